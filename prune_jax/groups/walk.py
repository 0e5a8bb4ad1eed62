"""The walk over a jaxpr that all analysis and all rewriting share.

Analysing, it labels every axis of every array and gathers ties. Rewriting, it does the same, and evaluates each
equation on arrays without their dead indices. The second walk meets the same labels as the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from prune_jax.groups.labels import Labels, Reason, living
from prune_jax.groups.values import COMPUTABLE, Axis, Unsettled, Value

Rule = Callable[["Walk", JaxprEqn, list[Value]], list[Value]]
RULES: dict[str, Rule] = {}  # primitive -> what its equations tie, and how they are rewritten
THROUGH: set[Rule] = set()  # rules that hand constants on as they are


def rule(*primitives: str, through: bool = False) -> Callable[[Rule], Rule]:
    """Registers the rule of some primitives; one that holds functions hands constants `through` to them."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(primitives, function))
        if through:
            THROUGH.add(function)
        return function

    return register


@dataclass(frozen=True)
class Walk:
    """One walk: with `alive` (bool, by label) it rewrites, without it analyses.

    Without `derivatives` it treats functions with derivatives of their own as any other: so derivatives are walked.
    """

    labels: Labels
    alive: np.ndarray | None = None
    derivatives: bool = True

    def run(self, closed: ClosedJaxpr, inputs: Sequence[Value]) -> list[Value]:
        """The outputs of `closed` on `inputs`."""
        jaxpr = closed.jaxpr
        known = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, constant in zip(jaxpr.constvars, closed.consts, strict=True):
            known[var] = self.constant(constant)

        def read(atom: Any) -> Value:
            return self.constant(atom.val) if isinstance(atom, Literal) else known[atom]

        for eqn in jaxpr.eqns:
            outputs = self._equation(eqn, [read(atom) for atom in eqn.invars])
            known.update(zip(eqn.outvars, [self._no_single(eqn, value) for value in outputs], strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
        apply = RULES.get(eqn.primitive.name, opaque)
        if any(o.whole for o in operands) and all(o.whole or o.const is not None for o in operands) and not eqn.effects:
            return self._constants(eqn, operands)
        return apply(self, eqn, operands if apply in THROUGH else [self.cut(operand) for operand in operands])

    def _constants(self, eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
        """The outputs of an equation on constants: whole, for each use may cut them otherwise."""
        arrays: Sequence[Any] = [None] * len(eqn.outvars)
        if self.alive is not None:
            given = [
                o.array if o.whole or not o.axes else jnp.full(o.shape, o.const or 0.0, dtype_of(atom))
                for o, atom in zip(operands, eqn.invars, strict=True)
            ]
            made = bind(eqn, given)
            arrays = list(made) if eqn.primitive.multiple_results else [made]
        known = self._known(eqn, operands)
        return [self.whole(a, shape_of(var), known) for a, var in zip(arrays, eqn.outvars, strict=True)]

    def whole(self, array: Any, shape: tuple[int, ...], known: Callable[[], Any] | None) -> Value:
        """A constant that keeps all of its indices until it meets something else."""
        axes = tuple(Axis(self.labels.never(Reason("it meets a constant"), size)) for size in shape)
        return Value(axes, None, known, array, None, True, True)

    def cut(self, value: Value) -> Value:
        """A constant as what it meets makes of it: its axes are free at each use; other values as they are."""
        if not value.axes or not (value.whole or value.const is not None):
            return value
        if value.const is None:
            return self.source(lambda: value.array, value.shape, value.known)
        axes = tuple(Axis(self.labels.fresh(size), value.const) for size in value.shape)
        array = value.array
        if array is not None:
            array = jnp.full([self.size(axis) for axis in axes], value.const, array.dtype)
        return Value(axes, value.const, value.known, array, weights=True)

    def constant(self, whole: Any) -> Value:
        """A value that stands in the function itself. Its elements at dead indices are what they are."""
        if not np.ndim(whole):
            dtype = jax.dtypes.result_type(whole)
            real = jnp.issubdtype(dtype, np.floating) or jnp.issubdtype(dtype, np.integer)
            return Value((), float(whole) if real else None, lambda: whole, whole, None, True)
        return self.whole(whole, np.shape(whole), lambda: whole)

    def source(self, make: Callable[[], Any], shape: tuple[int, ...], known: Callable[[], Any] | None = None) -> Value:
        """A value that is made whole and then cut: its axes are free, and what is dead can be had."""
        axes = tuple(Axis(self.labels.fresh(size), COMPUTABLE) for size in shape)
        if self.alive is None:
            return Value(axes, None, known, weights=known is not None)
        whole = make()
        keeps = [np.flatnonzero(self.keep(axis)) for axis in axes]

        def cut(kept: Sequence[np.ndarray]) -> Any:
            array = whole
            for i, positions in enumerate(kept):
                array = pick(array, i, positions)
            return array

        def part(i: int) -> Any:
            dead = np.flatnonzero(~self.keep(axes[i]))
            return cut([dead if k == i else positions for k, positions in enumerate(keeps)])

        return Value(axes, None, known, cut(keeps), part, known is not None)

    def outputs(
        self,
        eqn: JaxprEqn,
        axes: Sequence[Sequence[Axis]],
        operands: Sequence[Value],
        *,
        rewrite: Callable[[], Any] | None = None,
        part: Callable[[int], Any] | None = None,
        const: float | None = None,
    ) -> list[Value]:
        """The outputs of an equation.

        Args:
            eqn: the equation.
            axes: of each output.
            operands: its operands.
            rewrite: makes the outputs; left out, the same equation on smaller operands.
            part: of the only output, as in `Value`.
            const: of the only output, as in `Value`.
        """
        known = self._known(eqn, operands)
        weights = bool(operands) and all(operand.weights for operand in operands)
        arrays: Sequence[Any] = [None] * len(axes)
        if self.alive is not None:
            made = rewrite() if rewrite else bind(eqn, [operand.array for operand in operands])
            arrays = list(made) if eqn.primitive.multiple_results else [made]
        return [
            Value(tuple(of_one), const, known, array, part, weights) for of_one, array in zip(axes, arrays, strict=True)
        ]

    def _known(self, eqn: JaxprEqn, operands: Sequence[Value]) -> Callable[[], Any] | None:
        makers = [operand.known for operand in operands]
        if eqn.primitive.multiple_results or eqn.effects or not all(makers):
            return None

        def whole() -> Any:
            with jax.ensure_compile_time_eval():
                return bind(eqn, [jnp.asarray(maker()) for maker in makers if maker])

        return whole

    def keep(self, axis: Axis) -> np.ndarray:
        """Which of its indices are alive, `[size]`."""
        assert self.alive is not None
        return np.asarray(living(axis.rows, self.alive).all(axis=0))

    def size(self, axis: Axis) -> int:
        """How many of its indices are alive."""
        return int(self.keep(axis).sum())

    def dead(self, value: Value, i: int, dtype: Any) -> Any:
        """What stands at the dead indices of axis `i`, `[..., 1 or dead, ...]`; of a scalar, the scalar."""
        if not value.axes:
            return value.array
        found = value.axes[i].dead
        if not isinstance(found, Unsettled):
            shape = list(value.array.shape)
            shape[i] = 1
            return jnp.full(shape, found, dtype)
        assert value.part is not None
        return value.part(i)

    def tie(self, eqn: JaxprEqn, *axes: Axis) -> np.ndarray:
        """Ties axes that are one axis; the labels of that."""
        rows = axes[0].rows
        if self.alive is not None and any((self.keep(axis) != self.keep(axes[0])).any() for axis in axes[1:]):
            raise RuntimeError(f"the dead indices of two axes that meet in {eqn.primitive.name} differ")
        for axis in axes[1:]:
            rows = self.labels.tie(rows, axis.rows, Reason(eqn.primitive.name, eqn))
        return rows

    def fix(self, eqn: JaxprEqn, axis: Axis, text: str) -> None:
        """Forbids that an index of the axis dies."""
        if self.alive is not None and not self.keep(axis).all():
            raise RuntimeError(f"a dead index reached {eqn.primitive.name}: {text}")
        self.labels.fix(axis.rows, Reason(text, eqn))

    def never(self, eqn: JaxprEqn, size: int, text: str) -> Axis:
        """An axis of which no index dies."""
        return Axis(self.labels.never(Reason(text, eqn), size))

    def _no_single(self, eqn: JaxprEqn, value: Value) -> Value:
        """An axis of one index cannot lose it."""
        for axis in value.axes:
            if axis.size == 1:
                self.fix(eqn, axis, "an axis has one index only")
        return value


def shape_of(atom: Any) -> tuple[int, ...]:
    """Its shape before anything dies."""
    return atom.aval.shape  # typed loosely: JAX's own annotation hides shape and dtype


def dtype_of(atom: Any) -> Any:
    """Its type of numbers."""
    return atom.aval.dtype


def bind(eqn: JaxprEqn, arrays: Sequence[Any], **changed: Any) -> Any:
    """Evaluates an equation, some of its parameters changed."""
    return eqn.primitive.bind(*arrays, **eqn.primitive.get_bind_params({**eqn.params, **changed}))


def opaque(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """What has no rule keeps all of its axes."""
    text = f"primitive {eqn.primitive.name!r} has no rule"
    for operand in operands:
        for axis in operand.axes:
            walk.fix(eqn, axis, text)
    return walk.outputs(eqn, [fixed_axes(walk, eqn, var, text) for var in eqn.outvars], operands)


def fixed_axes(walk: Walk, eqn: JaxprEqn, var: Any, text: str) -> list[Axis]:
    """Axes for an output that keeps all of its indices."""
    return [walk.never(eqn, size, text) for size in var.aval.shape]


def match(arrays: Sequence[Any], axis: int) -> list[Any]:
    """Repeats axes of size one, as primitives do not."""
    size = max((a.shape[axis] for a in arrays if np.ndim(a)), default=1)

    def repeat(a: Any) -> Any:
        return jnp.broadcast_to(a, (*a.shape[:axis], size, *a.shape[axis + 1 :])) if np.ndim(a) else a

    return [repeat(a) for a in arrays]


def pick(array: Any, axis: int, positions: np.ndarray) -> Any:
    """The elements at `positions` of an axis: by a slice where they form one, which is what XLA likes best."""
    size, count = array.shape[axis], len(positions)
    if count == size and np.array_equal(positions, np.arange(size)):
        return array
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended):
        return array[(slice(None),) * axis + (positions,)]
    steps = np.unique(np.diff(positions)) if count > 1 else np.array([1])
    if count and len(steps) == 1 and steps[0] > 0:
        start, stop = int(positions[0]), int(positions[-1]) + 1
        return jax.lax.slice_in_dim(jnp.asarray(array), start, stop, int(steps[0]), axis)
    return jnp.take(jnp.asarray(array), positions, axis=axis, mode="clip")


def ranks(keep: np.ndarray) -> np.ndarray:
    """Where each living index stands once the dead are gone."""
    return np.cumsum(keep) - 1
