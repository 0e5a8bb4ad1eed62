"""Ray's heads and nodes. The one room that knows Ray; it imports it late, since Ray reads its settings then."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from prefect_ray import RayTaskRunner
from prefect_ray.context import remote_options
from prefect_ray.task_runners import PrefectRayFuture
from prune_jax.flows import clusters

from prune_jax.errors import UserMistake

START = 120  # seconds that a process of Ray may take to start, import what it needs and answer
MEMORY = 100_000_000  # bytes for Ray's objects, which are calls and results; it takes no less than 75 MB
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}  # stdout is for the run record
EACH: dict[str, dict[str, Any]] = {  # what a stage takes where the cluster has it: one device, and nobody beside it
    "CPU": {"num_cpus": 1},
    "GPU": {"num_gpus": 1},
    "TPU": {"resources": {"TPU": 1}},
}
HERE = {  # for processes of this machine
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # heard on Linux, too: all ports on loopback
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else, below `uv run`, the working folder is packed for the workers
    "RAY_enable_metrics_collection": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Future(PrefectRayFuture):
    """Prefect's future, which tells of its end in a new thread; nothing waits for it until then.

    Ray tells in the thread that its answers come by, where asking for one could wait for ever.
    """

    def add_done_callback(self, fn: Callable[[Any], Any]) -> None:
        """Calls `fn` with this future when it is done."""
        super().add_done_callback(lambda future: threading.Thread(target=fn, args=(future,)).start())


class Runner(RayTaskRunner):
    """Prefect's runner, with such futures."""

    def submit(self, *args: Any, **kwargs: Any) -> Future:
        """As Prefect's."""
        future = super().submit(*args, **kwargs)
        return Future(future.task_run_id, future.wrapped_future)


@contextmanager
def connected(address: str) -> Iterator[clusters.Cluster]:
    """The nodes of a head, `ray://HOST:10001` or `HOST:6379`, or the processes of `local:N`.

    Raises:
        UserMistake: no head answers there, or this process uses Ray already.
    """
    count = clusters.local_processes(address)
    for name, value in HERE.items() if count else ():
        os.environ.setdefault(name, value)

    import ray

    if ray.is_initialized():
        raise UserMistake(
            f"runner = 'ray={address}': this process is connected to Ray already; call ray.shutdown() before, and have "
            "one such run at a time"
        )
    with ExitStack() as stack:
        stack.enter_context(_sigterm_kept())
        folder = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True)  # sockets: short
        stack.enter_context(folder)
        stack.callback(ray.shutdown, wait_for_processes=True)
        _start(count, folder.name) if count else _connect(address)
        has = ray.cluster_resources()
        taken = [kind for kind in EACH if has.get(kind)]
        stack.enter_context(remote_options(**{name: n for kind in taken for name, n in EACH[kind].items()}))
        threads = int(min((has[kind] for kind in taken), default=0))
        yield clusters.Cluster(Runner(), threads, partial(_ask, {"CPU", *taken}))


def _start(count: int, folder: str) -> None:
    """Worker processes of this machine. They ask for a token, and `folder` is private: no other user gets in."""
    import ray

    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one into the user's home
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)  # JAX's: programs follow at once
        ray.init(
            "local",
            num_cpus=count,
            include_dashboard=False,
            object_store_memory=MEMORY,
            runtime_env={"env_vars": clusters.share(count)},
            _temp_dir=f"{folder}/r",  # which Ray opens to all; the one around it stays private
            **QUIET,
        )


def _connect(address: str) -> None:
    import ray

    host = urlsplit(address if "://" in address else f"//{address}")
    try:
        with socket.create_connection((host.hostname, host.port), timeout=clusters.PATIENCE):
            pass
        if not host.scheme:
            _try(address)
        ray.init(address, **QUIET)
    except Exception as error:  # whatever Ray makes of what it found there
        reason = str(error).strip().rpartition("\n")[2]  # its tracebacks of other processes end with it
        raise UserMistake(
            f"runner = 'ray={address}': no Ray head answers there ({type(error).__name__}: {reason}). Start one with "
            "`ray start --head` and further nodes with `ray start --address=HOST:6379`, or write ray=local:2 for two "
            "processes of this machine."
        ) from None


def _try(address: str) -> None:
    """Connects in another process: where no head answers, Ray goes on trying for minutes and cannot be told to stop."""
    command = [sys.executable, "-c", "import ray, sys; ray.init(sys.argv[1], log_to_driver=False)", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START)
    if done.returncode:
        raise ConnectionError(done.stderr.strip().rpartition("\n")[2])


def _ask(needed: Collection[str], question: Callable[..., Any], *given: Any) -> dict[str, Any]:
    """Asks every node that stages may come to: its name -> what it answers."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked = {
        f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})": ray.remote(question)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote(*given)
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].keys() >= needed
    }
    return dict(zip(asked, ray.get(list(asked.values()), timeout=START), strict=True))


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Puts back what SIGTERM does; meanwhile Ray has it end this process with all that it started."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
