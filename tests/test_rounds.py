"""The rounds of a prune stage, driven by made-up results: which calls it makes, and which network it chooses."""

from __future__ import annotations

import pytest

from prune_jax.errors import GuardBreachError
from prune_jax.plan import make_plan
from prune_jax.recipe import StageResult, read_recipe
from prune_jax.rounds import prune_rounds

TRAIN = {"kind": "train", "epochs": 2}
PRUNE = {"kind": "prune", "criterion": "taylor", "target": {"sparsity": 0.9}}
ITERATIVE = {"kind": "iterative", "rounds": 3}
DENSE = {"validation_accuracy": 0.9, "validation_loss": 0.5}


def plan_of(prune, before=None):
    raw = {
        "name": "r",
        "data": {"source": "digits"},
        "model": {"kind": "mlp"},
        "stages": {"train": TRAIN, **(before or {}), "prune": {**PRUNE, **prune}},
    }
    return make_plan(read_recipe(raw), digest_of=lambda data: "d", code_of=lambda recipe: {})


def drive(prune, answer=lambda call: {}, *, before=None, dense=DENSE):
    """Runs the rounds; `answer(call)` makes up metrics. Answers the batches of calls and the last call."""
    plan = plan_of(prune, before)
    rounds = prune_rounds(plan.calls[-1], lambda ref: dense if ref == plan.calls[0].ref else {})
    batches, results = [], None
    while True:
        try:
            batches.append(rounds.send(results))
        except StopIteration as finished:
            return batches, finished.value
        results = [
            StageResult(
                name=c.name, kind=c.kind, key=c.key, status="ran", metrics={**DENSE, "sparsity": 0, **answer(c)}
            )
            for c in batches[-1]
        ]


def calls_of(batches, kind):
    return [call for batch in batches for call in batch if call.kind == kind]


def by_level(table, metric="validation_accuracy"):
    """Metrics by the level of the call's mask."""
    return lambda call: {metric: table[_level(call)]} if call.kind == "mask" else {}


def _level(call):
    return round(call.settings["target"]["sparsity"], 4)


@pytest.mark.parametrize(
    ("levels", "expected"),
    [("geometric", [1 - 0.1 ** (1 / 3), 1 - 0.1 ** (2 / 3), 0.9]), ("cubic", [0.9 * 19 / 27, 0.9 * 26 / 27, 0.9])],
)
def test_the_levels_of_a_climb(levels, expected):
    batches, last = drive({"schedule": {**ITERATIVE, "levels": levels}, "finetune": {"epochs": 1}})
    assert [[call.kind for call in batch] for batch in batches] == [["score"], ["mask"], ["finetune"]] * 3
    assert [call.name for batch in batches for call in batch] == [
        f"prune.{turn}.{kind}" for turn in (1, 2, 3) for kind in ("score", "mask", "finetune")
    ]
    found = [call.settings["target"]["sparsity"] for call in calls_of(batches, "mask")]
    assert found == pytest.approx(expected, abs=1e-6)
    assert found[-1] == 0.9
    assert [fact["level"] for fact in last.facts["rounds"]] == found
    assert last.facts["message"] == ""


def test_each_turn_stands_on_the_one_before():
    batches, last = drive({"schedule": ITERATIVE, "finetune": {"epochs": 1}})
    scores, masks, finetunes = (calls_of(batches, kind) for kind in ("score", "mask", "finetune"))
    train = plan_of({}).calls[0]
    assert scores[0].inputs == {"network": train.ref}
    for turn in range(3):
        assert masks[turn].inputs == {"network": scores[turn].inputs["network"], "scores": scores[turn].ref}
        assert finetunes[turn].inputs == {"network": masks[turn].ref}
    for turn in (1, 2):
        assert scores[turn].inputs["network"] == finetunes[turn - 1].ref
    assert last.inputs == {"network": train.ref, "result": finetunes[-1].ref}
    assert [fact["key"] for fact in last.facts["rounds"]] == [call.key for call in finetunes]
    assert all(fact["kept"] for fact in last.facts["rounds"])


def test_the_publishing_call_has_the_key_that_was_planned():
    for prune in ({}, {"schedule": ITERATIVE}, {"finetune": {"steps": 1}}, {"target": {"threshold": 0.5}}):
        _, last = drive(prune)
        planned = plan_of(prune).calls[-1]
        assert (last.kind, last.key, last.name) == (planned.kind, planned.key, planned.name)


