"""Weights in blocks small enough that matrices over them fit: the inputs of each output, cut into even pieces.

No block holds weights of two outputs. One matrix for each block takes (weights) x (block) numbers, not weights squared.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def grid(shape: tuple[int, ...], block: int) -> tuple[int, int, int]:
    """How many outputs a leaf has, how many blocks of inputs each, how many weights a block; a vector is one output.

    >>> grid((784, 300), 64), grid((5, 5, 6, 16), 64), grid((10,), 64)
    ((300, 13, 61), (16, 3, 50), (1, 1, 10))
    """
    outputs = shape[-1] if len(shape) > 1 else 1
    inputs = math.prod(shape) // outputs
    count = -(-inputs // block)
    return outputs, count, -(-inputs // count)


def cut(leaf: jax.Array, block: int) -> jax.Array:
    """A leaf `[.., out]` in blocks `[outputs, blocks, size]`, with zeros after the last input.

    >>> cut(jnp.array([[1, 2], [3, 4], [5, 6]]), 2)
    Array([[[1, 3],
            [5, 0]],
    <BLANKLINE>
           [[2, 4],
            [6, 0]]], dtype=int32)
    """
    outputs, count, size = grid(leaf.shape, block)
    lines = leaf.reshape(-1, outputs).T  # [outputs, inputs]
    return jnp.pad(lines, ((0, 0), (0, count * size - lines.shape[1]))).reshape(outputs, count, size)


def join(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The leaf that was cut into these blocks."""
    lines = blocks.reshape(blocks.shape[0], -1)
    return lines[:, : math.prod(shape) // len(lines)].T.reshape(shape)
