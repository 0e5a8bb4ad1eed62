import jax.numpy as jnp
import numpy as np
import pytest

import prune_jax.scoring as pj
from prune_jax.allocation import allocate, check_sparsity
from prune_jax.errors import UserMistake
from prune_jax.masks import counts

SHAPES = {"conv/kernel": (5, 5, 1, 6), "hidden/kernel": (64, 100), "out/kernel": (100, 10)}


@pytest.fixture(scope="module")
def scores():
    rng = np.random.default_rng(0)
    return {path: jnp.asarray(np.abs(rng.standard_normal(shape)), jnp.float32) for path, shape in SHAPES.items()}


def pruned(pools):
    return {path: pool.prune for pool in pools for path in pool.paths if len(pool.paths) == 1}


@pytest.mark.parametrize("value", [0.0, 0.5, 0.9, 0.977])
def test_global_is_one_pool(scores, value):
    (pool,) = allocate(scores, sparsity=value)
    assert pool.paths == tuple(SHAPES)
    assert pool.prune == round(value * 7550)
    (pool,) = allocate(scores, keep=123)
    assert pool.prune == 7550 - 123


def test_layer_takes_the_sparsity_of_each_leaf(scores):
    assert pruned(allocate(scores, scope="layer", sparsity=0.77)) == {
        "conv/kernel": round(0.77 * 150),
        "hidden/kernel": round(0.77 * 6400),
        "out/kernel": 770,
    }


@pytest.mark.parametrize("scope", ["layer", "erk"])
@pytest.mark.parametrize("keep", [1, 17, 1000, 7549, 7550])
def test_keep_is_exact_in_every_scope(scores, scope, keep):
    dead = pruned(allocate(scores, scope=scope, keep=keep))
    assert sum(dead.values()) == 7550 - keep
    assert all(0 <= dead[p] <= scores[p].size for p in SHAPES)


def erk_by_hand(density):
    """Evci et al. 2020: one factor for all leaves that it does not make denser than dense."""
    dense = set()
    while True:
        left = density * 7550 - sum(np.prod(SHAPES[p]) for p in dense)
        factor = left / sum(sum(SHAPES[p]) for p in SHAPES if p not in dense)
        found = {p: 1.0 if p in dense else factor * sum(s) / np.prod(s) for p, s in SHAPES.items()}
        if max(found.values()) <= 1:
            return found
        dense.add(max(found, key=found.get))


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.95])
def test_erk_has_the_densities_of_the_paper(scores, sparsity):
    dead = pruned(allocate(scores, scope="erk", sparsity=sparsity))
    assert sum(dead.values()) == round(sparsity * 7550)
    for path, density in erk_by_hand(1 - sparsity).items():
        assert abs(scores[path].size - dead[path] - density * scores[path].size) < 1


def test_erk_goes_by_the_shapes_of_weights_also_for_neurons():
    units = {"a": jnp.ones(100), "b": jnp.ones(100)}
    dead = pruned(allocate(units, scope="erk", sparsity=0.5, shapes={"a": (1000, 100), "b": (10, 100)}))
    assert dead["a"] > dead["b"] == 0 or dead["a"] + dead["b"] == 100
    assert 100 - dead["b"] > 100 - dead["a"]


def test_a_table_names_each_leafs_sparsity(scores):
    table = {"hidden": 0.9, "*/kernel": 0.5}  # the first that fits wins
    assert pruned(allocate(scores, scope=table)) == {"conv/kernel": 75, "hidden/kernel": 5760, "out/kernel": 500}
    assert pruned(allocate(scores, scope={"out": 0.5})) == {"out/kernel": 500}
    masks = pj.mask(scores, scope={"out": 0.5})
    assert counts(masks) == {"conv/kernel": (150, 150), "hidden/kernel": (6400, 6400), "out/kernel": (500, 1000)}


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize(
    ("target", "number"),
    [
        ({"threshold": 0.5}, lambda s: np.float32(0.5)),
        ({"threshold": -1.0}, lambda s: np.float32(-1)),
        ({"statistic": "mean"}, lambda s: np.float32(np.mean(s, dtype=np.float64))),
        ({"statistic": "median"}, np.median),
        ({"percentile": 90}, lambda s: np.percentile(s, 90)),
        ({"percentile": 33.3}, lambda s: np.percentile(s, 33.3)),
        ({"percentile": 0}, np.min),
        ({"percentile": 97}, lambda s: np.percentile(s, 97)),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "tied"])
