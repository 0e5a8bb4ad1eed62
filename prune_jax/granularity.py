"""Granularity: what dies together. Scores of weights -> scores of units, and masks of units -> masks of weights.

Units are tiles of a leaf. Their scores and masks have one axis for each axis that is cut into tiles, and none for those
that a tile takes whole. Of n:m the units are single weights, that compete in groups of m.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from prune_jax.errors import UserMistake
from prune_jax.notation import Granularity, listed, read_granularity
from prune_jax.trees import PyTree, leaves_by_path, map_by_path

Written = str | Mapping[Any, Any] | Granularity
Shape = tuple[int, ...]
Tile = tuple[int | None, ...]  # how long it is along each axis of a leaf; None: it takes the axis whole

# The tile of each granularity, by the number of the leaf's axes; the last two are those of a kernel [.., in, out].
TILES: dict[str, Callable[..., Tile]] = {
    "weight": lambda ndim: (1,) * ndim,
    "n:m": lambda ndim, n, m, axis=-2: (1,) * ndim,
    "block": lambda ndim, rows, columns: (1,) * (ndim - 2) + (rows, columns),
    "kernel": lambda ndim: (None,) * (ndim - 2) + (1,) * min(ndim, 2),
    "neuron": lambda ndim: (None,) * (ndim - 1) + (1,) * min(ndim, 1),
}
GRANULARITIES = tuple(TILES)

# What is made of the scores of a unit's weights; what stands where an edge cuts a unit; and the power of
# (weights of a whole unit) / (weights that it has) that makes up for it.
_COMBINE: dict[str, tuple[Callable[[jax.Array, tuple[int, ...]], jax.Array], float, float]] = {
    "sum": (lambda s, axes: jnp.sum(s, axes), 0, 1),
    "mean": (lambda s, axes: jnp.mean(s, axes), 0, 1),
    "l1": (lambda s, axes: jnp.sum(jnp.abs(s), axes), 0, 1),
    "l2": (lambda s, axes: jnp.sqrt(jnp.sum(s * s, axes)), 0, 0.5),
    "max": (lambda s, axes: jnp.max(s, axes), -math.inf, 0),
    "first": (lambda s, axes: s[tuple(0 if d in axes else slice(None) for d in range(s.ndim))], 0, 0),
}

T = TypeVar("T")


def check_granularity(granularity: Written, known: tuple[str, ...] = GRANULARITIES) -> Granularity:
    """Reads a granularity and refuses one of a family that is not `known`."""
    try:
        found = read_granularity(granularity)
    except UserMistake as mistake:
        raise UserMistake(f"granularity {granularity!r} {mistake}") from None
    if found.family not in known:
        shown = repr(granularity) if isinstance(granularity, str) else str(found)
        raise UserMistake(f"granularity {shown} is not possible here (allowed: {listed(known)})")
    return found


def check_leaves(shapes: Mapping[str, Shape], granularity: Written) -> None:
    """Refuses leaves that have no such units, and n:m where no leaf has a group of m."""
    unit = check_granularity(granularity)
    for path, shape in shapes.items():
        _tile(shape, unit, path)
    if unit.fixed and not any(has_groups(shape, unit.numbers[1], unit.axis) for shape in shapes.values()):
        found = ", ".join(f"{path!r} {list(shape)}" for path, shape in shapes.items())
        raise UserMistake(
            f"{unit} needs a kernel [.., in, out] of {unit.numbers[1]} inputs or more, but there is only {found}"
            if unit.axis == -2
            else f"{unit} needs a kernel of {unit.numbers[1]} or more along axis {unit.axis}, but there is only {found}"
        )


def has_groups(shape: Shape, m: int, axis: int = -2) -> bool:
    """Whether n:m prunes such a leaf: one of two axes or more, m or more along that axis; others stay dense."""
    return len(shape) >= 2 and -len(shape) <= axis < len(shape) and shape[axis] >= m


def unit_shape(shape: Shape, granularity: Written = "weight") -> Shape:
    """The shape of the units of a leaf.

    >>> unit_shape((5, 5, 6, 16), "kernel"), unit_shape((300, 100), {"block": [8, 8]})
    ((6, 16), (38, 13))
    """
    tile = _tile(shape, check_granularity(granularity))
    return tuple(-(-size // length) for size, length in zip(shape, tile, strict=True) if length)


def unit_scores(scores: PyTree, granularity: Written = "weight", *, combine: str = "sum") -> PyTree:
    """Scores of units from those of the weights that they hold.

    - `weight`, and n:m such as `"2:4"`: each weight.
    - `{"block": [r, c]}`: r x c weights on the last two axes of a leaf; each index of the axes before them, such as
      each position of a convolution, has its own grid of blocks. Blocks at the far edges may be smaller.
    - `kernel`: one input and one output channel, all positions of a convolution `[height, width, in, out]` together;
      of a leaf of two axes or fewer, one weight.
    - `neuron`: a slice along the last axis: the incoming weights of one unit of a dense layer `[in, out]`, one filter
      of a convolution.

    A block of k weights is scored as a whole one of the same mean would be, lest it die for being small: its sum times
    r c / k, its l2 norm times sqrt(r c / k); `mean`, `max` and `first` do not grow with k.

    Args:
        scores: arrays shaped like the weights.
        granularity: what dies together.
        combine: what is made of a unit's scores: their `sum`, `mean`, `l1` or `l2` norm, `max`, or the `first` of them.

    Returns:
        Arrays of the shape that `unit_shape` tells.

    >>> unit_scores({"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}, "neuron")["kernel"]
    Array([4., 6.], dtype=float32)
    >>> unit_scores({"kernel": jnp.array([[1.0, 2.0, 5.0]])}, {"block": [1, 2]})["kernel"]
    Array([[ 3., 10.]], dtype=float32)
    """
    unit = check_granularity(granularity)
    if unit.family in ("weight", "n:m"):
        return scores
    function, edge, power = _COMBINE[combine]

    def of_leaf(path: str, leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        tile = _tile(leaf.shape, unit, path)
        units = _reduce(leaf, tile, edge, function)
        return units if not power else units * _makeup(leaf.shape, tile) ** power

    return map_by_path(of_leaf, scores)


def living_units(masks: PyTree, granularity: Written = "weight") -> PyTree:
    """Which units have a living weight."""
    unit = check_granularity(granularity)
    if unit.family in ("weight", "n:m"):
        return masks
    return map_by_path(
        lambda path, m: _reduce(
            jnp.asarray(m), _tile(jnp.shape(m), unit, path), False, lambda x, axes: jnp.any(x, axes)
        ),
        masks,
    )


def weight_masks(
    masks: PyTree, like: PyTree, granularity: Written = "weight", *, params: PyTree | None = None
) -> PyTree:
    """Masks of weights from those of units.

    Args:
        masks: bool arrays shaped like the units.
        like: arrays, or shapes, of the weights under the same paths.
        granularity: what dies together.
        params: the network's parameters; with them the bias `[out]` beside a kernel dies with its neurons.

    Returns:
        Bool arrays shaped like the weights; with `params`, in the containers of `params`, None where nothing is masked.
    """
    unit = check_granularity(granularity)
    shapes = {path: jnp.shape(leaf) for path, leaf in leaves_by_path(like).items()}
    units = {path: jnp.asarray(mask) for path, mask in leaves_by_path(masks).items()}
    whole = {path: _expand(mask, shapes[path], _tile(shapes[path], unit, path)) for path, mask in units.items()}
    if params is None:
        return map_by_path(lambda path, _: whole[path], masks)
    if unit.family == "neuron":
        for path, leaf in leaves_by_path(params).items():
            kernel = next((p for p in units if _is_bias_of(path, p)), None)
            if kernel and path not in whole and jnp.shape(leaf) == units[kernel].shape:
                whole[path] = units[kernel]
    return map_by_path(lambda path, _: whole.get(path), params)


def _tile(shape: Shape, unit: Granularity, path: str = "") -> Tile:
    if unit.family == "block" and len(shape) < 2:
        name = repr(path) if path else "one leaf"
        raise UserMistake(f"{unit} needs kernels [.., in, out], but {name} is {list(shape)}; exclude it")
    return TILES[unit.family](len(shape), *unit.numbers)


def _reduce(leaf: jax.Array, tile: Tile, edge: Any, function: Callable[[jax.Array, tuple[int, ...]], T]) -> T:
    """Calls `function(array, axes)`, the axes being those along which the members of one unit lie."""
    room = [(0, -size % (length or 1)) for size, length in zip(leaf.shape, tile, strict=True)]
    if any(after for _, after in room):
        leaf = jnp.pad(leaf, room, constant_values=edge)
    shape: list[int] = []
    axes: list[int] = []
    for size, length in zip(leaf.shape, tile, strict=True):
        shape += [size] if length in (None, 1) else [size // length, length]  # type: ignore[operator]
        if length != 1:
            axes.append(len(shape) - 1)
    return function(leaf.reshape(shape), tuple(axes))


def _makeup(shape: Shape, tile: Tile) -> np.ndarray:
    """How many times more weights a whole unit has than each unit, `[units]`."""
    cut = [(size, length) for size, length in zip(shape, tile, strict=True) if length]
    along = [length / np.minimum(length, size - length * np.arange(-(-size // length))) for size, length in cut]
    return functools.reduce(np.multiply, np.ix_(*along), np.ones((1,) * len(along))).astype(np.float32)


def _expand(units: jax.Array, shape: Shape, tile: Tile) -> jax.Array:
    pairs = list(zip(shape, tile, strict=True))
    mask = units.reshape([-(-size // length) if length else 1 for size, length in pairs])
    for axis, (size, length) in enumerate(pairs):
        if length not in (None, 1):
            mask = jax.lax.slice_in_dim(jnp.repeat(mask, length, axis=axis), 0, size, axis=axis)
    return jnp.broadcast_to(mask, shape)


def _is_bias_of(path: str, kernel: str) -> bool:
    """Whether `path` is named `bias` and lies beside `kernel`; NNX states add a key such as `value` to both."""
    a, b = path.split("/"), kernel.split("/")
    different = [(x, y) for x, y in zip(a, b, strict=False) if x != y]
    return len(a) == len(b) and len(different) == 1 and different[0][0] == "bias"
