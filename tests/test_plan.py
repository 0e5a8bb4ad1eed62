"""Recipe -> calls with chained keys: what changes a key, what does not, what is shared."""

from __future__ import annotations

import copy
import importlib
import sys

import pytest

from prune_jax import plan as planning
from prune_jax.objectives import objective
from prune_jax.plan import make_plan
from prune_jax.problems import code_of, data_of
from prune_jax.recipe import built_in, digest, read_recipe, with_value

TRAIN = {"kind": "train", "epochs": 2}
PRUNE = {"kind": "prune", "criterion": "taylor", "target": {"sparsity": 0.5}}
EVALUATE = {"kind": "evaluate", "of": ["train", "prune"]}


def recipe(**stages):
    stages = stages or {"train": TRAIN, "prune": PRUNE, "evaluate": EVALUATE}
    return {"name": "r", "data": {"source": "xor"}, "model": {"kind": "mlp"}, "stages": stages}


def plan_of(raw, *, digest="d" * 64, code=None):
    return make_plan(read_recipe(raw), digest_of=lambda data: digest, code_of=lambda recipe: code or {})


def keys(raw, **options):
    return {call.name: call.key for call in plan_of(raw, **options).calls}


# The keys of artifacts that users have on their disks. One that fails asks: is the stage's result another one now? Then
# raise its number in `VERSIONS` and only then write the new key down; otherwise mend what changed the key.
GOLDEN = {
    "lenet-300-100": {
        "train": "7023fb187208f80f41fa",
        "prune": "842455fae9bf794308b8",
        "evaluate": "9aadf27e5d14fd446d74",
    },
    "xor": {
        "train": "2f0b7128f9a79972da06",
        "by-threshold": "b1293c74e4808dbc40b1",
        "to-four": "9ba195f20cabc0284a2d",
        "evaluate": "5564da5a5f72360cc823",
    },
    "sensitivities": {
        "train": "622bde0bb1d81bf3e43e",
        "prune[statistic=mean]": "d42c26b11546289819b6",
        "evaluate[statistic=mean]": "3abadc8c78ff15a740d9",
        "prune[statistic=median]": "a3f3dbcba023b2a10885",
        "evaluate[statistic=median]": "4ba356a19ed6741df895",
    },
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_keys(name):
    assert keys(name) == GOLDEN[name]


# The same in short for every built-in recipe: the digest of its keys by stage.
IN_SHORT = {
    "autoencoder": "93ddafeef7fbfb0bfbaa",
    "comparison": "bb9005e26345f6fc9e9f",
    "controls": "8abac2a4a30644254dab",
    "controls-lenet-5": "5ece7f0672fc187491d0",
    "controls-resnet-20": "20e25b2089170a9089b4",
    "controls-transformer": "e70165c5aa8fb533f8fd",
    "criteria": "cb50498fdb942dd5313d",
    "gru-vowels": "b73d3034c8778ad98732",
    "lenet-300-100": "35d8407e9ce0cdf0668c",
    "lenet-5": "2f2efb40e6e8f1d6fa6e",
    "lenet-5-compact": "5bd2e98c13a836bc96c9",
    "line": "ec22ffcfd861faa299b4",
    "lottery-ticket": "051c9f7579131081a8d7",
    "mlp-l1": "5b1327daa03c95742d40",
    "neurons": "c4b4c450d23dca0f09c3",
    "projection": "7a485edc490e70dd8eb4",
    "recovery": "fce3ae8db61b175097c0",
    "resnet-8": "23bbaea21134fdf29b38",
    "sensitivities": "bb1d9088a90b19521d9f",
    "threshold-search": "1b31720ca3473977785b",
    "transformer-vowels": "f9521235bde513e0d15e",
    "xor": "e70ca6f2f60878b7410d",
}
LARGE = {
    "comparison",
    "controls",
    "controls-lenet-5",
    "controls-resnet-20",
    "controls-transformer",
    "criteria",
    "recovery",
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LARGE)) for n in built_in()])
def test_golden_keys_of_all_recipes(name):
    assert digest(keys(name))[:20] == IN_SHORT[name]


