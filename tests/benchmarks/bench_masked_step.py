"""The jitted training step under masks, fixed or changing, against the dense one, with donated buffers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from prune_jax.schedules import cubic
from prune_jax.scoring import mask, score
from prune_jax.sparse_training import gradual, masked, rigl, sparse_evolution
from tests.benchmarks.networks import NETWORKS, wide
from tests.benchmarks.rounds import Figure, figure, in_turns, ratio

EVERY = 100  # steps between two changes of the masks, as in the papers
PLACES = 7  # where in memory the arrays lie moves a step's time by some percent: so many times they are made anew
OPTIMIZERS = {"sgd": optax.sgd(1e-2, momentum=0.9), "adam": optax.adam(1e-3), "adamw": optax.adamw(1e-3)}


@functools.lru_cache
def _step(loss: Callable, tx: optax.GradientTransformation) -> Callable[..., Any]:
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def _stepper(
    loss: Callable, tx: optax.GradientTransformation, params: Any, batch: Any, steps: int, *, at: int | None = None
) -> Callable[[], Any]:
    """Takes so many steps; if `at` is given, the step of that number each time."""
    step = _step(loss, tx)
    held = jax.tree.map(jnp.array, [params, tx.init(params)])  # copies: the step donates them

    def run() -> Any:
        for _ in range(steps):
            if at is not None:
                held[1] = held[1]._replace(step=np.int32(at))  # a JAX array takes 0.2 ms to make
            held[0], held[1], value = step(*held, batch)
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
    methods = {"dense": OPTIMIZERS["adam"], "gradual": _gradual(), "rigl": _rigl(), "set": _set()}
    seconds: dict[str, list[float]] = {}
    for _ in range(PLACES):
        runs = {name: _stepper(loss, tx, params, batch, EVERY) for name, tx in methods.items()}
        for name, tx in methods.items():
            runs[f"{name} due"] = _stepper(loss, tx, params, batch, 8, at=None if name == "dense" else EVERY)
        times = in_turns(runs, rounds=rounds // PLACES)  # the masks change once in each call over EVERY steps
        seconds = {name: seconds.get(name, []) + times[name] for name in runs}
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    scratch = {name: _scratch(loss, tx, params, batch) for name, tx in methods.items()}
    for method in methods.keys() - {"dense"}:
        found[f"wide adam: {method} step, masks every {EVERY} / dense step"] = ratio(seconds, method, "dense")
        due = ratio(seconds, f"{method} due", "dense due")
        found[f"wide adam: {method} step that changes masks / dense step"] = due
        more = (scratch[method] - scratch["dense"]) / size
        found[f"wide adam: {method} scratch beyond the dense step's / parameters"] = figure([more])
    return found


def _scratch(loss: Callable, tx: optax.GradientTransformation, params: Any, batch: Any) -> int:
    state = jax.eval_shape(tx.init, params)
    compiled = _step(loss, tx).lower(params, state, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def _gradual() -> optax.GradientTransformation:
    return gradual(OPTIMIZERS["adam"], schedule=cubic(0.0, 0.9, begin=0, end=100_000, every=EVERY))


def _rigl() -> optax.GradientTransformation:
    return rigl(OPTIMIZERS["adam"], sparsity=0.9, every=EVERY, end=100_000, key=jax.random.key(0))


def _set() -> optax.GradientTransformation:
    return sparse_evolution(OPTIMIZERS["adam"], sparsity=0.9, every=EVERY, end=100_000, key=jax.random.key(0))