@pytest.mark.parametrize("granularity", ["neuron", "kernel", {"block": [2, 2]}, "2:4"], ids=str)
def test_the_turns_have_the_keys_of_stages_written_out(granularity):
    """score, mask and finetune as stages of their own make the same artifacts."""
    settings = {"criterion": {"name": "taylor", "batches": 3}, "granularity": granularity, "exclude": ["output"]}
    shared = (
        {"scope": "layer", "min_keep": 2, "target": {"sparsity": 0.9}} if granularity != "2:4" else {"target": None}
    )
    recovery = {"epochs": 3, "optimizer": {"name": "sgd"}, "l1": 0.1}
    batches, _ = drive({**settings, **shared, "finetune": recovery})
    raw = {
        "name": "r",
        "data": {"source": "digits"},
        "model": {"kind": "mlp"},
        "stages": {
            "train": TRAIN,
            "score": {"kind": "score", **settings},
            "mask": {"kind": "mask", **shared},
            "finetune": {"kind": "finetune", **recovery},
        },
    }
    written_out = make_plan(read_recipe(raw), digest_of=lambda data: "d", code_of=lambda recipe: {}).calls[1:]
    assert [call.key for batch in batches for call in batch] == [call.key for call in written_out]


@pytest.mark.parametrize(
    "target", [{"threshold": 0.5}, {"statistic": "mean"}, {"percentile": 50}, {"keep": 7}, {"sparsity": 0.9}]
)
def test_one_shot_is_one_turn(target):
    batches, last = drive({"target": target})
    assert [[call.kind for call in batch] for batch in batches] == [["score"], ["mask"]]
    assert batches[1][0].settings["target"] == target
    assert last.inputs["result"] == batches[1][0].ref


def test_a_table_is_one_turn_without_a_target():
    batches, last = drive({"target": None, "scope": {"output": 0.5}})
    assert batches[1][0].settings == {"scope": {"output": 0.5}, "granularity": "weight"}
    assert last.facts["rounds"][0]["level"] is None


def test_n_of_m_is_one_turn_without_a_target():
    finetune = {"epochs": 1}
    batches, last = drive({"target": None, "granularity": "2:4", "finetune": finetune})
    assert [call.label for batch in batches for call in batch] == [
        "score · taylor · 2:4",
        "mask · 2:4",
        "finetune · 1 epoch · 2:4",
    ]
    assert batches[1][0].settings == {"granularity": "2:4"}
    assert last.facts["rounds"][0]["level"] is None


@pytest.mark.parametrize("granularity", ["kernel", {"block": [2, 2]}], ids=str)
def test_other_granularities_climb(granularity):
    batches, _ = drive({"granularity": granularity, "schedule": ITERATIVE})
    masks = calls_of(batches, "mask")
    assert [m.settings["granularity"] for m in masks] == [granularity] * 3
    assert [m.settings["target"]["sparsity"] for m in masks][-1] == 0.9
    assert all(s.settings["granularity"] == granularity for s in calls_of(batches, "score"))


def test_keep_climbs_by_rounds_since_only_the_mask_knows_how_many_weights_there_are():
    batches, _ = drive({"target": {"keep": 100}, "schedule": {**ITERATIVE, "levels": "cubic"}})
    masks = calls_of(batches, "mask")
    assert [m.settings["climb"] for m in masks] == [{"round": r, "rounds": 3, "levels": "cubic"} for r in (1, 2, 3)]
    assert {m.settings["target"]["keep"] for m in masks} == {100}
    assert [m.label for m in masks] == [f"mask · global · keep 100 {r}/3" for r in (1, 2, 3)]


def test_labels_say_the_level():
    batches, _ = drive({"schedule": ITERATIVE, "finetune": {"epochs": 1.5}})
    assert [call.label for batch in batches for call in batch][:4] == [
        "score · taylor · 0.536",
        "mask · global · 0.536",
        "finetune · 1.5 epochs · 0.536",
        "score · taylor · 0.785",
    ]


LEVELS = {0.5358: 0.9, 0.7846: 0.85, 0.9: 0.6}


def test_stop_keeps_the_last_good_round():
    guard = {"max_drop": 0.1}
    batches, last = drive({"schedule": ITERATIVE, "guard": guard}, by_level(LEVELS))
    masks = calls_of(batches, "mask")
    assert len(masks) == 3
    assert last.inputs["result"] == masks[1].ref
    assert [fact["kept"] for fact in last.facts["rounds"]] == [True, True, False]
    assert last.facts["message"] == (
        "stopped at round 3: accuracy went from 0.9 to 0.6, worse by 0.3; the guard allows 0.1"
    )


def test_a_breach_ends_the_climb():
    batches, last = drive({"schedule": ITERATIVE, "guard": {"max_drop": 0.1}}, by_level({**LEVELS, 0.5358: 0.1}))
    assert len(calls_of(batches, "mask")) == 1
    assert last.inputs["result"] == plan_of({}).calls[0].ref  # nothing was good: the network it took


