"""Retrain, gate, promote: a recipe on today's data, held beside the reigning champion, made champion if it may."""

from __future__ import annotations

from typing import Any

from httpx import HTTPError
from prefect import flow, get_client
from prefect.artifacts import create_table_artifact
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed, Running, State
from prefect.task_runners import ThreadPoolTaskRunner
from prune_jax.flows.display import artifact_key
from prune_jax.flows.events import tell
from prune_jax.flows.prune import THREADS, Written, carry_out, made, outcome_of, store_of
from pydantic import Field

from prune_jax.checkpoints import Store
from prune_jax.contest import contest
from prune_jax.gates import Check, number, reason, rows
from prune_jax.promotion import Candidate, candidate, champion, promote, reject
from prune_jax.recipe import Champion, Limits, Recipe, check_run_name, digest, read_recipe
from prune_jax.registry import without_plugins
from prune_jax.snapshots import snapshot


class Decision(RunInput):
    """What a person answers to a candidate that keeps to all limits."""

    approve: bool = Field(description="true: promote it; false: turn it away")
    by: str = Field(default="", description="who decides; kept in the history")
    why: str = Field(default="", description="kept in the history")


def _run_name() -> str:
    given = flow_run.parameters
    return f"{given['name']} · {read_recipe(given['recipe'], changes=given.get('changes') or ()).name}"


@flow(
    name="lifecycle",
    flow_run_name=_run_name,
    task_runner=ThreadPoolTaskRunner(max_workers=THREADS),  # type: ignore[arg-type]
    persist_result=False,
)
def lifecycle(
    recipe: Written,
    name: str,
    store: str | None = None,
    limits: Limits = Limits(max_drop=0.01),  # noqa: B008  (frozen)
    approval_seconds: int | None = None,
    network: str | None = None,
    changes: list[str] | None = None,
    side_by_side: int | None = None,
    no_plugins: bool = False,
) -> State:
    """Puts today's data aside, runs the recipe on them, and promotes its network if it may.

    Args:
        recipe: a built-in recipe's name, the path of a YAML file as the worker sees it, or the recipe itself; it
            evaluates and exports the network.
        name: the champion's.
        store: the folder in which artifacts, records and champions lie; left out, what `PRUNE_JAX_STORE` of the worker
            says, else `artifacts`.
        limits: what the candidate must keep to, some of it beside the champion, on the candidate's test data.
        approval_seconds: wait so long for a person, who answers in the UI; left out, nobody is asked.
        network: the stage whose network it is, if the recipe exports several.
        changes: `stages.train.epochs=3`: set before the run, as by `--set`.
        side_by_side: stages at a time; left out, as many as the machine is good for.
        no_plugins: refuse `module:object` and what other packages register, before any of it is imported.
    """
    recipe = read_recipe(recipe, changes=changes or ())
    with without_plugins(no_plugins):
        outcome = _lifecycle(recipe, name, Store(store_of(store)), limits, approval_seconds, network, side_by_side)
    if (wanted := made.get()) is not None:
        wanted.append(outcome)
    if outcome["outcome"] == "failed":
        return Failed(message=outcome["message"])
    return Completed(name=outcome["outcome"].capitalize(), message=outcome["message"])


def _lifecycle(
    recipe: Recipe,
    name: str,
    store: Store,
    limits: Limits,
    approval_seconds: int | None,
    network: str | None,
    side_by_side: int | None,
) -> dict[str, Any]:
    check_run_name(name)
    before = champion(store, name)
    data, ref = snapshot(store, recipe.data)
    recipe = recipe.model_copy(update={"data": data})
    with store.at_work([ref] if ref else []):
        record = carry_out(recipe, str(store.root), _run_of(name, recipe), side_by_side)
        if record["status"] == "failed" and not record["rejected"]:
            return _outcome("failed", before, record, record["message"], [])
        found = candidate(store, record["name"], network, rejected=True)
        with store.at_work([found.artifact, found.export]):
            if record["rejected"]:  # by a gate of the recipe's own
                gates = [stage for stage in record["stages"].values() if stage["kind"] == "gate"]
                checks = [check for gate in gates for check in gate["metrics"].get("checks", ())]
                return _turn_away(store, before, record, found, record["message"], checks)
            return _decide(store, before, record, found, limits, approval_seconds)


