"""Criteria of the second order: how the loss, or its gradient, curves along a weight."""

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


@criterion(
    "obd",
    formula="w^2 * diag(H) / 2, diag(H) = E[z * (H z)], z = ±1; H, or J^T H_L J in its place",
    paper="LeCun et al. 1990, Optimal Brain Damage (NIPS 2); Hutchinson 1990; Schraudolph 2002, Neural Computation 14",
    needs=("hessian_diagonal",),
)
def obd(params: PyTree, stats: Statistics, *, probes: int = 10, curvature: str = "hessian") -> PyTree:
    """The rise of the loss when a weight is removed at a minimum: s = w^2 diag(H) / 2, H the Hessian of the loss.

    The diagonal is estimated with Hutchinson's random signs; LeCun et al. carry it backwards layer by layer, leaving
    out what crosses layers. A weight along which the loss bends down scores below zero, and dies first.

    `curvature: gauss_newton` has J^T H_L J for H, J the Jacobian of the outputs by the weights and H_L the Hessian of
    the loss by the outputs: what LeCun et al. come to when they leave out second derivatives of the network. Its
    diagonal is never negative where the loss is convex in the outputs, as cross entropy and squared error are; an
    estimate below zero counts as zero. For cross entropy of logits it is the Fisher matrix, labels drawn by the model.

    Args:
        params: weights, leaves of any shape.
        stats: `hessian_diagonal`, shaped like `params`.
        probes: random signs for each batch; each costs a Hessian product, about three gradients.
        curvature: `hessian`, or `gauss_newton`, for which the loss is known in two parts: in recipes always, in Python
            where it is `pj.composed(loss, apply)`.

    Returns:
        Scores shaped like `params`, float32, in units of the loss; with `gauss_newton` >= 0.
    """
    del probes  # an option of what `stats` holds
    diagonal = stats.hessian_diagonal
    if curvature == "gauss_newton":
        diagonal = jax.tree.map(lambda h: jnp.maximum(h, 0), diagonal)
    return jax.tree.map(lambda w, h: 0.5 * h * jnp.square(w.astype(jnp.float32)), params, diagonal)


@criterion(
    "grasp",
    formula="w * (H g): the paper's S = -w * (H g), of which the highest die",
    paper="Wang et al. 2020, arXiv:2002.07376",
    needs=("hessian_gradient",),
)
def grasp(params: PyTree, stats: Statistics) -> PyTree:
    """What the norm of the gradient loses with a weight, at initialisation: s = w (H g).

    To first order, removing the weight changes |g|^2 by -2 w (H g). The paper calls S = -w (H g) its score and removes
    the highest; ours is -S, since here the lowest die first. Its logits are divided by a temperature of 200: that is a
    matter of the loss.

    Args:
        params: weights, leaves of any shape.
        stats: `hessian_gradient`, of the whole set, shaped like `params`.

    Returns:
        Scores shaped like `params`, float32, of both signs, in squared units of the loss per squared unit of weight.
    """
    return jax.tree.map(lambda w, p: w.astype(jnp.float32) * p, params, stats.hessian_gradient)
