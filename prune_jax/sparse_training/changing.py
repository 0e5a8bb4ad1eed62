"""What all methods share whose masks change while they train: how many die where at which step, and the state.

How many die is a table that is made while the step is traced, from the same allocation as everywhere: the compiled step
looks a row up. Masks change in place, so that a quiet step costs what a masked one does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from prune_jax.allocation import Pool, allocate
from prune_jax.errors import UserMistake, did_you_mean
from prune_jax.masks import apply_masks, masks_of
from prune_jax.schedules import Levels
from prune_jax.scoring import prunable_paths
from prune_jax.sparse_training.bits import in_bits
from prune_jax.trees import PyTree, leaves_by_path, map_by_path, path_name, select

SCOPES = ("global", "layer", "erk")
T = TypeVar("T")


class SparseState(NamedTuple):
    """What a training method keeps."""

    masks: PyTree  # bool, shaped like the parameters; True = alive; None for leaves that stay dense
    inner: optax.OptState
    step: jax.Array  # [] int32: so many updates were made
    key: jax.Array | None  # what random numbers are drawn from, as plain integers
    memory: PyTree  # what the method remembers of weights; None if nothing


class Now(NamedTuple):
    """What a method may look at when it changes masks."""

    step: jax.Array  # [] int32
    due: jax.Array  # [] bool: whether masks change
    masks: PyTree
    params: PyTree  # as the step finds them
    gradients: PyTree  # by all weights, also the dead ones
    key: jax.Array | None  # of this step


Changed = tuple[PyTree, PyTree]  # masks; gradients, with zeros for what comes alive


class Table(NamedTuple):
    """How many die in which pool at which steps."""

    steps: np.ndarray  # [changes] int32
    paths: tuple[tuple[str, ...], ...]  # [pools]
    prune: np.ndarray  # [changes, pools] int32

    def due(self, step: jax.Array) -> jax.Array:
        """Whether there is a change at `step`."""
        return among(self.steps, step)

    def pools(self, step: jax.Array) -> tuple[Pool, ...]:
        """The pools of the last change that is not after `step`."""
        row = jnp.maximum(jnp.sum(self.steps <= step, dtype=jnp.int32) - 1, 0)
        numbers = jnp.asarray(self.prune)[row]
        return tuple(Pool(paths, numbers[i]) for i, paths in enumerate(self.paths))


def among(steps: np.ndarray, step: jax.Array) -> jax.Array:
    """Whether `step` is one of some steps that rise; those that lie evenly from the first on are not looked up."""
    gaps = np.diff(steps)
    every = int(gaps[0]) if gaps.size else 1
    even = 1 + int(np.argmax(np.append(gaps != every, True)))
    on = ((step - steps[0]) % every == 0) & (step >= steps[0]) & (step <= steps[even - 1])
    return on | jnp.any(steps[even:] == step) if even < steps.size else on


def table(masks: PyTree, levels: Levels, scope: str, min_keep: int = 0) -> Table:
    """The table of `levels` for leaves shaped like `masks`."""
    if scope not in SCOPES:
        raise UserMistake(
            f"scope {scope!r} is not possible inside a training step{did_you_mean(scope, SCOPES)} "
            f"(allowed: {', '.join(SCOPES)})"
        )
    shapes = tuple((path, jnp.shape(leaf)) for path, leaf in leaves_by_path(masks).items())
    return _table(shapes, levels, scope, min_keep)


@functools.lru_cache(maxsize=64)
def _table(shapes: tuple[tuple[str, tuple[int, ...]], ...], levels: Levels, scope: str, min_keep: int) -> Table:
    leaves = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes}
    known = sorted({min(levels.sparsities), max(levels.sparsities)}) if scope == "erk" else levels.sparsities
    rows = [allocate(leaves, scope=scope, sparsity=s, min_keep=min_keep) for s in known]
    prune = np.array([[pool.prune for pool in row] for row in rows], float)
    if scope == "erk":  # each layer goes the schedule's way between its own ends
        prune = np.stack([np.rint(np.interp(levels.sparsities, known, layer)) for layer in prune.T], axis=1)
    return Table(np.array(levels.steps, np.int32), tuple(pool.paths for pool in rows[0]), prune.astype(np.int32))


def dense_masks(params: PyTree, prunable: Iterable[str] | None, exclude: Iterable[str]) -> PyTree:
    """Masks of what may be pruned, with everything alive."""
    chosen = select(params, prunable_paths(params, prunable, exclude))
    return jax.tree.map(lambda w: jnp.ones(jnp.shape(w), bool), chosen)


def of_masked(tree: PyTree, masks: PyTree) -> PyTree:
    """`tree` with None in place of the leaves that have no mask."""
    return select(tree, leaves_by_path(masks))


def changing(
    inner: optax.GradientTransformation,
    *,
    start: Callable[[PyTree], PyTree],
    due: Callable[[PyTree, jax.Array], jax.Array],
    change: Callable[[Now], Changed],
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps `inner` in masks that change at some steps; between them it is `masked`.

    At a step that is due, masks are chosen from the weights as the step finds them; then `inner` takes its step with
    the weights that live now. One that comes alive is zero after that step, as are its moments: its gradient is taken
    to be zero once.

    Args:
        inner: any optimizer.
        start: parameters -> masks.
        due: (masks, step) -> whether masks change; steps count from 0.
        change: what masks and gradients become; by `once`, or of masks that are no longer read when the new ones are
            made, by `lax.cond`: so they stay as they are, and where they are, unless `Now.due`.
        key: what random numbers are drawn from.

    Returns:
        A transformation whose state is a `SparseState`; it stands outermost in a chain.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> SparseState:
        masks = start(params)
        state = inner.init(apply_masks(params, masks))
        return SparseState(masks, state, jnp.zeros((), jnp.int32), key_data(key), None)

    def update(
        updates: PyTree, state: SparseState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, SparseState]:
        params = needed(params)
        due_now = due(state.masks, state.step)
        masks, updates = change(Now(state.step, due_now, state.masks, params, updates, step_key(key, state)))
        alive = in_bits(masks_of(params, masks))
        moments = masked_state(state.inner, params, alive)
        steps, moved = inner.update(apply_masks(updates, alive), moments, apply_masks(params, alive), **extra)

        def step(path: str, u: jax.Array, w: jax.Array) -> jax.Array:
            return jnp.where(alive[path], u, -w) if path in alive else u  # w + (-w) is 0

        paths = map_by_path(lambda path, _: path, steps)
        return jax.tree.map(step, paths, steps, params), SparseState(masks, moved, state.step + 1, state.key, None)

    return optax.GradientTransformationExtraArgs(init, update)


def grown(masks: PyTree, before: PyTree, gradients: PyTree) -> PyTree:
    """Gradients with zeros for what comes alive."""
    old, new = leaves_by_path(before), leaves_by_path(masks)

    def rest(path: str, g: jax.Array) -> jax.Array:
        return jnp.where(new[path] & ~old[path], jnp.zeros_like(g), g) if path in new else g

    return map_by_path(rest, gradients)


def once(due: jax.Array, turn: Callable[[T], T], value: T) -> T:
    """`turn(value)` if it is due, else `value`, in place.

    `lax.cond` copies what it hands through where the turn reads the old beside the new; a loop does not, but costs 4 %
    of a step itself.
    """
    return lax.while_loop(lambda state: state[0], lambda state: (jnp.zeros((), bool), turn(state[1])), (due, value))[1]


def masked_state(state: optax.OptState, params: PyTree, alive: dict[str, jax.Array]) -> optax.OptState:
    """An optimizer's state with zeros for dead weights: in every leaf named and shaped like a masked parameter.

    Moments are found by the ends of their paths (`mu/hidden/kernel`), whatever chain, wrapper or optimizer holds them.
    """
    shapes = {path: jnp.shape(leaf) for path, leaf in leaves_by_path(params).items()}

    def of(path: tuple[Any, ...], leaf: Any) -> Any:
        ends = (path_name(path[i:]) for i in range(len(path) + 1))
        name = next((end for end in ends if end in shapes), None)  # the longest
        if name not in alive or jnp.shape(leaf) != shapes[name]:
            return leaf
        return jnp.where(alive[name], leaf, jnp.zeros_like(leaf))

    return jax.tree_util.tree_map_with_path(of, state)


def key_data(key: jax.Array | None) -> jax.Array | None:
    """A key as plain integers, which any checkpoint can hold; a copy, for the step may donate it."""
    return None if key is None else jnp.copy(jax.random.key_data(key))


def step_key(key: jax.Array | None, state: SparseState) -> jax.Array | None:
    """The key of a step, from the one in the state; `key` is one of the same kind."""
    if key is None or state.key is None:
        return None
    return jax.random.fold_in(jax.random.wrap_key_data(state.key, impl=jax.random.key_impl(key)), state.step)


def needed(params: PyTree | None) -> PyTree:
    """The parameters; refuses their absence."""
    if params is None:
        raise UserMistake("the weights are needed: call update(gradients, state, params).")
    return params
