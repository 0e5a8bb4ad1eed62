"""What a `prune` stage does: rounds of score, mask and fine-tune, whose next call depends on the last result.

A generator yields calls to be run side by side and is sent their results; so a plain loop and a flow drive the same
rounds, and this room knows nothing of either.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

from prune_jax import schedules
from prune_jax.checkpoints import Store
from prune_jax.errors import GuardBreachError, PruneError
from prune_jax.gates import HIGHER_IS_BETTER
from prune_jax.objectives import objective
from prune_jax.plan import finetune_call, mask_call, retraining, rewind_call, score_call, train_call
from prune_jax.progress import Breach, listeners
from prune_jax.recipe import Guard, Iterative, Prune, Ref, Search, StageCall, StageResult, Target, untargeted

T = TypeVar("T")
Dialogue = Generator[list[StageCall], list[StageResult], T]


@dataclass
class _Turns:
    """Numbers the turns of one prune stage and makes their calls."""

    call: StageCall
    stage: Prune
    turn: int = 0
    facts: list[dict[str, Any]] = field(default_factory=list)

    def run(self, network: Ref, target: Mapping[str, Any], level: str, **where: Any) -> Dialogue[StageResult]:
        """One turn: score, mask, fine-tune; answers the last result."""
        self.turn += 1
        scored = yield [self._score(network, level, **where)]
        masked = yield [self._mask(network, scored[0].ref, target, level, **where)]
        result = masked[0]
        if self.stage.finetune:
            recovery = self._finetune(result.ref, level, **where)
            if rewind := self._rewind(**where):
                yield [rewind]
            result = (yield [recovery])[0]
        return result

    def _rewind(self, **where: Any) -> StageCall | None:
        return rewind_call(self.call.settings["finetune"].get("rewind"), self.origin(**where), self._name())

    def _name(self, word: str = "") -> str:
        return f"{self.call.name}.{self.turn}" + (f".{word}" if word else "")

    def origin(self, origin: StageCall | None = None) -> StageCall:
        """The training from which the network descends: the plan's, or that of a fold."""
        found = origin or self.call.origin
        assert found is not None  # the plan gives every prune stage one
        return found

    def _shared(self, **where: Any) -> dict[str, Any]:
        origin = self.origin(**where)
        return {"problem": origin.problem, "origin": origin, "operation": self.call.operation}

    def _score(self, network: Ref, level: str, **where: Any) -> StageCall:
        settings = _only(self.call.settings, "criterion", "granularity", "kinds", "exclude", "spare")
        return score_call(
            self._name("score"),
            settings=settings,
            seed=self.call.seed,
            network=network,
            level=level,
            **self._shared(**where),
        )

    def _mask(self, network: Ref, scores: Ref, target: Mapping[str, Any], level: str, **where: Any) -> StageCall:
        settings = {**_only(self.call.settings, "scope", "min_keep", "round_to", "correct_bias_batches"), **target}
        settings["granularity"] = self.call.settings.get("granularity", "weight")
        return mask_call(
            self._name("mask"), settings=settings, network=network, scores=scores, level=level, **self._shared(**where)
        )

    def _finetune(self, network: Ref, level: str, **where: Any) -> StageCall:
        rewind, teacher = self._rewind(**where), self._teacher(**where)
        return finetune_call(
            self._name("distill" if teacher else "finetune"),
            settings=retraining(self.call.settings["finetune"], self.origin(**where)),
            seed=self.call.seed,
            network=network,
            rewind=rewind.ref if rewind else None,
            teacher=teacher,
            level=level,
            **self._shared(**where),
        )

    def _teacher(self, origin: StageCall | None = None) -> Ref | None:
        """The plan's teacher; on a fold its training, which has not seen what the fold holds out."""
        teacher = self.call.inputs.get("teacher")
        return origin.ref if teacher and origin else teacher


