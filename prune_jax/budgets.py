"""Budgets that are measured: how many units must die until the network is as fast as wanted, here and now."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from prune_jax.compaction import TracedNetwork
from prune_jax.errors import UserMistake
from prune_jax.evaluation import latencies
from prune_jax.models import Network, Variables
from prune_jax.structure import cut_network

TRIES = 7  # bisections: the share of dead units is found to within a hundredth


def within_latency(
    net: TracedNetwork,
    network: Network,
    variables: Variables,
    inputs: Callable[[int], Sequence[Any]],
    share: float,
    at: Callable[[float], Mapping[str, Sequence[int]]],
    *,
    batch_size: int = 1,
    told: Callable[[int, float], None] = lambda done, found: None,
) -> Mapping[str, Sequence[int]]:
    """The fewest dead units with which the compact network takes at most `share` of the whole one's time.

    Each candidate is compacted, compiled and timed in turns with the whole network, by the median; compiling counts for
    nothing. Times differ from machine to machine and a little from run to run, and so may the answer.

    Args:
        net: the network's trace, of `{"params", "state"}`.
        network: the network.
        variables: its weights and state.
        inputs: `inputs(batch_size) -> (x, ...)`.
        share: of the whole network's time, in (0, 1].
        at: share of dead units, in [0, 1] -> the units.
        batch_size: examples in a call.
        told: is told how many candidates were timed, and the last one's share.

    Raises:
        UserMistake: even with `min_keep` units in every group it takes longer.
    """

    def taken(dead: Mapping[str, Sequence[int]], done: int) -> float:
        small = net.compact(dead, variables._asdict())
        pair = {"whole": (network, variables), "small": (cut_network(network, small.keep), Variables(**small.params))}
        times = latencies(pair, inputs, (batch_size,), min_calls=30, min_seconds=0.1, max_seconds=1.0)
        found = times["small"][str(batch_size)]["p50"] / times["whole"][str(batch_size)]["p50"]
        told(done, found)
        return found

    low, high, best = 0.0, 1.0, at(1.0)
    fastest = taken(best, 1)
    if fastest > share:
        raise UserMistake(
            f"target.latency = {share:g} is out of reach: with min_keep units left in every group the network takes "
            f"{fastest:.2g} of the whole one's time at batch {batch_size} on {jax.devices()[0].device_kind}."
        )
    for done in range(2, TRIES + 2):
        middle = (low + high) / 2
        dead = at(middle)
        if taken(dead, done) <= share:
            high, best = middle, dead
        else:
            low = middle
    return best
