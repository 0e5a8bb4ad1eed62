"""Arrays of any type in the safetensors format; its own reader for numpy knows no bfloat16 and no metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NoReturn

import jax.numpy as jnp
import numpy as np

from prune_jax.errors import DamagedArtifactError, PruneError, shortened

BITS = (8, 16, 32, 64)
TYPES = {
    "BOOL": "bool",
    **{f"I{bits}": f"int{bits}" for bits in BITS},
    **{f"U{bits}": f"uint{bits}" for bits in BITS},
    **{f"F{bits}": f"float{bits}" for bits in BITS[1:]},
    "BF16": "bfloat16",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}


def to_safetensors(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file of arrays in C order.

    Raises:
        PruneError: the format has no name for an array's type.
    """
    import safetensors.numpy

    for path, array in arrays.items():
        if array.dtype.name not in TYPES.values():
            raise PruneError(
                f"{path} is {array.dtype.name}, which safetensors cannot hold (allowed: {', '.join(TYPES.values())})."
            )
    return safetensors.numpy.save(dict(arrays), dict(metadata) if metadata else None)


def load_safetensors(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a safetensors file and its metadata; nothing larger than the file is made.

    Raises:
        DamagedArtifactError: it is no such file.
    """
    import safetensors

    try:
        found = safetensors.deserialize(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        for name, each in found:
            if each["dtype"] not in TYPES:
                refuse(f"{name} is of the type {each['dtype']}")
        arrays = {n: np.frombuffer(e["data"], jnp.dtype(TYPES[e["dtype"]])).reshape(e["shape"]) for n, e in found}
    except (safetensors.SafetensorError, ValueError) as error:
        refuse(str(error))
    return arrays, header.get("__metadata__") or {}


def refuse(what: str) -> NoReturn:
    """Says why a file of arrays cannot be read."""
    raise DamagedArtifactError(f"the file of arrays cannot be read: {shortened(what)}. Export the network anew.")
