"""An Optax wrapper that keeps pruned weights, and their moments, at exactly zero.

Masks are state: saved and sharded with the moments, and replaced without compiling again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from prune_jax.errors import UserMistake
from prune_jax.masks import apply_masks, masks_of
from prune_jax.sparse_training.bits import in_bits
from prune_jax.trees import PyTree, map_by_path


class MaskedState(NamedTuple):
    """The masks, and the state of the optimizer that they wrap."""

    masks: PyTree  # bool, shaped like the parameters; True = alive; leaves that it lacks are dense
    inner: optax.OptState


def masked(inner: optax.GradientTransformation, masks: PyTree) -> optax.GradientTransformationExtraArgs:
    """Wraps `inner`, outermost in a chain, so that pruned weights are exactly zero after every step.

    `inner` sees a gradient and weights that are zero where the mask is `False`, so its moments are zero there too; the
    step of a pruned weight w is -w, whatever `inner` answers. Weights need not be masked beforehand.

    Args:
        inner: any optimizer.
        masks: bool arrays under the paths of the parameters; leaves that it lacks, or that are None, stay dense.

    Returns:
        A transformation whose state is a `MaskedState`; `update` needs the parameters and goes by the state's masks.

    >>> params = {"w": jnp.array([1.0, 2.0])}
    >>> tx = masked(optax.sgd(0.5), {"w": jnp.array([True, False])})
    >>> updates, state = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["w"]
    Array([0.5, 0. ], dtype=float32)
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> MaskedState:
        return MaskedState(masks, inner.init(apply_masks(params, masks)))

    def update(
        updates: PyTree, state: MaskedState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, MaskedState]:
        if params is None:
            raise UserMistake("masked needs the weights: call update(gradients, state, params).")
        alive = in_bits(masks_of(params, state.masks))
        steps, inner_state = inner.update(apply_masks(updates, alive), state.inner, apply_masks(params, alive), **extra)

        def step(path: str, u: jax.Array, w: jax.Array) -> jax.Array:
            return jnp.where(alive[path], u, -w) if path in alive else u  # w + (-w) is 0

        paths = map_by_path(lambda path, _: path, steps)
        return jax.tree.map(step, paths, steps, params), MaskedState(state.masks, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