@pytest.mark.parametrize(
    "raw",
    [
        {**recipe(), "name": "another"},
        {**recipe(), "description": "another"},
        {**recipe(), "objective": "classification"},
        {**recipe(), "seed": 0},
        dict(reversed(recipe().items())),
        {**recipe(), "data": {"source": "xor", "validation": 0.1, "batch_size": 64, "args": {}}},
        {**recipe(), "model": {"widths": [300, 100], "kind": "mlp", "activation": "relu", "dropout": 0}},
        recipe(train={"epochs": 2.0, "kind": "train"}, prune=PRUNE, evaluate=EVALUATE),
        recipe(train={**TRAIN, "optimizer": {}, "l1": 0, "seed": 0}, prune=PRUNE, evaluate=EVALUATE),
        recipe(
            train={**TRAIN, "optimizer": {"name": "adam", "learning_rate": 0.001, "warmup_steps": 0}},
            prune=PRUNE,
            evaluate=EVALUATE,
        ),
        recipe(
            train={**TRAIN, "retries": 7, "timeout_seconds": 9, "checkpoint_seconds": 0},
            prune={**PRUNE, "retries": 0, "after": "train"},
            evaluate={**EVALUATE, "retries": 1},
        ),
        recipe(train=TRAIN, prune={**PRUNE, "of": "train"}, evaluate=EVALUATE),
        recipe(train=TRAIN, prune={**PRUNE, "criterion": {"name": "taylor"}}, evaluate=EVALUATE),
        recipe(
            train=TRAIN,
            prune={
                **PRUNE,
                "criterion": {"name": "taylor", "options": {}, "batches": None},
                "granularity": "weight",
                "scope": "global",
                "schedule": {"kind": "one_shot"},
                "exclude": [],
                "min_keep": 0,
                "guard": None,
            },
            evaluate={**EVALUATE, "latency": {"batch_sizes": [1, 64]}},
        ),
        recipe(train=TRAIN, prune=PRUNE, evaluate={"kind": "evaluate"}),  # the dense network is always measured too
    ],
)
def test_what_does_not_change_a_result_does_not_change_a_key(raw):
    assert keys(raw) == keys(recipe())


@pytest.mark.parametrize("kind", ["score", "prune"])
@pytest.mark.parametrize(("option", "same"), [({"p": 1}, True), ({"p": 1.0}, True), ({"p": 2}, False)])
def test_an_option_at_its_default_is_the_same_as_one_left_out(kind, option, same):
    def key(criterion):
        stage = {**PRUNE, "criterion": criterion} if kind == "prune" else {"kind": "score", "criterion": criterion}
        return keys(recipe(train=TRAIN, stage=stage))["stage"]

    assert (key({"name": "magnitude", "options": option}) == key("magnitude")) == same


def test_a_stage_may_be_called_anything():
    renamed = recipe(teach=TRAIN, thin=PRUNE, look={"kind": "evaluate", "of": ["teach", "thin"]})
    assert list(keys(renamed).values()) == list(keys(recipe()).values())


def test_ten_epochs_are_the_default():
    raw = recipe(train={"kind": "train"})
    assert keys(raw) == keys(recipe(train={"kind": "train", "epochs": 10}))
    assert keys(raw) != keys(recipe(train={"kind": "train", "steps": 10}))


