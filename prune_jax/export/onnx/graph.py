"""The ONNX graph while it is written: values, nodes, and sizes that follow the batch."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper

from prune_jax.errors import PruneError


class Batch(NamedTuple):
    """A size that is so many times the batch."""

    times: int


Size = int | Batch
Shape = tuple[Size, ...]


@dataclass(frozen=True)
class Value:
    """An array of the network: a constant, or a tensor of the graph.

    Attributes:
        shape: as the network sees it.
        dtype: of its numbers.
        held: its shape as it is held: 1 where all indices of an axis hold the same. So broadcasts cost nothing where
            ONNX broadcasts by itself.
        array: the numbers of a constant, of shape `held`.
        name: of a tensor.
    """

    shape: Shape
    dtype: Any
    held: Shape
    array: Any = None
    name: str = ""

    @property
    def fixed(self) -> bool:
        """Whether all its numbers are known, whatever the batch."""
        return self.array is not None and is_static(self.shape)

    @property
    def whole(self) -> np.ndarray:
        """All numbers of a fixed value."""
        return self.array if self.held == self.shape else np.broadcast_to(self.array, self.shape)  # type: ignore[arg-type]


def constant(array: Any) -> Value:
    """A value that is the same for every batch."""
    return Value(array.shape, array.dtype, array.shape, array)


def is_static(shape: Shape) -> bool:
    """Whether no size follows the batch."""
    return not any(isinstance(size, Batch) for size in shape)


def product(shape: Shape) -> Size:
    """The number of elements."""
    if sum(isinstance(size, Batch) for size in shape) > 1:
        raise PruneError("a product of two sizes that follow the batch cannot be written as ONNX.")
    times = math.prod(size.times if isinstance(size, Batch) else size for size in shape)
    return times if is_static(shape) else Batch(times)


class Graph:
    """Nodes in the order in which they are computed; those of a loop's body are gathered apart.

    Args:
        batch_from: the input whose first axis is the batch.
    """

    def __init__(self, batch_from: str) -> None:
        self.batch_from = batch_from
        self.levels: list[list[onnx.NodeProto]] = [[]]  # the graph, and the bodies that are being written
        self.arrays: dict[str, np.ndarray] = {}
        self.uses: Counter[str] = Counter()
        self._names: Counter[str] = Counter()
        self._stored: dict[Any, str] = {}

    def fresh(self, stem: str) -> str:
        """A name that nothing has yet."""
        self._names[stem] += 1
        return f"{stem}_{self._names[stem] - 1}"

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """A node with one output; its name."""
        return self.many(op, *inputs, outputs=1, **attributes)[0]

    def many(self, op: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:
        """A node with several outputs; their names."""
        names = [self.fresh(op.lower()) for _ in range(outputs)]
        self.levels[-1].append(helper.make_node(op, inputs, names, **attributes))
        self.uses.update(inputs)
        return names

    def store(self, array: Any) -> str:
        """An array in the file; the same one once."""
        array = np.ascontiguousarray(array).reshape(np.shape(array))  # the former makes scalars vectors
        key = (array.dtype.name, array.shape, hashlib.sha256(array.tobytes()).digest())
        if key not in self._stored:
            self._stored[key] = self.fresh("constant")
            self.arrays[self._stored[key]] = array
        return self._stored[key]

    def numbers(self, *numbers: int) -> str:
        """A vector of integers, as shapes and axes are told."""
        return self.store(np.array(numbers, np.int64))

    def vector(self, shape: Shape) -> str:
        """A shape as a tensor."""
        if is_static(shape):
            return self.numbers(*shape)  # type: ignore[arg-type]
        parts = [self._times_batch(s.times) if isinstance(s, Batch) else self.numbers(s) for s in shape]
        return self.add("Concat", *parts, axis=0) if len(parts) > 1 else parts[0]

    def _times_batch(self, times: int) -> str:
        if not any("batch_size" in node.output for node in self.levels[0][:1]):
            node = helper.make_node("Shape", [self.batch_from], ["batch_size"], start=0, end=1)
            self.levels[0].insert(0, node)
        return "batch_size" if times == 1 else self.add("Mul", "batch_size", self.numbers(times))

    def held(self, value: Value) -> str:
        """The tensor of a value as it is held, for operations that broadcast."""
        return value.name if value.array is None else self.store(value.array)

    def full(self, value: Value) -> str:
        """The tensor of a value in its shape."""
        if value.fixed:
            return self.store(value.whole)
        if value.held == value.shape:
            return self.held(value)
        to = tuple(1 if size == held else size for size, held in zip(value.shape, value.held, strict=True))
        return self.add("Expand", self.held(value), self.vector(to))

    def tensor(self, name: str, shape: Shape, dtype: Any) -> Value:
        """A value of the graph."""
        return Value(shape, np.dtype(dtype), shape, None, name)

    def reshape(self, name: str, before: Shape, after: Shape) -> str:
        """The same numbers in another shape."""
        if before == after:
            return name
        moving = sum(isinstance(size, Batch) for size in after)
        to = self.vector(after) if moving > 1 else self.numbers(*(-1 if isinstance(s, Batch) else s for s in after))
        return self.add("Reshape", name, to)

    def transpose(self, name: str, order: Sequence[int]) -> str:
        """The axes in another order."""
        return name if list(order) == sorted(order) else self.add("Transpose", name, perm=list(order))

    def cast(self, name: str, dtype: Any) -> str:
        """The numbers in another type."""
        return self.add("Cast", name, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def described(self, name: str, shape: Shape, dtype: Any) -> onnx.ValueInfoProto:
        """What a graph says of its inputs and outputs."""
        sizes = [("batch" if s.times == 1 else None) if isinstance(s, Batch) else s for s in shape]
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), sizes)

    def close(
        self, name: str, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[tuple[str, Value]]
    ) -> onnx.GraphProto:
        """Ends the graph that is being written last: a loop's body, or the whole."""
        infos = []
        for output, value in outputs:  # a node of its own for each: ONNX hands on neither inputs nor constants
            source = self.full(value)
            self.uses[source] += 1
            self.levels[-1].append(helper.make_node("Identity", [source], [output]))
            infos.append(self.described(output, value.shape, value.dtype))
        nodes = self._with_biases(self.levels.pop())
        arrays = [] if self.levels else [numpy_helper.from_array(a, n) for n, a in self.arrays.items() if self.uses[n]]
        return helper.make_graph(nodes, name, inputs, infos, arrays)

    def _with_biases(self, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
        """A dense layer and the constant that is added to it made one node."""
        made = {output: node for node in nodes for output in node.output}
        kept = []
        for node in nodes:
            gemm, bias = self._dense_and_bias(node, made)
            if gemm is None:
                kept.append(node)
            else:
                gemm.input.append(bias)
                gemm.output[0] = node.output[0]
        return kept

    def _dense_and_bias(self, node: onnx.NodeProto, made: dict[str, onnx.NodeProto]) -> tuple[Any, str]:
        if node.op_type == "Add":
            for dense, bias in (tuple(node.input), tuple(reversed(node.input))):
                gemm, array = made.get(dense), self.arrays.get(bias)
                if gemm is None or array is None or gemm.op_type != "Gemm" or len(gemm.input) != 2:
                    continue
                if self.uses[dense] == 1 and array.size == array.shape[-1] == self.arrays[gemm.input[1]].shape[0]:
                    return gemm, bias
        return None, ""
