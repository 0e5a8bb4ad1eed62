"""Labels: one integer for each index of each axis of each array, and what ties them.

Two indices with one label live and die together. A negative label never dies; it names the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


class Reason(NamedTuple):
    """Why an index may not die: in words, and at which equation of the jaxpr."""

    text: str
    eqn: Any = None


class Factoring(NamedTuple):
    """An axis seen as a grid: index k of `raw` dies exactly if, for some row r, `rows[r][patterns[r][k]]` dies."""

    raw: np.ndarray  # [n]
    patterns: tuple[np.ndarray, ...]  # each [n]: the coordinate of every index
    rows: tuple[np.ndarray, ...]  # each [max of its pattern + 1]


class Mark(NamedTuple):
    """A place to come back to."""

    labels: int
    equal: int
    fixed: int
    factorings: int


@dataclass
class Labels:
    """The labels given out so far, and the ties between them.

    A walk of the same equations gives out the same labels again, so that a second walk can look up who is alive.
    """

    def __post_init__(self) -> None:
        self.count = 0
        self.reasons: list[Reason] = []
        self.equal: list[tuple[np.ndarray, np.ndarray]] = []
        self.fixed: list[tuple[np.ndarray, int]] = []  # labels, and the number of a reason
        self.factorings: list[Factoring] = []
        self.heads: list[np.ndarray] = []  # labels along which attention runs in parallel
        self.head_dims: list[np.ndarray] = []  # labels that attention contracts or hands on
        self.summed: list[np.ndarray] = []  # labels that a product sums over
        self.channels: list[np.ndarray] = []  # labels of a convolution's features

    def fresh(self, size: int) -> np.ndarray:
        """New labels `[1, size]`, tied to nothing."""
        self.count += size
        return np.arange(self.count - size, self.count, dtype=np.int64)[None]

    def never(self, reason: Reason, size: int = 1) -> np.ndarray:
        """Labels `[1, size]` that never die."""
        self.reasons.append(reason)
        return np.broadcast_to(np.int64(-len(self.reasons)), (1, size))

    def fix(self, rows: np.ndarray, reason: Reason) -> None:
        """Forbids the death of `rows`."""
        labels = rows[rows >= 0]
        if labels.size:
            self.reasons.append(reason)
            self.fixed.append((labels, len(self.reasons)))

    def tie(self, a: np.ndarray, b: np.ndarray, reason: Reason) -> np.ndarray:
        """Makes the indices of two axes live and die together.

        Args:
            a: labels `[rows, n]`: an index dies if one of its rows does.
            b: as `a`.
            reason: why they meet, for what cannot be tied.

        Returns:
            The labels by which the common axis is best known from here on.
        """
        if a is b or (a.shape == b.shape and np.array_equal(a, b)):
            return a
        if len(a) == len(b) == 1:
            return self._tie_row(a[0], b[0])[None]
        left, right = {_pattern(row): row for row in a}, {_pattern(row): row for row in b}
        if len(left) == len(a) and len(right) == len(b) and left.keys() == right.keys():
            return np.stack([self._tie_row(row, right[key]) for key, row in left.items()])
        if len(b) == 1 and _is_raw(b[0]):
            return self._tie_rows(a, self.factor(b[0], a))
        if len(a) == 1 and _is_raw(a[0]):
            return self._tie_rows(b, self.factor(a[0], b))
        apart = Reason(f"{reason.text}: two axes meet that were split or joined in different ways", reason.eqn)
        tied = dict[bytes, np.ndarray]()
        for row in (*a, *b):
            key = _pattern(row)
            if key in left and key in right:  # of the parts that both have
                tied[key] = self._tie_row(tied[key], row) if key in tied else row
            else:
                self.fix(row, apart)
        return np.stack(list(tied.values())) if tied else self.never(apart, a.shape[1])

    def factor(self, raw: np.ndarray, grid: np.ndarray) -> np.ndarray:
        """Sees the axis `raw` `[n]` as a grid whose coordinates repeat as the labels in `grid` `[rows, n]` do.

        An index of `raw` dies exactly if one of its coordinates does, and never for itself.

        Returns:
            Labels `[rows, n]` of the coordinates.
        """
        patterns = tuple(np.unique(row, return_inverse=True)[1].ravel() for row in grid)
        for known in self.factorings:
            if np.array_equal(known.raw, raw) and _same(known.patterns, patterns):
                rows = known.rows
                break
        else:
            rows = tuple(self.fresh(int(pattern.max()) + 1)[0] for pattern in patterns)
            self.factorings.append(Factoring(raw, patterns, rows))
        return np.stack([row[pattern] for row, pattern in zip(rows, patterns, strict=True)])

    def fork(self) -> Labels:
        """A copy that gives out the same labels from here on, and gathers ties for itself."""
        copy = Labels()
        copy.count, copy.factorings = self.count, list(self.factorings)
        return copy

    def mark(self) -> Mark:
        """Where we are."""
        return Mark(self.count, len(self.equal), len(self.fixed), len(self.factorings))

    def rewind(self, mark: Mark) -> None:
        """Forgets what came after `mark`."""
        self.count = mark.labels
        del self.equal[mark.equal :], self.fixed[mark.fixed :], self.factorings[mark.factorings :]

    def _tie_row(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        loose = (a >= 0) & (b >= 0) & (a != b)
        if loose.any():
            self.equal.append((a[loose], b[loose]))
        for x, y in ((a, b), (b, a)):
            stuck = (x >= 0) & (y < 0)
            for number in np.unique(y[stuck]):
                self.fixed.append((x[stuck & (y == number)], int(-number)))
        return np.where(a < 0, a, b)

    def _tie_rows(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.stack([self._tie_row(x, y) for x, y in zip(a, b, strict=True)])


def _pattern(row: np.ndarray) -> bytes:
    """Which indices share a label, whatever the labels are."""
    _, first, inverse = np.unique(row, return_index=True, return_inverse=True)
    return first[inverse.ravel()].tobytes()


def _is_raw(row: np.ndarray) -> bool:
    """Whether each index has a label of its own."""
    return bool((row >= 0).all()) and np.unique(row).size == row.size


def _same(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def living(rows: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """Which labels in `rows` are alive, where `alive` says it of each that may die."""
    found = np.ones(rows.shape, bool)
    loose = rows >= 0
    found[loose] = alive[rows[loose]]
    return found


def without_fixed_rows(rows: np.ndarray) -> np.ndarray:
    """`rows` without those that never die, but at least one row."""
    loose = (rows >= 0).any(axis=1)
    if loose.all():
        return rows
    return rows[loose] if loose.any() else rows[:1]
