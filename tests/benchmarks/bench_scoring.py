"""One scoring pass against a plain jitted gradient pass over the same batches."""

from __future__ import annotations

from functools import partial

import jax

from prune_jax.criteria import CRITERIA
from prune_jax.scoring import prunable_paths
from prune_jax.statistics import gather
from tests.benchmarks.networks import NETWORKS
from tests.benchmarks.rounds import in_turns, ratio

CRITERIA_MEASURED = ("sensitivity", "snip", "taylor", "fisher")


def measure(rounds: int = 15) -> dict[str, float]:
    found = {}
    for name, network in NETWORKS.items():
        params, loss, batches = network(batches=24)
        gradient = jax.jit(jax.grad(loss))
        paths = prunable_paths(params)

        def plain(gradient=gradient, params=params, batches=batches):
            for batch in batches:
                answer = gradient(params, batch)
            return answer

        passes = {
            c: partial(gather, CRITERIA[c].needs, loss, params, batches, prunable=paths) for c in CRITERIA_MEASURED
        }
        seconds = in_turns({"plain": plain, "plain again": plain, **passes}, rounds=rounds)
        for other in ("plain again", *passes):
            found[f"{name}: {other} pass / gradient pass"] = ratio(seconds, other, "plain")
    return found
