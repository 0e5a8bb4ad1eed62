"""The layers of any JAX function one after the other, each with what it sees once those before it have been changed.

The function is cut in front of each product with a kernel. One part after the other is compiled, and evaluated on all
batches, so that all layers together cost one pass.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jax.tree_util import Partial

from prune_jax.activations import Product, products_in
from prune_jax.errors import UserMistake
from prune_jax.gram import PRIMITIVES, gram_matrices, kernel_inputs, kernel_matrix
from prune_jax.groups.dataflow import CALLS, DERIVATIVES
from prune_jax.groups.walk import bind
from prune_jax.trees import PyTree, leaves_by_path, map_by_path

HELD_BYTES = 1 << 30  # activations of all batches at one cut; where they take more, batches are run from their start
NO_BATCHES = "there are no batches to gather statistics from; give at least one, and no exhausted iterator."
READ_TWICE = (
    "the layers see more than fits into 1 GiB, so that the batches are read once for each layer: give a list of them, "
    "or what else can be read again, and no iterator; or fewer."
)


class Line(NamedTuple):
    """How an axis of a parameter lies in its matrix `[groups, in, out]`.

    Attributes:
        across: among the outputs; else among the inputs.
        order: of the inputs, or outputs, in which its indices follow one another.
        size: how many follow one another.
    """

    across: bool
    order: np.ndarray
    size: int


@dataclass(frozen=True)
class Layer:
    """A kernel and what it sees.

    Attributes:
        path: of the parameter.
        w: `[groups, in, out]`, float32: in what is summed over, groups what stands side by side.
        edges: where pieces of the inputs begin, and where the last one ends.
        products: for each piece X^T X `[groups, size, size]`, mean over examples.
        shape: of the parameter.
    """

    path: str
    w: jax.Array
    edges: tuple[int, ...]
    products: tuple[jax.Array, ...]
    shape: tuple[int, ...]
    _matrix: Callable[[jax.Array], jax.Array]

    def matrix(self, leaf: Any) -> jax.Array:
        """An array shaped like the parameter as `[groups, in, out]`."""
        return self._matrix(jnp.asarray(leaf))

    def leaf(self, matrix: jax.Array) -> jax.Array:
        """Undoes `matrix`."""
        back = jax.linear_transpose(self._matrix, jax.ShapeDtypeStruct(self.shape, jnp.float32))
        return back(matrix.astype(jnp.float32))[0].astype(matrix.dtype)

    def along(self, axis: int) -> Line:
        """How an axis of the parameter lies in the matrix.

        Raises:
            UserMistake: it lies neither in what is summed over nor in what is not.
        """
        places = np.arange(math.prod(self.shape), dtype=np.int32).reshape(self.shape)
        own = places // math.prod(self.shape[axis % len(self.shape) + 1 :]) % self.shape[axis]
        stride = math.prod(self.shape[axis % len(self.shape) + 1 :])
        own, rest = (np.asarray(self.matrix(a)) for a in (own, places - own * stride))
        if (own == own[:1, :, :1]).all():
            return Line(False, np.lexsort((own[0, :, 0], rest[0, :, 0])), self.shape[axis])
        if (own == own[:1, :1]).all():
            return Line(True, np.lexsort((own[0, 0], rest[0, 0])), self.shape[axis])
        raise UserMistake(f"axis {axis} of {self.path!r} {list(self.shape)} cuts across the products with it")


def visit(
    function: Callable[[Layer], jax.Array | None],
    loss: Callable[..., Any],
    params: PyTree,
    batches: Iterable[PyTree],
    paths: Collection[str],
    *,
    inputs: int = 4096,
    multiple: int = 1,
) -> PyTree:
    """Calls `function` on the layers in the order in which they are evaluated, and puts the weights that it answers in.

    What a layer sees has gone through the layers before it with their new weights. A kernel that is multiplied several
    times has its X^T X added up, and is visited at the last of them; the batches are then read anew.

    Of X^T X those of one layer are held at a time, of at most `inputs` inputs in one piece. Between two layers what is
    alive there is held for all batches, up to 1 GiB.

    Args:
        function: of a layer; None leaves the weights as they are.
        loss: any function `loss(params, batch)`; its answer does not matter, and is not computed.
        params: any pytree of arrays.
        batches: pytrees of arrays whose leading axis counts examples.
        paths: of the parameters to visit.
        inputs: layers of more inputs are cut into pieces that do not see one another.
        multiple: pieces begin at multiples of it.

    Returns:
        `params` with new weights, their types kept.

    Raises:
        UserMistake: there is no batch, one of the parameters is no kernel, or batches would have to be read twice.
    """
    loss = loss if isinstance(loss, Partial) else Partial(loss)
    weights = {path: jnp.asarray(leaf) for path, leaf in leaves_by_path(params).items()}

    def line_of(batch: PyTree) -> _Cut:
        return _line(loss, params, batch, paths, inputs, multiple)

    held: list[_Start] | None = None
    sums: dict[str, _Sums] = {}
    last: _Sums = ()
    number, count = 0, min(len(paths), 1)
    while number < count:
        if held is None and number and iter(batches) is batches:
            raise UserMistake(READ_TWICE)
        starts: Iterable[_Start] = _popped(held) if held is not None else _anew(batches, line_of, loss, weights, number)
        held, size, examples, total = [], 0, 0, None
        for line, there, values in starts:
            new = line.is_new(number)
            values, found = line.run(number, weights, values, new=new)
            total = found if total is None else _added(total, found)
            examples += there
            size += sum(value.nbytes for value in values.values())
            if held is not None:
                held.append(_Start(line, there, values))
            if size > HELD_BYTES:
                held = None
        if total is None:
            raise UserMistake(NO_BATCHES)
        count, product = len(line.products), line.products[number]
        last = total if new else last
        path = product.path
        sums[path] = _added(sums[path], last) if path in sums else last
        number += 1
        if any(later.path == path for later in line.products[number:]):
            continue
        layer = line.layer(product, weights[path], tuple(_over(s, examples) for s in sums.pop(path)))
        changed = function(layer)
        if changed is not None:
            weights[path] = layer.leaf(changed).astype(weights[path].dtype)
            if any(earlier.path == path for earlier in line.products[: number - 1]):
                held = None
    return map_by_path(lambda path, _: weights[path], params)


def check_layers(loss: Callable[..., Any], params: PyTree, batch: PyTree, paths: Collection[str]) -> None:
    """Refuses parameters that `visit` cannot visit; shapes will do, nothing is computed."""
    _line(loss if isinstance(loss, Partial) else Partial(loss), params, batch, paths, 1, 1)


_Sums = tuple[jax.Array, ...]
_Values = dict[Var, Any]


class _Start(NamedTuple):
    """A batch at a cut: how many examples it holds, and the values that are alive there."""

    line: _Cut
    examples: int
    values: _Values


def _popped(held: list[_Start]) -> Iterator[_Start]:
    """All of them; none is held on to."""
    while held:
        yield held.pop(0)


def _anew(
    batches: Iterable[PyTree],
    line_of: Callable[[PyTree], _Cut],
    loss: Partial,
    weights: Mapping[str, jax.Array],
    number: int,
) -> Iterator[_Start]:
    """Batches from their start to a cut."""
    for batch in batches:
        line = line_of(batch)
        values = line.start(loss, batch)
        for before in range(number):
            values, _ = line.run(before, weights, values, new=False)
        yield _Start(line, _examples(batch), values)


@jax.jit
def _added(a: _Sums, b: _Sums) -> _Sums:
    return jax.tree.map(jnp.add, a, b)


@jax.jit
def _over(total: jax.Array, examples: int) -> jax.Array:
    return total / examples


def _examples(batch: PyTree) -> int:
    leaves = jax.tree.leaves(batch)
    if not leaves or not jnp.ndim(leaves[0]):
        raise UserMistake("a batch holds no array with a leading axis of examples.")
    return leaves[0].shape[0]


def _line(loss: Partial, params: PyTree, batch: PyTree, paths: Collection[str], inputs: int, multiple: int) -> _Cut:
    """The line of a function at the shapes of a batch; the same one for the same shapes, so that it compiles once."""
    leaves, structure = jax.tree.flatten((loss, params, batch))
    shapes = tuple((np.shape(leaf), jax.dtypes.result_type(leaf)) for leaf in leaves)
    names = tuple(leaves_by_path(params))
    before = len(jax.tree.leaves(loss))
    return _made(structure, shapes, before, names, frozenset(paths), inputs, multiple)


@functools.lru_cache(maxsize=64)
def _made(
    structure: Any,
    shapes: tuple[tuple[tuple[int, ...], Any], ...],
    before: int,
    names: tuple[str, ...],
    paths: frozenset[str],
    inputs: int,
    multiple: int,
) -> _Cut:
    rest = [*range(before), *range(before + len(names), len(shapes))]
    order = [*range(before, before + len(names)), *rest]  # parameters first

    def whole(*leaves: jax.Array) -> Any:
        back = dict(zip(order, leaves, strict=True))
        loss, params, batch = jax.tree.unflatten(structure, [back[i] for i in range(len(shapes))])
        return loss(params, batch)

    structs = [jax.ShapeDtypeStruct(*shapes[i]) for i in order]
    closed = jax.make_jaxpr(whole)(*structs)
    flat = jax.make_jaxpr(lambda *leaves: _uncalled(closed.jaxpr, closed.consts, leaves))(*structs)
    products, lost = products_in(flat, names, PRIMITIVES)
    for path in sorted(paths):
        if path in lost or all(product.path != path for product in products):
            why = lost.get(path, "nothing reads it")
            raise UserMistake(f"{path!r} is no kernel whose inputs can be seen: {why}. Leave it dense: `exclude` it.")
    line = _Cut(flat, tuple(p for p in products if p.path in paths), names, inputs, multiple)
    for path in paths:
        line.check_layouts(path)
    return line


def _uncalled(jaxpr: Jaxpr, consts: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr and what it calls: written down, nothing in it is called any more."""
    known: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *values), strict=True))
    for eqn in jaxpr.eqns:
        arrays = [atom.val if isinstance(atom, Literal) else known[atom] for atom in eqn.invars]
        name = eqn.primitive.name
        held = eqn.params.get(CALLS.get(name) or DERIVATIVES.get(name, ""))
        if held is not None:
            body, inner = (held.jaxpr, held.consts) if isinstance(held, ClosedJaxpr) else (held, ())
            made = _uncalled(body, inner, arrays)
        else:
            made = bind(eqn, arrays)
            made = made if eqn.primitive.multiple_results else [made]
        known.update(zip(eqn.outvars, made, strict=True))
    return [atom.val if isinstance(atom, Literal) else known[atom] for atom in jaxpr.outvars]


