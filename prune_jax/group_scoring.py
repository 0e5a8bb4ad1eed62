"""Scores of a network's groups: any criterion, from the scores of the weights that their units hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prune_jax.compaction import TracedNetwork
from prune_jax.criteria import Criterion
from prune_jax.errors import UserMistake
from prune_jax.groups import Group
from prune_jax.scoring import prunable_paths, score
from prune_jax.statistics import Apply, Loss, unit_taylor
from prune_jax.trees import PyTree, leaves_by_path


def score_groups(
    net: TracedNetwork,
    criterion: Criterion,
    params: PyTree,
    *,
    prefix: str = "",
    loss: Loss | None = None,
    batches: Iterable[PyTree] | None = None,
    apply: Apply | None = None,
    inputs: Any = None,
    exclude: Iterable[str] = (),
    kinds: Iterable[str] = (),
    key: jax.Array | None = None,
    options: Mapping[str, Any] | None = None,
    combine: str | None = None,
) -> dict[str, np.ndarray]:
    """Scores of units `[units]` by group; the lowest die first.

    Args:
        net: the network's trace.
        criterion: an entry of `prune_jax.criteria`; its `combine` says what is made of a unit's weights' scores.
        params: the weights that are scored.
        prefix: what stands before their paths in the trace, such as `params/`.
        loss: as in `score`.
        batches: as in `score`.
        apply: as in `score`.
        inputs: as in `score`.
        exclude: patterns of leaves that stay dense: no group is scored that holds one.
        kinds: groups of these kinds alone; left out, all.
        key: as in `score`.
        options: of the criterion.
        combine: what is made of the scores of a unit's weights in place of what the criterion says.

    Raises:
        UserMistake: no group is left to prune.
    """
    everywhere = prunable_paths(params)
    paths = prunable_paths(params, exclude=exclude)
    dense = {f"{prefix}{path}" for path in everywhere if path not in paths}
    groups = {name: group for name, group in net.groups_of(kinds).items() if not dense & _paths(group)}
    if not groups:
        raise UserMistake(
            f"no group is left to prune (groups: {', '.join(net.groups) or 'none'}): exclude less, or name other kinds"
        )
    options = dict(options or {})
    combined = criterion.combine_with(options, combine)
    if combined == "square of sum":
        if loss is None or batches is None:
            raise UserMistake(f"criterion {criterion.name!r} needs gradients: give loss= and batches=.")
        found = unit_taylor(lambda tree: _sums(groups, prefix, tree), loss, params, batches, prunable=paths)
        return {name: np.asarray(values) for name, values in jax.device_get(found).items()}
    if combined.startswith("unit"):
        return _of_units(criterion, groups, params, prefix, loss, batches, options)
    given: dict[str, Any] = {"loss": loss, "batches": batches, "apply": apply, "inputs": inputs}
    scores = score(criterion, params, exclude=exclude, key=key, options=options, **given)
    named = {f"{prefix}{path}": leaf for path, leaf in leaves_by_path(scores).items()}
    return net.unit_scores(named, groups=groups, combine=combined)


def _of_units(
    criterion: Criterion,
    groups: Mapping[str, Group],
    params: PyTree,
    prefix: str,
    loss: Loss | None,
    batches: Iterable[PyTree] | None,
    options: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    leaves = {f"{prefix}{path}": leaf for path, leaf in leaves_by_path(params).items()}
    if criterion.data_free:
        return criterion.function(groups, leaves, **options)
    if loss is None or batches is None:
        raise UserMistake(f"criterion {criterion.name!r} needs the loss: give loss= and batches=.")
    structure = jax.tree.structure(params)

    def of_leaves(flat: Mapping[str, Any], batch: PyTree) -> jax.Array:
        return loss(jax.tree.unflatten(structure, [flat[path] for path in leaves]), batch)

    return criterion.function(groups, leaves, loss=of_leaves, batches=batches, **options)


def _paths(group: Group) -> set[str]:
    return {path for path, _, _ in group.members}


def _sums(groups: Mapping[str, Group], prefix: str, tree: PyTree) -> dict[str, jax.Array]:
    """Sums over the elements that each unit holds, `[units]` by group."""
    leaves = {f"{prefix}{path}": leaf for path, leaf in leaves_by_path(tree).items()}
    found: dict[str, jax.Array] = {}
    for name, group in groups.items():
        for path, axis, places in group.members:
            if path in leaves:
                leaf = leaves[path]
                line = jnp.sum(leaf, axis=tuple(d for d in range(leaf.ndim) if d != axis))
                found[name] = found.get(name, jnp.zeros(group.size)) + jnp.sum(line[places], axis=1)
    return found
