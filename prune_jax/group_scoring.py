"""Scores of a network's groups: any criterion, from the scores of the weights that their units hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from prune_jax.compaction import TracedNetwork
from prune_jax.criteria import Criterion
from prune_jax.errors import UserMistake
from prune_jax.groups import Group
from prune_jax.scoring import prunable_paths, score
from prune_jax.statistics import Apply, Loss, unit_taylor
from prune_jax.trees import PyTree, leaves_by_path
from prune_jax.unit_statistics import gather_units


def score_groups(
    net: TracedNetwork,
    criterion: Criterion,
    params: PyTree,
    *,
    prefix: str = "",
    loss: Loss | None = None,
    correct: Loss | None = None,
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
        correct: `correct(params, batch) -> [batch]`, 1 where the answer is right, else 0; for criteria that ask for it.
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
    groups = free_groups(net, params, kinds, exclude, prefix)
    options = dict(options or {})
    combined = criterion.combine_with(options, combine)
    if combined == "square of sum":
        if loss is None or batches is None:
            raise UserMistake(f"criterion {criterion.name!r} needs gradients: give loss= and batches=.")
        paths = prunable_paths(params, exclude=exclude)
        found = unit_taylor(_Sums.of(groups, prefix), loss, params, batches, prunable=paths)
        return {name: np.asarray(values) for name, values in jax.device_get(found).items()}
    if combined.startswith("unit"):
        return _of_units(criterion, groups, params, prefix, loss, correct, batches, options)
    given: dict[str, Any] = {"loss": loss, "batches": batches, "apply": apply, "inputs": inputs}
    scores = score(criterion, params, exclude=exclude, key=key, options=options, **given)
    named = {f"{prefix}{path}": leaf for path, leaf in leaves_by_path(scores).items()}
    return net.unit_scores(named, groups=groups, combine=combined)


def free_groups(
    net: TracedNetwork, params: PyTree, kinds: Iterable[str] = (), exclude: Iterable[str] = (), prefix: str = ""
) -> dict[str, Group]:
    """The groups of these kinds that hold no leaf that stays dense.

    Raises:
        UserMistake: there is none.
    """
    paths = prunable_paths(params, exclude=exclude)
    dense = {f"{prefix}{path}" for path in prunable_paths(params) if path not in paths}
    groups = {name: group for name, group in net.groups_of(kinds).items() if not dense & _paths(group)}
    if not groups:
        raise UserMistake(
            f"no group is left to prune (groups: {', '.join(net.groups) or 'none'}): leave less dense, or name other "
            "kinds"
        )
    return groups


def _of_units(
    criterion: Criterion,
    groups: Mapping[str, Group],
    params: PyTree,
    prefix: str,
    loss: Loss | None,
    correct: Loss | None,
    batches: Iterable[PyTree] | None,
    options: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    leaves = {f"{prefix}{path}": leaf for path, leaf in leaves_by_path(params).items()}
    if criterion.data_free:
        return criterion.function(groups, leaves, **options)
    if "correct" in criterion.needs and correct is None:
        raise UserMistake(
            f"criterion {criterion.name!r} needs answers that are right or wrong: give correct=, (params, batch) -> "
            "[batch]; in a recipe, the objective `classification` has them."
        )
    if loss is None or batches is None:
        raise UserMistake(f"criterion {criterion.name!r} needs the loss: give loss= and batches=.")
    of_leaves = _OfLeaves(jax.tree.structure(params), tuple(leaves))
    function = Partial(of_leaves, loss if isinstance(loss, Partial) else Partial(loss))
    if criterion.combine == "unit and activations":
        stats = gather_units(criterion.needs_with(options), groups, function, leaves, batches)
        return criterion.function(groups, stats, **options)
    given: dict[str, Any] = {"loss": function}
    if "correct" in criterion.needs:
        given = {"correct": Partial(of_leaves, correct if isinstance(correct, Partial) else Partial(correct))}
    return criterion.function(groups, leaves, batches=batches, **given, **options)


@dataclass(frozen=True)
class _OfLeaves:
    """A function of parameters as one of their leaves by path; equal for equal parameters, so that it compiles once."""

    structure: Any
    paths: tuple[str, ...]

    def __call__(self, function: Loss, leaves: Mapping[str, Any], batch: PyTree) -> Any:
        return function(jax.tree.unflatten(self.structure, [leaves[path] for path in self.paths]), batch)


def _paths(group: Group) -> set[str]:
    return {path for path, _, _ in group.members}


@dataclass(frozen=True)
class _Sums:
    """Sums over the elements that each unit holds, `[units]` by group; equal for equal groups: it compiles once.

    Attributes:
        held: by group its units, and path and axis of its members.
    """

    prefix: str
    held: tuple[tuple[str, int, tuple[tuple[str, int], ...]], ...]

    @classmethod
    def of(cls, groups: Mapping[str, Group], prefix: str) -> Partial:
        """That of these groups; the indices `[units, m]` of their members are arguments of what is compiled."""
        held = tuple((name, g.size, tuple((path, axis) for path, axis, _ in g.members)) for name, g in groups.items())
        return Partial(cls(prefix, held), {name: [places for *_, places in g.members] for name, g in groups.items()})

    def __call__(self, places: Mapping[str, list[Any]], tree: PyTree) -> dict[str, jax.Array]:
        leaves = {f"{self.prefix}{path}": leaf for path, leaf in leaves_by_path(tree).items()}
        found: dict[str, jax.Array] = {}
        for name, size, members in self.held:
            for (path, axis), rows in zip(members, places[name], strict=True):
                if path in leaves:
                    leaf = leaves[path]
                    line = jnp.sum(leaf, axis=tuple(d for d in range(leaf.ndim) if d != axis))
                    found[name] = found.get(name, jnp.zeros(size)) + jnp.sum(line[rows], axis=1)
        return found
