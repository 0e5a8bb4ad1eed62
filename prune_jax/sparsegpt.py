"""Weights of one layer masked, and the others moved so that the layer's outputs change as little as they can."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from prune_jax.errors import UserMistake
from prune_jax.selection import all_but_lowest, n_of_m


def solve(
    w: jax.Array,
    xx: jax.Array,
    *,
    sparsity: float | None = None,
    n_m: tuple[int, int] | None = None,
    block: int = 128,
    damping: float = 0.01,
) -> tuple[jax.Array, jax.Array]:
    """SparseGPT (Frantar & Alistarh 2023, arXiv:2301.00774): the layer-wise optimal brain surgeon, input by input.

    Sought are a mask and weights of small ||X w - X w'||^2. Inputs are gone through in order. What dies at input i, at
    the cost of w_i^2 / [H_F^-1]_ii each, moves the weights of the later inputs by -w_i [H_F^-1]_i / [H_F^-1]_ii, with
    H = X^T X + damping and F the inputs from i on. All outputs share the H_F^-1: they are the rows of one Cholesky
    factor. Which weights die is chosen when their block is reached: the cheapest of all outputs together, or, of n:m,
    all but n of each m inputs of an output.

    Args:
        w: kernel `[in, out]`; that of a convolution with its positions and inputs as one axis.
        xx: X^T X `[in, in]`, with X the inputs `[examples, in]`, or their mean over examples.
        sparsity: fraction of the weights that dies, in [0, 1): of the leaf exactly so many, of each block its share.
        n_m: instead, n are kept of each m weights along the inputs; a last group of fewer than m keeps at most n.
        block: inputs whose weights are chosen together, a multiple of m; later inputs are updated once for all of them.
        damping: added to the diagonal of H, as a fraction of its mean.

    Returns:
        Mask, bool, True = alive, and weights of the type of `w`, zero where the mask is False. Weights of inputs that
        are always zero become zero. It holds a few float32 arrays `[in, in]` and `[in, out]`, whatever the block.

    Raises:
        UserMistake: neither or both of `sparsity` and `n_m` are given, or shapes do not fit.

    >>> mask, moved = solve(jnp.array([[1.0], [2.0]]), jnp.array([[2.0, 1.0], [1.0, 2.0]]), sparsity=0.5, damping=0.0)
    >>> mask.ravel(), moved.ravel()  # the second weight makes up for half of the first
    (Array([False,  True], dtype=bool), Array([0. , 2.5], dtype=float32))
    """
    inputs, outputs = w.shape
    _check(w.shape, xx.shape, sparsity, n_m, block)
    factor, used = _factor(xx, damping)
    moved = jnp.where(used[:, None], w.astype(jnp.float32), 0)
    mask = jnp.ones(w.shape, bool)
    for start, size in _blocks(inputs, block, n_m[1] if n_m else 1):
        dying = 0
        if sparsity is not None:  # shares that add up
            dying = round(sparsity * (start + size) * outputs) - round(sparsity * start * outputs)
        mask, moved = _block(mask, moved, factor, start, dying, size=size, n_m=n_m)
    return mask, moved.astype(w.dtype)


def _check(
    w: tuple[int, ...], xx: tuple[int, ...], sparsity: float | None, n_m: tuple[int, int] | None, block: int
) -> None:
    if len(w) != 2 or xx != (w[0], w[0]):
        raise UserMistake(f"w is {list(w)} and xx {list(xx)}, but they must be [in, out] and [in, in]")
    if (sparsity is None) == (n_m is None):
        raise UserMistake("give one of sparsity and n_m")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise UserMistake(f"sparsity = {sparsity}: must be at least 0 and below 1")
    if n_m is not None and (not 1 <= n_m[0] < n_m[1] or block % n_m[1]):
        raise UserMistake(f"n_m = {n_m}: n must be at least 1 and below m, and block, {block}, a multiple of m")


def _blocks(inputs: int, block: int, m: int) -> list[tuple[int, int]]:
    """Where blocks begin and how long they are; what is left of m inputs is one of its own."""
    whole = inputs - inputs % m
    found = [(start, min(block, whole - start)) for start in range(0, whole, block)]
    return found if whole == inputs else [*found, (whole, inputs - whole)]


@jax.jit
def _factor(xx: jax.Array, damping: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The upper U of H^-1 = U^T U, whose row i is the first of H_F^-1 over the root of its diagonal; who is used."""
    diagonal = jnp.diagonal(xx).astype(jnp.float32)
    used = diagonal > 0
    size = xx.shape[0]
    h = xx.astype(jnp.float32) + jnp.diag(jnp.where(used, damping * jnp.mean(diagonal), 1))
    upper = jnp.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]  # H = R R^T, R upper, so that U is its inverse
    return lax.linalg.triangular_solve(upper, jnp.eye(size), left_side=True), used


@partial(jax.jit, static_argnames=("size", "n_m"))
def _block(
    mask: jax.Array,
    w: jax.Array,
    factor: jax.Array,
    start: jax.Array,
    dying: jax.Array,
    *,
    size: int,
    n_m: tuple[int, int] | None,
) -> tuple[jax.Array, jax.Array]:
    """One block of inputs: its weights are chosen and moved, then all later ones at once."""
    outputs = w.shape[1]
    rows = lax.dynamic_slice_in_dim(factor, start, size)  # [block, in]
    u = lax.dynamic_slice_in_dim(rows, start, size, axis=1)  # [block, block]
    group = min(n_m[1], size) if n_m else size

    def choose(w: jax.Array, first: jax.Array) -> jax.Array:
        """Which weights of a group live, `[group, out]`."""
        root = lax.dynamic_slice_in_dim(jnp.diagonal(u), first, group)
        costs = jnp.square(lax.dynamic_slice_in_dim(w, first, group) / root[:, None])
        return n_of_m(costs, None, *n_m) if n_m else all_but_lowest([costs], [None], dying)[0]

    def sweep(g: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        w, alive, errors = state
        alive = lax.dynamic_update_slice_in_dim(alive, choose(w, g * group), g * group, axis=0)

        def one(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            w, errors = state
            error = jnp.where(alive[i], 0, w[i]) / u[i, i]  # [out]
            w = w - jnp.outer(u[i], error)
            w = w.at[i].set(jnp.where(alive[i], w[i], 0))  # exactly
            return w, errors.at[i].set(error)

        w, errors = lax.fori_loop(g * group, (g + 1) * group, one, (w, errors))
        return w, alive, errors

    own = lax.dynamic_slice_in_dim(w, start, size)
    empty = (own, jnp.ones(own.shape, bool), jnp.zeros((size, outputs)))
    own, alive, errors = lax.fori_loop(0, size // group, sweep, empty)
    w = w - lax.dot(rows.T, errors, precision=lax.Precision.HIGHEST)  # the factor is zero at all earlier inputs
    w = lax.dynamic_update_slice_in_dim(w, own, start, axis=0)
    return lax.dynamic_update_slice_in_dim(mask, alive, start, axis=0), w
