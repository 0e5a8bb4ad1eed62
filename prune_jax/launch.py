"""Runs a recipe: the same thing for the command line and for Python."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from prune_jax.checkpoints import Store, versions
from prune_jax.compiled import keep
from prune_jax.errors import PruneError, UserMistake
from prune_jax.hosts import Group, Place, join, place
from prune_jax.meshes import check_devices, check_share
from prune_jax.plan import VERSIONS, Plan, expand
from prune_jax.preparation import check_networks, is_cached, prepare
from prune_jax.problems import code_of
from prune_jax.promotion import champion
from prune_jax.recipe import Limits, Recipe, StageCall, StageResult, check_run_name, digest, parents_of, read_recipe
from prune_jax.records import Run
from prune_jax.registry import without_plugins
from prune_jax.shares import settle

RUNNERS = ("threads", "local")
CLUSTERS = ("dask", "ray")


def run(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    store: str | os.PathLike[str] = "artifacts",
    name: str | None = None,
    changes: Iterable[str] = (),
    runner: str = "threads",
    no_plugins: bool = False,
    hosts: str | None = None,
    of_hosts: int | None = None,
    host: int | None = None,
) -> dict[str, Any]:
    """Runs a recipe's stages through Prefect and answers the run record.

    What the store holds is not computed again. If it holds all, no server is started, unless one is configured: then
    the run is seen there.

    Args:
        recipe: a YAML path, the name of a built-in recipe, a mapping, or a recipe.
        store: the folder or URL in which artifacts and run records lie.
        name: the run's name; left out, the recipe's.
        changes: `"stages.train.epochs=3"`: set before the recipe is checked.
        runner: `threads` runs independent branches side by side, `local` one stage at a time; `dask=tcp://HOST:PORT`
            on the workers of a Dask cluster, `ray=ray://HOST:10001` or `ray=HOST:6379` on the nodes of a Ray cluster,
            `dask=local:N` and `ray=local:N` in N processes of this machine (extras `dask`, `ray`; a script that says
            so of Dask needs `if __name__ == "__main__":`).
        no_plugins: refuse `module:object` and what other packages register, before any of it is imported.
        hosts: train over several hosts, each of which calls this in a new process with the same recipe and a store that
            all share: `HOST:PORT`, a free port of host 0, or `auto` under SLURM, Kubernetes, Open MPI and on TPUs.
        of_hosts: how many hosts.
        host: which one this is, from 0: that one walks the plan, the others take part in trainings
            and answer its record.

    Returns:
        The run record: stages with status and seconds, results of each evaluated network. A failed stage is in it too:
        `record["status"]` is then `failed`.

    Raises:
        UserMistake: the recipe is wrong; nothing was written.
        PruneError: over hosts: another one is gone.
    """
    where = place(hosts, of_hosts, host)
    with without_plugins(no_plugins):
        return _run(recipe, store=store, name=name, changes=changes, runner=runner, where=where)


def lifecycle(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    name: str,
    *,
    store: str | os.PathLike[str] = "artifacts",
    limits: Limits = Limits(max_drop=0.01),  # noqa: B008  (frozen)
    approval_seconds: int | None = None,
    network: str | None = None,
    changes: Iterable[str] = (),
    runner: str = "threads",
    no_plugins: bool = False,
) -> dict[str, Any]:
    """Runs a recipe on today's data and promotes its network if it keeps to the limits.

    Args:
        recipe: a YAML path, the name of a built-in recipe, a mapping, or a recipe.
        name: the champion's.
        store: the folder in which artifacts, records and champions lie.
        limits: what the candidate must keep to, some of it beside the champion.
        approval_seconds: wait so long for a person, who answers in the UI; left out, nobody is asked.
        network: the stage whose network it is, if the recipe exports several.
        changes: `"stages.train.epochs=3"`: set before the recipe is checked.
        runner: `threads` runs independent branches side by side, `local` one stage at a time.
        no_plugins: refuse `module:object` and what other packages register, before any of it is imported.

    Returns:
        `outcome`: promoted, rejected, unchanged or failed; `message`, why; `checks`; `generation`; `run`, the record.

    Raises:
        UserMistake: the recipe is wrong, or makes no network that can be promoted.
        PromotionError: somebody else promoted meanwhile.
    """
    from prune_jax.flows import server

    with without_plugins(no_plugins):
        wanted = read_recipe(recipe, changes=changes)
        _check_promotable(wanted)
        check_runner(runner)
        champion(Store(store), name)
        configured = server.configured()
        if approval_seconds is not None and not configured:
            raise UserMistake(
                "approval is given in the UI of a Prefect server that stays: start one (`prefect server start`) and "
                "set PREFECT_API_URL, such as http://127.0.0.1:4200/api; or leave --approval-seconds out"
            )
        temporary = None if configured else server.start_early()
        prepare(wanted)

    from prune_jax.flows.lifecycle import run_lifecycle

    settings = {"limits": limits, "approval_seconds": approval_seconds, "network": network, "no_plugins": no_plugins}
    with server.in_use(temporary) if temporary else nullcontext():
        side_by_side = 1 if runner == "local" else None
        return run_lifecycle(wanted, name=name, store=str(store), side_by_side=side_by_side, **settings)


def _check_promotable(recipe: Recipe) -> None:
    """Refuses recipes of whose run nothing could be promoted."""
    stages, wiring = recipe.stages, parents_of(recipe.stages)
    exported = {wiring[n][0] for n, stage in stages.items() if stage.kind == "export" and "stablehlo" in stage.formats}
    judged = {parent for n, stage in stages.items() if stage.kind == "evaluate" for parent in wiring[n]}
    if not exported:
        raise UserMistake(
            f"{recipe.name}: stages: none exports StableHLO, and only an export can be promoted; add one such as "
            "`export: {kind: export, of: compact, formats: [stablehlo]}`"
        )
    if not exported & judged:
        raise UserMistake(
            f"{recipe.name}: stages: none evaluates what is exported, {', '.join(sorted(exported))}; add one such as "
            f"`evaluate: {{kind: evaluate, of: [{sorted(exported)[0]}]}}`"
        )


def check_runner(runner: str, *more: str) -> None:
    """Refuses a runner that is not known."""
    if runner not in RUNNERS:
        raise UserMistake(f"runner = {runner!r}: is not known (allowed: {', '.join((*RUNNERS, *more))})")


def _run(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    store: str | os.PathLike[str],
    name: str | None,
    changes: Iterable[str],
    runner: str,
    where: Place | None,
) -> dict[str, Any]:
    settle()
    wanted = read_recipe(recipe, changes=changes)
    name = name or wanted.name
    check_run_name(name)
    if runner.partition("=")[0] not in CLUSTERS:
        check_runner(runner, *(f"{kind}=ADDRESS" for kind in CLUSTERS))
    if where is None:
        keep()
        return _carry_out(wanted, store, name, runner)
    if runner not in RUNNERS:
        raise UserMistake(f"runner = {runner!r}: over hosts stages run on host 0; choose {' or '.join(RUNNERS)}")
    if "://" in str(store):
        raise UserMistake(
            f"store = {str(store)!r}: hosts share step checkpoints, too; name a folder that all of them see"
        )
    artifacts = Store(store)
    hosts = join(where)
    hosts.introduce(_facts(wanted, hosts))
    return _led(hosts, wanted, store, name, runner) if hosts.first else _followed(hosts, artifacts)


def _facts(recipe: Recipe, hosts: Group) -> dict[str, Any]:
    """What must be the same on all hosts, before any device is asked for."""
    code = {reference: found for row in expand(recipe)[1] for reference, found in code_of(row).items()}
    return {
        "the number of hosts": hosts.count,
        "the version": versions(),
        "the number of the stage": {kind: str(number) for kind, number in VERSIONS.items()},
        "the recipe's digest": digest(recipe.model_dump(mode="json")),
        "the digest of the code": code,
    }


def _led(hosts: Group, recipe: Recipe, store: str | os.PathLike[str], name: str, runner: str) -> dict[str, Any]:
    """What host 0 does; however it ends, the others hear of it."""
    outcome: dict[str, Any] = {}
    try:
        outcome = _carry_out(recipe, store, name, runner, hosts)
    except BaseException as error:
        outcome = {"message": str(error) or type(error).__name__, "mistake": isinstance(error, UserMistake)}
        raise
    finally:
        hosts.end(outcome)
    return outcome


def _followed(hosts: Group, store: Store) -> dict[str, Any]:
    """What a host does that is not the first, and the record that the first one made."""
    from prune_jax.stages import take_part

    def share(text: str) -> None:
        take_part(StageCall.model_validate_json(text), Store(store.root), hosts)

    outcome = hosts.follow(share)
    if "stages" not in outcome:
        raise (UserMistake if outcome.get("mistake") else PruneError)(f"host 0: {outcome['message']}")
    return outcome


def _carry_out(
    recipe: Recipe, store: str | os.PathLike[str], name: str, runner: str, hosts: Group | None = None
) -> dict[str, Any]:
    artifacts = Store(store)
    on_cluster = runner.partition("=")[0] in CLUSTERS
    plan = prepare(recipe)
    cached = is_cached(plan, artifacts)

    from prune_jax.flows import clusters, server

    if on_cluster:
        clusters.check_address(runner)
    configured = server.configured()
    if cached and not configured:
        return _nothing_to_do(plan, artifacts, name)
    temporary = None if configured else server.start_early()
    if not cached:
        check_networks(plan)
        if not on_cluster:  # else the workers' devices count
            for mesh in {call.problem.devices for call in plan.calls}:
                if hosts is not None:
                    check_share((mesh.data, mesh.model) if mesh else None, hosts.count)
                elif mesh is not None:
                    check_devices(mesh.data, mesh.model)

    from prune_jax.flows.prune import run_flow

    with (
        server.in_use(temporary) if temporary else nullcontext(),
        clusters.opened(runner) if on_cluster else nullcontext() as cluster,
    ):
        at_a_time = 1 if runner == "local" else None
        return run_flow(recipe, store=str(store), name=name, side_by_side=at_a_time, cluster=cluster)


def _nothing_to_do(plan: Plan, store: Store, name: str) -> dict[str, Any]:
    results = {}
    for call in plan.calls:
        meta = store.meta(call.ref) or {}
        results[call.name] = StageResult(
            name=call.name, kind=call.kind, key=call.key, status="cached", metrics=meta.get("metrics", {})
        )
    return Run(plan, store, name).finish(results)
