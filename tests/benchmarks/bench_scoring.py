"""One scoring pass against a plain jitted gradient pass over the same batches.

Fisher scores take the gradient of each example by itself, which no pass over batches gives: they are judged against the
pass that one would write for that, `vmap` of `grad`, and shown against the plain one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

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


def _example_squares(loss: Callable[..., Any], params: Any, batch: Any) -> Any:
    def of_one(example: Any) -> Any:
        return jax.grad(loss)(params, jax.tree.map(lambda a: a[None], example))

    return jax.tree.map(lambda g: jnp.sum(g * g, axis=0), jax.vmap(of_one)(batch))


def measure(rounds: int = 15) -> dict[str, Figure]:
    found = {}
    for name, network in NETWORKS.items():
        params, loss, batches = network(batches=24)
        paths = prunable_paths(params)
        by_example = partial(_gradient_pass, jax.jit(partial(_example_squares, loss)), params, batches)
        plain = partial(_gradient_pass, jax.jit(jax.grad(loss)), params, batches)

        passes = {
            c: partial(gather, CRITERIA[c].needs, loss, params, batches, prunable=paths) for c in CRITERIA_MEASURED
        }
        seconds = in_turns({"plain": plain, "plain again": plain, "by example": by_example, **passes}, rounds=rounds)
        for other in ("plain again", *passes):
            found[f"{name}: {other} pass / gradient pass"] = ratio(seconds, other, "plain")
        found[f"{name}: fisher pass / pass by example"] = ratio(seconds, "fisher", "by example")
    return found
