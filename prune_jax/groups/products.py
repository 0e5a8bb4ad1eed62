"""Rules of matrix products and convolutions: what they sum over is one axis, in both operands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn

from prune_jax.groups.values import UNKNOWN, Axis, Dead, Unsettled, Value, same
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
        axes += [_through(axis) for d, axis in enumerate(value.axes) if d not in used]
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


def _through(axis: Axis) -> Axis:
    """A free axis: a sum of zeros is zero."""
    return Axis(axis.rows, 0.0 if same(axis.dead, 0.0) else UNKNOWN)


def _product(a: Dead, b: Dead) -> Dead:
    numbers = [n for n in (a, b) if not isinstance(n, Unsettled)]
    return 0.0 if 0.0 in numbers and all(math.isfinite(n) for n in numbers) else UNKNOWN


def _adds_nothing(walk: Walk, eqn: JaxprEqn, a: Axis, b: Axis) -> None:
    if isinstance(_product(a.dead, b.dead), Unsettled):
        for axis in (a, b):
            walk.fix(eqn, axis, "it is summed over, and what stands at a pruned index is not zero")


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
    batch = _through(x.axes[numbers.lhs_spec[0]])
    shape = shape_of(eqn.outvars[0])
    axes: list[Axis] = [walk.never(eqn, size, text) for size in shape]
    axes[numbers.out_spec[0]] = batch
    axes[numbers.out_spec[1]] = Axis(out_rows, _through(outward).dead)

    def rewrite() -> Any:
        return bind(eqn, [x.array, kernel.array], feature_group_count=count)

    return walk.outputs(eqn, [axes], operands, rewrite=rewrite)


def _grid(outer: Axis, inner: Axis) -> Axis:
    """The axis that joins two, without the parts that never die."""
    rows = [np.repeat(row, inner.size) for row in outer.rows]
    rows += [np.tile(row, outer.size) for row in inner.rows if (row >= 0).any() and inner.size > 1]
    return Axis(np.stack(rows))
