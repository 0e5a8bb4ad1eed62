"""Dask's schedulers and workers. The one room that knows Dask."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import dask
from distributed import Client, LocalCluster
from prefect_dask import DaskTaskRunner
from prune_jax.flows import clusters

from prune_jax.errors import UserMistake

# What Dask's own dashboard shows, which is off here, wakes every process a hundred times a second.
QUIET = {
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "5s",
    "distributed.admin.system-monitor.disk": False,
}


@contextmanager
def connected(address: str) -> Iterator[clusters.Cluster]:
    """The workers of a scheduler, `tcp://HOST:PORT`, or of `local:N`.

    Raises:
        UserMistake: no scheduler answers there.
    """
    with ExitStack() as stack:
        options: dict[str, Any] = {"timeout": clusters.PATIENCE}
        where = address
        if count := clusters.local_processes(address):
            processes = _processes(stack, count)
            where, options["security"] = processes.scheduler_address, processes.security
        try:
            client = stack.enter_context(Client(where, set_as_default=False, **options))
        except (OSError, ValueError, TypeError) as error:  # what Dask raises for addresses that are none
            raise UserMistake(
                f"runner = 'dask={address}': no Dask scheduler answers there ({error}). Start one with `dask "
                "scheduler` and its workers with `dask worker ADDRESS --nthreads 1`, or write dask=local:2 for two "
                "processes of this machine."
            ) from None
        runner = DaskTaskRunner(address=where, client_kwargs=options)
        yield clusters.Cluster(runner, sum(client.nthreads().values()), client.run)


def _processes(stack: ExitStack, count: int) -> LocalCluster:
    """Worker processes, spawned: JAX does not survive a fork. They speak TLS, so that no other user gets in."""
    # Dask has them hand freed memory back at once: each step of a training would then ask the system for it anew.
    name = "distributed.nanny.pre-spawn-environ"
    environ = {
        variable: value for variable, value in dask.config.get(name).items() if variable != "MALLOC_TRIM_THRESHOLD_"
    }
    stack.enter_context(dask.config.set({name: environ, **QUIET}))
    cluster = LocalCluster(
        n_workers=count,
        threads_per_worker=1,
        processes=True,
        security=True,
        dashboard_address=None,
        env=clusters.share(count),
        silence_logs=logging.CRITICAL,
    )
    return stack.enter_context(cluster)
