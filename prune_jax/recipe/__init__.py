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
    Rewind,
    Search,
    Target,
    Teaching,
)
from prune_jax.recipe.read import built_in, check_run_name, read_recipe, validate, with_value
from prune_jax.recipe.recipe import (
    EXPORTS,
    Distill,
    Evaluate,
    Finetune,
    Mask,
    Prune,
    Recipe,
    Score,
    Stage,
    Train,
    untargeted,
)
from prune_jax.recipe.sparsify import Sparsify
from prune_jax.recipe.wiring import NETWORKS, TUNED, parents_of

__all__ = [
    "BUILT_IN_MODELS",
    "EXPORTS",
    "NETWORKS",
    "TUNED",
    "Data",
    "Distill",
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
    "Rewind",
    "Score",
    "Search",
    "Sparsify",
    "Stage",
    "StageCall",
    "StageResult",
    "Status",
    "Target",
    "Teaching",
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
