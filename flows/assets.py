"""The lineage of networks as Prefect's assets: data -> dense -> pruned -> compact -> exported.

An asset is named by what it holds, `prunejax://train/KEY`, wherever the store lies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect.assets import Asset, AssetProperties
from prefect.context import AssetContext
from prune_jax.flows.events import figures

from prune_jax.checkpoints import Store
from prune_jax.plan import Plan
from prune_jax.recipe import Problem, Ref, StageCall, StageResult

MAKERS = {"train", "distill", "mask", "finetune", "prune", "compact", "export"}  # kinds that publish a network


def published(plan: Plan, store: Store) -> dict[Ref, Asset]:
    """The networks of a plan that are assets: those of its stages, not of the turns within them."""
    return {call.ref: _network(call, store) for call in plan.calls if call.kind in MAKERS}


def lineage(call: StageCall, store: Store, networks: Mapping[Ref, Asset]) -> dict[str, Any]:
    """Options of the task that makes a network: the asset that it is, and those that it is made of.

    None for what the store holds already: nothing is made then.
    """
    if call.ref not in networks or store.meta(call.ref):
        return {"assets": [], "asset_deps": []}
    parents = [networks[ref] for ref in call.inputs.values() if ref in networks]
    return {"assets": [networks[call.ref]], "asset_deps": parents or [_data(call.problem)]}


def describe(call: StageCall, result: StageResult) -> None:
    """Adds a stage's metrics to what is told of the asset that this task makes."""
    context = AssetContext.get()
    for asset in context.downstream_assets if context else ():
        asset.add_metadata(figures(call, result))


def _network(call: StageCall, store: Store) -> Asset:
    properties = AssetProperties(name=call.label, url=str(store.path(call.ref)))
    return Asset(key=f"prunejax://{call.kind}/{call.key}", properties=properties)


def _data(problem: Problem) -> Asset:
    properties = AssetProperties(name=problem.data.path or problem.data.source)
    return Asset(key=f"prunejax://data/{problem.data_digest}", properties=properties)
