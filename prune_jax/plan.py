"""Recipe -> plan: the stage calls with chained keys. Pure; nothing has run yet.

A key is the digest of the stage's kind, its version (and those of its turns), the settings that differ from their
defaults, the seed where something is drawn, and its parents' keys; names, retries and timeouts are not in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from prune_jax.criteria import find
from prune_jax.notation import read_granularity
from prune_jax.recipe import (
    BUILT_IN_METHODS,
    Data,
    Problem,
    Prune,
    Recipe,
    Ref,
    StageCall,
    Teaching,
    digest,
    parents_of,
    untargeted,
    validate,
    with_value,
)
from prune_jax.recipe.parts import Frozen
from prune_jax.sparse_training import find as find_method

# A stage that comes to compute something else gets the next number, so that nothing old is taken for new.
VERSIONS = {
    "train": 2,
    "score": 1,
    "mask": 1,
    "finetune": 2,
    "distill": 1,
    "prune": 1,
    "compact": 1,
    "export": 1,
    "evaluate": 2,
    "gate": 1,
    "snapshot": 1,
}
# Of training methods that answer otherwise than at first; some do in one scope only.
METHODS = {"static": 3, "set": 3, "rigl": 3, "gradual, erk": 2, "movement, erk": 2}
KEY_LENGTH = 20


@dataclass(frozen=True)
class Plan:
    """Stage calls in an order that can be run, and whose results each takes."""

    recipe: Recipe
    calls: tuple[StageCall, ...]
    after: Mapping[str, tuple[str, ...]]


def key_of(kind: str, **content: Any) -> str:
    """The key of a stage: a digest of all that decides its result."""
    sparsify = content.get("settings", {}).get("sparsify", {})
    for method in (sparsify.get("kind"), f"{sparsify.get('kind')}, {sparsify.get('scope')}"):
        if method in METHODS:
            content["method"] = METHODS[method]
    return digest({"kind": kind, "version": VERSIONS[kind], **content})[:KEY_LENGTH]


def _data_part(problem: Problem) -> dict[str, Any]:
    return {
        "digest": problem.data_digest,
        "validation": problem.data.validation,
        "batch_size": problem.data.batch_size,
        "fold": problem.fold,
    }


def _problem_part(problem: Problem) -> dict[str, Any]:
    model = problem.model.model_dump(mode="json", exclude_defaults=True)
    found = {"data": _data_part(problem), "model": model, "objective": problem.objective, "code": problem.code}
    if problem.devices:  # sums in another order: the last bits differ
        found["devices"] = problem.devices.model_dump(mode="json")
    return found


def as_settings(part: Frozen, **more: Any) -> dict[str, Any]:
    """A recipe's part as the settings of a call: what differs from the defaults."""
    return {**part.model_dump(mode="json", exclude_defaults=True), **more}


def train_call(name: str, problem: Problem, settings: dict[str, Any], seed: int, **more: Any) -> StageCall:
    """Training from initialisation; with `stop_step` in the settings, only so far."""
    key = key_of("train", settings=settings, seed=seed, **_problem_part(problem))
    label = " · ".join(filter(None, ("train", _model_word(problem), _sparsify_word(settings))))
    if "stop_step" in settings:
        label = f"train · to step {settings['stop_step']}"
    return StageCall(
        name=name, label=label, kind="train", key=key, settings=settings, problem=problem, seed=seed, **more
    )


def score_call(
    name: str, problem: Problem, settings: dict[str, Any], seed: int, network: Ref, level: str = "", **more: Any
) -> StageCall:
    """Scores of a network's units."""
    content: dict[str, Any] = {"settings": settings, "network": network.key, "data": _data_part(problem)}
    if _draws(settings["criterion"]):
        content["seed"] = seed
    return StageCall(
        name=name,
        label=" · ".join(filter(None, ("score", settings["criterion"]["name"], level))),
        kind="score",
        key=key_of("score", objective=problem.objective, **content),
        settings=settings,
        inputs={"network": network},
        problem=problem,
        seed=seed,
        **more,
    )


