"""Which units die: scores of weights made into scores of units, and the lowest of them chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from prune_jax.errors import NonFiniteScoreError, UserMistake, did_you_mean
from prune_jax.groups.layers import LAYER
from prune_jax.groups.trace import Group
from prune_jax.trees import PyTree, leaves_by_path

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
        scale = 1.0 if scope == "group" or groups[name].kind == LAYER or not mean else mean
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
        min_keep: so many units of each group live whatever their scores; layers have but one, which may die.
        round_to: each group keeps a multiple of this, the best of the dead with it, or all of its units.
    """
    dead: dict[str, list[int]] = {}
    for pool in pools:
        wanted = count(len(pool))
        left = {name: groups[name].size - (0 if groups[name].kind == LAYER else min_keep) for name, _ in pool}
        for name, unit in pool:
            if not wanted:
                break
            if left[name] > 0:
                left[name] -= 1
                wanted -= 1
                dead.setdefault(name, []).append(unit)
    for name, units in dead.items():
        living = groups[name].size - len(units)
        back = min(-living % round_to, len(units)) if groups[name].kind != LAYER else 0
        dead[name] = sorted(units[: len(units) - back])
    return {name: units for name, units in dead.items() if units}


def of_kinds(groups: Mapping[str, Group], kinds: Iterable[str]) -> dict[str, Group]:
    """The groups of these kinds, all if none is named."""
    wanted = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    there = sorted({group.kind for group in groups.values()})
    for kind in wanted:
        if kind not in there:
            raise UserMistake(
                f"there is no group of kind {kind!r}{did_you_mean(kind, there)} (kinds: {', '.join(there) or 'none'})"
            )
    return {name: group for name, group in groups.items() if not wanted or group.kind in wanted}


def checked_scores(
    scores: PyTree,
    groups: Mapping[str, Group],
    shapes: Mapping[str, tuple[int, ...]],
    combine: str,
    known: Collection[str],
) -> dict[str, np.ndarray]:
    """Scores of units of `groups`, from those of weights, or as they are if all their names are `known` groups."""
    if isinstance(scores, Mapping) and scores and all(name in known for name in scores):
        found = {name: np.asarray(values, np.float64) for name, values in scores.items() if name in groups}
        for name, values in found.items():
            if values.shape != (groups[name].size,):
                raise UserMistake(
                    f"group {name!r} has {groups[name].size} units but its scores are {list(values.shape)}"
                )
        return found
    leaves = leaves_by_path(scores)
    for path, leaf in leaves.items():
        if path not in shapes or np.shape(leaf) != shapes[path]:
            expected = f"{list(shapes[path])}" if path in shapes else "no parameter"
            raise UserMistake(f"scores {path!r} are {list(np.shape(leaf))} but should be {expected}")
    return unit_scores(groups, leaves, combine)


def check_target(**targets: float | None) -> None:
    """Refuses none or several targets, and impossible ones."""
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise UserMistake(f"give one target (of {', '.join(targets)}); {', '.join(given) or 'none'} is given")
    ((name, value),) = given.items()
    if name == "sparsity" and not 0 <= value < 1:
        raise UserMistake(f"sparsity = {value} must be at least 0 and below 1: it is the fraction of units that dies")
    if name != "sparsity" and not value > 0:
        raise UserMistake(f"{name} = {value} must be above 0: a number, or a fraction of what there is")


def within(
    name: str,
    budget: float,
    measure: Callable[[Mapping[str, Iterable[int]]], int],
    at: Callable[[float], dict[str, list[int]]],
    units: int,
) -> dict[str, list[int]]:
    """The fewest dead units whose network is within the budget, by bisection."""
    most = budget * measure({}) if budget <= 1 else budget
    low, high = 0, units
    if measure(at(1.0)) > most:
        raise UserMistake(
            f"{name} = {budget:g} is out of reach: with min_keep units left in every group it is {measure(at(1.0)):,}, "
            f"of {measure({}):,}. Prune less, or weights as well."
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if measure(at(middle / max(units, 1))) <= most else (middle + 1, high)
    return at(low / max(units, 1))
