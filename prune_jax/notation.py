"""How granularities are written, in recipes and in Python: `weight`, `kernel`, `"2:4"`, `{block: [4, 1]}`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from prune_jax.errors import UserMistake, did_you_mean

FAMILIES = ("weight", "n:m", "block", "kernel", "neuron", "group", "layer")
_FORMS = {"n:m": "n:m such as '2:4'", "block": "{block: [r, c]}"}  # of those that take numbers


class Granularity(NamedTuple):
    """What dies together: one of `FAMILIES`, and its numbers: n and m, or the rows and columns of a block."""

    family: str
    numbers: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.family == "n:m":
            return "{}:{}".format(*self.numbers)
        return f"{{block: {list(self.numbers)}}}" if self.family == "block" else self.family

    @property
    def fixed(self) -> bool:
        """Whether it says by itself how many die, and where."""
        return self.family == "n:m"

    def alone(self, *words: str) -> str:
        """Why a target, a scope or a `min_keep` does not go with a fixed one."""
        n, m = self.numbers
        return f"{self} keeps {n} of each {m} inputs, which says how many die where; leave {' and '.join(words)} out"


def read_granularity(written: Any) -> Granularity:
    """Reads a granularity.

    Raises:
        UserMistake: what is wrong with it; a sentence that goes on after its name and value.

    >>> read_granularity("2:4"), read_granularity({"block": [4, 1]})
    (Granularity(family='n:m', numbers=(2, 4)), Granularity(family='block', numbers=(4, 1)))
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
