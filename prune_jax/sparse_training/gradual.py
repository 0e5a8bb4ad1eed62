"""Masks that follow a schedule of sparsities while the weights train: gradual pruning, and AC/DC."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from prune_jax.criteria import CRITERIA, Criterion, find
from prune_jax.errors import UserMistake
from prune_jax.masks import choose
from prune_jax.schedules import Levels, alternating
from prune_jax.sparse_training.changing import Changed, Now, changing, dense_masks, grown, of_masked, once, table
from prune_jax.sparse_training.entry import method
from prune_jax.statistics import Statistics
from prune_jax.trees import PyTree

# What one batch's gradient says of the means over batches that criteria ask for.
OF_ONE_BATCH = {"gradient": lambda g: g, "gradient_abs": jnp.abs, "gradient_square": jnp.square}


@method(
    "gradual",
    formula="at each step t of the schedule the lowest scores die, up to s(t); what is dead stays dead",
    paper="Zhu & Gupta 2017, arXiv:1710.01878",
)
def gradual(
    inner: optax.GradientTransformation,
    *,
    schedule: Levels,
    criterion: str | Criterion = "magnitude",
    scope: str = "global",
    prunable: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    min_keep: int = 0,
    options: Mapping[str, Any] | None = None,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Prunes by and by, inside the training step, until the schedule's last sparsity is reached.

    At each step t of the schedule, masks = choose(score(w, g), s(t)): exactly so many are dead in every scope. Between
    those steps, and after the last, masks stay. Before the first all is dense. In scope `erk` each layer goes the
    schedule's way from its own first sparsity to its own last, as in the paper, rounded; shared out anew at each step,
    small layers would die late and fast.

    Deviations from the paper: scores may compete across layers (there, each layer has the sparsity); what is dead stays
    dead whatever its score.

    Args:
        inner: any optimizer.
        schedule: sparsities that do not fall, such as `pj.cubic(0.0, 0.9, begin=100, end=1000, every=10)`.
        criterion: a name, or an entry; one that needs gradients gets the gradient of the step's own batch.
        scope: within which set scores compete: `global`, `layer`, `erk`.
        prunable: patterns of the leaves that may be pruned; left out, floating leaves of two axes or more.
        exclude: patterns of leaves that stay dense.
        min_keep: so many weights of each leaf survive whatever their scores.
        options: of the criterion.
        key: a PRNG key, for a criterion that draws random numbers.

    Returns:
        A transformation whose state is a `SparseState`; it stands outermost in a chain.

    >>> from prune_jax.schedules import cubic
    >>> params = {"w": jnp.array([3.0, 1.0, 2.0, -4.0])}
    >>> tx = gradual(optax.sgd(0.25), schedule=cubic(0.0, 0.5, begin=0, end=1))
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...     updates, state = tx.update({"w": jnp.ones(4)}, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> state.masks["w"], params["w"]
    (Array([ True, False, False,  True], dtype=bool), Array([ 2.5,  0. ,  0. , -4.5], dtype=float32))
    """
    entry = find(criterion) if isinstance(criterion, str) else criterion
    given = dict(options or {})
    check_criterion(entry, given)
    if entry.stochastic and key is None:
        raise UserMistake(f"criterion {entry.name!r} draws random numbers: give key=, such as jax.random.key(0).")
    if any(later < earlier for earlier, later in pairwise(schedule.sparsities)):
        raise UserMistake("the sparsities of a gradual schedule fall, but what is dead stays dead; let them rise.")

    def scores(now: Now) -> PyTree:
        weights = of_masked(now.params, now.masks)
        gradients = jax.tree.map(lambda g: g.astype(jnp.float32), of_masked(now.gradients, now.masks))
        stats = Statistics(**{n: jax.tree.map(OF_ONE_BATCH[n], gradients) for n in entry.needs_with(given)})
        drawn = {"key": now.key} if entry.stochastic else {}
        return entry.function(weights, stats, **drawn, **given)

    def change(now: Now) -> Changed:
        rows = table(now.masks, schedule, scope, min_keep)
        sizes = entry is CRITERIA["magnitude"]  # never written to memory

        def turn(masks: PyTree) -> PyTree:
            pools = rows.pools(now.step)
            found = of_masked(now.params, masks) if sizes else scores(now)
            return choose(found, pools, alive=masks, min_keep=min_keep, magnitude=sizes)

        return lax.cond(
            now.due, turn, lambda masks: masks, now.masks
        ), now.gradients  # in place, for what died stays dead

    return changing(
        inner,
        start=lambda params: dense_masks(params, prunable, exclude),
        due=lambda masks, step: table(masks, schedule, scope, min_keep).due(step),
        change=change,
        key=key if entry.stochastic else None,
    )


@method(
    "ac_dc",
    formula="by turns so many steps with the largest |w| alone, and as many with all weights; compressed at the end",
    paper="Peste et al. 2021, arXiv:2106.12379",
)
def ac_dc(
    inner: optax.GradientTransformation,
    *,
    sparsity: float,
    begin: int,
    every: int,
    end: int,
    scope: str = "global",
    prunable: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    min_keep: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Alternates compressed and dense training.

    At steps begin, begin + 2 every, ... and `end` (from 0) the lowest |w| die, all others of their scope live; at
    begin + every, begin + 3 every, ... < end all come alive again, from zero. Before `begin` all is dense.

    Deviation from the paper: the moments of weights that come alive are zero, those of the others go on.

    Args:
        inner: any optimizer.
        sparsity: fraction that is dead in compressed phases, in [0, 1), of the prunable weights.
        begin: the first step of the first compressed phase.
        every: steps in a phase.
        end: the first step of the last compressed phase.
        scope: within which set weights compete: `global`, `layer`, `erk`.
        prunable: patterns of the leaves that may be pruned; left out, floating leaves of two axes or more.
        exclude: patterns of leaves that stay dense.
        min_keep: so many weights of each leaf survive.

    Returns:
        A transformation whose state is a `SparseState`; it stands outermost in a chain.
    """
    levels = alternating(sparsity, begin=begin, end=end, every=every)

    def change(now: Now) -> Changed:
        rows = table(now.masks, levels, scope, min_keep)

        def turn(changed: Changed) -> Changed:
            before, gradients = changed
            pools = rows.pools(now.step)
            masks = choose(of_masked(now.params, before), pools, min_keep=min_keep, magnitude=True)
            return masks, grown(masks, before, gradients)

        return once(now.due, turn, (now.masks, now.gradients))

    return changing(
        inner,
        start=lambda params: dense_masks(params, prunable, exclude),
        due=lambda masks, step: table(masks, levels, scope, min_keep).due(step),
        change=change,
    )


def check_criterion(entry: Criterion, options: Mapping[str, Any]) -> None:
    """Refuses criteria that cannot be had of the weights and one batch's gradient."""
    entry.check_options(options)
    more = sorted(entry.needs_with(options) - OF_ONE_BATCH.keys())
    if more or entry.combine.startswith("unit"):
        what = "scores units" if entry.combine.startswith("unit") else f"needs {', '.join(more)}"
        raise UserMistake(
            f"criterion {entry.name!r} {what}, but inside a training step there are only the weights and one batch's "
            "gradient; take magnitude, snip or taylor, or prune in rounds"
        )
