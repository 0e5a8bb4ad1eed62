"""Layers pruned one after the other, in functions and recipes, against what each layer sees by numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import prune_jax as pj
from prune_jax.errors import UserMistake
from prune_jax.layers import visit
from prune_jax.networks import mean_loss
from prune_jax.problems import dataset_of, network_of
from prune_jax.surgeon import solve
from prune_jax.trees import nest
from tests.plain import EVALUATE, TRAIN, arrays, part, run_plain, tiny
from tests.zoo import Make

make = Make()
WORDS = {
    "window_strides": (2, 1),
    "padding": [(1, 2), (0, 1)],
    "rhs_dilation": (1, 2),
    "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
    "feature_group_count": 2,
}
PARAMS = {"conv": make(2, 3, 2, 6), "heads": make(3, 96, 5), "twice": make(5, 5)}
BATCHES = [make(4, 6, 7, 4), make(2, 6, 7, 4)]


def convolved(p, x):
    return lax.conv_general_dilated(x, p["conv"], **WORDS)


def hidden(p, x):
    return jax.nn.gelu(convolved(p, x)).reshape(len(x), -1)


def loss(p, x):
    h = jnp.einsum("nd,hdk->nhk", hidden(p, x), p["heads"])
    return jnp.mean(jnp.tanh(jax.nn.silu(h) @ p["twice"]) @ p["twice"])


def test_layers_see_what_the_changed_layers_before_them_answer():
    """X^T X of patches against JAX's own; of others by numpy; the kernel as a matrix gives the same product."""
    seen = {}

    def double(layer):
        seen[layer.path] = layer
        np.testing.assert_array_equal(layer.leaf(layer.w), PARAMS[layer.path])
        return 2 * layer.w

    found = visit(double, loss, PARAMS, BATCHES, list(PARAMS))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), found, PARAMS)
    assert list(seen) == ["conv", "heads", "twice"]
    x = jnp.concatenate(BATCHES)
    words = {k: v for k, v in WORDS.items() if k not in ("feature_group_count", "window_strides", "padding")}
    patches = lax.conv_general_dilated_patches(x, (2, 3), (2, 1), WORDS["padding"], **words)
    rows = patches.reshape(-1, 2, 2, 6).transpose(1, 0, 3, 2).reshape(2, -1, 12)  # [groups, rows, positions x inputs]
    wanted = np.einsum("gti,gtj->gij", rows, rows) / 6
    np.testing.assert_allclose(seen["conv"].products[0], wanted, rtol=1e-4, atol=1e-4)
    answer = np.einsum("gti,gio->tgo", rows, seen["conv"].w).reshape(-1, 6)
    np.testing.assert_allclose(answer, np.asarray(convolved(PARAMS, x)).reshape(-1, 6), atol=1e-4)
    h = np.asarray(hidden({"conv": 2 * PARAMS["conv"]}, x), np.float64)
    np.testing.assert_allclose(seen["heads"].products[0][0], h.T @ h / 6, rtol=1e-4, atol=1e-3)
    g = np.einsum("nd,hdk->nhk", h, 2 * np.asarray(PARAMS["heads"], np.float64))
    a = (g / (1 + np.exp(-g))).reshape(-1, 5)
    b = np.tanh(a @ np.asarray(PARAMS["twice"], np.float64))
    np.testing.assert_allclose(seen["twice"].products[0][0], (a.T @ a + b.T @ b) / 6, rtol=1e-3, atol=1e-3)


def mlp(p, x):
    return jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]


def test_masks_are_those_of_the_layers_solved_by_hand_and_two_rounds_keep_what_is_dead():
    rng = np.random.default_rng(0)
    params = {"a": {"kernel": make(8, 6)}, "b": {"kernel": make(6, 4)}}
    x = jnp.asarray(rng.standard_normal((30, 8)) @ rng.standard_normal((8, 8)), jnp.float32)
    words = {"loss": lambda p, x: jnp.sum(mlp(p, x)), "batches": [x[:20], x[20:]]}
    found, masks = pj.sparsegpt(params, sparsity=0.5, **words)
    mask, first = solve(params["a"]["kernel"], x.T @ x / 30, prune=24)
    h = jnp.tanh(x @ first)
    second, last = solve(params["b"]["kernel"], h.T @ h / 30, prune=12)
    np.testing.assert_array_equal(masks["a"]["kernel"], mask)
    np.testing.assert_array_equal(masks["b"]["kernel"], second)
    np.testing.assert_allclose(found["b"]["kernel"], last, rtol=1e-3, atol=1e-4)
    again, newer = pj.sparsegpt(found, sparsity=0.75, alive=masks, **words)
    for name, dying in (("a", 36), ("b", 18)):
        assert (~newer[name]["kernel"]).sum() == dying
        assert not (newer[name]["kernel"] & ~masks[name]["kernel"]).any()
        assert not again[name]["kernel"][~newer[name]["kernel"]].any()
    given = pj.compensate("sparsegpt", params, masks, **words)
    moved = solve(params["a"]["kernel"], x.T @ x / 30, mask=mask)[1]
    np.testing.assert_allclose(given["a"]["kernel"], moved, atol=1e-4)


def test_what_is_no_kernel_is_refused():
    words = {"batches": [jnp.zeros((2,), jnp.int32)], "sparsity": 0.5}
    with pytest.raises(UserMistake, match=r"'table' is no kernel whose inputs .*: it goes into 'gather'. Leave"):
        pj.sparsegpt({"table": make(4, 3)}, loss=lambda p, x: jnp.sum(p["table"][x]), **words)
    both = lambda p, x: jnp.sum(x @ p["w"] @ p["w"].T)  # noqa: E731
    with pytest.raises(UserMistake, match="'w' is summed over in several ways: leave it dense"):
        pj.sparsegpt({"w": make(4, 4)}, loss=both, batches=[make(2, 4)], sparsity=0.5)


