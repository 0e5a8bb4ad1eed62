"""Runs a recipe: the same thing for the command line and for Python."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from prune_jax.checkpoints import Store
from prune_jax.errors import UserMistake
from prune_jax.meshes import check_devices
from prune_jax.plan import Plan
from prune_jax.preparation import check_networks, is_cached, prepare
from prune_jax.recipe import Recipe, StageResult, check_run_name, read_recipe
from prune_jax.records import Run
from prune_jax.registry import without_plugins

RUNNERS = ("threads", "local")


def run(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    store: str | os.PathLike[str] = "artifacts",
    name: str | None = None,
    changes: Iterable[str] = (),
    runner: str = "threads",
    no_plugins: bool = False,
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
            on the workers of a Dask cluster, `dask=local:N` in N processes of this machine (extra `dask`; a script
            that says so needs `if __name__ == "__main__":`).
        no_plugins: refuse `module:object` and what other packages register, before any of it is imported.

    Returns:
        The run record: stages with status and seconds, results of each evaluated network. A failed stage is in it too:
        `record["status"]` is then `failed`.

    Raises:
        UserMistake: the recipe is wrong; nothing was written.
    """
    with without_plugins(no_plugins):
        return _run(recipe, store=store, name=name, changes=changes, runner=runner)


def _run(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    store: str | os.PathLike[str],
    name: str | None,
    changes: Iterable[str],
    runner: str,
) -> dict[str, Any]:
    wanted = read_recipe(recipe, changes=changes)
    name = name or wanted.name
    check_run_name(name)
    kind, _, address = runner.partition("=")
    if kind != "dask" and runner not in RUNNERS:
        raise UserMistake(f"runner = {runner!r}: is not known (allowed: {', '.join(RUNNERS)}, dask=ADDRESS)")
    artifacts = Store(store)
    plan = prepare(wanted)
    cached = is_cached(plan, artifacts)

    from prune_jax.flows import clusters, server

    if kind == "dask":
        clusters.check_address(address)
    configured = server.configured()
    if cached and not configured:
        return _nothing_to_do(plan, artifacts, name)
    temporary = None if configured else server.start_early()
    if not cached:
        check_networks(plan)
        if kind != "dask":  # else the workers' devices count
            for mesh in {call.problem.devices for call in plan.calls if call.problem.devices}:
                check_devices(mesh.data, mesh.model)

    from prune_jax.flows.prune import run_flow

    with (
        server.in_use(temporary) if temporary else nullcontext(),
        clusters.opened(address) if kind == "dask" else nullcontext() as cluster,
    ):
        at_a_time = 1 if runner == "local" else None
        return run_flow(wanted, store=str(store), name=name, side_by_side=at_a_time, cluster=cluster)


def _nothing_to_do(plan: Plan, store: Store, name: str) -> dict[str, Any]:
    results = {}
    for call in plan.calls:
        meta = store.meta(call.ref) or {}
        results[call.name] = StageResult(
            name=call.name, kind=call.kind, key=call.key, status="cached", metrics=meta.get("metrics", {})
        )
    return Run(plan, store, name).finish(results)
