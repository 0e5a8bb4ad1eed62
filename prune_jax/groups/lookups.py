"""Rules of primitives that read or write at positions that are computed, and of those that make positions."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn

from prune_jax.groups.moves import moved
from prune_jax.groups.values import UNKNOWN, Axis, Dead, Value, join, same, vague
from prune_jax.groups.walk import Walk, bind, fixed_axes, opaque, rule, shape_of

_SCATTERS = [f"scatter{mark}{how}" for how in ("add", "sub", "mul", "min", "max") for mark in "-_"]


@rule("dynamic_slice")
def dynamic_slice(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Axes that are taken whole pass; others are indexed by number."""
    x, *starts = operands
    text = "it is indexed by a number that is computed"
    axes = []
    for size, axis in zip(eqn.params["slice_sizes"], x.axes, strict=True):
        if size == axis.size:
            axes.append(axis.settled())
        else:
            walk.fix(eqn, axis, text)
            axes.append(walk.never(eqn, size, text))

    def rewrite() -> Any:
        return bind(eqn, [o.array for o in operands], slice_sizes=tuple(walk.size(axis) for axis in axes))

    return walk.outputs(eqn, [axes], [x, *starts], rewrite=rewrite, const=x.const)


@rule("dynamic_update_slice")
def dynamic_update_slice(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Axes that are replaced whole are one; others are indexed by number."""
    x, new = operands[:2]
    text = "it is indexed by a number that is computed"
    axes = []
    for old, other in zip(x.axes, new.axes, strict=True):
        if old.size == other.size:
            axes.append(Axis(walk.tie(eqn, old, other), join([old.dead, other.dead])))
        else:
            walk.fix(eqn, old, text)
            walk.fix(eqn, other, text)
            axes.append(walk.never(eqn, old.size, text))
    return walk.outputs(eqn, [axes], operands)


@rule("gather")
def gather(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Axes that are taken whole pass; a lookup by constant numbers moves indices; others are indexed by number."""
    x, indices = operands
    numbers = eqn.params["dimension_numbers"]
    static = _constant_lookup(eqn, x, indices)
    if static is not None:
        return moved(walk, eqn, x, static)
    text = "it is looked up by numbers that are computed"
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    window = [d for d in range(len(x.axes)) if d not in gone]
    offsets = dict(zip(numbers.offset_dims, window, strict=True))
    lookups = iter(range(len(indices.axes) - 1))
    sizes, out = eqn.params["slice_sizes"], shape_of(eqn.outvars[0])
    walk.fix(eqn, indices.axes[-1], text)
    indexed = {i: axis for i, axis in enumerate(indices.axes)}
    for d, s in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        indexed[s] = Axis(walk.tie(eqn, x.axes[d], indices.axes[s]))
    axes = []
    for o in range(len(out)):
        if o not in offsets:
            axes.append(indexed[next(lookups)].settled()._replace(dead=UNKNOWN))
        elif sizes[offsets[o]] == x.axes[offsets[o]].size:
            axes.append(x.axes[offsets[o]].settled())
        else:
            axes.append(walk.never(eqn, out[o], text))
    for d, axis in enumerate(x.axes):
        if d not in numbers.operand_batching_dims and (d in gone or sizes[d] != axis.size):
            walk.fix(eqn, axis, text)

    def rewrite() -> Any:
        cut = [
            walk.size(a) if size == a.size and d not in gone else size
            for d, (size, a) in enumerate(zip(sizes, x.axes, strict=True))
        ]
        return bind(eqn, [x.array, indices.array], slice_sizes=tuple(cut))

    return walk.outputs(eqn, [axes], operands, rewrite=rewrite)


def _constant_lookup(eqn: JaxprEqn, x: Value, indices: Value) -> dict[int, np.ndarray] | None:
    """Axis -> numbers, where whole rows of one axis are looked up by constants and stay in its place."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    axis = numbers.collapsed_slice_dims
    others = tuple(d for d in range(len(x.axes)) if d not in axis)
    plain = len(axis) == 1 and numbers.start_index_map == axis and not numbers.operand_batching_dims
    if not plain or len(indices.axes) != 2 or numbers.offset_dims != others or indices.known is None:
        return None
    if any(sizes[d] != x.axes[d].size for d in others):
        return None
    found = np.asarray(indices.known()).reshape(-1)
    if found.size and (found.min() < 0 or found.max() >= x.axes[axis[0]].size):
        return None
    return {axis[0]: found}


@rule("scatter", *_SCATTERS)
def scatter(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Axes that are written whole are one; others are indexed by number."""
    x, indices, updates = operands
    numbers = eqn.params["dimension_numbers"]
    text = "it is written to by numbers that are computed"
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    window = [d for d in range(len(x.axes)) if d not in gone]
    source = dict(zip(window, numbers.update_window_dims, strict=True))
    lookups = [d for d in range(len(updates.axes)) if d not in numbers.update_window_dims]
    walk.fix(eqn, indices.axes[-1], text)
    for d, i in zip(lookups, range(len(indices.axes) - 1), strict=True):
        walk.tie(eqn, updates.axes[d], indices.axes[i])
    for d, s in zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True):
        walk.tie(eqn, x.axes[d], indices.axes[s])
    axes = []
    for d, axis in enumerate(x.axes):
        if d in source and updates.axes[source[d]].size == axis.size:
            other = updates.axes[source[d]]
            axes.append(Axis(walk.tie(eqn, axis, other), _written(eqn, axis.dead, other.dead)))
        elif d in numbers.operand_batching_dims:
            axes.append(Axis(axis.rows, vague(axis.dead)))
        else:
            walk.fix(eqn, axis, text)
            if d in source:
                walk.fix(eqn, updates.axes[source[d]], text)
            axes.append(walk.never(eqn, axis.size, text))
    return walk.outputs(eqn, [axes], operands)


def _written(eqn: JaxprEqn, old: Dead, new: Dead) -> Dead:
    """What stands at dead indices where something is written to some of them, and how often is not known."""
    name = eqn.primitive.name
    sums = name.endswith(("add", "sub"))
    products = name.endswith("mul")
    if (sums and not same(new, 0.0)) or (products and not same(new, 1.0) and not (same(old, 0.0) and same(new, old))):
        return vague(old, new)
    return join([old] if sums or products else [old, new])


@rule("iota")
def iota(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Numbers by position."""
    if operands:
        return opaque(walk, eqn, operands)
    shape = eqn.params["shape"]

    def make() -> Any:
        return lax.broadcasted_iota(eqn.params["dtype"], shape, eqn.params["dimension"])

    def known() -> Any:
        with jax.ensure_compile_time_eval():
            return make()

    return [walk.whole(None if walk.alive is None else make(), shape, known)]


@rule("random_bits", "rng_uniform")
def random_bits(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Random numbers by position: made whole, then cut, so that what lives meets the same luck."""
    if any(operand.axes for operand in operands):
        return opaque(walk, eqn, operands)
    return [walk.source(lambda: bind(eqn, [operand.array for operand in operands]), shape_of(eqn.outvars[0]))]


@rule("rng_bit_generator")
def rng_bit_generator(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """As random bits, and the key that comes after."""
    (key,) = operands
    for axis in key.axes:
        walk.fix(eqn, axis, "it is a key")
    made = [None, None] if walk.alive is None else bind(eqn, [key.array])
    after = Value(tuple(fixed_axes(walk, eqn, eqn.outvars[0], "it is a key")), array=made[0])
    return [after, walk.source(lambda: made[1], shape_of(eqn.outvars[1]))]
