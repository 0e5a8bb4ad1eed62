"""Weights of one layer masked, and the others moved so that the layer's outputs change as little as they can."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from prune_jax.errors import UserMistake
from prune_jax.selection import all_but_lowest, n_of_m

STEP = 8  # inputs that are gone through one by one, before the later ones of their block hear of it in one product
SMALL = 256  # matrices of so many rows are factored as they are
HIGHEST = lax.Precision.HIGHEST


def solve(
    w: jax.Array,
    xx: jax.Array | Sequence[jax.Array],
    *,
    prune: int | None = None,
    n_m: tuple[int, int] | None = None,
    mask: jax.Array | None = None,
    alive: jax.Array | None = None,
    by_output: bool = False,
    across: bool = False,
    period: int | None = None,
    block: int = 128,
    dampening: float = 0.01,
) -> tuple[jax.Array, jax.Array]:
    """SparseGPT (Frantar & Alistarh 2023, arXiv:2301.00774): the layer-wise optimal brain surgeon, input by input.

    Sought are a mask and weights of small ||X w - X w'||^2. Inputs are gone through in order. What dies at input i, at
    the cost of w_i^2 / [H_F^-1]_ii each, moves the weights of the later inputs by -w_i [H_F^-1]_i / [H_F^-1]_ii, with
    H = X^T X + dampening and F the inputs from i on. All outputs share the H_F^-1: they are the rows of one Cholesky
    factor. Which weights die is chosen when their block is reached: the cheapest of all outputs together, the cheapest
    of each output, or, of n:m, all but n of each m inputs of an output.

    Args:
        w: kernel `[in, out]`, or several side by side `[groups, in, out]`; of a convolution, its positions and inputs
            as one axis.
        xx: X^T X `[in, in]` or `[groups, in, in]`, with X the inputs `[examples, in]`, or their mean over examples. Of
            consecutive pieces of the inputs, several: H is then zero between them.
        prune: so many weights die, earlier ones among them; of the leaf exactly so many, of each block its share.
        n_m: instead, n are kept of each m weights along the inputs; a last group of fewer than m keeps at most n.
        mask: instead, the mask itself, bool, shaped like `w`, True = alive.
        alive: an earlier mask: what is dead there stays dead, and dies first.
        by_output: of each output the same number dies.
        across: n:m runs along the outputs of an input.
        period: groups of m are counted anew after so many inputs; left out, never.
        block: inputs whose weights are chosen together, a multiple of m; later inputs are updated once for all of them.
        dampening: added to the diagonal of H, as a fraction of its mean.

    Returns:
        Mask, bool, True = alive, and weights of the type of `w`, zero where the mask is False. Weights of inputs that
        are always zero become zero. It holds a few float32 arrays `[in, in]` and `[in, out]`, whatever the block.

    Raises:
        UserMistake: not one of `prune`, `n_m` and `mask` is given, or shapes do not fit.

    >>> mask, moved = solve(jnp.array([[1.0], [2.0]]), jnp.array([[2.0, 1.0], [1.0, 2.0]]), prune=1, dampening=0.0)
    >>> mask.ravel(), moved.ravel()  # the second weight makes up for half of the first
    (Array([False,  True], dtype=bool), Array([0. , 2.5], dtype=float32))
    """
    pieces = (xx,) if isinstance(xx, jax.Array) else tuple(xx)
    _check(w.shape, [piece.shape for piece in pieces], prune, n_m, mask, block)
    if w.ndim == 2:
        given = [None if m is None else m[None] for m in (mask, alive)]
        words: dict[str, Any] = {
            "by_output": by_output,
            "across": across,
            "period": period,
            "block": block,
            "dampening": dampening,
        }
        found = solve(w[None], [p[None] for p in pieces], prune=prune, n_m=n_m, mask=given[0], alive=given[1], **words)
        return found[0][0], found[1][0]
    along = None if across else n_m
    blocks = [_blocks(piece.shape[-1], block, along[1] if along else 1, period) for piece in pieces]
    if alive is not None and mask is not None:
        mask = mask & alive
    quotas = None if prune is None else _quotas(w.shape, alive, list(itertools.chain(*blocks)), prune, by_output)
    start, masks, weights = 0, [], []
    for piece, own in zip(pieces, blocks, strict=True):
        factor, used = _factor(piece, dampening)
        size = piece.shape[-1]
        moved = jnp.where(used[:, :, None], _cut(w, start, size).astype(jnp.float32), 0)
        kept, before = (None if m is None else _cut(m, start, size) for m in (mask, alive))
        mine, quotas = (None, None) if quotas is None else (quotas[: len(own)], quotas[len(own) :])
        _, left, chosen = _sweep(_Given(factor, kept, before, mine, n_m, across), moved, own, 0)
        start += size
        masks.append(chosen)
        weights.append(left.astype(w.dtype))
    return _joint(masks), _joint(weights)


def _joint(pieces: Sequence[jax.Array]) -> jax.Array:
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=1)


def costs(w: jax.Array, xx: jax.Array | Sequence[jax.Array], *, dampening: float = 0.01) -> jax.Array:
    """What it costs a layer to lose one weight, if the others make up for it: w_i^2 / (2 [H^-1]_ii).

    Args:
        w: as of `solve`.
        xx: as of `solve`, mean over examples.
        dampening: as of `solve`.

    Returns:
        float32, shaped like `w`, >= 0, in squared units of the outputs; 0 for inputs that are always zero.

    >>> costs(jnp.array([[1.0], [2.0]]), jnp.array([[2.0, 1.0], [1.0, 2.0]]), dampening=0.0).ravel().round(2)
    Array([0.75, 3.  ], dtype=float32)
    """
    pieces = (xx,) if isinstance(xx, jax.Array) else tuple(xx)
    factors = [_factor(piece, dampening) for piece in pieces]
    shares = [used / jnp.sum(jnp.square(u), axis=-2) for u, used in factors]  # H^-1 = U^T U
    return 0.5 * jnp.square(w.astype(jnp.float32)) * jnp.concatenate(shares, axis=-1)[..., None]


def _check(
    w: tuple[int, ...],
    xx: Sequence[tuple[int, ...]],
    prune: int | None,
    n_m: tuple[int, int] | None,
    mask: jax.Array | None,
    block: int,
) -> None:
    square = all(piece == (*w[:-2], piece[-1], piece[-1]) for piece in xx)
    if len(w) not in (2, 3) or not square or sum(piece[-1] for piece in xx) != w[-2]:
        shown = ", ".join(str(list(piece)) for piece in xx)
        raise UserMistake(f"w is {list(w)} and xx {shown}, but they must be [.., in, out] and [.., in, in]")
    if sum(given is not None for given in (prune, n_m, mask)) != 1:
        raise UserMistake("give one of prune, n_m and mask")
    if prune is not None and not 0 <= prune <= math.prod(w):
        raise UserMistake(f"prune = {prune}: must be from 0 to {math.prod(w)}, the number of weights")
    if n_m is not None and (not 1 <= n_m[0] < n_m[1] or block % n_m[1]):
        raise UserMistake(f"n_m = {n_m}: n must be at least 1 and below m, and block, {block}, a multiple of m")


def _blocks(inputs: int, block: int, m: int, period: int | None) -> tuple[int, ...]:
    """How long blocks are, one after the other; what is left of m inputs is one of its own."""
    if period is not None and inputs > period and period % m:
        return _blocks(period, block, m, None) * (inputs // period)
    whole = inputs - inputs % m
    found = [min(block, whole - start) for start in range(0, whole, block)]
    return tuple(found if whole == inputs else [*found, inputs - whole])


def _quotas(
    shape: tuple[int, ...], alive: jax.Array | None, blocks: Sequence[int], prune: int, by_output: bool
) -> list[np.ndarray]:
    """How many of each block die, earlier ones among them, all together or by output `[groups, out]`.

    They are shared out by the weights that blocks have left, so that they add up.
    """
    groups, _, outputs = shape
    sizes = np.repeat(np.asarray(blocks), groups * outputs).reshape(len(blocks), groups, outputs).astype(np.int64)
    living = sizes if alive is None else _living(alive, blocks)
    if not by_output:
        sizes, living = (a.sum(axis=(1, 2)) for a in (sizes, living))
    wanted = prune // (groups * outputs) if by_output else prune
    total = living.sum(axis=0)
    new = np.maximum(wanted - (sizes - living).sum(axis=0), 0)
    ends = (new * np.cumsum(living, axis=0) * 2 + total) // np.maximum(2 * total, 1)  # rounded
    dying = np.diff(ends, axis=0, prepend=np.zeros_like(ends[:1])) + sizes - living
    return list(dying.astype(np.int32))


def _living(alive: jax.Array, blocks: Sequence[int]) -> np.ndarray:
    """Living weights by block and output, `[blocks, groups, out]`."""
    starts = np.cumsum([0, *blocks])[:-1]
    counts = np.add.reduceat(np.asarray(alive), starts, axis=1, dtype=np.int64)
    return counts.transpose(1, 0, 2)


def _factor(xx: jax.Array, dampening: float) -> tuple[jax.Array, jax.Array]:
    """The upper U of H^-1 = U^T U, whose row i is the first of H_F^-1 over the root of its diagonal; who is used."""
    h, used = _dampened(xx, dampening)
    return _reversed(_inverse(h)), used  # H = R R^T, R upper, and U is its inverse


@jax.jit
def _dampened(xx: jax.Array, dampening: jax.Array) -> tuple[jax.Array, jax.Array]:
    """H, its inputs in reverse; who is used."""
    diagonal = jnp.diagonal(xx, axis1=-2, axis2=-1).astype(jnp.float32)
    used = diagonal > 0
    added = jnp.where(used, dampening * jnp.mean(diagonal, axis=-1, keepdims=True), 1)
    return _reversed(
        xx.astype(jnp.float32) + jnp.broadcast_to(jnp.eye(xx.shape[-1]), xx.shape) * added[..., None, :]
    ), used


@jax.jit
def _reversed(a: jax.Array) -> jax.Array:
    return a[..., ::-1, ::-1]


def _inverse(h: jax.Array) -> jax.Array:
    """The inverse of the Cholesky factor of H, by halves: but for the smallest ones, it is all products."""
    if h.shape[-1] <= SMALL:
        return _of_small(h)
    first = _inverse(h[..., : h.shape[-1] // 2, : h.shape[-1] // 2])
    below, rest = _eliminate(h, first)
    return _joined(first, below, _inverse(rest))


@jax.jit
def _of_small(h: jax.Array) -> jax.Array:
    """One matrix after the other: batches of factorisations can wait for one another for ever, see `solvers`."""

    def one(h: jax.Array) -> jax.Array:
        return lax.linalg.triangular_solve(jnp.linalg.cholesky(h), jnp.eye(len(h)), left_side=True, lower=True)

    return one(h) if h.ndim == 2 else lax.map(one, h)


@jax.jit
def _eliminate(h: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array]:
    half = first.shape[-1]
    below = jnp.matmul(h[..., half:, :half], first.mT, precision=HIGHEST)
    return below, h[..., half:, half:] - jnp.matmul(below, below.mT, precision=HIGHEST)


@jax.jit
def _joined(first: jax.Array, below: jax.Array, rest: jax.Array) -> jax.Array:
    corner = -jnp.matmul(rest, jnp.matmul(below, first, precision=HIGHEST), precision=HIGHEST)
    return jnp.block([[first, jnp.zeros_like(corner.mT)], [corner, rest]])


class _Given(NamedTuple):
    factor: jax.Array  # [groups, in, in]
    mask: jax.Array | None
    alive: jax.Array | None
    quotas: list[np.ndarray] | None
    n_m: tuple[int, int] | None
    across: bool


def _sweep(
    given: _Given, w: jax.Array, blocks: Sequence[int], start: int, number: int = 0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Errors, weights and mask of some inputs, `[groups, size, out]`: of the first half, then of the other.

    So what the first half does to the other is one product, and no product is wasted on zeros.
    """
    size = sum(blocks)
    if len(blocks) == 1:
        tiers = [None if m is None else _cut(m, start, size) for m in (given.mask, given.alive)]
        dying = None if given.quotas is None else jnp.asarray(given.quotas[number])
        return _block(w, given.factor, start, *tiers, dying, n_m=given.n_m, across=given.across)
    middle = len(blocks) // 2
    left = sum(blocks[:middle])
    first = _sweep(given, _cut(w, 0, left), blocks[:middle], start, number)
    right = _later(w, first[0], given.factor, start)
    rest = _sweep(given, right, blocks[middle:], start + left, number + middle)
    return tuple(jnp.concatenate(pair, axis=1) for pair in zip(first, rest, strict=True))  # type: ignore[return-value]


