"""Criteria that look at no data: at the weights, or at the network that they are in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from prune_jax.criteria.entry import criterion
from prune_jax.selection import shares
from prune_jax.statistics import Statistics
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


@criterion(
    "lamp",
    formula="w^2 / sum of the squares not smaller, in its layer",
    paper="Lee et al. 2021, arXiv:2010.07611",
    granularities=("weight", "n:m"),  # of units: the scope lamp, which compares their own scores
)
def lamp(params: PyTree, stats: Any) -> PyTree:
    """A weight's share of what its layer would be left with, were it the next to die: s_i = w_i^2 / sum_(j >= i) w_j^2.

    The layer is sorted by |w|, equals by position, as in `selection.shares`. Its largest weight scores 1, so that no
    layer loses all before the others do. The scope `lamp` with the criterion `magnitude` is the same.

    Args:
        params: weights, leaves of any shape; each leaf is a layer.
        stats: not used.

    Returns:
        Scores shaped like `params`, float32, in [0, 1], without unit.
    """
    del stats
    return jax.tree.map(lambda w: shares(jnp.abs(w.astype(jnp.float32))), params)


@criterion(
    "synflow",
    formula="|w| * dR/d|w|, R = sum of the outputs at ones, with |weights|",
    paper="Tanaka et al. 2020, arXiv:2006.05467",
    needs=("flow",),
)
def synflow(params: PyTree, stats: Statistics) -> PyTree:
    """How much of what flows through the network, all made positive, goes through a weight: s = |w| dR/d|w|.

    The sum over a layer is the same for each layer, if all are linear or relu and without bias, so that, scored anew as
    it is pruned, none dies out: the paper takes 100 rounds, `schedule: {kind: iterative, rounds: 100}`. Norms,
    saturating activations and softmax stay in place and bend the flow; what goes beyond float32 is refused.

    Args:
        params: weights, leaves of any shape.
        stats: `flow`, shaped like `params`.

    Returns:
        Scores shaped like `params`, float32, >= 0, in units of the outputs.
    """
    return jax.tree.map(lambda w, f: jnp.abs(w.astype(jnp.float32)) * f, params, stats.flow)
