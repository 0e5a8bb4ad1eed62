"""What a walk knows of one array: the labels of its axes, what stands at dead indices, and, when rewriting, itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, NamedTuple

import numpy as np


class Unsettled(Enum):
    """What stands at the dead indices of an axis, where it is no number known beforehand."""

    COMPUTABLE = "computable"  # `Value.part` makes it from what is alive
    UNKNOWN = "unknown"


COMPUTABLE, UNKNOWN = Unsettled.COMPUTABLE, Unsettled.UNKNOWN
Dead = float | Unsettled


class Axis(NamedTuple):
    """One axis: labels `[rows, size]`, an index dies if one of its rows does; and the number at dead indices."""

    rows: np.ndarray
    dead: Dead = UNKNOWN

    @property
    def size(self) -> int:
        """Its length before anything dies."""
        return self.rows.shape[1]

    @property
    def fixed(self) -> bool:
        """Whether it is known already that no index dies."""
        return bool((self.rows < 0).all())

    def settled(self) -> Axis:
        """The axis without the promise that its dead part can be computed."""
        return self._replace(dead=UNKNOWN) if self.dead is COMPUTABLE else self


@dataclass(frozen=True)
class Value:
    """An array of the walked function.

    Attributes:
        axes: one for each axis of the whole array.
        const: the number that every element is, if it is known.
        known: the whole array, where it depends on constants alone.
        array: the array without its dead indices; None while analysing.
        part: axis -> what stands at its dead indices, `[..., 1 or dead, ...]`; for axes that are COMPUTABLE.
        weights: whether it depends on parameters and constants alone.
        news: the parameters that it was made of element by element: it may be the new value of one.
        whole: whether it depends on constants alone, and `array` keeps all indices until it meets something else.
    """

    axes: tuple[Axis, ...]
    const: float | None = None
    known: Callable[[], Any] | None = None
    array: Any = None
    part: Callable[[int], Any] | None = None
    weights: bool = False
    whole: bool = False
    news: frozenset[int] = frozenset()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape before anything dies."""
        return tuple(axis.size for axis in self.axes)

    def settled(self) -> Value:
        """The value as it crosses into a loop: what it is made of is forgotten."""
        return replace(self, axes=tuple(axis.settled() for axis in self.axes), part=None)


def living(labels: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """Whether these labels live, by what is told of each; those below 0 always do."""
    found = np.ones(labels.shape, bool)
    found[labels >= 0] = alive[labels[labels >= 0]]
    return found


def join(deads: Sequence[Dead]) -> Dead:
    """What stands at dead indices that come from one of several places."""
    first, *rest = deads
    return first if not isinstance(first, Unsettled) and all(same(first, other) for other in rest) else UNKNOWN


def same(a: Dead, b: Dead) -> bool:
    """Whether two dead values are the same number."""
    if isinstance(a, Unsettled) or isinstance(b, Unsettled):
        return False
    return a == b or (math.isnan(a) and math.isnan(b))
