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
    WILD = "wild"  # unknown, and perhaps no finite number: zero times that is not zero


COMPUTABLE, UNKNOWN, WILD = Unsettled
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


def join(deads: Sequence[Dead]) -> Dead:
    """What stands at dead indices that come from one of several places."""
    first, *rest = deads
    return first if not isinstance(first, Unsettled) and all(same(first, other) for other in rest) else vague(*deads)


def vague(*deads: Dead) -> Dead:
    """What is left to say of what was made of these in a way that is not followed.

    Infinities that the function itself writes, as masks do, are met by what lives too: no more is feared of them.
    """
    return WILD if any(dead is WILD or same(dead, math.nan) for dead in deads) else UNKNOWN


def is_zero(factors: Sequence[Dead]) -> bool:
    """Whether a product of these is zero: one of them is, and all are finite."""
    infinite = any(not isinstance(dead, Unsettled) and math.isinf(dead) for dead in factors)
    return 0.0 in factors and vague(*factors) is UNKNOWN and not infinite


def sum_of(dead: Dead) -> Dead:
    """What stands at the dead indices of a weighted sum over another axis: a sum of zeros is zero."""
    return 0.0 if same(dead, 0.0) else vague(dead)


def same(a: Dead, b: Dead) -> bool:
    """Whether two dead values are the same number."""
    if isinstance(a, Unsettled) or isinstance(b, Unsettled):
        return False
    return a == b or (math.isnan(a) and math.isnan(b))
