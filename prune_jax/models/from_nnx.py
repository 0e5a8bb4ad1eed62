"""Flax NNX modules as pure functions.

A module is split once into a graph definition and its variables. Each call makes fresh variables inside the current
trace and merges them, because NNX refuses to update variables (batch statistics, counters of random streams) that
were made outside it.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prune_jax.models.network import Network, Variables, check_inputs, mode_arguments
from prune_jax.trees import nest

_Path = tuple[Any, ...]


def from_nnx(make: Callable[[nnx.Rngs], nnx.Module], inputs: tuple[jax.ShapeDtypeStruct, ...]) -> Network:
    """Makes an NNX module into a `Network`.

    `nnx.Param` variables are the params, random streams are derived from the key of each call, everything else that
    is a variable (batch statistics, caches) is the state. Arrays that are no variables are constants.

    Args:
        make: random streams -> module.
        inputs: what the module will be called with.
    """
    module = _blueprint(make)
    check_inputs(module.__call__, len(inputs))
    takes_rngs = "rngs" in inspect.signature(module.__call__).parameters
    nnx.Module.train(module)  # not module.train(): users call attributes `train`
    training = nnx.graphdef(module)
    nnx.Module.eval(module)
    evaluating, variables = nnx.split(module)
    slots: dict[_Path, Any] = dict(nnx.to_flat_state(variables))
    param_paths = [path for path, slot in slots.items() if isinstance(slot, nnx.Param)]
    state_paths = [
        path
        for path, slot in slots.items()
        if isinstance(slot, nnx.Variable) and not isinstance(slot, (nnx.Param, nnx.RngState))
    ]
    # Made here, outside any trace, so that a stream which is not used leaves nothing behind in the jaxpr.
    resting = {path: _resting(slot) for path, slot in slots.items() if isinstance(slot, nnx.RngState)}
    spare = jax.random.key(0)

    def init(key: jax.Array) -> Variables:
        made = _values(make(nnx.Rngs(key)))
        return Variables(_pick(made, param_paths), _pick(made, state_paths))

    def apply(
        params: dict[str, Any], state: dict[str, Any], inputs: tuple[Any, ...], *, train: bool, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, Any]]:
        if train and key is None and resting:
            raise ValueError("this network is random in training (dropout): call apply with a key.")
        values: dict[_Path, Any] = {}
        for tree, paths in ((params, param_paths), (state, state_paths)):
            values |= {path: reduce(operator.getitem, map(str, path), tree) for path in paths}
        values |= resting if key is None else _streams(resting, slots, key)
        filled = {
            path: slot.replace(values[path]) if isinstance(slot, nnx.Variable) else slot for path, slot in slots.items()
        }
        module: Any = nnx.merge(training if train else evaluating, nnx.from_flat_state(filled))
        options = mode_arguments(module.__call__, train=train)
        if takes_rngs:
            options["rngs"] = nnx.Rngs(spare if key is None else jax.random.fold_in(key, len(slots)))
        outputs = module(*inputs, **options)
        return outputs, _pick(_values(module), state_paths) if train else state

    return Network(init, apply)


def _blueprint(make: Callable[[nnx.Rngs], nnx.Module]) -> Any:
    """The module with shapes in place of arrays; if it holds arrays that are no variables, the real one."""
    bare = False

    def trace() -> nnx.Module | None:
        nonlocal bare
        module = make(nnx.Rngs(0))
        attributes = [list(vars(node).values()) for _, node in nnx.iter_modules(module)]
        leaves = jax.tree.leaves(attributes, is_leaf=lambda leaf: isinstance(leaf, (nnx.Variable, nnx.Module)))
        bare = any(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves)
        return None if bare else module

    module = nnx.eval_shape(trace)
    return make(nnx.Rngs(0)) if bare else module


def _values(module: nnx.Module) -> dict[_Path, Any]:
    slots = dict(nnx.to_flat_state(nnx.state(module)))
    return {path: slot.get_value() for path, slot in slots.items() if isinstance(slot, nnx.Variable)}


def _pick(values: dict[_Path, Any], paths: list[_Path]) -> dict[str, Any]:
    return nest({"/".join(map(str, path)): values[path] for path in paths})


def _resting(slot: Any) -> jax.Array:
    shape = slot.get_value().shape
    return _keys(jax.random.key(0), shape) if isinstance(slot, nnx.RngKey) else jnp.zeros(shape, jnp.uint32)


def _streams(resting: dict[_Path, jax.Array], slots: dict[_Path, Any], key: jax.Array) -> dict[_Path, jax.Array]:
    """One key for each random stream, its counter at zero."""
    key = jax.random.wrap_key_data(key) if key.dtype == jnp.uint32 else key
    return {
        path: _keys(jax.random.fold_in(key, number), value.shape) if isinstance(slots[path], nnx.RngKey) else value
        for number, (path, value) in enumerate(resting.items())
    }


def _keys(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.split(key, shape) if shape else key
