"""Reading recipes: every mistake is told by its path, value, what is allowed and the nearest name."""

from __future__ import annotations

import copy
import json

import pytest
from jsonschema import Draft202012Validator

from prune_jax.errors import UserMistake
from prune_jax.plan import make_plan
from prune_jax.recipe import Recipe, built_in, check_run_name, read_recipe, with_value
from prune_jax.schema import recipe_schema
from tests.sparing import sparing

TRAIN = {"kind": "train"}
PRUNE = {"kind": "prune", "criterion": "magnitude", "target": {"sparsity": 0.5}}
SCORE = {"kind": "score", "criterion": "magnitude"}
MASK = {"kind": "mask", "target": {"sparsity": 0.5}}
NETWORK = "train or mask or finetune or distill or prune or compact"
MISSING = object()


def recipe(**stages):
    return {
        "name": "r",
        "data": {"source": "xor"},
        "model": {"kind": "mlp"},
        "stages": stages or {"train": TRAIN, "prune": PRUNE},
    }


def changed(path, value):
    """The plain recipe with `value` at the path of keys."""
    raw = copy.deepcopy(recipe())
    *folders, last = path.split("/")
    branch = raw
    for folder in folders:
        branch = branch.setdefault(folder, {})
    branch[last] = value
    if value is MISSING:
        del branch[last]
    return raw


def complaint(raw, **options):
    with pytest.raises(UserMistake) as caught:
        read_recipe(raw, **options)
    return str(caught.value)


TOP = "(allowed: name, description, seed, data, model, objective, devices, stages, matrix)"
RATES = "(allowed: sgd, adam, adamw, nadam, rmsprop, adagrad, lion, lamb)"
ONE_TARGET = "needs exactly one of sparsity, keep, threshold, statistic, percentile, params, macs, latency"
GRANULARITIES = "(allowed: weight, n:m such as '2:4', {block: [r, c]}, kernel, neuron, group, layer)"
SPARSE = {"kind": "prune", "criterion": "magnitude", "granularity": "2:4"}
TWO_OF_FOUR = "2:4 keeps 2 of each 4 inputs, which says how many die where"
BOTH = "says both `after` and `of`, which mean the same; leave one out"

