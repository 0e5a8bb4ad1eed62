"""`python -m tests.faults [--only PATTERN] [--times N]`: a table of faults; exit code 1 if anything was lost."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from fnmatch import fnmatchcase

from rich.console import Console

import tests.faults
from tests.faults.table import FAULTS, Outcome, table_of


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--only", default="*", help="faults whose name matches, such as 'kill*'")
    parser.add_argument("--times", type=int, default=30, help="how often each is injected")
    wanted = parser.parse_args()
    for module in pkgutil.iter_modules(tests.faults.__path__):
        if not module.name.startswith(("test_", "__")):
            importlib.import_module(f"tests.faults.{module.name}")
    console = Console(width=110)
    rows: list[tuple[str, Outcome]] = []
    for name, inject in FAULTS.items():
        if fnmatchcase(name, wanted.only):
            console.print(f"{name} ...", style="dim")
            rows.append((name, inject(wanted.times)))
    console.print(table_of(rows))
    return int(any(it.lost or it.survived < it.times for _, it in rows) or not rows)


if __name__ == "__main__":
    sys.exit(main())
