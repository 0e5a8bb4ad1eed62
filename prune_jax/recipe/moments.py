"""Whose moments a stage goes on with: refused where there are none, or another optimizer's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prune_jax.recipe.parts import Optimizer, mistake
from prune_jax.recipe.wiring import TUNED


def check_moments(stages: Mapping[str, Any], wiring: Mapping[str, tuple[str, ...]]) -> None:
    """Refuses `moments: kept` where the network may come without the moments of the same optimizer."""
    for name, stage in stages.items():
        recovery, where = (stage.finetune, f"{name}.finetune") if stage.kind == "prune" else (stage, name)
        if getattr(recovery, "moments", "fresh") != "kept":
            continue
        sources = _sources(wiring[name][0], stages, wiring)
        if stage.kind == "prune" and stage.search:  # its folds train anew
            sources |= _sources(_origin(name, wiring), stages, wiring)
        here = _word(_optimizer(name, recovery, stages, wiring))
        for source, training in sources.items():
            if not training.store_moments:
                message = f"stores none: set `stages.{source}.store_moments: true`, or leave `moments` out"
                raise mistake(f"{where}.moments", f"{source}, whose network it may start from, {message}")
            home = source if source in stages else source.removesuffix(".finetune")
            if (there := _word(_optimizer(home, training, stages, wiring))) != here:
                message = f"{here} cannot go on with those of {there}, which {source} stores"
                raise mistake(f"{where}.moments", f"{message}; make the optimizers the same, or leave `moments` out")
        if stage.kind == "prune" and getattr(stage.schedule, "rounds", 1) > 1 and not recovery.store_moments:
            message = "each round goes on with the moments that the one before stores: set it to true"
            raise mistake(f"{where}.store_moments", message)


def _sources(name: str, stages: Mapping[str, Any], wiring: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """The trainings, by their place in the recipe, whose moments the network of a stage may hold."""
    stage = stages[name]
    if stage.kind in {"train", *TUNED}:
        return {name: stage}
    before = wiring[name][0]
    found = {f"{name}.finetune": stage.finetune} if stage.kind == "prune" and stage.finetune else {}
    if not found or (stage.guard and stage.guard.breach.action != "fail"):  # a guard may publish what was there before
        found |= _sources(before, stages, wiring)
    return found


def _optimizer(name: str, training: Any, stages: Mapping[str, Any], wiring: Mapping[str, tuple[str, ...]]) -> Optimizer:
    """A stage's own optimizer, or the first training's where that is repeated."""
    repeated = getattr(training, "repeated_from", None) is not None
    return stages[_origin(name, wiring)].optimizer if repeated else training.optimizer


def _origin(name: str, wiring: Mapping[str, tuple[str, ...]]) -> str:
    return _origin(wiring[name][0], wiring) if wiring[name] else name


def _word(optimizer: Optimizer) -> str:
    return optimizer.name if optimizer.momentum is None else f"{optimizer.name} with momentum"
