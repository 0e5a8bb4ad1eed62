"""Solvers against explicit inverses and the constrained quadratic itself, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prune_jax as pj
from prune_jax.blocks import cut, grid, join
from prune_jax.criteria.solvers import surgeon
from prune_jax.errors import UserMistake
from prune_jax.networks import mean_loss
from prune_jax.problems import dataset_of, network_of
from prune_jax.statistics import gather
from tests.compiling import compilations
from tests.plain import EVALUATE, TRAIN, arrays, part, run_plain, tiny

DAMPENING = 1e-2


def dense(params, x):
    return jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"][None]) @ params["out"]["kernel"]


def convolved(params, x):
    strides = dict(window_strides=(1, 1), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    h = jnp.tanh(jax.lax.conv_general_dilated(x, params["in"]["kernel"], **strides))
    return jnp.mean(h, axis=(1, 2)) @ params["out"]["kernel"]


def case(name):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    if name == "dense":
        apply, size = dense, (7,)
        params = {"in": {"kernel": draw(7, 4), "bias": draw(4)}, "out": {"kernel": draw(4, 2)}}
    else:
        apply, size = convolved, (5, 5, 2)
        params = {"in": {"kernel": draw(3, 3, 2, 4)}, "out": {"kernel": draw(4, 2)}}
    batches = [{"x": np.asarray(draw(n, *size)), "y": np.asarray(draw(n, 2))} for n in (6, 6, 3)]

    def loss(params, batch):
        return jnp.mean(jnp.sum(jnp.square(apply(params, batch["x"]) - batch["y"]), axis=1)) / 2

    return params, loss, batches


def gradients(params, loss, batches):
    """Those of single examples, by leaf `[examples, ...]`."""
    one_by_one = [jax.tree.map(lambda a, i=i: a[i : i + 1], b) for b in batches for i in range(len(b["x"]))]
    found = [jax.grad(loss)(params, example) for example in one_by_one]
    return {name: np.stack([np.asarray(g[name]["kernel"], np.float64) for g in found]) for name in params}


def pieces(shape, block):
    """Blocks as lists of places in the flat leaf: the inputs of each output, in even pieces."""
    outputs = shape[-1]
    for output in range(outputs):
        places = np.arange(int(np.prod(shape)))[output::outputs]
        size = -(-len(places) // -(-len(places) // block))
        yield from (places[i : i + size] for i in range(0, len(places), size))


def fisher(g, places, dampening=DAMPENING):
    flat = g.reshape(len(g), -1)[:, places]
    products = flat.T @ flat / len(flat)
    return products + dampening * np.diag(products).max() * np.eye(len(places))


@pytest.mark.parametrize("block", [64, 3, 1])
@pytest.mark.parametrize("shape", [(7, 4), (3, 3, 2, 4), (5,)], ids=str)
def test_blocks_come_back(shape, block):
    leaf = jnp.arange(np.prod(shape)).reshape(shape) + 1
    blocks = cut(leaf, block)
    assert blocks.shape == grid(shape, block)
    assert blocks.shape[2] <= block
    np.testing.assert_array_equal(join(blocks, shape), leaf)
    if len(shape) > 1:
        found = [sorted(b[b > 0]) for b in np.asarray(blocks).reshape(-1, blocks.shape[2])]
        assert found == [list(p + 1) for p in pieces(shape, block)]


CASES = [
    ("convolution", 3),
    ("dense", 64),
    pytest.param("dense", 3, marks=pytest.mark.slow),
    pytest.param("convolution", 64, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "block"), CASES)
def test_scores_agree_with_the_inverse_of_the_dampened_fisher(name, block):
    params, loss, batches = case(name)
    options = {"block": block, "dampening": DAMPENING}
    scores = pj.score("woodfisher", params, loss=loss, batches=iter(batches), options=options)
    for leaf, g in gradients(params, loss, batches).items():
        w = np.asarray(params[leaf]["kernel"], np.float64)
        wanted = np.zeros(w.size)
        for places in pieces(w.shape, block):
            wanted[places] = w.ravel()[places] ** 2 / (2 * np.diag(np.linalg.inv(fisher(g, places))))
        np.testing.assert_allclose(scores[leaf]["kernel"].ravel(), wanted, rtol=2e-3)


def constrained(A, w, dead):
    """min d^T A d / 2 subject to w + d = 0 on `dead`, by its Lagrangian."""
    E = np.eye(len(w))[dead]
    system = np.block([[A, E.T], [E, np.zeros((len(E), len(E)))]])
    return w + np.linalg.solve(system, np.concatenate([np.zeros(len(w)), -w[dead]]))[: len(w)]


@pytest.mark.parametrize(("name", "block"), CASES)
def test_survivors_solve_the_constrained_quadratic(name, block):
    params, loss, batches = case(name)
    params["in"]["kernel"] = params["in"]["kernel"].at[..., 0, 1].set(0)  # dead since an earlier round
    options = {"block": block, "dampening": DAMPENING}
    words = {"loss": loss, "batches": batches, "options": options}
    masks = pj.mask(pj.score("woodfisher", params, **words), sparsity=0.4, min_keep=1)
    found = pj.compensate("woodfisher", params, masks, **words)
    for leaf, g in gradients(params, loss, batches).items():
        w, alive = np.asarray(params[leaf]["kernel"], np.float64), np.asarray(masks[leaf]["kernel"])
        assert alive.ravel()[w.ravel() == 0].sum() == 0, "what is zero dies first"
        wanted = np.zeros(w.size)
        for places in pieces(w.shape, block):
            wanted[places] = constrained(fisher(g, places), w.ravel()[places], ~alive.ravel()[places])
        result = np.asarray(found[leaf]["kernel"])
        assert not result[~alive].any()
        np.testing.assert_allclose(result.ravel(), wanted, rtol=2e-3, atol=1e-4)
    if name == "dense":
        assert found["in"]["bias"] is params["in"]["bias"]


def test_one_removal_costs_what_its_score_says():
    """d^T (F + dampening) d / 2 of the best correction is w^2 / (2 [F^-1]_ii)."""
    params, loss, batches = case("dense")
    words = {"loss": loss, "batches": batches, "options": {"dampening": DAMPENING}}
    scores = pj.score("woodfisher", params, **words)
    masks = pj.mask(scores, keep=28 + 8 - 1)
    (dead,) = np.argwhere(~np.asarray(masks["in"]["kernel"]))
    moved = np.asarray(pj.compensate("woodfisher", params, masks, **words)["in"]["kernel"] - params["in"]["kernel"])
    A = fisher(gradients(params, loss, batches)["in"][:, :, dead[1]], np.arange(7))
    d = moved[:, dead[1]]
    np.testing.assert_allclose(d @ A @ d / 2, scores["in"]["kernel"][tuple(dead)], rtol=1e-3)
    assert not np.delete(moved, dead[1], axis=1).any()


def test_a_twin_takes_over():
    """Where two inputs are alike, the one that is left does the work of both, and the loss stays."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((40, 4)).astype(np.float32)
    x[:, 3] = x[:, 0]
    params = {"kernel": jnp.asarray(rng.standard_normal((4, 3)), jnp.float32)}
    noise = rng.standard_normal((40, 3)).astype(np.float32)
    batches = [{"x": x, "y": x @ np.asarray(params["kernel"]) + noise}]
    words = {"loss": lambda p, b: jnp.mean(jnp.square(b["x"] @ p["kernel"] - b["y"])), "batches": batches}
    scores = pj.score("woodfisher", params, **words)["kernel"] / jnp.square(params["kernel"])
    assert scores[jnp.array([0, 3])].max() < scores[1:3].min() / 10
    masks = {"kernel": jnp.ones((4, 3), bool).at[0].set(False)}
    found = pj.compensate("woodfisher", params, masks, **words)["kernel"]
    np.testing.assert_allclose(found[3], params["kernel"][0] + params["kernel"][3], atol=0.02)
    np.testing.assert_allclose(found[1:3], params["kernel"][1:3], atol=0.02)


