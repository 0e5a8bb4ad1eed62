"""Two made-up problems whose answers are known."""

from __future__ import annotations

from typing import Any

import numpy as np

from prune_jax.errors import UserMistake

MOST = 10**7  # numbers that are made up


def line(
    *, points: int = 100, slope: float = 3.0, noise: float = 0.1, distractors: int = 0, seed: int = 0
) -> dict[str, Any]:
    """`y = slope * x + noise * n`, x uniform in [-1, 1), n normal; `points` to train and as many to test.

    Args:
        points: in each split.
        slope: of the line.
        noise: standard deviation; the mean squared error cannot fall below its square.
        distractors: further inputs beside x, drawn like x, that y does not depend on.
        seed: of the points.
    """
    random = _random(points, noise, seed)
    if not isinstance(distractors, int) or not 0 <= distractors < MOST // points:
        raise UserMistake(
            f"distractors = {distractors!r}: must be an integer, at least 0, and make at most {MOST:,} numbers"
        )
    arrays: dict[str, Any] = {"note": f"y = {slope} x + noise, made up"}
    for split in ("train", "test"):
        x = random.uniform(-1, 1, (points, 1 + distractors))
        arrays |= {f"x_{split}": x, f"y_{split}": slope * x[:, :1] + noise * random.standard_normal((points, 1))}
    return arrays


def xor(*, points: int = 400, noise: float = 0.1, seed: int = 0) -> dict[str, Any]:
    """Exclusive or: points around the four corners of the unit square; y is 1.0 where exactly one input is near 1.

    Args:
        points: in each split; corners take turns.
        noise: standard deviation around the corners.
        seed: of the points.
    """
    random = _random(points, noise, seed)
    arrays: dict[str, Any] = {"note": "exclusive or, made up"}
    corners = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])[np.arange(points) % 4]
    for split in ("train", "test"):
        arrays[f"x_{split}"] = corners + noise * random.standard_normal((points, 2))
        arrays[f"y_{split}"] = (corners[:, 0] != corners[:, 1]).astype(np.float32)
    return arrays


def _random(points: int, noise: float, seed: int) -> np.random.RandomState:
    if not isinstance(points, int) or not 1 <= points <= MOST:
        raise UserMistake(f"points = {points!r}: must be an integer from 1 to {MOST:,}")
    if not isinstance(noise, int | float) or not 0 <= noise < np.inf:
        raise UserMistake(f"noise = {noise!r}: must be a number, at least 0")
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise UserMistake(f"seed = {seed!r}: must be an integer from 0 to 2**32 - 1")
    return np.random.RandomState(seed)  # numpy promises its stream for all time
