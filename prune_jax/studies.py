"""The search over several knobs, by Optuna: what to try next, and which trials to stop early.

Optuna's study lives in memory alone. Its sampler has a fixed seed and trials are deterministic, so that asked again it
goes the same way, past trials that the store answers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from prune_jax.errors import UserMistake
from prune_jax.gates import SLACK
from prune_jax.recipe import Knob
from prune_jax.trials import Trial

SEED = 0
THIRD = 3  # one trial of so many goes on to the next value of the fidelity
FAR = 1e9  # from the guard: of trials without figures

Judge = Callable[[dict[str, Any], Any], Trial]


def optimise(
    knobs: Sequence[Knob], judge: Judge, *, max_drop: float, trials: int, steps: Sequence[Any] = (None,)
) -> list[Trial]:
    """Has TPE (Bergstra et al. 2011) look for the smallest network that keeps to the guard, which is a constraint.

    Successive halving (Li et al. 2018, arXiv:1810.05934) stops a trial after a value of the fidelity unless it is among
    the best third so far: those that keep to the guard before those that do not, the former by size, the latter by how
    far they are from it (Deb 2000). There the guard allows, besides, the most that a trial has won back on its way from
    that value to the last: small networks lose more at first, and judged by the guard alone would never be let go on.

    Args:
        knobs: what may be turned. The sampler sees a rung's number if all rungs are numbers, else rungs without order.
        judge: carries out a trial at a value of the fidelity.
        max_drop: what the guard allows.
        trials: so many different settings; all, if there are no more.
        steps: the fidelity's values, the last of which is the full one.

    Returns:
        The trials that came to the last value.
    """
    optuna = _optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    halving = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=THIRD)
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=SEED), pruner=halving if len(steps) > 1 else optuna.pruners.NopPruner()
    )
    whole, tried, dice = [], set(), random.Random(SEED)
    won_back = [0.0 for _ in steps]  # from each value of the fidelity to the last, the most so far
    for _ in range(min(trials, math.prod(len(knob.values) for knob in knobs))):
        asked, rungs = _ask(study, knobs)
        if rungs in tried:  # the sampler likes to come back; by lot it gets to know what it has not seen
            study.tell(asked, state=optuna.trial.TrialState.FAIL)
            while rungs in tried:
                rungs = tuple(dice.randrange(len(knob.values)) for knob in knobs)
            study.enqueue_trial({knob.path: rung for knob, rung in zip(knobs, rungs, strict=True)})
            asked, rungs = _ask(study, knobs)
        tried.add(rungs)
        values = {knob.path: knob.values[rung] for knob, rung in zip(knobs, rungs, strict=True)}
        drops: list[float | None] = []
        for place, step in enumerate(steps):
            found = judge(values, step)
            drops.append(found.drop)
            asked.report(score(found, max_drop + won_back[place]), step=THIRD**place)
            if stopped := place < len(steps) - 1 and asked.should_prune():
                break
        asked.set_constraint("drop", FAR if found.drop is None else found.drop - max_drop - SLACK)
        if stopped:
            study.tell(asked, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(asked, math.inf if found.size is None else found.size)
            whole.append(found)
            if (last := drops[-1]) is not None:
                won_back = [
                    max(w, drop - last) if drop is not None else w for w, drop in zip(won_back, drops, strict=True)
                ]
    return whole


def score(trial: Trial, allowed: float) -> float:
    """How good a trial looks, lowest best: 1 - 1 / (1 + size) < 1 within what is allowed, else 1 + how far beyond."""
    if trial.size is None or trial.drop is None:
        return 1 + FAR
    return 1 - 1 / (1 + trial.size) if trial.drop <= allowed + SLACK else 1 + trial.drop - allowed


def check_installed() -> None:
    """Raises `UserMistake` where Optuna is not installed."""
    _optuna()


def _ask(study: Any, knobs: Sequence[Knob]) -> tuple[Any, tuple[int, ...]]:
    asked = study.ask()
    return asked, tuple(_rung(asked, knob) for knob in knobs)


def _rung(asked: Any, knob: Knob) -> int:
    if all(isinstance(value, int | float) for value in knob.values):
        return asked.suggest_int(knob.path, 0, len(knob.values) - 1)
    return asked.suggest_categorical(knob.path, range(len(knob.values)))


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserMistake(
            "several knobs need Optuna, which is not installed: run `pip install 'prune-jax[search]'`, or search one"
        ) from None
    return optuna
