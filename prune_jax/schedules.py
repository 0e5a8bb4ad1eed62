"""Schedules: round -> sparsity, and step -> sparsity. The last one is the wanted one, exactly."""

from __future__ import annotations

from typing import NamedTuple

from prune_jax.errors import UserMistake, did_you_mean

LEVELS = {
    "geometric": lambda final, share: 1 - (1 - final) ** share,
    "cubic": lambda final, share: final * (1 - (1 - share) ** 3),
}


def one_shot(sparsity: float) -> tuple[float, ...]:
    """All at once.

    >>> one_shot(0.9)
    (0.9,)
    """
    return (sparsity,)


def iterative(sparsity: float, *, rounds: int, levels: str = "geometric") -> tuple[float, ...]:
    """Sparsity after each of R rounds.

    `geometric`: the same fraction of the survivors dies each round, 1 - (1 - s)^(r/R) (Frankle & Carbin 2019,
    arXiv:1803.03635). `cubic`: s (1 - (1 - r/R)^3), most at first (Zhu & Gupta 2017, arXiv:1710.01878).

    Args:
        sparsity: fraction pruned after the last round, in [0, 1).
        rounds: R, at least 1.
        levels: `geometric` or `cubic`.

    Returns:
        R fractions, rising to `sparsity`.

    >>> iterative(0.75, rounds=2)
    (0.5, 0.75)
    """
    if levels not in LEVELS:
        raise UserMistake(
            f"levels {levels!r} is not known{did_you_mean(levels, LEVELS)} (allowed: {', '.join(LEVELS)})"
        )
    if rounds < 1:
        raise UserMistake(f"rounds is {rounds} but must be at least 1; to prune all at once, take 1")
    return (*(LEVELS[levels](sparsity, r / rounds) for r in range(1, rounds)), sparsity)


class Levels(NamedTuple):
    """Sparsities while a training goes on: from update `steps[i]` on, counted from 0, `sparsities[i]` are dead."""

    steps: tuple[int, ...]  # ascending
    sparsities: tuple[float, ...]


def cubic(initial: float, final: float, *, begin: int, end: int, every: int = 1) -> Levels:
    """Most is pruned at first: s(t) = final + (initial - final) (1 - (t - begin) / (end - begin))^3.

    Zhu & Gupta 2017, arXiv:1710.01878.

    Args:
        initial: sparsity at `begin`, in [0, 1).
        final: sparsity at `end`, in [0, 1); it is reached exactly, also where `every` does not divide the way there.
        begin: the first update, counted from 0, at which something may die.
        end: the last.
        every: so many updates lie between two changes.

    Returns:
        The levels at begin, begin + every, ..., end.

    >>> cubic(0.0, 0.5, begin=10, end=20, every=5)
    Levels(steps=(10, 15, 20), sparsities=(0.0, 0.4375, 0.5))
    """
    for name, value in (("initial", initial), ("final", final)):
        if not 0 <= value < 1:
            raise UserMistake(f"{name} = {value}: must be at least 0 and below 1; sparsity is the fraction pruned")
    steps = _steps(begin, end, every)
    shares = [(t - begin) / max(end - begin, 1) for t in steps]
    return Levels(steps, (*(final + (initial - final) * (1 - share) ** 3 for share in shares[:-1]), final))


def alternating(sparsity: float, *, begin: int, end: int, every: int) -> Levels:
    """By turns `sparsity` and 0, each for `every` updates, and `sparsity` from `end` on (Peste et al. 2021).

    >>> alternating(0.9, begin=2, end=7, every=2)
    Levels(steps=(2, 4, 6, 7), sparsities=(0.9, 0.0, 0.9, 0.9))
    """
    steps = _steps(begin, end, every)
    return Levels(steps, (*(0.0 if i % 2 else sparsity for i in range(len(steps) - 1)), sparsity))


def _steps(begin: int, end: int, every: int) -> tuple[int, ...]:
    """Begin, begin + every, ..., and the end itself."""
    if not 0 <= begin <= end:
        raise UserMistake(f"begin = {begin}, end = {end}: begin must be at least 0, and end not before it")
    if every < 1:
        raise UserMistake(f"every = {every}: must be at least 1")
    return (*range(begin, end, every), end)
