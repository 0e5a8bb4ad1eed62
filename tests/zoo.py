"""Small networks of every kind, each with the groups that it truly has: for tests of compaction.

A row is a function `(make, n) -> (apply, params, inputs)`: `make` draws numbers, `n` is the batch size. What is
expected of it maps the members of a group, `path:axis` each, to its size; to several sizes where several groups have
the same members. An axis that stands in no group must be frozen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.nn import gelu, relu, sigmoid, silu, softmax

from prune_jax.trees import map_by_path


@dataclass(frozen=True)
class Network:
    """One row.

    Attributes:
        name: of the function that builds it.
        build: `(make, n) -> (apply, params, inputs)`.
        groups: members -> size, or sizes in rising order.
        batch: the batch size it is traced with.
        other: another one; None where it has none.
        mirrors: whether outputs are new values of parameters, and shrink as these do.
        tolerance: of outputs, relative to the largest.
    """

    name: str
    build: Callable[[Make, int], tuple[Callable[..., Any], Any, tuple[Any, ...]]]
    groups: Mapping[str, int | tuple[int, ...]]
    batch: int = 4
    other: int | None = 7
    mirrors: bool = False
    tolerance: float = 1e-5


ZOO: dict[str, Network] = {}


def network(groups: Mapping[str, int | tuple[int, ...]], **options: Any) -> Callable[..., Any]:
    def register(build):
        ZOO[build.__name__] = Network(build.__name__, build, groups, **options)
        return build

    return register


class Make:
    """Draws numbers that are never near zero."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)

    def __call__(self, *shape: int) -> jax.Array:
        sign = self.rng.choice([-1.0, 1.0], shape)
        return jnp.asarray(sign * self.rng.uniform(0.2, 0.7, shape), jnp.float32)

    def positive(self, *shape: int) -> jax.Array:
        return jnp.asarray(self.rng.uniform(0.5, 1.5, shape), jnp.float32)

    def ids(self, below: int, *shape: int) -> jax.Array:
        return jnp.asarray(self.rng.integers(0, below, shape), jnp.int32)

    def like(self, tree: Any) -> Any:
        """Numbers for all leaves; positive ones for variances and scales."""

        def draw(path: str, leaf: Any) -> Any:
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                return jnp.zeros(leaf.shape, leaf.dtype)
            parts = path.split("/")
            drawn = self.positive if {"var", "scale", "sigma"} & {*parts, *parts[-1:]} else self
            return drawn(*leaf.shape).astype(leaf.dtype)

        return map_by_path(draw, tree)


def linen(make: Make, module: nn.Module, *inputs: Any) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
    """A Linen module whose only variables are parameters."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    assert set(shapes) == {"params"}
    return (lambda p, *x: module.apply({"params": p}, *x)), make.like(shapes["params"]), inputs


def of_nnx(
    make: Make, build: Callable[[nnx.Rngs], Any], *inputs: Any
) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
    """An NNX module."""
    graph, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param)
    return (lambda p, *x: nnx.merge(graph, p)(*x)), make.like(state), inputs


def _of_nnx_paths(groups):
    """NNX ends its paths with `value`."""
    return {members.replace(":", "/value:"): size for members, size in groups.items()}


def conv(x, kernel, stride=1, groups=1, padding="SAME", **options):
    """`[batch, *places, channel]` with `[*places, in, out]`."""
    places = "DHW"[-(x.ndim - 2) :]
    layout = (f"N{places}C", f"{places}IO", f"N{places}C")
    strides = (stride,) * (x.ndim - 2)
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=layout, feature_group_count=groups, **options
    )


def layer_norm(x, scale, bias=0.0):
    centred = x - x.mean(-1, keepdims=True)
    return centred * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * scale[None] + bias


def heads(x, count):
    return x.reshape(*x.shape[:-1], count, -1)


def attend(q, k, v, mask=None):
    """`[batch, length, heads, dim]` each."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = jnp.where(mask[None, None], scores, -1e9)
    return jnp.einsum("bhqk,bkhd->bqhd", softmax(scores), v)


# Dense layers


@network({"w1:1 b1:0 w2:0": 6})
def mlp(make, n):
    params = {"w1": make(5, 6), "b1": make(6), "w2": make(6, 3), "b2": make(3)}
    return (lambda p, x: relu(x @ p["w1"] + p["b1"][None]) @ p["w2"] + p["b2"][None]), params, (make(n, 5),)


@network({"w1:1 b1:0 w2:0": 6})
def mlp_whose_zeros_become_halves(make, n):
    params = {"w1": make(5, 6), "b1": make(6), "w2": make(6, 3)}
    return (lambda p, x: sigmoid(x @ p["w1"] + p["b1"][None]) @ p["w2"]), params, (make(n, 5),)


@network({"0:1 1:0": 6, "1:1 2:0": 6}, batch=6)
def everything_is_six(make, n):
    def apply(p, x):
        for w in p[:-1]:
            x = jnp.tanh(x @ w)
        return x @ p[-1]

    return apply, [make(6, 6), make(6, 6), make(6, 6)], (make(n, 6),)


@network({"0:1 1:0": 8, "1:1 2:0": 5, "2:1 3:0": 6})
def mlp_of_a_tuple(make, n):
    def apply(p, x):
        for w in p[:-1]:
            x = silu(x @ w)
        return x @ p[-1]

    return apply, (make(3, 8), make(8, 5), make(5, 6), make(6, 2)), (make(n, 3),)


class Pair(NamedTuple):
    w: jax.Array
    layers: list


@network({"w:1 layers/0/k:0": 6, "layers/0/k:1 layers/1/0:0": 8})
def params_in_lists_and_named_tuples(make, n):
    def apply(p, x):
        return gelu(gelu(x @ p.w) @ p.layers[0]["k"]) @ p.layers[1][0]

    return apply, Pair(make(5, 6), [{"k": make(6, 8)}, (make(8, 3),)]), (make(n, 5),)


@network({"a:1 o:0": 6})
def a_parameter_that_nothing_reads(make, n):
    return (
        (lambda p, x: relu(x @ p["a"]) @ p["o"]),
        {"a": make(5, 6), "o": make(6, 3), "left": make(6, 8)},
        (make(n, 5),),
    )


@network({})
def a_width_of_one(make, n):
    return (lambda p, x: relu(x @ p["a"]) @ p["o"]), {"a": make(5, 1), "o": make(1, 3)}, (make(n, 5),)


@network({"a:1 o:0": 6}, batch=6)
def batch_as_large_as_the_width(make, n):
    def apply(p, x):
        h = relu(x @ p["a"])
        return (h - h.mean(0, keepdims=True)) @ p["o"]

    return apply, {"a": make(6, 6), "o": make(6, 6)}, (make(n, 6),)


@network({"e:1 u:0 d:1 o:0": 8, "u:1 d:0": 12})
def residual(make, n):
    def apply(p, x):
        h = x @ p["e"]
        return (h + relu(h @ p["u"]) @ p["d"]) @ p["o"]

    return apply, {"e": make(5, 8), "u": make(8, 12), "d": make(12, 8), "o": make(8, 3)}, (make(n, 5),)


@network({"e:1 u:0 d:1 o:0": 6, "u:1 d:0": 6}, batch=6)
def residual_of_equal_sizes(make, n):
    def apply(p, x):
        h = x @ p["e"]
        return (h + relu(h @ p["u"]) @ p["d"]) @ p["o"]

    return apply, {name: make(6, 6) for name in "eudo"}, (make(n, 6),)


@network({"a:1 o:0": 6})
def residual_that_broadcasts(make, n):
    def apply(p, x):
        return relu(x @ p["a"] + x @ p["s"]) @ p["o"]

    return apply, {"a": make(5, 6), "s": make(5, 1), "o": make(6, 3)}, (make(n, 5),)


@network({"a:1 b:0 c:0 o:0": 5, "b:1 c:0 o:0": 6, "c:1 o:0": 8})
def dense_connections(make, n):
    def apply(p, x):
        h = x @ p["a"]
        h = jnp.concatenate([h, relu(h @ p["b"])], -1)
        h = jnp.concatenate([h, relu(h @ p["c"])], -1)
        return h @ p["o"]

    return apply, {"a": make(3, 5), "b": make(5, 6), "c": make(11, 8), "o": make(19, 2)}, (make(n, 3),)


@network({"a:1 c:1 o:0": 5, "b:1 c:1 o:0": 6})
def concat_meets_residual(make, n):
    def apply(p, x):
        return relu(jnp.concatenate([x @ p["a"], x @ p["b"]], -1) + x @ p["c"]) @ p["o"]

    return apply, {"a": make(3, 5), "b": make(3, 6), "c": make(3, 11), "o": make(11, 2)}, (make(n, 3),)


@network({"a:1 o:0": 6})
def glu(make, n):
    def apply(p, x):
        value, gate = jnp.split(x @ p["a"], 2, -1)
        return value * sigmoid(gate) @ p["o"]

    return apply, {"a": make(5, 12), "o": make(6, 3)}, (make(n, 5),)


@network({"up:1 gate:1 down:0": 12, "e:1 up:0 gate:0 down:1 norm:0 o:0": 8})
def swiglu_with_rms_norm(make, n):
    def apply(p, x):
        h = x @ p["e"]
        y = h * lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + 1e-6) * p["norm"][None]
        return (h + silu(y @ p["gate"]) * (y @ p["up"]) @ p["down"]) @ p["o"]

    params = {"e": make(5, 8), "norm": make(8), "gate": make(8, 12), "up": make(8, 12), "down": make(12, 8)}
    return apply, params | {"o": make(8, 3)}, (make(n, 5),)


@network({"a:1 o1:0": 5, "a:1 o2:0": 7})
def uneven_split(make, n):
    def apply(p, x):
        left, right = jnp.split(relu(x @ p["a"]), [5], -1)
        return left @ p["o1"], right @ p["o2"]

    return apply, {"a": make(3, 12), "o1": make(5, 2), "o2": make(7, 4)}, (make(n, 3),)


@network({"a:1 b:1 o:0": 6})
def stack_and_sum(make, n):
    def apply(p, x):
        return jnp.stack([x @ p["a"], relu(x @ p["b"])], -1).sum(-1) @ p["o"]

    return apply, {"a": make(5, 6), "b": make(5, 6), "o": make(6, 3)}, (make(n, 5),)


@network({"a:1 b:1 o:0": 6})
def stack_and_interleave(make, n):
    def apply(p, x):
        return jnp.stack([x @ p["a"], relu(x @ p["b"])], -1).reshape(-1, 12) @ p["o"]

    return apply, {"a": make(5, 6), "b": make(5, 6), "o": make(12, 3)}, (make(n, 5),)


@network({"a:1 b:1 o:0": 5, "b:1 o:0": 3})
def shortcut_padded_with_zeros(make, n):
    def apply(p, x):
        return relu(jnp.pad(x @ p["a"], ((0, 0), (1, 2))) + x @ p["b"]) @ p["o"]

    return apply, {"a": make(3, 5), "b": make(3, 8), "o": make(8, 2)}, (make(n, 3),)


@network({"a:1 b:1 o:0": 5, "b:1 o:0": 3})
def shortcut_padded_with_ones(make, n):
    def apply(p, x):
        h = jnp.pad(relu(x @ p["a"]), ((0, 0), (0, 3)), constant_values=1.0) * (x @ p["b"])
        return (h * h.sum(-1, keepdims=True)) @ p["o"]

    return apply, {"a": make(3, 5), "b": make(3, 8), "o": make(8, 2)}, (make(n, 3),)


@network({"a:1 o:0": 4, "a:1": 4})
def every_second_channel(make, n):
    return (lambda p, x: relu(x @ p["a"])[:, ::2] @ p["o"]), {"a": make(5, 8), "o": make(4, 3)}, (make(n, 5),)


@network({"a:1 o:0": 5})
def one_channel_is_read_by_number(make, n):
    def apply(p, x):
        h = relu(x @ p["a"])
        return h @ p["o"] + h[:, 2:3]

    return apply, {"a": make(5, 6), "o": make(6, 3)}, (make(n, 5),)


@network({"a:1 o:0": 4})
def added_to_its_mirror_image(make, n):
    def apply(p, x):
        h = relu(x @ p["a"])
        return (h + h[:, ::-1]) @ p["o"]

    return apply, {"a": make(5, 8), "o": make(8, 3)}, (make(n, 5),)


@network({"a:1 o:0": 6})
def rolled(make, n):
    return (lambda p, x: jnp.roll(relu(x @ p["a"]), 2, -1) @ p["o"]), {"a": make(5, 6), "o": make(6, 3)}, (make(n, 5),)


@network({"a:1 o:0": 2})
def added_to_itself_rolled(make, n):
    def apply(p, x):
        h = relu(x @ p["a"])
        return (h + jnp.roll(h, 2, -1)) @ p["o"]

    return apply, {"a": make(5, 6), "o": make(6, 3)}, (make(n, 5),)


@network({"a:1 o:0": 5, "o:0": 2})
def repeated(make, n):
    return (
        (lambda p, x: jnp.repeat(relu(x @ p["a"]), 2, -1) @ p["o"]),
        {"a": make(3, 5), "o": make(10, 2)},
        (make(n, 3),),
    )


@network({"a:1 o:0": 5, "o:0": 3})
def tiled(make, n):
    return (lambda p, x: jnp.tile(relu(x @ p["a"]), 3) @ p["o"]), {"a": make(3, 5), "o": make(15, 2)}, (make(n, 3),)


@network({"a:1 o:0 q:0": 6})
def permuted_by_constants(make, n):
    order = np.array([3, 0, 5, 1, 4, 2])

    def apply(p, x):
        h = relu(x @ p["a"])
        return h[:, order] @ p["o"] + h @ p["q"]

    return apply, {"a": make(5, 6), "o": make(6, 3), "q": make(6, 3)}, (make(n, 5),)


@network({})
def one_channel_is_set(make, n):
    return (lambda p, x: (x @ p["a"]).at[:, 2].set(1.0) @ p["o"]), {"a": make(5, 6), "o": make(6, 3)}, (make(n, 5),)


@network({"a:1 o:0": 6})
def one_place_is_set(make, n):
    return (lambda p, x: (x @ p["a"]).at[:, 1].set(1.0) @ p["o"]), {"a": make(5, 6), "o": make(6, 3)}, (make(n, 3, 5),)


