"""Looks over what a run needs before it needs it: software, devices, threads, Prefect, the store and its disk.

What may be missing is imported where it is looked at.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from packaging.requirements import Requirement
from rich.markup import escape
from rich.table import Table

from prune_jax.disks import free_bytes, readable, told
from prune_jax.errors import PruneError
from prune_jax.shares import RUNS, at_a_time, settle, usable_cpus

LEAST, SCARCE = 100e6, 2e9  # bytes free: too few for a small run, and few for a larger one
EXTRAS = {"grain": "data that does not fit in memory", "onnx": "the export format onnx"}
DRIVERS = {"NVIDIA GPU": "/dev/nvidia0", "AMD GPU": "/dev/kfd", "TPU": "/dev/accel0"}
FRACTION = "XLA_CLIENT_MEM_FRACTION"


State = Literal["good", "doubtful", "bad"]  # bad: something will fail


class Finding(NamedTuple):
    """One thing that was looked at."""

    what: str
    state: State
    found: str
    mend: str = ""


def examine(store: str) -> list[Finding]:
    """Looks at everything; writes nothing that stays.

    Args:
        store: the folder or URL that runs would write to.

    Raises:
        UserMistake: `PRUNE_JAX_RUNS_AT_A_TIME` is no number.
    """
    settle()
    looks: tuple[Callable[[], Iterator[Finding]], ...] = (_software, _devices, _threads, _prefect)
    return [finding for look in looks for finding in look()] + list(_store(store))


def _software() -> Iterator[Finding]:
    yield Finding("python", "good", platform.python_version())
    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires("prune-jax") or ()]
    except importlib.metadata.PackageNotFoundError:
        yield Finding("packages", "bad", "prune-jax is not installed", "pip install prune-jax")
        return
    wanted = [it for it in wanted if it.marker is None or it.marker.evaluate({"extra": ""})]
    wrong = [it for it in wanted if not it.specifier.contains(_version(it.name) or "0", prereleases=True)]
    for it in wrong:
        found = f"{it.name} is {_version(it.name) or 'not installed'}, not {it.specifier}"
        yield Finding("packages", "bad", found, f"pip install '{it.name}{it.specifier}'")
    names = ["prune-jax", *(it.name for it in wanted if it not in wrong)]
    yield Finding("packages", "good", ", ".join(f"{name} {_version(name)}" for name in names))
    for name, use in EXTRAS.items():
        there = _version(name)
        mend = "" if there else f"pip install 'prune-jax[{name}]'"
        yield Finding(name, "good", f"{there or 'not installed'}; for {use}", mend)


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _devices() -> Iterator[Finding]:
    try:
        import jax
        import jax.numpy as jnp

        devices = jax.devices()
        right = float(jax.jit(lambda x: x @ x)(jnp.full((8, 8), 0.5))[0, 0]) == 2.0
    except Exception as error:  # what a plug-in raises is its own affair
        mend = "Unset JAX_PLATFORMS, or install what the device needs: pip install 'jax[cuda13]' (or cuda12, tpu)"
        asked = f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}: " if "JAX_PLATFORMS" in os.environ else ""
        yield Finding(
            "devices", "bad", f"{asked}{type(error).__name__} {str(error).partition(chr(10))[0]}".rstrip(), mend
        )
        return
    backend = jax.default_backend()
    found = f"{backend} x{len(devices)}, {devices[0].device_kind}"
    if not right:
        yield Finding("devices", "bad", f"{found}: a product of matrices is wrong", "Update its driver and jaxlib")
        return
    unseen = [name for name, path in DRIVERS.items() if os.path.exists(path)] if backend == "cpu" else []
    if unseen and "cpu" not in os.environ.get("JAX_PLATFORMS", ""):
        mend = "pip install 'jax[cuda13]' (or cuda12, tpu), or set JAX_PLATFORMS=cpu to mean it"
        yield Finding("devices", "doubtful", f"{found}; JAX does not see the {unseen[0]}", mend)
    else:
        yield Finding("devices", "good", found)
    if backend == "gpu":
        yield _preallocation(at_a_time(), os.environ)


def _preallocation(runs: int, env: Mapping[str, str]) -> Finding:
    """Whether as many runs as share the machine find room on one device, where they share it."""
    if env.get("XLA_PYTHON_CLIENT_PREALLOCATE", "").lower() in {"0", "false"}:
        return Finding("device memory", "good", "taken as it is needed")
    share = float(env.get(FRACTION) or env.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or 0.75)
    found = f"{share:.0%} of each device is taken by one run"
    if share * runs > 1 and not env.get("CUDA_VISIBLE_DEVICES"):
        return Finding(
            "device memory",
            "doubtful",
            f"{found}, of {runs} at a time",
            f"Set {FRACTION}={0.9 / runs:.2f}, or give each its CUDA_VISIBLE_DEVICES",
        )
    return Finding("device memory", "good", found)


def _threads() -> Iterator[Finding]:
    cpus, runs, each = usable_cpus(), at_a_time(), os.environ["PJRT_NPROC"]
    found = f"{each} for XLA, on {cpus:g} CPUs" + (f" that {runs} runs share" if runs > 1 else "")
    if each.isdecimal() and int(each) * runs > max(cpus, runs):
        yield Finding("threads", "doubtful", found, f"They take turns: unset PJRT_NPROC, which {RUNS} sets")
    else:
        yield Finding("threads", "good", found)


def _prefect() -> Iterator[Finding]:
    try:
        from prune_jax.flows.server import look
    except Exception as error:  # a broken package raises what it likes
        yield Finding("prefect", "bad", f"cannot be imported: {error}", "pip install --force-reinstall prune-jax")
        return
    facts = look()
    yield Finding("prefect profile", "good", f"{facts.profile}, home {facts.home}")
    if facts.url and facts.fault:
        mend = (
            "Start it (`prefect server start`), or have a temporary one: unset PREFECT_API_URL, "
            "`prefect config unset PREFECT_API_URL`"
        )
        yield Finding("prefect server", "bad", f"{facts.url} does not answer: {facts.fault}", mend)
    elif facts.url and facts.version != importlib.metadata.version("prefect"):
        yield Finding("prefect server", "doubtful", f"{facts.url}, version {facts.version}", "Install the same version")
    elif facts.url:
        yield Finding("prefect server", "good", f"{facts.url}, version {facts.version}, {facts.milliseconds:.0f} ms")
    else:
        yield Finding("prefect server", "good", "a temporary one for each run")
    if facts.limited:
        yield Finding("prefect limits", "good", ", ".join(facts.limited))
    yield _written("prefect home", str(facts.home), "Set PREFECT_HOME to a folder that can be written")


def _store(root: str) -> Iterator[Finding]:
    try:
        from prune_jax.checkpoints import Store

        store = Store(root)
        version = f", format {store.format}" if store.format is not None else ", not there yet"
    except PruneError as error:
        yield Finding("store", "bad", str(error), "Name another one with --store")
        return
    except ImportError as error:
        yield Finding("store", "bad", f"cannot be looked at: {error}", "pip install --force-reinstall prune-jax")
        return
    written = _written("store", str(store.root), "Name another folder with --store")
    yield written._replace(found=written.found + version) if written.state == "good" else written
    if not store.local or written.state != "good":
        return
    free = free_bytes(str(store.root))
    if free is not None:
        state: State = "bad" if free < LEAST else "doubtful" if free < SCARCE else "good"
        mend = "" if state == "good" else "`prune-jax gc --dry-run` tells what the store can spare"
        yield Finding("free disk", state, readable(free), mend)


def _written(what: str, root: str, mend: str) -> Finding:
    """Writes below a folder, or the nearest one above it that is there, renames, locks, and takes it away again."""
    try:
        with told(f"{root} cannot be written", root):
            _try(root)
    except Exception as error:  # of a URL, whatever its file system raises
        return Finding(what, "bad", str(error) if isinstance(error, PruneError) else f"{root}: {error}", mend)
    return Finding(what, "good", root)


def _try(root: str) -> None:
    if "://" in root:
        from etils import epath

        file = epath.Path(root) / f".doctor-{uuid.uuid4().hex[:8]}"
        file.write_text("written")
        file.unlink()
        return
    import fcntl

    folder = Path(root)
    while not folder.exists():
        folder = folder.parent
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as name:
        (Path(name) / "a").write_bytes(bytes(4096))
        (Path(name) / "a").rename(Path(name) / "b")
        with open(Path(name) / "b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def findings_table(findings: list[Finding]) -> Table:
    """What was found, and below it how it is mended."""
    colour = {"good": "green", "doubtful": "yellow", "bad": "bold red"}
    table = Table("", "what", "found", box=None, pad_edge=False)
    for it in findings:
        mend = f"\n[dim]{escape(it.mend)}[/]" if it.mend else ""
        table.add_row(f"[{colour[it.state]}]{it.state}[/]", it.what, escape(it.found) + mend)
    return table


def findings_json(findings: list[Finding]) -> dict[str, Any]:
    """The same for programs."""
    return {"good": healthy(findings), "findings": [it._asdict() for it in findings]}


def healthy(findings: list[Finding]) -> bool:
    """Whether nothing of it will fail."""
    return all(it.state != "bad" for it in findings)
