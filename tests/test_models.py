"""Every model is a pair of pure functions: same key, same arrays; same inputs, same outputs; nothing leaks."""

from __future__ import annotations

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prune_jax.errors import UserMistake
from prune_jax.models import MODELS, Network, build
from prune_jax.trees import leaves_by_path
from tests.sparing import sparing


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct((1, *shape), dtype)


LENGTHS = spec(dtype=jnp.int32)
VECTOR, IMAGE, SERIES, TOKENS = spec(4), spec(8, 8, 1), spec(6, 3), spec(6, dtype=jnp.int32)

# kind, arguments, inputs: each also answers for dropout and batch norm where the model has them
CASES = {
    "linear": ("linear", {}, (IMAGE,)),
    "linear without bias": ("linear", {"bias": False}, (VECTOR,)),
    "mlp": ("mlp", {"widths": [5, 4]}, (IMAGE,)),
    "mlp with everything": (
        "mlp",
        {"widths": [16], "activation": "tanh", "output_activation": "sigmoid", "dropout": 0.5, "batch_norm": True},
        (VECTOR,),
    ),
    "cnn": ("cnn", {"widths": [2, 3], "dense": [5], "kernel": 3}, (IMAGE,)),
    "cnn with everything": (
        "cnn",
        {"widths": [2], "dense": [16], "kernel": 3, "padding": "valid", "dropout": 0.5, "batch_norm": True},
        (IMAGE,),
    ),
    "resnet": ("resnet", {"depth": 8, "width": 2}, (IMAGE,)),
    "autoencoder": ("autoencoder", {"widths": [16], "code": 2, "dropout": 0.5}, (IMAGE,)),
    "gru": ("rnn", {"width": 8, "dropout": 0.5}, (SERIES, LENGTHS)),
    "lstm": ("rnn", {"width": 4, "cell": "lstm"}, (SERIES, LENGTHS)),
    "gru, no lengths": ("rnn", {"width": 4}, (SERIES,)),
    "gru of tokens": ("rnn", {"width": 4, "vocab": 5}, (TOKENS, LENGTHS)),
    "transformer": ("transformer", {"dim": 8, "heads": 2, "layers": 1, "dropout": 0.5}, (SERIES, LENGTHS)),
    "transformer of tokens": ("transformer", {"dim": 8, "heads": 2, "vocab": 5}, (TOKENS,)),
    "nnx class": ("tests.samples.nets:NnxNet", {"width": 16}, (VECTOR,)),
    "nnx.RNN": ("tests.samples.nets:NnxRecurrent", {}, (SERIES, LENGTHS)),
    "nnx function": ("tests.samples.nets:make_nnx", {}, (VECTOR,)),
    "nnx by flag": ("tests.samples.nets:NnxFlagged", {}, (VECTOR,)),
    "linen class": ("tests.samples.nets:LinenNet", {"width": 16}, (VECTOR,)),
    "linen, deterministic": ("tests.samples.nets:LinenDeterministic", {}, (VECTOR,)),
    "linen instance": ("tests.samples.nets:LINEN_INSTANCE", {}, (VECTOR,)),
    "linen function": ("tests.samples.nets:make_linen", {"width": 16}, (VECTOR,)),
    "two functions": ("tests.samples.nets:make_functions", {"width": 16}, (VECTOR,)),
}
# Each compiles for seconds; a stage or an export runs each such kind of network besides.
SLOW = {"resnet", "transformer of tokens", "nnx.RNN", "gru of tokens", "nnx function", "linen function"} | {
    "gru, no lengths", "nnx by flag", "linen, deterministic", "linen instance"
}  # fmt: skip
MOST = sparing(CASES, SLOW)
RANDOM = {"mlp with everything", "cnn with everything", "autoencoder", "gru", "transformer", "nnx class"} | {
    "nnx function", "nnx by flag", "linen class", "linen, deterministic", "linen instance", "linen function",
    "two functions",
}  # fmt: skip
STATEFUL = {"mlp with everything", "cnn with everything", "resnet", "nnx class", "nnx function"} | {
    "linen class", "linen instance", "linen function"
}  # fmt: skip


@cache
def network_of(case) -> Network:
    kind, args, inputs = CASES[case]
    return build(kind, args, inputs=inputs, outputs=3)


@cache
def init_of(case):
    return jax.jit(network_of(case).init)


@cache
def variables_of(case):
    return init_of(case)(jax.random.key(0))