EXACT = [
    # unknown fields
    ("sead", 1, f"sead = 1: is not a field here; did you mean 'seed'? {TOP}"),
    ("zzz", [1], f"zzz = [1]: is not a field here {TOP}"),
    (
        "data/sorce",
        "xor",
        "data.sorce = 'xor': is not a field here; did you mean 'source'? "
        "(allowed: source, path, args, validation, batch_size)",
    ),
    (
        "stages/prune/target/sparcity",
        0.5,
        "stages.prune.target.sparcity = 0.5: is not a field here; did you mean 'sparsity'? "
        "(allowed: sparsity, keep, threshold, statistic, percentile, params, macs, latency)",
    ),
    (
        "stages/prune/criterion",
        {"nme": "snip"},
        "stages.prune.criterion.nme = 'snip': is not a field here; did you mean 'name'? "
        "(allowed: name, options, combine, batches, perturbation)",
    ),
    # missing fields
    ("data", MISSING, "data: is missing"),
    ("model", MISSING, "model: is missing"),
    ("stages", MISSING, "stages: is missing"),
    ("data/source", MISSING, "data.source: is missing"),
    ("model/kind", MISSING, "model.kind: is missing"),
    ("stages/train/kind", MISSING, "stages.train: is missing its `kind`"),
    ("stages/prune/criterion", MISSING, "stages.prune.criterion: is missing"),
    ("stages/prune/schedule", {"rounds": 3}, "stages.prune.schedule: is missing its `kind`"),
    ("stages/prune/guard", {}, "stages.prune.guard.max_drop: is missing"),
    # unknown kinds and names
    (
        "model/kind",
        "mpl",
        "model.kind = 'mpl': is not known; did you mean 'mlp'? "
        "(allowed: linear, mlp, cnn, resnet, autoencoder, rnn, transformer, or module:object)",
    ),
    (
        "model/activation",
        "rellu",
        "model.activation = 'rellu': is not known; did you mean 'relu'? (allowed: relu, tanh, sigmoid, gelu)",
    ),
    (
        "stages/train/kind",
        "trian",
        "stages.train.kind = 'trian': is not known; did you mean 'train'? "
        "(allowed: train, score, mask, finetune, distill, prune, compact, export, evaluate, gate)",
    ),
    (
        "stages/train/optimizer",
        {"name": "adm"},
        f"stages.train.optimizer.name = 'adm': is not known; did you mean 'adam'? {RATES}",
    ),
    (
        "stages/prune/granularity",
        "weights",
        f"stages.prune.granularity = 'weights': is not known; did you mean 'weight'? {GRANULARITIES}",
    ),
    ("stages/prune/granularity", {"blok": [2, 2]}, f"stages.prune.granularity: is not known {GRANULARITIES}"),
    (
        "stages/prune/granularity",
        {"block": [2, 0]},
        "stages.prune.granularity: gives [2, 0] where rows and columns are wanted, whole numbers from 1 on: "
        "{block: [4, 1]}",
    ),
    (
        "stages/prune/granularity",
        "4:4",
        "stages.prune.granularity = '4:4': keeps 4 of each 4: n must be at least 1 and below m, as in '2:4'",
    ),
    (
        "stages/prune/granularity",
        124,
        'stages.prune.granularity = 124: is a number, which is what YAML makes of 2:4; write it in quotes: "2:4"',
    ),
    ("stages/prune/granularity", "2:4", f"stages.prune.target: {TWO_OF_FOUR}; leave `target` out"),
    (
        "stages/prune",
        {**SPARSE, "scope": "layer"},
        f"stages.prune.scope = 'layer': {TWO_OF_FOUR}; leave `scope` out",
    ),
    ("stages/prune", {**SPARSE, "scope": {"*": 0.5}}, f"stages.prune.scope: {TWO_OF_FOUR}; leave `scope` out"),
    ("stages/prune", {**SPARSE, "min_keep": 1}, f"stages.prune.min_keep = 1: {TWO_OF_FOUR}; leave `min_keep` out"),
    (
        "stages/prune",
        {**SPARSE, "schedule": {"kind": "iterative"}},
        "stages.prune: an iterative schedule climbs to a sparsity: its target is sparsity or keep, not 2:4; "
        "write `schedule: {kind: one_shot}`",
    ),
    (
        "stages/prune",
        {**SPARSE, "search": {"amounts": [0.1, 0.2]}},
        "stages.prune: search tries values of threshold, sparsity or percentile, not of 2:4",
    ),
    (
        "stages/prune",
        {**SPARSE, "guard": {"max_drop": 0.1, "breach": {"action": "back_off"}}},
        "stages.prune.guard.breach.action = 'back_off': bisects a sparsity, but the target is 2:4; write stop or fail",
    ),
    (
        "stages/prune",
        {**PRUNE, "granularity": {"block": [2, 2]}, "target": {"macs": 0.5}},
        "stages.prune.target.macs = 0.5: does not go with granularity {block: [2, 2]} "
        "(allowed: sparsity, keep, threshold, statistic, percentile)",
    ),
    (
        "stages",
        {"train": TRAIN, "score": {**SCORE, "granularity": "2:4"}, "mask": MASK},
        f"stages.mask.target: {TWO_OF_FOUR}; leave `target` out",
    ),
    (
        "stages",
        {"train": TRAIN, "score": {**SCORE, "granularity": "kernel"}, "mask": {"kind": "mask"}},
        "stages.mask: needs `target`, such as {sparsity: 0.9}, unless `scope` is a table {pattern: sparsity}",
    ),
    (
        "stages/prune/schedule",
        {"kind": "iterativ"},
        "stages.prune.schedule.kind = 'iterativ': is not known; did you mean 'iterative'? "
        "(allowed: one_shot, iterative)",
    ),
    (
        "stages/prune/schedule",
        {"kind": "iterative", "levels": "cubik"},
        "stages.prune.schedule.levels = 'cubik': is not known; did you mean 'cubic'? (allowed: geometric, cubic)",
    ),
    (
        "stages/prune/guard",
        {"max_drop": 0.1, "breach": {"action": "stopp"}},
        "stages.prune.guard.breach.action = 'stopp': is not known; did you mean 'stop'? "
        "(allowed: stop, back_off, fail)",
    ),
    (
        "stages/prune/target",
        {"statistic": "avg"},
        "stages.prune.target.statistic = 'avg': is not known (allowed: mean, median)",
    ),
    # targets
    (
        "stages/prune/target/sparsity",
        90,
        "stages.prune.target.sparsity = 90: must be at least 0 and below 1; sparsity is a fraction, did you mean 0.9?",
    ),
    ("stages/prune/target/sparsity", 1, "stages.prune.target.sparsity = 1: must be at least 0 and below 1"),
    ("stages/prune/target/sparsity", 1000, "stages.prune.target.sparsity = 1000: must be at least 0 and below 1"),
    ("stages/prune/target/sparsity", -0.1, "stages.prune.target.sparsity = -0.1: must be at least 0 and below 1"),
    ("stages/prune/target/keep", 3, f"stages.prune.target: says sparsity and keep but {ONE_TARGET}"),
    ("stages/prune/target", {}, f"stages.prune.target: says nothing but {ONE_TARGET}"),
    (
        "stages/prune/target",
        MISSING,
        "stages.prune: needs `target`, such as {sparsity: 0.9}, unless `scope` is a table {pattern: sparsity}",
    ),
    (
        "stages/prune/scope",
        {"*": 0.5},
        "stages.prune: a table in `scope` says how many die where; leave `target` out",
    ),
    (
        "stages/prune",
        {**PRUNE, "scope": "erk", "target": {"threshold": 0.5}},
        "stages.prune: erk shares out a number of survivors: its target is sparsity or keep, not threshold",
    ),
    (
        "stages/prune",
        {**PRUNE, "schedule": {"kind": "iterative"}, "target": {"threshold": 0.5}},
        "stages.prune: an iterative schedule climbs to a sparsity: its target is sparsity or keep, not threshold; "
        "write `schedule: {kind: one_shot}`",
    ),
    (
        "stages/prune",
        {"kind": "prune", "criterion": "snip", "schedule": {"kind": "iterative"}, "scope": {"*": 0.5}},
        "stages.prune: an iterative schedule climbs to a sparsity: its target is sparsity or keep, not table; "
        "write `schedule: {kind: one_shot}`",
    ),
    (
        "stages/prune",
        {**PRUNE, "target": {"keep": 3}, "search": {"amounts": [1, 2]}},
        "stages.prune: search tries values of threshold, sparsity or percentile, not of keep",
    ),
    (
        "stages/prune",
        {**PRUNE, "schedule": {"kind": "iterative"}, "search": {"amounts": [0.1, 0.2]}},
        "stages.prune: search goes with `schedule: {kind: one_shot}`",
    ),
    # optimizers and lengths
    (
        "stages/train/optimizer",
        {"name": "adam", "momentum": 0.9},
        "stages.train.optimizer: adam takes no momentum (it takes b1, b2, eps; taken by: sgd, rmsprop)",
    ),
    (
        "stages/train/optimizer",
        {"name": "sgd", "b1": 0.9, "eps": 1},
        "stages.train.optimizer: sgd takes no b1, eps "
        "(it takes momentum, nesterov; taken by: adam, adamw, nadam, lamb)",
    ),
    (
        "stages/train/optimizer",
        {"name": "lion", "momentum": 0.9, "weight_decay": 0.1},
        "stages.train.optimizer: lion takes no momentum (it takes b1, b2, weight_decay; taken by: sgd, rmsprop)",
    ),
    (
        "stages/train/optimizer",
        {"name": "adam", "momentum": 0.9, "weight_decay": 0.1},
        "stages.train.optimizer: adam takes no momentum, weight_decay (it takes b1, b2, eps; taken by: none)",
    ),
    (
        "stages/train/optimizer",
        {"warmup": 5},
        "stages.train.optimizer.warmup = 5: is not a field here; did you mean 'warmup_steps'? (allowed: name, "
        "learning_rate, decay_to, warmup_steps, clip_norm, momentum, nesterov, b1, b2, decay, eps, weight_decay)",
    ),
    (
        "stages/train",
        {"kind": "train", "epochs": 1, "steps": 1},
        "stages.train: needs one of epochs, steps; it says both",
    ),
    ("stages/prune/finetune", {}, "stages.prune.finetune: needs exactly one of epochs, steps"),
    (
        "stages/prune/finetune",
        {"rewind": {"learning_rate": {"step": 1}}, "epochs": 3},
        "stages.prune.finetune.epochs = 3: is the training's own where `rewind` repeats its learning rates; leave it "
        "out",
    ),
    (
        "stages/prune/finetune",
        {"rewind": {"learning_rate": {"step": 1}, "step": 1}},
        "stages.prune.finetune.rewind.learning_rate: one of step, learning_rate is needed, and no more than one",
    ),
    (
        "stages/prune/finetune",
        {"epochs": 1, "steps": 2},
        "stages.prune.finetune: needs exactly one of epochs, steps",
    ),
    # data and models
    (
        "data/source",
        "npz",
        "data: `source: npz` needs `path`, a file with x_train, y_train, x_test, y_test",
    ),
    (
        "data/path",
        "d.npz",
        "data: `path` goes with `source: npz`; source is 'xor', whose settings go into `args`",
    ),
    ("model", {"kind": "resnet", "depth": 9}, "model: depth is 9 but must be 6n + 2, such as 8 or 14"),
    ("model", {"kind": "transformer", "dim": 10, "heads": 3}, "model: dim is 10 but must be a multiple of heads, 3"),
    ("model", {"kind": "a.b:c", "width": 3}, "model.width = 3: is not a field here (allowed: kind, args)"),
    # wiring
    (
        "stages/prune/after",
        "trian",
        "stages.prune.after = 'trian': names no stage; did you mean 'train'? (stages above: train)",
    ),
    ("stages/prune/of", "zz", "stages.prune.of = 'zz': names no stage (stages above: train)"),
    (
        "stages/prune/after",
        "prune",
        "stages.prune.after = 'prune': names 'prune', which does not come before it (stages above: train)",
    ),
    ("stages/prune", {**PRUNE, "after": "train", "of": "train"}, f"stages.prune: {BOTH}"),
]


