"""Flax Linen modules as pure functions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

from prune_jax.models.network import Network, Variables, check_inputs, mode_arguments


def from_linen(module: linen.Module, inputs: tuple[jax.ShapeDtypeStruct, ...]) -> Network:
    """Makes a Linen module into a `Network`.

    The collection `params` is the params; every other collection (`batch_stats`) is the state, under its own name,
    and may change in training only.

    Args:
        module: the module, unbound.
        inputs: what the module will be called with.
    """
    call: Any = module.__call__
    check_inputs(call, len(inputs))

    def init(key: jax.Array) -> Variables:
        zeros = (jnp.zeros(x.shape, x.dtype) for x in inputs[:1])
        lengths = (jnp.ones(n.shape, n.dtype) for n in inputs[1:])
        made = module.init(_streams(key), *zeros, *lengths, **mode_arguments(call, train=False))
        collections = linen.meta.unbox(made)
        return Variables(
            collections.get("params", {}),
            {n: c for n, c in collections.items() if n not in ("params", "intermediates")},
        )

    def apply(
        params: dict[str, Any], state: dict[str, Any], inputs: tuple[Any, ...], *, train: bool, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, Any]]:
        outputs, changed = module.apply(
            {"params": params, **state},
            *inputs,
            **mode_arguments(call, train=train),
            rngs=None if key is None else _streams(key),
            mutable=list(state) if train else [],
        )
        return outputs, {**state, **changed} if train else state

    return Network(init, apply)


def _streams(key: jax.Array) -> dict[str, jax.Array]:
    """Linen falls back on `params` for streams of other names."""
    params, dropout = jax.random.split(key)
    return {"params": params, "dropout": dropout}
