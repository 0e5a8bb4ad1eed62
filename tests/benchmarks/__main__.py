"""`python -m tests.benchmarks`: all figures with their bounds in one table; exit code 1 if a bound is broken."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import platform
import sys
from collections.abc import Mapping
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks.rounds import Figure

# Pattern of a measure's name -> what it may be at most; the first that fits counts; None: shown, not judged.
BOUNDS: dict[str, dict[str, float | None]] = {
    "orchestration": {
        "run beside its stages, temporary server*": 16,
        "run beside its stages, running server": 4,
        "run with nothing to compute: processes and ports opened": 0,
        "run with nothing to compute": 6,
        "import prune_jax / import jax": 1.1,
        "prune-jax --help": 0.5,
        "*": None,
    },
    "tasks": {"running server*": 150, "*": None},
    "sharing": {"*": None},
    "training": {"* / *": 1.05, "*": None},
    "masked_step": {
        "*dense step / dense step": None,
        "* that changes masks*": 2,
        "*scratch*": 0.3,
        "*": 1.05,
    },
    "scoring": {
        "*plain again*": None,
        "mlp: fisher pass / gradient pass": 2.5,
        "*fisher pass / gradient pass": None,
        "*": 1.1,
    },
    "selection": {"* / read": 10, "*": None},
    "digits": {"*": 1},
    "layers": {
        "*sweep / product of its FLOPs": 3.4,
        "wanda*: scores / forward pass": 1.5,
        "*": None,
    },
    "compaction": {
        "analysis of ViT-B*": 2.7,
        "analysis of a ViT of 1.0 G*": 30,
        "analysis, seconds of a layer*": 1.5,
        "* / fresh": 1.05,
        "*batch 64: compact / dense": 1 / 1.8,
        "*": None,
    },
    "scaling": {
        "plan of 10,000 stages*": 2,
        "* a stage of 10,000 / of 900": 1.5,
        "memory of a stage*": 20,
        "sweep that waits: two workers / one": 1 / 1.7,
        "*": None,
    },
}


def bound(benchmark: str, measure: str) -> float | None:
    return next(most for pattern, most in BOUNDS[benchmark].items() if fnmatchcase(measure, pattern))


def table(found: Mapping[str, Mapping[str, Figure]], load: str) -> Table:
    shown = Table("measure", title=load, title_style="dim", title_justify="left", box=None, pad_edge=False)
    for column in ("median", "quartiles", "at most"):
        shown.add_column(column, justify="right")
    shown.add_column("")
    for benchmark, figures in found.items():
        shown.add_row(f"[bold]{benchmark}[/]")
        for measure, it in figures.items():
            if math.isnan(it.value):
                shown.add_row(f"  {measure}", it.unit)
                continue
            most = bound(benchmark, measure)
            verdict = "" if most is None else "[green]pass[/]" if it.value <= most else "[bold red]FAIL[/]"
            limit = "" if most is None else f"{most:g}"
            spread = f"{it.low:.3g} to {it.high:.3g}"
            shown.add_row(f"  {measure}", f"{it.value:.3f} {it.unit}".rstrip(), spread, limit, verdict)
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--only", action="append", choices=BOUNDS, help="this benchmark; repeat it for several")
    parser.add_argument("--json", type=Path, help="writes the figures to a file, too")
    parser.add_argument("--plots", type=Path, help="a folder for drawings of what can be drawn")
    wanted = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    found: dict[str, dict[str, Figure]] = {}
    before = os.getloadavg()[0]
    for benchmark in wanted.only or BOUNDS:
        with console.status(f"measuring {benchmark}"):
            module = importlib.import_module(f"tests.benchmarks.bench_{benchmark}")
            found[benchmark] = module.measure()
        if wanted.plots and hasattr(module, "plot"):
            wanted.plots.mkdir(parents=True, exist_ok=True)
            console.print(f"drawn: {module.plot(found[benchmark], wanted.plots)}")
    load = (
        f"{os.cpu_count()} cores, load {before:.1f} before, {os.getloadavg()[0]:.1f} after; "
        f"Python {platform.python_version()}, jax {version('jax')}, prefect {version('prefect')}"
    )
    console.print(table(found, load))
    judged = {
        benchmark: {
            measure: {**it._asdict(), "bound": (most := bound(benchmark, measure)), "ok": most is None or it[0] <= most}
            for measure, it in figures.items()
            if not math.isnan(it.value)  # not installed
        }
        for benchmark, figures in found.items()
    }
    if wanted.json:
        wanted.json.write_text(json.dumps({"machine": load, "benchmarks": judged}, indent=1) + "\n")
    return 0 if all(it["ok"] for figures in judged.values() for it in figures.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
