"""A user's server of Prefect that goes away while a run works, and comes back on the same port and database."""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.sorting import FlowRunSort

from tests.faults.runs import (
    PATIENCE,
    PrefectServer,
    clock,
    command,
    contents,
    environment,
    leftovers,
    recipe,
    records,
    until,
)
from tests.faults.table import Outcome, fault

SECONDS = (20.0, 60.0)
FIRST = ("train/.*.lock", "train/*.work/*", "mask/.*.lock", "finetune/.*.lock", "compact/.*.lock", "evaluate/.*.lock")


@fault("the user's Prefect server down for 20 to 60 s")
def server_away(times: int) -> Outcome:
    """kill -9 of the server at a moment of the run, and a new start; the run ends well and the server knows it."""
    chance = random.Random(0)
    survived = lost = 0
    raw = recipe()
    with clock() as seconds, tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with PrefectServer(folder / "home") as server:
            env = environment(folder / "home", server.url)
            if command(raw, folder / "whole", env).wait(PATIENCE) != 0:
                raise RuntimeError("the run that nothing disturbed failed")
            whole = contents(folder / "whole")
            for number in range(times):
                store, wanted = folder / f"run-{number}", FIRST[number % len(FIRST)]
                process = command(raw, store, env)
                until(lambda store=store, wanted=wanted: any(store.glob(wanted)), wanted, PATIENCE, every=0.01)
                server.stop()
                away = chance.uniform(*SECONDS)
                time.sleep(away)
                server.start()
                code = process.wait(PATIENCE)
                wrong = [f"exit code {code}"] if code else []
                wrong += [f"{s} is {it['status']}" for s, it in _stages(store) if it["status"] != "ran"]
                found = contents(store)
                wrong += [f"{name} differs" for name in whole if found.get(name) != whole[name]]
                wrong += [f"{path} is left over" for path in leftovers(store)]
                if (state := _last_state(server.url)) != "Completed":
                    wrong.append(f"the server says {state}")
                survived, lost = survived + (not wrong), lost + len(wrong)
                sys.stderr.write(f"{seconds():5.0f} s  away {away:.0f} s at {wanted} {wrong or ''}\n")
    return Outcome(times, survived, lost, seconds())


def _stages(store: Path) -> list[tuple[str, dict[str, str]]]:
    told = records(store)
    return list(told[-1]["stages"].items()) if told else []


def _last_state(url: str) -> str:
    with SyncPrefectClient(url) as client:
        return client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)[0].state.name
