"""The Gauss-Newton part of a Hessian, J^T H_L J: the curvature of the loss by the outputs, seen by the weights.

It takes a loss whose two parts are known, the network and what its outputs cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from prune_jax.errors import UserMistake
from prune_jax.trees import PyTree


@dataclass(frozen=True)
class Composed:
    """A mean loss in two parts, `(*held, params, batch) -> scalar`; equal for equal parts, so that it compiles once.

    Attributes:
        loss: `loss(outputs, batch) -> scalar or [batch]`.
        apply: `apply(*held, params, *inputs) -> outputs`.
        inputs: `inputs(batch)` answers a tuple of the network's inputs.
    """

    loss: Callable[[PyTree, PyTree], jax.Array]
    apply: Callable[..., PyTree]
    inputs: Callable[[PyTree], tuple[Any, ...]]

    def __call__(self, *given: Any, **held: Any) -> jax.Array:
        """The mean loss."""
        return self.of_outputs(self.outputs(*given, **held), given[-1])

    def outputs(self, *given: Any, **held: Any) -> PyTree:
        """What the network answers to the inputs of the batch, which comes last."""
        *before, batch = given
        return self.apply(*before, *self.inputs(batch), **held)

    def of_outputs(self, outputs: PyTree, batch: PyTree) -> jax.Array:
        """What they cost."""
        return jnp.mean(self.loss(outputs, batch))


def check_composed(loss: Callable[..., jax.Array]) -> tuple[Composed, Partial]:
    """The parts of a loss, and itself with what it holds; refuses one whose parts are not known."""
    if isinstance(loss, Partial) and isinstance(loss.func, Composed):
        return loss.func, loss
    raise UserMistake(
        "curvature gauss_newton is made of a network and of what its outputs cost, but the loss is one function: give "
        "loss=pj.composed(loss, apply), of loss(outputs, batch) and apply(params, *inputs), or take curvature hessian."
    )


def product(
    direction: PyTree, loss: Callable[..., jax.Array], whole: Callable[[PyTree], PyTree], chosen: PyTree, batch: PyTree
) -> PyTree:
    """J^T (H_L (J v)): forward through the network, the loss's Hessian by the outputs, and back; no matrix is formed.

    J is the Jacobian of the outputs by the chosen leaves, H_L the Hessian of the loss by the outputs; the product is
    the Hessian's without the curvature of the network itself (Schraudolph 2002, Neural Computation 14).

    Args:
        direction: v, shaped and typed like `chosen`.
        loss: a `Partial` of a `Composed`.
        whole: makes of the chosen leaves all parameters.
        chosen: the leaves to differentiate by.
        batch: of the loss.
    """
    parts, held = check_composed(loss)

    def outputs(chosen: PyTree) -> PyTree:
        return parts.outputs(*held.args, whole(chosen), batch, **held.keywords)

    answers, moved = jax.jvp(outputs, (chosen,), (direction,))
    bent = jax.jvp(jax.grad(lambda y: parts.of_outputs(y, batch)), (answers,), (moved,))[1]
    return jax.vjp(outputs, chosen)[1](bent)[0]
