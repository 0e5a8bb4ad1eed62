"""Optax wrappers that prune while an optimizer trains, around any optimizer.

A method is one function `(inner, *, ...) -> transformation`, registered by `@method`, whose state has `masks`: bool,
True = alive. It stands outermost in a chain; pruned weights are exactly zero after every step.
"""

from prune_jax.sparse_training.changing import SparseState
from prune_jax.sparse_training.dynamic import rigl, sparse_evolution, static
from prune_jax.sparse_training.entry import METHODS, Method, find, method
from prune_jax.sparse_training.gradual import ac_dc, gradual
from prune_jax.sparse_training.latent import movement, ste, surgery
from prune_jax.sparse_training.masked import MaskedState, masked
from prune_jax.sparse_training.proximal import proximal_l1
from prune_jax.sparse_training.reparametrised import l0, settle, soft_threshold, variational_dropout

__all__ = [
    "METHODS",
    "MaskedState",
    "Method",
    "SparseState",
    "ac_dc",
    "find",
    "gradual",
    "l0",
    "masked",
    "method",
    "movement",
    "proximal_l1",
    "rigl",
    "settle",
    "soft_threshold",
    "sparse_evolution",
    "static",
    "ste",
    "surgery",
    "variational_dropout",
]
