"""What the README shows as Python runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import pytest

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_every_block_is_found():
    assert len(BLOCKS) == README.count("```python") >= 1


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("block", BLOCKS, ids=[block.splitlines()[0] for block in BLOCKS])
def test_a_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    with jax.numpy_rank_promotion("allow"):  # as it is for users
        exec(compile(block, "README.md", "exec"), names)
    assert names.get("record", {"status": "completed"})["status"] == "completed"
