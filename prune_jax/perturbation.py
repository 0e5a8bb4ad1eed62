"""Batches under perturbation: what criteria make of them is what stays important when inputs are disturbed.

Sehwag et al. 2020, arXiv:2002.10509, prune for robustness; here any criterion that looks at a loss can.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from prune_jax.errors import UserMistake, did_you_mean
from prune_jax.statistics import Loss
from prune_jax.trees import PyTree, leaves_by_path, map_by_path, matches

Kind = Literal["fgsm", "pgd", "gaussian"]
KINDS: tuple[Kind, ...] = ("fgsm", "pgd", "gaussian")


@dataclass(frozen=True)
class Perturbed:
    """Batches, each perturbed as it is read, for one loss and one network's weights; read as often as what it holds."""

    batches: Iterable[PyTree]
    disturb: Any  # (batch, number) -> batch

    def __iter__(self) -> Iterator[PyTree]:
        return (self.disturb(batch, i) for i, batch in enumerate(self.batches))


def perturbed(
    batches: Iterable[PyTree],
    kind: Kind,
    epsilon: float,
    *,
    loss: Loss | None = None,
    params: PyTree = None,
    steps: int = 7,
    inputs: str = "x",
    key: jax.Array | None = None,
) -> Perturbed:
    """Batches whose inputs are perturbed: `pj.score("snip", params, loss=loss, batches=perturbed(...))`.

    - `fgsm`: x + epsilon sign(dL/dx) (Goodfellow et al. 2015, arXiv:1412.6572).
    - `pgd`: `steps` such steps of 2.5 epsilon / steps, held within epsilon of x (Madry et al. 2018, arXiv:1706.06083),
      from x itself, where the paper starts at random.
    - `gaussian`: x + epsilon n, n ~ N(0, 1).

    Args:
        batches: pytrees of arrays `[batch, ...]`.
        kind: one of the above.
        epsilon: in units of the inputs, > 0.
        loss: `loss(params, batch) -> scalar`; for `fgsm` and `pgd`.
        params: the weights that are attacked; for `fgsm` and `pgd`.
        steps: of `pgd`.
        inputs: a pattern of the batch's arrays that are perturbed, those of floating numbers.
        key: a PRNG key; for `gaussian`.

    Returns:
        Batches of the same shapes; those that are an iterator can be read but once.

    Raises:
        UserMistake: what the kind needs is missing, or, as a batch is read, nothing in it fits.

    >>> loss = lambda p, batch: jnp.mean(batch["x"] * p)
    >>> list(perturbed([{"x": jnp.ones(2)}], "fgsm", 0.5, loss=loss, params=jnp.array(-1.0)))
    [{'x': Array([0.5, 0.5], dtype=float32)}]
    """
    if kind not in KINDS:
        raise UserMistake(f"perturbation {kind!r} is not known{did_you_mean(kind, KINDS)} (known: {', '.join(KINDS)})")
    if not epsilon > 0:
        raise UserMistake(f"epsilon = {epsilon}: must be above 0, in units of the inputs")
    if kind == "gaussian":
        if key is None:
            raise UserMistake("gaussian perturbation draws random numbers: give key=, such as jax.random.key(0).")
        return Perturbed(batches, lambda batch, i: _noisy(batch, key, i, epsilon, inputs))
    if loss is None:
        raise UserMistake(f"perturbation {kind!r} needs gradients: give loss=, (params, batch) -> scalar, and params=.")
    whole = loss if isinstance(loss, Partial) else Partial(loss)
    taken, size = (1, epsilon) if kind == "fgsm" else (steps, 2.5 * epsilon / steps)
    return Perturbed(batches, lambda batch, i: _attacked(batch, params, whole, epsilon, size, taken, inputs))


def _chosen(batch: PyTree, pattern: str) -> dict[str, jax.Array]:
    leaves = leaves_by_path(batch)
    chosen = {
        path: jnp.asarray(leaf)
        for path, leaf in leaves.items()
        if (matches(path, pattern) or not path) and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    }
    if not chosen:
        raise UserMistake(
            f"no floating array of the batch fits {pattern!r} (arrays: "
            f"{', '.join(f'{p} {jnp.result_type(leaf)}' for p, leaf in leaves.items())}): only those can be perturbed"
        )
    return chosen


def _with(batch: PyTree, chosen: dict[str, jax.Array]) -> PyTree:
    return map_by_path(lambda path, leaf: chosen.get(path, leaf), batch)


@partial(jax.jit, static_argnames=("steps", "pattern"))
def _attacked(
    batch: PyTree, params: PyTree, loss: Partial, epsilon: float, size: float, steps: int, pattern: str
) -> PyTree:
    start = _chosen(batch, pattern)

    def step(_: Any, now: dict[str, jax.Array]) -> dict[str, jax.Array]:
        uphill = jax.grad(lambda chosen: loss(params, _with(batch, chosen)))(now)
        moved = {path: x + (size * jnp.sign(uphill[path])).astype(x.dtype) for path, x in now.items()}
        return {path: jnp.clip(x, start[path] - epsilon, start[path] + epsilon) for path, x in moved.items()}

    return _with(batch, jax.lax.fori_loop(0, steps, step, start))


@partial(jax.jit, static_argnames="pattern")
def _noisy(batch: PyTree, key: jax.Array, number: int, epsilon: float, pattern: str) -> PyTree:
    start = _chosen(batch, pattern)
    keys = jax.random.split(jax.random.fold_in(key, number), len(start))
    drawn = {
        path: x + (epsilon * jax.random.normal(k, x.shape)).astype(x.dtype)
        for k, (path, x) in zip(keys, start.items(), strict=True)
    }
    return _with(batch, drawn)