def mask_call(
    name: str, problem: Problem, settings: dict[str, Any], network: Ref, scores: Ref, level: str = "", **more: Any
) -> StageCall:
    """The network under masks of its lowest scores."""
    key = key_of("mask", settings=settings, network=network.key, scores=scores.key)
    scope = settings.get("scope", "global")
    where = "" if read_granularity(settings["granularity"]).fixed else scope if isinstance(scope, str) else "table"
    return StageCall(
        name=name,
        label=" · ".join(filter(None, ("mask", where, level))),
        kind="mask",
        key=key,
        settings=settings,
        inputs={"network": network, "scores": scores},
        problem=problem,
        **{"seed": 0, **more},
    )


def shape_call(
    kind: str, name: str, problem: Problem, settings: dict[str, Any], network: Ref, **more: Any
) -> StageCall:
    """The same network in another shape: compact, or exported."""
    return StageCall(
        name=name,
        label=" · ".join([kind, *settings.get("formats", ())]),
        kind=kind,
        key=key_of(kind, settings=settings, network=network.key, **_problem_part(problem)),
        settings=settings,
        inputs={"network": network},
        problem=problem,
        **more,
    )


def gate_call(
    name: str, problem: Problem, settings: dict[str, Any], network: Ref, against: Ref | None, **more: Any
) -> StageCall:
    """Whether a network keeps to its limits, some of them beside another network."""
    inputs = {"network": network} | ({"against": against} if against else {})
    keys = {role: ref.key for role, ref in inputs.items()}
    content = {"settings": settings, "inputs": keys, "data": problem.data_digest, "objective": problem.objective}
    return StageCall(
        name=name,
        label="gate",
        kind="gate",
        key=key_of("gate", **content),
        settings=settings,
        inputs=inputs,
        problem=problem,
        **more,
    )


def finetune_call(
    name: str,
    problem: Problem,
    settings: dict[str, Any],
    seed: int,
    network: Ref,
    rewind: Ref | None = None,
    teacher: Ref | None = None,
    level: str = "",
    **more: Any,
) -> StageCall:
    """The network trained on under its masks, from earlier weights if `rewind` names them, towards a `teacher`."""
    inputs = {"network": network} | ({"rewind": rewind} if rewind else {}) | ({"teacher": teacher} if teacher else {})
    keys = {role: ref.key for role, ref in inputs.items()}
    amount, unit = (settings["epochs"], "epoch") if "epochs" in settings else (settings["steps"], "step")
    length = f"{amount:.12g} {unit}{'s' * (amount != 1)}"
    if begin := settings.get("begin_step"):
        length = f"{length} from step {begin}"
    kind = "distill" if teacher else "finetune"
    return StageCall(
        name=name,
        label=" · ".join(filter(None, (kind, length, _sparsify_word(settings), level))),
        kind=kind,
        key=key_of(kind, settings=settings, seed=seed, inputs=keys, **_problem_part(problem)),
        settings=settings,
        inputs=inputs,
        problem=problem,
        seed=seed,
        **more,
    )


def retraining(settings: Mapping[str, Any], origin: StageCall) -> dict[str, Any]:
    """The settings of a recovery with what it repeats of the training, and what it learns from a teacher, in one."""
    found = {k: v for k, v in settings.items() if k not in ("rewind", "distill", "teacher")}
    found |= {k: v for k, v in settings.get("distill", {}).items() if k != "teacher"}
    begin = _learning_rate_of(settings.get("rewind"))
    if begin is None:
        return found
    repeated = {k: v for k, v in origin.settings.items() if k in ("optimizer", "epochs", "steps")}
    return {**found, **repeated, "begin_step": begin}


def _learning_rate_of(rewind: Any) -> int | None:
    """The step to which a recovery rewinds the learning rate alone."""
    return rewind["learning_rate"]["step"] if isinstance(rewind, Mapping) and "learning_rate" in rewind else None