EVERYTHING = ("train", "prune", "evaluate")
CHANGES = [
    ("seed", 1, ("train", "prune", "evaluate")),
    ("data.validation", 0.2, EVERYTHING),
    ("data.batch_size", 32, EVERYTHING),
    ("model.kind", "cnn", EVERYTHING),
    ("model.widths", [100], EVERYTHING),
    ("model.dropout", 0.1, EVERYTHING),
    ("objective", "regression", EVERYTHING),
    ("stages.train.epochs", 3, EVERYTHING),
    ("stages.train.l1", 0.1, EVERYTHING),
    ("stages.train.l2", 0.1, EVERYTHING),
    ("stages.train.store_moments", True, EVERYTHING),
    ("stages.train.seed", 1, EVERYTHING),
    ("stages.train.optimizer", {"name": "sgd"}, EVERYTHING),
    ("stages.train.optimizer", {"learning_rate": 0.1}, EVERYTHING),
    ("stages.train.optimizer", {"b1": 0.8}, EVERYTHING),
    ("stages.train.optimizer", {"decay_to": 0.0}, EVERYTHING),
    ("stages.train.optimizer", {"warmup_steps": 1}, EVERYTHING),
    ("stages.train.optimizer", {"clip_norm": 1}, EVERYTHING),
    ("stages.prune.criterion", "snip", EVERYTHING[1:]),
    ("stages.prune.criterion", {"name": "taylor", "batches": 2}, EVERYTHING[1:]),
    ("stages.prune.criterion", {"name": "taylor", "options": {"a": 1}}, EVERYTHING[1:]),
    ("stages.prune.granularity", "neuron", EVERYTHING[1:]),
    ("stages.prune.granularity", "kernel", EVERYTHING[1:]),
    ("stages.prune.granularity", {"block": [2, 2]}, EVERYTHING[1:]),
    ("stages.prune.granularity", {"block": [2, 4]}, EVERYTHING[1:]),
    ("stages.prune", {"kind": "prune", "criterion": "taylor", "granularity": "2:4"}, EVERYTHING[1:]),
    ("stages.prune", {"kind": "prune", "criterion": "taylor", "granularity": "1:4"}, EVERYTHING[1:]),
    ("stages.prune.exclude", ["output"], EVERYTHING[1:]),
    ("stages.prune.scope", "layer", EVERYTHING[1:]),
    ("stages.prune.min_keep", 1, EVERYTHING[1:]),
    ("stages.prune.target", {"sparsity": 0.6}, EVERYTHING[1:]),
    ("stages.prune.target", {"threshold": 0.5}, EVERYTHING[1:]),
    ("stages.prune.target", {"percentile": 0.5}, EVERYTHING[1:]),
    ("stages.prune.schedule", {"kind": "iterative"}, EVERYTHING[1:]),
    ("stages.prune.schedule", {"kind": "iterative", "rounds": 2}, EVERYTHING[1:]),
    ("stages.prune.schedule", {"kind": "iterative", "levels": "cubic"}, EVERYTHING[1:]),
    ("stages.prune.finetune", {"epochs": 1}, EVERYTHING[1:]),
    ("stages.prune.finetune", {"steps": 1}, EVERYTHING[1:]),
    ("stages.prune.finetune", {"epochs": 1, "store_moments": True}, EVERYTHING[1:]),
    ("stages.prune.finetune", {"epochs": 1, "rewind": "initialisation"}, EVERYTHING[1:]),
    ("stages.prune.finetune", {"epochs": 1, "rewind": {"step": 1}}, EVERYTHING[1:]),
    ("stages.prune.finetune", {"rewind": {"learning_rate": {"step": 1}}}, EVERYTHING[1:]),
    ("stages.prune.finetune", {"epochs": 1, "distill": {}}, EVERYTHING[1:]),
    ("stages.prune.finetune", {"epochs": 1, "distill": {"soft": 0.5}}, EVERYTHING[1:]),
    ("stages.prune.correct_bias_batches", 1, EVERYTHING[1:]),
    ("stages.prune.guard", {"max_drop": 0.1}, EVERYTHING[1:]),
    ("stages.prune.guard", {"max_drop": 0.1, "breach": {"action": "fail"}}, EVERYTHING[1:]),
    ("stages.prune.search", {"amounts": [0.1, 0.2]}, EVERYTHING[1:]),
    ("stages.evaluate.latency", None, EVERYTHING[2:]),
    ("stages.evaluate.latency", {"batch_sizes": [2]}, EVERYTHING[2:]),
]


@pytest.mark.parametrize(
    ("criterion", "finetune", "told"),
    [("taylor", None, False), ("random", None, True), ("taylor", {"epochs": 1}, True), ("random", {"epochs": 1}, True)],
)
def test_a_seed_is_in_the_key_of_a_pruning_that_draws(criterion, finetune, told):
    prune = {**PRUNE, "criterion": criterion, "finetune": finetune}
    before, after = (keys(recipe(train=TRAIN, prune={**prune, "seed": seed})) for seed in (0, 1))
    assert before["train"] == after["train"]
    assert (before["prune"] != after["prune"]) == told


@pytest.mark.parametrize(("criterion", "told"), [("taylor", False), ("magnitude", False), ("random", True)])
def test_a_seed_is_in_the_key_of_scores_that_are_drawn(criterion, told):
    score = {"kind": "score", "criterion": criterion}
    before, after = (keys(recipe(train=TRAIN, score={**score, "seed": seed})) for seed in (0, 1))
    assert (before["score"] != after["score"]) == told


@pytest.mark.parametrize(("path", "value", "expected"), CHANGES, ids=[f"{p}={v}" for p, v, _ in CHANGES])
def test_a_setting_changes_the_keys_of_its_stage_and_of_what_follows(path, value, expected):
    before, after = keys(recipe()), keys(with_value(recipe(), path, value))
    assert tuple(name for name in before if before[name] != after[name]) == expected


