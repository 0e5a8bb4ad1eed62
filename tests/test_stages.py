"""Tiny recipes through every kind of stage, against numpy on the stored arrays."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest

from prune_jax.checkpoints import Store
from prune_jax.criteria import CRITERIA
from prune_jax.errors import DamagedArtifactError, UserMistake
from prune_jax.preparation import prepare
from prune_jax.recipe import read_recipe
from prune_jax.stages import run_stage
from tests.plain import EVALUATE, PRUNE, TRAIN, arrays, part, run_plain, same_bytes, tiny
from tests.sparing import sparing

BUILT_IN = tuple(name for name in CRITERIA if "weight" in CRITERIA[name].granularities)
HELD_STILL = {"name": "sgd", "learning_rate": 1e-44}  # steps that move nothing


def network(store, result):
    """Weights and masks of an artifact, by path."""
    flat = arrays(store, result)
    return part(flat, "params"), part(flat, "masks")


def magnitudes(store, results):
    """The trained kernels by path, in the order of the leaves."""
    params, _ = network(store, results["train"])
    return {path: np.abs(w) for path, w in params.items() if w.ndim >= 2}


def lowest(values, count):
    """The oracle: True but for the `count` lowest of all leaves, the first among equals dying first."""
    flat = np.concatenate([v.ravel() for v in values.values()])
    alive = np.ones(flat.size, bool)
    alive[np.argsort(flat, kind="stable")[:count]] = False
    cuts = np.split(alive, np.cumsum([v.size for v in values.values()])[:-1])
    return {path: cut.reshape(values[path].shape) for path, cut in zip(values, cuts, strict=True)}


def below(values, number):
    return {path: v >= np.float32(number) for path, v in values.items()}


def assert_masks(found, expected):
    assert list(found) == list(expected)
    for path in expected:
        np.testing.assert_array_equal(found[path], expected[path], err_msg=path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One store for all recipes that only read: what they share is trained once."""
    return Store(tmp_path_factory.mktemp("stages") / "store")


@pytest.mark.parametrize("name", sparing(BUILT_IN, ["sparsegpt", "woodfisher", "obd", "grasp"]))
def test_every_criterion_prunes_exactly_what_was_asked(shared, name):
    prune = {**PRUNE, "criterion": name, "finetune": {"steps": 3, "optimizer": {"learning_rate": 0.01}}}
    _, results = run_plain(tiny(train=TRAIN, prune=prune, evaluate=EVALUATE), shared)
    params, masks = network(shared, results["prune"])
    total = sum(m.size for m in masks.values())
    assert sum(int(m.sum()) for m in masks.values()) == total - round(0.5 * total)
    for path, mask in masks.items():
        assert mask.dtype == bool
        assert not params[path][~mask].any()
    assert results["prune"].metrics["sparsity"] == pytest.approx(0.5)
    same_bytes(params, network(shared, results["prune.1.finetune"])[0])
    found = results["evaluate"].metrics[results["prune"].key]
    assert found["nonzero"] == sum(np.count_nonzero(w) for w in params.values())


def test_the_criteria_do_not_agree():
    """A run of one name that computed another would go unnoticed above."""
    keys = set()
    for name in BUILT_IN:
        plan = prepare(read_recipe(tiny(train=TRAIN, score={"kind": "score", "criterion": name})))
        keys.add(plan.calls[-1].key)
    assert len(keys) == len(BUILT_IN)


TARGETS = {
    "sparsity": ({"sparsity": 0.3}, lambda v: lowest(v, round(0.3 * 42))),
    "nothing": ({"sparsity": 0.0}, lambda v: lowest(v, 0)),
    "keep": ({"keep": 5}, lambda v: lowest(v, 42 - 5)),
    "threshold": ({"threshold": 0.3}, lambda v: below(v, 0.3)),
    "mean": (
        {"statistic": "mean"},
        lambda v: below(v, np.mean(np.concatenate([x.ravel() for x in v.values()]), dtype=np.float64)),
    ),
    "median": ({"statistic": "median"}, lambda v: below(v, np.median(np.concatenate([x.ravel() for x in v.values()])))),
    "percentile": (
        {"percentile": 20},
        lambda v: below(v, np.percentile(np.concatenate([x.ravel() for x in v.values()]).astype(np.float64), 20)),
    ),
}


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_is_what_numpy_says(shared, target):
    asked, oracle = TARGETS[target]
    _, results = run_plain(tiny(train=TRAIN, prune={**PRUNE, "target": asked, "min_keep": 0}), shared)
    params, masks = network(shared, results["prune"])
    expected = oracle(magnitudes(shared, results))
    assert_masks(masks, expected)
    trained, _ = network(shared, results["train"])
    for path, w in trained.items():
        np.testing.assert_array_equal(params[path], np.where(expected.get(path, True), w, 0))


