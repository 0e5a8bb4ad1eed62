"""What every model becomes: two pure functions on nested dicts of arrays, whatever framework it was written in."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from prune_jax.errors import UserMistake

_TRAINING = ("train", "training", "is_training")
_RESTING = ("deterministic", "use_running_average")


class Variables(NamedTuple):
    """The arrays of a network.

    Attributes:
        params: what is trained: nested dicts with string keys.
        state: what the forward pass itself keeps, such as batch statistics; nested dicts, possibly empty.
    """

    params: dict[str, Any]
    state: dict[str, Any]


@dataclass(frozen=True)
class Network:
    """A model as pure functions.

    Attributes:
        init: PRNG key -> `Variables`; the same key gives the same arrays.
        apply: `apply(params, state, inputs, *, train, key) -> (outputs, new_state)` with `inputs` a tuple `(x,)` or
            `(x, lengths)`, each with a batch axis in front. `train` switches dropout and batch statistics on;
            `key` feeds dropout and may be `None` where nothing is random. Without `train`, `new_state` is `state`.
    """

    init: Callable[[jax.Array], Variables]
    apply: Callable[..., tuple[jax.Array, dict[str, Any]]]


def mode_arguments(call: Callable[..., Any], *, train: bool) -> dict[str, Any]:
    """The keyword by which a forward pass is told its mode, if it has one, set accordingly.

    >>> mode_arguments(lambda x, deterministic=True: x, train=True)
    {'deterministic': False}
    """
    taken = inspect.signature(call).parameters
    return {name: train for name in _TRAINING if name in taken} | {
        name: not train for name in _RESTING if name in taken
    }


def check_inputs(call: Callable[..., Any], number: int) -> None:
    """Refuses a forward pass that takes fewer inputs than the data hold, or cannot do with so few.

    Args:
        call: bound forward pass.
        number: 1 for `x`, 2 for `x` and `lengths`.
    """
    ours = {*_TRAINING, *_RESTING, "rngs"}
    taken = [p for name, p in inspect.signature(call).parameters.items() if name not in ours]
    positional = [p for p in taken if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if number > len(positional) and not any(p.kind is p.VAR_POSITIONAL for p in taken):
        raise UserMistake(
            f"its forward pass takes {len(positional)} input(s) but the data hold {number} (x, lengths): padded "
            "sequences need a model that knows their lengths, such as the kinds rnn and transformer"
        )
    needed = [p.name for p in positional if p.default is p.empty]
    if number < len(needed):
        raise UserMistake(
            f"its forward pass needs {len(needed)} inputs ({', '.join(needed)}) but the data hold only x; "
            "add lengths to the data, or give the others a default"
        )
