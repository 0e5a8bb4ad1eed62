"""Times functions in turns, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np


class Figure(NamedTuple):
    """A median over rounds and its quartiles."""

    value: float
    low: float
    high: float
    unit: str = ""


def figure(values: Sequence[float], unit: str = "") -> Figure:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return Figure(float(middle), float(low), float(high), unit)


def in_turns(functions: Mapping[str, Callable[[], Any]], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, round by round, after one call each that is not counted."""
    for function in functions.values():
        jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds):
        names = list(functions)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            jax.block_until_ready(functions[name]())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, to: str) -> Figure:
    """`name`'s time in units of the time of `to` in the same round."""
    return figure([a / b for a, b in zip(seconds[name], seconds[to], strict=True)])
