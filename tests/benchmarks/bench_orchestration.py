"""What the command costs beside its stages: whole runs with and without a server, a second run, imports, help."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.benchmarks.rounds import Figure, figure

RECIPE = "lenet-300-100"
SCRIPTS = Path(sys.executable).parent
COMMAND = SCRIPTS / "prune-jax"

# The command, with each process, port and connection that it opens written down.
AUDITED = """
import sys
seen = {"subprocess.Popen", "os.system", "os.fork", "os.posix_spawn", "socket.bind", "socket.connect"}
def hook(event, arguments):
    if event in seen:
        sys.stderr.write(f"OPENED {event} {arguments}\\n")
sys.addaudithook(hook)
from prune_jax.cli import main
main()
"""


def _surroundings(home: Path, **more: str) -> dict[str, str]:
    """The environment without Prefect's settings but these."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return {**kept, "PREFECT_HOME": str(home), "DO_NOT_TRACK": "1", **more}


def _timed(*command: str | Path, cwd: Path, env: Mapping[str, str]) -> tuple[float, subprocess.CompletedProcess[str]]:
    begun = time.perf_counter()
    done = subprocess.run([*map(str, command)], cwd=cwd, env=dict(env), capture_output=True, text=True)
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stderr}")
    return seconds, done


def _beside_its_stages(store: Path, env: Mapping[str, str]) -> tuple[float, float]:
    """Seconds of a whole run without those of its stages, and of the stages."""
    wall, done = _timed(COMMAND, "run", RECIPE, "--store", store, "--json", cwd=store.parent, env=env)
    stages = json.loads(done.stdout)["stages"].values()
    assert all(stage["status"] == "ran" for stage in stages)
    inside = sum(stage["seconds"] for stage in stages)
    return wall - inside, inside


def _opened_by_a_second_run(store: Path, home: Path) -> list[str]:
    arguments = ("run", RECIPE, "--store", store)
    _, done = _timed(sys.executable, "-c", AUDITED, *arguments, cwd=store.parent, env=_surroundings(home))
    database = [str(path) for path in home.rglob("*.db")] if home.exists() else []
    return [line for line in done.stderr.splitlines() if line.startswith("OPENED")] + database


@contextmanager
def _server(home: Path) -> Iterator[str]:
    """A Prefect server on a free port, and its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = _surroundings(home, PREFECT_SERVER_ANALYTICS_ENABLED="false")
    command = [str(SCRIPTS / "prefect"), "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with open(home.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            _await(f"http://127.0.0.1:{port}/api/health", process)
            yield f"http://127.0.0.1:{port}/api"
        finally:
            process.terminate()
            process.wait(timeout=30)


def _await(url: str, process: subprocess.Popen[bytes], patience: float = 120) -> None:
    begun = time.monotonic()
    while process.poll() is None and time.monotonic() - begun < patience:
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"the server did not answer at {url}")


def measure(rounds: int = 3, quick_rounds: int = 7) -> dict[str, Figure]:
    seconds: dict[str, list[float]] = {}

    def note(measure: str, value: float) -> None:
        seconds.setdefault(measure, []).append(value)

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        used, untouched, store = root / "used", root / "untouched", root / "store"
        _beside_its_stages(store, _surroundings(used))
        with _server(root / "server") as url:
            for i in range(rounds):
                for j, (way, env) in enumerate(
                    {
                        "temporary server, first in its home": _surroundings(root / f"home-{i}"),
                        "temporary server": _surroundings(used),
                        "running server": _surroundings(root / "client", PREFECT_API_URL=url),
                    }.items()
                ):
                    beside, inside = _beside_its_stages(root / f"store-{i}-{j}", env)
                    note(f"run beside its stages, {way}", beside)
                    note("run: its stages", inside)
        opened = _opened_by_a_second_run(store, untouched)
        for _ in range(quick_rounds):
            env = _surroundings(untouched)
            for name, command in {
                "run with nothing to compute": (COMMAND, "run", RECIPE, "--store", store),
                "prune-jax --help": (COMMAND, "--help"),
                "import jax": (sys.executable, "-c", "import jax"),
                "import prune_jax": (sys.executable, "-c", "import prune_jax"),
                "import prune_jax, all that it offers": (sys.executable, "-c", "from prune_jax import *"),
            }.items():
                note(name, _timed(*command, cwd=root, env=env)[0])
    found = {name: figure(values, "s") for name, values in seconds.items()}
    found["run with nothing to compute: processes and ports opened"] = figure([len(opened)])
    for name in ("import prune_jax", "import prune_jax, all that it offers"):
        pairs = zip(seconds[name], seconds["import jax"], strict=True)
        found[f"{name} / import jax"] = figure([ours / jax for ours, jax in pairs])
    return found
