"""A run that a worker of Prefect's process pool carries out: killed and retried through the API, or cancelled there."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.states import Cancelling, Scheduled

from tests.faults.runs import (
    NAME,
    PrefectServer,
    clock,
    contents,
    finished,
    kill_session,
    leftovers,
    recipe,
    records,
    until,
)
from tests.faults.table import Outcome, fault

ROOT = Path(__file__).parents[2]
TOLD_AGAIN = 10  # seconds in which the worker reports a crash once more; it would end a retry that has begun by then
STOPS_WITHIN = 45  # seconds: a worker hears of a cancellation at once or, at the worst, when it asks the next time
ENDS = ("Completed", "Failed", "Crashed")
FIRST = ("train/*.work/*", "finetune/.*.lock", "mask/.*.lock", "compact/.*.lock", "evaluate/.*.lock")


class Served(NamedTuple):
    """A server with the deployment of `deployments/prefect.yaml`, and a worker that is started anew when it is gone."""

    folder: Path
    env: dict[str, str]
    client: SyncPrefectClient
    deployment: UUID
    worker: list[subprocess.Popen[bytes]]

    def work(self) -> None:
        """Starts a worker."""
        words = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "local", "--type", "process"]
        with open(self.folder / "worker.log", "a") as log:
            self.worker.append(
                subprocess.Popen(words, cwd=self.folder, env=self.env, stdout=log, stderr=log, start_new_session=True)
            )

    def begin(self, store: Path) -> UUID:
        """Asks for a run."""
        given = {"recipe": recipe(), "store": str(store), "name": NAME}
        return self.client.create_flow_run_from_deployment(self.deployment, parameters=given).id

    def state(self, run: UUID) -> str:
        """The name of a run's state."""
        return self.client.read_flow_run(run).state.name

    def retry(self, run: UUID) -> None:
        """What the button in the UI does."""
        answer = self.client.set_flow_run_state(run, Scheduled(name="AwaitingRetry", message="Retry from the UI"))
        assert answer.status.name == "ACCEPT", answer

    def wait(self, run: UUID, *wanted: str, patience: float = 600) -> str:
        """Waits until a run is in one of the states."""
        return str(until(lambda: (s := self.state(run)) in wanted and s, f"{wanted}", patience, every=0.5))


def holders(store: Path) -> list[int]:
    """The processes that have a lock of the store open, and so carry out a stage of it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                path = os.readlink(descriptor)
                if path.startswith(f"{store}/") and path.endswith(".lock"):
                    found.append(int(process.name))
                    break
    return found


@contextmanager
def served(folder: Path) -> Iterator[Served]:
    """Starts server and worker, as `deployments/prefect.yaml` says, and ends them and all that they started."""
    with PrefectServer(folder / "home") as server:
        env = {**server.env, "PREFECT_API_URL": server.url, "PREFECT_WORKER_QUERY_SECONDS": "2"}
        env["PYTHONPATH"] = str(ROOT)
        prefect = [sys.executable, "-m", "prefect", "--no-prompt"]
        template = ["--base-job-template", str(ROOT / "deployments" / "pools" / "process-cpu.json")]
        create = [*prefect, "work-pool", "create", "local", "--type", "process", *template]
        deploy = [*prefect, "deploy", "--prefect-file", str(ROOT / "deployments" / "prefect.yaml"), "--all"]
        for words in (create, deploy):
            subprocess.run(words, cwd=folder, env={**env, "PWD": str(folder)}, check=True, capture_output=True)
        with SyncPrefectClient(server.url) as client:
            deployment = client.read_deployment_by_name("prune/prune").id
            it = Served(folder, env, client, deployment, [])
            it.work()
            try:
                yield it
            finally:
                for worker in it.worker:
                    kill_session(worker)


def stop_process(it: Served, run: UUID, store: Path) -> None:
    """kill -9 of the process that carries the run out; the worker sees it and says so."""
    for pid in holders(store):
        os.kill(pid, signal.SIGKILL)
    it.wait(run, "Crashed")
    time.sleep(TOLD_AGAIN)


def stop_all(it: Served, run: UUID, store: Path) -> None:
    """kill -9 of the worker, too: nobody is left to say so, and the run seems to go on."""
    kill_session(it.worker[-1])
    for pid in holders(store):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert it.state(run) == "Running"
    it.work()


def cancel(it: Served, run: UUID, store: Path) -> None:
    """The button in the UI; the process ends within seconds and leaves none behind."""
    pids = holders(store)
    it.client.set_flow_run_state(run, Cancelling())
    begun = time.monotonic()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "the process ends", STOPS_WITHIN)
    sys.stderr.write(f"        stopped {time.monotonic() - begun:.1f} s after it was cancelled\n")
    it.wait(run, "Cancelled", patience=60)


def _often(times: int, stop: Callable[[Served, UUID, Path], None]) -> Outcome:
    chance = random.Random(0)
    survived = lost = 0
    with clock() as seconds, tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with served(folder) as it:
            it.wait(it.begin(folder / "whole"), "Completed")
            whole = contents(folder / "whole")
            for number in range(times):
                store, wanted = folder / f"run-{number}", FIRST[number % len(FIRST)]
                run = it.begin(store)
                until(lambda store=store, wanted=wanted: any(store.glob(wanted)), wanted, every=0.01)
                time.sleep(chance.uniform(0, 0.3))
                until(lambda store=store: holders(store), "a stage is at work", every=0.01)
                stop(it, run, store)
                done = finished(store)
                it.retry(run)
                wrong = [] if it.wait(run, *ENDS) == "Completed" else ["it failed when it was retried"]
                wrong += _lost(store, done, whole)
                survived, lost = survived + (not wrong), lost + len(wrong)
                sys.stderr.write(f"{seconds():5.0f} s  {stop.__name__} at {wanted} {wrong or ''}\n")
    return Outcome(times, survived, lost, seconds())


def _lost(store: Path, done: dict[str, str], whole: dict[str, str]) -> list[str]:
    stages = {f"{s['kind']}/{s['key']}": s["status"] for s in records(store)[-1]["stages"].values()}
    wrong = [f"{name} was made twice" for name in done if stages.get(name, "cached") != "cached"]
    now, found = finished(store), contents(store)
    wrong += [f"{name} is another one" for name in done if now.get(name) != done[name]]
    wrong += [f"{name} differs" for name in whole if found.get(name) != whole[name]]
    return [*wrong, *(f"{path} is left over" for path in leftovers(store))]


@fault("kill -9 of a served run's process, retried in the UI")
def kill_served(times: int) -> Outcome:
    """The worker lives."""
    return _often(times, stop_process)


@fault("kill -9 of worker and run, retried in the UI")
def kill_worker(times: int) -> Outcome:
    """A machine that goes down."""
    return _often(times, stop_all)


@fault("run cancelled in the UI, retried later")
def cancel_served(times: int) -> Outcome:
    """By whoever needs the machine."""
    return _often(times, cancel)
