"""Cases that take long are left to `pytest -m slow`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sparing(cases: Iterable[Any], slow: Collection[Any]) -> list[Any]:
    """The cases, those of `slow` marked so; refuses a slow one that is no case."""
    cases = list(cases)
    assert not (unknown := set(slow) - set(cases)), unknown
    return [pytest.param(case, marks=pytest.mark.slow) if case in slow else case for case in cases]
