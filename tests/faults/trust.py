"""A store of somebody else's: pickles planted in every file that is read, and module names where ours would stand."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from prune_jax import cli
from prune_jax.checkpoints import META, Store, _digest_of
from prune_jax.datasets import load
from prune_jax.errors import PruneError
from prune_jax.export import EXTENSIONS, load_packed, load_stablehlo
from prune_jax.export.tensors import load_safetensors
from prune_jax.prediction import read_inputs
from prune_jax.recipe import Ref
from tests.faults.table import Outcome, fault

REF = Ref("train", "k" * 20)


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def rewritten(folder: Path, name: str, data: bytes) -> None:
    """Writes a file of an artifact with digests that fit, as anybody can who may write the store."""
    (folder / name).write_bytes(data)
    told = json.loads((folder / META).read_text())
    told["files"][name] = hashlib.sha256(data).hexdigest()
    (folder / META).write_text(json.dumps(told | {"digest": _digest_of(told)}, indent=1))


def places(home: Path) -> Iterator[tuple[str, Any, Any]]:
    """Every place that is read: its name, what plants bytes there, what reads it."""
    home.mkdir(exist_ok=True)
    store = Store(home / "store")
    store.write(
        REF, {"params": {"w": np.arange(6.0)}}, {"metrics": {}, "seconds": 1.0}, {EXTENSIONS["stablehlo"]: b"x"}
    )
    export = {"kind": "export", "key": REF.key, "status": "ran", "metrics": {"stablehlo": {}}}
    store.write(Ref("export", REF.key), {}, {"metrics": {}}, {EXTENSIONS["stablehlo"]: b"x"})
    store.write_record({"name": "export", "stages": {"export": export}})
    shown = "shown"
    store.write_record({"name": shown})
    folder, exported = Path(store.path(REF)), Path(store.path(Ref("export", REF.key)))
    np.savez(home / "good.npz", x=np.ones((1, 2)))
    inputs = str(home / "good.npz")
    files = [f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()]
    for file in sorted(files, key=lambda file: (file == META, file)):  # last: the others are written with it
        if file == META:
            yield file, (folder / META).write_bytes, lambda: store.read(REF)
        else:
            yield file, lambda data, file=file: rewritten(folder, file, data), lambda: store.read(REF)
    yield (
        "a program that is predicted with",
        lambda data: rewritten(exported, EXTENSIONS["stablehlo"], data),
        lambda: cli.predict("export", inputs, store=str(store.root)),
    )
    with store.steps(REF) as steps:
        steps.save(3, {"w": np.arange(3.0)})
    work, spare = Path(store.work(REF)), home / "spare"
    shutil.copytree(work, spare)
    for file in [f.relative_to(spare) for f in sorted(spare.rglob("*")) if f.is_file()]:
        yield (
            f"step checkpoint {file}",
            lambda data, file=file: _in_step(store, spare, file, data),
            lambda: _steps(store),
        )
    shutil.rmtree(work, ignore_errors=True)
    record = Path(store.record_path(shown))
    for command in (cli.show, cli.report):
        yield (
            f"run.json of {command.__name__}",
            record.write_bytes,
            lambda command=command: command(shown, store=str(store.root)),
        )
    for name in ("d.npz", "d.npy", "d.pkl"):
        path = home / name
        yield f"data {name}", path.write_bytes, lambda path=path: load("npz", path=str(path))
        yield f"inputs {name}", path.write_bytes, lambda path=path: read_inputs(str(path))
    for reader in (load_stablehlo, load_packed, load_safetensors):
        path = home / reader.__name__
        yield reader.__name__, path.write_bytes, lambda path=path, reader=reader: reader(path.read_bytes())


def _in_step(store: Store, spare: Path, file: Path, data: bytes) -> None:
    """Writes a file of a whole step checkpoint, with digests that fit."""
    work = Path(store.work(REF))
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(spare, work)
    with store.steps(REF) as steps:
        (work / file).write_bytes(data)
        if len(file.parts) > 1:  # else it is the digests themselves
            steps._digests(3).write_text(json.dumps(steps._files_of(3)))


def _steps(store: Store) -> None:
    with contextlib.suppress(Exception), store.steps(REF) as steps:  # a stage that cannot go on from a step fails
        steps.latest({"w": np.zeros(3)})


def payloads(mark: Path) -> list[bytes]:
    """The bomb as it is, and as an array of objects, alone and in an archive."""
    import io

    array = np.array([Bomb(mark)], object)
    alone, archived = io.BytesIO(), io.BytesIO()
    np.save(alone, array, allow_pickle=True)
    np.savez(archived, x_train=array, x=array)
    return [pickle.dumps(Bomb(mark)), alone.getvalue(), archived.getvalue()]


@fault("pickles planted where files are read")
def planted(times: int) -> Outcome:
    begun, count, survived = time.perf_counter(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        home, mark = Path(folder), Path(folder) / "unpickled"
        for payload in payloads(mark):
            for _, plant, read in places(home / hashlib.sha256(payload).hexdigest()[:8]):
                if count == times:
                    break
                count += 1
                mark.unlink(missing_ok=True)
                plant(payload)
                with contextlib.suppress(PruneError):
                    read()
                survived += not mark.exists()
    return Outcome(count, survived, 0, time.perf_counter() - begun)
