"""SparseGPT against the optimal brain surgeon in its slowest form: one inverse for each input, one output at a time."""

import jax.numpy as jnp
import numpy as np
import pytest

from prune_jax.errors import UserMistake
from prune_jax.surgeon import _factor, _of_small, costs, solve
from tests.compiling import compilations


def layer(inputs=12, outputs=5, examples=40):
    """Correlated inputs and a kernel."""
    rng = np.random.default_rng(inputs)
    mix = rng.normal(size=(inputs, inputs)) / np.sqrt(inputs) + np.eye(inputs)
    x = rng.normal(size=(examples, inputs)) @ mix
    return x, rng.normal(size=(inputs, outputs))


def slowly(w, xx, *, prune=None, n_m=None, mask=None, before=None, by_output=False, block=128, dampening=0.01):
    w, (inputs, outputs) = w.astype(np.float64).copy(), w.shape
    h = xx.astype(np.float64) + dampening * np.diagonal(xx).mean() * np.eye(inputs)
    alive = np.ones(w.shape, bool) if mask is None else mask.copy()
    before = np.ones(w.shape, bool) if before is None else before
    of_later = [np.linalg.inv(h[i:, i:]) for i in range(inputs)]
    costs = lambda i: np.where(before[i], w[i] ** 2 / of_later[i][0, 0], -1)  # noqa: E731

    def share(living, wanted, end):  # of those that die anew, up to an input
        return (2 * wanted * living[:end].sum() + living.sum()) // max(2 * living.sum(), 1)

    for i in range(inputs):
        end = min(i + block, inputs)
        if prune is not None and i % block == 0:
            now = np.stack([costs(j) for j in range(i, end)])
            lines = [[o] for o in range(outputs)] if by_output else [list(range(outputs))]
            for line in lines:
                living = before[:, line]
                wanted = max(prune * len(line) // outputs - (~living).sum(), 0)
                dying = share(living, wanted, end) - share(living, wanted, i) + (~living[i:end]).sum()
                part = alive[i:end][:, line]
                part.flat[np.argsort(now[:, line].ravel(), kind="stable")[:dying]] = False
                alive[i:end, line] = part
        if n_m is not None and i % n_m[1] == 0:
            n, m = n_m
            end = min(i + m, inputs)
            order = np.argsort(np.stack([costs(j) for j in range(i, end)]), axis=0, kind="stable")
            for output in range(outputs):
                alive[i + order[: max(end - i - n, 0), output], output] = False
        alive[i] &= before[i]
        for output in np.flatnonzero(~alive[i]):
            w[i:, output] -= w[i, output] * of_later[i][0] / of_later[i][0, 0]
            w[i, output] = 0
    return alive, w


def earlier(inputs=12, outputs=5):
    """A fifth is dead, unevenly."""
    mask = np.ones((inputs, outputs), bool)
    mask[[0, 1, 1, 2, 7, 9], [0, 0, 3, 3, 1, 4]] = False
    mask[:6, 2] = False
    return mask


CASES = [
    pytest.param({"prune": 30}, marks=pytest.mark.slow),
    {"prune": 42, "block": 4},
    {"prune": 33, "block": 5, "dampening": 0.1, "before": earlier()},
    {"prune": 35, "block": 4, "by_output": True, "before": earlier()},
    pytest.param({"prune": 9, "before": earlier()}, marks=pytest.mark.slow),  # more is dead already
    {"n_m": (2, 4), "block": 8, "before": earlier()},
    pytest.param({"n_m": (1, 5), "block": 10}, marks=pytest.mark.slow),  # the last group is of two
    {"mask": earlier(), "block": 6},
    pytest.param({"prune": 0}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("words", CASES, ids=lambda words: "-".join(words))
def test_masks_and_weights_are_those_of_the_slow_way(words):
    x, w = layer()
    given = dict(words)
    before = given.pop("before", None)
    if before is not None:
        w *= before
    xx = jnp.asarray(x.T @ x, jnp.float32)
    mask, moved = solve(jnp.asarray(w, jnp.float32), xx, alive=None if before is None else jnp.asarray(before), **given)
    expected, wanted = slowly(w, x.T @ x, **words)
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_allclose(moved, wanted, rtol=1e-3, atol=2e-4)
    assert (np.asarray(moved)[~np.asarray(mask)] == 0).all()
    if "prune" in words:
        dead = 0 if before is None else (~before).sum()
        assert (~np.asarray(mask)).sum() == max(words["prune"], dead)
    if before is not None:
        assert not (np.asarray(mask) & ~before).any()


@pytest.mark.slow
def test_kernels_side_by_side_and_pieces_of_inputs_are_solved_as_if_alone():
    """Two groups under n:m; and one kernel of which the inputs do not see those of the other piece."""
    (x, w), (y, v) = layer(12), layer(12, examples=50)
    as_array = lambda *a: jnp.asarray(np.stack(a), jnp.float32)  # noqa: E731
    masks, moved = solve(as_array(w, v), as_array(x.T @ x, y.T @ y), n_m=(2, 4), block=4)
    for number, (inputs, kernel) in enumerate([(x, w), (y, v)]):
        expected, wanted = slowly(kernel, inputs.T @ inputs, n_m=(2, 4), block=4)
        np.testing.assert_array_equal(masks[number], expected)
        np.testing.assert_allclose(moved[number], wanted, rtol=1e-3, atol=2e-4)
    apart = [jnp.asarray(x[:, part].T @ x[:, part], jnp.float32) for part in (slice(0, 8), slice(8, 12))]
    masks, moved = solve(jnp.asarray(w, jnp.float32), apart, n_m=(2, 4), block=8)
    for part in (slice(0, 8), slice(8, 12)):
        expected, wanted = slowly(w[part], x[:, part].T @ x[:, part], n_m=(2, 4), block=8)
        np.testing.assert_array_equal(masks[part], expected)
        np.testing.assert_allclose(moved[part], wanted, rtol=1e-3, atol=2e-4)


def test_large_factors_are_found_by_halves():
    x, _ = layer(700, 1, 300)
    xx = jnp.asarray(x.T @ x, jnp.float32)
    factor, _ = _factor(xx[None], 0.01)
    h = x.T @ x + 0.01 * np.diagonal(x.T @ x).mean() * np.eye(700)
    wanted = np.linalg.inv(np.linalg.cholesky(h[::-1, ::-1]))[::-1, ::-1]
    np.testing.assert_allclose(factor[0], wanted, atol=2e-4 * np.abs(wanted).max())


def test_costs_are_those_of_single_removals():
    """What the best weights lose under a mask of one zero, by least squares."""
    x, w = layer(6, 1)
    found = costs(jnp.asarray(w, jnp.float32), jnp.asarray(x.T @ x / len(x), jnp.float32), dampening=0.0)
    for i in range(6):
        rest = np.delete(x, i, axis=1)
        lost = np.square(x @ w - rest @ np.linalg.lstsq(rest, x @ w, rcond=None)[0]).mean() / 2
        np.testing.assert_allclose(found[i, 0], lost, rtol=1e-3)


@pytest.mark.slow
def test_outputs_change_less_than_without_the_update_and_than_by_magnitude():
    x, w = layer(64, 16, 500)
    xx = jnp.asarray(x.T @ x, jnp.float32)
    mask, moved = map(np.asarray, solve(jnp.asarray(w, jnp.float32), xx, prune=512, block=16))
    by_size = np.abs(w) >= np.median(np.abs(w))
    changed = lambda v: np.square(x @ (w - v)).sum()  # noqa: E731
    assert changed(moved) < 0.8 * changed(w * mask)
    assert changed(moved) < 0.8 * changed(w * by_size)


def test_the_best_weights_under_the_mask_are_no_better_where_only_the_first_input_dies():
    """Then the update is the solution of least squares, exactly."""
    x, w = layer(6, 1)
    w[0] = 1e-3
    mask, moved = solve(jnp.asarray(w, jnp.float32), jnp.asarray(x.T @ x, jnp.float32), prune=1, dampening=0.0)
    assert not mask[0, 0]
    best = np.linalg.lstsq(x[:, 1:], x @ w, rcond=None)[0]
    np.testing.assert_allclose(moved[1:], best, rtol=1e-3)


@pytest.mark.slow
def test_an_input_that_is_always_zero_dies_first_and_breaks_nothing():
    x, w = layer()
    x[:, 3] = 0
    mask, moved = solve(jnp.asarray(w, jnp.bfloat16), jnp.asarray(x.T @ x), prune=30)
    assert moved.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(moved, np.float32)).all()
    assert not np.asarray(mask)[3].any()


def test_another_layer_of_the_shape_compiles_nothing():
    (x, w), (y, v) = layer(16, 4), layer(16, 4)
    first, second = ([jnp.asarray(a, jnp.float32) for a in (w, x.T @ x)] for x, w in ((x, w), (y, v)))
    solve(*first, prune=32, block=4)
    with compilations() as seconds:
        solve(*second, prune=32, block=4)
    assert not seconds


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "give one of prune, n_m and mask"),
        ({"prune": 17}, "prune = 17: must be from 0 to 16, the number of weights"),
        ({"n_m": (2, 4), "block": 6}, "n_m = .*: n must be at least 1 and below m, and block, 6, a multiple of m"),
    ],
)
def test_mistakes(words, message):
    with pytest.raises(UserMistake, match=message):
        solve(jnp.ones((8, 2)), jnp.eye(8), **words)
    with pytest.raises(UserMistake, match=r"w is \[8, 2\] and xx \[2, 2\]"):
        solve(jnp.ones((8, 2)), jnp.eye(2), prune=8)


def test_no_batch_of_matrices_is_factored():
    """On CPU such batches can wait for one another for ever."""
    told = _of_small.lower(jnp.ones((3, 4, 4))).as_text()
    factored = [line for line in told.splitlines() if "potrf" in line or "trsm" in line or "stablehlo.cholesky" in line]
    assert factored
    assert not [line for line in factored if "3x4x4" in line]
