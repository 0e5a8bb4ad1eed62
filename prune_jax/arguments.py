"""Arguments that a recipe hands to a function, held against its signature before anything is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from prune_jax.errors import UserMistake, did_you_mean

_KEYWORDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What `function`, or the constructor of a class, takes.

    >>> list(parameters(lambda x, *, bias=True: None))
    ['x', 'bias']
    """
    if not inspect.isclass(function):
        return dict(inspect.signature(function).parameters)
    # Not the signature of the class itself: a metaclass (Flax NNX has one) answers (*args, **kwargs) there.
    taken = list(inspect.signature(function.__init__).parameters.items())  # type: ignore[misc]
    return dict(taken[1:])


def check_arguments(function: Callable[..., Any], args: Mapping[str, Any], *, ours: Collection[str] = ()) -> None:
    """Refuses arguments that `function` does not take, and asks for those that it cannot do without.

    Args:
        function: a function or a class.
        args: what the user wrote.
        ours: names that the caller hands in itself; they are not offered to the user.

    Raises:
        UserMistake: naming the argument, the nearest known one and all that are accepted.
    """
    taken = parameters(function)
    accepted = [name for name, p in taken.items() if p.kind in _KEYWORDS and name not in ours]
    offered = f"(accepted: {', '.join(accepted) or 'none'})"
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
    for name in args:
        if name in ours or (name not in accepted and not anything):
            raise UserMistake(f"{name!r} is not an argument{did_you_mean(name, accepted)} {offered}")
    for name in accepted:
        if name not in args and taken[name].default is inspect.Parameter.empty:
            raise UserMistake(f"the argument {name!r} is missing {offered}")