def each(values, count_of):
    return {path: lowest({path: v}, count_of(v))[path] for path, v in values.items()}


def shares(values):
    """The scores of Lee et al. 2021: squares over the sum of those that are not smaller."""
    return np.array([[x**2 / np.square(values[values >= x], dtype=np.float64).sum() for x in row] for row in values])


SCOPES = {
    "layer": ({"scope": "layer", "target": {"sparsity": 0.5}}, lambda v: each(v, lambda x: round(0.5 * x.size))),
    "layer threshold": (
        {"scope": "layer", "target": {"statistic": "mean"}},
        lambda v: {path: x >= np.float32(x.mean(dtype=np.float64)) for path, x in v.items()},
    ),
    "lamp": (
        {"scope": "lamp", "target": {"sparsity": 0.5}},
        lambda v: lowest({p: shares(x) for p, x in v.items()}, 21),
    ),
    "table": (
        {"scope": {"hidden_*": 0.25, "output": 0.75}, "target": None},
        lambda v: {
            p: each({p: x}, lambda x, p=p: round((0.25 if "hidden" in p else 0.75) * x.size))[p] for p, x in v.items()
        },
    ),
    "table first fits": (
        {"scope": {"*": 0.5, "output": 0.75}, "target": None},
        lambda v: each(v, lambda x: round(0.5 * x.size)),
    ),
    "exclude": (
        {"exclude": ["output"], "target": {"sparsity": 0.5}},
        lambda v: each({p: x for p, x in v.items() if "output" not in p}, lambda x: round(0.5 * x.size)),
    ),
}


@pytest.mark.parametrize("scope", SCOPES)
def test_every_scope_is_what_numpy_says(shared, scope):
    asked, oracle = SCOPES[scope]
    _, results = run_plain(tiny(train=TRAIN, prune={**PRUNE, **asked}), shared)
    assert_masks(network(shared, results["prune"])[1], oracle(magnitudes(shared, results)))


def test_erk_shares_out_exactly_and_spares_the_small(shared):
    _, results = run_plain(tiny(train=TRAIN, prune={**PRUNE, "scope": "erk"}), shared)
    masks = network(shared, results["prune"])[1]
    left = {path: int(m.sum()) for path, m in masks.items()}
    assert sum(left.values()) == 42 - 21
    # densities eps * (in + out) / (in * out): hidden [4, 6] and output [6, 3]
    raw = {"hidden_0/kernel": 10, "output/kernel": 9}
    assert left["hidden_0/kernel"] == pytest.approx(21 * raw["hidden_0/kernel"] / 19, abs=0.5)
    values = magnitudes(shared, results)
    assert_masks(masks, each(values, lambda v: v.size - left[next(p for p in values if values[p] is v)]))


def test_a_neuron_dies_with_its_incoming_weights_and_its_bias(shared):
    prune = {**PRUNE, "granularity": "neuron", "exclude": ["output"]}
    _, results = run_plain(tiny(train=TRAIN, prune=prune), shared)
    params, masks = network(shared, results["prune"])
    importance = magnitudes(shared, results)["hidden_0/kernel"].sum(0)
    alive = lowest({"": importance}, 3)[""]
    np.testing.assert_array_equal(masks["hidden_0/kernel"], np.broadcast_to(alive, (4, 6)))
    np.testing.assert_array_equal(masks["hidden_0/bias"], alive)
    assert not params["hidden_0/kernel"][:, ~alive].any()
    assert not params["hidden_0/bias"][~alive].any()


def units_of(values, granularity):
    """(path, places) of each unit: slow loops over the trained kernels."""
    for path, w in values.items():
        *lead, inputs, outputs = (range(n) for n in w.shape)
        rows, columns = granularity["block"] if isinstance(granularity, dict) else (1, 1)
        corners = itertools.product(inputs[::rows], outputs[::columns])
        if granularity == "kernel":
            yield from ((path, [(*p, i, o) for p in itertools.product(*lead)]) for i, o in corners)
            continue
        for where, (top, left) in itertools.product(itertools.product(*lead), list(corners)):
            block = itertools.product(inputs[top : top + rows], outputs[left : left + columns])
            yield path, [(*where, i, o) for i, o in block]


