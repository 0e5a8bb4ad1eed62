"""Batch statistics anew: what pruning did to the means and variances of activations, for one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from prune_jax.models import Network, Variables
from prune_jax.trees import PyTree


def reestimate(network: Network, variables: Variables, batches: Iterable[tuple[Any, ...]], *, seed: int = 0) -> PyTree:
    """The state as batches say it is, in place of a moving average.

    A layer in training mode answers `m * old + (1 - m) * b` for the statistics `b` of its batch. With 0 and with 1 for
    `old`, that tells `m` and `b`; the new state is the mean of `b` over the batches (Li et al. 2020, EagleEye,
    arXiv:2007.02491; "precise batch norm" of Wu & Johnson 2021, arXiv:2105.07576). State of another form stays.

    Args:
        network: the network.
        variables: its weights and state.
        batches: inputs of batches, `(x,)` or `(x, lengths)`, such as those of the training split.
        seed: of dropout, which is on as in training.

    Returns:
        The new state, in the containers of the old one.
    """
    if not any(map(_is_average, jax.tree.leaves(variables.state))):
        return variables.state
    answers = partial(_answers(network), variables.params)

    def filled(value: float) -> PyTree:
        return jax.tree.map(lambda s: jnp.full_like(s, value) if _is_average(s) else s, variables.state)

    total, count, momentum = None, 0, None
    for count, inputs in enumerate(batches, 1):
        key = jax.random.fold_in(jax.random.key(seed), count)
        found = answers(filled(0.0), inputs, key)
        if momentum is None:
            momentum = jax.tree.map(jnp.subtract, answers(filled(1.0), inputs, key), found)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    if total is None or momentum is None:
        return variables.state

    def settled(old: jax.Array, summed: jax.Array, m: jax.Array) -> jax.Array:
        if not _is_average(old):
            return old
        linear = (m >= 0) & (m < 1)
        return jnp.where(linear, summed / count / jnp.where(linear, 1 - m, 1), old).astype(old.dtype)

    return jax.tree.map(settled, variables.state, total, momentum)


@lru_cache(maxsize=16)
def _answers(network: Network) -> Callable[..., PyTree]:
    """The state after a batch; compiled once for a network, whatever its weights."""
    return jax.jit(lambda params, old, inputs, key: network.apply(params, old, inputs, train=True, key=key)[1])


def _is_average(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
