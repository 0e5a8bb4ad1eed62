"""Which stage takes the result of which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prune_jax.errors import did_you_mean
from prune_jax.recipe.parts import mistake

# What each kind takes: the kinds whose result will do.
NETWORKS = ("train", "mask", "finetune", "distill", "prune", "compact")
TUNED = ("finetune", "distill")  # train a network on
TAKES = {
    "train": (),
    "score": NETWORKS,
    "mask": ("score",),
    "finetune": NETWORKS,
    "distill": NETWORKS,
    "prune": NETWORKS,
    "compact": NETWORKS,
    "export": NETWORKS,
    "evaluate": NETWORKS,
    "gate": NETWORKS,
}


def parents_of(stages: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """By stage, those whose results it takes: those that it names, else the one above that fits; then the other one.

    The other one is a teacher, or what a gate compares with.
    """
    above: list[str] = []
    wiring = {}
    for name, stage in stages.items():
        fitting = [n for n in above if stages[n].kind in TAKES[stage.kind]]
        others = tuple(other for _, other in _others(stage))
        wiring[name] = (*(stage.parents or ((fitting[-1],) if fitting and TAKES[stage.kind] else ())), *others)
        above.append(name)
    return wiring


def check_wiring(stages: Mapping[str, Any]) -> None:
    """Refuses a stage that names an unknown, later or unfit stage, or that has nothing to take."""
    above: list[str] = []
    for name, stage in stages.items():
        fit = TAKES[stage.kind]
        field = "of" if getattr(stage, "of", None) else "after"
        for where, parent in (*((field, parent) for parent in stage.parents), *_others(stage)):
            if parent not in stages:
                raise mistake(
                    f"{name}.{where}", f"names no stage{did_you_mean(parent, stages)} (stages above: {_listed(above)})"
                )
            if parent not in above:
                raise mistake(
                    f"{name}.{where}",
                    f"names {parent!r}, which does not come before it (stages above: {_listed(above)})",
                )
            if stages[parent].kind not in fit:
                wanted = f"a {' or '.join(fit)} stage" if fit else "no other stage's result"
                raise mistake(
                    f"{name}.{where}",
                    f"names {parent!r}, a {stages[parent].kind} stage, but {stage.kind} takes {wanted}",
                )
        if fit and not stage.parents and not any(stages[n].kind in fit for n in above):
            raise mistake(
                f"{name}.kind", f"{stage.kind} takes the result of a {' or '.join(fit)} stage, and none stands above it"
            )
        above.append(name)


def _others(stage: Any) -> tuple[tuple[str, str], ...]:
    """Where a stage names its teacher, or what a gate compares with, and whom; nothing if it names none."""
    if against := getattr(stage, "against", None):
        return (("against", against),)
    teaching = getattr(getattr(stage, "finetune", None), "distill", None)
    where, teacher = ("finetune.distill.teacher", teaching.teacher) if teaching else ("teacher", None)
    teacher = teacher or getattr(stage, "teacher", None)
    return ((where, teacher),) if teacher else ()


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"
