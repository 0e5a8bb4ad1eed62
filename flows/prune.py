"""One run: the plan of a recipe, walked by Prefect's tasks."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Annotated, Any

import jax
from httpx import HTTPError
from prefect import flow, get_client
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL
from prefect.states import Completed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner
from prune_jax.flows.assets import lineage, published
from prune_jax.flows.clusters import Cluster
from prune_jax.flows.display import show
from prune_jax.flows.events import tell_finished, telling_breaches
from prune_jax.flows.tasks import delays, device_tags, limited_tags, stage, tags_of
from pydantic import BeforeValidator, Field

from prune_jax.checkpoints import Store
from prune_jax.errors import PruneError
from prune_jax.preparation import check_networks, is_cached, prepare
from prune_jax.progress import Progress, listeners
from prune_jax.recipe import Recipe, Ref, StageCall, StageResult, check_run_name, read_recipe
from prune_jax.records import Run
from prune_jax.registry import plugins_allowed, without_plugins
from prune_jax.sinks import logged, targets
from prune_jax.walk import failure, walk

# What came of a run in this context, for whoever called the flow; of the same name there may be others by then.
made: ContextVar[list[dict[str, Any]] | None] = ContextVar("made", default=None)
THREADS = 8  # the walk says how many stages are at work; here is room for all that it may say

# What a deployment takes, as users write it: a built-in name, a path, or the recipe, of which the UI draws a form.
Written = Annotated[
    Annotated[str, Field(title="Name or path", examples=["lenet-300-100", "/recipes/my.yaml"])] | Recipe,
    BeforeValidator(read_recipe),
]


def _run_name() -> str:
    given = flow_run.parameters
    recipe = read_recipe(given["recipe"], changes=given.get("changes") or ())
    return f"{given.get('name') or recipe.name} · seed {recipe.seed}"


@flow(
    name="prune",
    flow_run_name=_run_name,
    task_runner=ThreadPoolTaskRunner(max_workers=THREADS),  # type: ignore[arg-type]
    persist_result=False,
)
def prune(
    recipe: Written,
    store: str | None = None,
    name: str | None = None,
    changes: list[str] | None = None,
    side_by_side: int | None = None,
    no_plugins: bool = False,
) -> State:
    """Trains, scores, masks, fine-tunes and evaluates as the recipe says.

    Args:
        recipe: a built-in recipe's name, the path of a YAML file as the worker sees it, or the recipe itself.
        store: the folder or URL in which artifacts and run records lie; left out, what `PRUNE_JAX_STORE` of the worker
            says, else `artifacts`.
        name: the run's name; left out, the recipe's.
        changes: `stages.train.epochs=3`: set before the run, as by `--set`.
        side_by_side: stages at a time; left out, as many as the machine is good for.
        no_plugins: refuse `module:object` and what other packages register, before any of it is imported.
    """
    recipe = read_recipe(recipe, changes=changes or ())
    with without_plugins(no_plugins):
        return _prune(recipe, store_of(store), name or recipe.name, side_by_side)


def _prune(recipe: Recipe, store: str, name: str, side_by_side: int | None) -> State:
    """What the flow does, apart: clusters are sent a flow's function with all that it names, and this by its name."""
    record = carry_out(recipe, store, name, side_by_side)
    if (wanted := made.get()) is not None:
        wanted.append(record)
    if record["status"] == "failed":
        return Failed(message=record["message"])
    return Completed(message=record["message"])


def store_of(given: str | None) -> str:
    """The store of a run that was perhaps not told one."""
    return given or os.environ.get("PRUNE_JAX_STORE", "artifacts")


