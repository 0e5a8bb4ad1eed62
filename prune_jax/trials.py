"""One trial of a search: a run of the recipe with its knobs set, held to the guard on the validation split.

What decides is known before anything runs: which network is searched, beside which dense training, by which metric. The
test split decides nothing; a gate in the recipe, which looks at it, is heard only about the network that was chosen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from prune_jax.checkpoints import Store
from prune_jax.errors import DamagedArtifactError, PruneError, UserMistake, did_you_mean
from prune_jax.gates import HIGHER_IS_BETTER, SLACK
from prune_jax.plan import Plan, expand
from prune_jax.preparation import prepare
from prune_jax.recipe import (
    NETWORKS,
    Knob,
    Recipe,
    check_run_name,
    digest,
    is_run_name,
    parents_of,
    read_recipe,
)
from prune_jax.recipe.knobs import written
from prune_jax.rounds import is_sound

SIZES = ("params", "macs", "bytes", "nonzero")
PRUNES = {"prune", "mask", "compact"}
NO = {"GuardBreachError", "DivergedError", "LayerCollapseError"}  # failures that only say: too much was asked
GATE = "GateError"
DONE = {"ran", "cached"}

CarryOut = Callable[[Recipe, str], Mapping[str, Any]]  # runs a recipe under a name, and answers the run record


@dataclass(frozen=True)
class Question:
    """What a search wants to know, checked."""

    name: str
    recipe: Recipe
    knobs: tuple[Knob, ...]
    fidelity: Knob | None
    network: str  # the stage whose network is to be small
    dense: str  # the training that it is held beside
    metric: str
    max_drop: float
    smallest: str

    def changes(self, values: Mapping[str, Any], step: Any = None) -> list[str]:
        """What `--set` takes for a trial."""
        found = [knob.change(values[knob.path]) for knob in self.knobs]
        return found + ([self.fidelity.change(step)] if self.fidelity else [])

    def run_name(self, values: Mapping[str, Any], step: Any = None) -> str:
        """`digits-search-0.86`: of values that no folder's name can hold, a digest."""
        told = [*values.values(), *([step] if self.fidelity else [])]
        words = "-".join(re.sub(r"[^A-Za-z0-9._-]+", "_", written(value).strip('"')) for value in told)
        name = f"{self.name}-{words}"
        return name if is_run_name(name) else f"{self.name}-{digest(self.changes(values, step))[:8]}"


class Trial(NamedTuple):
    """What came of one run; figures are None if it got no further."""

    run: str
    values: Mapping[str, Any]  # of the knobs, by path
    step: Any  # of the fidelity
    metric: float | None  # on the validation split
    drop: float | None  # against the dense training, positive if worse
    size: int | None
    ok: bool
    why: str  # not ok
    cached: bool  # nothing was computed for it


def ask(
    recipe: Recipe,
    knobs: Iterable[Knob],
    *,
    name: str | None = None,
    fidelity: Knob | None = None,
    of: str | None = None,
    metric: str | None = None,
    max_drop: float = 0.01,
    smallest: str = "params",
) -> Question:
    """Checks what is searched, every rung of every knob included; nothing has run yet.

    Raises:
        UserMistake: what is wrong, what is allowed, what to add.
    """
    from prune_jax.objectives import objective

    name = name or f"{recipe.name[:80]}-search"
    check_run_name(f"{name}-{'0' * 8}")
    if smallest not in SIZES:
        raise UserMistake(f"--smallest {smallest}: is not known{did_you_mean(smallest, SIZES)} ({_one_of(SIZES)})")
    if not max_drop >= 0:
        raise UserMistake(f"--max-drop {max_drop}: must be 0 or more, in units of the metric")
    if expand(recipe)[0]:
        raise UserMistake(
            f"{recipe.name}: matrix: a trial has one network, and the search sets the knobs; leave it out"
        )
    if not recipe.data.validation:
        raise UserMistake(
            f"{recipe.name}: data.validation = 0: the guard looks at a validation split, never at the test split; set "
            "it, such as --set data.validation=0.1"
        )
    knobs = tuple(knobs)
    paths = [knob.path for knob in (*knobs, *([fidelity] if fidelity else []))]
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise UserMistake(f"--over {twice}: stands twice; give each knob once")
    network = _network(recipe, of, smallest)
    goal = objective(recipe.objective)
    metrics = ["loss", *goal.metrics]
    metric = metric or goal.primary
    if metric not in metrics:
        raise UserMistake(f"--metric {metric}: is not known{did_you_mean(metric, metrics)} ({_one_of(metrics)})")
    dense = _dense(recipe, network)
    question = Question(name, recipe, knobs, fidelity, network, dense, metric, max_drop, smallest)
    _check_rungs(question)
    return question


def try_out(question: Question, values: Mapping[str, Any], step: Any, store: Store, carry_out: CarryOut) -> Trial:
    """Runs the recipe with these values, unless a run of that name did, and judges what came of it.

    Raises:
        PruneError: the run failed by something else than too much pruning.
    """
    recipe, name = read_recipe(question.recipe, changes=question.changes(values, step)), question.run_name(values, step)
    record = _finished(prepare(recipe), store, name)
    cached = record is not None
    if record is None:
        record = carry_out(recipe, name)
        cached = all(stage["status"] == "cached" for stage in record["stages"].values())
    return Trial(name, dict(values), step, *_judged(question, record), cached)


