"""What a disk refuses, in words: full, read-only, forbidden, gone; how much is free and how much is asked for."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prune_jax.errors import PruneError, StoreError

_ROOM = (
    "Make room (`prune-jax gc --dry-run` tells what the store can spare), or name a folder on another disk with --store"
)
_RIGHTS = "Give this user the right to write there, or name another folder with --store"
TROUBLES = {
    errno.ENOSPC: ("the disk is full", _ROOM),
    errno.EDQUOT: ("this user's quota of the disk is used up", _ROOM),
    errno.EFBIG: ("a file would become larger than this process may write", "Raise the limit (`ulimit -f`)"),
    errno.EROFS: ("the disk is read-only", "Mount it for writing, or name another folder with --store"),
    errno.EACCES: ("this user has no permission", _RIGHTS),
    errno.EPERM: ("this user has no permission", _RIGHTS),
    errno.ESTALE: ("the disk is no longer there", "Mount it again"),
}
GOES_ON = "what is done is kept, and the same command goes on."


@contextmanager
def told(doing: str, root: str, needed: int = 0) -> Iterator[None]:
    """Raises what a disk refuses as `StoreError`; other errors pass.

    Args:
        doing: begins the message: `train/3f.. cannot be written`.
        root: the store.
        needed: bytes that were to be written, as far as they are known.
    """
    try:
        yield
    except PruneError:
        raise
    except Exception as error:
        what, mend = TROUBLES.get(_code(error), ("", ""))
        if not what:
            raise
        raise StoreError(f"{doing}: {what} at {_place(error, root)}{_room(root, needed)}. {mend}; {GOES_ON}") from error


def check_room(doing: str, root: str, needed: int) -> None:
    """Raises `StoreError` where fewer bytes are free than needed; a disk that does not tell is trusted."""
    free = free_bytes(root)
    if free is not None and free < needed:
        raise StoreError(f"{doing}: there is not enough room at {root}{_room(root, needed)}. {_ROOM}; {GOES_ON}")


def free_bytes(root: str) -> int | None:
    """Bytes that this user may still write below a folder; None for a URL, or where there is no such disk."""
    folder = Path(root)
    if "://" in root:
        return None
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def readable(count: float) -> str:
    """A number of bytes, as people say it.

    >>> readable(999), readable(266_610 * 4), readable(3e9)
    ('999 B', '1.1 MB', '3.0 GB')
    """
    power = min(len(str(int(count))) - 1, 14) // 3
    return f"{count / 1000**power:.{min(power, 1)}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _code(error: BaseException) -> int:
    """The error's number; TensorStore writes it into its text."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found[1]) if found else 0


def _place(error: BaseException, root: str) -> str:
    return os.fspath(error.filename) if isinstance(error, OSError) and isinstance(error.filename, str) else root


def _room(root: str, needed: int) -> str:
    free = free_bytes(root)
    if free is None:
        return ""
    return f" ({readable(free)} free" + (f", about {readable(needed)} needed)" if needed else ")")
