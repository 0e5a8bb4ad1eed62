"""Files that are there whole or not at all: replaced by one rename, written through to disk, digested, locked."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from etils import epath


def sha256(file: epath.Path) -> str:
    """The file's digest, read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def replace(path: epath.Path, text: str, mtime: float | None = None) -> None:
    """Writes a file by one rename, as if at `mtime`; what was there stays until then, and stays if this fails."""
    aside = path.parent / f".{path.stem}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        aside.write_text(text)
        if "://" not in str(path):
            with open(aside, "rb") as file:
                os.fsync(file.fileno())
            if mtime is not None:
                os.utime(aside, (mtime, mtime))
        aside.replace(path)
    finally:
        if aside.exists():
            aside.unlink()


def copy_file(source: epath.Path, target: epath.Path) -> None:
    """Copies a file in pieces, from and to anywhere."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reading, target.open("wb") as writing:
        shutil.copyfileobj(reading, writing)  # type: ignore[misc]


def user_cache() -> Path:
    """The folder for what this user can do without: `~/.cache/prune_jax`, or below `XDG_CACHE_HOME`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prune_jax"


def locked(path: Path, *, wait: bool = True) -> IO[str] | None:
    """The file, locked until it is closed; None where another holds it and we do not wait."""
    import fcntl

    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW  # a link would open, and create, what it leads to
    file = open(os.open(path, flags, 0o666), "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException as error:
        file.close()
        if isinstance(error, BlockingIOError):
            return None
        raise
    return file


def files_below(folder: epath.Path) -> Iterator[epath.Path]:
    """All files in a folder and in its folders."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from files_below(entry)
        else:
            yield entry


def sync_all(folder: Path) -> None:
    """Has the kernel write the folder to disk, so that the rename never comes before the content."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Has the kernel write one file, or the names in one folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