def carry_out(recipe: Recipe, store: str, name: str, side_by_side: int | None) -> dict[str, Any]:
    """Has the tasks of the flow run at work carry out a recipe, and answers the run record."""
    check_run_name(name)
    log = os.environ.get("PRUNE_JAX_LOG", "")
    targets(log)
    artifacts = Store(store)
    plan = prepare(recipe)
    if not is_cached(plan, artifacts):
        check_networks(plan)
    run = Run(plan, artifacts, name)
    where, bare = str(artifacts.root), not plugins_allowed()
    futures: dict[Ref, PrefectFuture[StageResult]] = {}
    limited, networks = limited_tags(), published(plan, artifacts)
    context = copy_context()  # results come from threads that know no flow run

    def submit(call: StageCall, done: Callable[[StageResult], None]) -> None:
        run.begin(call)
        future = stage.with_options(
            name=call.kind,
            tags=(tags_of(call) | device_tags()) & limited,
            retries=call.operation.retries,
            retry_delay_seconds=delays(call.operation.retries),
            timeout_seconds=call.operation.timeout_seconds,
            **lineage(call, artifacts, networks),
        ).submit(call, where, bare, wait_for=[futures[ref] for ref in call.inputs.values() if ref in futures])
        futures[call.ref] = future
        future.add_done_callback(lambda future: finish(call, future, done))

    def finish(call: StageCall, future: PrefectFuture[StageResult], done: Callable[[StageResult], None]) -> None:
        result = _result(call, future)
        run.end(call, result)
        context.copy().run(tell_finished, name, call, result, future.task_run_id)
        done(result)

    with (
        artifacts.at_work(call.ref for call in plan.calls),
        _ending_stages(),
        telling_breaches(name),
        logged(log, name) as log_record,
    ):
        record = run.finish(walk(plan, artifacts, submit, side_by_side=side_by_side or _side_by_side()))
        log_record(record)
    show(artifacts, record)
    return record


def run_flow(
    recipe: Recipe, *, store: str, name: str, side_by_side: int | None = None, cluster: Cluster | None = None
) -> dict[str, Any]:
    """Runs the flow in this process and answers the run record.

    Args:
        recipe: what is wanted.
        store: where artifacts and records lie.
        name: the run's name.
        side_by_side: stages at a time; left out, as many as the machine is good for.
        cluster: where stages run; left out, in threads of this process.

    Raises:
        UserMistake: the recipe is wrong.
        PruneError: the run ended without a record.
    """
    at_work = prune if cluster is None else prune.with_options(task_runner=cluster.runner)
    at_a_time = side_by_side if cluster is None else 2 * cluster.threads  # the next is there when one ends
    return outcome_of(lambda: at_work(recipe, store=store, name=name, side_by_side=at_a_time, return_state=True))


def outcome_of(call: Callable[[], State]) -> dict[str, Any]:
    """Calls a flow in this process and answers what it puts into `made`.

    Raises:
        PruneError: it ended without that.
    """
    with get_client(sync_client=True) as client:
        if fault := client.api_healthcheck():
            raise _unanswered(fault)
    outcomes: list[dict[str, Any]] = []
    token = made.set(outcomes)
    try:
        state = call()
    except HTTPError as error:
        if not outcomes:
            raise _unanswered(error) from error
    finally:
        made.reset(token)
    if not outcomes:
        state.result()  # raises what kept the run from ending
        raise PruneError(f"Prefect ended the run as {state.name}: {state.message}")
    return outcomes[0]


def _unanswered(fault: Exception) -> PruneError:
    return PruneError(
        f"Prefect's server at {PREFECT_API_URL.value()} does not answer ({type(fault).__name__}: {fault}). What is "
        "done is kept. Start the server, or unset PREFECT_API_URL to have a temporary one; the same command goes on."
    )


@contextmanager
def _ending_stages() -> Iterator[None]:
    """Ends the stages at work at their next report, where they save a checkpoint, when the run is told to end."""
    ended = threading.Event()
    heard = listeners.get()

    def progress(progress: Progress) -> None:
        if ended.is_set():
            raise PruneError("the run was told to end")
        heard.progress(progress)

    token = listeners.set(heard._replace(progress=progress))
    try:
        yield
    except BaseException:
        ended.set()
        raise
    finally:
        listeners.reset(token)


def _side_by_side() -> int:
    """Two stages at a time on one device: they share XLA's threads, so more would only wait for each other.

    One at a time on several: programs that span devices and are started side by side may wait for each other for ever.
    """
    return 2 if jax.device_count() == 1 else 1


def _result(call: StageCall, future: PrefectFuture[StageResult]) -> StageResult:
    try:
        return future.result()
    except BaseException as error:  # whatever it was, the walk must hear of it
        return failure(call, error)
