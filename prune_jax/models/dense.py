"""Networks of dense layers: linear, multilayer perceptron, autoencoder. All flatten what they are given."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import jax
from flax import nnx

from prune_jax.models import settings


class Linear(nnx.Module):
    """`y = x W + b`.

    Args:
        inputs: shape of one sample.
        outputs: width of the answer.
        bias: whether there is a `b`.
        rngs: random streams.
    """

    def __init__(self, inputs: tuple[int, ...], outputs: int, *, bias: bool = True, rngs: nnx.Rngs):
        self.output = nnx.Linear(prod(inputs), outputs, use_bias=bias, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` [batch, ...] -> [batch, outputs]."""
        return self.output(x.reshape(x.shape[0], -1))


class Mlp(nnx.Module):
    """Multilayer perceptron: `widths` hidden layers, each dense, normalised (on demand), activated, dropped out.

    Args:
        inputs: shape of one sample.
        outputs: width of the answer.
        widths: units of each hidden layer; the default is LeNet-300-100 (LeCun et al. 1998).
        activation: of the hidden layers.
        output_activation: of the output layer.
        dropout: fraction of hidden units dropped in training.
        batch_norm: normalises hidden layers over the batch; their own bias, then without effect, is left out.
        bias: whether layers have biases.
        rngs: random streams.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: int,
        *,
        widths: Sequence[int] = (300, 100),
        activation: str = "relu",
        output_activation: str = "none",
        dropout: float = 0.0,
        batch_norm: bool = False,
        bias: bool = True,
        rngs: nnx.Rngs,
    ):
        settings.widths_of(widths=widths)
        self.hidden = _dense(self, "hidden", prod(inputs), widths, bias=bias and not batch_norm, rngs=rngs)
        if batch_norm:
            for i, width in enumerate(widths):
                setattr(self, f"norm_{i}", nnx.BatchNorm(width, momentum=0.9, rngs=rngs))
        self.output = nnx.Linear([prod(inputs), *widths][-1], outputs, use_bias=bias, rngs=rngs)
        self.batch_norm = batch_norm
        self.activation = settings.activation("activation", activation)
        self.output_activation = settings.activation("output_activation", output_activation)
        self.dropout = settings.dropout(dropout, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` [batch, ...] -> [batch, outputs]."""
        x = x.reshape(x.shape[0], -1)
        for i, name in enumerate(self.hidden):
            x = getattr(self, name)(x)  # [batch, widths[i]]
            if self.batch_norm:
                x = getattr(self, f"norm_{i}")(x)
            x = self.dropout(self.activation(x))
        return self.output_activation(self.output(x))


class Autoencoder(nnx.Module):
    """Squeezes `x` through a narrow code and answers a reconstruction of its shape (Hinton & Salakhutdinov 2006).

    The layers are `widths`, the code, and `widths` backwards; code and output have no activation of their own unless
    `output_activation` names one.

    Args:
        inputs: shape of one sample.
        widths: units of the encoder's layers, from the input inwards.
        code: units of the code.
        activation: of the hidden layers.
        output_activation: of the reconstruction; `sigmoid` suits pixels in [0, 1].
        dropout: fraction of hidden units dropped in training.
        bias: whether layers have biases.
        rngs: random streams.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        *,
        widths: Sequence[int] = (64, 32),
        code: int = 8,
        activation: str = "relu",
        output_activation: str = "none",
        dropout: float = 0.0,
        bias: bool = True,
        rngs: nnx.Rngs,
    ):
        settings.widths_of(widths=widths)
        settings.positive(code=code)
        size = prod(inputs)
        self.encoder = _dense(self, "encoder", size, widths, bias=bias, rngs=rngs)
        self.code = nnx.Linear([size, *widths][-1], code, use_bias=bias, rngs=rngs)
        self.decoder = _dense(self, "decoder", code, widths[::-1], bias=bias, rngs=rngs)
        self.output = nnx.Linear([code, *widths[::-1]][-1], size, use_bias=bias, rngs=rngs)
        self.activation = settings.activation("activation", activation)
        self.output_activation = settings.activation("output_activation", output_activation)
        self.dropout = settings.dropout(dropout, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` [batch, ...] -> its reconstruction [batch, ...]."""
        shape = x.shape
        x = x.reshape(shape[0], -1)
        for name in self.encoder:
            x = self.dropout(self.activation(getattr(self, name)(x)))
        x = self.code(x)  # [batch, code]
        for name in self.decoder:
            x = self.dropout(self.activation(getattr(self, name)(x)))
        return self.output_activation(self.output(x)).reshape(shape)


def _dense(
    module: nnx.Module, name: str, size: int, widths: Sequence[int], *, bias: bool, rngs: nnx.Rngs
) -> tuple[str, ...]:
    """Gives `module` dense layers `name_0`, `name_1`, ... (attributes, not a list, so that paths read well)."""
    names = tuple(f"{name}_{i}" for i in range(len(widths)))
    for layer, before, after in zip(names, [size, *widths], widths, strict=False):
        setattr(module, layer, nnx.Linear(before, after, use_bias=bias, rngs=rngs))
    return names
