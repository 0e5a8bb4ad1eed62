"""The formats of an export: each writes a network and shows, by reading it again, that it is the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from prune_jax.errors import PruneError
from prune_jax.export.stablehlo import Forward, load_stablehlo, to_stablehlo
from prune_jax.trees import PyTree, leaves_by_path

BATCH_SIZES = (1, 3)  # on which an export is compared with the network
TOLERANCE = 1e-4  # of the largest output


class Written(NamedTuple):
    """An export that was read again and agrees."""

    data: bytes
    facts: dict[str, Any]


def stablehlo(forward: Forward, variables: PyTree, sample: Sequence[np.ndarray]) -> Written:
    """The program with its weights; compared with the network on batches of several sizes."""
    del variables
    data = to_stablehlo(forward, sample)
    again, worst = load_stablehlo(data), 0.0
    for size in BATCH_SIZES:
        inputs = [np.repeat(x, size, axis=0) for x in sample]
        expected, found = np.asarray(jax.jit(forward)(*inputs), np.float64), np.asarray(again(*inputs), np.float64)
        worst = max(worst, float(np.abs(found - expected).max() / (np.abs(expected).max() + 1e-30)))
    if not worst <= TOLERANCE:
        raise PruneError(f"the StableHLO program differs from the network by {worst:.2g} of its largest output.")
    return Written(data, {"bytes": len(data), "largest_difference": worst})


def safetensors(forward: Forward, variables: PyTree, sample: Sequence[np.ndarray]) -> Written:
    """The arrays by their paths, with no program; read again and compared bit for bit."""
    import safetensors.numpy

    del forward, sample
    arrays = {path: np.ascontiguousarray(leaf) for path, leaf in leaves_by_path(variables).items() if np.size(leaf)}
    data = safetensors.numpy.save(arrays)
    again = safetensors.numpy.load(data)
    different = [path for path, array in arrays.items() if again[path].tobytes() != array.tobytes()]
    if different:
        raise PruneError(f"safetensors gave back other numbers in {', '.join(different)}.")
    return Written(data, {"bytes": len(data), "arrays": len(arrays)})


WRITERS: dict[str, Callable[[Forward, PyTree, Sequence[np.ndarray]], Written]] = {
    "stablehlo": stablehlo,
    "safetensors": safetensors,
}
EXTENSIONS = {"stablehlo": "model.stablehlo", "safetensors": "model.safetensors"}
