"""How granularities are written: `weight`, `kernel`, `"2:4"`, `{n_m: "2:4", axis: -1}`, `{block: [4, 1]}`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from prune_jax.errors import UserMistake, did_you_mean

FAMILIES = ("weight", "n:m", "block", "kernel", "neuron", "group", "layer")
_FORMS = {"n:m": "n:m such as '2:4'", "block": "{block: [r, c]}"}  # of those that take numbers


class Granularity(NamedTuple):
    """What dies together: one of `FAMILIES`, and its numbers: n, m and an axis other than -2, or a block's sides."""

    family: str
    numbers: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.family == "n:m":
            n_m = "{}:{}".format(*self.numbers)
            return n_m if self.axis == -2 else f"{{n_m: '{n_m}', axis: {self.axis}}}"
        return f"{{block: {list(self.numbers)}}}" if self.family == "block" else self.family

    @property
    def axis(self) -> int:
        """Of n:m, the axis along which groups of m lie: the inputs of a kernel `[.., in, out]`, unless it was named."""
        return self.numbers[2] if len(self.numbers) > 2 else -2

    @property
    def fixed(self) -> bool:
        """Whether it says by itself how many die, and where."""
        return self.family == "n:m"

    def alone(self, *words: str) -> str:
        """Why a target, a scope or a `min_keep` does not go with a fixed one."""
        n, m = self.numbers[:2]
        what = "inputs" if self.axis == -2 else "weights"
        return f"{self} keeps {n} of each {m} {what}, which says how many die where; leave {' and '.join(words)} out"


def read_granularity(written: Any) -> Granularity:
    """Reads a granularity.

    Raises:
        UserMistake: what is wrong with it; a sentence that goes on after its name and value.

    >>> read_granularity("2:4"), read_granularity({"block": [4, 1]})
    (Granularity(family='n:m', numbers=(2, 4)), Granularity(family='block', numbers=(4, 1)))
    >>> read_granularity({"n_m": "2:4", "axis": -1})
    Granularity(family='n:m', numbers=(2, 4, -1))
    """
    if isinstance(written, Granularity):
        return written
    if isinstance(written, str) and written in FAMILIES and written not in _FORMS:
        return Granularity(written)
    if isinstance(written, str) and re.fullmatch(r"(0|[1-9]\d*):(0|[1-9]\d*)", written):
        n, m = map(int, written.split(":"))
        if not 1 <= n < m:
            raise UserMistake(f"keeps {n} of each {m}: n must be at least 1 and below m, as in '2:4'")
        return Granularity("n:m", (n, m))
    if isinstance(written, Mapping) and "n_m" in written and written.keys() <= {"n_m", "axis"}:
        found, axis = read_granularity(written["n_m"]), written.get("axis", -2)
        if not found.fixed or found.axis != -2 or type(axis) is not int:
            raise UserMistake("needs n:m in quotes and the number of an axis: {n_m: '2:4', axis: -1}")
        return found if axis == -2 else Granularity("n:m", (*found.numbers, axis))
    if isinstance(written, Mapping) and list(written) == ["block"]:
        return Granularity("block", _sides(written["block"]))
    if isinstance(written, int) and written > 60:
        n, m = divmod(written, 60)
        raise UserMistake(f'is a number, which is what YAML makes of {n}:{m}; write it in quotes: "{n}:{m}"')
    words = [family for family in FAMILIES if family not in _FORMS]
    raise UserMistake(f"is not known{did_you_mean(written, words)} (allowed: {listed(FAMILIES)})")


def _sides(written: Any) -> tuple[int, int]:
    sides = tuple(written) if isinstance(written, list | tuple) else ()
    if len(sides) != 2 or not all(type(side) is int and side >= 1 for side in sides):
        raise UserMistake(
            f"gives {written!r} where rows and columns are wanted, whole numbers from 1 on: {{block: [4, 1]}}"
        )
    return sides


def listed(families: Iterable[str]) -> str:
    """The families as one writes them.

    >>> listed(["weight", "block"])
    'weight, {block: [r, c]}'
    """
    return ", ".join(_FORMS.get(family, family) for family in families)
