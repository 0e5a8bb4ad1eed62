"""Weights to begin from: a safetensors file, held against the network's own arrays name by name."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from prune_jax.errors import DamagedArtifactError, UserMistake, did_you_mean, shortened
from prune_jax.export.tensors import load_safetensors
from prune_jax.models import Variables
from prune_jax.trees import PyTree, leaves_by_path, map_by_path


def weights_digest(path: str) -> str:
    """Twenty digits of the file's sha256; none if there is no such file, which `read_weights` will say."""
    try:
        with open(os.path.expanduser(path), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:20]
    except OSError:
        return ""


def read_weights(path: str, shapes: PyTree) -> Variables:
    """The arrays of a file in the place of the network's own.

    Args:
        path: a safetensors file of arrays named `params/PATH` and `state/PATH`, as the export of this name writes them.
        shapes: `{"params": ..., "state": ...}`: shapes and types of the network's variables.

    Returns:
        The variables, in the network's types.

    Raises:
        UserMistake: the file, the first array that does not fit, and what would.
    """
    file = Path(os.path.expanduser(path))
    try:
        found, _ = load_safetensors(file.read_bytes())
    except OSError as error:
        raise UserMistake(f"cannot be read ({error.strerror}; looked in {file.parent.resolve()})") from None
    except DamagedArtifactError as error:
        raise UserMistake(f"is no safetensors file: {error}") from None
    wanted = leaves_by_path(shapes)
    for name in wanted:
        if name not in found:
            near = did_you_mean(name, found)
            raise UserMistake(f"array {name!r} is missing{near} (found: {shortened(', '.join(found)) or 'none'})")
    for name, array in found.items():
        if name not in wanted:
            raise UserMistake(f"array {shortened(name, 60)!r} is not the network's{did_you_mean(name, wanted)}")
        shape, dtype = wanted[name].shape, wanted[name].dtype
        if array.shape != shape or not np.can_cast(array.dtype, dtype):
            raise UserMistake(
                f"array {name!r} is {array.dtype.name} {list(array.shape)}, but the network's is {dtype.name} "
                f"{list(shape)}"
            )
    return Variables(**map_by_path(lambda name, leaf: np.asarray(found[name]).astype(leaf.dtype), shapes))
