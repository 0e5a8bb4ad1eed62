"""Data and networks of a problem, read and built once in a process."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from prune_jax.criteria import find as find_criterion
from prune_jax.datasets import Dataset, GrainSplit, Split, load
from prune_jax.errors import UserMistake
from prune_jax.recipe import Data, Problem, Prune, Recipe, Score
from prune_jax.recipe.sparsify import Gradual
from prune_jax.registry import load_module, plugin_module
from prune_jax.sparse_training import find as find_method
from prune_jax.weights import weights_digest

if TYPE_CHECKING:
    from prune_jax.models import Network


def dataset_of(problem: Problem) -> Dataset:
    """The data of a problem, and no other than those that its key names.

    Raises:
        UserMistake: the source answers other data than when the plan was made.
    """
    data = data_of(problem.data, problem.fold)
    if data.digest != problem.data_digest:
        raise UserMistake(
            f"data.source = {problem.data.source!r}: the data changed while the recipe was running "
            f"(digest {problem.data_digest[:12]} became {data.digest[:12]}). Run the recipe again."
        )
    return data


def data_of(data: Data, fold: tuple[int, int] | None = None) -> Dataset:
    """What a recipe's `data` names."""
    args = json.dumps(data.args, sort_keys=True)
    stamp = os.stat(data.path).st_mtime_ns if data.path and os.path.exists(data.path) else 0
    code = _code_digest(data.source) if ":" in data.source else ""
    return _load(data.source, data.path, args, data.validation, fold, (stamp, code))


@functools.lru_cache(maxsize=4)
def _load(
    source: str, path: str | None, args: str, validation: float, fold: tuple[int, int] | None, stamp: tuple[int, str]
) -> Dataset:
    return load(source, path=path, args=json.loads(args), validation=validation, fold=fold)


def sample_of(data: Dataset) -> dict[str, np.ndarray]:
    """A batch of one example."""
    split = data.train
    record = split.dataset[0] if isinstance(split, GrainSplit) else {name: array[0] for name, array in split.items()}
    return {name: np.asarray(value)[None] for name, value in record.items()}


def examples_of(split: Split) -> int:
    """The number of examples of a split."""
    return len(split) if isinstance(split, GrainSplit) else len(split["x"])


def records_at(split: Split, rows: range) -> dict[str, np.ndarray]:
    """The examples of a split at these places, stacked."""
    if isinstance(split, GrainSplit):
        records = [split.dataset[row] for row in rows]
        return {name: np.stack([record[name] for record in records]) for name in records[0]}
    return {name: array[rows.start : rows.stop] for name, array in split.items()}


def network_of(problem: Problem) -> Network:
    """The network of a problem; the same object for the same model and data, so that its functions compile once."""
    sample = sample_of(dataset_of(problem))
    shapes = tuple((array.shape, array.dtype.name) for name, array in sample.items() if name != "y")
    model = problem.model.model_dump(mode="json")
    return _build(json.dumps(model, sort_keys=True), shapes, outputs_of(problem), json.dumps(problem.code))


def outputs_of(problem: Problem) -> int:
    """How many numbers the network answers for one example."""
    data = dataset_of(problem)
    sample = sample_of(data)
    if problem.objective == "reconstruction":
        return math.prod(sample["x"].shape[1:])
    if data.classes is not None and problem.objective != "regression":
        return data.classes
    return math.prod(sample["y"].shape[1:])


@functools.lru_cache(maxsize=16)
def _build(model: str, shapes: tuple[tuple[tuple[int, ...], str], ...], outputs: int, code: str) -> Network:
    import jax

    from prune_jax.models import build

    settings: dict[str, Any] = json.loads(model)
    kind = settings.pop("kind")
    args = settings["args"] if "args" in settings else settings
    inputs = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes)
    return build(kind, args, inputs=inputs, outputs=outputs)


def code_of(recipe: Recipe) -> dict[str, str]:
    """The digests of the files of others' code that the recipe names: edited code is another recipe.

    Of each `module:object`, and of all that is registered by name and not ours; and of the files of weights.
    """
    stages = recipe.stages.values()
    criteria = [stage.criterion.name for stage in stages if isinstance(stage, Score | Prune)]
    methods = [method for stage in stages if (method := getattr(stage, "sparsify", None))]
    criteria += [method.criterion for method in methods if isinstance(method, Gradual)]
    kinds = [method.kind for method in methods]
    references = [recipe.data.source, recipe.model.kind, recipe.objective, *criteria, *kinds]
    found = {reference: _code_digest(reference) for reference in references if ":" in reference}
    plugged = [(find_criterion, name) for name in criteria] + [(find_method, name) for name in kinds]
    named = {name: _plugin_digest(find, name) for find, name in plugged if ":" not in name}
    parts = {"datasets": recipe.data.source, "models": recipe.model.kind, "objectives": recipe.objective}
    for group, name in parts.items():
        if module := plugin_module(f"prune_jax.{group}", name):
            named[name] = _code_digest(f"{module}:{name}")
    files = {path: weights_digest(path) for stage in stages if (path := getattr(stage, "weights", None))}
    return found | {name: told for name, told in named.items() if told} | files


def _code_digest(reference: str) -> str:
    try:
        return _file_digest(load_module(reference))
    except Exception:
        return ""  # what uses it will say so, with its place in the recipe


def _plugin_digest(find: Callable[[str], Any], name: str) -> str:
    """Nothing of what is ours: that the version of the stage tells."""
    try:
        module = find(name).function.__module__
        return "" if module.partition(".")[0] == "prune_jax" else _file_digest(sys.modules[module])
    except Exception:
        return ""  # as above


def _file_digest(module: ModuleType) -> str:
    """Of the module's file as it was when it was first asked for: an edit counts when the module is loaded anew."""
    facts = vars(module.__spec__ or module)  # each import and each reload makes a spec of its own
    if "_prune_jax_digest" not in facts:
        file = getattr(module, "__file__", None)
        facts["_prune_jax_digest"] = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:20] if file else ""
    return facts["_prune_jax_digest"]