@pytest.mark.parametrize("rounds", sparing([1, 2], [1]))
@pytest.mark.parametrize("granularity", ["kernel", {"block": [4, 3]}], ids=str)
def test_units_of_kernels_die_together(shared, granularity, rounds):
    model = {"kind": "cnn", "widths": [2], "dense": [5], "kernel": 3}
    prune = {**PRUNE, "granularity": granularity, "schedule": {"kind": "iterative", "rounds": rounds}, "min_keep": 1}
    _, results = run_plain(tiny("images", model=model, train=TRAIN, prune=prune, evaluate=EVALUATE), shared)
    params, masks = network(shared, results["prune"])
    values = magnitudes(shared, results)
    units = list(units_of(values, granularity))
    whole = 12 if granularity != "kernel" else None
    ranks = [
        np.float32(sum(values[path][p].item() for p in places) * (whole or len(places)) / len(places))
        for path, places in units
    ]
    best = {
        path: max((r, i) for i, (r, (at, _)) in enumerate(zip(ranks, units, strict=True)) if at == path)[1]
        for path in values
    }
    order = [i for i in np.argsort(ranks, kind="stable") if i not in best.values()]
    expected = {path: np.ones(v.shape, bool) for path, v in values.items()}
    for i in order[: round(0.5 * len(units))]:
        for place in units[i][1]:
            expected[units[i][0]][place] = False
    assert_masks(masks, expected)
    assert all(not params[path][~mask].any() for path, mask in masks.items())
    scores = part(arrays(shared, results["prune.1.score"]), "scores")
    assert sum(s.size for s in scores.values()) == len(units) == results["prune.1.score"].metrics["units"]
    np.testing.assert_allclose(np.concatenate([s.ravel() for s in scores.values()]), ranks, rtol=1e-5)


def test_two_of_four_inputs_stay(shared):
    """hidden [4, 6] has one group for each output; output [6, 3] a group and a tail of two, which both may live."""
    prune = {"kind": "prune", "criterion": "magnitude", "granularity": "2:4", "finetune": {"steps": 3}}
    prune["guard"] = {"max_drop": 1.0}
    _, results = run_plain(tiny(train=TRAIN, prune=prune, evaluate=EVALUATE), shared)
    params, masks = network(shared, results["prune"])
    expected = {}
    for path, w in magnitudes(shared, results).items():
        expected[path] = np.ones(w.shape, bool)
        for o in range(w.shape[1]):
            expected[path][np.argsort(w[:4, o], kind="stable")[:2], o] = False
    assert_masks(masks, expected)
    assert all(not params[path][~mask].any() for path, mask in masks.items())
    assert results["evaluate"].metrics[results["prune"].key]["sparsity"] == pytest.approx((12 + 6) / 42)
    scores = part(arrays(shared, results["prune.1.score"]), "scores")
    assert {path: s.shape for path, s in scores.items()} == {path: m.shape for path, m in masks.items()}


@pytest.mark.parametrize(
    "apart",
    [
        ({"granularity": "2:4"}, {}),
        ({"granularity": {"block": [2, 2]}}, {"target": {"sparsity": 0.5}}),
        ({"granularity": "kernel"}, {"target": {"keep": 20}}),
    ],
    ids=str,
)
def test_score_and_mask_apart_do_what_prune_does(shared, apart):
    score, how_many = apart
    criterion = {"criterion": "snip"}
    prune = {"kind": "prune", **criterion, **score, **how_many}
    stages = {
        "train": TRAIN,
        "score": {"kind": "score", **criterion, **score},
        "mask": {"kind": "mask", **how_many},
        "prune": {**prune, "after": "train"},
    }
    _, results = run_plain(tiny(**stages), shared)
    assert results["mask"].key == results["prune.1.mask"].key
    same_bytes(*(network(shared, results[name])[1] for name in ("mask", "prune")))


def test_n_of_m_after_weights_revives_nothing(shared):
    first = {**PRUNE, "target": {"sparsity": 0.3}}
    then = {"kind": "prune", "criterion": "magnitude", "granularity": "2:4"}
    _, results = run_plain(tiny(train=TRAIN, first=first, then=then), shared)
    before, after = (network(shared, results[name])[1] for name in ("first", "then"))
    for path in before:
        assert not (after[path] & ~before[path]).any()
        assert np.all(after[path][:4].sum(axis=0) <= 2)


