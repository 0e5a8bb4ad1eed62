"""A function written down at the shapes of its arguments, whole or without some of its residual branches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Var
from jax.interpreters import partial_eval

from prune_jax.errors import UserMistake
from prune_jax.groups.branches import Branch, branches, without
from prune_jax.trees import PyTree, leaves_by_path


@dataclass(frozen=True)
class Function:
    """A function without what nobody uses.

    Attributes:
        closed: its jaxpr.
        out: shapes of its outputs.
        named: path -> shape of each parameter, which come first among its inputs.
        homes: by output, the parameter whose new value it is.
    """

    closed: ClosedJaxpr
    out: PyTree
    named: Mapping[str, Any]
    homes: list[int | None]

    @classmethod
    def of(cls, apply: Callable[..., Any], params: PyTree, inputs: Sequence[Any]) -> Function:
        """`apply(params, *inputs)`, written down; nothing is run.

        Args:
            apply: any JAX function.
            params: any pytree of arrays, or of their shapes and types.
            inputs: pytrees of the same.
        """
        whole, out = jax.make_jaxpr(apply, return_shape=True)(params, *inputs)
        named = leaves_by_path(params)
        jaxpr = _used(whole.jaxpr, [True] * len(whole.jaxpr.outvars))
        return cls(ClosedJaxpr(jaxpr, whole.consts), out, named, mirrors(out, named))

    @cached_property
    def branches(self) -> list[Branch]:
        """Its residual branches."""
        return branches(self.closed.jaxpr, [len(leaf.shape) for leaf in self.named.values()], self.homes)

    def without(self, gone: Collection[str]) -> tuple[ClosedJaxpr, tuple[jax.ShapeDtypeStruct | None, ...]]:
        """The function without the branches of which all parameters are gone.

        Args:
            gone: their paths.

        Returns:
            Its jaxpr, and by output of the whole what stands for it where the jaxpr makes it no more.
        """
        if not gone:
            return self.closed, (None,) * len(self.homes)
        paths = list(self.named)
        joins = [join for b in self.branches if all(paths[p] in gone for p in b.params) for join in b.joins]
        empty = tuple(
            None
            if home is None or paths[home] not in gone
            else jax.ShapeDtypeStruct((0,) * len(leaf.shape), leaf.dtype)
            for home, leaf in zip(self.homes, jax.tree.leaves(self.out), strict=True)
        )
        jaxpr = _used(without(self.closed.jaxpr, joins), [nothing is None for nothing in empty])
        read = read_in(jaxpr)
        for path, var in zip(paths, jaxpr.invars, strict=False):
            if path in gone and var in read:
                raise UserMistake(
                    f"{path!r} has no index left but is read beyond the residual branch that was taken away: for these "
                    "inputs the function is wired otherwise than where it was traced. Trace it with inputs like these."
                )
        return ClosedJaxpr(jaxpr, self.closed.consts), empty


def _used(jaxpr: Jaxpr, outputs: Sequence[bool]) -> Jaxpr:
    return partial_eval.dce_jaxpr(jaxpr, list(outputs), instantiate=True)[0]


def read_in(jaxpr: Jaxpr) -> set[Any]:
    """The variables that something reads, or that are outputs."""
    inside = {var for eqn in jaxpr.eqns for var in eqn.invars if isinstance(var, Var)}
    return inside | {var for var in jaxpr.outvars if isinstance(var, Var)}


def mirrors(out: PyTree, named: Mapping[str, Any]) -> list[int | None]:
    """By output, which parameter it is the new value of: the one whose path ends its own, of the same shape."""
    numbers = {path: i for i, path in enumerate(named)}
    found = []
    for path, leaf in leaves_by_path(out).items():
        parts = path.split("/")
        tails = ["/".join(parts[i:]) for i in range(len(parts))]
        hit = next((tail for tail in tails if tail in numbers and np.shape(named[tail]) == leaf.shape), None)
        found.append(None if hit is None else numbers[hit])
    return found
