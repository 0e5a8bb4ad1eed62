"""The store: `STORE/<kind>/<key>/` holds what one stage made, and nothing pickled.

An artifact is written aside and appears by one rename, `meta.json` in it; a folder without one is unfinished. The one
room that knows Orbax.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import re
import stat
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from prune_jax.archives import check_unpacked
from prune_jax.errors import DamagedArtifactError, UserMistake, did_you_mean
from prune_jax.recipe import Ref, check_run_name, digest, is_run_name, printable, why_no_record
from prune_jax.trees import leaves_by_path, nest

ARRAYS = "arrays"
META = "meta.json"
SPARSE_RATIO = 10_000  # how much smaller a network of zeros may be on disk than in memory
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of what lies in a store; none of them leads out of it
FILE = re.compile(r"[^/\\\0]+(/[^/\\\0]+)*")
# Orbax numbers its operations for the whole process: saves side by side would take each other's temporary folders.
ORBAX = threading.Lock()
PACKAGES = ("prune-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "prefect", "numpy")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


class Store:
    """Artifacts and run records below a folder or any URL that `etils.epath` can write."""

    def __init__(self, root: str | os.PathLike[str]):
        try:
            path = epath.Path(root)
            self.root = path if "://" in str(root) else path.resolve()  # Orbax takes absolute paths only
            is_file = self.local and not stat.S_ISDIR(os.stat(self.root).st_mode)
        except FileNotFoundError:
            is_file = False
        except (ValueError, OSError) as error:
            raise UserMistake(f"store = {str(root)[:100]!r}: cannot be a folder ({error})") from None
        if is_file:
            raise UserMistake(f"{self.root} is a file; a store is a folder. Give another one with --store.")

    @property
    def local(self) -> bool:
        """Whether the store lies on a file system of this machine."""
        return "://" not in str(self.root)

    def path(self, ref: Ref) -> epath.Path:
        """The folder of an artifact."""
        return self._below(ref.kind, ref.key)

    def work(self, ref: Ref) -> epath.Path:
        """The folder in which a stage keeps its step checkpoints until it is done."""
        return self._below(ref.kind, f"{ref.key}.work")

    def _below(self, *names: str) -> epath.Path:
        """A path below the root that stays there, whoever wrote the names and the folders.

        Raises:
            DamagedArtifactError: a name leads elsewhere, or a folder on the way is a symbolic link.
        """
        found = self.root
        for name in names:
            if not NAME.fullmatch(name):
                raise DamagedArtifactError(f"{name[:100]!r} is no name of the store in {self.root}.")
            found = found / name
            if self.local and os.path.islink(found):
                raise DamagedArtifactError(
                    f"{found} is a symbolic link, and a store follows none: what lies behind it may be anybody's. Put "
                    "the folder itself there, or give the place that it leads to with --store."
                )
        return found

    def meta(self, ref: Ref) -> dict[str, Any] | None:
        """What is known of a finished artifact; `None` if there is none, nothing if it is damaged."""
        try:
            meta = json.loads((self.path(ref) / META).read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError:  # neither text nor JSON
            return {}
        return meta if _is_meta(meta) else {}

    def damage(self, ref: Ref) -> str | None:
        """Says what is wrong with a finished artifact: a file that is missing or whose digest differs."""
        meta = self.meta(ref)
        if meta is None:
            return None
        if not meta:
            return f"{self.path(ref) / META} is not the file that was written"
        folder = self.path(ref)
        if self.local and (link := next((f for f in Path(folder).rglob("*") if f.is_symlink()), None)):
            return f"{link} is a symbolic link"
        for name, expected in meta["files"].items():
            file = folder / name
            if not FILE.fullmatch(name) or ".." in name.split("/"):
                return f"{name[:100]!r} in {META} leads out of it"
            if not file.is_file():
                return f"{file} is missing"
            if hashlib.sha256(file.read_bytes()).hexdigest() != expected:
                return f"{file} is not the file that was written (its sha256 differs from {META})"
        return None

    def intact(self, ref: Ref) -> bool:
        """Whether the artifact is finished and every file of it is the one that was written."""
        return self.meta(ref) is not None and self.damage(ref) is None

    def read(self, ref: Ref) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arrays (numpy, nested dicts) and meta of an artifact.

        Raises:
            DamagedArtifactError: it is missing, or a file of it is not the one that was written.
        """
        import orbax.checkpoint as ocp

        meta, damage = self.meta(ref), self.damage(ref)
        if meta is None or damage:
            raise DamagedArtifactError(
                f"{ref.kind}/{ref.key}: {damage or 'not in the store'}. Run the recipe again: it will be made anew."
            )
        try:
            sizes = [math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in meta["arrays"].values()]
            stored = sum((self.path(ref) / name).stat().length for name in meta["files"])
            check_unpacked(sum(sizes), stored, ratio=SPARSE_RATIO)
            flat = {p: np.empty(shape, dtype) for p, (shape, dtype) in meta["arrays"].items()}
            target = nest({p: array for p, array in flat.items() if array.size})
            if not target:
                return nest(flat), meta
            with ORBAX, ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
                found = checkpointer.restore(self.path(ref) / ARRAYS, args=ocp.args.StandardRestore(target))
        except Exception as error:  # what Orbax raises where arrays are not as meta says; we write no such artifacts
            if isinstance(error, OSError) or not self.local:  # a disk or a network that may come back
                raise
            raise DamagedArtifactError(
                f"{ref.kind}/{ref.key}: its arrays cannot be read ({type(error).__name__}: {error}). Remove its folder "
                "and run the recipe again: it will be made anew."
            ) from error
        return nest(flat | leaves_by_path(found)), meta

    def write(
        self, ref: Ref, arrays: Mapping[str, Any], meta: Mapping[str, Any], files: Mapping[str, bytes] | None = None
    ) -> dict[str, Any]:
        """Publishes an artifact by one rename and answers its meta; what is already there stays.

        Args:
            ref: its name.
            arrays: nested dicts of arrays.
            meta: facts that JSON can hold; digests, versions and the shapes of the arrays are added.
            files: other files by name.
        """
        final = self.path(ref)
        final.parent.mkdir(parents=True, exist_ok=True)
        aside = final.parent / f".{ref.key}.{uuid.uuid4().hex[:8]}.tmp"
        aside.mkdir()
        try:
            for name, data in (files or {}).items():
                (aside / name).write_bytes(data)
            full = self._fill(aside, ref, arrays, meta)
            if self.meta(ref) is not None:
                if self.intact(ref):  # somebody else was quicker
                    return self.meta(ref) or full
                self.set_aside(ref)
            aside.rename(final)
        finally:
            if aside.exists():
                aside.rmtree()
        self.clear_work(ref)
        return full

    def _fill(self, aside: epath.Path, ref: Ref, arrays: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, Any]:
        """Writes arrays and meta into a folder."""
        import orbax.checkpoint as ocp

        flat = {p: np.asarray(a) for p, a in _flatten(arrays).items()}
        # Orbax saves no empty arrays; their shape says all.
        filled = {path: array for path, array in flat.items() if array.size}
        if filled:
            with ORBAX, ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
                checkpointer.save(aside / ARRAYS, args=ocp.args.StandardSave(nest(filled)))
        full = {
            "kind": ref.kind,
            "key": ref.key,
            **meta,
            "arrays": {p: [list(a.shape), a.dtype.name] for p, a in flat.items()},
            "versions": versions(),
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "files": {
                str(f.relative_to(aside)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(_files(aside))
            },
        }
        full["digest"] = _digest_of(full)
        (aside / META).write_text(json.dumps(full, indent=1, allow_nan=False))
        if self.local:
            _sync(Path(aside))
        return full

    def set_aside(self, ref: Ref) -> epath.Path:
        """Moves a damaged artifact out of the way; nothing is deleted."""
        moved = self.path(ref).parent / f"{ref.key}.damaged-{uuid.uuid4().hex[:8]}"
        self.path(ref).rename(moved)
        return moved

    def clear_work(self, ref: Ref) -> None:
        """Removes the step checkpoints of a finished stage."""
        if self.work(ref).exists():
            self.work(ref).rmtree()

    @contextlib.contextmanager
    def lock(self, ref: Ref) -> Iterator[None]:
        """Holds the artifact's lock: a second run waits and then finds the first one's result.

        The kernel lets go of it with the process, so a killed run leaves nothing locked. Remote stores have none; there
        the same artifact may be made twice and the first one stays.
        """
        if not self.local:
            yield
            return
        import fcntl

        folder = Path(self.path(ref).parent)
        folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW  # a link would open, and create, what it leads to
        with open(os.open(folder / f".{ref.key}.lock", flags, 0o666), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def steps(self, ref: Ref) -> Steps:
        """The step checkpoints of a stage at work."""
        return Steps(self.work(ref))

    # Run records

    def record_path(self, name: str) -> epath.Path:
        """Where the record of a run lies."""
        check_run_name(name)
        return self._below("runs", name) / "run.json"

    def record(self, name: str) -> dict[str, Any]:
        """The record of a run."""
        if not is_run_name(name) or not (path := self.record_path(name)).exists():
            known = self.runs()
            raise UserMistake(
                f"no run {name[:100]!r} in {self.root}{did_you_mean(name, known)} (runs: {', '.join(known) or 'none'})"
            )
        mend = "Run the recipe again: what it computed is there."
        try:
            record = printable(json.loads(path.read_text()))
        except (ValueError, RecursionError):
            raise DamagedArtifactError(f"{path}, the record of run {name!r}, is not JSON. {mend}") from None
        if why := why_no_record(record):
            raise DamagedArtifactError(f"{path}, the record of run {name!r}, is not one: {why}. {mend}")
        return record

    def runs(self) -> list[str]:
        """The names of all runs, the latest last."""
        folder = self.root / "runs"
        if not folder.exists():
            return []
        if self.local and os.path.islink(folder):
            return []
        named = [p for p in folder.iterdir() if is_run_name(p.name) and not (self.local and os.path.islink(p))]
        records = [p / "run.json" for p in named if (p / "run.json").exists()]
        return [r.parent.name for r in sorted(records, key=lambda r: (r.stat().mtime, r.parent.name))]

    def write_record(self, record: Mapping[str, Any]) -> epath.Path:
        """Writes a run's record by one rename; the record of an earlier run of that name moves to `history/`."""
        path = self.record_path(record["name"])
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            history = self._below("runs", record["name"], "history")
            history.mkdir(parents=True, exist_ok=True)
            path.copy(history / f"{len(list(history.iterdir())) + 1}.json")
        write_anew(path, json.dumps(record, indent=1, allow_nan=False).encode())
        return path


def write_anew(path: epath.Path, data: bytes) -> None:
    """Writes a file by one rename: a symbolic link that stood there is replaced, and nothing behind it touched."""
    aside = path.parent / f".{path.name[:100]}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        aside.write_bytes(data)
        aside.replace(path)
    finally:
        if aside.exists():
            aside.unlink()


class Steps:
    """Step checkpoints of one stage at work, kept by Orbax's manager; a killed stage goes on from the last."""

    def __init__(self, folder: epath.Path, *, keep: int = 2):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._manager = ocp.CheckpointManager(
            folder.resolve() if "://" not in str(folder) else folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, cleanup_tmp_directories=True, create=True, enable_async_checkpointing=False
            ),
        )

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def latest(self, like: Any) -> tuple[int, Any] | None:
        """The last complete step and its tree, shaped like `like` (arrays or shapes); `None` if there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        with ORBAX:
            return step, self._manager.restore(step, args=self._ocp.args.StandardRestore(like))

    def save(self, step: int, tree: Any) -> None:
        """Saves a step; one that is already there stays."""
        with ORBAX:
            if step not in self._manager.all_steps():
                self._manager.save(step, args=self._ocp.args.StandardSave(tree))


def _digest_of(meta: Mapping[str, Any]) -> str:
    return digest({name: value for name, value in meta.items() if name != "digest"})


def _is_meta(meta: Any) -> bool:
    """Whether it is what `write` writes, as far as its parts are used here."""
    try:
        return (
            meta["digest"] == _digest_of(meta)
            and all(isinstance(sha, str) for sha in meta["files"].values())
            and all(
                isinstance(dtype, str) and all(type(d) is int and d >= 0 for d in shape)
                for shape, dtype in meta["arrays"].values()
            )
            and all(isinstance(meta.get(part, {}), dict) for part in ("call", "metrics", "facts"))
        )
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return False


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, branch in tree.items():
        if isinstance(branch, Mapping):
            flat |= _flatten(branch, f"{prefix}{name}/")
        elif branch is not None:
            flat[f"{prefix}{name}"] = branch
    return flat


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _files(entry)
        else:
            yield entry


def _sync(folder: Path) -> None:
    """Has the kernel write the folder to disk, so that the rename never comes before the content."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
