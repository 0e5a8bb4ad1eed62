"""One task for all kinds of stage: a call goes in, a result comes out, and the store holds the arrays."""

from __future__ import annotations

import os
import platform
import time
from typing import Any
from uuid import UUID

import jax
from httpx import HTTPError
from prefect import get_client
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import State
from prefect.tasks import MaterializingTask
from prune_jax.flows.assets import describe

from prune_jax.checkpoints import Store
from prune_jax.compiled import keep
from prune_jax.errors import PruneError
from prune_jax.progress import Progress, Report, listeners
from prune_jax.recipe import StageCall, StageResult
from prune_jax.registry import without_plugins
from prune_jax.stages import run_stage

keep()  # a worker imports this before it compiles anything

RETRY_DELAYS = [5, 30, 120]  # seconds; the last for all further tries
AWAY = 60  # seconds without a progress bar once the server did not answer
RARE = 99  # telling Prefect takes one part in so many of a stage's time, for the training waits for it
PAGE, PAGES = 200, 50  # concurrency limits that are asked for at a time, as many as a server answers, and how often


def worth_retrying(task: Any, task_run: Any, state: State) -> bool:
    """Whether trying again may help: after a fault, not after a mistake or a result that would come again."""
    try:
        state.result()
    except PruneError:
        return False
    except Exception:
        return True
    return True


def tags_of(call: StageCall) -> set[str]:
    """What a stage's task run is tagged with: its kind and the accelerator."""
    return {call.kind, jax.default_backend()}


def device_tags() -> set[str]:
    """One for each device of this process, `HOST-gpu-0`: a limit of 1 on it has the runs that share it take turns."""
    backend = jax.default_backend()
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "") if backend == "gpu" else ""
    numbers = shown.split(",") if shown else [device.id for device in jax.local_devices()]
    return {f"{platform.node()}-{backend}-{number}" for number in numbers}


def _tag_run(*tags: str) -> None:
    """Tags this task run, to be seen and filtered by.

    Before it starts a task, Prefect asks the server for a slot of every tag that the task was submitted with, and a
    server on SQLite that is just writing the last task's events refuses it for two seconds. So tasks are submitted with
    those tags alone that somebody has put a limit on, and get the others here.
    """
    run = TaskRunContext.get()
    if run is not None:
        run.task_run.tags = sorted({*run.task_run.tags, *tags})


def limited_tags() -> set[str]:
    """The tags on whose task runs the server has a concurrency limit."""
    tags: set[str] = set()
    with get_client(sync_client=True) as client:
        for page in range(PAGES):
            limits = client.read_global_concurrency_limits(limit=PAGE, offset=page * PAGE)
            tags |= {limit.name.removeprefix("tag:") for limit in limits if limit.name.startswith("tag:")}
            if len(limits) < PAGE:
                break
    return tags


def delays(retries: int) -> list[int]:
    """The waits before each further try."""
    return (RETRY_DELAYS + RETRY_DELAYS[-1:] * retries)[:retries]


def _stage(call: StageCall, store: str, no_plugins: bool = False) -> StageResult:
    """Carries out one stage; returns at once when its artifact is already in the store."""
    _tag_run(*tags_of(call))
    report = _to_all(listeners.get().progress, _progress_artifact())
    with without_plugins(no_plugins):  # this may be another machine than the run's
        result = run_stage(call, Store(store, there=True), report=report)
    describe(call, result)
    get_run_logger().info("%s %s in %.1f s: %s/%s", call.name, result.status, result.seconds, result.kind, result.key)
    return result


stage = MaterializingTask(
    _stage,
    assets=[],  # those of one call: `assets.lineage`
    materialized_by="prune_jax",
    name="stage",
    task_run_name="{call.label}",
    cache_policy=NO_CACHE,
    persist_result=False,  # the store holds it; Prefect would pickle it
    retry_condition_fn=worth_retrying,
)


def _to_all(*reports: Report) -> Report:
    def report(progress: Progress) -> None:
        for each in reports:
            each(progress)

    return report


def _progress_artifact() -> Report:
    """A progress bar in the UI for stages of more than a second, moved every few seconds.

    It waits for nothing: with the server away the stage goes on, and the bar is tried again a minute later.
    """
    artifact: UUID | None = None
    due = time.perf_counter() + 1

    def report(progress: Progress) -> None:
        nonlocal artifact, due
        begun = time.perf_counter()
        finished = progress.done >= progress.total
        if begun < due and not (finished and artifact):
            return
        percent = 100 * progress.done / max(progress.total, 1)
        try:
            with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
                if artifact is None:
                    artifact = create_progress_artifact(progress=percent, description=progress.label)  # type: ignore[assignment]
                else:
                    update_progress_artifact(artifact_id=artifact, progress=percent)
        except HTTPError:
            due = begun + AWAY
        else:
            took = time.perf_counter() - begun
            due = begun + max(1, RARE * took)

    return report
