"""Rules of primitives that move elements about: transposes, reshapes, slices, joins, lookups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from prune_jax.groups.labels import without_fixed_rows
from prune_jax.groups.values import COMPUTABLE, UNKNOWN, WILD, Axis, Dead, Unsettled, Value, join, vague
from prune_jax.groups.walk import Walk, bind, dtype_of, match, opaque, pick, ranks, rule, shape_of


@rule("transpose")
def transpose(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Axes change places."""
    (x,) = operands
    order = [int(i) for i in eqn.params["permutation"]]

    def part(i: int) -> Any:
        return bind(eqn, [walk.dead(x, order[i], dtype_of(eqn.invars[0]))])

    return walk.outputs(eqn, [[x.axes[i] for i in order]], operands, part=part, const=x.const)


@rule("squeeze")
def squeeze(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Axes of one index go."""
    (x,) = operands
    gone = {i % len(x.axes) for i in eqn.params["dimensions"]}
    left = [i for i in range(len(x.axes)) if i not in gone]

    def part(i: int) -> Any:
        return bind(eqn, [walk.dead(x, left[i], dtype_of(eqn.invars[0]))])

    return walk.outputs(eqn, [[x.axes[i] for i in left]], operands, part=part, const=x.const)


@rule("broadcast_in_dim")
def broadcast_in_dim(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """New axes are free: each of their indices holds the same."""
    x = operands[0]
    if len(operands) > 1:
        return opaque(walk, eqn, operands)
    sizes = eqn.params["shape"]
    home = {
        int(out): i for i, out in enumerate(eqn.params["broadcast_dimensions"]) if x.axes[i].size == sizes[int(out)]
    }
    new = COMPUTABLE if x.const is None else x.const
    axes = [x.axes[home[d]] if d in home else _spread(walk, eqn, size, new) for d, size in enumerate(sizes)]

    def shaped(array: Any, i: int | None = None) -> Any:
        size = None if i is None else (array.shape[home[i]] if i in home else 1)
        shape = tuple(size if d == i else walk.size(axis) for d, axis in enumerate(axes))
        return bind(eqn, [array], shape=shape)

    def part(i: int) -> Any:
        return shaped(walk.dead(x, home[i], dtype_of(eqn.invars[0])) if i in home else x.array, i)

    return walk.outputs(eqn, [axes], operands, rewrite=lambda: shaped(x.array), part=part, const=x.const)


def _spread(walk: Walk, eqn: JaxprEqn, size: int, dead: Dead) -> Axis:
    """A new axis all of whose indices hold the same."""
    return walk.never(eqn, 1, "an axis has one index only") if size == 1 else Axis(walk.labels.fresh(size), dead)


@rule("reshape")
def reshape(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Joined axes carry the labels of all; a split axis hands them back, or is seen as a grid from here on."""
    x = operands[0]
    if len(operands) > 1 or 0 in x.shape:
        return opaque(walk, eqn, operands)
    order, sizes = eqn.params.get("dimensions"), eqn.params["new_sizes"]
    if order is not None:  # it transposes first
        array = x.array if x.array is None else jnp.transpose(x.array, order)
        x = Value(tuple(x.axes[i].settled() for i in order), x.const, None, array, weights=x.weights)
    axes: list[Axis | None] = [None] * len(sizes)
    home: dict[int, int] = {}
    for ins, outs in _segments(x.shape, sizes):
        if len(ins) == len(outs) == 1:
            home[outs[0]] = ins[0]
            axes[outs[0]] = x.axes[ins[0]]
            continue
        rows, dead = _merge([x.axes[i] for i in ins])
        for out, axis in zip(outs, _split(walk, eqn, rows, dead, [sizes[d] for d in outs]), strict=True):
            axes[out] = axis
    found = [axis or walk.never(eqn, 1, "an axis has one index only") for axis in axes]

    def shaped(array: Any, i: int | None = None) -> Any:
        size = None if i is None else array.shape[home[i]]
        left = tuple(size if d == i else walk.size(a) for d, a in enumerate(found))
        return bind(eqn, [array], new_sizes=left, dimensions=None)

    def part(i: int) -> Any:
        return shaped(walk.dead(x, home[i], dtype_of(eqn.invars[0])), i)

    return walk.outputs(eqn, [found], operands, rewrite=lambda: shaped(x.array), part=part, const=x.const)


def _segments(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of axes, of more than one index, that hold the same elements before and after."""
    ins = [i for i, size in enumerate(before) if size != 1]
    outs = [i for i, size in enumerate(after) if size != 1]
    found, left, right = [], list[int](), list[int]()
    while ins or outs or left or right:
        a, b = math.prod(before[i] for i in left), math.prod(after[i] for i in right)
        if left and right and a == b:
            found.append((left, right))
            left, right = [], []
        elif ins and (a <= b or not outs):
            left = [*left, ins.pop(0)]
        elif outs:
            right = [*right, outs.pop(0)]
        else:
            break  # an array without elements
    return found


def _merge(axes: Sequence[Axis]) -> tuple[np.ndarray, Dead]:
    """One axis of several: it carries the labels of each."""
    sizes = [axis.size for axis in axes]
    total = math.prod(sizes)
    loose = [(k, axis) for k, axis in enumerate(axes) if not axis.fixed]
    if not loose:
        return np.broadcast_to(axes[0].rows[0, 0], (1, total)), UNKNOWN
    rows = []
    for k, axis in loose:
        shape = [1] * len(sizes)
        shape[k] = axis.size
        rows += [np.broadcast_to(row.reshape(shape), sizes).reshape(-1) for row in without_fixed_rows(axis.rows)]
    return np.stack(rows), join([axis.dead for _, axis in loose])


def _split(walk: Walk, eqn: JaxprEqn, rows: np.ndarray, dead: Dead, sizes: Sequence[int]) -> list[Axis]:
    """Several axes of one."""
    if len(sizes) == 1:
        return [Axis(rows, dead)]
    found: list[list[np.ndarray]] = [[] for _ in sizes]
    for row in rows:
        if (row < 0).all():
            continue
        grid = row.reshape(sizes)
        lines = [np.moveaxis(grid, d, 0).reshape(size, -1) for d, size in enumerate(sizes)]
        varies = [d for d, line in enumerate(lines) if (line != line[:1]).any()]
        if len(varies) == 1:
            found[varies[0]].append(lines[varies[0]][:, 0])
            continue
        reduced = grid[tuple(slice(None) if d in varies else slice(0, 1) for d in range(len(sizes)))]
        shape = [size if d in varies else 1 for d, size in enumerate(sizes)]
        raw = reduced.reshape(-1)
        if not varies or (raw < 0).any() or np.unique(raw).size != raw.size:
            walk.fix(eqn, Axis(row[None]), "an axis is split across its parts")
            continue
        places = np.indices(shape).reshape(len(sizes), -1)
        coordinates = walk.labels.factor(raw, places[varies])
        for d, labels in zip(varies, coordinates, strict=True):
            line = np.zeros(sizes[d], np.int64)
            line[places[d]] = labels
            found[d].append(line)
    never = walk.never(eqn, 1, "an axis is split off one that cannot be pruned").rows[0, 0]
    return [
        Axis(np.stack(lines), dead) if lines else Axis(np.broadcast_to(never, (1, size)))
        for lines, size in zip(found, sizes, strict=True)
    ]


def moved(walk: Walk, eqn: JaxprEqn, operand: Value, sources: dict[int, np.ndarray]) -> list[Value]:
    """The output whose axis `d` holds the operand's indices `sources[d]`, for each `d`."""
    axes = [
        axis._replace(rows=without_fixed_rows(axis.rows[:, sources[d]])) if d in sources else axis
        for d, axis in enumerate(operand.axes)
    ]

    def positions(d: int, alive: bool) -> np.ndarray:
        chosen = walk.keep(operand.axes[d])[sources[d]]
        before = walk.keep(operand.axes[d])
        return ranks(before if alive else ~before)[sources[d][chosen if alive else ~chosen]]

    def taken(array: Any, dead: int | None = None) -> Any:
        for d in sources:
            if d != dead:
                array = pick(array, d, positions(d, alive=True))
            elif array.shape[d] > 1:
                array = pick(array, d, positions(d, alive=False))
        return array

    def part(i: int) -> Any:
        return taken(walk.dead(operand, i, dtype_of(eqn.invars[0])), i)

    return walk.outputs(eqn, [axes], [operand], rewrite=lambda: taken(operand.array), part=part, const=operand.const)


@rule("slice")
def slice_(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Some indices of each axis, in steps."""
    (x,) = operands
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    sources = {
        d: np.arange(start, limit, stride)
        for d, (start, limit, stride) in enumerate(zip(starts, limits, strides, strict=True))
        if (start, limit, stride) != (0, x.axes[d].size, 1)
    }
    return moved(walk, eqn, x, sources)


@rule("rev")
def rev(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Axes backwards: so are they when some indices are gone."""
    (x,) = operands
    turned = {int(d) for d in eqn.params["dimensions"]}
    axes = [axis._replace(rows=axis.rows[:, ::-1]) if d in turned else axis for d, axis in enumerate(x.axes)]

    def part(i: int) -> Any:
        return bind(eqn, [walk.dead(x, i, dtype_of(eqn.invars[0]))])

    return walk.outputs(eqn, [axes], operands, part=part, const=x.const)


@rule("split")
def split(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Pieces of one axis, one after the other."""
    (x,) = operands
    axis, ends = eqn.params["axis"], np.cumsum(eqn.params["sizes"])
    pieces = [
        [
            Axis(without_fixed_rows(a.rows[:, end - size : end]), a.settled().dead) if d == axis else a.settled()
            for d, a in enumerate(x.axes)
        ]
        for size, end in zip(eqn.params["sizes"], ends, strict=True)
    ]
    return walk.outputs(
        eqn,
        pieces,
        operands,
        rewrite=lambda: bind(eqn, [x.array], sizes=tuple(walk.size(piece[axis]) for piece in pieces)),
    )


@rule("stack")
def stack(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Arrays side by side along a new axis, each at its place; the other axes are one."""
    d = eqn.params["axis"] % (len(operands[0].axes) + 1)
    axes = []
    for i in range(len(operands[0].axes)):
        rows = walk.tie(eqn, *(x.axes[i] for x in operands))
        axes.append(Axis(rows, _either([x.axes[i].dead for x in operands])))
    axes.insert(d, walk.never(eqn, len(operands), "arrays are stacked along it"))

    def part(i: int) -> Any:
        k = i if i < d else i - 1
        parts = [walk.dead(x, k, dtype_of(v)) for x, v in zip(operands, eqn.invars, strict=True)]
        return jnp.stack(match(parts, k), axis=d)

    return walk.outputs(eqn, [axes], operands, part=part)


@rule("unstack")
def unstack(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """The indices of one axis, each an array: they keep their places."""
    (x,) = operands
    d = eqn.params["axis"] % len(x.axes)
    walk.fix(eqn, x.axes[d], "each of its indices goes its own way")
    axes = [axis.settled() for i, axis in enumerate(x.axes) if i != d]
    return walk.outputs(eqn, [axes] * len(eqn.outvars), operands)


@rule("tile")
def tile(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Copies of an axis one after the other: an index of a copy dies with its source, or with the copy."""
    (x,) = operands
    reps = tuple(eqn.params["reps"])
    new = len(reps) - len(x.axes)
    whole = [*([None] * new), *x.axes]
    axes, counts = [], list[Axis]()
    for rep, axis in zip(reps, whole, strict=True):
        copy = walk.never(eqn, 1, "an axis has one index only") if rep == 1 else Axis(walk.labels.fresh(rep))
        counts.append(copy)
        if axis is None or rep == 1:
            axes.append(copy if axis is None else axis.settled())
        else:
            rows, dead = _merge([copy, axis])
            axes.append(Axis(rows, dead if axis.fixed else vague(axis.dead)))

    def rewrite() -> Any:
        return jnp.tile(x.array, [walk.size(copy) for copy in counts])

    return walk.outputs(eqn, [axes], operands, rewrite=rewrite)


@rule("concatenate")
def concatenate(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Indices one after the other; the other axes are one."""
    d = eqn.params["dimension"]
    tall = max(len(x.axes[d].rows) for x in operands)
    pieces = [_taller(walk, eqn, x.axes[d].rows, tall) for x in operands]
    loose = [x.axes[d].dead for x in operands if not x.axes[d].fixed]
    axes = []
    for i in range(len(operands[0].axes)):
        if i == d:
            axes.append(Axis(np.concatenate(pieces, axis=1), _either(loose)))
            continue
        rows = walk.tie(eqn, *(x.axes[i] for x in operands))
        axes.append(Axis(rows, _either([x.axes[i].dead for x in operands])))

    def part(i: int) -> Any:
        parts = []
        for x, var in zip(operands, eqn.invars, strict=True):
            dead = int((~walk.keep(x.axes[i])).sum())
            if i == d and not dead:
                continue
            found = walk.dead(x, i, dtype_of(var))
            size = dead if i == d else int((~walk.keep(axes[i])).sum())
            parts.append(jnp.broadcast_to(found, (*found.shape[:i], size, *found.shape[i + 1 :])))
        return jnp.concatenate(parts, axis=d)

    return walk.outputs(eqn, [axes], operands, part=part)


def _either(deads: Sequence[Dead]) -> Dead:
    """What stands at dead indices that come from one of several places, each of which can be computed."""
    found = join(deads) if deads else UNKNOWN
    return COMPUTABLE if deads and isinstance(found, Unsettled) and not {UNKNOWN, WILD} & set(deads) else found


def _taller(walk: Walk, eqn: JaxprEqn, rows: np.ndarray, tall: int) -> np.ndarray:
    if len(rows) == tall:
        return rows
    never = walk.never(eqn, rows.shape[1], "joined with an axis of several parts").rows
    return np.concatenate([rows, np.repeat(never, tall - len(rows), axis=0)])


@rule("pad")
def pad(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """New indices before and after are free; between others they hold them all."""
    x, filler = operands
    number = filler.const
    axes, around = [], dict[int, tuple[np.ndarray, np.ndarray]]()
    for d, ((low, high, inner), axis) in enumerate(zip(eqn.params["padding_config"], x.axes, strict=True)):
        if (low, high, inner) == (0, 0, 0):
            axes.append(axis.settled())
            continue
        if inner or low < 0 or high < 0:
            walk.fix(eqn, axis, "padding goes between its indices, or cuts them")
            axes.append(walk.never(eqn, shape_of(eqn.outvars[0])[d], "padding goes between its indices, or cuts them"))
            continue
        before, after = walk.labels.fresh(low), walk.labels.fresh(high)
        around[d] = (before, after)
        blank = [_taller(walk, eqn, rows, len(axis.rows)) for rows in (before, after)]
        dead = number if number is not None and (axis.fixed or axis.dead == number) else vague(axis.dead)
        axes.append(Axis(np.concatenate([blank[0], axis.rows, blank[1]], axis=1), dead))

    def rewrite() -> Any:
        config = list(eqn.params["padding_config"])
        for d, (before, after) in around.items():
            config[d] = (walk.size(Axis(before)), walk.size(Axis(after)), 0)
        return bind(eqn, [x.array, filler.array], padding_config=tuple(config))

    return walk.outputs(eqn, [axes], operands, rewrite=rewrite)
