"""Rules of primitives that hold functions: calls, loops, branches, and functions with derivatives of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.interpreters import partial_eval

from prune_jax.groups.elementwise import ELEMENTWISE
from prune_jax.groups.labels import Labels
from prune_jax.groups.values import Axis, Value, join
from prune_jax.groups.walk import Walk, bind, dtype_of, opaque, rule, shape_of

_CALLS = ("jit", "pjit", "closed_call", "core_call", "named_call", "composite")


def _closed(jaxpr: Jaxpr | ClosedJaxpr) -> ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def arrays_of(values: Sequence[Value]) -> list[Any]:
    """Their arrays, without dead indices."""
    return [value.array for value in values]


def _analysing(walk: Walk) -> Walk:
    return replace(walk, alive=None)


def function_of(walk: Walk, before: Labels, closed: ClosedJaxpr, inputs: Sequence[Value]) -> Callable[..., list[Any]]:
    """`closed` on small arrays, walked again from where the labels were `before`."""

    def call(*arrays: Any) -> list[Any]:
        values = [replace(v, array=jnp.asarray(a)) for v, a in zip(inputs, arrays, strict=True)]
        return arrays_of(run_cut(replace(walk, labels=before.fork()), closed, values))

    return call


def run_cut(walk: Walk, closed: ClosedJaxpr, inputs: Sequence[Value]) -> list[Value]:
    """The outputs of a function whose results meet others': constants among them are cut as these are."""
    return [walk.cut(value) for value in walk.run(closed, inputs)]


def results_of(values: Sequence[Value], arrays: Sequence[Any] | None) -> list[Value]:
    """What comes out of a function that holds others: with these arrays, if there are any."""
    settled = [value.settled() for value in values]
    return settled if arrays is None else [replace(v, array=a) for v, a in zip(settled, arrays, strict=True)]


