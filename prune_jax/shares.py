"""A run's share of a machine that other runs use, too: how many threads XLA gets on its CPUs.

XLA starts a thread for each CPU that it sees, in each process, and sees nothing of a container's quota. Two runs on two
CPUs then have four threads that take turns. It reads `PJRT_NPROC` once, when the first device is asked for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from prune_jax.errors import UserMistake

RUNS = "PRUNE_JAX_RUNS_AT_A_TIME"  # so many runs share this machine
QUOTA = Path("/sys/fs/cgroup/cpu.max")


def settle(env: MutableMapping[str, str] = os.environ) -> None:
    """Gives XLA this run's threads, unless the user did; to be called before the first device is asked for.

    Raises:
        UserMistake: `PRUNE_JAX_RUNS_AT_A_TIME` is no number of runs.
    """
    env.setdefault("PJRT_NPROC", str(threads(at_a_time(env))))


def at_a_time(env: Mapping[str, str] = os.environ) -> int:
    """So many runs share this machine.

    Raises:
        UserMistake: `PRUNE_JAX_RUNS_AT_A_TIME` is no number of runs.
    """
    text = env.get(RUNS, "1")
    if not text.isdecimal() or int(text) < 1:
        raise UserMistake(f"{RUNS} = {text[:60]!r}: must be the number of runs that share this machine, 1 or more")
    return int(text)


def threads(runs: int, cpus: float | None = None) -> int:
    """Threads for each of so many runs at a time: cpus / runs rounded down, at least one.

    >>> threads(2, cpus=8), threads(3, cpus=8), threads(4, cpus=2), threads(1, cpus=2.5)
    (4, 2, 1, 2)
    """
    return max(1, math.floor((usable_cpus() if cpus is None else cpus) / runs))


def usable_cpus() -> float:
    """CPUs that this process may use: those it may be scheduled on, or the quota of its container if that is less."""
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(seen, _quota())


def _quota(file: Path | None = None) -> float:
    """CPUs by the control group's `cpu.max`, microseconds in each period; infinite where nothing is said."""
    try:
        most, period = (file or QUOTA).read_text().split()
        return math.inf if most == "max" else int(most) / int(period)
    except (OSError, ValueError):
        return math.inf
