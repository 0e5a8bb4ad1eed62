"""Learning from a teacher: losses and gradients against numpy, training against a plain loop of Optax, stages."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import prune_jax as pj
from prune_jax import training
from prune_jax.checkpoints import Store
from prune_jax.distillation import Lesson, feature_losses, kernels_seen, soft_loss
from prune_jax.errors import UserMistake
from prune_jax.networks import columns_of
from prune_jax.plan import make_plan
from prune_jax.preparation import prepare
from prune_jax.problems import data_of
from prune_jax.recipe import StageResult, read_recipe
from prune_jax.roles import lineage, role_of
from prune_jax.rounds import prune_rounds
from prune_jax.stages import run_stage
from prune_jax.training import Teacher, make_optimizer
from prune_jax.trees import leaves_by_path
from tests.compiling import compilations
from tests.plain import PRUNE, TRAIN, arrays, part, run_plain, same_bytes, tiny
from tests.test_training import ADAM, data, half, network, same, start, train

LOGITS = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32) * 3


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_hand(z, v, temperature):
    p, q = softmax(v.astype(np.float64) / temperature), softmax(z.astype(np.float64) / temperature)
    return temperature**2 * (p * (np.log(p) - np.log(q))).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_soft_loss_and_its_gradient_are_those_by_hand(temperature):
    z, v = LOGITS
    found, gradient = jax.jvp(lambda z: soft_loss(z, v, temperature=temperature), (z,), (jnp.ones_like(z),))
    np.testing.assert_allclose(found, by_hand(z, v, temperature), rtol=1e-4)
    np.testing.assert_allclose(gradient, 0, atol=1e-5)  # it does not see a shift of all logits
    gradient = jax.grad(lambda z: soft_loss(z, v, temperature=temperature).sum())(z)
    expected = temperature**2 * (softmax(z / temperature) - softmax(v / temperature)) / temperature
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)
    assert not jax.grad(lambda v: soft_loss(z, v, temperature=temperature).sum())(v).any()


def test_at_high_temperature_logits_are_matched_about_their_means():
    z, v = LOGITS
    centred = (z - z.mean(1, keepdims=True)) - (v - v.mean(1, keepdims=True))
    np.testing.assert_allclose(soft_loss(z, v, temperature=300.0), (centred**2).mean(1) / 2, rtol=0.02)


def test_numbers_are_matched_by_their_squared_difference():
    z, v = LOGITS
    np.testing.assert_allclose(soft_loss(z, v, temperature=None), ((z - v) ** 2).mean(1), rtol=1e-5)
    whole = soft_loss(LOGITS, LOGITS[::-1], temperature=None)  # of outputs with more axes, their mean
    np.testing.assert_allclose(whole, ((z - v) ** 2).mean() * np.ones(2), rtol=1e-5)
    with pytest.raises(UserMistake, match=r"the student answers \[5, 4\], its teacher \[5, 3\]"):
        soft_loss(z, v[:, :3], temperature=None)


def mlp(params, x):
    hidden = jax.nn.relu(x @ params["a"] + params["b"][None])
    return hidden @ params["c"]


def weights(seed, width=6):
    rng = np.random.default_rng(seed)
    shapes = {"a": (3, width), "b": (width,), "c": (width, 4)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def cross_entropies(outputs, batch):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["y"])


BATCH = {"x": np.random.default_rng(1).normal(size=(7, 3)).astype(np.float32), "y": np.arange(7) % 4}


def hidden_by_hand(params):
    return np.maximum(BATCH["x"] @ params["a"] + params["b"], 0)


def test_a_distilled_loss_is_that_by_hand_and_holds_the_teacher_as_an_argument():
    student, teacher = weights(0), weights(1)
    loss = pj.distilled(cross_entropies, mlp, mlp, teacher, temperature=2.0, soft=0.7, features={"c": 0.5, "[ac]": 2.0})
    z, v = (hidden_by_hand(p) @ p["c"] for p in (student, teacher))
    hard = -np.log(softmax(z)[np.arange(7), BATCH["y"]]).mean()
    features = 0.5 * ((hidden_by_hand(student) - hidden_by_hand(teacher)) ** 2).mean()  # a sees the same x in both
    expected = 0.3 * hard + 0.7 * by_hand(z, v, 2.0).mean() + features
    jitted = jax.jit(lambda loss, params, batch: loss(params, batch))
    np.testing.assert_allclose(jitted(loss, student, BATCH), expected, rtol=1e-5)
    assert not jax.make_jaxpr(jitted)(loss, student, BATCH).jaxpr.constvars
    again = pj.distilled(
        cross_entropies, mlp, mlp, weights(2), temperature=2.0, soft=0.7, features={"c": 0.5, "[ac]": 2.0}
    )
    with compilations() as seconds:
        assert float(jitted(again, student, BATCH)) != float(jitted(loss, student, BATCH))
    assert not seconds
    with pytest.raises(UserMistake, match=r"soft = 1\.5: must be from 0"):
        pj.distilled(cross_entropies, mlp, mlp, teacher, soft=1.5)
    with pytest.raises(UserMistake, match="temperature = 0"):
        pj.distilled(cross_entropies, mlp, mlp, teacher, temperature=0)


def test_features_of_a_compact_student_are_the_teachers_units_that_it_has():
    whole = weights(0)
    net = pj.trace(mlp, whole, BATCH["x"])
    small = net.compact({"a.out": [1, 4]}, weights(3))
    alive = [0, 2, 3, 5]
    student = kernels_seen(small.apply, small.params, BATCH["x"])
    teacher = kernels_seen(mlp, whole, BATCH["x"])
    found = feature_losses(student, teacher, {"c": 1.0}, small.keep)
    expected = ((hidden_by_hand(weights(3))[:, alive] - hidden_by_hand(whole)[:, alive]) ** 2).mean()
    np.testing.assert_allclose(found["c"], expected, rtol=1e-5)
    with pytest.raises(UserMistake, match=r"'c' sees \[7, 4\] in the student but \[7, 6\] in the teacher"):
        feature_losses(student, teacher, {"c": 1.0}, {})
    with pytest.raises(UserMistake, match=r"'d' fits no kernel whose inputs can be seen .*\(those are: a, c\)"):
        feature_losses(student, teacher, {"d": 1.0}, {})
    with pytest.raises(UserMistake, match="the teacher has a layer 'c', but the student has it no more"):
        feature_losses({"a": student["a"]}, teacher, {"c": 1.0}, {})


def test_features_keep_derivatives_of_their_own():
    """A straight-through rounding has none of its body's."""

    @jax.custom_vjp
    def rounded(x):
        return jnp.round(x)

    rounded.defvjp(lambda x: (rounded(x), None), lambda _, g: (g,))

    def apply(params, x):
        return rounded(x @ params["a"]) @ params["c"]

    def loss(params):
        return feature_losses(kernels_seen(apply, params, BATCH["x"]), seen, {"c": 1.0}, {})["c"]

    params, seen = weights(0), kernels_seen(apply, weights(1), BATCH["x"])
    difference = np.round(BATCH["x"] @ params["a"]) - np.round(BATCH["x"] @ weights(1)["a"])
    np.testing.assert_allclose(jax.grad(loss)(params)["a"], BATCH["x"].T @ difference * 2 / 42, rtol=1e-4, atol=1e-5)


