"""Methods in which dead weights live on out of sight: the optimizer trains dense weights, the network sees them masked.

What is dead can come back with a value of its own. The values of dead weights are kept in the state; so the network's
parameters are exactly zero there, at the cost of one more copy of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from prune_jax.errors import UserMistake
from prune_jax.masks import apply_masks, choose, masks_of
from prune_jax.schedules import Levels
from prune_jax.sparse_training.changing import SparseState, dense_masks, masked_state, needed, of_masked, table
from prune_jax.sparse_training.entry import method
from prune_jax.trees import PyTree, leaves_by_path, map_by_path


@method(
    "ste",
    formula="forward: the weights with the largest |w|; backward: straight through to all, w <- w - lr dL/d(m w)",
    paper="Bengio et al. 2013, arXiv:1308.3432; top-k as in Jayakumar et al. 2020, arXiv:2106.03517",
)
def ste(
    inner: optax.GradientTransformation,
    *,
    sparsity: float | Levels,
    scope: str = "global",
    prunable: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    min_keep: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Trains dense weights of which the network sees the largest, chosen anew after every step.

    w <- w - step(dL/d(m w)), for dead weights too; m = |w| is among the largest of its scope. The first masks are those
    of the weights that the transformation is initialised with.

    Args:
        inner: any optimizer.
        sparsity: fraction that is dead, in [0, 1), of the prunable weights, from the first step on; or a schedule, such
            as `pj.cubic(0.0, 0.9, begin=100, end=1000)`.
        scope: within which set weights compete: `global`, `layer`, `erk`.
        prunable: patterns of the leaves that may be pruned; left out, floating leaves of two axes or more.
        exclude: patterns of leaves that stay dense.
        min_keep: so many weights of each leaf survive.

    Returns:
        A transformation whose state is a `SparseState`; it stands outermost in a chain.
    """
    levels = sparsity if isinstance(sparsity, Levels) else Levels((0,), (sparsity,))
    if levels.steps[0] > 0:  # dense before
        levels = Levels((0, *levels.steps), (0.0, *levels.sparsities))

    def largest(params: PyTree, masks: PyTree, step: jax.Array) -> PyTree:
        pools = table(masks, levels, scope, min_keep).pools(step)
        return choose(_sizes(of_masked(params, masks)), pools, min_keep=min_keep)

    return _latent(
        inner,
        start=lambda params: largest(params, dense_masks(params, prunable, exclude), jnp.zeros((), jnp.int32)),
        due=lambda masks, step: jnp.ones((), bool),
        change=lambda step, masks, params, notes: largest(params, masks, step),
    )


