"""Checks of what a recipe says about a built-in model, and the activations it can name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
from flax import nnx

from prune_jax.errors import UserMistake, did_you_mean

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nnx.relu,
    "tanh": nnx.tanh,
    "sigmoid": nnx.sigmoid,
    "gelu": nnx.gelu,
    "none": lambda x: x,
}


def activation(setting: str, name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation called `name`; `setting` is the argument that named it."""
    if name not in ACTIVATIONS:
        raise UserMistake(
            f"{setting} = {name!r} is not known{did_you_mean(name, ACTIVATIONS)} (known: {', '.join(ACTIVATIONS)})"
        )
    return ACTIVATIONS[name]


def positive(**settings: object) -> None:
    """Refuses settings that are not positive integers."""
    for name, value in settings.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserMistake(f"{name} = {value!r}: must be a positive integer")


def widths_of(**settings: Sequence[int]) -> None:
    """Refuses settings that are not lists of positive integers."""
    for name, value in settings.items():
        if not isinstance(value, list | tuple):
            raise UserMistake(f"{name} = {value!r}: must be a list of positive integers, such as [300, 100]")
        for position, width in enumerate(value):
            positive(**{f"{name}[{position}]": width})


def fraction(**settings: float) -> None:
    """Refuses settings outside [0, 1)."""
    for name, value in settings.items():
        if not isinstance(value, int | float) or not 0 <= value < 1:
            raise UserMistake(f"{name} = {value!r}: must be at least 0 and below 1")


def dropout(rate: float, rngs: nnx.Rngs) -> nnx.Dropout:
    """A dropout layer; one of rate 0 holds no random stream, so that its network is not random."""
    fraction(dropout=rate)
    return nnx.Dropout(rate, rngs=rngs if rate else None)


def image_shape(inputs: tuple[int, ...]) -> tuple[int, int, int]:
    """Height, width and channels of one image."""
    if len(inputs) != 3:
        raise UserMistake(
            f"images arrive as [height, width, channel], but one sample of x is {list(inputs)}; "
            "reshape it in the data (a grey image has one channel), or use kind mlp"
        )
    height, width, channels = inputs
    return height, width, channels
