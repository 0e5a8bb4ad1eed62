"""Processes side by side on the CPUs of one machine: XLA's own number of threads against `shares.threads`."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from prune_jax.shares import threads, usable_cpus
from tests.benchmarks.rounds import Figure, figure

# Steps of a small network and products that XLA cuts for all its threads. It tells its seconds, of clock and CPU.
WORK = """
import sys, time, jax, jax.numpy as jnp
x, w = jnp.ones((256, 784)), [jnp.ones((784, 1024)) / 784, jnp.ones((1024, 1024)) / 1024, jnp.ones((1024, 10))]
def loss(w):
    h = x
    for each in w:
        h = jnp.tanh(h @ each)
    return jnp.mean(h)
step = jax.jit(lambda w: jax.tree.map(lambda a, g: a - 0.1 * g, w, jax.grad(loss)(w)))
w = jax.block_until_ready(step(w))
sys.stdout.write("ready\\n"); sys.stdout.flush(); sys.stdin.readline()
clock, cpu = time.perf_counter(), time.process_time()
for _ in range(150):
    w = step(w)
jax.block_until_ready(w)
print(time.perf_counter() - clock, time.process_time() - cpu)
"""


def _together(count: int, env: dict[str, str]) -> tuple[float, float]:
    """Seconds until the last of so many is done, and CPU seconds of each."""
    pipe = subprocess.PIPE
    runs = [
        subprocess.Popen([sys.executable, "-c", WORK], env={**os.environ, **env}, stdin=pipe, stdout=pipe, text=True)
        for _ in range(count)
    ]
    for run in runs:
        assert run.stdout
        assert run.stdout.readline() == "ready\n"
    begun = time.perf_counter()
    for run in runs:
        assert run.stdin
        run.stdin.write("\n")
        run.stdin.flush()
    told = [run.communicate()[0].split() for run in runs]
    return time.perf_counter() - begun, sum(float(cpu) for _, cpu in told) / count


def measure(rounds: int = 5) -> dict[str, Figure]:
    found: dict[str, list[float]] = {}
    for count in (1, 2, 4):
        for _ in range(rounds):
            for name, number in {"XLA's own": "", "shares.threads": str(threads(count))}.items():
                clock, cpu = _together(count, {"PJRT_NPROC": number} if number else {})
                found.setdefault(f"{count} at a time on {usable_cpus():g} CPUs, {name}: clock", []).append(clock)
                found.setdefault(f"{count} at a time on {usable_cpus():g} CPUs, {name}: CPU of each", []).append(cpu)
    return {name: figure(seconds, "s") for name, seconds in found.items()}
