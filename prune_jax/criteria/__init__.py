"""Criteria: what makes a score. Each is a pure function of weights and statistics, with the facts about it."""

from prune_jax.criteria import activations, curvature, data_free, gradients, solvers, units
from prune_jax.criteria.entry import CRITERIA, Criterion, criterion, find

__all__ = [
    "CRITERIA",
    "Criterion",
    "activations",
    "criterion",
    "curvature",
    "data_free",
    "find",
    "gradients",
    "solvers",
    "units",
]
