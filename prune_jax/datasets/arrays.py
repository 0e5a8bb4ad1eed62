"""Arrays as everything else expects them: checked, in float32 or int32, and named by what they hold."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from prune_jax.errors import UserMistake, did_you_mean, shortened

NAMES = ("x_train", "y_train", "len_train", "x_test", "y_test", "len_test")
EXTRAS = ("classes", "note")
_TOKEN_BITS = (16, 32, 64)


def normal_form(found: Mapping[str, Any], where: str) -> dict[str, np.ndarray]:
    """Checks a source's arrays and brings them into one form.

    `x` [samples, ...] is float32, or int32 for tokens. `y` is int32 [samples] for labels, and float32
    [samples, width] for numbers; a float `y` [samples] gets a width of 1. Lengths are int32 [samples].

    Args:
        found: arrays by name: `x_train`, `y_train`, `x_test`, `y_test`, and perhaps `len_train` and `len_test`.
        where: what to call the source in messages.

    Raises:
        UserMistake: naming the array, the first bad position and the mend.
    """
    _check_names(found, where)
    arrays = {name: _array(found[name], name, where) for name in NAMES if name in found}
    for split in ("train", "test"):
        x, y = (f"{part}_{split}" for part in ("x", "y"))
        arrays[x], arrays[y] = _x(arrays[x], x, where), _y(arrays[y], y, where)
        for name in (y, f"len_{split}"):
            if name in arrays and len(arrays[name]) != len(arrays[x]):
                raise UserMistake(
                    f"{where}: {x!r} holds {len(arrays[x])} samples but {name!r} {len(arrays[name])}; "
                    "each sample needs its own"
                )
        if f"len_{split}" in arrays:
            arrays[f"len_{split}"] = _lengths(arrays[f"len_{split}"], arrays[x], f"len_{split}", where)
    for part in ("x", "y"):
        train, test = arrays[f"{part}_train"], arrays[f"{part}_test"]
        if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
            raise UserMistake(
                f"{where}: '{part}_train' is {train.dtype} {list(train.shape)} but '{part}_test' is "
                f"{test.dtype} {list(test.shape)}; they may differ in the number of samples only"
            )
    return arrays


def count_classes(arrays: Mapping[str, np.ndarray], given: int | None, where: str) -> int | None:
    """How many classes the labels name, `None` where `y` holds numbers.

    Labels are 0 to classes - 1. Unless the source says how many classes there are, each must have a training example.

    Args:
        arrays: in normal form.
        given: number of classes that the source states, if it does.
        where: what to call the source in messages.
    """
    train, test = arrays["y_train"], arrays["y_test"]
    if train.dtype != np.int32:
        if given is not None:
            raise UserMistake(f"{where}: states {given} classes, but y holds floats; labels are integers")
        return None
    if given is not None and (not isinstance(given, int) or given < 1):
        raise UserMistake(f"{where}: classes = {given!r}: must be a positive integer")
    mend = "Number the classes from 0, or make y floats if these are numbers to predict"
    present = np.unique(train)
    for name, labels in (("y_train", train), ("y_test", test)):
        if labels.min() < 0:
            raise UserMistake(f"{where}: {_first(labels < 0, labels, name)}, but labels start at 0. {mend}")
    classes = len(present) if given is None else given
    if given is None and present[-1] != classes - 1:
        missing = int(np.argmax(present != np.arange(classes)))
        raise UserMistake(
            f"{where}: no label in 'y_train' is {missing}, though they go from {present[0]} to {present[-1]}. {mend}"
        )
    for name, labels in (("y_train", train), ("y_test", test)):
        if labels.max() >= classes:
            known = f"the labels of 'y_train' go from 0 to {classes - 1}" if given is None else f"classes is {classes}"
            raise UserMistake(f"{where}: {_first(labels >= classes, labels, name)}, but {known}")
    return classes


def digest(arrays: Mapping[str, np.ndarray], classes: int | None) -> str:
    """The sha256 of names, dtypes, shapes and bytes, in the order of `NAMES`, and of the number of classes.

    >>> digest({"x_train": np.zeros((1, 1), np.float32)}, None)[:12]
    'be1c6cfe05a6'
    """
    total = hashlib.sha256(f"classes={classes}\n".encode())
    for name in NAMES:
        if name in arrays:
            array = np.ascontiguousarray(arrays[name])
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            total.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
            total.update(little.data)
    return total.hexdigest()


def _check_names(found: Mapping[str, Any], where: str) -> None:
    allowed = (*NAMES, *EXTRAS)
    lengths = ("len_train", "len_test")
    wanted = [name for name in NAMES if name not in lengths or any(n in found for n in lengths)]
    for name in wanted:
        if name not in found:
            strangers = [n for n in found if n not in allowed]
            raise UserMistake(
                f"{where}: array {name!r} is missing{did_you_mean(name, strangers)} "
                f"(found: {shortened(', '.join(n for n in found if n not in EXTRAS)) or 'none'}; "
                f"needed: {', '.join(wanted)})"
            )
    for name in found:
        if name not in allowed:
            raise UserMistake(
                f"{where}: array {shortened(name, 60)!r} is not known{did_you_mean(name, NAMES)} "
                f"(allowed: {', '.join(NAMES)})"
            )


def _array(value: Any, name: str, where: str) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise UserMistake(
            f"{where}: array {name!r} is of dtype {array.dtype}; only floats and integers are read "
            "(rows of unequal length must be padded, with their lengths in len_train and len_test)"
        )
    if array.ndim == 0:
        raise UserMistake(f"{where}: array {name!r} is one number, but must be [samples, ...]")
    if array.size == 0:
        raise UserMistake(f"{where}: array {name!r} is empty, {list(array.shape)}")
    return array


def _x(array: np.ndarray, name: str, where: str) -> np.ndarray:
    if array.ndim < 2:
        raise UserMistake(
            f"{where}: array {name!r} is {list(array.shape)}, but must be [samples, ...]; "
            "for one number a sample, reshape it to [samples, 1]"
        )
    if array.dtype.kind == "f":
        return _floats(array, name, where)
    if array.dtype.itemsize * 8 not in _TOKEN_BITS:
        raise UserMistake(
            f"{where}: array {name!r} is {array.dtype}, which may be pixels or tokens; "
            "save pixels as float32 (divided by 255), tokens as int32"
        )
    if array.min() < 0:
        raise UserMistake(f"{where}: {_first(array < 0, array, name)}, but integers in x are tokens, which start at 0")
    return _integers(array, name, where)


def _y(array: np.ndarray, name: str, where: str) -> np.ndarray:
    if array.dtype.kind == "f":
        return _floats(array.reshape(-1, 1) if array.ndim == 1 else array, name, where)
    if array.ndim != 1:
        raise UserMistake(
            f"{where}: array {name!r} holds integers {list(array.shape)}, but labels are [samples]; "
            "of one-hot rows take the argmax, of [samples, 1] the column; numbers to predict are floats"
        )
    return _integers(array, name, where)


def _lengths(array: np.ndarray, x: np.ndarray, name: str, where: str) -> np.ndarray:
    steps = x.shape[1]
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise UserMistake(
            f"{where}: array {name!r} is {array.dtype} {list(array.shape)}, but must be integers [samples]"
        )
    bad = (array < 1) | (array > steps)
    if bad.any():
        raise UserMistake(f"{where}: {_first(bad, array, name)}, but lengths are 1 to {steps}, the steps of x")
    return array.astype(np.int32)


def _floats(array: np.ndarray, name: str, where: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # told below, with its place
        cast = array.astype(np.float32, copy=False)
    bad = ~np.isfinite(cast)
    if bad.any():
        raise UserMistake(
            f"{where}: {int(bad.sum())} of {bad.size} values in {name!r} are not finite in float32, the first: "
            f"{_first(bad, array, name)}. Remove these samples, or fill the values in"
        )
    return cast


def _integers(array: np.ndarray, name: str, where: str) -> np.ndarray:
    bad = array > np.iinfo(np.int32).max if array.dtype.itemsize >= 4 else np.zeros(1, bool)
    if bad.any():
        raise UserMistake(f"{where}: {_first(bad, array, name)}, which does not fit int32; number them from 0")
    return array.astype(np.int32, copy=False)


def _first(bad: np.ndarray, array: np.ndarray, name: str) -> str:
    place = tuple(int(i) for i in np.argwhere(bad)[0])
    return f"{name}[{', '.join(map(str, place))}] = {array[place]}"