def test_fail_fails_the_stage():
    guard = {"max_drop": 0.1, "breach": {"action": "fail"}}
    with pytest.raises(GuardBreachError) as caught:
        drive({"schedule": ITERATIVE, "guard": guard}, by_level(LEVELS))
    assert str(caught.value) == (
        "the guard was breached at round 3: accuracy went from 0.9 to 0.6, worse by 0.3; the guard allows 0.1. "
        "Ask for less, fine-tune longer, or set `guard.breach.action` to stop or back_off."
    )


def test_back_off_bisects_between_the_last_good_and_the_breached_level():
    def answer(call):
        return {"validation_accuracy": 0.9 if _level(call) < 0.86 else 0.5} if call.kind == "mask" else {}

    guard = {"max_drop": 0.1, "breach": {"action": "back_off", "tries": 3}}
    batches, last = drive({"schedule": ITERATIVE, "guard": guard}, answer)
    masks = calls_of(batches, "mask")
    good = round(1 - 0.1 ** (2 / 3), 6)
    first = round((good + 0.9) / 2, 6)
    second = round((first + 0.9) / 2, 6)
    third = round((first + second) / 2, 6)
    assert [m.settings["target"]["sparsity"] for m in masks[3:]] == [first, second, third]
    assert {m.inputs["network"] for m in masks[3:]} == {masks[1].ref}  # always from the last good round
    assert last.inputs["result"] == (masks[5] if third < 0.86 else masks[3]).ref
    low, high = (third, second) if third < 0.86 else (first, third)
    assert last.facts["message"] == f"backed off to {low:.3g}: {high:.3g} breached the guard"


def test_back_off_in_one_shot_bisects_from_dense():
    guard = {"max_drop": 0.1, "breach": {"action": "back_off", "tries": 2}}
    batches, last = drive({"guard": guard}, lambda call: {"validation_accuracy": 0.1})
    assert [_level(m) for m in calls_of(batches, "mask")] == [0.9, 0.45, 0.225]
    assert last.inputs["result"] == plan_of({}).calls[0].ref
    assert last.facts["message"] == "backed off to 0: 0.225 breached the guard"


@pytest.mark.parametrize(("loss", "kept"), [(0.59, True), (0.61, False), (0.1, True)])
def test_a_loss_gets_worse_by_rising(loss, kept):
    guard = {"metric": "loss", "max_drop": 0.1}
    _, last = drive({"guard": guard}, lambda call: {"validation_loss": loss})
    assert last.facts["rounds"][0]["kept"] is kept


@pytest.mark.parametrize("accuracy", [0.8, 0.9, 1.0])
def test_a_drop_of_exactly_what_is_allowed_is_allowed(accuracy):
    dense = {"validation_accuracy": accuracy}
    _, last = drive({"guard": {"max_drop": 0.1}}, lambda call: {"validation_accuracy": accuracy - 0.1}, dense=dense)
    assert last.facts["message"] == ""


def test_exactly_what_is_allowed_is_allowed_in_floats_too():
    _, last = drive(
        {"guard": {"max_drop": 0.1}},
        lambda call: {"validation_accuracy": 0.7},
        dense={"validation_accuracy": 0.8},  # 0.8 - 0.7 is 0.10000000000000009
    )
    assert last.facts["message"] == ""


def test_the_guard_compares_with_the_training_also_after_another_pruning():
    before = {"first": {**PRUNE, "target": {"sparsity": 0.5}}}
    _, last = drive({"guard": {"max_drop": 0.1}}, lambda call: {"validation_accuracy": 0.5}, before=before)
    assert "from 0.9 to 0.5" in last.facts["message"]


@pytest.mark.parametrize(("rewind", "step"), [("initialisation", 0), ({"step": 3}, 3)])
def test_rewinding_takes_the_same_early_weights_each_round(rewind, step):
    batches, _ = drive({"schedule": ITERATIVE, "finetune": {"epochs": 1, "rewind": rewind}})
    assert [[call.kind for call in batch] for batch in batches] == [["score"], ["mask"], ["train"], ["finetune"]] * 3
    early = calls_of(batches, "train")
    assert {call.settings["stop_step"] for call in early} == {step}
    assert len({call.key for call in early}) == 1
    assert {call.inputs["rewind"] for call in calls_of(batches, "finetune")} == {early[0].ref}
    assert all("rewind" not in call.settings for call in calls_of(batches, "finetune"))


