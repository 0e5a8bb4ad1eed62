"""The registry of training methods: optimizers around an optimizer, that prune while it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import optax

from prune_jax.registry import Registry

Transformation = Callable[..., optax.GradientTransformationExtraArgs]
T = TypeVar("T", bound=Transformation)

METHODS: Registry[Method] = Registry("training method", "prune_jax.sparse_training")


@dataclass(frozen=True)
class Method:
    """A training method: `function(inner, **options)`, whose state has `masks`, `inner` and what else it keeps."""

    name: str
    function: Transformation
    formula: str
    paper: str


def method(name: str, *, formula: str, paper: str) -> Callable[[T], T]:
    """Registers the function below it under `name`."""

    def register(function: T) -> T:
        METHODS.add(name, Method(name, function, formula, paper))
        return function

    return register
