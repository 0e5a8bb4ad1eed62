"""The hosts that train one network together: how they meet, what the first tells the others, how all end if one does.

The same command runs on each. Host 0 walks the plan, alone, as ever; the others follow: they wait for the trainings
that it announces and take their part in them. Words go, in one order, through the key-value store of JAX's distributed
runtime; arrays go through the mesh. The one room that knows how JAX keeps that runtime.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import ipaddress
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from prune_jax.errors import PruneError, UserMistake
from prune_jax.trees import PyTree

PATIENCE = 300  # seconds that hosts wait for each other to start
HEARTBEAT = 40  # seconds without a sign of life after which JAX gives a host up
KEPT = 16  # words that stay: each beat waits for a step of all hosts, so that none is further behind
GOES_ON = "Give the same command on all hosts: it goes on from the last checkpoint"
GONE = f"\nanother host ended, or cannot be reached, and JAX ended this process (its words stand above). {GOES_ON}.\n"


class Place(NamedTuple):
    """One host among those that train together; None where SLURM, Kubernetes, Open MPI or the TPU tell."""

    address: str | None = None  # HOST:PORT on host 0
    hosts: int | None = None
    host: int | None = None


class LeftError(Exception):
    """Host 0 has left the training that this host takes part in."""


def place(hosts: str | None, of_hosts: int | None, host: int | None) -> Place | None:
    """What a user says of the hosts, checked; None for one host.

    Raises:
        UserMistake: what is wrong, and what is allowed.

    >>> place("10.0.0.1:8476", 2, 0)
    Place(address='10.0.0.1:8476', hosts=2, host=0)
    """
    if hosts is None:
        for word, value in (("of-hosts", of_hosts), ("host", host)):
            if value is not None:
                raise UserMistake(f"{word} = {value}: says nothing without --hosts HOST:PORT, which is the same on all")
        return None
    if hosts == "auto":
        for word, value in (("of-hosts", of_hosts), ("host", host)):
            if value is not None:
                raise UserMistake(f"{word} = {value}: is found by `--hosts auto`; leave it out, or name HOST:PORT")
        return Place()
    name, _, port = hosts.rpartition(":")
    if not name or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserMistake(
            f"hosts = {hosts[:100]!r}: is no address (allowed: HOST:PORT of host 0, as the others reach it, such as "
            "10.0.0.1:8476; or auto under SLURM, Kubernetes, Open MPI and on TPUs)"
        )
    if of_hosts is None or host is None:
        raise UserMistake(
            f"hosts = {hosts!r}: needs --of-hosts, how many there are, and --host, which one this is, from 0"
        )
    if of_hosts < 2:
        raise UserMistake(
            f"of-hosts = {of_hosts}: must be 2 or more; for one, leave --hosts, --of-hosts and --host out"
        )
    if not 0 <= host < of_hosts:
        raise UserMistake(f"host = {host}: must be from 0 to {of_hosts - 1}, another on each of the {of_hosts} hosts")
    return Place(hosts, of_hosts, host)


class Group:
    """The hosts, as one of them sees them."""

    def __init__(self, client: Any, index: int, count: int):
        self.index, self.count = index, count
        self.broken = ""  # why no training can span the hosts any more
        self._client, self._words, self._calls = client, 0, 0
        self.listening = True  # on host 0: the others wait for a word, or will without it
        self._met = False

    @property
    def first(self) -> bool:
        """Whether this is host 0."""
        return self.index == 0

    def agree(self, value: Any = None) -> Any:
        """What host 0 gives, on all hosts. Followers wait for it.

        Raises:
            LeftError: host 0 left the training instead.
        """
        if self.first:
            self._tell({"told": value})
            self.listening = False
            return value
        word = self._next()
        if "told" not in word:
            raise LeftError
        return word["told"]

    def meet(self) -> None:
        """Waits until all hosts are ready for the first step.

        Raises:
            PruneError: on host 0: one of them is not, and why.
        """
        if self.first:
            for index in range(1, self.count):
                if fault := self._hear(f"ready/{self._calls}/{index}"):
                    raise PruneError(f"host {index}: {fault}")
        else:
            self._say(f"ready/{self._calls}/{self.index}", "")
        self.agree()
        self._met = True

    @contextlib.contextmanager
    def training(self, call: str) -> Iterator[None]:
        """On host 0: has the others take part in a training, and lets them go if it fails.

        Raises:
            PruneError: the hosts are out of step: one is gone, or this one failed between two words.
        """
        if self.broken:
            raise PruneError(self.broken)
        self._calls += 1
        self._tell({"call": call})
        self.listening = True
        try:
            yield
        except BaseException as error:
            if not self.listening or isinstance(error, jax.errors.JaxRuntimeError):  # which a lost host makes, too
                self.broken = f"the training over {self.count} hosts broke off: {self._why(error)}. {GOES_ON}"
            self._tell({"failed": str(error)})
            if isinstance(error, Exception) and self.broken:
                raise PruneError(self.broken) from error
            raise

    def _why(self, error: BaseException) -> str:
        told = self._client.key_value_dir_get("prune_jax/gone/")
        gone = [f"host {key.rpartition('/')[2]} ended ({json.loads(text)})" for key, text in told]
        return "; ".join(gone) or f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"

    def end(self, outcome: Mapping[str, Any]) -> None:
        """On host 0: tells the others that the run is over, and what came of it."""
        self._tell({"end": outcome})
        if self.broken:
            self.leave(self.broken)

    def follow(self, take_part: Callable[[str], None]) -> dict[str, Any]:
        """Takes part in the trainings that host 0 announces until it ends the run, and answers what came of it.

        Args:
            take_part: is given the call, as text.
        """
        try:
            while "end" not in (word := self._next()):
                if "call" in word:  # else of a training that this host left
                    self._take_part(word["call"], take_part)
        except BaseException as fault:
            self.leave(str(fault) or type(fault).__name__)
            raise
        return word["end"]

    def _take_part(self, call: str, take_part: Callable[[str], None]) -> None:
        self._calls, self._met = self._calls + 1, False
        try:
            take_part(call)
        except LeftError:
            return
        except Exception as fault:
            if self._met:
                raise
            self._say(f"ready/{self._calls}/{self.index}", str(fault) or type(fault).__name__)

    def whole(self, tree: PyTree) -> PyTree:
        """Arrays of the mesh as each host has them in memory, one after the other; all hosts take part."""
        from jax.experimental.multihost_utils import process_allgather

        return jax.tree.map(lambda leaf: np.asarray(process_allgather(leaf, tiled=True)), tree)

    def introduce(self, facts: Mapping[str, Any]) -> None:
        """Has all hosts be of one mind before anything is computed.

        Args:
            facts: by name what must be the same on all hosts.

        Raises:
            UserMistake: on all hosts: which one differs in what.
        """
        self._say(f"facts/{self.index}", facts)
        differs = ""
        if self.first:
            for index in range(1, self.count):
                theirs = self._hear(f"facts/{index}")
                differs = differs or next(
                    (f"host {index}: {_other(n, facts, theirs)}" for n in facts if theirs.get(n) != facts[n]), ""
                )
        if told := self.agree(differs):
            raise UserMistake(f"{told}. Give the same command, recipe and software on all hosts")
        jax.devices()  # all hosts ask at the same time: each waits two minutes for the others

    def leave(self, why: str) -> None:
        """Has this process end without waiting for the others, who hear why."""
        from jax._src import distributed

        if not self.first:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # host 0 may be gone, too
                self._say(f"gone/{self.index}", why)
        state = distributed.global_state
        for held in (state.client, state.service):  # whose end would wait for hosts that are gone, and abort
            if held is not None:
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))
        state.client = state.service = None

    def _tell(self, word: Mapping[str, Any]) -> None:
        self._words += 1
        self._say(f"words/{self._words}", word)
        if self._words > KEPT:
            self._client.key_value_delete(f"prune_jax/words/{self._words - KEPT}")

    def _next(self) -> dict[str, Any]:
        self._words += 1
        return self._hear(f"words/{self._words}")

    def _say(self, key: str, value: Any) -> None:
        self._client.key_value_set(f"prune_jax/{key}", json.dumps(value))

    def _hear(self, key: str) -> Any:
        """Waits for a value as long as its sender lives: if not, JAX ends this process."""
        while True:
            try:
                return json.loads(self._client.blocking_key_value_get(f"prune_jax/{key}", 1000))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise PruneError(f"another host ended, or cannot be reached. {GOES_ON}") from error


def _is_number(address: str | None) -> bool:
    """Whether an address holds no name, so that host 0 can listen on it alone.

    >>> [_is_number(address) for address in ("10.0.0.1:8476", "[::1]:8476", "head:8476", None)]
    [True, True, False, False]
    """
    try:
        return bool(ipaddress.ip_address((address or "").rpartition(":")[0].strip("[]")))
    except ValueError:
        return False


def _other(name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    here, there = ours[name], theirs.get(name)
    if isinstance(here, dict) and isinstance(there, dict):
        part = next(p for p in {**here, **there} if here.get(p) != there.get(p))
        name, here, there = f"{name} of {part}", here.get(part), there.get(part)
    return f"{name} is {there or 'none'}, and on host 0 {here or 'none'}"


_JOINED: list[Group] = []  # JAX has one distributed runtime in a process


def group() -> Group | None:
    """The hosts that this process trains with; None where it is alone."""
    return _JOINED[0] if _JOINED else None


def join(where: Place) -> Group:
    """Meets the other hosts; to be called before the first device is asked for.

    Raises:
        UserMistake: nothing tells where the hosts are, or this process has used its devices already.
        PruneError: not all of them come.
    """
    from jax._src import distributed

    if _JOINED:
        raise UserMistake("hosts: this process has run a recipe over hosts already; start a new one for each run")
    jax.config.update("jax_enable_preemption_service", False)  # it would keep SIGTERM to itself
    told = f"hosts = {where.address or 'auto'}"
    try:
        jax.distributed.initialize(
            where.address,
            where.hosts,
            where.host,
            coordinator_bind_address=where.address if _is_number(where.address) else None,  # else on all interfaces
            cluster_detection_method="deactivate" if where.address else None,
            initialization_timeout=PATIENCE,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except (ValueError, TypeError):
        raise UserMistake(
            f"{told}: neither SLURM, Kubernetes, Open MPI nor a TPU says where the hosts are; name them with "
            "--hosts HOST:PORT --of-hosts N --host I"
        ) from None
    except jax.errors.JaxRuntimeError as error:
        raise PruneError(
            f"{told}: not all hosts met there ({str(error).partition(chr(10))[0]}). See that the command runs on each "
            f"of them, with another --host from 0, within {PATIENCE} seconds, and that the others reach that port"
        ) from error
    except RuntimeError as error:
        raise UserMistake(f"{told}: this process has used its devices already ({error})") from None
    state = distributed.global_state
    _JOINED.append(Group(state.client, state.process_id, state.num_processes))
    _speak_last()
    return _JOINED[0]


@functools.lru_cache(maxsize=1)
def _speak_last() -> Any:
    """Has a process that JAX ends, since another host did, say what to do, and end with exit code 1.

    JAX calls abort() then, and no handler of Python's is called before that is through.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def last(_: int) -> None:
        os.write(2, GONE.encode())
        os._exit(1)

    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    libc.signal(int(signal.SIGABRT), ctypes.cast(last, ctypes.c_void_p))
    return last
