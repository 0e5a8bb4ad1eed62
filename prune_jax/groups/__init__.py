"""Dependency analysis: which indices of which parameters live and die together, read off a function's jaxpr."""

from prune_jax.groups.choice import check_target, checked_scores, lowest, of_kinds, ranked, unit_scores, within
from prune_jax.groups.drawing import dot, table
from prune_jax.groups.function import Function, mirrors
from prune_jax.groups.layers import LAYER, gone_in, layers
from prune_jax.groups.trace import Analysis, Group, analyse, rewrite

__all__ = [
    "LAYER",
    "Analysis",
    "Function",
    "Group",
    "analyse",
    "check_target",
    "checked_scores",
    "dot",
    "gone_in",
    "layers",
    "lowest",
    "mirrors",
    "of_kinds",
    "ranked",
    "rewrite",
    "table",
    "unit_scores",
    "within",
]
