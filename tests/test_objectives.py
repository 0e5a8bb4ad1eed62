"""Losses against numpy; every refusal's words."""

from __future__ import annotations

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prune_jax.errors import UserMistake
from prune_jax.objectives import Objective, check, inputs_of, objective, penalty


def shape(*dims, dtype="float32"):
    return jax.ShapeDtypeStruct(dims, dtype)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_classification(transform, dtype):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(10 * rng.standard_normal((32, 5)), dtype)
    labels = rng.integers(0, 5, 32)
    found = objective("classification")
    batch = {"x": np.zeros((32, 2)), "y": labels}

    z = np.asarray(logits, np.float64)
    expected = np.log(np.exp(z).sum(1)) - z[np.arange(32), labels]
    losses = transform(found.loss)(logits, batch)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(transform(found.metrics["accuracy"])(logits, batch), z.argmax(1) == labels)
    assert (found.primary, found.higher_is_better) == ("accuracy", True)


def test_huge_logits_stay_finite():
    losses = objective("classification").loss(jnp.array([[1e30, 0.0], [0.0, -1e30]]), {"y": np.array([0, 1])})
    np.testing.assert_allclose(losses, [0.0, 1e30])


@pytest.mark.parametrize("label", [3, 100, -1])
def test_a_label_that_is_no_class_gives_nan(label):
    losses = objective("classification").loss(jnp.zeros((2, 3)), {"y": np.array([0, label])})
    assert np.isfinite(losses[0])
    assert np.isnan(losses[1])


@pytest.mark.parametrize(
    ("outputs", "wanted"),
    [((8,), (8,)), ((8, 1), (8,)), ((8,), (8, 1)), ((8, 3), (8, 3)), ((8, 2, 3), (8, 6)), ((1, 1), (1,))],
)
@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_regression_reconciles_shapes(outputs, wanted, dtype):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal(outputs).astype(np.float32), (10 * rng.standard_normal(wanted)).astype(dtype)
    found = objective("regression")
    batch = {"x": np.zeros((outputs[0], 4)), "y": b}
    expected = ((a.reshape(outputs[0], -1) - b.reshape(outputs[0], -1).astype(np.float32)) ** 2).mean(1)
    np.testing.assert_allclose(found.loss(jnp.asarray(a), batch), expected, rtol=1e-5)
    np.testing.assert_allclose(found.metrics["mse"](jnp.asarray(a), batch), expected, rtol=1e-5)
    assert (found.primary, found.higher_is_better) == ("mse", False)


def test_reconstruction_is_against_the_input():
    rng = np.random.default_rng(0)
    x, outputs = rng.random((4, 8, 8, 1), np.float32), rng.random((4, 64), np.float32)
    losses = objective("reconstruction").loss(jnp.asarray(outputs), {"x": x})
    np.testing.assert_allclose(losses, ((outputs - x.reshape(4, 64)) ** 2).mean(1), rtol=1e-5)


@pytest.fixture
def my_losses(monkeypatch):
    module = types.ModuleType("my_losses")
    monkeypatch.setitem(sys.modules, "my_losses", module)
    return module


def test_a_loss_of_ones_own(my_losses):
    my_losses.absolute = lambda outputs, batch: jnp.abs(outputs - batch["y"]).sum(axis=1)
    found = objective("my_losses:absolute")
    batch = {"x": np.zeros((2, 1)), "y": np.ones((2, 3), np.float32)}
    np.testing.assert_allclose(found.loss(jnp.zeros((2, 3)), batch), [3, 3])
    assert (found.name, found.primary, found.higher_is_better) == ("my_losses:absolute", "loss", False)
    assert found.metrics == {}
    assert objective("my_losses:absolute") is found
    check(found, shape(2, 3), batch, classes=None)


def refusal(name, outputs, batch, classes=None):
    with pytest.raises(UserMistake) as caught:
        check(objective(name), outputs, batch, classes=classes)
    return str(caught.value)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda outputs, batch: jnp.mean(outputs),
            "objective 'my_losses:loss' answers float32 []; it must answer one loss for each example, float [4]. "
            "Leave out the mean over the batch: it is taken later.",
        ),
        (lambda outputs, batch: outputs, "objective 'my_losses:loss' answers float32 [4, 3]; it must answer one loss"),
        (
            lambda outputs, batch: jnp.argmax(outputs, 1),
            "objective 'my_losses:loss' answers int32 [4]; it must answer one loss for each example, float [4].",
        ),
        (
            lambda outputs, batch: outputs[:, 0] * batch["weight"],
            "objective 'my_losses:loss' fails on outputs [4, 3]: KeyError: 'weight'",
        ),
    ],
    ids=["mean", "too many", "integers", "raises"],
)
def test_a_wrong_loss_of_ones_own_is_refused(my_losses, loss, message):
    my_losses.loss = loss
    batch = {"x": np.zeros((4, 2)), "y": np.zeros(4)}
    assert refusal("my_losses:loss", shape(4, 3), batch).startswith(message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "clasification",
            "objective 'clasification' is not known; did you mean 'classification'? "
            "(known: classification, regression, reconstruction)",
        ),
        ("no_such_module:loss", "'no_such_module:loss' could not be imported: no module 'no_such_module'."),
        ("math:pi", "objective 'math:pi' is 3.14159"),
    ],
)
def test_unknown_objectives(name, message):
    with pytest.raises(UserMistake) as caught:
        objective(name)
    assert str(caught.value).startswith(message)


