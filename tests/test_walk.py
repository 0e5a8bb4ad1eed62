"""Walking a plan: order, sharing, failures, and who is at work at the same time. The stages are made up."""

from __future__ import annotations

import threading
import time

import pytest

from prune_jax.errors import DivergedError, UserMistake
from prune_jax.plan import make_plan
from prune_jax.recipe import StageResult, read_recipe
from prune_jax.walk import failure, walk

TRAIN = {"kind": "train", "epochs": 2}
PRUNE = {"kind": "prune", "criterion": "taylor", "target": {"sparsity": 0.9}}
EVALUATE = {"kind": "evaluate"}


def plan_of(matrix=None, **stages):
    raw = {"name": "r", "data": {"source": "digits"}, "model": {"kind": "mlp"}, "stages": stages}
    if matrix:
        raw["matrix"] = matrix
    return make_plan(read_recipe(raw), digest_of=lambda data: "d", code_of=lambda recipe: {})


def result(call, **more):
    metrics = {"validation_accuracy": 0.9, "sparsity": 0.1}
    return StageResult(name=call.name, kind=call.kind, key=call.key, status="ran", seconds=1.0, metrics=metrics, **more)


class Workers:
    """Carries calls out in threads; notes what was submitted and who was at work together."""

    def __init__(self, fails=(), seconds=0.0):
        self.fails, self.seconds = dict(fails), seconds
        self.submitted, self.together = [], []
        self.at_work, self.lock = set(), threading.Lock()

    def __call__(self, call, done):
        self.submitted.append(call)
        threading.Thread(target=self._work, args=(call, done)).start()

    def _work(self, call, done):
        with self.lock:
            self.at_work.add(call.name)
            self.together.append(frozenset(self.at_work))
        time.sleep(self.seconds)
        with self.lock:
            self.at_work.remove(call.name)
        error = self.fails.get(call.name)
        done(failure(call, error) if error else result(call))

    @property
    def names(self):
        return [call.name for call in self.submitted]


def at_once(fails=()):
    workers = Workers(fails)
    workers.__class__ = type("AtOnce", (Workers,), {"__call__": lambda self, call, done: _at_once(self, call, done)})
    return workers


def _at_once(workers, call, done):
    workers.submitted.append(call)
    error = workers.fails.get(call.name)
    done(failure(call, error) if error else result(call))


def test_every_stage_comes_after_what_it_takes(store):
    plan = plan_of(train=TRAIN, prune=PRUNE, more={"kind": "finetune", "epochs": 1}, evaluate=EVALUATE)
    workers = at_once()
    results = walk(plan, store, workers)
    assert workers.names == ["train", "prune.1.score", "prune.1.mask", "prune", "more", "evaluate"]
    assert list(results) == ["train", "prune.1.score", "prune.1.mask", "prune", "more", "evaluate"]
    assert {r.status for r in results.values()} == {"ran"}
    assert results["prune"].ref == plan.calls[1].ref


def test_threads_that_answer_late_come_to_the_same(store):
    plan = plan_of(train=TRAIN, prune=PRUNE, other={**PRUNE, "criterion": "snip", "after": "train"}, evaluate=EVALUATE)
    slow, quick = Workers(seconds=0.01), at_once()
    first, second = walk(plan, store, slow, side_by_side=3), walk(plan, store, quick)
    assert {n: (r.key, r.status) for n, r in first.items()} == {n: (r.key, r.status) for n, r in second.items()}
    assert set(first) == set(second)


def test_what_two_stages_need_is_made_once(store):
    """The two prunings score alike; only the first one's score is carried out."""
    plan = plan_of(train=TRAIN, half=PRUNE, most={**PRUNE, "target": {"sparsity": 0.5}, "after": "train"})
    workers = Workers(seconds=0.01)
    results = walk(plan, store, workers, side_by_side=4)
    keys = [call.key for call in workers.submitted]
    assert len(keys) == len(set(keys)) == 6
    assert results["half.1.score"].status == "ran"
    assert results["most.1.score"].status == "cached"
    assert results["most.1.score"].seconds == 0
    assert results["most.1.score"].key == results["half.1.score"].key


def test_rows_of_a_matrix_train_once(store):
    plan = plan_of({"stages.prune.criterion": ["snip", "taylor", "random"]}, train=TRAIN, prune=PRUNE)
    workers = Workers()
    walk(plan, store, workers, side_by_side=2)
    assert workers.names.count("train") == 1
    assert len(workers.names) == 1 + 3 * 3


@pytest.mark.parametrize("workers", [Workers, at_once], ids=["threads", "at once"])
@pytest.mark.parametrize(
    ("failing", "failed", "skipped", "done"),
    [
        ("train", {"train"}, {"one", "two", "more", "evaluate"}, set()),
        ("one.1.mask", {"one.1.mask", "one"}, {"more", "evaluate"}, {"train", "two"}),
        ("two", {"two"}, {"evaluate"}, {"train", "one", "more"}),
        ("more", {"more"}, set(), {"train", "one", "two", "evaluate"}),
        ("evaluate", {"evaluate"}, set(), {"train", "one", "two", "more"}),
    ],
)
def test_a_failure_skips_what_it_would_have_fed_and_nothing_else(store, workers, failing, failed, skipped, done):
    plan = plan_of(
        train=TRAIN,
        one=PRUNE,
        two={**PRUNE, "criterion": "snip", "after": "train"},
        more={"kind": "finetune", "epochs": 1, "after": "one"},
        evaluate={**EVALUATE, "of": ["one", "two"]},
    )
    results = walk(plan, store, workers({failing: DivergedError("it blew up")}), side_by_side=2)
    by_status = {s: {n for n, r in results.items() if r.status == s} for s in ("failed", "skipped", "ran", "cached")}
    assert by_status["failed"] == failed
    assert by_status["skipped"] == skipped
    assert done <= by_status["ran"]
    assert set(results) >= {"train", "one", "two", "more", "evaluate"}


