"""What kernels see: the values that each parameter is multiplied with, or added to, in any JAX function.

The function is evaluated equation by equation. On the way each parameter is followed through moves of its elements
(casts, transpositions, reshapes) to the products in which it is the kernel; the other operand is what it sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from prune_jax.groups.dataflow import CALLS, DERIVATIVES
from prune_jax.groups.function import Function
from prune_jax.groups.walk import bind
from prune_jax.trees import PyTree, leaves_by_path

Place = tuple[int, ...]  # of an equation, as in `groups.dataflow.Node`


class Part(NamedTuple):
    """A part of an array's axis: so many indices of a parameter's axis, `stride` apart; None: of no one axis."""

    axis: int | None
    size: int
    stride: int = 1


Parts = tuple[Part, ...]  # of one axis, the outermost first; an axis of one index may have none


@dataclass(frozen=True)
class Reading:
    """A product in which a parameter is the kernel.

    Attributes:
        path: of the parameter.
        values: what it is multiplied with.
        axes: of each axis of `values`, what of the parameter's axes it is summed over with; of others, no axis.
        shape: of the parameter.
    """

    path: str
    values: jax.Array
    axes: tuple[Parts, ...]
    shape: tuple[int, ...]
    _squares: Callable[[], jax.Array] = field(repr=False, compare=False)

    def reads(self, axis: int) -> bool:
        """Whether the sum goes over this whole axis of the parameter."""
        return math.prod(p.size for p in self._parts() if p.axis == axis) == self.shape[axis] > 1

    def along(self, *axes: int) -> jax.Array:
        """The values by the indices of axes of the parameter that are summed over, `[everything else, *sizes]`."""
        parts = self._parts()
        mine = [sorted((i for i, p in enumerate(parts) if p.axis == d), key=lambda i: -parts[i].stride) for d in axes]
        order = [i for i, part in enumerate(parts) if part.axis not in axes] + [i for places in mine for i in places]
        sizes = [self.shape[d] for d in axes]
        return self.values.reshape([p.size for p in parts]).transpose(order).reshape(-1, *sizes)

    def squares(self) -> jax.Array:
        """The sum of the squares of all values that each weight is multiplied with, float32, shaped like the parameter.

        Exact for strides, dilation, groups and padding of a convolution. A lookup is a product with rows of which one
        element is 1, so that it counts how often each row is taken.
        """
        return self._squares()

    def _parts(self) -> Parts:
        return tuple(part for parts in self.axes for part in parts)


@dataclass(frozen=True)
class Addition:
    """A parameter added to what is made of the inputs, as a bias is.

    Attributes:
        path: of the parameter.
        kernels: paths of the parameters whose products the values are, but for additions, moves and fixed factors.
        values: what it is added to.
    """

    path: str
    kernels: frozenset[str]
    values: jax.Array
    _back: Callable[[jax.Array], jax.Array] = field(repr=False, compare=False)

    def sums(self) -> jax.Array:
        """The sum of all values that each element of the parameter is added to, float32, shaped like the parameter."""
        return self._back(self.values.astype(jnp.float32))

    def counts(self) -> jax.Array:
        """How many values each element is added to, float32, shaped like the parameter."""
        return self._back(jnp.ones(self.values.shape, jnp.float32))


class Captured(NamedTuple):
    """What came by while a function was evaluated.

    Attributes:
        readings: products in which a parameter is the kernel, in the order of evaluation.
        additions: of parameters to what is made of the inputs, in the order of evaluation.
        unseen: path -> the primitive in which a parameter was lost sight of, if it was read nowhere.
        at: what goes into the equations at the places that were asked for, and what comes out of them.
    """

    readings: tuple[Reading, ...]
    additions: tuple[Addition, ...]
    unseen: Mapping[str, str]
    at: Mapping[Place, tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]]


def capture(apply: Callable[..., Any], params: PyTree, *inputs: Any, places: Iterable[Place] = ()) -> Captured:
    """Evaluates a function and answers what its kernels see. It can be jitted, mapped and differentiated.

    Functions that are called (`jit`, `remat`, `custom_jvp`) are looked into; loops and branches are not: kernels that
    are read there are `unseen`. What is captured but not used costs nothing once it is compiled.

    Args:
        apply: any JAX function `apply(params, *inputs)`; its outputs do not matter.
        params: any pytree of arrays.
        *inputs: pytrees of the same.
        places: of equations in the jaxpr that `groups.Function.of` makes, whose operands and results are wanted.

    >>> params = {"w": jnp.ones((2, 3))}
    >>> (seen,) = capture(lambda p, x: jnp.tanh(x @ p["w"]), params, jnp.array([[1.0, 2.0]])).readings
    >>> seen.path, seen.along(0), seen.squares()[:, 0]
    ('w', Array([[1., 2.]], dtype=float32), Array([1., 4.], dtype=float32))
    """
    function = Function.of(apply, jax.tree.map(struct, params), jax.tree.map(struct, inputs))
    named = leaves_by_path(params)
    walk = _Walk(frozenset(places))
    values = [_Value(leaf, _PARAMS, _View.of(path, np.shape(leaf))) for path, leaf in named.items()]
    values += [_Value(leaf, _DATA) for leaf in jax.tree.leaves(inputs)]
    walk.run(function.closed.jaxpr, function.closed.consts, values, ())
    read = {reading.path for reading in walk.readings}
    unseen = {path: name for path, name in walk.unseen.items() if path not in read}
    return Captured(tuple(walk.readings), tuple(walk.additions), unseen, walk.at)


class Product(NamedTuple):
    """An equation in which a whole parameter, its elements moved at most, is the kernel.

    Attributes:
        place: the number of the equation.
        path: of the parameter.
        kernel: which operand it is.
        moved: the parameter, or an array of its shape -> what is multiplied.
    """

    place: int
    path: str
    kernel: int
    moved: Callable[[jax.Array], jax.Array]


def products_in(
    closed: ClosedJaxpr, paths: Sequence[str], known: Collection[str]
) -> tuple[list[Product], dict[str, str]]:
    """The products in which parameters are kernels, and what becomes of those of which that is not so.

    Args:
        closed: of a function in which nothing is called; nothing is run.
        paths: of the parameters, which come first among its inputs.
        known: primitives that count.

    Returns:
        Products in the order of evaluation; path -> why not, of parameters that are read in other ways.
    """
    walk, found, lost = _Walk(frozenset()), [], dict[str, str]()

    def run(*leaves: jax.Array) -> tuple[()]:
        values = [_Value(leaf, _PARAMS, _View.of(p, leaf.shape)) for p, leaf in zip(paths, leaves, strict=False)]
        seen: dict[Any, _Value] = dict(zip(closed.jaxpr.constvars, map(_Value, closed.consts), strict=True))
        rest = [_Value(leaf, _DATA) for leaf in leaves[len(paths) :]]
        seen |= zip(closed.jaxpr.invars, [*values, *rest], strict=True)
        for place, eqn in enumerate(closed.jaxpr.eqns):
            operands = [_Value(a.val) if isinstance(a, Literal) else seen[a] for a in eqn.invars]
            count = len(walk.readings)
            seen.update(zip(eqn.outvars, walk.equation(eqn, operands, None), strict=True))
            if len(walk.readings) == count:
                continue
            (kernel, view), *_ = [(i, o.view) for i, o in enumerate(operands) if o.view is not None]
            whole = math.prod(view.shape) == math.prod(_shape(eqn.invars[kernel]))
            if eqn.primitive.name in known and whole:
                found.append(Product(place, view.path, kernel, view.forward))
            else:
                lost[view.path] = "parts of it are read" if whole is False else f"it goes into {eqn.primitive.name!r}"
        return ()

    jax.eval_shape(run, *(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars))
    read = {product.path for product in found}
    return found, {path: f"it goes into {name!r}" for path, name in walk.unseen.items() if path not in read} | lost


def struct(leaf: Any) -> jax.ShapeDtypeStruct:
    """Its shape and type."""
    return jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.result_type(leaf))


Move = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class _View:
    """A value whose elements are a parameter's: what its axes are made of, and how it was made."""

    path: str
    shape: tuple[int, ...]
    axes: tuple[Parts, ...]
    moves: tuple[Move, ...] = ()

    @classmethod
    def of(cls, path: str, shape: tuple[int, ...]) -> _View:
        return cls(path, shape, tuple((Part(d, size),) for d, size in enumerate(shape)))

    def moved(self, axes: Sequence[Parts], move: Move | None = None) -> _View:
        return _View(self.path, self.shape, tuple(axes), (*self.moves, move) if move else self.moves)

    def forward(self, w: jax.Array) -> jax.Array:
        """An array shaped like the parameter -> what the view is of it."""
        for move in self.moves:
            w = move(w)
        return w

    def back(self, array: jax.Array) -> jax.Array:
        """Sums for the elements of the view -> sums for those of the parameter."""
        return jax.linear_transpose(self.forward, jax.ShapeDtypeStruct(self.shape, jnp.float32))(array)[0]


