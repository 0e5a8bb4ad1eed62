"""How a stage tells how far it is; who listens (a terminal, a flow, nobody) is not its business."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import NamedTuple


class Progress(NamedTuple):
    """How far one stage is."""

    name: str
    label: str
    done: int
    total: int
    unit: str = "step"
    loss: float | None = None
    rate: float | None = None  # units per second


Report = Callable[[Progress], None]
Finished = Callable[[str, str, str, float, str], None]  # name, label, status, seconds, what there is to say


def silent(progress: Progress) -> None:
    """Listens to nothing."""


def _unheard(name: str, label: str, status: str, seconds: float, told: str) -> None:
    """Listens to nothing."""


class Listeners(NamedTuple):
    """Who hears of progress and of finished stages."""

    progress: Report = silent
    finished: Finished = _unheard


# Who listens in this context beside the flow: the command line sets it around a run.
listeners: ContextVar[Listeners] = ContextVar("listeners", default=Listeners())  # noqa: B039  (immutable)
