"""Rules of primitives that work element by element: axes of the same place are one axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from prune_jax.groups.values import COMPUTABLE, UNKNOWN, WILD, Axis, Dead, Unsettled, Value, is_zero, same, vague
from prune_jax.groups.walk import Walk, bind, dtype_of, match, opaque, rule, shape_of

ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz complex conj
convert_element_type copy copy_p cos cosh device_put digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt
igamma igammac imag integer_pow is_finite layout_constraint le le_to lgamma log log1p logistic lt lt_to max min mul
mulhi name ne neg nextafter not or polygamma population_count pow random_gamma_grad real reduce_precision
regularized_incomplete_beta rem reshard round rsqrt select_n sharding_constraint shift_left shift_right_arithmetic
shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh threefry2x32 xor zeta
""".split()

# What they make of numbers known beforehand; all others' results are computed when they are needed.
_NUMBERS: dict[str, Callable[..., float | None]] = {
    "abs": abs,
    "add": lambda a, b: a + b,
    "add_any": lambda a, b: a + b,
    "conj": lambda a: a,
    "cos": lambda a: math.cos(a) if math.isfinite(a) else math.nan,
    "convert_element_type": lambda a: a,
    "copy": lambda a: a,
    "copy_p": lambda a: a,
    "device_put": lambda a: a,
    "div": lambda a, b: a / b,
    "eq": lambda a, b: float(a == b),
    "erf": math.erf,
    "exp": lambda a: math.inf if a > 700 else math.exp(a),
    "ge": lambda a, b: float(a >= b),
    "gt": lambda a, b: float(a > b),
    "imag": lambda a: 0.0,
    "layout_constraint": lambda a: a,
    "le": lambda a, b: float(a <= b),
    "log": lambda a: math.log(a) if a > 0 else (-math.inf if a == 0 else math.nan),
    "logistic": lambda a: 1 / (1 + math.exp(-max(a, -700.0))),
    "lt": lambda a, b: float(a < b),
    "max": lambda a, b: math.nan if math.isnan(a) or math.isnan(b) else max(a, b),
    "min": lambda a, b: math.nan if math.isnan(a) or math.isnan(b) else min(a, b),
    "mul": lambda a, b: a * b,
    "name": lambda a: a,
    "ne": lambda a, b: float(a != b),
    "neg": lambda a: -a,
    "pow": lambda a, b: a**b if 1e-9 < a < 1e9 and -9 < b < 9 else (0.0 if a == 0 < b else None),
    "real": lambda a: a,
    "reduce_precision": lambda a: a,
    "reshard": lambda a: a,
    "rsqrt": lambda a: 1 / math.sqrt(a) if a > 0 else (math.inf if a == 0 else math.nan),
    "sharding_constraint": lambda a: a,
    "sin": lambda a: math.sin(a) if math.isfinite(a) else math.nan,
    "sqrt": lambda a: math.sqrt(a) if a >= 0 else math.nan,
    "square": lambda a: a * a,
    "stop_gradient": lambda a: a,
    "sub": lambda a, b: a - b,
    "tan": lambda a: math.tan(a) if math.isfinite(a) else math.nan,
    "tanh": math.tanh,
}
_COMPARISONS = frozenset("eq ge gt le lt ne".split())
_COMPLEX = frozenset(
    "add add_any conj convert_element_type copy div exp imag mul name neg real square stop_gradient sub".split()
)
_KEEP_ZERO = frozenset("asin asinh atan atanh cbrt ceil erf_inv expm1 floor log1p round sign sinh".split())


