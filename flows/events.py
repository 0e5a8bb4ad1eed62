"""What other programs may listen to: `prune_jax.model.promoted`, `prune_jax.model.rejected`."""

from __future__ import annotations

from typing import Any

from prefect.events import emit_event


def tell(what: str, champion: str, payload: dict[str, Any]) -> None:
    """Emits an event of a champion's; automations and webhooks can be hung on it.

    Args:
        what: `promoted`, `rejected`.
        champion: its name.
        payload: small and JSON-friendly.
    """
    resource = {"prefect.resource.id": f"prune_jax.champion.{champion}", "prefect.resource.name": champion}
    emit_event(event=f"prune_jax.model.{what}", resource=resource, payload=payload)
