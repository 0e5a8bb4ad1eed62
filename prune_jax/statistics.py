"""One pass over batches for what criteria need to know of the loss, and of what goes into its products.

Sums stay on the device, and memory does not grow with the number of batches.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from prune_jax.activations import capture
from prune_jax.errors import UserMistake, did_you_mean
from prune_jax.trees import PyTree, leaves_by_path, map_by_path, select

# Gradients of single examples held at once. XLA multiplies batches of matrices on CPU with plain loops: there, all but
# the smallest networks are ten times faster one example at a time.
CHUNK_BYTES = {"cpu": 1 << 17}
CHUNK_BYTES_ELSEWHERE = 1 << 28


class Statistics(NamedTuple):
    """Means over batches weighted by their examples; float32, shaped like the weights; None where not asked for."""

    gradient: PyTree | None = None  # mean of g = dL/dw: the gradient of the whole set
    gradient_abs: PyTree | None = None  # mean of |g| over batches
    gradient_square: PyTree | None = None  # mean of g^2 over batches
    example_gradient_square: PyTree | None = None  # mean over examples of g_i^2, g_i the gradient of one example alone
    input_square: PyTree | None = None  # mean over examples of the sum of x^2, x all that a weight is multiplied with


_OF_BATCH: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "gradient": lambda g: g,
    "gradient_abs": jnp.abs,
    "gradient_square": jnp.square,
}
_OF_EXAMPLE = "example_gradient_square"
_OF_INPUT = "input_square"

Loss = Callable[[PyTree, PyTree], jax.Array]


def gather(
    needs: Iterable[str],
    loss: Loss,
    params: PyTree,
    batches: Iterable[PyTree],
    *,
    prunable: Collection[str] | None = None,
) -> Statistics:
    """Gathers the fields of `Statistics` that are needed, in one pass.

    Compiles once for each shape of batch, and not again in later calls with the same `loss`: one function, or a
    `jax.tree_util.Partial` of one, whose arrays are arguments of the compiled pass.

    Args:
        needs: names of fields of `Statistics`.
        loss: `loss(params, batch) -> scalar`, a mean over the batch's examples.
        params: any pytree of arrays.
        batches: pytrees of arrays whose leading axis counts examples.
        prunable: paths of the leaves to differentiate by; left out, all floating leaves.

    Returns:
        Trees like `params`, None for other leaves.

    Raises:
        UserMistake: there is no batch, a field is unknown, or the loss is not a scalar.

    >>> batches = [jnp.ones(2), jnp.zeros(2)]
    >>> gather({"gradient"}, lambda p, x: jnp.mean(p["w"] * x), {"w": jnp.ones(())}, batches).gradient
    {'w': Array(0.5, dtype=float32)}
    """
    needs = frozenset(needs)
    loss = loss if isinstance(loss, Partial) else Partial(loss)
    for need in needs - frozenset(Statistics._fields):
        known = Statistics._fields
        raise UserMistake(f"statistic {need!r} is not known{did_you_mean(need, known)} (known: {', '.join(known)})")
    if prunable is None:
        prunable = [path for path, leaf in leaves_by_path(params).items() if jnp.issubdtype(leaf.dtype, jnp.floating)]
    paths = frozenset(prunable)
    sums = {need: _zeros(params, paths) for need in needs}
    of_batch = {need: sums[need] for need in needs if need in _OF_BATCH}
    of_example, of_input = sums.get(_OF_EXAMPLE), sums.get(_OF_INPUT)
    examples = 0
    for batch in batches:
        count = _examples(batch)
        if of_batch:
            of_batch = _add_batch(of_batch, loss, params, batch, paths=paths)
        if of_example is not None:
            chunk, there = _chunk(of_example, count), jax.device_put(batch)
            for start in range(0, count, chunk):
                of_example = _add_examples(of_example, loss, params, there, start, paths=paths, chunk=chunk)
        if of_input is not None:
            of_input = _add_inputs(of_input, loss, params, batch, paths=paths)
        examples += count
    if not examples:
        raise UserMistake(
            "there are no batches to gather statistics from; give at least one, and no exhausted iterator."
        )
    found = {**of_batch, _OF_EXAMPLE: of_example, _OF_INPUT: of_input}
    return Statistics(**_means({need: tree for need, tree in found.items() if tree is not None}, examples))


def unit_taylor(
    sums: Callable[[PyTree], PyTree],
    loss: Loss,
    params: PyTree,
    batches: Iterable[PyTree],
    *,
    prunable: Collection[str],
) -> PyTree:
    """The squared change of the loss when a unit is removed, to first order: mean over batches of (sum g w)^2.

    Args:
        sums: makes of a tree like `params`, None for leaves that are not prunable, the sums over units.
        loss: `loss(params, batch) -> scalar`, a mean over the batch's examples.
        params: any pytree of arrays.
        batches: pytrees of arrays whose leading axis counts examples; each weighs as many as it holds.
        prunable: paths of the leaves that count.

    Returns:
        A tree like that of `sums`, float32.
    """
    paths = frozenset(prunable)

    @jax.jit
    def squares(params: PyTree, batch: PyTree) -> PyTree:
        gradient = _gradient(loss, params, batch, paths)
        terms = jax.tree.map(lambda g, w: g * w.astype(jnp.float32), gradient, select(params, paths))
        return jax.tree.map(lambda s: _examples(batch) * jnp.square(s), sums(terms))

    total, examples = None, 0
    for batch in batches:
        found = squares(params, batch)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        examples += _examples(batch)
    if not examples:
        raise UserMistake("there are no batches to gather statistics from; give at least one.")
    return jax.tree.map(lambda s: s / examples, total)


def _zeros(params: PyTree, paths: frozenset[str]) -> PyTree:
    return jax.tree.map(lambda w: jnp.zeros(jnp.shape(w), jnp.float32), select(params, paths))


def _examples(batch: PyTree) -> int:
    leaves = jax.tree.leaves(batch)
    if not leaves or not jnp.ndim(leaves[0]):
        raise UserMistake("a batch holds no array with a leading axis of examples.")
    return leaves[0].shape[0]


def _chunk(sums: PyTree, count: int) -> int:
    """Examples at once: as many of the batch as have gradients that are small enough."""
    return examples_at_once(sum(leaf.nbytes for leaf in jax.tree.leaves(sums)), count)


def examples_at_once(one: int, count: int) -> int:
    """So many of `count` examples at once, if each takes `one` bytes: a divisor, so that one shape does."""
    held = CHUNK_BYTES.get(jax.default_backend(), CHUNK_BYTES_ELSEWHERE)
    most = max(min(count, held // max(one, 1)), 1)
    return next(size for size in range(most, 0, -1) if count % size == 0)


def _gradient(loss: Loss, params: PyTree, batch: PyTree, paths: frozenset[str]) -> PyTree:
    """The gradient by the leaves at `paths` alone; others cost no backward pass."""

    def of(chosen: PyTree) -> jax.Array:
        value = loss(jax.tree.map(lambda c, w: w if c is None else c, chosen, params, is_leaf=_is_none), batch)
        if jnp.shape(value) != ():
            raise UserMistake(
                f"the loss answered an array {list(jnp.shape(value))} but must answer one number: take its mean."
            )
        return value

    return jax.tree.map(lambda g: g.astype(jnp.float32), jax.grad(of)(select(params, paths)))


def _is_none(leaf: Any) -> bool:
    return leaf is None


@partial(jax.jit, static_argnames=("paths",), donate_argnums=0)
def _add_batch(
    sums: dict[str, PyTree], loss: Loss, params: PyTree, batch: PyTree, *, paths: frozenset[str]
) -> dict[str, PyTree]:
    gradient = _gradient(loss, params, batch, paths)
    count = _examples(batch)
    return {
        need: jax.tree.map(lambda s, g, of=_OF_BATCH[need]: s + count * of(g), total, gradient)
        for need, total in sums.items()
    }


@partial(jax.jit, static_argnames=("paths", "chunk"), donate_argnums=0)
def _add_examples(
    sums: PyTree, loss: Loss, params: PyTree, batch: PyTree, start: int, *, paths: frozenset[str], chunk: int
) -> PyTree:
    def of_one(example: PyTree) -> PyTree:
        return _gradient(loss, params, jax.tree.map(lambda a: a[None], example), paths)

    examples = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, chunk), batch)
    if chunk == 1:
        squares = jax.tree.map(jnp.square, _gradient(loss, params, examples, paths))
    else:
        squares = jax.tree.map(lambda g: jnp.sum(jnp.square(g), axis=0), jax.vmap(of_one)(examples))
    return jax.tree.map(jnp.add, sums, squares)


@partial(jax.jit, static_argnames=("paths",), donate_argnums=0)
def _add_inputs(sums: PyTree, loss: Loss, params: PyTree, batch: PyTree, *, paths: frozenset[str]) -> PyTree:
    found = _input_squares(loss, params, batch, paths)
    return map_by_path(lambda path, s: s + found[path], sums)


def check_inputs(loss: Loss, params: PyTree, batch: PyTree, *, prunable: Collection[str]) -> None:
    """Refuses leaves for which `input_square` cannot be gathered; shapes will do, nothing is computed."""
    loss = loss if isinstance(loss, Partial) else Partial(loss)
    jax.eval_shape(lambda l, p, b: _input_squares(l, p, b, frozenset(prunable)), loss, params, batch)


def _input_squares(loss: Loss, params: PyTree, batch: PyTree, paths: frozenset[str]) -> dict[str, jax.Array]:
    captured = capture(loss, params, batch)
    found: dict[str, jax.Array] = {}
    for reading in captured.readings:
        if reading.path in paths:
            found[reading.path] = found.get(reading.path, jnp.float32(0)) + reading.squares()
    for path in sorted(paths - found.keys()):
        where = f"it goes into {captured.unseen[path]!r}" if path in captured.unseen else "nothing reads it"
        raise UserMistake(f"what {path!r} is multiplied with cannot be seen: {where}. Leave it dense: `exclude` it.")
    return found


@partial(jax.jit, donate_argnums=0)
def _means(sums: dict[str, PyTree], examples: int) -> dict[str, PyTree]:
    return jax.tree.map(lambda s: s / examples, sums)