def test_types_are_kept_jit_equals_eager_and_a_second_call_compiles_nothing():
    params, loss, batches = case("dense")
    low = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    masks = pj.mask(pj.score("magnitude", params), sparsity=0.5)
    words = {"loss": loss, "batches": batches}
    for given in (params, low):
        found = pj.compensate("woodfisher", given, masks, **words)
        assert jax.tree.map(lambda w: (w.shape, w.dtype), found) == jax.tree.map(lambda w: (w.shape, w.dtype), given)
    newer = jax.tree.map(lambda w: 2 * w, params)
    with compilations() as seconds:
        found = pj.compensate("woodfisher", newer, masks, **words)["in"]["kernel"]
    assert not seconds
    stats = gather({"fisher_blocks"}, loss, newer, batches, prunable=["in/kernel"])
    alone = {"in": {"kernel": newer["in"]["kernel"], "bias": None}, "out": {"kernel": None}}
    kept = {**masks, "out": {"kernel": None}}
    np.testing.assert_allclose(surgeon(alone, stats, kept)["in"]["kernel"], found, rtol=1e-3, atol=1e-5)


def test_products_take_as_many_numbers_as_weights_times_block():
    params, loss, batches = case("dense")
    found = gather({"fisher_blocks"}, loss, params, batches, prunable=["in/kernel"], block=3).fisher_blocks
    assert found["in"]["kernel"].shape == (4, 3, 3, 3)
    assert found["out"]["kernel"] is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("fisher",),
            "criterion 'fisher' does not correct the survivors: choose woodfisher, sparsegpt, or apply_masks.",
        ),
        (("woodfisher", {"dampening": 0}), "criterion 'woodfisher': dampening = 0 must be a number above 0"),
        (("woodfisher", {"block": 2.5}), "criterion 'woodfisher': block = 2.5 must be a whole number from 1 on"),
    ],
    ids=["no solver", "dampening", "block"],
)
def test_mistakes(names, message):
    params, loss, batches = case("dense")
    name, options = (*names, {})[:2]
    masks = pj.mask(pj.score("magnitude", params), sparsity=0.5)
    with pytest.raises(UserMistake) as caught:
        pj.compensate(name, params, masks, loss=loss, batches=batches, options=options)
    assert str(caught.value) == message


