"""The formats of an export: each writes a network and shows, by reading it again, that it is the same."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from prune_jax.errors import PruneError
from prune_jax.export.packed import load_packed, to_packed
from prune_jax.export.stablehlo import Forward, load_stablehlo, to_stablehlo
from prune_jax.export.tensors import load_safetensors, to_safetensors
from prune_jax.trees import PyTree, leaves_by_path

BATCH_SIZES = (1, 3)  # on which an export is compared with the network
ONNX_BATCH_SIZES = (1, 3, 64)
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
        worst = float(np.maximum(worst, _difference(again(*inputs), jax.jit(forward)(*inputs))))
    if not worst <= TOLERANCE:
        raise PruneError(f"the StableHLO program differs from the network by {worst:.2g} of its largest output.")
    return Written(data, {"bytes": len(data), "largest_difference": worst})


def safetensors(forward: Forward, variables: PyTree, sample: Sequence[np.ndarray]) -> Written:
    """The arrays by their paths, with no program; read again and compared bit for bit."""
    del forward, sample
    arrays = {path: np.ascontiguousarray(leaf) for path, leaf in leaves_by_path(variables).items() if np.size(leaf)}
    data = to_safetensors(arrays)
    again, _ = load_safetensors(data)
    different = [path for path, array in arrays.items() if again[path].tobytes() != array.tobytes()]
    if different:
        raise PruneError(f"safetensors gave back other numbers in {', '.join(different)}.")
    return Written(data, {"bytes": len(data), "arrays": len(arrays)})


def packed(forward: Forward, variables: PyTree, sample: Sequence[np.ndarray]) -> Written:
    """The arrays by their paths, the sparse ones as bits and values; read again and compared bit for bit."""
    del forward, sample
    arrays = {path: np.asarray(leaf) for path, leaf in leaves_by_path(variables).items()}
    data = to_packed(arrays)
    again, dense = load_packed(data), sum(array.nbytes for array in arrays.values())
    different = [path for path, array in arrays.items() if not _same(array, again.get(path))]
    if different:
        raise PruneError(f"the packed file gave back other arrays in {', '.join(different)}.")
    return Written(data, {"bytes": len(data), "bytes_dense": dense, "ratio": round(dense / len(data), 3)})


def onnx(forward: Forward, variables: PyTree, sample: Sequence[np.ndarray]) -> Written:
    """The program with its weights as ONNX; checked, and run by onnxruntime on batches of several sizes."""
    import onnx as library
    import onnxruntime

    from prune_jax.export.onnx import MEND, OPSET, to_onnx

    del variables
    data, worst = to_onnx(forward, sample), 0.0
    try:
        library.checker.check_model(data, full_check=True)
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        for size in ONNX_BATCH_SIZES:
            inputs = _varied(sample, size)
            with jax.default_matmul_precision("highest"):
                expected = jax.jit(forward)(*inputs)
            (found,) = session.run(None, {f.name: x for f, x in zip(session.get_inputs(), inputs, strict=True)})
            worst = float(np.maximum(worst, _difference(found, expected)))
    except Exception as error:  # the checker's and the runtime's own, of classes that they do not tell
        raise PruneError(f"the ONNX program does not run ({type(error).__name__}: {error}). {MEND}") from error
    if not worst <= TOLERANCE:
        raise PruneError(f"the ONNX program differs from the network by {worst:.2g} of its largest output. {MEND}")
    return Written(data, {"bytes": len(data), "opset": OPSET, "largest_difference": worst})


def _same(a: np.ndarray, b: np.ndarray | None) -> bool:
    return b is not None and (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()


def _difference(found: Any, expected: Any) -> float:
    """The largest difference, of the largest output; infinite where the shapes differ."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        return np.inf
    return float(np.abs(found - expected).max() / (np.abs(expected).max() + 1e-30))


def _varied(sample: Sequence[np.ndarray], size: int) -> list[np.ndarray]:
    """One example and others like it: floats with noise, steps in other orders, lengths and numbers no larger."""
    rng, made = np.random.default_rng(size), []
    for x in sample:
        first = x[:1].astype(jax.dtypes.canonicalize_dtype(x.dtype))
        others = np.repeat(first, size - 1, axis=0)
        if np.issubdtype(first.dtype, np.floating):
            noise = rng.normal(scale=float(np.std(first)) or 1.0, size=others.shape)
            others = others + noise.astype(first.dtype)
        elif others.ndim > 1:
            others = rng.permuted(others, axis=-1)
        elif first.dtype != np.bool_:
            others = rng.integers(np.minimum(others, 1), others + 1, dtype=first.dtype)
        made.append(np.concatenate([first, others]))
    return made


def missing(name: str) -> tuple[str, ...]:
    """The packages that a format needs and that are not installed."""
    return tuple(package for package in PACKAGES.get(name, ()) if importlib.util.find_spec(package) is None)


WRITERS: dict[str, Callable[[Forward, PyTree, Sequence[np.ndarray]], Written]] = {
    "stablehlo": stablehlo,
    "safetensors": safetensors,
    "packed": packed,
    "onnx": onnx,
}
EXTENSIONS = {
    "stablehlo": "model.stablehlo",
    "safetensors": "model.safetensors",
    "packed": "model.packed.safetensors",
    "onnx": "model.onnx",
}
PACKAGES = {"onnx": ("onnx", "onnxruntime")}  # of the extra of the same name