@network({"a:1 w:0": 5, "b:1 w:0": 6})
def outer_product_flattened(make, n):
    def apply(p, x):
        return (relu(x @ p["a"])[:, :, None] * (x @ p["b"])[:, None, :]).reshape(-1, 30) @ p["w"]

    return apply, {"a": make(3, 5), "b": make(3, 6), "w": make(30, 2)}, (make(n, 3),)


@network({"a:1 o:0": (3, 4)})
def channel_shuffle(make, n):
    def apply(p, x):
        h = relu(x @ p["a"])
        return h.reshape(-1, 3, 4).swapaxes(1, 2).reshape(-1, 12) @ p["o"]

    return apply, {"a": make(5, 12), "o": make(12, 2)}, (make(n, 5),)


@network({"a:1 o:0": 6, "a:1": 2})
def maxout(make, n):
    return (
        (lambda p, x: (x @ p["a"]).reshape(-1, 6, 2).max(-1) @ p["o"]),
        {"a": make(5, 12), "o": make(6, 3)},
        (make(n, 5),),
    )


@network({"a:1 w:0": 5, "b:1 w:1": 6, "w:2 o:0": 8})
def bilinear(make, n):
    def apply(p, x, y):
        return relu(jnp.einsum("bi,ijk,bj->bk", x @ p["a"], p["w"], y @ p["b"])) @ p["o"]

    params = {"a": make(3, 5), "b": make(4, 6), "w": make(5, 6, 8), "o": make(8, 2)}
    return apply, params, (make(n, 3), make(n, 4))


@network({"a:1 b:0": 4, "w:1 b:1 o:0": 6})
def lora(make, n):
    def apply(p, x):
        return relu(x @ (p["w"] + 0.5 * p["a"] @ p["b"])) @ p["o"]

    return apply, {"w": make(5, 6), "a": make(5, 4), "b": make(4, 6), "o": make(6, 3)}, (make(n, 5),)


@network({"a:1 v:0": 6, "v:1 o:0": 8, "h:1 g:0": 5, "o:1 g:1": 3})
def hypernetwork(make, n):
    def apply(p, x):
        made = (relu(x.mean(0, keepdims=True) @ p["h"]) @ p["g"]).reshape(3, 4)
        return (relu(relu(x @ p["a"]) @ p["v"]) @ p["o"]) @ made

    params = {"a": make(5, 6), "v": make(6, 8), "o": make(8, 3), "h": make(5, 5), "g": make(5, 12)}
    return apply, params, (make(n, 5),)


@network({"a:1 g:1 m:1 o:0": 6})
def highway(make, n):
    def apply(p, x):
        h = x @ p["a"]
        gate = sigmoid(x @ p["g"])
        return (gate * relu(x @ p["m"]) + (1 - gate) * h) @ p["o"]

    return apply, {name: make(5, 6) for name in "agm"} | {"o": make(6, 3)}, (make(n, 5),)


@network({"a:1 b:1 o:0": 6})
def joined_by_where(make, n):
    def apply(p, x):
        return jnp.where(x[:, :1] > 0, x @ p["a"], jnp.exp(x @ p["b"])) @ p["o"]

    return apply, {"a": make(5, 6), "b": make(5, 6), "o": make(6, 3)}, (make(n, 5),)


@network({"a:1 slope:0 o:0": 6})
def prelu(make, n):
    def apply(p, x):
        h = x @ p["a"]
        return jnp.where(h > 0, h, p["slope"][None] * h) @ p["o"]

    return apply, {"a": make(5, 6), "slope": make(6), "o": make(6, 3)}, (make(n, 5),)


@network({"w:1 b:0": 6})
def autoencoder_with_one_matrix(make, n):
    def apply(p, x):
        return relu(x @ p["w"] + p["b"][None]) @ p["w"].T + p["c"][None]

    return apply, {"w": make(5, 6), "b": make(6), "c": make(5)}, (make(n, 5),)


@network({"a:1 b:0": 6, "b:1 o:0": 8})
def siamese(make, n):
    def apply(p, x, y):
        def tower(z):
            return jnp.tanh(relu(z @ p["a"]) @ p["b"])

        return jnp.abs(tower(x) - tower(y)) @ p["o"], jnp.sum(tower(x) * tower(y), -1)

    return apply, {"a": make(5, 6), "b": make(6, 8), "o": make(8, 1)}, (make(n, 5), make(n, 5))


@network({"a:1 b:1 o:0 q:0": 6})
def two_inputs_two_outputs(make, n):
    def apply(p, inputs):
        h = relu(inputs["x"] @ p["a"] + inputs["y"] @ p["b"])
        return {"class": h @ p["o"], "box": (h @ p["q"],)}

    params = {"a": make(5, 6), "b": make(8, 6), "o": make(6, 3), "q": make(6, 4)}
    return apply, params, ({"x": make(n, 5), "y": make(n, 8)},)


@network({"a:1 o:0": 6, "m:1 o:1": 8})
def einsum_in_odd_orders(make, n):
    def apply(p, x):
        h = jnp.einsum("ia,bi->ab", p["a"], x)
        k = jnp.einsum("im,bi->mb", p["m"], x)
        return jnp.einsum("amo,mb,ab->bo", p["o"], k, jnp.tanh(h))

    return apply, {"a": make(5, 6), "m": make(5, 8), "o": make(6, 8, 3)}, (make(n, 5),)


@network({"a:1 m:0": 6, "m:1 o:0": 8})
def autoregressive_masks(make, n):
    order = np.tril(np.ones((6, 8), np.float32))

    def apply(p, x):
        return relu(relu(x @ p["a"]) @ (p["m"] * order)) @ p["o"]

    return apply, {"a": make(5, 6), "m": make(6, 8), "o": make(8, 3)}, (make(n, 5),)


@network({"a:1 o:0": 6}, tolerance=1e-2)
def mixed_precision(make, n):
    def apply(p, x):
        a, o = (p[k].astype(jnp.bfloat16) for k in "ao")
        h = relu(x.astype(jnp.bfloat16) @ a)
        return (h @ o).astype(jnp.float32)

    return apply, {"a": make(5, 6), "o": make(6, 3)}, (make(n, 5),)


# Convolutions, pooling and their shapes


@network({"a:3 b:2": 5, "b:3 o:0": 6})
def cnn_flattened(make, n):
    def apply(p, x):
        h = nn.max_pool(relu(conv(x, p["a"])), (2, 2), (2, 2))
        h = nn.avg_pool(relu(conv(h, p["b"])), (2, 2), (2, 2))
        return h.reshape(h.shape[0], -1) @ p["o"]

    return apply, {"a": make(3, 3, 2, 5), "b": make(3, 3, 5, 6), "o": make(24, 3)}, (make(n, 8, 8, 2),)


@network({"a:0 b:1 ab:0": 5, "b:0 o:0": 6})
def cnn_with_channels_first(make, n):
    def apply(p, x):
        h = relu(lax.conv(x, p["a"], (1, 1), "SAME") + p["ab"][None, :, None, None])
        return lax.conv(h, p["b"], (2, 2), "VALID").mean((2, 3)) @ p["o"]

    params = {"a": make(5, 2, 3, 3), "ab": make(5), "b": make(6, 5, 3, 3), "o": make(6, 3)}
    return apply, params, (make(n, 2, 7, 7),)


@network({"a:3 k:3 o:0": 3, "a:3 k:2": 2, "k:3 o:0": 4})
def grouped_convolution(make, n):
    def apply(p, x):
        return relu(conv(relu(conv(x, p["a"])), p["k"], groups=3)).mean((1, 2)) @ p["o"]

    return apply, {"a": make(3, 3, 2, 6), "k": make(3, 3, 2, 12), "o": make(12, 5)}, (make(n, 5, 5, 2),)


@network({"a:3 k:3 kb:0 o:0": 6})
def depthwise_convolution(make, n):
    def apply(p, x):
        h = conv(relu(conv(x, p["a"])), p["k"], groups=6) + p["kb"][None, None, None]
        return relu(h).mean((1, 2)) @ p["o"]

    params = {"a": make(1, 1, 2, 6), "k": make(3, 3, 1, 6), "kb": make(6), "o": make(6, 5)}
    return apply, params, (make(n, 5, 5, 2),)


@network({"a:3 k:3 o:0": 6, "k:3 o:0": 2})
def depthwise_convolution_that_doubles(make, n):
    def apply(p, x):
        return relu(conv(relu(conv(x, p["a"])), p["k"], groups=6)).mean((1, 2)) @ p["o"]

    return apply, {"a": make(1, 1, 2, 6), "k": make(3, 3, 1, 12), "o": make(12, 5)}, (make(n, 5, 5, 2),)


@network({"a:3 a2:3 k:3 o:0": 6})
def residual_around_depthwise(make, n):
    def apply(p, x):
        h = conv(x, p["a"])
        h = h + conv(h, p["k"], groups=6) + conv(x, p["a2"])
        return relu(h).mean((1, 2)) @ p["o"]

    params = {"a": make(1, 1, 2, 6), "a2": make(1, 1, 2, 6), "k": make(3, 3, 1, 6), "o": make(6, 5)}
    return apply, params, (make(n, 5, 5, 2),)


@network(
    {
        "Conv_0/kernel:2 Conv_0/bias:0 ConvTranspose_0/kernel:1": 6,
        "ConvTranspose_0/kernel:2 ConvTranspose_0/bias:0 Conv_1/kernel:1": 8,
    }
)
def transposed_and_dilated_1d(make, n):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = relu(nn.Conv(6, (3,), kernel_dilation=(2,))(x))
            x = relu(nn.ConvTranspose(8, (4,), strides=(2,))(x))
            return nn.Conv(3, (3,), strides=(2,))(x)

    return linen(make, Net(), make(n, 12, 5))


@network({"a:4 b:3": 5, "b:4 o:0": 6})
def convolution_3d(make, n):
    def apply(p, x):
        h = relu(conv(relu(conv(x, p["a"])), p["b"], padding="VALID"))
        return h.mean((1, 2, 3)) @ p["o"]

    return apply, {"a": make(3, 3, 3, 1, 5), "b": make(2, 2, 2, 5, 6), "o": make(6, 3)}, (make(n, 4, 4, 4, 1),)


@network({"a:3 b:2": 3, "b:3 o:0": 6})
def pixel_shuffle(make, n):
    def apply(p, x):
        h = relu(conv(x, p["a"]))
        b, height, width, _ = h.shape
        h = h.reshape(b, height, width, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * height, 2 * width, 3)
        return relu(conv(h, p["b"])).mean((1, 2)) @ p["o"]

    return apply, {"a": make(3, 3, 2, 12), "b": make(3, 3, 3, 6), "o": make(6, 3)}, (make(n, 4, 4, 2),)


