"""Archives of arrays (`.npz`) from anywhere: nothing in them is unpickled, and nothing larger than stated is made.

What an array takes is read from its header and held against the archive and the machine's memory before it is made.
"""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path

import numpy as np

from prune_jax.errors import UserMistake, shortened

ARRAYS = 1000  # in one archive
BOMB_BYTES, BOMB_RATIO = 2**28, 100  # unpacked: so large, and so many times what is there, is no data
OBJECTS = (
    "holds Python objects, which are not read since unpickling runs code; save it as a plain array of numbers, padded "
    "where rows differ in length"
)


def read_archive(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file by name.

    Raises:
        UserMistake: it is no archive of plain arrays, is damaged, or claims more than the machine holds.
        FileNotFoundError: there is none.
    """
    file = Path(path)
    if not os.path.isfile(file):
        file.stat()
        raise UserMistake("is no file")
    if not zipfile.is_zipfile(file):
        raise UserMistake("is not an .npz archive, or was cut off; write it with numpy.savez(path, x_train=..., ...)")
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            _check_sizes(members, file.stat().st_size)
            return {m.filename.removesuffix(".npy"): _array(archive, m) for m in members}
    except (UserMistake, OSError):
        raise
    except Exception as error:  # whatever the directory of a damaged archive makes zipfile raise
        raise UserMistake(f"is damaged ({type(error).__name__}: {shortened(error)}); write the file again") from error


def check_unpacked(unpacked: int, packed: int, ratio: int = BOMB_RATIO) -> None:
    """Refuses what would take more bytes than this machine has memory, or `ratio` times those that are there."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    told = f"unpacks to {unpacked / 2**30:,.1f} GiB"
    if unpacked > memory:
        raise UserMistake(f"{told}, and this machine has {memory / 2**30:.1f} in all")
    if unpacked > max(BOMB_BYTES, ratio * packed):
        raise UserMistake(
            f"{told}, {unpacked // max(packed, 1):,} times its size; if that is meant, store it without compression"
        )


def _check_sizes(members: list[zipfile.ZipInfo], packed: int) -> None:
    if len(members) > ARRAYS:
        raise UserMistake(f"holds {len(members):,} arrays; at most {ARRAYS:,} are read")
    check_unpacked(sum(member.file_size for member in members), packed)


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    name = member.filename.removesuffix(".npy")[:60]
    try:
        with archive.open(member) as stored:
            version = np.lib.format.read_magic(stored)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(stored)
            header = stored.tell()
        if dtype.hasobject:
            raise UserMistake(f"array {name!r} {OBJECTS}")
        if header + math.prod(shape) * dtype.itemsize != member.file_size or min(shape, default=0) < 0:
            raise ValueError(
                f"its header says {dtype} {list(shape)}, and {member.file_size - header:,} bytes are there"
            )
        with archive.open(member) as stored:
            return np.lib.format.read_array(stored, allow_pickle=False)
    except UserMistake:
        raise
    except Exception as error:  # of zipfile, zlib, struct, tokenize, numpy: a damaged file brings out all of them
        raise UserMistake(f"array {name!r} is damaged ({shortened(error)}); write the file again") from error
