"""What a run shows in a terminal while it works: a line for each stage with rate, loss and time left."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table

from prune_jax.errors import PruneError
from prune_jax.progress import Progress


class Board:
    """Bars for the stages at work; a finished stage leaves one quiet line.

    Args:
        console: where to draw. On a stream that is no terminal only the finished stages are told.
    """

    def __init__(self, console: Console):
        self.console = console
        self.bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.at_work: dict[str, TaskID] = {}
        self.lock = threading.Lock()  # stages report from their own threads
        self.interrupted = False

    def __enter__(self) -> Board:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def waiting(self, text: str) -> None:
        """Says what is being waited for before the first stage begins."""
        with self.lock:
            self.at_work[""] = self.bars.add_task(text, total=None, facts="")

    def hear(self, progress: Progress) -> None:
        """Moves a stage's bar.

        Raises:
            PruneError: the user has pressed Ctrl-C; it ends the stage that reports.
        """
        if self.interrupted:
            raise PruneError("interrupted")
        with self.lock:
            if "" in self.at_work:
                self.bars.remove_task(self.at_work.pop(""))
            if progress.name not in self.at_work:
                self.at_work[progress.name] = self.bars.add_task(progress.label, total=progress.total, facts="")
            task = self.at_work[progress.name]
            self.bars.update(task, completed=progress.done, total=progress.total, facts=_facts(progress))

    def interrupt(self) -> None:
        """Ends the stages at work at their next report, where they save a checkpoint; at once if none is at work."""
        if self.interrupted or not self.at_work.keys() - {""}:
            raise KeyboardInterrupt
        self.interrupted = True
        self.console.print("interrupted: saving what is done")

    def end(self, name: str) -> None:
        """Takes a stage's bar away."""
        with self.lock:
            if name in self.at_work:
                self.bars.remove_task(self.at_work.pop(name))

    def finished(self, name: str, label: str, status: str, seconds: float, told: str) -> None:
        """Replaces a stage's bar by a line."""
        self.end(name)
        mark = {"ran": "[green]✓[/]", "cached": "[blue]=[/]", "failed": "[red]✗[/]"}.get(status, "[yellow]-[/]")
        text = f"{mark} {escape(label):<32} {seconds:6.1f} s  [dim]{escape(told or status)}[/]"
        self.console.print(text, highlight=False, no_wrap=True, overflow="ellipsis")


def _facts(progress: Progress) -> str:
    facts = []
    if progress.rate:
        facts.append(f"{progress.rate:,.0f} {progress.unit}s/s")
    if progress.loss is not None:
        facts.append(f"loss {progress.loss:.4f}")
    return "  ".join(facts)


def stages_table(record: Mapping[str, Any]) -> Table:
    """The stages of a run with status, key and seconds."""
    table = Table("stage", "what", "status", "key", "seconds", "made in", box=None, pad_edge=False)
    for name, stage in record["stages"].items():
        told = stage["status"] if stage["status"] != "failed" else f"failed: {stage['message']}"
        seconds = (f"{stage['seconds']:.1f}", f"{stage['made_in_seconds']:.1f}")
        table.add_row(escape(name), escape(stage["label"]), escape(told), stage["key"][:12], *seconds)
    return table
