"""Counts against hand arithmetic: every expected figure is written out from the shapes."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from prune_jax.costs import cost
from prune_jax.models import build


def shape(*dims, dtype="float32"):
    return jax.ShapeDtypeStruct(dims, dtype)


def sparse(rng, *dims, density=0.5):
    """Random weights, some of them exactly zero."""
    return np.where(rng.random(dims) < density, rng.standard_normal(dims), 0).astype(np.float32)


def alive(*weights):
    return sum(int((np.asarray(w) != 0).sum()) for w in weights)


def mlp(params, x):
    for name in ("hidden_0", "hidden_1"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"][None])
    return x @ params["out"]["kernel"] + params["out"]["bias"][None]


@pytest.fixture
def lenet():
    rng = np.random.default_rng(0)
    sizes = {"hidden_0": (784, 300), "hidden_1": (300, 100), "out": (100, 10)}
    return {
        name: {"kernel": sparse(rng, *dims, density=0.1), "bias": np.ones(dims[1], np.float32)}
        for name, dims in sizes.items()
    }


@pytest.mark.parametrize("batch", [1, 7])
def test_lenet_300_100(lenet, batch):
    answer = cost(mlp, lenet, shape(batch, 784))
    kernels = [layer["kernel"] for layer in lenet.values()]

    assert answer.params == 266_610
    assert answer.bytes == 4 * 266_610
    assert answer.macs == batch * 266_200
    assert answer.nonzero == alive(*kernels) + 410
    assert answer.effective_macs == batch * alive(*kernels)
    assert answer.layers == {
        f"{name}/kernel": (batch * layer["kernel"].size, batch * alive(layer["kernel"]))
        for name, layer in lenet.items()
    }
    assert answer.notes == ()


def test_abstract_parameters_have_no_zeros(lenet):
    abstract = jax.tree.map(lambda w: shape(*w.shape), lenet)
    answer = cost(mlp, abstract, shape(1, 784))
    assert (answer.params, answer.nonzero) == (266_610, 266_610)
    assert (answer.macs, answer.effective_macs) == (266_200, 266_200)
    assert answer.layers["out/kernel"] == (1000, 1000)


def test_one_abstract_leaf_among_concrete_ones_counts_in_full():
    params = {"a": np.zeros((3, 2), np.float32), "b": shape(3, 2)}
    answer = cost(lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], axis=1), params, shape(1, 3))
    assert (answer.nonzero, answer.macs) == (6, 12)
    assert answer.layers == {"a": (6, 6), "b": (6, 6)}, "the pattern of the joined kernel is not known"


def test_arrays_of_numpy_float64_and_plain_numbers_are_parameters():
    params = {"w": np.eye(3), "scale": 2.0}
    answer = cost(lambda p, x: x @ (p["scale"] * p["w"]), params, shape(1, 3))
    assert (answer.params, answer.nonzero, answer.macs, answer.effective_macs) == (10, 4, 9, 3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_small_types(dtype):
    w = jnp.asarray([[1, 0, 2], [0, 0, 3]], dtype)
    answer = cost(lambda p, x: x @ p["w"].astype(jnp.float32), {"w": w}, shape(2, 2))
    assert (answer.nonzero, answer.effective_macs) == (3, 6)
    assert answer.bytes == 6 * w.dtype.itemsize


def test_counters_and_keys_are_no_parameters():
    params = {"w": np.ones((2, 2), np.float32), "count": jnp.uint32(3), "key": jax.random.key(0)}
    answer = cost(lambda p, x: x @ p["w"], params, shape(1, 2))
    assert (answer.params, answer.nonzero, answer.bytes) == (4, 4, 16)


def conv(stride=(1, 1), groups=1, padding="SAME", lhs_dilation=None, numbers=("NHWC", "HWIO", "NHWC")):
    return lambda params, x: lax.conv_general_dilated(
        x, params["w"], stride, padding, lhs_dilation, None, numbers, feature_group_count=groups
    )


@pytest.mark.parametrize(
    ("function", "kernel", "image", "macs"),
    [
        (conv(), (3, 3, 8, 16), (2, 10, 10, 8), 2 * 10 * 10 * 3 * 3 * 8 * 16),
        (conv(padding="VALID"), (3, 3, 8, 16), (2, 10, 10, 8), 2 * 8 * 8 * 3 * 3 * 8 * 16),
        (conv(stride=(2, 2)), (3, 3, 8, 16), (2, 10, 10, 8), 2 * 5 * 5 * 3 * 3 * 8 * 16),
        (conv(groups=4), (3, 3, 2, 16), (2, 10, 10, 8), 2 * 10 * 10 * 3 * 3 * 2 * 16),
        (conv(groups=8), (3, 3, 1, 8), (2, 10, 10, 8), 2 * 10 * 10 * 3 * 3 * 8),
        (
            conv(padding=((1, 2), (1, 2)), lhs_dilation=(2, 2)),
            (3, 3, 8, 16),
            (2, 10, 10, 8),
            2 * 10 * 10 * 3 * 3 * 8 * 16,
        ),
        (conv(numbers=("NCHW", "OIHW", "NCHW")), (16, 8, 3, 3), (2, 8, 10, 10), 2 * 10 * 10 * 3 * 3 * 8 * 16),
    ],
    ids=["same", "valid", "stride", "groups", "depthwise", "transposed", "channels first"],
)
def test_convolutions(function, kernel, image, macs):
    w = sparse(np.random.default_rng(0), *kernel)
    answer = cost(function, {"w": w}, shape(*image))
    assert answer.macs == macs
    assert answer.effective_macs == macs // w.size * alive(w)


def test_attention_counts_the_products_of_two_activations_in_full():
    batch, time, heads, width = 2, 5, 3, 4
    rng = np.random.default_rng(0)
    params = {"qkv": sparse(rng, heads * width, 3 * heads * width), "out": sparse(rng, heads * width, heads * width)}

    def attention(params, x):
        q, k, v = (
            part.reshape(batch, time, heads, width) for part in jnp.split(x @ params["qkv"], 3, axis=-1)
        )  # [batch, time, heads, width]
        scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(batch, time, heads * width)
        return mixed @ params["out"]

    between = 2 * batch * heads * time * time * width
    answer = cost(attention, params, shape(batch, time, heads * width))
    assert answer.macs == batch * time * (12 * 36 + 12 * 12) + between
    assert answer.effective_macs == batch * time * alive(*params.values()) + between
    assert sum(macs for macs, _ in answer.layers.values()) == answer.macs - between


def _split_qkv(w):
    return jnp.split(w["a"], 3, axis=1)[1]


def _masked(w):
    return w["a"] * jnp.asarray(np.arange(72).reshape(6, 12) % 3 != 0, jnp.float32)


def _selected(w):
    return jnp.where(np.arange(72).reshape(6, 12) % 3 != 0, w["a"], 0)


STRUCTURE = {
    "transpose": lambda w: w["a"].T.reshape(12, 6).T,
    "reshape": lambda w: w["a"].reshape(2, 3, 12).reshape(6, 12),
    "cast": lambda w: w["a"].astype(jnp.bfloat16).astype(jnp.float32),
    "squeeze": lambda w: jnp.squeeze(w["a"][None], 0),
    "slice": lambda w: w["a"][:, 2:7],
    "strided slice": lambda w: w["a"][:, ::3],
    "reverse": lambda w: w["a"][:, ::-1],
    "take": lambda w: jnp.take(w["a"], np.array([3, 0, 3]), axis=1),
    "split": _split_qkv,
    "concatenate": lambda w: jnp.concatenate([w["a"], w["a"]], axis=1),
    "pad": lambda w: jnp.pad(w["a"], ((0, 0), (1, 2))),
    "mask by product": _masked,
    "mask by where": _selected,
    "jit": jax.jit(lambda w: w["a"] * 2.0),
    "jit in jit": jax.jit(lambda w: jax.jit(jnp.negative)(w["a"])),
    "remat": jax.checkpoint(lambda w: w["a"] * 0.5),
    "custom_jvp": lambda w: jax.nn.relu(w["a"]),
    "standardised": lambda w: w["a"] - jnp.mean(w["a"]),
    "absolute": lambda w: jnp.abs(w["a"]),
}


@pytest.mark.parametrize("function", STRUCTURE.values(), ids=STRUCTURE.keys())
def test_zeros_are_followed_to_the_product(function):
    params = {"a": sparse(np.random.default_rng(0), 6, 12)}
    answer = cost(lambda p, x: x @ function(p), params, shape(5, 6))
    kernel = np.asarray(function(params))
    assert answer.macs == 5 * kernel.size
    assert answer.effective_macs == 5 * alive(kernel)
    assert list(answer.layers) == ["a"]


def test_joined_parameters_are_charged_one_by_one():
    rng = np.random.default_rng(0)
    params = {"q": sparse(rng, 6, 4), "k": sparse(rng, 6, 4, density=0.2), "v": sparse(rng, 6, 3, density=0.0)}

    def joined(p, x):
        w = jnp.concatenate([p["q"], p["k"].astype(jnp.float32), p["v"]], axis=-1)
        return (x @ w.T.reshape(11, 6).T)[:, ::2]

    answer = cost(joined, params, shape(5, 6))
    assert answer.layers == {
        "q": (120, 5 * alive(params["q"])),
        "k": (120, 5 * alive(params["k"])),
        "v": (90, 0),
    }


def test_scaled_weights_are_charged_to_the_larger_parameter():
    rng = np.random.default_rng(0)
    params = {"gain": np.array([0.0, 1.0, 2.0], np.float32), "w": sparse(rng, 6, 3)}
    answer = cost(lambda p, x: x @ (p["w"] * p["gain"][None]), params, shape(1, 6))
    assert answer.layers == {"w": (18, alive(params["w"][:, 1:]))}


def test_the_sparser_of_two_weights_counts():
    params = {"a": np.eye(4, dtype=np.float32), "b": np.ones((4, 4), np.float32)}
    answer = cost(lambda p, x: x @ (p["a"] @ p["b"]), params, shape(1, 4))
    assert answer.macs == 64 + 16
    assert answer.effective_macs == 16 + 16
    assert answer.layers == {"a": (80, 32)}, "of two weights of one size the first is charged"


def test_biases_lookups_and_elementwise_products_are_no_macs():
    params = {"table": np.ones((100, 8), np.float32), "scale": np.ones(8, np.float32), "bias": np.ones(8, np.float32)}

    def function(p, tokens):
        x = jnp.take(p["table"], tokens, axis=0)  # [batch, time, 8]
        return jnp.einsum("bti,i->bti", x, p["scale"]) * p["scale"][None, None] + p["bias"][None, None]

    answer = cost(function, params, shape(3, 7, dtype="int32"))
    assert (answer.params, answer.macs, answer.layers) == (816, 0, {})


def test_constants_are_no_weights():
    mixing = np.diag(np.arange(4, dtype=np.float32))
    answer = cost(lambda p, x: (x @ mixing) @ p["w"], {"w": np.ones((4, 2), np.float32)}, shape(1, 4))
    assert (answer.macs, answer.effective_macs) == (16 + 8, 16 + 8)


def test_unused_work_is_left_out():
    def function(p, x):
        _ = x @ p["auxiliary"]
        return x @ p["w"]

    params = {"w": np.ones((4, 2), np.float32), "auxiliary": np.ones((4, 50), np.float32)}
    assert cost(function, params, shape(1, 4)).macs == 8


def gru(params, x):
    """A plain GRU: x [batch, time, features] -> last state [batch, width]."""
    width = params["h"].shape[0]

    def step(h, x):
        zx, rx, nx = jnp.split(x @ params["i"], 3, axis=-1)
        zh, rh, nh = jnp.split(h @ params["h"], 3, axis=-1)
        z, r = jax.nn.sigmoid(zx + zh), jax.nn.sigmoid(rx + rh)
        return z * h + (1 - z) * jnp.tanh(nx + r * nh), None

    return lax.scan(step, jnp.zeros((x.shape[0], width)), jnp.swapaxes(x, 0, 1))[0] @ params["out"]


def test_a_scan_counts_every_step():
    rng = np.random.default_rng(0)
    params = {"i": sparse(rng, 12, 3 * 16), "h": sparse(rng, 16, 3 * 16), "out": sparse(rng, 16, 9)}
    answer = cost(gru, params, shape(4, 29, 12))
    assert answer.macs == 4 * (29 * (12 * 48 + 16 * 48) + 16 * 9)
    assert answer.effective_macs == 4 * (29 * alive(params["i"], params["h"]) + alive(params["out"]))
    assert answer.layers["h"] == (4 * 29 * 16 * 48, 4 * 29 * alive(params["h"]))


def test_scanned_layers_have_each_their_own_zeros():
    w = sparse(np.random.default_rng(0), 3, 5, 5)
    w[1] = 0
    masks = np.arange(3 * 25).reshape(3, 5, 5) % 2 == 0

    def function(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ jnp.where(w[1], w[0], 0)), None), x, (p["layers"], masks))[0]

    answer = cost(function, {"layers": w}, shape(2, 5))
    assert answer.layers == {"layers": (2 * 75, 2 * alive(w * masks))}


def test_a_loop_that_carries_its_weights():
    w = sparse(np.random.default_rng(0), 5, 5)

    def function(p, x):
        return lax.fori_loop(0, 4, lambda _, c: (c[0], jnp.tanh(c[1] @ c[0])), (p["w"], x))[1]

    answer = cost(function, {"w": w}, shape(2, 5))
    assert answer.layers == {"w": (4 * 2 * 25, 4 * 2 * alive(w))}


def test_a_branch_counts_its_dearest_arm():
    rng = np.random.default_rng(0)
    params = {"small": sparse(rng, 4, 4), "large": sparse(rng, 4, 4)}

    def function(p, x):
        return lax.switch(
            jnp.int32(x.sum() > 0),
            [lambda x: x, lambda x: x @ p["small"], lambda x: x @ p["large"] @ p["large"]],
            x,
        )

    assert cost(function, params, shape(1, 4)).layers == {"large": (32, 2 * alive(params["large"]))}


def test_a_while_loop_is_counted_once_and_noted():
    w = sparse(np.random.default_rng(0), 4, 4)

    def function(p, x):
        return lax.while_loop(lambda x: x.sum() < 10, lambda x: x @ p["w"] + 1, x)

    answer = cost(function, {"w": w}, shape(1, 4))
    assert answer.layers == {"w": (16, alive(w))}
    assert answer.notes == ("a while loop of unknown length is counted once",)


def test_what_cannot_be_seen_is_noted():
    def function(p, x):
        return jax.pure_callback(lambda w, x: x @ w, shape(1, 4), p["w"], x)

    answer = cost(function, {"w": np.ones((4, 4), np.float32)}, shape(1, 4))
    assert answer.macs == 0
    assert answer.notes == ("the multiplications inside pure_callback are not counted",)


def test_custom_vjp_and_gradients():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    w = sparse(np.random.default_rng(0), 4, 3)

    forward = cost(lambda p, x: product(x, p["w"]), {"w": w}, shape(5, 4))
    assert forward.layers == {"w": (60, 5 * alive(w))}
    both = cost(lambda p, x: jax.grad(lambda p: product(x, p["w"]).sum())(p), {"w": w}, shape(5, 4))
    assert both.macs == 60, "the weight's gradient alone: XLA drops the rest, and so do we"


def test_linen_variables():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3))(x)))
            x = nn.max_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
            return nn.Dense(10)(x)

    net = Net()
    variables = net.init(jax.random.key(0), jnp.ones((1, 8, 8, 1)))
    answer = cost(net.apply, variables, shape(1, 8, 8, 1))
    assert answer.layers == {
        "params/Conv_0/kernel": (8 * 8 * 9 * 8, 8 * 8 * 9 * 8),
        "params/Dense_0/kernel": (4 * 4 * 8 * 10, 4 * 4 * 8 * 10),
    }
    assert answer.params == (72 + 8) + (1280 + 10) + 16 + 16


def test_linen_lstm_joins_its_kernels():
    lstm = nn.RNN(nn.OptimizedLSTMCell(6))
    variables = lstm.init(jax.random.key(0), jnp.ones((1, 5, 4)))
    dead = variables["params"]["cell"]["hf"]["kernel"].at[:3].set(0)
    variables["params"]["cell"]["hf"]["kernel"] = dead
    answer = cost(lstm.apply, variables, shape(2, 5, 4))
    assert answer.macs == 2 * 5 * 4 * (4 * 6 + 6 * 6)
    assert answer.macs - answer.effective_macs == 2 * 5 * 18
    assert answer.layers["params/cell/hf/kernel"] == (2 * 5 * 36, 2 * 5 * 18)
    assert len(answer.layers) == 8


def test_nnx_recurrent_network():
    module = nnx.RNN(nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)))
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    answer = cost(lambda p, rest, x: nnx.merge(graph, p, rest)(x), params, rest, shape(2, 5, 3))
    assert answer.macs == 2 * 5 * (3 * 12 + 4 * 12)
    assert answer.effective_macs == answer.macs
    assert answer.params == 3 * 12 + 12 + 4 * 12


def test_nnx_attention():
    module = nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    answer = cost(lambda p, x: nnx.merge(graph, p, rest)(x), params, shape(1, 5, 8))
    assert answer.macs == 5 * 4 * 64 + 2 * 5 * 5 * 8
    assert len(answer.layers) == 4


def test_linen_attention_with_zeros():
    attention = nn.MultiHeadDotProductAttention(num_heads=2)
    variables = attention.init(jax.random.key(0), jnp.ones((1, 5, 8)))
    kernel = variables["params"]["query"]["kernel"]  # [8, heads, 4]
    variables["params"]["query"]["kernel"] = kernel.at[:, 0].set(0)
    answer = cost(attention.apply, variables, shape(1, 5, 8))
    assert answer.layers["params/query/kernel"] == (5 * 64, 5 * 32)


def test_resnet_20_has_the_size_of_the_papers():
    """He et al. 2016: 0.27 million parameters; 40.6 million MACs, and 0.26 more for our projections."""
    network = build("resnet", {"depth": 20, "width": 16}, inputs=(shape(1, 32, 32, 3),), outputs=10)
    params, state = jax.eval_shape(network.init, jax.random.key(0))
    forward = partial(network.apply, train=False, key=None)
    answer = cost(lambda p, state, x: forward(p, state, (x,)), params, state, shape(1, 32, 32, 3))
    assert answer.params == 272_474
    assert answer.macs == 40_550_400 + 640 + 16 * 32 * 256 + 32 * 64 * 64