@method(
    "surgery",
    formula="dead where |w| < (1 - margin) c_l, spliced back where |w| > (1 + margin) c_l, c_l = mean |w| + c std |w|",
    paper="Guo et al. 2016, arXiv:1608.04493",
)
def surgery(
    inner: optax.GradientTransformation,
    *,
    every: int,
    end: int,
    c: float = 0.5,
    margin: float = 0.1,
    begin: int = 0,
    prunable: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """Dynamic network surgery: weights die below one threshold and come back above a higher one.

    w <- w - step(dL/d(m w)), for dead weights too; after steps begin, begin + every, ... <= end (from 0), m becomes 0
    where |w| < (1 - margin) c_l, 1 where |w| > (1 + margin) c_l, and stays in between, with
    c_l = mean |w| + c std |w| of layer l as the transformation is initialised. How many die comes of itself.

    Deviation from the paper: masks change every so many steps, there with a probability that falls.

    Args:
        inner: any optimizer.
        every: so many steps lie between two changes.
        end: after this step masks stay.
        c: larger kills more.
        margin: half the width of the gap between the thresholds, relative, in [0, 1).
        begin: the first step after which masks change.
        prunable: patterns of the leaves that may be pruned; left out, floating leaves of two axes or more.
        exclude: patterns of leaves that stay dense.

    Returns:
        A transformation whose state is a `SparseState`; it stands outermost in a chain.
    """
    if every < 1 or not 0 <= begin <= end:
        raise UserMistake(f"begin = {begin}, end = {end}, every = {every}: begin <= end and at least 1 between changes")
    if not 0 <= margin < 1:
        raise UserMistake(f"margin = {margin}: must be at least 0 and below 1")

    def thresholds(params: PyTree, masks: PyTree) -> PyTree:
        found = {
            path: (jnp.mean(s), jnp.std(s)) for path, s in leaves_by_path(_sizes(of_masked(params, masks))).items()
        }
        return {path: mean + c * std for path, (mean, std) in found.items()}

    def change(step: jax.Array, masks: PyTree, params: PyTree, notes: PyTree) -> PyTree:
        sizes = leaves_by_path(_sizes(of_masked(params, masks)))

        def of(path: str, mask: jax.Array) -> jax.Array:
            kept = mask & (sizes[path] >= (1 - margin) * notes[path])
            return kept | (sizes[path] > (1 + margin) * notes[path])

        return map_by_path(of, masks)

    return _latent(
        inner,
        start=lambda params: dense_masks(params, prunable, exclude),
        due=lambda masks, step: (step >= begin) & (step <= end) & ((step - begin) % every == 0),
        change=change,
        notes=thresholds,
    )


@method(
    "movement",
    formula="s = -sum over steps of g w; at each step t of the schedule the lowest are dead, up to s(t)",
    paper="Sanh et al. 2020, arXiv:2005.07683",
)
def movement(
    inner: optax.GradientTransformation,
    *,
    schedule: Levels,
    scope: str = "global",
    prunable: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    min_keep: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Movement pruning: weights that training pushes towards zero die.

    s <- s - g w at every step, g = dL/d(m w) by all weights, straight through the mask; after each step of the
    schedule, masks are those of the highest s, so that what is dead may come back with the value that it died with.

    Deviations from the paper: s grows by g w itself, not by an optimizer of its own with a rate of its own; scores may
    compete across layers.

    Args:
        inner: any optimizer.
        schedule: sparsities, such as `pj.cubic(0.0, 0.9, begin=100, end=1000, every=10)`.
        scope: within which set scores compete: `global`, `layer`, `erk`.
        prunable: patterns of the leaves that may be pruned; left out, floating leaves of two axes or more.
        exclude: patterns of leaves that stay dense.
        min_keep: so many weights of each leaf survive.

    Returns:
        A transformation whose state is a `SparseState`; it stands outermost in a chain.
    """

    def change(step: jax.Array, masks: PyTree, params: PyTree, notes: PyTree) -> PyTree:
        del params
        return choose(notes, table(masks, schedule, scope, min_keep).pools(step), min_keep=min_keep)

    def note(notes: PyTree, gradients: PyTree, params: PyTree) -> PyTree:
        product = jax.tree.map(lambda g, w: g.astype(jnp.float32) * w.astype(jnp.float32), gradients, params)
        return jax.tree.map(jnp.subtract, notes, of_masked(product, notes))

    return _latent(
        inner,
        start=lambda params: dense_masks(params, prunable, exclude),
        due=lambda masks, step: table(masks, schedule, scope, min_keep).due(step),
        change=change,
        notes=lambda params, masks: jax.tree.map(lambda m: jnp.zeros(m.shape, jnp.float32), masks),
        note=note,
        rests=True,
    )


def _sizes(params: PyTree) -> PyTree:
    return jax.tree.map(lambda w: jnp.abs(w.astype(jnp.float32)), params)


def _latent(
    inner: optax.GradientTransformation,
    *,
    start: Callable[[PyTree], PyTree],
    due: Callable[[PyTree, jax.Array], jax.Array],
    change: Callable[[jax.Array, PyTree, PyTree, PyTree], PyTree],
    notes: Callable[[PyTree, PyTree], PyTree] = lambda params, masks: None,
    note: Callable[[PyTree, PyTree, PyTree], PyTree] = lambda notes, gradients, params: notes,
    rests: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Wraps `inner`, which trains dense weights, in masks under which they are handed out.

    Args:
        inner: any optimizer; it sees the gradient by all weights, and the dense weights.
        start: parameters -> masks.
        due: (masks, step) -> whether masks change after this step.
        change: (step, masks, dense weights after the step, notes) -> masks.
        notes: (parameters, masks) -> what is remembered beside the weights.
        note: (notes, gradients, dense weights before the step) -> notes.
        rests: whether dead weights keep the value that they died with, without moments.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> SparseState:
        masks = start(params)
        flipped = jax.tree.map(jnp.logical_not, masks)
        hidden = apply_masks(of_masked(params, masks), flipped)
        memory = {"hidden": hidden, "notes": notes(params, masks)}
        return SparseState(masks, inner.init(params), jnp.zeros((), jnp.int32), None, memory)

    def update(
        updates: PyTree, state: SparseState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, SparseState]:
        params = needed(params)
        alive, hidden = masks_of(params, state.masks), leaves_by_path(state.memory["hidden"])

        def whole(path: str, w: jax.Array) -> jax.Array:
            return jnp.where(alive[path], w, hidden[path]) if path in alive else w

        dense = map_by_path(whole, params)
        noted = note(state.memory["notes"], updates, dense)
        seen = apply_masks(updates, state.masks) if rests else updates
        steps, moved = inner.update(seen, state.inner, dense, **extra)
        if rests:
            steps = apply_masks(steps, state.masks)
        after = optax.apply_updates(dense, steps)
        masks = lax.cond(
            due(state.masks, state.step),
            change,
            lambda step, masks, after, noted: masks,
            state.step,
            state.masks,
            after,
            noted,
        )
        lives = leaves_by_path(masks)
        if rests:
            moved = masked_state(moved, params, lives)

        def step(path: str, u: jax.Array, w: jax.Array, new: jax.Array) -> jax.Array:
            if path not in lives:
                return u
            shown = jnp.where(alive[path], u, new - w)  # w is zero where it was dead, but, it may be, at the first step
            return jnp.where(lives[path], shown, -w)  # w + (-w) is 0

        paths = map_by_path(lambda path, _: path, params)
        out = jax.tree.map(step, paths, steps, params, after)
        kept = apply_masks(of_masked(after, masks), jax.tree.map(jnp.logical_not, masks))
        memory = {"hidden": kept, "notes": noted}
        return out, SparseState(masks, moved, state.step + 1, state.key, memory)

    return optax.GradientTransformationExtraArgs(init, update)
