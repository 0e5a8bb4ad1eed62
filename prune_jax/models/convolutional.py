"""Networks for images [batch, height, width, channel]: LeNet-5 and the ResNet of CIFAR-10."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from prune_jax.errors import UserMistake, did_you_mean
from prune_jax.models import settings

_HE = nnx.initializers.he_normal()  # keeps the variance through ReLU (He et al. 2015, arXiv:1502.01852)


class Cnn(nnx.Module):
    """LeNet-5 (LeCun et al. 1998): convolutions, each activated and max-pooled by 2, then dense layers.

    `widths: [20, 50], dense: [500], padding: valid` on 28x28 images is the pruning papers' LeNet-5 of 431,080 weights.

    Args:
        inputs: shape of one image, [height, width, channel].
        outputs: width of the answer.
        widths: channels of each convolution.
        dense: units of each dense layer after them.
        kernel: side of the square kernels.
        padding: `same` or `valid`.
        activation: of all hidden layers.
        dropout: fraction of dense units dropped in training.
        batch_norm: normalises convolutions over the batch; their own bias, then without effect, is left out.
        rngs: random streams.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: int,
        *,
        widths: Sequence[int] = (6, 16),
        dense: Sequence[int] = (120, 84),
        kernel: int = 5,
        padding: str = "same",
        activation: str = "relu",
        dropout: float = 0.0,
        batch_norm: bool = False,
        rngs: nnx.Rngs,
    ):
        settings.widths_of(widths=widths, dense=dense)
        settings.positive(kernel=kernel)
        if padding not in ("same", "valid"):
            near = did_you_mean(padding, ("same", "valid"))
            raise UserMistake(f"padding = {padding!r} is not known{near} (known: same, valid)")
        height, width, channels = settings.image_shape(inputs)
        for i, features in enumerate(widths):
            convolution = nnx.Conv(
                channels, features, (kernel, kernel), padding=padding.upper(), use_bias=not batch_norm, rngs=rngs
            )
            setattr(self, f"conv_{i}", convolution)
            if batch_norm:
                setattr(self, f"norm_{i}", nnx.BatchNorm(features, momentum=0.9, rngs=rngs))
            lost = kernel - 1 if padding == "valid" else 0
            height, width, channels = (height - lost) // 2, (width - lost) // 2, features
            if min(height, width) < 1:
                raise UserMistake(
                    f"images of {inputs[0]}x{inputs[1]} vanish in convolution {i} (kernel {kernel}, {padding}, "
                    "then pooled by 2); use fewer widths, a smaller kernel, or padding same"
                )
        size = height * width * channels
        for i, units in enumerate(dense):
            setattr(self, f"hidden_{i}", nnx.Linear(size, units, rngs=rngs))
            size = units
        self.output = nnx.Linear(size, outputs, rngs=rngs)
        self.layers = (len(widths), len(dense))
        self.batch_norm = batch_norm
        self.activation = settings.activation("activation", activation)
        self.dropout = settings.dropout(dropout, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` [batch, height, width, channel] -> [batch, outputs]."""
        convolutions, dense = self.layers
        for i in range(convolutions):
            x = getattr(self, f"conv_{i}")(x)  # [batch, height, width, widths[i]]
            if self.batch_norm:
                x = getattr(self, f"norm_{i}")(x)
            x = nnx.max_pool(self.activation(x), (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        for i in range(dense):
            x = self.dropout(self.activation(getattr(self, f"hidden_{i}")(x)))
        return self.output(x)


class ResNet(nnx.Module):
    """The ResNet of CIFAR-10: depth 6n + 2, three stages of n blocks with 1, 2 and 4 times `width` channels.

    He et al. 2016, arXiv:1512.03385, section 4.2. Where the shape changes, the shortcut is a 1x1 convolution (their
    option B; for CIFAR they pad with zeros), since every tie between channels is then one that can be pruned.

    Args:
        inputs: shape of one image, [height, width, channel].
        outputs: width of the answer.
        depth: layers with weights, 6n + 2: 8, 14, 20, 32, 44, 56, 110.
        width: channels of the first stage.
        rngs: random streams.
    """

    def __init__(self, inputs: tuple[int, ...], outputs: int, *, depth: int = 20, width: int = 16, rngs: nnx.Rngs):
        settings.positive(depth=depth, width=width)
        if depth < 8 or (depth - 2) % 6:
            near = 6 * max(1, round((depth - 2) / 6)) + 2
            raise UserMistake(f"depth = {depth}: must be 6n + 2 (8, 14, 20, 32, 44, 56, 110); the nearest is {near}")
        channels = settings.image_shape(inputs)[2]
        self.blocks = (depth - 2) // 2
        self.stem = _convolution(channels, width, kernel=3, stride=1, rngs=rngs)
        self.stem_norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        channels = width
        for i in range(self.blocks):
            stage, place = divmod(i, self.blocks // 3)
            after = width * 2**stage
            setattr(
                self, f"block_{i}", ResidualBlock(channels, after, stride=2 if stage and not place else 1, rngs=rngs)
            )
            channels = after
        self.output = nnx.Linear(channels, outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` [batch, height, width, channel] -> [batch, outputs]."""
        x = nnx.relu(self.stem_norm(self.stem(x)))
        for i in range(self.blocks):
            x = getattr(self, f"block_{i}")(x)
        return self.output(jnp.mean(x, axis=(1, 2)))


class ResidualBlock(nnx.Module):
    """`relu(shortcut(x) + norm(conv(relu(norm(conv(x))))))`.

    Args:
        before: channels that come in.
        after: channels that go out.
        stride: of the first convolution and the shortcut.
        rngs: random streams.
    """

    def __init__(self, before: int, after: int, *, stride: int, rngs: nnx.Rngs):
        self.conv_0 = _convolution(before, after, kernel=3, stride=stride, rngs=rngs)
        self.norm_0 = nnx.BatchNorm(after, momentum=0.9, rngs=rngs)
        self.conv_1 = _convolution(after, after, kernel=3, stride=1, rngs=rngs)
        self.norm_1 = nnx.BatchNorm(after, momentum=0.9, rngs=rngs)
        self.projects = stride != 1 or before != after
        if self.projects:
            self.shortcut = _convolution(before, after, kernel=1, stride=stride, rngs=rngs)
            self.shortcut_norm = nnx.BatchNorm(after, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` [batch, height, width, before] -> [batch, height / stride, width / stride, after]."""
        y = nnx.relu(self.norm_0(self.conv_0(x)))
        y = self.norm_1(self.conv_1(y))
        return nnx.relu(y + (self.shortcut_norm(self.shortcut(x)) if self.projects else x))


def _convolution(before: int, after: int, *, kernel: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        before, after, (kernel, kernel), strides=(stride, stride), use_bias=False, kernel_init=_HE, rngs=rngs
    )
