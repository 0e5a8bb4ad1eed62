"""Random numbers that are computed wherever they are read, and never stored."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@partial(jax.tree_util.register_dataclass, data_fields=("words",), meta_fields=("shape",))
@dataclass(frozen=True)
class Draws:
    """A number in [0, 2) for each place of an array, any of the 2**30 that float32 has there: a hash of place and key.

    pcg3d of Jarzynski & Olano 2020, "Hash Functions for GPU Rendering", Journal of Computer Graphics Techniques 9(3).
    JAX's own generator takes thirty times as long, and what it fills has to be in memory.
    """

    words: jax.Array  # [2] uint32
    shape: tuple[int, ...]

    @classmethod
    def of(cls, key: jax.Array, shape: tuple[int, ...]) -> Draws:
        """The draws of a PRNG key."""
        return cls(jax.random.bits(key, (2,), jnp.uint32), shape)

    @property
    def size(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    def at(self, places: jax.Array) -> jax.Array:
        """The numbers at some places, counted as if all were laid end to end, in float32."""
        return self._of_sums(places.astype(jnp.uint32) + self.words[0] * np.uint32(sum(_steps(self.shape))))

    def part(self, part: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """The numbers of a part of the array, in float32."""
        # the key is added before anything is multiplied: XLA writes to memory what is the same in each turn of a loop
        along = (lax.broadcasted_iota(jnp.uint32, self.shape, axis) for axis in range(len(self.shape)))
        sums = (
            (place + self.words[0]) * np.uint32(step) for place, step in zip(along, _steps(self.shape), strict=True)
        )
        return self._of_sums(part(sum(sums, start=jnp.uint32(0))))

    def astype(self, dtype: jnp.dtype) -> jax.Array:
        """All of them, as an array."""
        return self.part(lambda a: a).astype(dtype)

    def _of_sums(self, sums: jax.Array) -> jax.Array:
        held = (sums, self.words[0], self.words[1])
        x, y, z = (n * np.uint32(1664525) + np.uint32(1013904223) for n in held)
        _, _, z = _mixed(*(n ^ n >> 16 for n in _mixed(x, y, z)))
        return lax.bitcast_convert_type(z >> 2, jnp.float32)


def places(shape: tuple[int, ...]) -> jax.Array:
    """The position of each element of an array if all are laid end to end."""
    along = (lax.broadcasted_iota(jnp.int32, shape, axis) * step for axis, step in enumerate(_steps(shape)))
    return sum(along, start=jnp.int32(0))


def _steps(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _mixed(x: jax.Array, y: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x = x + y * z
    y = y + z * x
    return x, y, z + x * y
