"""From a function to its groups: the jaxpr is walked, and what may die is named."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from prune_jax.groups import elementwise, flow, lookups, moves, products, reductions, sharded  # noqa: F401 - they register rules
from prune_jax.groups.function import Function, read_in
from prune_jax.groups.labels import Labels, Reason, living
from prune_jax.groups.units import SPLIT, Units, solve
from prune_jax.groups.values import UNKNOWN, Axis, Value
from prune_jax.groups.walk import Walk
from prune_jax.trees import PyTree, leaves_by_path, matches

_INPUT = Reason("it meets an input's axis")
_OUTPUT = Reason("it meets an output's axis")
_UNREAD = Reason("nothing reads it")
_NUMBERS = Reason("it holds no floating weights")
_KEY = Reason("it is a key of random numbers")
_SINGLE = Reason("an axis has one index only")
_LEAVES = ("kernel", "embedding", "weight", "w", "W")


@dataclass(frozen=True)
class Group:
    """Units that are interchangeable: they hold the same axes of the same parameters in the same way.

    Attributes:
        name: such as `Conv_0.out`.
        kind: neuron, channel, head, head_dim, width, or feature where nothing in it writes.
        size: how many units there are.
        members: (path, axis, indices `[size, m]`): unit `u` holds `indices[u]` of that axis of that parameter.
    """

    name: str
    kind: str
    size: int
    members: tuple[tuple[str, int, np.ndarray], ...]


@dataclass(frozen=True)
class Analysis:
    """What the walk over one function at one set of shapes found.

    Attributes:
        closed: the function's jaxpr, without what nobody uses.
        tree: structure of its outputs.
        paths: of the parameters, in their order.
            labels: what was tied, and by whom.
        starts: by parameter the axes' labels as they were given out, None where it has none.
        units: what may die.
        read: by parameter, whether anything reads it.
        empty: by output, what stands for it where it is no more: the new value of what is gone.
        soft: by parameter, whether it holds weights: numbers that are not whole.
    """

    closed: ClosedJaxpr
    tree: Any
    paths: tuple[str, ...]
    labels: Labels
    starts: tuple[tuple[Axis, ...], ...]
    units: Units
    read: tuple[bool, ...]
    empty: tuple[jax.ShapeDtypeStruct | None, ...]
    soft: tuple[bool, ...]

    @cached_property
    def table(self) -> np.ndarray:
        """All that units hold: rows of unit, parameter, axis, index."""
        home = [
            np.stack([np.full(axis.size, p), np.full(axis.size, d), np.arange(axis.size), axis.rows[0]])
            for p, axes in enumerate(self.starts)
            for d, axis in enumerate(axes)
            if not axis.fixed
        ]
        if not home:
            return np.zeros((0, 4), np.int64)
        places = np.concatenate(home, axis=1)
        component = self.units.components[places[3]]
        order = np.argsort(component, kind="stable")
        begins = np.searchsorted(component[order], np.arange(self.units.closures.shape[1] + 1))
        closures = self.units.closures.tocsr()
        unit_of = np.repeat(np.arange(closures.shape[0]), np.diff(closures.indptr))
        counts = np.diff(begins)[closures.indices]
        units = np.repeat(unit_of, counts)
        offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = order[np.repeat(begins[:-1][closures.indices], counts) + offsets]
        table = np.stack([units, places[0, rows], places[1, rows], places[2, rows]], axis=1)
        weighty = np.zeros(closures.shape[0], bool)
        weighty[table[np.asarray(self.soft)[table[:, 1]], 0]] = True
        table = table[weighty[table[:, 0]]]  # whole numbers and truths die with weights, never for themselves
        return table[np.lexsort(table.T[::-1])]

    @cached_property
    def groups(self) -> dict[str, tuple[Group, np.ndarray]]:
        """Name -> group and the units, by their numbers in `units`, in it."""
        return _named(self)

    @cached_property
    def roles(self) -> _Roles:
        """What axes are used for."""
        return _Roles(self)

    def alive(self, dead: Iterable[int]) -> np.ndarray:
        """By label, whether it lives once these units are dead."""
        gone = np.zeros(self.units.closures.shape[1], bool)
        for unit in dead:
            closure = self.units.closures
            gone[closure.indices[closure.indptr[unit] : closure.indptr[unit + 1]]] = True
        return ~gone[self.units.components]

    def units_within(self, keeps: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
        """The units that hold nothing but indices that are dead in `keeps`, by parameter and axis."""
        table = self.table
        if not table.size:
            return np.zeros(0, np.int64)
        dead = np.zeros(len(table), bool)
        for p, d in np.unique(table[:, 1:3], axis=0):
            here = (table[:, 1] == p) & (table[:, 2] == d)
            dead[here] = ~keeps[p][d][table[here, 3]]
        units, begins = np.unique(table[:, 0], return_index=True)
        return units[np.logical_and.reduceat(dead, begins)]

    def keeps(self, alive: np.ndarray) -> list[list[np.ndarray]]:
        """By parameter and axis, which indices live."""
        return [[living(a.rows[0], alive) for a in axes] for axes in self.starts]

    def frozen(self) -> tuple[tuple[str, int, str], ...]:
        """Path, axis and reason of whatever no unit holds."""
        columns = np.zeros(self.units.closures.shape[1], bool)
        columns[self.units.closures[np.unique(self.table[:, 0])].indices] = True
        covered = columns[self.units.components]
        found = []
        for p, axes in enumerate(self.starts):
            for d, axis in enumerate(axes):
                labels = axis.rows[0]
                loose = (labels >= 0) & living(labels, covered)
                if loose.all():
                    continue
                why = self._reason(int(labels[~loose][0]))
                part = f"{int((~loose).sum())} of {loose.size}: " if loose.any() else ""
                found.append((self.paths[p], d, f"{part}{why}"))
        return tuple(found)

    def _reason(self, label: int) -> str:
        component = self.units.components[label]
        number = -label if label < 0 else int(self.units.reasons[component])
        alone = _NUMBERS if not number and self.units.closures[:, component].nnz else SPLIT
        reason = self.labels.reasons[number - 1] if number else alone
        if reason.eqn is None:
            return reason.text
        return f"{reason.text} ({reason.eqn.primitive.name}, {source_info_util.summarize(reason.eqn.source_info)})"


def analyse(function: Function, release: Sequence[str] = (), gone: Collection[str] = ()) -> Analysis:
    """Walks a function and finds what may die.

    Args:
        function: any function.
        release: patterns of outputs that may lose indices; all others keep them, but for new values of parameters.
        gone: paths of the parameters of residual branches that are taken away.
    """
    closed, empty = function.without(gone)
    labels = Labels()
    starts, values = _inputs(labels, closed.jaxpr, len(function.named), [None] * len(closed.jaxpr.invars))
    outputs = iter(Walk(labels).run(closed, values))
    for path, home, nothing in zip(leaves_by_path(function.out), function.homes, empty, strict=True):
        if nothing is not None:
            continue
        value, free = next(outputs), any(matches(path, pattern) for pattern in release)
        if not free and home not in value.news:
            for axis in value.axes:
                labels.fix(axis.rows, _OUTPUT)
    weights, read = closed.jaxpr.invars[: len(function.named)], read_in(closed.jaxpr)
    return Analysis(
        closed,
        jax.tree.structure(function.out),
        tuple(function.named),
        labels,
        starts,
        solve(labels),
        tuple(var in read for var in weights),
        empty,
        tuple(map(_soft, weights)),
    )


def rewrite(analysis: Analysis, alive: np.ndarray, params: Sequence[Any], inputs: Sequence[Any]) -> PyTree:
    """Evaluates the function on arrays of parameters without their dead indices; its outputs."""
    labels = Labels()
    values = _inputs(labels, analysis.closed.jaxpr, len(params), [*params, *inputs])[1]
    outputs = Walk(labels, alive).run(analysis.closed, values)
    if labels.count != analysis.labels.count:
        raise RuntimeError("the second walk over a function met other axes than the first")
    made = iter(outputs)
    arrays = [next(made).array if e is None else jnp.zeros(e.shape, e.dtype) for e in analysis.empty]
    return jax.tree.unflatten(analysis.tree, [jnp.asarray(array) for array in arrays])


def _inputs(
    labels: Labels, jaxpr: Jaxpr, count: int, arrays: Sequence[Any]
) -> tuple[tuple[tuple[Axis, ...], ...], list[Value]]:
    """The axes of the first `count` inputs, the parameters, and the values of all."""
    read = read_in(jaxpr)
    starts = tuple(_start(labels, var, var in read) for var in jaxpr.invars[:count])
    others = [tuple(Axis(labels.never(_INPUT, size)) for size in _shape(var)) for var in jaxpr.invars[count:]]
    weights = [True] * count + [False] * len(others)
    axes = [*starts, *others]
    values = [Value(a, array=x, weights=w) for a, x, w in zip(axes, arrays, weights, strict=True)]
    return starts, [replace(v, news=frozenset([i] if i < count else ())) for i, v in enumerate(values)]


def _soft(var: Any) -> bool:
    return jnp.issubdtype(var.aval.dtype, np.inexact)


def _shape(var: Any) -> tuple[int, ...]:
    return var.aval.shape


def _start(labels: Labels, var: Any, read: bool) -> tuple[Axis, ...]:
    if not read or jax.dtypes.issubdtype(var.aval.dtype, jax.dtypes.extended):
        return tuple(Axis(labels.never(_KEY if read else _UNREAD, size)) for size in var.aval.shape)
    return tuple(
        Axis(labels.never(_SINGLE), UNKNOWN) if size == 1 else Axis(labels.fresh(size), 0.0) for size in var.aval.shape
    )


def _named(analysis: Analysis) -> dict[str, tuple[Group, np.ndarray]]:
    found: dict[str, tuple[Group, np.ndarray]] = {}
    roles = analysis.roles
    for units, rows in _alike(analysis.table):
        members = _members(analysis, rows)
        kind = roles.kind(units[0], members)
        name = unique(roles.name(kind, members), found)
        found[name] = (Group(name, kind, len(units), members), units)
    return found


def _alike(table: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Units that hold the same axes in the same way, and their rows `[units, rows of each, 4]`; by first member."""
    if not table.size:
        return []
    units, begins, counts = np.unique(table[:, 0], return_index=True, return_counts=True)
    groups = defaultdict(list)
    axes = table[:, 1:3].astype(np.int32)
    for unit, begin, count in zip(units.tolist(), begins.tolist(), counts.tolist(), strict=True):
        groups[axes[begin : begin + count].tobytes()].append((unit, begin, count))
    found = []
    for same in groups.values():
        rows = np.stack([table[begin : begin + count] for _, begin, count in same])
        order = np.lexsort((rows[:, 0, 3], rows[:, 0, 2], rows[:, 0, 1]))
        found += [(part[:, 0, 0], part) for part in _apart(rows[order])]
    return sorted(found, key=lambda pair: tuple(pair[1][0, 0, 1:]))