_CONSTANT, _PARAMS, _DATA = range(3)  # what a value is made of at most


class _Value(NamedTuple):
    array: Any
    made_of: int = _CONSTANT
    view: _View | None = None
    kernels: frozenset[str] = frozenset()  # whose products it is, but for additions, moves and fixed factors


@dataclass
class _Walk:
    places: frozenset[Place]
    readings: list[Reading] = field(default_factory=list)
    additions: list[Addition] = field(default_factory=list)
    unseen: dict[str, str] = field(default_factory=dict)
    at: dict[Place, tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]] = field(default_factory=dict)

    def run(self, jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[_Value], place: Place | None) -> list[_Value]:
        known: dict[Any, _Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        known |= {var: _Value(const) for var, const in zip(jaxpr.constvars, consts, strict=True)}

        def read(atom: Any) -> _Value:
            return _Value(atom.val) if isinstance(atom, Literal) else known[atom]

        for i, eqn in enumerate(jaxpr.eqns):
            here = None if place is None else (*place, i)
            outputs = self.equation(eqn, [read(atom) for atom in eqn.invars], here)
            known.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: JaxprEqn, operands: list[_Value], place: Place | None) -> list[_Value]:
        name = eqn.primitive.name
        held = eqn.params.get(CALLS.get(name) or DERIVATIVES.get(name, ""))
        viewed = [i for i, operand in enumerate(operands) if operand.view is not None]
        if held is not None and (name in CALLS or viewed):  # without a parameter in it, its derivative stays its own
            body, consts = (held.jaxpr, held.consts) if isinstance(held, ClosedJaxpr) else (held, ())
            return self.run(body, consts, operands, place if name in CALLS else None)
        made = bind(eqn, [operand.array for operand in operands])
        arrays = tuple(made) if eqn.primitive.multiple_results else (made,)
        if place in self.places:
            self.at[place] = (tuple(operand.array for operand in operands), arrays)
        made_of = max((operand.made_of for operand in operands), default=_CONSTANT)
        if viewed == [0] and name in _MOVES:
            views = _MOVES[name](eqn, operands)
            return [_Value(array, made_of, view) for array, view in zip(arrays, views, strict=True)]
        reading = None
        if len(viewed) == 1 and name in _READ and not _is_weight(operands, viewed[0]):
            reading = _READ[name](eqn, operands, viewed[0])
        kernels = _kernels(name, operands)
        if reading is not None:
            self.readings.append(reading)
            kernels = frozenset({reading.path})
        else:
            self.unseen |= {view.path: name for view in (operands[i].view for i in viewed) if view is not None}
        if name in _ADDS and len(viewed) == 1 and operands[1 - viewed[0]].made_of == _DATA:
            self.additions.append(_addition(operands[viewed[0]], operands[1 - viewed[0]], made.shape))
        return [_Value(array, made_of, None, kernels) for array in arrays]


