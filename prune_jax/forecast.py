"""What a run would do, before it does it: cached or to run, and why."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from prune_jax.checkpoints import Store
from prune_jax.errors import DamagedArtifactError
from prune_jax.plan import Plan
from prune_jax.recipe import Ref, StageCall, StageResult
from prune_jax.rounds import prune_rounds


class Forecast(NamedTuple):
    """One line of a plan."""

    stage: str
    label: str
    kind: str
    key: str
    status: str  # "cached" or "to run"
    why: str
    after: tuple[str, ...]
    turn: bool = False  # of a prune stage


def forecast(plan: Plan, store: Store) -> list[Forecast]:
    """What a run of `plan` would do; the turns of a prune stage as far as they can be known beforehand."""
    before = _last_of_same_name(plan, store)
    rows: list[Forecast] = []
    for call in plan.calls:
        row = _row(call, store, plan.after[call.name], before.get(call.name))
        if row.status != "cached" and call.kind == "prune":
            rows += _turns(call, store)
        rows.append(row)
    return rows


def _row(call: StageCall, store: Store, after: tuple[str, ...], before: StageCall | None) -> Forecast:
    if store.meta(call.ref) is None:
        status, why = "to run", _why(call, before)
    elif damage := store.damage(call.ref):
        status, why = "to run", f"damaged: {damage}"
    else:
        status, why = "cached", ""
    return Forecast(call.name, call.label, call.kind, call.key, status, why, after)


def _turns(call: StageCall, store: Store) -> Iterator[Forecast]:
    """Drives the rounds as if every guard held; what a search will choose cannot be known."""
    rounds = prune_rounds(call, lambda ref: _Hopeful())
    if call.settings.get("search"):
        why = "the search decides which turns there are"
        yield Forecast(f"{call.name}.*", "search, then rounds", "", "", "to run", why, (), turn=True)
        return
    answers: Any = None
    while True:
        try:
            batch = rounds.send(answers)
        except StopIteration:
            return
        for sub in batch:
            yield _row(sub, store, (), None)._replace(turn=True)
        answers = [StageResult(name=s.name, kind=s.kind, key=s.key, status="cached", metrics=_HOPE) for s in batch]


_HOPE = {f"validation_{metric}": 0.0 for metric in ("loss", "accuracy", "mse")} | {"sparsity": 0.0}


class _Hopeful(dict):
    def __missing__(self, key: str) -> float:
        return 0.0


def _last_of_same_name(plan: Plan, store: Store) -> dict[str, StageCall]:
    """The stages of the last run of this recipe's name, as they were called."""
    name = plan.recipe.name
    try:
        stages = store.record(name).get("stages", {}) if store.record_path(name).exists() else {}
    except DamagedArtifactError:  # it is only asked what changed since
        return {}
    found = {}
    for stage, entry in stages.items():
        meta = store.meta(Ref(entry["kind"], entry["key"]))
        if meta and "call" in meta:
            with contextlib.suppress(ValueError):  # another version's
                found[stage] = StageCall.model_validate(meta["call"])
    return found


def _why(call: StageCall, before: StageCall | None) -> str:
    """Which input changed since the last run of that name."""
    if before is None:
        return "not yet made"
    changes = list(_changes(_inputs(before), _inputs(call)))
    parents = [r for r, ref in call.inputs.items() if r in before.inputs and before.inputs[r].key != ref.key]
    changes += [f"{role} changed" for role in parents]
    return "; ".join(changes) or "not in this store"


def _inputs(call: StageCall) -> dict[str, Any]:
    problem = call.problem.model_dump(mode="json")
    return {**call.settings, "seed": call.seed, **problem}


def _changes(before: Any, now: Any, path: str = "") -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys((*before, *now)):
            yield from _changes(before.get(name), now.get(name), f"{path}.{name}".strip("."))
    elif before != now:
        yield f"{path}: {_short(before)} -> {_short(now)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "…"


def forecast_table(name: str, rows: list[Forecast]) -> Table:
    """The plan as a table; the turns of a prune stage stand indented above it."""
    table = Table(title=f"plan of {escape(name)}", title_justify="left", box=None, pad_edge=False)
    for column in ("stage", "key", "status"):
        table.add_column(column, no_wrap=True)
    table.add_column("why, and after what")
    for row in rows:
        name = "" if row.turn else f"[bold]{escape(row.stage)}[/]"
        told = f"{name}  [dim]{escape(row.label)}[/]"
        colour = "blue" if row.status == "cached" else "green"
        after = f"after {', '.join(row.after)}" if row.after else ""
        reason = escape("; ".join(filter(None, (row.why, after))))
        table.add_row(told, row.key[:12], f"[{colour}]{row.status}[/]", reason)
    return table
