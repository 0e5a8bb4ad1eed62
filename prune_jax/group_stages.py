"""Stages of groups: units masked by their scores, and masked units taken away."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prune_jax.budgets import TRIES, within_latency
from prune_jax.checkpoints import Store
from prune_jax.compaction import Dead, TracedNetwork
from prune_jax.group_scoring import free_groups
from prune_jax.groups import LAYER, Group, gone_in
from prune_jax.masks import apply_masks
from prune_jax.models import Variables
from prune_jax.networks import (
    Arrays,
    Batches,
    Loaded,
    Metrics,
    as_arrays,
    dense_for,
    groups_for,
    masked,
    network_for,
    read_network,
    repeated,
    shapes_of,
    sparsity_of,
    validated,
)
from prune_jax.objectives import inputs_of
from prune_jax.problems import dataset_of, sample_of
from prune_jax.progress import Progress, Report
from prune_jax.recipe import StageCall
from prune_jax.reestimation import reestimate
from prune_jax.structure import after, reading_order, restored, stored
from prune_jax.trees import PyTree, leaves_by_path, map_by_path

WIRED = ("group", "layer")  # granularities that a network's trace knows


def kinds_of(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The kinds of groups that may be pruned; all if there is none."""
    return (LAYER,) if settings.get("granularity") == LAYER else tuple(settings.get("kinds", ()))


def mask_groups(call: StageCall, store: Store, report: Report) -> tuple[Arrays, Metrics]:
    """The network under masks of its lowest groups' units; the batch statistics of dead units are zero too."""
    loaded = read_network(store, call.inputs["network"])
    net = groups_for(call.problem, loaded.keep)
    scores = leaves_by_path(store.read(call.inputs["scores"])[0]["scores"])  # group names are paths, too
    settings = call.settings
    left = free_groups(net, loaded.variables.params, kinds_of(settings), dense_for(call, loaded, settings), "params/")
    scores = {name: values for name, values in scores.items() if name in left}
    scope = settings.get("scope", "global")
    already = net.dead_in(_alive(loaded))
    choose = functools.partial(
        net.choose,
        scores,
        scope="group" if scope == "layer" else scope,
        min_keep=max(settings.get("min_keep", 1), 1),
        round_to=settings.get("round_to", 1),
        dead=already,
        kinds=(LAYER,) if settings["granularity"] == LAYER else (),
    )
    if share := settings["target"].get("latency"):
        sample = sample_of(dataset_of(call.problem))
        dead = within_latency(
            net,
            network_for(call.problem, loaded.keep),
            loaded.variables,
            functools.partial(repeated, sample),
            share,
            lambda fraction: choose(sparsity=min(fraction, 0.999999)),
            told=lambda done, found: report(Progress(call.name, f"{call.label} · {found:.2f}", done, TRIES + 1, "try")),
        )
    else:
        dead = choose(**settings["target"])
    masks = net.masks(dead)
    params = masks["params"]
    if loaded.masks is not None:  # what is dead stays dead
        params = jax.tree.map(jnp.logical_and, params, _full(loaded.masks, params))
    variables = Variables(
        jax.device_get(apply_masks(loaded.variables.params, params)),
        jax.device_get(apply_masks(loaded.variables.state, masks["state"])),
    )
    after = loaded._replace(variables=variables, masks=jax.device_get(params))
    arrays, metrics = masked(call, loaded, after, report)
    groups = net.layers if settings["granularity"] == LAYER else net.groups
    return arrays, metrics | _wiring(call, loaded, net, dead, groups)


def _wiring(call: StageCall, loaded: Loaded, net: TracedNetwork, dead: Dead, groups: Mapping[str, Group]) -> Metrics:
    """What the report draws the network from: its groups, and its parameters in the order of their use.

    Returns:
        `groups`: name -> `dead`, `units`, `kind`, `members` as [path, axis]; `parameters`: [path, shape, shape without
        the dead units]. Of the parameters alone: batch statistics follow them.
    """
    alive = leaves_by_path(net.masks(dead)["params"])
    order = reading_order(network_for(call.problem, loaded.keep), inputs_of(sample_of(dataset_of(call.problem))))
    gone = gone_in(dead, net.layers)

    def lost(group: Group) -> int:
        within = {path for path, _, _ in group.members} <= gone
        return group.size if within else len(list(dead.get(group.name, ())))

    found = {
        name: {
            "dead": lost(group),
            "units": group.size,
            "kind": group.kind,
            "members": [[p.removeprefix("params/"), d] for p, d, _ in group.members if p.startswith("params/")],
        }
        for name, group in groups.items()
    }
    return {"groups": found, "parameters": [[p, list(alive[p].shape), _extent(np.asarray(alive[p]))] for p in order]}


def _extent(mask: np.ndarray) -> list[int]:
    """How many indices of each axis hold anything alive."""
    axes = range(mask.ndim)
    return [int(mask.any(axis=tuple(i for i in axes if i != d)).sum()) for d in axes]


def _alive(loaded: Loaded) -> PyTree:
    """What is not masked, and which batch statistics are not zero, as those of masked units are."""
    return {"params": loaded.masks or {}, "state": jax.tree.map(lambda s: np.asarray(s) != 0, loaded.variables.state)}


def _full(masks: PyTree, like: PyTree) -> PyTree:
    found = leaves_by_path(masks)
    return map_by_path(lambda path, mask: found.get(path, np.ones(mask.shape, bool)), like)


def compact(call: StageCall, store: Store, report: Report) -> tuple[Arrays, Metrics]:
    """The network without its dead units: smaller arrays for a smaller function."""
    loaded = read_network(store, call.inputs["network"])
    net = groups_for(call.problem, loaded.keep)
    dead = net.dead_in(_alive(loaded))
    small = net.compact(dead, loaded.variables._asdict())
    variables = jax.device_get(Variables(**small.params))
    masks = None if loaded.masks is None else jax.device_get(small.slice({"params": loaded.masks})["params"])
    if masks is not None and all(np.all(mask) for mask in jax.tree.leaves(masks)):
        masks = None
    shapes = shapes_of(call.problem)
    keep = small.keep if loaded.keep is None else after(restored(loaded.keep, shapes), small.keep)
    moments = {name: small.slice({"params": tree})["params"] for name, tree in (loaded.moments or {}).items()}
    made = Loaded(variables, masks, stored(keep, shapes), jax.device_get(moments) or None)
    if most := call.settings.get("reestimate_batches"):
        batches = map(inputs_of, Batches(dataset_of(call.problem).train, call, most, report))
        state = reestimate(network_for(call.problem, made.keep), variables, batches, seed=call.seed)
        variables = variables._replace(state=jax.device_get(state))
        made = made._replace(variables=variables)
    metrics = validated(call.problem, variables, dataset_of(call.problem), made.keep)
    groups = {**net.groups, **{name: group for name, group in net.layers.items() if name in dead}}
    return as_arrays(made), metrics | {"sparsity": sparsity_of(masks), **_wiring(call, loaded, net, dead, groups)}