@network({"a:3 ab:0 b:2": 5, "b:3 s:3 o:0": 6})
def space_to_depth_after_convolution(make, n):
    def apply(p, x):
        h = relu(conv(x, p["a"]) + p["ab"][None, None, None])
        b, height, width, c = h.shape
        h = h.reshape(b, height // 2, 2, width // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
        h = conv(h.reshape(b, height // 2, width // 2, 4 * c), p["b"])
        return relu(h + conv(x, p["s"], stride=2)).mean((1, 2)) @ p["o"]

    params = {"a": make(3, 3, 2, 5), "ab": make(5), "b": make(1, 1, 20, 6), "s": make(1, 1, 2, 6), "o": make(6, 3)}
    return apply, params, (make(n, 4, 4, 2),)


@network({"a:3 k:3 o:0": 3, "a:3 k:2": 2, "k:3 o:0": 4})
def shuffled_groups(make, n):
    def apply(p, x):
        h = relu(conv(relu(conv(x, p["a"])), p["k"], groups=3))
        h = h.reshape(*h.shape[:3], 3, 4).swapaxes(-1, -2).reshape(h.shape)
        return h.mean((1, 2)) @ p["o"]

    return apply, {"a": make(1, 1, 2, 6), "k": make(3, 3, 2, 12), "o": make(12, 5)}, (make(n, 5, 5, 2),)


@network({"a:3 s1:0 s2:1 b:2": 6, "s1:1 s2:0": 4, "b:3 o:0": 5})
def squeeze_and_excite(make, n):
    def apply(p, x):
        h = relu(conv(x, p["a"]))
        gate = sigmoid(relu(h.mean((1, 2)) @ p["s1"]) @ p["s2"])
        return relu(conv(h * gate[:, None, None], p["b"])).mean((1, 2)) @ p["o"]

    params = {"a": make(3, 3, 2, 6), "s1": make(6, 4), "s2": make(4, 6), "b": make(1, 1, 6, 5), "o": make(5, 3)}
    return apply, params, (make(n, 5, 5, 2),)


@network({"a:3 b:2 c:2": 6, "c:3 b:2": 8, "b:3 o:2": 5})
def u_net(make, n):
    def apply(p, x):
        high = relu(conv(x, p["a"]))
        low = relu(conv(nn.max_pool(high, (2, 2), (2, 2)), p["c"]))
        low = jax.image.resize(low, (*high.shape[:3], 8), "nearest")
        return conv(relu(conv(jnp.concatenate([high, low], -1), p["b"])), p["o"])

    params = {"a": make(3, 3, 2, 6), "c": make(3, 3, 6, 8), "b": make(3, 3, 14, 5), "o": make(1, 1, 5, 3)}
    return apply, params, (make(n, 4, 4, 2),)


@network(
    {"stem:3 scale:0 expand:2 project:3 o:0": 5, "expand:3 depth:3 project:2": 12},
)
def inverted_residual(make, n):
    def apply(p, x):
        h = conv(x, p["stem"])
        y = jnp.clip(conv(h, p["expand"]), 0, 6)
        y = jnp.clip(conv(y, p["depth"], groups=12), 0, 6)
        return (h + conv(y, p["project"]) * p["scale"][None, None, None]).mean((1, 2)) @ p["o"]

    params = {"stem": make(3, 3, 2, 5), "expand": make(1, 1, 5, 12), "depth": make(3, 3, 1, 12)}
    return apply, params | {"project": make(1, 1, 12, 5), "scale": make(5), "o": make(5, 3)}, (make(n, 4, 4, 2),)


@network({"stem:3 depth:3 ln:0 lb:0 up:0 down:1 gamma:0 o:0": 6, "up:1 ub:0 down:0": 10})
def convnext_block(make, n):
    def apply(p, x):
        h = conv(x, p["stem"], stride=2)
        y = conv(h, p["depth"], groups=6)
        mean = y.mean(-1, keepdims=True)
        y = (y - mean) / jnp.sqrt(y.var(-1, keepdims=True) + 1e-6) * p["ln"][None, None, None] + p["lb"][
            None, None, None
        ]
        y = gelu(y @ p["up"] + p["ub"][None, None, None]) @ p["down"]
        return (h + p["gamma"][None, None, None] * y).mean((1, 2)) @ p["o"]

    params = {"stem": make(2, 2, 2, 6), "depth": make(3, 3, 1, 6), "ln": make.positive(6), "lb": make(6)}
    params |= {"up": make(6, 10), "ub": make(10), "down": make(10, 6), "gamma": make(6), "o": make(6, 3)}
    return apply, params, (make(n, 8, 8, 2),)


@network({"a:3 b:3 o:0": 5, "b:3 o:0": 3})
def option_a_shortcut(make, n):
    def apply(p, x):
        h = relu(conv(x, p["a"]))
        short = jnp.pad(h[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (1, 2)))
        return relu(short + conv(x, p["b"], stride=2)).mean((1, 2)) @ p["o"]

    return apply, {"a": make(3, 3, 2, 5), "b": make(3, 3, 2, 8), "o": make(8, 3)}, (make(n, 4, 4, 2),)


# Norms


def _resnet_with_batch_norm(train):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
            x = relu(norm(name="n0")(nn.Conv(6, (3, 3), name="c0", use_bias=False)(x)))
            y = relu(norm(name="n1")(nn.Conv(5, (3, 3), name="c1")(x)))
            y = norm(name="n2")(nn.Conv(6, (3, 3), name="c2", use_bias=False)(y))
            return nn.Dense(3, name="o")(relu(x + y).mean((1, 2)))

    return Net()


def _normed(name):
    stats = " ".join(f"batch_stats/{name}/{stat}:0" for stat in ("mean", "var"))
    return f"params/{name}/scale:0 params/{name}/bias:0 {stats}"


_BATCH_NORM_GROUPS = {
    "params/c0/kernel:3 params/c1/kernel:2 params/c2/kernel:3 params/o/kernel:0 "
    + _normed("n0")
    + " "
    + _normed("n2"): 6,
    "params/c1/kernel:3 params/c1/bias:0 params/c2/kernel:2 " + _normed("n1"): 5,
}


@network(_BATCH_NORM_GROUPS)
def batch_norm_as_it_infers(make, n):
    net, x = _resnet_with_batch_norm(train=False), make(n, 4, 4, 2)
    return net.apply, make.like(jax.eval_shape(net.init, jax.random.key(0), x)), (x,)


@network(_BATCH_NORM_GROUPS, tolerance=3e-5, mirrors=True)
def batch_norm_as_it_trains(make, n):
    net, x = _resnet_with_batch_norm(train=True), make(n, 4, 4, 2)
    variables = make.like(jax.eval_shape(net.init, jax.random.key(0), x))
    return (lambda v, x: net.apply(v, x, mutable=["batch_stats"])), variables, (x,)


class _Normed(nn.Module):
    norm: Any
    features: int = 12

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.features, name="a")(x)
        return nn.Dense(3, name="o")(relu(self.norm(x)))


@network({"a/kernel:1 a/bias:0 norm/scale:0 norm/bias:0 o/kernel:0": 6})
def layer_norm_of_linen(make, n):
    return linen(make, _Normed(nn.LayerNorm(), 6), make(n, 5))


@network({"a/kernel:1 a/bias:0 norm/scale:0 norm/bias:0 o/kernel:0": 6})
def layer_norm_of_linen_with_slow_variance(make, n):
    return linen(make, _Normed(nn.LayerNorm(use_fast_variance=False), 6), make(n, 5))


@network({"a/kernel:1 a/bias:0 norm/scale:0 o/kernel:0": 6})
def rms_norm_of_linen(make, n):
    return linen(make, _Normed(nn.RMSNorm(), 6), make(n, 5))


@network({"a/kernel:1 a/bias:0 norm/scale:0 norm/bias:0 o/kernel:0": (3, 4)})
def group_norm_of_linen(make, n):
    return linen(make, _Normed(nn.GroupNorm(num_groups=3)), make(n, 4, 5))


@network({"a/kernel:1 a/bias:0 norm/scale:0 norm/bias:0 o/kernel:0": 6}, tolerance=3e-5)
def instance_norm_of_linen(make, n):
    return linen(make, _Normed(nn.InstanceNorm(), 6), make(n, 4, 5))


@network({"e:1 scale:0 bias:0 o:0": 6})
def layer_norm_by_hand(make, n):
    def apply(p, x):
        return relu(layer_norm(x @ p["e"], p["scale"], p["bias"][None])) @ p["o"]

    return apply, {"e": make(5, 6), "scale": make(6), "bias": make(6), "o": make(6, 3)}, (make(n, 5),)


@network({"e:1 scale:1 o:0": 6})
def norm_over_flattened_axes(make, n):
    def apply(p, x):
        h = x @ p["e"]
        flat = h.reshape(h.shape[0], -1)
        flat = (flat - flat.mean(1, keepdims=True)) / jnp.sqrt(flat.var(1, keepdims=True) + 1e-5)
        return (flat.reshape(h.shape) * p["scale"][None]) @ p["o"]

    return apply, {"e": make(5, 6), "scale": make(4, 6), "o": make(6, 3)}, (make(n, 4, 5),)


@network({"a:1 w:0": 6, "w:1 g:0 o:0": 8})
def weight_norm(make, n):
    def apply(p, x):
        w = p["w"] / jnp.sqrt(jnp.square(p["w"]).sum(0, keepdims=True) + 1e-6) * p["g"][None]
        return relu(relu(x @ p["a"]) @ w) @ p["o"]

    return apply, {"a": make(5, 6), "w": make(6, 8), "g": make(8), "o": make(8, 3)}, (make(n, 5),)


@network({"a:1 w:0": 6, "w:1 o:0": 8})
def standardised_weights(make, n):
    def apply(p, x):
        w = (p["w"] - p["w"].mean(0, keepdims=True)) / jnp.sqrt(p["w"].var(0, keepdims=True) + 1e-3)
        return relu(relu(x @ p["a"]) @ w) @ p["o"]

    return apply, {"a": make(5, 6), "w": make(6, 8), "o": make(8, 3)}, (make(n, 5),)


@network({"w:1 o:0": 8})
def standardised_weights_after_sigmoid(make, n):
    """A pruned input is 0.5 and its standardised row not zero: it counts, so it stays."""

    def apply(p, x):
        w = (p["w"] - p["w"].mean(0, keepdims=True)) / jnp.sqrt(p["w"].var(0, keepdims=True) + 1e-3)
        return relu(sigmoid(x @ p["a"]) @ w) @ p["o"]

    return apply, {"a": make(5, 6), "w": make(6, 8), "o": make(8, 3)}, (make(n, 5),)


@network(
    {
        "params/a/kernel:1 params/a/bias:0 params/Dense_0/kernel:0": 6,
        "params/Dense_0/kernel:1 params/Dense_0/bias:0 batch_stats/b/Dense_0/kernel/u:1 params/o/kernel:0": 8,
    },
    tolerance=3e-5,
)
def spectral_norm_of_linen(make, n):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = relu(nn.Dense(6, name="a")(x))
            x = nn.SpectralNorm(nn.Dense(8), name="b")(x, update_stats=False)
            return nn.Dense(3, name="o")(relu(x))

    x = make(n, 5)
    return Net().apply, make.like(jax.eval_shape(Net().init, jax.random.key(0), x)), (x,)


@network(
    {
        "a/kernel:1 a/bias:0 Dense_0/kernel:0": 6,
        "Dense_0/kernel:1 Dense_0/bias:0 b/Dense_0/kernel/scale:0 o/kernel:0": 8,
    }
)
def weight_norm_of_linen(make, n):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = relu(nn.Dense(6, name="a")(x))
            return nn.Dense(3, name="o")(relu(nn.WeightNorm(nn.Dense(8), name="b")(x)))

    return linen(make, Net(), make(n, 5))


@network({"a:1 o:0": 6})
def features_of_length_one(make, n):
    def apply(p, x):
        h = x @ p["a"]
        return h / jnp.linalg.norm(h, axis=-1, keepdims=True) @ p["o"]

    return apply, {"a": make(5, 6), "o": make(6, 3)}, (make(n, 5),)


# Channels that are looked at together


@network({"a:1 o:0": 6})
def gated_by_the_mean_over_channels(make, n):
    def apply(p, x):
        h = relu(x @ p["a"])
        return (h * sigmoid(h.mean(-1, keepdims=True))) @ p["o"]

    return apply, {"a": make(5, 6), "o": make(6, 3)}, (make(n, 5),)


@network({"a:1": 6, "b:1 o:0": 8})
def a_mean_scales_other_channels(make, n):
    def apply(p, x):
        return (jnp.exp(x @ p["a"]).mean(-1, keepdims=True) * (x @ p["b"])) @ p["o"]

    return apply, {"a": make(5, 6), "b": make(5, 8), "o": make(8, 3)}, (make(n, 5),)


@network({"a:1 o:0": 6})
def divided_by_the_largest_channel(make, n):
    def apply(p, x):
        h = jnp.tanh(x @ p["a"])
        return (h / (1 + h.max(-1, keepdims=True) - h.min(-1, keepdims=True))) @ p["o"]

    return apply, {"a": make(5, 6), "o": make(6, 3)}, (make(n, 5),)


@network({"a:1 g:1 o:0": 6})
def gated_by_softmax_over_channels(make, n):
    def apply(p, x):
        return ((x @ p["a"]) * softmax(x @ p["g"])) @ p["o"]

    return apply, {"a": make(5, 6), "g": make(5, 6), "o": make(6, 3)}, (make(n, 5),)


@network({"a:1 o:0": 6})
def answers_log_softmax(make, n):
    def apply(p, x):
        return jax.nn.log_softmax(relu(x @ p["a"]) @ p["o"] + p["b"][None])

    return apply, {"a": make(5, 6), "o": make(6, 3), "b": make(3)}, (make(n, 5),)


@network({})
def argmax_over_channels(make, n):
    def apply(p, x):
        h = x @ p["a"]
        return h @ p["o"], jnp.argmax(h, -1)

    return apply, {"a": make(5, 6), "o": make(6, 3)}, (make(n, 5),)


@network({})
def the_largest_channels(make, n):
    return (lambda p, x: lax.top_k(x @ p["a"], 4)[0] @ p["o"]), {"a": make(5, 6), "o": make(4, 3)}, (make(n, 5),)


@network({})
def sorted_channels(make, n):
    return (lambda p, x: jnp.sort(x @ p["a"], -1) @ p["o"]), {"a": make(5, 6), "o": make(6, 3)}, (make(n, 5),)


@network({})
def summed_along_channels(make, n):
    return (lambda p, x: jnp.cumsum(x @ p["a"], -1) @ p["o"]), {"a": make(5, 6), "o": make(6, 3)}, (make(n, 5),)


@network({"a:1 o:0": 6})
def summed_along_the_batch(make, n):
    return (lambda p, x: jnp.cumsum(x @ p["a"], 0) @ p["o"]), {"a": make(5, 6), "o": make(6, 3)}, (make(n, 5),)


@network({"b:1 o:0": 8})
def fourier_transformed_channels(make, n):
    def apply(p, x):
        return jnp.fft.rfft(x @ p["a"]).real @ p["b"] @ p["o"]

    return apply, {"a": make(5, 6), "b": make(4, 8), "o": make(8, 3)}, (make(n, 5),)


@network({"s:1": 6, "a:1 o:0": 8}, batch=1, other=None)
def linear_algebra(make, n):
    def apply(p, x):
        square = p["s"] @ p["s"].T + jnp.eye(6)
        return relu(jnp.linalg.solve(square, x.reshape(6, 5)) @ p["a"]) @ p["o"]

    return apply, {"s": make(6, 6), "a": make(5, 8), "o": make(8, 3)}, (make(n, 6, 5),)


@network({"a:1": 6})
def gram_matrix(make, n):
    def apply(p, x):
        h = jnp.tanh(x @ p["a"])
        return jnp.sum(jnp.square(h.T @ h))

    return apply, {"a": make(5, 6)}, (make(n, 5),)


@network({"mean:1 logvar:1 o:0": 4, "a:1 mean:0 logvar:0": 6})
def variational_autoencoder(make, n):
    def apply(p, x, key):
        h = relu(x @ p["a"])
        mean, logvar = h @ p["mean"], h @ p["logvar"]
        latent = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        return latent @ p["o"], jnp.sum(jnp.square(mean) + jnp.exp(logvar) - 1 - logvar, -1)

    params = {"a": make(5, 6), "mean": make(6, 4), "logvar": make(6, 4), "o": make(4, 5)}
    return apply, params, (make(n, 5), jax.random.key(3))


@network({"a/kernel:1 a/bias:0 o/kernel:0": 12})
def dropout(make, n):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = relu(nn.Dense(12, name="a")(x))
            return nn.Dense(3, name="o")(nn.Dropout(0.5, deterministic=False)(x))

    x = make(n, 5)
    shapes = jax.eval_shape(Net().init, {"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)

    def apply(p, x, key):
        return Net().apply({"params": p}, x, rngs={"dropout": key})

    return apply, make.like(shapes["params"]), (x, jax.random.key(7))


# Embeddings, positions and attention


@network({"e:1 o:0": 6})
def embedding(make, n):
    return (lambda p, ids: relu(p["e"][ids]).mean(1) @ p["o"]), {"e": make(9, 6), "o": make(6, 3)}, (make.ids(9, n, 5),)


@network({"e:1 u:0 d:1": 6, "u:1 d:0": 8})
def tied_embedding(make, n):
    def apply(p, ids):
        h = p["e"][ids]
        return (h + relu(h @ p["u"]) @ p["d"]) @ p["e"].T

    return apply, {"e": make(9, 6), "u": make(6, 8), "d": make(8, 6)}, (make.ids(9, n, 5),)


@network({"e:1 place:1 scale:0 o:0": 6, "place:0": 2})
def positions_as_parameters(make, n):
    def apply(p, ids):
        h = p["e"][ids] + p["place"][: ids.shape[1]][None]
        return layer_norm(h, p["scale"][None]) @ p["o"]

    return apply, {"e": make(9, 6), "place": make(7, 6), "scale": make(6), "o": make(6, 3)}, (make.ids(9, n, 5),)


def _waves(length, width):
    angles = np.arange(length)[:, None] / 100.0 ** (np.arange(width)[None] / width)
    return np.asarray(np.where(np.arange(width)[None] % 2, np.cos(angles), np.sin(angles)), np.float32)


@network({"e:1 scale:0 u:0 d:1 o:0": 6, "u:1 d:0": 8})
def positions_as_constants(make, n):
    """At pruned indices stands the table, and the norm sees it."""
    table = _waves(5, 6)

    def apply(p, ids):
        h = p["e"][ids] + table[None]
        h = h + relu(layer_norm(h, p["scale"][None]) @ p["u"]) @ p["d"]
        return layer_norm(h, p["scale"][None]) @ p["o"]

    params = {"e": make(9, 6), "scale": make(6), "u": make(6, 8), "d": make(8, 6), "o": make(6, 3)}
    return apply, params, (make.ids(9, n, 5),)


@network({"e:1 scale:0 o:0": 6})
def positions_computed_in_the_function(make, n):
    def apply(p, ids):
        angles = jnp.arange(5, dtype=jnp.float32)[:, None] / 100.0 ** (jnp.arange(3, dtype=jnp.float32)[None] / 3)
        table = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
        return layer_norm(p["e"][ids] + table[None], p["scale"][None]) @ p["o"]

    return apply, {"e": make(9, 6), "scale": make(6), "o": make(6, 3)}, (make.ids(9, n, 5),)


_ATTENTION = {"q:1 k:1 v:1 out:0": 3, "q:2 k:2": 4, "v:2 out:1": 5, "e:1 q:0 k:0 v:0 out:2 o:0": 6}


def _attention_params(make):
    params = {"e": make(7, 6), "q": make(6, 3, 4), "k": make(6, 3, 4), "v": make(6, 3, 5)}
    return params | {"out": make(3, 5, 6), "o": make(6, 2)}


@network(_ATTENTION)
def attention_with_kernels_of_three_axes(make, n):
    def apply(p, x):
        h = x @ p["e"]
        q, k, v = (jnp.einsum("bld,dhk->blhk", h, p[name]) for name in "qkv")
        return (h + jnp.einsum("blhk,hkd->bld", attend(q, k, v), p["out"])) @ p["o"]

    return apply, _attention_params(make), (make(n, 5, 7),)


@network(_ATTENTION)
def causal_attention_one_block_of_two(make, n):
    def apply(p, x):
        h = x @ p["e"]
        mask = jnp.tril(jnp.ones((h.shape[1], h.shape[1]), bool))
        for _ in range(2):
            q, k, v = (jnp.einsum("bld,dhk->blhk", h, p[name]) for name in "qkv")
            h = h + jnp.einsum("blhk,hkd->bld", attend(q, k, v, mask), p["out"])
        return h @ p["o"]

    return apply, _attention_params(make), (make(n, 5, 7),)


@network({"e:1 q:0 k:0 v:0 out:1 o:0": 8, "q:1 k:1 v:1 out:0": 3, "q:1 k:1": 4, "v:1 out:0": 5})
def attention_with_flat_kernels(make, n):
    def apply(p, x):
        h = x @ p["e"]
        q, k, v = (heads(h @ p[name], 3) for name in "qkv")
        return (h + attend(q, k, v).reshape(*h.shape[:2], 15) @ p["out"]) @ p["o"]

    params = {"e": make(7, 8), "q": make(8, 12), "k": make(8, 12), "v": make(8, 15), "out": make(15, 8)}
    return apply, params | {"o": make(8, 2)}, (make(n, 5, 7),)


@network({"e:1 qkv:0 out:1 o:0": 8, "qkv:1 out:0": (2, 3), "qkv:1": 3})
def attention_fused_and_split(make, n):
    def apply(p, x):
        h = x @ p["e"]
        q, k, v = (heads(part, 2) for part in jnp.split(h @ p["qkv"], 3, -1))
        return (h + attend(q, k, v).reshape(*h.shape[:2], 6) @ p["out"]) @ p["o"]

    params = {"e": make(7, 8), "qkv": make(8, 18), "out": make(6, 8), "o": make(8, 2)}
    return apply, params, (make(n, 5, 7),)


@network({"e:1 qkv:0 out:1 o:0": 8, "qkv:1 out:0": (2, 4)})
def attention_fused_and_reshaped(make, n):
    def apply(p, x):
        h = x @ p["e"]
        qkv = (h @ p["qkv"]).reshape(*h.shape[:2], 3, 2, 4)
        y = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        return (h + y.reshape(*h.shape[:2], 8) @ p["out"]) @ p["o"]

    params = {"e": make(7, 8), "qkv": make(8, 24), "out": make(8, 8), "o": make(8, 2)}
    return apply, params, (make(n, 5, 7),)


@network({"q:1 k:1 v:1 out:0": 2, "q:1 out:0": 3, "q:1 k:1": 4, "v:1 out:0": 5})
def grouped_query_attention(make, n):
    def apply(p, x):
        length = x.shape[1]
        q = (x @ p["q"]).reshape(-1, length, 2, 3, 4)
        k, v = heads(x @ p["k"], 2), heads(x @ p["v"], 2)
        weights = softmax(jnp.einsum("bqgrd,bkgd->bgrqk", q, k))
        return jnp.einsum("bgrqk,bkgd->bqgrd", weights, v).reshape(-1, length, 30) @ p["out"]

    params = {"q": make(7, 24), "k": make(7, 8), "v": make(7, 10), "out": make(30, 3)}
    return apply, params, (make(n, 5, 7),)


@network({"q:1 k:1 v:1 out:0": 2, "q:1 out:0": 3, "q:1 k:1": 4, "v:1 out:0": 5})
def grouped_query_attention_that_repeats_keys(make, n):
    def apply(p, x):
        length = x.shape[1]
        q = heads(x @ p["q"], 6)
        k, v = (jnp.repeat(heads(x @ p[name], 2), 3, axis=2) for name in "kv")
        return attend(q, k, v).reshape(-1, length, 30) @ p["out"]

    params = {"q": make(7, 24), "k": make(7, 8), "v": make(7, 10), "out": make(30, 3)}
    return apply, params, (make(n, 5, 7),)


@network({"q:1 out:0": 3, "q:2 k:1": 4, "v:1 out:1": 5})
def multi_query_attention(make, n):
    def apply(p, x):
        q = jnp.einsum("bld,dhk->bhlk", x, p["q"])
        weights = softmax(jnp.einsum("bhqd,bkd->bhqk", q, x @ p["k"]))
        return jnp.einsum("bhqk,bkd,hdo->bqo", weights, x @ p["v"], p["out"])

    return apply, {"q": make(7, 3, 4), "k": make(7, 4), "v": make(7, 5), "out": make(3, 5, 2)}, (make(n, 5, 7),)


@network({"q:1 k:1 v:1 out:0": 3, "q:2 k:2": 4, "v:2 out:1": 4})
def attention_of_jax_nn(make, n):
    def apply(p, x):
        q, k, v = (jnp.einsum("bld,dhk->blhk", x, p[name]) for name in "qkv")
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return jnp.einsum("blhk,hkd->bld", y, p["out"])

    params = {"q": make(7, 3, 4), "k": make(7, 3, 4), "v": make(7, 3, 4), "out": make(3, 4, 2)}
    return apply, params, (make(n, 5, 7),)


def _angles(length, half):
    return jnp.arange(length, dtype=jnp.float32)[:, None] / 10.0 ** (jnp.arange(half, dtype=jnp.float32)[None] / half)


@network({"q:1 k:1 v:1 out:0": 2, "q:2 k:2": 3, "v:2 out:1": 5})
def rotary_positions_in_halves(make, n):
    def rotate(x):
        angles = _angles(x.shape[1], 3)[None, :, None]
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate(
            [a * jnp.cos(angles) - b * jnp.sin(angles), b * jnp.cos(angles) + a * jnp.sin(angles)], -1
        )

    def apply(p, x):
        q, k, v = (jnp.einsum("bld,dhk->blhk", x, p[name]) for name in "qkv")
        return jnp.einsum("blhk,hkd->bld", attend(rotate(q), rotate(k), v), p["out"])

    params = {"q": make(7, 2, 6), "k": make(7, 2, 6), "v": make(7, 2, 5), "out": make(2, 5, 3)}
    return apply, params, (make(n, 5, 7),)


@network({"q:1 k:1 v:1 out:0": 2, "q:2 k:2": 3, "v:2 out:1": 5})
def rotary_positions_with_rotate_half(make, n):
    def rotate(x):
        angles = _angles(x.shape[1], 3)[None, :, None]
        angles = jnp.concatenate([angles, angles], -1)
        turned = jnp.concatenate([-x[..., 3:], x[..., :3]], -1)
        return x * jnp.cos(angles) + turned * jnp.sin(angles)

    def apply(p, x):
        q, k, v = (jnp.einsum("bld,dhk->blhk", x, p[name]) for name in "qkv")
        return jnp.einsum("blhk,hkd->bld", attend(rotate(q), rotate(k), v), p["out"])

    params = {"q": make(7, 2, 6), "k": make(7, 2, 6), "v": make(7, 2, 5), "out": make(2, 5, 3)}
    return apply, params, (make(n, 5, 7),)


@network(
    {"q:1 k:1 v:1 out:0": 2, "q:2 k:2": 3, "v:2 out:1": 5},
)
def rotary_positions_in_pairs(make, n):
    def rotate(x):
        angles = _angles(x.shape[1], 3)[None, :, None]
        a, b = x[..., ::2], x[..., 1::2]
        turned = [a * jnp.cos(angles) - b * jnp.sin(angles), b * jnp.cos(angles) + a * jnp.sin(angles)]
        return jnp.concatenate([t[..., None] for t in turned], -1).reshape(x.shape)

    def apply(p, x):
        q, k, v = (jnp.einsum("bld,dhk->blhk", x, p[name]) for name in "qkv")
        return jnp.einsum("blhk,hkd->bld", attend(rotate(q), rotate(k), v), p["out"])

    params = {"q": make(7, 2, 6), "k": make(7, 2, 6), "v": make(7, 2, 5), "out": make(2, 5, 3)}
    return apply, params, (make(n, 5, 7),)


@network({"q:1 k:1 v:1 out:0": 3, "v:2 out:1": 5})
def linear_attention_whose_features_are_not_zero(make, n):
    """elu(0) + 1 is 1: a pruned feature of keys and queries would count."""

    def apply(p, x):
        q, k, v = (jnp.einsum("bld,dhk->blhk", x, p[name]) for name in "qkv")
        q, k = jax.nn.elu(q) + 1, jax.nn.elu(k) + 1
        y = jnp.einsum("blhk,bhkv->blhv", q, jnp.einsum("blhk,blhv->bhkv", k, v))
        y = y / jnp.einsum("blhk,bhk->blh", q, k.sum(1))[..., None]
        return jnp.einsum("blhk,hkd->bld", y, p["out"])

    params = {"q": make(7, 3, 4), "k": make(7, 3, 4), "v": make(7, 3, 5), "out": make(3, 5, 2)}
    return apply, params, (make(n, 5, 7),)


@network({"q:1 k:1 v:1 out:0": 3, "q:2 k:2": 4, "v:2 out:1": 5})
def linear_attention_whose_features_are_zero(make, n):
    def apply(p, x):
        q, k, v = (jnp.einsum("bld,dhk->blhk", x, p[name]) for name in "qkv")
        y = jnp.einsum("blhk,bhkv->blhv", jnp.tanh(q), jnp.einsum("blhk,blhv->bhkv", relu(k), v))
        return jnp.einsum("blhk,hkd->bld", y, p["out"])

    params = {"q": make(7, 3, 4), "k": make(7, 3, 4), "v": make(7, 3, 5), "out": make(3, 5, 2)}
    return apply, params, (make(n, 5, 7),)


@network({"q:1 k:1": 4, "v:1 out:0": 6})
def cross_attention(make, n):
    def apply(p, x, y):
        weights = softmax(x @ p["q"] @ (y @ p["k"]).swapaxes(1, 2))
        return weights @ (y @ p["v"]) @ p["out"]

    params = {"q": make(7, 4), "k": make(3, 4), "v": make(3, 6), "out": make(6, 2)}
    return apply, params, (make(n, 5, 7), make(n, 8, 3))


@network({"v:1 out:0": 5, "q:2 k:2": 4})
def attention_with_a_cache_as_input(make, n):
    """The heads of keys are those of the cache, an input; so is the length."""

    def apply(p, x, cache):
        q, k = (jnp.einsum("bld,dhk->blhk", x, p[name]) for name in "qk")
        weights = softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) + cache)
        return jnp.einsum("bhqk,bkd->bqd", weights, x @ p["v"]) @ p["out"]

    params = {"q": make(7, 3, 4), "k": make(7, 3, 4), "v": make(7, 5), "out": make(5, 2)}
    return apply, params, (make(n, 5, 7), make(n, 3, 5, 5))


_FLAX_ATTENTION = {
    "e/kernel:1 e/bias:0 n/scale:0 n/bias:0 t/query/kernel:0 t/key/kernel:0 t/value/kernel:0 t/out/kernel:2 "
    "t/out/bias:0 u/kernel:0 d/kernel:1 d/bias:0 o/kernel:0": 12,
    "t/query/kernel:1 t/query/bias:0 t/key/kernel:1 t/key/bias:0 t/value/kernel:1 t/value/bias:0 t/out/kernel:0": 3,
    "t/query/kernel:2 t/query/bias:1 t/key/kernel:2 t/key/bias:1": 4,
    "t/value/kernel:2 t/value/bias:1 t/out/kernel:1": 4,
    "u/kernel:1 u/bias:0 d/kernel:0": 8,
}


@network(_FLAX_ATTENTION)
def transformer_of_linen(make, n):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Dense(12, name="e")(x)
            h = h + nn.MultiHeadDotProductAttention(3, name="t")(nn.LayerNorm(name="n")(h))
            h = h + nn.Dense(12, name="d")(gelu(nn.Dense(8, name="u")(h)))
            return nn.Dense(3, name="o")(h)

    return linen(make, Net(), make(n, 5, 7))


@network(_of_nnx_paths(_FLAX_ATTENTION))
def transformer_of_nnx(make, n):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.e = nnx.Linear(7, 12, rngs=rngs)
            self.n = nnx.LayerNorm(12, rngs=rngs)
            self.t = nnx.MultiHeadAttention(3, 12, decode=False, rngs=rngs)
            self.u, self.d = nnx.Linear(12, 8, rngs=rngs), nnx.Linear(8, 12, rngs=rngs)
            self.o = nnx.Linear(12, 3, rngs=rngs)

        def __call__(self, x):
            h = self.e(x)
            h = h + self.t(self.n(h))
            return self.o(h + self.d(gelu(self.u(h))))

    return of_nnx(make, Net, make(n, 5, 7))


@network(
    {
        "patch:3 cls:2 place:2 q:0 k:0 v:0 out:2 o:0": 6,
        "q:1 k:1 v:1 out:0": 3,
        "q:2 k:2": 4,
        "v:2 out:1": 5,
    }
)
def vision_transformer_with_class_token(make, n):
    def apply(p, x):
        h = conv(x, p["patch"], stride=2, padding="VALID")
        h = h.reshape(h.shape[0], 4, -1)
        token = jnp.broadcast_to(p["cls"], (h.shape[0], 1, 6))
        h = jnp.concatenate([token, h], 1) + p["place"]
        q, k, v = (jnp.einsum("bld,dhk->blhk", h, p[name]) for name in "qkv")
        h = h + jnp.einsum("blhk,hkd->bld", attend(q, k, v), p["out"])
        return h[:, 0] @ p["o"]

    params = {"patch": make(2, 2, 3, 6), "cls": make(1, 1, 6), "place": make(1, 5, 6), "q": make(6, 3, 4)}
    params |= {"k": make(6, 3, 4), "v": make(6, 3, 5), "out": make(3, 5, 6), "o": make(6, 2)}
    return apply, params, (make(n, 4, 4, 3),)


@network({"e:1 n:0 u:0 d:1 o:0": 6, "t1:1 t2:0": 4, "u:1 d:0": 8})
def mlp_mixer(make, n):
    def apply(p, x):
        h = x @ p["e"]
        y = layer_norm(h, p["n"][None]).swapaxes(1, 2)
        h = h + (gelu(y @ p["t1"]) @ p["t2"]).swapaxes(1, 2)
        return (h + gelu(h @ p["u"]) @ p["d"]).mean(1) @ p["o"]

    params = {"e": make(7, 6), "n": make(6), "t1": make(5, 4), "t2": make(4, 5), "u": make(6, 8), "d": make(8, 6)}
    return apply, params | {"o": make(6, 3)}, (make(n, 5, 7),)


@network({"gate:1 up:0 down:0 bias:0": 3, "up:2 down:1": 5, "e:1 gate:0 up:1 down:2 bias:1 o:0": 6})
def mixture_of_experts(make, n):
    def apply(p, x):
        h = x @ p["e"]
        gates = softmax(h @ p["gate"])
        y = jnp.einsum("bef,efd->bed", relu(jnp.einsum("bd,edf->bef", h, p["up"])), p["down"]) + p["bias"][None]
        return (h + jnp.einsum("be,bed->bd", gates, y)) @ p["o"]

    params = {"e": make(4, 6), "gate": make(6, 3), "up": make(3, 6, 5), "down": make(3, 5, 6), "bias": make(3, 6)}
    return apply, params | {"o": make(6, 2)}, (make(n, 4),)


@network({"w1:2 b1:1 w2:1": 6, "w1:0 b1:0 w2:0 b2:0": 3})
def ensemble_by_vmap(make, n):
    def apply(p, x):
        def member(p, x):
            return relu(x @ p["w1"] + p["b1"][None]) @ p["w2"] + p["b2"][None]

        return jax.vmap(member, (0, None))(p, x).mean(0)

    return apply, {"w1": make(3, 5, 6), "b1": make(3, 6), "w2": make(3, 6, 2), "b2": make(3, 2)}, (make(n, 5),)


@network({"a:1 o:0": 6})
def vmap_over_examples(make, n):
    def apply(p, x):
        return jax.vmap(lambda x: relu(jnp.tensordot(p["a"].T, x, 1)) @ p["o"])(x)

    return apply, {"a": make(5, 6), "o": make(6, 3)}, (make(n, 5),)


# Loops, branches and functions with derivatives of their own


@network({"x:1 h:0 h:1 b:0 o:0": 6})
def recurrent_by_scan(make, n):
    def apply(p, x):
        def step(h, x):
            h = jnp.tanh(x @ p["x"] + h @ p["h"] + p["b"][None])
            return h, h

        last, all_ = lax.scan(step, jnp.zeros((x.shape[0], 6)), x.swapaxes(0, 1))
        return last @ p["o"], all_.swapaxes(0, 1) @ p["o"]

    return apply, {"x": make(5, 6), "h": make(6, 6), "b": make(6), "o": make(6, 3)}, (make(n, 4, 5),)


@network({"x:1 h:0 h:1 o:0": 6})
def recurrent_backwards_from_ones(make, n):
    """Before the first step, ones stand at pruned indices; their rows of `h` are zero."""

    def apply(p, x):
        def step(h, x):
            return jnp.tanh(x @ p["x"] + h @ p["h"]), h

        last, before = lax.scan(step, jnp.ones((x.shape[0], 6)), x.swapaxes(0, 1), reverse=True)
        return last @ p["o"], before.swapaxes(0, 1) @ p["o"]

    return apply, {"x": make(5, 6), "h": make(6, 6), "o": make(6, 3)}, (make(n, 4, 5),)


def _cell(prefix, gates_in, gates_hidden, biased):
    parts = [f"{prefix}/{g}/kernel:1" for g in gates_in] + [
        f"{prefix}/{g}/kernel:{d}" for g in gates_hidden for d in (0, 1)
    ]
    return " ".join([*parts, *(f"{prefix}/{g}/bias:0" for g in biased)])


def _rnn(make, n, cell, bidirectional=False):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            if bidirectional:
                h = nn.Bidirectional(nn.RNN(cell(6), name="f"), nn.RNN(cell(5), name="b"))(x)
            else:
                h = nn.RNN(cell(6), name="f")(x)
            return nn.Dense(3, name="o")(h)

    return linen(make, Net(), make(n, 4, 5))


@network({_cell("GRUCell_0", ("ir", "iz", "in"), ("hr", "hz", "hn"), ("ir", "iz", "in", "hn")) + " o/kernel:0": 6})
def gru_of_linen(make, n):
    return _rnn(make, n, nn.GRUCell)


_LSTM = (("ii", "if", "ig", "io"), ("hi", "hf", "hg", "ho"), ("hi", "hf", "hg", "ho"))


@network({_cell("LSTMCell_0", *_LSTM) + " o/kernel:0": 6})
def lstm_of_linen(make, n):
    return _rnn(make, n, nn.LSTMCell)


@network({_cell("OptimizedLSTMCell_0", *_LSTM) + " o/kernel:0": 6})
def optimized_lstm_of_linen(make, n):
    return _rnn(make, n, nn.OptimizedLSTMCell)


@network(
    {
        _cell("SimpleCell_0", ("i",), ("h",), ("i",)) + " o/kernel:0": 6,
        _cell("SimpleCell_1", ("i",), ("h",), ("i",)) + " o/kernel:0": 5,
    }
)
def bidirectional_simple_cells_of_linen(make, n):
    return _rnn(make, n, nn.SimpleCell, bidirectional=True)


@network(_of_nnx_paths({"c/dense_i/kernel:1 c/dense_i/bias:0 c/dense_h/kernel:0 c/dense_h/kernel:1 o/kernel:0": 6}))
def gru_of_nnx(make, n):
    """Its three gates are one kernel of 18."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.c = nnx.GRUCell(5, 6, rngs=rngs)
            self.o = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.o(nnx.RNN(self.c)(x))

    return of_nnx(make, Net, make(n, 4, 5))


@network(_of_nnx_paths({_cell("c", *_LSTM).replace("if/", "if_/") + " o/kernel:0": 6}))
def lstm_of_nnx(make, n):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.c = nnx.LSTMCell(5, 6, rngs=rngs)
            self.o = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.o(nnx.RNN(self.c)(x))

    return of_nnx(make, Net, make(n, 4, 5))


@network({"e:1 u:1 d:2 s:1 o:0": 6, "u:2 b:1 d:1": 8})
def scan_over_stacked_layers(make, n):
    def apply(p, x):
        def layer(h, w):
            u, b, d, s = w
            return h + relu(h @ u + b[None]) @ d * s[None], None

        h, _ = lax.scan(layer, x @ p["e"], (p["u"], p["b"], p["d"], p["s"]))
        return h @ p["o"]

    params = {
        "e": make(5, 6),
        "u": make(3, 6, 8),
        "b": make(3, 8),
        "d": make(3, 8, 6),
        "s": make(3, 6),
        "o": make(6, 2),
    }
    return apply, params, (make(n, 5),)


@network(
    {
        "e/kernel:1 e/bias:0 layers/u/kernel:1 layers/d/kernel:2 layers/d/bias:1 o/kernel:0": 6,
        "layers/u/kernel:2 layers/u/bias:1 layers/d/kernel:1": 8,
    }
)
def scan_of_linen_with_remat(make, n):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, h):
            return h + nn.Dense(6, name="d")(gelu(nn.Dense(8, name="u")(h))), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Dense(6, name="e")(x)
            layers = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return nn.Dense(2, name="o")(layers(name="layers")(h)[0])

    return linen(make, Net(), make(n, 5))


@network({"a:1 b:0 b2:1 c:0 c2:1 o:0": 6, "b:1 b2:0": 8, "c:1 c2:0": 5})
def one_of_two_branches(make, n):
    def apply(p, x, i):
        h = x @ p["a"]
        h = h + lax.cond(i > 0, lambda h: relu(h @ p["b"]) @ p["b2"], lambda h: jnp.tanh(h @ p["c"]) @ p["c2"], h)
        return h @ p["o"]

    params = {"a": make(4, 6), "b": make(6, 8), "b2": make(8, 6), "c": make(6, 5), "c2": make(5, 6), "o": make(6, 2)}
    return apply, params, (make(n, 4), jnp.int32(1))


@network({"a:1 b:1 o:0": 6})
def one_of_three_branches(make, n):
    def apply(p, x, i):
        branches = [lambda x: x @ p["a"], lambda x: sigmoid(x @ p["b"]), lambda x: jnp.ones((x.shape[0], 6))]
        return lax.switch(i, branches, x) @ p["o"]

    return apply, {"a": make(5, 6), "b": make(5, 6), "o": make(6, 2)}, (make(n, 5), jnp.int32(1))


@network({"a:1 w:0 w:1 o:0": 6})
def fori_loop(make, n):
    def apply(p, x):
        return lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"]) + h, x @ p["a"]) @ p["o"]

    return apply, {"a": make(5, 6), "w": make(6, 6), "o": make(6, 2)}, (make(n, 5),)


@network({"a:1 w:0 w:1 o:0": 6})
def checkpointed_blocks(make, n):
    def apply(p, x):
        block = jax.checkpoint(lambda h: sigmoid(h @ p["w"]) * h)
        return block(block(x @ p["a"])) @ p["o"]

    return apply, {"a": make(5, 6), "w": make(6, 6), "o": make(6, 2)}, (make(n, 5),)


@network({"a:1 b:0": 6, "b:1 o:0": 8})
def calls_in_calls(make, n):
    @jax.jit
    def dense(x, w):
        return jax.jit(relu)(x @ w)

    return (
        (lambda p, x: dense(dense(x, p["a"]), p["b"]) @ p["o"]),
        {"a": make(5, 6), "b": make(6, 8), "o": make(8, 3)},
        (make(n, 5),),
    )


@network({"0:1 1:0": 6, "1:1 2:0": 6, "2:1 3:0": 6})
def the_same_call_between_different_layers(make, n):
    @jax.jit
    def block(x, w):
        return jax.nn.relu(x @ w)

    def apply(p, x):
        for w in p:
            x = block(x, w)
        return x

    return apply, [make(6, 6) for _ in range(4)], (make(n, 6),)


@jax.custom_jvp
def _bent(x):
    return jnp.where(x > 0, x, 0.1 * x)


@_bent.defjvp
def _bent_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    return _bent(x), jnp.cos(x) * t


@network({"a:1 b:0": 6, "b:1 o:0": 8})
def a_derivative_that_its_author_chose(make, n):
    def apply(p, x):
        return _bent(_bent(x @ p["a"]) @ p["b"]) @ p["o"]

    return apply, {"a": make(5, 6), "b": make(6, 8), "o": make(8, 3)}, (make(n, 5),)


@jax.custom_vjp
def _rounded(x, scale):
    return jnp.round(x * scale[None] * 4) / 4


_rounded.defvjp(lambda x, s: (_rounded(x, s), (x, s)), lambda kept, g: (g * 0.7 + 0.1 * kept[0], (g * kept[0]).sum(0)))


@network({"a:1 scale:0 o:0": 6})
def straight_through_rounding(make, n):
    """The derivative is not the true one, and a pruned unit's own cotangent is lost with it."""

    def apply(p, x):
        return _rounded(x @ p["a"], p["scale"]) @ p["o"]

    return apply, {"a": make(5, 6), "scale": make(6), "o": make(6, 3)}, (make(n, 5),)


@jax.custom_vjp
def _mean_reversed(x):
    return jnp.tanh(x)


_mean_reversed.defvjp(
    lambda x: (jnp.tanh(x), x), lambda x, g: (-g + 0.5 * jnp.square(g).sum(-1, keepdims=True) * jnp.tanh(x),)
)


@network({})
def a_false_gradient_that_mixes_channels(make, n):
    """Nothing is known of a cotangent at a pruned index, so its square counts."""

    def apply(p, x):
        return _mean_reversed(x @ p["a"]) @ p["o"]

    return apply, {"a": make(5, 6), "o": make(6, 3)}, (make(n, 5),)


@network({"a:1 b:0": 6, "b:1 o:0": 8})
def stopped_gradients(make, n):
    def apply(p, x):
        h = relu(x @ p["a"])
        h = h + lax.stop_gradient(jnp.tanh(h) - h)
        return silu(h @ p["b"]) @ p["o"]

    return apply, {"a": make(5, 6), "b": make(6, 8), "o": make(8, 3)}, (make(n, 5),)


# Traps


@network(
    {"0:1 1:0": 6},
    batch=6,
)
def an_output_shaped_like_a_parameter(make, n):
    """Path `0`, shape `[6, 6]`: both the first output and the first parameter."""

    def apply(p, x):
        return jnp.tanh(x @ p[0]) @ p[1], x.sum()

    return apply, [make(6, 6), make(6, 6)], (make(n, 6),)


@network(
    {},
    batch=6,
)
def the_only_array_is_shaped_like_the_only_output(make, n):
    return (lambda w, x: x @ w), make(6, 6), (make(n, 6),)


@network({"a:1 b:0 c:0": 6, "b:1": 3}, mirrors=True, tolerance=3e-5)
def a_step_of_gradient_descent(make, n):
    def apply(p, x):
        slopes = jax.grad(lambda p: jnp.square(sigmoid(x @ p["a"] + p["c"][None]) @ p["b"]).sum())(p)
        return jax.tree.map(lambda w, g: w - 0.1 * g, p, slopes)

    return apply, {"a": make(5, 6), "b": make(6, 3), "c": make(6)}, (make(n, 5),)


@network({"a:3 b:0": 6, "b:1": 3})
def a_gradient_by_the_input(make, n):
    def apply(p, x):
        def total(x):
            h = nn.max_pool(relu(conv(x, p["a"])), (2, 2), (2, 2)).mean((1, 2))
            return (jnp.tanh(h) @ p["b"]).sum()

        return jax.grad(total)(x)

    return apply, {"a": make(3, 3, 2, 6), "b": make(6, 3)}, (make(n, 4, 4, 2),)


@network({"a:1 o:0": 6})
def weights_divided_by_their_largest(make, n):
    return (
        (lambda p, x: x @ (p["a"] / jnp.abs(p["a"]).max()) @ p["o"]),
        {"a": make(5, 6), "o": make(6, 2)},
        (make(n, 5),),
    )


@network({"a:3 k:3 o:0": 6})
def depthwise_convolution_after_sigmoid(make, n):
    def apply(p, x):
        return sigmoid(conv(sigmoid(conv(x, p["a"])), p["k"], groups=6)).mean((1, 2)) @ p["o"]

    return apply, {"a": make(1, 1, 2, 6), "k": make(3, 3, 1, 6), "o": make(6, 5)}, (make(n, 5, 5, 2),)


@network({"a:1": 6})
def softplus_is_summed(make, n):
    return (lambda p, x: jax.nn.softplus(x @ p["a"]).sum(-1)), {"a": make(5, 6)}, (make(n, 5),)


@network({"a:1 o:0": 4})
def unstacked(make, n):
    def apply(p, x):
        a, b, c = jnp.unstack((x @ p["a"]).reshape(-1, 3, 4), axis=1)
        return (a * b + c) @ p["o"]

    return apply, {"a": make(5, 12), "o": make(4, 2)}, (make(n, 5),)


@network({"e:1 u:1 d:2 o:0": 6, "u:2 d:1": 8})
def stacked_layers_read_one_by_one(make, n):
    def apply(p, x):
        h = x @ p["e"]
        for i in range(3):
            h = h + relu(h @ p["u"][i]) @ p["d"][i]
        return h @ p["o"]

    return apply, {"e": make(5, 6), "u": make(3, 6, 8), "d": make(3, 8, 6), "o": make(6, 2)}, (make(n, 5),)


@network({"a:1 c:1": 6, "c:0 o:0": 8})
def distances_to_centres(make, n):
    def apply(p, x):
        h = x @ p["a"]
        return jnp.exp(-jnp.square(h[:, None] - p["c"][None]).sum(-1)) @ p["o"]

    return apply, {"a": make(5, 6), "c": make(8, 6), "o": make(8, 2)}, (make(n, 5),)


@network({"a:1 b:1 o:0": 6})
def associative_scan(make, n):
    def apply(p, x):
        gates, values = sigmoid(x @ p["a"]), x @ p["b"]
        return lax.associative_scan(lambda l, r: (l[0] * r[0], r[0] * l[1] + r[1]), (gates, values), axis=1)[1] @ p["o"]

    return apply, {"a": make(5, 6), "b": make(5, 6), "o": make(6, 2)}, (make(n, 4, 5),)


@network({"a:3 k:3 o:0": 3, "a:3 k:2 k:3 o:0": 2})
def residual_around_groups(make, n):
    def apply(p, x):
        h = relu(conv(x, p["a"]))
        return (h + conv(h, p["k"], groups=3)).mean((1, 2)) @ p["o"]

    return apply, {"a": make(1, 1, 2, 6), "k": make(3, 3, 2, 6), "o": make(6, 2)}, (make(n, 4, 4, 2),)


@network({"a:1 o:0": 6, "o:0": 3})
def ones_are_concatenated(make, n):
    def apply(p, x):
        h = jnp.concatenate([x @ p["a"], jnp.ones((x.shape[0], 3)), x], -1)
        return h @ p["o"], jnp.exp(h).sum(-1)

    return apply, {"a": make(5, 6), "o": make(14, 3)}, (make(n, 5),)


@network({"a:1 o:0": (2, 4)})
def padded_with_its_reflection(make, n):
    """The two in the middle of each end come twice, with their images."""

    def apply(p, x):
        h = relu(x @ p["a"])
        return jnp.exp(jnp.pad(h, ((0, 0), (2, 2)), mode="reflect")) @ p["o"], h.sum(-1)

    return apply, {"a": make(5, 6), "o": make(10, 3)}, (make(n, 5),)


@network({"a:1 w:0": 6, "w:1 o:0": 8})
def kernel_through_softmax(make, n):
    return (
        (lambda p, x: relu(x @ p["a"]) @ softmax(p["w"], 0) @ p["o"]),
        {"a": make(5, 6), "w": make(6, 8), "o": make(8, 2)},
        (make(n, 5),),
    )


@network({"a:1 s:0 o:0": 6, "b:1 s:0 o:0": 4})
def norm_over_a_concat_of_exponentials(make, n):
    def apply(p, x):
        return layer_norm(jnp.concatenate([x @ p["a"], jnp.exp(x @ p["b"])], -1), p["s"]) @ p["o"]

    return apply, {"a": make(5, 6), "b": make(5, 4), "s": make(10), "o": make(10, 2)}, (make(n, 5),)


@network({})
def carry_that_grows_at_pruned_indices(make, n):
    def apply(p, x):
        def step(c, w):
            return jnp.exp(c) * 0.1 + x @ w, c.sum(-1)

        last, sums = lax.scan(step, jnp.zeros((x.shape[0], 6)), p["w"])
        return last @ p["o"], sums

    return apply, {"w": make(3, 5, 6), "o": make(6, 2)}, (make(n, 5),)


@network({"a:1 o:0": 6})
def noise_is_summed(make, n):
    def apply(p, x, key):
        h = x @ p["a"]
        h = h + jax.random.normal(key, h.shape)
        return (h - h.mean(-1, keepdims=True)) @ p["o"], h.max(-1)

    return apply, {"a": make(5, 6), "o": make(6, 2)}, (make(n, 5), jax.random.key(2))


# Models of recent years, and what they were pruned wrongly for


@network({"e:1 h:0 k:0 o:1 q:0 v:0": 6, "k:1 o:0 q:1 v:1": 2, "k:1 q:1": 4, "o:0 v:1": 4}, other=None)
def kv_cache_decoder(make, n):
    """Both caches are the same zeros."""

    def apply(p, x):
        def step(carry, i):
            ck, cv = carry
            h = lax.dynamic_index_in_dim(x, i, 1, keepdims=True) @ p["e"]
            q, k, v = (heads(h @ p[s], 2) for s in "qkv")
            ck = lax.dynamic_update_slice(ck, k, (0, i, 0, 0))
            cv = lax.dynamic_update_slice(cv, v, (0, i, 0, 0))
            s = jnp.einsum("bqhd,bkhd->bhqk", q, ck) / 2.0
            s = jnp.where((jnp.arange(5) <= i)[None, None, None], s, -1e9)
            y = jnp.einsum("bhqk,bkhd->bqhd", softmax(s), cv).reshape(x.shape[0], 1, 8)
            h = h + y @ p["o"]
            return ((ck, cv), (h @ p["h"])[:, 0])

        z = jnp.zeros((x.shape[0], 5, 2, 4))
        return lax.scan(step, (z, z), jnp.arange(5))[1]

    params = {"e": make(3, 6), "q": make(6, 8), "k": make(6, 8), "v": make(6, 8), "o": make(8, 6), "h": make(6, 3)}
    return apply, params, (make(n, 5, 3),)


@network({"k:1 o:0 q:1 v:1": 3, "k:1 q:1": 2, "o:0 v:1": 4})
def rope_by_complex_numbers(make, n):
    def rot(x):
        xc = lax.complex(x[..., ::2], x[..., 1::2])
        f = jnp.exp(1j * _angles(x.shape[1], 2).astype(jnp.complex64))[None, :, None]
        y = xc * f
        return jnp.stack([y.real, y.imag], -1).reshape(x.shape)

    def apply(p, x):
        q, k, v = (heads(x @ p[s], 3) for s in "qkv")
        return attend(rot(q), rot(k), v).reshape(*x.shape[:2], 12) @ p["o"]

    return apply, {"q": make(4, 12), "k": make(4, 12), "v": make(4, 12), "o": make(12, 3)}, (make(n, 5, 4),)


@network({"k:1 q:1 t1:0": 3, "k:2 q:2": 5, "o:0 t2:1 v:1": 2, "o:1 v:2": 3, "t1:1 t2:0": 4})
def talking_heads(make, n):
    def apply(p, x):
        q, k, v = (jnp.einsum("bld,dhk->blhk", x, p[s]) for s in "qkv")
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        s = jnp.einsum("bhqk,hg->bgqk", s, p["t1"])
        w = jnp.einsum("bgqk,gf->bfqk", softmax(s), p["t2"])
        return jnp.einsum("blhk,hkd->bld", jnp.einsum("bhqk,bkhd->bqhd", w, v), p["o"])

    params = {
        "q": make(7, 3, 5),
        "k": make(7, 3, 5),
        "t1": make(3, 4),
        "t2": make(4, 2),
        "v": make(7, 2, 3),
        "o": make(2, 3, 2),
    }
    return apply, params, (make(n, 6, 7),)


@network({"d:0 u:0": 4, "d:1 u:2": 5, "d:2 e:1 o:0 r:0 u:1": 6})
def moe_top2_dense_dispatch(make, n):
    def apply(p, x):
        h = x @ p["e"]
        probs = softmax(h @ p["r"])
        top, idx = lax.top_k(probs, 2)
        gate = (jax.nn.one_hot(idx, 4) * (top / top.sum(-1, keepdims=True))[..., None]).sum(-2)
        y = jnp.einsum("bef,efd->bed", gelu(jnp.einsum("bd,edf->bef", h, p["u"])), p["d"])
        return (h + jnp.einsum("be,bed->bd", gate, y)) @ p["o"]

    params = {"e": make(3, 6), "r": make(6, 4), "u": make(4, 6, 5), "d": make(4, 5, 6), "o": make(6, 2)}
    return apply, params, (make(n, 3),)


@network({"d:0 phi:1 u:0": 3, "d:1 u:2": 5, "d:2 e:1 o:0 phi:0 u:1": 6})
def soft_moe(make, n):
    def apply(p, x):
        h = x @ p["e"]
        logits = jnp.einsum("bld,des->bles", h, p["phi"])
        disp = softmax(logits, axis=1)
        comb = softmax(logits.reshape(*h.shape[:2], 6), axis=-1).reshape(logits.shape)
        s = jnp.einsum("bld,bles->besd", h, disp)
        y = jnp.einsum("besf,efd->besd", relu(jnp.einsum("besd,edf->besf", s, p["u"])), p["d"])
        return (h + jnp.einsum("besd,bles->bld", y, comb)) @ p["o"]

    params = {"e": make(3, 6), "phi": make(6, 3, 2), "u": make(3, 6, 5), "d": make(3, 5, 6), "o": make(6, 2)}
    return apply, params, (make(n, 4, 3),)


@network({"A:0 D:0 cb:0 conv:2 dt:1 dtb:0 in:1 out:0 xp:0": 6, "A:1 xp:1": 3, "dt:0 xp:1": 2})
def mamba(make, n):
    def apply(p, x):
        u, z = jnp.split(x @ p["in"], 2, -1)
        u = silu(conv(u, p["conv"], groups=6, padding=((3, 0),)) + p["cb"][None, None])
        d, B, C = jnp.split(u @ p["xp"], [2, 5], -1)
        d = jax.nn.softplus(d @ p["dt"] + p["dtb"][None, None])
        A = -jnp.exp(p["A"])
        dA = jnp.exp(d[..., None] * A[None, None])
        dBu = d[..., None] * B[:, :, None] * u[..., None]

        def step(h, s):
            a, b, c = s
            h = a * h + b
            return (h, jnp.einsum("bdn,bn->bd", h, c))

        _, ys = lax.scan(step, jnp.zeros((x.shape[0], 6, 3)), tuple(jnp.moveaxis(t, 1, 0) for t in (dA, dBu, C)))
        y = jnp.moveaxis(ys, 0, 1) + u * p["D"][None, None]
        return y * silu(z) @ p["out"]

    params = {
        "in": make(4, 12),
        "conv": make(4, 1, 6),
        "cb": make(6),
        "xp": make(6, 8),
        "dt": make(2, 6),
        "dtb": make(6),
        "A": make(6, 3),
        "D": make(6),
        "out": make(6, 3),
    }
    return apply, params, (make(n, 5, 4),)


@network({"B:0 Bi:0 C:1 Ci:1 L:0 Li:0": 5, "C:0 Ci:0 D:0 o:0": 6})
def s5_with_complex_state(make, n):
    def apply(p, x):
        lam = lax.complex(-jnp.exp(p["L"]), p["Li"])
        B, C = (lax.complex(p["B"], p["Bi"]), lax.complex(p["C"], p["Ci"]))
        Bu = jnp.einsum("pd,bld->blp", B, x.astype(jnp.complex64))
        A = jnp.broadcast_to(jnp.exp(lam * 0.1)[None, None], Bu.shape)

        def op(l, r):
            return (l[0] * r[0], r[0] * l[1] + r[1])

        xs = lax.associative_scan(op, (A, Bu), axis=1)[1]
        y = jnp.einsum("hp,blp->blh", C, xs).real
        return gelu(y * p["D"][None, None]) @ p["o"]

    params = {
        "L": make(5),
        "Li": make(5),
        "B": make(5, 4),
        "Bi": make(5, 4),
        "C": make(6, 5),
        "Ci": make(6, 5),
        "D": make(6),
        "o": make(6, 2),
    }
    return apply, params, (make(n, 6, 4),)


@network({"e:1 h:0 k:0 mk:0 mr:0 mv:0 o:1 r:0 v:0": 6, "k:1 o:0 r:1 u:0 v:1 w:0": 5})
def rwkv_time_mixing(make, n):
    def apply(p, x):
        h = x @ p["e"]
        prev = jnp.pad(h, ((0, 0), (1, 0), (0, 0)))[:, :-1]

        def mix(m):
            return h * p[m][None, None] + prev * (1 - p[m])[None, None]

        k, v, r = (mix("mk") @ p["k"], mix("mv") @ p["v"], sigmoid(mix("mr") @ p["r"]))
        w, u = (-jnp.exp(p["w"])[None], p["u"][None])

        def step(c, kv):
            a, b, m = c
            k, v = kv
            mm = jnp.maximum(m, u + k)
            e1, e2 = (jnp.exp(m - mm), jnp.exp(u + k - mm))
            out = (e1 * a + e2 * v) / (e1 * b + e2)
            m2 = jnp.maximum(w + m, k)
            e1, e2 = (jnp.exp(w + m - m2), jnp.exp(k - m2))
            return ((e1 * a + e2 * v, e1 * b + e2, m2), out)

        z = jnp.zeros((x.shape[0], 5))
        _, y = lax.scan(step, (z, z, z - 1e38), (k.swapaxes(0, 1), v.swapaxes(0, 1)))
        return (h + r * y.swapaxes(0, 1) @ p["o"]) @ p["h"]

    ps = {"e": make(3, 6), "o": make(5, 6), "h": make(6, 2), "w": make(5), "u": make(5)}
    ps |= {"m" + s: make(6) for s in "kvr"} | {s: make(6, 5) for s in "kvr"}
    return apply, ps, (make(n, 4, 3),)


@network({"f:0 g:1 o:0 v:1": 6}, other=None)
def hyena_fft(make, n):
    def apply(p, x):
        L = x.shape[1]
        v, g = (x @ p["v"], x @ p["g"])
        y = jnp.fft.irfft(
            jnp.fft.rfft(v, n=2 * L, axis=1) * jnp.fft.rfft(p["f"], n=2 * L, axis=1).T[None], n=2 * L, axis=1
        )[:, :L]
        return y * g @ p["o"]

    return apply, {"v": make(4, 6), "g": make(4, 6), "f": make(6, 5), "o": make(6, 2)}, (make(n, 5, 4),)


@network({"e:1 w:0 wi:0 wr:0": 4, "o:0 w:1 wi:1 wr:1": 5}, other=None)
def fno(make, n):
    def apply(p, x):
        h = x @ p["e"]
        f = jnp.fft.rfft(h, axis=1)[:, :3]
        W = p["wr"] + 1j * p["wi"]
        y = jnp.einsum("bkc,cdk->bkd", f, W)
        y = jnp.fft.irfft(jnp.pad(y, ((0, 0), (0, 2), (0, 0))), n=8, axis=1)
        return gelu(y + h @ p["w"]) @ p["o"]

    params = {"e": make(3, 4), "wr": make(4, 5, 3), "wi": make(4, 5, 3), "w": make(4, 5), "o": make(5, 2)}
    return apply, params, (make(n, 8, 3),)


@network({"ada:0 e:1": 6, "ada:1 d:1 o:0 p:1 u:0": 5, "d:0 u:1": 7, "e:0": 4}, other=None)
def dit_adaln_zero(make, n):
    def ln(x):
        m = x.mean(-1, keepdims=True)
        return (x - m) * lax.rsqrt(((x - m) ** 2).mean(-1, keepdims=True) + 1e-6)

    def apply(p, x, t):
        ang = t[:, None] * jnp.exp(-jnp.arange(4) / 4.0)[None]
        c = silu(jnp.concatenate([jnp.sin(ang), jnp.cos(ang)], -1) @ p["e"])
        s, b, g = jnp.split(c @ p["ada"], 3, -1)
        h = x @ p["p"]
        y = ln(h) * (1 + s[:, None]) + b[:, None]
        return (h + g[:, None] * (gelu(y @ p["u"]) @ p["d"])) @ p["o"]

    params = {"e": make(8, 6), "ada": make(6, 15), "p": make(3, 5), "u": make(5, 7), "d": make(7, 5), "o": make(5, 2)}
    return apply, params, (make(n, 4, 3), make(n))


@network({"e:1 k:0 v:0": 6, "h:0 lat:1 o:1 q:0": 5, "k:1 q:1": 3, "o:0 v:1": 8})
def perceiver(make, n):
    def apply(p, x):
        h = x @ p["e"]
        lat = jnp.broadcast_to(p["lat"][None], (x.shape[0], 4, 5))
        w = softmax(lat @ p["q"] @ (h @ p["k"]).swapaxes(1, 2))
        lat = lat + w @ (h @ p["v"]) @ p["o"]
        return lat.mean(1) @ p["h"]

    params = {
        "lat": make(4, 5),
        "e": make(3, 6),
        "q": make(5, 3),
        "k": make(6, 3),
        "v": make(6, 8),
        "o": make(8, 5),
        "h": make(5, 2),
    }
    return apply, params, (make(n, 7, 3),)


@network({"o:0 wh:1 wz:1": 5})
def min_gru(make, n):
    def apply(p, x):
        k, t = (x @ p["wz"], x @ p["wh"])
        lc, lz = (-jax.nn.softplus(k), -jax.nn.softplus(-k))

        def g(x):
            return jnp.where(x >= 0, jnp.log(relu(x) + 0.5), -jax.nn.softplus(-x))

        a = jnp.cumsum(lc, 1)
        hs = a + lax.cumlogsumexp(lz + g(t) - a, axis=1)
        return jnp.exp(hs) @ p["o"]

    return apply, {"wz": make(4, 5), "wh": make(4, 5), "o": make(5, 2)}, (make(n, 6, 4),)


@network({"b:0 o:0 w:2 w:3": 4})
def conv_lstm(make, n):
    def apply(p, x):
        def step(c, x):
            h, c = c
            i, f, g, o = jnp.split(conv(jnp.concatenate([x, h], -1), p["w"]) + p["b"][None, None, None], 4, -1)
            c = sigmoid(f + 1) * c + sigmoid(i) * jnp.tanh(g)
            h = sigmoid(o) * jnp.tanh(c)
            return ((h, c), None)

        z = jnp.zeros((*x.shape[:1], *x.shape[2:4], 4))
        (h, _), _ = lax.scan(step, (z, z), jnp.moveaxis(x, 1, 0))
        return h.mean((1, 2)) @ p["o"]

    return apply, {"w": make(3, 3, 6, 16), "b": make(16), "o": make(4, 2)}, (make(n, 3, 4, 4, 2),)


@network({"kva:1 kvb:0": 3, "kvb:1 o:0 qb:1": 2, "kvb:1 qb:1": 4, "kvb:1 o:0": 3, "qa:1 qb:0": 4})
def multi_head_latent_attention(make, n):
    """DeepSeek's MLA: low-rank kv, decoupled rope key shared over heads"""

    def rope(x):
        a, b = jnp.split(x, 2, -1)
        ang = _angles(x.shape[1], 1)[None, :, None]
        return jnp.concatenate([a * jnp.cos(ang) - b * jnp.sin(ang), a * jnp.sin(ang) + b * jnp.cos(ang)], -1)

    def apply(p, x):
        q = heads(x @ p["qa"] @ p["qb"], 2)
        qn, qr = (q[..., :4], rope(q[..., 4:]))
        kv = x @ p["kva"]
        c, kr = (kv[..., :3], rope(kv[..., None, 3:]))
        kvb = heads(c @ p["kvb"], 2)
        kn, v = (kvb[..., :4], kvb[..., 4:])
        k = jnp.concatenate([kn, jnp.broadcast_to(kr, (*kn.shape[:3], 2))], -1)
        return attend(jnp.concatenate([qn, qr], -1), k, v).reshape(*x.shape[:2], -1) @ p["o"]

    params = {"qa": make(7, 4), "qb": make(4, 12), "kva": make(7, 5), "kvb": make(3, 14), "o": make(6, 2)}
    return apply, params, (make(n, 5, 7),)


@network({"k:1 o:0 q:1 v:1": 2, "k:1 q:1": 4, "o:0 v:1": 3})
def attention_block_by_block(make, n):
    """flash attention by hand: a scan over blocks of keys with running max"""

    def apply(p, x):
        q, k, v = (heads(x @ p[s], 2) for s in "qkv")
        kb, vb = (t.reshape(t.shape[0], 2, 3, 2, -1).swapaxes(0, 1) for t in (k, v))

        def step(c, kv):
            m, l, acc = c
            k, v = kv
            s = jnp.einsum("bqhd,bkhd->bhqk", q, k)
            m2 = jnp.maximum(m, s.max(-1))
            pr = jnp.exp(s - m2[..., None])
            a = jnp.exp(m - m2)
            return ((m2, l * a + pr.sum(-1), acc * a[..., None] + jnp.einsum("bhqk,bkhd->bhqd", pr, v)), None)

        B, L = x.shape[:2]
        init = (jnp.full((B, 2, L), -jnp.inf), jnp.zeros((B, 2, L)), jnp.zeros((B, 2, L, 3)))
        (_, l, acc), _ = lax.scan(step, init, (kb, vb))
        return (acc / l[..., None]).swapaxes(1, 2).reshape(B, L, 6) @ p["o"]

    return apply, {"q": make(4, 8), "k": make(4, 8), "v": make(4, 6), "o": make(6, 2)}, (make(n, 6, 4),)


@network({"e:1 h:0 o:1 qkv:0": 6, "o:0 qkv:1 rel:1": 3, "o:0 qkv:1": 2, "rel:0": 1}, other=5)
def swin_window_attention(make, n):
    idx = np.random.default_rng(0).integers(0, 9, (4, 4))

    def apply(p, x):
        B = x.shape[0]
        h = x @ p["e"]
        s = jnp.roll(h, (-1, -1), (1, 2))
        w = s.reshape(B, 2, 2, 2, 2, 6).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 4, 6)
        qkv = (w @ p["qkv"]).reshape(-1, 4, 3, 3, 2).transpose(2, 0, 3, 1, 4)
        q, k, v = (qkv[0], qkv[1], qkv[2])
        a = q @ k.swapaxes(-1, -2) + p["rel"][idx.reshape(-1)].reshape(4, 4, 3).transpose(2, 0, 1)[None]
        y = (softmax(a) @ v).transpose(0, 2, 1, 3).reshape(-1, 4, 6) @ p["o"]
        y = y.reshape(B, 2, 2, 2, 2, 6).transpose(0, 1, 3, 2, 4, 5).reshape(B, 4, 4, 6)
        return (h + jnp.roll(y, (1, 1), (1, 2))) @ p["h"]

    params = {"e": make(3, 6), "qkv": make(6, 18), "rel": make(9, 3), "o": make(6, 6), "h": make(6, 2)}
    return apply, params, (make(n, 4, 4, 3),)


@network({"a:3 b:2 hl:2 lh:3 o:0": 4, "b:3 hl:3 lh:2 o:0": 6})
def hrnet_fuse(make, n):
    def up(x):
        return jax.image.resize(x, (x.shape[0], x.shape[1] * 2, x.shape[2] * 2, x.shape[3]), "bilinear")

    def apply(p, x):
        h = relu(conv(x, p["a"]))
        l = relu(conv(h, p["b"], stride=2))
        h2 = relu(h + up(conv(l, p["lh"])))
        l2 = relu(l + conv(h, p["hl"], stride=2))
        return jnp.concatenate([h2, up(l2)], -1).mean((1, 2)) @ p["o"]

    params = {
        "a": make(3, 3, 2, 4),
        "b": make(3, 3, 4, 6),
        "lh": make(1, 1, 6, 4),
        "hl": make(3, 3, 4, 6),
        "o": make(10, 2),
    }
    return apply, params, (make(n, 8, 8, 2),)


@network({"a:3 k:2 st:1": 4, "k:3 o:2": 5})
def stylegan_modulated_convolution(make, n):
    """kernel modulated and demodulated per example, then a convolution of B groups"""

    def apply(p, x, z):
        h = conv(x, p["a"])
        s = z @ p["st"] + 1
        w = p["k"][None] * s[:, None, None, :, None]
        w = w * lax.rsqrt((w**2).sum((1, 2, 3), keepdims=True) + 1e-08)
        y = jax.vmap(lambda h, w: conv(h[None], w)[0])(h, w)
        return conv(jax.nn.leaky_relu(y), p["o"])

    params = {"a": make(1, 1, 2, 4), "st": make(3, 4), "k": make(3, 3, 4, 5), "o": make(1, 1, 5, 2)}
    return apply, params, (make(n, 4, 4, 2), make(n, 3))


@network({"a:3 f1:0 f2:1 o:0": 6, "f1:1 f2:0": 3})
def cbam(make, n):
    def apply(p, x):
        h = relu(conv(x, p["a"]))

        def mlp(v):
            return relu(v @ p["f1"]) @ p["f2"]

        h = h * sigmoid(mlp(h.mean((1, 2))) + mlp(h.max((1, 2))))[:, None, None]
        s = jnp.concatenate([h.mean(-1, keepdims=True), h.max(-1, keepdims=True)], -1)
        h = h * sigmoid(conv(s, p["s"]))
        return h.mean((1, 2)) @ p["o"]

    params = {"a": make(3, 3, 2, 6), "f1": make(6, 3), "f2": make(3, 6), "s": make(3, 3, 2, 1), "o": make(6, 2)}
    return apply, params, (make(n, 5, 5, 2),)


@network({})
def eca_convolves_over_channels(make, n):
    def apply(p, x):
        h = relu(conv(x, p["a"]))
        g = conv(h.mean((1, 2))[..., None], p["k"])
        return (h * sigmoid(g[..., 0])[:, None, None]).mean((1, 2)) @ p["o"]

    return apply, {"a": make(3, 3, 2, 6), "k": make(3, 1, 1), "o": make(6, 2)}, (make(n, 4, 4, 2),)


@network(
    {
        "a:3 b:2 b:3 o:0": 3,
        "a:3 b:3 k1:2 o:0": 3,
        "a:3 b:2 b:3 k1:3 k2:2 o:0": 3,
        "a:3 b:2 b:3 k2:3 k3:2 o:0": 3,
        "b:2 k3:3": 3,
    }
)
def res2net(make, n):
    def apply(p, x):
        h = relu(conv(x, p["a"]))
        xs = jnp.split(h, 4, -1)
        ys = [xs[0]]
        for i in range(1, 4):
            z = xs[i] if i == 1 else xs[i] + ys[-1]
            ys.append(relu(conv(z, p[f"k{i}"])))
        return (h + conv(jnp.concatenate(ys, -1), p["b"])).mean((1, 2)) @ p["o"]

    params = {"a": make(1, 1, 2, 12), "b": make(1, 1, 12, 12), "o": make(12, 2)} | {
        f"k{i}": make(3, 3, 3, 3) for i in (1, 2, 3)
    }
    return apply, params, (make(n, 4, 4, 2),)


@network({"q:1 q2:0 s:0 z:0": 6})
def int8_kernels_dequantised(make, n):
    def apply(p, x):
        w = (p["q"].astype(jnp.float32) - p["z"].astype(jnp.float32)[None]) * p["s"][None]
        w2 = p["q2"].astype(jnp.float32) * p["s2"][None]
        return relu(x @ w) @ w2

    params = {
        "q": make.ids(100, 5, 6).astype(jnp.int8),
        "z": make.ids(9, 6),
        "s": 0.02 * make(6),
        "q2": make.ids(100, 6, 3).astype(jnp.int8),
        "s2": 0.02 * make(3),
    }
    return apply, params, (make(n, 5),)


@network({"m:1 o:0 w:1": 6})
def mask_among_the_params(make, n):
    return (
        lambda p, x: relu(x @ jnp.where(p["m"], p["w"], 0)) @ p["o"],
        {"w": make(5, 6), "m": make(5, 6) > 0, "o": make(6, 3)},
        (make(n, 5),),
    )


@network({})
def scatter_adds_to_sigmoids(make, n):
    def apply(p, x):
        h = sigmoid(x @ p["a"])
        g = sigmoid(x[:2] @ p["b"])
        return (h.at[jnp.array([0, 0])].add(g).sum(-1), h.at[:2].multiply(g).max(-1))

    return apply, {"a": make(5, 6), "b": make(5, 6)}, (make(n, 5),)


@network({})
def one_over_a_pruned_zero(make, n):
    def apply(p, x):
        h = x @ p["a"]
        return (jnp.minimum(1.0 / relu(h), 5.0).sum(-1), jnp.maximum(-1.0 / (h * h), -3.0) @ p["o"])

    return apply, {"a": make(5, 6), "o": make(6, 3)}, (make(n, 5),)


@network({"o:0 qkv:1": (4, 4)})
def square_grid_of_heads(make, n):
    def apply(p, x):
        qkv = (x @ p["qkv"]).reshape(*x.shape[:2], 3, 4, 4)
        return attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]).reshape(*x.shape[:2], 16) @ p["o"]

    return apply, {"qkv": make(5, 48), "o": make(16, 2)}, (make(n, 3, 5),)