@cache
def forward_of(case):
    return jax.jit(network_of(case).apply, static_argnames="train")


def inputs_of(case, batch, seed=0):
    rng = np.random.default_rng(seed)
    first = CASES[case][2][0]
    shape = (batch, *first.shape[1:])
    x = rng.integers(0, 5, shape) if first.dtype == jnp.int32 else rng.normal(size=shape)
    arrays = [jnp.asarray(x, first.dtype)]
    if len(CASES[case][2]) == 2:
        arrays.append(jnp.asarray(rng.integers(1, 7, batch), jnp.int32))
    return tuple(arrays)


def assert_trees_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_every_built_in_kind_is_tested():
    assert set(MODELS) <= {kind for kind, _, _ in CASES.values()}


@pytest.mark.parametrize("case", MOST)
def test_init_follows_the_key_alone(case):
    init = init_of(case)
    one, again, other = variables_of(case), init(jax.random.key(0)), init(jax.random.key(1))
    assert_trees_equal(one, again)
    kernels = [path for path, leaf in leaves_by_path(one.params).items() if leaf.ndim >= 2]
    assert kernels
    for path in kernels:
        assert not np.array_equal(leaves_by_path(one.params)[path], leaves_by_path(other.params)[path]), path
    assert {leaf.dtype for leaf in jax.tree.leaves(one)} == {jnp.dtype(jnp.float32)}
    shapes = jax.eval_shape(network_of(case).init, jax.random.key(0))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), one
    )


@pytest.mark.parametrize("case", ["mlp", "transformer", "nnx class", "linen class"])
def test_init_is_the_same_without_jit_and_of_another_network(case):
    kind, args, inputs = CASES[case]
    eager = build(kind, args, inputs=inputs, outputs=3).init(jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), eager, variables_of(case))


@pytest.mark.parametrize("case", MOST)
def test_containers_are_nested_dicts_with_string_keys(case):
    def check(tree):
        if isinstance(tree, dict):
            assert all(type(name) is str for name in tree)
            for branch in tree.values():
                check(branch)
        else:
            assert isinstance(tree, jax.Array)

    variables = variables_of(case)
    check(variables.params)
    check(variables.state)
    assert bool(variables.state) == (case in STATEFUL)


@pytest.mark.parametrize("case", MOST)
def test_apply_is_the_same_without_jit_and_at_several_sizes_of_batch(case):
    network, forward = network_of(case), forward_of(case)
    params, state = variables_of(case)
    inputs = inputs_of(case, 4)
    outputs, kept = network.apply(params, state, inputs, train=False, key=None)
    assert outputs.shape == (inputs[0].shape if case == "autoencoder" else (4, 3))
    assert outputs.dtype == jnp.float32
    assert_trees_equal(kept, state)
    jitted, kept = forward(params, state, inputs, train=False, key=None)
    np.testing.assert_allclose(jitted, outputs, rtol=1e-5, atol=1e-5)
    assert_trees_equal(kept, state)
    alone, _ = forward(params, state, tuple(x[2:3] for x in inputs), train=False, key=None)
    np.testing.assert_allclose(alone, outputs[2:3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["mlp with everything", "nnx class", "linen class"])
def test_training_is_the_same_without_jit_and_leaks_nothing(case):
    params, state = variables_of(case)
    call = {"train": True, "key": jax.random.key(1)}
    with jax.checking_leaks():
        eager = network_of(case).apply(params, state, inputs_of(case, 4), **call)
        jitted = jax.jit(network_of(case).apply, static_argnames="train")(params, state, inputs_of(case, 4), **call)
    assert jax.tree.structure(eager[1]) == jax.tree.structure(jitted[1]) == jax.tree.structure(state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), eager, jitted)


@pytest.mark.parametrize("case", MOST)
def test_training_is_random_where_there_is_dropout_and_only_there(case):
    params, state = variables_of(case)
    inputs = inputs_of(case, 4)

    def outputs(train, key):
        return np.asarray(forward_of(case)(params, state, inputs, train=train, key=key)[0])

    one, again, other = (outputs(True, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.array_equal(one, other) == (case not in RANDOM)
    np.testing.assert_array_equal(outputs(False, None), outputs(False, jax.random.key(1)))
    if case in RANDOM and not case.startswith(("linen", "two functions")) and case != "nnx by flag":
        with pytest.raises(ValueError, match="random in training"):
            outputs(True, None)


@pytest.mark.parametrize("case", sparing(sorted(STATEFUL), SLOW & STATEFUL))
def test_batch_statistics_move_in_training_only(case):
    forward = forward_of(case)
    params, state = variables_of(case)
    inputs = inputs_of(case, 4)
    before = jax.tree.map(np.copy, state)
    _, kept = forward(params, state, inputs, train=False, key=jax.random.key(1))
    _, moved = forward(params, state, inputs, train=True, key=jax.random.key(1))
    assert_trees_equal(kept, before)
    assert_trees_equal(state, before)
    changes = [not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (moved, before)), strict=True)]
    assert all(changes)
    in_new_state, _ = forward(params, moved, inputs, train=False, key=None)
    in_old_state, _ = forward(params, state, inputs, train=False, key=None)
    assert not np.array_equal(in_new_state, in_old_state)


