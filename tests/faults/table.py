"""What came of injected faults: how many, and whether anything that was computed was lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from rich import box
from rich.table import Table

FAULTS: dict[str, Callable[[int], Outcome]] = {}


class Outcome(NamedTuple):
    """A fault, injected so many times."""

    times: int
    survived: int  # noticed, told, and afterwards the result of a run that nothing had disturbed
    lost: int  # finished work that was gone, made twice, or silently wrong: must be 0
    seconds: float


def fault(name: str) -> Callable[[Callable[[int], Outcome]], Callable[[int], Outcome]]:
    """Registers `inject(times) -> Outcome` under what is done, such as `kill -9 of the flow process`."""

    def register(inject: Callable[[int], Outcome]) -> Callable[[int], Outcome]:
        if name in FAULTS:
            raise ValueError(f"{name!r} is registered twice")
        FAULTS[name] = inject
        return inject

    return register


def table_of(rows: Iterable[tuple[str, Outcome]]) -> Table:
    """The table that the suite ends with."""
    table = Table("fault", box=box.MARKDOWN)
    for column in ("injected", "survived", "lost", "seconds"):
        table.add_column(column, justify="right")
    for name, it in rows:
        table.add_row(name, str(it.times), str(it.survived), str(it.lost), f"{it.seconds:.0f}")
    return table
