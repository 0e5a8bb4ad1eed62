"""Fixed splits: they depend on the labels and nothing else, so that every recipe is measured on the same examples."""

from __future__ import annotations

import numpy as np

from prune_jax.errors import UserMistake


def spread(y: np.ndarray) -> np.ndarray:
    """An order of the samples in which equal labels stand together, each class shuffled.

    Every k-th sample of it is a stratified sample: each class gets its share, to within one.

    Args:
        y: labels [samples], or numbers, which are only shuffled.

    Returns:
        Positions [samples].
    """
    # RandomState and not Generator: numpy promises its stream for all time, and digests of results stand on it.
    order = np.random.RandomState(0).permutation(len(y))
    return order[np.argsort(y[order], kind="stable")] if y.dtype.kind == "i" else order


def hold_out(y: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Splits samples in two, stratified.

    Args:
        y: labels [samples] or numbers.
        fraction: of the samples to hold out, in [0, 1); at least one sample stays on either side unless it is 0.

    Returns:
        Positions that stay and positions held out, each in ascending order.
    """
    order = spread(y)
    count = min(max(round(fraction * len(y)), 1), len(y) - 1) if fraction else 0
    picked = ((np.arange(count) + 0.5) * (len(y) / max(count, 1))).astype(int)
    return np.sort(np.delete(order, picked)), np.sort(order[picked])


def fold_of(y: np.ndarray, fold: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The i-th of k folds, stratified; together the k folds hold every sample once.

    Args:
        y: labels [samples] or numbers.
        fold: (i, k), 0 <= i < k.

    Returns:
        Positions outside the fold and positions in it, each in ascending order.
    """
    index, _ = fold
    order = spread(y)
    picked = np.arange(index, len(y), fold[1])
    return np.sort(np.delete(order, picked)), np.sort(order[picked])


def check_split(samples: int, validation: float, fold: tuple[int, int] | None, where: str) -> None:
    """Refuses splits that leave nothing to train on or nothing to validate on."""
    if not 0 <= validation < 1:
        raise UserMistake(f"{where}: validation = {validation!r}: must be at least 0 and below 1, a fraction of train")
    if fold is not None:
        index, folds = fold
        if not 2 <= folds <= samples or not 0 <= index < folds:
            raise UserMistake(
                f"{where}: fold = {list(fold)}: must be [i, k] with 0 <= i < k and 2 <= k <= {samples}, "
                "the training samples"
            )
    elif validation and samples < 2:
        raise UserMistake(f"{where}: {samples} sample cannot be split; set `validation: 0`")
