"""Data by name, from a file, or from a function of the user's: checked, split, and named by their digest.

Nothing here touches the network, and nothing depends on the recipe's seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from prune_jax.arguments import check_arguments
from prune_jax.datasets import bundled, records, synthetic
from prune_jax.datasets.arrays import count_classes, digest, normal_form
from prune_jax.datasets.files import npz
from prune_jax.datasets.records import GrainSplit
from prune_jax.datasets.splits import check_split, fold_of, hold_out
from prune_jax.errors import UserMistake
from prune_jax.registry import Registry, load_object

__all__ = ["SOURCES", "Dataset", "GrainSplit", "Split", "check_labels", "load"]

Split = Mapping[str, np.ndarray] | GrainSplit

SOURCES: Registry[Callable[..., Mapping[str, Any]]] = Registry("data source", "prune_jax.datasets")
for _source in (
    bundled.mnist5k,
    bundled.japanese_vowels,
    bundled.digits,
    bundled.breast_cancer,
    bundled.diabetes,
    bundled.pydoc,
    synthetic.line,
    synthetic.xor,
    npz,
):
    SOURCES.add(_source.__name__, _source)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Data, split.

    Attributes:
        train: arrays `x` [samples, ...], `y` and perhaps `lengths`, or a `GrainSplit` of such records.
        validation: taken from train, or `None`.
        test: what nobody looks at before the end.
        digest: of all of it, before validation is taken from train.
        classes: how many labels there are, `None` where `y` holds numbers.
        note: origin and terms.
    """

    train: Split
    validation: Split | None
    test: Split
    digest: str
    classes: int | None
    note: str


def load(
    source: str,
    *,
    path: str | None = None,
    args: Mapping[str, Any] | None = None,
    validation: float = 0.1,
    fold: tuple[int, int] | None = None,
) -> Dataset:
    """Reads data and checks them.

    A user's function answers arrays `x_train`, `y_train`, `x_test`, `y_test` (and `len_train`, `len_test` for padded
    sequences), or Grain datasets `train`, `test` and perhaps `validation` of records `{"x", "y"}`; and perhaps
    `classes` and `note`.

    Args:
        source: a registered name, or `"module:function"`.
        path: for `npz`, the file.
        args: what the source is called with.
        validation: fraction of train to hold out, stratified by label; 0 for none.
        fold: (i, k): hold out the i-th of k folds of train instead.

    Raises:
        UserMistake: naming source, array, first bad position and mend.
    """
    function = load_object(source) if ":" in source else SOURCES[source]
    where = f"data {source!r}" + (f" at {path}" if path is not None else "")
    settings = dict(args or {}) | ({} if path is None else {"path": path})
    found = _call(function, settings, where)
    if "train" not in found:
        arrays = normal_form(found, where)
        classes = count_classes(arrays, found.get("classes"), where)
        check_split(len(arrays["y_train"]), validation, fold, where)
        y = arrays["y_train"]
        kept, held_out = hold_out(y, validation) if fold is None else fold_of(y, fold)
        return Dataset(
            train=_rows(arrays, "train", kept),
            validation=_rows(arrays, "train", held_out) if len(held_out) else None,
            test=_rows(arrays, "test", slice(None)),
            digest=digest(arrays, classes),
            classes=classes,
            note=found.get("note", source),
        )
    splits = records.grain_splits(found, validation=validation, fold=fold, where=where)
    return Dataset(
        **splits,  # type: ignore[arg-type]
        digest=records.records_digest(function, found, json.dumps(settings, sort_keys=True, default=str), where),
        classes=records.classes_of(found, where),
        note=found.get("note", source),
    )


def check_labels(dataset: Dataset, source: str) -> None:
    """Refuses data without labels, for objectives that need them."""
    if dataset.classes is None:
        raise UserMistake(
            f"data {source!r}: classification needs integer labels, but y holds floats; "
            "save y as int32 class numbers from 0, or choose `objective: regression`"
        )


def _call(function: Callable[..., Any], settings: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    if not callable(function):
        raise UserMistake(f"{where}: is of type {type(function).__name__}, not a function that answers data")
    try:
        check_arguments(function, settings)
        found = function(**settings)
    except UserMistake as mistake:
        raise UserMistake(f"{where}: {mistake}") from mistake.__cause__
    except ModuleNotFoundError as error:
        if error.name != "grain":
            raise
        raise UserMistake(f"{where}: {records.EXTRA}") from error
    if not isinstance(found, Mapping):
        raise UserMistake(
            f"{where}: answers a value of type {type(found).__name__}; it must answer a dict of arrays, "
            "or of Grain datasets"
        )
    return found


def _rows(arrays: Mapping[str, np.ndarray], split: str, rows: Any) -> dict[str, np.ndarray]:
    names = {"x": f"x_{split}", "lengths": f"len_{split}", "y": f"y_{split}"}
    return {part: arrays[name][rows] for part, name in names.items() if name in arrays}
