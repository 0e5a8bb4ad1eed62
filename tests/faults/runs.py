"""A small recipe through every kind of stage, the processes that run it, and what is compared afterwards."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from prune_jax.checkpoints import Store
from prune_jax.recipe import Ref
from prune_jax.trees import leaves_by_path

NAME = "tiny"
PATIENCE = 900  # seconds that a run may take on a machine that others use, too
ADAM = {"learning_rate": 0.01}


def recipe(
    seconds: float = 0.02, steps: int = 40, rounds: int = 2, formats: tuple[str, ...] = ("stablehlo", "safetensors")
) -> Any:
    """Train, rounds of score, mask and finetune, compact, evaluate, export; records come slowly, `seconds` each.

    A checkpoint at the first beat of each training, and then as often as may be.
    """
    recovery = {"steps": steps // 2, "optimizer": ADAM}
    return {
        "name": NAME,
        "data": {
            "source": "tests.samples.tiny:slow_records",
            "args": {"seconds": seconds},
            "batch_size": 9,
            "validation": 0.2,
        },
        "model": {"kind": "mlp", "widths": [6]},
        "objective": "classification",
        "stages": {
            "train": {"kind": "train", "steps": steps, "optimizer": ADAM, "checkpoint_seconds": 0},
            "prune": {
                "kind": "prune",
                "criterion": "taylor",
                "granularity": "group",
                "target": {"sparsity": 0.5},
                "schedule": {"kind": "iterative", "rounds": rounds},
                "finetune": recovery,
                "checkpoint_seconds": 0,
            },
            "compact": {"kind": "compact"},
            "evaluate": {"kind": "evaluate", "of": ["train", "prune", "compact"], "latency": None},
            "export": {"kind": "export", "of": "compact", "formats": list(formats)},
        },
    }


class Process(Protocol):
    """What runs a recipe: a command, or a fork of a process that has everything imported."""

    pid: int

    def poll(self) -> int | None:
        """The exit code, or nothing while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, in the end."""


def environment(home: Path, url: str | None = None) -> dict[str, str]:
    """That of a user with one device, a Prefect home of their own and perhaps a server."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_") and k != "XLA_FLAGS"}
    given = {"PREFECT_HOME": str(home), "JAX_PLATFORMS": "cpu", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    return {**kept, **given, **({"PREFECT_API_URL": url} if url else {})}


def command(raw: Any, store: Path, env: dict[str, str], at: Path | None = None) -> subprocess.Popen[str]:
    """`prune-jax run` in a process of its own; recipe and what it says go to files in the folder `at`."""
    at = at or store.parent
    path = at / f"{store.name}.yaml"
    path.write_text(json.dumps(raw))
    with open(at / f"{store.name}.{time.time_ns()}.log", "w") as log:
        script = "import sys; from prune_jax.cli import main; sys.exit(main())"
        words = [sys.executable, "-c", script, "run", str(path), "--store", str(store)]
        return subprocess.Popen(words, env=env, stdout=log, stderr=log, text=True, stdin=subprocess.DEVNULL)


def finished(store: Path) -> dict[str, str]:
    """The artifacts of a store that are finished, and the digest of each one's `meta.json`."""
    metas = store.glob("*/[!.]*/meta.json")
    return {f"{m.parent.parent.name}/{m.parent.name}": hashlib.sha256(m.read_bytes()).hexdigest() for m in metas}


def contents(store: Path) -> dict[str, str]:
    """Digests of what is in each artifact: its arrays, its other files, its metrics; no times."""
    found = {}
    for name in finished(store):
        arrays, meta = Store(store).read(Ref(*name.split("/")))
        told = hashlib.sha256()
        for path, array in sorted(leaves_by_path(arrays).items()):
            told.update(f"{path} {array.dtype} {array.shape}".encode() + np.asarray(array).tobytes())
        files = {k: v for k, v in meta["files"].items() if not k.startswith("arrays/")}
        metrics = {k: v for k, v in meta["metrics"].items() if k != "resumed_from_step"}
        told.update(json.dumps([files, metrics], sort_keys=True).encode())
        found[name] = told.hexdigest()
    return found


def records(store: Path, name: str = NAME) -> list[dict[str, Any]]:
    """All records of a run, the latest last."""
    folder = store / "runs" / name
    files = sorted(folder.glob("history/*.json"), key=lambda p: int(p.stem))
    return [json.loads(p.read_text()) for p in [*files, folder / "run.json"] if p.exists()]


def leftovers(store: Path) -> list[str]:
    """What no finished run should leave: half-written artifacts and records, step checkpoints."""
    found = [
        *store.glob("*/.*.tmp"),
        *store.glob("*/*.work"),
        *store.glob("*/*.damaged-*"),
        *store.glob("runs/*/.*.tmp"),
    ]
    return [str(p.relative_to(store)) for p in found]


def last_steps(store: Path) -> dict[str, int]:
    """The last complete step checkpoint of each training at work."""
    steps: dict[str, int] = {}
    for folder in store.glob("*/*.work/*"):
        if folder.name.isdigit():
            name = f"{folder.parent.parent.name}/{folder.parent.name.removesuffix('.work')}"
            steps[name] = max(steps.get(name, 0), int(folder.name))
    return steps


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return int(it.getsockname()[1])


class PrefectServer:
    """A user's own server on loopback: it can be stopped and started again on the same port and database."""

    def __init__(self, home: Path):
        self.home, self.port = home, free_port()
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.env = environment(home)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it and waits until it answers."""
        words = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        self.home.mkdir(parents=True, exist_ok=True)
        with open(self.home / "server.log", "a") as log:
            self.process = subprocess.Popen(
                [*words, "--no-ui"], env=self.env, stdout=log, stderr=log, start_new_session=True
            )
        until(self.answers, "the server answers")

    def answers(self) -> bool:
        """Whether it is up."""
        try:
            return bool(urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        """Ends it as a power cut would: it and what it started."""
        if self.process is not None:
            kill_session(self.process)

    def __enter__(self) -> PrefectServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def kill_session(process: subprocess.Popen[Any]) -> None:
    """kill -9 of a process that leads a session, and of all in its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def until(condition: Any, what: str, patience: float = 300, every: float = 0.1) -> Any:
    """Waits until `condition()` is true and answers what it answered."""
    begun = time.monotonic()
    while not (found := condition()):
        if time.monotonic() - begun > patience:
            raise TimeoutError(f"{what}: not within {patience} s")
        time.sleep(every)
    return found


@contextlib.contextmanager
def clock() -> Iterator[Any]:
    """Answers a function that tells the seconds so far."""
    begun = time.monotonic()
    yield lambda: time.monotonic() - begun