def _run_of(name: str, recipe: Recipe) -> str:
    """A run's name that tells today's data and recipe: the same again go on where they were left."""
    return f"{name[:80]}-{digest(recipe.model_dump(mode='json', exclude_unset=True))[:8]}"


def _decide(
    store: Store, before: Champion, record: dict[str, Any], found: Candidate, limits: Limits, seconds: int | None
) -> dict[str, Any]:
    if before.champion and before.champion.export == found.export:
        return _outcome("unchanged", before, record, f"it is the champion already, generation {before.generation}", [])
    judged = contest(store, found, before.champion, limits)
    _show(before.name, judged)
    no, by, why = reason(judged), None, ""
    if not no and seconds is not None:
        no, by, why = _ask(before, found, judged, seconds)
    if no:
        return _turn_away(store, before, record, found, no, rows(judged), by or "")
    now = promote(
        store,
        found.run,
        before.name,
        network=found.network,
        expected=before.generation,
        checks=rows(judged),
        by=by,
        why=why,
    )
    tell("promoted", now.name, {"run": found.run, "network": found.network, "generation": now.generation})
    told = f"generation {now.generation}: {found.network} of run {found.run}"
    return _outcome("promoted", now, record, told, rows(judged))


def _turn_away(
    store: Store,
    before: Champion,
    record: dict[str, Any],
    found: Candidate,
    why: str,
    checks: list[dict[str, Any]],
    by: str = "",
) -> dict[str, Any]:
    """Keeps in the history that the candidate was turned away, and tells who listens."""
    reject(store, found, before.name, checks=checks, why=why, by=by)
    tell("rejected", before.name, {"run": found.run, "network": found.network, "reason": why})
    return _outcome("rejected", before, record, why, checks)


def _ask(before: Champion, found: Candidate, judged: tuple[Check, ...], seconds: int) -> tuple[str, str | None, str]:
    """Waits for a person: why it is turned away, if it is; who decided; and what they said."""
    reign = f"run {before.champion.run!r}" if before.champion else "nobody"
    lines = [
        f"{check.what}: {number(check.candidate)}"
        + (f" beside {number(check.champion)}" if check.champion is not None else "")
        for check in judged
    ]
    told = f"Promote run `{found.run}`, {found.network}, to **{before.name}**, now {reign}?\n\n* " + "\n* ".join(lines)
    try:
        answer = pause_flow_run(wait_for_input=Decision.with_initial_data(description=told), timeout=seconds)
    except FlowPauseTimeout:
        with get_client(sync_client=True) as client:  # else the server would call it failed, "never resumed"
            client.set_flow_run_state(flow_run.id, Running(), force=True)
        return f"nobody approved it within {seconds} s", None, ""
    if answer.approve:
        return "", answer.by or None, answer.why
    return f"turned away by {answer.by or 'a person'}" + (f": {answer.why}" if answer.why else ""), answer.by, ""


def _outcome(
    outcome: str, now: Champion, record: dict[str, Any], message: str, checks: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "outcome": outcome,
        "champion": now.name,
        "generation": now.generation,
        "message": message,
        "checks": checks,
        "run": record,
    }


def _show(name: str, judged: tuple[Check, ...]) -> None:
    """The verdict as a table in the UI."""
    table = [{**row, "passed": "yes" if row["passed"] else "no"} for row in rows(judged)]
    try:
        create_table_artifact(key=f"{artifact_key(name)}-verdict", table=table, description=reason(judged) or "passed")
    except HTTPError as error:  # the verdict stands in the champion's history, too
        get_run_logger().warning("the verdict could not be shown in the UI: %s", error)


def run_lifecycle(recipe: Recipe, **settings: Any) -> dict[str, Any]:
    """Runs the flow in this process and answers what came of it.

    Args:
        recipe: what is wanted.
        **settings: the flow's other parameters.

    Raises:
        UserMistake: the recipe is wrong, or makes no network that can be promoted.
        PruneError: the run ended without an outcome.
    """
    return outcome_of(lambda: lifecycle(recipe, **settings, return_state=True))
