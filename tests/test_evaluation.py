"""Evaluation against numpy on the whole split; sizes against hand counts; the shape of what is timed."""

from __future__ import annotations

import io
import json
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prune_jax.errors import DivergedError
from prune_jax.evaluation import describe, evaluate, evaluator, latencies, peak_bytes
from prune_jax.models import Network, Variables, build
from prune_jax.objectives import objective


def dense_network(*widths):
    """A plain MLP whose outputs are scaled by its state; its `apply` notes how often it is traced."""
    traces = []

    def init(key):
        keys = jax.random.split(key, len(widths) - 1)
        params = {
            f"layer_{i}": {"kernel": jax.random.normal(keys[i], widths[i : i + 2]), "bias": jnp.ones(widths[i + 1])}
            for i in range(len(widths) - 1)
        }
        return Variables(params, {"scale": jnp.float32(0.5)})

    def apply(params, state, inputs, *, train, key):
        traces.append(inputs[0].shape)
        assert not train
        assert key is None
        x, *lengths = inputs
        for i in range(len(widths) - 1):
            layer = params[f"layer_{i}"]
            x = x @ layer["kernel"] + layer["bias"][None]
            x = jnp.tanh(x) if i < len(widths) - 2 else x
        return x * state["scale"] + (lengths[0][:, None] if lengths else 0.0), state

    return Network(init, apply), traces


def by_hand(variables, x):
    x = np.asarray(x, np.float64)
    layers = list(variables.params.values())
    for i, layer in enumerate(layers):
        x = x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64)
        x = np.tanh(x) if i < len(layers) - 1 else x
    return 0.5 * x


def cross_entropy(z, y):
    return np.log(np.exp(z).sum(1)) - z[np.arange(len(y)), y]


@pytest.fixture
def problem():
    network, traces = dense_network(6, 16, 5)
    rng = np.random.default_rng(0)
    split = {"x": rng.standard_normal((101, 6)).astype(np.float32), "y": rng.integers(0, 5, 101)}
    return network, network.init(jax.random.key(0)), split, traces


@pytest.mark.parametrize("batch_size", [1, 7, 64, 100, 101, 1000])
def test_every_example_counts_once(problem, batch_size):
    network, variables, split, traces = problem
    found = evaluate(network, variables, objective("classification"), split, batch_size=batch_size)

    z = by_hand(variables, split["x"])
    assert list(found) == ["loss", "accuracy"]
    assert found["accuracy"] == float((z.argmax(1) == split["y"]).sum()) / 101, "exactly"
    np.testing.assert_allclose(found["loss"], cross_entropy(z, split["y"]).mean(), rtol=1e-5)
    assert traces == [(min(batch_size, 101), 6)], "one shape, traced and compiled once"
    json.dumps(found)


def test_an_evaluator_compiles_once_for_many_weights(problem):
    network, variables, split, traces = problem
    run = evaluator(network, objective("classification"), batch_size=32)
    losses = [run(network.init(jax.random.key(seed)), split)["loss"] for seed in range(3)]
    assert len(traces) == 1
    assert len(set(losses)) == 3
    assert losses[0] == run(variables, split)["loss"]


def test_regression_and_lengths(problem):
    network, variables, split, _ = problem
    rng = np.random.default_rng(1)
    split = {"x": split["x"], "y": rng.standard_normal((101, 5)), "lengths": rng.integers(1, 9, 101, dtype=np.int32)}
    found = evaluate(network, variables, objective("regression"), split, batch_size=10)
    expected = ((by_hand(variables, split["x"]) + split["lengths"][:, None] - split["y"]) ** 2).mean()
    np.testing.assert_allclose([found["mse"], found["loss"]], expected, rtol=1e-5)


def test_a_sequence_of_records(problem):
    network, variables, split, traces = problem
    records = [{name: values[i] for name, values in split.items()} for i in range(101)]
    run = evaluator(network, objective("classification"), batch_size=32)
    assert run(variables, records) == run(variables, split)
    assert len(traces) == 1


