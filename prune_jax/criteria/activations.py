"""Criteria that look at activations: what units answer to the data, and what weights are multiplied with."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from prune_jax.activations import capture, struct
from prune_jax.criteria.entry import criterion
from prune_jax.errors import UserMistake
from prune_jax.groups import Function, Group
from prune_jax.statistics import Loss, Statistics, examples_at_once
from prune_jax.trees import PyTree
from prune_jax.unit_statistics import Histogram, UnitStatistics, reading_members

Groups = Mapping[str, Group]
Leaves = Mapping[str, Any]
Scores = dict[str, np.ndarray]


@criterion(
    "wanda",
    formula="|w_ij| ||x_i||_2; with scope output compared within each output j",
    paper="Sun et al. 2024, arXiv:2306.11695",
    needs=("input_square",),
    granularities=("weight", "n:m"),
)
def wanda(params: PyTree, stats: Statistics) -> PyTree:
    """How much a weight adds to its output at most: its size times the norm of all that it is multiplied with.

    s = |w| sqrt(mean over examples of the sum of x^2), which is the paper's up to a factor that all weights share. The
    paper compares the inputs of each output with one another: that is `scope: output`, and n:m does so by itself. A
    weight of a convolution has an input of its own at each position of the kernel; a row of a table of embeddings is
    multiplied with 1 where it is looked up.

    Args:
        params: weights, leaves of any shape.
        stats: `input_square`, shaped like `params`.

    Returns:
        Scores shaped like `params`, float32, >= 0, in units of the layer's outputs.
    """
    return jax.tree.map(lambda w, x2: jnp.abs(w.astype(jnp.float32)) * jnp.sqrt(x2), params, stats.input_square)


@criterion(
    "apoz",
    formula="1 - share of the unit's activations that are zero",
    paper="Hu et al. 2016, arXiv:1607.03250",
    needs=("zeros",),
    granularities=("group",),
    combine="unit and activations",
)
def apoz(groups: Groups, stats: UnitStatistics) -> Scores:
    """How often a unit says anything: s = 1 - APoZ, the average percentage of zeros among its activations.

    Over all examples, positions and reading kernels. Where nothing is ever zero, as after gelu, all units score 1.

    Args:
        groups: name -> group.
        stats: `zeros`, share of zeros `[units]` by group.

    Returns:
        Group -> scores `[units]`, in [0, 1]; groups that no kernel reads are left out, and stay.
    """
    return {name: 1 - zeros for name, zeros in stats.zeros.items()}


@criterion(
    "entropy",
    formula="-sum_b p_b log p_b, p_b the share of examples whose pooled activation lies in bin b",
    paper="Luo & Wu 2017, arXiv:1706.05791",
    needs=("histogram",),
    granularities=("group",),
    combine="unit and activations",
)
def entropy(groups: Groups, stats: UnitStatistics, *, bins: int = 32) -> Scores:
    """How much a unit's answers differ from example to example: the entropy of their histogram.

    The activations of an example are averaged over positions, as the paper does; bins of equal width lie between the
    lowest and the highest average. A unit that always answers the same scores 0.

    Args:
        groups: name -> group.
        stats: `histogram` by group; values are rounded to 1/128 of their range or less before they are binned.
        bins: how many.

    Returns:
        Group -> scores `[units]`, in nats, from 0 to log(bins); groups that no kernel reads are left out, and stay.
    """
    return {name: _entropy(_shares(found, bins)) for name, found in stats.histogram.items()}


@criterion(
    "mutual_information",
    formula="sum_by p_by log(p_by / p_b p_y), b the bin of the pooled activation, y the label",
    paper="Cover & Thomas 2006, chapter 2; as a criterion Battiti 1994, doi:10.1109/72.298224",
    needs=("label_histogram",),
    granularities=("group",),
    combine="unit and activations",
)
def mutual_information(groups: Groups, stats: UnitStatistics, *, bins: int = 16) -> Scores:
    """What a unit's answer alone tells of the label: I(bin; y) = H(bin) + H(y) - H(bin, y) of the examples' counts.

    Activations are averaged and binned as in `entropy`. Counts stand for probabilities, which lifts the score of a unit
    that tells nothing to about (bins in use - 1) (classes - 1) / (2 examples).

    Args:
        groups: name -> group.
        stats: `label_histogram` by group.
        bins: how many.

    Returns:
        Group -> scores `[units]`, in nats, from 0 to log(classes); groups that no kernel reads are left out, and stay.
    """
    found: Scores = {}
    for name, histogram in stats.label_histogram.items():
        p = _shares(histogram, bins)  # [units, classes, bins]
        whole = p.reshape(len(p), -1)
        found[name] = np.maximum(_entropy(p.sum(axis=1)) + _entropy(p.sum(axis=2)) - _entropy(whole), 0)
    return found


def _shares(histogram: Histogram, bins: int) -> np.ndarray:
    """NaN for units of which a value was no finite number."""
    counts = histogram.binned(bins)
    total = counts.reshape(len(counts), -1).sum(axis=1)
    total = np.where(np.isfinite(np.add(histogram.low, histogram.high)), total, np.nan)
    return counts / total.reshape(-1, *[1] * (counts.ndim - 1))


def _entropy(p: np.ndarray) -> np.ndarray:
    return -np.sum(p * np.log(np.where(p == 0, 1, p)), axis=-1)


@criterion(
    "correlation",
    formula="1 - |correlation with the nearest unit of the group that outlives it|",
    paper="after Babaeizadeh et al. 2016, NoiseOut, arXiv:1611.06211",
    needs=("covariance",),
    granularities=("group",),
    combine="unit and activations",
)
def correlation(groups: Groups, stats: UnitStatistics) -> Scores:
    """How little a unit's activations follow those of another one that could stand for it.

    As in the paper, the two living units of the largest |correlation| are found again and again, and one of them goes:
    the one that varies less, the later one of equals. It scores 1 - |correlation|, so that of two twins only one scores
    low. What never varies follows from anything and scores 0; the unit that is left at last scores 1.

    Args:
        groups: name -> group.
        stats: `covariance` by group, over examples, positions and reading kernels.

    Returns:
        Group -> scores `[units]`, in [0, 1]; groups that no kernel reads are left out, and stay.
    """
    return {name: _distances(np.asarray(found, np.float64)) for name, found in stats.covariance.items()}


def _distances(covariance: np.ndarray) -> np.ndarray:
    spread = np.sqrt(np.diagonal(covariance))
    with np.errstate(divide="ignore", invalid="ignore"):
        near = np.abs(covariance / np.outer(spread, spread))
    still = spread == 0
    near[still], near[:, still] = 0, 0
    near = np.minimum(near, 1)
    np.fill_diagonal(near, -1)
    scores = np.where(still, 0.0, np.where(np.isfinite(spread), 1.0, np.nan))
    alive = ~still & np.isfinite(spread)
    near[~alive], near[:, ~alive] = -1, -1
    nearest, best = near.argmax(axis=1), near.max(axis=1)
    for _ in range(int(alive.sum()) - 1):
        a = int(best.argmax())
        pair = (a, int(nearest[a]))
        goes = min(pair, key=lambda unit: (spread[unit], -unit))
        scores[goes] = 1 - best[a]
        near[goes], near[:, goes], best[goes] = -1, -1, -1
        alive[goes] = False
        lost = np.flatnonzero(alive & (nearest == goes))
        nearest[lost], best[lost] = near[lost].argmax(axis=1), near[lost].max(axis=1)
    return scores


@criterion(
    "forgetting",
    formula="share of examples that are right with the unit and wrong without",
    paper="after Toneva et al. 2019, arXiv:1812.05159",
    needs=("correct",),
    granularities=("group", "layer"),
    combine="unit and loss",
)
def forgetting(groups: Groups, leaves: Leaves, *, correct: Loss, batches: Iterable[Any]) -> Scores:
    """How much is forgotten when a unit is taken away.

    A forgetting event of Toneva et al. is an example that was classified rightly and then is not; they count those
    between two steps of training, we those between the network as it is and the network without the unit.

    Args:
        groups: name -> group.
        leaves: path -> parameter.
        correct: `correct(leaves, batch) -> [batch]`, 1 where the answer is right, else 0.
        batches: pytrees of arrays whose leading axis counts examples; read once.

    Returns:
        Group -> scores `[units]`, in [0, 1].
    """
    correct = correct if isinstance(correct, Partial) else Partial(correct)
    where = {name: _places(group.members, leaves) for name, group in groups.items()}
    lost = {name: np.zeros(group.size) for name, group in groups.items()}
    examples = 0
    for batch in batches:
        there = jax.device_put(batch)
        right = _right(correct, dict(leaves), there)
        for name, (axes, places) in where.items():
            lost[name] += np.asarray(_forgotten(correct, dict(leaves), there, right, places, axes=axes))
        examples += right.shape[0]
    if not examples:
        raise UserMistake("there are no batches to look for what is forgotten in; give at least one.")
    return {name: (count / examples).astype(np.float32) for name, count in lost.items()}


Axes = tuple[tuple[str, int], ...]


def _places(members: Iterable[tuple[str, int, np.ndarray]], leaves: Leaves) -> tuple[Axes, tuple[jax.Array, ...]]:
    """What units hold of these leaves: path and axis, and the indices `[units, m]` of each."""
    held = [(path, axis, places) for path, axis, places in members if path in leaves]
    return tuple((path, axis) for path, axis, _ in held), tuple(jnp.asarray(places) for _, _, places in held)


@jax.jit
def _right(correct: Loss, leaves: Leaves, batch: Any) -> jax.Array:
    return correct(leaves, batch) > 0.5


@partial(jax.jit, static_argnames="axes")
def _forgotten(
    correct: Loss, leaves: Leaves, batch: Any, right: jax.Array, places: tuple[jax.Array, ...], *, axes: Axes
) -> jax.Array:
    """How many examples, `[units]`; one unit after the other, so that memory stays that of one network."""

    def without(rows: tuple[jax.Array, ...]) -> jax.Array:
        cut = dict(leaves)
        for (path, axis), row in zip(axes, rows, strict=True):
            cut[path] = cut[path].at[(slice(None),) * axis + (row,)].set(0)
        return jnp.sum(right & (correct(cut, batch) <= 0.5))

    return jax.lax.map(without, places)


@criterion(
    "head_importance",
    formula="mean over examples of |dL/dxi|, xi = 1 a gate on the head's output",
    paper="Michel et al. 2019, arXiv:1905.10650",
    granularities=("group",),
    combine="unit and loss",
    family="gradients",
    cost="per-example gradients",
)
def head_importance(groups: Groups, leaves: Leaves, *, loss: Loss, batches: Iterable[Any]) -> Scores:
    """How strongly the loss of an example answers to a gate xi on an attention head, at xi = 1.

    The gate is put on what reads the head, its slices of the output projection, which is the same: there
    dL/dxi = sum g w, exactly. Absolute values are taken of single examples, else those of opposite signs would cancel.
    The paper divides by the l2 norm over each layer; scopes do that here.

    Args:
        groups: name -> group.
        leaves: path -> parameter.
        loss: `loss(leaves, batch) -> scalar`, a mean over the batch's examples.
        batches: pytrees of arrays whose leading axis counts examples; read once.

    Returns:
        Group -> scores `[units]`, float32, >= 0, in units of the loss; groups of other kinds are left out, and stay.

    Raises:
        UserMistake: no group is one of attention heads.
    """
    heads = {name: group for name, group in groups.items() if group.kind == "head"}
    if not heads:
        raise UserMistake("no group is one of attention heads; choose taylor, which is its like for all units.")
    loss = loss if isinstance(loss, Partial) else Partial(loss)
    stream = iter(batches)
    first = next(stream, None)
    if first is None:
        raise UserMistake("there are no batches to differentiate the loss on; give at least one.")
    members = reading_members(heads, loss, leaves, first)
    where = {name: _places(mine, leaves) for name, mine in members.items()}
    axes = {name: found for name, (found, _) in where.items()}
    places = {name: found for name, (_, found) in where.items()}
    size = sum(leaves[path].size * 4 for path in {path for found in axes.values() for path, _ in found})
    total: Any = {name: jnp.zeros(groups[name].size) for name in where}
    examples = 0
    for batch in itertools.chain([first], stream):
        count = jax.tree.leaves(batch)[0].shape[0]
        chunk = examples_at_once(size, count)
        total = _add_gates(total, loss, dict(leaves), batch, places, axes=tuple(axes.items()), chunk=chunk)
        examples += count
    return {name: np.asarray(found) / examples for name, found in total.items()}


@partial(jax.jit, static_argnames=("axes", "chunk"))
def _add_gates(
    total: dict[str, jax.Array],
    loss: Loss,
    leaves: Leaves,
    batch: Any,
    places: dict[str, tuple[jax.Array, ...]],
    *,
    axes: tuple[tuple[str, Axes], ...],
    chunk: int,
) -> dict[str, jax.Array]:
    def of_one(example: Any) -> dict[str, jax.Array]:
        def gated(gates: dict[str, jax.Array]) -> jax.Array:
            held = dict(leaves)
            for name, mine in axes:
                for (path, axis), rows in zip(mine, places[name], strict=True):
                    w = held[path]
                    line = jnp.ones(w.shape[axis], w.dtype).at[rows].set(gates[name].astype(w.dtype)[:, None])
                    held[path] = w * line.reshape([-1 if d == axis else 1 for d in range(w.ndim)])
            return loss(held, jax.tree.map(lambda a: a[None], example))

        return jax.tree.map(
            jnp.abs, jax.grad(gated)({name: jnp.ones(rows[0].shape[0]) for name, rows in places.items()})
        )

    found = jax.lax.map(of_one, batch, batch_size=chunk)
    return {name: total[name] + jnp.sum(values, axis=0) for name, values in found.items()}


@criterion(
    "block_influence",
    formula="1 - mean cos(x, x + f(x)), x what the branch f is added to",
    paper="Men et al. 2024, arXiv:2403.03853",
    granularities=("layer",),
    combine="unit and loss",
    family="activations",
    cost="1 forward pass",
)
def block_influence(groups: Groups, leaves: Leaves, *, loss: Loss, batches: Iterable[Any]) -> Scores:
    """How far a residual branch turns what it is added to: one minus the mean cosine of before and after.

    The cosine is that of vectors along the last axis, mean over examples and positions; of a branch that is added in
    several places, mean over those. The paper's blocks are of two branches, ours of one.

    Args:
        groups: name -> group of kind `layer`.
        leaves: path -> parameter.
        loss: `loss(leaves, batch) -> scalar`.
        batches: pytrees of arrays whose leading axis counts examples; read once.

    Returns:
        Group -> scores `[1]`, float32, in [0, 2].

    Raises:
        UserMistake: the loss is wired otherwise than where the layers were found.
    """
    loss = loss if isinstance(loss, Partial) else Partial(loss)
    held = tuple((name, frozenset(p for p, _, _ in group.members if p in leaves)) for name, group in groups.items())
    total, examples = {name: jnp.zeros(()) for name in groups}, 0
    for batch in batches:
        total = _add_influence(total, loss, dict(leaves), batch, held=held)
        examples += jax.tree.leaves(batch)[0].shape[0]
    if not examples:
        raise UserMistake("there are no batches to run the blocks on; give at least one.")
    return {name: np.asarray(value / examples)[None] for name, value in total.items()}


@partial(jax.jit, static_argnames="held")
def _add_influence(
    total: dict[str, jax.Array],
    loss: Loss,
    leaves: Leaves,
    batch: Any,
    *,
    held: tuple[tuple[str, frozenset[str]], ...],
) -> dict[str, jax.Array]:
    function = Function.of(loss, *jax.tree.map(struct, (leaves, (batch,))))
    paths = list(function.named)
    joins = {frozenset(paths[p] for p in branch.params): branch.joins for branch in function.branches}
    for name, mine in held:
        if mine not in joins:
            raise UserMistake(f"{name!r} is no residual branch of the loss, though it is one of the network.")
    wanted = [join.place for _, mine in held for join in joins[mine]]
    seen = capture(loss, leaves, batch, places=wanted).at
    count = jax.tree.leaves(batch)[0].shape[0]

    def influence(mine: frozenset[str]) -> jax.Array:
        turns = [1 - jnp.mean(_cosine(seen[j.place][0][j.stays], seen[j.place][1][0])) for j in joins[mine]]
        return jnp.mean(jnp.stack(turns))

    return {name: total[name] + count * influence(mine) for name, mine in held}


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Of vectors along the last axis; 1 where one of them is zero, and nothing is turned."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.where(norms > 0, jnp.sum(a * b, axis=-1) / jnp.where(norms > 0, norms, 1), 1)
