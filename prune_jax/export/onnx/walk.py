"""The walk over a jaxpr that writes its ONNX graph.

The network is traced with two batch sizes, and both jaxprs are walked side by side. What is the same in both is fixed;
what is a multiple of each batch follows the batch; anything else cannot be told, and is refused. So no size is taken
for the batch because it happens to be as large.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from prune_jax.errors import PruneError
from prune_jax.export.onnx.graph import Batch, Graph, Shape, Size, Value, constant, is_static

SIZES = (7, 11)  # the two batches

Pair = tuple[ClosedJaxpr, ClosedJaxpr]
Rule = Callable[..., Any]  # (graph, step, *values) -> name or value of the output, or a list of them
RULES: dict[str, Rule] = {}  # primitive -> what writes its nodes
EAGER: set[str] = set()  # primitives whose rules know what to do with constants; those of others are folded

_CALLS = {
    "jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr",
    "checkpoint", "remat", "remat2",
}  # fmt: skip
_SHAPES = {"shape", "new_sizes", "sizes", "start_indices", "limit_indices", "slice_sizes"}  # they may follow the batch


@dataclass(frozen=True)
class Step:
    """An equation, in both traces.

    Attributes:
        eqn: the equation.
        other: the same in the other trace.
        shapes: of the outputs.
        dtypes: of the outputs.
    """

    eqn: JaxprEqn
    other: JaxprEqn
    shapes: tuple[Shape, ...]
    dtypes: tuple[Any, ...]

    @property
    def name(self) -> str:
        """Of the primitive."""
        return self.eqn.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        """The same in both traces, but for shapes and functions."""
        return self.eqn.params

    @property
    def shape(self) -> Shape:
        """Of the only output."""
        return self.shapes[0]

    @property
    def dtype(self) -> Any:
        """Of the only output."""
        return self.dtypes[0]

    def sizes(self, name: str) -> Shape:
        """A parameter that holds sizes."""
        return sizes(self.eqn.params[name], self.other.params[name])

    def pair(self, name: str) -> Pair:
        """A parameter that holds a function."""
        return closed(self.eqn.params[name]), closed(self.other.params[name])

    def refuse(self, what: str) -> PruneError:
        """The error of an equation that ONNX, or this walk, cannot say."""
        return PruneError(f"{self.name} {what} cannot be written as ONNX. {MEND}")


MEND = "Export the network as StableHLO: `formats: [stablehlo]`."


def rule(*primitives: str, eager: bool = False) -> Callable[[Rule], Rule]:
    """Registers what writes the nodes of some primitives."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(primitives, function))
        if eager:
            EAGER.update(primitives)
        return function

    return register


def closed(jaxpr: Any) -> ClosedJaxpr:
    """A jaxpr with its constants, which may be none."""
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def size(one: int, other: int) -> Size:
    """What a number of both traces is for every batch.

    >>> size(5, 5), size(7, 11), size(28, 44)
    (5, Batch(times=1), Batch(times=4))
    """
    if one == other:
        return int(one)
    times, left = divmod(int(one), SIZES[0])
    if left or other != times * SIZES[1]:
        raise PruneError(
            f"a size of the network is {one} for a batch of {SIZES[0]} and {other} for one of {SIZES[1]}: "
            f"it follows the batch in a way that cannot be written as ONNX. {MEND}"
        )
    return Batch(times)


def sizes(one: Any, other: Any) -> Shape:
    """The same for a shape."""
    return tuple(size(a, b) for a, b in zip(one, other, strict=True))