@rule(*_CALLS, through=True)
def call(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Walked through."""
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return opaque(walk, eqn, operands) if inner is None else walk.run(_closed(inner), operands)


@rule("checkpoint", "remat", "remat2", through=True)
def checkpoint(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Walked through; what is forgotten before the backward pass stays so."""
    closed = _closed(eqn.params["jaxpr"])
    inputs = [operand.settled() for operand in operands]
    before = walk.labels.fork()
    outputs = run_cut(_analysing(walk), closed, inputs)
    if walk.alive is None:
        return results_of(outputs, None)
    function = function_of(walk, before, closed, inputs)
    options = {"prevent_cse": eqn.params["prevent_cse"], "policy": eqn.params["policy"]}
    return results_of(outputs, jax.checkpoint(function, **options)(*arrays_of(inputs)))


@rule("cond", through=True)
def cond(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """The branches' outputs are one."""
    index, *rest = operands
    for axis in index.axes:
        walk.fix(eqn, axis, "it chooses a branch")
    inputs = [operand.settled() for operand in rest]
    functions, outputs = [], list[list[Value]]()
    for branch in eqn.params["branches"]:
        functions.append(function_of(walk, walk.labels.fork(), branch, inputs))
        outputs.append(run_cut(_analysing(walk), branch, inputs))
    merged = [Value(_one(walk, eqn, [o.axes for o in same])) for same in zip(*outputs, strict=True)]
    if walk.alive is None:
        return merged
    return results_of(merged, lax.switch(index.array, functions, *arrays_of(inputs)))


def _one(walk: Walk, eqn: JaxprEqn, several: Sequence[Sequence[Axis]]) -> tuple[Axis, ...]:
    """Axes that are one and the same, whichever was computed."""
    together = zip(*several, strict=True)
    return tuple(Axis(walk.tie(eqn, *axes), join([axis.dead for axis in axes])) for axes in together)


def _settle_carry(
    walk: Walk, eqn: JaxprEqn, carry: Sequence[Value], turn: Callable[[Sequence[Value]], Sequence[Value]]
) -> tuple[list[Value], Sequence[Value], Labels]:
    """What holds of a carry in every turn: its axes are one before and after, and dead indices hold what they held.

    Returns:
        The carry, what `turn` answered at last, and the labels before that.
    """
    mark = walk.labels.mark()
    held = [Value(value.settled().axes) for value in carry]
    while True:
        walk.labels.rewind(mark)
        before = walk.labels.fork()
        outputs = turn(held)
        after = [Value(_carried(walk, eqn, a, b)) for a, b in zip(held, outputs, strict=False)]
        if [_deads(value) for value in after] == [_deads(value) for value in held]:
            return held, outputs, before
        held = after


def _carried(walk: Walk, eqn: JaxprEqn, value: Value, output: Value) -> tuple[Axis, ...]:
    for a, b in zip(value.axes, output.axes, strict=True):
        walk.tie(eqn, a, b)
    return tuple(Axis(a.rows, join([a.dead, b.dead])) for a, b in zip(value.axes, output.axes, strict=True))


def _deads(value: Value) -> list[str]:
    return [repr(axis.dead) for axis in value.axes]


def _row(walk: Walk, eqn: JaxprEqn, value: Value) -> Value:
    """What a loop hands to its body of an array that it goes over."""
    walk.fix(eqn, value.axes[0], "a loop goes over it")
    return Value(value.settled().axes[1:], value.const, weights=value.weights, whole=value.whole)


@rule("scan", through=True)
def scan(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """The carry is one before and after; stacked axes keep all indices."""
    params = eqn.params
    body, length = params["jaxpr"], params["length"]
    first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
    consts = [value.settled() for value in operands[:first]]
    rows = [_row(walk, eqn, value) for value in operands[last:]]
    analysing = _analysing(walk)
    given = [walk.cut(value) for value in operands[first:last]]
    carry, outputs, before = _settle_carry(
        walk, eqn, given, lambda held: run_cut(analysing, body, [*consts, *held, *rows])
    )
    stack = walk.never(eqn, length, "a loop goes over it")
    stacked = [Value((stack, *value.settled().axes)) for value in outputs[len(carry) :]]
    if walk.alive is None:
        return [*carry, *stacked]
    function = function_of(walk, before, body, [*consts, *carry, *rows])

    def turn(held: list[Any], row: list[Any]) -> tuple[list[Any], list[Any]]:
        made = function(*arrays_of(consts), *held, *row)
        return made[: len(carry)], made[len(carry) :]

    options = {name: params[name] for name in ("reverse", "unroll", "_split_transpose") if name in params}
    start, over = arrays_of(given), arrays_of(operands[last:])
    ended, made = lax.scan(turn, [jnp.asarray(a) for a in start], over, length, **options)
    return results_of([*carry, *stacked], [*ended, *made])


@rule("while", through=True)
def while_(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """The carry is one before and after."""
    params = eqn.params
    test, body = params["cond_jaxpr"], params["body_jaxpr"]
    first, last = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    of_test = [value.settled() for value in operands[:first]]
    of_body = [value.settled() for value in operands[first:last]]
    analysing = _analysing(walk)
    given = [walk.cut(value) for value in operands[last:]]
    carry, _, before = _settle_carry(walk, eqn, given, lambda held: run_cut(analysing, body, [*of_body, *held]))
    before_test = walk.labels.fork()
    run_cut(analysing, test, [*of_test, *carry])
    if walk.alive is None:
        return carry
    again = function_of(walk, before_test, test, [*of_test, *carry])
    turn = function_of(walk, before, body, [*of_body, *carry])
    ended = lax.while_loop(
        lambda held: again(*arrays_of(of_test), *held)[0],
        lambda held: turn(*arrays_of(of_body), *held),
        [jnp.asarray(a) for a in arrays_of(given)],
    )
    return results_of(carry, ended)


@rule("custom_jvp_call", through=True)
def custom_jvp(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Walked through, and so is its derivative, which stays what its author says."""

    def slope(arrays: list[Any], tangents: list[Any]) -> Any:
        of_soft, chosen = _of_soft(eqn, arrays)
        return jax.jvp(of_soft, chosen, tuple(tangents))[1]

    start, slope_of, outputs = _with_derivative(walk, eqn, operands, slope, forward=True)
    if start is None or slope_of is None:
        return outputs
    function = jax.custom_jvp(start)

    @function.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return start(*primals), slope_of(*primals, *(tangents[i] for i in _soft(eqn)))

    arrays = function(*[jnp.asarray(a) for a in arrays_of(operands)])
    return [replace(value, array=array) for value, array in zip(outputs, arrays, strict=True)]


@rule("custom_vjp_call", "custom_vjp_call_jaxpr", through=True)
def custom_vjp(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Walked through, and so is its derivative; the backward pass computes anew what the forward pass would keep."""

    def slope(arrays: list[Any], cotangents: list[Any]) -> Any:
        of_soft, chosen = _of_soft(eqn, arrays)
        return jax.vjp(of_soft, *chosen)[1](cotangents)

    start, slope_of, outputs = _with_derivative(walk, eqn, operands, slope, forward=False)
    if start is None or slope_of is None:
        return outputs
    function = jax.custom_vjp(start)

    def backward(arrays: Any, cotangents: Any) -> Any:
        found = dict(zip(_soft(eqn), slope_of(*arrays, *cotangents), strict=True))
        return tuple(found.get(i) for i in range(len(arrays)))

    function.defvjp(lambda *arrays: (start(*arrays), arrays), backward)
    arrays = function(*[jnp.asarray(a) for a in arrays_of(operands)])
    return [replace(value, array=array) for value, array in zip(outputs, arrays, strict=True)]


def _with_derivative(
    walk: Walk, eqn: JaxprEqn, operands: Sequence[Value], slope: Callable[..., Any], *, forward: bool
) -> tuple[Callable[..., list[Any]] | None, Callable[..., list[Any]] | None, list[Value]]:
    """Walks a function and its derivative `slope(arrays, seeds)`, which obeys the same ties.

    The seeds are tangents of the operands if `forward`, and cotangents of the outputs otherwise.

    Returns:
        The function and its derivative on small arrays, where they differ from the whole ones, and the outputs.
    """
    closed = _closed(eqn.params["call_jaxpr"])
    if not walk.derivatives:
        return None, None, walk.run(closed, operands)
    simple = _only_elementwise(closed.jaxpr)  # then what is dead can still be computed
    inputs = [operand if simple else operand.settled() for operand in operands]
    smooth = bool(_soft(eqn)) and all(jnp.issubdtype(dtype_of(var), np.floating) for var in eqn.outvars)
    if all(axis.fixed for value in inputs for axis in value.axes) or not smooth:
        return None, None, opaque(walk, eqn, inputs)
    before = walk.labels.fork()
    outputs = run_cut(walk if simple else _analysing(walk), closed, inputs)
    outputs = outputs if simple else results_of(outputs, None)
    shapes = [jax.ShapeDtypeStruct(shape_of(var), dtype_of(var)) for var in eqn.invars]
    seeds = [eqn.invars[i] for i in _soft(eqn)] if forward else eqn.outvars
    derivative = jax.make_jaxpr(slope)(shapes, [jax.ShapeDtypeStruct(shape_of(v), dtype_of(v)) for v in seeds])
    read = partial_eval.dce_jaxpr(derivative.jaxpr, [True] * len(derivative.jaxpr.outvars), instantiate=True)[0]
    derivative = ClosedJaxpr(read, derivative.consts)
    ends = [operands[i] for i in _soft(eqn)] if forward else outputs
    seeded = [*inputs, *(_like(value) for value in ends)]
    before_slope = walk.labels.fork()
    plain = replace(walk, derivatives=False)
    slopes = run_cut(_analysing(plain), derivative, seeded)
    mirrored = outputs if forward else [inputs[i] for i in _soft(eqn)]
    for value, other in zip(mirrored, slopes, strict=True):
        for a, b in zip(value.axes, other.axes, strict=True):
            walk.tie(eqn, a, b)
    if walk.alive is None:
        return None, None, outputs
    return function_of(walk, before, closed, inputs), function_of(plain, before_slope, derivative, seeded), outputs


def _only_elementwise(jaxpr: Jaxpr) -> bool:
    inner = [_closed(value).jaxpr for eqn in jaxpr.eqns for value in eqn.params.values() if _is_jaxpr(value)]
    plain = {*ELEMENTWISE, *_CALLS, "custom_jvp_call", "broadcast_in_dim"}
    return plain.issuperset(eqn.primitive.name for eqn in jaxpr.eqns) and all(map(_only_elementwise, inner))


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, Jaxpr | ClosedJaxpr)


def _soft(eqn: JaxprEqn) -> list[int]:
    """The operands by which one can differentiate."""
    return [i for i, var in enumerate(eqn.invars) if jnp.issubdtype(dtype_of(var), np.floating)]


def _of_soft(eqn: JaxprEqn, arrays: Sequence[Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The equation on whole arrays as a function of those by which one can differentiate, and these."""
    soft = _soft(eqn)

    def function(*chosen: Any) -> Any:
        given = dict(zip(soft, chosen, strict=True))
        return bind(eqn, [given.get(i, array) for i, array in enumerate(arrays)])

    return function, tuple(arrays[i] for i in soft)


def _like(value: Value) -> Value:
    """A tangent or cotangent of the value: the same axes, and nothing known of what it holds."""
    return Value(tuple(Axis(axis.rows) for axis in value.axes))


@rule("optimization_barrier")
def barrier(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Hands everything on."""
    return walk.outputs(eqn, [[axis.settled() for axis in operand.axes] for operand in operands], operands)