def _apart(rows: np.ndarray) -> list[np.ndarray]:
    """Units in parts that share no index: the rows and the columns of a grid are alike if it is square."""
    places, held = np.unique(rows[:, :, 1:].reshape(-1, 3), axis=0, return_inverse=True)
    if len(places) == held.size:
        return [rows]
    holds = sparse.csr_matrix((np.ones(held.size, np.int32), held.ravel(), np.arange(0, held.size + 1, rows.shape[1])))
    part = connected_components((holds @ holds.T).toarray() == 0, directed=False)[1]
    return [rows[part == number] for number in range(part.max() + 1)]


def _members(analysis: Analysis, rows: np.ndarray) -> tuple[tuple[str, int, np.ndarray], ...]:
    places, begins = np.unique(rows[0, :, 1:3], axis=0, return_index=True)
    ends = [*begins[1:], rows.shape[1]]
    return tuple(
        (analysis.paths[p], int(d), rows[:, begin:end, 3])
        for (p, d), begin, end in zip(places, begins, ends, strict=True)
    )


class _Roles:
    """What axes are used for, to call groups by names that people know."""

    def __init__(self, analysis: Analysis) -> None:
        labels, self.analysis = analysis.labels, analysis
        components = analysis.units.components
        count = analysis.units.closures.shape[1]

        def flagged(arrays: list[np.ndarray]) -> np.ndarray:
            found = np.zeros(count, bool)
            for rows in arrays:
                found[components[rows[rows >= 0]]] = True
            return found

        self.heads, self.head_dims = flagged(labels.heads), flagged(labels.head_dims)
        self.channels = flagged(labels.channels)
        summed = np.zeros(labels.count, bool)
        for rows in labels.summed:
            summed[rows[rows >= 0]] = True
        self.reads = {
            (analysis.paths[p], d)
            for p, axes in enumerate(analysis.starts)
            for d, axis in enumerate(axes)
            if summed[axis.rows[axis.rows >= 0]].any()
        }
        self.ranks = dict(zip(analysis.paths, (len(axes) for axes in analysis.starts), strict=True))

    def kind(self, unit: int, members: Sequence[tuple[str, int, np.ndarray]]) -> str:
        closure = self.analysis.units.closures
        seed = self.analysis.units.seeds[unit]
        held = closure.indices[closure.indptr[unit] : closure.indptr[unit + 1]]
        if self.heads[seed]:
            return "head"
        if self.head_dims[seed]:
            return "head_dim"
        if self.channels[held].any():
            return "channel"
        writers = self._writers(members)
        readers = {path for path, d, _ in members if (path, d) in self.reads}
        if len({path for path, _ in writers} - readers) > 1:
            return "width"
        return "neuron" if writers else "feature"

    def _writers(self, members: Sequence[tuple[str, int, np.ndarray]]) -> list[tuple[str, int]]:
        return [(path, d) for path, d, _ in members if self.ranks[path] > 1 and (path, d) not in self.reads]

    def name(self, kind: str, members: Sequence[tuple[str, int, np.ndarray]]) -> str:
        writers = [path for path, _ in self._writers(members)]
        kernels = [path for path in writers if path.rpartition("/")[2] in (*_LEAVES, "value")]
        path = [*kernels, *writers, members[0][0]][0]
        parts = path.split("/")
        if len(parts) > 2 and parts[-1] == "value" and parts[-2] in _LEAVES:  # as NNX names them
            parts.pop()
        if len(parts) > 1 and parts[-1] in _LEAVES:
            parts.pop()
        ending = {"neuron": "out", "channel": "out", "head": "heads", "head_dim": "head_dim"}.get(kind, kind)
        return f"{'/'.join(parts)}.{ending}"


def unique(name: str, taken: Mapping[str, Any]) -> str:
    """The name, with a number behind it if it is taken."""
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    return found
