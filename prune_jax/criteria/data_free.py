"""Criteria that look at the weights alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from prune_jax.criteria.entry import criterion
from prune_jax.trees import PyTree


@criterion(
    "magnitude",
    formula="|w|; blocks, kernels, neurons: Lp norm, p in {1, 2, inf}",
    paper="Han et al. 2015, arXiv:1506.02626; Li et al. 2017, arXiv:1608.08710",
    combine="p",
)
def magnitude(params: PyTree, stats: Any, *, p: Any = 1) -> PyTree:
    """The size of each weight: s = |w|.

    Keeping the k largest is the projection min ||W - W'||_2 subject to ||W'||_0 <= k, exactly.

    Args:
        params: weights, leaves of any shape.
        stats: not used.
        p: the norm that makes a unit's score of its weights': 1, 2 or inf; weights are scored the same for each.

    Returns:
        Scores shaped like `params`, float32, >= 0, in units of the weights.
    """
    del stats, p
    return jax.tree.map(lambda w: jnp.abs(w.astype(jnp.float32)), params)


@criterion(
    "random",
    formula="u ~ U[0, 1)",
    paper="the baseline that every paper must beat",
    combine="first",  # a sum of more weights would be larger, and its unit no longer random
)
def random(params: PyTree, stats: Any, *, key: jax.Array) -> PyTree:
    """A number drawn for each weight: s ~ U[0, 1). A unit takes the number of its first weight.

    Args:
        params: weights, leaves of any shape.
        stats: not used.
        key: a PRNG key.

    Returns:
        Scores shaped like `params`, float32, in [0, 1).
    """
    del stats
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, max(len(leaves), 1))
    drawn = [jax.random.uniform(k, w.shape, jnp.float32) for k, w in zip(keys, leaves, strict=False)]
    return jax.tree.unflatten(structure, drawn)