def prune_rounds(call: StageCall, metrics_of: Callable[[Ref], Mapping[str, Any]]) -> Dialogue[StageCall]:
    """Drives one prune stage.

    Args:
        call: the stage.
        metrics_of: the metrics of a finished artifact.

    Yields:
        Calls to be run side by side; it is sent their results, all of them good.

    Returns:
        The call that publishes the chosen network.

    Raises:
        GuardBreachError: the guard was breached and its action is `fail`.
    """
    stage = Prune.model_validate({"kind": "prune", **call.settings})
    turns = _Turns(call, stage)
    facts: dict[str, Any] = {}
    if stage.search and stage.target:
        facts["search"] = yield from _search(turns, stage.search, stage.target)
        chosen = stage.target.model_copy(update={stage.target.word: facts["search"]["chosen"]})
        turns.stage = stage.model_copy(update={"target": chosen})
    dense = metrics_of(turns.origin().ref)
    network, message = yield from _climb(turns, dense)
    facts |= {"rounds": turns.facts, "message": message}
    return call.model_copy(update={"inputs": {**call.inputs, "result": network}, "facts": {**call.facts, **facts}})


def _climb(turns: _Turns, dense: Mapping[str, Any]) -> Dialogue[tuple[Ref, str]]:
    """Round after round until the target or the guard; answers the network and what there is to say."""
    guard = turns.stage.guard
    best, low = turns.call.inputs["network"], 0.0
    for target, level in _targets(turns.stage):
        result = yield from turns.run(best, target, _shown(turns.stage, target, level))
        breach = _breach(guard, dense, result) if guard else ""
        turns.facts.append(_fact(turns.turn, level, result, breach))
        if guard and breach:
            if result.status == "ran":  # what comes from the store was told when it was made
                told = (turns.call.name, turns.turn, result.key, guard.breach.action, breach)
                listeners.get().breached(Breach(*told, turns.facts[-1]["metrics"]))
            return (yield from _after_breach(turns, guard, dense, (best, low), level, breach))
        best, low = result.ref, level or 0.0
    return best, ""


def _after_breach(
    turns: _Turns,
    guard: Guard,
    dense: Mapping[str, Any],
    good: tuple[Ref, float],
    level: float | None,
    breach: str,
) -> Dialogue[tuple[Ref, str]]:
    message = f"stopped at round {turns.turn}: {breach}"
    if guard.breach.action == "fail":
        raise GuardBreachError(
            f"the guard was breached at round {turns.turn}: {breach}. "
            "Ask for less, fine-tune longer, or set `guard.breach.action` to stop or back_off."
        )
    if guard.breach.action == "back_off" and level is not None:
        return (yield from _back_off(turns, guard, dense, good, level))
    return good[0], message


def _back_off(
    turns: _Turns, guard: Guard, dense: Mapping[str, Any], good: tuple[Ref, float], high: float
) -> Dialogue[tuple[Ref, str]]:
    """Bisects between the last good level and the breached one; answers the sparsest good network."""
    start, low = good
    best = start
    for _ in range(guard.breach.tries):
        level = round((low + high) / 2, 6)
        result = yield from turns.run(start, {"target": {"sparsity": level}}, f"{level:.3g}")
        breach = _breach(guard, dense, result)
        turns.facts.append(_fact(turns.turn, level, result, breach))
        if breach:
            high = level
        else:
            best, low = result.ref, level
    return best, f"backed off to {low:.3g}: {high:.3g} breached the guard"


def _targets(stage: Prune) -> list[tuple[dict[str, Any], float | None]]:
    """The mask settings of each round and its level of sparsity, where it is known beforehand."""
    if stage.target is None:
        return [({}, None)]
    word, amount = stage.target.word, stage.target.amount
    if not isinstance(stage.schedule, Iterative) or stage.schedule.rounds == 1:
        return [({"target": {word: amount}}, amount if word == "sparsity" else None)]
    rounds, levels = stage.schedule.rounds, stage.schedule.levels
    if word == "keep":
        return [
            ({"target": {word: amount}, "climb": {"round": r, "rounds": rounds, "levels": levels}}, None)
            for r in range(1, rounds + 1)
        ]
    climb = schedules.iterative(amount, rounds=rounds, levels=levels)
    return [({"target": {"sparsity": round(level, 6)}}, round(level, 6)) for level in climb]


