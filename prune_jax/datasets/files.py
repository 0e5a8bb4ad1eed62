"""Arrays of a user's own, from an `.npz` file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from prune_jax.archives import read_archive
from prune_jax.errors import UserMistake, did_you_mean


def npz(*, path: str) -> dict[str, Any]:
    """`x_train`, `y_train`, `x_test`, `y_test`, and for padded sequences `len_train` and `len_test`; nothing pickled.

    Args:
        path: the file; as `numpy.savez(path, x_train=..., ...)` writes it, perhaps with `classes`, a number.
    """
    file = Path(os.path.expanduser(path))
    if not os.path.isfile(file):  # and not `file.is_file()`, which raises where a name is too long
        if os.path.isdir(file):
            raise UserMistake("is a folder; name the .npz file in it")
        near = (
            did_you_mean(file.name, sorted(p.name for p in file.parent.glob("*.npz")))
            if os.path.isdir(file.parent)
            else ""
        )
        raise UserMistake(f"there is no such file{near} (looked in {file.parent.resolve()})")
    arrays: dict[str, Any] = read_archive(file)
    if "classes" in arrays and arrays["classes"].ndim == 0 and arrays["classes"].dtype.kind == "i":
        arrays["classes"] = int(arrays["classes"])
    return {"note": file.name} | arrays
