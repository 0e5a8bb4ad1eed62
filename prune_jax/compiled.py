"""XLA's programs, kept from run to run: what a schedule trains again is not compiled again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from prune_jax.files import user_cache

LIMIT = 1 << 30  # bytes of programs; beyond, those go that were not used for longest
WORTH = 0.1  # seconds of compiling that are worth a file
CPUS = Path("/proc/cpuinfo")


def keep() -> Path | None:
    """Has JAX keep what it compiles from now on, for this user and kind of processor, and take it from there.

    The folder is `~/.cache/prune_jax/compiled` (or below `XDG_CACHE_HOME`). Nothing is done where the user has chosen
    another (`JAX_COMPILATION_CACHE_DIR`) or none (`JAX_ENABLE_COMPILATION_CACHE=false`), over several hosts, which must
    compile side by side, and where the folder is not this user's to write: whoever writes there has code run.

    Returns:
        Where programs are kept; None if nothing was done.
    """
    chosen = jax.config.values
    if not chosen["jax_enable_compilation_cache"] or chosen["jax_compilation_cache_dir"]:
        return None
    folder = user_cache() / "compiled" / _processor()
    if jax.distributed.is_initialized() or not _is_ours(folder):
        return None
    _trim(folder.parent)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH)
    compilation_cache.reset_cache()  # JAX looks once, at what is compiled first
    return folder


def _processor() -> str:
    """Machine code for one kind of processor may not run on another that sees the same folder."""
    try:
        told = {line for line in CPUS.read_text().splitlines() if line.startswith(("model name", "flags", "Features"))}
    except OSError:
        told = {platform.processor()}
    return hashlib.sha256("\n".join([platform.machine(), *sorted(told)]).encode()).hexdigest()[:12]


def _is_ours(folder: Path) -> bool:
    try:
        for made in (folder.parent, folder):
            made.mkdir(mode=0o700, parents=True, exist_ok=True)
            if hasattr(os, "getuid") and (made.stat().st_uid != os.getuid() or made.stat().st_mode & 0o022):
                return False
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _trim(folder: Path) -> None:
    with contextlib.suppress(OSError):  # another process trims, too
        files = [(file, file.stat()) for file in folder.glob("*/*")]
        room = LIMIT
        for file, facts in sorted(files, key=lambda it: max(it[1].st_atime, it[1].st_mtime), reverse=True):
            room -= facts.st_size
            if room < 0:
                file.unlink(missing_ok=True)