@pytest.mark.parametrize("case", MOST)
def test_gradients_are_finite_and_reach_every_leaf(case):
    network = network_of(case)
    params, state = variables_of(case)
    inputs = inputs_of(case, 4)

    @jax.jit
    def gradients(params):
        def loss(params):
            outputs, new_state = network.apply(params, state, inputs, train=True, key=jax.random.key(1))
            weights = jnp.arange(outputs.size, dtype=jnp.float32).reshape(outputs.shape)
            return jnp.mean(weights * outputs**2 + outputs), new_state

        return jax.grad(loss, has_aux=True)(params)[0]

    for path, gradient in leaves_by_path(gradients(params)).items():
        assert np.isfinite(gradient).all(), path
        # a shift of all keys does not change a softmax
        assert np.any(gradient) or path.endswith("attention/key/bias"), path


@pytest.mark.parametrize("case", sparing(["mlp", "gru", "transformer", "nnx.RNN", "linen class"], ["nnx.RNN"]))
def test_per_example_gradients_by_vmap(case):
    network = network_of(case)
    params, state = variables_of(case)
    inputs = inputs_of(case, 4)

    def loss(params, *inputs):
        return jnp.sum(network.apply(params, state, inputs, train=False, key=None)[0] ** 2)

    def one(params, *example):
        return jax.grad(loss)(params, *(x[None] for x in example))

    each = jax.jit(jax.vmap(one, in_axes=(None, *(0,) * len(inputs))))(params, *inputs)
    whole = jax.jit(jax.grad(loss))(params, *inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a.sum(0), b, rtol=2e-4, atol=2e-4), each, whole)


@pytest.mark.parametrize(
    "case", sparing(["gru", "lstm", "gru of tokens", "transformer", "nnx.RNN"], ["gru of tokens", "nnx.RNN"])
)
def test_padding_is_masked(case):
    forward = forward_of(case)
    params, state = variables_of(case)
    x, _ = inputs_of(case, 4)
    lengths = jnp.array([1, 2, 4, 6], jnp.int32)
    outputs, _ = forward(params, state, (x, lengths), train=False, key=None)
    padded = np.arange(6)[None, :] >= np.asarray(lengths)[:, None]
    garbage = np.array(x)
    garbage[padded] = 4 if x.dtype == jnp.int32 else -1e3
    same, _ = forward(params, state, (jnp.asarray(garbage), lengths), train=False, key=None)
    np.testing.assert_array_equal(same, outputs)
    alone, _ = forward(params, state, (x[2:3, :4], lengths[2:3]), train=False, key=None)  # as if nothing were padded
    np.testing.assert_allclose(alone[0], outputs[2], rtol=1e-5, atol=1e-5)
    full, _ = forward(params, state, (x[3:], lengths[3:]), train=False, key=None)
    silent, _ = forward(params, state, (x[3:],), train=False, key=None)  # no lengths: all steps are real
    np.testing.assert_allclose(full, silent, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["gru", "lstm", "transformer"])
def test_nan_in_padding_reaches_neither_outputs_nor_gradients(case):
    params, state = variables_of(case)
    x, _ = inputs_of(case, 2)
    x = x.at[:, 4:].set(jnp.nan)

    def loss(params):
        lengths = jnp.array([4, 2], jnp.int32)
        return jnp.sum(network_of(case).apply(params, state, (x, lengths), train=False, key=None)[0] ** 2)

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, gradients)))


