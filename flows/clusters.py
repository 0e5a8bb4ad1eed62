"""Dask clusters to run stages on: one that is there, or processes of this machine. The one room that knows Dask.

Dask pickles what it sends between its processes, and whoever reaches its ports may run code: they belong in a network
whose every machine is trusted. What goes over them is calls and results; the arrays stay in the store.
"""

from __future__ import annotations

import logging
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from prefect.settings import PREFECT_API_URL

from prune_jax.checkpoints import versions
from prune_jax.errors import UserMistake
from prune_jax.shares import at_a_time, threads

if TYPE_CHECKING:
    from prefect_dask import DaskTaskRunner

PATIENCE = 20  # seconds that a scheduler may take to answer
ALIKE = ("prune-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "prefect")  # packages on all machines


class Cluster(NamedTuple):
    """Workers that stages are sent to."""

    runner: DaskTaskRunner
    threads: int  # of all workers: stages at a time


@contextmanager
def opened(address: str) -> Iterator[Cluster]:
    """A cluster whose workers can carry out stages.

    Args:
        address: of a scheduler, `tcp://HOST:PORT`; or `local:N`, N processes of this machine that share its cores
            and end with the context.

    Raises:
        UserMistake: no scheduler answers there, or a worker lacks something: which, and what to do.
    """
    from distributed import Client
    from prefect_dask import DaskTaskRunner

    with ExitStack() as stack:
        options: dict[str, Any] = {"timeout": PATIENCE}
        where = address
        if address.startswith("local:"):
            processes = stack.enter_context(_processes(int(address.removeprefix("local:"))))
            where, options["security"] = processes.scheduler_address, processes.security
        try:
            client = Client(where, set_as_default=False, **options)
        except (OSError, ValueError, TypeError) as error:  # what Dask raises for addresses that are none
            raise UserMistake(
                f"runner = 'dask={address}': no Dask scheduler answers there ({error}). Start one with `dask "
                "scheduler` and its workers with `dask worker ADDRESS --nthreads 1`, or write dask=local:2 for two "
                "processes of this machine."
            ) from None
        with client:
            _check_workers(client, address)
            threads = sum(client.nthreads().values())
        yield Cluster(DaskTaskRunner(address=where, client_kwargs=options), threads)


@contextmanager
def _processes(count: int) -> Iterator[Any]:
    """Worker processes, spawned: JAX does not survive a fork. They speak TLS, so that no other user gets in."""
    import dask
    from distributed import LocalCluster

    # Dask has workers hand freed memory back at once: each step of a training would then ask the system for it anew.
    spawning = "distributed.nanny.pre-spawn-environ"
    environ = {name: value for name, value in dask.config.get(spawning).items() if name != "MALLOC_TRIM_THRESHOLD_"}
    share = {"PJRT_NPROC": str(threads(count * at_a_time()))}  # each would inherit those of this process
    with (
        dask.config.set({spawning: environ}),
        LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            processes=True,
            security=True,
            dashboard_address=None,
            env=share,
            silence_logs=logging.CRITICAL,
        ) as cluster,
    ):
        yield cluster


def _check_workers(client: Any, address: str) -> None:
    """Refuses workers that would make other results, or none."""
    ours, url = versions(), PREFECT_API_URL.value()
    where = f"runner = 'dask={address}'"
    try:
        found: Mapping[str, tuple[dict[str, str], bool]] = client.run(_look, url)
    except Exception as error:
        raise UserMistake(
            f"{where}: a worker cannot run stages ({type(error).__name__}: {error}). Install the same prune-jax there, "
            f"{ours['prune-jax']}, with `pip install 'prune-jax[dask]'`."
        ) from None
    if not found:
        raise UserMistake(f"{where}: has no workers; start some with `dask worker {address} --nthreads 1`")
    for worker, (theirs, reaches) in found.items():
        for package in ALIKE:
            if theirs.get(package) != ours.get(package):
                raise UserMistake(
                    f"{where}: the worker {worker} has {package} {theirs.get(package, 'not installed')}, and here is "
                    f"{ours.get(package)}. Install the same on both, lest one recipe give two results."
                )
        if not reaches:
            raise UserMistake(
                f"{where}: the worker {worker} does not reach Prefect at {url}. Start a server in its network "
                "(PREFECT_SERVER_API_HOST and `prefect server start`), and set PREFECT_API_URL here to its address."
            )


def _look(url: str | None) -> tuple[dict[str, str], bool]:
    """On a worker: its versions, and whether Prefect answers it."""
    from prune_jax.flows import tasks  # noqa: F401  (before the first stage, and to see that it can be)

    try:
        with urllib.request.urlopen(f"{url}/health", timeout=PATIENCE):
            return versions(), True
    except OSError:
        return versions(), False


def check_address(address: str) -> None:
    """Refuses what cannot be a cluster's address, and Dask where it is not installed.

    Raises:
        UserMistake: what is wrong, and what is allowed.
    """
    from importlib.util import find_spec

    kind, _, rest = address.partition(":")
    if not rest or (kind == "local" and not (rest.isdigit() and int(rest))):
        raise UserMistake(
            f"runner = 'dask={address}': is no address of a cluster (allowed: dask=tcp://HOST:PORT of a Dask "
            "scheduler, or dask=local:N, N processes of this machine)"
        )
    if find_spec("prefect_dask") is None:
        raise UserMistake(
            f"runner = 'dask={address}': needs what is not installed: prefect-dask. Run `pip install 'prune-jax[dask]'`"
        )