@pytest.mark.parametrize(
    ("granularity", "told"),
    [
        (
            {"granularity": "2:8"},
            "stages.prune.granularity = '2:8': 2:8 needs a kernel [.., in, out] of 8 inputs or more",
        ),
        (
            {"criterion": "taylor", "granularity": {"block": [2, 2]}, "target": {"sparsity": 0.5}},
            "stages.prune.granularity = {'block': [2, 2]}: granularity {block: [2, 2]} is not possible here "
            "(allowed: weight, n:m such as '2:4', group, layer)",
        ),
        (
            {"granularity": {"block": [2, 2]}, "target": {"keep": 13}},
            "stages.prune.target = {'keep': 13}: keep = 13: must be a whole number from 1 to 12",
        ),
    ],
    ids=str,
)
def test_units_that_the_network_does_not_have_are_refused_before_anything_runs(shared, granularity, told):
    with pytest.raises(UserMistake) as caught:
        run_plain(tiny(train=TRAIN, prune={"kind": "prune", "criterion": "magnitude", **granularity}), shared)
    assert str(caught.value).startswith(f"tiny: {told}")


def test_magnitude_with_keep_is_the_projection(shared):
    """min ||W - W'||^2 s.t. ||W'||_0 <= k: no other choice of k weights is nearer."""
    raw = tiny(
        "numbers",
        objective="regression",
        model={"kind": "linear"},
        train=TRAIN,
        prune={**PRUNE, "target": {"keep": 3}},
    )
    _, results = run_plain(raw, shared)
    dense, sparse = (network(shared, results[n])[0]["output/kernel"].ravel() for n in ("train", "prune"))
    assert np.count_nonzero(sparse) == 3
    best = min(sum(dense[i] ** 2 for i in range(6) if i not in kept) for kept in itertools.combinations(range(6), 3))
    assert np.sum((dense - sparse) ** 2) == pytest.approx(best)
    assert set(sparse[sparse != 0]) <= set(dense)


@pytest.mark.parametrize("levels", ["geometric", "cubic"])
def test_keep_in_rounds_ends_at_exactly_so_many(shared, levels):
    schedule = {"kind": "iterative", "rounds": 3, "levels": levels}
    prune = {**PRUNE, "target": {"keep": 9}, "schedule": schedule, "finetune": {"steps": 2}}
    _, results = run_plain(tiny(train=TRAIN, prune=prune), shared)
    living = [
        sum(int(m.sum()) for m in network(shared, results[f"prune.{turn}.mask"])[1].values()) for turn in (1, 2, 3)
    ]
    share = 1 - 9 / 42
    sparsities = {
        "geometric": [1 - (1 - share) ** (r / 3) for r in (1, 2, 3)],
        "cubic": [share * (1 - (1 - r / 3) ** 3) for r in (1, 2, 3)],
    }[levels]
    assert living == [42 - round(s * 42) for s in sparsities]
    assert living[-1] == 9


def test_what_is_dead_stays_dead_over_rounds(shared):
    prune = {**PRUNE, "schedule": {"kind": "iterative", "rounds": 3}, "criterion": "random", "finetune": {"steps": 2}}
    _, results = run_plain(tiny(train=TRAIN, prune=prune), shared)
    rounds = [network(shared, results[f"prune.{turn}.finetune"]) for turn in (1, 2, 3)]
    for (_, before), (params, after) in itertools.pairwise(rounds):
        for path in before:
            assert not (after[path] & ~before[path]).any()
            assert not params[path][~after[path]].any()


@pytest.mark.parametrize(("rewind", "step"), [("initialisation", 0), ({"step": 3}, 3)])
def test_rewinding_starts_from_the_early_weights_under_the_new_masks(shared, rewind, step):
    finetune = {"steps": 1, "optimizer": HELD_STILL, "rewind": rewind}
    raw = tiny(train=TRAIN, prune={**PRUNE, "finetune": finetune})
    _, results = run_plain(raw, shared)
    early, _ = network(shared, results["prune.1.rewind"])
    late, _ = network(shared, results["train"])
    params, masks = network(shared, results["prune"])
    assert results["prune.1.rewind"].metrics["steps"] == step
    for path, w in early.items():
        np.testing.assert_array_equal(params[path], np.where(masks.get(path, True), w, 0), err_msg=path)
    assert any((early[path] != late[path]).any() for path in early)