@pytest.mark.parametrize(("path", "value", "text"), EXACT, ids=[f"{p}-{i}" for i, (p, _, _) in enumerate(EXACT)])
def test_a_mistake_is_told_by_path_value_and_what_is_allowed(path, value, text):
    assert complaint(changed(path, value)) == f"r: {text}"


WIRING = [
    (dict(prune=PRUNE), f"stages.prune.kind = 'prune': prune takes the result of a {NETWORK} stage, and none stands"),
    (dict(mask=MASK), "stages.mask.kind = 'mask': mask takes the result of a score stage, and none stands above it"),
    (
        dict(evaluate={"kind": "evaluate"}),
        f"stages.evaluate.kind = 'evaluate': evaluate takes the result of a {NETWORK} stage, and none stands above it",
    ),
    (dict(train=TRAIN, mask=MASK), "stages.mask.kind = 'mask': mask takes the result of a score stage, and none"),
    (
        dict(train=TRAIN, mask={**MASK, "after": "train"}),
        "stages.mask.after = 'train': names 'train', a train stage, but mask takes a score stage",
    ),
    (
        dict(train=TRAIN, score=SCORE, prune={**PRUNE, "after": "score"}),
        f"stages.prune.after = 'score': names 'score', a score stage, but prune takes a {NETWORK} stage",
    ),
    (
        dict(one=TRAIN, two={**TRAIN, "after": "one"}),
        "stages.two.after = 'one': names 'one', a train stage, but train takes no other stage's result",
    ),
    (
        dict(train=TRAIN, evaluate={"kind": "evaluate", "of": ["train", "prune"]}, prune=PRUNE),
        "stages.evaluate.of = ['train', 'prune']: names 'prune', which does not come before it (stages above: train)",
    ),
    (dict(train=TRAIN, evaluate={"kind": "evaluate", "of": "train", "after": "train"}), f"stages.evaluate: {BOTH}"),
    (dict(train=TRAIN, finetune={"kind": "finetune"}), "stages.finetune: needs exactly one of epochs, steps"),
]


