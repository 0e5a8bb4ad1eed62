"""Training as prune_jax does it against a jitted Optax loop by hand, on the same network, data and steps."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from prune_jax.checkpoints import Steps, Store
from prune_jax.datasets import GrainSplit, load
from prune_jax.models import Network, Variables, build
from prune_jax.recipe import Optimizer, Ref
from prune_jax.scoring import mask, score
from prune_jax.training import fit
from tests.benchmarks.rounds import Figure, figure, in_turns, ratio

BATCH = 64
INTERVAL = 20.0  # seconds between step checkpoints, the default
NETWORKS: dict[str, tuple[str, dict[str, Any], int]] = {
    "mlp": ("mlp", {"widths": [300, 100]}, 20),
    "cnn": ("cnn", {}, 3),
}  # kind, arguments, epochs


def _step_of(network: Network, tx: optax.GradientTransformation) -> Callable[..., Any]:
    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        def loss_of(params: Any) -> jax.Array:
            logits, _ = network.apply(params, {}, (x,), train=True, key=None)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def _by_hand_numpy(network: Network, params: Any, x: np.ndarray, y: np.ndarray, epochs: int) -> Callable[[], Any]:
    """Each batch is cut on the host and handed to the step."""
    tx = optax.adam(1e-3)
    step = jax.jit(_step_of(network, tx), donate_argnums=(0, 1))

    def run() -> Any:
        weights = jax.tree.map(jnp.array, params)  # a copy: the step donates it
        state, history, rng = tx.init(weights), [], np.random.default_rng(0)
        for _ in range(epochs):
            order, losses = rng.permutation(len(x)), []
            for i in range(len(x) // BATCH):
                rows = order[i * BATCH : (i + 1) * BATCH]
                weights, state, loss = step(weights, state, x[rows], y[rows])
                losses.append(loss)
            history += jax.device_get(losses)
        return jax.device_get(weights)

    return run


def _by_hand_device(network: Network, params: Any, x: np.ndarray, y: np.ndarray, epochs: int) -> Callable[[], Any]:
    """The data lie on the device, and the step gathers its batch."""
    tx = optax.adam(1e-3)
    plain = _step_of(network, tx)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(weights: Any, state: Any, x: jax.Array, y: jax.Array, order: jax.Array, i: Any) -> Any:
        rows = jax.lax.dynamic_slice(order, (i * BATCH,), (BATCH,))
        return plain(weights, state, x[rows], y[rows])

    def run() -> Any:
        weights, (xs, ys) = jax.tree.map(jnp.array, params), jax.device_put((x, y))
        state, history, rng = tx.init(weights), [], np.random.default_rng(0)
        for _ in range(epochs):
            order, losses = jax.device_put(rng.permutation(len(x)).astype(np.int32)), []
            for i in range(len(x) // BATCH):
                weights, state, loss = step(weights, state, xs, ys, order, i)
                losses.append(loss)
            history += jax.device_get(losses)
        return jax.device_get(weights)

    return run


def _seconds_of_a_checkpoint(checkpoints: Steps, params: Any, tries: int = 5) -> list[float]:
    tree = {"params": params, "optimizer": optax.adam(1e-3).init(params)}
    seconds = []
    for step in range(1, tries + 1):
        start = time.perf_counter()
        checkpoints.save(step, tree)
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(rounds: int = 11) -> dict[str, Figure]:
    found = {}
    train = load("mnist5k", validation=0.1).train
    assert not isinstance(train, GrainSplit)
    x, y = np.asarray(train["x"]), np.asarray(train["y"])
    for name, (kind, args, epochs) in NETWORKS.items():
        shape = jax.ShapeDtypeStruct((1, *x.shape[1:]), np.float32)
        network = build(kind, args, inputs=(shape,), outputs=10)
        variables = jax.device_get(jax.jit(network.init)(jax.random.key(0)))
        masks = mask(score("magnitude", variables.params), sparsity=0.9)
        with tempfile.TemporaryDirectory() as folder:
            store = Store(Path(folder))
            with store.steps(Ref(kind="train", key="fit")) as steps, store.steps(Ref(kind="train", key="one")) as one:
                ours = partial(
                    fit,
                    network,
                    Variables(*variables),
                    train,
                    objective_name="classification",
                    optimizer=Optimizer(name="adam", learning_rate=1e-3),
                    batch_size=BATCH,
                    seed=0,
                    epochs=epochs,
                    checkpoints=steps,
                    checkpoint_seconds=INTERVAL,
                )
                ways: dict[str, Callable[[], Any]] = {
                    "fit": ours,
                    "fit under masks": partial(ours, masks=masks),
                    "loop on numpy batches": _by_hand_numpy(network, variables.params, x, y, epochs),
                    "loop on device data": _by_hand_device(network, variables.params, x, y, epochs),
                }
                seconds = in_turns(ways, rounds=rounds)
                checkpoint = figure([s / INTERVAL for s in _seconds_of_a_checkpoint(one, variables.params)])
        for loop in ("loop on numpy batches", "loop on device data"):
            plain = [ours / theirs for ours, theirs in zip(seconds["fit"], seconds[loop], strict=True)]
            found[f"{name}: fit / {loop}"] = figure([r * (1 + checkpoint.value) for r in plain])
        found[f"{name}: of it, a checkpoint every {INTERVAL:.0f} s"] = checkpoint
        found[f"{name}: fit under masks / fit"] = ratio(seconds, "fit under masks", "fit")
        found[f"{name}: one step of fit"] = figure(
            [1000 * s / (epochs * (len(x) // BATCH)) for s in seconds["fit"]], "ms"
        )
    return found
