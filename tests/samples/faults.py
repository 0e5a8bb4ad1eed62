"""Criteria that misbehave, found by `tests.samples.faults:NAME`; they count how often they were asked."""

from __future__ import annotations

import os
import signal
import time

import jax
import jax.numpy as jnp

from prune_jax.criteria import Criterion
from prune_jax.errors import UserMistake

ATTEMPTS: list[str] = []


def _sizes(params):
    return jax.tree.map(jnp.abs, params)


def criterion(name, *, formula, paper):
    """As the package's, but not registered: other tests walk the registry."""
    return lambda function: Criterion(name, function, formula=formula, paper=paper)


@criterion("tests-fails-once", formula="|w|", paper="none")
def fails_once(params, stats):
    """A disk that was away for a moment."""
    ATTEMPTS.append("fails_once")
    if ATTEMPTS.count("fails_once") == 1:
        raise OSError("the disk was away")
    return _sizes(params)


@criterion("tests-fails-always", formula="|w|", paper="none")
def fails_always(params, stats):
    """A disk that stays away."""
    ATTEMPTS.append("fails_always")
    raise OSError("the disk is away")


@criterion("tests-mistaken", formula="|w|", paper="none")
def mistaken(params, stats):
    """What trying again will not mend."""
    ATTEMPTS.append("mistaken")
    raise UserMistake("there is nothing to score here")


@criterion("tests-sleeps", formula="|w|", paper="none")
def sleeps(params, stats):
    """Takes so long that it is stopped."""
    ATTEMPTS.append("sleeps")
    for _ in range(600):
        time.sleep(0.05)
    return _sizes(params)


@criterion("tests-slow-a", formula="|w|", paper="none")
def slow_a(params, stats):
    """Takes a second."""
    time.sleep(1)
    return _sizes(params)


@criterion("tests-slow-b", formula="|w|", paper="none")
def slow_b(params, stats):
    """Takes a second too."""
    time.sleep(1)
    return _sizes(params)


@criterion("tests-kills-once", formula="|w|", paper="none")
def kills_once(params, stats):
    """Takes the process down with it, the first time of all processes."""
    try:
        open(os.environ["PRUNE_JAX_TEST_KILLED"], "x").close()
    except FileExistsError:
        return _sizes(params)
    os.kill(os.getpid(), signal.SIGKILL)
