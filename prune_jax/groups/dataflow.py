"""A jaxpr as one flat graph: functions that are called are looked into, so that what flows where can be followed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

# How equations of these call a function on their own operands, and where it stands.
CALLS = {name: "jaxpr" for name in ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2")}
DERIVATIVES = {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}  # their bodies stay as they are


@dataclass(frozen=True)
class Node:
    """One equation.

    Attributes:
        eqn: the equation.
        ins: values that go in.
        outs: values that come out.
        place: where it stands: its number, after those of the calls around it; None where nothing may be changed.
    """

    eqn: JaxprEqn
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    place: tuple[int, ...] | None


@dataclass
class Graph:
    """All equations in an order in which they can be evaluated; values are numbers.

    Attributes:
        inputs: values of the function's inputs.
        outputs: values of its outputs.
        nodes: its equations.
        producers: value -> the node that makes it.
        readers: value -> the nodes that read it.
        zeros: values that are the literal 0.
    """

    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    nodes: list[Node] = field(default_factory=list)
    producers: dict[int, int] = field(default_factory=dict)
    readers: list[list[int]] = field(default_factory=list)
    zeros: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, jaxpr: Jaxpr) -> Graph:
        """The graph of a function."""
        graph = cls()
        graph.inputs = tuple(graph._new() for _ in jaxpr.invars)
        graph.outputs = tuple(graph._walk(jaxpr, graph.inputs, ()))
        return graph

    def _new(self) -> int:
        self.readers.append([])
        return len(self.readers) - 1

    def _walk(self, jaxpr: Jaxpr, inputs: Sequence[int], place: tuple[int, ...] | None) -> list[int]:
        known: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True))
        known |= {var: self._new() for var in jaxpr.constvars}

        def value(atom: Any) -> int:
            if not isinstance(atom, Literal):
                return known[atom]
            number = self._new()
            if not np.ndim(atom.val) and atom.val == 0:
                self.zeros.add(number)
            return number

        for i, eqn in enumerate(jaxpr.eqns):
            here = None if place is None else (*place, i)
            ins = [value(atom) for atom in eqn.invars]
            name = eqn.primitive.name
            held = eqn.params.get(CALLS.get(name) or DERIVATIVES.get(name, ""))
            if held is not None:
                body = held.jaxpr if isinstance(held, ClosedJaxpr) else held
                outs = self._walk(body, ins, here if name in CALLS else None)
            else:
                outs = [self._new() for _ in eqn.outvars]
                self._add(Node(eqn, tuple(ins), tuple(outs), here))
            known.update(zip(eqn.outvars, outs, strict=True))
        return [value(atom) for atom in jaxpr.outvars]

    def _add(self, node: Node) -> None:
        number = len(self.nodes)
        self.nodes.append(node)
        self.producers.update(dict.fromkeys(node.outs, number))
        for value in node.ins:
            self.readers[value].append(number)
