"""Solvers: criteria that also say how the weights that survive make up for those that die."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from prune_jax.blocks import cut, join
from prune_jax.criteria.entry import criterion
from prune_jax.statistics import Statistics
from prune_jax.surgeon import costs, solve
from prune_jax.trees import PyTree


def surgeon(params: PyTree, stats: Statistics, masks: PyTree, *, block: int = 64, dampening: float = 0.01) -> PyTree:
    """The survivors that raise the loss least: min d^T F d / 2 subject to w + d = 0 where pruned, exactly, by blocks.

    d_S = (F_SS + l I)^-1 F_SM w_M, S what lives, M what dies, l the dampening. The paper adds up the updates of single
    removals, which leaves the pruned weights off zero, and cuts them; solved together they need no cut.

    Args:
        params: weights before pruning, leaves of any shape.
        stats: `fisher_blocks`.
        masks: bool, shaped like `params`, True = alive.
        block: as of `woodfisher`.
        dampening: as of `woodfisher`.

    Returns:
        Weights shaped and typed like `params`, zero where masked.
    """

    def of_block(w: jax.Array, alive: jax.Array, F: jax.Array) -> jax.Array:
        F, _ = _normalised(F)
        pull = jnp.where(alive, F @ jnp.where(alive, 0, w), 0)
        return jnp.where(alive, w + _inverse(F, alive, dampening) @ pull, 0)

    def of_leaf(w: jax.Array, alive: jax.Array, F: jax.Array) -> jax.Array:
        return join(_each(of_block, cut(w.astype(jnp.float32), block), cut(alive, block), F), w.shape).astype(w.dtype)

    return jax.tree.map(of_leaf, params, masks, stats.fisher_blocks)


@criterion(
    "woodfisher",
    formula="w^2 / (2 [F^-1]_ii), F = E[g_i g_i^T] + l I in blocks; survivors: w_S + F_SS^-1 F_SM w_M",
    paper="Singh & Alistarh 2020, arXiv:2004.14340; Hassibi & Stork 1993 (NIPS 5)",
    needs=("fisher_blocks",),
    granularities=("weight", "n:m", "block", "kernel"),  # what takes all inputs of an output leaves none to make up
    compensate=surgeon,
)
def woodfisher(params: PyTree, stats: Statistics, *, block: int = 64, dampening: float = 0.01) -> PyTree:
    """The rise of the loss when a weight is removed and the others make up for it: s = w^2 / (2 [F^-1]_ii).

    F is the empirical Fisher matrix of single examples' gradients, block by block; a block is up to `block` inputs of
    one output, where the paper's are consecutive weights. F is summed and inverted once: that holds as many numbers as
    the paper's recursion for F^-1 (Woodbury's), is the same in exact arithmetic, and loses fewer digits in float32.
    A weight that is exactly zero counts as pruned: it scores 0 and makes up for nothing. A unit of several weights
    scores the sum, as if each were removed alone.

    Args:
        params: weights, leaves of any shape.
        stats: `fisher_blocks`; weights x block x 4 bytes in all, and as much again of the gradients of a few examples.
        block: so many weights are in a block at most.
        dampening: added to the diagonal of F, as a share of the largest entry there in each block. The paper adds 1e-5
            whatever the loss; a share leaves the ranks as they are when the loss is scaled, and F can be inverted.

    Returns:
        Scores shaped like `params`, float32, >= 0, in units of the loss (of its square, where it is no log-likelihood).
    """

    def of_block(w: jax.Array, F: jax.Array) -> jax.Array:
        F, largest = _normalised(F)
        return 0.5 * largest * jnp.square(w) / jnp.diag(_inverse(F, w != 0, dampening))

    def of_leaf(w: jax.Array, F: jax.Array) -> jax.Array:
        return join(_each(of_block, cut(w.astype(jnp.float32), block), F), w.shape)

    return jax.tree.map(of_leaf, params, stats.fisher_blocks)


def swept(
    w: jax.Array,
    products: tuple[jax.Array, ...],
    *,
    block: int = 128,
    dampening: float = 0.01,
    inputs: int = 4096,
    **choice: Any,
) -> tuple[jax.Array, jax.Array]:
    """One layer's mask and weights, by `surgeon.solve`, whose `choice` it is; blocks begin where groups of m do."""
    del inputs  # in so large pieces the products come
    m = choice["n_m"][1] if choice.get("n_m") else 1
    return solve(w, products, block=max(block - block % m, m), dampening=dampening, **choice)


