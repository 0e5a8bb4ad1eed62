"""The smallest network within a budget of the metric: bisection over one knob's rungs, Optuna over several knobs.

Every trial is a run of the recipe, seen and kept like any other: what it shares with others is computed once, and the
same search asked again goes on where it was. `searches/NAME.json` is written anew after each trial.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from prune_jax.checkpoints import Store
from prune_jax.disks import told
from prune_jax.errors import PruneError, UserMistake
from prune_jax.files import replace
from prune_jax.gates import number
from prune_jax.launch import check_runner, run
from prune_jax.recipe import Recipe, read_knob, read_recipe, read_steps
from prune_jax.registry import without_plugins
from prune_jax.studies import Judge, check_installed, optimise
from prune_jax.trials import CarryOut, Question, Trial, ask, try_out

FORMAT = 1  # of STORE/searches/NAME.json

Tell = Callable[[Question, Trial], None]


def search(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    over: str | Iterable[str],
    *,
    max_drop: float = 0.01,
    of: str | None = None,
    metric: str | None = None,
    smallest: str = "params",
    rungs: int = 9,
    trials: int = 20,
    fidelity: str | None = None,
    name: str | None = None,
    changes: Iterable[str] = (),
    store: str | os.PathLike[str] = "artifacts",
    runner: str = "threads",
    no_plugins: bool = False,
    tell: Tell = lambda question, trial: None,
) -> dict[str, Any]:
    """Searches the smallest network whose validation metric is worse than the dense one's by at most `max_drop`.

    One knob is bisected: log2(rungs + 1) trials. It is assumed, not looked at, that the network gets smaller from rung
    to rung and that beyond a rung that breaches the guard all do. Several knobs are searched by Optuna.

    Args:
        recipe: a YAML path, the name of a built-in recipe, a mapping, or a recipe.
        over: `"stages.prune.target.sparsity=0.5:0.98"`, from the larger networks to the smaller ones, or a list of
            rungs, `"...=[0.5, 0.7, 0.9]"`; several such texts for several knobs.
        max_drop: largest loss of the metric, absolute, on the validation split.
        of: the stage whose network is searched; left out, the last that is compacted and evaluated.
        metric: of the objective, or `loss`; left out, its own.
        smallest: params, macs, bytes; or nonzero, for networks that are masked only.
        rungs: of a range, evenly spaced, both ends included.
        trials: of several knobs.
        fidelity: `"stages.prune.finetune.epochs=1,3,9"`: trials of several knobs rise through these, and bad ones stop.
        name: the search's; left out, the recipe's with `-search`. Runs are named `NAME-<values>`.
        changes: `"stages.train.epochs=3"`: set before the recipe is checked.
        store: the folder or URL in which artifacts, run records and `searches/NAME.json` lie.
        runner: `threads` runs independent branches side by side, `local` one stage at a time.
        no_plugins: refuse `module:object` and what other packages register, before any of it is imported.
        tell: hears of every trial when it is done.

    Returns:
        `outcome`: found, rejected (by a gate of the recipe) or none; `message`; `chosen`, `set`, `trials`.

    Raises:
        UserMistake: the recipe or a knob is wrong; nothing was written.
        PruneError: a trial failed by something else than too much pruning.
    """
    changes = list(changes)
    with without_plugins(no_plugins):
        knobs = [read_knob(text, rungs=rungs) for text in ([over] if isinstance(over, str) else over)]
        steps = read_steps(fidelity) if fidelity else None
        _check_kind(len(knobs), steps is not None, trials)
        check_runner(runner)
        wanted = read_recipe(recipe, changes=changes)
        asked = {"of": of, "metric": metric, "max_drop": max_drop, "smallest": smallest}
        question = ask(wanted, knobs, name=name, fidelity=steps, **asked)  # type: ignore[arg-type]
        if len(knobs) > 1:
            check_installed()
    artifacts = Store(store)

    def carry_out(recipe: Recipe, name: str) -> Mapping[str, Any]:
        return run(recipe, store=store, name=name, runner=runner, no_plugins=no_plugins)

    with without_plugins(no_plugins):
        return find(question, artifacts, carry_out, trials=trials, changes=changes, tell=tell)


def find(
    question: Question,
    store: Store,
    carry_out: CarryOut,
    *,
    trials: int = 20,
    changes: Iterable[str] = (),
    tell: Tell = lambda question, trial: None,
) -> dict[str, Any]:
    """Answers a question that was checked; the runs are carried out by whoever is handed in.

    Args:
        question: what is searched.
        store: where runs and the answer lie.
        carry_out: runs a recipe under a name and answers the run record.
        trials: of several knobs.
        changes: what was set before, for the line that repeats the chosen run.
        tell: hears of every trial when it is done.
    """
    tried: dict[str, Trial] = {}  # by run

    def judge(values: dict[str, Any], step: Any) -> Trial:
        name = question.run_name(values, step)
        if name not in tried:
            tried[name] = try_out(question, values, step, store, carry_out)
            _keep(question, store, _answer(question, tried, "running", ""))
            tell(question, tried[name])
        return tried[name]

    try:
        chosen = _choose(question, judge, tried, trials)
    except PruneError as error:
        _keep(question, store, _answer(question, tried, "failed", str(error)))
        raise
    record = store.record(chosen.run) if chosen else {}
    outcome = "none" if chosen is None else "rejected" if record["rejected"] else "found"
    answer = _answer(question, tried, outcome, _message(question, tried, chosen, record))
    if chosen:
        answer["set"] = [*changes, *question.changes(chosen.values, chosen.step)]
        answer["chosen"] = {**_row(chosen), "run": chosen.run, "test": _told_at_the_end(question, record)}
    _keep(question, store, answer)
    return answer


def _choose(question: Question, judge: Judge, tried: Mapping[str, Trial], trials: int) -> Trial | None:
    """Tries the knobs; the smallest network that keeps to the guard, the better one of two of a size."""
    steps = question.fidelity.values if question.fidelity else (None,)
    if len(question.knobs) == 1:
        knob = question.knobs[0]

        def keeps(rung: int) -> bool:
            found = judge({knob.path: knob.values[rung]}, None).ok
            _check_order(question, tried)
            return found

        bisect(len(knob.values), keeps)
        whole = list(tried.values())
    else:
        whole = optimise(question.knobs, judge, max_drop=question.max_drop, trials=trials, steps=steps)
    fit = [trial for trial in whole if trial.ok]
    return min(fit, key=lambda trial: (trial.size, trial.drop), default=None)


def bisect(count: int, keeps: Callable[[int], bool]) -> int | None:
    """The last of `count` rungs that keeps to the guard, if all before one that does do, too; None if none does.

    >>> bisect(9, lambda rung: rung <= 5)
    5
    """
    last, beyond = -1, count
    while beyond - last > 1:
        middle = (last + beyond) // 2
        last, beyond = (middle, beyond) if keeps(middle) else (last, middle)
    return last if last >= 0 else None


def _check_kind(knobs: int, fidelity: bool, trials: int) -> None:
    if not knobs:
        raise UserMistake("a search needs a knob, such as --over stages.prune.target.sparsity=0.5:0.98")
    if fidelity and knobs == 1:
        raise UserMistake(
            "--fidelity stops trials of several knobs early; one knob is bisected, in a few trials: leave it"
        )
    if not 1 <= trials <= 10_000:
        raise UserMistake(f"--trials {trials}: must be 1 to 10,000")


def _check_order(question: Question, tried: Mapping[str, Trial]) -> None:
    """Refuses rungs in the wrong order, as soon as two trials have told their sizes."""
    knob = question.knobs[0]
    sized = [(knob.values.index(t.values[knob.path]), t.size) for t in tried.values() if t.size is not None]
    if len(sized) == 2 and (rungs := sorted(sized))[0][1] < rungs[1][1]:
        (a, small), (b, large) = rungs
        raise UserMistake(
            f"{knob.path}: {question.smallest} rise from {small:,} at {knob.values[a]} to {large:,} at "
            f"{knob.values[b]}, but bisection goes from larger networks to smaller ones: write the rungs the other way "
            f"round, such as {knob.values[-1]}:{knob.values[0]}"
        )


def _answer(question: Question, tried: Mapping[str, Trial], outcome: str, message: str) -> dict[str, Any]:
    """What `searches/NAME.json` holds. Only the chosen run is named as `run`: `gc --keep` lets the others go."""
    return {
        "format": FORMAT,
        "name": question.name,
        "recipe": question.recipe.name,
        "network": question.network,
        "dense": question.dense,
        "metric": question.metric,
        "max_drop": question.max_drop,
        "smallest": question.smallest,
        "over": {knob.path: list(knob.values) for knob in question.knobs},
        "fidelity": {question.fidelity.path: list(question.fidelity.values)} if question.fidelity else None,
        "outcome": outcome,
        "message": message,
        "set": [],
        "chosen": None,
        "trials": [_row(trial) for trial in tried.values()],
    }


def _keep(question: Question, store: Store, answer: Mapping[str, Any]) -> None:
    path = store.search_path(question.name)
    with told(f"what came of search {question.name!r} cannot be written", str(store.root)):
        store.make(path.parent)
        replace(path, json.dumps(answer, indent=1))


def _row(trial: Trial) -> dict[str, Any]:
    row = trial._asdict()
    return {"name": row.pop("run"), **row}


def _told_at_the_end(question: Question, record: Mapping[str, Any]) -> dict[str, Any]:
    """The metric on the test split, of the chosen network and, if it was evaluated, of the dense one."""
    results = record.get("results", {})
    return {name: results[name][question.metric] for name in (question.dense, question.network) if name in results}


def _message(question: Question, tried: Mapping[str, Trial], chosen: Trial | None, record: Mapping[str, Any]) -> str:
    guard = f"{question.metric} worse by at most {question.max_drop:g} on the validation split"
    many = "1 trial" if len(tried) == 1 else f"{len(tried)} trials"
    if chosen is None:
        return f"no trial keeps to the guard, {guard}; allow more, begin with larger networks, or fine-tune longer"
    values = ", ".join(f"{knob.word} {_shown(chosen.values[knob.path])}" for knob in question.knobs)
    found = f"{values}: {number(chosen.size or 0)} {question.smallest}, the smallest of {many} with {guard}"
    if len(question.knobs) == 1 and (left := len(question.knobs[0].values) - len(tried)):
        found += f"; of {left} rungs more it is assumed that they do no better"
    return f"{found}; but {record['message']}" if record["rejected"] else found


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def trial_line(question: Question, trial: Trial) -> str:
    """One trial in one line, for a terminal."""
    mark = "[green]✓[/]" if trial.ok else "[yellow]-[/]"
    values = " ".join(f"{knob.word} {_shown(trial.values[knob.path])}" for knob in question.knobs)
    if question.fidelity:
        values += f" · {question.fidelity.word} {_shown(trial.step)}"
    told = (
        f"{question.metric} {_figure(trial.metric)}, worse by {_drop(trial)}, {_size(trial.size)} {question.smallest}"
    )
    what = told if trial.metric is not None else trial.why
    return f"{mark} {escape(values):<28} {escape(what)}[dim]{', cached' if trial.cached else ''}[/]"


def trials_table(answer: Mapping[str, Any]) -> Table:
    """All trials of a search, the chosen one marked; metrics are those on the validation split."""
    paths, fidelity = list(answer["over"]), list(answer["fidelity"] or ())
    table = Table(box=None, pad_edge=False)
    for path in (*paths, *fidelity):
        table.add_column(escape(path.rpartition(".")[2]), justify="right")
    for column in (answer["metric"], "drop", answer["smallest"]):
        table.add_column(column, justify="right")
    for column in ("guard", "cached", ""):
        table.add_column(column)
    best = answer["chosen"]["name"] if answer["chosen"] else None
    for row in answer["trials"]:
        trial = Trial(row["name"], *(row[field] for field in Trial._fields[1:]))
        values = [*(_shown(trial.values[path]) for path in paths), *(_shown(trial.step) for _ in fidelity)]
        verdict = "ok" if trial.ok else "no" if trial.metric is not None else f"no: {trial.why}"
        cells = (*values, _figure(trial.metric), _drop(trial), _size(trial.size), verdict)
        chosen = trial.run == best
        table.add_row(
            *map(escape, cells),
            "yes" if trial.cached else "",
            "← chosen" if chosen else "",
            style="bold" if chosen else None,
        )
    return table


def set_line(answer: Mapping[str, Any]) -> str:
    """The options of `prune-jax run` that repeat the chosen run."""
    return " ".join(f"--set {shlex.quote(change)}" for change in answer["set"])


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _drop(trial: Trial) -> str:
    return "–" if trial.drop is None else f"{trial.drop:.4f}"


def _size(size: int | None) -> str:
    return "–" if size is None else number(size)
