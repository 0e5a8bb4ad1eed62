"""The guides as a new user follows them: files are written under their names, Python runs, recipes are checked."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest

from prune_jax.preparation import check_networks, prepare
from prune_jax.recipe import read_recipe

DOCS = Path(__file__).parents[1] / "docs"
GUIDES = ("cluster", "your_own_model", "your_own_method", "when_a_run_fails")
BLOCK = re.compile(r"^```(python|yaml)\n# (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(guide):
    """Kind, file and text of each block, in order."""
    return BLOCK.findall((DOCS / f"{guide}.md").read_text("utf-8"))


def wanted(text):
    """Whether what a block imports is installed: Equinox is nobody's dependency."""
    return "equinox" not in text or find_spec("equinox") is not None


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to stand in, whose modules nobody else sees."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if (tmp_path / f"{name}.py").exists():
            del sys.modules[name]


def test_every_block_is_found():
    for guide in GUIDES:
        text = (DOCS / f"{guide}.md").read_text("utf-8")
        assert len(blocks(guide)) == text.count("```python") + text.count("```yaml"), guide
    assert sum(len(blocks(guide)) for guide in GUIDES) >= 8


@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide_can_be_followed(guide, folder):
    for kind, file, text in blocks(guide):
        (folder / file).write_text(text)
        if kind == "yaml":
            check_networks(prepare(read_recipe(file)))
        elif wanted(text):
            importlib.invalidate_caches()
            with jax.numpy_rank_promotion("allow"):  # as it is for users
                importlib.import_module(Path(file).stem)


def test_a_model_of_equinox_is_a_network(folder):
    pytest.importorskip("equinox")
    from prune_jax.models import build

    text = next(text for _, file, text in blocks("your_own_model") if file == "my_equinox.py")
    (folder / "my_equinox.py").write_text(text)
    network = build("my_equinox:mlp", {}, inputs=(jax.ShapeDtypeStruct((1, 4), "float32"),), outputs=3)
    shapes = jax.eval_shape(network.init, jax.random.key(0)).params
    assert shapes["layers"]["0"]["weight"].shape == (16, 4)


@pytest.mark.slow
@pytest.mark.parametrize("guide", ["your_own_model", "your_own_method"])
def test_the_commands_run_in_a_fresh_folder(guide, tmp_path):
    for kind, file, text in blocks(guide):
        (tmp_path / file).write_text(text)
        if file == "convert.py":
            subprocess.run([sys.executable, file], cwd=tmp_path, check=True)
        if kind == "yaml":
            command = [sys.executable, "-c", "from prune_jax.cli import main; main()", "run", file]
            ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert ended.returncode == 0, ended.stdout + ended.stderr
            assert f"record: artifacts/runs/{Path(file).stem.replace('my', 'mine')}/run.json" in ended.stdout
