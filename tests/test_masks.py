import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import prune_jax.scoring as pj
from prune_jax.allocation import Pool, allocate
from prune_jax.errors import LayerCollapseError, NonFiniteScoreError, UserMistake
from prune_jax.masks import apply_masks, check_collapse, check_finite, choose, counts, sparsity
from prune_jax.selection import all_but_lowest, count_below, kth_smallest
from tests.compiling import compilations


def survivors(leaves, k, dead=None):
    """What lives of all leaves laid end to end, by a stable argsort in float64; what is dead goes first."""
    flat = np.concatenate([np.ravel(leaf) for leaf in leaves]).astype(np.float64)
    if dead is not None:
        flat[np.concatenate([np.ravel(d) for d in dead])] = -np.inf
    alive = np.ones(flat.size, bool)
    alive[np.argsort(flat, kind="stable")[:k]] = False
    return alive


def flat(masks):
    return np.concatenate([np.ravel(m) for m in jax.tree.leaves(masks)])


KINDS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "positive": lambda rng, n: np.abs(rng.standard_normal(n)),
    "negative": lambda rng, n: -np.abs(rng.standard_normal(n)),
    "heavy tail": lambda rng, n: rng.pareto(0.5, n),
    "constant": lambda rng, n: np.full(n, 0.1),
    "zeros": lambda rng, n: np.zeros(n),
    "signed zeros": lambda rng, n: np.where(rng.random(n) < 0.5, 0.0, -0.0),
    "mostly zero": lambda rng, n: rng.standard_normal(n) * (rng.random(n) < 0.1),
    "tied": lambda rng, n: rng.integers(-3, 4, n) / 2,
    "subnormal": lambda rng, n: rng.integers(-4, 5, n) * 1.4e-45,
    "huge": lambda rng, n: rng.standard_normal(n) * 1e38,
    "few sampled": lambda rng, n: np.where(sampled(n), -1.0, 1.0) * rng.random(n),
}


