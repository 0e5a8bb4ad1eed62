"""What an optimizer has gathered of past gradients, by name: `mu/hidden_0/kernel`, `trace/...`, Adam's `count`.

Free of how Optax chains its parts, so that it goes from one training to the next: the schedule of the learning rate
belongs to each training and is not among them.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
from jax.tree_util import GetAttrKey

from prune_jax.errors import UserMistake
from prune_jax.trees import PyTree, leaves_by_path, nest, path_name


def moments_of(state: optax.OptState) -> dict[str, Any]:
    """The moments in the state of an optimizer, as nested dicts.

    >>> params = {"w": jax.numpy.ones(2)}
    >>> sorted(leaves_by_path(moments_of(optax.adam(1e-3).init(params))))
    ['count', 'mu/w', 'nu/w']
    """
    return nest({name: leaf for name, leaf in _named(state) if name})


def with_moments(state: optax.OptState, moments: PyTree) -> optax.OptState:
    """The state of an optimizer with these moments in place of its own.

    Raises:
        UserMistake: the optimizer has other moments, or of other shapes.
    """
    given = leaves_by_path(moments)
    own = {name: leaf for name, leaf in _named(state) if name}
    unlike = [n for n in own if n not in given or np.shape(own[n]) != np.shape(given[n])] + sorted(given.keys() - own)
    if unlike:
        raise UserMistake(f"the moments are not those of this optimizer and network: {unlike[0]} differs")
    leaves = [given[name] if name else leaf for name, leaf in _named(state)]
    return jax.tree.unflatten(jax.tree.structure(state, is_leaf=_is_schedule), leaves)


def masked_moments(moments: PyTree, masks: PyTree) -> PyTree:
    """Zeros in place of the moments of pruned weights; leaves without a mask stay as they are."""
    alive = leaves_by_path(masks)

    def of(name: str, leaf: Any) -> Any:
        _, _, path = name.partition("/")
        return np.where(alive[path], leaf, np.zeros_like(leaf)) if path in alive else leaf

    return nest({name: of(name, leaf) for name, leaf in leaves_by_path(moments).items()})


def _named(state: optax.OptState) -> list[tuple[str, Any]]:
    """The leaves of a state by name, from the field of their part on; a schedule is one leaf without a name."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state, is_leaf=_is_schedule):
        field = next((i for i, key in enumerate(path) if isinstance(key, GetAttrKey)), len(path))
        found.append(("" if _is_schedule(leaf) else path_name(path[field:]), leaf))
    return found


def _is_schedule(part: Any) -> bool:
    return isinstance(part, optax.ScaleByScheduleState)