def teacher_for(net, **lesson):
    return Teacher(net, start(net, 7), Lesson(**lesson))


def test_without_a_share_of_the_teacher_it_is_the_plain_training_to_the_bit():
    net = network("linear", bias=True)
    masks = half(start(net).params)
    plain = train(net, epochs=1, masks=masks)
    taught = train(net, epochs=1, masks=masks, teacher=teacher_for(net, soft=0.0))
    same(taught.variables, plain.variables)
    same(taught.losses, plain.losses)


def test_a_step_heeds_labels_and_teacher_in_their_shares():
    net = network("linear", bias=True)
    found = train(net, steps=1, teacher=teacher_for(net, soft=0.6, temperature=3.0)).losses
    rows = np.random.default_rng([0, 0]).permutation(54)[:9]
    x, y = data()["x"][rows], data()["y"][rows]
    layers = [start(net, seed).params["output"] for seed in (0, 7)]
    z, v = (x @ layer["kernel"] + layer["bias"] for layer in layers)
    hard = -np.log(softmax(z)[np.arange(9), y]).mean()
    np.testing.assert_allclose(found, [0.4 * hard + 0.6 * by_hand(z, v, 3.0).mean()], rtol=1e-4)


@pytest.mark.slow
def test_it_is_the_training_that_optax_does():
    """Batch statistics are the student's alone."""
    net, steps = network(widths=[16], batch_norm=True), 4
    lesson = {"temperature": 3.0, "soft": 0.6, "features": (("output", 0.1),)}
    masks = half(start(net).params)
    fitted = train(net, steps=steps, masks=masks, teacher=teacher_for(net, **lesson))
    params, state = pj.apply_masks(start(net).params, masks), start(net).state
    tx, knows = pj.masked(make_optimizer(ADAM, steps), masks), start(net, 7)
    moments, losses = tx.init(params), []

    def answers(variables, x):  # at rest
        h = x @ variables.params["hidden_0"]["kernel"]
        norm, kept = variables.params["norm_0"], variables.state["norm_0"]
        h = (h - kept["mean"]) / np.sqrt(kept["var"] + 1e-5) * norm["scale"] + norm["bias"]
        h = np.maximum(h, 0)
        return h, h @ variables.params["output"]["kernel"] + variables.params["output"]["bias"]

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def graded(params, state, x, y, its, v, key):
        z, new = net.apply(params, state, (x,), train=True, key=key)
        hard = optax.softmax_cross_entropy_with_integer_labels(z, y).mean()
        soft = 9 * optax.losses.kl_divergence(jax.nn.log_softmax(z / 3), jax.nn.softmax(v / 3)).mean()
        h = x @ params["hidden_0"]["kernel"]
        h = (h - h.mean(0)[None]) / jnp.sqrt(h.var(0) + 1e-5)[None] * params["norm_0"]["scale"][None]
        h = jax.nn.relu(h + params["norm_0"]["bias"][None])
        return 0.4 * hard + 0.6 * soft + 0.1 * ((h - its) ** 2).mean(), new

    for i in range(steps):
        rows = np.random.default_rng([0, 0]).permutation(54)[9 * i :][:9]
        x, y = data()["x"][rows], data()["y"][rows]
        its, v = answers(knows, x)

        key = jax.random.fold_in(jax.random.key(0), i)
        (loss, state), gradients = graded(params, state, x, y, its, v, key)
        updates, moments = tx.update(gradients, moments, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    np.testing.assert_allclose(fitted.losses, losses, rtol=1e-4)
    for path, w in leaves_by_path(fitted.variables.params).items():
        np.testing.assert_allclose(w, leaves_by_path(params)[path], rtol=1e-3, atol=1e-4)
    for path, mask in leaves_by_path(masks).items():
        assert not leaves_by_path(fitted.variables.params)[path][~mask].any()


# Stages

DISTILL = {"kind": "distill", "steps": 6, "optimizer": {"learning_rate": 0.01}}
GROUPS = {**PRUNE, "granularity": "group"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("distill"))


def plan_of(**stages):
    return make_plan(read_recipe(tiny(**stages)), digest_of=lambda _: "d" * 64, code_of=lambda _: {})


def keys(**stages):
    return {call.name: call.key for call in plan_of(**stages).calls}


def test_the_teacher_is_an_edge_of_the_plan_and_in_the_key():
    stages = {"train": TRAIN, "other": {**TRAIN, "seed": 1}, "prune": {**PRUNE, "after": "train"}}
    plan = plan_of(**stages, student=DISTILL)
    assert plan.after["student"] == ("prune", "train")  # the dense training, left out
    calls = {call.name: call for call in plan.calls}
    assert calls["student"].inputs == {"network": calls["prune"].ref, "teacher": calls["train"].ref}
    assert calls["student"].origin.key == calls["train"].key
    plan = plan_of(**stages, student={**DISTILL, "teacher": "other"})
    assert plan.after["student"] == ("prune", "other")
    found = [keys(**stages, student={**DISTILL, **more})["student"] for more in ({}, {"teacher": "other"})]
    found += [keys(**stages, student={**DISTILL, **more})["student"] for more in ({"soft": 0.5}, {"temperature": 2})]
    found += [keys(**stages, student={**DISTILL, "kind": "finetune"})["student"]]
    assert len(set(found)) == 5
    assert found[0] == keys(**stages, student={**DISTILL, "teacher": "train", "soft": 0.9})["student"]


def test_rounds_are_distilled_towards_the_same_teacher():
    finetune = {"steps": 6, "optimizer": {"learning_rate": 0.01}, "distill": {"soft": 0.5}}
    plan = plan_of(train=TRAIN, longer={**DISTILL, "kind": "finetune"}, prune={**PRUNE, "finetune": finetune})
    named = {**finetune, "distill": {"soft": 0.5, "teacher": "longer"}}
    other = plan_of(train=TRAIN, longer={**DISTILL, "kind": "finetune"}, prune={**PRUNE, "finetune": named})
    assert (plan.after["prune"], other.after["prune"]) == (("longer", "train"), ("longer",))
    assert plan.calls[-1].key != other.calls[-1].key
    assert "teacher" not in other.calls[-1].settings["finetune"]["distill"]  # names are in no key


def test_a_stage_called_teacher_may_have_rows():
    teacher = {**TRAIN, "matrix": {"steps": [8, 9]}}
    raw = tiny(teacher=teacher, prune=PRUNE, student=DISTILL)
    plan = make_plan(read_recipe(raw), digest_of=lambda _: "d" * 64, code_of=lambda _: {})
    student = next(call for call in plan.calls if call.name == "student[steps=9]")
    assert list(student.inputs) == ["network", "teacher"]
    assert student.facts["teacher"] == "teacher[steps=9]"


def test_a_compact_student_learns_in_rounds_and_after_them(shared):
    stages = {
        "train": TRAIN,
        "prune": {**GROUPS, "finetune": {"steps": 3, "distill": {"features": {"output": 0.5}}}},
        "compact": {"kind": "compact"},
        "student": {**DISTILL, "features": {"output": 0.5}},
    }
    _, results = run_plain(tiny(**stages), shared)
    before, after = (part(arrays(shared, results[name]), "params") for name in ("compact", "student"))
    assert {p: a.shape for p, a in before.items()} == {p: a.shape for p, a in after.items()}
    assert any((before[path] != after[path]).any() for path in before)
    masked = arrays(shared, results["prune.1.distill"])
    for path, mask in part(masked, "masks").items():
        assert not part(masked, "params")[path][~mask].any()


def test_a_student_descends_from_its_network_and_not_from_its_teacher():
    stages = {
        "train": ("train", []),
        "longer": ("finetune", ["train"]),
        "compact": ("compact", ["train"]),
        "student": ("distill", ["compact", "longer"]),
        "dense": ("distill", ["train", "longer"]),
    }
    told = {name: {"kind": kind, "after": after} for name, (kind, after) in stages.items()}
    told["student"]["teacher"] = told["dense"]["teacher"] = "longer"
    record = {"stages": told, "results": {name: {"kind": stage["kind"]} for name, stage in told.items()}}
    assert [role_of(record, name) for name in stages] == [
        "dense",
        "dense, trained longer",
        "compact",
        "compact, distilled",
        "dense, distilled",
    ]
    assert lineage(record, "student") == ["student", "compact", "train"]


def test_the_teachers_units_are_found_in_a_teacher_that_was_cut_too():
    problem = plan_of(train=TRAIN).calls[0].problem
    problem = problem.model_copy(update={"data_digest": data_of(problem.data).digest})
    cut = [{"params": {"output": {"kernel": {"0": np.array(left)}}}} for left in ([1, 3], [0, 1, 3, 5])]
    columns = columns_of(problem, cut[0], cut[1])
    np.testing.assert_array_equal(columns["output/kernel"][0], [1, 2])
    np.testing.assert_array_equal(columns_of(problem, cut[0], None)["output/kernel"][0], [1, 3])
    assert columns_of(problem, None, None) == {}
    with pytest.raises(UserMistake, match=r"lacks units of 'output/kernel' .* must not be the smaller of the two"):
        columns_of(problem, cut[1], cut[0])


def test_a_student_goes_on_from_its_step_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "BEAT_SECONDS", 0.0)
    monkeypatch.setattr(training, "CHECKPOINT_SHARE", 0)
    raw = tiny(train=TRAIN, student={**DISTILL, "checkpoint_seconds": 0, "features": {"output": 1.0}})
    first, call = prepare(read_recipe(raw)).calls
    store, other = Store(tmp_path / "a"), Store(tmp_path / "b")

    def disturb(progress):
        if progress.done == 4:
            raise KeyboardInterrupt

    for each in (store, other):
        run_stage(first, each)
    with pytest.raises(KeyboardInterrupt):
        run_stage(call, store, report=disturb)
    resumed = run_stage(call, store)
    assert resumed.metrics["resumed_from_step"] == 4
    same_bytes(arrays(store, resumed), arrays(other, run_stage(call, other)))


