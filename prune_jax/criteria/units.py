"""Criteria of whole units: what only a channel, a neuron or a head has, and no single weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from prune_jax.criteria.entry import criterion
from prune_jax.errors import UserMistake
from prune_jax.groups import Group
from prune_jax.statistics import Loss

Leaves = Mapping[str, Any]
Scores = dict[str, np.ndarray]


@criterion(
    "bn_scale",
    formula="sum |gamma| of the unit's norm layers",
    paper="Liu et al. 2017, arXiv:1708.06519",
    granularities=("group",),
    combine="unit",
)
def bn_scale(groups: Mapping[str, Group], leaves: Leaves) -> Scores:
    """The scales of batch, layer or other norms that a unit goes through: s = sum |gamma|.

    Args:
        groups: name -> group.
        leaves: path -> parameter; a norm's scale is one of one axis, called `scale` or `gamma`.

    Returns:
        Group -> scores `[units]`, float32, >= 0; groups without a norm are left out, and stay.

    Raises:
        UserMistake: no group has one.
    """
    found: Scores = {}
    for name, group in groups.items():
        scales = [(leaves[path], places) for path, _, places in group.members if path in leaves and _is_scale(path)]
        if scales:
            found[name] = sum(np.abs(np.asarray(scale, np.float32))[places].sum(axis=1) for scale, places in scales)
    if not found:
        raise UserMistake("no group goes through a norm with a scale; choose magnitude, taylor or fpgm.")
    return found


def _is_scale(path: str) -> bool:
    return any(part in ("scale", "gamma") for part in path.split("/")[-2:])


@criterion(
    "fpgm",
    formula="sum over the units j of the group of ||w_i - w_j||_2",
    paper="He et al. 2019, arXiv:1811.00250",
    granularities=("group",),
    combine="unit",
)
def fpgm(groups: Mapping[str, Group], leaves: Leaves) -> Scores:
    """How far a unit is from all others: those near the geometric median can be spared, since others stand for them.

    The weights of a unit are all that it holds in kernels, of what writes it and of what reads it; the paper takes what
    writes it alone.

    Args:
        groups: name -> group.
        leaves: path -> parameter.

    Returns:
        Group -> scores `[units]`, float32, >= 0, in units of the weights.
    """
    found: Scores = {}
    for name, group in groups.items():
        rows = [
            np.moveaxis(np.asarray(leaves[path], np.float32), axis, 0)[places].reshape(group.size, -1)
            for path, axis, places in group.members
            if path in leaves and np.ndim(leaves[path]) > 1
        ]
        if rows:
            w = jnp.asarray(np.concatenate(rows, axis=1))  # [units, weights]
            squares = jnp.sum(w * w, axis=1)
            distances = jnp.maximum(squares[:, None] + squares[None] - 2 * w @ w.T, 0)  # [units, units]
            found[name] = np.asarray(jnp.sum(jnp.sqrt(distances), axis=1))
    return found


@criterion(
    "oracle",
    formula="L(without the unit) - L",
    paper="Molchanov et al. 2017, arXiv:1611.06440, section 2.2",
    granularities=("group", "layer"),
    combine="unit and loss",
    cost="1 forward pass a unit",
)
def oracle(groups: Mapping[str, Group], leaves: Leaves, *, loss: Loss, batches: Iterable[Any]) -> Scores:
    """The change of the loss when a unit is taken away, exactly: one pass over the batches for each unit.

    Args:
        groups: name -> group.
        leaves: path -> parameter.
        loss: `loss(leaves, batch) -> scalar`, a mean over the batch's examples.
        batches: pytrees of arrays whose leading axis counts examples; kept on the device.

    Returns:
        Group -> scores `[units]`, float32, in units of the loss; negative where the network is better off without.
    """
    loss = loss if isinstance(loss, Partial) else Partial(loss)
    held = [jax.device_put(batch) for batch in batches]
    counts = [jax.tree.leaves(batch)[0].shape[0] for batch in held]
    if not held:
        raise UserMistake("there are no batches to measure the loss on; give at least one.")

    def mean(values: list[jax.Array]) -> jax.Array:
        return sum(count * value for count, value in zip(counts, values, strict=True)) / sum(counts)

    whole = mean([_value(loss, dict(leaves), batch) for batch in held])
    found: Scores = {}
    for name, group in groups.items():
        axes = tuple((path, axis) for path, axis, _ in group.members if path in leaves)
        places = {f"{path}[{axis}]": jnp.asarray(p) for path, axis, p in group.members if path in leaves}
        found[name] = np.asarray(
            mean([_without(loss, dict(leaves), places, batch, axes=axes) for batch in held]) - whole
        )
    return found


_value = jax.jit(lambda loss, leaves, batch: loss(leaves, batch))


@partial(jax.jit, static_argnames="axes")
def _without(
    loss: Loss, leaves: Leaves, places: Mapping[str, jax.Array], batch: Any, *, axes: tuple[tuple[str, int], ...]
) -> jax.Array:
    """Losses `[units]`, one unit after the other so that memory stays that of one network."""

    def one(rows: Mapping[str, jax.Array]) -> jax.Array:
        cut = dict(leaves)
        for path, axis in axes:
            cut[path] = cut[path].at[(slice(None),) * axis + (rows[f"{path}[{axis}]"],)].set(0)
        return loss(cut, batch)

    return jax.lax.map(one, places)
