"""Criteria of the second order: how the loss curves along a weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from prune_jax.criteria.entry import criterion
from prune_jax.statistics import Statistics
from prune_jax.trees import PyTree


@criterion(
    "fisher",
    formula="w^2 * E[g_i^2] / 2",
    paper="Theis et al. 2018, arXiv:1801.05787",
    needs=("example_gradient_square",),
)
def fisher(params: PyTree, stats: Statistics) -> PyTree:
    """The rise of the loss when a weight is removed, with the empirical Fisher diagonal for the Hessian's.

    s = w^2 E[g_i^2] / 2, with g_i the gradient of one example; the gradient of a batch would lose their spread.

    Args:
        params: weights, leaves of any shape.
        stats: `example_gradient_square`, mean over examples, shaped like `params`.

    Returns:
        Scores shaped like `params`, float32, >= 0, in units of the loss (of its square, where it is no log-likelihood).
    """
    squares = stats.example_gradient_square
    return jax.tree.map(lambda w, g2: 0.5 * g2 * jnp.square(w.astype(jnp.float32)), params, squares)
