"""One pass over batches, two for H g, for what criteria need to know of the loss and its inputs; `flow` for the rest.

Sums stay on the device, and memory does not grow with the number of batches.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from prune_jax.activations import capture
from prune_jax.blocks import cut, grid
from prune_jax.errors import UserMistake, did_you_mean
from prune_jax.gauss_newton import check_composed, product
from prune_jax.outer_products import Outer, evaluate
from prune_jax.trees import PyTree, leaves_by_path, map_by_path, select

# Gradients of single examples held at once. XLA multiplies batches of matrices on CPU with plain loops: there, all but
# the smallest networks are ten times faster one example at a time.
CHUNK_BYTES = {"cpu": 1 << 17}
CHUNK_BYTES_ELSEWHERE = 1 << 28


class Statistics(NamedTuple):
    """Means over batches weighted by their examples; float32, shaped like the weights; None where not asked for.

    `fisher_blocks` is `[outputs, blocks, size, size]` for each leaf.
    """

    gradient: PyTree | None = None  # mean of g = dL/dw: the gradient of the whole set
    gradient_abs: PyTree | None = None  # mean of |g| over batches
    gradient_square: PyTree | None = None  # mean of g^2 over batches
    example_gradient_square: PyTree | None = None  # mean over examples of g_i^2, g_i the gradient of one example alone
    hessian_gradient: PyTree | None = None  # H g: the Hessian of the whole set times the gradient of the whole set
    hessian_diagonal: PyTree | None = (
        None  # mean over batches and random signs z of z * (C z): estimates diag(C), see `CURVATURES`
    )
    fisher_blocks: PyTree | None = None  # mean over examples of g_i g_i^T in the blocks of `blocks.cut`
    flow: PyTree | None = None  # dR/d|w| of the network alone, see `flow`
    input_products: PyTree | None = None  # of one layer at a time, see `layers.Layer`: mean over examples of x x^T
    input_square: PyTree | None = None  # mean over examples of the sum of x^2, x all that a weight is multiplied with


_OF_BATCH: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "gradient": lambda g: g,
    "gradient_abs": jnp.abs,
    "gradient_square": jnp.square,
}
_OF_EXAMPLE = "example_gradient_square"
_OF_INPUT = "input_square"
_SECOND_PASS = "hessian_gradient"
_PROBED = "hessian_diagonal"
_BLOCKS = "fisher_blocks"

OF_NETWORK = frozenset({"flow"})  # fields that no batch is needed for, but the network
OF_LAYERS = frozenset({"input_products"})  # fields that are gathered layer by layer
OF_INPUTS = OF_LAYERS | {_OF_INPUT}  # fields that the loss is looked through for, and not differentiated
DRAWN = frozenset({_PROBED})  # fields that take a key
OPTIONS = frozenset({"probes", "block", "curvature"})  # of a criterion, that `gather` takes
CURVATURES = ("hessian", "gauss_newton")  # C: the Hessian H; or J^T H_L J, of a loss L by outputs of Jacobian J
READ_TWICE = (
    "the Hessian times the gradient takes a second pass over the batches: give a list of them, or what else can be "
    "read twice, and no iterator."
)

Loss = Callable[[PyTree, PyTree], jax.Array]
Apply = Callable[..., PyTree]


def gather(
    needs: Iterable[str],
    loss: Loss,
    params: PyTree,
    batches: Iterable[PyTree],
    *,
    prunable: Collection[str] | None = None,
    key: jax.Array | None = None,
    probes: int = 10,
    block: int = 64,
    curvature: str = "hessian",
) -> Statistics:
    """Gathers the fields of `Statistics` that are needed, in one pass; in two where `hessian_gradient` is.

    Hessian products are forward over reverse, by the prunable leaves alone: they cost a few gradients, and no matrix is
    ever held.

    Compiles once for each shape of batch, and not again in later calls with the same `loss`: one function, or a
    `jax.tree_util.Partial` of one, whose arrays are arguments of the compiled pass.

    Args:
        needs: names of fields of `Statistics`, but for `flow` and `input_products`.
        loss: `loss(params, batch) -> scalar`, a mean over the batch's examples.
        params: any pytree of arrays.
        batches: pytrees of arrays whose leading axis counts examples.
        prunable: paths of the leaves to differentiate by; left out, all floating leaves.
        key: a PRNG key, for `hessian_diagonal`.
        probes: random signs z for each batch (Hutchinson): the variance of z * (H z) falls with probes times batches.
        block: the weights in a block of `fisher_blocks`, which hold (weights) x (block) numbers, and as many again
            while gradients are added.
        curvature: what `hessian_diagonal` is the diagonal of, one of `CURVATURES`; for `gauss_newton`, the loss is one
            that `objectives.composed` made.

    Returns:
        Trees like `params`, None for other leaves.

    Raises:
        UserMistake: there is no batch, a field is unknown, the loss is not a scalar or its parts are not known, or what
            is to be read twice is an iterator.

    >>> batches = [jnp.ones(2), jnp.zeros(2)]
    >>> gather({"gradient"}, lambda p, x: jnp.mean(p["w"] * x), {"w": jnp.ones(())}, batches).gradient
    {'w': Array(0.5, dtype=float32)}
    """
    needs = frozenset(needs)
    loss = loss if isinstance(loss, Partial) else Partial(loss)
    known = tuple(field for field in Statistics._fields if field not in OF_NETWORK | OF_LAYERS)
    for need in needs - frozenset(known):
        raise UserMistake(f"statistic {need!r} is not known{did_you_mean(need, known)} (known: {', '.join(known)})")
    if prunable is None:
        prunable = [path for path, leaf in leaves_by_path(params).items() if jnp.issubdtype(leaf.dtype, jnp.floating)]
    paths = frozenset(prunable)
    if _PROBED in needs and key is None:
        raise UserMistake("hessian_diagonal is estimated with random signs: give key=, such as jax.random.key(0).")
    if _PROBED in needs and curvature == "gauss_newton":
        check_composed(loss)
    if _SECOND_PASS in needs:
        if iter(batches) is batches:
            raise UserMistake(READ_TWICE)
        others = (needs - {_SECOND_PASS}) | {"gradient"}
        words: dict[str, Any] = {"probes": probes, "block": block, "curvature": curvature}
        first = gather(others, loss, params, batches, prunable=paths, key=key, **words)
        second = _product_with(first.gradient, loss, params, batches, paths)
        return first._replace(hessian_gradient=second, gradient=first.gradient if "gradient" in needs else None)
    sums = {need: _zeros(params, paths) for need in needs - {_BLOCKS}}
    blocks = jax.tree.map(lambda w: _no_products(w.shape, block), select(params, paths)) if _BLOCKS in needs else None
    of_batch = {need: sums[need] for need in needs if need in _OF_BATCH}
    of_example, of_input, probed = sums.get(_OF_EXAMPLE), sums.get(_OF_INPUT), sums.get(_PROBED)
    examples, chunks = 0, dict[int, int]()
    for i, batch in enumerate(batches):
        count = _examples(batch)
        if probed is not None:
            probed = _add_probes(probed, loss, params, batch, key, i, paths=paths, probes=probes, curvature=curvature)
        if of_batch:
            of_batch = _add_batch(of_batch, loss, params, batch, paths=paths)
        if of_example is not None:
            there = jax.device_put(batch)
            if count not in chunks:
                chunks[count] = _examples_together(of_example, loss, params, there, paths)
            chunk = chunks[count]
            for start in range(0, count, chunk):
                of_example = _add_examples(of_example, loss, params, there, start, paths=paths, chunk=chunk)
        if blocks is not None:
            chunk, there = _divisor(count, block), jax.device_put(batch)
            words = {"paths": paths, "chunk": chunk, "held": _chunk(select(params, paths), chunk), "block": block}
            for start in range(0, count, chunk):
                blocks = _add_products(blocks, loss, params, there, start, **words)
        if of_input is not None:
            of_input = _add_inputs(of_input, loss, params, batch, paths=paths)
        examples += count
    if not examples:
        raise UserMistake(
            "there are no batches to gather statistics from; give at least one, and no exhausted iterator."
        )
    found = {**of_batch, _OF_EXAMPLE: of_example, _OF_INPUT: of_input, _PROBED: probed, _BLOCKS: blocks}
    return Statistics(**_means({need: tree for need, tree in found.items() if tree is not None}, examples))


def _product_with(
    direction: PyTree, loss: Loss, params: PyTree, batches: Iterable[PyTree], paths: frozenset[str]
) -> PyTree:
    """H v, mean over batches, each weighted by its examples."""
    total, examples = _zeros(params, paths), 0
    for batch in batches:
        total = _add_product(total, direction, loss, params, batch, paths=paths)
        examples += _examples(batch)
    if not examples:
        raise UserMistake(READ_TWICE)
    return _means({_SECOND_PASS: total}, examples)[_SECOND_PASS]


def flow(apply: Apply, params: PyTree, inputs: Sequence[Any], *, prunable: Collection[str]) -> PyTree:
    """What flows through each weight: dR/d|w|, R the sum of the outputs at inputs of ones, all parameters positive.

    Args:
        apply: `apply(params, *inputs) -> outputs`.
        params: any pytree of arrays.
        inputs: arrays, or their shapes and types, `[batch, ..]`; of the floating ones the shape alone counts, others,
            such as tokens or lengths, are taken as they are. One example is.
        prunable: paths of the leaves to differentiate by.

    Returns:
        A tree like `params`, float32, None for other leaves.

    >>> x = jnp.zeros((1, 2))
    >>> flow(lambda p, x: x @ p["a"] @ p["b"], {"a": -jnp.ones((2, 1)), "b": jnp.array([[3.0]])}, (x,), prunable=["a"])
    {'a': Array([[3.],
           [3.]], dtype=float32), 'b': None}
    """
    ones = tuple(
        jnp.ones((1, *x.shape[1:]), x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.asarray(x)[:1]
        for x in inputs
    )
    return _flow(apply if isinstance(apply, Partial) else Partial(apply), params, ones, frozenset(prunable))


@partial(jax.jit, static_argnums=3)
def _flow(apply: Partial, params: PyTree, inputs: tuple[jax.Array, ...], paths: frozenset[str]) -> PyTree:
    positive = jax.tree.map(lambda w: jnp.abs(w) if jnp.issubdtype(w.dtype, jnp.floating) else w, params)

    def total(params: PyTree, inputs: PyTree) -> jax.Array:
        outputs = [y for y in jax.tree.leaves(apply(params, *inputs)) if jnp.issubdtype(y.dtype, jnp.floating)]
        return sum((jnp.sum(y, dtype=jnp.float32) for y in outputs), jnp.float32(0))

    return _gradient(Partial(total), positive, inputs, paths)


def unit_taylor(
    sums: Callable[[PyTree], PyTree],
    loss: Loss,
    params: PyTree,
    batches: Iterable[PyTree],
    *,
    prunable: Collection[str],
) -> PyTree:
    """The squared change of the loss when a unit is removed, to first order: mean over batches of (sum g w)^2.

    Compiles once for equal `sums` and the same `loss`, each a function or a `jax.tree_util.Partial` of one.

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
    sums, loss = (f if isinstance(f, Partial) else Partial(f) for f in (sums, loss))
    total, examples = None, 0
    for batch in batches:
        found = _unit_squares(sums, loss, params, batch, paths=paths)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        examples += _examples(batch)
    if not examples:
        raise UserMistake("there are no batches to gather statistics from; give at least one.")
    return jax.tree.map(lambda s: s / examples, total)


