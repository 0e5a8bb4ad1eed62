"""Rules of reductions: a reduced axis may lose indices if what stood there can be made up for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from prune_jax.groups.values import COMPUTABLE, UNKNOWN, WILD, Axis, Dead, Unsettled, Value, same, sum_of, vague
from prune_jax.groups.walk import Walk, bind, dtype_of, fixed_axes, opaque, rule, shape_of

_NEUTRAL = {
    "reduce_sum": 0.0,
    "reduce_prod": 1.0,
    "reduce_max": -math.inf,
    "reduce_min": math.inf,
    "reduce_and": 1.0,
    "reduce_or": 0.0,
    "reduce_xor": 0.0,
}
_COMBINE: dict[str, Callable[[Any, Any], Any]] = {
    "reduce_sum": jnp.add,
    "reduce_max": jnp.maximum,
    "reduce_min": jnp.minimum,
}


@rule("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor")
def reduce(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Reduced axes go; what their dead indices would have added is added, or they keep all indices."""
    (x,) = operands
    name = eqn.primitive.name
    gone = [int(d) for d in eqn.params["axes"]]
    left = [d for d in range(len(x.axes)) if d not in gone]
    neutral = _NEUTRAL.get(name, math.nan)
    harmless = [d for d in gone if x.axes[d].fixed or same(x.axes[d].dead, neutral)]
    made_up = _made_up(name, {d: x.axes[d].dead for d in gone if d not in harmless})
    for d in gone:
        if d not in harmless and d not in made_up:
            walk.fix(eqn, x.axes[d], f"{name} goes over it, and what stands at a pruned index counts")
    dtype = dtype_of(eqn.invars[0])

    def rewrite() -> Any:
        out = bind(eqn, [x.array])
        for d in made_up:
            dead = x.axes[d].size - walk.size(x.axes[d])
            if dead:
                part = walk.dead(x, d, dtype)
                more = bind(eqn, [part])
                if name == "reduce_sum" and part.shape[d] != dead:
                    more = more * jnp.asarray(dead, more.dtype)
                out = _COMBINE[name](out, more)
        return out

    def part(i: int) -> Any:
        return bind(eqn, [walk.dead(x, left[i], dtype)])

    axes = []
    for d in left:
        dead = x.axes[d].dead
        if name == "reduce_sum" and same(dead, 0.0):
            axes.append(Axis(x.axes[d].rows, 0.0))
        elif dead in (UNKNOWN, WILD) or len(harmless) < len(gone):
            axes.append(Axis(x.axes[d].rows, vague(dead)))
        else:
            held = name in ("reduce_max", "reduce_min") or same(dead, math.nan)
            axes.append(Axis(x.axes[d].rows, dead if held else COMPUTABLE))
    return walk.outputs(eqn, [axes], operands, rewrite=rewrite, part=part)


def _made_up(name: str, deads: Mapping[int, Dead]) -> list[int]:
    """Over which axes at once what is dead can be made up for.

    A sum over two would miss what is dead along both; of a largest number known ones are taken at any number of axes.
    """
    if name not in _COMBINE:
        return []
    computable = [d for d, dead in deads.items() if dead is COMPUTABLE]
    numbers = [d for d, dead in deads.items() if not isinstance(dead, Unsettled)]
    return [*numbers, *computable][:1] if name == "reduce_sum" else [*numbers, *computable[:1]]


