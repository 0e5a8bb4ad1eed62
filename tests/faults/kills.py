"""kill -9 of a run, at moments spread over all stages and within what they write."""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.forks import Forks
from tests.faults.runs import (
    PATIENCE,
    PrefectServer,
    Process,
    clock,
    command,
    contents,
    environment,
    finished,
    last_steps,
    leftovers,
    recipe,
    records,
)
from tests.faults.table import Outcome, fault

Launch = Callable[[Path], Process]
POLL = 0.003


class Moment(NamedTuple):
    """When to kill: so long after something that fits the pattern has appeared in the store."""

    name: str
    order: float  # in the pipeline
    pattern: str | None
    within: float  # seconds

    def come(self, store: Path, begun: float) -> bool:
        """Whether it has appeared since the process was started."""
        if self.pattern is None:
            return True
        for path in store.glob(self.pattern):
            try:
                if path.stat().st_mtime >= begun - 0.02:
                    return True
            except FileNotFoundError:
                pass
        return False


def moments(record: dict[str, Any]) -> list[Moment]:
    """All moments of a run whose record is given: in each stage, in what it saves, at its rename, at start and end."""
    found = [Moment("right after start", -1, None, 5.0)] * 3
    stages = sorted(record["stages"].items(), key=lambda item: item[1]["begin"] or 0)
    for order, (name, stage) in enumerate(stages):
        kind, key = stage["kind"], stage["key"]
        found.append(Moment(f"in {name}", order, f"{kind}/.{key}.lock", stage["seconds"]))
        found.append(Moment(f"saving {name}", order + 0.8, f"{kind}/.{key}.*.tmp", 0.2))
        found.append(Moment(f"renaming {name}", order + 0.9, f"{kind}/.{key}.*.tmp/meta.json", 0.02))
        if kind in {"train", "finetune"}:
            found += [Moment(f"step of {name}", order + 0.5, f"{kind}/{key}.work/*tmp*", 0.1)] * 2
    last = stages[-1][1]
    return [*found, *[Moment("in the record", len(stages), f"{last['kind']}/{last['key']}/meta.json", 0.5)] * 2]


def kill_at(process: Process, store: Path, moment: Moment, chance: random.Random, number: int) -> bool:
    """Sends a signal when the moment has come; `False` if the run ended before."""
    begun = time.time()
    while not moment.come(store, begun):
        if process.poll() is not None:
            return False
        if time.time() - begun > PATIENCE:
            raise TimeoutError(f"{moment.name} did not come")
        time.sleep(POLL)
    time.sleep(chance.uniform(0, moment.within))
    if process.poll() is not None:
        return False
    os.kill(process.pid, number)
    process.wait(60)
    return True


def kill_and_finish(
    launch: Launch,
    store: Path,
    whole: dict[str, str],
    wanted: list[Moment],
    chance: random.Random,
    number: int = signal.SIGKILL,
) -> tuple[list[str], list[str]]:
    """Kills one run again and again, lets it finish, and answers the kills and what was wrong afterwards."""
    wrong: list[str] = []
    done: dict[str, str] = {}
    steps: dict[str, int] = {}
    kills: list[str] = []
    for moment in wanted:
        process = launch(store)
        if not kill_at(process, store, moment, chance, number):
            break
        kills.append(moment.name)
        now, steps = finished(store), last_steps(store)
        wrong += [f"{name} was finished and is gone or was made twice" for name in done if now.get(name) != done[name]]
        done = now
    else:
        process = launch(store)
    if (code := process.wait(PATIENCE)) != 0:
        return kills, [*wrong, f"the run after the kills ended with {code}"]
    record = records(store)[-1]
    for name, stage in record["stages"].items():
        artifact = f"{stage['kind']}/{stage['key']}"
        if (stage["status"] == "cached") != (artifact in done):
            wrong.append(f"{name} is {stage['status']}, and was{'' if artifact in done else ' not'} finished before")
        if artifact not in done and stage["metrics"].get("resumed_from_step", 0) != steps.get(artifact, 0):
            wrong.append(f"{name} did not go on from step {steps.get(artifact, 0)}: {stage['metrics']}")
    now = finished(store)
    wrong += [f"{name} was made twice" for name in done if now.get(name) != done[name]]
    found = contents(store)
    wrong += [f"{n} differs from the run that nothing disturbed" for n in whole if found.get(n) != whole[n]]
    return kills, [*wrong, *(f"{path} is left over" for path in leftovers(store))]


def kill_often(launch: Launch, folder: Path, times: int, seed: int = 0, number: int = signal.SIGKILL) -> Outcome:
    """Runs the recipe once undisturbed, then kills runs of it, one to four times each, until `times` are killed."""
    chance = random.Random(seed)
    with clock() as seconds:
        if (code := launch(folder / "whole").wait(PATIENCE)) != 0:
            raise RuntimeError(f"the run that nothing disturbed ended with {code}")
        whole = contents(folder / "whole")
        pool: list[Moment] = []
        killed = survived = lost = turn = 0
        while killed < times:
            if not pool:
                pool = moments(records(folder / "whole")[-1])
                chance.shuffle(pool)
            here = min(chance.randint(1, 4), times - killed)
            wanted, pool = sorted(pool[:here], key=lambda m: m.order), pool[here:]
            kills, wrong = kill_and_finish(launch, folder / f"run-{turn}", whole, wanted, chance, number)
            turn += 1
            killed += len(kills)
            survived += 0 if wrong else len(kills)
            lost += len(wrong)
            sys.stderr.write(f"{seconds():5.0f} s  {killed:3d} killed: {', '.join(kills)} {wrong or ''}\n")
    return Outcome(killed, survived, lost, seconds())


@contextmanager
def _room() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@fault("kill -9 of the process, plain loop")
def kill_plain(times: int) -> Outcome:
    """Without Prefect: stages one after another in a fork."""
    raw = recipe(formats=("safetensors",))
    with _room() as folder, Forks(raw, environment(folder / "home")) as forks:
        return kill_often(forks.launch, folder, times)


@fault("kill -9 of the flow process, a user's server")
def kill_flow(times: int) -> Outcome:
    """`prune-jax run` that speaks to a server of the user's."""
    raw = recipe()
    with _room() as folder, PrefectServer(folder / "home") as server:
        env = environment(folder / "home", server.url)
        return kill_often(lambda store: command(raw, store, env), folder, times)


@fault("kill -9 of the flow process, a temporary server")
def kill_flow_alone(times: int) -> Outcome:
    """`prune-jax run` as it stands."""
    raw = recipe()
    with _room() as folder:
        env = environment(folder / "home")
        return kill_often(lambda store: command(raw, store, env), folder, times, seed=1)


@fault("SIGTERM of the flow process, a temporary server")
def end_flow(times: int) -> Outcome:
    """What a cluster sends before it takes the machine away: trainings save a step first."""
    raw = recipe()
    with _room() as folder:
        env = environment(folder / "home")
        return kill_often(lambda store: command(raw, store, env), folder, times, seed=2, number=signal.SIGTERM)
