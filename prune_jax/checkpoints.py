"""The store: `STORE/<kind>/<key>/` holds what one stage made, and nothing pickled.

An artifact is written aside and appears by one rename, `meta.json` in it; a folder without one is unfinished. The one
room that knows Orbax.
"""

from __future__ import annotations

import calendar
import contextlib
import errno
import functools
import json
import math
import os
import platform
import re
import shutil
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from prune_jax.archives import check_unpacked
from prune_jax.disks import GOES_ON, told
from prune_jax.errors import DamagedArtifactError, StoreError, UserMistake, did_you_mean, shortened
from prune_jax.files import copy_file, files_below, locked, replace, sha256, sync, sync_all, user_cache
from prune_jax.hosts import group
from prune_jax.recipe import Ref, check_run_name, digest, is_run_name, printable, why_no_record
from prune_jax.trees import leaves_by_path, nest

ARRAYS = "arrays"
META = "meta.json"
FORMAT, FORMAT_FILE = 1, "format.json"  # a store without the file is of version 1
CHAMPIONS = "champions"
SEARCHES = "searches"
AT_WORK, GATE = ".at-work", ".gate.lock"  # files of `runs/`: what the runs at work need; who holds the gate may remove
SPARSE_RATIO = 10_000  # how much smaller a network of zeros may be on disk than in memory
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of what lies in a store; none of them leads out of it
FILE = re.compile(r"(?=.{1,1000}$)(?!.*[\\\x00-\x1f\ud800-\udfff])[^/]+(/[^/]+)*")
# Orbax numbers its operations for the whole process: saves side by side would take each other's temporary folders.
ORBAX = threading.Lock()
KEPT_STEPS = 2
LOCK_POLL = 0.05  # seconds between two looks at a lock that another one holds
PACKAGES = ("prune-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "prefect", "numpy")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


class Store:
    """Artifacts and run records below a folder or any URL that `etils.epath` can write.

    Args:
        root: the folder or URL; made with the first artifact.
        there: it must be there already: a store that went away in the middle of a run is not begun anew.

    Raises:
        UserMistake: it is a file, cannot be reached, or is of a newer format than this software reads.
        StoreError: it should be there and is not.
    """

    def __init__(self, root: str | os.PathLike[str], *, there: bool = False):
        try:
            if "://" in str(root):
                _fresh_listings(str(root).partition("://")[0])
            path = epath.Path(root)
            self.root = path if "://" in str(root) else path.resolve()  # Orbax takes absolute paths only
            is_file = self.local and not stat.S_ISDIR(os.stat(self.root).st_mode)
        except FileNotFoundError:
            is_file = False
        except (ValueError, OSError, KeyError) as error:  # KeyError: a kind of URL that is not known
            raise UserMistake(f"store = {str(root)[:100]!r}: cannot be a folder ({error})") from None
        if not self.local:
            _reach(self.root)
        if is_file:
            raise UserMistake(f"{self.root} is a file; a store is a folder. Give another one with --store.")
        # Locks and step checkpoints lie on a disk: in the store, or where this machine keeps them for one on a URL.
        self.near = Path(self.root) if self.local else user_cache() / digest(str(self.root))[:20]
        self.there = there or (self.local and self.format is not None)
        if there:
            self.expect()

    @property
    def local(self) -> bool:
        """Whether the store lies on a file system of this machine."""
        return "://" not in str(self.root)

    @functools.cached_property
    def format(self) -> int | None:
        """The version of the store's format; None where nothing says it.

        Raises:
            UserMistake: it is newer than what this software reads.
        """
        file = self.root / FORMAT_FILE
        with told(f"{file} cannot be read", str(self.root)):
            try:
                version = json.loads(file.read_text())["format"]
                newer = version > FORMAT
            except (FileNotFoundError, NotADirectoryError):
                return None
            except (ValueError, TypeError, KeyError):
                raise DamagedArtifactError(
                    f"{file} is not the file that was written. Delete it if this is a store of this version of "
                    f"prune-jax, {FORMAT}: the next run writes it again."
                ) from None
        if newer:
            raise UserMistake(
                f"{self.root} is a store of format {version}, but this prune-jax reads formats up to {FORMAT}. "
                "Install a newer one (`pip install -U prune-jax`), or name another folder with --store."
            )
        return version

    def expect(self) -> None:
        """Raises `StoreError` if the store, which was there, is not."""
        if self.there and not (self.root / FORMAT_FILE).exists():
            raise StoreError(
                f"the store {self.root} is gone: {FORMAT_FILE}, which was there when the run began, is not. "
                f"Bring it back (mount its disk, move the folder back); {GOES_ON}"
            )

    def make(self, folder: epath.Path | None = None) -> None:
        """Makes a folder of the store, and the store if it was not there before."""
        self.expect()
        if not self.there and self.format is None:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
            except FileNotFoundError:  # as below /proc
                raise StoreError(f"the store {self.root} cannot be made there; name another folder") from None
            replace(self.root / FORMAT_FILE, json.dumps({"format": FORMAT}))
        self.there = True
        (folder or self.root).mkdir(parents=True, exist_ok=True)

    def path(self, ref: Ref) -> epath.Path:
        """The folder of an artifact."""
        return self._below(ref.kind, ref.key)

    def work(self, ref: Ref) -> epath.Path:
        """The folder in which a stage keeps its step checkpoints until it is done."""
        return self._below(ref.kind, f"{ref.key}.work", root=epath.Path(self.near))

    def _below(self, *names: str, root: epath.Path | None = None) -> epath.Path:
        """A path below the root that stays there, whoever wrote the names and the folders.

        Raises:
            DamagedArtifactError: a name leads elsewhere, or a folder on the way is a symbolic link.
        """
        found = root or self.root
        for name in names:
            if not NAME.fullmatch(name):
                raise DamagedArtifactError(f"{name[:100]!r} is no name of the store in {self.root}.")
            found = found / name
            if (root or self.local) and os.path.islink(found):
                raise DamagedArtifactError(
                    f"{found} is a symbolic link, and a store follows none: what lies behind it may be anybody's. Put "
                    "the folder itself there, or give the place that it leads to with --store."
                )
        return found

    def meta(self, ref: Ref) -> dict[str, Any] | None:
        """What is known of a finished artifact; `None` if there is none, nothing if it is damaged."""
        file = self.path(ref) / META
        with told(f"{file} cannot be read", str(self.root)):
            try:
                text = file.read_text()
                meta = json.loads(text)
                sound = _is_meta(meta) and text == _text(meta)
            except (FileNotFoundError, NotADirectoryError):
                # It is in the artifact when that appears; but folders of a remote store do not appear at once.
                return {} if self.local and self.path(ref).exists() else None
            except (ValueError, RecursionError, IsADirectoryError):
                return {}
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                return {}
        return meta if sound else {}

    def damage(self, ref: Ref) -> str | None:
        """Says what is wrong with a finished artifact: the first file that is missing or whose digest differs."""
        return next(self.damages(ref), None)

    def damages(self, ref: Ref) -> Iterator[str]:
        """Says of each file of a finished artifact what is wrong with it."""
        meta = self.meta(ref)
        if meta is None:
            return
        if not meta:
            file = self.path(ref) / META
            yield f"{file} is {'not the file that was written' if file.exists() else 'missing'}"
            return
        folder = self.path(ref)
        if self.local:
            yield from (f"{f} is a symbolic link" for f in Path(folder).rglob("*") if f.is_symlink())
        for name, expected in meta["files"].items():
            file = folder / name
            if not FILE.fullmatch(name) or ".." in name.split("/"):
                yield f"{name[:100]!r} in {META} leads out of it, or is no file's name"
                continue
            wrong = ""
            with told(f"{file} cannot be read", str(self.root)):
                try:
                    if sha256(file) != expected:
                        wrong = f"is not the file that was written (its sha256 differs from {META})"
                except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                    wrong = "is missing"
                except OSError as error:
                    if error.errno not in (errno.EIO, errno.ENAMETOOLONG):
                        raise
                    wrong = "cannot be read from the disk"
            if wrong:
                yield f"{file} {wrong}"

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
            self.expect()
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
            with self._at_hand(ref, meta) as folder, ORBAX:
                with _checkpointer() as checkpointer:
                    found = checkpointer.restore(folder / ARRAYS, args=ocp.args.StandardRestore(target))
        except Exception as error:  # what Orbax raises where arrays are not as meta says; we write no such artifacts
            if isinstance(error, OSError) or not self.local:  # a disk or a network that may come back
                raise
            raise DamagedArtifactError(
                f"{ref.kind}/{ref.key}: its arrays cannot be read ({type(error).__name__}: {shortened(error)}). Remove "
                "its folder and run the recipe again: it will be made anew."
            ) from error
        return nest(flat | leaves_by_path(found)), meta

    @contextlib.contextmanager
    def _at_hand(self, ref: Ref, meta: Mapping[str, Any]) -> Iterator[epath.Path]:
        """The artifact on a disk of this machine: Orbax reads and writes no URLs but `gs://`."""
        if self.local:
            yield self.path(ref)
            return
        with tempfile.TemporaryDirectory() as folder:
            copied = epath.Path(folder)
            for name in meta["files"]:
                copy_file(self.path(ref) / name, copied / name)
            yield copied

    def write(
        self, ref: Ref, arrays: Mapping[str, Any], meta: Mapping[str, Any], files: Mapping[str, bytes] | None = None
    ) -> dict[str, Any]:
        """Publishes an artifact by one rename, on a URL by its last file, and answers its meta; what is there stays.

        Args:
            ref: its name.
            arrays: nested dicts of arrays.
            meta: facts that JSON can hold; digests, versions and the shapes of the arrays are added.
            files: other files by name.
        """
        needed = sum(np.asarray(a).nbytes for a in _flatten(arrays).values()) + sum(map(len, (files or {}).values()))
        with told(f"{ref.kind}/{ref.key} cannot be written", str(self.root), needed):
            full = self._publish(ref, arrays, meta, files or {})
            self.clear_work(ref)
            return full

    def _publish(
        self, ref: Ref, arrays: Mapping[str, Any], meta: Mapping[str, Any], files: Mapping[str, bytes]
    ) -> dict[str, Any]:
        final = self.path(ref)
        self.make(final.parent)
        written = f".{ref.key}.{uuid.uuid4().hex[:8]}.tmp"
        aside = final.parent / written if self.local else epath.Path(tempfile.gettempdir()) / written
        try:
            aside.mkdir(mode=0o777 if self.local else 0o700)
            for name, data in files.items():
                (aside / name).write_bytes(data)
            full = self._fill(aside, ref, arrays, meta)
            if self.meta(ref) is not None:
                if self.intact(ref):  # somebody else was quicker
                    return self.meta(ref) or full
                self.set_aside(ref)
            if self.local:
                aside.rename(final)
                sync(Path(final.parent))
            else:  # there are no folders to rename: without the last file there is no artifact
                for name in (*full["files"], META):
                    copy_file(aside / name, final / name)
        finally:
            if aside.exists():
                aside.rmtree()
        return full

    def _fill(self, aside: epath.Path, ref: Ref, arrays: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, Any]:
        """Writes arrays and meta into a folder."""
        import orbax.checkpoint as ocp

        flat = {p: np.asarray(a) for p, a in _flatten(arrays).items()}
        # Orbax saves no empty arrays; their shape says all.
        filled = {path: array for path, array in flat.items() if array.size}
        if filled:
            with ORBAX, _checkpointer() as checkpointer:
                checkpointer.save(aside / ARRAYS, args=ocp.args.StandardSave(nest(filled)))
        full = {
            "kind": ref.kind,
            "key": ref.key,
            **meta,
            "arrays": {p: [list(a.shape), a.dtype.name] for p, a in flat.items()},
            "versions": versions(),
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "files": {str(f.relative_to(aside)): sha256(f) for f in sorted(files_below(aside))},
        }
        full["digest"] = _digest_of(full)
        (aside / META).write_text(_text(full))
        if self.local:
            sync_all(Path(aside))
        return full

    def set_aside(self, ref: Ref) -> epath.Path:
        """Moves a damaged artifact out of the way; nothing is deleted."""
        moved = self.path(ref).parent / f"{ref.key}.damaged-{uuid.uuid4().hex[:8]}"
        with told(f"{ref.kind}/{ref.key}, which is damaged, cannot be moved aside", str(self.root)):
            if self.local:
                self.path(ref).rename(moved)
            else:
                for file in list(files_below(self.path(ref))):
                    copy_file(file, moved / file.relative_to(self.path(ref)))
                self.path(ref).rmtree()
        return moved

    def clear_work(self, ref: Ref) -> None:
        """Removes the step checkpoints of a finished stage."""
        if self.work(ref).exists():
            self.work(ref).rmtree()

    @contextlib.contextmanager
    def lock(self, ref: Ref, *, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Holds the artifact's lock: a second run waits and then finds the first one's result.

        The kernel lets go of it with the process, so a killed run leaves nothing locked; what it left half written is
        removed by the next who holds the lock. Those of a store on a URL hold among the runs of one machine; two
        machines may make the same artifact, and the one whose last file comes last stays.

        Args:
            ref: the artifact's name.
            waiting: called now and then while another one holds the lock; what it raises ends the wait.
        """
        with told(f"{ref.kind}/{ref.key} cannot be begun", str(self.root)):
            self.make(self.path(ref).parent)
            path = self._locked_by(ref)
            path.parent.mkdir(parents=True, exist_ok=True)
            while (file := locked(path, wait=False)) is None:
                waiting()
                time.sleep(LOCK_POLL)
            os.utime(path)  # tells when it was held last
        with file:
            self._clear_leftovers(ref)
            yield

    def is_held(self, ref: Ref) -> bool:
        """Whether somebody holds, or has held, the artifact's lock."""
        return self._locked_by(ref).exists()

    def _locked_by(self, ref: Ref) -> Path:
        return Path(self.work(ref)).parent / f".{ref.key}.lock"

    @contextlib.contextmanager
    def at_work(self, refs: Iterable[Ref]) -> Iterator[None]:
        """Says that a run is at work which needs these artifacts, and those that it locks: none of them is removed."""
        with told("the run cannot be begun", str(self.root)):
            self.make(self.root / "runs")
            if not self.local:
                file = None
            else:
                with self.gate():
                    path = Path(self.root) / "runs" / f".{uuid.uuid4().hex[:8]}{AT_WORK}"
                    file = locked(path)
                    path.write_text(json.dumps([f"{ref.kind}/{ref.key}" for ref in refs]))
        try:
            yield
        finally:
            if file is not None:
                with contextlib.suppress(OSError):  # a disk that is away: the lock goes with the process
                    path.unlink()
                file.close()

    @contextlib.contextmanager
    def gate(self) -> Iterator[None]:
        """While it is held no run begins, and nobody else removes anything."""
        file = locked(Path(self.root) / "runs" / GATE)
        assert file is not None
        with file:
            yield

    def _clear_leftovers(self, ref: Ref) -> None:
        for aside in self.near.glob(f"{ref.kind}/.{ref.key}.*.tmp"):
            shutil.rmtree(aside)
        if self.meta(ref):
            self.clear_work(ref)

    def steps(self, ref: Ref) -> Steps:
        """The step checkpoints of a stage at work."""
        with told(f"{ref.kind}/{ref.key} cannot be begun", str(self.root)):
            self.make(self.path(ref).parent)
            return Steps(self.work(ref), self)

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

    def champion_path(self, name: str) -> epath.Path:
        """Where a champion and its history lie."""
        check_run_name(name)
        return self._below(CHAMPIONS, f"{name}.json")

    def search_path(self, name: str) -> epath.Path:
        """Where what came of a search lies."""
        check_run_name(name)
        return self._below(SEARCHES, f"{name}.json")

    def runs(self) -> list[str]:
        """The names of all runs, the latest last."""
        folder = self.root / "runs"
        if not folder.exists():
            return []
        if self.local and os.path.islink(folder):
            return []
        named = [p for p in folder.iterdir() if is_run_name(p.name) and not (self.local and os.path.islink(p))]
        records = [p / "run.json" for p in named if (p / "run.json").exists()]
        return [r.parent.name for r in sorted(records, key=age)]

    def write_record(self, record: Mapping[str, Any]) -> epath.Path:
        """Writes a run's record by one rename; the record of an earlier run of that name goes to `history/`, whole."""
        path = self.record_path(record["name"])
        with told(f"the record of run {record['name']!r} cannot be written", str(self.root)):
            self.make(path.parent)
            with (locked(Path(path.parent) / ".lock") if self.local else None) or contextlib.nullcontext():
                others = [age(self.record_path(name)) for name in self.runs()]
                if path.exists():
                    history = self._below("runs", record["name"], "history")
                    history.mkdir(parents=True, exist_ok=True)
                    last = max((int(p.stem) for p in history.iterdir() if p.stem.isdigit()), default=0)
                    text = path.read_text()
                    if not last or (history / f"{last}.json").read_text() != text:  # else one was killed in between
                        replace(history / f"{last + 1}.json", text, path.stat().mtime)
                replace(path, _text(record))
                if self.local and others and age(path) <= max(others):  # the clock was set back: the last is the latest
                    os.utime(path, (max(others)[0] + 0.01,) * 2)
        return path


def age(record: epath.Path) -> tuple[float, str]:
    """What orders records: when it was written, or begun where the store knows no times of files, then by name."""
    return record.stat().mtime or _begun(record), record.parent.name


def _begun(record: epath.Path) -> float:
    try:
        return calendar.timegm(time.strptime(json.loads(record.read_text())["started"], "%Y-%m-%dT%H:%M:%SZ"))
    except (ValueError, TypeError, KeyError):
        return 0.0


def _fresh_listings(scheme: str) -> None:
    """Has listings of a URL asked for each time: others write there, too."""
    try:
        import fsspec
    except ImportError:
        return  # what reads says so
    fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)


def _reach(root: epath.Path) -> None:
    """Refuses a URL that cannot be asked anything: no package for it, no server, no rights."""
    scheme = str(root).partition("://")[0]
    try:
        root.exists()
    except ImportError as error:
        package = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}.get(scheme, "a package of fsspec for it")
        raise UserMistake(f"store = {str(root)!r}: needs {package} ({error}); run `pip install {package}`") from None
    except Exception as error:  # whatever the package raises for its network and its rights
        raise UserMistake(
            f"store = {str(root)!r}: cannot be reached ({type(error).__name__}: {error}). Check its name, the network "
            "and this user's credentials"
        ) from error


