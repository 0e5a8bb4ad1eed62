"""Dependency analysis by size of the network; compact networks against dense ones and fresh ones of their widths.

Beside it Torch-Pruning's dependency graph of the same network, where `torch` and `torch_pruning` are installed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import prune_jax as pj
from prune_jax.models import Network, build
from tests.benchmarks import torch_pruning_vit
from tests.benchmarks.rounds import Figure, figure, in_turns, ratio

IMAGE = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
SERIES = jax.ShapeDtypeStruct((1, 64, 32), jnp.float32)
DEPTHS = (3, 6, 12, 24, 48, 96)  # layers; ViT-B has 12
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


def _of_depth(layers: int) -> str:
    return "analysis of ViT-B (87 M parameters)" if layers == 12 else f"analysis of a ViT-B of {layers} layers"


def _beside(ours: Figure) -> dict[str, Figure]:
    """Torch-Pruning's time for the same network, and ours in units of it."""
    title = "Torch-Pruning: groups of ViT-B"
    seconds = torch_pruning_vit.seconds(repeats=3)
    if not seconds:
        return {title: Figure(math.nan, math.nan, math.nan, "not installed")}
    theirs = figure(seconds, "s")
    spread = Figure(ours.value / theirs.value, ours.low / theirs.high, ours.high / theirs.low)
    return {title: theirs, "groups of ViT-B: prune_jax / Torch-Pruning": spread}


def measure(rounds: int = 41) -> dict[str, Figure]:
    found = {_of_depth(layers): _analysis(Vit(layers=layers)) for layers in DEPTHS}
    few, many = found[_of_depth(12)], found[_of_depth(96)]
    found["analysis, seconds of a layer: 96 layers / 12 layers"] = Figure(
        many.value / few.value / 8, many.low / few.high / 8, many.high / few.low / 8
    )
    found["analysis of a ViT of 1.0 G parameters"] = _analysis(Vit(dim=2048, heads=16, layers=20))
    found |= _beside(few)
    for name in HALVED:
        for batch in (1, 64):
            found |= _halved(name, batch, rounds if batch == 1 else rounds // 3)
    return found


def plot(found: Mapping[str, Figure], folder: Path) -> Path:
    """Draws the analysis' seconds against depth, with the line through the origin that fits best."""
    from matplotlib.figure import Figure as Drawing

    times = [found[_of_depth(layers)] for layers in DEPTHS]
    layers, seconds = np.array(DEPTHS), np.array([it.value for it in times])
    slope = float(layers @ seconds / (layers @ layers))
    drawing = Drawing(figsize=(6, 3.4), layout="constrained")
    axes = drawing.add_subplot()
    axes.plot([0, DEPTHS[-1]], [0, slope * DEPTHS[-1]], color="0.7", lw=1, label=f"{1000 * slope:.0f} ms a layer")
    low, high = ([abs(it.value - end) for it, end in zip(times, ends, strict=True)] for ends in _ends(times))
    axes.errorbar(layers, seconds, [low, high], fmt="o", ms=5, color="#0b67b2", capsize=3, label="median and quartiles")
    axes.set_xticks(DEPTHS[2:])
    axes.set_xlabel("layers of a ViT of ViT-B's width")
    axes.set_ylabel("seconds from function to groups")
    axes.set_xlim(0)
    axes.set_ylim(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = folder / "analysis_time.png"
    drawing.savefig(path, dpi=120, metadata={"Software": None})
    return path


def _ends(times: list[Figure]) -> tuple[list[float], list[float]]:
    return [it.low for it in times], [it.high for it in times]
