"""Networks seen as groups, and networks cut down: the same two functions on smaller arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from prune_jax.compaction import Keep, TracedNetwork, cut, shrink, trace
from prune_jax.models import Network, Variables
from prune_jax.order import uses
from prune_jax.trees import PyTree, leaves_by_path


def groups_of(network: Network, inputs: Sequence[Any]) -> TracedNetwork:
    """The groups of a network, of its training and its resting mode together: what either ties is tied.

    Args:
        network: the network.
        inputs: shapes and types of its inputs, with a batch axis of any size.
    """
    return _traced(network, tuple(jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype) for x in inputs))


@lru_cache(maxsize=16)
def _traced(network: Network, shapes: tuple[jax.ShapeDtypeStruct, ...]) -> TracedNetwork:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return trace(
        lambda v, i, k: (_run(network, v, i, k, True), _run(network, v, i, None, False)),
        jax.eval_shape(network.init, key)._asdict(),
        shapes,
        key,
    )


def reading_order(network: Network, inputs: Sequence[Any]) -> list[str]:
    """The paths of a network's parameters in the order in which its resting forward pass uses them; idle ones last.

    Args:
        network: the network.
        inputs: shapes and types of its inputs, with a batch axis of any size.
    """
    variables = jax.eval_shape(network.init, jax.random.key(0))
    shapes = tuple(jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for x in inputs)
    forward = lambda params, state, x: network.apply(params, state, x, train=False, key=None)[0]  # noqa: E731
    used = uses(forward, variables.params, variables.state, shapes)
    return list(dict.fromkeys([*used, *leaves_by_path(variables.params)]))


def cut_network(network: Network, keep: Keep) -> Network:
    """The network on variables that were cut to `keep`; the same object for the same cut, so that it compiles once."""
    held = ((path, tuple(np.asarray(left, np.int64).tobytes() for left in axes)) for path, axes in keep.items())
    return _remembered(network, tuple(sorted(held)))


@lru_cache(maxsize=16)
def _remembered(network: Network, held: tuple[tuple[str, tuple[bytes, ...]], ...]) -> Network:
    return _cut_network(network, {path: tuple(np.frombuffer(a, np.int64) for a in axes) for path, axes in held})


def _run(network: Network, variables: Mapping[str, Any], inputs: Any, key: Any, train: bool) -> dict[str, Any]:
    outputs, state = network.apply(variables["params"], variables["state"], inputs, train=train, key=key)
    return {"outputs": outputs, "state": state}


def _cut_network(network: Network, keep: Keep) -> Network:
    shapes = jax.eval_shape(network.init, jax.random.key(0))._asdict()
    modes = {
        train: shrink(lambda v, i, k, train=train: _run(network, v, i, k, train), shapes, keep)
        for train in (True, False)
    }

    def init(key: jax.Array) -> Variables:
        return Variables(**cut(network.init(key)._asdict(), shapes, keep))

    def apply(params: PyTree, state: PyTree, inputs: Any, *, train: bool, key: Any) -> tuple[Any, Any]:
        found = modes[train]({"params": params, "state": state}, inputs, key)
        return found["outputs"], found["state"] if train else state

    return Network(init, apply)


def stored(keep: Keep, shapes: PyTree) -> dict[str, dict[str, np.ndarray]]:
    """A cut as arrays by path and axis, of the axes alone that get shorter."""
    whole = {path: leaf.shape for path, leaf in leaves_by_path(shapes).items()}
    found = {
        path: {str(d): left for d, left in enumerate(axes) if len(left) < whole[path][d]} for path, axes in keep.items()
    }
    return {path: axes for path, axes in found.items() if axes}


def restored(arrays: Mapping[str, Any], shapes: PyTree) -> Keep:
    """A cut out of what `stored` made of it."""
    named = leaves_by_path(arrays)
    whole = {path: leaf.shape for path, leaf in leaves_by_path(shapes).items()}
    return {
        path: tuple(named.get(f"{path}/{d}", np.arange(size)) for d, size in enumerate(shape))
        for path, shape in whole.items()
    }


def after(first: Keep, second: Keep) -> Keep:
    """One cut of two, the second made in what the first left."""
    return {path: tuple(a[b] for a, b in zip(axes, second[path], strict=True)) for path, axes in first.items()}
