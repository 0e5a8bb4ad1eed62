"""In which order a function uses its parameters: where each first meets the data, not where it is named, cast or split.

What is made of parameters alone carries their names along to the equation that puts them together with an input.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.interpreters import partial_eval

from prune_jax.errors import UserMistake
from prune_jax.scoring import prunable_paths
from prune_jax.trees import PyTree, leaves_by_path

ENDS = ("first", "last")
Made = frozenset[str] | None  # of these parameters alone; None: of data
_NOTHING: Made = frozenset()


def uses(apply: Callable[..., Any], params: PyTree, *inputs: Any) -> list[str]:
    """The paths of the parameters in the order in which `apply(params, *inputs)` uses them, as often as it does.

    Args:
        apply: any JAX function; it is traced, and nothing is computed.
        params: any pytree of arrays, or of their shapes and types.
        *inputs: pytrees of the same.

    >>> import jax.numpy as jnp
    >>> w = {"a": jnp.ones((3, 1)), "z": jnp.ones((2, 3))}
    >>> uses(lambda p, x: x @ p["z"] @ p["a"], w, jnp.ones((1, 2)))
    ['z', 'a']
    """
    traced = jax.make_jaxpr(apply)(params, *inputs).jaxpr
    jaxpr, _ = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars), instantiate=True)  # what nobody asks for
    names: list[Made] = [frozenset({path}) for path in leaves_by_path(params)]
    told: list[str] = []
    for made in _walk(jaxpr, [*names, *[None] * (len(jaxpr.invars) - len(names))], told):
        told += sorted(made or ())  # answered as it is
    return told


def ends(apply: Callable[..., Any], params: PyTree, *inputs: Any) -> tuple[str, str]:
    """The first and the last layer: of the leaves that may be pruned, the one used first and the one used last.

    Both are patterns for `exclude`, anchored at the root. A table of tokens that also makes the outputs is both.

    Args:
        apply: `apply(params, *inputs) -> outputs`, as it answers, without its training mode.
        params: any pytree of arrays, or of their shapes and types.
        *inputs: pytrees of the same, `[batch, ..]`.

    Raises:
        UserMistake: the inputs meet none of these leaves.

    >>> import jax.numpy as jnp
    >>> w = {"a": jnp.ones((3, 1)), "m": jnp.ones((3, 3)), "z": jnp.ones((2, 3))}
    >>> ends(lambda p, x: x @ p["z"] @ p["m"] @ p["a"], w, jnp.ones((1, 2)))
    ('/z', '/a')
    """
    prunable = prunable_paths(params)
    used = [path for path in uses(apply, params, *inputs) if path in prunable]
    if not used:
        raise UserMistake(f"no layer is first or last: the inputs meet none of {', '.join(prunable)}.")
    return f"/{glob.escape(used[0])}", f"/{glob.escape(used[-1])}"


def dense(
    exclude: Iterable[str], spare: Sequence[str], apply: Callable[..., Any], params: PyTree, *inputs: Any
) -> tuple[str, ...]:
    """Patterns of what stays dense: those that are excluded, and the `first` or `last` layer where it is spared."""
    both = ends(apply, params, *inputs) if spare else ()
    return (*exclude, *dict.fromkeys(end for word, end in zip(ENDS, both, strict=False) if word in spare))


def _walk(jaxpr: Jaxpr, given: Sequence[Made], told: list[str]) -> list[Made]:
    made: dict[Any, Made] = dict(zip(jaxpr.invars, given, strict=True))

    def of(var: Any) -> Made:
        return _NOTHING if isinstance(var, Literal) else made.get(var, _NOTHING)

    for eqn in jaxpr.eqns:
        made.update(zip(eqn.outvars, _outputs(eqn, [of(var) for var in eqn.invars], told), strict=True))
    return [of(var) for var in jaxpr.outvars]


def _outputs(eqn: JaxprEqn, given: list[Made], told: list[str]) -> list[Made]:
    name, of = eqn.primitive.name, eqn.params
    if name == "scan":
        return _loop(of["jaxpr"].jaxpr, given, of["num_consts"], of["num_carry"], told)
    if name == "while":
        return _loop(of["body_jaxpr"].jaxpr, given[of["cond_nconsts"] :], of["body_nconsts"], len(eqn.outvars), told)
    if name == "cond":
        arms = [_walk(arm.jaxpr, given[1:], told) for arm in of["branches"]]
        return [_either(made, told) for made in zip(*arms, strict=True)]
    bodies = (getattr(value, "jaxpr", value) for value in of.values())
    body = next((b for b in bodies if isinstance(b, Jaxpr) and len(b.invars) == len(given)), None)
    if body is not None and len(body.outvars) == len(eqn.outvars):
        return _walk(body, given, told)
    return [_either(given, told)] * len(eqn.outvars)


def _loop(body: Jaxpr, given: list[Made], consts: int, carried: int, told: list[str]) -> list[Made]:
    """Of a loop's first turn, once it is known which of what it carries will be made of data."""
    while True:
        carry = given[consts : consts + carried]
        after = _walk(body, given, [])[:carried]
        joined = [_either(pair, []) for pair in zip(carry, after, strict=True)]
        if joined == carry:
            return _walk(body, given, told)
        for before, now in zip(carry, joined, strict=True):
            told += sorted(before or ()) if now is None else ()
        given = [*given[:consts], *joined, *given[consts + carried :]]


def _either(given: Iterable[Made], told: list[str]) -> Made:
    """What is made of these together; parameters that meet data are told."""
    given = list(given)
    if None not in given:
        return frozenset().union(*(made for made in given if made is not None))
    for made in given:
        told += sorted(made or ())
    return None
