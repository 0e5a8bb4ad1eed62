"""A network without its dead units: smaller arrays, and a smaller function of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from prune_jax.compaction.cutting import Keep, Traced, cut, shrink
from prune_jax.trees import PyTree


class CompactNetwork:
    """A network without its dead units. Made by `TracedNetwork.compact`.

    Attributes:
        params: the smaller arrays, in the containers of the traced ones.
        keep: path -> for each axis the indices that are left.
    """

    def __init__(
        self, apply: Callable[..., Any], traced: Traced, keep: Keep, params: PyTree, release: Sequence[str] = ()
    ) -> None:
        self.keep, self._shapes, self._release = keep, traced.shapes, tuple(release)
        self._jitted = jax.jit(shrink(apply, traced.shapes, keep, release=release, traced=traced))
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
