"""Allocation: scope x target -> how many units die where.

Whatever the target, the answer is a number for each pool of leaves that compete, so that one exact selection serves
all of them: those below a threshold are simply the lowest so many.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from prune_jax.errors import UserMistake, did_you_mean
from prune_jax.selection import count_below, kth_smallest
from prune_jax.trees import matches, names_in

Scope = str | Mapping[str, float]

SCOPES = ("global", "layer", "erk", "lamp", "output")
BY_OUTPUT = ("weight", "kernel")  # granularities whose units are inputs of an output
_ONE_POOL = ("global", "lamp")
TARGETS = ("sparsity", "keep", "threshold", "statistic", "percentile")
STATISTICS = ("mean", "median")


class Pool(NamedTuple):
    """Leaves whose units compete, and how many of those die; by output: those along the last axis, each so many."""

    paths: tuple[str, ...]
    prune: int | jax.Array
    by_output: bool = False


def allocate(
    scores: Mapping[str, Any],
    *,
    scope: Scope = "global",
    sparsity: float | None = None,
    keep: int | None = None,
    threshold: float | None = None,
    statistic: str | None = None,
    percentile: float | None = None,
    alive: Mapping[str, jax.Array] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    min_keep: int = 0,
) -> tuple[Pool, ...]:
    """Says how many units die in which pool.

    `global` is one pool, and so is `lamp`, of scores that `selection.shares` made comparable; `layer`, `erk` and a
    table are one pool for each leaf. `sparsity` and `keep` count all units,
    those that are dead already included; `threshold`, `statistic` and `percentile` make a number of each pool's living
    scores, below which they die. In `layer`, each leaf gets the sparsity, rounded; a `keep` is shared out by size.
    `erk` gives leaf l the density eps * sum(shape) / prod(shape), at most 1, with eps such that the total is as asked
    (Evci et al. 2020, arXiv:1911.11134; Mocanu et al. 2018). In `output`, the inputs of each output of a leaf, an index
    of its last axis, compete, and the sparsity of them dies, rounded.

    Args:
        scores: scores of units by path, finite.
        scope: `global`, `layer`, `erk`, `lamp`, `output`, or {pattern: sparsity}: the first pattern that fits wins,
            leaves that none fits stay dense, and no target is given.
        sparsity: fraction that dies, in [0, 1).
        keep: so many survive.
        threshold: what scores below it, as float32, dies.
        statistic: `mean` or `median` of the living scores, as float32: what is below dies.
        percentile: in [0, 100], interpolated linearly as numpy does: what is below dies.
        alive: which units live, by path; a path that it lacks lives.
        shapes: shapes of the weights, for `erk`, where they are not those of the scores.
        min_keep: so many living units of each leaf are to survive, even if less dies than was asked of a leaf.

    Returns:
        Pools; together they hold every leaf of which something may die.

    Raises:
        UserMistake: the target is missing, doubled, impossible, or does not fit the scope.
    """
    targets = dict(zip(TARGETS, (sparsity, keep, threshold, statistic, percentile), strict=True))
    sizes = {path: int(np.prod(np.shape(leaf))) for path, leaf in scores.items()}
    check_target(sizes, scope=scope, **targets)
    alive = alive or {}
    floor = {path: min(min_keep, int(alive[path].sum()) if path in alive else size) for path, size in sizes.items()}
    if isinstance(scope, Mapping):
        return tuple(_fraction(path, share, sizes, floor) for path, share in _table(scope, sizes).items())
    if scope == "output":
        return tuple(_of_outputs(path, np.shape(leaf), float(sparsity or 0), min_keep) for path, leaf in scores.items())
    if scope == "layer" and sparsity is not None:
        return tuple(_fraction(path, sparsity, sizes, floor) for path in sizes)
    if sparsity is not None or keep is not None:
        total = sum(sizes.values())
        survivors = int(keep) if keep is not None else total - round(sparsity * total)  # type: ignore[operator]
        _check_floor(floor, survivors, total, min_keep)
        if scope in _ONE_POOL:
            return (Pool(tuple(sizes), total - survivors),)
        wanted = np.array([float(size) for size in sizes.values()])
        if scope == "erk":
            of = {path: tuple((shapes or {}).get(path, np.shape(leaf))) for path, leaf in scores.items()}
            wanted *= [sum(shape) / math.prod(shape) if shape else 1.0 for shape in of.values()]
        left = _share_out(survivors, wanted, np.array(list(floor.values())), np.array(list(sizes.values())))
        return tuple(Pool((path,), sizes[path] - int(n)) for path, n in zip(sizes, left, strict=True))
    word, amount = next((w, a) for w, a in targets.items() if a is not None)
    groups = [tuple(scores)] if scope in _ONE_POOL else [(path,) for path in scores]
    below = [_below(word, amount, paths, scores, alive) for paths in groups]
    most = [sum(sizes[path] - floor[path] for path in paths) for paths in groups]
    return tuple(Pool(*pool) for pool in zip(groups, map(min, below, most), strict=True))


def check_target(sizes: Mapping[str, int], *, scope: Scope = "global", **targets: Any) -> None:
    """Refuses what `allocate` would refuse, as far as can be told before there are scores.

    Args:
        sizes: number of units of each prunable leaf, by path.
        scope: as of `allocate`.
        targets: `sparsity`, `keep`, `threshold`, `statistic`, `percentile`, as of `allocate`.
    """
    if not sizes:
        raise UserMistake(
            "there is nothing to prune: no leaf was scored. Look at the patterns of prunable and exclude."
        )
    word, amount = _only_target(targets, scope)
    if isinstance(scope, Mapping):
        _check_table(scope, sizes)
    elif word == "sparsity":
        check_sparsity(amount)
    elif word == "keep":
        total = sum(sizes.values())
        if not _is_number(amount) or amount != int(amount) or not 1 <= amount <= total:
            raise UserMistake(
                f"keep = {amount}: must be a whole number from 1 to {total}, the number of prunable units; "
                "to say which fraction dies, give sparsity"
            )
    elif word == "threshold" and (not _is_number(amount) or not math.isfinite(amount)):
        raise UserMistake(f"threshold = {amount}: must be a finite number")
    elif word == "statistic" and amount not in STATISTICS:
        raise UserMistake(
            f"statistic {amount!r} is not known{did_you_mean(amount, STATISTICS)} (allowed: {', '.join(STATISTICS)})"
        )
    elif word == "percentile" and (not _is_number(amount) or not 0 <= amount <= 100):
        raise UserMistake(f"percentile = {amount}: must be from 0 to 100")


def _only_target(targets: Mapping[str, Any], scope: Scope) -> tuple[str, Any]:
    given = [name for name, value in targets.items() if value is not None]
    if isinstance(scope, Mapping):
        if given:
            raise UserMistake(f"a table in scope says how many die where; leave {' and '.join(given)} out")
        return "", None
    if scope not in SCOPES:
        raise UserMistake(
            f"scope {scope!r} is not known{did_you_mean(scope, SCOPES)} "
            f"(allowed: {', '.join(SCOPES)}, or a table {{pattern: sparsity}})"
        )
    if len(given) != 1:
        raise UserMistake(f"the target is {' and '.join(given) or 'missing'}; give exactly one of {', '.join(TARGETS)}")
    if scope == "erk" and given[0] not in ("sparsity", "keep"):
        raise UserMistake(f"erk shares out a number of survivors: its target is sparsity or keep, not {given[0]}")
    if scope == "output" and given[0] != "sparsity":
        raise UserMistake(f"each output loses the same share of its inputs: its target is sparsity, not {given[0]}")
    return given[0], targets[given[0]]


def _of_outputs(path: str, shape: tuple[int, ...], sparsity: float, min_keep: int) -> Pool:
    if len(shape) < 2:
        raise UserMistake(f"scope output needs kernels [.., in, out], but {path!r} is {list(shape)}; exclude it")
    if min_keep:
        raise UserMistake(f"min_keep = {min_keep} counts a leaf's units, but scope output an output's; leave it out")
    return Pool((path,), round(sparsity * math.prod(shape[:-1])), by_output=True)


def check_sparsity(value: Any, name: str = "sparsity") -> None:
    """Refuses what is not a fraction in [0, 1)."""
    if not _is_number(value) or not 0 <= value < 1:
        hint = (
            f"; sparsity is a fraction, did you mean {value / 100:g}?" if _is_number(value) and 1 < value < 100 else ""
        )
        raise UserMistake(f"{name} = {value}: must be at least 0 and below 1{hint}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _fraction(path: str, sparsity: float, sizes: Mapping[str, int], floor: Mapping[str, int]) -> Pool:
    return Pool((path,), min(round(sparsity * sizes[path]), sizes[path] - floor[path]))


def _share_out(total: int, wanted: np.ndarray, least: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Whole numbers in proportion to `wanted`, held between `least` and `most`, that add up to `total`."""
    low, high = 0.0, float(np.max(most / wanted))
    for _ in range(200):  # bisects the factor of proportion to the last bit
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(middle * wanted, least, most).sum() < total else (low, middle)
    quota = np.clip(high * wanted, least, most)
    shares = np.floor(quota).astype(np.int64)
    by_rest = np.argsort(shares - quota, kind="stable")  # the largest rest first
    for i in by_rest[shares[by_rest] < most[by_rest]][: total - shares.sum()]:
        shares[i] += 1
    return shares