@partial(jax.jit, static_argnames=("paths",))
def _unit_squares(sums: Partial, loss: Partial, params: PyTree, batch: PyTree, *, paths: frozenset[str]) -> PyTree:
    gradient = _gradient(loss, params, batch, paths)
    terms = jax.tree.map(lambda g, w: g * w.astype(jnp.float32), gradient, select(params, paths))
    return jax.tree.map(lambda s: _examples(batch) * jnp.square(s), sums(terms))


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
    return _divisor(count, held // max(one, 1))


def _divisor(count: int, most: int) -> int:
    return next(size for size in range(max(min(count, most), 1), 0, -1) if count % size == 0)


def _no_products(shape: tuple[int, ...], block: int) -> jax.Array:
    outputs, count, size = grid(shape, block)
    return jnp.zeros((outputs, count, size, size), jnp.float32)


def _gradient(loss: Loss, params: PyTree, batch: PyTree, paths: frozenset[str]) -> PyTree:
    """The gradient by the leaves at `paths` alone; others cost no backward pass."""
    gradient = _gradient_at(loss, params, batch)(select(params, paths))
    return jax.tree.map(lambda g: g.astype(jnp.float32), gradient)


def _gradient_at(loss: Loss, params: PyTree, batch: PyTree) -> Callable[[PyTree], PyTree]:
    """The gradient as a function of the chosen leaves, the others None."""

    def of(chosen: PyTree) -> jax.Array:
        value = loss(_whole(chosen, params), batch)
        if jnp.shape(value) != ():
            raise UserMistake(
                f"the loss answered an array {list(jnp.shape(value))} but must answer one number: take its mean."
            )
        return value

    return jax.grad(of)


def _whole(chosen: PyTree, params: PyTree) -> PyTree:
    """`params` with the chosen leaves in place of its own."""
    return jax.tree.map(lambda c, w: w if c is None else c, chosen, params, is_leaf=lambda leaf: leaf is None)


def _product(
    direction: PyTree,
    loss: Loss,
    params: PyTree,
    batch: PyTree,
    paths: frozenset[str],
    curvature: str = "hessian",
) -> PyTree:
    """A curvature by the leaves at `paths` times a direction; the Hessian's is forward over reverse."""
    chosen = select(params, paths)
    tangent = jax.tree.map(lambda v, w: v.astype(w.dtype), direction, chosen)
    if curvature == "hessian":
        found = jax.jvp(_gradient_at(loss, params, batch), (chosen,), (tangent,))[1]
    else:
        found = product(tangent, loss, partial(_whole, params=params), chosen, batch)
    return jax.tree.map(lambda p: p.astype(jnp.float32), found)


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


@partial(jax.jit, static_argnames=("paths",), donate_argnums=0)
def _add_product(
    sums: PyTree, direction: PyTree, loss: Loss, params: PyTree, batch: PyTree, *, paths: frozenset[str]
) -> PyTree:
    found = _product(direction, loss, params, batch, paths)
    return jax.tree.map(lambda s, p: s + _examples(batch) * p, sums, found)


@partial(jax.jit, static_argnames=("paths", "probes", "curvature"), donate_argnums=0)
def _add_probes(
    sums: PyTree,
    loss: Loss,
    params: PyTree,
    batch: PyTree,
    key: jax.Array,
    number: int,
    *,
    paths: frozenset[str],
    probes: int,
    curvature: str,
) -> PyTree:
    key = jax.random.fold_in(key, number)
    leaves, structure = jax.tree.flatten(sums)

    def add(i: jax.Array, sums: PyTree) -> PyTree:
        keys = jax.random.split(jax.random.fold_in(key, i), len(leaves))
        drawn = [jax.random.rademacher(k, s.shape, jnp.float32) for k, s in zip(keys, leaves, strict=True)]
        signs = jax.tree.unflatten(structure, drawn)
        found = _product(signs, loss, params, batch, paths, curvature)
        return jax.tree.map(lambda s, z, p: s + _examples(batch) / probes * z * p, sums, signs, found)

    return jax.lax.fori_loop(0, probes, add, sums)


@partial(jax.jit, static_argnames=("paths",))
def _of_one(loss: Loss, params: PyTree, example: PyTree, *, paths: frozenset[str]) -> list[jax.Array | Outer]:
    """The gradient of a batch of one example, leaf by leaf; what is an outer product is not formed."""
    gradient = jax.make_jaxpr(lambda example: _gradient(loss, params, example, paths))(example)
    return evaluate(gradient, jax.tree.leaves(example))


def _examples_together(sums: PyTree, loss: Loss, params: PyTree, batch: PyTree, paths: frozenset[str]) -> int:
    """Examples at once: by the gradients that are formed; by all where a kernel's is, for the sake of `CHUNK_BYTES`."""
    first = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), batch)
    leaves = jax.eval_shape(partial(_of_one, paths=paths), loss, params, first)
    formed = [sum_ for sum_, leaf in zip(jax.tree.leaves(sums), leaves, strict=True) if not isinstance(leaf, Outer)]
    return _chunk(sums if any(leaf.ndim > 1 for leaf in formed) else formed, _examples(batch))


