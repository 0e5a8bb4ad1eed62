"""What kernels see, held against intermediate values that are computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

from prune_jax.activations import capture
from tests.compiling import compilations
from tests.zoo import ZOO, Make

make = Make()


def rows(array, axis=-1):
    """`[everything else, size]`, in numpy."""
    array = np.moveaxis(np.asarray(array), axis, -1)
    return array.reshape(-1, array.shape[-1])


def seen(apply, params, *inputs):
    """Path and axis -> the values of all its readings."""
    names = []

    @jax.jit
    def found(params, *inputs):
        readings = [(r, d) for r in capture(apply, params, *inputs).readings for d in range(len(r.shape)) if r.reads(d)]
        names[:] = [f"{r.path.removesuffix('/value')}[{d}]" for r, d in readings]
        return [r.along(d) for r, d in readings]

    values = found(params, *inputs)
    with compilations() as seconds:
        found(params, *inputs)
    assert not seconds
    by_name = {}
    for name, array in zip(names, values, strict=True):
        by_name.setdefault(name, []).append(np.asarray(array))
    return by_name


def same(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_dense_layers_however_their_kernels_are_turned():
    params = {"a": make(3, 4), "b": make(5, 4), "c": make(10, 2), "h": {"w": make(4, 6).astype(jnp.bfloat16)}}

    @jax.checkpoint
    def inner(p, h):
        return jax.nn.relu(jax.jit(lambda w, h: h @ w.T)(p["b"], h))

    def apply(p, x):
        h = jnp.tanh(x @ p["a"])
        y = inner(p, h)
        z = h @ p["h"]["w"].astype(jnp.float32).reshape(2, 2, 6).reshape(4, 6)
        return jnp.concatenate([y, y], -1) @ p["c"], z

    x = make(7, 3)
    found = seen(apply, params, x)
    for reading in capture(apply, params, x).readings:  # not jitted
        for d in (d for d in range(2) if reading.reads(d)):
            same(reading.along(d), found[f"{reading.path}[{d}]"][0])
    h = np.tanh(np.asarray(x) @ params["a"])
    y = np.maximum(h @ np.asarray(params["b"]).T, 0)
    assert found.keys() == {"a[0]", "b[1]", "c[0]", "h/w[0]"}
    same(found["a[0]"][0], x)
    same(found["b[1]"][0], h)
    same(found["c[0]"][0], np.concatenate([y, y], -1))
    same(found["h/w[0]"][0], h)


def test_convolutions_of_linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3), strides=2)(x))
            x = nn.Conv(6, (3, 3), feature_group_count=2)(x)
            return nn.Dense(2)(x.reshape(x.shape[0], -1))

    net, x = Net(), make(2, 6, 6, 3)
    variables = make.like(jax.eval_shape(net.init, jax.random.key(0), x))
    _, state = jax.jit(lambda v: net.apply(v, x, capture_intermediates=True))(variables)
    kept = {name: value["__call__"][0] for name, value in state["intermediates"].items() if name != "__call__"}
    found = seen(net.apply, variables, x)
    same(found["params/Conv_0/kernel[2]"][0], rows(x))
    first = np.maximum(kept["Conv_0"], 0)
    same(found["params/Conv_1/kernel[2]"][0], rows(first.reshape(2, 3, 3, 2, 2)))  # by places within the groups
    same(found["params/Dense_0/kernel[0]"][0], rows(np.asarray(kept["Conv_1"]).reshape(2, -1)))


def test_attention_of_nnx_with_kernels_of_three_axes():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 6, (2,), rngs=rngs)
            self.t = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
            self.out = nnx.Linear(6, 2, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.gelu(self.t(self.conv(x))))

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    x = make(2, 5, 3)
    found = seen(lambda p, x: nnx.merge(graph, p)(x), state, x)
    net = nnx.merge(graph, state)
    h = net.conv(x)
    q, k, v = (np.asarray(layer(h)) for layer in (net.t.query, net.t.key, net.t.value))  # [batch, steps, heads, 3]
    weights = jax.nn.softmax(np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(3))
    held = np.einsum("bhqk,bkhd->bqhd", weights, v)
    same(found["conv/kernel[1]"][0], rows(x))
    for name in ("query", "key", "value"):
        same(found[f"t/{name}/kernel[0]"][0], rows(h))
    same(found["t/out/kernel[0]"][0], rows(held, 2))
    same(found["t/out/kernel[1]"][0], rows(held, 3))
    same(found["out/kernel[0]"][0], rows(nnx.gelu(net.t(h))))


def test_a_kernel_that_is_read_twice_has_two_readings():
    params = {"a": make(3, 3)}
    found = seen(lambda p, x: jnp.tanh(x @ p["a"]) @ p["a"].T, params, x := make(4, 3))
    same(found["a[0]"][0], x)
    same(found["a[1]"][0], np.tanh(np.asarray(x) @ params["a"]))


def test_what_is_not_seen_is_told():
    params = {"w": make(3, 3), "m": make(3, 3), "a": make(3, 2), "b": make(2, 3), "o": make(3, 2), "t": make(9, 3)}

    def apply(p, i):
        x = lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), p["t"][i], None, length=2)[0]
        return x @ (p["m"] * 2) @ (p["a"] @ p["b"]) @ p["o"]

    captured = capture(apply, params, jnp.array([0, 3]))
    assert captured.unseen == {"w": "scan", "m": "mul", "a": "dot_general", "b": "dot_general"}
    assert [reading.path for reading in captured.readings] == ["t", "o"]


def patches(x, kernel, stride):
    """`[batch, places, kernel .., in]` of a convolution with padding SAME, slowly."""
    x, k = np.asarray(x), kernel
    out = [-(-n // stride) for n in x.shape[1:3]]
    total = [max((o - 1) * stride + k - n, 0) for o, n in zip(out, x.shape[1:3], strict=True)]
    x = np.pad(x, [(0, 0), *((t // 2, t - t // 2) for t in total), (0, 0)])
    return np.stack(
        [x[:, i * stride : i * stride + k, j * stride : j * stride + k] for i in range(out[0]) for j in range(out[1])],
        1,
    )


@pytest.mark.parametrize("groups", [1, 2])
def test_squares_of_a_convolution_are_those_of_its_patches(groups):
    x, w = make(2, 5, 6, 4), make(3, 3, 4 // groups, 6)

    def apply(p, x):
        spec = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, p["w"], (2, 2), "SAME", dimension_numbers=spec, feature_group_count=groups)

    (reading,) = capture(apply, {"w": w}, x).readings
    sums = np.square(patches(x, 3, 2)).sum((0, 1))  # [3, 3, in]
    per_group = sums.reshape(3, 3, groups, 4 // groups)
    expected = np.repeat(np.moveaxis(per_group, 2, -1), 6 // groups, axis=-1)
    same(reading.squares(), expected)
    same(jax.jit(lambda w, x: capture(apply, {"w": w}, x).readings[0].squares())(w, x), expected)


def test_squares_of_products_and_lookups():
    params = {"t": make(5, 3), "q": make(3, 2, 4), "o": make(2, 4, 3), "e": make(2, 3, 4)}

    def apply(p, i, x):
        h = jnp.einsum("bd,dhk->bhk", p["t"][i], p["q"])
        return jnp.einsum("bhk,hkd->bd", h, p["o"]), jnp.einsum("bed,edf->bef", x, p["e"])

    i, x = jnp.array([1, 1, 4]), make(6, 2, 3)
    found = {r.path: r.squares() for r in capture(apply, params, i, x).readings}
    taken = np.asarray(params["t"])[np.asarray(i)]
    h = np.einsum("bd,dhk->bhk", taken, params["q"])
    same(found["t"], np.array([0, 2, 0, 0, 1.0])[:, None] * np.ones((5, 3)))
    same(found["q"], np.square(taken).sum(0)[:, None, None] * np.ones((3, 2, 4)))
    same(found["o"], np.square(h).sum(0)[..., None] * np.ones((2, 4, 3)))
    same(found["e"], np.square(x).sum(0)[..., None] * np.ones((2, 3, 4)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention_fused_and_split", "checkpointed_blocks"])
def test_squares_are_those_of_what_is_seen(name):
    """Where each value meets each weight of its index, as in dense layers, the two ways to the sums agree."""
    network = ZOO[name]
    apply, params, inputs = network.build(make, network.batch)
    dense = 0
    for reading in capture(apply, params, *inputs).readings:
        if len(reading.shape) == 2 and reading.reads(0):
            dense += 1
            expected = np.square(rows(reading.along(0))).sum(0)[:, None] * np.ones(reading.shape)
            same(reading.squares(), expected)
        assert reading.squares().shape == reading.shape
    assert dense
