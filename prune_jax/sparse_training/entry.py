"""The registry of training methods: optimizers around an optimizer, that prune while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import optax

from prune_jax.arguments import check_arguments, parameters
from prune_jax.errors import UserMistake
from prune_jax.registry import Registry, load_object

Transformation = Callable[..., optax.GradientTransformationExtraArgs]
T = TypeVar("T", bound=Transformation)

METHODS: Registry[Method] = Registry("training method", "prune_jax.sparse_training")


OURS = ("key", "learning_rate", "steps", "prunable")  # what a recipe's training hands in itself, where it is taken


@dataclass(frozen=True)
class Method:
    """A training method: `function(inner, **options)`, whose state has `masks`, `inner` and what else it keeps.

    In a recipe its keyword-only parameters are the options of `sparsify: {kind: name}`. A function that takes `key`,
    `learning_rate` (a schedule) or `steps` (of the whole training) gets them of the training. A seed is no reason to
    compile again: what the function draws while it updates, it draws by a key that it keeps in its state.
    """

    name: str
    function: Transformation
    formula: str
    paper: str

    @property
    def options(self) -> dict[str, Any]:
        """Its options and their defaults."""
        taken = parameters(self.function).values()
        return {p.name: p.default for p in taken if p.kind is p.KEYWORD_ONLY and p.name not in OURS}

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuses options that it does not take, and asks for those that it cannot do without."""
        try:
            check_arguments(self.function, options, ours=("inner", *OURS))
        except UserMistake as mistake:
            raise UserMistake(f"training method {self.name!r}: {mistake}") from None

    def of_training(self, **given: Any) -> dict[str, Any]:
        """Those of `OURS` that its function takes."""
        return {name: value for name, value in given.items() if name in parameters(self.function)}


def method(name: str, *, formula: str, paper: str) -> Callable[[T], T]:
    """Registers the function below it under `name`.

    Other packages announce their methods through the entry point group `prune_jax.sparse_training`, or are named
    `module:object`.
    """

    def register(function: T) -> T:
        METHODS.add(name, Method(name, function, formula, paper))
        return function

    return register


def find(name: str) -> Method:
    """The method called `name`, or the function that `module:object` names.

    >>> find("prune_jax.sparse_training:rigl").name
    'rigl'
    """
    found: Any = load_object(name) if ":" in name else METHODS[name]
    if isinstance(found, Method):
        return found
    if not callable(found):
        raise UserMistake(
            f"{name!r} is of type {type(found).__name__}, not a training method: (inner, *, ...) -> optax"
        )
    known = (entry for entry in METHODS.entries() if isinstance(entry, Method) and entry.function is found)
    return next(known, Method(name, found, "", ""))
