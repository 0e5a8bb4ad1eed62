"""Data that do not fit in memory: Grain datasets of records `{"x", "y"}`, read at random access."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prune_jax.datasets.arrays import count_classes, digest, normal_form
from prune_jax.datasets.splits import check_split
from prune_jax.errors import UserMistake, did_you_mean

EXTRA = "Grain is not installed: pip install 'prune-jax[grain]'"
_NAMES = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class GrainSplit:
    """A split that is read record by record.

    Attributes:
        dataset: a `grain.MapDataset` of records `{"x", ["lengths"], "y"}` in the dtypes of the arrays' normal form.
    """

    dataset: Any

    def __len__(self) -> int:
        """Number of records."""
        return len(self.dataset)

    def batches(self, batch_size: int, *, seed: int | None = None, start: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Stacked batches; the k-th is the same from any `start`.

        Args:
            batch_size: records in a batch.
            seed: without end, shuffled anew in every epoch, full batches only; `None`: once, in order, to the last one.
            start: leave out so many batches.
        """
        import grain

        records = self.dataset if seed is None else self.dataset.shuffle(seed=seed % 2**32)
        stacked = records.batch(batch_size, drop_remainder=seed is not None)
        stream = stacked if seed is None else stacked.repeat()
        # The buffer counts batches.
        return iter(stream[start:].to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)))


@dataclass(frozen=True)
class _OtherFolds:
    """All records but every `folds`-th, from `index` on."""

    records: Any
    index: int
    folds: int

    def __len__(self) -> int:
        return len(self.records) - len(range(self.index, len(self.records), self.folds))

    def __getitem__(self, position: int) -> Any:
        block, place = divmod(position, self.folds - 1)
        return self.records[block * self.folds + place + (place >= self.index)]


def grain_splits(
    found: Mapping[str, Any], *, validation: float, fold: tuple[int, int] | None, where: str
) -> dict[str, GrainSplit | None]:
    """Train, validation and test of what a user's function answered.

    Where the function gives no validation split, or a fold is asked for, it is taken from a fixed shuffle of train:
    not stratified, since that would mean reading all labels.
    """
    try:
        import grain
    except ModuleNotFoundError as error:
        raise UserMistake(f"{where}: answers Grain datasets. {EXTRA}") from error
    _check(found, grain.MapDataset, where)
    check_split(len(found["train"]), validation, fold, where)
    splits = {}
    for name in (name for name in _NAMES if found.get(name) is not None):
        check = partial(_checked, f"{where}: record", name, len(found[name]), found.get("classes"))
        splits[name] = found[name].map_with_index(check)
    train = splits["train"]
    if fold is not None:
        mixed = train.shuffle(seed=0)
        index, folds = fold
        splits |= {
            "train": grain.MapDataset.source(_OtherFolds(mixed, index, folds)),
            "validation": mixed[index::folds],
        }
    elif "validation" not in splits and validation:
        mixed = train.shuffle(seed=0)
        count = min(max(round(validation * len(train)), 1), len(train) - 1)
        splits |= {"train": mixed[count:], "validation": mixed[:count]}
    return {name: GrainSplit(splits[name]) if name in splits else None for name in _NAMES}


def probe(found: Mapping[str, Any], where: str) -> dict[str, np.ndarray]:
    """First and last records of train and test as arrays in normal form: what can be checked without reading all."""
    arrays: dict[str, Any] = {}
    for split in ("train", "test"):
        records = [found[split][0], found[split][len(found[split]) - 1]]
        for name in ("x", "y", "lengths"):
            values = [record[name] for record in records if name in record]
            if values:
                arrays[f"{'len' if name == 'lengths' else name}_{split}"] = np.stack([np.asarray(v) for v in values])
    return normal_form(arrays, where)