PRUNE = {"kind": "prune", "criterion": {"name": "sparsegpt", "batches": 5}, "target": {"sparsity": 0.5}}


def test_a_recipe_prunes_layer_by_layer_in_rounds(store):
    prune = {**PRUNE, "scope": "layer", "schedule": {"kind": "iterative", "rounds": 2}}
    plan, results = run_plain(tiny(train=TRAIN, prune=prune, evaluate=EVALUATE), store)
    call = plan.calls[0]
    split = dict(dataset_of(call.problem).train)
    batches = [jax.tree.map(lambda a, i=i: a[i : i + 9], split) for i in range(0, len(split["x"]), 9)]
    words = {"loss": mean_loss(network_of(call.problem), "classification", {}), "batches": batches}
    params, masks = nest(part(arrays(store, results["train"]), "params")), None
    for turn, sparsity in (("prune.1.mask", 0.292893), ("prune.2.mask", 0.5)):
        flat = arrays(store, results[turn])
        params, masks = pj.sparsegpt(params, sparsity=sparsity, alive=masks, **words)
        for path, mask in part(flat, "masks").items():
            name, leaf = path.split("/")
            np.testing.assert_array_equal(mask, masks[name][leaf])
            np.testing.assert_allclose(part(flat, "params")[path], params[name][leaf], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("granularity", "word"), [("neuron", "weight, n:m"), ("group", "weight, n:m")])
def test_coarser_units_are_refused_when_the_recipe_is_read(store, granularity, word):
    with pytest.raises(UserMistake, match=f"granularity '?{granularity}'? is not possible here .allowed: {word}"):
        run_plain(tiny(train=TRAIN, prune={**PRUNE, "granularity": granularity}), store)


DIGITS = [({"kind": "mlp", "widths": [100, 50]}, 0.7), ({"kind": "cnn"}, 0.5)]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "sparsity"), DIGITS, ids=["mlp", "lenet-5"])
def test_one_shot_without_fine_tuning_it_beats_magnitude_on_digits(store, model, sparsity):
    """In each layer the same share, over three seeds: at most half of the loss that magnitude adds."""
    stages = {"train": {"kind": "train", "epochs": 10, "optimizer": {"learning_rate": 0.003}}}
    for name in ("magnitude", "sparsegpt"):
        target = {"sparsity": sparsity}
        stages[name] = {"kind": "prune", "after": "train", "criterion": name, "scope": "layer", "target": target}
    stages["evaluate"] = {"kind": "evaluate", "of": list(stages), "latency": None}
    added = {"magnitude": [], "sparsegpt": []}
    for seed in range(3):
        raw = {**tiny(model=model, **stages), "data": {"source": "digits", "batch_size": 64}, "seed": seed}
        _, results = run_plain(raw, store)
        losses = {n: results["evaluate"].metrics[results[n].key]["loss"] for n in ("train", *added)}
        for name in added:
            added[name].append(losses[name] - losses["train"])
    assert sum(added["sparsegpt"]) < sum(added["magnitude"]) / 2


@pytest.mark.slow
@pytest.mark.parametrize(("path", "axis"), [("conv", -2), ("conv", 1), ("heads", -2), ("heads", 2)], ids=str)
def test_n_of_m_holds_along_any_axis_of_any_layout(path, axis):
    """1:2 along the inputs and positions of a grouped convolution, and along inputs and widths of heads."""
    params = {"conv": PARAMS["conv"], "heads": make(3, 96, 4)}
    only = lambda p, x: jnp.sum(jnp.einsum("nd,hdk->nhk", hidden(p, x), p["heads"]))  # noqa: E731
    unit = {"n_m": "1:2", "axis": axis}
    found, masks = pj.sparsegpt(params, loss=only, batches=BATCHES, granularity=unit, prunable=[path])
    mask = np.moveaxis(np.asarray(masks[path]), axis, -1)
    for start in range(0, mask.shape[-1] - 1, 2):
        assert (mask[..., start : start + 2].sum(axis=-1) == 1).all()
    dead = ~np.asarray(masks[path])
    assert not np.asarray(found[path])[dead].any()
    assert np.any(np.asarray(found[path])[~dead] != np.asarray(params[path])[~dead])


def test_axes_that_cannot_be_followed_are_refused():
    words = {"loss": loss, "batches": BATCHES, "prunable": ["conv"]}
    with pytest.raises(UserMistake, match=r"axis -1 of 'conv' \[2, 3, 2, 6\] cuts across the products with it"):
        pj.sparsegpt(PARAMS, granularity={"n_m": "1:2", "axis": -1}, **words)


def test_where_nothing_is_to_die_nothing_changes():
    moved = visit(lambda layer: 0 * layer.w, loss, PARAMS, BATCHES, [])
    jax.tree.map(np.testing.assert_array_equal, moved, PARAMS)


def test_outputs_lose_their_share_whatever_others_have_lost():
    earlier = np.ones((10, 6), bool)
    earlier[:9, :2] = False
    words = {"loss": lambda p, x: jnp.mean(x @ p["a"]), "batches": [make(40, 10)], "scope": "output"}
    _, masks = pj.sparsegpt({"a": make(10, 6)}, sparsity=0.5, alive={"a": earlier}, **words)
    np.testing.assert_array_equal((~masks["a"]).sum(axis=0), [9, 9, 5, 5, 5, 5])
    assert not (masks["a"] & ~earlier).any()
