"""Disks that fail under a stage at work: full, read-only, forbidden, moved away, files limited in size.

They are done for real, to a small file system of memory in a mount namespace of a child's own (`unshare`, `mount`),
from which the right to ignore permissions is taken (`setpriv`). The child is
`python -m tests.faults.disks FOLDER FAULT TIMES`.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from prune_jax.checkpoints import Store
from prune_jax.errors import PruneError
from prune_jax.preparation import prepare
from prune_jax.recipe import read_recipe
from prune_jax.stages import run_stage
from prune_jax.trees import leaves_by_path
from prune_jax.verification import verify
from prune_jax.walk import failure, walk
from tests.faults.table import Outcome, fault
from tests.plain import EVALUATE, TRAIN, run_plain, same_bytes, tiny

SMALL = tiny(validation=0, model={"kind": "linear"}, train={**TRAIN, "steps": 3}, evaluate={**EVALUATE, "of": "train"})
MEGABYTES = 5
CHILD = (
    "mount -t tmpfs -o size={size}m none {folder} && exec setpriv --bounding-set=-dac_override,-dac_read_search {run}"
)


def fill(store: Path) -> Callable[[], None]:
    """Fills the disk to its last byte."""
    ballast = store.parent / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
    return ballast.unlink


def almost_fill(store: Path) -> Callable[[], None]:
    """Leaves room for the start of an artifact and not for its end."""
    undo = fill(store)
    os.truncate(store.parent / "ballast", (store.parent / "ballast").stat().st_size - 4096)
    return undo


def mount_read_only(store: Path) -> Callable[[], None]:
    for how in (["--bind", store, store], ["-o", "remount,bind,ro", store]):
        subprocess.run(["mount", *how], check=True)
    return lambda: subprocess.run(["umount", "-l", store], check=True) and None


def forbid(store: Path) -> Callable[[], None]:
    folders = [store, *(path for path in store.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o500)
    return lambda: [folder.chmod(0o700) for folder in folders] and None


def move_away(store: Path) -> Callable[[], None]:
    away = store.rename(store.parent / "away")
    return lambda: away.rename(store) and None


def limit(store: Path) -> Callable[[], None]:
    """No file of more than a few bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


FAULTS = {
    "full disk": (fill, "the disk is full"),
    "disk that fills while it is written": (almost_fill, "the disk is full"),
    "read-only disk": (mount_read_only, "the disk is read-only"),
    "no permission": (forbid, "this user has no permission"),
    "store moved away": (move_away, "is gone"),
    "files limited in size": (limit, "a file would become larger than this process may write"),
}


def disturb(folder: Path, name: str, seed: int, undisturbed: Store) -> str:
    """Runs, with a disk that fails in the middle of one of the stages, and again; answers what was wrong."""
    inject, text = FAULTS[name]
    store = Store(folder / "store")
    plan = prepare(read_recipe(SMALL))
    stages = ["train"] if inject is almost_fill else ["train", "evaluate"]  # the other takes no page
    chosen = random.Random(seed).choice(stages)
    undo: list[Callable[[], None]] = []
    store.make()

    def submit(call, done):
        def report(progress):
            if call.name == chosen and not undo:
                undo.append(inject(Path(store.root)))

        try:
            done(run_stage(call, Store(store.root, there=True), report=report))
        except PruneError as error:
            done(failure(call, error))

    first = walk(plan, store, submit)
    for back in undo:
        back()
    failed = [result for result in first.values() if result.status == "failed"]
    if [result.name for result in failed] != [chosen]:
        return f"{chosen} should have failed: {[(r.name, r.status, r.message) for r in first.values()]}"
    message = failed[0].message
    if text not in message or str(store.root) not in message or "the same command goes on" not in message:
        return f"told as: {message}"
    if "full" in name and "free" not in message:
        return f"room is not told: {message}"
    if not verify(store).intact or list(Path(store.root).rglob("*.tmp")):
        return f"left behind: {sorted(map(str, Path(store.root).rglob('*')))}"
    _, second = run_plain(SMALL, store)
    for result in second.values():
        if result.status != ("cached" if first[result.name].good else "ran"):
            return f"{result.name} {result.status} the second time"
        same_bytes(leaves_by_path(store.read(result.ref)[0]), leaves_by_path(undisturbed.read(result.ref)[0]))
        if result.metrics != undisturbed.read(result.ref)[1]["metrics"]:
            return f"other metrics of {result.name}: {result.metrics}"
    return ""


def main(folder: Path, name: str, times: int) -> None:
    """In the child: disturbs so often, and prints what was wrong."""
    with tempfile.TemporaryDirectory() as elsewhere:
        undisturbed = Store(Path(elsewhere) / "store")
        run_plain(SMALL, undisturbed)
        wrong = []
        for seed in range(times):
            wrong.append(disturb(folder, name, seed, undisturbed))
            shutil.rmtree(folder / "store", ignore_errors=True)
    sys.stdout.write(json.dumps(wrong))


def on_a_small_disk(name: str, times: int) -> list[str]:
    """What was wrong each time; empty texts if nothing was."""
    with tempfile.TemporaryDirectory(prefix="disk-") as folder:
        run = f"{sys.executable} -m {__name__} {folder} '{name}' {times}"
        command = CHILD.format(size=MEGABYTES, folder=folder, run=run)
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def possible() -> bool:
    """Whether this machine lets us mount and take rights away."""
    if not all(shutil.which(program) for program in ("unshare", "mount", "setpriv")):
        return False
    with tempfile.TemporaryDirectory() as folder:
        command = CHILD.format(size=1, folder=folder, run="true")
        return not subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True).returncode


def _register(name: str) -> None:
    @fault(f"disk: {name}")
    def inject(times: int) -> Outcome:
        began = time.perf_counter()
        wrong = [text for text in on_a_small_disk(name, times) if text]
        for text in wrong:
            sys.stderr.write(f"{text}\n")
        return Outcome(times, times - len(wrong), len(wrong), time.perf_counter() - began)


for _name in FAULTS:
    _register(_name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