def _judged(question: Question, record: Mapping[str, Any]) -> tuple[float | None, float | None, int | None, bool, str]:
    """Metric, drop, size, whether it is allowed, and why not."""
    stages, why = record["stages"], ""
    for name, stage in stages.items():
        fault = stage.get("fault", "")
        if stage["status"] != "failed" or fault == GATE:
            continue
        if fault not in NO or name == question.dense:
            error = UserMistake if record.get("user_mistake") else PruneError
            raise error(f"the search stops: run {record['name']!r}: {name} failed: {stage['message']}")
        why = why or f"{name}: {stage['message']}"
    found = record["results"].get(question.network)
    if found is None:
        return None, None, None, False, why
    word = f"validation_{question.metric}"
    before, now = (stages[name]["metrics"][word] for name in (question.dense, question.network))
    drop = before - now if question.metric in HIGHER_IS_BETTER else now - before
    ok = drop <= question.max_drop + SLACK
    return now, drop, found[question.smallest], ok, "" if ok else f"worse by {drop:.4g}"


def _finished(plan: Plan, store: Store, name: str) -> Mapping[str, Any] | None:
    """The record of a run of this very plan that came to an end, if all that it made is there."""
    if not store.record_path(name).exists():
        return None
    try:
        record = store.record(name)
    except DamagedArtifactError:  # the next run writes it anew
        return None
    stages = record["stages"]
    if any(stages.get(call.name, {}).get("key") != call.key for call in plan.calls):
        return None
    if any(s["status"] == "failed" and s.get("fault") not in {*NO, GATE} for s in stages.values()):
        return None
    made = [call for call in plan.calls if stages[call.name]["status"] in DONE]
    return record if all(is_sound(call, store) for call in made) else None


def _lineage(recipe: Recipe, name: str) -> list[str]:
    """A stage and those that its network went through before, nearest first."""
    wiring, found = parents_of(recipe.stages), [name]
    while wiring[found[-1]]:
        found.append(wiring[found[-1]][0])
    return found


def _network(recipe: Recipe, of: str | None, smallest: str) -> str:
    """The stage whose network is searched: the one that is named, else the last that is evaluated and small."""
    stages, wiring = recipe.stages, parents_of(recipe.stages)
    judged = {parent for name, stage in stages.items() if stage.kind == "evaluate" for parent in wiring[name]}
    networks = [name for name, stage in stages.items() if stage.kind in NETWORKS]
    if of is not None and of not in networks:
        raise UserMistake(f"--of {of}: is no stage with a network{did_you_mean(of, networks)} ({_one_of(networks)})")
    small = [n for n in networks if _shrinks(recipe, n, smallest)]
    named = [of] if of else small
    if not set(named) & set(small):
        if smallest == "nonzero":
            raise UserMistake(
                f"{recipe.name}: stages: {of or 'no network'} is not pruned; add a `prune` stage, or --of"
            )
        raise UserMistake(
            f"{recipe.name}: stages: {of or 'no network'} is not compacted, and masks alone leave {smallest} as they "
            "are; add `compact: {kind: compact}` after a `prune` of granularity group, or ask --smallest nonzero"
        )
    found = [name for name in named if name in judged]
    if not found:
        raise UserMistake(
            f"{recipe.name}: stages: none evaluates {' or '.join(named)}, whose size is asked for; add one such as "
            f"`evaluate: {{kind: evaluate, of: [{named[-1]}]}}`"
        )
    if beside := set(found) - set(_lineage(recipe, found[-1])):
        raise UserMistake(
            f"{recipe.name}: several networks could be meant; say --of {' or '.join(beside | {found[-1]})}"
        )
    return found[-1]


def _shrinks(recipe: Recipe, name: str, smallest: str) -> bool:
    line = [recipe.stages[n] for n in _lineage(recipe, name)]
    if smallest != "nonzero":
        return any(stage.kind == "compact" for stage in line)
    return any(stage.kind in PRUNES or getattr(stage, "sparsify", None) for stage in line)


def _dense(recipe: Recipe, network: str) -> str:
    """The dense training from which a network descends; of what was sparse from the first step, the one beside it."""
    trained = [n for n, s in recipe.stages.items() if s.kind == "train" and not getattr(s, "sparsify", None)]
    origin = _lineage(recipe, network)[-1]
    if origin in trained:
        return origin
    if not trained:
        raise UserMistake(
            f"{recipe.name}: stages: {network} was sparse from the first step, and there is no dense training "
            "to hold it beside; add one such as `dense: {kind: train, ...}`"
        )
    return trained[0]


def _check_rungs(question: Question) -> None:
    """Refuses rungs that the recipe does not take, and knobs that turn nothing or move what is compared with."""
    first = {knob.path: knob.values[0] for knob in question.knobs}
    steps = question.fidelity.values if question.fidelity else (None,)
    turned = [
        (knob, [question.changes({**first, knob.path: v}, steps[-1]) for v in knob.values]) for knob in question.knobs
    ]
    if question.fidelity:
        turned.append((question.fidelity, [question.changes(first, step) for step in steps]))
    dense: set[str] = set()
    for knob, settings in turned:
        plans = [prepare(read_recipe(question.recipe, changes=changes)) for changes in settings]
        keys = [{call.name: call.key for call in plan.calls} for plan in plans]
        if len({key[question.network] for key in keys}) == 1:
            raise UserMistake(f"{knob.path}: changes nothing of {question.network}, the network that is searched")
        dense |= {key[question.dense] for key in keys}
        if len(dense) > 1:
            raise UserMistake(
                f"{knob.path}: changes {question.dense}, the dense training that every trial is held beside; choose "
                "settings of later stages"
            )


def _one_of(words: Iterable[str]) -> str:
    return f"allowed: {', '.join(words)}"
