"""Many runs at once on one store: each stage is computed once, nobody waits for ever, all get the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.faults.runs import PATIENCE, clock, command, contents, environment, leftovers, recipe, records, until
from tests.faults.table import Outcome, fault
from tests.faults.workers import holders

CROWD = 10


def small(sparsity: float = 0.5) -> Any:
    """A recipe of few steps; all of them share what comes before the mask."""
    raw = recipe(seconds=0.002, steps=8, rounds=1, formats=("safetensors",))
    raw["stages"]["prune"]["target"] = {"sparsity": sparsity}
    return raw


def identical() -> list[Any]:
    """The same, ten times, and under one name."""
    return [small() for _ in range(CROWD)]


def overlapping() -> list[Any]:
    """Ten that share training and scores, two by two all of it."""
    return [{**small(0.3 + 0.1 * (i // 2)), "name": f"overlap-{i}"} for i in range(CROWD)]


def judge(store: Path, raws: list[Any], whole: dict[str, str], killed: int = 0) -> list[str]:
    """What is wrong: a run without a record, a stage that was computed twice or by nobody, other bytes, leftovers."""
    told = [r for name in {raw["name"] for raw in raws} for r in records(store, name)]
    wrong = [f"{len(told)} records of {len(raws) - killed} runs"] if len(told) != len(raws) - killed else []
    wrong += [f"{r['name']}: {r['message']}" for r in told if r["status"] != "completed"]
    ran = Counter(s["key"] for r in told for s in r["stages"].values() if s["status"] == "ran")
    keys = {s["key"]: name for r in told for name, s in r["stages"].items()}
    for key, name in keys.items():
        if ran[key] > 1 or (ran[key] < 1 and not killed):
            wrong.append(f"{name} was computed {ran[key]} times")
    found = contents(store)
    wrong += [f"{name} differs" for name in whole if found.get(name) != whole[name]]
    return [*wrong, *(f"{path} is left over" for path in leftovers(store))]


@contextmanager
def _room() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _outcome(rounds: list[tuple[int, list[str]]], seconds: float) -> Outcome:
    for _, wrong in rounds:
        sys.stderr.write(f"{seconds:5.0f} s  {wrong or 'all as one'}\n")
    good = sum(runs for runs, wrong in rounds if not wrong)
    return Outcome(sum(runs for runs, _ in rounds), good, sum(len(wrong) for _, wrong in rounds), seconds)


def _alone(folder: Path) -> dict[str, str]:
    """What one run makes that nobody disturbs."""
    if command(small(), folder / "whole", environment(folder / "home")).wait(PATIENCE) != 0:
        raise RuntimeError("the run that nothing disturbed failed")
    return contents(folder / "whole")


@fault("runs at once in threads of one process")
def threads(times: int) -> Outcome:
    """Ten identical and ten overlapping, through Prefect, `times` runs in all or some more."""
    rounds: list[tuple[int, list[str]]] = []
    with clock() as seconds, _room() as folder:
        whole = _alone(folder)
        while sum(runs for runs, _ in rounds) < times:
            for raws in (identical(), overlapping()):
                store = folder / f"store-{len(rounds)}"
                words = [sys.executable, "-m", "tests.faults.threads", str(store)]
                ended = subprocess.run(
                    words,
                    input=json.dumps(raws),
                    capture_output=True,
                    text=True,
                    env=environment(folder / "home"),
                    timeout=PATIENCE,
                )
                wrong = [f"exit code {ended.returncode}: {ended.stderr[-500:]}"] if ended.returncode else []
                rounds.append((len(raws), wrong + judge(store, raws, whole)))
    return _outcome(rounds, seconds())


def _processes(raws: list[Any], store: Path, home: Path, whole: dict[str, str], kill: bool) -> tuple[int, list[str]]:
    """Runs them all at once, each with a temporary server of its own in one home; perhaps kills who is at work."""
    started = []
    for i, raw in enumerate(raws):
        (store.parent / f"{store.name}-{i}").mkdir()
        started.append(command(raw, store, environment(home), at=store.parent / f"{store.name}-{i}"))
    killed = 0
    if kill:
        own = {process.pid for process in started}
        until(lambda: list(store.glob("train/*.work/[0-9]*")), "a step is saved", PATIENCE)
        for pid in set(until(lambda: holders(store), "a stage is at work", PATIENCE)[:1]) & own:
            os.kill(pid, signal.SIGKILL)
            killed += 1
    codes = Counter(process.wait(PATIENCE) for process in started)
    expected = {0: len(raws) - killed, **({-signal.SIGKILL: killed} if killed else {})}
    wrong = [f"exit codes {dict(codes)}"] if codes != expected else []
    wrong += ["nobody was killed"] if kill and not killed else []
    said = "".join(p.read_text() for p in store.parent.glob(f"{store.name}-*/*.log"))
    wrong += ["`database is locked` was told to the user"] if "database is locked" in said else []
    return len(raws), wrong + judge(store, raws, whole, killed)


@fault("runs at once in processes, one of them killed")
def processes(times: int) -> Outcome:
    """Ten identical in a new home of Prefect's, ten overlapping, ten identical of which the one at work is killed."""
    rounds: list[tuple[int, list[str]]] = []
    with clock() as seconds, _room() as folder:
        whole = _alone(folder)
        while sum(runs for runs, _ in rounds) < times:
            for raws, kill in ((identical(), False), (overlapping(), False), (identical(), True)):
                number = len(rounds)
                home = folder / f"home-{number // 3}"  # new for the first ten
                rounds.append(_processes(raws, folder / f"store-{number}", home, whole, kill))
    return _outcome(rounds, seconds())
