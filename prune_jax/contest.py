"""A candidate beside the reigning champion, both on the candidate's test data."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.table import Table

from prune_jax.checkpoints import Store
from prune_jax.errors import DivergedError, UserMistake
from prune_jax.evaluation import evaluator, latencies, noisy
from prune_jax.export import EXTENSIONS, read_stablehlo
from prune_jax.gates import NOISY, Check, checks, number
from prune_jax.models import Network, Variables
from prune_jax.networks import repeated
from prune_jax.objectives import objective
from prune_jax.preparation import check_limits
from prune_jax.problems import dataset_of, sample_of
from prune_jax.promotion import Candidate, check_intact
from prune_jax.recipe import Entry, Limits, Problem

NOTHING = Variables({}, {})  # of an export, whose weights lie in its program
BATCH_SIZE = 256


def contest(store: Store, candidate: Candidate, champion: Entry | None, limits: Limits) -> tuple[Check, ...]:
    """Holds a candidate to limits, some of them beside the champion.

    Metrics that were taken on the candidate's own data stand as recorded. A champion of other data is measured anew,
    its exported program on the candidate's test split. Times and noise are always measured here, on both programs.

    Args:
        store: where both lie.
        candidate: the network that wants to become champion.
        champion: the reigning one; None: limits beside it hold.
        limits: what is allowed.

    Raises:
        UserMistake: the data changed since the candidate's run, or the champion cannot be measured on them.
        DamagedArtifactError: a file of one of them is not the one that was written.
    """
    meta = store.meta(candidate.export) or {}
    problem = Problem.model_validate(meta["call"]["problem"])
    goal = objective(problem.objective)
    found: dict[str, dict[str, Any]] = {"candidate": dict(candidate.metrics)}
    entries: dict[str, Candidate | Entry] = {"candidate": candidate}
    if champion:
        found["champion"], entries["champion"] = dict(champion.metrics), champion
        if champion.objective != candidate.objective:
            raise UserMistake(
                f"the champion's objective is {champion.objective}, the candidate's {candidate.objective}: they cannot "
                "be compared; promote the candidate under another name"
            )
    for entry in entries.values():
        check_intact(store, entry)
    metric = limits.metric or goal.primary
    anew = {r for r, entry in entries.items() if entry.data != candidate.data or metric not in found[r]}
    if not (anew or limits.robustness or limits.latency_ms):
        return checks(limits, found["candidate"], found.get("champion"), metric=metric)

    data = dataset_of(problem)
    check_limits(limits, goal, data)
    networks = {role: _network(store, entry) for role, entry in entries.items()}
    for role, network in networks.items():
        measure = evaluator(network, goal, batch_size=BATCH_SIZE)
        with _comparable(role):
            if role in anew:
                found[role] |= measure(NOTHING, data.test)
            if robust := limits.robustness:
                noise = noisy(data.test, robust.noise, robust.seed)
                found[role][NOISY] = measure(NOTHING, noise, name="noisy test")[metric]
    if limits.latency_ms:
        timed = {role: (network, NOTHING) for role, network in networks.items()}
        sample = functools.partial(repeated, sample_of(data))
        for role, times in latencies(timed, sample, [limits.latency_batch]).items():
            found[role]["latency_ms"] = times
    return checks(limits, found["candidate"], found.get("champion"), metric=metric)


def _network(store: Store, entry: Candidate | Entry) -> Network:
    """A network's exported program, as a function of its inputs alone."""
    program = read_stablehlo((store.path(entry.export) / EXTENSIONS["stablehlo"]).read_bytes())

    def apply(params: Any, state: Any, inputs: tuple[Any, ...], *, train: bool, key: Any) -> tuple[Any, Any]:
        return program(*inputs), state

    return Network(init=lambda key: NOTHING, apply=apply)


@contextmanager
def _comparable(role: str) -> Iterator[None]:
    try:
        yield
    except UserMistake:
        raise
    except (TypeError, ValueError, DivergedError) as error:
        if role == "candidate":
            raise
        raise UserMistake(
            f"the champion cannot be measured on the candidate's test data: {str(error).partition(chr(10))[0]}. "
            "Promote the candidate under another name, or without limits (`prune-jax promote`)."
        ) from error


def contest_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """The checks, as `gates.rows` has them."""
    table = Table("what", box=None, pad_edge=False)
    for column in ("champion", "candidate"):
        table.add_column(column, justify="right")
    table.add_column("allowed")
    table.add_column("verdict")
    for row in rows:
        champion = "-" if row["champion"] is None else number(row["champion"])
        verdict = "[green]passed[/]" if row["passed"] else "[red]failed[/]"
        table.add_row(row["what"], champion, number(row["candidate"]), row["allowed"], verdict)
    return table
