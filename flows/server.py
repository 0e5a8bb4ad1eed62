"""Prefect's server: whether the user has one, and a temporary one that starts while other work goes on.

`python -m prune_jax.flows.server SOCKET` is that temporary one.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import gc
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, get_current_settings, temporary_settings

from prune_jax.errors import PruneError

PATIENCE = 600  # seconds that a start may take: the first one writes the database, and many may start at once
# Tables are made in turn, below. Prefect's hundred kinds of blocks, which no flow of ours uses, are not written at all.
QUICK = {"PREFECT_SERVER_DATABASE_MIGRATE_ON_START": "false", "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false"}
STARTING = threading.Lock()  # runs in several threads share one server


class Temporary(NamedTuple):
    """A server that lives no longer than this process."""

    process: subprocess.Popen[bytes]
    port: int


def configured() -> bool:
    """Whether `PREFECT_API_URL` is set, in the environment or in the active profile."""
    return bool(get_current_settings().api.url)


class Facts(NamedTuple):
    """How Prefect is set up here, and whether its server answers."""

    profile: str
    home: Path
    url: str = ""  # none: a run has a temporary server
    fault: str = ""  # why it does not answer
    version: str = ""
    milliseconds: float = 0.0
    limited: tuple[str, ...] = ()  # tags with a limit, `gpu: 1`


def look() -> Facts:
    """Asks the server that is set, once, and starts none."""
    from prefect import get_client
    from prefect.context import get_settings_context
    from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_CLIENT_MAX_RETRIES

    settings = get_current_settings()
    url = re.sub("//[^/@]*@", "//", str(settings.api.url or ""))  # without a password
    here = Facts(get_settings_context().profile.name, settings.home, url)
    if not here.url:
        return here
    try:
        patience = {PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: 10}
        with temporary_settings(patience), get_client(sync_client=True) as client:
            version = client.api_version()
            begun = time.perf_counter()
            limits = client.read_global_concurrency_limits(limit=200)
            milliseconds = 1000 * (time.perf_counter() - begun)
    except Exception as error:  # an HTTPError, or what Prefect makes of it
        return here._replace(fault=f"{type(error).__name__}: {error}")
    limited = tuple(f"{it.name.removeprefix('tag:')}: {it.limit}" for it in limits if it.name.startswith("tag:"))
    return here._replace(version=version, milliseconds=milliseconds, limited=limited)


def start_early() -> Temporary:
    """Starts a temporary server in a process of its own and does not wait for it; one that runs already stays.

    Its start takes seconds: time to import Flax and check the recipe. Prefect would start the same by itself, but from
    a module whose import alone takes this process two seconds more.
    """
    with STARTING:
        if _start().process.poll() is not None:
            _start.cache_clear()
        return _start()


@functools.lru_cache(maxsize=1)
def _start() -> Temporary:
    # It is handed a socket that listens already: no other program can take the port, and requests wait until it is up.
    with socket.create_server(("127.0.0.1", 0)) as listening:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(listening.fileno())],
            env={**os.environ, **get_current_settings().to_environment_variables(exclude_unset=True), **QUICK},
            pass_fds=[listening.fileno()],
            stdin=subprocess.PIPE,  # closed when this process ends, however it ends
            process_group=0,  # Ctrl-C is for this process, which has things to tell the server then
        )
        atexit.register(_stop, process)
        return Temporary(process, listening.getsockname()[1])


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def in_use(server: Temporary) -> Iterator[None]:
    """Has Prefect's clients speak to a temporary server, once it answers.

    Raises:
        PruneError: it does not start.
    """
    _await(server)
    url = f"http://127.0.0.1:{server.port}/api"
    with temporary_settings({PREFECT_API_URL: url, PREFECT_UI_URL: ""}):  # it has no pages: no links to them
        yield


def _await(server: Temporary) -> None:
    begun = time.monotonic()
    while not _answers(server.port):
        code, waited = server.process.poll(), time.monotonic() - begun
        if code is not None or waited > PATIENCE:
            end = f"ended with exit code {code}" if code is not None else f"did not answer within {waited:.0f} s"
            raise PruneError(
                f"Prefect's temporary server {end}; what it wrote stands above. Its database lies in "
                f"{get_current_settings().home}: make sure that it can be written there, or set PREFECT_API_URL to a "
                "server that runs."
            )
        time.sleep(0.05)


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
    try:
        connection.request("GET", "/api/health")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@contextmanager
def _turn() -> Iterator[None]:
    """Waits until no other server is making tables in this home: SQLite has two that do so at once fail."""
    import fcntl

    home = get_current_settings().home
    home.mkdir(parents=True, exist_ok=True)
    with open(home / ".prune-jax.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def serve(descriptor: int) -> None:
    """Serves Prefect's API on a socket, without pages and background services, as long as stdin is open."""
    gc.set_threshold(50_000)  # imports make what stays: a quarter of their time went into looking for garbage
    import uvicorn
    from prefect.server.api.server import create_app
    from prefect.server.database import provide_database_interface

    def end_with_parent() -> None:
        os.read(sys.stdin.fileno(), 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_with_parent, daemon=True).start()
    with _turn():
        asyncio.run(provide_database_interface().create_db())
    uvicorn.run(create_app(ephemeral=True, final=True), fd=descriptor, log_level="error", lifespan="on")


if __name__ == "__main__":
    serve(int(sys.argv[1]))