@network({"a:1 o:0 s:0": (4, 4)})
def group_norm_square(make, n):
    def apply(p, x):
        h = (x @ p["a"]).reshape(-1, 4, 4)
        h = (h - h.mean(-1, keepdims=True)) * lax.rsqrt(h.var(-1, keepdims=True) + 1e-05)
        return relu(h.reshape(-1, 16) * p["s"][None]) @ p["o"]

    return apply, {"a": make(5, 16), "s": make(16), "o": make(16, 2)}, (make(n, 5),)


@network({"A:1 B:0": 2, "dn:1 up:0": 3})
def dora_and_adapter(make, n):
    def apply(p, x):
        w = p["w"] + p["A"] @ p["B"] * 2
        w = p["m"][None] * w / jnp.linalg.norm(w, axis=0, keepdims=True)
        h = relu(x @ w)
        h = h + relu(h @ p["dn"]) @ p["up"]
        return h @ p["o"]

    params = {
        "w": make(5, 6),
        "A": make(5, 2),
        "B": make(2, 6),
        "m": make(6),
        "dn": make(6, 3),
        "up": make(3, 6),
        "o": make(6, 2),
    }
    return apply, params, (make(n, 5),)


@network({"a:1 b:0": 6, "b:1 o:0": 4})
def checkpoint_names_and_policies(make, n):
    def apply(p, x):
        @partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("h"))
        def f(p, x):
            h = checkpoint_name(jnp.tanh(x @ p["a"]), "h")
            return h @ p["b"]

        return jax.nn.gelu(f(p, x)) @ p["o"]

    return apply, {"a": make(5, 6), "b": make(6, 4), "o": make(4, 2)}, (make(n, 5),)