def rewind_call(rewind: Any, origin: StageCall, name: str) -> StageCall | None:
    """The training to the step that a recovery rewinds to; it is the same training, only stopped there."""
    if rewind in (None, "none") or _learning_rate_of(rewind) is not None:
        return None
    step = 0 if rewind == "initialisation" else rewind["step"]
    settings = {**origin.settings, "stop_step": step}
    settings.pop("store_moments", None)  # nothing goes on with those
    return train_call(f"{name}.rewind", origin.problem, settings, origin.seed, operation=origin.operation)


def make_plan(recipe: Recipe, *, digest_of: Callable[[Data], str], code_of: Callable[[Recipe], dict[str, str]]) -> Plan:
    """Expands the matrices and names every call.

    Args:
        recipe: what is wanted.
        digest_of: the digest of what a data source answers.
        code_of: the digests of the user's own code that the recipe names.
    """
    axes, rows = expand(recipe)
    return join(recipe, axes, [plan_row(row, digest_of(row.data), code_of(row)) for row in rows])


def join(recipe: Recipe, axes: list[Axis], plans: list[Plan]) -> Plan:
    """The plans of a matrix's rows as one, in which each call stands once.

    Args:
        recipe: with the matrix.
        axes: of the matrix.
        plans: of its rows, in the order of `expand`.
    """
    if not axes:
        return plans[0]
    places = _places(axes, plans)
    calls: dict[str, StageCall] = {}
    after: dict[str, tuple[str, ...]] = {}
    for row, plan in enumerate(plans):
        named = {stage: _row_name(stage, places[stage, row]) for stage in plan.after}
        for call in plan.calls:
            name = named[call.name]
            if name in calls:
                continue
            inputs = call.inputs
            if call.kind == "evaluate":  # whose inputs go by the names of stages
                inputs = {named.get(role, role): ref for role, ref in inputs.items()}
            facts: dict[str, Any] = {"row": places[call.name, row]}
            if teacher := call.facts.get("teacher"):
                facts["teacher"] = named[teacher]
            calls[name] = call.model_copy(update={"name": name, "inputs": inputs, "facts": facts})
            after[name] = tuple(named[p] for p in plan.after[call.name])
    return Plan(recipe, tuple(calls.values()), after)


class Axis(NamedTuple):
    """One axis of a matrix."""

    path: tuple[str, ...]
    values: list[Any]


def expand(recipe: Recipe) -> tuple[list[Axis], list[Recipe]]:
    """The axes of all matrices and one plain recipe for each combination of their values."""
    raw = recipe.model_dump(mode="json", exclude_unset=True)
    axes = [Axis(tuple(path.split(".")), values) for path, values in (recipe.matrix or {}).items()]
    raw.pop("matrix", None)
    for name, stage in recipe.stages.items():
        axes += [Axis(("stages", name, *path.split(".")), values) for path, values in (stage.matrix or {}).items()]
        raw["stages"][name].pop("matrix", None)
    rows = []
    for combination in itertools.product(*(axis.values for axis in axes)):
        row = raw
        for axis, value in zip(axes, combination, strict=True):
            row = with_value(row, axis.path, value)
        told = [f"{'.'.join(axis.path)}={value}" for axis, value in zip(axes, combination, strict=True)]
        rows.append(validate(row, f"{recipe.name} [{', '.join(told)}]" if told else recipe.name, row=True))
    return axes, rows


def _places(axes: list[Axis], plans: list[Plan]) -> dict[tuple[str, int], dict[str, str]]:
    """Where in the matrix a row's stage stands: those axes alone that change the stage's key."""
    places = list(itertools.product(*(range(len(axis.values)) for axis in axes)))
    row_of = {place: row for row, place in enumerate(places)}
    keys = [{call.name: call.key for call in plan.calls} for plan in plans]
    labels = _labels(axes)
    words = [_words(axis.values) for axis in axes]
    found = {}
    for stage in plans[0].after:
        told = [
            a
            for a in range(len(axes))
            if any(keys[row_of[p]][stage] != keys[row_of[(*p[:a], 0, *p[a + 1 :])]][stage] for p in places)
        ]
        for row, place in enumerate(places):
            found[stage, row] = {labels[a]: words[a][place[a]] for a in told}
    return found