def write_anew(path: epath.Path, data: bytes) -> None:
    """Writes a file by one rename: a symbolic link that stood there is replaced, and nothing behind it touched."""
    aside = path.parent / f".{path.name[:100]}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        aside.write_bytes(data)
        aside.replace(path)
    finally:
        if aside.exists():
            aside.unlink()


def _alone() -> Any:
    """Has Orbax wait for no other host: one writes, and each reads, when it likes."""
    from orbax.checkpoint.options import MultiprocessingOptions

    if (hosts := group()) is None:
        return MultiprocessingOptions()
    this = hosts.index
    return MultiprocessingOptions(primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"host{this}")


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp

    options = _alone()
    return ocp.Checkpointer(
        ocp.StandardCheckpointHandler(multiprocessing_options=options), multiprocessing_options=options
    )


class Steps:
    """Step checkpoints of one stage at work, kept by Orbax's manager; a killed stage goes on from the last."""

    def __init__(self, folder: epath.Path, store: Store, *, keep: int = KEPT_STEPS):
        import orbax.checkpoint as ocp

        self._ocp, self._folder, self._store = ocp, folder, store
        folder.mkdir(parents=True, exist_ok=True)  # Orbax makes it for all hosts together only
        self._manager = ocp.CheckpointManager(
            folder.resolve() if "://" not in str(folder) else folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                cleanup_tmp_directories=True,
                create=False,
                enable_async_checkpointing=False,
                multiprocessing_options=_alone(),
            ),
        )

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def latest(self, like: Any) -> tuple[int, Any] | None:
        """The last complete step and its tree, shaped like `like` (arrays or shapes); `None` if there is none."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            if self._sound(step):
                with ORBAX:
                    return step, self._manager.restore(step, args=self._ocp.args.StandardRestore(like))
            self._manager.delete(step)
        return None

    def read(self, step: int, like: Any) -> Any:
        """The tree of a step that another host has found to be complete."""
        with ORBAX:
            return self._manager.restore(step, args=self._ocp.args.StandardRestore(like))

    def _sound(self, step: int) -> bool:
        """Whether a step's files are those that were saved; of a step without a digest, as older ones are, no doubt."""
        digests = self._digests(step)
        try:
            return not digests.exists() or json.loads(digests.read_text()) == self._files_of(step)
        except ValueError:
            return False

    def _digests(self, step: int) -> epath.Path:
        return self._folder / f"{step}.{META}"

    def _files_of(self, step: int) -> dict[str, str]:
        folder = self._folder / str(step)
        return {str(file.relative_to(folder)): sha256(file) for file in sorted(files_below(folder))}

    def save(self, step: int, tree: Any) -> None:
        """Saves a step; one that is already there stays."""
        doing = f"step {step} of {self._folder.parent.name}/{self._folder.stem} cannot be saved"
        needed = sum(getattr(leaf, "nbytes", 8) for leaf in leaves_by_path({"": tree}).values())
        with ORBAX, told(doing, str(self._store.root), needed):
            self._store.expect()
            if step in self._manager.all_steps():
                return
            try:
                self._manager.save(step, args=self._ocp.args.StandardSave(tree))
            except Exception:
                for half in self._folder.glob(f"{step}.*tmp*"):  # no room is to be taken by what nobody can read
                    half.rmtree()
                raise
            replace(self._digests(step), json.dumps(self._files_of(step)))
            for old in self._folder.glob(f"*.{META}"):
                if int(old.name.partition(".")[0]) not in self._manager.all_steps():
                    old.unlink()


def _digest_of(meta: Mapping[str, Any]) -> str:
    return digest({name: value for name, value in meta.items() if name != "digest"})


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, allow_nan=False)


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
            and all(
                isinstance(kind, str) and isinstance(key, str)
                for kind, key in meta.get("call", {}).get("inputs", {}).values()
            )
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