@network({"d:1 u:2": 5, "d:2 e:1 o:0 r:0 u:1": 6})
def ragged_experts(make, n):
    def apply(p, x):
        h = x @ p["e"]
        e = (h @ p["r"]).argmax(-1)
        order = jnp.argsort(e)
        sizes = jnp.bincount(e, length=3)
        y = lax.ragged_dot(relu(lax.ragged_dot(h[order], p["u"], sizes)), p["d"], sizes)
        return (h + jnp.zeros_like(y).at[order].set(y)) @ p["o"]

    params = {"e": make(3, 6), "r": make(6, 3), "u": make(3, 6, 5), "d": make(3, 5, 6), "o": make(6, 2)}
    return apply, params, (make(n, 3),)


@network({"a:1 b:0 c:0": 6})
def complex_kernels(make, n):
    def apply(p, x):
        h = x.astype(jnp.complex64) @ p["a"]
        h = h * (relu(jnp.abs(h) + p["b"][None]) / (jnp.abs(h) + 1e-6))
        return jnp.abs(h @ p["c"])

    def c(*s):
        return lax.complex(make(*s), make(*s))

    return apply, {"a": c(5, 6), "b": make(6), "c": c(6, 2)}, (make(n, 5),)


@network({"a:1 b:0": 6, "b:1 c:0": 4})
def energy_model_with_langevin(make, n):
    def apply(p, x, key):
        def E(x):
            return (jax.nn.softplus(jax.nn.swish(x @ p["a"]) @ p["b"]) @ p["c"]).sum()

        def step(x, k):
            return (x - 0.1 * jax.grad(E)(x) + 0.01 * jax.random.normal(k, x.shape), None)

        return lax.scan(step, x, jax.random.split(key, 3))[0]

    return apply, {"a": make(5, 6), "b": make(6, 4), "c": make(4, 1)}, (make(n, 5), jax.random.key(0))