def _row_name(stage: str, place: Mapping[str, str]) -> str:
    """`prune[criterion=snip]`."""
    return f"{stage}[{','.join(f'{axis}={word}' for axis, word in place.items())}]" if place else stage


def _labels(axes: list[Axis]) -> list[str]:
    """The shortest ends of the paths that tell the axes apart."""
    labels = []
    for axis in axes:
        ends = [axis.path[-n:] for n in range(1, len(axis.path) + 1)]
        alone = [end for end in ends if sum(other.path[-len(end) :] == end for other in axes) == 1]
        labels.append(".".join(alone[0] if alone else axis.path))
    return labels


def _words(values: list[Any]) -> list[str]:
    """A word for each value; values that would share one are told apart by their number."""
    words = [_word(value) for value in values]
    alike = {w for i, w in enumerate(words) for j in range(i) if words[j] == w and values[j] != values[i]}
    return [f"{word}#{i + 1}" if word in alike else word for i, word in enumerate(words)]


def _word(value: Any) -> str:
    if isinstance(value, dict):
        return "+".join(_word(v) for v in value.values())
    if isinstance(value, list):
        return "-".join(_word(v) for v in value)
    return str(value)


def plan_row(recipe: Recipe, data_digest: str, code: dict[str, str]) -> Plan:
    """The plan of a recipe without matrices."""
    problem = Problem(
        data=recipe.data,
        data_digest=data_digest,
        model=recipe.model,
        objective=recipe.objective,
        code=code,
        devices=recipe.devices,
    )
    calls: dict[str, StageCall] = {}
    after: dict[str, tuple[str, ...]] = {}
    wiring = parents_of(recipe.stages)
    for name, stage in recipe.stages.items():
        *before, call = _calls_of(name, stage, recipe, problem, [calls[p] for p in wiring[name]])
        for extra in before:  # the training to the step that the stage rewinds to
            calls[extra.name], after[extra.name] = extra, ()
        calls[name] = call
        dense = tuple(role for role in call.inputs if stage.kind == "evaluate" and role not in wiring[name])
        scored = wiring[wiring[name][0]] if stage.kind == "mask" else ()
        beside = (call.inputs.get("teacher"), call.inputs.get("against"))
        taught = (call.origin.name,) if call.origin and call.origin.ref in beside else ()
        after[name] = tuple(dict.fromkeys((*dense, *scored, *wiring[name], *taught, *(extra.name for extra in before))))
    return Plan(recipe, tuple(calls.values()), after)


