"""Gates: limits checked by hand, refused where they say nothing, and a stage that keeps a run from passing."""

from __future__ import annotations

import re

import numpy as np
import pytest

from prune_jax.errors import UserMistake
from prune_jax.evaluation import noisy
from prune_jax.gates import checks, reason
from prune_jax.preparation import prepare
from prune_jax.recipe import Limits, read_recipe
from prune_jax.records import Run
from tests.plain import PRUNE, TRAIN, arrays, run_plain, tiny
from tests.samples.tiny import blobs

NOW = {"accuracy": 0.9, "mse": 0.3, "params": 50, "macs": 40, "bytes": 400, "latency_ms": {"8": {"p50": 2.0}}}
BEFORE = {"accuracy": 1.0, "mse": 0.2, "params": 100, "macs": 40, "bytes": 300, "latency_ms": {"8": {"p50": 1.0}}}


@pytest.mark.parametrize(
    ("limits", "metric", "passed"),
    [
        ({"max_drop": 0.1}, "accuracy", True),  # 1.0 - 0.9 is a little more than 0.1
        ({"max_drop": 0.09}, "accuracy", False),
        ({"max_drop": 0.1}, "mse", True),  # of an error, less is better
        ({"max_drop": 0.09}, "mse", False),
        ({"at_least": 0.9}, "accuracy", True),
        ({"at_least": 0.91}, "accuracy", False),
        ({"at_most": 0.3}, "mse", True),
        ({"at_most": 0.29}, "mse", False),
        ({"params": 50}, "accuracy", True),
        ({"params": 49}, "accuracy", False),
        ({"params": {"times": 0.5}}, "accuracy", True),
        ({"params": {"times": 0.49}}, "accuracy", False),
        ({"macs": {"times": 1}}, "accuracy", True),
        ({"bytes": {"times": 1.3}}, "accuracy", False),
        ({"latency_ms": 2, "latency_batch": 8}, "accuracy", True),
        ({"latency_ms": {"times": 1.9}, "latency_batch": 8}, "accuracy", False),
    ],
)
def test_each_limit_is_held(limits, metric, passed):
    (check,) = checks(Limits(**limits), NOW, BEFORE, metric=metric)
    assert check.passed is passed
    assert bool(reason([check])) is not passed


def test_without_another_network_limits_beside_it_hold_and_the_others_stand():
    limits = Limits(max_drop=0.0, params={"times": 0.1}, at_least=0.95)
    found = checks(limits, NOW, None, metric="accuracy")
    assert [(c.what, c.champion, c.passed) for c in found] == [
        ("accuracy", None, False),
        ("accuracy", None, True),
        ("params", None, True),
    ]
    assert reason(found) == "accuracy is 0.9, allowed is at least 0.95"


def test_noise_is_the_seeds_and_records_get_theirs_by_place():
    x = np.ones((3, 2), np.float32)
    found = noisy({"x": x, "y": np.zeros(3)}, 0.5, seed=7)
    expected = x + 0.5 * np.random.RandomState(7).standard_normal((3, 2))
    np.testing.assert_allclose(found["x"], expected, rtol=1e-6)
    assert found["x"].dtype == np.float32
    records = [{"x": row, "y": 0} for row in x]
    one = noisy(records, 0.5, seed=7)
    assert len(one) == 3
    np.testing.assert_array_equal(one[2]["x"], noisy(records, 0.5, seed=7)[2]["x"])
    assert not np.array_equal(one[2]["x"], one[1]["x"])
    with pytest.raises(UserMistake, match="needs floats, but x is int32"):
        noisy({"x": np.ones((3, 2), np.int32)}, 0.5)


GATE = {"kind": "gate", "of": "prune", "at_least": 0.1}


