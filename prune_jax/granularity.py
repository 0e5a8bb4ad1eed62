"""Granularity: what dies together. Scores of weights -> scores of units, and masks of units -> masks of weights.

A unit score has the shape of the leaf's units: the whole leaf for `weight`, its last axis for `neuron`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from prune_jax.errors import UserMistake, did_you_mean
from prune_jax.trees import PyTree, leaves_by_path, map_by_path

GRANULARITIES = ("weight", "neuron")

_COMBINE = {
    "sum": lambda s, axes: jnp.sum(s, axes),
    "l2": lambda s, axes: jnp.sqrt(jnp.sum(s * s, axes)),
    "max": lambda s, axes: jnp.max(s, axes),
    "first": lambda s, axes: s[(0,) * len(axes)],
}


def check_granularity(granularity: object, known: tuple[str, ...] = GRANULARITIES) -> None:
    """Refuses a granularity that is not `known`."""
    if granularity not in known:
        raise UserMistake(
            f"granularity {granularity!r} is not possible here{did_you_mean(granularity, known)} "
            f"(allowed: {', '.join(known)})"
        )


def unit_scores(scores: PyTree, granularity: str = "weight", *, combine: str = "sum") -> PyTree:
    """Scores of units from those of the weights that they hold.

    A neuron is a slice along the last axis of a kernel: the incoming weights of one unit of a dense layer `[in, out]`,
    one filter of a convolution `[height, width, in, out]`.

    Args:
        scores: arrays shaped like the weights.
        granularity: `weight` or `neuron`.
        combine: what is made of a unit's scores: their `sum`, `l2` norm, `max`, or the `first` of them.

    Returns:
        For `weight` the scores; for `neuron` arrays `[out]`.

    >>> unit_scores({"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}, "neuron")["kernel"]
    Array([4., 6.], dtype=float32)
    """
    check_granularity(granularity)
    if granularity == "weight":
        return scores
    return jax.tree.map(lambda s: _COMBINE[combine](jnp.asarray(s), tuple(range(jnp.ndim(s) - 1))), scores)


def living_units(masks: PyTree, granularity: str = "weight") -> PyTree:
    """Which units have a living weight."""
    check_granularity(granularity)
    if granularity == "weight":
        return masks
    return jax.tree.map(lambda m: jnp.any(jnp.asarray(m), axis=tuple(range(jnp.ndim(m) - 1))), masks)


def weight_masks(masks: PyTree, like: PyTree, granularity: str = "weight", *, params: PyTree | None = None) -> PyTree:
    """Masks of weights from those of units.

    Args:
        masks: bool arrays shaped like the units.
        like: arrays, or shapes, of the weights under the same paths.
        granularity: `weight` or `neuron`.
        params: the network's parameters; with them the bias `[out]` beside a kernel dies with its neurons.

    Returns:
        Bool arrays shaped like the weights; with `params`, in the containers of `params`, None where nothing is masked.
    """
    check_granularity(granularity)
    shapes = {path: jnp.shape(leaf) for path, leaf in leaves_by_path(like).items()}
    units = leaves_by_path(masks)
    whole = {path: jnp.broadcast_to(_rank(mask, len(shapes[path])), shapes[path]) for path, mask in units.items()}
    if params is None:
        return map_by_path(lambda path, _: whole[path], masks)
    if granularity == "neuron":
        for path, leaf in leaves_by_path(params).items():
            kernel = next((p for p in units if _is_bias_of(path, p)), None)
            if kernel and path not in whole and jnp.shape(leaf) == units[kernel].shape:
                whole[path] = units[kernel]
    return map_by_path(lambda path, _: whole.get(path), params)


def _rank(mask: Any, ndim: int) -> jax.Array:
    mask = jnp.asarray(mask)
    return mask.reshape((1,) * (ndim - mask.ndim) + mask.shape)


def _is_bias_of(path: str, kernel: str) -> bool:
    """Whether `path` is named `bias` and lies beside `kernel`; NNX states add a key such as `value` to both."""
    a, b = path.split("/"), kernel.split("/")
    different = [(x, y) for x, y in zip(a, b, strict=False) if x != y]
    return len(a) == len(b) and len(different) == 1 and different[0][0] == "bias"