def _addition(bias: _Value, to: _Value, shape: tuple[int, ...]) -> Addition:
    view = bias.view
    assert view is not None
    own = np.shape(bias.array)  # an equation repeats scalars and axes of one index
    repeated = tuple(d for d, size in enumerate(shape) if own and own[d] < size)

    def back(values: jax.Array) -> jax.Array:
        return view.back(jnp.sum(values, axis=repeated, keepdims=True) if own else jnp.sum(values))

    return Addition(view.path, to.kernels, jnp.broadcast_to(to.array, shape), back)


def _kernels(name: str, operands: Sequence[_Value]) -> frozenset[str]:
    """Whose products come out of an equation that is linear in what is made of the inputs; none of others."""
    data = [operand.made_of == _DATA for operand in operands]
    factor = (name == "mul" and sum(data) == 1) or (name == "div" and data == [True, False])
    if not factor and name not in _LINEAR:
        return frozenset()
    return frozenset().union(*(operand.kernels for operand in operands))


def _is_weight(operands: Sequence[_Value], kernel: int) -> bool:
    """Whether the kernel is multiplied with what is made of parameters, as a factor of another kernel is."""
    return any(operand.made_of == _PARAMS for i, operand in enumerate(operands) if i != kernel)


# Moves: an equation and its operands, of which the first is a view -> the views that come out.
Views = list[_View]


