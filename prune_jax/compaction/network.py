"""A function whose parameters' dependencies are known: what may be pruned, chosen, masked and taken away."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prune_jax.compaction.compact import CompactNetwork
from prune_jax.compaction.cutting import Traced, struct
from prune_jax.costs import cost
from prune_jax.errors import UserMistake, did_you_mean
from prune_jax.groups import (
    LAYER,
    Function,
    Group,
    analyse,
    check_target,
    checked_scores,
    dot,
    gone_in,
    layers,
    lowest,
    of_kinds,
    ranked,
    table,
    within,
)
from prune_jax.trees import PyTree, leaves_by_path, map_by_path

Dead = Mapping[str, Iterable[int]]  # group -> units


class TracedNetwork:
    """A function whose parameters' dependencies are known. Made by `trace`.

    Attributes:
        groups: name -> Group, of what may be pruned.
        layers: name -> Group, of residual branches that may be taken away whole.
        frozen: (path, axis, reason) of what may not.
        params: those that it was traced with.
    """

    def __init__(
        self, apply: Callable[..., Any], params: PyTree, inputs: Sequence[Any], release: Sequence[str] = ()
    ) -> None:
        self._apply, self.params, self._release = apply, params, tuple(release)
        self._shapes = jax.tree.map(struct, params)
        self._inputs = jax.tree.map(struct, tuple(inputs))
        self._function = Function.of(apply, self._shapes, self._inputs)
        self._analysis = analyse(self._function, self._release)

    @cached_property
    def groups(self) -> dict[str, Group]:
        """Name -> what may be pruned."""
        return {name: group for name, (group, _) in self._analysis.groups.items()}

    @cached_property
    def layers(self) -> dict[str, Group]:
        """Name -> residual branch that may be taken away whole: a group of one unit, which holds parameters whole.

        They stand apart from `groups`, with whose units they overlap; `masks` and `compact` take both.
        """
        return layers(self._function)

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
            kinds: only groups of these kinds; left out, all; `layer` for residual branches, which compete as they are.
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
        pools = ranked(groups, self.unit_scores(scores, groups=groups, combine=combine), scope, dead or {})
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
        """The groups of these kinds, all if none is named; of `layer`, the residual branches."""
        kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
        if kinds != (LAYER,):
            return of_kinds(self.groups, kinds)
        if not self.layers:
            raise UserMistake("the function has no residual branch: nothing that is added to what it was made of.")
        return self.layers

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
        groups = self.groups if groups is None else groups
        return checked_scores(scores, groups, self.shapes, combine, {**self.groups, **groups})

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
        traced = Traced(self._function, self._analysis, self._shapes, self._inputs)
        return CompactNetwork(self._apply, traced, keep, self.params if params is None else params, self._release)

    def dead_in(self, masks: PyTree) -> dict[str, list[int]]:
        """The units that hold nothing but masked weights, and the layers that add zero: what `compact` can take away.

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
        absent = [p for p, path in enumerate(self._analysis.paths) if path in named and not np.any(named[path])]
        branches = zip(self.layers, self._function.branches, strict=True) if absent else ()
        whole = {name: [0] for name, branch in branches if branch.is_zero(absent)}
        within = gone_in(whole, self.layers) if whole else set()
        left = {name: units for name, units in found.items() if units and not _paths(self.groups[name]) <= within}
        return left | whole

    def _keeps(self, dead: Dead) -> list[list[np.ndarray]]:
        units, gone = [], set[str]()
        for name, chosen in dead.items():
            group, numbers = self._found(name)
            picked = np.asarray(list(chosen), np.int64).reshape(-1)
            bad = picked[(picked < 0) | (picked >= group.size)]
            if bad.size:
                raise UserMistake(f"group {name!r} has no unit {int(bad[0])}: it has {group.size}, numbered from 0.")
            if group.kind == LAYER:
                gone |= _paths(group) if picked.size else set()
                continue
            if np.unique(picked).size == group.size:
                raise UserMistake(
                    f"all {group.size} units of group {name!r} are dead: nothing would go through it. Keep one or more."
                )
            units.append(numbers[picked])
        keeps = self._analysis.keeps(self._analysis.alive(np.concatenate(units) if units else ()))
        for path, axes in zip(self._analysis.paths, keeps, strict=True):
            for d, keep in enumerate(axes):
                if path in gone:
                    keep[:] = False
                elif keep.size and not keep.any():
                    raise UserMistake(f"axis {d} of {path!r} would be left without an index: kill fewer of its units.")
        return keeps

    def _found(self, name: str) -> tuple[Group, np.ndarray]:
        """A group, or a layer, and its units by their numbers in the analysis."""
        if name in self._analysis.groups:
            return self._analysis.groups[name]
        if name in self.layers:
            return self.layers[name], np.zeros(1, np.int64)
        known = [*self.groups, *self.layers]
        raise UserMistake(
            f"group {name!r} is unknown{did_you_mean(name, known)} (groups: {', '.join(known) or 'none'})"
        )

    def to_dot(self) -> str:
        """The network as a drawing for Graphviz: parameters as boxes, groups as coloured arrows between them."""
        return dot(self.groups, self.shapes, self._analysis.roles.reads)

    def __repr__(self) -> str:
        return table(self.groups, self.layers, self.shapes, self.frozen)


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


def _paths(group: Group) -> set[str]:
    return {path for path, _, _ in group.members}