def test_a_rewound_learning_rate_repeats_the_trainings_end_on_the_weights_that_there_are(shared):
    training = {**TRAIN, "optimizer": {**HELD_STILL, "decay_to": 0.5}}
    rewind = {"rewind": {"learning_rate": {"step": 3}}}
    plan, results = run_plain(tiny(train=training, finetune={"kind": "finetune", **rewind}), shared)
    assert plan.calls[-1].settings == {"optimizer": training["optimizer"], "steps": 8, "begin_step": 3}
    assert plan.calls[-1].label == "finetune · 8 steps from step 3"
    assert plan.after["finetune"] == ("train",)
    assert arrays(shared, results["finetune"])["losses"].shape == (5,)
    same_bytes(*(network(shared, results[name])[0] for name in ("train", "finetune")))


def test_a_search_finds_the_threshold_that_cross_validation_prefers(shared):
    search = {"amounts": [0.05, 5.0], "folds": 2}
    prune = {**PRUNE, "target": {"threshold": 0.1}, "min_keep": 1, "search": search}
    _, results = run_plain(tiny(train={**TRAIN, "steps": 60}, prune=prune), shared)
    facts = shared.meta(results["prune"].ref)["facts"]
    table = {row["threshold"]: row for row in facts["search"]["table"]}
    assert facts["search"]["chosen"] == 0.05
    assert table[0.05]["mean"] > table[5.0]["mean"]
    assert table[5.0]["sparsity"] > 0.9
    for fold in (1, 2):
        assert results[f"prune.fold {fold}"].status == "ran"


MODELS = {
    "linear": ("blobs", {"kind": "linear"}, "classification"),
    "mlp": ("blobs", {"kind": "mlp", "widths": [5, 4], "batch_norm": True, "dropout": 0.1}, "classification"),
    "cnn": ("images", {"kind": "cnn", "widths": [2], "dense": [4], "kernel": 3}, "classification"),
    "resnet": ("images", {"kind": "resnet", "depth": 8, "width": 2}, "classification"),
    "autoencoder": ("blobs", {"kind": "autoencoder", "widths": [4], "code": 2}, "reconstruction"),
    "gru": ("series", {"kind": "rnn", "width": 4}, "classification"),
    "lstm": ("series", {"kind": "rnn", "cell": "lstm", "width": 4}, "classification"),
    "transformer": ("series", {"kind": "transformer", "dim": 4, "heads": 2, "layers": 1}, "classification"),
    "tokens": ("tokens", {"kind": "transformer", "dim": 4, "heads": 2, "layers": 1, "vocab": 6}, "classification"),
    "regression": ("numbers", {"kind": "mlp", "widths": [4], "activation": "sigmoid"}, "regression"),
    "nnx": ("blobs", {"kind": "tests.samples.nets:NnxNet", "args": {"width": 5}}, "classification"),
    "linen": ("blobs", {"kind": "tests.samples.nets:LinenNet", "args": {"width": 5}}, "classification"),
    "user's loss": ("numbers", {"kind": "linear"}, "tests.samples.tiny:absolute_error"),
}


# What takes long to compile is scored by its weights alone and not trained on, or left to the slow tests.
TRAINED_ON = ("mlp", "gru", "nnx", "linen", "autoencoder", "regression")
SLOW = ("cnn", "regression", "resnet", "gru", "lstm", "transformer", "tokens", "linen", "nnx", "autoencoder")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in MODELS])
def test_every_model_and_objective_runs_from_training_to_evaluation(shared, kind):
    data, model, objective = MODELS[kind]
    recovery = {"steps": 2, "optimizer": {"name": "sgd", "learning_rate": 0.01, "momentum": 0.9}}
    more = {"criterion": "taylor", "finetune": recovery} if kind in TRAINED_ON else {}
    prune = {**PRUNE, "min_keep": 1, **more}
    stages = {"train": {**TRAIN, "steps": 3}, "prune": prune, "evaluate": EVALUATE}
    _, results = run_plain(tiny(data, model=model, objective=objective, **stages), shared)
    params, masks = network(shared, results["prune"])
    total = sum(m.size for m in masks.values())
    assert sum(int(m.sum()) for m in masks.values()) == total - round(0.5 * total)
    assert all(not params[path][~mask].any() for path, mask in masks.items())
    metric = {"classification": "accuracy", "regression": "mse", "reconstruction": "mse"}.get(objective)
    for name in ("train", "prune"):
        found = results["evaluate"].metrics[results[name].key]
        assert np.isfinite(found["loss"])
        assert metric is None or np.isfinite(found[metric])
        assert found["params"] == sum(w.size for w in params.values())
    assert {"validation_loss"} <= set(results["prune"].metrics)


