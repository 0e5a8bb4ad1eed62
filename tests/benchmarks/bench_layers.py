"""Solvers and criteria that look at what layers see, against what their papers say they cost.

SparseGPT is O(in^3 + in^2 out) for a layer: its sweep is set beside one plain product of the same FLOPs, in^2 out, and
all of it beside one of in^2 out + in^3. Wanda is one forward pass and O(weights): it is set beside that pass.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from prune_jax.masks import choose_n_of_m
from prune_jax.models import build
from prune_jax.networks import mean_loss
from prune_jax.scoring import prunable_paths, score
from prune_jax.statistics import gather
from prune_jax.surgeon import _blocks, _factor, _Given, _quotas, _sweep, solve
from tests.benchmarks.rounds import Figure, figure, in_turns, ratio

SIZES = {"1024 x 4096": (1024, 4096), "4096 x 1024": (4096, 1024)}
SAMPLES = 2048


def measure(rounds: int = 5) -> dict[str, Figure]:
    found: dict[str, Figure] = {}
    for name, (inputs, outputs) in SIZES.items():
        found |= _solver(f"sparsegpt {name}", inputs, outputs, rounds)
    return found | _wanda(rounds)


def _solver(name: str, inputs: int, outputs: int, rounds: int) -> dict[str, Figure]:
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((SAMPLES, inputs), (inputs, outputs)))
    xx = x.T @ x / SAMPLES
    factor = _factor(xx[None], 0.01)[0]
    blocks = _blocks(inputs, 128, 1, None)
    quotas = _quotas((1, inputs, outputs), None, blocks, w.size // 2, False)
    given = {
        "sweep": _Given(factor, None, None, quotas, None, False),
        "n:m": _Given(factor, None, None, None, (2, 4), False),
    }
    product = jax.jit(partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST))
    half, square = w[:, : outputs // 2] + 0, xx + 0
    seconds = in_turns(
        {
            "product": lambda: product(square, half),  # in^2 out FLOPs
            "cube": lambda: product(square, square[:, : inputs // 2]),  # in^3
            "sweep": lambda: _sweep(given["sweep"], w[None], blocks, 0)[1],
            "2:4": lambda: _sweep(given["n:m"], w[None], blocks, 0)[1],
            "solve": lambda: solve(w, xx, prune=w.size // 2)[1],
        },
        rounds=rounds,
    )
    both = {**seconds, "both": [a + b for a, b in zip(seconds["product"], seconds["cube"], strict=True)]}
    rate = [inputs**2 * outputs / s / 1e9 for s in seconds["product"]]
    return {
        f"{name}: a product": figure(rate, "GFLOP/s"),
        f"{name}: the sweep": figure([inputs**2 * outputs / s / 1e9 for s in seconds["sweep"]], "GFLOP/s"),
        f"{name}: sweep / product of its FLOPs": ratio(seconds, "sweep", "product"),
        f"{name}: sweep at 2:4 / product of its FLOPs": ratio(seconds, "2:4", "product"),
        f"{name}: all / product of its FLOPs": ratio(both, "solve", "both"),
    }


def _wanda(rounds: int) -> dict[str, Figure]:
    """A transformer of 12 blocks of width 256 on 4 x 128 steps of 64 features."""
    rng = np.random.default_rng(1)
    batches = [{"x": rng.normal(size=(4, 128, 64)).astype(np.float32), "y": np.zeros(4, np.int32)} for _ in range(4)]
    sizes = {"dim": 256, "heads": 4, "layers": 12}
    network = build("transformer", sizes, inputs=(jax.ShapeDtypeStruct((1, 128, 64), jnp.float32),), outputs=10)
    variables = jax.jit(network.init)(jax.random.key(0))
    loss = mean_loss(network, "classification", variables.state)
    params = variables.params
    paths = prunable_paths(params)
    forward = jax.jit(lambda loss, params, batch: loss(params, batch))
    scores = score("wanda", params, loss=loss, batches=batches)
    seconds = in_turns(
        {
            "forward": lambda: [forward(loss, params, batch) for batch in batches],
            "statistics": lambda: gather({"input_square"}, loss, params, batches, prunable=paths),
            "score": lambda: score("wanda", params, loss=loss, batches=batches),
            "mask": lambda: choose_n_of_m(scores, 2, 4),
        },
        rounds=rounds,
    )
    return {
        "wanda, 12 blocks: a forward pass": figure([1e3 * s for s in seconds["forward"]], "ms"),
        "wanda, 12 blocks: statistics / forward pass": ratio(seconds, "statistics", "forward"),
        "wanda, 12 blocks: scores / forward pass": ratio(seconds, "score", "forward"),
        "wanda, 12 blocks: 2:4 masks / forward pass": ratio(seconds, "mask", "forward"),
    }
