"""Schedules: round -> sparsity. The last round's is the wanted one, exactly."""

from __future__ import annotations

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
