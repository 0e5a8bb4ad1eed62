"""What lies in a store: artifacts, records of runs, and what killed processes left half-written."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from prune_jax.checkpoints import AT_WORK, CHAMPIONS, SEARCHES, Store, age
from prune_jax.errors import UserMistake
from prune_jax.files import files_below
from prune_jax.plan import VERSIONS
from prune_jax.recipe import Ref, why_no_record

RECORDS = "runs"
DONE = {"ran", "cached"}


class Record(NamedTuple):
    """The record of a run, or of an earlier run of that name."""

    path: epath.Path
    run: str
    latest: bool  # of its name
    mtime: float
    content: Mapping[str, Any] | None  # None: no record

    @property
    def refs(self) -> set[Ref]:
        """The artifacts of its stages, and the data that were put aside for it."""
        return {ref for ref, status in self._stages() if status in DONE} | self._snapshot()

    def _snapshot(self) -> set[Ref]:
        path = (self.content or {}).get("recipe", {}).get("data", {}).get("path")
        kind, key = Path(path).parts[-3:-1] if isinstance(path, str) and path.count("/") > 2 else ("", "")
        return {Ref(kind, key)} if kind == "snapshot" else set()

    @property
    def begun(self) -> set[Ref]:
        """Artifacts of stages that did not end well: a killed training goes on from its step checkpoints."""
        return {ref for ref, status in self._stages() if status not in DONE}

    def _stages(self) -> Iterator[tuple[Ref, str]]:
        for stage in (self.content or {}).get("stages", {}).values():
            yield Ref(stage["kind"], stage["key"]), stage["status"]


class Leftover(NamedTuple):
    """What no run reads."""

    path: epath.Path
    ref: Ref | None  # the artifact that was to become
    what: str  # half-written, set aside, step checkpoints, or the mark of a run


def check_is_store(store: Store) -> None:
    """Raises `UserMistake` where there is no store."""
    if not store.root.exists():
        raise UserMistake(f"{store.root}: there is no such store. Name another one with --store.")


def artifacts(store: Store) -> list[Ref]:
    """All artifacts, whole or not, by kind and key."""
    return [Ref(kind.name, entry.name) for kind, entry in _entries(store) if entry.is_dir() and "." not in entry.name]


def records(store: Store) -> list[Record]:
    """All records, earlier ones of a name included, the latest last."""
    folder = store.root / RECORDS
    found = []
    for run in sorted(folder.iterdir()) if folder.exists() else ():
        if run.name.startswith(".") or not run.is_dir():
            continue
        history = sorted((run / "history").glob("*.json")) if (run / "history").exists() else []
        for path in [*history, run / "run.json"]:
            if path.exists():
                found.append(Record(path, run.name, path.parent == run, age(path)[0], _record(path)))
    return sorted(found, key=lambda record: (record.mtime, record.latest))


def leftovers(store: Store) -> list[Leftover]:
    """What killed processes and damaged artifacts left behind."""
    found = []
    for kind, entry in _entries(store):
        ref = Ref(kind.name, entry.name.lstrip(".").partition(".")[0])
        if entry.name.endswith(".tmp"):
            found.append(Leftover(entry, ref, "half-written"))
        elif ".damaged-" in entry.name:
            found.append(Leftover(entry, ref, "set aside"))
        elif entry.name.endswith(".work"):
            found.append(Leftover(entry, ref, "step checkpoints"))
    runs = store.root / RECORDS
    nested = chain.from_iterable((run, *_folders(run)) for run in _folders(runs))
    for entry in (
        e
        for folder in (store.root, runs, store.root / CHAMPIONS, store.root / SEARCHES, *nested)
        if folder.exists()
        for e in sorted(folder.iterdir())
    ):
        if entry.name.endswith(".tmp"):
            found.append(Leftover(entry, None, "half-written"))
        elif entry.name.endswith(AT_WORK):
            found.append(Leftover(entry, None, "mark of a run"))
    found += [Leftover(run, None, "run without a record") for run in _folders(runs) if not (run / "run.json").exists()]
    return found


def promoted(store: Store) -> tuple[str, set[str]]:
    """What the JSON files beside artifacts and records say, as one text, and the runs that they name as `run`."""
    folders = [folder for folder in _folders(store.root) if folder.name not in {RECORDS, *VERSIONS}]
    files = [entry for entry in store.root.iterdir() if not entry.is_dir()]
    files = [file for file in (*files, *chain.from_iterable(map(files_below, folders))) if file.suffix == ".json"]
    return "\n".join(file.read_bytes().decode(errors="replace") for file in files), {
        run for file in files for run in _runs_in(_json(file))
    }


def measure(path: epath.Path) -> tuple[int, float]:
    """Bytes of a file, or of all files in a folder, and when the last of them was written: now, if they change."""
    try:
        found = [file.stat() for file in (path, *(files_below(path) if path.is_dir() else ()))]
    except FileNotFoundError:
        return 0, time.time()
    return sum(stat.length for stat in found if not stat.is_directory), max((stat.mtime for stat in found), default=0.0)


def _entries(store: Store) -> Iterator[tuple[epath.Path, epath.Path]]:
    for kind in _folders(store.root):
        if kind.name in VERSIONS:
            yield from ((kind, entry) for entry in sorted(kind.iterdir()))


def _folders(folder: epath.Path) -> list[epath.Path]:
    if not folder.exists():
        return []
    return sorted(e for e in folder.iterdir() if e.is_dir() and not e.name.startswith("."))


def _runs_in(content: Any) -> Iterator[str]:
    waiting = [content]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            if isinstance(part.get("run"), str):
                yield part["run"]
            part = list(part.values())
        waiting += part if isinstance(part, list) else []


def _json(path: epath.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError):
        return None


def _record(path: epath.Path) -> Mapping[str, Any] | None:
    content = _json(path)
    return content if isinstance(content, Mapping) and why_no_record(content) is None else None
