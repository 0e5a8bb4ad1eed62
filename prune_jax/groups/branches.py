"""Residual branches: parts that are added to a path which goes on without them, and so can be taken away whole.

A branch is known by the parameters that nothing else reads. With these at zero it adds zero, so that the network
without the branch computes what the masked network computes.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Var

from prune_jax.groups.dataflow import CALLS, Graph, Node

_SAME = {"convert_element_type", "copy", "sharding_constraint", "optimization_barrier", "name", "reduce_precision"}
_ANY = {"mul", "dot_general", "conv_general_dilated", "and"}  # zero if one operand is
_FIRST = _SAME | {  # zero if the first operand is
    *("neg", "abs", "sign", "sqrt", "cbrt", "square", "integer_pow", "tanh", "sin", "tan", "asin", "atan", "sinh"),
    *("asinh", "erf", "expm1", "log1p", "floor", "ceil", "round", "reshape", "transpose", "squeeze", "rev", "slice"),
    *("broadcast_in_dim", "reduce_sum", "reduce_max", "reduce_min", "reduce_window_sum", "reduce_window_max"),
    *("cumsum", "real", "imag", "dynamic_slice", "gather", "stop_gradient", "div"),
}
_ALL = {"add", "sub", "max", "min", "concatenate", "pad", "add_any"}  # zero if all operands are


_WILD = {"rsqrt", "log", "pow", "digamma", "lgamma", "atan2"}  # what is infinite, or none, at zero


@dataclass(frozen=True)
class Join:
    """An addition of a branch.

    Attributes:
        place: where the equation stands, as in `dataflow.Node`.
        stays: which operand goes on without the other.
    """

    place: tuple[int, ...]
    stays: int


@dataclass(frozen=True)
class Branch:
    """What can be taken away whole.

    Attributes:
        params: the parameters, by their numbers, that nothing else reads.
        joins: where it is added.
    """

    params: frozenset[int]
    joins: tuple[Join, ...]
    _graph: Graph = field(repr=False, compare=False)
    _additions: tuple[_Candidate, ...] = field(repr=False, compare=False)

    def is_zero(self, params: Iterable[int]) -> bool:
        """Whether it adds zero wherever it is added once these parameters are zero."""
        return all(_is_zero(self._graph, addition, params) for addition in self._additions)


@dataclass(frozen=True)
class _Candidate:
    node: int
    join: Join
    stays: int  # the value that goes on
    branch: int  # and the one that is added to it
    params: frozenset[int]  # all that the branch reads
    inside: frozenset[int]  # its nodes


def branches(jaxpr: Jaxpr, ranks: Sequence[int], mirrored: Sequence[int | None]) -> list[Branch]:
    """The residual branches of a function, in the order in which they are added.

    An addition joins a branch where one operand is made of the other (or of what that was added to before).

    Args:
        jaxpr: the function's; its first inputs are its parameters.
        ranks: axes of each parameter; one without axes is no part of a branch.
        mirrored: by output, the parameter whose new value it is, such as a batch statistic.
    """
    graph = Graph.of(jaxpr)
    found = _candidates(graph, len(ranks))
    seen: dict[frozenset[int], Branch] = {}
    for candidate in found:
        branch = _branch(graph, candidate, found, ranks, mirrored)
        if branch:
            seen.setdefault(branch.params, branch)
    return list(seen.values())


def _candidates(graph: Graph, count: int) -> list[_Candidate]:
    """Additions of which one operand is made of the other."""
    streams = list(range(len(graph.readers)))  # value -> the path that it lies on
    found = []
    for number, node in enumerate(graph.nodes):
        name = node.eqn.primitive.name
        if name in _SAME:
            for value, out in zip(node.ins, node.outs, strict=False):
                streams[out] = streams[value]
        if name != "add" or node.place is None:
            continue
        for stays in (0, 1):
            if _shape(node.eqn.invars[stays]) != _shape(node.eqn.outvars[0]):
                continue
            inside, params, meets = _behind(graph, node.ins[1 - stays], streams, streams[node.ins[stays]], count)
            if meets:
                streams[node.outs[0]] = streams[node.ins[stays]]
                join = Join(node.place, stays)
                found.append(_Candidate(number, join, node.ins[stays], node.ins[1 - stays], params, inside))
                break
    return found


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


def _behind(
    graph: Graph, value: int, streams: Sequence[int], stream: int, count: int
) -> tuple[frozenset[int], frozenset[int], bool]:
    """The nodes and parameters that a value is made of, back to a stream; whether it meets the stream."""
    inside: set[int] = set()
    params: set[int] = set()
    meets, todo, seen = False, [value], {value}
    while todo:
        value = todo.pop()
        if streams[value] == stream:
            meets = True
            continue
        if value < count:  # inputs come first, and of these the parameters
            params.add(value)
        number = graph.producers.get(value)
        if number is None:
            continue
        inside.add(number)
        fresh = set(graph.nodes[number].ins) - seen
        seen |= fresh
        todo += fresh
    return frozenset(inside), frozenset(params), meets


def _branch(
    graph: Graph,
    first: _Candidate,
    candidates: Sequence[_Candidate],
    ranks: Sequence[int],
    mirrored: Sequence[int | None],
) -> Branch | None:
    """The branch that a candidate belongs to: with all additions of the same parameters, as in another mode."""
    by_node = {candidate.node: candidate for candidate in candidates}
    joined = {first.node: first}
    heap = sorted({n for p in first.params for n in graph.readers[p]})
    seen = set(heap)
    while heap:
        number = heapq.heappop(heap)
        other = by_node.get(number)
        if other and number not in first.inside and (other is first or _like(graph, first, other, seen)):
            joined[number] = other
            if graph.producers.get(other.stays) not in seen:
                continue
        for out in graph.nodes[number].outs:
            for reader in set(graph.readers[out]) - seen:
                seen.add(reader)
                heapq.heappush(heap, reader)
    outer = [c for c in joined.values() if not any(c.node in other.inside for other in joined.values())]
    params = frozenset[int]().union(*(c.params for c in outer))
    own = _own(graph, params, {(c.node, c.branch) for c in outer if c.branch != c.stays}, ranks, mirrored)
    branch = Branch(own, tuple(c.join for c in outer), graph, tuple(outer))
    return branch if own and branch.is_zero(own) else None


def _like(graph: Graph, first: _Candidate, other: _Candidate, seen: set[int]) -> bool:
    """Whether the addition is of the same branch, in another mode: what was seen comes to it, and little else does."""
    more_or_less = other.params <= first.params or other.params >= first.params
    return more_or_less and graph.producers.get(other.branch) in seen


def _own(
    graph: Graph,
    params: Iterable[int],
    joins: set[tuple[int, int]],
    ranks: Sequence[int],
    mirrored: Sequence[int | None],
) -> frozenset[int]:
    """Those that reach nothing but the joins (node, value that is added), and new values of their like."""
    homes: dict[int, set[int | None]] = defaultdict(set)
    for value, home in zip(graph.outputs, mirrored, strict=True):
        homes[value].add(home if home is not None and ranks[home] else None)
    reached = {p: _reached(graph, p, joins, homes) for p in params if ranks[p]}
    own = {p for p, found in reached.items() if None not in found}
    while True:
        own |= {home for p in own for home in reached[p] if home is not None and home not in reached}
        reached |= {p: _reached(graph, p, joins, homes) for p in own - reached.keys()}
        left = {p for p in own if reached[p] <= own}
        if left == own:
            return frozenset(own)
        own = left


def _reached(
    graph: Graph, value: int, joins: set[tuple[int, int]], homes: Mapping[int, set[int | None]]
) -> set[int | None]:
    """The parameters whose new values are made of a value past the joins; None for any other output."""
    found: set[int | None] = set()
    todo, seen = [value], {value}
    while todo and None not in found:
        value = todo.pop()
        found |= homes.get(value, set())
        outs = {out for n in graph.readers[value] if (n, value) not in joins for out in graph.nodes[n].outs}
        todo += outs - seen
        seen |= outs
    return found


def _is_zero(graph: Graph, candidate: _Candidate, params: Iterable[int]) -> bool:
    """Whether a branch adds zero once these parameters are zero; zero times what may be infinite is not."""
    zero, wild = {*graph.zeros, *params}, set[int]()
    for number in sorted(candidate.inside):
        node = graph.nodes[number]
        is_zero = [value in zero for value in node.ins]
        if not wild.isdisjoint(node.ins) or _is_wild(node, is_zero):
            wild.update(node.outs)
        elif _keeps_zero(node, is_zero):
            zero.update(node.outs)
    return candidate.branch in zero


def _is_wild(node: Node, is_zero: Sequence[bool]) -> bool:
    """Whether it may be infinite or no number at zeros."""
    name = node.eqn.primitive.name
    if name == "div":
        return is_zero[1]
    return any(is_zero[:1]) and (name in _WILD or (name == "integer_pow" and node.eqn.params["y"] < 0))


def _keeps_zero(node: Node, is_zero: Sequence[bool]) -> bool:
    name = node.eqn.primitive.name
    if name in _ANY:
        return any(is_zero)
    if name == "integer_pow":
        return is_zero[0] and node.eqn.params["y"] > 0
    if name in _FIRST:
        return is_zero[0]
    if name == "select_n":
        return all(is_zero[1:])
    if name == "dynamic_update_slice":
        return all(is_zero[:2])
    return name in _ALL and all(is_zero)


def without(jaxpr: Jaxpr, joins: Iterable[Join]) -> Jaxpr:
    """The function without what is added at these places; what it was added to goes on alone."""
    here: dict[int, list[Join]] = defaultdict(list)
    for join in joins:
        here[join.place[0]].append(Join(join.place[1:], join.stays))
    renamed: dict[Any, Any] = {}

    def new(atom: Any) -> Any:
        return renamed.get(atom, atom) if isinstance(atom, Var) else atom

    eqns = []
    for i, eqn in enumerate(jaxpr.eqns):
        eqn = eqn.replace(invars=[new(atom) for atom in eqn.invars])
        inner = here.get(i, [])
        if any(not join.place for join in inner):
            renamed[eqn.outvars[0]] = eqn.invars[inner[0].stays]
            continue
        if inner:
            name = CALLS[eqn.primitive.name]
            held = eqn.params[name]
            closed = isinstance(held, ClosedJaxpr)
            body = without(held.jaxpr if closed else held, inner)
            eqn = eqn.replace(params={**eqn.params, name: ClosedJaxpr(body, held.consts) if closed else body})
        eqns.append(eqn)
    return jaxpr.replace(eqns=eqns, outvars=[new(atom) for atom in jaxpr.outvars])