@pytest.mark.parametrize(
    ("gate", "told"),
    [
        ({"at_least": None}, "stages.gate: limits nothing; say one of at_least, at_most, max_drop, params, macs"),
        ({"against": "train"}, "stages.gate.against = 'train': is compared with nothing; add `max_drop`, or a budget"),
        ({"max_drop": 0, "against": "trian"}, "against = 'trian': names no stage; did you mean 'train'?"),
        ({"of": "gat"}, "stages.gate.of = 'gat': names no stage"),
        ({"max_drop": -1}, "stages.gate.max_drop = -1: input should be greater than or equal to 0"),
        ({"robustness": {"noise": 1}}, "needs a limit: at_least, at_most or max_drop"),
        ({"latency_batch": 8}, "latency_batch = 8: says which calls are timed, but none is"),
        ({"maxdrop": 0}, "maxdrop = 0: is not a field here; did you mean 'max_drop'?"),
        ({"metric": "acuracy"}, "metric = 'acuracy': metric 'acuracy' is not known; did you mean 'accuracy'?"),
    ],
)
def test_gates_that_say_nothing_are_refused_with_the_recipe(gate, told):
    with pytest.raises(UserMistake, match=re.escape(told)):
        prepare(read_recipe(tiny(train=TRAIN, prune=PRUNE, gate={**GATE, **gate})))


def test_a_gate_compares_with_what_it_names_else_with_the_dense_training():
    def gate(**more):
        stages = {"train": TRAIN, "prune": PRUNE, "other": {**PRUNE, "after": "train"}, "gate": {**GATE, **more}}
        plan = prepare(read_recipe(tiny(**stages)))
        return plan.calls[-1], plan.after["gate"], {call.name: call.ref for call in plan.calls}

    call, after, refs = gate()
    assert (call.inputs, after) == ({"network": refs["prune"]}, ("prune",))
    call, after, refs = gate(max_drop=0)
    assert (call.inputs, after) == ({"network": refs["prune"], "against": refs["train"]}, ("prune", "train"))
    named, after, refs = gate(max_drop=0, against="other")
    assert (named.inputs["against"], after) == (refs["other"], ("prune", "other"))
    assert gate(max_drop=0, against="train")[0].key == call.key  # named or not, it is the same


def accuracy(flat, noise=0.0):
    """Of a linear network on the test split, by numpy."""
    x, y = (np.asarray(blobs()[name], np.float32) for name in ("x_test", "y_test"))
    x = x + noise * np.random.RandomState(0).standard_normal(x.shape)
    kernel, bias = (next(a for p, a in flat.items() if re.fullmatch(f"params/.*{n}", p)) for n in ("kernel", "bias"))
    return pytest.approx(np.mean((x @ kernel + bias).argmax(1) == y)), kernel.size + bias.size


def test_a_gate_judges_on_the_test_split_and_a_rejected_run_keeps_its_results(store):
    gate = {**GATE, "max_drop": 1, "bytes": 1e9, "robustness": {"noise": 2.0, "max_drop": 1}}
    strict = {"kind": "gate", "of": "prune", "params": {"times": 0.1}}
    raw = tiny(model={"kind": "linear"}, train=TRAIN, prune=PRUNE, gate=gate, strict=strict)
    plan, results = run_plain(raw, store, name_failures=False)
    dense, pruned = (arrays(store, results[name]) for name in ("train", "prune"))
    expected = [(accuracy(dense)[0], accuracy(pruned)[0])] * 2 + [(accuracy(dense, 2.0)[0], accuracy(pruned, 2.0)[0])]
    found = results["gate"].metrics["checks"]
    assert [(check["champion"], check["candidate"]) for check in found[:3]] == expected
    assert found[0]["candidate"] != found[2]["candidate"]
    assert found[3]["what"] == "bytes"

    record, size = Run(plan, store, "strict").finish(results), accuracy(dense)[1]
    assert (record["status"], record["rejected"], record["user_mistake"]) == ("failed", True, False)
    assert record["message"] == f"strict said no: params is {size} beside {size}, allowed is at most 0.1 times"
    assert record["stages"]["strict"]["metrics"]["checks"][0]["passed"] is False
    assert [record["stages"][name]["status"] for name in ("prune", "gate", "strict")] == ["ran", "ran", "failed"]
    assert not store.path(results["strict"].ref).exists()  # it is judged anew, and so it says so again
