"""Files of artifacts changed at random: each is found and named, and made anew; nothing else is."""

from __future__ import annotations

import functools
import os
import random
import shutil
import tempfile
import time
from pathlib import Path

from prune_jax.checkpoints import Store
from prune_jax.recipe import Ref
from prune_jax.trees import leaves_by_path
from prune_jax.verification import verify
from tests.faults.table import Outcome, fault
from tests.plain import EVALUATE, PRUNE, TRAIN, run_plain, same_bytes, tiny

SMALL = tiny(validation=0, model={"kind": "linear"}, train={**TRAIN, "steps": 2}, prune=PRUNE)
WHOLE = tiny(
    train=TRAIN,
    prune={**PRUNE, "criterion": "taylor", "finetune": {"steps": 2}},
    evaluate=EVALUATE,
    export={"kind": "export", "of": "prune", "formats": ["safetensors"]},
)


def flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def cut(file: Path, rng: random.Random) -> None:
    os.truncate(file, rng.randrange(file.stat().st_size))


def delete(file: Path, rng: random.Random) -> None:
    file.unlink()


def empty(file: Path, rng: random.Random) -> None:
    file.write_bytes(b"")


def append(file: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes() + rng.choice([b"\n", b"\0", b" ", rng.randbytes(20)]))


DAMAGES = (flip, cut, delete, empty, append)


@functools.cache
def undisturbed(small: bool) -> Path:
    """A store in which the recipe ran and nothing happened."""
    root = Path(tempfile.mkdtemp(prefix="undisturbed-")) / "store"
    run_plain(SMALL if small else WHOLE, Store(root))
    return root


def contents(root: Path) -> dict[str, bytes]:
    """Every file of every artifact but what tells time: those of a run without disturbance are known by it."""
    names = (p for p in sorted(root.glob("*/*/**/*")) if p.is_file() and p.relative_to(root).parts[0] != "runs")
    return {str(p.relative_to(root)): p.read_bytes() for p in names if ".damaged-" not in str(p)}


def same_results(store: Store, ref: Ref, before: Path) -> bool:
    """Whether an artifact that was made anew has the arrays, files and metrics of the first."""
    old = Store(before)
    (arrays, meta), (others, its) = store.read(ref), old.read(ref)
    same_bytes(leaves_by_path(arrays), leaves_by_path(others))
    beside = {name: digest for name, digest in meta["files"].items() if "/" not in name}  # Orbax draws its names
    return meta["metrics"] == its["metrics"] and beside.items() <= its["files"].items()


def corrupt_once(seed: int, small: bool) -> bool:
    """Damages one file of a copy of the store; whether it was found, and healed, and nothing else was touched."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(shutil.copytree(undisturbed(small), Path(folder) / "store"))
        root, whole = Path(store.root), contents(Path(store.root))
        name = rng.choice([name for name, content in whole.items() if content])
        kind, key, *_ = Path(name).parts
        DAMAGES[seed % len(DAMAGES)](root / name, rng)
        damaged = {v.ref: v.damages for v in verify(store).verdicts if v.damages}
        if list(damaged) != [(kind, key)] or not damaged[Ref(kind, key)][0].startswith(str(root / name)):
            return False
        _, results = run_plain(SMALL if small else WHOLE, store)
        ran = {result.ref for result in results.values() if result.status == "ran"}
        after = contents(root)
        others = {n for n in whole if not n.startswith(f"{kind}/{key}/")}
        return (
            ran == {(kind, key)}
            and all(after[n] == whole[n] for n in others)
            and verify(store).intact
            and same_results(store, Ref(kind, key), undisturbed(small))
        )


@fault("corrupt a file of an artifact: a bit, cut off, gone, empty, longer")
def corrupt(times: int, *, small: bool = False) -> Outcome:
    undisturbed(small)
    began = time.perf_counter()
    survived = sum(corrupt_once(seed, small) for seed in range(times))
    return Outcome(times, survived, times - survived, time.perf_counter() - began)


@fault("corrupt a step checkpoint")
def corrupt_step(times: int) -> Outcome:
    """The last of two steps is damaged: what is gone on from is the one before, never the damaged one."""
    import numpy as np

    began, survived = time.perf_counter(), 0
    for seed in range(times):
        rng = random.Random(seed)
        with tempfile.TemporaryDirectory() as folder:
            store, ref = Store(Path(folder) / "store"), Ref("train", "k" * 20)
            trees = [{"w": np.arange(300, dtype=np.float32) * (i + 1)} for i in range(2)]
            with store.steps(ref) as steps:
                for i, tree in enumerate(trees):
                    steps.save(i, tree)
            files = [p for p in (Path(store.work(ref)) / "1").rglob("*") if p.is_file() and p.stat().st_size]
            DAMAGES[seed % len(DAMAGES)](rng.choice(sorted(files)), rng)
            with store.steps(ref) as steps:
                found = steps.latest(trees[0])
            survived += found is not None and found[0] == 0 and np.array_equal(found[1]["w"], trees[0]["w"])
    return Outcome(times, survived, times - survived, time.perf_counter() - began)
