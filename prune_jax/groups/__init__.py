"""Dependency analysis: which indices of which parameters live and die together, read off a function's jaxpr."""

from prune_jax.groups.choice import lowest, ranked, unit_scores
from prune_jax.groups.drawing import dot
from prune_jax.groups.trace import Analysis, Group, analyse, mirrors, rewrite

__all__ = ["Analysis", "Group", "analyse", "dot", "lowest", "mirrors", "ranked", "rewrite", "unit_scores"]
