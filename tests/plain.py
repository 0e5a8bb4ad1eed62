"""Recipes of a few steps, and the plain loop that carries them out without Prefect."""

from __future__ import annotations

import numpy as np

from prune_jax.errors import PruneError
from prune_jax.preparation import check_networks, prepare
from prune_jax.recipe import Ref, read_recipe
from prune_jax.stages import run_stage
from prune_jax.trees import leaves_by_path
from prune_jax.walk import failure, walk

TRAIN = {"kind": "train", "steps": 8, "optimizer": {"learning_rate": 0.01}}
PRUNE = {"kind": "prune", "criterion": "magnitude", "target": {"sparsity": 0.5}}
EVALUATE = {"kind": "evaluate", "of": ["train", "prune"], "latency": None}


def tiny(data="blobs", *, model=None, objective="classification", validation=0.2, **stages):
    """A recipe on made-up data; `data` is a function of `tests.samples.tiny`.

    Two devices do not divide its batches of 9: programs for one compile quicker.
    """
    return {
        "name": "tiny",
        "data": {"source": f"tests.samples.tiny:{data}", "batch_size": 9, "validation": validation},
        "model": model or {"kind": "mlp", "widths": [6]},
        "objective": objective,
        "stages": stages or {"train": TRAIN, "prune": PRUNE, "evaluate": EVALUATE},
    }


def run_plain(raw, store, *, name_failures=True):
    """Plans, checks and walks a recipe; answers the plan and the results by name."""
    plan = prepare(read_recipe(raw))
    check_networks(plan)

    def submit(call, done):
        try:
            done(run_stage(call, store))
        except PruneError as error:
            done(failure(call, error))

    results = walk(plan, store, submit)
    if name_failures:
        assert all(r.good for r in results.values()), [r.message for r in results.values() if not r.good]
    return plan, results


def arrays(store, result):
    """The arrays of an artifact by path: `params/hidden_0/kernel`."""
    return leaves_by_path(store.read(Ref(result.kind, result.key))[0])


def part(flat, name):
    """The arrays below one name, without it."""
    return {path.removeprefix(f"{name}/"): a for path, a in flat.items() if path.startswith(f"{name}/")}


def same_bytes(a, b):
    """Asserts that two dicts of arrays are equal bit for bit."""
    assert list(a) == list(b)
    for path in a:
        assert (a[path].dtype, a[path].shape) == (b[path].dtype, b[path].shape), path
        assert np.asarray(a[path]).tobytes() == np.asarray(b[path]).tobytes(), path