def test_every_change_has_keys_of_its_own():
    found = [keys(with_value(recipe(), path, value))["prune"] for path, value, told in CHANGES if "prune" in told]
    found = [key for (path, *_), key in zip(CHANGES, found, strict=False) if not path.endswith("seed")]
    assert len(set(found)) == len(found)


def test_the_data_and_the_users_code_are_in_every_key():
    before = keys(recipe())
    for options in ({"digest": "e" * 64}, {"code": {"a:b": "1"}}, {"code": {"a:b": "2"}}):
        after = keys(recipe(), **options)
        assert not set(before.values()) & set(after.values())
        before = after


def test_a_new_version_of_a_stage_renames_it_and_what_follows(monkeypatch):
    before = keys(recipe())
    monkeypatch.setitem(planning.VERSIONS, "prune", planning.VERSIONS["prune"] + 1)
    after = keys(recipe())
    assert after["train"] == before["train"]
    assert after["prune"] != before["prune"]
    assert after["evaluate"] != before["evaluate"]


@pytest.mark.parametrize("finetune", [None, {"epochs": 1}], ids=["masked only", "fine-tuned"])
@pytest.mark.parametrize("turn", ["score", "mask", "finetune"])
def test_a_new_version_of_a_turn_renames_the_prune_stages_that_take_it(monkeypatch, turn, finetune):
    raw = with_value(recipe(), "stages.prune.finetune", finetune)
    before = keys(raw)
    monkeypatch.setitem(planning.VERSIONS, turn, planning.VERSIONS[turn] + 1)
    after = keys(raw)
    assert after["train"] == before["train"]
    assert (after["prune"] != before["prune"]) == (after["evaluate"] != before["evaluate"])
    assert (after["prune"] != before["prune"]) == (turn != "finetune" or finetune is not None)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's that can be edited."""
    file = tmp_path / "users_own.py"
    file.write_text("loss = model = data = mine = None\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield file
    sys.modules.pop("users_own", None)


@pytest.mark.parametrize(
    "path", ["model", "objective", "data.source", "stages.prune.criterion", "stages.prune.criterion.name"]
)
def test_edited_code_of_the_users_is_another_recipe(module, path):
    value = {"kind": "users_own:model"} if path == "model" else "users_own:mine"
    mine = read_recipe(with_value(recipe(), path, value))
    before = code_of(mine)
    module.write_text(module.read_text() + "# edited\n")
    sys.modules.pop("users_own")
    assert list(before) == list(code_of(mine)) == [value["kind"] if path == "model" else value]
    assert before != code_of(mine)


def test_the_key_is_of_the_code_that_is_loaded_not_of_an_edit_that_is_not(module):
    mine = read_recipe(with_value(recipe(), "objective", "users_own:mine"))
    importlib.import_module("users_own")
    before = code_of(mine)
    module.write_text("mine = 'edited after it was imported, as in a notebook'\n")
    assert code_of(mine) == before


def test_a_reloaded_module_is_edited_code_and_the_edit_is_what_runs(module):
    module.write_text("def loss(outputs, batch):\n    return 1.0\n\ndef data():\n    return [1]\n")
    mine = read_recipe(with_value(recipe(), "objective", "users_own:loss"))
    before, first = code_of(mine), objective("users_own:loss")
    assert objective("users_own:loss") is first
    module.write_text("# edited\n" + module.read_text())
    importlib.reload(sys.modules["users_own"])
    assert code_of(mine) != before
    assert objective("users_own:loss") is not first


def test_data_are_read_again_by_a_reloaded_source(module):
    text = "from prune_jax.datasets import SOURCES\n\ndef load():\n    return SOURCES['NAME']()\n"
    module.write_text(text.replace("NAME", "xor"))
    data = read_recipe(with_value(recipe(), "data.source", "users_own:load")).data
    before = data_of(data).digest
    assert data_of(data) is data_of(data)
    module.write_text(text.replace("NAME", "line"))
    importlib.reload(sys.modules["users_own"])
    assert data_of(data).digest != before


def test_branches_share_their_ancestors_and_a_stage_takes_the_one_above():
    plan = plan_of(
        recipe(
            train=TRAIN,
            one=PRUNE,
            two={**PRUNE, "after": "train", "criterion": "snip"},
            further={"kind": "finetune", "epochs": 1},
            evaluate={"kind": "evaluate", "of": ["one", "further"]},
        )
    )
    assert plan.after == {
        "train": (),
        "one": ("train",),
        "two": ("train",),
        "further": ("two",),
        "evaluate": ("train", "one", "further"),  # the dense network is measured beside them
    }
    calls = {call.name: call for call in plan.calls}
    assert calls["one"].inputs == {"network": calls["train"].ref}
    assert calls["further"].inputs == {"network": calls["two"].ref}
    assert calls["further"].origin.key == calls["one"].origin.key == calls["train"].key
    assert list(calls["evaluate"].inputs) == ["train", "one", "further"]


def test_score_and_mask_apart_are_wired_over_scores():
    plan = plan_of(
        recipe(
            train=TRAIN,
            score={"kind": "score", "criterion": "snip", "granularity": "neuron", "exclude": ["output"]},
            half={"kind": "mask", "target": {"sparsity": 0.5}},
            most={"kind": "mask", "target": {"sparsity": 0.9}, "after": "score"},
            recovered={"kind": "finetune", "epochs": 1, "after": "half"},
        )
    )
    calls = {call.name: call for call in plan.calls}
    assert calls["half"].inputs == {"network": calls["train"].ref, "scores": calls["score"].ref}
    assert calls["most"].inputs == calls["half"].inputs
    assert calls["half"].settings["granularity"] == "neuron"
    assert plan.after["half"] == ("train", "score")
    assert plan.after["recovered"] == ("half",)


@pytest.mark.parametrize(("rewind", "step"), [("initialisation", 0), ({"step": 7}, 7)])
def test_rewinding_adds_the_training_stopped_there(rewind, step):
    plan = plan_of(recipe(train=TRAIN, again={"kind": "finetune", "epochs": 1, "rewind": rewind}))
    train, stopped, again = plan.calls
    assert stopped.name == "again.rewind"
    assert stopped.settings == {**train.settings, "stop_step": step}
    assert (stopped.seed, stopped.problem) == (train.seed, train.problem)
    assert again.inputs == {"network": train.ref, "rewind": stopped.ref}
    assert set(plan.after["again"]) == {"train", "again.rewind"}


@pytest.mark.parametrize(
    ("stages", "labels"),
    [
        ({}, ["train · mlp", "prune · taylor · 0.5", "evaluate · train, prune"]),
        ({"train": TRAIN, "prune": {**PRUNE, "target": {"keep": 4}}}, ["train · mlp", "prune · taylor · keep 4"]),
        (
            {"train": TRAIN, "prune": {**PRUNE, "target": {"statistic": "mean"}}},
            [None, "prune · taylor · statistic mean"],
        ),
        (
            {
                "train": TRAIN,
                "score": {"kind": "score", "criterion": "snip"},
                "mask": {"kind": "mask", "scope": {"*": 0.5}},
            },
            [None, "score · snip", "mask · table · table"],
        ),
        (
            {"train": TRAIN, "prune": {"kind": "prune", "criterion": "snip", "granularity": "2:4"}},
            [None, "prune · snip · 2:4"],
        ),
        (
            {
                "train": TRAIN,
                "score": {"kind": "score", "criterion": "snip", "granularity": "2:4"},
                "mask": {"kind": "mask"},
            },
            [None, "score · snip", "mask · 2:4"],
        ),
        ({"train": TRAIN, "more": {"kind": "finetune", "steps": 5}}, [None, "finetune · 5 steps"]),
    ],
)
def test_labels_read_well(stages, labels):
    found = [call.label for call in plan_of(recipe(**stages)).calls]
    assert [f for f, wanted in zip(found, labels, strict=True) if wanted] == [w for w in labels if w]


def test_a_matrix_trains_once_and_names_rows_by_what_they_change():
    raw = recipe(
        train=TRAIN,
        prune={**PRUNE, "matrix": {"criterion": ["snip", "taylor"], "target.sparsity": [0.5, 0.9]}},
        evaluate=EVALUATE,
    )
    plan = plan_of(raw)
    rows = [f"criterion={c},sparsity={s}" for c in ("snip", "taylor") for s in (0.5, 0.9)]
    names = [call.name for call in plan.calls]
    assert sorted(names) == sorted(["train", *(f"{kind}[{row}]" for kind in ("prune", "evaluate") for row in rows)])
    for row in rows:
        assert plan.after[f"prune[{row}]"] == ("train",)
        assert plan.after[f"evaluate[{row}]"] == ("train", f"prune[{row}]")
    calls = {call.name: call for call in plan.calls}
    assert calls["prune[criterion=taylor,sparsity=0.5]"].key == keys(recipe())["prune"]
    assert calls["evaluate[criterion=taylor,sparsity=0.5]"].key == keys(recipe())["evaluate"]
    assert calls["prune[criterion=snip,sparsity=0.9]"].facts["row"] == {"criterion": "snip", "sparsity": "0.9"}
    assert list(calls["evaluate[criterion=snip,sparsity=0.9]"].inputs) == [
        "train",
        "prune[criterion=snip,sparsity=0.9]",
    ]


def test_a_matrix_of_the_recipe_and_of_a_stage_are_the_same():
    on_stage = recipe(train=TRAIN, prune={**PRUNE, "matrix": {"criterion": ["snip", "taylor"]}})
    on_recipe = {**recipe(train=TRAIN, prune=PRUNE), "matrix": {"stages.prune.criterion": ["snip", "taylor"]}}
    assert keys(on_stage) == keys(on_recipe)


def test_seeds_train_each_their_own():
    plan = plan_of({**recipe(train=TRAIN, prune=PRUNE), "matrix": {"seed": [0, 1, 2]}})
    assert [call.name for call in plan.calls if call.kind == "train"] == [f"train[seed={i}]" for i in range(3)]
    assert [call.seed for call in plan.calls if call.kind == "prune"] == [0, 1, 2]
    assert plan.after["prune[seed=1]"] == ("train[seed=1]",)
    assert len({call.key for call in plan.calls}) == 6
    apart = keys({**recipe(train=TRAIN, prune=PRUNE), "seed": 1})
    assert {call.name: call.key for call in plan.calls}["prune[seed=1]"] == apart["prune"]


def test_a_seed_of_the_pruning_alone_trains_once():
    found = keys(recipe(train=TRAIN, prune={**PRUNE, "criterion": "random", "matrix": {"seed": [0, 1]}}))
    assert list(found) == ["train", "prune[seed=0]", "prune[seed=1]"]


def test_a_value_that_stands_twice_is_one_row():
    assert list(keys(recipe(train=TRAIN, prune={**PRUNE, "matrix": {"criterion": ["snip", "snip"]}}))) == [
        "train",
        "prune",
    ]


@pytest.mark.parametrize(
    "matrix",
    [
        {"target": [{"sparsity": 0.5}, {"threshold": 0.5}]},
        {"exclude": [["hidden_0", "output"], ["hidden_0-output"]]},
        {"schedule": [{"kind": "iterative", "rounds": 2}, {"kind": "iterative", "rounds": 3}]},
    ],
)
def test_no_row_of_a_matrix_is_lost(matrix):
    prune = [name for name in keys(recipe(train=TRAIN, prune={**PRUNE, "matrix": matrix})) if name.startswith("prune")]
    assert len(prune) == 2


@pytest.mark.parametrize(
    ("stages", "name", "row"),
    [
        (
            {"train": TRAIN, "prune": {**PRUNE, "matrix": {"exclude": [["a,b=c"], ["output"]]}}},
            "prune[exclude=a,b=c]",
            {"exclude": "a,b=c"},
        ),
        (
            {
                "train": TRAIN,
                "one": {**PRUNE, "matrix": {"criterion": ["snip", "taylor"]}},
                "two": {**PRUNE, "after": "one", "matrix": {"criterion": ["magnitude", "fisher"]}},
            },
            None,
            ["snip", "fisher"],
        ),
    ],
)
def test_a_row_tells_every_axis(stages, name, row):
    rows = {call.name: call.facts["row"] for call in plan_of(recipe(**stages)).calls}
    if name:
        assert rows[name] == row
    else:
        assert any(sorted(found.values()) == sorted(row) for found in rows.values()), rows


def test_a_dot_in_a_stages_name_does_not_lose_its_matrix():
    found = keys(recipe(**{"v1.0": TRAIN, "v1.1": {**PRUNE, "matrix": {"criterion": ["snip", "taylor"]}}}))
    assert list(found) == ["v1.0", "v1.1[criterion=snip]", "v1.1[criterion=taylor]"]


def test_a_stage_is_after_what_it_names_and_not_after_a_twin_of_that():
    plan = plan_of(recipe(train=TRAIN, twin=copy.deepcopy(TRAIN), prune={**PRUNE, "after": "train"}))
    assert plan.after["prune"] == ("train",)


def test_a_plan_is_the_same_twice():
    assert plan_of(recipe()) == plan_of(recipe())
