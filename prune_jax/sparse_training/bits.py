"""Masks that a step reads again and again, as bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from prune_jax.trees import PyTree

SMALL = 1 << 16  # a mask of fewer bytes stays in the caches anyway


def in_bits(masks: PyTree) -> PyTree:
    """`masks` again, on CPUs by way of bits: an optimizer's kernels then read an eighth of the bytes each.

    A step reads every mask once for each moment and once for the weights, as XLA makes a loop over memory of each. On
    accelerators it makes one loop of all, which reads the mask but once.
    """
    return jax.tree.map(lambda mask: lax.platform_dependent(mask, cpu=_by_bits, default=lambda mask: mask), masks)


def _by_bits(mask: jax.Array) -> jax.Array:
    if mask.size < SMALL or mask.ndim < 2 or mask.shape[-2] % 8:
        return mask
    *lead, rows, columns = mask.shape  # eight rows are a byte: columns stay side by side
    place = jnp.expand_dims(jnp.arange(8, dtype=jnp.uint8), (*range(len(lead) + 1), len(lead) + 2))
    by_eight = mask.reshape(*lead, rows // 8, 8, columns).astype(jnp.uint8)
    packed = jnp.sum(by_eight << place, axis=-2, keepdims=True, dtype=jnp.uint8)
    return ((packed >> place & 1) != 0).reshape(mask.shape)
