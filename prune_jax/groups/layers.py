"""Residual branches as groups of kind `layer`, of one unit each."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np

from prune_jax.groups.function import Function
from prune_jax.groups.trace import Group, unique

LAYER = "layer"


def layers(function: Function) -> dict[str, Group]:
    """The residual branches of a function: name -> a group whose only unit holds all that the branch alone reads."""
    paths = list(function.named)
    found: dict[str, Group] = {}
    for branch in function.branches:
        mine = [paths[p] for p in sorted(branch.params)]
        name = unique(f"{_module(mine, function)}.{LAYER}", found)
        members = tuple((path, 0, np.arange(function.named[path].shape[0])[None]) for path in mine)
        found[name] = Group(name, LAYER, 1, members)
    return found


def _module(mine: Collection[str], function: Function) -> str:
    """The largest module around the branch's first kernel that holds nothing else."""
    kernel = next((path for path in mine if len(function.named[path].shape) > 1), next(iter(mine)))
    parts = kernel.split("/")
    around = ["/".join(parts[:i]) for i in range(1, len(parts))]
    others = function.named.keys() - set(mine)
    return next((a for a in around if not any(path.startswith(f"{a}/") for path in others)), kernel)


def gone_in(dead: Mapping[str, Iterable[int]], layers: Mapping[str, Group]) -> set[str]:
    """The parameters of layers that are dead."""
    return {
        path for name, units in dead.items() if name in layers and list(units) for path, _, _ in layers[name].members
    }