def sampled(n):
    """Where the sample that brackets the answer may look, in both leaves."""
    i = np.arange(n)
    return (i % 127 == 0) | ((i - n // 2 // 4 * 4) % 127 == 0)


@pytest.mark.parametrize("size", [40, 70_003, 600_001], ids=["small", "sampled", "large"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_k_lowest_go_as_in_a_stable_argsort(kind, size):
    with np.errstate(over="ignore"):
        values = KINDS[kind](np.random.default_rng(0), size).astype(np.float32)
    leaves = [values[: size // 2 // 4 * 4].reshape(4, -1), values[size // 2 // 4 * 4 :]]
    for k in (0, 1, size // 2, round(0.9 * size), size - 1, size):
        found = all_but_lowest([jnp.asarray(leaf) for leaf in leaves], [None, None], k)
        np.testing.assert_array_equal(flat(found), survivors(leaves, k), err_msg=f"k = {k}")


@pytest.mark.parametrize("kind", ["normal", "zeros", "tied", "few sampled"])
@pytest.mark.parametrize("shape", [(50,), (300_001,), (512, 1024)], ids=["small", "in pages", "in its own shape"])
def test_what_stays_whatever_its_score_goes_last_and_in_order(shape, kind):
    rng, size = np.random.default_rng(0), math.prod(shape)
    values = KINDS[kind](rng, size).astype(np.float32).reshape(shape)
    tier = rng.integers(0, 3, shape).astype(np.int8)
    order = np.where(tier == 0, -np.inf, np.where(tier == 2, np.inf, values))
    for k in (0, size // 2, round(0.6 * size), round(0.9 * size), size - 1, size):
        (found,) = all_but_lowest([jnp.asarray(values)], [jnp.asarray(tier)], k)
        np.testing.assert_array_equal(flat(found), survivors([order], k), err_msg=f"k = {k}")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_k_lowest_go_whatever_the_scores(data):
    some = data.draw(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
    values = np.array(data.draw(st.lists(st.sampled_from(some), min_size=33, max_size=33)), np.float32)
    dead = np.array(data.draw(st.lists(st.booleans(), min_size=33, max_size=33)))
    k = data.draw(st.integers(0, 33))
    parts = lambda a: [a[:12].reshape(3, 4), a[12:]]  # noqa: E731
    found = all_but_lowest([jnp.asarray(a) for a in parts(values)], [jnp.asarray(~a) for a in parts(dead)], k)
    np.testing.assert_array_equal(flat(found), survivors(parts(values), k, parts(dead)))


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_pools_are_chosen_apart_and_other_leaves_stay_dense(transform):
    rng = np.random.default_rng(0)
    scores = {name: rng.standard_normal((4, 5)).astype(np.float32) for name in "abc"}
    masks = transform(lambda s: choose(s, [Pool(("a",), 7), Pool(("b",), 20)]))(scores)
    np.testing.assert_array_equal(np.ravel(masks["a"]), survivors([scores["a"]], 7))
    assert not np.any(masks["b"])
    assert np.all(masks["c"])
    assert {m.dtype for m in masks.values()} == {np.dtype(bool)}


def test_one_compilation_serves_a_whole_schedule():
    scores = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((9, 11)), jnp.float32)}
    choose(scores, [Pool(("w",), 3)])
    with compilations() as seconds:
        for k in (10, 40, 98):
            assert counts(choose(scores, [Pool(("w",), k)]))["w"][0] == 99 - k
    assert len(seconds) <= 1  # the sum of `counts`


def test_scores_spread_over_devices_give_the_same_masks():
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    values = np.round(np.random.default_rng(0).standard_normal((512, 256)), 2).astype(np.float32)
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    for axes in (PartitionSpec("d"), PartitionSpec(None, "d")):
        spread = jax.device_put(values, NamedSharding(mesh, axes))
        found = choose({"w": spread}, [Pool(("w",), 100_000)])
        np.testing.assert_array_equal(flat(found), survivors([values], 100_000))


def test_what_is_dead_dies_first_and_stays_dead():
    scores = {"w": jnp.arange(8.0)}
    alive = {"w": jnp.array([True, True, True, True, True, True, False, False])}
    masks = choose(scores, [Pool(("w",), 4)], alive=alive)
    np.testing.assert_array_equal(masks["w"], [False, False, True, True, True, True, False, False])
    masks = choose(scores, [Pool(("w",), 1)], alive=alive)  # fewer than are dead already
    np.testing.assert_array_equal(masks["w"], alive["w"])


def test_min_keep_spares_the_best_of_each_leaf():
    scores = {"big": jnp.arange(10.0, 20.0), "small": jnp.array([1.0, 3.0, 2.0, 3.0])}
    alive = {"small": jnp.array([True, True, True, False])}
    masks = choose(scores, [Pool(("big", "small"), 9)], alive=alive, min_keep=2)
    np.testing.assert_array_equal(masks["small"], [False, True, True, False])
    np.testing.assert_array_equal(np.flatnonzero(masks["big"]), [7, 8, 9])


def test_order_statistics_agree_with_numpy():
    values = np.round(np.random.default_rng(0).standard_normal(101), 1).astype(np.float32)
    dead = values > 1
    leaves, tiers = [jnp.asarray(values[:50]), jnp.asarray(values[50:])], [jnp.asarray(~dead[:50]), None]
    counting = np.sort(np.concatenate([values[:50][~dead[:50]], values[50:]]))
    for k in (1, 2, 40, counting.size):
        assert float(kth_smallest(leaves, tiers, k)) == counting[k - 1]
    for value in (-3.0, -0.0, 0.1, 5.0):
        assert int(count_below(leaves, tiers, value)) == dead[:50].sum() + np.sum(counting < np.float32(value))


def test_magnitude_and_keep_solve_the_projection():
    """The minimum of ||W - W'||_2 over all W' with at most k non-zeros, by trying every support."""
    rng = np.random.default_rng(0)
    params = {"a": rng.standard_normal((2, 3)).astype(np.float32), "b": rng.standard_normal((2, 2)).astype(np.float32)}
    w = np.concatenate([params["a"].ravel(), params["b"].ravel()])
    for k in (1, 4, 7):
        best = min(np.sum(np.square(np.delete(w, list(kept)))) for kept in itertools.combinations(range(10), k))
        scores = pj.score("magnitude", params)
        masks = choose(scores, allocate(scores, keep=k))
        projected = apply_masks(params, masks)
        distance = sum(np.sum(np.square(params[n] - np.asarray(projected[n]))) for n in params)
        assert sum(int(np.count_nonzero(leaf)) for leaf in projected.values()) == k
        np.testing.assert_allclose(distance, best, rtol=1e-6)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_masks_put_zeros_even_over_nan(transform):
    params = {"w": jnp.array([[jnp.nan, 1.0], [jnp.inf, -2.0]]), "b": jnp.ones(2), "n": jnp.array([1, 2])}
    masks = {"w": jnp.array([[False, True], [False, False]]), "b": None, "n": None}
    masked = transform(apply_masks)(params, masks)
    np.testing.assert_array_equal(masked["w"], [[0.0, 1.0], [0.0, 0.0]])
    np.testing.assert_array_equal(masked["b"], params["b"])
    assert masked["n"].dtype == params["n"].dtype
    half = apply_masks({"w": jnp.ones(2, jnp.bfloat16)}, {"w": jnp.array([True, False])})["w"]
    assert half.dtype == jnp.bfloat16


def test_masks_must_fit_the_parameters():
    params = {"dense": {"kernel": jnp.ones((2, 3))}}
    with pytest.raises(UserMistake, match=r"a mask is named 'dense/kernl' but no parameter is; did you mean 'dense/k"):
        apply_masks(params, {"dense": {"kernl": jnp.ones((2, 3), bool)}})
    with pytest.raises(UserMistake, match=r"the mask of 'dense/kernel' is \[3\] but the parameter \[2, 3\]; to mask"):
        apply_masks(params, {"dense": {"kernel": jnp.ones(3, bool)}})


def test_sparsity_counts_masked_weights_only():
    masks = {"a": jnp.array([True, False, False]), "b": None, "c": jnp.array([[True]])}
    assert counts(masks) == {"a": (1, 3), "c": (1, 1)}
    assert sparsity(masks) == 0.5
    assert sparsity({"a": None}) == 0.0


@pytest.mark.parametrize(
    ("criterion", "opening"), [("taylor", "Criterion 'taylor' gave 2 of 6"), ("", "There are 2 of 6")]
)
def test_scores_that_are_not_finite_are_named(criterion, opening):
    scores = {"a": jnp.ones(3), "b": jnp.array([[1.0, 2.0, 3.0], [4.0, jnp.nan, jnp.inf]])}
    with pytest.raises(NonFiniteScoreError) as caught:
        check_finite(scores, criterion)
    assert str(caught.value).startswith(f"{opening} non-finite scores in 'b' [2, 3], the first at (1, 1). ")


def test_a_layer_without_a_living_weight_is_named():
    masks = {"a": jnp.array([True, False]), "b": {"w": jnp.zeros((2, 2), bool)}}
    with pytest.raises(
        LayerCollapseError, match=r"nothing alive in 'b/w' \(all 4\), at a sparsity of 0.8333 .*min_keep"
    ):
        check_collapse(masks)


def test_mask_names_the_layer_that_a_global_target_would_kill():
    scores = {"a": jnp.arange(1.0, 91.0), "b": jnp.full(10, 0.5)}
    with pytest.raises(LayerCollapseError, match="'b'"):
        pj.mask(scores, sparsity=0.5)
    masks = pj.mask(scores, sparsity=0.5, min_keep=1)
    assert counts(masks)["b"] == (1, 10)
    assert sparsity(masks) == 0.5


def test_masks_of_rounds_are_nested():
    rng = np.random.default_rng(0)
    masks = None
    for level in (0.3, 0.6, 0.9):
        scores = {n: jnp.asarray(rng.standard_normal((6, 10)), jnp.float32) for n in "ab"}
        newer = pj.mask(scores, sparsity=level, alive=masks)
        assert sparsity(newer) == pytest.approx(level, abs=1e-12)
        if masks is not None:
            assert not np.any(flat(newer) & ~flat(masks))
        masks = newer


def test_leaves_without_scores_have_no_masks():
    masks = pj.mask({"a": {"kernel": jnp.arange(4.0), "bias": None}}, keep=2)
    assert masks["a"]["bias"] is None
    assert jax.tree.structure(masks) == jax.tree.structure({"a": {"kernel": 0, "bias": None}})


def test_selection_in_a_jitted_step_takes_a_traced_number():
    scores = {"w": jnp.arange(20.0)}

    @partial(jax.jit)
    def living(k):
        return jnp.sum(choose(scores, [Pool(("w",), k)])["w"])

    assert [int(living(k)) for k in (0, 5, 20)] == [20, 15, 0]