@pytest.mark.parametrize(("stages", "text"), WIRING, ids=[t[:40] for _, t in WIRING])
def test_a_stage_that_has_nothing_fit_to_take_is_refused(stages, text):
    assert complaint(recipe(**stages)).startswith(f"r: {text}")


# Wrong types and ranges: pydantic's words, but at our path and with the value.
BEGINNINGS = [
    ("seed", "three", "seed = 'three': "),
    ("seed", -1, "seed = -1: "),
    ("seed", 2**31, "seed = 2147483648: "),
    ("seed", 1.5, "seed = 1.5: "),
    ("name", "a b", "name = 'a b': must match"),
    ("name", "../up", "name = '../up': must match"),
    ("data", "mnist5k", "data = 'mnist5k': "),
    ("data/batch_size", 0, "data.batch_size = 0: "),
    ("data/batch_size", "many", "data.batch_size = 'many': "),
    ("data/validation", 1.0, "data.validation = 1.0: "),
    ("data/source", 3, "data.source = 3: "),
    ("model", "mlp", "model = 'mlp': "),
    ("model/kind", 3, "model.kind = 3: "),
    ("model/widths", [0], "model.widths.0 = 0: "),
    ("model/widths", 30, "model.widths = 30: "),
    ("objective", 3, "objective = 3: "),
    ("stages", {}, "stages: "),
    ("stages", [1], "stages = [1]: "),
    ("stages/train", None, "stages.train = None: "),
    ("stages/train/epochs", 0, "stages.train.epochs = 0: "),
    ("stages/train/epochs", "ten", "stages.train.epochs = 'ten': "),
    ("stages/train/steps", -1, "stages.train.steps = -1: "),
    ("stages/train/steps", 2.5, "stages.train.steps = 2.5: "),
    ("stages/train/l1", -1, "stages.train.l1 = -1: "),
    ("stages/train/optimizer", "adam", "stages.train.optimizer = 'adam': "),
    ("stages/train/optimizer", {"learning_rate": 0}, "stages.train.optimizer.learning_rate = 0: "),
    ("stages/train/optimizer", {"learning_rate": float("nan")}, "stages.train.optimizer.learning_rate = nan: "),
    ("stages/train/optimizer", {"warmup_steps": -1}, "stages.train.optimizer.warmup_steps = -1: "),
    ("stages/train/optimizer", {"name": "sgd", "momentum": 1}, "stages.train.optimizer.momentum = 1: "),
    ("stages/train/retries", -1, "stages.train.retries = -1: "),
    ("stages/train/timeout_seconds", 0, "stages.train.timeout_seconds = 0: "),
    ("stages/prune/criterion", 3, "stages.prune.criterion = 3: "),
    ("stages/prune/criterion", {"name": "snip", "batches": 0}, "stages.prune.criterion.batches = 0: "),
    ("stages/prune/target", 0.9, "stages.prune.target = 0.9: "),
    ("stages/prune/target", {"keep": 0}, "stages.prune.target.keep = 0: "),
    ("stages/prune/target", {"keep": 2.5}, "stages.prune.target.keep = 2.5: "),
    ("stages/prune/target", {"sparsity": "90%"}, "stages.prune.target.sparsity = '90%': "),
    ("stages/prune/target", {"percentile": 100}, "stages.prune.target.percentile = 100: "),
    ("stages/prune/target", {"threshold": float("inf")}, "stages.prune.target.threshold = inf: "),
    (
        "stages/prune/scope",
        "erks",
        "stages.prune.scope = 'erks': is not known; did you mean 'erk'? "
        "(allowed: global, layer, erk, lamp, output, isomorphic, or a table {pattern: sparsity})",
    ),
    ("stages/prune/exclude", "output", "stages.prune.exclude = 'output': must be a list, such as [a, b]"),
    (
        "stages/prune/finetune",
        {"epochs": 1, "rewind": "init"},
        "stages.prune.finetune.rewind = 'init': is not known (allowed: none, initialisation, or {step: n}, "
        "{learning_rate: {step: n}})",
    ),
    ("stages/prune/schedule", {"kind": "iterative", "rounds": 0}, "stages.prune.schedule.rounds = 0: "),
    ("stages/prune/guard", {"max_drop": -1}, "stages.prune.guard.max_drop = -1: "),
    ("stages/prune/search", {"amounts": [0.1]}, "stages.prune.search.amounts = [0.1]: "),
    ("stages/prune/search", {"amounts": [0.1, 0.2], "folds": 1}, "stages.prune.search.folds = 1: "),
    ("stages/prune/matrix", {"seed": []}, "stages.prune.matrix.seed = []: "),
    ("stages/prune/min_keep", -1, "stages.prune.min_keep = -1: "),
    ("matrix", {"seed": 3}, "matrix.seed = 3: must be a list, such as [a, b]"),
]