def test_a_regression_matches_numbers(shared):
    _, results = run_plain(
        tiny(
            "numbers",
            model={"kind": "linear"},
            objective="regression",
            train=TRAIN,
            student={**DISTILL, "soft": 1.0, "steps": 1},
        ),
        shared,
    )
    losses = arrays(shared, results["student"])["losses"]
    np.testing.assert_allclose(losses, 0, atol=1e-10)  # it begins as its teacher


BAD = {
    "unknown": ({"teacher": "trian"}, "student.teacher = 'trian': names no stage; did you mean 'train'?"),
    "below": ({"teacher": "last"}, "student.teacher = 'last': names 'last', which does not come before it"),
    "kind": (
        {"teacher": "score"},
        "student.teacher = 'score': names 'score', a score stage, but distill takes a train",
    ),
    "share": ({"soft": 1.5}, "student.soft = 1.5: "),
    "weight": ({"features": {"output": 0}}, "student.features.output = 0: "),
    "pattern": (
        {"features": {"outptu": 1}},
        "student.features = {'outptu': 1.0}: 'outptu' fits no kernel whose inputs can be seen; did you mean 'output'? "
        "(those are: hidden_0/kernel, output/kernel)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_teacher_that_cannot_be_is_refused_before_anything_runs(shared, case):
    more, told = BAD[case]
    score = {"kind": "score", "criterion": "magnitude"}
    last = {"kind": "finetune", "after": "train", "steps": 1}
    with pytest.raises(UserMistake) as caught:
        run_plain(tiny(train=TRAIN, score=score, student={**DISTILL, "after": "train", **more}, last=last), shared)
    assert told in str(caught.value)


def test_a_temperature_needs_logits_and_a_search_its_own_teachers(shared):
    with pytest.raises(UserMistake, match=r"student\.temperature = 2: is one of class probabilities, but regression"):
        read_recipe(tiny("numbers", objective="regression", train=TRAIN, student={**DISTILL, "temperature": 2}))
    search = {"search": {"amounts": [0.1, 0.2], "folds": 2}}
    finetune = {"steps": 1, "distill": {"teacher": "train"}}
    with pytest.raises(UserMistake, match=r"prune\.finetune\.distill\.teacher = 'train': has seen what the folds"):
        read_recipe(tiny(train=TRAIN, prune={**PRUNE, **search, "finetune": finetune}))
    call = plan_of(train=TRAIN, prune={**PRUNE, **search, "finetune": {"steps": 1, "distill": {}}}).calls[-1]
    rounds, taught = prune_rounds(call, lambda ref: {}), []
    batch = next(rounds)
    try:
        while True:
            taught += [c.inputs["teacher"] == c.origin.ref for c in batch if c.kind == "distill"]
            good = {"validation_accuracy": 1.0, "sparsity": 0.5}
            batch = rounds.send(
                [StageResult(name="", kind=c.kind, key=c.key, status="ran", metrics=good) for c in batch]
            )
    except StopIteration:
        assert taught == [True] * 5  # two amounts on two folds, each by the fold's own training; then the chosen one