def records_digest(function: Callable[..., Any], found: Mapping[str, Any], args: str, where: str) -> str:
    """The sha256 of the function's source file, its arguments, the number of records and the first and last of them.

    Records in between are not read: data changed there under the same code go unnoticed.
    """
    file = inspect.getsourcefile(function)
    code = Path(file).read_bytes() if file else b""
    sizes = [len(found[name]) for name in _NAMES if found.get(name) is not None]
    parts = [hashlib.sha256(code).hexdigest(), args, str(sizes), digest(probe(found, where), found.get("classes"))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def classes_of(found: Mapping[str, Any], where: str) -> int | None:
    """How many classes the function states; needed where `y` is integers."""
    arrays = probe(found, where)
    given = found.get("classes")
    if arrays["y_train"].dtype == np.int32 and given is None:
        raise UserMistake(f"{where}: y holds labels, but not all are read; answer their number under 'classes' too")
    return count_classes(arrays, given, where)


def _check(found: Mapping[str, Any], kind: Any, where: str) -> None:
    allowed = (*_NAMES, "classes", "note")
    for name in found:
        if name not in allowed:
            near = did_you_mean(name, allowed)
            raise UserMistake(f"{where}: {name!r} is not known{near} (allowed: {', '.join(allowed)})")
    for name in _NAMES:
        dataset = found.get(name)
        if dataset is None and name == "validation":
            continue
        if not isinstance(dataset, kind):
            raise UserMistake(
                f"{where}: {name!r} is of type {type(dataset).__name__}, but must be a grain.MapDataset: "
                "training goes on from any step, which takes random access"
            )
        if not 0 < len(dataset) < sys.maxsize:
            size = "is empty" if len(dataset) == 0 else "repeats without end; leave out repeat()"
            raise UserMistake(f"{where}: {name!r} {size}")
        ends = {position: dataset[position] for position in (0, len(dataset) - 1)}
        for position, record in ends.items():
            if not isinstance(record, Mapping) or not {"x", "y"} <= set(record) <= {"x", "y", "lengths"}:
                shown = ", ".join(map(str, record)) if isinstance(record, Mapping) else type(record).__name__
                raise UserMistake(
                    f"{where}: record {position} of {name!r} is {shown}; a record is a dict of x, y and perhaps lengths"
                )
        shapes = [{part: list(np.shape(value)) for part, value in record.items()} for record in ends.values()]
        if shapes[0] != shapes[-1]:
            raise UserMistake(
                f"{where}: the first record of {name!r} is shaped {shapes[0]}, the last {shapes[-1]}; "
                "all must be alike, sequences padded and with their lengths"
            )


def _checked(where: str, split: str, size: int, classes: int | None, index: int, record: Mapping[str, Any]) -> Any:
    """A record in normal form; its numbers are looked at as it is read, since nobody reads all of them before."""
    for part, value in ((part, np.asarray(value)) for part, value in record.items()):
        if value.dtype.kind == "f":
            with np.errstate(over="ignore"):
                bad, why = ~np.isfinite(value.astype(np.float32)), "is not finite in float32"
        elif part == "y" and classes is not None:
            bad, why = (value < 0) | (value >= classes), f"but classes is {classes}, and labels start at 0"
        else:
            bad, why = (value < 0) | (value > np.iinfo(np.int32).max), "but integers in x are tokens, 0 to 2**31 - 1"
        if bad.any():
            place = tuple(int(i) for i in np.argwhere(bad)[0])
            shown = f"{part}[{', '.join(map(str, place))}]" if place else part
            told = f"{where} {index % size} of {split!r}: {shown} = {value[place]}, {why}"
            raise UserMistake(f"{told}. Leave the record out, or mend it")
    return _record(record)


def _record(record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """One record in the dtypes of the arrays' normal form, in the order in which models take them."""
    ordered = {name: np.asarray(record[name]) for name in ("x", "lengths", "y") if name in record}
    cast = {n: v.astype(np.float32 if v.dtype.kind == "f" else np.int32, copy=False) for n, v in ordered.items()}
    y = cast["y"]
    return cast | {"y": y.reshape(1) if y.ndim == 0 and y.dtype == np.float32 else y}
