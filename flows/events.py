"""What other programs may listen to; automations and webhooks hang on it.

`prune_jax.stage.finished`, `prune_jax.guard.breached`, `prune_jax.model.promoted`, `prune_jax.model.rejected`. Events
are queued and sent by a thread of Prefect's: a server that is away costs a run nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prefect.events import emit_event

from prune_jax.progress import Breach, listeners
from prune_jax.recipe import StageCall, StageResult

MOST = 100  # metrics in one event


def tell(what: str, champion: str, payload: dict[str, Any]) -> None:
    """Emits an event of a champion's.

    Args:
        what: `promoted`, `rejected`.
        champion: its name.
        payload: small and JSON-friendly.
    """
    resource = {"prefect.resource.id": f"prune_jax.champion.{champion}", "prefect.resource.name": champion}
    emit_event(event=f"prune_jax.model.{what}", resource=resource, payload=payload)


def tell_finished(run: str, call: StageCall, result: StageResult, task_run: object) -> None:
    """Emits `prune_jax.stage.finished` of a stage that ran; what the store held already was told when it was made.

    Args:
        run: the run's name.
        call: the stage.
        result: what came of it.
        task_run: the id of the task run that carried it out.
    """
    if result.status != "ran":
        return
    payload: dict[str, Any] = {"run": run, "stage": call.name, "kind": call.kind, "key": call.key}
    payload |= {"metrics": figures(call, result), "seconds": round(result.seconds, 3)}
    by = {
        "prefect.resource.id": f"prefect.task-run.{task_run}",
        "prefect.resource.role": "task-run",
        "prefect.resource.name": call.label,
    }
    emit_event(event="prune_jax.stage.finished", resource=_stage(run, call.name), related=[by], payload=payload)


@contextmanager
def telling_breaches(run: str) -> Iterator[None]:
    """Emits `prune_jax.guard.breached` for each round of a run that its guard refuses."""
    heard = listeners.get()

    def breached(breach: Breach) -> None:
        heard.breached(breach)
        told = breach._asdict()
        payload = {"run": run, "stage": told.pop("name"), "message": told.pop("told"), **told}
        emit_event(event="prune_jax.guard.breached", resource=_stage(run, breach.name), payload=payload)

    token = listeners.set(heard._replace(breached=breached))
    try:
        yield
    finally:
        listeners.reset(token)


def figures(call: StageCall, result: StageResult) -> dict[str, int | float]:
    """The metrics of a stage that are one number each; those of evaluated networks as `prune.accuracy`."""
    found = _numbers(result.metrics)
    for name, ref in call.inputs.items():
        if isinstance(of := result.metrics.get(ref.key), Mapping):
            found |= {f"{name}.{metric}": value for metric, value in _numbers(of).items()}
    return dict(list(found.items())[:MOST])


def _numbers(metrics: Mapping[str, Any]) -> dict[str, int | float]:
    return {k: v for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _stage(run: str, name: str) -> dict[str, str]:
    return {"prefect.resource.id": f"prune_jax.stage.{run}.{name}", "prefect.resource.name": f"{run} · {name}"}
