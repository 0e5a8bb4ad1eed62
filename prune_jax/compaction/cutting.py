"""Cutting: trees that mirror the parameters, and functions of them, without the indices that are not kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prune_jax.errors import UserMistake
from prune_jax.groups import Analysis, Function, analyse, mirrors, rewrite
from prune_jax.trees import PyTree, leaves_by_path, map_by_path

Keep = Mapping[str, Sequence[np.ndarray]]  # path -> by axis, the indices that are left


@dataclass(frozen=True)
class Traced:
    """A function that was analysed at these shapes of its parameters and inputs."""

    function: Function
    analysis: Analysis
    shapes: PyTree
    inputs: tuple[Any, ...]


def cut(tree: PyTree, shapes: PyTree, keep: Keep) -> PyTree:
    """Cuts the indices that are not in `keep` out of a tree that mirrors parameters of these shapes.

    A leaf mirrors the parameter whose path ends its own, if it has its shape; other leaves stay as they are.
    """
    named = leaves_by_path(shapes)
    paths, homes = list(named), dict(zip(leaves_by_path(tree), mirrors(tree, named), strict=True))

    def of(path: str, leaf: Any) -> Any:
        home = homes[path]
        return leaf if home is None or paths[home] not in keep else _cut(leaf, keep[paths[home]])

    return map_by_path(of, tree)


def shrink(
    apply: Callable[..., Any],
    shapes: PyTree,
    keep: Keep,
    *,
    release: Sequence[str] = (),
    traced: Traced | None = None,
) -> Callable[..., Any]:
    """A function on parameters that were cut to `keep`, computing what `apply` does on whole, masked ones.

    Args:
        apply: `apply(params, *inputs) -> outputs`.
        shapes: pytree of the whole parameters' shapes and types.
        keep: path -> for each axis the indices that are left; parameters that it lacks are whole.
        release: patterns of outputs that may get narrower, as in `trace`.
        traced: the function's trace, if it is at hand: it is used where the shapes are the same.

    Returns:
        `small(params, *inputs) -> outputs`; it can be jitted, differentiated, mapped, sharded and exported.
    """
    sizes = {path: leaf.shape for path, leaf in leaves_by_path(shapes).items()}
    gone = {path for path, axes in keep.items() if sizes[path] and all(sizes[path]) and not any(map(len, axes))}

    def small(params: PyTree, *inputs: Any) -> Any:
        whole = jax.tree.map(lambda w, s: jax.ShapeDtypeStruct(s.shape, w.dtype), params, shapes)
        at = jax.tree.map(struct, inputs)
        at_hand = traced is not None and (whole, at) == (traced.shapes, traced.inputs)
        if traced is not None and at_hand and not gone:
            analysis = traced.analysis
        else:
            function = traced.function if traced is not None and at_hand else Function.of(apply, whole, at)
            analysis = analyse(function, release, gone)
        alive = _alive(analysis, keep, at)
        return rewrite(analysis, alive, jax.tree.leaves(params), jax.tree.leaves(inputs))

    return small


def _alive(analysis: Analysis, keep: Keep, inputs: Any) -> np.ndarray:
    """By label, who lives where these indices of the parameters are left."""
    keeps = [[np.ones(axis.size, bool) for axis in axes] for axes in analysis.starts]
    for path, masks in zip(analysis.paths, keeps, strict=True):
        for mask, left in zip(masks, keep.get(path, ()), strict=False):
            mask[:] = False
            mask[np.asarray(left)] = True
    alive = analysis.alive(analysis.units_within(keeps))
    for path, mine, theirs, read in zip(analysis.paths, keeps, analysis.keeps(alive), analysis.read, strict=True):
        for d, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            if read and not np.array_equal(a, b):
                raise UserMistake(
                    f"axis {d} of {path!r} cannot be pruned like this for inputs shaped "
                    f"{[s.shape for s in jax.tree.leaves(inputs)]}: the function ties it otherwise there than "
                    "where it was traced. Trace it with inputs like these."
                )
    return alive


def struct(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape and type of an array."""
    return jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.result_type(leaf))


def _cut(leaf: Any, keep: Sequence[np.ndarray]) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(tuple(len(k) for k in keep), leaf.dtype)
    if leaf.dtype == jax.dtypes.float0:  # the gradient of whole numbers, which holds nothing
        return np.zeros([len(k) for k in keep], jax.dtypes.float0)
    for d, places in enumerate(keep):
        if len(places) < leaf.shape[d]:
            leaf = jnp.take(leaf, places, axis=d)
    return leaf