def softmax_loss(logits, y):
    shifted = logits - logits.max(1, keepdims=True)
    return float(np.mean(np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(y)), y]))


def test_an_evaluation_is_what_numpy_says(shared):
    from tests.samples.tiny import blobs

    timed = {**EVALUATE, "latency": {"batch_sizes": [1, 3]}}
    _, results = run_plain(tiny(train=TRAIN, prune=PRUNE, evaluate=timed), shared)
    data = blobs()
    for name in ("train", "prune"):
        params, masks = network(shared, results[name])
        hidden = np.maximum(data["x_test"].astype(np.float32) @ params["hidden_0/kernel"] + params["hidden_0/bias"], 0)
        logits = hidden @ params["output/kernel"] + params["output/bias"]
        found = results["evaluate"].metrics[results[name].key]
        assert found["accuracy"] == pytest.approx(np.mean(logits.argmax(1) == data["y_test"]))
        assert found["loss"] == pytest.approx(softmax_loss(logits, data["y_test"]), rel=1e-4)
        assert found["params"] == 4 * 6 + 6 + 6 * 3 + 3 == 51
        assert found["nonzero"] == sum(np.count_nonzero(w) for w in params.values())
        dead = sum(int((~m).sum()) for m in masks.values())
        assert found["sparsity"] == pytest.approx(dead / 42 if masks else 0)
        assert found["sparsity_total"] == pytest.approx(dead / 51)
        assert found["macs"] == 42
        assert found["effective_macs"] == 42 - dead
        assert found["bytes"] > 51 * 4
        assert found["layers"]["hidden_0/kernel"]["shape"] == [4, 6]
        assert found["layers"]["hidden_0/bias"]["prunable"] is False
        assert set(found["latency_ms"]) == {"1", "3"}
        assert all(0 < t["p50"] <= t["p90"] for t in found["latency_ms"].values())


def test_validation_metrics_are_of_the_validation_split(shared):
    from prune_jax.datasets import load

    _, results = run_plain(tiny(), shared)
    split = load("tests.samples.tiny:blobs", validation=0.2).validation
    params, _ = network(shared, results["prune"])
    hidden = np.maximum(split["x"] @ params["hidden_0/kernel"] + params["hidden_0/bias"], 0)
    logits = hidden @ params["output/kernel"] + params["output/bias"]
    assert len(split["x"]) == 8
    assert results["prune"].metrics["validation_accuracy"] == pytest.approx(np.mean(logits.argmax(1) == split["y"]))
    assert results["prune"].metrics["validation_loss"] == pytest.approx(softmax_loss(logits, split["y"]), rel=1e-4)


def test_without_a_validation_split_there_are_no_validation_metrics(shared):
    _, results = run_plain(tiny(validation=0), shared)
    assert not [m for m in results["train"].metrics if m.startswith("validation")]
    assert results["train"].metrics["train_loss"] > 0


def test_a_users_criterion(shared):
    prune = {**PRUNE, "criterion": "tests.samples.tiny:by_position", "scope": "layer"}
    _, results = run_plain(tiny(train=TRAIN, prune=prune), shared)
    masks = network(shared, results["prune"])[1]
    for mask in masks.values():
        np.testing.assert_array_equal(mask.ravel(), np.arange(mask.size) >= mask.size / 2)


@pytest.mark.parametrize("batches", [1, 2, None])
def test_scores_are_of_so_many_batches(shared, batches):
    criterion = {"name": "sensitivity", "batches": batches}
    raw = tiny(
        "numbers",
        objective="regression",
        model={"kind": "linear"},
        train=TRAIN,
        score={"kind": "score", "criterion": criterion},
    )
    _, results = run_plain(raw, shared)
    from prune_jax.datasets import load

    split = load("tests.samples.tiny:numbers", validation=0.2).train
    params, _ = network(shared, results["train"])
    gradients = []
    for i in range(0, len(split["x"]), 9)[:batches]:
        x, y = split["x"][i : i + 9], split["y"][i : i + 9]
        error = x @ params["output/kernel"] + params["output/bias"] - y
        gradients.append((np.abs(x.T @ error * 2 / y.size), len(x)))
    expected = sum(g * n for g, n in gradients) / sum(n for _, n in gradients)
    found = arrays(shared, results["score"])["scores/output/kernel"]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_obd_with_gauss_newton_is_that_of_softmax_regression_in_the_last_layer(shared):
    """The logits are linear in its weights; their cross entropy bends by p (1 - p) along each."""
    criterion = {"name": "obd", "options": {"curvature": "gauss_newton", "probes": 4000}}
    score = {"kind": "score", "criterion": criterion, "exclude": ["hidden_0"]}
    _, results = run_plain(tiny(train=TRAIN, score=score), shared)
    from prune_jax.datasets import load

    x = load("tests.samples.tiny:blobs", validation=0.2).train["x"].astype(np.float64)
    params, _ = network(shared, results["train"])
    h = np.maximum(x @ params["hidden_0/kernel"] + params["hidden_0/bias"], 0)
    e = np.exp(h @ params["output/kernel"] + params["output/bias"])
    p = e / e.sum(axis=1, keepdims=True)
    expected = params["output/kernel"] ** 2 * ((h**2).T @ (p * (1 - p)) / len(x)) / 2
    found = arrays(shared, results["score"])
    np.testing.assert_allclose(found["scores/output/kernel"], expected, atol=0.03 * expected.max())
    assert "scores/hidden_0/kernel" not in found


