"""Masks: choosing them from scores, putting them on weights, counting what lives. `True` is alive."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prune_jax.allocation import Pool
from prune_jax.errors import LayerCollapseError, NonFiniteScoreError, UserMistake, did_you_mean
from prune_jax.granularity import has_groups
from prune_jax.selection import all_but_lowest, n_of_m
from prune_jax.trees import PyTree, leaves_by_path, map_by_path


def choose(
    scores: PyTree, pools: Iterable[Pool], *, alive: PyTree | None = None, min_keep: int = 0, magnitude: bool = False
) -> PyTree:
    """Masks the `pool.prune` lowest scores of every pool, exactly, and by position among equals: the first die first.

    What is dead in `alive` dies first and stays dead, also where more is dead already than a pool asks for.

    Args:
        scores: arrays of finite numbers; leaves that are in no pool stay dense.
        pools: leaves that compete with one another and how many of their units die; a traced number will do.
        alive: earlier masks of the same shapes; leaves that it lacks count as alive.
        min_keep: so many units of each leaf of a pool survive whatever their scores, those with the highest.
        magnitude: whether |score| counts; not for pools by output.

    Returns:
        Bool arrays shaped like `scores`.
    """
    leaves = {path: jnp.asarray(leaf) for path, leaf in leaves_by_path(scores).items()}
    living = {path: jnp.asarray(mask, bool) for path, mask in leaves_by_path(alive).items() if path in leaves}
    chosen: dict[str, jax.Array] = {}
    for pool in pools:
        if sum(leaves[path].size for path in pool.paths) > np.iinfo(np.int32).max:
            raise UserMistake(
                "more than 2**31 - 1 units compete in one pool, more than can be counted; choose the scope layer."
            )
        tiers = [living.get(path) for path in pool.paths]
        if pool.by_output:
            held = zip(pool.paths, tiers, strict=True)
            chosen |= {path: _by_output(leaves[path], tier, int(pool.prune)) for path, tier in held}
            continue
        if min_keep:
            tiers = [
                _protect(leaves[path], tier, min_keep, magnitude) for path, tier in zip(pool.paths, tiers, strict=True)
            ]
        found = all_but_lowest([leaves[path] for path in pool.paths], tiers, pool.prune, magnitude=magnitude)
        chosen |= zip(pool.paths, found, strict=True)

    def mask(path: str, leaf: Any) -> jax.Array:
        found = chosen.get(path, jnp.ones(jnp.shape(leaf), bool))
        return found & living[path] if path in living else found

    return map_by_path(mask, scores)


def choose_n_of_m(scores: PyTree, n: int, m: int, axis: int = -2, *, alive: PyTree | None = None) -> PyTree:
    """Masks all but the n highest of each m weights that follow one another along an axis, left out the inputs, -2.

    Of equal ones the first die. What is dead in `alive` dies first and stays dead. Where m does not divide the axis,
    at most n of the last, shorter group live. Leaves of fewer than two axes, or than m along this one, stay dense.

    Args:
        scores: arrays `[.., in, out]` of finite numbers.
        n: how many of each group live.
        m: how many weights are a group.
        axis: along which a group lies, counted from the front or, below 0, from the end.
        alive: earlier masks of the same shapes; leaves that it lacks count as alive.

    Returns:
        Bool arrays shaped like `scores`.
    """
    living = {path: jnp.asarray(mask, bool) for path, mask in leaves_by_path(alive).items()}

    def mask(path: str, leaf: Any) -> jax.Array:
        leaf, tier = jnp.asarray(leaf), living.get(path)
        found = _along(leaf, tier, n, m, axis) if has_groups(leaf.shape, m, axis) else jnp.ones(leaf.shape, bool)
        return found if tier is None else found & tier

    return map_by_path(mask, scores)


def _along(leaf: jax.Array, tier: jax.Array | None, n: int, m: int, axis: int) -> jax.Array:
    moved, held = (None if a is None else jnp.moveaxis(a, axis, -2) for a in (leaf, tier))
    return jnp.moveaxis(n_of_m(moved, held, n, m), -2, axis)


def _by_output(leaf: jax.Array, alive: jax.Array | None, prune: int) -> jax.Array:
    """All but so many of the lowest along the last axis, each by itself."""
    rows = math.prod(leaf.shape[:-1])
    if prune in (0, rows):
        return jnp.full(leaf.shape, prune == 0)
    tier = None if alive is None else alive.reshape(rows, -1)
    return n_of_m(leaf.reshape(rows, -1), tier, rows - prune, rows).reshape(leaf.shape)


def _protect(leaf: jax.Array, alive: jax.Array | None, min_keep: int, magnitude: bool) -> jax.Array:
    """Tiers of `all_but_lowest`: 0 dead, 1 competes, 2 among the `min_keep` highest of what lives."""
    highest = all_but_lowest([leaf], [alive], max(leaf.size - min_keep, 0), magnitude=magnitude)[0]
    tier = jnp.where(highest, jnp.int8(2), jnp.int8(1))
    return tier if alive is None else jnp.where(alive, tier, jnp.int8(0))


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
    """Puts zeros where masks are `False`, NaN and infinity included: w -> w if alive else 0.

    Args:
        params: any pytree of arrays.
        masks: bool arrays under the same paths; leaves that it lacks, or that are None, stay as they are.

    Returns:
        `params` with zeros; the leaves' types are kept.

    >>> apply_masks({"w": jnp.array([1.0, jnp.nan]), "b": jnp.ones(1)}, {"w": jnp.array([True, False])})["w"]
    Array([1., 0.], dtype=float32)
    """
    by_path = masks_of(params, masks)
    return map_by_path(lambda path, w: jnp.where(by_path[path], w, jnp.zeros_like(w)) if path in by_path else w, params)


def masks_of(params: PyTree, masks: PyTree) -> dict[str, jax.Array]:
    """The masks by their paths, each held against the leaf of `params` that it belongs to."""
    by_path = leaves_by_path(masks)
    leaves = leaves_by_path(params)
    for path, mask in by_path.items():
        if path not in leaves:
            raise UserMistake(
                f"a mask is named {path!r} but no parameter is{did_you_mean(path, leaves)} "
                f"(parameters: {', '.join(leaves)})"
            )
        if jnp.shape(mask) != jnp.shape(leaves[path]):
            raise UserMistake(
                f"the mask of {path!r} is {list(jnp.shape(mask))} but the parameter {list(jnp.shape(leaves[path]))}; "
                "to mask weights by scores of neurons, call pj.mask(..., granularity='neuron', params=params)."
            )
    return by_path


@jax.jit
def _living(leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: jnp.sum(mask, dtype=jnp.int32) for path, mask in leaves.items()}


def counts(masks: PyTree) -> dict[str, tuple[int, int]]:
    """How many live, and how many there are, of each masked leaf.

    >>> counts({"w": jnp.array([True, False, True]), "b": None})
    {'w': (2, 3)}
    """
    leaves = {path: jnp.asarray(mask) for path, mask in leaves_by_path(masks).items()}
    living = jax.device_get(_living(leaves))
    return {path: (int(living[path]), mask.size) for path, mask in leaves.items()}


def sparsity(masks: PyTree) -> float:
    """The fraction pruned of the masked weights.

    >>> sparsity({"w": jnp.array([True, False, False, False])})
    0.75
    """
    found = counts(masks).values()
    total = sum(size for _, size in found)
    return 1 - sum(living for living, _ in found) / total if total else 0.0


@jax.jit
def _bad(leaves: Mapping[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    bad = {path: ~jnp.isfinite(jnp.ravel(leaf)) for path, leaf in leaves.items()}
    return {path: (jnp.sum(b, dtype=jnp.int32), jnp.argmax(b)) for path, b in bad.items()}


def check_finite(scores: PyTree, criterion: str = "") -> None:
    """Raises `NonFiniteScoreError` when a score is NaN or infinite, naming the first such leaf."""
    leaves = {path: jnp.asarray(leaf) for path, leaf in leaves_by_path(scores).items()}
    for path, (bad, first) in jax.device_get(_bad(leaves)).items():
        if bad:
            leaf = leaves[path]
            where = tuple(int(i) for i in np.unravel_index(int(first), leaf.shape))
            what = f"Criterion {criterion!r} gave" if criterion else "There are"
            raise NonFiniteScoreError(
                f"{what} {bad} of {leaf.size} non-finite scores in {path!r} {list(leaf.shape)}, the first at {where}. "
                "The weights, a batch or the loss hold NaN, infinity or numbers near the largest float: "
                "look at them with jnp.isfinite, scale the data, or train with a smaller learning rate."
            )


def check_collapse(masks: PyTree) -> None:
    """Raises `LayerCollapseError` when a leaf has no living unit left, naming all such leaves."""
    found = counts(masks)
    dead = [path for path, (living, size) in found.items() if size and not living]
    if dead:
        sizes = ", ".join(f"{path!r} (all {found[path][1]})" for path in dead)
        raise LayerCollapseError(
            f"Pruning would leave nothing alive in {sizes}, at a sparsity of {sparsity(masks):.4g} over all layers. "
            "Set min_keep to 1 or more, choose scope erk or layer, exclude the layer, or prune less."
        )
