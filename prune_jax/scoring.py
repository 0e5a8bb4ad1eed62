"""Scores, masks and corrected weights in one call each: `pj.score`, `pj.mask` and `pj.compensate`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from prune_jax.allocation import BY_OUTPUT, TARGETS, Scope, allocate
from prune_jax.criteria import CRITERIA, Criterion, find
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
from prune_jax.layers import Layer, visit
from prune_jax.masks import check_collapse, check_finite, choose, choose_n_of_m, masks_of
from prune_jax.notation import Granularity
from prune_jax.selection import shares
from prune_jax.statistics import OF_INPUTS, OF_LAYERS, OF_NETWORK, Apply, Loss, Statistics, flow, gather
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
    apply: Apply | None = None,
    inputs: Any = None,
    prunable: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    key: jax.Array | None = None,
    options: Mapping[str, Any] | None = None,
    granularity: Written = "weight",
    combine: str | None = None,
) -> PyTree:
    """Scores every prunable weight; the lowest die first.

    Args:
        criterion: a name such as `magnitude`, `module:object`, or an entry of `prune_jax.criteria`.
        params: any pytree of arrays.
        loss: `loss(params, batch) -> scalar`, a mean over the batch's examples; for criteria that need gradients;
            `pj.composed(loss, apply)` for `obd` with `curvature: gauss_newton`.
        batches: pytrees of arrays `[batch, ...]`; read once, by `grasp` twice.
        apply: `apply(params, *inputs) -> outputs`, for criteria that look at the network, as `synflow` does.
        inputs: a tuple of arrays `[batch, ...]` for it, or the only one; `synflow` looks at their shapes.
        prunable: patterns of the leaves that may be pruned; left out, floating leaves of two axes or more.
        exclude: patterns of leaves that stay dense.
        key: a PRNG key, for criteria that draw random numbers.
        options: of the criterion.
        granularity: `weight`; or `kernel`, `neuron` or `{"block": [r, c]}` for scores of the units themselves, combined
            as the criterion says (see `granularity.unit_scores`); n:m such as `"2:4"` scores weights.
        combine: what is made of the scores of a unit's weights in place of what the criterion says: `sum`, `mean`,
            `l1`, `l2` or `max`.

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
    combined = entry.combine_with(options, combine)
    paths = prunable_paths(params, prunable, exclude)
    check_leaves({path: jnp.shape(leaf) for path, leaf in leaves_by_path(params).items() if path in paths}, unit)
    needs = entry.needs_with(options)
    of_loss = needs - OF_NETWORK
    if of_loss and (loss is None or batches is None):
        raise UserMistake(
            f"criterion {entry.name!r} needs {'inputs' if needs <= OF_INPUTS else 'gradients'}: give loss=, "
            "(params, batch) -> scalar, and batches=."
        )
    if needs & OF_NETWORK and (apply is None or inputs is None):
        raise UserMistake(
            f"criterion {entry.name!r} needs the network: give apply=, (params, *inputs) -> outputs, and inputs=."
        )
    if entry.stochastic and key is None:
        raise UserMistake(f"criterion {entry.name!r} draws random numbers: give key=, such as jax.random.key(0).")
    stats = Statistics()
    if loss is not None and batches is not None and needs & OF_LAYERS:
        scores = _by_layer(entry, params, loss, batches, paths, options)
        check_finite(scores, entry.name)
        return scores
    if loss is not None and batches is not None and of_loss:
        stats = gather(of_loss, loss, params, batches, prunable=paths, key=key, **entry.gathering(options))
    if apply is not None and needs & OF_NETWORK:
        given = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
        stats = stats._replace(flow=flow(apply, params, given, prunable=paths))
    chosen = jax.tree.map(jnp.asarray, select(params, paths))
    scores = _scores(chosen, stats, key if entry.takes_key else None, entry.function, tuple(sorted(options.items())))
    scores = unit_scores(scores, unit, combine=combined)
    check_finite(scores, entry.name)
    return scores