PRUNE = {"kind": "prune", "criterion": {"name": "woodfisher", "batches": 5}, "target": {"sparsity": 0.5}}


def test_a_recipe_corrects_the_survivors(store):
    prune = {**PRUNE, "schedule": {"kind": "iterative", "rounds": 2}}
    _, results = run_plain(tiny(train=TRAIN, prune=prune, evaluate=EVALUATE), store)
    call = run_plain(tiny(train=TRAIN, prune=prune, evaluate=EVALUATE), store)[0].calls[0]
    rows = [slice(i * 9, (i + 1) * 9) for i in range(5)]
    batches = [jax.tree.map(lambda a, r=r: a[r], dict(dataset_of(call.problem).train)) for r in rows]
    loss = mean_loss(network_of(call.problem), "classification", {})
    before = part(arrays(store, results["train"]), "params")
    for turn in ("prune.1.mask", "prune.2.mask"):
        flat = arrays(store, results[turn])
        after, masks = part(flat, "params"), part(flat, "masks")
        wanted = pj.compensate("woodfisher", nested(before), nested(masks), loss=loss, batches=batches)
        for path, mask in masks.items():
            name, leaf = path.split("/")
            np.testing.assert_allclose(after[path], wanted[name][leaf], rtol=1e-5, atol=1e-6)
            assert not after[path][~mask].any()
            assert np.any(after[path][mask] != before[path][mask])
        assert sum(int(mask.sum()) for mask in masks.values()) == (21 if turn == "prune.2.mask" else 30)
        before = after


def nested(flat):
    tree = {}
    for path, leaf in flat.items():
        name, last = path.split("/")
        tree.setdefault(name, {})[last] = leaf
    return tree


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["2:4", {"block": [1, 2]}, "kernel"], ids=str)
def test_recipes_of_coarser_units_do_too(store, granularity):
    prune = {**PRUNE, "granularity": granularity, "exclude": ["output"] if granularity == "2:4" else []}
    if granularity == "2:4":
        prune.pop("target")
    _, results = run_plain(tiny(train=TRAIN, prune=prune, evaluate=EVALUATE), store)
    trained, flat = part(arrays(store, results["train"]), "params"), arrays(store, results["prune"])
    mask = part(flat, "masks")["hidden_0/kernel"]
    assert mask.sum() == (12 if granularity == "2:4" else mask.sum())
    w = part(flat, "params")["hidden_0/kernel"]
    assert not w[~mask].any()
    assert np.any(w[mask] != trained["hidden_0/kernel"][mask])


@pytest.mark.parametrize("granularity", ["neuron", "group", "layer"])
def test_units_that_leave_nothing_to_correct_are_refused_when_the_recipe_is_read(store, granularity):
    with pytest.raises(UserMistake, match=f"granularity '?{granularity}'? is not possible here .allowed: weight, n:m"):
        run_plain(tiny(train=TRAIN, prune={**PRUNE, "granularity": granularity}), store)


@pytest.mark.slow
def test_a_trained_network_loses_less_than_under_plain_masks(store):
    """On handwritten digits, at 75 % sparsity without fine-tuning, the loss rises less than half as much."""
    model = {"kind": "mlp", "widths": [32]}
    train = {"kind": "train", "epochs": 10, "optimizer": {"learning_rate": 0.003}}
    raw = {**tiny(model=model, train=train, prune={**PRUNE, "criterion": "woodfisher", "target": {"sparsity": 0.75}})}
    raw["data"] = {"source": "digits", "batch_size": 64}
    plan, results = run_plain(raw, store)
    trained, flat = part(arrays(store, results["train"]), "params"), arrays(store, results["prune"])
    solved, masks = part(flat, "params"), part(flat, "masks")
    loss, split = (
        mean_loss(network_of(plan.calls[0].problem), "classification", {}),
        dataset_of(plan.calls[0].problem).train,
    )
    plain = {path: w * masks[path] if path in masks else w for path, w in trained.items()}
    before, masked, corrected = (float(loss(nested(tree), split)) for tree in (trained, plain, solved))
    assert corrected - before < (masked - before) / 2