@network({"a:1 ab:0 b:0": 6, "b:1 c:0": 4})
def physics_informed_second_derivatives(make, n):
    def apply(p, x):
        def u(t):
            return (jnp.tanh(jnp.tanh(t[None] @ p["a"] + p["ab"][None]) @ p["b"]) @ p["c"])[0, 0]

        return (
            jax.vmap(u)(x),
            jax.vmap(lambda t: jnp.trace(jax.hessian(u)(t)))(x),
            jax.vmap(lambda t: jax.jvp(jax.grad(u), (t,), (t,))[1])(x),
        )

    return apply, {"a": make(3, 6), "ab": make(6), "b": make(6, 4), "c": make(4, 1)}, (make(n, 3),)


@network({"a:1 b:0": 6, "b:1 c:1 d:0": 4, "d:1 o:0": 3})
def vq_vae(make, n):
    def apply(p, x):
        z = relu(x @ p["a"]) @ p["b"]
        d = (z**2).sum(1, keepdims=True) - 2 * z @ p["c"].T + (p["c"] ** 2).sum(1)[None]
        k = d.argmin(1)
        q = p["c"][k]
        return (relu((z + lax.stop_gradient(q - z)) @ p["d"]) @ p["o"], k)

    return apply, {"a": make(5, 6), "b": make(6, 4), "c": make(7, 4), "d": make(4, 3), "o": make(3, 5)}, (make(n, 5),)


