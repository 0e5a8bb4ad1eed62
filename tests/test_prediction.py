"""Predictions in a process that has neither the model's code nor what trained it."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from prune_jax.networks import network_for, read_network
from prune_jax.records import Run
from tests.plain import TRAIN, run_plain, tiny
from tests.samples import nets

MODULE = "nets_of_a_user"
ABSENT = ("flax", "orbax", "optax", "prefect", "tests", MODULE)
HOOK = f"""
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ImportError(name + " is not for this process")

sys.meta_path.insert(0, Absent())
"""


def without_them(folder, *arguments):
    """Runs Python in `folder` where nothing in ABSENT can be imported."""
    (folder / "hook").mkdir(exist_ok=True)
    (folder / "hook" / "sitecustomize.py").write_text(HOOK)
    environment = {**os.environ, "PYTHONPATH": str(folder / "hook")}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("name", ABSENT)
def test_the_process_can_import_none_of_them(tmp_path, name):
    (tmp_path / f"{name}.py").write_text("")
    found = without_them(tmp_path, "-c", f"import {name}")
    assert (found.returncode, found.stderr.splitlines()[-1]) == (1, f"ImportError: {name} is not for this process")


def test_predict_needs_neither_the_models_code_nor_what_trained_it(store, tmp_path, monkeypatch):
    (tmp_path / f"{MODULE}.py").write_text(Path(nets.__file__).read_text("utf-8"))
    monkeypatch.syspath_prepend(tmp_path)
    stages = {
        "train": TRAIN,
        "prune": {"kind": "prune", "criterion": "magnitude", "granularity": "group", "target": {"sparsity": 0.5}},
        "compact": {"kind": "compact"},
        "export": {"kind": "export", "formats": ["stablehlo"]},
    }
    plan, results = run_plain(tiny(model={"kind": f"{MODULE}:NnxNet"}, **stages), store)
    Run(plan, store, "tiny").finish(results)
    loaded = read_network(store, results["compact"].ref)
    network = network_for(plan.calls[0].problem, loaded.keep)
    x = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    apply = jax.jit(lambda v, x: network.apply(v.params, v.state, (x,), train=False, key=None)[0])
    expected = np.asarray(apply(loaded.variables, x))

    np.savez(tmp_path / "in.npz", x=x)
    script = Path(sys.executable).parent / "prune-jax"
    told = without_them(tmp_path, script, "predict", "tiny", "in.npz", "-o", "out.npz", "--store", store.root)
    assert (told.returncode, told.stdout, told.stderr) == (0, "out.npz: outputs [7, 3]\n", "")
    np.testing.assert_allclose(np.load(tmp_path / "out.npz")["outputs"], expected, rtol=1e-5, atol=1e-5)
