"""What a function costs: parameters, multiplications and bytes, read off its jaxpr without running it.

Whatever depends on parameters and constants alone is followed to the product that uses it, so that zeros are seen
through transposes, splits, casts and masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.interpreters import partial_eval

from prune_jax.trees import PyTree, leaves_by_path

_NOBODY = -1  # owner of the products of two activations
_MOVES = {"broadcast_in_dim", "concatenate", "copy", "pad", "reshape", "rev", "slice", "split", "squeeze", "transpose"}
_OPAQUE = {"ffi_call", "io_callback", "pallas_call", "pure_callback", "ragged_dot_general"}


@dataclass(frozen=True)
class Cost:
    """What one call of a function costs.

    Attributes:
        params: numbers in the parameter arrays.
        nonzero: those that are not zero.
        macs: multiply-accumulate operations of one call.
        effective_macs: those of them whose weight is not zero.
        bytes: size of the parameter arrays in memory.
        layers: parameter path -> (macs, effective macs) of the products in which it is the weight; what is left to
            `macs` are products of two activations, as in attention.
        notes: what the count could not see, in words; mostly empty.
    """

    params: int
    nonzero: int
    macs: int
    effective_macs: int
    bytes: int
    layers: Mapping[str, tuple[int, int]]
    notes: tuple[str, ...] = ()


def cost(apply: Callable[..., Any], params: PyTree, *inputs: Any) -> Cost:
    """Counts the parameters and the multiplications of `apply(params, *inputs)`, for the whole batch.

    A matrix product `[m, k] x [k, n]` is `m k n` MACs. A convolution is
    `batch * positions * k_h k_w * (c_in / groups) * c_out`, its padding counted as if it were data, as is usual;
    positions are those of the output, or of the input for a transposed convolution. Biases, activations,
    normalisation, pooling, lookups and products without a sum are no MACs. Work whose result nobody uses is left
    out, as the compiler does. A loop of known length counts its body that many times, a branch its dearest arm.

    `effective_macs` is exact: it counts the MACs whose weight is not zero, weight by weight. A weight is an operand
    that depends on `params` and constants only, however it was reshaped, cast, split, joined or multiplied by a mask.
    Where both operands are weights, the sparser one counts; where neither is, every MAC does.

    Args:
        apply: `apply(params, *inputs) -> outputs`.
        params: any pytree of arrays, or of `ShapeDtypeStruct`: then no zeros are known, and `nonzero = params`.
            PRNG keys and integer scalars (counters) among its leaves are no parameters.
        *inputs: pytrees of arrays or of `ShapeDtypeStruct`; their batch size is the one that is counted.

    Returns:
        The counts; nothing is run but what depends on `params` alone.

    >>> apply = lambda params, x: jnp.tanh(x @ params["w1"]) @ params["w2"]
    >>> params = {"w1": jnp.ones((4, 3)).at[0].set(0.0), "w2": jnp.ones((3, 2))}
    >>> c = cost(apply, params, jax.ShapeDtypeStruct((1, 4), "float32"))
    >>> c.params, c.nonzero, c.macs, c.effective_macs, c.bytes
    (18, 15, 18, 15, 72)
    >>> dict(c.layers)
    {'w1': (12, 9), 'w2': (6, 6)}
    """
    closed = jax.make_jaxpr(apply)(params, *inputs)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    named = leaves_by_path(params)
    values = [leaf if _is_concrete(leaf) else None for leaf in named.values()]
    avals = [_aval(var) for var in jaxpr.invars[: len(named)]]
    walk = _Walk(sizes=tuple(aval.size for aval in avals), notes=set())
    weights = [_parameter(i, value, aval.shape) for i, (value, aval) in enumerate(zip(values, avals, strict=True))]
    rest: list[_Known | None] = [None] * (len(jaxpr.invars) - len(named))
    tally, _ = walk.run(ClosedJaxpr(jaxpr, closed.consts), [*weights, *rest])

    dtypes: list[Any] = [getattr(leaf, "dtype", aval.dtype) for leaf, aval in zip(named.values(), avals, strict=True)]
    counted = [i for i, dtype in enumerate(dtypes) if _is_parameter(dtype, avals[i].ndim)]
    paths = list(named)
    return Cost(
        params=sum(avals[i].size for i in counted),
        nonzero=sum(_count_nonzero(values[i], avals[i].size) for i in counted),
        macs=sum(macs for macs, _ in tally.values()),
        effective_macs=sum(effective for _, effective in tally.values()),
        bytes=sum(avals[i].size * dtypes[i].itemsize for i in counted),
        layers={paths[i]: tally[i] for i in sorted(tally) if i != _NOBODY},
        notes=tuple(sorted(walk.notes)),
    )


def _is_concrete(leaf: Any) -> bool:
    return not isinstance(leaf, (jax.ShapeDtypeStruct, jax.core.Tracer))


def _count_nonzero(value: Any, size: int) -> int:
    return size if value is None else int(np.count_nonzero(value))


def _aval(atom: Any) -> Any:
    return atom.aval  # typed loosely: JAX's own annotation hides shape and dtype


def _is_parameter(dtype: Any, ndim: int) -> bool:
    return jnp.issubdtype(dtype, jnp.number) and (ndim > 0 or not jnp.issubdtype(dtype, jnp.integer))


_Tally = dict[int, tuple[int, int]]  # parameter -> (macs, effective macs)


def _add(into: _Tally, more: _Tally, times: int = 1) -> None:
    for owner, (macs, effective) in more.items():
        had = into.get(owner, (0, 0))
        into[owner] = (had[0] + times * macs, had[1] + times * effective)


@dataclass(frozen=True)
class _Known:
    """A value that depends on parameters and constants only; it is computed when somebody asks."""

    leaves: frozenset[int]  # the parameters it is made of; none: a constant
    value: Callable[[], Any]  # the array, or None where a parameter is abstract
    owner: Callable[[], Any]  # int array of the same shape: from which parameter each element comes


def _parameter(index: int, value: Any, shape: tuple[int, ...]) -> _Known:
    return _Known(frozenset([index]), lambda: value, lambda: _owned_by(index, shape))


def _constant(value: Any) -> _Known:
    return _Known(frozenset(), lambda: value, lambda: _owned_by(_NOBODY, np.shape(value)))


def _owned_by(index: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(np.int32(index), shape)


def _at(known: _Known, i: int) -> _Known:
    """The `i`-th slice along the first axis, as a scan hands it to its body."""
    return _Known(known.leaves, lambda: known.value()[i], lambda: known.owner()[i])


def _is_weight(known: _Known | None) -> bool:
    return known is not None and bool(known.leaves)


@dataclass(frozen=True)
class _Walk:
    """One walk over a jaxpr: `sizes` of the parameters, and the `notes` gathered on the way."""

    sizes: tuple[int, ...]
    notes: set[str]

    def run(self, closed: ClosedJaxpr, inputs: Sequence[_Known | None]) -> tuple[_Tally, list[_Known | None]]:
        """The tally of `closed` on `inputs` (None: an activation), and what is known of its outputs."""
        jaxpr = closed.jaxpr
        known: dict[Any, _Known | None] = dict(zip(jaxpr.invars, inputs, strict=True))
        known |= {var: _constant(value) for var, value in zip(jaxpr.constvars, closed.consts, strict=True)}

        def read(atom: Any) -> _Known | None:
            return _constant(atom.val) if isinstance(atom, Literal) else known[atom]

        tally: _Tally = {}
        for eqn in jaxpr.eqns:
            more, outputs = self._equation(eqn, [read(atom) for atom in eqn.invars])
            _add(tally, more)
            known.update(zip(eqn.outvars, outputs, strict=True))
        return tally, [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: JaxprEqn, operands: list[_Known | None]) -> tuple[_Tally, list[_Known | None]]:
        unknown: list[_Known | None] = [None] * len(eqn.outvars)
        name = eqn.primitive.name
        if name in _OPAQUE:
            self.notes.add(f"the multiplications inside {name} are not counted")
            return {}, unknown
        match name:
            case "dot_general":
                return self._charge(_dot_macs(eqn), operands), self._derive(eqn, operands)
            case "conv_general_dilated":
                return self._charge(_conv_macs(eqn), operands), self._derive(eqn, operands)
            case "scan":
                return self._scan(eqn, operands), unknown
            case "while":
                return self._while(eqn, operands), unknown
            case "cond":
                arms = [self.run(arm, operands[1:])[0] for arm in eqn.params["branches"]]
                return max(arms, key=lambda arm: [sum(column) for column in zip(*arm.values(), strict=True)]), unknown
        inner = [_close(value) for value in eqn.params.values() if isinstance(value, (Jaxpr, ClosedJaxpr))]
        if not inner:
            return {}, self._derive(eqn, operands)
        if len(inner) == 1 and _is_call(eqn, inner[0].jaxpr):  # jit, remat, custom_jvp, custom_vjp, ...
            return self.run(inner[0], operands)
        tally: _Tally = {}
        for closed in inner:
            _add(tally, self.run(closed, [None] * len(closed.jaxpr.invars))[0])
        if tally:
            self.notes.add(f"the multiplications inside {name} are counted once")
        return tally, unknown

    def _scan(self, eqn: JaxprEqn, operands: list[_Known | None]) -> _Tally:
        body, length = eqn.params["jaxpr"], eqn.params["length"]
        first, last = eqn.params["num_consts"], eqn.params["num_consts"] + eqn.params["num_carry"]
        fixed = operands[:first] + _invariant(body.jaxpr, operands[first:last], first)
        rows = operands[last:]
        tally: _Tally = {}
        if any(_is_weight(row) for row in rows):  # stacked layers: each has its own zeros
            for i in range(length):
                _add(tally, self.run(body, fixed + [None if row is None else _at(row, i) for row in rows])[0])
        else:
            _add(tally, self.run(body, fixed + [None] * len(rows))[0], times=length)
        return tally

    def _while(self, eqn: JaxprEqn, operands: list[_Known | None]) -> _Tally:
        test, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
        n_test, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        consts, carry = operands[n_test : n_test + n_body], operands[n_test + n_body :]
        carry = _invariant(body.jaxpr, carry, n_body)
        tally, _ = self.run(test, [*operands[:n_test], *carry])
        _add(tally, self.run(body, [*consts, *carry])[0])
        if tally:
            self.notes.add("a while loop of unknown length is counted once")
        return tally

    def _charge(self, macs: int, operands: list[_Known | None]) -> _Tally:
        """Shares `macs` among the owners of the weight; each of its elements is used equally often."""
        shares = [self._shares(macs, o) for o in operands if o is not None and o.leaves]
        if macs == 0 or not shares:
            return {_NOBODY: (macs, macs)} if macs else {}
        return min(shares, key=lambda share: sum(effective for _, effective in share.values()))

    def _shares(self, macs: int, weight: _Known) -> _Tally:
        value = weight.value()
        alive = None if value is None else np.asarray(value) != 0
        if len(weight.leaves) == 1:
            share = macs if alive is None else macs * int(alive.sum()) // alive.size
            return {next(iter(weight.leaves)): (macs, share)}
        owners = np.asarray(weight.owner())
        alive = np.ones(owners.shape, bool) if alive is None else alive
        return {
            int(owner): (macs * int(mine.sum()) // mine.size, macs * int((mine & alive).sum()) // mine.size)
            for owner in np.unique(owners)
            for mine in [owners == owner]
        }

    def _derive(self, eqn: JaxprEqn, operands: Sequence[_Known | None]) -> list[_Known | None]:
        """What is known of an equation's outputs: all, if all operands are known, and nothing otherwise."""
        if eqn.effects or any(o is None for o in operands):
            return [None] * len(eqn.outvars)
        parents = [o for o in operands if o is not None]
        leaves = frozenset[int]().union(*(o.leaves for o in parents))

        def bind(arrays: Iterable[Any]) -> list[Any]:
            out = eqn.primitive.bind(*arrays, **eqn.params)
            return list(out) if eqn.primitive.multiple_results else [out]

        @cache
        def values() -> list[Any]:
            arrays = [o.value() for o in parents]
            return [None] * len(eqn.outvars) if any(a is None for a in arrays) else bind(arrays)

        @cache
        def owners() -> list[Any]:
            if len(leaves) > 1 and eqn.primitive.name in _MOVES:
                return bind(o.owner() for o in parents)
            largest = max(leaves, key=lambda leaf: (self.sizes[leaf], -leaf), default=_NOBODY)
            return [_owned_by(largest, _aval(var).shape) for var in eqn.outvars]

        def output(i: int) -> _Known:
            return _Known(leaves, lambda: values()[i], lambda: owners()[i])

        return [output(i) for i in range(len(eqn.outvars))]