@pytest.mark.parametrize(("path", "value", "text"), BEGINNINGS, ids=[t for *_, t in BEGINNINGS])
def test_a_wrong_type_or_range_is_told_by_path_and_value(path, value, text):
    found = complaint(changed(path, value))
    assert found.startswith(f"{value if path == 'name' else 'r'}: {text}"), found
    assert "pydantic" not in found


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("stages/prune/scope", {"*": 1.0}, "scope.* = 1.0"),
        ("stages/prune/finetune", {"epochs": 1, "rewind": {"steps": 1}}, "rewind.steps = 1"),
        ("stages/prune/finetune", {"epochs": 1, "rewind": {"step": -1}}, "rewind.step = -1"),
    ],
)
def test_a_mistake_in_one_form_of_a_field_is_not_told_as_one_in_another(path, value, told):
    raw = changed(path, value)
    if "scope" in raw["stages"]["prune"]:
        del raw["stages"]["prune"]["target"]
    found = complaint(raw)
    assert told in found
    assert len(found.splitlines()) == 1, found


@pytest.mark.parametrize("path", ["model", "data", "stages/train/optimizer", "stages/prune/target"])
def test_a_message_names_no_class(path):
    found = complaint(changed(path, "x"))
    assert not any(word in found for word in ("Model", "Data", "Optimizer", "Target", "instance")), found


