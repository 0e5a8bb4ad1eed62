"""Loops of a fixed length."""

from __future__ import annotations

from typing import Any

import numpy as np

from prune_jax.export.onnx.graph import Graph, Value
from prune_jax.export.onnx.walk import Step, rule, sizes, walk


@rule("scan")
def scan(graph: Graph, step: Step, *values: Value) -> list[str]:
    """Scan: its body sees what does not change as names from outside."""
    p = step.params
    seen, carried = p["num_consts"], p["num_consts"] + p["num_carry"]
    consts = [v if v.array is not None else graph.tensor(graph.full(v), v.shape, v.dtype) for v in values[:seen]]
    given = [graph.full(value) for value in values[seen:]]
    body, twin = step.pair("jaxpr")
    invars = list(zip(body.jaxpr.invars, twin.jaxpr.invars, strict=True))[seen:]
    inner = [graph.tensor(graph.fresh("step"), sizes(a.aval.shape, b.aval.shape), a.aval.dtype) for a, b in invars]  # type: ignore[attr-defined]
    infos = [graph.described(value.name, value.shape, value.dtype) for value in inner]
    stacked = len(values) - carried
    if not stacked:  # ONNX counts the steps by what is stacked
        given.append(graph.store(np.zeros(p["length"], np.float32)))
        infos.append(graph.described(graph.fresh("step"), (), np.float32))
        stacked = 1
    graph.levels.append([])
    made = walk(graph, (body, twin), [*consts, *inner])
    closed = graph.close(graph.fresh("body"), infos, [(graph.fresh("next"), value) for value in made])
    ways = {"scan_input_directions": stacked, "scan_output_directions": len(made) - p["num_carry"]}
    backwards: dict[str, Any] = {name: [1] * number for name, number in ways.items() if number and p["reverse"]}
    return graph.many("Scan", *given, outputs=len(made), body=closed, num_scan_inputs=stacked, **backwards)


@rule("optimization_barrier")
def barrier(graph: Graph, step: Step, *values: Value) -> list[Value]:
    """Hands everything on."""
    return list(values)
