"""Rules of functions that run on many devices: a shard loses the same places on each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn

from prune_jax.groups.flow import arrays_of, function_of, results_of, run_cut
from prune_jax.groups.values import Axis, Value, sum_of
from prune_jax.groups.walk import Walk, rule


@rule("shard_map")
def shard_map(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Walked through on the shapes of one shard; derivatives inside are those of what is computed."""
    params = eqn.params
    closed = ClosedJaxpr(params["jaxpr"], ())
    inputs = [
        Value(tuple(_shard(walk, eqn, a, k) for a, k in zip(v.axes, counts, strict=True)), weights=v.weights)
        for v, counts in zip(operands, _shards(params["mesh"], params["in_specs"], operands), strict=True)
    ]
    plain = replace(walk, derivatives=False)
    before = walk.labels.fork()
    local = run_cut(replace(plain, alive=None), closed, inputs)
    outputs = [
        Value(tuple(_joined(axis, count) for axis, count in zip(v.axes, counts, strict=True)))
        for v, counts in zip(local, _shards(params["mesh"], params["out_specs"], local), strict=True)
    ]
    if walk.alive is None:
        return outputs
    function = function_of(plain, before, closed, inputs)
    mapped = jax.shard_map(
        lambda *arrays: tuple(function(*arrays)),
        mesh=params["mesh"],
        in_specs=params["in_specs"],
        out_specs=params["out_specs"],
        axis_names=set(params["newly_manual_axes"]),
        check_vma=params["check_vma"],
    )
    return results_of(outputs, mapped(*(jnp.asarray(a) for a in arrays_of(operands))))


def _shards(mesh: Any, specs: Sequence[Any], values: Sequence[Value]) -> list[list[int]]:
    """Into how many pieces each axis of each value is cut."""
    found = []
    for spec, value in zip(specs, values, strict=True):
        names = [*spec, *([None] * (len(value.axes) - len(spec)))]
        parts = [() if n is None else (n,) if isinstance(n, str) else tuple(n) for n in names]
        found.append([math.prod(mesh.shape[name] for name in part) for part in parts])
    return found


def _shard(walk: Walk, eqn: JaxprEqn, axis: Axis, count: int) -> Axis:
    """The axis of one shard: its places are one on all devices."""
    size = axis.size // count
    pieces = [Axis(axis.rows[:, i * size : (i + 1) * size]) for i in range(count)]
    if size == 1 and count > 1:
        walk.fix(eqn, axis, "a device holds one index of it only")
    return Axis(walk.tie(eqn, *pieces), axis.settled().dead)


def _joined(axis: Axis, count: int) -> Axis:
    return Axis(np.tile(axis.rows, count), axis.settled().dead)


@rule("pvary", "pcast", "psum", "psum_invariant", "pmax", "pmin", "ppermute", "pbroadcast")
def collective(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Devices exchange arrays place by place."""
    sums = eqn.primitive.name.startswith("psum")
    axes = [[Axis(a.rows, sum_of(a.dead) if sums else a.settled().dead) for a in operand.axes] for operand in operands]
    whole = operands[0].const if len(operands) == 1 and not sums else None
    return walk.outputs(eqn, axes, operands, const=whole)
