"""Criteria of the first order: what the gradient of the loss says of a weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from prune_jax.criteria.entry import criterion
from prune_jax.statistics import Statistics
from prune_jax.trees import PyTree


@criterion(
    "sensitivity",
    formula="mean |g|; signed: mean g",
    paper="after Mozer & Smolensky 1989, Skeletonization (NIPS 1)",
    needs=("gradient_abs",),
    needs_if={"signed": ("gradient",)},
)
def sensitivity(params: PyTree, stats: Statistics, *, signed: bool = False) -> PyTree:
    """How strongly the loss answers to each weight: s = mean over batches of |dL/dw|.

    Args:
        params: weights, leaves of any shape.
        stats: `gradient_abs`, or `gradient` if signed, shaped like `params`.
        signed: whether the gradient itself is the score, as some texts write it: s = mean of dL/dw.

    Returns:
        Scores shaped like `params`, float32, in units of the loss per unit of weight.
    """
    return jax.tree.map(lambda _, g: g, params, stats.gradient if signed else stats.gradient_abs)


@criterion("snip", formula="|w * mean g|", paper="Lee et al. 2019, arXiv:1810.02340", needs=("gradient",))
def snip(params: PyTree, stats: Statistics) -> PyTree:
    """The loss's sensitivity to removing each weight: s = |w * dL/dw|, at initialisation or after training.

    The paper divides by the total; we do not, since ranks are the same.

    Args:
        params: weights, leaves of any shape.
        stats: `gradient`, mean over the batches, shaped like `params`.

    Returns:
        Scores shaped like `params`, float32, >= 0, in units of the loss.
    """
    return jax.tree.map(lambda w, g: jnp.abs(w.astype(jnp.float32) * g), params, stats.gradient)


@criterion(
    "taylor",
    formula="mean (g * w)^2",
    paper="Molchanov et al. 2017, arXiv:1611.06440; 2019, arXiv:1906.10771",
    needs=("gradient_square",),
    granularities=(
        "weight",
        "n:m",
        "group",
        "layer",
    ),  # a neuron's score would be the square of a sum, not the sum of these squares
    combine="square of sum",
)
def taylor(params: PyTree, stats: Statistics) -> PyTree:
    """The squared change of the loss when a weight is removed, to first order: s = mean over batches of (g w)^2.

    A group's unit is scored by the square of the sum over its weights, mean over batches of (sum g w)^2.

    Args:
        params: weights, leaves of any shape.
        stats: `gradient_square`, mean over the batches, shaped like `params`.

    Returns:
        Scores shaped like `params`, float32, >= 0, in squared units of the loss.
    """
    return jax.tree.map(lambda w, g2: g2 * jnp.square(w.astype(jnp.float32)), params, stats.gradient_square)