@network({"a:1 l:0": 2, "a:1 r:0": 3, "l:1 o:0": 3, "o:0 r:1": 2})
def kronecker_kernel(make, n):
    def apply(p, x):
        return relu(relu(x @ p["a"]) @ jnp.kron(p["l"], p["r"])) @ p["o"]

    return apply, {"a": make(5, 6), "l": make(2, 3), "r": make(3, 2), "o": make(6, 2)}, (make(n, 5),)


@network({"a:1 b1:0": 3, "a:1 b2:0": 3, "b1:1 o:0": 2, "b2:1 o:0": 4})
def block_diagonal_kernel(make, n):
    def apply(p, x):
        h = relu(x @ p["a"])
        w = jax.scipy.linalg.block_diag(p["b1"], p["b2"])
        return relu(h @ w) @ p["o"]

    return apply, {"a": make(5, 6), "b1": make(3, 2), "b2": make(3, 4), "o": make(6, 2)}, (make(n, 5),)


@network({"a:1 m:0 u:0": 6, "m:1 u:0": 5, "o:0 u:1": 4}, other=None)
def gcn_by_segment_sum(make, n):
    src, dst = (np.array([0, 1, 2, 3, 0, 2]), np.array([1, 2, 3, 0, 2, 0]))

    def apply(p, x, src, dst):
        h = relu(x @ p["a"])
        m = jnp.concatenate([h[src], h[dst]], -1) @ p["m"]
        agg = jax.ops.segment_sum(relu(m), dst, 4)
        mx = jax.ops.segment_max(m, dst, 4)
        h = relu(jnp.concatenate([h, agg, jnp.where(jnp.isfinite(mx), mx, 0)], -1) @ p["u"])
        return jax.ops.segment_sum(h, jnp.zeros(4, jnp.int32), 1) @ p["o"]

    return apply, {"a": make(3, 6), "m": make(12, 5), "u": make(16, 4), "o": make(4, 2)}, (make(4, 3), src, dst)