@partial(jax.jit, static_argnums=2)
def _cut(a: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(a, start, size, axis=1)


@jax.jit
def _later(w: jax.Array, errors: jax.Array, factor: jax.Array, start: jax.Array) -> jax.Array:
    """The inputs after those that made the errors, updated."""
    left = errors.shape[1]
    right = w.shape[1] - left
    rows = lax.dynamic_slice_in_dim(factor, start, left, axis=1)
    u = lax.dynamic_slice_in_dim(rows, start + left, right, axis=2)  # [groups, left, right]
    return w[:, left:] - jnp.einsum("glr,glo->gro", u, errors, precision=HIGHEST)


@partial(jax.jit, static_argnames=("n_m", "across"))
def _block(
    w: jax.Array,
    factor: jax.Array,
    start: jax.Array,
    mask: jax.Array | None,
    alive: jax.Array | None,
    dying: jax.Array | None,
    *,
    n_m: tuple[int, int] | None,
    across: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One block of inputs: its weights are chosen and moved; errors, weights and mask `[groups, block, out]`."""
    groups, size, _ = w.shape
    rows = lax.dynamic_slice_in_dim(factor, start, size, axis=1)
    u = lax.dynamic_slice_in_dim(rows, start, size, axis=2)  # [groups, block, block]
    roots = jnp.diagonal(u, axis1=1, axis2=2)  # [groups, block]
    if dying is not None:
        mask = _cheapest(jnp.square(w / roots[..., None]), alive, dying)
    if n_m is not None and across:
        tier = None if alive is None else alive.mT
        mask, n_m = n_of_m(jnp.square(w / roots[..., None]).mT, tier, *n_m).mT, None
        mask = mask if alive is None else mask & alive
    chosen = jnp.ones(w.shape, bool) if mask is None else mask
    group = min(n_m[1], size) if n_m else 1
    step = max(n for n in range(group, size + 1, group) if size % n == 0 and n <= max(STEP, group))

    def one(i: jax.Array, state: tuple[jax.Array, ...], first: jax.Array) -> tuple[jax.Array, ...]:
        """One input of a step, which begins at `first`."""
        w, chosen, errors = state
        row = lax.dynamic_slice(u, (0, first + i, first), (groups, 1, step))[:, 0]  # [groups, step]
        root = lax.dynamic_slice_in_dim(roots, first + i, 1, axis=1)
        lives = lax.dynamic_index_in_dim(chosen, i, axis=1, keepdims=False)
        old = lax.dynamic_index_in_dim(w, i, axis=1, keepdims=False)
        error = jnp.where(lives, 0, old) / root  # [groups, out]
        w = w - row[:, :, None] * error[:, None]
        w = lax.dynamic_update_index_in_dim(w, jnp.where(lives, old, 0), i, axis=1)  # exactly
        return w, chosen, lax.dynamic_update_index_in_dim(errors, error, i, axis=1)

    def sweep(s: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        first = s * step
        all_w, all_chosen, all_errors = state
        here = lax.dynamic_slice_in_dim(u, first, step, axis=2)  # [groups, block, step]
        w = _cut(all_w, first, step) - jnp.einsum("gbs,gbo->gso", here, all_errors, precision=HIGHEST)
        state = w, _cut(all_chosen, first, step), jnp.zeros(w.shape)

        def of_group(g: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            if n_m is not None:
                w, chosen, errors = state
                root = lax.dynamic_slice_in_dim(roots, first + g * group, group, axis=1)
                tier = None if alive is None else _cut(alive, first + g * group, group)
                found = n_of_m(jnp.square(_cut(w, g * group, group) / root[..., None]), tier, *n_m)
                found = found if tier is None else found & tier
                state = w, lax.dynamic_update_slice_in_dim(chosen, found, g * group, axis=1), errors
            return lax.fori_loop(g * group, (g + 1) * group, partial(one, first=first), state)

        done = lax.fori_loop(0, step // group, of_group, state)
        return tuple(
            lax.dynamic_update_slice_in_dim(a, b, first, axis=1)
            for a, b in zip((all_w, all_chosen, all_errors), done, strict=True)
        )

    found, chosen, errors = lax.fori_loop(0, size // step, sweep, (w, chosen, jnp.zeros(w.shape)))
    return errors, found, chosen


def _cheapest(costs: jax.Array, alive: jax.Array | None, dying: jax.Array) -> jax.Array:
    """All but the `dying` cheapest of a block, or of each output; what is dead goes first, and stays."""
    if alive is not None:
        costs = jnp.where(alive, costs, -1)
    if dying.ndim:
        order = jnp.argsort(costs, axis=1, stable=True)
        chosen = jnp.argsort(order, axis=1) >= dying[:, None]
    else:
        chosen = all_but_lowest([costs], [None], dying)[0]
    return chosen if alive is None else chosen & alive
