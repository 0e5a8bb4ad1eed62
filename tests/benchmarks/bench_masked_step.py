"""The jitted training step under masks, fixed or changing, against the dense one, with donated buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from prune_jax.schedules import cubic
from prune_jax.scoring import mask, score
from prune_jax.sparse_training import gradual, masked, rigl
from tests.benchmarks.networks import NETWORKS, wide
from tests.benchmarks.rounds import Figure, in_turns, ratio

EVERY = 100  # steps between two changes of the masks, as in the papers
OPTIMIZERS = {"sgd": optax.sgd(1e-2, momentum=0.9), "adam": optax.adam(1e-3), "adamw": optax.adamw(1e-3)}


def _stepper(
    loss: Callable, tx: optax.GradientTransformation, params: Any, batch: Any, steps: int
) -> Callable[[], Any]:
    def step(params: Any, state: Any, batch: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    jitted = jax.jit(step, donate_argnums=(0, 1))
    held = jax.tree.map(jnp.array, [params, tx.init(params)])  # copies: the step donates them

    def run() -> Any:
        for _ in range(steps):
            held[0], held[1], value = jitted(*held, batch)
        return value

    return run


def measure(rounds: int = 21) -> dict[str, Figure]:
    found = {}
    for name, network in NETWORKS.items():
        params, loss, batches = network(batches=1)
        masks = mask(score("magnitude", params), sparsity=0.9)
        batch = jax.tree.map(lambda a: jax.device_put(np.asarray(a)), batches[0])
        for optimizer, tx in OPTIMIZERS.items():
            steps = 40 if name == "mlp" else 6
            dense = _stepper(loss, tx, params, batch, steps)
            again = _stepper(loss, tx, params, batch, steps)
            sparse = _stepper(loss, masked(tx, masks), params, batch, steps)
            seconds = in_turns({"dense": dense, "again": again, "sparse": sparse}, rounds=rounds)
            found[f"{name} {optimizer}: masked step / dense step"] = ratio(seconds, "sparse", "dense")
            found[f"{name} {optimizer}: dense step / dense step"] = ratio(seconds, "again", "dense")
    params, loss, batches = wide(batches=1)
    batch = jax.tree.map(lambda a: jax.device_put(np.asarray(a)), batches[0])
    methods = {"dense": OPTIMIZERS["adam"], "gradual": _gradual(), "rigl": _rigl()}
    runs = {name: _stepper(loss, tx, params, batch, EVERY) for name, tx in methods.items()}
    seconds = in_turns(runs, rounds=rounds // 3)  # the masks change once in each call
    for method in ("gradual", "rigl"):
        found[f"wide adam: {method} step, masks every {EVERY} / dense step"] = ratio(seconds, method, "dense")
    return found


def _gradual() -> optax.GradientTransformation:
    return gradual(OPTIMIZERS["adam"], schedule=cubic(0.0, 0.9, begin=0, end=100_000, every=EVERY))


def _rigl() -> optax.GradientTransformation:
    return rigl(OPTIMIZERS["adam"], sparsity=0.9, every=EVERY, end=100_000, key=jax.random.key(0))
