"""Dask's schedulers and workers. The one room that knows Dask."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from distributed import Client, LocalCluster
from prefect_dask import DaskTaskRunner
from prune_jax.flows import clusters

from prune_jax.errors import UserMistake


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
            processes = stack.enter_context(_processes(count))
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


def _processes(count: int) -> LocalCluster:
    """Worker processes, spawned: JAX does not survive a fork. They speak TLS, so that no other user gets in."""
    return LocalCluster(
        n_workers=count,
        threads_per_worker=1,
        processes=True,
        security=True,
        dashboard_address=None,
        env=clusters.share(count),
        silence_logs=logging.CRITICAL,
    )
