"""Optax wrappers that prune while an optimizer trains, around any optimizer.

A method is one function `(inner, *, ...) -> transformation`, registered by `@method`, whose state has `masks`: bool,
True = alive. It stands outermost in a chain; pruned weights are exactly zero after every step.
"""

from prune_jax.sparse_training.changing import SparseState
from prune_jax.sparse_training.dynamic import rigl, sparse_evolution, static
from prune_jax.sparse_training.entry import METHODS, Method, method
from prune_jax.sparse_training.gradual import gradual
from prune_jax.sparse_training.masked import MaskedState, masked

__all__ = [
    "METHODS",
    "MaskedState",
    "Method",
    "SparseState",
    "gradual",
    "masked",
    "method",
    "rigl",
    "sparse_evolution",
    "static",
]
