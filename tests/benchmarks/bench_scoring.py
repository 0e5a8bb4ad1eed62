"""One scoring pass against a plain jitted gradient pass over the same batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from prune_jax.criteria import CRITERIA
from prune_jax.scoring import prunable_paths
from prune_jax.statistics import gather
from tests.benchmarks.networks import NETWORKS
from tests.benchmarks.rounds import Figure, in_turns, ratio

CRITERIA_MEASURED = ("sensitivity", "snip", "taylor", "fisher")


def _gradient_pass(gradient: Callable[..., Any], params: Any, batches: list[Any]) -> Any:
    for batch in batches:
        answer = gradient(params, batch)
    return answer


def measure(rounds: int = 15) -> dict[str, Figure]:
    found = {}
    for name, network in NETWORKS.items():
        params, loss, batches = network(batches=24)
        paths = prunable_paths(params)
        plain = partial(_gradient_pass, jax.jit(jax.grad(loss)), params, batches)

        passes = {
            c: partial(gather, CRITERIA[c].needs, loss, params, batches, prunable=paths) for c in CRITERIA_MEASURED
        }
        seconds = in_turns({"plain": plain, "plain again": plain, **passes}, rounds=rounds)
        for other in ("plain again", *passes):
            found[f"{name}: {other} pass / gradient pass"] = ratio(seconds, other, "plain")
    return found