def _only(operands: Sequence[_Value]) -> _View:
    view = operands[0].view
    assert view is not None
    return view


def _by(eqn: JaxprEqn, operands: Sequence[_Value], number: int = 0) -> Move:
    rest = [operand.array for operand in operands[1:]]

    def move(w: jax.Array) -> jax.Array:
        made = bind(eqn, [w, *rest])
        return made[number] if eqn.primitive.multiple_results else made

    return move


def _same(eqn: JaxprEqn, operands: list[_Value]) -> Views:
    return [_only(operands)]


def _transpose(eqn: JaxprEqn, operands: list[_Value]) -> Views:
    view = _only(operands)
    return [view.moved([view.axes[d] for d in eqn.params["permutation"]], _by(eqn, operands))]


def _reshape(eqn: JaxprEqn, operands: list[_Value]) -> Views:
    view = _only(operands)
    return [view.moved(_regroup(view.axes, eqn.params["new_sizes"]), _by(eqn, operands))]


def _regroup(axes: Sequence[Parts], shape: Sequence[int]) -> list[Parts]:
    """The parts of all axes, laid end to end and cut anew; where they cannot be cut so, they are of no one axis."""
    left = [part for parts in axes for part in parts if part.size > 1]
    found: list[Parts] = []
    for size in shape:
        mine: list[Part] = []
        room = size
        while room > 1 and left:
            part = left.pop(0)
            if room % part.size == 0:
                mine.append(part)
                room //= part.size
            elif part.size % room == 0:  # it is cut in two, the outer one of which is wanted
                inner = part.size // room
                mine.append(Part(part.axis, room, part.stride * inner))
                left.insert(0, Part(part.axis, inner, part.stride))
                room = 1
            else:
                return [(Part(None, n),) for n in shape]
        found.append(tuple(mine))
    return found


def _squeeze(eqn: JaxprEqn, operands: list[_Value]) -> Views:
    view = _only(operands)
    gone = {d % len(view.axes) for d in eqn.params["dimensions"]}
    return [view.moved([parts for d, parts in enumerate(view.axes) if d not in gone], _by(eqn, operands))]


def _broadcast(eqn: JaxprEqn, operands: list[_Value]) -> Views:
    view, shape = _only(operands), eqn.params["shape"]
    axes: list[Parts] = [(Part(None, size),) for size in shape]
    for parts, d in zip(view.axes, eqn.params["broadcast_dimensions"], strict=True):
        if math.prod(part.size for part in parts) == shape[d]:
            axes[d] = parts
    return [view.moved(axes, _by(eqn, operands))]


def _cut(eqn: JaxprEqn, operands: list[_Value]) -> Views:
    """What takes some of the indices of some axes: the others are what they were."""
    view = _only(operands)
    before, turned = _shape(eqn.invars[0]), eqn.params.get("dimensions", ())

    def axes(after: Sequence[int]) -> list[Parts]:
        return [
            view.axes[d] if a == b and d not in turned else (Part(None, b),)
            for d, (a, b) in enumerate(zip(before, after, strict=True))
        ]

    return [view.moved(axes(_shape(var)), _by(eqn, operands, i)) for i, var in enumerate(eqn.outvars)]


