"""Compaction: a network without its dead units, as smaller arrays and a smaller function.

The function is the user's own, walked again on smaller arrays; nothing of its code is changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prune_jax.costs import cost
from prune_jax.errors import UserMistake, did_you_mean
from prune_jax.groups import (
    Analysis,
    Group,
    analyse,
    check_target,
    checked_scores,
    dot,
    lowest,
    mirrors,
    of_kinds,
    ranked,
    rewrite,
    table,
    within,
)
from prune_jax.trees import PyTree, leaves_by_path, map_by_path

Dead = Mapping[str, Iterable[int]]  # group -> units
Keep = Mapping[str, Sequence[np.ndarray]]  # path -> by axis, the indices that are left


class TracedNetwork:
    """A function whose parameters' dependencies are known. Made by `trace`.

    Attributes:
        groups: name -> Group, of what may be pruned.
        frozen: (path, axis, reason) of what may not.
        params: those that it was traced with.
    """

    def __init__(
        self, apply: Callable[..., Any], params: PyTree, inputs: Sequence[Any], release: Sequence[str] = ()
    ) -> None:
        self._apply, self.params, self._release = apply, params, tuple(release)
        self._shapes = jax.tree.map(_struct, params)
        self._inputs = jax.tree.map(_struct, tuple(inputs))
        self._analysis = analyse(apply, self._shapes, self._inputs, self._release)

    @cached_property
    def groups(self) -> dict[str, Group]:
        """Name -> what may be pruned."""
        return {name: group for name, (group, _) in self._analysis.groups.items()}

    @cached_property
    def frozen(self) -> tuple[tuple[str, int, str], ...]:
        """What may not be pruned: path, axis and why."""
        return self._analysis.frozen()

    def choose(
        self,
        scores: PyTree,
        *,
        sparsity: float | None = None,
        params: float | None = None,
        macs: float | None = None,
        scope: str = "global",
        kinds: Iterable[str] = (),
        combine: str = "sum",
        min_keep: int = 1,
        round_to: int = 1,
        dead: Dead | None = None,
    ) -> dict[str, list[int]]:
        """Chooses the units that die: those with the lowest scores.

        Args:
            scores: arrays shaped like the parameters (None or absent: not counted), or {group: scores `[units]`}.
            sparsity: fraction of the units that dies, in [0, 1).
            params: instead, so many parameters are left at most; a fraction of them below or at 1.
            macs: instead, so many multiplications are left at most, at the traced shapes; or a fraction.
            scope: who competes: `global` (scores divided by their group's mean), `isomorphic`, `group`.
            kinds: only groups of these kinds; left out, all.
            combine: what is made of the scores of a unit's weights: `sum`, `mean`, `l1`, `l2`, `max`.
            min_keep: so many units of each group live.
            round_to: each group keeps a multiple of this, or all.
            dead: units that are dead already: they die first, and count.

        Returns:
            Group name -> units, for `masks` and `compact`.

        Raises:
            UserMistake: the target is missing, doubled or out of reach, or a name is unknown.
            NonFiniteScoreError: a score is NaN or infinite.
        """
        groups = self.groups_of(kinds)
        pools = ranked(groups, checked_scores(scores, groups, self.shapes, combine, self.groups), scope, dead or {})
        check_target(sparsity=sparsity, params=params, macs=macs)

        def at(fraction: float) -> dict[str, list[int]]:
            return lowest(groups, pools, lambda size: round(fraction * size), min_keep=min_keep, round_to=round_to)

        if sparsity is not None:
            return at(sparsity)
        name, budget, measure = (
            ("params", params, self._params_left) if macs is None else ("macs", macs, self._macs_left)
        )
        return within(name, float(budget or 0), measure, at, sum(map(len, pools)))

    def _params_left(self, dead: Dead) -> int:
        return sum(math.prod(int(k.sum()) for k in axes) for axes in self._keeps(dead))

    def _macs_left(self, dead: Dead) -> int:
        small = self.compact(dead, self._shapes)
        return cost(small.apply, small.params, *self._inputs).macs

    def groups_of(self, kinds: Iterable[str] = ()) -> dict[str, Group]:
        """The groups of these kinds, all if none is named."""
        return of_kinds(self.groups, kinds)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Path -> shape of every parameter."""
        return {path: leaf.shape for path, leaf in leaves_by_path(self._shapes).items()}

    def unit_scores(
        self, scores: PyTree, *, groups: Mapping[str, Group] | None = None, combine: str = "sum"
    ) -> dict[str, np.ndarray]:
        """Scores of units `[units]` by group, from scores of weights.

        Args:
            scores: arrays shaped like the parameters; None or absent: not counted.
            groups: of these groups; left out, of all.
            combine: what is made of the scores of a unit's weights: `sum`, `mean`, `l1`, `l2`, `max`.
        """
        return checked_scores(scores, self.groups if groups is None else groups, self.shapes, combine, self.groups)

    def masks(self, dead: Dead) -> PyTree:
        """Bool arrays shaped like all parameters, False in every slice that a dead unit holds.

        Args:
            dead: group name -> units.

        Returns:
            True = alive; zeros in these places make the function that `compact` computes.
        """
        keeps = dict(zip(self._analysis.paths, self._keeps(dead), strict=True))

        def mask(path: str, leaf: Any) -> jax.Array:
            whole = np.ones(leaf.shape, bool)
            for d, keep in enumerate(keeps[path]):
                whole[(slice(None),) * d + (~keep,)] = False
            return jnp.asarray(whole)

        return map_by_path(mask, self._shapes)

    def compact(self, dead: Dead, params: PyTree | None = None) -> CompactNetwork:
        """The network without the dead units.

        Args:
            dead: group name -> units.
            params: weights to slice; left out, those of the trace.

        Returns:
            Smaller arrays and a smaller function that computes what the masked network computes.

        Raises:
            UserMistake: a group or a unit is unknown, or an axis would be left without an index.
        """
        left = zip(self._analysis.paths, self._keeps(dead), strict=True)
        keep = {path: tuple(np.flatnonzero(mask) for mask in masks) for path, masks in left}
        return CompactNetwork(self, keep, self.params if params is None else params)

    def dead_in(self, masks: PyTree) -> dict[str, list[int]]:
        """The units that hold nothing but masked weights: those that `compact` can take away.

        Args:
            masks: bool arrays under the parameters' paths, False = dead; parameters that it lacks live.
        """
        named = leaves_by_path(masks)
        keeps = [[np.ones(axis.size, bool) for axis in axes] for axes in self._analysis.starts]
        for path, axes in zip(self._analysis.paths, keeps, strict=True):
            mask = np.asarray(named[path]) if path in named else None
            for d in range(len(axes) if mask is not None else 0):
                axes[d] = np.any(mask, axis=tuple(i for i in range(len(axes)) if i != d))
        gone = set(self._analysis.units_within(keeps).tolist())
        found = {
            name: [unit for unit, number in enumerate(numbers.tolist()) if number in gone]
            for name, (_, numbers) in self._analysis.groups.items()
        }
        return {name: units for name, units in found.items() if units}

    def _keeps(self, dead: Dead) -> list[list[np.ndarray]]:
        units = []
        for name, chosen in dead.items():
            if name not in self._analysis.groups:
                known = ", ".join(self._analysis.groups) or "none"
                raise UserMistake(
                    f"group {name!r} is unknown{did_you_mean(name, self._analysis.groups)} (groups: {known})"
                )
            group, numbers = self._analysis.groups[name]
            picked = np.asarray(list(chosen), np.int64).reshape(-1)
            bad = picked[(picked < 0) | (picked >= group.size)]
            if bad.size:
                raise UserMistake(f"group {name!r} has no unit {int(bad[0])}: it has {group.size}, numbered from 0.")
            if np.unique(picked).size == group.size:
                raise UserMistake(
                    f"all {group.size} units of group {name!r} are dead: nothing would go through it. Keep one or more."
                )
            units.append(numbers[picked])
        keeps = self._analysis.keeps(self._analysis.alive(np.concatenate(units) if units else ()))
        for path, axes in zip(self._analysis.paths, keeps, strict=True):
            for d, keep in enumerate(axes):
                if keep.size and not keep.any():
                    raise UserMistake(f"axis {d} of {path!r} would be left without an index: kill fewer of its units.")
        return keeps

    def to_dot(self) -> str:
        """The network as a drawing for Graphviz: parameters as boxes, groups as coloured arrows between them."""
        return dot(self.groups, self.shapes, self._analysis.roles.reads)

    def __repr__(self) -> str:
        return table(self.groups, self.shapes, self.frozen)


class CompactNetwork:
    """A network without its dead units. Made by `TracedNetwork.compact`.

    Attributes:
        params: the smaller arrays, in the containers of the traced ones.
        keep: path -> for each axis the indices that are left.
    """

    def __init__(self, net: TracedNetwork, keep: Keep, params: PyTree) -> None:
        self.keep, self._shapes, self._release = keep, net._shapes, net._release
        self._jitted = jax.jit(shrink(net._apply, net._shapes, keep, release=net._release, traced=net))
        self.params = self.slice(params)

    def apply(self, params: PyTree, *inputs: Any) -> Any:
        """What the traced function computes on the masked network, from arrays like `self.params`.

        Inputs may have other shapes than those of the trace, such as another batch size.
        """
        return self._jitted(params, *inputs)

    def of(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        """Another function of the same parameters, such as the training mode, made smaller by the same cut."""
        return shrink(apply, self._shapes, self.keep, release=self._release)

    def slice(self, tree: PyTree) -> PyTree:
        """Cuts the dead indices out of a tree that mirrors the parameters: gradients, moments, averages, masks.

        A leaf mirrors the parameter whose path ends its own, if it has its shape; other leaves stay as they are.
        """
        return cut(tree, self._shapes, self.keep)


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
    traced: TracedNetwork | None = None,
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

    def small(params: PyTree, *inputs: Any) -> Any:
        whole = jax.tree.map(lambda w, s: jax.ShapeDtypeStruct(s.shape, w.dtype), params, shapes)
        at = jax.tree.map(_struct, inputs)
        if traced is not None and (whole, at) == (traced._shapes, traced._inputs):
            analysis = traced._analysis
        else:
            analysis = analyse(apply, whole, at, release)
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


def trace(apply: Callable[..., Any], params: PyTree, *inputs: Any, release: Iterable[str] = ()) -> TracedNetwork:
    """Finds out which indices of which parameters of any JAX function live and die together.

    Nothing is run, and no array is needed: shapes will do. Inputs and outputs keep their widths.

    Args:
        apply: `apply(params, *inputs) -> outputs`.
        params: any pytree of arrays or of `jax.ShapeDtypeStruct`.
        *inputs: pytrees of the same.
        release: patterns of outputs that may get narrower. An output named like a parameter, such as new batch
            statistics, always may, along with it.

    Returns:
        The groups that can be pruned, and what can be done with them.

    >>> apply = lambda p, x: jax.nn.relu(x @ p["hidden"]["kernel"]) @ p["out"]["kernel"]
    >>> params = {"hidden": {"kernel": jnp.ones((3, 4))}, "out": {"kernel": jnp.ones((4, 2))}}
    >>> net = trace(apply, params, jnp.ones((1, 3)))
    >>> [(group.name, group.kind, group.size) for group in net.groups.values()]
    [('hidden.out', 'neuron', 4)]
    >>> small = net.compact({"hidden.out": [0, 2]})
    >>> jax.tree.map(jnp.shape, small.params)
    {'hidden': {'kernel': (3, 2)}, 'out': {'kernel': (2, 2)}}
    >>> small.apply(small.params, jnp.ones((1, 3)))
    Array([[6., 6.]], dtype=float32)
    """
    return TracedNetwork(apply, params, inputs, tuple([release] if isinstance(release, str) else release))


def _struct(leaf: Any) -> jax.ShapeDtypeStruct:
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
