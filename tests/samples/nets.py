"""Models as users write them, found by `tests.samples.nets:NAME`."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx


class NnxNet(nnx.Module):
    """A list of layers, batch norm, dropout and an array that is no variable."""

    def __init__(self, inputs, outputs, width=8, *, rngs):
        self.layers = nnx.List([nnx.Linear(inputs[0], width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)])
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.output = nnx.Linear(width, outputs, rngs=rngs)
        self.scale = jnp.full(outputs, 2.0)

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.output(self.dropout(self.norm(x))) * self.scale[None, :]


class Half(nnx.Module):
    """One layer whose weights and sums are float16."""

    def __init__(self, inputs, outputs, *, rngs):
        self.output = nnx.Linear(inputs[0], outputs, param_dtype=jnp.float16, dtype=jnp.float16, rngs=rngs)

    def __call__(self, x):
        return self.output(x)


class NnxRecurrent(nnx.Module):
    """`nnx.RNN` keeps a random stream of its own, and is told the lengths."""

    def __init__(self, inputs, outputs, *, rngs):
        self.rnn = nnx.RNN(nnx.GRUCell(inputs[1], 6, rngs=rngs), return_carry=True)
        self.output = nnx.Linear(6, outputs, rngs=rngs)

    def __call__(self, x, lengths=None):
        carry, _ = self.rnn(x, seq_lengths=lengths)
        return self.output(carry)


class NnxFlagged(nnx.Module):
    """Is told its mode and its random stream by keyword, and calls an attribute `train`."""

    def __init__(self, inputs, outputs, *, rngs):
        self.train = "an attribute"
        self.output = nnx.Linear(inputs[0], outputs, rngs=rngs)

    def __call__(self, x, *, deterministic, rngs=None):
        x = self.output(x)
        return x if deterministic else x + jax.random.normal(rngs.noise(), x.shape)


class LinenNet(linen.Module):
    """Batch norm and dropout, told by `train`."""

    outputs: int
    width: int = 8

    @linen.compact
    def __call__(self, x, train: bool = False):
        x = linen.relu(linen.Dense(self.width)(x))
        x = linen.BatchNorm(use_running_average=not train)(x)
        x = linen.Dropout(0.5, deterministic=not train)(x)
        return linen.Dense(self.outputs)(x)


class LinenDeterministic(linen.Module):
    """Told by `deterministic`, the other way round; has no state."""

    outputs: int

    @linen.compact
    def __call__(self, x, deterministic):
        return linen.Dense(self.outputs)(linen.Dropout(0.5, deterministic=deterministic)(x))


LINEN_INSTANCE = LinenNet(outputs=3)


def make_nnx(outputs, *, rngs):
    return NnxNet((4,), outputs, rngs=rngs)


def make_linen(width, outputs):
    return LinenNet(outputs=outputs, width=width)


class Layer(NamedTuple):
    bias: jax.Array
    kernel: jax.Array


def make_functions(inputs, outputs, width=8):
    """Of no library: named tuples in a list; drops units out in training."""

    def init(key):
        keys = jax.random.split(key)
        first = Layer(jnp.zeros(width), jax.random.normal(keys[0], (inputs[0], width)))
        return [first, Layer(jnp.zeros(outputs), jax.random.normal(keys[1], (width, outputs)))]

    def apply(params, x, *, train, key):
        x = jax.nn.relu(x @ params[0].kernel + params[0].bias[None, :])
        if train:
            x = jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * x, 0)
        return x @ params[1].kernel + params[1].bias[None, :]

    return init, apply


def make_functions_with_text():
    return lambda key: {"kernel": jnp.ones((4, 3)), "activation": "relu"}, lambda params, x: x @ params["kernel"]


def make_functions_of_one_array():
    return lambda key: jnp.ones((4, 3)), lambda params, x: x @ params


def make_without_rngs(outputs):
    return NnxNet((4,), outputs, rngs=nnx.Rngs(0))


class WrongWidth(nnx.Module):
    def __init__(self, outputs, *, rngs):
        self.output = nnx.Linear(99, outputs, rngs=rngs)

    def __call__(self, x):
        return self.output(x)


class AnswersTuple(NnxNet):
    def __call__(self, x):
        return super().__call__(x), x


NOT_A_MODEL = 3


class Residual(nnx.Module):
    """Blocks that are added to what they are made of."""

    def __init__(self, inputs, outputs, width=6, *, rngs):
        self.input = nnx.Linear(inputs[0], width, rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(width, rngs=rngs) for _ in range(2)])
        self.ups = nnx.List([nnx.Linear(width, 8, rngs=rngs) for _ in range(2)])
        self.downs = nnx.List([nnx.Linear(8, width, rngs=rngs) for _ in range(2)])
        self.output = nnx.Linear(width, outputs, rngs=rngs)

    def __call__(self, x):
        x = self.input(x)
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            x = x + down(nnx.relu(up(norm(x))))
        return self.output(x)