def _check_table(table: Mapping[str, float], paths: Iterable[str]) -> None:
    for pattern, value in table.items():
        check_sparsity(value, f"scope[{pattern!r}]")
        if not any(matches(path, pattern) for path in paths):
            raise UserMistake(
                f"scope[{pattern!r}] fits no prunable leaf{did_you_mean(pattern, names_in(paths))} "
                f"(leaves: {', '.join(paths)})"
            )


def _table(table: Mapping[str, float], paths: Iterable[str]) -> dict[str, float]:
    first = {path: next((v for pattern, v in table.items() if matches(path, pattern)), None) for path in paths}
    return {path: value for path, value in first.items() if value is not None}


def _below(
    word: str, amount: Any, paths: tuple[str, ...], scores: Mapping[str, jax.Array], alive: Mapping[str, jax.Array]
) -> int:
    """How many units of the pool are dead or score less than the target's number."""
    leaves = [scores[path] for path in paths]
    tiers = [alive.get(path) for path in paths]
    return int(count_below(leaves, tiers, float(np.float32(_number(word, amount, leaves, tiers)))))


def _number(word: str, amount: Any, leaves: Sequence[jax.Array], tiers: Sequence[jax.Array | None]) -> float:
    """The score below which units die."""
    if word == "threshold":
        return amount
    if amount == "mean":  # in float64 on the host: equal scores must not come out below their own mean
        living = [_living(leaf, tier) for leaf, tier in zip(leaves, tiers, strict=True)]
        return sum(float(x.sum(dtype=np.float64)) for x in living) / max(sum(x.size for x in living), 1)
    percentile = 50 if amount == "median" else amount
    count = sum(leaf.size if tier is None else int(tier.sum()) for leaf, tier in zip(leaves, tiers, strict=True))
    if not count:
        return -math.inf
    rank = percentile / 100 * (count - 1)
    low = float(kth_smallest(leaves, tiers, math.floor(rank) + 1))
    if rank == math.floor(rank):
        return low
    high = float(kth_smallest(leaves, tiers, math.floor(rank) + 2))
    return low + (high - low) * (rank - math.floor(rank))


def _living(leaf: jax.Array, tier: jax.Array | None) -> np.ndarray:
    return np.asarray(leaf) if tier is None else np.asarray(leaf)[np.asarray(tier)]


def _check_floor(floor: Mapping[str, int], survivors: int, total: int, min_keep: int) -> None:
    if sum(floor.values()) > survivors:
        raise UserMistake(
            f"min_keep = {min_keep} keeps {sum(floor.values())} units in {len(floor)} leaves, but the target "
            f"leaves only {survivors} of {total}; lower min_keep or prune less"
        )