_MOVES: dict[str, Callable[[JaxprEqn, list[_Value]], Views]] = {
    **dict.fromkeys(("convert_element_type", "copy", "sharding_constraint", "optimization_barrier", "name"), _same),
    "reduce_precision": _same,
    **dict.fromkeys(("slice", "split", "dynamic_slice", "rev"), _cut),
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
}

_ADDS = ("add", "add_any")
_LINEAR = (*_MOVES, *_ADDS, "sub", "neg", "concatenate", "pad", "reduce_sum")


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


def _free(shape: Sequence[int]) -> list[Parts]:
    return [(Part(None, size),) for size in shape]


def _squared(array: Any) -> jax.Array:
    return jnp.square(jnp.asarray(array).astype(jnp.float32))


# Readings: an equation, its operands and which of them is the kernel -> what it reads, None where that is not known.
def _dot(eqn: JaxprEqn, operands: list[_Value], kernel: int) -> Reading | None:
    view, x = operands[kernel].view, operands[1 - kernel].array
    assert view is not None
    contracting, batch = eqn.params["dimension_numbers"]
    summed = dict(zip(contracting[1 - kernel], contracting[kernel], strict=True))  # axis of x -> of the kernel
    side_by_side = dict(zip(batch[1 - kernel], batch[kernel], strict=True))
    if not summed:
        return None
    axes = _free(np.shape(x))
    for mine, its in summed.items():
        axes[mine] = view.axes[its]

    def squares() -> jax.Array:
        kept = summed | side_by_side
        sums = jnp.sum(_squared(x), axis=tuple(d for d in range(np.ndim(x)) if d not in kept))
        its = [kept[d] for d in sorted(kept)]  # the kernel's axes, in the order in which x has them
        whole = sums.transpose(np.argsort(its))
        shape = _shape(eqn.invars[kernel])
        return view.back(
            jnp.broadcast_to(jnp.expand_dims(whole, [d for d in range(len(shape)) if d not in its]), shape)
        )

    return Reading(view.path, x, tuple(axes), view.shape, squares)


def _conv(eqn: JaxprEqn, operands: list[_Value], kernel: int) -> Reading | None:
    view, x, groups = operands[1].view, operands[0].array, eqn.params["feature_group_count"]
    if kernel != 1 or view is None or eqn.params["batch_group_count"] != 1:
        return None
    numbers = eqn.params["dimension_numbers"]
    feature, inward, outward = numbers.lhs_spec[1], numbers.rhs_spec[1], numbers.rhs_spec[0]
    axes = _free(np.shape(x))
    axes[feature] = (Part(None, groups), *view.axes[inward])
    shape = _shape(eqn.invars[1])

    def squares() -> jax.Array:
        one = tuple(groups if d == outward else size for d, size in enumerate(shape))  # an output for each group

        def product(k: jax.Array) -> jax.Array:
            return bind(eqn, [_squared(x), k], preferred_element_type=jnp.float32)

        out = jax.eval_shape(product, jax.ShapeDtypeStruct(one, jnp.float32))
        (sums,) = jax.linear_transpose(product, jax.ShapeDtypeStruct(one, jnp.float32))(jnp.ones(out.shape, out.dtype))
        return view.back(jnp.repeat(sums, shape[outward] // groups, axis=outward))

    return Reading(view.path, x, tuple(axes), view.shape, squares)


def _lookup(eqn: JaxprEqn, operands: list[_Value], kernel: int) -> Reading | None:
    view = operands[0].view
    if kernel != 0 or view is None:
        return None
    take = _by(eqn, operands)

    def squares() -> jax.Array:
        whole = jax.ShapeDtypeStruct(_shape(eqn.invars[0]), jnp.float32)
        out = jax.eval_shape(take, whole)
        return view.back(jax.linear_transpose(take, whole)(jnp.ones(out.shape, out.dtype))[0])

    return Reading(view.path, operands[1].array, tuple(_free(np.shape(operands[1].array))), view.shape, squares)


_READ: dict[str, Callable[[JaxprEqn, list[_Value], int], Reading | None]] = {
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "gather": _lookup,
}