@network({"a:1 g:1": 5, "g:0 z:1": 4, "g:1 o:0": 6})
def hypernetwork_of_a_hidden_kernel(make, n):
    def apply(p, x, z):
        w = (relu(z @ p["z"]) @ p["g"]).reshape(-1, 5, 6)
        return relu(jnp.einsum("bi,bij->bj", x @ p["a"], w)) @ p["o"]

    return apply, {"z": make(3, 4), "g": make(4, 30), "a": make(3, 5), "o": make(6, 2)}, (make(n, 3), make(n, 3))


@network({"c:0 m:1 u:0": 6, "e:1 m:0 o:0 u:1": 5})
def egnn_pairwise(make, n):
    def apply(p, x, pos):
        h = x @ p["e"]
        d = ((pos[:, :, None] - pos[:, None]) ** 2).sum(-1, keepdims=True)
        N = h.shape[1]
        hi, hj = (
            jnp.broadcast_to(h[:, :, None], (h.shape[0], N, N, 5)),
            jnp.broadcast_to(h[:, None], (h.shape[0], N, N, 5)),
        )
        m = silu(jnp.concatenate([hi, hj, d], -1) @ p["m"])
        pos = pos + ((pos[:, :, None] - pos[:, None]) * (m @ p["c"])).mean(2)
        return ((h + m.sum(2) @ p["u"]).mean(1) @ p["o"], pos)

    params = {"e": make(3, 5), "m": make(11, 6), "c": make(6, 1), "u": make(6, 5), "o": make(5, 2)}
    return apply, params, (make(n, 4, 3), make(n, 4, 3))


@network({})
def divided_by_how_many_are_positive(make, n):
    """Of a pruned channel none is: zero by zero, and the masked network is no number."""

    def apply(p, x):
        h = relu(x @ p["a"])
        return h.sum(1) / (h > 0).sum(1) @ p["o"]

    return apply, {"a": make(5, 6), "o": make(6, 2)}, (make(n, 8, 5),)


@network({"a:1 o:0": 6})
def divided_by_what_is_guarded(make, n):
    def apply(p, x):
        h = relu(x @ p["a"])
        counts = (h > 0).sum(1)
        return h.sum(1) / jnp.where(counts == 0, 1, counts) @ p["o"]

    return apply, {"a": make(5, 6), "o": make(6, 2)}, (make(n, 8, 5),)


@network({})
def instance_norm_without_epsilon(make, n):
    def apply(p, x):
        h = relu(x @ p["a"])
        return ((h - h.mean(1, keepdims=True)) / h.std(1, keepdims=True)).max(1) @ p["o"]

    return apply, {"a": make(5, 6), "o": make(6, 2)}, (make(n, 8, 5),)


@network({"k:1 q:1": 4})
def normed_queries_without_epsilon(make, n):
    """A pruned head would divide zero by zero; a pruned dimension of it does not."""

    def apply(p, x):
        q, k, v = (heads(x @ p[name], 2) for name in "qkv")
        q, k = (t / jnp.linalg.norm(t, axis=-1, keepdims=True) for t in (q, k))
        return attend(q, k, v).reshape(*x.shape[:2], -1) @ p["o"]

    return apply, {"q": make(4, 8), "k": make(4, 8), "v": make(4, 6), "o": make(6, 2)}, (make(n, 3, 4),)


@network({"d:1 u:2": 5, "d:2 e:1 o:0 q:0 r:0 u:1": 6})
def experts_looked_up_for_each_row(make, n):
    def apply(p, x):
        h = x @ p["e"]
        chosen = (h @ p["r"]).argmax(-1)
        y = jnp.einsum("bf,bfd->bd", gelu(jnp.einsum("bd,bdf->bf", h, p["u"][chosen])), p["d"][chosen])
        return (h + y) @ p["o"], jnp.zeros((4, 6)).at[chosen].add(y) @ p["q"]

    params = {"e": make(3, 6), "r": make(6, 4), "u": make(4, 6, 5), "d": make(4, 5, 6), "o": make(6, 2)}
    return apply, params | {"q": make(6, 2)}, (make(n, 3),)
