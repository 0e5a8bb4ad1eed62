"""Weights that a penalty makes exactly zero: the optimizer's step, then the proximal map of the L1 norm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from prune_jax.errors import UserMistake
from prune_jax.sparse_training.changing import SparseState, dense_masks, needed
from prune_jax.sparse_training.entry import method
from prune_jax.trees import PyTree, leaves_by_path, map_by_path


@method(
    "proximal_l1",
    formula="v = w + step; w <- sign(v) max(|v| - lr l1, 0); what is zero is dead, until a step revives it",
    paper="Daubechies et al. 2004, arXiv:math/0307152 (ISTA)",
)
def proximal_l1(
    inner: optax.GradientTransformation,
    *,
    l1: float,
    learning_rate: float | optax.Schedule,
    prunable: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """Minimises loss + l1 sum |w| by proximal steps, which end at exact zeros; how many comes of itself.

    The masks say which weights are not zero. Moments go on, so that a zero weight can come back.

    Deviation from the literature: any optimizer's step stands for the gradient's, and the shrinkage is not scaled by
    its preconditioner.

    Args:
        inner: any optimizer.
        l1: weight of the penalty.
        learning_rate: that of `inner`, or its schedule.
        prunable: patterns of the leaves that may be pruned; left out, floating leaves of two axes or more.
        exclude: patterns of leaves that stay dense.

    Returns:
        A transformation whose state is a `SparseState`; it stands outermost in a chain.

    >>> tx = proximal_l1(optax.sgd(0.5), l1=1.0, learning_rate=0.5)
    >>> params = {"w": jnp.array([2.0, 0.25])}
    >>> updates, state = tx.update({"w": jnp.zeros(2)}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["w"], state.masks["w"]
    (Array([1.5, 0. ], dtype=float32), Array([ True, False], dtype=bool))
    """
    if l1 < 0:
        raise UserMistake(f"l1 = {l1}: must be at least 0")
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> SparseState:
        masks = dense_masks(params, prunable, exclude)
        return SparseState(masks, inner.init(params), jnp.zeros((), jnp.int32), None, None)

    def update(
        updates: PyTree, state: SparseState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, SparseState]:
        params = needed(params)
        steps, moved = inner.update(updates, state.inner, params, **extra)
        shrink = l1 * (learning_rate(state.step) if callable(learning_rate) else learning_rate)
        after = leaves_by_path(optax.apply_updates(params, steps))
        masks = map_by_path(lambda path, _: jnp.abs(after[path]) > shrink, state.masks)
        alive = leaves_by_path(masks)

        def step(path: str, u: jax.Array, w: jax.Array) -> jax.Array:
            if path not in alive:
                return u
            return jnp.where(alive[path], u - (jnp.sign(after[path]) * shrink).astype(u.dtype), -w)

        paths = map_by_path(lambda path, _: path, params)
        return jax.tree.map(step, paths, steps, params), SparseState(masks, moved, state.step + 1, None, None)

    return optax.GradientTransformationExtraArgs(init, update)
