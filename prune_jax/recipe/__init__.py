"""What is wanted: frozen models of recipes, read once, at the edge."""

from prune_jax.recipe.calls import Problem, Ref, StageCall, StageResult, Status, digest
from prune_jax.recipe.model import BUILT_IN_MODELS
from prune_jax.recipe.parts import (
    Data,
    Frozen,
    Guard,
    Iterative,
    Operation,
    Optimizer,
    Recovery,
    RewindStep,
    Search,
    Target,
)
from prune_jax.recipe.read import built_in, check_run_name, read_recipe, validate, with_value
from prune_jax.recipe.recipe import EXPORTS, Evaluate, Finetune, Mask, Prune, Recipe, Score, Stage, Train, untargeted
from prune_jax.recipe.sparsify import BUILT_IN_METHODS, CustomMethod, Sparsify
from prune_jax.recipe.wiring import NETWORKS, parents_of

__all__ = [
    "BUILT_IN_METHODS",
    "BUILT_IN_MODELS",
    "EXPORTS",
    "NETWORKS",
    "CustomMethod",
    "Data",
    "Evaluate",
    "Finetune",
    "Frozen",
    "Guard",
    "Iterative",
    "Mask",
    "Operation",
    "Optimizer",
    "Problem",
    "Prune",
    "Recipe",
    "Recovery",
    "Ref",
    "RewindStep",
    "Score",
    "Search",
    "Sparsify",
    "Stage",
    "StageCall",
    "StageResult",
    "Status",
    "Target",
    "Train",
    "built_in",
    "check_run_name",
    "digest",
    "parents_of",
    "read_recipe",
    "untargeted",
    "validate",
    "with_value",
]
