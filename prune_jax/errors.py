"""The errors a user may meet. Each says what happened, where, what is allowed and how to mend it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class PruneError(Exception):
    """A stage could not do its work. Exit code 1."""


class UserMistake(PruneError, ValueError):
    """A recipe, an option, a file or an argument is wrong: trying again will not help. Exit code 2."""


class DivergedError(PruneError):
    """The loss stopped being a finite number."""


class NonFiniteScoreError(PruneError):
    """A criterion answered NaN or infinity."""


class NonFiniteResultError(PruneError):
    """A stage came to NaN or infinity."""


class LayerCollapseError(PruneError):
    """Pruning would leave a layer without one living weight."""


class DamagedArtifactError(PruneError):
    """A stored file is missing or is not the one that was written."""


class StoreError(PruneError):
    """The store cannot be read or written: its disk is full, read-only, forbidden or gone."""


class GuardBreachError(PruneError):
    """A guard whose breach means failure was breached."""


class GateError(PruneError):
    """A gate said no. Exit code 3.

    Attributes:
        metrics: what it found, check by check.
    """

    def __init__(self, message: str, metrics: dict[str, Any]):
        super().__init__(message)
        self.metrics = metrics


class PromotionError(PruneError):
    """Somebody else promoted meanwhile: what was decided was decided against another champion."""


def shortened(text: object, most: int = 300) -> str:
    """The beginning of what somebody else wrote, a name or a library's message, so that an answer stays one.

    >>> shortened("x" * 50, 10)
    'xxxxxxx...'
    """
    whole = str(text)
    return whole if len(whole) <= most else f"{whole[: most - 3]}..."


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Answers `"; did you mean 'x'?"` for the nearest known name, or nothing.

    >>> did_you_mean("taylr", ["taylor", "snip"])
    "; did you mean 'taylor'?"
    >>> did_you_mean("zzz", ["taylor", "snip"])
    ''
    """
    near = get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
