"""Sparse arrays in little room: a bit for each weight, and the values that are not zero; restored to the bit.

A safetensors file. An array that gains by it is two tensors, `mask/PATH` (the bits, in C order, of each byte the
highest first) and `values/PATH`, and its shape is in the metadata; any other is one, `whole/PATH`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import numpy as np

from prune_jax.export.tensors import load_safetensors, refuse, to_safetensors

FORMAT, VERSION = "prune-jax packed", "1"
ENTRY_BYTES = 150  # about what a second tensor and a shape cost in the header, beside their names


def to_packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    """A file of arrays, packed where that makes it smaller.

    Zero is what has no bit set: -0.0 and NaN are values.
    """
    tensors, shapes = {}, {}
    for path, given in arrays.items():
        array = np.asarray(given, order="C")
        alive = _alive(array)
        packed = -(-array.size // 8) + int(alive.sum()) * array.itemsize
        if packed + ENTRY_BYTES + 2 * len(path) < array.nbytes:
            tensors[f"mask/{path}"], tensors[f"values/{path}"] = np.packbits(alive), array[alive]
            shapes[path] = array.shape
        else:
            tensors[f"whole/{path}"] = array
    return to_safetensors(tensors, {"format": FORMAT, "version": VERSION, "shapes": json.dumps(shapes)})


def load_packed(data: bytes) -> dict[str, np.ndarray]:
    """The arrays, by path, in a file that `to_packed` made.

    Raises:
        DamagedArtifactError: it is no such file, or its parts do not fit together. An array is made only once its
            shape agrees with the bits that are there.
    """
    tensors, metadata = load_safetensors(data)
    if metadata.get("format") != FORMAT:
        refuse("it is not packed")
    if metadata.get("version") != VERSION:
        refuse(f"it is packed as version {metadata.get('version')}, and {VERSION} is read here")
    shapes = _shapes(metadata)
    arrays = {name.removeprefix("whole/"): a for name, a in tensors.items() if name.startswith("whole/")}
    parts = {f"{part}/{path}" for path in shapes for part in ("mask", "values")}
    if missing := sorted(parts - tensors.keys()):
        refuse(f"{missing[0]} is missing")
    if surplus := sorted(tensors.keys() - parts - {f"whole/{path}" for path in arrays.keys() - shapes.keys()}):
        refuse(f"{surplus[0]} has no place in it")
    for path, shape in shapes.items():
        arrays[path] = _restored(path, shape, tensors[f"mask/{path}"], tensors[f"values/{path}"])
    return arrays


def _alive(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.itemsize}") != 0 if array.itemsize <= 8 else np.ones(array.shape, bool)


def _shapes(metadata: Mapping[str, str]) -> dict[str, list[int]]:
    try:
        shapes = json.loads(metadata.get("shapes", ""))
    except (ValueError, RecursionError):
        shapes = None
    if not isinstance(shapes, dict):
        refuse("its metadata hold no shapes")
    for path, shape in shapes.items():
        if not isinstance(shape, list) or len(shape) > 32 or not all(type(d) is int and d > 0 for d in shape):
            refuse(f"{path} has no shape")
    return shapes


def _restored(path: str, shape: list[int], mask: np.ndarray, values: np.ndarray) -> np.ndarray:
    size = math.prod(shape)
    needed = -(-size // 8)
    if mask.dtype != np.uint8 or mask.shape != (needed,):
        refuse(f"{path} {shape} needs {needed} bytes of bits, and {mask.dtype.name} {list(mask.shape)} are there")
    bits = np.unpackbits(mask).view(bool)
    if bits[size:].any() or values.shape != (int(bits.sum()),):
        refuse(f"{path} has {int(bits[:size].sum())} bits set of {size}, and values {list(values.shape)}")
    array = np.zeros(size, values.dtype)
    array[bits[:size]] = values
    return array.reshape(shape)