@pytest.mark.parametrize(
    ("path", "value"),
    [("seed", True), ("data/batch_size", True), ("stages/train/epochs", True), ("stages/prune/target", {"keep": True})],
)
def test_true_is_no_number(path, value):
    complaint(changed(path, value))


@pytest.mark.parametrize(
    ("target", "amounts"),
    [({"sparsity": 0.5}, [0.5, 1.5]), ({"sparsity": 0.5}, [-0.1, 0.5]), ({"percentile": 10}, [10, 200])],
)
def test_a_search_tries_possible_amounts_only(target, amounts):
    found = complaint(changed("stages/prune", {**PRUNE, "target": target, "search": {"amounts": amounts}}))
    assert "stages.prune.search.amounts" in found


@pytest.mark.parametrize(
    "how_many",
    [{"target": {w: v}} for w, v in (("keep", 3), ("threshold", 0.1), ("statistic", "mean"), ("percentile", 9))]
    + [{"target": None, "scope": {"*": 0.5}}],
    ids=str,
)
def test_backing_off_needs_a_sparsity(how_many):
    guard = {"max_drop": 0.1, "breach": {"action": "back_off"}}
    word = next(iter(how_many["target"] or ["table"]))
    assert complaint(changed("stages/prune", {**PRUNE, **how_many, "guard": guard})) == (
        f"r: stages.prune.guard.breach.action = 'back_off': bisects a sparsity, but the target is {word}; "
        "write stop or fail"
    )


@pytest.mark.parametrize(
    ("evaluate", "told"),
    [
        ({"of": []}, "of = []: names no network; leave it out to take the stage above"),
        ({"latency": {"batch_sizes": []}}, "latency.batch_sizes = []: must have 1 or more"),
    ],
)
def test_an_evaluation_of_nothing_is_refused(evaluate, told):
    raw = recipe(train=TRAIN, evaluate={"kind": "evaluate", **evaluate})
    assert complaint(raw) == f"r: stages.evaluate.{told}"


def test_all_mistakes_are_told_at_once():
    raw = changed("seed", "x")
    raw["data"]["batch_size"] = 0
    raw["stages"]["prune"]["target"]["sparsity"] = 90
    lines = complaint(raw).splitlines()
    assert [line.split(":")[1].split("=")[0].strip() for line in lines] == [
        "seed",
        "data.batch_size",
        "stages.prune.target.sparsity",
    ]


