"""What is done to each element by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from prune_jax.export.onnx.graph import Graph, Shape, Value
from prune_jax.export.onnx.walk import Rule, Step, fold, rule

Write = Callable[..., str]  # (graph, step, *names) -> name

PLAIN = {
    "abs": "Abs", "acos": "Acos", "acosh": "Acosh", "add": "Add", "add_any": "Add", "asin": "Asin", "asinh": "Asinh",
    "atan": "Atan", "atanh": "Atanh", "ceil": "Ceil", "copy": "Identity", "copy_p": "Identity", "cos": "Cos",
    "cosh": "Cosh", "div": "Div", "eq": "Equal", "erf": "Erf", "exp": "Exp", "floor": "Floor", "ge": "GreaterOrEqual",
    "gt": "Greater", "le": "LessOrEqual", "log": "Log", "logistic": "Sigmoid", "lt": "Less", "max": "Max", "min": "Min",
    "name": "Identity",
    "mul": "Mul", "neg": "Neg", "pow": "Pow", "reduce_precision": "Identity", "sign": "Sign", "sin": "Sin",
    "sinh": "Sinh", "sqrt": "Sqrt", "stop_gradient": "Identity", "sub": "Sub", "tan": "Tan", "tanh": "Tanh",
}  # fmt: skip


def elementwise(*primitives: str) -> Callable[[Write], Write]:
    """Registers what writes the nodes on the operands as they are held; broadcasts are left to ONNX."""

    def register(write: Write) -> Write:
        rule(*primitives, eager=True)(_on_held(write))
        return write

    return register


def _on_held(write: Write) -> Rule:
    def apply(graph: Graph, step: Step, *values: Value) -> Value:
        held = _together(step.shape, values)
        if all(value.array is not None for value in values):
            arrays = [value.array if value.shape == () else np.broadcast_to(value.array, held) for value in values]  # type: ignore[arg-type]
            return Value(step.shape, step.dtype, held, fold(step.eqn, arrays)[0])
        return Value(step.shape, step.dtype, held, None, write(graph, step, *map(graph.held, values)))

    return apply


def _together(shape: Shape, values: tuple[Value, ...]) -> Shape:
    """How the result of operands is held."""
    arrays = [value.held for value in values if value.held]
    return tuple(next((held[i] for held in arrays if held[i] != 1), 1) for i in range(len(shape)))


def _plain(graph: Graph, step: Step, *names: str) -> str:
    return graph.add(PLAIN[step.name], *names)


elementwise(*PLAIN)(_plain)


@elementwise("convert_element_type")
def convert(graph: Graph, step: Step, x: str) -> str:
    """Another type of numbers."""
    return graph.cast(x, step.dtype)


@elementwise("select_n")
def select(graph: Graph, step: Step, which: str, *cases: str) -> str:
    """One of two cases, by truth."""
    if len(cases) != 2 or step.eqn.invars[0].aval.dtype != np.bool_:  # type: ignore[attr-defined]
        raise step.refuse(f"by numbers among {len(cases)} cases")
    return graph.add("Where", which, cases[1], cases[0])


@elementwise("clamp")
def clamp(graph: Graph, step: Step, low: str, x: str, high: str) -> str:
    """At least `low`, at most `high`."""
    return graph.add("Min", graph.add("Max", x, low), high)


@elementwise("ne")
def unequal(graph: Graph, step: Step, a: str, b: str) -> str:
    """Whether they differ."""
    return graph.add("Not", graph.add("Equal", a, b))


@elementwise("and", "or", "xor", "not")
def logic(graph: Graph, step: Step, *names: str) -> str:
    """Of truths, or bit by bit."""
    op = step.name.capitalize()
    return graph.add(op if step.dtype == np.bool_ else f"Bitwise{op}", *names)


@elementwise("rsqrt")
def rsqrt(graph: Graph, step: Step, x: str) -> str:
    """1 / sqrt(x)."""
    return graph.add("Reciprocal", graph.add("Sqrt", x))


@elementwise("square")
def square(graph: Graph, step: Step, x: str) -> str:
    """The number times itself."""
    return graph.add("Mul", x, x)


@elementwise("integer_pow")
def integer_pow(graph: Graph, step: Step, x: str) -> str:
    """To a whole power."""
    y = step.params["y"]
    return graph.add("Mul", x, x) if y == 2 else graph.add("Pow", x, _one(graph, step, y))


@elementwise("exp2")
def exp2(graph: Graph, step: Step, x: str) -> str:
    """2 to the power of x."""
    return graph.add("Pow", _one(graph, step, 2), x)


@elementwise("log1p")
def log1p(graph: Graph, step: Step, x: str) -> str:
    """log(1 + x); right to one rounding of 1, not of the result."""
    return graph.add("Log", graph.add("Add", x, _one(graph, step, 1)))


@elementwise("expm1")
def expm1(graph: Graph, step: Step, x: str) -> str:
    """exp(x) - 1; right to one rounding of 1, not of the result."""
    return graph.add("Sub", graph.add("Exp", x), _one(graph, step, 1))


@elementwise("erfc")
def erfc(graph: Graph, step: Step, x: str) -> str:
    """1 - erf(x); right to one rounding of 1, not of the result."""
    return graph.add("Sub", _one(graph, step, 1), graph.add("Erf", x))


@elementwise("round")
def round_(graph: Graph, step: Step, x: str) -> str:
    """The nearest whole number; halves to the even one, as ONNX has it."""
    if int(step.params["rounding_method"]) != 1:
        raise step.refuse("of halves away from zero")
    return graph.add("Round", x)


@elementwise("rem")
def remainder(graph: Graph, step: Step, x: str, y: str) -> str:
    """Of a division, with the sign of `x`."""
    return graph.add("Mod", x, y, fmod=1)


@elementwise("is_finite")
def is_finite(graph: Graph, step: Step, x: str) -> str:
    """Neither NaN nor infinite."""
    return graph.add("Not", graph.add("Or", graph.add("IsNaN", x), graph.add("IsInf", x)))


def _one(graph: Graph, step: Step, number: Any) -> str:
    return graph.store(np.array(number, step.dtype))
