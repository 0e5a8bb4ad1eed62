"""Data as they were: kept in the store by their digest, so that tomorrow's file does not change today's run."""

from __future__ import annotations

import io

import numpy as np

from prune_jax.checkpoints import Store
from prune_jax.datasets import GrainSplit
from prune_jax.errors import UserMistake
from prune_jax.plan import key_of
from prune_jax.problems import data_of
from prune_jax.recipe import Data, Ref

FILE = "data.npz"


def snapshot(store: Store, data: Data) -> tuple[Data, Ref | None]:
    """Puts data aside and answers a recipe's `data` that reads them from there.

    Files and `module:function` are read once and kept as `STORE/snapshot/<key>/data.npz`. Data that ship with a package
    stay where they are, and so do Grain datasets, which do not fit in memory: of those the run itself refuses to go on
    when their digest changes.

    Args:
        store: on a disk of this machine.
        data: what the recipe says.

    Returns:
        The new `data`, of the same digest, and the artifact; None where nothing was put aside.
    """
    if data.source != "npz" and ":" not in data.source:
        return data, None
    whole = data_of(data.model_copy(update={"validation": 0.0}))
    if isinstance(whole.train, GrainSplit) or isinstance(whole.test, GrainSplit):
        return data, None
    if not store.local:
        raise UserMistake(f"{store.root}: is no folder of this machine; data are put aside on a disk alone")
    ref = Ref("snapshot", key_of("snapshot", data=whole.digest))
    with store.lock(ref):
        if store.damage(ref):
            store.set_aside(ref)
        if store.meta(ref) is None:
            names = {"x": "x", "y": "y", "lengths": "len"}
            splits = {"train": whole.train, "test": whole.test}
            arrays = {f"{names[n]}_{split}": array for split, rows in splits.items() for n, array in rows.items()}
            if whole.classes is not None:
                arrays["classes"] = np.asarray(whole.classes, np.int32)
            file = io.BytesIO()
            np.savez(file, **arrays)  # type: ignore[arg-type]
            facts = {"digest": whole.digest, "source": data.source, "path": data.path or "", "note": whole.note}
            store.write(ref, {}, {"metrics": {}, "facts": facts}, {FILE: file.getvalue()})
    kept = data.model_copy(update={"source": "npz", "path": str(store.path(ref) / FILE), "args": {}})
    if data_of(kept).digest != whole.digest:
        raise UserMistake(
            f"data.source = {data.source!r}: the data changed while they were read. Run the recipe again."
        )
    return kept, ref
