"""How a stage tells how far it is; who listens (a terminal, a flow, nobody) is not its business."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple


class Progress(NamedTuple):
    """How far one stage is."""

    name: str
    label: str
    done: int
    total: int
    unit: str = "step"
    loss: float | None = None
    rate: float | None = None  # units per second


class Breach(NamedTuple):
    """A round that its guard refused."""

    name: str  # of the prune stage
    round: int
    key: str  # of the network that was refused
    action: str  # stop, back_off, fail
    told: str
    metrics: dict[str, Any]


Report = Callable[[Progress], None]
Finished = Callable[[str, str, str, float, str], None]  # name, label, status, seconds, what there is to say


def silent(_: Progress | Breach) -> None:
    """Listens to nothing."""


def _unheard(name: str, label: str, status: str, seconds: float, told: str) -> None:
    """Listens to nothing."""


class Listeners(NamedTuple):
    """Who hears of progress, of finished stages and of breached guards."""

    progress: Report = silent
    finished: Finished = _unheard
    breached: Callable[[Breach], None] = silent


# Who listens in this context beside the flow: the command line sets it around a run.
listeners: ContextVar[Listeners] = ContextVar("listeners", default=Listeners())  # noqa: B039  (immutable)
