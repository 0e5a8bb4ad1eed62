"""Two plain functions as a network: how models of other libraries, or of none, come in."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax

from prune_jax.errors import UserMistake
from prune_jax.models.network import Network, Variables, check_inputs, mode_arguments
from prune_jax.trees import leaves_by_path, nest


def from_functions(
    init: Callable[[jax.Array], Any], apply: Callable[..., Any], inputs: tuple[jax.ShapeDtypeStruct, ...]
) -> Network:
    """Makes `init(key) -> params` and `apply(params, x) -> outputs` into a `Network` without state.

    `params` is any pytree of arrays: dicts, lists, named tuples, an Equinox module without what is no array. Each
    leaf is named by its path, `layers/0/weight`. `apply` is told its mode by `train` (or another of the names that
    Flax modules use), and given a PRNG key as `key`, if it takes keywords of these names.

    Args:
        init: the same key gives the same arrays.
        apply: the forward pass, on a batch.
        inputs: what it will be called with.
    """
    check_inputs(partial(apply, None), len(inputs))
    try:
        shapes = jax.eval_shape(init, jax.random.key(0))
    except TypeError as error:
        raise UserMistake(
            f"init does not answer a pytree of arrays alone ({error}); part what is no array from it, as "
            "`eqx.partition(model, eqx.is_array)` does"
        ) from error
    paths = tuple(leaves_by_path(shapes))
    if "" in paths:
        raise UserMistake("init answers one bare array; put it in a dict, whose name becomes the parameter's")
    structure = jax.tree.structure(shapes)

    def named(key: jax.Array) -> Variables:
        return Variables(nest(leaves_by_path(init(key))), {})

    def forward(
        params: dict[str, Any], state: dict[str, Any], inputs: tuple[Any, ...], *, train: bool, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, Any]]:
        leaves = [reduce(operator.getitem, path.split("/"), params) for path in paths]
        options = mode_arguments(apply, train=train)
        if "key" in inspect.signature(apply).parameters:
            options["key"] = key
        return apply(jax.tree.unflatten(structure, leaves), *inputs, **options), state

    return Network(named, forward)
