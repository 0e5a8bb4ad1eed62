"""A function in JAX -> the bytes of an ONNX file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr
from jax.interpreters import partial_eval
from onnx import helper

from prune_jax.errors import PruneError
from prune_jax.export.onnx import elementwise, loops, moves, products  # noqa: F401 - they register rules
from prune_jax.export.onnx.graph import Graph
from prune_jax.export.onnx.walk import MEND, SIZES, sizes, walk

OPSET, IR_VERSION = 18, 8  # the versions of the operators and of the file that belong together
NAMES = ("x", "lengths")
MOST_BYTES = 2**31 - 2**20  # of a protobuf message


def to_onnx(forward: Callable[..., Any], inputs: Sequence[Any]) -> bytes:
    """An ONNX file that computes `forward` for any batch size, its weights inside.

    Args:
        forward: `(x, ...) -> outputs`, arrays with a batch axis in front.
        inputs: arrays or shapes and types of a batch of any size; in the file they are called `x`, `lengths`,
            `input_2` and so on, what comes out `outputs`, or `outputs_0`, `outputs_1` and so on.

    Raises:
        PruneError: the function does what has no translation, or holds more than a file of ONNX can.
    """
    one, other = (_traced(forward, inputs, batch) for batch in SIZES)
    names = [NAMES[i] if i < len(NAMES) else f"input_{i}" for i in range(len(inputs))]
    graph = Graph(names[0])
    given = [
        graph.tensor(name, sizes(a.aval.shape, b.aval.shape), a.aval.dtype)  # type: ignore[attr-defined]
        for name, a, b in zip(names, one.jaxpr.invars, other.jaxpr.invars, strict=True)
    ]
    made = walk(graph, (one, other), given)
    ends = ["outputs"] if len(made) == 1 else [f"outputs_{i}" for i in range(len(made))]
    infos = [graph.described(value.name, value.shape, value.dtype) for value in given]
    whole = graph.close("network", infos, list(zip(ends, made, strict=True)))
    stored = sum(array.nbytes for array in graph.arrays.values())
    if stored > MOST_BYTES:
        raise PruneError(f"the network holds {stored:,} bytes, and a file of ONNX at most {MOST_BYTES:,}. {MEND}")
    model = helper.make_model(
        whole, producer_name="prune_jax", opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )
    return bytes(model.SerializeToString(deterministic=True))


def _traced(forward: Callable[..., Any], inputs: Sequence[Any], batch: int) -> ClosedJaxpr:
    """The jaxpr on a batch of this size, without what is computed for nothing."""
    shapes = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype)) for x in inputs]
    closed = jax.make_jaxpr(forward)(*shapes)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    return ClosedJaxpr(jaxpr, closed.consts)
