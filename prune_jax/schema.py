"""The JSON schema of recipes, with the names that the registries know, so that editors complete them."""

from __future__ import annotations

from typing import Any

from prune_jax.criteria import CRITERIA
from prune_jax.datasets import SOURCES
from prune_jax.recipe import Recipe


def recipe_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a recipe."""
    schema = Recipe.model_json_schema()
    parts = schema["$defs"]
    names = {"anyOf": [{"enum": list(CRITERIA)}, {"type": "string", "pattern": r"^[\w.]+:[\w.]+$"}]}
    bare, whole = parts["Criterion"]["anyOf"]
    bare |= names
    whole["properties"]["name"] |= names
    source = parts["Data"]["properties"]["source"]
    source["anyOf"] = [{"enum": list(SOURCES)}, {"type": "string", "pattern": r"^[\w.]+:[\w.]+$"}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
