"""Gradients that are outer products: of a dense layer that one vector goes through, dL/dw = x d^T.

A function is evaluated equation by equation. Its outputs that are the product of two vectors, up to moves of elements,
are answered as these two: sums over examples then need no array of the shape of all gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from prune_jax.groups.dataflow import CALLS, DERIVATIVES
from prune_jax.groups.walk import bind


@partial(jax.tree_util.register_dataclass, data_fields=("left", "right"), meta_fields=("moves",))
@dataclass(frozen=True)
class Outer:
    """left (x) right, `[*left, *right]`, and then its moves."""

    left: jax.Array
    right: jax.Array
    moves: tuple[Callable[[jax.Array], jax.Array], ...] = ()

    def squares(self) -> jax.Array:
        """The sum over examples, the first axis of both, of the squares: sum_b l_b^2 (x) r_b^2, float32."""
        left, right = (jnp.square(a.astype(jnp.float32)) for a in (self.left, self.right))
        total = jnp.tensordot(left, right, axes=((0,), (0,)), precision=lax.Precision.HIGHEST)
        for move in self.moves:
            total = move(total)
        return total


class _Value(NamedTuple):
    array: Any
    outer: Outer | None = None


def evaluate(function: ClosedJaxpr, inputs: Sequence[Any]) -> list[jax.Array | Outer]:
    """The function's outputs; those that are outer products as such.

    What is not asked for is never computed inside `jit`.

    >>> f = jax.make_jaxpr(lambda x, d: (x.T @ d, x + 1))(jnp.ones((1, 2)), jnp.ones((1, 3)))
    >>> [type(found).__name__ for found in evaluate(f, [jnp.ones((1, 2)), jnp.ones((1, 3))])]
    ['Outer', 'ArrayImpl']
    """
    values = _run(function.jaxpr, function.consts, [_Value(array) for array in inputs])
    return [value.array if value.outer is None else value.outer for value in values]


def _run(jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[_Value]) -> list[_Value]:
    known: dict[Any, _Value] = dict(zip(jaxpr.invars, inputs, strict=True))
    known |= {var: _Value(const) for var, const in zip(jaxpr.constvars, consts, strict=True)}

    def read(atom: Any) -> _Value:
        return _Value(atom.val) if isinstance(atom, Literal) else known[atom]

    for eqn in jaxpr.eqns:
        known.update(zip(eqn.outvars, _equation(eqn, [read(atom) for atom in eqn.invars]), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _equation(eqn: JaxprEqn, operands: list[_Value]) -> list[_Value]:
    name = eqn.primitive.name
    held = eqn.params.get(CALLS.get(name) or DERIVATIVES.get(name, ""))
    if held is not None:
        body, consts = (held.jaxpr, held.consts) if isinstance(held, ClosedJaxpr) else (held, ())
        return _run(body, consts, operands)
    made = bind(eqn, [operand.array for operand in operands])
    if eqn.primitive.multiple_results:
        return [_Value(array) for array in made]
    if name == "dot_general":
        return [_Value(made, _product(eqn, operands))]
    outer = operands[0].outer if operands else None
    if outer is not None and name in ("transpose", "reshape", "squeeze"):
        return [_Value(made, replace(outer, moves=(*outer.moves, lambda array: bind(eqn, [array]))))]
    return [
        _Value(made, outer if name == "convert_element_type" and jnp.issubdtype(made.dtype, jnp.floating) else None)
    ]


def _product(eqn: JaxprEqn, operands: list[_Value]) -> Outer | None:
    """The two operands of a product that sums over one number."""
    contracted, batched = eqn.params["dimension_numbers"]
    left, right = (operand.array for operand in operands)
    if any(batched) or math.prod(left.shape[axis] for axis in contracted[0]) != 1:
        return None
    return Outer(jnp.squeeze(left, contracted[0]), jnp.squeeze(right, contracted[1]))
