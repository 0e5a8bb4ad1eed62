"""Scores and masks in one call each: `pj.score` and `pj.mask`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from prune_jax.allocation import BY_OUTPUT, TARGETS, Scope, allocate
from prune_jax.criteria import Criterion, find
from prune_jax.errors import UserMistake, did_you_mean
from prune_jax.granularity import (
    Written,
    check_granularity,
    check_leaves,
    living_units,
    unit_scores,
    unit_shape,
    weight_masks,
)
from prune_jax.masks import check_collapse, check_finite, choose, choose_n_of_m
from prune_jax.notation import Granularity
from prune_jax.statistics import Loss, Statistics, gather
from prune_jax.trees import PyTree, leaves_by_path, map_by_path, matches, names_in, select


def prunable_paths(
    params: PyTree, prunable: Iterable[str] | None = None, exclude: Iterable[str] = ()
) -> tuple[str, ...]:
    """Paths of the leaves that may be pruned.

    Args:
        params: any pytree of arrays, or of their shapes and types.
        prunable: patterns of them; left out, floating leaves of two axes or more, or all floating ones if none has two.
        exclude: patterns of those that stay dense.

    >>> prunable_paths({"hidden": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}})
    ('hidden/kernel',)
    """
    leaves = leaves_by_path(params)
    floating = {p: leaf for p, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size}
    chosen = [p for p, leaf in floating.items() if leaf.ndim >= 2] or list(floating)
    if prunable is not None:
        chosen = [
            p for p in floating if any(matches(p, pattern) for pattern in _patterns("prunable", prunable, floating))
        ]
    dense = _patterns("exclude", exclude, floating)
    left = tuple(p for p in chosen if not any(matches(p, pattern) for pattern in dense))
    if not left:
        raise UserMistake(
            f"there is nothing to prune: of {', '.join(leaves) or 'no parameters'} no floating leaf is left."
        )
    return left


def _patterns(name: str, patterns: Iterable[str], paths: Iterable[str]) -> tuple[str, ...]:
    if isinstance(patterns, str):
        patterns = (patterns,)
    patterns, paths = tuple(patterns), tuple(paths)
    for pattern in patterns:
        if not any(matches(path, pattern) for path in paths):
            raise UserMistake(
                f"{name} pattern {pattern!r} fits no parameter{did_you_mean(pattern, names_in(paths))} "
                f"(parameters: {', '.join(paths)})"
            )
    return patterns


def score(
    criterion: str | Criterion,
    params: PyTree,
    *,
    loss: Loss | None = None,
    batches: Iterable[PyTree] | None = None,
    prunable: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    key: jax.Array | None = None,
    options: Mapping[str, Any] | None = None,
    granularity: Written = "weight",
) -> PyTree:
    """Scores every prunable weight; the lowest die first.

    Args:
        criterion: a name such as `magnitude`, `module:object`, or an entry of `prune_jax.criteria`.
        params: any pytree of arrays.
        loss: `loss(params, batch) -> scalar`, a mean over the batch's examples; for criteria that need gradients.
        batches: pytrees of arrays `[batch, ...]`; read once.
        prunable: patterns of the leaves that may be pruned; left out, floating leaves of two axes or more.
        exclude: patterns of leaves that stay dense.
        key: a PRNG key, for criteria that draw random numbers.
        options: of the criterion.
        granularity: `weight`; or `kernel`, `neuron` or `{"block": [r, c]}` for scores of the units themselves, combined
            as the criterion says (see `granularity.unit_scores`); n:m such as `"2:4"` scores weights.

    Returns:
        float32 arrays shaped like the prunable leaves, or like their units, in the containers of `params`; None for
        other leaves.

    Raises:
        UserMistake: a name, an option or a pattern is unknown, or what the criterion needs is missing.
        NonFiniteScoreError: a score is NaN or infinite.

    >>> score("magnitude", {"kernel": jnp.array([[-2.0, 1.0]]), "bias": jnp.ones(2)})
    {'bias': None, 'kernel': Array([[2., 1.]], dtype=float32)}
    """
    entry = find(criterion) if isinstance(criterion, str) else criterion
    options = dict(options or {})
    entry.check_options(options)
    if granularity in ("group", "layer"):
        kinds = ", kinds='layer'" if granularity == "layer" else ""
        raise UserMistake(
            f"{granularity}s are known by a network's trace alone: net = pj.trace(apply, params, inputs), then "
            f"net.choose(pj.score(...), sparsity=0.5{kinds})"
        )
    unit = check_granularity(granularity, entry.granularities)
    paths = prunable_paths(params, prunable, exclude)
    check_leaves({path: jnp.shape(leaf) for path, leaf in leaves_by_path(params).items() if path in paths}, unit)
    needs = entry.needs_with(options)
    if needs and (loss is None or batches is None):
        raise UserMistake(
            f"criterion {entry.name!r} needs {'inputs' if needs == {'input_square'} else 'gradients'}: give loss=, "
            "(params, batch) -> scalar, and batches=."
        )
    if entry.stochastic and key is None:
        raise UserMistake(f"criterion {entry.name!r} draws random numbers: give key=, such as jax.random.key(0).")
    stats = Statistics()
    if loss is not None and batches is not None and needs:
        stats = gather(needs, loss, params, batches, prunable=paths)
    chosen = jax.tree.map(jnp.asarray, select(params, paths))
    scores = _scores(chosen, stats, key if entry.stochastic else None, entry.function, tuple(sorted(options.items())))
    scores = unit_scores(scores, unit, combine=entry.combine_with(options))
    check_finite(scores, entry.name)
    return scores


@partial(jax.jit, static_argnums=(3, 4))
def _scores(params: PyTree, stats: Statistics, key: jax.Array | None, function: Any, options: tuple) -> PyTree:
    drawn = {} if key is None else {"key": key}
    return function(params, stats, **drawn, **dict(options))


def mask(
    scores: PyTree,
    *,
    sparsity: float | None = None,
    keep: int | None = None,
    threshold: float | None = None,
    statistic: str | None = None,
    percentile: float | None = None,
    scope: Scope = "global",
    granularity: Written = "weight",
    alive: PyTree | None = None,
    min_keep: int = 0,
    params: PyTree | None = None,
) -> PyTree:
    """Masks the lowest scores: exactly as many as the target says, by position among equals.

    Args:
        scores: arrays shaped like the prunable leaves, or, with `params`, like their units; None for other leaves.
        sparsity: fraction that dies, in [0, 1), of the scored units.
        keep: so many survive.
        threshold: what scores below it dies.
        statistic: `mean` or `median`: what scores below that of the living scores dies.
        percentile: in [0, 100], interpolated linearly: what scores below it dies.
        scope: within which set scores compete: `global`, `layer`, `erk`, `output` (the inputs of each output, with a
            sparsity), or a table {pattern: sparsity} in place of a target.
        granularity: what dies together: `weight`; `neuron`, `kernel` or `{"block": [r, c]}`, whose score is the sum of
            its weights' scores (see `granularity.unit_scores`); or n:m such as `"2:4"`, where n are kept of each m
            weights along the inputs (see `masks.choose_n_of_m`), and no target, scope or `min_keep` is given.
        alive: earlier masks: what is dead there stays dead, and dies first.
        min_keep: so many units of each leaf survive whatever their scores.
        params: the parameters; with them, the bias beside a kernel dies with its neurons.

    Returns:
        Bool arrays, True = alive, shaped like the leaves of `scores`, or of `params` if given; None for other leaves.

    Raises:
        UserMistake: the target is missing, doubled or impossible.
        NonFiniteScoreError: a score is NaN or infinite.
        LayerCollapseError: a leaf would be left without a living unit.

    >>> mask({"w": jnp.array([3.0, 1.0, 2.0, 1.0])}, sparsity=0.5)
    {'w': Array([ True, False,  True, False], dtype=bool)}
    >>> mask({"w": jnp.array([[3.0], [1.0], [2.0], [1.0]])}, granularity="2:4")["w"].ravel()
    Array([ True, False,  True, False], dtype=bool)
    """
    unit = check_granularity(granularity)
    leaves = leaves_by_path(scores)
    weights = leaves if params is None else {p: leaf for p, leaf in leaves_by_path(params).items() if p in leaves}
    shapes = {path: jnp.shape(leaf) for path, leaf in weights.items()}
    if unknown := [path for path in leaves if path not in shapes]:
        raise UserMistake(f"scores are named {unknown[0]!r} but no parameter is (parameters: {', '.join(shapes)})")
    check_leaves(shapes, unit)
    combined = scores if _are_of_units(leaves, shapes, unit) else unit_scores(scores, unit)
    units = {path: jnp.asarray(leaf, jnp.float32) for path, leaf in leaves_by_path(combined).items()}
    check_finite(units)
    earlier = {path: jnp.asarray(m, bool) for path, m in leaves_by_path(alive).items()}
    living = {path: _living(path, earlier[path], shapes[path], unit) for path in units if path in earlier}
    amounts = (sparsity, keep, threshold, statistic, percentile)
    targets: dict[str, Any] = dict(zip(TARGETS, amounts, strict=True))
    if unit.fixed:
        given = [word for word, amount in targets.items() if amount is not None]
        if given := given + ["scope"] * (scope != "global") + ["min_keep"] * bool(min_keep):
            raise UserMistake(unit.alone(*given))
        chosen = choose_n_of_m(units, *unit.numbers, alive=living)
    else:
        if scope == "output" and unit.family not in BY_OUTPUT:
            raise UserMistake(f"scope output goes with granularity {' or '.join(BY_OUTPUT)}, not with {unit}")
        pools = allocate(units, scope=scope, alive=living, shapes=shapes, min_keep=min_keep, **targets)
        chosen = choose(units, pools, alive=living, min_keep=min_keep)
    check_collapse(chosen)
    masks = weight_masks(map_by_path(lambda p, _: chosen[p], scores), weights, unit, params=params)
    return map_by_path(lambda p, m: m & earlier[p] if p in earlier and earlier[p].shape == m.shape else m, masks)


def _are_of_units(scores: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], unit: Granularity) -> bool:
    """Whether scores are those of units already; where each weight is a unit, it makes no difference."""
    if all(jnp.shape(leaf) == unit_shape(shapes[path], unit) for path, leaf in scores.items()):
        return True
    for path, leaf in scores.items():
        if jnp.shape(leaf) != shapes[path]:
            raise UserMistake(
                f"the scores of {path!r} are {list(jnp.shape(leaf))} but the parameter is {list(shapes[path])}"
            )
    return False


def _living(path: str, mask: jax.Array, shape: tuple[int, ...], unit: Granularity) -> jax.Array:
    """Which units of a leaf live, from an earlier mask of its weights or of its units."""
    if mask.shape == shape:
        return living_units({path: mask}, unit)[path]
    if mask.shape != unit_shape(shape, unit):
        raise UserMistake(f"the mask of {path!r} is {list(mask.shape)} but the parameter is {list(shape)}")
    return mask
