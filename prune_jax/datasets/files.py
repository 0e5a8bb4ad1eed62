"""Arrays of a user's own, from an `.npz` file."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from prune_jax.errors import UserMistake, did_you_mean


def npz(*, path: str) -> dict[str, Any]:
    """`x_train`, `y_train`, `x_test`, `y_test`, and for padded sequences `len_train` and `len_test`; nothing pickled.

    Args:
        path: the file; as `numpy.savez(path, x_train=..., ...)` writes it.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        if file.is_dir():
            raise UserMistake("is a folder; name the .npz file in it")
        near = (
            did_you_mean(file.name, sorted(p.name for p in file.parent.glob("*.npz"))) if file.parent.is_dir() else ""
        )
        raise UserMistake(f"there is no such file{near} (looked in {file.parent.resolve()})")
    if not zipfile.is_zipfile(file):
        raise UserMistake("is not an .npz archive, or was cut off; write it with numpy.savez(path, x_train=..., ...)")
    arrays: dict[str, Any] = {}
    with np.load(file, allow_pickle=False) as stored:
        for name in stored.files:
            try:
                arrays[name] = stored[name]
            except ValueError as error:
                raise UserMistake(
                    f"array {name!r} holds Python objects, which are not read since unpickling runs code; "
                    "save it as a plain array of numbers, padded where rows differ in length"
                ) from error
            except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
                raise UserMistake(f"array {name!r} is damaged ({error}); write the file again") from error
    return {"note": file.name} | arrays