DIGITS = {"x": shape(4, 8, 8, 1), "y": shape(4, dtype="int32")}


@pytest.mark.parametrize(
    ("name", "outputs", "batch", "message"),
    [
        (
            "classification",
            (4, 3),
            DIGITS,
            "The model answers 3 logits for each example, but the data have 10 classes. "
            "Give its last layer one output for each class.",
        ),
        (
            "classification",
            (4, 7, 10),
            DIGITS,
            "The model answers [4, 7, 10], but classification needs [batch, classes] with batch = 4.",
        ),
        ("classification", (4,), DIGITS, "The model answers [4], but classification needs [batch, classes]"),
        ("classification", (1, 10), DIGITS, "The model answers [1, 10], but classification needs [batch, classes]"),
        (
            "classification",
            (4, 10),
            {**DIGITS, "y": shape(4)},
            "Classification needs integer labels y [batch], but they are float32 [4]. "
            "For one-hot labels store their argmax; for numbers write `objective: regression`.",
        ),
        ("classification", (4, 10), {**DIGITS, "y": shape(4, 10, dtype="int32")}, "Classification needs integer"),
        (
            "regression",
            (4, 2),
            {**DIGITS, "y": shape(4)},
            "The model answers [4, 2], but y is [4]: it must answer 1 number(s) for each of the 4 example(s).",
        ),
        ("regression", (4,), {**DIGITS, "y": shape(4, 2)}, "The model answers [4], but y is [4, 2]"),
        ("regression", (), {**DIGITS, "y": shape(4)}, "The model answers [], but y is [4]"),
        ("regression", (2, 2), {**DIGITS, "y": shape(4)}, "The model answers [2, 2], but y is [4]"),
        (
            "reconstruction",
            (4, 63),
            DIGITS,
            "The model answers [4, 63], but x is [4, 8, 8, 1]: it must answer 64 number(s) for each of the 4",
        ),
    ],
)
def test_outputs_that_do_not_fit_are_refused(name, outputs, batch, message):
    assert refusal(name, shape(*outputs), batch, classes=10).startswith(message)


@pytest.mark.parametrize(
    ("name", "outputs"), [("classification", (4, 10)), ("regression", (4, 1)), ("reconstruction", (4, 8, 8, 1))]
)
def test_outputs_that_fit_pass(name, outputs):
    check(objective(name), shape(*outputs), DIGITS, classes=10)


def test_inputs_of_a_batch():
    assert inputs_of({"y": 1, "x": 2}) == (2,)
    assert inputs_of({"lengths": 3, "y": 1, "x": 2}) == (2, 3)


def test_penalty():
    rng = np.random.default_rng(0)
    params = {name: {"kernel": rng.standard_normal((4, 3)), "bias": rng.standard_normal(3)} for name in ("a", "b")}
    prunable = {"a/kernel", "b/kernel"}
    kernels = np.concatenate([layer["kernel"].ravel() for layer in params.values()])
    params = jax.tree.map(jnp.asarray, params)

    for value in (penalty(params, l1=0.3, l2=0.7, prunable=prunable), penalty(params, l1=0.3, l2=0.7)):
        np.testing.assert_allclose(value, 0.3 * np.abs(kernels).sum() + 0.35 * (kernels**2).sum(), rtol=1e-5)
    only_a = penalty(params, l1=1.0, l2=0.0, prunable=["a/kernel"])
    np.testing.assert_allclose(only_a, np.abs(kernels[:12]).sum(), rtol=1e-5)
    gradient = jax.grad(lambda p: penalty(p, l1=0.0, l2=0.7, prunable=prunable))(params)
    np.testing.assert_allclose(gradient["a"]["kernel"], 0.7 * params["a"]["kernel"], rtol=1e-5)
    np.testing.assert_array_equal(gradient["a"]["bias"], 0)


def test_penalty_of_a_model_without_matrices():
    assert float(penalty({"slope": jnp.float32(-3), "offset": jnp.float32(1), "n": jnp.int32(9)}, l1=1.0, l2=0.0)) == 4


def test_an_objective_is_a_key_of_jit():
    """`jax.jit` takes objectives as static arguments: they must be hashable."""
    assert isinstance(objective("regression"), Objective)
    assert hash(objective("regression")) == hash(objective("regression"))