@partial(jax.jit, static_argnames=("paths", "chunk"), donate_argnums=0)
def _add_examples(
    sums: PyTree, loss: Loss, params: PyTree, batch: PyTree, start: int, *, paths: frozenset[str], chunk: int
) -> PyTree:
    """Adds the squares of each example's gradient; of outer products x d^T, by one product: sum (x^2)^T d^2."""

    def of_one(example: PyTree) -> list[jax.Array | Outer]:
        return _of_one(loss, params, jax.tree.map(lambda a: a[None], example), paths=paths)

    examples = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, chunk), batch)
    if chunk == 1:
        found = jax.tree.map(lambda g: g[None], _of_one(loss, params, examples, paths=paths))
    else:
        found = jax.vmap(of_one)(examples)
    squares = [g.squares() if isinstance(g, Outer) else jnp.sum(jnp.square(g), axis=0) for g in found]
    return jax.tree.map(jnp.add, sums, jax.tree.unflatten(jax.tree.structure(sums), squares))


@partial(jax.jit, static_argnames=("paths", "chunk", "held", "block"), donate_argnums=0)
def _add_products(
    sums: PyTree,
    loss: Loss,
    params: PyTree,
    batch: PyTree,
    start: int,
    *,
    paths: frozenset[str],
    chunk: int,
    held: int,
    block: int,
) -> PyTree:
    """Adds g g^T of `chunk` examples; their gradients are taken `held` at a time."""

    def of_one(example: PyTree) -> PyTree:
        gradient = _gradient(loss, params, jax.tree.map(lambda a: a[None], example), paths)
        return jax.tree.map(lambda g: cut(g, block), gradient)  # [outputs, blocks, size]

    examples = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, chunk), batch)
    gradients = jax.lax.map(of_one, examples, batch_size=held if held > 1 else None)
    return jax.tree.map(lambda s, g: s + jnp.einsum("nobi,nobj->obij", g, g), sums, gradients)


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