def _calls_of(name: str, stage: Any, recipe: Recipe, problem: Problem, parents: list[StageCall]) -> list[StageCall]:
    seed = recipe.seed if stage.seed is None else stage.seed
    settings = stage.settings()
    if "criterion" in settings:
        settings["criterion"] = _without_defaults(settings["criterion"])
    if settings.get("sparsify", {}).get("kind", "gradual") not in BUILT_IN_METHODS:
        defaults = find_method(settings["sparsify"]["kind"]).options
        settings["sparsify"] = {k: v for k, v in settings["sparsify"].items() if k not in defaults or v != defaults[k]}
    operations: dict[str, Any] = {"operation": stage.operation()}
    if stage.kind == "train":
        if "steps" not in settings:
            settings.setdefault("epochs", 10.0)
        return [train_call(name, problem, settings, seed, **operations)]
    parent = parents[0]
    origin = parent.origin or parent
    operations["origin"] = origin
    teacher = _teacher_of(stage, parents, origin)
    if teacher and teacher is not parent:
        operations["facts"] = {"teacher": teacher.name}
    match stage.kind:
        case "score":
            return [score_call(name, problem, settings, seed, parent.ref, **operations)]
        case "mask":
            settings["granularity"] = parent.settings.get("granularity", "weight")
            network = parent.inputs["network"]
            level = _level(stage, settings["granularity"])
            return [mask_call(name, problem, settings, network, parent.ref, level, **operations)]
        case "compact" | "export":
            return [shape_call(stage.kind, name, problem, settings, parent.ref, seed=seed, **operations)]
        case "gate":
            other = parents[1] if len(parents) > 1 else origin
            against = other.ref if stage.relative else None
            return [gate_call(name, problem, settings, parent.ref, against, seed=seed, **operations)]
        case "finetune" | "distill":
            rewind = rewind_call(settings.get("rewind"), origin, name)
            settings = retraining(settings, origin)
            before, knows = (each.ref if each else None for each in (rewind, teacher))
            call = finetune_call(name, problem, settings, seed, parent.ref, before, knows, **operations)
            return [rewind, call] if rewind else [call]
        case "prune":
            inputs = {"network": parent.ref}
            if teacher:
                inputs["teacher"] = teacher.ref
                distill = {k: v for k, v in settings["finetune"]["distill"].items() if k != "teacher"}
                settings["finetune"] = {**settings["finetune"], "distill": distill}
            content = {
                "settings": settings,
                **{role: ref.key for role, ref in inputs.items()},
                **_problem_part(problem),
            }
            if stage.finetune or _draws(settings["criterion"]):
                content["seed"] = seed
            content["turns"] = {kind: VERSIONS[kind] for kind in _turns(stage)}
            if (stage.finetune and stage.finetune.rewind != "none") or stage.search:
                content["origin"] = origin.key
            return [
                StageCall(
                    name=name,
                    label=" · ".join(filter(None, ("prune", stage.criterion.name, _level(stage, stage.granularity)))),
                    kind="prune",
                    key=key_of("prune", **content),
                    settings=settings,
                    inputs=inputs,
                    problem=problem,
                    seed=seed,
                    **operations,
                )
            ]
    networks = {p.name: p.ref for p in parents}
    if origin.key not in {ref.key for ref in networks.values()}:
        networks = {origin.name: origin.ref, **networks}
    content = {"settings": settings, "networks": [ref.key for ref in networks.values()], "data": problem.data_digest}
    return [
        StageCall(
            name=name,
            label=f"evaluate · {', '.join(networks)}",
            kind="evaluate",
            key=key_of("evaluate", objective=problem.objective, **content),
            settings=settings,
            inputs=networks,
            problem=problem,
            seed=seed,
            **operations,
        )
    ]


def _teacher_of(stage: Any, parents: list[StageCall], origin: StageCall) -> StageCall | None:
    """The call whose network a stage learns from: the one that it names, else the training."""
    recovery = stage.finetune if isinstance(stage, Prune) else stage
    if not isinstance(recovery, Teaching) and not getattr(recovery, "distill", None):
        return None
    return parents[1] if len(parents) > 1 else origin


def _draws(criterion: Mapping[str, Any]) -> bool:
    """Whether something of a score is drawn."""
    return find(criterion["name"]).stochastic or criterion.get("perturbation", {}).get("kind") == "gaussian"


def _without_defaults(criterion: dict[str, Any]) -> dict[str, Any]:
    """A criterion's settings without the options that are set to what its function takes them for."""
    defaults = find(criterion["name"]).options
    options = {k: v for k, v in criterion.get("options", {}).items() if k not in defaults or v != defaults[k]}
    rest = {k: v for k, v in criterion.items() if k != "options"}
    return {**rest, "options": options} if options else rest


def _turns(stage: Prune) -> tuple[str, ...]:
    """The kinds of stage that a prune stage is made of."""
    if not stage.finetune:
        return "score", "mask"
    return "score", "mask", "distill" if stage.finetune.distill else "finetune"


def _level(stage: Any, granularity: Any) -> str:
    if stage.target is None:
        return untargeted(granularity)
    return (
        f"{stage.target.amount:g}"
        if isinstance(stage.target.amount, float)
        else f"{stage.target.word} {stage.target.amount}"
    )


def _model_word(problem: Problem) -> str:
    return problem.model.kind.rpartition(":")[2]


def _sparsify_word(settings: Mapping[str, Any]) -> str:
    method = settings.get("sparsify")
    return method["kind"] if method else ""
