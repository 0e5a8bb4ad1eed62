"""What a store holds that no kept run needs, and its removal.

A record goes before the artifacts that it names, and everything by a rename first: killed at any moment, no record is
left that names what is gone, and what is half-removed is a leftover that the next removal takes.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath
from rich.table import Table

from prune_jax.checkpoints import AT_WORK, Store
from prune_jax.disks import readable, told
from prune_jax.errors import DamagedArtifactError, UserMistake
from prune_jax.files import locked
from prune_jax.inventory import (
    RECORDS,
    Leftover,
    Record,
    artifacts,
    check_is_store,
    leftovers,
    measure,
    promoted,
    records,
)
from prune_jax.recipe import Ref

HOUR = 3600.0  # seconds after which nobody is thought to be writing


class Removal(NamedTuple):
    """One thing that goes."""

    what: str
    path: str  # below the store
    bytes: int
    why: str


class _Item(NamedTuple):
    """What goes; the artifact whose lock it takes; and when that was held last."""

    removal: Removal
    path: epath.Path
    ref: Ref | None = None
    touched: float = 0.0


class _AtWork(NamedTuple):
    """A run at work: what it needs, and since when it locks artifacts."""

    refs: frozenset[str]
    since: float


def remove(store: Store, *, keep: int | None = None, dry_run: bool = False) -> list[Removal]:
    """Removes what no kept run needs, and answers it.

    Kept are: artifacts that a kept record names, or whose key stands in a JSON file beside artifacts and records (a
    promoted model), with all that they were made from; what a run at work locks or has locked or plans; step
    checkpoints of stages that a kept record calls unfinished. Of leftovers, those older than an hour go.

    Args:
        store: on a disk of this machine.
        keep: so many records stay, the latest, and those of promoted runs; left out, all.
        dry_run: only answers what would go.

    Raises:
        UserMistake: there is no such store; or it lies on a URL, where no locks can be seen.
        DamagedArtifactError: a record cannot be read, so that what it needs is not known.
    """
    if not store.local:
        raise UserMistake(f"{store.root}: is no folder of this machine; whether a run is at work there cannot be seen")
    if keep is not None and keep < 0:
        raise UserMistake(f"--keep {keep}: must be 0 or more records")
    check_is_store(store)
    with told("nothing more can be removed", str(store.root)):
        if dry_run:
            return [item.removal for item in _garbage(store, keep)]
        store.make(store.root / RECORDS)
        with store.gate():
            return [item.removal for item in list(_garbage(store, keep)) if _take(store, item)]


def _garbage(store: Store, keep: int | None) -> Iterator[_Item]:
    """What goes, records first."""
    written, working, (text, runs) = records(store), _at_work(store), promoted(store)
    for record in written:
        if record.content is None:
            raise DamagedArtifactError(
                f"{record.path} is no record of a run, so that what it needs is not known; nothing was removed. "
                "Run its recipe again, or delete the file."
            )
    kept = _kept(written, keep, runs)
    names = {record.run for record in kept}
    for record in written:
        if record.run not in names and record.latest:
            yield _item(store, "record", record.path.parent, f"not among the last {keep}")
        elif record.run in names and record not in kept:
            yield _item(store, "record", record.path, f"not among the last {keep}")
    there = artifacts(store)
    needed = {ref for record in kept for ref in record.refs} | {ref for ref in there if ref.key in text}
    needed |= {ref for ref in there if _is_at_work(store, ref, working)}
    needed = _with_parents(store, needed)
    for ref in there:
        if ref not in needed:
            yield _item(store, "artifact", store.path(ref), "no kept run needs it", ref)
    unfinished = needed | {ref for record in kept for ref in record.begun}
    for left in leftovers(store):
        if why := _why(store, left, unfinished, working):
            yield _item(store, left.what, left.path, why, left.ref)


def _kept(written: list[Record], keep: int | None, runs: set[str]) -> list[Record]:
    if keep is None:
        return written
    last = written[max(len(written) - keep, 0) :]
    names = runs | {record.run for record in last}  # of a name, the latest stays with the earlier ones
    return [record for record in written if record in last or (record.latest and record.run in names)]


def _with_parents(store: Store, refs: set[Ref]) -> set[Ref]:
    """These artifacts and all that they were made from."""
    found, todo = set(refs), list(refs)
    while todo:
        meta = store.meta(todo.pop()) or {}
        for kind, key in meta.get("call", {}).get("inputs", {}).values():
            if Ref(kind, key) not in found:
                found.add(Ref(kind, key))
                todo.append(Ref(kind, key))
    return found


def _at_work(store: Store) -> list[_AtWork]:
    """The runs whose marks are locked."""
    found = []
    for mark in Path(store.root).glob(f"{RECORDS}/.*{AT_WORK}"):
        with contextlib.suppress(FileNotFoundError, ValueError):  # it is just being made, or has just ended
            if not _is_free(mark):
                found.append(_AtWork(frozenset(json.loads(mark.read_text())), mark.stat().st_mtime))
    return found


def _is_at_work(store: Store, ref: Ref, working: list[_AtWork]) -> bool:
    """Whether an artifact is locked, or was since a run at work began, or is part of its plan."""
    lock = _lock_of(store, ref)
    if lock.exists() and not _is_free(lock):
        return True
    return any(f"{ref.kind}/{ref.key}" in run.refs or _touched(lock) >= run.since for run in working)


def _touched(lock: Path) -> float:
    return lock.stat().st_mtime if lock.exists() else 0.0


def _why(store: Store, left: Leftover, unfinished: set[Ref], working: list[_AtWork]) -> str:
    """Why a leftover goes; nothing if it stays."""
    if left.what == "set aside":
        return "damaged"
    if left.what == "mark of a run":
        return "its run was killed" if _is_free(Path(left.path)) else ""
    if left.what == "step checkpoints" and left.ref in unfinished:
        return ""
    if left.ref and _is_at_work(store, left.ref, working):
        return ""
    return "older than an hour" if time.time() - measure(left.path)[1] > HOUR else ""


def _take(store: Store, item: _Item) -> bool:
    """Removes one thing under its artifact's lock; not what another holds, or has held since it was looked at."""
    with contextlib.ExitStack() as stack:
        if item.ref is not None:
            lock = _lock_of(store, item.ref)
            file = locked(lock, wait=False)
            if file is None:
                return False
            stack.enter_context(file)
            if item.touched and _touched(lock) != item.touched:
                return False
        if not item.path.exists():
            return False
        _delete(item.path)
        return True