def test_the_same_recipe_gives_the_same_bytes_in_another_store(tmp_path):
    prune = {**PRUNE, "criterion": "random", "finetune": {"steps": 2}}
    raw = tiny(model={"kind": "mlp", "widths": [5], "dropout": 0.5}, train=TRAIN, prune=prune)
    stores = [Store(tmp_path / name) for name in "ab"]
    first, second = (run_plain(raw, s)[1] for s in stores)
    assert {n: r.key for n, r in first.items()} == {n: r.key for n, r in second.items()}
    for _name, result in first.items():
        same_bytes(arrays(stores[0], result), arrays(stores[1], result))


def test_a_second_run_computes_nothing(store):
    raw = tiny()
    _, first = run_plain(raw, store)
    written = {p: p.stat().st_mtime_ns for p in Path(store.root).rglob("*") if p.is_file() and p.suffix != ".lock"}
    _, second = run_plain(raw, store)
    assert {r.status for r in first.values()} == {"ran"}
    assert {r.status for r in second.values()} == {"cached"}
    assert written == {
        p: p.stat().st_mtime_ns for p in Path(store.root).rglob("*") if p.is_file() and p.suffix != ".lock"
    }
    for name in second:
        assert second[name].metrics == first[name].metrics


def test_a_damaged_artifact_is_made_anew_and_only_that(store):
    raw = tiny()
    _, first = run_plain(raw, store)
    before = arrays(store, first["train"])
    file = max(
        (Path(store.path(first["train"].ref)) / "arrays").rglob("*"), key=lambda p: p.stat().st_size * p.is_file()
    )
    os.truncate(file, 10)
    _, second = run_plain(raw, store)
    assert second["train"].status == "ran"
    assert second["prune"].status == second["evaluate"].status == "cached"
    same_bytes(arrays(store, second["train"]), before)


def test_a_damaged_parent_is_never_trusted(store):
    raw = tiny(train=TRAIN, prune=PRUNE)
    _plan, first = run_plain(raw, store)
    other = prepare(read_recipe(tiny(train=TRAIN, score={"kind": "score", "criterion": "snip"}))).calls[-1]
    meta = Path(store.path(first["train"].ref)) / "meta.json"
    meta.write_text("cut off")
    with pytest.raises(DamagedArtifactError) as caught:
        run_stage(other, store)
    assert str(caught.value).startswith(f"train/{first['train'].key}: ")
    assert str(caught.value).endswith("Run the recipe again: it will be made anew.")
    assert not store.intact(other.ref)


def test_a_disturbed_stage_goes_on_from_its_step_checkpoint(tmp_path, monkeypatch):
    from prune_jax import training

    monkeypatch.setattr(training, "BEAT_SECONDS", 0.0)
    monkeypatch.setattr(training, "CHECKPOINT_SHARE", 0)
    raw = tiny(train={**TRAIN, "checkpoint_seconds": 0, "steps": 12})
    call = prepare(read_recipe(raw)).calls[0]
    store = Store(tmp_path / "a")

    def disturb(progress):
        if progress.done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(call, store, report=disturb)
    assert store.meta(call.ref) is None
    resumed = run_stage(call, store)
    assert resumed.metrics["resumed_from_step"] == 7
    whole = run_stage(call, other := Store(tmp_path / "b"))
    same_bytes(arrays(store, resumed), arrays(other, whole))
    assert not Path(store.work(call.ref)).exists()


