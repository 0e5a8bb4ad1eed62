"""How much a recipe may say: what is far beyond any recipe is refused before it takes memory or time."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prune_jax.recipe.parts import mistake

BYTES = 256 * 1024  # of a recipe's file; those that ship with the package have less than 5,000
DEPTH = 32  # of lists and mappings in one another
PARTS = 20_000  # values, lists and mappings, those that an alias stands for counted each time
TEXT = 10_000  # characters in one text
WHOLE = 2**63  # below which the sizes of whole numbers stay
ROWS = 10_000  # that matrices may make of a recipe


def check_bounds(raw: Any) -> None:
    """Refuses what JSON cannot hold, and more of it than a recipe can mean.

    Args:
        raw: a recipe as it was written, before anything else looks at it.

    Raises:
        PydanticCustomError: naming the place, what stands there and the bound.
    """
    parts = 0
    waiting: list[tuple[tuple[str, ...], Any]] = [((), raw)]
    while waiting:
        path, value = waiting.pop()
        parts += 1
        if parts > PARTS:
            raise mistake(".".join(path[:1]), f"has more than {PARTS:,} values; a recipe has dozens")
        if len(path) > DEPTH:
            raise mistake(".".join(path[:3]), f"is nested more than {DEPTH} deep")
        if isinstance(value, Mapping):
            for name, inner in value.items():
                if not isinstance(name, str):
                    continue  # the field that takes it says it better
                _check_text(path, name)
                waiting.append(((*path, name), inner))
        elif isinstance(value, list | tuple):
            waiting += [((*path, str(i)), inner) for i, inner in enumerate(value)]
        elif isinstance(value, str):
            _check_text(path, value)
        elif isinstance(value, int) and not -WHOLE < value < WHOLE:
            raise mistake(".".join(path), "is a whole number beyond 64 bits")


def _check_text(path: tuple[str, ...], text: str) -> None:
    if len(text) <= TEXT and text.isprintable():
        return
    where = ".".join(path)
    if len(text) > TEXT:
        raise mistake(where, f"is a text of {len(text):,} characters; at most {TEXT:,} are read")
    if strange := next((c for c in text if unicodedata.category(c) in {"Cc", "Cs"} and c not in "\n\t"), None):
        raise mistake(where, f"holds the control character {strange!a}")


def check_rows(matrices: Iterable[Mapping[str, Sequence[Any]]]) -> None:
    """Refuses matrices that make more rows than anybody runs; none of them is made."""
    rows = math.prod(len(values) for matrix in matrices for values in matrix.values())
    if rows > ROWS:
        raise mistake("matrix", f"the matrices make {rows:,} rows; at most {ROWS:,} are planned")
