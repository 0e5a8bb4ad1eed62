"""Clusters to run stages on, ones that are there or processes of this machine: what Dask's and Ray's have alike.

Both pickle what they send between their processes, and whoever reaches their ports may run code: they belong in a
network whose every machine is trusted. What goes over them is calls and results; the arrays stay in the store.
"""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

from prefect.settings import PREFECT_API_URL
from prefect.task_runners import TaskRunner

from prune_jax.checkpoints import versions
from prune_jax.errors import UserMistake
from prune_jax.shares import at_a_time, threads

PATIENCE = 20  # seconds that a cluster, and Prefect from a worker, may take to answer
ALIKE = ("prune-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "prefect")  # packages on all machines


class Kind(NamedTuple):
    """What a kind of cluster needs; `flows/KIND_cluster.py` connects to it."""

    package: str  # in the extra of the kind's name
    address: str  # a regular expression
    allowed: str
    worker: str  # the command that starts one


KINDS = {
    "dask": Kind(
        "prefect_dask",
        r"(?!local).+:.+",
        "dask=tcp://HOST:PORT of a Dask scheduler",
        "dask worker ADDRESS --nthreads 1",
    ),
    "ray": Kind(
        "prefect_ray",
        r"(?!local:)(ray://)?([^/:\s]+|\[[^]\s]+\]):\d{1,5}",
        "ray=ray://HOST:10001 of a Ray head, ray=HOST:6379 on a machine of its cluster",
        "ray start --address=HOST:6379",
    ),
}


class Cluster(NamedTuple):
    """Workers that stages are sent to."""

    runner: TaskRunner[Any]
    threads: int  # of all workers: so many stages run at a time
    ask: Callable[..., Mapping[str, Any]]  # ask(function, *arguments) of every worker: its name -> what it answers


@contextmanager
def opened(runner: str) -> Iterator[Cluster]:
    """A cluster whose workers can carry out stages.

    Args:
        runner: `KIND=ADDRESS` of a cluster; or `KIND=local:N`, N processes of this machine that share its cores and
            end with the context.

    Raises:
        UserMistake: no cluster answers there, or a worker lacks something: which, and what to do.
    """
    kind, _, address = runner.partition("=")
    with import_module(f"{__package__}.{kind}_cluster").connected(address) as cluster:
        _check_workers(cluster, kind, address)
        yield cluster


def local_processes(address: str) -> int:
    """The N of `local:N`; 0 of an address."""
    found = re.fullmatch("local:([1-9][0-9]{0,3})", address)
    return int(found[1]) if found else 0


def share(processes: int) -> dict[str, str]:
    """The surroundings of a process that has its share of this machine's cores: it would inherit those of this one."""
    return {"PJRT_NPROC": str(threads(processes * at_a_time()))}


def _check_workers(cluster: Cluster, kind: str, address: str) -> None:
    """Refuses workers that would make other results, or none."""
    ours, url = versions(), PREFECT_API_URL.value()
    where = f"runner = '{kind}={address}'"
    try:
        found: Mapping[str, tuple[dict[str, str], bool]] = cluster.ask(_look, url)
    except Exception as error:
        reason = str(error).strip().rpartition("\n")[2]  # Ray's holds the worker's traceback, too
        raise UserMistake(
            f"{where}: a worker cannot run stages ({type(error).__name__}: {reason}). Install the same prune-jax "
            f"there, {ours['prune-jax']}, with `pip install 'prune-jax[{kind}]'`."
        ) from None
    if not found:
        start = KINDS[kind].worker.replace("ADDRESS", address)
        raise UserMistake(f"{where}: has no workers; start some with `{start}`")
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


def check_address(runner: str) -> None:
    """Refuses what cannot be a cluster's address, and a kind of cluster whose package is not installed.

    Raises:
        UserMistake: what is wrong, and what is allowed.
    """
    name, _, address = runner.partition("=")
    kind = KINDS[name]
    if not local_processes(address) and not re.fullmatch(kind.address, address):
        raise UserMistake(
            f"runner = '{runner}': is no address of a cluster (allowed: {kind.allowed}, or {name}=local:N, N processes "
            "of this machine)"
        )
    if find_spec(kind.package) is None:
        raise UserMistake(
            f"runner = '{runner}': needs what is not installed: {kind.package.replace('_', '-')}. Run "
            f"`pip install 'prune-jax[{name}]'`"
        )
