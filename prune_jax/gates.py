"""Whether a network may pass: one check for each limit, beside the network that it is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from prune_jax.recipe import Limits, Times

HIGHER_IS_BETTER = {"accuracy"}
SLACK = 1e-9  # 0.8 - 0.7 is a little more than 0.1
NOISY = "noisy"  # of facts: the metric on inputs with noise on them


class Check(NamedTuple):
    """One limit and what was found."""

    what: str
    champion: float | None  # or whatever it is compared with; None: with nothing
    candidate: float
    allowed: str
    passed: bool


def checks(
    limits: Limits, candidate: Mapping[str, Any], champion: Mapping[str, Any] | None, *, metric: str
) -> tuple[Check, ...]:
    """Holds a network to its limits.

    Drop is `champion - candidate` of a metric of which more is better, such as accuracy, else `candidate - champion`.

    Args:
        limits: what is allowed.
        candidate: what was found of the network: the metric, `params`, `macs`, `bytes`, `latency_ms` as `evaluate`
            answers them, and `noisy`, the metric under noise.
        champion: the same of the other network; None: there is none, so that limits beside it hold.
        metric: the metric's name.
    """
    other = champion or {}
    found: list[Check] = []
    levels: list[tuple[str, str, Any]] = [(metric, metric, limits)]
    if limits.robustness:
        levels.append((f"{metric} under noise {limits.robustness.noise:g}", NOISY, limits.robustness))
    for what, name, level in levels:
        found += _levels(what, candidate[name], other.get(name), level, higher=metric in HIGHER_IS_BETTER)
    batch = str(limits.latency_batch)
    for name in ("params", "macs", "bytes", "latency_ms"):
        if (budget := getattr(limits, name)) is not None:
            what, takes, took = name, candidate[name], other.get(name)
            if name == "latency_ms":
                what, takes = f"latency_ms, batch {batch}", takes[batch]["p50"]
                took = took[batch]["p50"] if took else None
            found.append(_budget(what, takes, took, budget))
    return tuple(found)


def _levels(what: str, now: float, before: float | None, level: Any, *, higher: bool) -> Iterator[Check]:
    if level.at_least is not None:
        yield Check(what, before, now, f"at least {level.at_least:g}", now >= level.at_least)
    if level.at_most is not None:
        yield Check(what, before, now, f"at most {level.at_most:g}", now <= level.at_most)
    if level.max_drop is not None:
        drop = 0.0 if before is None else before - now if higher else now - before
        yield Check(what, before, now, f"worse by at most {level.max_drop:g}", drop <= level.max_drop + SLACK)


def _budget(what: str, takes: float, took: float | None, budget: float | Times) -> Check:
    if not isinstance(budget, Times):
        return Check(what, took, takes, f"at most {budget:g}", takes <= budget)
    return Check(
        what, took, takes, f"at most {budget.times:g} times", took is None or takes <= budget.times * took * (1 + SLACK)
    )


def reason(found: Iterable[Check]) -> str:
    """Names the checks that failed; nothing if all passed.

    >>> reason([Check("accuracy", 0.95, 0.9, "worse by at most 0.01", False)])
    'accuracy is 0.9 beside 0.95, allowed is worse by at most 0.01'
    """
    return "; ".join(
        f"{check.what} is {number(check.candidate)}"
        + ("" if check.champion is None else f" beside {number(check.champion)}")
        + f", allowed is {check.allowed}"
        for check in found
        if not check.passed
    )


def number(value: float) -> str:
    """A number as people read it.

    >>> number(2410), number(0.94707)
    ('2,410', '0.9471')
    """
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def rows(found: Iterable[Check]) -> list[dict[str, Any]]:
    """The checks as JSON holds them."""
    return [check._asdict() for check in found]
