"""Walks a plan: starts every call whose inputs are there, side by side where the executor allows.

The executor is handed in: a plain loop and a flow walk the same plan to the same keys.
"""

from __future__ import annotations

import queue
from collections import defaultdict
from collections.abc import Callable, Generator
from functools import partial
from heapq import heappop, heappush
from typing import Any

from prune_jax.checkpoints import Store
from prune_jax.errors import GateError, PruneError, UserMistake
from prune_jax.plan import Plan
from prune_jax.recipe import Ref, StageCall, StageResult, Status
from prune_jax.rounds import is_sound, prune_rounds

Submit = Callable[[StageCall, Callable[[StageResult], None]], None]


class _Walk:
    """The state of one walk: what waits, what runs, what is done. Each stage is looked at when its last parent ends."""

    def __init__(self, plan: Plan, store: Store, submit: Submit, side_by_side: int):
        self.plan, self.store, self.submit, self.side_by_side = plan, store, submit, side_by_side
        self.lacks = {name: len(set(parents)) for name, parents in plan.after.items()}  # parents without a result
        self.feeds: dict[str, list[int]] = defaultdict(list)  # the places in the plan of whom a stage feeds
        for place, call in enumerate(plan.calls):
            for parent in set(plan.after[call.name]):
                self.feeds[parent].append(place)
        self.ready = [place for place, call in enumerate(plan.calls) if not self.lacks[call.name]]  # a heap
        self.results: dict[str, StageResult] = {}
        self.by_key: dict[str, StageResult] = {}
        self.wanted: dict[str, list[tuple[StageCall, Callable[[StageResult], None]]]] = {}
        self.backlog: list[StageCall] = []  # wanted, but enough are at work
        self.alone: list[StageCall] = []  # calls that are timed and want the machine for themselves
        self.done: queue.Queue[StageResult] = queue.Queue()

    def run(self) -> dict[str, StageResult]:
        while self.ready or self.wanted or self.alone:
            self._start_what_is_ready()
            if not self.wanted and self.alone:
                call = self.alone.pop(0)
                self._want(call, partial(self._finish, call.name))
            if self.wanted:
                self._settle(self.done.get())
        return self.results

    def _start_what_is_ready(self) -> None:
        while self.ready:
            call = self.plan.calls[heappop(self.ready)]
            parents = [self.results[parent] for parent in self.plan.after[call.name]]
            bad = next((parent for parent in parents if not parent.good), None)
            if bad:
                self._finish(call.name, _skipped(call, bad))
            else:
                self._start(call)

    def _start(self, call: StageCall) -> None:
        if call.kind == "prune" and not is_sound(call, self.store):
            rounds = prune_rounds(call, self._metrics_of)
            self._advance(call, rounds, None)
        elif is_timed(call) and not self.store.intact(call.ref):
            self.alone.append(call)
        else:
            self._want(call, partial(self._finish, call.name))

    def _advance(self, call: StageCall, rounds: Generator[Any, Any, StageCall], answers: Any) -> None:
        """Has a prune stage say what it wants next, and comes back when all of it is there."""
        try:
            batch = rounds.send(answers)
        except StopIteration as finished:
            self._want(finished.value, partial(self._finish, call.name))
            return
        except Exception as error:  # the other branches go on
            self._finish(call.name, failure(call, error))
            return
        got: dict[str, StageResult] = {}

        def collect(sub: StageCall, result: StageResult) -> None:
            self.results.setdefault(sub.name, result)
            got[sub.name] = result
            if len(got) < len(batch):
                return
            bad = next((r for r in got.values() if not r.good), None)
            if bad:
                rounds.close()
                self._finish(call.name, _skipped(call, bad, status="failed"))
            else:
                self._advance(call, rounds, [got[s.name] for s in batch])

        for sub in batch:
            self._want(sub, partial(collect, sub))

    def _metrics_of(self, ref: Ref) -> dict[str, Any]:
        return (self.store.meta(ref) or {}).get("metrics", {})

    def _want(self, call: StageCall, then: Callable[[StageResult], None]) -> None:
        """Submits a call unless another of the same key is at work or done."""
        if call.key in self.by_key:
            then(_shared(self.by_key[call.key], call))
            return
        first = call.key not in self.wanted
        self.wanted.setdefault(call.key, []).append((call, then))
        if first:
            self.backlog.append(call)
            self._submit_some()

    def _submit_some(self) -> None:
        while self.backlog and len(self.wanted) - len(self.backlog) < self.side_by_side:
            self.submit(self.backlog.pop(0), self.done.put)

    def _settle(self, result: StageResult) -> None:
        self.by_key[result.key] = result
        (_, first), *others = self.wanted.pop(result.key)
        self._submit_some()
        first(result)
        for call, then in others:
            then(_shared(result, call))

    def _finish(self, name: str, result: StageResult) -> None:
        self.results[name] = result
        for place in self.feeds[name]:
            child = self.plan.calls[place].name
            self.lacks[child] -= 1
            if not self.lacks[child]:
                heappush(self.ready, place)


def walk(plan: Plan, store: Store, submit: Submit, *, side_by_side: int = 1) -> dict[str, StageResult]:
    """Carries out a plan; what a failed stage would have fed is skipped, all else goes on.

    Args:
        plan: what to do.
        store: where artifacts lie.
        submit: starts a call and has the second argument called with its result, from any thread.
        side_by_side: calls at work at a time.

    Returns:
        The result of every stage and of every turn of a prune stage, by name.
    """
    return _Walk(plan, store, submit, side_by_side).run()


def is_timed(call: StageCall) -> bool:
    """Whether a call measures times, and so wants the machine for itself."""
    if call.kind == "evaluate":
        return call.settings.get("latency", {}) is not None
    return call.kind == "gate" and "latency_ms" in call.settings


def failure(call: StageCall, error: BaseException) -> StageResult:
    """The result of a call that raised."""
    return StageResult(
        name=call.name,
        kind=call.kind,
        key=call.key,
        status="failed",
        message=str(error) if isinstance(error, PruneError) else f"{type(error).__name__}: {error}{_mend(error)}",
        metrics=error.metrics if isinstance(error, GateError) else {},
        user_mistake=isinstance(error, UserMistake),
        rejected=isinstance(error, GateError),
        fault=type(error).__name__,
    )


def _mend(error: BaseException) -> str:
    """What helps where XLA found no memory."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        return ""
    return (
        " Lower `data.batch_size`, choose a smaller model, spread the training (`devices`), or run one stage at a time "
        "(`--runner local`)."
    )


def _shared(result: StageResult, call: StageCall) -> StageResult:
    """The result of one call for another call of the same key."""
    spared = {"status": "cached", "seconds": 0.0} if result.good else {}
    return result.model_copy(update={"name": call.name, **spared})


def _skipped(call: StageCall, bad: StageResult, status: Status = "skipped") -> StageResult:
    verb = "failed" if bad.status == "failed" else "was skipped"
    message = f"{bad.name}: {bad.message}" if status == "failed" else f"{bad.name} {verb}"
    return StageResult(
        name=call.name,
        kind=call.kind,
        key=call.key,
        status=status,
        message=message,
        user_mistake=bad.user_mistake,
        fault=bad.fault if status == "failed" else "",
    )