def test_a_failure_is_told_down_the_line(store):
    plan = plan_of(train=TRAIN, prune=PRUNE, evaluate=EVALUATE)
    results = walk(plan, store, at_once({"prune.1.mask": UserMistake("keep = 99: too many")}))
    assert results["prune.1.mask"].message == "keep = 99: too many"
    assert results["prune"].message == "prune.1.mask: keep = 99: too many"
    assert results["evaluate"].message == "prune failed"
    assert results["prune"].user_mistake
    assert not results["train"].user_mistake


def test_a_skipped_stage_skips_on(store):
    plan = plan_of(train=TRAIN, prune=PRUNE, more={"kind": "finetune", "epochs": 1}, evaluate=EVALUATE)
    results = walk(plan, store, at_once({"train": OSError("disk full")}))
    assert results["train"].message == "OSError: disk full"
    assert results["prune"].message == "train failed"
    assert results["more"].message == "prune was skipped"


def test_a_failed_call_is_not_tried_again_under_another_name(store):
    plan = plan_of(train=TRAIN, half=PRUNE, most={**PRUNE, "target": {"sparsity": 0.5}, "after": "train"})
    workers = at_once({"half.1.score": DivergedError("no")})
    results = walk(plan, store, workers)
    assert workers.names == ["train", "half.1.score"]
    assert results["most.1.score"].status == "failed"
    assert results["most"].message == "most.1.score: no"


def test_a_guard_that_fails_is_a_failed_stage(store):
    guard = {"max_drop": 0.0, "breach": {"action": "fail"}}
    plan = plan_of(train=TRAIN, prune={**PRUNE, "guard": guard}, evaluate=EVALUATE)
    train = plan.calls[0]
    store.write(train.ref, {}, {"metrics": {"validation_accuracy": 0.95}})
    results = walk(plan, store, at_once())
    assert results["prune"].status == "failed"
    assert "the guard was breached at round 1: accuracy went from 0.95 to 0.9" in results["prune"].message
    assert results["evaluate"].status == "skipped"


def test_what_breaks_inside_the_rounds_is_a_failed_stage_not_the_end_of_the_walk(store):
    """A metric that a stage did not answer: the other branch must go on."""
    plan = plan_of(
        train=TRAIN,
        prune={**PRUNE, "guard": {"max_drop": 0.0, "metric": "loss"}},
        other={**PRUNE, "criterion": "snip", "after": "train"},
    )
    results = walk(plan, store, at_once())
    assert results["prune"].status == "failed"
    assert results["other"].status == "ran"


def test_a_cached_prune_stage_does_no_turns(store):
    plan = plan_of(train=TRAIN, prune=PRUNE)
    store.write(plan.calls[1].ref, {}, {"metrics": {}})
    workers = at_once()
    walk(plan, store, workers)
    assert workers.names == ["train", "prune"]


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_no_more_are_at_work_than_are_allowed(store, limit):
    criteria = ["magnitude", "random", "snip", "taylor"]
    plan = plan_of({"stages.prune.criterion": criteria}, train=TRAIN, prune=PRUNE)
    workers = Workers(seconds=0.02)
    walk(plan, store, workers, side_by_side=limit)
    assert max(map(len, workers.together)) == limit


def test_an_evaluation_has_the_machine_for_itself(store):
    """It measures latency: neither another stage nor another evaluation may run beside it."""
    plan = plan_of(
        train=TRAIN,
        one=PRUNE,
        two={**PRUNE, "criterion": "snip", "after": "train"},
        three={**PRUNE, "criterion": "random", "after": "train"},
        first={**EVALUATE, "of": "one"},
        second={**EVALUATE, "of": "two"},
        third={**EVALUATE, "of": "train"},
    )
    workers = Workers(seconds=0.01)
    results = walk(plan, store, workers, side_by_side=4)
    assert all(r.status == "ran" for r in results.values())
    for group in workers.together:
        if group & {"first", "second", "third"}:
            assert len(group) == 1, group
    assert max(map(len, workers.together)) > 1


def test_a_cached_evaluation_need_not_wait(store):
    plan = plan_of(train=TRAIN, prune=PRUNE, look={**EVALUATE, "of": "train"})
    look = plan.calls[-1]
    store.write(look.ref, {}, {"metrics": {}})
    workers = at_once()
    walk(plan, store, workers)
    assert workers.names.index("look") < workers.names.index("prune")


def test_search_trains_its_folds_side_by_side(store):
    search = {"amounts": [0.1, 0.2], "folds": 3}
    plan = plan_of(train=TRAIN, prune={**PRUNE, "target": {"threshold": 0.1}, "search": search})
    workers = Workers(seconds=0.02)
    results = walk(plan, store, workers, side_by_side=3)
    assert results["prune"].status == "ran"
    assert any(len(group) == 3 for group in workers.together)


def test_failure_tells_prune_errors_as_they_are_and_others_with_their_kind():
    call = plan_of(train=TRAIN).calls[0]
    assert failure(call, DivergedError("the loss became nan")).message == "the loss became nan"
    assert failure(call, KeyError("x")).message == "KeyError: 'x'"
    told = failure(call, RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")).message
    assert told.startswith(
        "RuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes. Lower `data.batch_size`"
    )
    assert failure(call, UserMistake("no")).user_mistake
    assert not failure(call, DivergedError("no")).user_mistake
