"""`prune_jax` as a library: the contract's examples, word for word, with no recipe, no Flax and no Prefect."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import prune_jax as pj
from prune_jax.trees import leaves_by_path

ROOT = Path(__file__).parents[1]

EXAMPLE = """
import jax, jax.numpy as jnp, optax
import prune_jax as pj

params = {"hidden": {"kernel": jnp.linspace(-1, 1, 12).reshape(3, 4), "bias": jnp.zeros(4)}}
batches = [{"x": jnp.ones((2, 3)), "y": jnp.ones((2, 4))}, {"x": jnp.full((2, 3), 2.0), "y": jnp.ones((2, 4))}]

def apply(params, x):
    return x @ params["hidden"]["kernel"] + params["hidden"]["bias"]

def loss_fn(params, batch):
    return jnp.mean((apply(params, batch["x"]) - batch["y"]) ** 2)

scores = pj.score("taylor", params, loss=loss_fn, batches=batches)
masks  = pj.mask(scores, sparsity=0.9, scope="global", granularity="weight")
params = pj.apply_masks(params, masks)
tx     = pj.masked(optax.adam(1e-3), masks)
state  = tx.init(params)
for batch in batches:
    updates, state = tx.update(jax.grad(loss_fn)(params, batch), state, params)
    params = optax.apply_updates(params, updates)
cost = pj.cost(apply, params, jnp.ones((1, 3)))

kernel = params["hidden"]["kernel"]
assert scores["hidden"]["kernel"].shape == (3, 4) and scores["hidden"]["bias"] is None
assert int(masks["hidden"]["kernel"].sum()) == 12 - round(0.9 * 12) == 1
assert int((kernel != 0).sum()) == 1 and not kernel[~masks["hidden"]["kernel"]].any()
biases = int((params["hidden"]["bias"] != 0).sum())
assert (cost.params, cost.nonzero, cost.macs, cost.effective_macs) == (16, 1 + biases, 12, 1)
assert cost.bytes == 16 * 4
"""
HEAVY = ("flax", "prefect", "orbax", "matplotlib", "onnx", "sklearn", "pydantic", "typer", "rich", "tensorstore")
ASK = f"\nimport sys\nprint(sorted(m for m in {HEAVY!r} if m in sys.modules))"


def python(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_contracts_example_runs_without_flax_and_prefect():
    assert python(EXAMPLE + ASK.replace("'pydantic', 'typer', ", "").replace("'rich', ", "")) == "[]"


def test_importing_costs_what_jax_costs():
    assert python("import prune_jax" + ASK) == "[]"


def test_names_are_there_and_listed():
    wanted = {"apply_masks", "cost", "mask", "masked", "run", "score"}
    assert wanted <= set(pj.__all__)
    assert wanted <= set(dir(pj))
    for name in pj.__all__:
        assert getattr(pj, name).__doc__


def test_a_name_that_is_not_there_is_told():
    with pytest.raises(AttributeError, match="module 'prune_jax' has no attribute 'sorce'"):
        pj.sorce  # noqa: B018


def test_a_submodule_does_not_hide_a_function():
    """`prune_jax.masks` and `prune_jax.costs` are modules, `pj.mask` and `pj.cost` functions, whatever came first."""
    code = "import prune_jax.costs, prune_jax.masks, prune_jax.scoring, prune_jax as pj\n"
    assert python(code + "print(callable(pj.cost), callable(pj.mask), callable(pj.score))") == "True True True"


@jax.tree_util.register_dataclass
@dataclass
class Layer:
    kernel: jax.Array
    bias: jax.Array


W, B = jnp.arange(12.0).reshape(3, 4), jnp.ones(4)
PYTREES = {
    "linen": ({"params": {"Dense_0": {"kernel": W, "bias": B}}}, ["params/Dense_0/kernel"]),
    "lists": ([W, (B, W)], ["0", "1/1"]),
    "nnx": (nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0))), ["kernel"]),
    "dataclass": (Layer(W, B), ["kernel"]),
    "array": (W, [""]),
}


@pytest.mark.parametrize("kind", PYTREES)
def test_params_are_any_pytree(kind):
    params, paths = PYTREES[kind]
    masks = pj.mask(pj.score("magnitude", params), sparsity=0.5)
    pruned = pj.apply_masks(params, masks)
    assert jax.tree.structure(pruned) == jax.tree.structure(params)
    assert [path.removesuffix("/value") for path in leaves_by_path(masks)] == paths
    total = 12 * len(paths)
    assert sum(int(m.sum()) for m in jax.tree.leaves(masks)) == total - round(total / 2)
    zeros = sum(int((w == 0).sum()) for w in jax.tree.leaves(pruned) if w.ndim == 2)
    assert zeros >= round(total / 2)


@pytest.mark.usefixtures("prefect_server")
def test_run_answers_the_record(tmp_path):
    from tests.plain import tiny

    record = pj.run(tiny(), store=tmp_path / "artifacts")
    assert record["status"] == "completed"
    assert set(record["results"]) == {"train", "prune"}
    assert pj.run(tiny(), store=str(tmp_path / "artifacts"))["results"] == record["results"]


def test_run_refuses_kindly(tmp_path):
    from prune_jax.errors import UserMistake

    with pytest.raises(UserMistake, match="no such file and no built-in recipe; did you mean 'xor'"):
        pj.run("xorr", store=tmp_path / "store")
    with pytest.raises(UserMistake, match="runner = 'fast': is not known"):
        pj.run("xor", store=tmp_path / "store", runner="fast")
    assert not (tmp_path / "store").exists()
