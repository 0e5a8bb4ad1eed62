"""A recipe's `sparsify` as an optimizer around the optimizer: shares become steps."""

from __future__ import annotations

from typing import Any

import jax
import optax

from prune_jax.errors import UserMistake
from prune_jax.recipe import CustomMethod, Sparsify
from prune_jax.schedules import cubic
from prune_jax.sparse_training import METHODS, find

DRAWN = ("static", "set", "rigl", "l0", "variational_dropout")  # take a key
OWN = ("soft_threshold", "l0", "variational_dropout")  # train something beside the weights


def sparsified(
    inner: optax.GradientTransformation,
    sparsify: Sparsify,
    *,
    steps: int,
    examples: int,
    learning_rate: optax.Schedule,
    key: jax.Array,
) -> optax.GradientTransformationExtraArgs:
    """The method that a recipe names, around `inner`.

    Args:
        inner: any optimizer.
        sparsify: the method and its settings; of `spare` nothing is left, see `networks.dense_in`.
        steps: of the whole training, of which `begin` and `end` are shares.
        examples: in the training split.
        learning_rate: that of `inner`.
        key: what random masks are drawn from.

    Raises:
        UserMistake: in so short a training the masks would never change.
    """
    if isinstance(sparsify, CustomMethod):
        return _custom(inner, sparsify, steps=steps, learning_rate=learning_rate, key=key)
    options: dict[str, Any] = sparsify.model_dump(exclude={"kind", "spare"})
    begin, end = (min(int(options.get(name, 0) * steps), steps - 1) for name in ("begin", "end"))
    for name, step in (("begin", begin), ("end", end)):
        if name in options:
            options[name] = step
    if sparsify.kind in ("set", "rigl") and end <= sparsify.every:
        raise UserMistake(
            f"masks would never change: the training has {steps} steps, masks change every {sparsify.every} and stay "
            f"from step {end} on; set `every` below that, or train longer"
        )
    if sparsify.kind in ("gradual", "movement"):
        ends = (options.pop("initial", 0.0), options.pop("sparsity"))
        times = {name: options.pop(name) for name in ("begin", "end", "every")}
        options["schedule"] = cubic(*ends, **times)
    if sparsify.kind == "proximal_l1":
        options["learning_rate"] = learning_rate
    if sparsify.kind in OWN:
        options["optimizer"] = optax.adam(options.pop("learning_rate"))
    if sparsify.kind == "variational_dropout":
        options["examples"] = examples
    if sparsify.kind in DRAWN or options.get("criterion", "magnitude") != "magnitude":
        options["key"] = key
    return METHODS[sparsify.kind].function(inner, **options)


def _custom(
    inner: optax.GradientTransformation, sparsify: CustomMethod, **training: Any
) -> optax.GradientTransformationExtraArgs:
    entry, options = find(sparsify.kind), options_of(sparsify)
    entry.check_options(options)
    return entry.function(inner, **options, **entry.of_training(**training))


def options_of(sparsify: CustomMethod) -> dict[str, Any]:
    """What a recipe says to somebody else's function; it need not know `exclude` where nothing is excluded."""
    options = sparsify.model_dump(exclude={"kind", "spare"})
    return options if sparsify.exclude or sparsify.spare else {k: v for k, v in options.items() if k != "exclude"}
