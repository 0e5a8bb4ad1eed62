"""SparseGPT against the optimal brain surgeon in its slowest form: one inverse for each input, one output at a time."""

import jax.numpy as jnp
import numpy as np
import pytest

from prune_jax.errors import UserMistake
from prune_jax.sparsegpt import solve
from tests.compiling import compilations


def layer(inputs=12, outputs=5, examples=40):
    """Correlated inputs and a kernel."""
    rng = np.random.default_rng(inputs)
    mix = rng.normal(size=(inputs, inputs)) / np.sqrt(inputs) + np.eye(inputs)
    x = rng.normal(size=(examples, inputs)) @ mix
    return x, rng.normal(size=(inputs, outputs))


def slowly(w, xx, *, sparsity=None, n_m=None, block=128, damping=0.01):
    w, (inputs, outputs) = w.astype(np.float64).copy(), w.shape
    h = xx.astype(np.float64) + damping * np.diagonal(xx).mean() * np.eye(inputs)
    alive = np.ones(w.shape, bool)
    of_later = [np.linalg.inv(h[i:, i:]) for i in range(inputs)]
    costs = lambda i: w[i] ** 2 / of_later[i][0, 0]  # noqa: E731
    for i in range(inputs):
        if sparsity is not None and i % block == 0:
            end = min(i + block, inputs)
            dying = round(sparsity * end * outputs) - round(sparsity * i * outputs)
            order = np.argsort(np.stack([costs(j) for j in range(i, end)]).ravel(), kind="stable")
            alive[i:end].ravel()[order[:dying]] = False
        if n_m is not None and i % n_m[1] == 0:
            n, m = n_m
            end = min(i + m, inputs)
            order = np.argsort(np.stack([costs(j) for j in range(i, end)]), axis=0, kind="stable")
            for output in range(outputs):
                alive[i + order[: max(end - i - n, 0), output], output] = False
        for output in np.flatnonzero(~alive[i]):
            w[i:, output] -= w[i, output] * of_later[i][0] / of_later[i][0, 0]
            w[i, output] = 0
    return alive, w


CASES = [
    {"sparsity": 0.5},
    {"sparsity": 0.7, "block": 4},
    pytest.param({"sparsity": 0.55, "block": 5, "damping": 0.1}, marks=pytest.mark.slow),
    pytest.param({"n_m": (2, 4), "block": 4}, marks=pytest.mark.slow),
    {"n_m": (2, 4), "block": 8},
    {"n_m": (1, 5), "block": 10},  # the last group is of two
    {"sparsity": 0.0},
]


@pytest.mark.parametrize("words", CASES, ids=str)
def test_masks_and_weights_are_those_of_the_slow_way(words):
    x, w = layer()
    mask, moved = solve(jnp.asarray(w, jnp.float32), jnp.asarray(x.T @ x, jnp.float32), **words)
    expected, wanted = slowly(w, x.T @ x, **words)
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_allclose(moved, wanted, rtol=1e-3, atol=2e-4)
    assert (np.asarray(moved)[~np.asarray(mask)] == 0).all()
    if "sparsity" in words:
        assert (~np.asarray(mask)).sum() == round(words["sparsity"] * w.size)


def test_outputs_change_less_than_without_the_update_and_than_by_magnitude():
    x, w = layer(64, 16, 500)
    xx = jnp.asarray(x.T @ x, jnp.float32)
    mask, moved = map(np.asarray, solve(jnp.asarray(w, jnp.float32), xx, sparsity=0.5, block=16))
    by_size = np.abs(w) >= np.median(np.abs(w))
    changed = lambda v: np.square(x @ (w - v)).sum()  # noqa: E731
    assert changed(moved) < 0.8 * changed(w * mask)
    assert changed(moved) < 0.8 * changed(w * by_size)


def test_the_best_weights_under_the_mask_are_no_better_where_only_the_first_input_dies():
    """Then the update is the solution of least squares, exactly."""
    x, w = layer(6, 1)
    w[0] = 1e-3
    mask, moved = solve(jnp.asarray(w, jnp.float32), jnp.asarray(x.T @ x, jnp.float32), sparsity=1 / 6, damping=0.0)
    assert not mask[0, 0]
    best = np.linalg.lstsq(x[:, 1:], x @ w, rcond=None)[0]
    np.testing.assert_allclose(moved[1:], best, rtol=1e-3)


def test_an_input_that_is_always_zero_dies_first_and_breaks_nothing():
    x, w = layer()
    x[:, 3] = 0
    mask, moved = solve(jnp.asarray(w, jnp.bfloat16), jnp.asarray(x.T @ x), sparsity=0.5)
    assert moved.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(moved, np.float32)).all()
    assert not np.asarray(mask)[3].any()


def test_another_layer_of_the_shape_compiles_nothing():
    (x, w), (y, v) = layer(16, 4), layer(16, 4)
    first, second = ([jnp.asarray(a, jnp.float32) for a in (w, x.T @ x)] for x, w in ((x, w), (y, v)))
    solve(*first, sparsity=0.5, block=4)
    with compilations() as seconds:
        solve(*second, sparsity=0.5, block=4)
    assert not seconds


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "give one of sparsity and n_m"),
        ({"sparsity": 1.0}, "sparsity = 1.0: must be at least 0 and below 1"),
        ({"n_m": (2, 4), "block": 6}, "n_m = .*: n must be at least 1 and below m, and block, 6, a multiple of m"),
    ],
)
def test_mistakes(words, message):
    with pytest.raises(UserMistake, match=message):
        solve(jnp.ones((8, 2)), jnp.eye(8), **words)
    with pytest.raises(UserMistake, match=r"w is \[8, 2\] and xx \[2, 2\]"):
        solve(jnp.ones((8, 2)), jnp.eye(2), sparsity=0.5)
