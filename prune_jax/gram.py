"""Products with a kernel written as X W: the kernel as matrices, and the X^T X of what it is multiplied with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

PRIMITIVES = ("dot_general", "conv_general_dilated")
PATCH_BYTES = 1 << 26  # patches of a convolution's inputs that are held at once


def kernel_matrix(eqn: JaxprEqn, kernel: int, w: jax.Array) -> jax.Array:
    """The kernel of a product as `[groups, in, out]`: in what is summed over, groups what stands side by side.

    Of a convolution in are the positions, outermost, and the inputs of one of its groups.

    Args:
        eqn: the product, one of `PRIMITIVES`.
        kernel: which of its operands is the kernel.
        w: an array of the kernel's shape.
    """
    if eqn.primitive.name == "dot_general":
        contracting, batch = (sides[kernel] for sides in eqn.params["dimension_numbers"])
        summed = sorted(contracting)
        free = [d for d in range(w.ndim) if d not in (*summed, *batch)]
        sizes = [math.prod(w.shape[d] for d in axes) for axes in (batch, summed, free)]
        return w.transpose(*batch, *summed, *free).reshape(sizes)
    groups = eqn.params["feature_group_count"]
    outward, inward, *positions = eqn.params["dimension_numbers"].rhs_spec
    w = w.transpose(outward, *positions, inward)
    return w.reshape(groups, w.shape[0] // groups, -1).transpose(0, 2, 1)


def gram_matrices(eqn: JaxprEqn, kernel: int, x: jax.Array, edges: Sequence[int]) -> tuple[jax.Array, ...]:
    """X^T X, summed over all examples and positions, for each piece of the inputs.

    Args:
        eqn: as of `kernel_matrix`.
        kernel: as of `kernel_matrix`.
        x: the other operand.
        edges: where pieces of the inputs begin, and where the last one ends.

    Returns:
        float32 arrays `[groups, size, size]`, one for each piece.
    """
    if eqn.primitive.name == "dot_general":
        return _products(_rows(eqn, kernel, x), edges)
    pieces = partial(_convolved, eqn, edges)
    x = jnp.moveaxis(x, eqn.params["dimension_numbers"].lhs_spec[0], 0)
    held = max(PATCH_BYTES // max(_patch_bytes(eqn), 1), 1)
    chunk = next(size for size in range(min(len(x), held), 0, -1) if len(x) % size == 0)
    if chunk == len(x):
        return pieces(x)
    sums = lax.map(pieces, x.reshape(-1, chunk, *x.shape[1:]))
    return tuple(jnp.sum(each, axis=0) for each in sums)


def kernel_inputs(eqn: JaxprEqn, kernel: int) -> int:
    """How many inputs the kernel sums over for each output."""
    return jax.eval_shape(partial(kernel_matrix, eqn, kernel), eqn.invars[kernel].aval).shape[1]


def _rows(eqn: JaxprEqn, kernel: int, x: jax.Array) -> jax.Array:
    """The values `[groups, rows, in]` that a kernel is multiplied with."""
    contracting, batch = eqn.params["dimension_numbers"]
    pairs = sorted(zip(contracting[kernel], contracting[1 - kernel], strict=True))
    summed, groups = [mine for _, mine in pairs], batch[1 - kernel]
    rows = [d for d in range(x.ndim) if d not in (*summed, *groups)]
    sizes = [math.prod(x.shape[d] for d in axes) for axes in (groups, rows, summed)]
    return x.transpose(*groups, *rows, *summed).reshape(sizes)


def _products(rows: jax.Array, edges: Sequence[int]) -> tuple[jax.Array, ...]:
    rows = rows.astype(jnp.float32)
    parts = [rows[:, :, a:b] for a, b in itertools.pairwise(edges)]
    return tuple(jnp.einsum("gti,gtj->gij", x, x, precision=lax.Precision.HIGHEST) for x in parts)


def _convolved(eqn: JaxprEqn, edges: Sequence[int], x: jax.Array) -> tuple[jax.Array, ...]:
    """Those of the patches of some examples, `[examples, ..]`."""
    words, groups = eqn.params, eqn.params["feature_group_count"]
    batch, feature, *spatial = words["dimension_numbers"].lhs_spec
    moved = [d + 1 if d < batch else d for d in (feature, *spatial)]  # where they are now that examples come first
    x = x.transpose(0, *moved[1:], moved[0])
    dilated = [(low, high, n - 1) for (low, high), n in zip(words["padding"], words["lhs_dilation"], strict=True)]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *dilated, (0, 0, 0)])
    _, _, *axes = words["dimension_numbers"].rhs_spec
    kernel = [_shape(eqn.invars[1])[d] for d in axes]
    out = [_shape(eqn.outvars[0])[d] for d in words["dimension_numbers"].out_spec[2:]]

    def seen(position: tuple[int, ...]) -> jax.Array:
        """What one position of the kernel sees."""
        start = [p * n for p, n in zip(position, words["rhs_dilation"], strict=True)]
        stop = [a + (n - 1) * s + 1 for a, n, s in zip(start, out, words["window_strides"], strict=True)]
        return lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *words["window_strides"], 1)).reshape(
            -1, groups, x.shape[-1] // groups
        )

    patches = jnp.stack([seen(p) for p in itertools.product(*map(range, kernel))], axis=2)
    return _products(jnp.moveaxis(patches.reshape(*patches.shape[:2], -1), 1, 0), edges)


def _patch_bytes(eqn: JaxprEqn) -> int:
    """What the patches of one example take."""
    out = [_shape(eqn.outvars[0])[d] for d in eqn.params["dimension_numbers"].out_spec[2:]]
    return 4 * math.prod(out) * kernel_inputs(eqn, 1) * eqn.params["feature_group_count"]


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape
