"""Which units die: scores of weights made into scores of units, and the lowest of them chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from prune_jax.errors import NonFiniteScoreError, UserMistake, did_you_mean
from prune_jax.groups.trace import Group

COMBINE = ("sum", "mean", "l1", "l2", "max", "first")
SCOPES = ("global", "isomorphic", "group")


def unit_scores(groups: Mapping[str, Group], leaves: Mapping[str, Any], combine: str = "sum") -> dict[str, np.ndarray]:
    """Scores of units from those of all the weights that they hold.

    Args:
        groups: name -> group.
        leaves: path -> scores shaped like that parameter; parameters that it lacks count for nothing.
        combine: what is made of a unit's scores: `sum`, `mean`, `l1`, `l2`, `max`, or the `first` of them.

    Returns:
        Group -> float64 scores `[units]`; groups of which no weight is scored are left out.
    """
    if combine not in COMBINE:
        raise UserMistake(
            f"combine {combine!r} is not possible{did_you_mean(combine, COMBINE)} (allowed: {', '.join(COMBINE)})"
        )
    found = {}
    for name, group in groups.items():
        scored = [(leaves[path], axis, places) for path, axis, places in group.members if path in leaves]
        if scored:
            found[name] = _combined([(np.asarray(s, np.float64), axis, places) for s, axis, places in scored], combine)
    return found


def _combined(scored: Sequence[tuple[np.ndarray, int, np.ndarray]], combine: str) -> np.ndarray:
    lines = [np.moveaxis(leaf, axis, 0).reshape(leaf.shape[axis], -1) for leaf, axis, _ in scored]
    held = [places for _, _, places in scored]
    if combine == "first":
        return lines[0][:, 0][held[0][:, 0]]
    if combine == "max":
        return np.stack([line.max(axis=1)[p].max(axis=1) for line, p in zip(lines, held, strict=True)]).max(axis=0)
    power: Callable[[np.ndarray], np.ndarray] = {"l1": np.abs, "l2": np.square}.get(combine, lambda s: s)
    total = sum(power(line).sum(axis=1)[p].sum(axis=1) for line, p in zip(lines, held, strict=True))
    if combine == "mean":
        return np.asarray(total / sum(line.shape[1] * p.shape[1] for line, p in zip(lines, held, strict=True)))
    return np.sqrt(total) if combine == "l2" else np.asarray(total)


def ranked(
    groups: Mapping[str, Group], scores: Mapping[str, np.ndarray], scope: str, dead: Mapping[str, Iterable[int]]
) -> list[list[tuple[str, int]]]:
    """Pools of units that compete, each from the lowest score to the highest; among equals the first dies first.

    Args:
        groups: name -> group.
        scores: group -> scores `[units]`.
        scope: `global`: all units compete, each group's scores divided by their mean, since groups of few weights
            would die out otherwise. `isomorphic`: groups of one kind that hold arrays of the same rank compete with
            one another (Fang et al. 2024, arXiv:2407.04616). `group`: each for itself.
        dead: group -> units that stand first in any case.
    """
    if scope not in SCOPES:
        raise UserMistake(
            f"scope {scope!r} is not possible for groups{did_you_mean(scope, SCOPES)} (allowed: {', '.join(SCOPES)})"
        )
    pools: dict[Any, list[tuple[float, int, str, int]]] = {}
    for number, (name, values) in enumerate(scores.items()):
        if not np.isfinite(values).all():
            bad = int(np.flatnonzero(~np.isfinite(values))[0])
            raise NonFiniteScoreError(
                f"The score of unit {bad} of group {name!r} is {values[bad]}: a weight or its gradient is NaN, "
                "infinite or near the largest float."
            )
        mean = float(np.abs(values).mean())
        scale = 1.0 if scope == "group" or not mean else mean
        pool = pools.setdefault({"global": None, "group": name}.get(scope, _shape(groups[name])), [])
        gone = frozenset(dead.get(name, ()))
        pool += [
            (-math.inf if unit in gone else float(value) / scale, number, name, unit)
            for unit, value in enumerate(values)
        ]
    return [[(name, unit) for _, _, name, unit in sorted(pool)] for pool in pools.values()]


def _shape(group: Group) -> tuple[Any, ...]:
    """What groups have in common that do the same in different places."""
    return (group.kind, tuple((axis, places.shape[1]) for _, axis, places in group.members))


def lowest(
    groups: Mapping[str, Group],
    pools: Sequence[Sequence[tuple[str, int]]],
    count: Callable[[int], int],
    *,
    min_keep: int = 1,
    round_to: int = 1,
) -> dict[str, list[int]]:
    """The lowest `count(size)` units of each pool, but never so many that a group keeps too few.

    Args:
        groups: name -> group.
        pools: units from the lowest score to the highest.
        count: the size of a pool -> how many of it die.
        min_keep: so many units of each group live whatever their scores.
        round_to: each group keeps a multiple of this, the best of the dead with it, or all of its units.
    """
    dead: dict[str, list[int]] = {}
    for pool in pools:
        wanted = count(len(pool))
        left = {name: max(groups[name].size - min_keep, 0) for name, _ in pool}
        for name, unit in pool:
            if not wanted:
                break
            if left[name]:
                left[name] -= 1
                wanted -= 1
                dead.setdefault(name, []).append(unit)
    for name, units in dead.items():
        living = groups[name].size - len(units)
        back = min(-living % round_to, len(units))
        dead[name] = sorted(units[: len(units) - back])
    return {name: units for name, units in dead.items() if units}