@rule(*ELEMENTWISE)
def elementwise(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Ties the axes; at dead indices stands what the primitive makes of what stood there."""
    whole = [operand for operand in operands if operand.axes]
    numbers: list[Dead] = [COMPUTABLE if operand.const is None else operand.const for operand in operands]
    const = dead_value(eqn, numbers) if all(operand.const is not None for operand in operands) else None
    axes = []
    for i in range(len(whole[0].axes) if whole else 0):
        size = max(operand.axes[i].size for operand in whole)
        rows = walk.tie(eqn, *(operand.axes[i] for operand in whole if operand.axes[i].size == size))
        deads = [
            operand.axes[i].dead if operand.axes and operand.axes[i].size == size else number
            for operand, number in zip(operands, numbers, strict=True)
        ]
        if eqn.primitive.name == "div" and operands[1].axes and operands[1].axes[i].size == size:
            deads[1] = WILD if deads[1] is COMPUTABLE and same(deads[0], 0.0) and not operands[1].known else deads[1]
        axes.append(Axis(rows, dead_value(eqn, deads)))  # above: it may be zero where what lives is not

    def part(i: int) -> Any:
        parts = [
            walk.dead(o, i, dtype_of(v)) if o.axes and o.axes[i].size == axes[i].size else o.array
            for o, v in zip(operands, eqn.invars, strict=True)
        ]
        return bind(eqn, match(parts, i))

    made = walk.outputs(
        eqn,
        [axes] * len(eqn.outvars),
        operands,
        rewrite=lambda: bind(eqn, [operand.array for operand in operands]),
        part=None if eqn.primitive.multiple_results else part,
        const=const if not isinstance(const, Unsettled) else None,
    )
    news = frozenset[int]().union(*(operand.news for operand in whole if operand.shape == made[0].shape))
    return [replace(value, news=news) for value in made] if news else made


def dead_value(eqn: JaxprEqn, deads: Sequence[Dead]) -> Dead:
    """What a primitive makes of what stands at dead indices."""
    name = eqn.primitive.name
    numbers = [dead for dead in deads if not isinstance(dead, Unsettled)]
    if name in ("mul", "and") and is_zero(deads):
        return 0.0
    if name == "div" and same(deads[0], 0.0) and isinstance(deads[1], Unsettled) and deads[1] is not WILD:
        return 0.0
    if name == "select_n" and numbers and all(same(deads[1], case) for case in deads[2:]):
        return deads[1]
    if (
        name == "select_n"
        and not isinstance(deads[0], Unsettled)
        and not isinstance(deads[1 + int(deads[0])], Unsettled)
    ):
        return deads[1 + int(deads[0])]
    if len(numbers) == len(deads):
        if name == "complex" and numbers[1] == 0:
            return numbers[0]
        if not _of_real_numbers(eqn, numbers):
            return COMPUTABLE
        if name == "div" and numbers[1] == 0:
            return math.nan if numbers[0] == 0 else WILD  # an infinity, whose sign is that of the zero
        if name in _KEEP_ZERO and numbers[0] == 0:
            return 0.0
        if name == "integer_pow" and (numbers[0] == 0 or 1e-9 < abs(numbers[0]) < 1e9) and 0 < eqn.params["y"] < 9:
            return numbers[0] ** eqn.params["y"]
        if name == "clamp":
            return min(max(numbers[1], numbers[0]), numbers[2])
        made = _NUMBERS[name](*numbers) if name in _NUMBERS else None
        if made is not None:
            return WILD if math.isinf(made) and all(map(math.isfinite, numbers)) else made
    if UNKNOWN in deads or WILD in deads or eqn.primitive.multiple_results:
        return vague(*deads)
    return COMPUTABLE


def _of_real_numbers(eqn: JaxprEqn, numbers: Sequence[float]) -> bool:
    """Whether what it makes of real numbers is the same number whatever the types of its operands and its output."""
    types = [dtype_of(atom) for atom in (eqn.outvars[0], *eqn.invars)]
    name = eqn.primitive.name
    if name == "convert_element_type":
        types = types[:1] if all(number not in (0, 1) for number in numbers) else []
    if any(jnp.issubdtype(t, np.complexfloating) for t in types):
        return name in _COMPLEX
    return name in _COMPARISONS or all(jnp.issubdtype(t, np.floating) for t in types)


@rule("bitcast_convert_type")
def bitcast(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Other numbers of the same bits; where their widths differ, an axis of bits comes or goes."""
    if shape_of(eqn.invars[0]) != shape_of(eqn.outvars[0]):
        return opaque(walk, eqn, operands)
    return elementwise(walk, eqn, operands)
