"""Plain JAX networks for measuring: an MLP 784-300-100-10 and a LeNet-5, with their loss and a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Network(NamedTuple):
    params: dict[str, Any]
    loss: Callable[..., jax.Array]
    batches: list[dict[str, np.ndarray]]


def mlp(batches: int = 8, batch_size: int = 64) -> Network:
    shapes = [(784, 300), (300, 100), (100, 10)]
    return Network(_params(shapes), _loss(_mlp), _batches(batches, batch_size, (784,)))


def lenet(batches: int = 8, batch_size: int = 64) -> Network:
    shapes = [(5, 5, 1, 6), (5, 5, 6, 16), (400, 120), (120, 84), (84, 10)]
    return Network(_params(shapes), _loss(_lenet), _batches(batches, batch_size, (28, 28, 1)))


def wide(batches: int = 8, batch_size: int = 128) -> Network:
    """Wide enough that a step is not mostly its dispatch."""
    shapes = [(784, 1024), (1024, 1024), (1024, 10)]
    return Network(_params(shapes), _loss(_mlp), _batches(batches, batch_size, (784,)))


NETWORKS = {"mlp": mlp, "cnn": lenet}


def _params(shapes: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        f"layer_{i}": {
            "kernel": jnp.asarray(rng.normal(0, np.prod(s[:-1]) ** -0.5, s), jnp.float32),
            "bias": jnp.zeros(s[-1]),
        }
        for i, s in enumerate(shapes)
    }


def _batches(count: int, size: int, shape: tuple[int, ...]) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [
        {"x": rng.random((size, *shape), np.float32), "y": rng.integers(0, 10, size, np.int32)} for _ in range(count)
    ]


def _loss(apply: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def loss(params: Any, batch: Any) -> jax.Array:
        log = jax.nn.log_softmax(apply(list(params.values()), batch["x"]))
        return -jnp.mean(jnp.take_along_axis(log, batch["y"][:, None], axis=1))

    return loss


def _mlp(layers: list[Any], x: jax.Array) -> jax.Array:
    for layer in layers[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
    return x @ layers[-1]["kernel"] + layers[-1]["bias"][None]


def _lenet(layers: list[Any], x: jax.Array) -> jax.Array:
    for layer, padding in zip(layers[:2], ("SAME", "VALID"), strict=True):
        x = lax.conv_general_dilated(x, layer["kernel"], (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(x + layer["bias"][None, None, None])
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return _mlp(layers[2:], x.reshape(x.shape[0], -1))