def _delete(path: epath.Path) -> None:
    if not path.name.endswith(".tmp"):
        aside = path.parent / f".{path.name.lstrip('.').partition('.')[0]}.{uuid.uuid4().hex[:8]}.tmp"
        path = path.rename(aside)
    if path.is_dir():
        path.rmtree()
    else:
        path.unlink()


def _lock_of(store: Store, ref: Ref) -> Path:
    return Path(store.root) / ref.kind / f".{ref.key}.lock"


def _is_free(lock: Path) -> bool:
    """Whether nobody holds a lock; asking does not touch the file."""
    import fcntl

    with open(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _item(store: Store, what: str, path: epath.Path, why: str, ref: Ref | None = None) -> _Item:
    removal = Removal(what, str(path.relative_to(store.root)), measure(path)[0], why)
    return _Item(removal, path, ref, _touched(_lock_of(store, ref)) if ref else 0.0)


def removals_table(removals: list[Removal]) -> Table:
    """What goes, and the bytes that it takes."""
    table = Table("what", "path", box=None, pad_edge=False)
    table.add_column("size", justify="right")
    table.add_column("why")
    for removal in removals:
        table.add_row(removal.what, removal.path, readable(removal.bytes), removal.why)
    return table


def removals_json(store: Store, removals: list[Removal]) -> dict[str, Any]:
    """The same for programs."""
    freed = sum(removal.bytes for removal in removals)
    return {"store": str(store.root), "bytes": freed, "removed": [removal._asdict() for removal in removals]}