def test_a_rewound_learning_rate_is_the_trainings_in_every_round():
    again = {"rewind": {"learning_rate": {"step": 3}}, "l1": 0.1}
    batches, last = drive({"schedule": ITERATIVE, "finetune": again})
    assert [[call.kind for call in batch] for batch in batches] == [["score"], ["mask"], ["finetune"]] * 3
    assert all(c.settings == {"l1": 0.1, "epochs": 2.0, "begin_step": 3} for c in calls_of(batches, "finetune"))
    assert last.key != drive({"schedule": ITERATIVE, "finetune": {**again, "l1": 0.2}})[1].key


def test_a_network_is_distilled_in_every_round_and_corrected_in_every_mask():
    finetune = {"epochs": 1, "distill": {"temperature": 2.0}}
    batches, _ = drive({"schedule": ITERATIVE, "finetune": finetune, "correct_bias_batches": 5})
    assert [[call.kind for call in batch] for batch in batches] == [["score"], ["mask"], ["distill"]] * 3
    taught, origin = calls_of(batches, "distill"), batches[0][0].origin
    assert {call.inputs["teacher"] for call in taught} == {origin.ref}
    assert all(call.settings == {"epochs": 1.0, "temperature": 2.0} for call in taught)
    assert all(call.settings["correct_bias_batches"] == 5 for call in calls_of(batches, "mask"))


SEARCH = {"target": {"threshold": 0.1}, "search": {"amounts": [0.1, 0.2, 0.3], "folds": 2}}
MEANS = {0.1: 0.8, 0.2: 0.9, 0.3: 0.9}
SPARSITIES = {0.1: 0.3, 0.2: 0.5, 0.3: 0.7}


def tried(means, metric="validation_accuracy"):
    def answer(call):
        if call.kind != "mask":
            return {}
        amount = call.settings["target"]["threshold"]
        shift = 0.05 * (1 if call.problem.fold == (0, 2) else -1) if call.problem.fold else 0
        return {metric: means[amount] + shift, "sparsity": SPARSITIES[amount]}

    return answer


def test_a_search_trains_each_fold_once_and_takes_the_sparsest_of_the_best():
    batches, last = drive(SEARCH, tried(MEANS))
    assert [call.problem.fold for call in batches[0]] == [(0, 2), (1, 2)]
    assert {call.kind for call in batches[0]} == {"train"}
    train = plan_of({}).calls[0]
    assert train.key not in {call.key for call in batches[0]}
    assert all(call.settings == train.settings for call in batches[0])
    masks = calls_of(batches, "mask")
    assert len(masks) == 3 * 2 + 1
    assert last.facts["search"]["metric"] == "accuracy"
    assert last.facts["search"]["over"] == "threshold"
    assert last.facts["search"]["chosen"] == 0.3
    table = last.facts["search"]["table"]
    assert [row["threshold"] for row in table] == [0.1, 0.2, 0.3]
    assert [row["mean"] for row in table] == pytest.approx([0.8, 0.9, 0.9])
    assert [row["folds"] for row in table] == [pytest.approx([m + 0.05, m - 0.05]) for m in MEANS.values()]
    assert [row["sparsity"] for row in table] == pytest.approx([0.3, 0.5, 0.7])
    assert masks[-1].settings["target"] == {"threshold": 0.3}
    assert masks[-1].inputs["network"] == train.ref
    assert masks[-1].problem.fold is None
    assert last.inputs["result"] == masks[-1].ref
    assert len(last.facts["rounds"]) == 1


@pytest.mark.parametrize(
    ("means", "tolerance", "chosen"),
    [
        ({0.1: 0.9, 0.2: 0.8, 0.3: 0.7}, 0.0, 0.1),
        ({0.1: 0.9, 0.2: 0.8, 0.3: 0.7}, 0.11, 0.2),
        ({0.1: 0.9, 0.2: 0.8, 0.3: 0.7}, 0.5, 0.3),
        ({0.1: 0.7, 0.2: 0.9, 0.3: 0.85}, 0.01, 0.2),
    ],
)
def test_a_search_takes_the_sparsest_within_the_tolerance(means, tolerance, chosen):
    _, last = drive({**SEARCH, "search": {**SEARCH["search"], "tolerance": tolerance}}, tried(means))
    assert last.facts["search"]["chosen"] == chosen


def test_a_search_by_loss_takes_the_smallest():
    search = {**SEARCH["search"], "metric": "loss"}
    _, last = drive({**SEARCH, "search": search}, tried({0.1: 0.3, 0.2: 0.5, 0.3: 0.9}, "validation_loss"))
    assert last.facts["search"]["chosen"] == 0.1


def test_the_folds_of_two_searches_are_shared():
    once, _ = drive(SEARCH, tried(MEANS))
    again, _ = drive({**SEARCH, "criterion": "snip"}, tried(MEANS))
    assert [call.key for call in once[0]] == [call.key for call in again[0]]