def test_mlp_against_numpy():
    network = build(
        "mlp",
        {"widths": [3], "activation": "sigmoid", "output_activation": "sigmoid"},
        inputs=(spec(2),),
        outputs=1,
    )
    params, state = network.init(jax.random.key(3))
    x = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    p = {path: np.asarray(leaf) for path, leaf in leaves_by_path(params).items()}
    hidden = sigmoid(x @ p["hidden_0/kernel"] + p["hidden_0/bias"])
    expected = sigmoid(hidden @ p["output/kernel"] + p["output/bias"])
    outputs, _ = network.apply(params, state, (jnp.asarray(x),), train=False, key=None)
    np.testing.assert_allclose(outputs, expected, rtol=1e-6)


def test_gru_against_numpy():
    network = build("rnn", {"width": 4}, inputs=(SERIES, LENGTHS), outputs=2)
    params, state = network.init(jax.random.key(0))
    p = {path: np.asarray(leaf, np.float64) for path, leaf in leaves_by_path(params).items()}
    x = np.random.default_rng(0).normal(size=(2, 6, 3))
    lengths = [4, 6]

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    expected = []
    for sequence, length in zip(x, lengths, strict=True):
        h = np.zeros(4)
        for step in sequence[:length]:
            i_r, i_z, i_n = np.split(step @ p["gru_0/dense_i/kernel"] + p["gru_0/dense_i/bias"], 3)
            h_r, h_z, h_n = np.split(h @ p["gru_0/dense_h/kernel"], 3)
            r, z = sigmoid(i_r + h_r), sigmoid(i_z + h_z)
            h = (1 - z) * np.tanh(i_n + r * h_n) + z * h
        expected.append(h @ p["output/kernel"] + p["output/bias"])
    inputs = (jnp.asarray(x, jnp.float32), jnp.asarray(lengths, jnp.int32))
    outputs, _ = network.apply(params, state, inputs, train=False, key=None)
    np.testing.assert_allclose(outputs, np.stack(expected), rtol=1e-4, atol=1e-5)


