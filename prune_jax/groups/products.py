"""Rules of matrix products and convolutions: what they sum over is one axis, in both operands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn

from prune_jax.groups.values import Axis, Dead, Value, is_zero, same, sum_of, vague
from prune_jax.groups.walk import Walk, bind, opaque, rule, shape_of


@rule("dot_general")
def dot_general(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Contracted axes are one, and dead indices must add nothing; batch axes are one; free axes pass."""
    left, right = operands
    (left_sum, right_sum), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    for l, r in zip(left_sum, right_sum, strict=True):
        walk.tie(eqn, left.axes[l], right.axes[r])
        _adds_nothing(walk, eqn, left.axes[l], right.axes[r])
        walk.labels.summed += [v.axes[d].rows for v, d in ((left, l), (right, r)) if v.weights]
    axes = []
    for l, r in zip(left_batch, right_batch, strict=True):
        rows = walk.tie(eqn, left.axes[l], right.axes[r])
        axes.append(Axis(rows, _product(left.axes[l].dead, right.axes[r].dead)))
    for value, used in ((left, {*left_sum, *left_batch}), (right, {*right_sum, *right_batch})):
        axes += [Axis(axis.rows, sum_of(axis.dead)) for d, axis in enumerate(value.axes) if d not in used]
    if (
        not left.weights
        and not right.weights
        and left_sum
        and _free(left, left_sum, left_batch)
        and _free(right, right_sum, right_batch)
    ):
        walk.labels.heads += [left.axes[l].rows for l in left_batch]
        walk.labels.head_dims += [left.axes[l].rows for l in left_sum]
        walk.labels.head_dims += [a.rows for d, a in enumerate(left.axes) if d not in {*left_sum, *left_batch}]
        walk.labels.head_dims += [a.rows for d, a in enumerate(right.axes) if d not in {*right_sum, *right_batch}]
    return walk.outputs(eqn, [axes], operands)


def _free(value: Value, *used: Sequence[int]) -> bool:
    """Whether axes of several indices are neither summed over nor gone through side by side."""
    return any(axis.size > 1 for d, axis in enumerate(value.axes) if all(d not in some for some in used))


def _product(a: Dead, b: Dead) -> Dead:
    return 0.0 if is_zero((a, b)) else vague(a, b)


def _adds_nothing(walk: Walk, eqn: JaxprEqn, a: Axis, b: Axis) -> None:
    if not same(_product(a.dead, b.dead), 0.0):
        for axis in (a, b):
            walk.fix(eqn, axis, "it is summed over, and what stands at a pruned index is not zero")


@rule("ragged_dot_general")
def ragged_dot(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """As a product; rows and matrices, of which each group of rows has its own, keep their places."""
    left, right, sizes = operands
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    ((left_sum, right_sum), (left_batch, right_batch)) = numbers.dot_dimension_numbers
    rows, groups = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    if left_batch or right_batch or {*rows} & {*left_sum}:
        return opaque(walk, eqn, operands)
    for value, fixed in ((left, rows), (right, groups), (sizes, range(len(sizes.axes)))):
        for d in fixed:
            walk.fix(eqn, value.axes[d], "its rows are counted in groups")
    for l, r in zip(left_sum, right_sum, strict=True):
        walk.tie(eqn, left.axes[l], right.axes[r])
        _adds_nothing(walk, eqn, left.axes[l], right.axes[r])
        walk.labels.summed += [v.axes[d].rows for v, d in ((left, l), (right, r)) if v.weights]
    free = [left.axes[d] for d in range(len(left.axes)) if d not in left_sum]
    free += [right.axes[d] for d in range(len(right.axes)) if d not in {*right_sum, *groups}]
    return walk.outputs(eqn, [[Axis(axis.rows, sum_of(axis.dead)) for axis in free]], operands)


@rule("conv_general_dilated")
def convolution(walk: Walk, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Input features are the kernel's, output features pass; with groups, both are grids of groups and places in them.

    A group dies with all its channels, or a place dies in every group, so that what is left is a convolution again.
    """
    x, kernel = operands
    if eqn.params["batch_group_count"] != 1:
        return opaque(walk, eqn, operands)
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    text = "a convolution slides over it"
    for value, spec in ((x, numbers.lhs_spec), (kernel, numbers.rhs_spec)):
        for d in spec[2:]:
            walk.fix(eqn, value.axes[d], text)
    features, inward = x.axes[numbers.lhs_spec[1]], kernel.axes[numbers.rhs_spec[1]]
    outward = kernel.axes[numbers.rhs_spec[0]]
    walk.labels.summed.append(inward.rows)
    walk.labels.channels += [features.rows, outward.rows]
    out_rows, count = outward.rows, groups
    if groups == 1:
        walk.tie(eqn, features, inward)
    else:
        group = Axis(walk.labels.fresh(groups))
        walk.tie(eqn, features, _grid(group, inward))
        place = Axis(walk.labels.fresh(outward.size // groups))
        if place.size == 1:
            walk.fix(eqn, place, "a group has one output")
            place = walk.never(eqn, 1, "a group has one output")
        out_rows = walk.tie(eqn, outward, _grid(group, place))
        if walk.alive is not None:
            count = walk.size(group)
    if groups == 1 or not inward.fixed:  # a dead group feeds nothing but its own dead outputs
        _adds_nothing(walk, eqn, features, inward)
    batch = x.axes[numbers.lhs_spec[0]]
    shape = shape_of(eqn.outvars[0])
    axes: list[Axis] = [walk.never(eqn, size, text) for size in shape]
    axes[numbers.out_spec[0]] = Axis(batch.rows, sum_of(batch.dead))
    axes[numbers.out_spec[1]] = Axis(out_rows, sum_of(outward.dead))

    def rewrite() -> Any:
        return bind(eqn, [x.array, kernel.array], feature_group_count=count)

    return walk.outputs(eqn, [axes], operands, rewrite=rewrite)


def _grid(outer: Axis, inner: Axis) -> Axis:
    """The axis that joins two, without the parts that never die."""
    rows = [np.repeat(row, inner.size) for row in outer.rows]
    rows += [np.tile(row, outer.size) for row in inner.rows if (row >= 0).any() and inner.size > 1]
    return Axis(np.stack(rows))
