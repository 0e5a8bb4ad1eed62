"""Biases that take over what died added on average: against numpy, and exactly where that is always the same."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prune_jax as pj
from prune_jax.bias_correction import correct_bias
from prune_jax.checkpoints import Store
from prune_jax.errors import UserMistake
from prune_jax.problems import dataset_of
from tests.compiling import compilations
from tests.plain import PRUNE, TRAIN, arrays, part, run_plain, tiny

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def dense(params, x):
    h = jax.nn.relu(x @ params["a"]["w"] + params["a"]["b"])
    h = jax.nn.relu(h @ params["b"]["w"] + params["b"]["b"])
    return h @ params["c"]["w"]


def layers(*widths):
    pairs = zip("abc", widths[:-1], widths[1:], strict=True)
    return {name: {"w": normal(m, n), "b": normal(1, n)} for name, m, n in pairs}


BATCHES = [(normal(8, 3),), (normal(5, 3),)]


def test_two_layers_by_hand_in_the_order_of_dataflow():
    params = layers(3, 6, 5, 2)
    params["c"].pop("b")
    masks = {n: {"w": RNG.random(params[n]["w"].shape) < 0.6} for n in params}
    found = correct_bias(params, masks, apply=dense, batches=BATCHES)
    x = np.concatenate([batch for (batch,) in BATCHES])
    pruned = {n: np.where(masks[n]["w"], params[n]["w"], 0) for n in params}
    first = params["a"]["b"] + (x @ params["a"]["w"] - x @ pruned["a"]).mean(0)
    whole = np.maximum(x @ params["a"]["w"] + params["a"]["b"], 0)
    thin = np.maximum(x @ pruned["a"] + first, 0)  # the second layer sees what the first became
    second = params["b"]["b"] + (whole @ params["b"]["w"] - thin @ pruned["b"]).mean(0)
    np.testing.assert_allclose(found.params["a"]["b"], first, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.params["b"]["b"], second, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.params["c"]["w"], pruned["c"])
    assert (found.biases, found.left) == (("a/b", "b/b"), ("c/w",))


def test_a_unit_that_always_answers_the_same_is_replaced_exactly_and_taken_away():
    params = layers(3, 6, 5, 2)
    params["a"]["w"][:, 2] = 0
    params["a"]["b"][:, 2] = 1.5
    net = pj.trace(dense, params, BATCHES[0][0])
    (group,) = (name for name in net.groups if name.startswith("a"))
    masks = net.masks({group: [2]})
    found = pj.correct_bias(params, masks, apply=dense, batches=BATCHES[:1])
    assert found.biases == ("b/b",)
    assert not found.params["a"]["b"][:, 2].any()  # what is dead stays dead
    x = normal(9, 3)
    np.testing.assert_allclose(dense(found.params, x), dense(params, x), rtol=1e-4, atol=1e-5)
    small = net.compact({group: [2]}, found.params)
    np.testing.assert_allclose(small.apply(small.params, x), dense(params, x), rtol=1e-4, atol=1e-5)


def conv(params, x):
    def layer(x, name):
        x = jax.lax.conv_general_dilated(
            x, params[name]["w"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return x + params[name]["b"].reshape(1, 1, 1, -1)

    return layer(jax.nn.relu(layer(x, "a")), "b").mean((1, 2))


def test_a_convolution_is_averaged_over_its_positions():
    params = {"a": {"w": normal(3, 3, 2, 4), "b": normal(4)}, "b": {"w": normal(2, 2, 4, 3), "b": normal(3)}}
    x = normal(5, 7, 7, 2)
    masks = {"a": {"w": RNG.random((3, 3, 2, 4)) < 0.5}}
    found = correct_bias(params, masks, apply=conv, batches=[(x,)])
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))  # [n, h, w, c, i, j]
    removed = np.where(masks["a"]["w"], 0, params["a"]["w"])
    expected = params["a"]["b"] + np.einsum("nhwcij,ijco->nhwo", windows, removed).mean((0, 1, 2))
    np.testing.assert_allclose(found.params["a"]["b"], expected, rtol=1e-4, atol=1e-4)
    assert found.biases == ("a/b", "b/b")  # the second sees other inputs

    params["a"]["w"][..., 1] = 0
    net = pj.trace(conv, params, x)
    (group,) = (name for name in net.groups if name.startswith("a"))
    found = correct_bias(params, net.masks({group: [1]}), apply=conv, batches=[(x,)])
    small, x = net.compact({group: [1]}, found.params), normal(2, 6, 6, 2)
    np.testing.assert_allclose(small.apply(small.params, x), conv(params, x), rtol=1e-3, atol=1e-4)


def test_a_norms_bias_makes_up_for_kernels_without_one_and_loops_are_named():
    params = {"w": normal(3, 4), "scale": normal(1, 4), "b": normal(1, 4), "r": normal(4, 4)}

    def apply(p, x):
        h = (x @ p["w"] - 0.5) / 2 * p["scale"] + p["b"]
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ p["r"]), None), h, None, 2)[0]

    masks = {name: RNG.random(params[name].shape) < 0.5 for name in ("w", "r")}
    found = correct_bias(params, masks, apply=apply, batches=BATCHES)
    x = np.concatenate([batch for (batch,) in BATCHES])
    change = (x @ np.where(masks["w"], 0, params["w"])).mean(0) / 2 * params["scale"]
    np.testing.assert_allclose(found.params["b"], params["b"] + change, rtol=1e-4, atol=1e-5)
    assert (found.biases, found.left) == (("b",), ("r",))


def test_nothing_is_compiled_for_other_weights_and_nothing_without_batches():
    apply = jax.tree_util.Partial(dense)
    for _ in range(2):
        params = layers(3, 6, 5, 2)
        masks = {n: {"w": RNG.random(params[n]["w"].shape) < 0.6} for n in params}
        correct_bias(params, masks, apply=apply, batches=BATCHES[:1])
    with compilations() as seconds:
        found = correct_bias(params, {}, apply=apply, batches=BATCHES[:1])
    assert not seconds
    assert found.biases == found.left == ()
    with pytest.raises(UserMistake, match="there is no batch"):
        correct_bias(params, masks, apply=apply, batches=[])


def test_a_pruning_corrects_biases_over_so_many_batches_and_compaction_keeps_it(tmp_path):
    prune = {**PRUNE, "granularity": "group", "correct_bias_batches": 2}
    store = Store(tmp_path)
    plan, results = run_plain(tiny(train=TRAIN, prune=prune, compact={"kind": "compact"}), store)
    dense, thin, small = (arrays(store, results[name]) for name in ("train", "prune", "compact"))
    before, after = part(dense, "params"), part(thin, "params")
    x = dataset_of(plan.calls[0].problem).train["x"][:18]

    def hidden(params):
        return np.maximum(x @ params["hidden_0/kernel"] + params["hidden_0/bias"], 0)

    change = (hidden(before) @ before["output/kernel"] - hidden(after) @ after["output/kernel"]).mean(0)
    np.testing.assert_allclose(after["output/bias"], before["output/bias"] + change, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(part(small, "params")["output/bias"], after["output/bias"])
    told = results["prune.1.mask"].metrics
    assert (told["corrected_biases"], told["without_bias"]) == (["output/bias"], [])


def test_weights_die_alone_and_the_mean_of_every_layer_stays(tmp_path):
    store = Store(tmp_path)
    prune = {**PRUNE, "target": {"sparsity": 0.7}, "correct_bias_batches": 3}
    plan, results = run_plain(tiny(train=TRAIN, prune=prune), store)
    before, after = (part(arrays(store, results[name]), "params") for name in ("train", "prune"))
    x = dataset_of(plan.calls[0].problem).train["x"][:27]
    for path in ("hidden_0", "output"):
        sums = [x @ p["hidden_0/kernel"] + p["hidden_0/bias"] for p in (before, after)]
        if path == "output":
            sums = [
                np.maximum(s, 0) @ p["output/kernel"] + p["output/bias"]
                for s, p in zip(sums, (before, after), strict=True)
            ]
        np.testing.assert_allclose(sums[0].mean(0), sums[1].mean(0), rtol=1e-4, atol=1e-5)
