"""Exact selection of the k lowest of n scores, in units of one read of the scores, and against sorting."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import cycle

import jax
import jax.numpy as jnp
import numpy as np

from prune_jax.selection import all_but_lowest
from tests.benchmarks.rounds import Figure, figure, in_turns, ratio

SORTED = 1_000_000  # more would take seconds


def measure(rounds: int = 14) -> dict[str, Figure]:
    found = {}
    for size in (SORTED, 10_000_000, 50_000_000):
        scores = jnp.asarray(np.abs(np.random.default_rng(0).standard_normal(size, np.float32))).reshape(1000, -1)
        host, total = np.asarray(scores), jax.jit(jnp.sum)
        k = size * 9 // 10
        living = sum(int(jnp.sum(mask, dtype=jnp.int32)) for mask in all_but_lowest([jnp.round(scores, 2)], [None], k))
        if living != size - k:
            raise AssertionError(f"{living} of {size} scores with ties live, not {size - k}")
        some = cycle(k - i * size // 1000 for i in range(7))  # how many passes it takes is luck; so 89.4 to 90 %
        again = cycle(k - i * size // 1000 for i in range(7))
        ways = {
            "choose": lambda s=scores, some=some: all_but_lowest([s], [None], next(some)),
            "choose in place": partial(_in_place, scores, [jnp.ones(scores.shape, bool)], again),
            "read": lambda s=scores, total=total: total(s),
            "np.partition": lambda h=host, k=k: np.partition(h.ravel(), k)[k] <= h,
        }
        if size == SORTED:
            argsort = jax.jit(lambda s: jnp.argsort(s.ravel()))
            ways["argsort"] = lambda s=scores, argsort=argsort: argsort(s)
        seconds = in_turns(ways, rounds=rounds)
        scratch = jax.jit(lambda s, k=k: all_but_lowest([s], [None], k)).lower(scores).compile().memory_analysis()
        found[f"{size:,} scores: scratch of a score"] = figure([scratch.temp_size_in_bytes / size], "bytes")
        for way in ways.keys() - {"choose", "choose in place"}:
            found[f"{size:,} scores: selection / {way}"] = ratio(seconds, "choose", way)
        found[f"{size:,} scores: selection in place / read"] = ratio(seconds, "choose in place", "read")
    return found


def _in_place(scores: jax.Array, held: list[jax.Array], numbers: Iterator[int]) -> jax.Array:
    """Into the memory of the masks of before, as a training step does; new memory costs two reads or more to get."""
    held[0] = _chosen(scores, held[0], next(numbers))
    return held[0]


@partial(jax.jit, donate_argnums=1, keep_unused=True)
def _chosen(scores: jax.Array, before: jax.Array, k: int) -> jax.Array:
    return all_but_lowest([scores], [None], k)[0]