def _close(jaxpr: Jaxpr | ClosedJaxpr) -> ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def _is_call(eqn: JaxprEqn, inner: Jaxpr) -> bool:
    """Whether the equation hands its operands to `inner` one by one (a reduction's jaxpr, e.g., takes scalars)."""
    outside = [_aval(atom).shape for atom in (*eqn.invars, *eqn.outvars)]
    return outside == [_aval(atom).shape for atom in (*inner.invars, *inner.outvars)]


def _invariant(body: Jaxpr, carry: list[_Known | None], first: int) -> list[_Known | None]:
    """Forgets every carried value that the body of a loop does not hand on as it is."""
    return [known if body.outvars[i] is body.invars[first + i] else None for i, known in enumerate(carry)]


def _dot_macs(eqn: JaxprEqn) -> int:
    (contracting, _), _ = eqn.params["dimension_numbers"]
    left = _aval(eqn.invars[0]).shape
    return _aval(eqn.outvars[0]).size * math.prod(left[axis] for axis in contracting) if contracting else 0


def _conv_macs(eqn: JaxprEqn) -> int:
    left, kernel, out = _aval(eqn.invars[0]), _aval(eqn.invars[1]), _aval(eqn.outvars[0])
    numbers = eqn.params["dimension_numbers"]  # each spec: batch, feature, then the spatial axes
    positions = math.prod(
        left.shape[l] if dilation > 1 else out.shape[o]
        for l, o, dilation in zip(numbers.lhs_spec[2:], numbers.out_spec[2:], eqn.params["lhs_dilation"], strict=True)
    )
    return out.shape[numbers.out_spec[0]] * positions * kernel.size