def test_a_loss_that_is_not_finite_is_named(problem):
    network, variables, split, _ = problem
    classification = objective("classification")
    split["x"][[3, 100]] = np.nan
    with pytest.raises(DivergedError) as caught:
        evaluate(network, variables, classification, split, batch_size=32)
    assert str(caught.value) == (
        "The loss is not finite on 2 of 101 examples of the test split, the first is example 3. "
        "All weights are finite: look for NaN, huge values or labels out of range in the data."
    )
    broken = jax.tree.map(lambda w: w, variables)
    broken.params["layer_1"]["kernel"] = variables.params["layer_1"]["kernel"].at[0, 0].set(jnp.nan)
    with pytest.raises(DivergedError) as caught:
        evaluate(network, broken, classification, split, batch_size=32, name="validation")
    assert str(caught.value) == (
        "The loss is not finite on 101 of 101 examples of the validation split, the first is example 0. "
        "NaN or infinity stands in layer_1/kernel: training diverged; lower the learning rate."
    )


def prune(variables, sparsity):
    rng = np.random.default_rng(0)
    masks = {
        name: {"kernel": jnp.asarray(rng.random(layer["kernel"].shape) >= sparsity), "bias": None}
        for name, layer in variables.params.items()
    }
    params = {
        name: {**layer, "kernel": jnp.where(masks[name]["kernel"], layer["kernel"], 0)}
        for name, layer in variables.params.items()
    }
    return variables._replace(params=params), masks


def test_describe_counts_what_is_alive(problem):
    network, variables, split, _ = problem
    pruned, masks = prune(variables, 0.75)
    found = describe(network, pruned, masks, (split["x"],))

    a, b = (int(np.asarray(masks[f"layer_{i}"]["kernel"]).sum()) for i in range(2))
    assert found["params"] == 6 * 16 + 16 + 16 * 5 + 5
    assert found["nonzero"] == a + b + 21
    assert found["sparsity"] == pytest.approx(1 - (a + b) / 176)
    assert found["sparsity_total"] == pytest.approx((176 - a - b) / 197)
    assert (found["macs"], found["effective_macs"]) == (176, a + b)
    assert found["layers"]["layer_0/kernel"] == {
        "shape": [6, 16],
        "size": 96,
        "nonzero": a,
        "prunable": True,
        "sparsity": pytest.approx(1 - a / 96),
        "macs": 96,
        "effective_macs": a,
    }
    assert found["layers"]["layer_0/bias"] == {
        "shape": [16],
        "size": 16,
        "nonzero": 16,
        "prunable": False,
        "sparsity": 0.0,
        "macs": 0,
        "effective_macs": 0,
    }
    json.dumps(found)


def test_describe_without_masks(problem):
    network, variables, _, _ = problem
    found = describe(network, variables, None, (jax.ShapeDtypeStruct((64, 6), "float32"),))
    assert (found["sparsity"], found["sparsity_total"]) == (0.0, 0.0)
    assert (found["macs"], found["effective_macs"], found["nonzero"]) == (176, 176, 197)


def test_bytes_are_those_of_an_npz_file():
    network, _ = dense_network(300, 100)
    variables = network.init(jax.random.key(0))
    arrays = {
        "params/layer_0/kernel": variables.params["layer_0"]["kernel"],
        "params/layer_0/bias": variables.params["layer_0"]["bias"],
        "state/scale": variables.state["scale"],
    }
    raw, deflated = io.BytesIO(), io.BytesIO()
    np.savez(raw, **arrays)
    np.savez_compressed(deflated, **arrays)
    inputs = (jax.ShapeDtypeStruct((1, 300), "float32"),)
    found = describe(network, variables, None, inputs)
    assert found["bytes"] == raw.tell()
    assert found["bytes_compressed"] == pytest.approx(deflated.tell(), rel=0.001)

    pruned, masks = prune(variables, 0.9)
    smaller = describe(network, pruned, masks, inputs)
    assert smaller["bytes"] == found["bytes"]
    assert smaller["bytes_compressed"] < 0.25 * found["bytes_compressed"]


def test_latencies_take_turns_and_share_programs():
    small, traces = dense_network(16, 16, 4)
    large, _ = dense_network(16, 1500, 1500, 4)
    variables = small.init(jax.random.key(0))
    networks = {
        "dense": (small, variables),
        "masked": (small, prune(variables, 0.5)[0]),
        "large": (large, large.init(jax.random.key(0))),
    }
    found = latencies(networks, lambda n: (np.ones((n, 16), np.float32),), [1, 64], min_calls=20, min_seconds=0.05)

    assert list(found) == ["dense", "masked", "large"]
    for times in found.values():
        assert list(times) == ["1", "64"]
        for quantiles in times.values():
            assert 0 < quantiles["p50"] <= quantiles["p90"]
    assert traces == [(1, 16), (64, 16)], "dense and masked are one program"
    assert found["large"]["64"]["p50"] > 2 * found["dense"]["64"]["p50"], "the large one multiplies 2250 times as much"
    json.dumps(found)


