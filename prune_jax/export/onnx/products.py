"""Products, convolutions, sums and pools."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from prune_jax.export.onnx.graph import Graph, Shape, Value, product
from prune_jax.export.onnx.walk import Step, rule


@rule("dot_general")
def dot_general(graph: Graph, step: Step, left: Value, right: Value) -> str:
    """Gemm for a dense layer on rows, else MatMul on axes brought into its order."""
    (left_sum, right_sum), (left_batch, right_batch) = step.params["dimension_numbers"]
    if left.dtype != step.dtype:
        raise step.refuse(f"of {left.dtype} into {step.dtype}")
    left_free, right_free = _others(left, left_sum, left_batch), _others(right, right_sum, right_batch)
    dense = right.fixed and not left_batch and len(left_free) == len(left_sum) == len(right_free) == 1
    if dense and step.dtype == np.float32:
        weights = np.transpose(right.whole, (*right_free, *right_sum))  # [out, in]
        inputs = graph.transpose(graph.full(left), (*left_free, *left_sum))
        return graph.add("Gemm", inputs, graph.store(weights), transB=1)
    batch, inner = _at(left, left_batch), product(_at(left, left_sum))
    columns = product(_at(right, right_free))
    rows = _at(left, left_free)
    rows = (product(rows),) if batch else rows
    a = _arranged(graph, left, (*left_batch, *left_free, *left_sum), (*batch, *rows, inner))
    b = _arranged(graph, right, (*right_batch, *right_sum, *right_free), (*batch, inner, columns))
    return graph.reshape(graph.add("MatMul", a, b), (*batch, *rows, columns), step.shape)


def _others(value: Value, *taken: Sequence[int]) -> list[int]:
    return [i for i in range(len(value.shape)) if not any(i in axes for axes in taken)]


def _at(value: Value, axes: Sequence[int]) -> Shape:
    return tuple(value.shape[i] for i in axes)


def _arranged(graph: Graph, value: Value, order: Sequence[int], shape: Shape) -> str:
    """The axes of a value in another order and shape; of a constant, now."""
    if value.fixed:
        return graph.store(np.transpose(value.whole, order).reshape(shape))  # type: ignore[arg-type]
    return graph.reshape(graph.transpose(graph.full(value), order), _at(value, order), shape)


@rule("conv_general_dilated")
def convolution(graph: Graph, step: Step, x: Value, kernel: Value) -> str:
    """Conv, channels first; ConvTranspose where the input is spread out."""
    p = step.params
    layout, padding, spread = p["dimension_numbers"], p["padding"], p["lhs_dilation"]
    groups = p["feature_group_count"]
    if p["batch_group_count"] != 1:
        raise step.refuse("with groups of examples")
    images = graph.transpose(graph.full(x), layout.lhs_spec)
    order = layout.rhs_spec  # [out, in, *places]
    if all(s == 1 for s in spread):
        if any(n < 0 for pair in padding for n in pair):
            raise step.refuse("with negative padding")
        found = graph.add(
            "Conv",
            images,
            _arranged(graph, kernel, order, _at(kernel, order)),
            kernel_shape=[kernel.shape[i] for i in order[2:]],
            strides=list(p["window_strides"]),
            pads=_pads(padding),
            dilations=list(p["rhs_dilation"]),
            group=groups,
        )
    else:
        places = zip(order[2:], p["rhs_dilation"], padding, strict=True)
        pads = [((kernel.shape[i] - 1) * d - low, (kernel.shape[i] - 1) * d - high) for i, d, (low, high) in places]  # type: ignore[operator]
        if groups != 1 or any(s != 1 for s in p["window_strides"]) or not kernel.fixed or min(map(min, pads)) < 0:
            raise step.refuse("of an input spread out, with strides, groups, computed kernels or that much padding,")
        turned = np.flip(np.transpose(kernel.whole, (order[1], order[0], *order[2:])), tuple(range(2, len(order))))
        found = graph.add(
            "ConvTranspose",
            images,
            graph.store(turned),
            kernel_shape=turned.shape[2:],
            strides=list(spread),
            pads=_pads(pads),
            dilations=list(p["rhs_dilation"]),
        )
    return graph.transpose(found, np.argsort(layout.out_spec).tolist())


def _pads(padding: Sequence[tuple[Any, Any]]) -> list[int]:
    return [low for low, _ in padding] + [high for _, high in padding]


@rule("reduce_window_max", "reduce_window_sum")
def pool(graph: Graph, step: Step, x: Value) -> str:
    """The largest or the sum in each window, on two other axes and those of the windows."""
    p = step.params
    windows, strides, padding = p["window_dimensions"], p["window_strides"], p["padding"]
    pooled = [i for i in range(len(windows)) if (windows[i], strides[i], *padding[i]) != (1, 1, 0, 0)]
    if any(d != 1 for d in p["base_dilation"]):
        raise step.refuse("of an input spread out")
    if step.name == "reduce_window_sum" and any(d != 1 for d in p["window_dilation"]):
        raise step.refuse("with gaps")
    if not pooled:
        return graph.full(x)
    others = [i for i in range(len(windows)) if i not in pooled]
    order = [*others, *pooled]
    two = _at(x, others) if len(others) == 2 else (product(_at(x, others)), 1)
    images = graph.reshape(graph.transpose(graph.full(x), order), _at(x, order), (*two, *_at(x, pooled)))
    given: dict[str, Any] = {
        "kernel_shape": [windows[i] for i in pooled],
        "strides": [strides[i] for i in pooled],
        "pads": _pads([padding[i] for i in pooled]),
    }
    if step.name == "reduce_window_max":
        found = graph.add("MaxPool", images, dilations=[p["window_dilation"][i] for i in pooled], **given)
    else:
        mean = graph.add("AveragePool", images, count_include_pad=1, **given)
        found = graph.add("Mul", mean, graph.store(np.array(math.prod(windows), step.dtype)))
    after = tuple(step.shape[i] for i in pooled)
    together = graph.reshape(found, (*two, *after), (*_at(x, others), *after))
    return graph.transpose(together, np.argsort(order).tolist())


_REDUCED = {
    "reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin", "reduce_prod": "ReduceProd",
}  # fmt: skip


@rule(*_REDUCED)
def reduction(graph: Graph, step: Step, x: Value) -> str:
    """Over whole axes; told none, ONNX takes all."""
    if not step.params["axes"]:
        return graph.full(x)
    return graph.add(_REDUCED[step.name], graph.full(x), graph.numbers(*step.params["axes"]), keepdims=0)


@rule("reduce_and", "reduce_or")
def truths(graph: Graph, step: Step, x: Value) -> str:
    """Whether all are true, or any."""
    if x.dtype != np.bool_:
        raise step.refuse("of bits")
    op = "ReduceMin" if step.name == "reduce_and" else "ReduceMax"
    numbers = graph.cast(graph.full(x), np.int32)
    return graph.cast(graph.add(op, numbers, graph.numbers(*step.params["axes"]), keepdims=0), np.bool_)


@rule("argmax", "argmin")
def place(graph: Graph, step: Step, x: Value) -> str:
    """Where the largest or the smallest stands, the first of several."""
    (axis,) = step.params["axes"]
    op = "ArgMax" if step.name == "argmax" else "ArgMin"
    return graph.cast(graph.add(op, graph.full(x), axis=axis, keepdims=0), step.dtype)


@rule("cumsum")
def cumsum(graph: Graph, step: Step, x: Value) -> str:
    """Sums of all up to each."""
    axis = graph.store(np.array(step.params["axis"], np.int64))
    return graph.add("CumSum", graph.full(x), axis, reverse=int(step.params["reverse"]))
