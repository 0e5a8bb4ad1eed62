"""One harness over every criterion, at every granularity that it claims; each one's own oracle stands elsewhere."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prune_jax as pj
from prune_jax.criteria import CRITERIA
from prune_jax.errors import UserMistake
from prune_jax.group_scoring import score_groups
from prune_jax.notation import FAMILIES, listed
from prune_jax.preparation import prepare
from prune_jax.recipe import read_recipe
from prune_jax.trees import leaves_by_path
from tests.compiling import compilations
from tests.plain import TRAIN, tiny

WRITTEN = {"n:m": "2:4", "block": {"block": [2, 2]}}
FINE = ("weight", "n:m", "block", "kernel", "neuron")
QUICK = ("magnitude", "taylor", "bn_scale")  # the others take a second or more each to compile


def claimed(*granularities):
    pairs = [(n, g) for n in CRITERIA for g in granularities if g in CRITERIA[n].granularities]
    return [pytest.param(n, g, marks=[] if n in QUICK else pytest.mark.slow) for n, g in pairs]


OF_LEAVES, WIRED = claimed(*FINE), claimed("group", "layer")
DRAWN = [name for name in CRITERIA if CRITERIA[name].stochastic]
ORDER = np.array([2, 0, 3, 1])  # of the hidden units
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def conv_net(p, x):
    h = jax.lax.conv_general_dilated(x, p["conv"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jax.nn.relu(h).mean((1, 2)) @ p["out"]


def blocks(p, x):
    """Heads, then a hidden layer behind a norm's scale, each added to what it was made of."""
    x = x @ p["in"]
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p["heads"][name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    x = x + jnp.einsum("bhqk,bkhd,hde->bqe", weights, v, p["heads"]["o"])
    h = jax.nn.relu((x @ p["mlp"]["u"]) * p["mlp"]["norm"]["scale"][None, None])
    x = x + h @ p["mlp"]["d"]
    return x.mean(1) @ p["out"]


CONV = {"conv": draw(2, 2, 4, 4), "out": draw(4, 3)}
BLOCKS = {
    "in": draw(3, 4),
    "heads": {**{name: draw(4, 2, 3) for name in "qkv"}, "o": draw(2, 3, 4)},
    "mlp": {"u": draw(4, 4), "norm": {"scale": 1 + 0.1 * draw(4)}, "d": draw(4, 4)},
    "out": draw(4, 3),
}
NETWORKS = {"conv": (conv_net, CONV, (3, 3, 4)), "blocks": (blocks, BLOCKS, (2, 3))}
LABELS = [np.arange(n) % 3 for n in (6, 6)]


def of(network):
    apply, params, shape = NETWORKS[network]

    def loss(p, batch):
        each = jax.nn.log_softmax(apply(p, batch["x"]))
        return -jnp.mean(jnp.sum(each * jax.nn.one_hot(batch["y"], 3), axis=1))

    def correct(p, batch):
        return jnp.argmax(apply(p, batch["x"]), axis=1) == batch["y"]

    return apply, params, loss, correct, [{"x": np.asarray(draw(len(y), *shape)), "y": y} for y in LABELS]


MADE = {network: of(network) for network in NETWORKS}
NET = pj.trace(blocks, BLOCKS, MADE["blocks"][4][0]["x"])


def permuted(params):
    """The same function with its hidden units in another order."""
    if "conv" in params:
        return {"conv": params["conv"][..., ORDER], "out": params["out"][ORDER]}
    mlp = params["mlp"]
    mlp = {"u": mlp["u"][:, ORDER], "norm": {"scale": mlp["norm"]["scale"][ORDER]}, "d": mlp["d"][ORDER]}
    return {**params, "mlp": mlp}


def scored(name, params, granularity, key=KEY):
    if granularity in ("group", "layer"):
        apply, _, loss, correct, batches = MADE["blocks"]
        given = {"loss": loss, "correct": correct, "batches": batches, "apply": apply, "inputs": batches[0]["x"]}
        kinds = "layer" if granularity == "layer" else ()
        return score_groups(NET, CRITERIA[name], params, kinds=kinds, key=key, **given)
    apply, _, loss, _, batches = MADE["conv"]
    given = {"loss": loss, "batches": batches, "apply": apply, "inputs": batches[0]["x"]}
    scores = pj.score(name, params, granularity=WRITTEN.get(granularity, granularity), key=key, **given)
    return {path: np.asarray(leaf) for path, leaf in leaves_by_path(scores).items()}


def units_of(leaf, granularity):
    """What has a score of its own, by hand: one entry for each unit, all of whose weights lie along the last axis."""
    leaf = np.asarray(leaf)
    if granularity in ("weight", "n:m"):
        return leaf[..., None]
    if granularity == "neuron":
        return np.moveaxis(leaf.reshape(-1, leaf.shape[-1]), 0, -1)
    if granularity == "kernel":
        return np.moveaxis(leaf.reshape(-1, *leaf.shape[-2:]), 0, -1)
    *before, rows, columns = leaf.shape
    padded = np.pad(leaf, [(0, 0)] * len(before) + [(0, rows % 2), (0, columns % 2)], mode="edge")
    cut = padded.reshape(*before, -(-rows // 2), 2, -(-columns // 2), 2)
    return np.moveaxis(cut, -3, -2).reshape(*cut.shape[:-3], cut.shape[-2], 4)


def reordered(scores, granularity):
    """What permuting the hidden units makes of the scores of units that they hold alone."""
    if granularity == "layer":
        return scores
    if granularity == "group":
        hidden = [name for name in scores if any(path == "mlp/u" and d == 1 for path, d, _ in NET.groups[name].members)]
        return {**scores, **{name: scores[name][ORDER] for name in hidden}}
    rows = slice(None) if granularity == "neuron" else ORDER
    return {"conv": scores["conv"][..., ORDER], "out": scores["out"][rows]}


@pytest.mark.parametrize(("name", "granularity"), OF_LEAVES + WIRED)
def test_scores(name, granularity):
    """Shape, type, finite; a second call compiles nothing; permuted units have permuted scores."""
    params = BLOCKS if granularity in ("group", "layer") else CONV
    scores = scored(name, params, granularity)
    other = permuted(params)
    with compilations() as seconds:
        after = scored(name, other, granularity)
    assert not seconds
    for path, leaf in scores.items():
        if granularity in ("group", "layer"):
            assert leaf.shape == ((NET.layers if granularity == "layer" else NET.groups)[path].size,)
            assert leaf.dtype in (np.float32, np.float64)  # of few numbers, on the host
        else:
            assert leaf.shape == units_of(CONV[path], granularity).shape[:-1]
            assert leaf.dtype == np.float32
        assert np.isfinite(leaf).all()
    if name in DRAWN or granularity == "block":  # drawn by position; a block holds several units
        return
    for path, leaf in reordered(scores, granularity).items():
        scale = np.abs(leaf).max()
        np.testing.assert_allclose(after[path], leaf, rtol=2e-3, atol=1e-5 * scale + 1e-7, err_msg=path)


@pytest.mark.parametrize(("name", "granularity"), OF_LEAVES)
def test_exactly_so_many_die_in_every_scope(name, granularity):
    scores = scored(name, CONV, granularity)
    written = WRITTEN.get(granularity, granularity)
    if granularity == "n:m":
        masks = pj.mask(scores, granularity=written)
        assert (np.asarray(masks["conv"]).sum(axis=2) == 2).all()
        assert (np.asarray(masks["out"]).sum(axis=0) == 2).all()
        return
    scopes = ["global", "layer", "erk"] + ["lamp"] * all(leaf.min() >= 0 for leaf in scores.values())
    scopes += ["output"] * (granularity in ("weight", "kernel"))
    for scope in scopes:
        masks = pj.mask(
            scores, sparsity=0.5, scope=scope, granularity=written, min_keep=int(scope != "output"), params=CONV
        )
        units = {path: units_of(masks[path], granularity) for path in CONV}
        assert all((u.all(axis=-1) | ~u.any(axis=-1)).all() for u in units.values()), "units die whole"
        dead = {path: int((~u.any(axis=-1)).sum()) for path, u in units.items()}
        sizes = {path: leaf.size for path, leaf in scores.items()}
        if scope in ("layer", "output"):  # each by itself
            assert all(dead[path] == round(0.5 * sizes[path]) for path in CONV), scope
        else:
            assert sum(dead.values()) == round(0.5 * sum(sizes.values())), scope


@pytest.mark.parametrize(("name", "granularity"), WIRED)
def test_exactly_so_many_units_die_in_every_scope(name, granularity):
    scores = scored(name, BLOCKS, granularity)
    kinds = ("layer",) if granularity == "layer" else ()
    for scope in ("global",) if kinds else ("global", "group", "isomorphic"):
        dead = NET.choose(scores, sparsity=0.5, scope=scope, kinds=kinds)
        per_group = [round(0.5 * len(s)) for s in scores.values()]
        total = sum(map(len, dead.values()))
        if scope == "group":
            assert total == sum(per_group)
        elif scope == "global":
            assert total == round(0.5 * sum(map(len, scores.values())))


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWN)
def test_what_is_drawn_is_drawn_by_its_key(name):
    for granularity in ("weight", "neuron", "group"):
        params = BLOCKS if granularity == "group" else CONV
        one, two, other = (scored(name, params, granularity, key=jax.random.key(seed)) for seed in (0, 0, 1))
        for path, leaf in one.items():
            np.testing.assert_array_equal(leaf, two[path])
            assert (leaf != other[path]).any()
        with pytest.raises(UserMistake, match="draws random numbers: give key="):
            scored(name, params, granularity, key=None)


@pytest.mark.parametrize("name", list(CRITERIA))
def test_what_it_cannot_score_is_refused_when_the_recipe_is_read(name):
    claimed = CRITERIA[name].granularities
    for granularity in FAMILIES:
        prune = {"kind": "prune", "criterion": name, "granularity": WRITTEN.get(granularity, granularity)}
        prune |= {} if granularity == "n:m" else {"target": {"sparsity": 0.5}}
        recipe = read_recipe(tiny(train=TRAIN, prune=prune))
        if granularity in claimed:
            prepare(recipe)
            continue
        with pytest.raises(UserMistake) as caught:
            prepare(recipe)
        assert "tiny: stages.prune.granularity = " in str(caught.value)
        assert f"(allowed: {listed(claimed)})" in str(caught.value)


@pytest.mark.parametrize("name", list(CRITERIA))
def test_it_states_its_definition(name):
    """Formula, shapes, units and source, and each option, where one looks for them."""
    entry = CRITERIA[name]
    text = inspect.getdoc(entry.function) or ""
    arguments, _, returns = text.partition("Returns:")
    assert entry.formula
    assert entry.paper
    assert all(f"\n    {option}: " in arguments for option in entry.options), "each option is explained"
    assert "shaped like `params`" in returns or "[units]" in returns or "[1]" in returns
    assert any(word in returns for word in ("unit", "in [0, 1", "in [0, 2]", "in nats")), "units, or a range without"