class _Cut:
    """A function as a line of equations, cut in front of the products with wanted kernels."""

    def __init__(
        self, flat: ClosedJaxpr, products: tuple[Product, ...], names: tuple[str, ...], inputs: int, multiple: int
    ):
        self.products = products
        self.consts = dict(zip(flat.jaxpr.constvars, flat.consts, strict=True))
        self.named = dict(zip(names, flat.jaxpr.invars, strict=False))
        self.others = flat.jaxpr.invars[len(names) :]
        self._eqns = flat.jaxpr.eqns
        self._pieces = (inputs, multiple)
        params = {*self.named.values(), *self.consts}
        defined = (*flat.jaxpr.constvars, *flat.jaxpr.invars, *(var for eqn in self._eqns for var in eqn.outvars))
        order = {var: i for i, var in enumerate(defined)}
        wanted: set[Var] = set()
        self._parts: list[tuple[list[JaxprEqn], list[Var], list[Var]]] = []  # equations, parameters, what is left
        for number, product in reversed(list(enumerate(products))):
            wanted.add(self._seen(product))
            left = sorted(wanted - params, key=order.__getitem__)
            first = products[number - 1].place if number else 0
            eqns: list[JaxprEqn] = []
            for eqn in reversed(self._eqns[first : product.place]):
                if wanted & set(eqn.outvars):
                    eqns.insert(0, eqn)
                    wanted -= set(eqn.outvars)
                    wanted |= {atom for atom in eqn.invars if isinstance(atom, Var)}
            read = {atom for eqn in eqns for atom in eqn.invars if isinstance(atom, Var)} & params
            self._parts.insert(0, (eqns, sorted(read, key=order.__getitem__), left))
        self._run = jax.jit(self._part, static_argnames=("number", "new"))

    def _seen(self, product: Product) -> Var:
        return self._eqns[product.place].invars[1 - product.kernel]

    def is_new(self, number: int) -> bool:
        """Whether a product sees other values than the one before it, or sums over them otherwise."""
        if not number:
            return True
        (before, other), (now, eqn) = ((p, self._eqns[p.place]) for p in self.products[number - 1 : number + 1])
        alike = self._seen(before) is self._seen(now) and before.kernel == now.kernel
        facts = (
            "dimension_numbers",
            "window_strides",
            "padding",
            "rhs_dilation",
            "lhs_dilation",
            "feature_group_count",
        )
        same = [eqn.params.get(word) == other.params.get(word) for word in facts]
        shapes = [each.invars[now.kernel].aval.shape for each in (eqn, other)]
        return not (alike and all(same) and shapes[0] == shapes[1] and eqn.primitive is other.primitive)

    def start(self, loss: Partial, batch: PyTree) -> _Values:
        """The values in front of all equations."""
        return dict(zip(self.others, map(jnp.asarray, jax.tree.leaves((loss, batch))), strict=True))

    def run(
        self, number: int, weights: Mapping[str, jax.Array], values: _Values, *, new: bool
    ) -> tuple[_Values, _Sums]:
        """Goes on to a product: the values alive there, and, if wanted, the X^T X."""
        _, read, left = self._parts[number]
        fixed = {self.named[path]: leaf for path, leaf in weights.items()} | self.consts
        given = [fixed[var] for var in read]
        needed = [values[var] for var in self._needed(number)]
        made, found = self._run(given, needed, number=number, new=new)
        return dict(zip(left, made, strict=True)), found

    def _needed(self, number: int) -> list[Var]:
        return self._parts[number - 1][2] if number else list(self.others)

    def _part(self, given: list[Any], needed: list[Any], *, number: int, new: bool) -> tuple[list[Any], _Sums]:
        eqns, read, left = self._parts[number]
        known = dict(zip((*read, *self._needed(number)), (*given, *needed), strict=True))
        for eqn in eqns:
            made = bind(eqn, [atom.val if isinstance(atom, Literal) else known[atom] for atom in eqn.invars])
            known.update(zip(eqn.outvars, made if eqn.primitive.multiple_results else [made], strict=True))
        product = self.products[number]
        eqn = self._eqns[product.place]
        sums: _Sums = ()
        if new:
            sums = gram_matrices(eqn, product.kernel, known[self._seen(product)], self._edges(product))
        return [known[var] for var in left], sums

    def _edges(self, product: Product) -> tuple[int, ...]:
        """Where pieces of a layer's inputs begin, as even as multiples allow."""
        most, multiple = self._pieces
        inputs = kernel_inputs(self._eqns[product.place], product.kernel)
        count = -(-inputs // most)
        size = -(-inputs // count)
        size += -size % multiple
        return (*range(0, inputs, size), inputs)

    def layer(self, product: Product, leaf: jax.Array, products: _Sums) -> Layer:
        """The layer of a product."""
        matrix = functools.partial(_as_matrix, self._eqns[product.place], product)
        w = matrix(leaf.astype(jnp.float32))
        return Layer(product.path, w, self._edges(product), products, leaf.shape, matrix)

    def check_layouts(self, path: str) -> None:
        """Refuses a kernel that is summed over in several ways, as one that is transposed where it is used again."""
        mine = [product for product in self.products if product.path == path]
        shape = self.named[path].aval.shape
        places = np.arange(math.prod(shape), dtype=np.int32).reshape(shape) if len(mine) > 1 else None
        layouts = [np.asarray(_as_matrix(self._eqns[p.place], p, places)) for p in mine[: len(mine) * (len(mine) > 1)]]
        if any(other.shape != layouts[0].shape or (other != layouts[0]).any() for other in layouts[1:]):
            raise UserMistake(f"{path!r} is summed over in several ways: leave it dense, `exclude` it.")


def _as_matrix(eqn: JaxprEqn, product: Product, leaf: Any) -> jax.Array:
    return kernel_matrix(eqn, product.kernel, product.moved(jnp.asarray(leaf)))