@rule("argmax", "argmin")
def argmax(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """The reduced axis keeps its numbers: they are the answer."""
    (x,) = operands
    gone = {int(d) for d in eqn.params["axes"]}
    for d in gone:
        walk.fix(eqn, x.axes[d], f"{eqn.primitive.name} answers its numbers")
    return walk.outputs(eqn, [[Axis(a.rows, UNKNOWN) for d, a in enumerate(x.axes) if d not in gone]], operands)


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort", "top_k", "approx_top_k")
def along(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """The axis along which they go keeps its order, and so its indices; others pass."""
    name = eqn.primitive.name
    last = len(operands[0].axes) - 1
    names = ("axis", "dimension", "reduction_dimension")
    d = next((eqn.params[key] for key in names if key in eqn.params), last) % (last + 1)
    text = f"{name} goes along it"
    for operand in operands:
        walk.fix(eqn, operand.axes[d], text)
    rows = [walk.tie(eqn, *(o.axes[i] for o in operands)) for i in range(last + 1)]
    deads = [vague(*(o.axes[i].dead for o in operands)) for i in range(last + 1)]
    axes = [
        [Axis(rows[i], deads[i]) if i != d else walk.never(eqn, size, text) for i, size in enumerate(shape_of(var))]
        for var in eqn.outvars
    ]
    return walk.outputs(eqn, axes, operands)


@rule("reduce")
def reduce_by_a_function(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Reduced axes keep all indices, for what the function makes of them is not known; others pass."""
    arrays = operands[: len(operands) // 2]
    gone = eqn.params["dimensions"]
    for d in gone:
        for x in arrays:
            walk.fix(eqn, x.axes[d], "a function of its own reduces it")
    left = [d for d in range(len(arrays[0].axes)) if d not in gone]
    axes = [Axis(walk.tie(eqn, *(x.axes[d] for x in arrays)), vague(*(x.axes[d].dead for x in arrays))) for d in left]
    return walk.outputs(eqn, [axes] * len(eqn.outvars), operands)


@rule("fft")
def fft(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Transformed axes keep all indices; others pass, and a transform of zeros is zero."""
    (x,) = operands
    kept = len(x.axes) - len(eqn.params["fft_lengths"])
    axes = [Axis(axis.rows, sum_of(axis.dead)) for axis in x.axes[:kept]]
    for d, size in enumerate(shape_of(eqn.outvars[0])[kept:], kept):
        walk.fix(eqn, x.axes[d], "a Fourier transform goes along it")
        axes.append(walk.never(eqn, size, "a Fourier transform goes along it"))
    return walk.outputs(eqn, [axes], operands)


@rule("reduce_window_max", "reduce_window_min", "reduce_window_sum", "reduce_window", "cumred_reduce_window_impl")
def window(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Axes that the window slides over keep all indices; others pass."""
    x, params = operands[0], eqn.params
    if len(eqn.outvars) != 1 or any(operand.axes for operand in operands[1:]):
        return opaque(walk, eqn, operands)
    text = "a window slides over it"
    name = eqn.primitive.name
    axes = []
    for d, axis in enumerate(x.axes):
        plain = (params["window_dimensions"][d], params["window_strides"][d], tuple(params["padding"][d])) == (
            1,
            1,
            (0, 0),
        )
        if plain and params["base_dilation"][d] == 1:
            held = (same(axis.dead, 0.0) and name == "reduce_window_sum") or name in (
                "reduce_window_max",
                "reduce_window_min",
            )
            axes.append(Axis(axis.rows, axis.settled().dead if held else vague(axis.dead)))
        else:
            walk.fix(eqn, axis, text)
            axes.append(walk.never(eqn, shape_of(eqn.outvars[0])[d], text))
    return walk.outputs(eqn, [axes], operands)


@rule("select_and_gather_add", "select_and_scatter_add")
def pooling_gradient(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """The gradients of pooling: windows slide over axes; those they do not slide over pass."""
    source, operand = operands
    params = eqn.params
    if eqn.primitive.name == "select_and_gather_add":
        source, operand = operand, source
    text = "a window slides over it"
    axes = []
    for d, (a, b) in enumerate(zip(source.axes, operand.axes, strict=True)):
        if params["window_dimensions"][d] == 1 and params["window_strides"][d] == 1 and a.size == b.size:
            axes.append(Axis(walk.tie(eqn, a, b), vague(a.dead, b.dead)))
        else:
            walk.fix(eqn, a, text)
            walk.fix(eqn, b, text)
            axes.append(fixed_axes(walk, eqn, eqn.outvars[0], text)[d])
    return walk.outputs(eqn, [axes], operands)
