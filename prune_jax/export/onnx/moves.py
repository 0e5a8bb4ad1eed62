"""What changes places and shapes and leaves the numbers as they are; lookups by number."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.lax import GatherScatterMode

from prune_jax.export.onnx.graph import Batch, Graph, Shape, Value, is_static
from prune_jax.export.onnx.walk import Step, rule


@rule("broadcast_in_dim", eager=True)
def broadcast(graph: Graph, step: Step, x: Value, *sizes: Value) -> Value:
    """New axes are held as one index, and so is an axis of one that becomes many."""
    to: list[Any] = [1] * len(step.shape)
    for axis, size in zip(step.params["broadcast_dimensions"], x.held, strict=True):
        to[axis] = size
    held = tuple(to)
    if x.array is not None:
        return Value(step.shape, step.dtype, held, np.reshape(x.array, held))
    return Value(step.shape, step.dtype, held, None, graph.reshape(x.name, x.held, held))


@rule("iota", eager=True)
def iota(graph: Graph, step: Step, *sizes: Value) -> Value:
    """Numbers by position along one axis."""
    axis = step.params["dimension"]
    held = tuple(size if i == axis else 1 for i, size in enumerate(step.shape))
    size = step.shape[axis]
    if not isinstance(size, Batch):
        return Value(step.shape, step.dtype, held, np.arange(size, dtype=step.dtype).reshape(held))  # type: ignore[arg-type]
    end = graph.add("Reshape", graph.vector((size,)), graph.numbers())
    found = graph.add("Range", graph.store(np.int64(0)), end, graph.store(np.int64(1)))
    return Value(step.shape, step.dtype, held, None, graph.reshape(graph.cast(found, step.dtype), (size,), held))


@rule("reshape", "squeeze", "expand_dims")
def reshape(graph: Graph, step: Step, x: Value) -> str:
    """The same numbers in another shape."""
    if step.params.get("dimensions") is not None and step.name == "reshape":
        raise step.refuse("in another order")
    return graph.reshape(graph.full(x), x.shape, step.shape)


@rule("transpose")
def transpose(graph: Graph, step: Step, x: Value) -> Value:
    """Axes change places."""
    order = step.params["permutation"]
    held = tuple(x.held[i] for i in order)
    if x.array is not None:
        return Value(step.shape, step.dtype, held, np.transpose(x.array, order))
    return Value(step.shape, step.dtype, held, None, graph.transpose(x.name, order))


@rule("concatenate")
def concatenate(graph: Graph, step: Step, *values: Value) -> str:
    """One after the other along an axis."""
    return graph.add("Concat", *map(graph.full, values), axis=step.params["dimension"])


@rule("stack")
def stack(graph: Graph, step: Step, *values: Value) -> str:
    """Side by side along a new axis."""
    axis = step.params["axis"] % len(step.shape)
    names = [graph.full(value) for value in values]
    one = (*step.shape[:axis], 1, *step.shape[axis + 1 :])
    parts = [graph.reshape(name, value.shape, one) for name, value in zip(names, values, strict=True)]
    return graph.add("Concat", *parts, axis=axis)


@rule("unstack")
def unstack(graph: Graph, step: Step, x: Value) -> list[str]:
    """The indices of one axis, each an array."""
    axis = step.params["axis"] % len(x.shape)
    one = (*x.shape[:axis], 1, *x.shape[axis + 1 :])
    ones = graph.numbers(*[1] * len(step.shapes))
    parts = graph.many("Split", graph.full(x), ones, outputs=len(step.shapes), axis=axis)
    return [graph.reshape(part, one, shape) for part, shape in zip(parts, step.shapes, strict=True)]


@rule("split")
def split(graph: Graph, step: Step, x: Value) -> list[str]:
    """Pieces of one axis."""
    pieces = graph.vector(step.sizes("sizes"))
    return graph.many("Split", graph.full(x), pieces, outputs=len(step.shapes), axis=step.params["axis"])


@rule("tile")
def tile(graph: Graph, step: Step, x: Value) -> str:
    """Copies one after the other."""
    return graph.add("Tile", graph.full(x), graph.numbers(*step.params["reps"]))


@rule("slice")
def slice_(graph: Graph, step: Step, x: Value) -> str:
    """Some indices of each axis, in steps."""
    starts, limits = step.sizes("start_indices"), step.sizes("limit_indices")
    strides = step.params["strides"] or [1] * len(starts)
    cut = [i for i, size in enumerate(x.shape) if (starts[i], limits[i], strides[i]) != (0, size, 1)]
    if not cut:
        return graph.full(x)
    ends = (graph.vector(tuple(of[i] for i in cut)) for of in (starts, limits))
    return graph.add("Slice", graph.full(x), *ends, graph.numbers(*cut), graph.numbers(*(strides[i] for i in cut)))


@rule("rev")
def rev(graph: Graph, step: Step, x: Value) -> str:
    """Axes backwards."""
    axes = step.params["dimensions"]
    starts, ends, steps = (graph.numbers(*[n] * len(axes)) for n in (-1, np.iinfo(np.int64).min, -1))
    return graph.add("Slice", graph.full(x), starts, ends, graph.numbers(*axes), steps)


@rule("pad")
def pad(graph: Graph, step: Step, x: Value, filler: Value) -> str:
    """New indices before and after each axis, or some fewer."""
    low, high, between = zip(*step.params["padding_config"], strict=True)
    if any(between):
        raise step.refuse("between the indices")
    return graph.add("Pad", graph.full(x), graph.numbers(*low, *high), graph.full(filler))


@rule("dynamic_slice")
def dynamic_slice(graph: Graph, step: Step, x: Value, *starts: Value) -> str:
    """A part of fixed size, from a start that is computed; it is moved so far that it lies inside."""
    cut = [i for i, (of_x, of_part) in enumerate(zip(x.shape, step.shape, strict=True)) if of_x != of_part]
    if not cut:
        return graph.full(x)
    parts = [graph.add("Reshape", graph.cast(graph.full(starts[i]), np.int64), graph.numbers(1)) for i in cut]
    asked = graph.add("Concat", *parts, axis=0)
    taken = graph.vector(tuple(step.shape[i] for i in cut))
    last = graph.add("Sub", graph.vector(tuple(x.shape[i] for i in cut)), taken)
    start = graph.add("Min", graph.add("Max", asked, graph.numbers(0)), last)
    return graph.add("Slice", graph.full(x), start, graph.add("Add", start, taken), graph.numbers(*cut))


@rule("gather")
def gather(graph: Graph, step: Step, x: Value, indices: Value) -> str:
    """Elements, or whole slices, at places that are computed: embeddings, `take`, `take_along_axis`."""
    how = step.params["dimension_numbers"]
    indexed, batched = list(how.start_index_map), list(how.operand_batching_dims)
    rest = [i for i in range(len(x.shape)) if i not in indexed and i not in batched]
    taken = step.sizes("slice_sizes")
    if any(taken[i] != 1 for i in indexed) or any(taken[i] != x.shape[i] for i in rest):
        raise step.refuse("of parts of an axis")
    moved = batched + indexed + rest
    operand = graph.transpose(graph.full(x), moved)
    order = list(how.start_indices_batching_dims)
    order += [i for i in range(len(indices.shape) - 1) if i not in order]
    shape = tuple(indices.shape[i] for i in order)
    where, inside = _places(graph, step, indices, tuple(x.shape[i] for i in indexed))
    where = graph.transpose(where, [*order, len(order)])
    if len(indexed) == 1 and not batched:
        found = graph.add("Gather", operand, graph.reshape(where, (*shape, 1), shape), axis=0)
    else:
        found = graph.add("GatherND", operand, where, batch_dims=len(batched))
    if inside:
        seen = graph.reshape(graph.transpose(inside, order), shape, (*shape, *[1] * len(rest)))
        found = graph.add("Where", seen, found, graph.store(_filler(step)))
    kept = [i for i in range(len(x.shape)) if i not in how.collapsed_slice_dims and i not in batched]
    offsets, back, passed = dict(zip(how.offset_dims, kept, strict=True)), [], 0
    for axis in range(len(step.shape)):  # where it stands in `found`: indices, then what was taken whole
        if axis not in offsets:
            back.append(order.index(passed))
            passed += 1
        elif offsets[axis] in rest:
            back.append(len(order) + rest.index(offsets[axis]))
    now = tuple([*shape, *(x.shape[i] for i in rest)][i] for i in back)
    return graph.reshape(graph.transpose(found, back), now, step.shape)


def _places(graph: Graph, step: Step, indices: Value, sizes: Shape) -> tuple[str, str]:
    """The indices moved inside `[..., axes]`, and whether they were inside `[...]` if others read a filler."""
    if indices.fixed and is_static(sizes) and (0 <= indices.whole).all() and (indices.whole < np.array(sizes)).all():
        return graph.store(indices.whole.astype(np.int64)), ""
    where = graph.cast(graph.full(indices), np.int64)
    mode = GatherScatterMode.from_any(step.params["mode"])
    if mode == GatherScatterMode.PROMISE_IN_BOUNDS:
        return where, ""
    last = graph.add("Sub", graph.vector(sizes), graph.numbers(1))
    clipped = graph.add("Min", graph.add("Max", where, graph.numbers(0)), last)
    if mode == GatherScatterMode.CLIP:
        return clipped, ""
    same = graph.cast(graph.add("Equal", clipped, where), np.int32)
    least = graph.add("ReduceMin", same, graph.numbers(len(indices.shape) - 1), keepdims=0)
    return clipped, graph.cast(least, np.bool_)


def _filler(step: Step) -> np.ndarray:
    """What is read outside: as JAX has it, NaN, the least signed or the largest unsigned number, or true."""
    number = step.params["fill_value"]
    if number is None:
        kind = step.dtype.kind
        number = np.iinfo(step.dtype).min if kind == "i" else np.iinfo(step.dtype).max if kind == "u" else np.nan
    return np.array(number, step.dtype)
