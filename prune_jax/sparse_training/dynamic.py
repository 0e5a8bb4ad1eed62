"""Sparse from the first step on: a fixed random network, and those that move their weights about (SET, RigL).

Every layer keeps its number of living weights to the unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from prune_jax.allocation import Pool
from prune_jax.draws import Draws
from prune_jax.errors import UserMistake
from prune_jax.masks import choose
from prune_jax.schedules import Levels
from prune_jax.selection import all_but_lowest
from prune_jax.sparse_training.changing import Changed, Now, among, changing, dense_masks, grown, once, table
from prune_jax.sparse_training.entry import method
from prune_jax.trees import PyTree, leaves_by_path, map_by_path


@method(
    "static",
    formula="a random mask of the layers' densities, fixed from the first step on",
    paper="the baseline of Evci et al. 2020, arXiv:1911.11134",
)
def static(
    inner: optax.GradientTransformation,
    *,
    sparsity: float,
    key: jax.Array,
    scope: str = "erk",
    prunable: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """Trains a random sparse network.

    Args:
        inner: any optimizer.
        sparsity: fraction that is dead, in [0, 1), of the prunable weights.
        key: a PRNG key, from which the mask is drawn.
        scope: the layers' densities: `erk`, or `layer` for the same in each.
        prunable: patterns of the leaves that may be pruned; left out, floating leaves of two axes or more.
        exclude: patterns of leaves that stay dense.

    Returns:
        A transformation whose state is a `SparseState`; it stands outermost in a chain.
    """
    return changing(
        inner,
        start=_random_start(sparsity, scope, key, prunable, exclude),
        due=lambda masks, step: jnp.zeros((), bool),
        change=lambda now: (now.masks, now.gradients),
    )


@method(
    "set",
    formula="every so many steps a share of each layer's living weights, the least |w|, dies; as many grow at random",
    paper="Mocanu et al. 2018, arXiv:1707.04780",
)
def sparse_evolution(
    inner: optax.GradientTransformation,
    *,
    sparsity: float,
    every: int,
    end: int,
    key: jax.Array,
    drop: float = 0.3,
    falling: bool = False,
    scope: str = "erk",
    prunable: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """Sparse evolutionary training: of the n_l living weights of layer l, floor(drop n_l) move to random places.

    At steps t = every, 2 every, ... < end (from 0): the least |w| die; among all that is then dead, as many grow as are
    drawn. With `falling`, floor(drop/2 (1 + cos(pi t/end)) n_l) move, as in Evci et al. 2020, arXiv:1911.11134: those
    grown last have had the least time to be of use, and are then few.

    Deviations from the paper: what grows starts at zero, not at random, and moves from the next step on; the least
    positive and the least negative weights are one set; a step may stand for an epoch.

    Args:
        inner: any optimizer.
        sparsity: fraction that is dead, in [0, 1), of the prunable weights, from the first step on.
        every: so many steps lie between two changes.
        end: from this step on masks stay.
        key: a PRNG key.
        drop: the share of the living that moves, in (0, 1).
        falling: whether the share falls from `drop` to 0 at `end`; else it stays.
        scope: the layers' densities: `erk`, or `layer` for the same in each.
        prunable: patterns of the leaves that may be pruned; left out, floating leaves of two axes or more.
        exclude: patterns of leaves that stay dense.

    Returns:
        A transformation whose state is a `SparseState`; it stands outermost in a chain.
    """
    shares = _shares(every, end, drop, falling)

    return changing(
        inner,
        start=_random_start(sparsity, scope, key, prunable, exclude),
        due=_due(shares),
        change=_move(shares, sparsity, scope, lambda g, key: Draws.of(key, g.shape)),
        key=key,
    )


@method(
    "rigl",
    formula="as set, but what grows has the largest |g|, and the share falls: drop/2 (1 + cos(pi t / end))",
    paper="Evci et al. 2020, arXiv:1911.11134",
)
def rigl(
    inner: optax.GradientTransformation,
    *,
    sparsity: float,
    every: int,
    end: int,
    key: jax.Array,
    drop: float = 0.3,
    scope: str = "erk",
    prunable: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """The rigged lottery: of the n_l living weights of layer l, floor(drop/2 (1 + cos(pi t/end)) n_l) move.

    At steps t = every, 2 every, ... < end (from 0): the least |w| die; among all that is then dead, those with the
    largest |g| grow, g the gradient of the step's batch by all weights. What grows starts at zero with zero moments,
    and moves from the next step on; what dies and grows at once stays as it is.

    Deviation from the paper: at such a step the weights that stay alive move as at any other; there, all rest.

    Args:
        inner: any optimizer.
        sparsity: fraction that is dead, in [0, 1), of the prunable weights, from the first step on.
        every: so many steps lie between two changes; the paper has 100.
        end: from this step on masks stay; the paper has three quarters of the training.
        key: a PRNG key, from which the first mask is drawn.
        drop: the share of the living that moves at first, in (0, 1).
        scope: the layers' densities: `erk`, or `layer` for the same in each.
        prunable: patterns of the leaves that may be pruned; left out, floating leaves of two axes or more.
        exclude: patterns of leaves that stay dense.

    Returns:
        A transformation whose state is a `SparseState`; it stands outermost in a chain.
    """
    shares = _shares(every, end, drop, falling=True)
    return changing(
        inner,
        start=_random_start(sparsity, scope, key, prunable, exclude),
        due=_due(shares),
        change=_move(shares, sparsity, scope, lambda g, key: g),
    )


Shares = dict[int, float]  # which share of the living moves at which step


def _shares(every: int, end: int, drop: float, falling: bool) -> Shares:
    if every < 1 or end <= every:
        raise UserMistake(f"every = {every}, end = {end}: every must be at least 1, and end after it, or nothing moves")
    if not 0 < drop < 1:
        raise UserMistake(f"drop = {drop}: must be above 0 and below 1")
    return {t: drop / 2 * (1 + math.cos(math.pi * t / end)) if falling else drop for t in range(every, end, every)}


def _due(shares: Shares) -> Callable[[PyTree, jax.Array], jax.Array]:
    steps = np.array(list(shares), np.int32)
    return lambda masks, step: among(steps, step)


def _random_start(
    sparsity: float, scope: str, key: jax.Array, prunable: Iterable[str] | None, exclude: Iterable[str]
) -> Callable[[PyTree], PyTree]:
    if scope not in ("layer", "erk"):
        raise UserMistake(f"scope {scope!r} is not possible: each layer keeps its density (allowed: layer, erk)")

    def start(params: PyTree) -> PyTree:
        dense, first = dense_masks(params, prunable, exclude), jax.random.fold_in(key, 0x5EED)  # no step's key
        keys = {path: jax.random.fold_in(first, i) for i, path in enumerate(leaves_by_path(dense))}
        drawn = map_by_path(lambda path, mask: Draws.of(keys[path], mask.shape).astype(jnp.float32), dense)
        return choose(drawn, _pools(dense, sparsity, scope))

    return start


def _pools(masks: PyTree, sparsity: float, scope: str) -> tuple[Pool, ...]:
    """How many are dead in each layer; one lives at least."""
    found = table(masks, Levels((0,), (sparsity,)), scope, 1)
    return tuple(Pool(paths, int(n)) for paths, n in zip(found.paths, found.prune[0], strict=True))


def _move(
    shares: Shares, sparsity: float, scope: str, wish: Callable[[jax.Array, Any], jax.Array | Draws]
) -> Callable[[Now], Changed]:
    """The change of masks: so many of each leaf's living die, as many grow whose |wish(g, key)| is the largest.

    Leaf by leaf, so that a leaf's quiet step waits for no other leaf's gradient.
    """

    def change(now: Now) -> Changed:
        pools = _pools(now.masks, sparsity, scope)
        sizes = {path: mask.size for path, mask in leaves_by_path(now.masks).items()}
        living = [sizes[pool.paths[0]] - pool.prune for pool in pools]
        place = {pool.paths[0]: i for i, pool in enumerate(pools)}
        moves = np.array([[math.floor(share * n) for n in living] for share in shares.values()], np.int32)
        steps = np.array(list(shares), np.int32)
        weights, gradients = leaves_by_path(now.params), leaves_by_path(now.gradients)

        def moved(path: str, mask: jax.Array) -> Changed:
            i = place[path]
            key = None if now.key is None else jax.random.fold_in(now.key, i)

            def turn(changed: Changed) -> Changed:
                alive, g = changed
                dead = pools[i].prune
                number = jnp.asarray(moves[:, i])[jnp.argmax(steps == now.step)]
                (left,) = all_but_lowest([weights[path]], [alive], dead + number, magnitude=True)
                tier = jnp.where(left, jnp.int8(2), jnp.int8(1))  # what is left stays
                (lives,) = all_but_lowest([wish(g, key)], [tier], dead, magnitude=True)
                return lives, grown(lives, alive, g)

            return once(now.due, turn, (mask, gradients[path]))

        found = {path: moved(path, mask) for path, mask in leaves_by_path(now.masks).items()}
        masks = map_by_path(lambda path, _: found[path][0], now.masks)
        return masks, map_by_path(lambda path, g: found[path][1] if path in found else g, now.gradients)

    return change