GOOD = "name: r\ndata: {source: xor}\nmodel: {kind: mlp}\nstages:\n  train: {kind: train}\n"
YAML_ERRORS = [
    ("a: [1, 2\nb: 3\n", ":2:2: not YAML: expected ',' or ']', but got ':'"),
    ("\t- a", r":1:1: not YAML: found character '\t' that cannot start any token"),
    ("a: b: c", ":1:5: not YAML: mapping values are not allowed here"),
    (
        "a: !!python/object/apply:os.system ['ls']",
        ":1:4: not YAML: the tag 'tag:yaml.org,2002:python/object/apply:os.system' has no place in a recipe",
    ),
    ("- a\n", ": a recipe is a mapping of name, data, model and stages; this is of type list"),
    ("just text", ": a recipe is a mapping of name, data, model and stages; this is of type str"),
    ("", ": a recipe is a mapping of name, data, model and stages"),
    (GOOD + "1: 2\n", f": 1: is not a field here {TOP}"),
    (GOOD + "? [a, b]\n: 3\n", ":6:"),
    (GOOD + "---\nb: 3\n", ":6:1: not YAML: but found another document"),
]


@pytest.mark.parametrize(("text", "told"), YAML_ERRORS, ids=[t[:20] for t, _ in YAML_ERRORS])
def test_what_is_not_yaml_is_told_by_line_and_column(tmp_path, text, told):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    assert complaint(path).startswith(f"{path}{told}")


@pytest.mark.parametrize("changes", [[], ["stages.train.epochs=3"], ["stages.on.epochs=3"]])
@pytest.mark.parametrize(("name", "read"), [("on", True), ("no", False), ("1", 1), ("1.5", 1.5), ("null", None)])
def test_a_stages_name_that_yaml_takes_for_a_value_must_be_quoted(tmp_path, name, read, changes):
    path = tmp_path / "r.yaml"
    path.write_text(GOOD + f"  {name}: {{kind: train}}\n")
    if changes == ["stages.on.epochs=3"]:
        assert "there is no stage 'on'" in complaint(path, changes=changes)
    else:
        assert complaint(path, changes=changes) == (
            f"{path}: stages: {read} cannot be a stage's name: YAML takes on, off, yes, no, null and numbers for "
            'values; put the name in quotes, such as "on"'
        )
    path.write_text(GOOD + f"  '{name}': {{kind: train}}\n")
    assert list(read_recipe(path).stages) == ["train", name]


def test_a_stage_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(GOOD + "  train: {kind: train, epochs: 3}\n")
    assert "train" in complaint(path)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\x00name")
    assert complaint(path).startswith(str(path))


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("lenet-300", "lenet-300: no such file and no built-in recipe; did you mean 'lenet-300-100'? (built in: "),
        ("xorr", "xorr: no such file and no built-in recipe; did you mean 'xor'? (built in: autoencoder, "),
        ("/nowhere/x.yaml", "/nowhere/x.yaml: no such file and no built-in recipe (built in: autoencoder, "),
        ("/", "/: no such file and no built-in recipe"),
    ],
)
def test_a_recipe_that_is_not_there_is_told_with_the_nearest_name(source, told):
    assert complaint(source).startswith(told)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("stages.train.epochs", "--set stages.train.epochs: write path=value, such as --set stages.train.epochs=3"),
        ("=3", "--set =3: write path=value, such as --set stages.train.epochs=3"),
        ("stages.train.epochs=[1", "--set stages.train.epochs=[1: '[1' is not a YAML value"),
        ("stages.train.epoch=3", "xor: stages.train.epoch = 3: is not a field here; did you mean 'epochs'?"),
        ("stages.train.epochs=ten", "xor: stages.train.epochs = 'ten': "),
        ("sead=3", "xor: sead = 3: is not a field here; did you mean 'seed'?"),
        ("stages.evaluate.of=[trian]", "xor: stages.evaluate.of = ['trian']: names no stage; did you mean 'train'?"),
    ],
)
def test_a_bad_set_is_told(change, told):
    assert complaint("xor", changes=[change]).startswith(told)


def test_a_set_of_an_unknown_stage_names_the_nearest():
    assert "did you mean 'train'?" in complaint("xor", changes=["stages.trian.epochs=3"])


@pytest.mark.parametrize(
    ("change", "path", "value"),
    [
        ("stages.train.epochs=3", "stages.train.epochs", 3.0),
        ("stages.train.optimizer.learning_rate=1e-2", "stages.train.optimizer.learning_rate", 0.01),
        ("stages.to-four.criterion=taylor", "stages.to-four.criterion.name", "taylor"),
        ("stages.to-four.criterion.batches=2", "stages.to-four.criterion.batches", 2),
        ("stages.evaluate.latency=null", "stages.evaluate.latency", None),
        ("description=a=b", "description", "a=b"),
        ("seed = 7", "seed", 7),
    ],
)
def test_set_puts_a_yaml_value_in_its_place(change, path, value):
    found = read_recipe("xor", changes=[change]).model_dump(mode="json")
    for part in path.split("."):
        found = found[part]
    assert found == value