def _shown(stage: Prune, target: Mapping[str, Any], level: float | None) -> str:
    if level is not None:
        return f"{level:.3g}"
    if not target:
        return untargeted(stage.granularity)
    word, amount = next(iter(target["target"].items()))
    climb = target.get("climb")
    return f"{word} {amount}" + (f" {climb['round']}/{climb['rounds']}" if climb else "")


def _breach(guard: Guard, dense: Mapping[str, Any], result: StageResult) -> str:
    """Says how the guard was breached; nothing if it was not."""
    name = f"validation_{guard.metric}"
    before, now = dense[name], result.metrics[name]
    drop = before - now if guard.metric in HIGHER_IS_BETTER else now - before
    if drop <= guard.max_drop + 1e-9:  # 0.8 - 0.7 is a little more than 0.1
        return ""
    return (
        f"{guard.metric} went from {before:.4g} to {now:.4g}, worse by {drop:.4g}; the guard allows {guard.max_drop:g}"
    )


def _fact(turn: int, level: float | None, result: StageResult, breach: str) -> dict[str, Any]:
    return {
        "round": turn,
        "level": level,
        "kind": result.kind,
        "key": result.key,
        "kept": not breach,
        "metrics": {k: v for k, v in result.metrics.items() if isinstance(v, int | float)},
    }


def _search(turns: _Turns, search: Search, target: Target) -> Dialogue[dict[str, Any]]:
    """k-fold cross-validation of the target's values; answers the table and the chosen value."""
    origin, word = turns.origin(), target.word
    metric = search.metric or objective(turns.call.problem.objective).primary
    folds = [_on_fold(origin, i, search.folds, turns.call.name) for i in range(search.folds)]
    yield folds
    table = []
    for amount in search.amounts:
        values, sparsities = [], []
        for fold in folds:
            result = yield from turns.run(fold.ref, {"target": {word: amount}}, f"{word} {amount:g}", origin=fold)
            values.append(result.metrics[f"validation_{metric}"])
            sparsities.append(result.metrics["sparsity"])
        table.append(_Tried(amount, values, fmean(values), fmean(sparsities)))
    means = [row.mean for row in table]
    best = max(means) if metric in HIGHER_IS_BETTER else min(means)
    chosen = max((row for row in table if abs(row.mean - best) <= search.tolerance), key=lambda row: row.sparsity)
    rows = [{word: row.amount, "folds": row.folds, "mean": row.mean, "sparsity": row.sparsity} for row in table]
    return {"metric": metric, "over": word, "table": rows, "chosen": chosen.amount}


class _Tried(NamedTuple):
    amount: float
    folds: list[float]
    mean: float
    sparsity: float


def _on_fold(origin: StageCall, fold: int, folds: int, name: str) -> StageCall:
    problem = origin.problem.model_copy(update={"fold": (fold, folds)})
    call = train_call(f"{name}.fold {fold + 1}", problem, origin.settings, origin.seed, operation=origin.operation)
    return call.model_copy(update={"label": f"train · fold {fold + 1} of {folds}"})


def _only(settings: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: settings[name] for name in names if name in settings}


def is_sound(call: StageCall, store: Store) -> bool:
    """Whether a call's artifact is intact and, of the turns of a prune stage that are there, none is damaged."""
    if not store.intact(call.ref):
        return False
    rounds = (
        prune_rounds(call, lambda ref: (store.meta(ref) or {}).get("metrics", {})) if call.kind == "prune" else None
    )
    answers: Any = None
    while rounds:
        try:
            batch = rounds.send(answers)
        except (StopIteration, PruneError, KeyError):  # the end, or a turn that a guard or a search needs is gone
            break
        if any(store.damage(turn.ref) for turn in batch):
            return False
        metas = [store.meta(turn.ref) for turn in batch]
        answers = [
            StageResult(
                name=turn.name, kind=turn.kind, key=turn.key, status="cached", metrics=(meta or {}).get("metrics", {})
            )
            for turn, meta in zip(batch, metas, strict=True)
        ]
    return True
