"""From ties to units: what must die together, and what may not die at all.

Labels that imply one another are one component; a unit is a component and all that its death implies. An index that is
seen as a place in a grid dies only with one of its coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from prune_jax.groups.labels import Labels, Reason

SPLIT = Reason("it is split in ways that no single index agrees with")


@dataclass(frozen=True)
class Units:
    """What may die.

    Attributes:
        components: the component of every label.
        closures: bool `[units, components]`: what dies with each unit.
        seeds: the component that stands for each unit.
        reasons: by component, why it may not die: 0 none, otherwise the number of a reason.
    """

    components: np.ndarray
    closures: sparse.csr_matrix
    seeds: np.ndarray
    reasons: np.ndarray


def solve(labels: Labels) -> Units:
    """Finds all units of what was tied in `labels`."""
    components = _components(labels)
    count = int(components.max(initial=-1)) + 1
    parents, children = _implied(labels, components)
    reasons = _reasons(labels, components, count, parents, children)
    alone = np.ones(count, bool)
    alone[parents] = False
    derived = _derived(labels, components, count)
    simple = np.flatnonzero(alone & ~derived & (reasons == 0))
    complex_ = np.flatnonzero(~alone & (reasons == 0))
    closed, kept = _closures(labels, components, count, parents, children, complex_)
    one = sparse.csr_matrix((np.ones(simple.size, bool), (np.arange(simple.size), simple)), (simple.size, count))
    return Units(components, sparse.vstack([one, closed]).tocsr(), np.concatenate([simple, kept]), reasons)


def _components(labels: Labels) -> np.ndarray:
    """The component of every label; grids of one axis that repeat in the same way are one grid."""
    pairs = [(a, b) for a, b in labels.equal]
    down = [(row[pattern], f.raw) for f in labels.factorings for row, pattern in zip(f.rows, f.patterns, strict=True)]
    while True:
        ends = [*pairs, *((b, a) for a, b in pairs), *down]
        source = np.concatenate([a for a, _ in ends]) if ends else np.zeros(0, np.int64)
        target = np.concatenate([b for _, b in ends]) if ends else np.zeros(0, np.int64)
        graph = sparse.csr_matrix((np.ones(source.size, bool), (source, target)), (labels.count, labels.count))
        components = connected_components(graph, directed=True, connection="strong")[1]
        again = _same_grids(labels, components)
        if not again:
            return components
        pairs += again


def _same_grids(labels: Labels, components: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Coordinates that are one, because their grids are, and are not yet."""
    first: dict[tuple[bytes, ...], tuple[np.ndarray, ...]] = {}
    found = []
    for factoring in labels.factorings:
        raw = components[factoring.raw].tobytes()
        grid = (raw, *(pattern.tobytes() for pattern in factoring.patterns))
        rows = first.setdefault(grid, factoring.rows)
        found += [(a, b) for a, b in zip(rows, factoring.rows, strict=True) if (components[a] != components[b]).any()]
    return found


def _implied(labels: Labels, components: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of components: the death of the first implies that of the second."""
    ends = [
        np.stack([components[row[pattern]], components[f.raw]])
        for f in labels.factorings
        for row, pattern in zip(f.rows, f.patterns, strict=True)
    ]
    if not ends:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    pairs = np.unique(np.concatenate(ends, axis=1), axis=1)
    apart = pairs[0] != pairs[1]
    return pairs[0][apart], pairs[1][apart]


def _reasons(
    labels: Labels, components: np.ndarray, count: int, parents: np.ndarray, children: np.ndarray
) -> np.ndarray:
    """By component the first reason that forbids its death, its own or that of what it implies."""
    none = np.iinfo(np.int64).max
    reasons = np.full(count, none, np.int64)
    for fixed, number in labels.fixed:
        np.minimum.at(reasons, components[fixed], number)
    while True:
        before = reasons.copy()
        np.minimum.at(reasons, parents, reasons[children])
        for f in labels.factorings:  # an index whose coordinates all live, lives
            makers = np.stack([reasons[components[row[p]]] for row, p in zip(f.rows, f.patterns, strict=True)])
            stuck = (makers != none).all(axis=0)
            np.minimum.at(reasons, components[f.raw[stuck]], makers.min(axis=0)[stuck])
        if np.array_equal(before, reasons):
            return np.where(reasons == none, 0, reasons)


def _derived(labels: Labels, components: np.ndarray, count: int) -> np.ndarray:
    """Which components die only with another, a coordinate of theirs."""
    derived = np.zeros(count, bool)
    for f in labels.factorings:
        raw = components[f.raw]
        own = np.zeros(raw.size, bool)
        for row, pattern in zip(f.rows, f.patterns, strict=True):
            own |= components[row[pattern]] == raw
        derived[raw[~own]] = True
    return derived


def _closures(
    labels: Labels, components: np.ndarray, count: int, parents: np.ndarray, children: np.ndarray, seeds: np.ndarray
) -> tuple[sparse.csr_matrix, np.ndarray]:
    """All that dies with each of `seeds`, and which of them may be had: no index dies without a coordinate."""
    edges = sparse.csr_matrix((np.ones(parents.size, np.int32), (parents, children)), (count, count))
    reach = sparse.csr_matrix((np.ones(seeds.size, np.int32), (np.arange(seeds.size), seeds)), (seeds.size, count))
    while True:
        more = reach + reach @ edges
        more.data[:] = 1
        if more.nnz == reach.nnz:
            break
        reach = more
    reach = _with_free_coordinates(labels, components, reach.tocsr(), seeds)
    whole = ~_orphans(labels, components, reach)
    return reach[whole].astype(bool), seeds[whole]


def _orphans(labels: Labels, components: np.ndarray, reach: sparse.csr_matrix) -> np.ndarray:
    """Which units hold an index of a grid without any of its coordinates."""
    bad = np.zeros(reach.shape[0], bool)
    columns = reach.tocsc()
    for f in labels.factorings:
        dead = columns[:, components[f.raw]]
        coordinates = sum(columns[:, components[row[pattern]]] for row, pattern in zip(f.rows, f.patterns, strict=True))
        held = dead.multiply(coordinates > 0)
        bad |= np.asarray(dead.sum(axis=1) > held.sum(axis=1)).ravel()
    return bad


def _with_free_coordinates(
    labels: Labels, components: np.ndarray, reach: sparse.csr_matrix, seeds: np.ndarray
) -> sparse.csr_matrix:
    """Adds to units that lack a coordinate those of other grids whose death adds nothing to theirs."""
    lacking = np.flatnonzero(_orphans(labels, components, reach))
    if not lacking.size:
        return reach
    implied = {
        int(seed): set(reach.indices[reach.indptr[i] : reach.indptr[i + 1]]) - {int(seed)}
        for i, seed in enumerate(seeds)
    }
    rows = reach.tolil()
    for unit in lacking:
        held = set(rows.rows[unit])
        while True:
            free = {seed for seed, dead in implied.items() if seed not in held and dead and dead <= held}
            if not free:
                break
            held |= free
        rows.rows[unit] = sorted(held)
        rows.data[unit] = [1] * len(held)
    return rows.tocsr()