def test_latencies_end_in_time():
    """A slow network is measured for `max_seconds`, however many calls that makes."""
    network, _ = dense_network(16, 1500, 1500, 4)
    calls = []

    def slow(params, state, inputs, *, train, key):
        outputs, state = network.apply(params, state, inputs, train=train, key=key)
        jax.debug.callback(lambda: (calls.append(1), time.sleep(0.05)))
        return outputs, state

    networks = {"slow": (Network(network.init, slow), network.init(jax.random.key(0)))}
    found = latencies(networks, lambda n: (np.ones((n, 16), np.float32),), [1], max_seconds=0.3)
    assert len(calls) < 20
    assert found["slow"]["1"]["p50"] > 0


@pytest.mark.parametrize(
    ("kind", "args", "shape", "macs"),
    [
        ("linear", {}, (13,), 13 * 5),
        ("mlp", {"widths": [300, 100]}, (28, 28, 1), 784 * 300 + 300 * 100 + 100 * 5),
        ("cnn", {}, (28, 28, 1), 25 * (784 * 6 + 196 * 6 * 16) + 784 * 120 + 120 * 84 + 84 * 5),
        (
            "resnet",
            {"depth": 8, "width": 4},
            (8, 8, 3),
            9 * 64 * (3 * 4 + 2 * 4 * 4) + (9 * 16 * (4 * 8 + 8 * 8) + 16 * 4 * 8) * 2 + 16 * 5,
        ),
    ],
)
def test_our_own_models(kind, args, shape, macs):
    """The models that recipes name pass through the whole of this room."""
    network = build(kind, args, inputs=(jax.ShapeDtypeStruct((1, *shape), "float32"),), outputs=5)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, jax.random.key(0))  # compiling the initialisers would take most of the time
    variables = Variables(
        jax.tree.map(lambda w: jnp.asarray(0.1 * rng.standard_normal(w.shape), w.dtype), shapes.params),
        jax.tree.map(lambda s: jnp.asarray(0.5 + rng.random(s.shape), s.dtype), shapes.state),
    )
    split = {"x": rng.random((33, *shape), np.float32), "y": rng.integers(0, 5, 33)}
    outputs, _ = jax.jit(partial(network.apply, train=False, key=None))(*variables, (split["x"],))

    found = evaluate(network, variables, objective("classification"), split, batch_size=16)
    z = np.asarray(outputs, np.float64)
    np.testing.assert_allclose(found["loss"], cross_entropy(z, split["y"]).mean(), rtol=1e-4)
    assert found["accuracy"] == float((z.argmax(1) == split["y"]).sum()) / 33

    described = describe(network, variables, None, (split["x"],))
    assert described["macs"] == sum(layer["macs"] for layer in described["layers"].values())
    assert described["macs"] == macs
    assert described["notes"] == []


@pytest.mark.parametrize("args", [{"cell": "gru"}, {"cell": "lstm"}])
def test_recurrent_models_are_counted_for_every_step(args):
    inputs = (jax.ShapeDtypeStruct((1, 29, 12), "float32"), jax.ShapeDtypeStruct((1,), "int32"))
    network = build("rnn", {"width": 16, **args}, inputs=inputs, outputs=9)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    variables = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes)
    gates = {"gru": 3, "lstm": 4}[args["cell"]]
    found = describe(network, variables, None, inputs)
    assert found["macs"] == 29 * gates * 16 * (12 + 16) + 16 * 9
    assert found["notes"] == []


@pytest.mark.usefixtures("optimized")
def test_peak_memory_is_what_goes_in_and_out_and_stands_between():
    def apply(params, state, inputs, *, train, key):
        return jnp.tanh(inputs[0] @ params["w"]) @ params["w"].T, state

    network = Network(lambda key: None, apply)
    weights = Variables({"w": np.ones((16, 1000), np.float32)}, {})
    one, many = (peak_bytes(network, weights, (np.ones((n, 16), np.float32),)) for n in (1, 64))
    assert one >= 4 * (16 * 1000 + 16 + 16)
    assert many - one >= 4 * 63 * (16 + 16)
    assert many < 4 * (2 * 16 * 1000 + 64 * (16 + 2 * 1000 + 16)) + 10_000