def walk(graph: Graph, pair: Pair, inputs: list[Value]) -> list[Value]:
    """Writes the nodes of a function; its outputs."""
    one, other = pair
    known = dict(zip(one.jaxpr.invars, inputs, strict=True))
    for var, a, b in zip(one.jaxpr.constvars, one.consts, other.consts, strict=True):
        known[var] = _constant(graph, a, b)
    if [e.primitive.name for e in one.jaxpr.eqns] != [e.primitive.name for e in other.jaxpr.eqns]:
        raise PruneError(f"the network computes otherwise for other batch sizes: it cannot be written as ONNX. {MEND}")

    def read(a: Any, b: Any) -> Value:
        return _constant(graph, a.val, b.val, a.aval.dtype) if isinstance(a, Literal) else known[a]  # type: ignore[attr-defined]

    for eqn, twin in zip(one.jaxpr.eqns, other.jaxpr.eqns, strict=True):
        operands = [read(a, b) for a, b in zip(eqn.invars, twin.invars, strict=True)]
        known.update(zip(eqn.outvars, _equation(graph, eqn, twin, operands), strict=True))
    return [read(a, b) for a, b in zip(one.jaxpr.outvars, other.jaxpr.outvars, strict=True)]


def _equation(graph: Graph, eqn: JaxprEqn, twin: JaxprEqn, operands: list[Value]) -> list[Value]:
    avals: list[Any] = [var.aval for var in eqn.outvars]
    twins: list[Any] = [var.aval for var in twin.outvars]
    shapes = tuple(sizes(a.shape, b.shape) for a, b in zip(avals, twins, strict=True))
    step = Step(eqn, twin, shapes, tuple(a.dtype for a in avals))
    if step.name in _CALLS:
        inner = next(name for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in eqn.params)
        return walk(graph, step.pair(inner), operands)
    _check_params(step)
    if (
        all(map(is_static, shapes))
        and step.name not in EAGER
        and all(operand.fixed for operand in operands)
        and not eqn.effects
    ):
        return [constant(array) for array in fold(eqn, [operand.whole for operand in operands])]
    if any(np.issubdtype(a.dtype, np.complexfloating) for a in avals):
        raise step.refuse("of complex numbers")
    if step.name not in RULES:
        raise PruneError(f"the primitive {step.name!r} has no translation to ONNX. {MEND}")
    made = RULES[step.name](graph, step, *operands)
    made = made if isinstance(made, list) else [made]
    return [
        m if isinstance(m, Value) else graph.tensor(m, shape, dtype)
        for m, shape, dtype in zip(made, step.shapes, step.dtypes, strict=True)
    ]


def fold(eqn: JaxprEqn, arrays: list[Any]) -> list[Any]:
    """What an equation makes of constants."""
    with jax.ensure_compile_time_eval():
        made = eqn.primitive.bind(*arrays, **eqn.primitive.get_bind_params(eqn.params))
    made = made if eqn.primitive.multiple_results else [made]
    return [a if jax.dtypes.issubdtype(a.dtype, jax.dtypes.extended) else np.asarray(a) for a in made]


def _check_params(step: Step) -> None:
    for name, value in step.params.items():
        told = isinstance(value, int | float | tuple) and name not in _SHAPES
        if told and str(value) != str(step.other.params[name]):  # as text: NaN is not NaN
            raise step.refuse(f"with `{name}` that follows the batch")


def _constant(graph: Graph, one: Any, other: Any, dtype: Any = None) -> Value:
    """A number or array that stands in the function; a number may be the size of the batch."""
    if jax.dtypes.issubdtype(jax.dtypes.result_type(one), jax.dtypes.extended):
        return constant(one)
    array = np.asarray(one, dtype)  # a Python number has the type that the function takes it for
    if one is other or (array.shape == np.shape(other) and array.tobytes() == np.asarray(other, dtype).tobytes()):
        return constant(array)
    if array.ndim == 0 and np.ndim(other) == 0 and float(one).is_integer() and float(other).is_integer():
        scalar = graph.add("Reshape", graph.vector((size(int(one), int(other)),)), graph.numbers())
        return graph.tensor(graph.cast(scalar, array.dtype), (), array.dtype)
    raise PruneError(f"an array in the network follows the batch: it cannot be written as ONNX. {MEND}")
