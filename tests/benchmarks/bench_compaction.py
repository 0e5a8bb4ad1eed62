"""Dependency analysis by size of the network; compact networks against dense ones and fresh ones of their widths."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import prune_jax as pj
from prune_jax.models import Network, build
from tests.benchmarks.rounds import Figure, figure, in_turns, ratio

IMAGE = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
SERIES = jax.ShapeDtypeStruct((1, 64, 32), jnp.float32)
TRANSFORMER = {"dim": 192, "heads": 6, "layers": 4}

# Name -> the network, its inputs, the one of half its widths, and the kinds of groups that are halved.
HALVED: dict[str, tuple[tuple[str, dict[str, Any]], Any, tuple[str, dict[str, Any]], tuple[str, ...]]] = {
    "resnet-20": (("resnet", {"depth": 20}), IMAGE, ("resnet", {"depth": 20, "width": 8}), ("channel",)),
    "transformer": (
        ("transformer", TRANSFORMER),
        SERIES,
        ("transformer", {**TRANSFORMER, "dim": 96, "heads": 3}),
        ("width", "head", "neuron"),
    ),
}


class Block(nn.Module):
    """A transformer block."""

    dim: int
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
        return x + nn.Dense(self.dim)(nn.gelu(nn.Dense(4 * self.dim)(nn.LayerNorm()(x))))


class Vit(nn.Module):
    """A vision transformer; ViT-B by default, 87 M parameters."""

    dim: int = 768
    heads: int = 12
    layers: int = 12

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.dim, (16, 16), (16, 16))(x).reshape(x.shape[0], -1, self.dim)
        x = x + self.param("positions", nn.initializers.normal(), (1, x.shape[1], self.dim))
        for _ in range(self.layers):
            x = Block(self.dim, self.heads)(x)
        return nn.Dense(1000)(nn.LayerNorm()(x).mean(1))


def _analysis(model: nn.Module) -> Figure:
    """Seconds from a function and its shapes to named groups; no weight is allocated."""
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    seconds = []
    for _ in range(3):
        jax.clear_caches()
        start = time.perf_counter()
        assert pj.trace(model.apply, params, x).groups
        seconds.append(time.perf_counter() - start)
    return figure(seconds, "s")


def _resting(network: Network) -> Callable[..., jax.Array]:
    return lambda v, x: network.apply(v["params"], v["state"], (x,), train=False, key=None)[0]


def _halved(name: str, batch: int, rounds: int) -> dict[str, Figure]:
    (kind, args), inputs, (_, half), kinds = HALVED[name]
    dense, fresh = (build(kind, a, inputs=(inputs,), outputs=10) for a in (args, half))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(batch, *inputs.shape[1:])), jnp.float32)
    of_dense, of_fresh = (jax.jit(n.init)(jax.random.key(0))._asdict() for n in (dense, fresh))
    net = pj.trace(_resting(dense), of_dense, x)
    scores = jax.tree.map(jnp.abs, of_dense)
    small = net.compact(net.choose(scores, sparsity=0.5, scope="group", kinds=kinds))
    widths = [sorted(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (small.params, of_fresh)]
    assert widths[0] == widths[1], "the fresh network is of other widths"
    seconds = in_turns(
        {
            "dense": partial(jax.jit(_resting(dense)), of_dense, x),
            "fresh": partial(jax.jit(_resting(fresh)), of_fresh, x),
            "compact": partial(small.apply, small.params, x),
        },
        rounds=rounds,
    )
    title = f"{name}, half the widths, batch {batch}"
    return {
        f"{title}: compact / fresh": ratio(seconds, "compact", "fresh"),
        f"{title}: compact / dense": ratio(seconds, "compact", "dense"),
    }


def measure(rounds: int = 41) -> dict[str, Figure]:
    found = {
        "analysis of ViT-B (87 M parameters)": _analysis(Vit()),
        "analysis of twice its layers": _analysis(Vit(layers=24)),
        "analysis of four times its layers": _analysis(Vit(layers=48)),
        "analysis of a ViT of 1.0 G parameters": _analysis(Vit(dim=2048, heads=16, layers=20)),
    }
    for name in HALVED:
        for batch in (1, 64):
            found |= _halved(name, batch, rounds if batch == 1 else rounds // 3)
    return found
