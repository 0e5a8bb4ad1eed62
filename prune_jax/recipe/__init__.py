"""What is wanted: frozen models of recipes, read once, at the edge."""

from prune_jax.recipe.calls import Problem, Ref, StageCall, StageResult, digest
from prune_jax.recipe.parts import BUILT_IN_MODELS, Data, Frozen, Optimizer, Recovery, RewindStep, Target
from prune_jax.recipe.read import built_in, check_run_name, read_recipe, validate, with_value
from prune_jax.recipe.recipe import Evaluate, Finetune, Mask, Prune, Recipe, Score, Stage, Train
from prune_jax.recipe.wiring import NETWORKS, parents_of

__all__ = [
    "BUILT_IN_MODELS",
    "NETWORKS",
    "Data",
    "Evaluate",
    "Finetune",
    "Frozen",
    "Mask",
    "Optimizer",
    "Problem",
    "Prune",
    "Recipe",
    "Recovery",
    "Ref",
    "RewindStep",
    "Score",
    "Stage",
    "StageCall",
    "StageResult",
    "Target",
    "Train",
    "built_in",
    "check_run_name",
    "digest",
    "parents_of",
    "read_recipe",
    "validate",
    "with_value",
]