PATHS = {
    "linear": ["output/bias", "output/kernel"],
    "mlp with everything": [
        "hidden_0/kernel", "norm_0/bias", "norm_0/scale", "output/bias", "output/kernel",
        "state: norm_0/mean", "state: norm_0/var",
    ],
    "cnn": [
        "conv_0/bias", "conv_0/kernel", "conv_1/bias", "conv_1/kernel",
        "hidden_0/bias", "hidden_0/kernel", "output/bias", "output/kernel",
    ],
    "autoencoder": [
        "code/bias", "code/kernel", "decoder_0/bias", "decoder_0/kernel",
        "encoder_0/bias", "encoder_0/kernel", "output/bias", "output/kernel",
    ],
    "lstm": ["lstm_0/dense_h/bias", "lstm_0/dense_h/kernel", "lstm_0/dense_i/kernel", "output/bias", "output/kernel"],
    "gru of tokens": [
        "embedding/embedding", "gru_0/dense_h/kernel", "gru_0/dense_i/bias", "gru_0/dense_i/kernel",
        "output/bias", "output/kernel",
    ],
    "transformer": [
        "block_0/attention/key/bias", "block_0/attention/key/kernel",
        "block_0/attention/output/bias", "block_0/attention/output/kernel",
        "block_0/attention/query/bias", "block_0/attention/query/kernel",
        "block_0/attention/value/bias", "block_0/attention/value/kernel",
        "block_0/hidden/bias", "block_0/hidden/kernel",
        "block_0/norm_0/bias", "block_0/norm_0/scale", "block_0/norm_1/bias", "block_0/norm_1/scale",
        "block_0/output/bias", "block_0/output/kernel",
        "embedding/bias", "embedding/kernel", "norm/bias", "norm/scale", "output/bias", "output/kernel",
        "position/embedding",
    ],
    "nnx class": [
        "layers/0/bias", "layers/0/kernel", "layers/1/bias", "layers/1/kernel", "norm/bias", "norm/scale",
        "output/bias", "output/kernel", "state: norm/mean", "state: norm/var",
    ],
    "two functions": ["0/bias", "0/kernel", "1/bias", "1/kernel"],
    "linen class": [
        "BatchNorm_0/bias", "BatchNorm_0/scale", "Dense_0/bias", "Dense_0/kernel", "Dense_1/bias", "Dense_1/kernel",
        "state: batch_stats/BatchNorm_0/mean", "state: batch_stats/BatchNorm_0/var",
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", PATHS)
def test_paths(case):
    params, state = jax.eval_shape(network_of(case).init, jax.random.key(0))
    assert [*leaves_by_path(params), *(f"state: {path}" for path in leaves_by_path(state))] == PATHS[case]


def test_paths_of_a_resnet():
    params, _ = jax.eval_shape(network_of("resnet").init, jax.random.key(0))
    kernels = {path: leaf.shape for path, leaf in leaves_by_path(params).items() if path.endswith("kernel")}
    assert kernels == {
        "block_0/conv_0/kernel": (3, 3, 2, 2),
        "block_0/conv_1/kernel": (3, 3, 2, 2),
        "block_1/conv_0/kernel": (3, 3, 2, 4),
        "block_1/conv_1/kernel": (3, 3, 4, 4),
        "block_1/shortcut/kernel": (1, 1, 2, 4),
        "block_2/conv_0/kernel": (3, 3, 4, 8),
        "block_2/conv_1/kernel": (3, 3, 8, 8),
        "block_2/shortcut/kernel": (1, 1, 4, 8),
        "output/kernel": (8, 3),
        "stem/kernel": (3, 3, 1, 2),
    }


@pytest.mark.parametrize(
    ("kind", "args", "inputs", "outputs", "count"),
    [
        ("linear", {}, (spec(10),), 1, 11),
        ("mlp", {}, (spec(28, 28, 1),), 10, 266_610),  # LeNet-300-100
        ("mlp", {"widths": [128, 64]}, (spec(8, 8, 1),), 10, 17_226),
        ("mlp", {"widths": [3], "bias": False}, (spec(2),), 1, 9),
        ("cnn", {"widths": [20, 50], "dense": [500], "padding": "valid"}, (spec(28, 28, 1),), 10, 431_080),
        ("resnet", {}, (spec(32, 32, 3),), 10, 272_474),
        pytest.param("resnet", {"depth": 56}, (spec(32, 32, 3),), 10, 855_770, marks=pytest.mark.slow),
        ("autoencoder", {"widths": [32], "code": 8}, (spec(8, 8, 1),), 64, 4_744),
        ("rnn", {}, (spec(29, 12), LENGTHS), 9, 15_369),
    ],
)
def test_known_counts_of_parameters(kind, args, inputs, outputs, count):
    params, _ = jax.eval_shape(build(kind, args, inputs=inputs, outputs=outputs).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def test_unused_randomness_leaves_nothing_in_the_jaxpr():
    network = network_of("transformer")
    params, state = variables_of("transformer")

    def forward(params, x, lengths):
        return network.apply(params, state, (x, lengths), train=False, key=None)[0]

    text = str(jax.make_jaxpr(forward)(params, *inputs_of("transformer", 2)))
    assert not re.search(r"random_|threefry|key<", text)


def test_arrays_that_are_no_variables_are_constants():
    network = network_of("nnx class")
    params, state = variables_of("nnx class")
    doubled, _ = network.apply(params, state, inputs_of("nnx class", 2), train=False, key=None)
    params = params | {"output": jax.tree.map(lambda leaf: leaf / 2, params["output"])}
    single, _ = network.apply(params, state, inputs_of("nnx class", 2), train=False, key=None)
    np.testing.assert_allclose(doubled, 2 * single, rtol=1e-6)


def test_two_functions_get_their_own_tree_back():
    params, state = variables_of("two functions")
    x = np.asarray(inputs_of("two functions", 5)[0])
    outputs, _ = network_of("two functions").apply(params, state, (x,), train=False, key=None)
    p = {path: np.asarray(leaf) for path, leaf in leaves_by_path(params).items()}
    expected = np.maximum(x @ p["0/kernel"] + p["0/bias"], 0) @ p["1/kernel"] + p["1/bias"]
    np.testing.assert_allclose(outputs, expected, rtol=1e-5)


MISTAKES = {
    "no array among the params": (
        "tests.samples.nets:make_functions_with_text",
        {},
        (VECTOR,),
        "init does not answer a pytree of arrays alone (",
    ),
    "a bare array": (
        "tests.samples.nets:make_functions_of_one_array",
        {},
        (VECTOR,),
        "init answers one bare array; put it in a dict",
    ),
    "unknown kind": ("mpl", {}, (VECTOR,), "model 'mpl' is not known; did you mean 'mlp'? (known: linear, mlp, "),
    "unknown argument": (
        "mlp",
        {"width": [3]},
        (VECTOR,),
        "model 'mlp': 'width' is not an argument; did you mean 'widths'? "
        "(accepted: widths, activation, output_activation, dropout, batch_norm, bias)",
    ),
    "not a list": ("mlp", {"widths": 300}, (VECTOR,), "model 'mlp': widths = 300: must be a list of positive integers"),
    "not positive": ("mlp", {"widths": [3, 0]}, (VECTOR,), "widths[1] = 0: must be a positive integer"),
    "a flag as a number": ("resnet", {"width": True}, (IMAGE,), "width = True: must be a positive integer"),
    "activation": (
        "mlp",
        {"activation": "rleu"},
        (VECTOR,),
        "activation = 'rleu' is not known; did you mean 'relu'? (known: relu, tanh, sigmoid, gelu, none)",
    ),
    "dropout": ("rnn", {"dropout": 1.0}, (SERIES,), "dropout = 1.0: must be at least 0 and below 1"),
    "padding": ("cnn", {"padding": "vald"}, (IMAGE,), "padding = 'vald' is not known; did you mean 'valid'?"),
    "no channel": (
        "cnn",
        {},
        (spec(8, 8),),
        "images arrive as [height, width, channel], but one sample of x is [8, 8]; reshape it in the data",
    ),
    "vanishing image": (
        "cnn",
        {"padding": "valid"},
        (IMAGE,),
        "images of 8x8 vanish in convolution 1 (kernel 5, valid",
    ),
    "depth": (
        "resnet",
        {"depth": 18},
        (IMAGE,),
        "depth = 18: must be 6n + 2 (8, 14, 20, 32, 44, 56, 110); the nearest",
    ),
    "cell": ("rnn", {"cell": "grru"}, (SERIES,), "cell = 'grru' is not known; did you mean 'gru'? (known: gru, lstm)"),
    "heads": ("transformer", {"dim": 10}, (SERIES,), "dim = 10: must be a multiple of heads, 4"),
    "flat series": ("rnn", {}, (VECTOR,), "sequences arrive as [steps, features], but one sample of x is [4]"),
    "tokens without vocab": ("transformer", {}, (TOKENS,), "x holds integers, which are tokens and need an embedding"),
    "tokens for an mlp": ("mlp", {}, (TOKENS,), "use kind rnn or transformer and set `vocab`"),
    "vocab without tokens": ("rnn", {"vocab": 5}, (SERIES,), "vocab is for integer tokens, but x holds floats"),
    "lengths for an mlp": (
        "mlp",
        {},
        (SERIES, LENGTHS),
        "model 'mlp': its forward pass takes 1 input(s) but the data hold 2 (x, lengths)",
    ),
    "no such module": (
        "tests.samples.nest:Net",
        {},
        (VECTOR,),
        "could not be imported: no module 'tests.samples.nest'",
    ),
    "no such object": ("tests.samples.nets:NnxNett", {}, (VECTOR,), "has no 'NnxNett'; did you mean 'NnxNet'?"),
    "user's argument": (
        "tests.samples.nets:LinenNet",
        {"widht": 3},
        (VECTOR,),
        "model 'tests.samples.nets:LinenNet': 'widht' is not an argument; did you mean 'width'? (accepted: width)",
    ),
    "missing argument": (
        "tests.samples.nets:make_linen",
        {},
        (VECTOR,),
        "model 'tests.samples.nets:make_linen': the argument 'width' is missing (accepted: width)",
    ),
    "rngs by hand": (
        "tests.samples.nets:NnxNet",
        {"rngs": 3},
        (VECTOR,),
        "'rngs' is not an argument (accepted: width)",
    ),
    "arguments for an instance": (
        "tests.samples.nets:LINEN_INSTANCE",
        {"width": 3},
        (VECTOR,),
        "is a Linen module already made: it takes no arguments, found width",
    ),
    "no rngs": (
        "tests.samples.nets:make_without_rngs",
        {},
        (VECTOR,),
        "takes no `rngs`, so that the recipe's seed cannot",
    ),
    "no model": ("tests.samples.nets:NOT_A_MODEL", {}, (VECTOR,), "is of type int, neither a Flax module nor a"),
    "wrong shape": (
        "tests.samples.nets:WrongWidth",
        {},
        (VECTOR,),
        "model 'tests.samples.nets:WrongWidth' with {} does not take inputs float32[batch, 4]: TypeError: dot_general",
    ),
    "tuple": (
        "tests.samples.nets:AnswersTuple",
        {},
        (VECTOR,),
        "answers a value of type tuple; it must answer one array, its outputs",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told(mistake):
    kind, args, inputs, text = MISTAKES[mistake]
    with pytest.raises(UserMistake, match=re.escape(text)):
        build(kind, args, inputs=inputs, outputs=3)