def test_changes_are_made_in_order_and_to_a_recipe_too():
    once = read_recipe("xor", changes=["seed=1", "seed=2"])
    assert once.seed == 2
    assert read_recipe(once, changes=["seed=3"]).seed == 3
    assert read_recipe(once) is once


def test_with_value_copies():
    raw = {"a": {"b": 1}}
    with_value(raw, "a.b", 2)
    assert raw == {"a": {"b": 1}}


@pytest.mark.parametrize("name", ["", "a b", "../x", "a/b", ".hidden", "-x", "x" * 101, "über", "a\n"])
def test_a_run_is_named_like_a_folder(name):
    with pytest.raises(UserMistake) as caught:
        check_run_name(name)
    assert str(caught.value) == (
        f"name = {name!r}: a run's name has letters, digits, '.', '_' and '-', begins with a letter or a digit and has "
        "at most 100 characters"
    )


@pytest.mark.parametrize("name", ["a", "0", "lenet-300-100", "a.b_c-1", "x" * 100])
def test_a_good_run_name_passes(name):
    check_run_name(name)


def _keys(recipe):
    plan = make_plan(recipe, digest_of=lambda data: "d" * 64, code_of=lambda recipe: {})
    return {call.name: call.key for call in plan.calls}


@pytest.mark.parametrize("name", sparing(built_in(), ["comparison"]))
def test_a_built_in_recipe_is_good_has_its_name_and_survives_json(name):
    found = read_recipe(name)
    assert found.name == name
    assert found.description
    text = found.model_dump_json(exclude_unset=True)
    again = read_recipe(json.loads(text))
    assert again == found
    assert _keys(again) == _keys(found) == _keys(Recipe.model_validate_json(found.model_dump_json()))


@pytest.fixture(scope="module")
def schema():
    return Draft202012Validator(recipe_schema())


def test_the_schema_is_a_schema():
    Draft202012Validator.check_schema(recipe_schema())
    json.dumps(recipe_schema(), allow_nan=False)


@pytest.mark.parametrize("name", built_in())
def test_the_schema_takes_every_built_in_recipe(schema, name):
    import yaml

    schema.validate(yaml.safe_load(built_in()[name]))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("sead", 1),
        ("seed", "three"),
        ("seed", -1),
        ("model/kind", MISSING),
        ("model/widths", [0]),
        ("data/source", "mnist6k"),
        ("data/batch_size", 0),
        ("data", MISSING),
        ("stages/train/kind", "trian"),
        ("stages/train/epoch", 1),
        ("stages/train/optimizer", {"name": "adm"}),
        ("stages/prune/criterion", "taylr"),
        ("stages/prune/criterion", {"name": "taylr"}),
        ("stages/prune/scope", "erks"),
        ("stages/prune/target", {"sparcity": 0.5}),
        ("stages/prune/granularity", "weights"),
        ("stages/prune/granularity", {"block": [2]}),
        ("stages/prune/granularity", {"block": [2, 0]}),
        ("stages/prune/granularity", {"blok": [2, 2]}),
        ("stages/prune/granularity", 124),
        ("stages/prune/schedule", {"kind": "iterative", "rounds": 0}),
        ("stages/prune/guard", {}),
        ("matrix", {"seed": []}),
    ],
)
def test_the_schema_refuses_mistakes(schema, path, value):
    assert not schema.is_valid(changed(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("stages/prune/criterion", "my_pkg.criteria:mine"),
        ("stages/prune/criterion", {"name": "my_pkg.criteria:mine"}),
        ("data/source", "my_pkg.data:load"),
        ("model", {"kind": "my_pkg.nets:Net", "args": {"width": 3}}),
        ("objective", "my_pkg.losses:loss"),
        ("stages/prune", SPARSE),
        ("stages/prune/granularity", {"block": [4, 1]}),
        ("stages/prune/granularity", "kernel"),
    ],
)
def test_recipe_and_schema_take_the_users_own(schema, path, value):
    raw = changed(path, value)
    read_recipe(raw)
    schema.validate(raw)