def test_what_scores_below_the_number_dies(scores, scope, target, number, ties):
    given = {p: jnp.round(s, 1) if ties else s for p, s in scores.items()}
    masks = pj.mask(given, scope=scope, **target)
    everything = np.concatenate([np.ravel(s) for s in given.values()])
    for path, leaf in given.items():
        cut = number(everything if scope == "global" else np.asarray(leaf))
        np.testing.assert_array_equal(masks[path], np.asarray(leaf) >= cut)


def test_numbers_are_made_of_living_scores():
    scores = {"w": jnp.arange(10.0)}
    alive = {"w": jnp.arange(10) >= 4}
    for target, survivors in (({"statistic": "median"}, 3), ({"statistic": "mean"}, 3), ({"percentile": 50}, 3)):
        masks = pj.mask(scores, alive=alive, **target)
        np.testing.assert_array_equal(np.flatnonzero(masks["w"]), range(10 - survivors, 10))


@pytest.mark.parametrize("target", [{"statistic": "mean"}, {"statistic": "median"}, {"percentile": 70}])
def test_equal_scores_are_not_below_their_own_number(target):
    masks = pj.mask({"w": jnp.full((7, 143), 0.1)}, **target)
    assert np.all(masks["w"])


def test_min_keep_holds_in_every_scope(scores):
    assert pruned(allocate(scores, scope="layer", sparsity=0.999, min_keep=20)) == {
        "conv/kernel": 130,
        "hidden/kernel": 6380,
        "out/kernel": 980,
    }
    dead = pruned(allocate(scores, scope="erk", keep=100, min_keep=30))
    assert sum(dead.values()) == 7450
    assert min(scores[p].size - dead[p] for p in SHAPES) >= 30
    (pool,) = allocate(scores, threshold=1e9, min_keep=5)
    assert pool.prune == 7550 - 15


MISTAKES = [
    ({"sparsity": 90}, "sparsity = 90: must be at least 0 and below 1; sparsity is a fraction, did you mean 0.9?"),
    ({"sparsity": 1.0}, "sparsity = 1.0: must be at least 0 and below 1"),
    ({"sparsity": -0.1}, "sparsity = -0.1: must be at least 0 and below 1"),
    ({"sparsity": float("nan")}, "sparsity = nan: must be at least 0 and below 1"),
    ({"keep": 7551}, "keep = 7551: must be a whole number from 1 to 7550, the number of prunable units; "),
    ({"keep": 0}, "keep = 0: must be a whole number from 1 to 7550"),
    ({"keep": 0.5}, "keep = 0.5: must be a whole number from 1 to 7550"),
    ({"threshold": float("inf")}, "threshold = inf: must be a finite number"),
    ({"statistic": "meen"}, "statistic 'meen' is not known; did you mean 'mean'? (allowed: mean, median)"),
    ({"percentile": 101}, "percentile = 101: must be from 0 to 100"),
    ({}, "the target is missing; give exactly one of sparsity, keep, threshold, statistic, percentile"),
    ({"sparsity": 0.5, "keep": 3}, "the target is sparsity and keep; give exactly one of"),
    (
        {"scope": "erc", "keep": 3},
        "scope 'erc' is not known; did you mean 'erk'? (allowed: global, layer, erk, lamp, output, or a t",
    ),
    ({"scope": "erk", "threshold": 0.1}, "erk shares out a number of survivors: its target is sparsity or keep, not"),
    ({"scope": {"out": 0.5}, "keep": 3}, "a table in scope says how many die where; leave keep out"),
    (
        {"scope": {"out": 50}},
        "scope['out'] = 50: must be at least 0 and below 1; sparsity is a fraction, did you mean 0.5?",
    ),
    (
        {"scope": {"hiden/kernel": 0.5}},
        "scope['hiden/kernel'] fits no prunable leaf; did you mean 'hidden/kernel'? (lea",
    ),
    (
        {"sparsity": 0.999, "min_keep": 5},
        "min_keep = 5 keeps 15 units in 3 leaves, but the target leaves only 8 of 7550",
    ),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[str(words) for words, _ in MISTAKES])
def test_mistakes_are_told_with_numbers_and_a_mend(scores, words, message):
    with pytest.raises(UserMistake) as caught:
        allocate(scores, **words)
    assert str(caught.value).startswith(message)


def test_nothing_to_prune_is_a_mistake():
    with pytest.raises(UserMistake, match="there is nothing to prune"):
        allocate({}, sparsity=0.5)


def test_check_sparsity_takes_numpy_numbers():
    check_sparsity(np.float32(0.5))
    with pytest.raises(UserMistake, match="True"):
        check_sparsity(True)
