"""Predictions by a run's exported network; no code of the model is loaded."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from prune_jax.archives import read_archive
from prune_jax.checkpoints import CHAMPIONS, Store
from prune_jax.errors import DamagedArtifactError, UserMistake, shortened
from prune_jax.export import EXTENSIONS, load_stablehlo
from prune_jax.promotion import reigning
from prune_jax.recipe import Ref

NAMES = ("x", "lengths")


def predict(store: Store, run: str, inputs: Mapping[str, np.ndarray], *, stage: str | None = None) -> np.ndarray:
    """What the exported network of a run answers.

    Args:
        store: where the run lies.
        run: its name; or `champions/NAME`, the champion of that name.
        inputs: `x`, and `lengths` where the network takes them, each with a batch axis in front.
        stage: the export, if the run has several; left out, the last.

    Raises:
        UserMistake: there is no such run or export, or the inputs do not fit.
    """
    data = _exported(store, run, stage)
    given = {name: np.asarray(inputs[name]) for name in NAMES if name in inputs}
    for name, array in given.items():
        if array.dtype.kind not in "fiub":
            raise UserMistake(f"the inputs do not fit the network of run {run!r}: {name} is {array.dtype}, no numbers")
    try:
        return load_stablehlo(data)(*given.values())
    except (TypeError, ValueError) as error:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in given.items())
        reason = shortened(str(error).partition("\n")[0])
        raise UserMistake(f"the inputs do not fit the network of run {run!r}: {shapes}. {reason}") from error


def _exported(store: Store, run: str, stage: str | None) -> bytes:
    if run.startswith(f"{CHAMPIONS}/"):
        reign = reigning(store, run.removeprefix(f"{CHAMPIONS}/")).champion
        assert reign is not None
        return _program(store, reign.export)
    stages = store.record(run).get("stages", {})
    exports = {n: s for n, s in stages.items() if s["kind"] == "export" and "stablehlo" in s.get("metrics", {})}
    if stage is not None and stage not in exports:
        raise UserMistake(f"run {run!r} has no export {stage!r} as StableHLO (exports: {', '.join(exports) or 'none'})")
    if not exports:
        raise UserMistake(
            f"run {run!r} has no StableHLO export; add a stage such as "
            "`export: {kind: export, formats: [stablehlo]}` to its recipe and run it"
        )
    chosen = exports[stage or list(exports)[-1]]
    return _program(store, Ref(chosen["kind"], chosen["key"]))


def _program(store: Store, ref: Ref) -> bytes:
    file, damage = EXTENSIONS["stablehlo"], store.damage(ref)
    if not damage and file not in (store.meta(ref) or {}).get("files", {}):
        damage = f"{store.path(ref) / file} is not there, though a record names it"
    if damage:
        raise DamagedArtifactError(f"{damage}. Run the recipe again: it will be made anew.")
    return (store.path(ref) / file).read_bytes()


def read_inputs(path: str) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file; a single one counts as `x`, whatever its name."""
    try:
        arrays = read_archive(path)
    except FileNotFoundError:
        raise UserMistake(f"{path}: there is no such file") from None
    except (UserMistake, OSError, ValueError) as error:  # ValueError: what no path can hold
        raise UserMistake(f"{path}: is no .npz file of plain arrays ({error})") from None
    if len(arrays) == 1:
        return {"x": next(iter(arrays.values()))}
    if "x" not in arrays:
        raise UserMistake(
            f"{path}: holds {shortened(', '.join(arrays)) or 'nothing'} but no x; name the inputs x (and lengths)"
        )
    return arrays