def compensate(
    criterion: str | Criterion,
    params: PyTree,
    masks: PyTree,
    *,
    loss: Loss,
    batches: Iterable[PyTree],
    options: Mapping[str, Any] | None = None,
) -> PyTree:
    """Puts masks on weights as a solver does: those that survive make up for those that die.

    Args:
        criterion: a solver, such as `woodfisher`; the masks may be anybody's.
        params: the weights before pruning, any pytree of arrays; what is dead already is zero in them.
        masks: bool arrays under the same paths, True = alive, as `mask` answers them; other leaves stay as they are.
        loss: as in `score`.
        batches: as in `score`.
        options: of the criterion.

    Returns:
        `params` with zeros where masked and the masked leaves' other weights corrected; types are kept.

    Raises:
        UserMistake: the criterion is no solver, an option is unknown, or a mask fits no parameter.
        NonFiniteScoreError: a weight came out NaN or infinite.

    >>> params = {"w": jnp.array([[3.0], [1.0]])}  # two inputs that are always equal
    >>> batches = [jnp.array([[1.0, 1.0], [2.0, 2.0]])]
    >>> words = {"loss": lambda p, x: jnp.mean(jnp.square(x @ p["w"] - 1)), "batches": batches}
    >>> masks = mask(score("woodfisher", params, **words), sparsity=0.5)
    >>> compensate("woodfisher", params, masks, **words)["w"].round(1).ravel()
    Array([4., 0.], dtype=float32)
    """
    entry = find(criterion) if isinstance(criterion, str) else criterion
    if entry.compensate is None and entry.sweep is None:
        known = ", ".join(name for name in CRITERIA if CRITERIA[name].compensate or CRITERIA[name].sweep)
        raise UserMistake(f"criterion {entry.name!r} does not correct the survivors: choose {known}, or apply_masks.")
    options = dict(options or {})
    entry.check_options(options)
    alive = masks_of(params, masks)
    if entry.sweep:
        solved = leaves_by_path(_swept(entry, params, loss, batches, alive, options))
        check_finite({path: solved[path] for path in alive}, entry.name)
        return map_by_path(lambda path, leaf: solved[path] if path in alive else leaf, params)
    stats = gather(entry.needs_with(options), loss, params, batches, prunable=alive, **entry.gathering(options))
    chosen = jax.tree.map(jnp.asarray, select(params, alive))
    kept = map_by_path(lambda path, _: jnp.asarray(alive[path], bool), chosen)
    solved = leaves_by_path(_compensated(chosen, stats, kept, entry.compensate, tuple(sorted(options.items()))))
    check_finite(solved, entry.name)
    return map_by_path(lambda path, leaf: solved.get(path, leaf), params)


def _by_layer(
    entry: Criterion,
    params: PyTree,
    loss: Loss,
    batches: Iterable[PyTree],
    paths: Iterable[str],
    options: Mapping[str, Any],
) -> PyTree:
    """Scores of weights by a criterion that looks at one layer at a time."""
    scores: dict[str, jax.Array] = {}

    def of_layer(layer: Layer) -> None:
        stats = Statistics(input_products={layer.path: layer.products})
        scores[layer.path] = layer.leaf(entry({layer.path: layer.w}, stats, **options)[layer.path])

    visit(of_layer, loss, params, batches, tuple(paths), inputs={**entry.options, **options}["inputs"])
    return map_by_path(lambda path, _: scores.get(path), params)


def _swept(
    entry: Criterion,
    params: PyTree,
    loss: Loss,
    batches: Iterable[PyTree],
    masks: Mapping[str, jax.Array],
    options: Mapping[str, Any],
) -> PyTree:
    """Weights under given masks, layer by layer."""

    def of_layer(layer: Layer) -> jax.Array:
        assert entry.sweep is not None
        return entry.sweep(layer.w, layer.products, mask=layer.matrix(masks[layer.path]), **options)[1]

    return visit(of_layer, loss, params, batches, tuple(masks), inputs={**entry.options, **options}["inputs"])


@partial(jax.jit, static_argnums=(3, 4))
def _compensated(params: PyTree, stats: Statistics, masks: PyTree, function: Any, options: tuple) -> PyTree:
    return function(params, stats, masks, **dict(options))


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
        scope: within which set scores compete: `global`, `layer`, `erk`, `lamp`, `output` (the inputs of each output,
            with a sparsity), or a table {pattern: sparsity} in place of a target. In `lamp` all compete by their shares
            of what their leaf is left with, s^2 / (sum of the squares not smaller), see `selection.shares`: one
            threshold that adapts to each leaf. A `threshold`, `statistic` or `percentile` is then one of shares.
        granularity: what dies together: `weight`; `neuron`, `kernel` or `{"block": [r, c]}`, whose score is the sum of
            its weights' scores (see `granularity.unit_scores`); or n:m such as `"2:4"`, where n are kept of each m
            weights along the inputs, or along any axis, `{"n_m": "2:4", "axis": 0}` (see `masks.choose_n_of_m`), and no
            target, scope or `min_keep` is given.
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
        if scope == "lamp":
            units = {path: _shares(path, leaf, living.get(path)) for path, leaf in units.items()}
        if scope == "output" and unit.family not in BY_OUTPUT:
            raise UserMistake(f"scope output goes with granularity {' or '.join(BY_OUTPUT)}, not with {unit}")
        pools = allocate(units, scope=scope, alive=living, shapes=shapes, min_keep=min_keep, **targets)
        chosen = choose(units, pools, alive=living, min_keep=min_keep)
    check_collapse(chosen)
    masks = weight_masks(map_by_path(lambda p, _: chosen[p], scores), weights, unit, params=params)
    return map_by_path(lambda p, m: m & earlier[p] if p in earlier and earlier[p].shape == m.shape else m, masks)


def _shares(path: str, scores: jax.Array, alive: jax.Array | None) -> jax.Array:
    """Shares of what the leaf is left with; what is dead has none."""
    lowest = float(jnp.min(scores, initial=0))
    if lowest < 0:
        raise UserMistake(
            f"scope lamp compares squares of scores, but the lowest of {path!r} is {lowest:.3g}: choose global, layer "
            "or erk for a criterion of both signs."
        )
    return shares(scores if alive is None else jnp.where(alive, scores, 0))


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