FAILURES = {
    "diverging": (
        tiny(train={**TRAIN, "optimizer": {"name": "sgd", "learning_rate": 1e30}, "steps": 30}),
        "train",
        ["the loss became", "at step ", " of 30, at learning rate 1e+30 (sgd). Lower `optimizer.learning_rate`"],
    ),
    "collapse": (
        tiny(train=TRAIN, prune={**PRUNE, "target": {"keep": 1}}),
        "prune.1.mask",
        ["Pruning would leave nothing alive in '", "Set min_keep to 1 or more"],
    ),
    "threshold": (
        tiny(train=TRAIN, prune={**PRUNE, "target": {"threshold": 1e6}}),
        "prune.1.mask",
        ["Pruning would leave nothing alive in 'hidden_0/kernel' (all 24), 'output/kernel' (all 18)"],
    ),
    "nan": (
        tiny(train=TRAIN, prune={**PRUNE, "criterion": "tests.samples.tiny:broken"}),
        "prune.1.score",
        ["Criterion 'tests-broken' gave 24 of 24 non-finite scores in 'hidden_0/kernel' [4, 6], the first at (0, 0)"],
    ),
    "guard": (
        tiny(
            train={**TRAIN, "steps": 60},
            prune={
                **PRUNE,
                "target": {"sparsity": 0.9},
                "min_keep": 1,
                "guard": {"max_drop": 0.0, "breach": {"action": "fail"}, "metric": "loss"},
            },
        ),
        "prune",
        ["the guard was breached at round 1: loss went from "],
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_told_is_not_kept_as_a_success_and_keeps_what_was_done(store, case):
    raw, stage, texts = FAILURES[case]
    _, results = run_plain(raw, store, name_failures=False)
    assert results[stage].status == "failed"
    for text in texts:
        assert text in results[stage].message, results[stage].message
    assert not results[stage].user_mistake
    for result in results.values():
        assert store.intact(result.ref) == result.good
    _, again = run_plain(raw, store, name_failures=False)
    for name, result in again.items():
        assert result.status == ("cached" if results[name].good else results[name].status)
        assert result.message == results[name].message


def test_a_training_that_ends_in_infinity_is_no_success_without_a_validation_split(store):
    """The last step's weights are looked at by nobody else."""
    train = {"kind": "train", "steps": 1, "optimizer": {"name": "sgd", "learning_rate": 1e39}}
    raw = tiny("numbers", objective="regression", model={"kind": "linear"}, validation=0, train=train)
    raw["data"]["args"] = {"scale": 1e4}
    _, results = run_plain(raw, store, name_failures=False)
    assert results["train"].status == "failed"
    assert results["train"].message.startswith("the weights became infinite at step 1 of 1, at learning rate 1e+39")


def test_data_that_change_during_a_run_are_refused(store, tmp_path):
    from prune_jax.errors import UserMistake
    from tests.samples.tiny import blobs

    file = tmp_path / "d.npz"
    np.savez(file, **{k: v for k, v in blobs().items() if k != "note"})
    raw = tiny(train=TRAIN) | {"data": {"source": "npz", "path": str(file)}}
    call = prepare(read_recipe(raw)).calls[0]
    np.savez(file, **{k: v for k, v in blobs(spread=0.6).items() if k != "note"})
    os.utime(file, (1, 1))
    with pytest.raises(UserMistake, match="the data changed while the recipe was running"):
        run_stage(call, store)


def test_the_meta_of_an_artifact_tells_how_to_make_it_again(shared):
    from prune_jax.recipe import StageCall

    plan, results = run_plain(tiny(), shared)
    for call in plan.calls:
        told = StageCall.model_validate(shared.meta(call.ref)["call"])
        assert (told.key, told.settings, told.seed, told.problem) == (call.key, call.settings, call.seed, call.problem)
        assert shared.meta(call.ref)["metrics"] == results[call.name].metrics
        assert shared.meta(call.ref)["seconds"] > 0


def test_what_was_pruned_stays_pruned_where_a_later_pruning_does_not_look(store):
    prune = {"kind": "prune", "criterion": "magnitude"}
    recovery = {"steps": 3, "optimizer": {"learning_rate": 0.01}}
    second = {**prune, "exclude": ["output"], "target": {"sparsity": 0.8}, "finetune": recovery}
    raw = tiny(train=TRAIN, first={**prune, "target": {"sparsity": 0.5}}, second=second)
    _, results = run_plain(raw, store)
    kernels = [store.read(results[name].ref)[0]["params"]["output"]["kernel"] for name in ("first", "second")]
    assert (kernels[0] == 0).any()
    assert (kernels[1][kernels[0] == 0] == 0).all()