@criterion(
    "sparsegpt",
    formula="w_i^2 / (2 [H^-1]_ii), H = X^T X + l I of a layer; masks are chosen input by input, w_F -= w_i u_i / u_ii",
    paper="Frantar & Alistarh 2023, arXiv:2301.00774",
    needs=("input_products",),
    granularities=("weight", "n:m"),
    sweep=swept,
)
def sparsegpt(
    params: PyTree, stats: Statistics, *, block: int = 128, dampening: float = 0.01, inputs: int = 4096
) -> PyTree:
    """What a layer's outputs lose with a weight when the others make up for it: s = w_i^2 / (2 [H^-1]_ii).

    These scores say how many weights each layer loses, where layers compete. Which ones, and what the others become, is
    found layer by layer by `surgeon.solve`, each from what it sees once those before it are pruned, and each layer's
    masks input by input: the cost of a weight depends on what has died before it.

    Args:
        params: kernels `[groups, in, out]`, see `layers.Layer`.
        stats: `input_products`, of each kernel X^T X `[groups, size, size]` of consecutive pieces of the inputs.
        block: inputs whose masks are chosen together; 128 in the paper.
        dampening: added to the diagonal of H, as a share of its mean; 0.01 in the paper.
        inputs: X^T X is held of so many inputs at most, in 4 x inputs^2 bytes; those of wider layers are cut into
            pieces that make up for one another no more. One layer's is held at a time, its inverse beside it.

    Returns:
        Scores shaped like `params`, float32, >= 0, in squared units of the layer's outputs.
    """
    del block, inputs  # options of the sweep, and of what `stats` holds
    products = stats.input_products or {}
    return {path: costs(w, products[path], dampening=dampening) for path, w in params.items()}


def _each(of_block: Callable[..., jax.Array], *blocks: jax.Array) -> jax.Array:
    """Of every block, those of one output at a time, so that no more matrices are held beside F."""
    return jax.lax.map(lambda given: jax.vmap(of_block)(*given), blocks)


def _normalised(F: jax.Array) -> tuple[jax.Array, jax.Array]:
    """F over the largest entry of its diagonal, and that; zeros stay."""
    largest = jnp.max(jnp.diag(F))
    return F / jnp.where(largest > 0, largest, 1), largest


def _inverse(F: jax.Array, alive: jax.Array, dampening: float) -> jax.Array:
    """(F + l I)^-1 of what lives, by Gauss-Jordan sweeps; what does not stands apart, with ones.

    F + l I is positive definite, so that no pivot is small. Not by `jnp.linalg`: on CPU jaxlib 0.10 spreads a batch of
    factorisations over the threads that run it, and as many batches at once as there are threads, as of two stages on
    two cores, wait for one another for ever.
    """
    whole = jnp.where(jnp.outer(alive, alive), F, 0) + jnp.diag(jnp.where(alive, dampening, 1.0))

    def sweep(k: jax.Array, A: jax.Array) -> jax.Array:
        unit = jnp.arange(len(A)) == k
        row = jnp.where(unit, 1, A[k]) / A[k, k]
        column = jnp.where(unit, 0, A[:, k])
        return jnp.where(unit[:, None], row, jnp.where(unit, 0, A) - jnp.outer(column, row))

    return jax.lax.fori_loop(0, len(F), sweep, whole)
