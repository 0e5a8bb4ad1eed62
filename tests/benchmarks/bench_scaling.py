"""Sweeps and many stages: 24 points on one worker process and on two; 10,000 stages planned and walked.

Each worker has one core. One sweep computes, beside the command and the server of Prefect on the same cores; the other
waits for its records, as for a disk or a device.
"""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from prune_jax.shares import RUNS, usable_cpus
from tests.benchmarks.rounds import Figure, figure

SPARSITIES = [0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]

# One process a run: the driver, its workers and a temporary Prefect server; the clock of the record starts when the
# workers are there.
RUN = """
import sys
from prune_jax.launch import run
from tests.benchmarks.bench_scaling import SWEEPS

if __name__ == "__main__":
    record = run(SWEEPS[sys.argv[1]], store=sys.argv[2], name="sweep", runner=sys.argv[3])
    assert record["status"] == "completed", record["message"]
    ran = [stage["kind"] for stage in record["stages"].values() if stage["status"] == "ran"]
    assert (ran.count("train"), ran.count("finetune"), len(record["results"])) == (3, 24, 27), ran
    print(record["seconds"])
"""


def _sweep(data: dict[str, Any], model: dict[str, Any], train: dict[str, Any], tune: dict[str, Any]) -> dict[str, Any]:
    """Eight networks of three seeds: three trainings that they share, 24 fine-tunings, each network evaluated."""
    rate = {"optimizer": {"learning_rate": 0.001}}
    prune = {"kind": "prune", "criterion": "magnitude", "min_keep": 1, "finetune": {**tune, **rate}}
    return {
        "name": "sweep",
        "data": data,
        "model": model,
        "stages": {
            "train": {"kind": "train", **train, **rate},
            "prune": {**prune, "target": {"sparsity": 0.5}},
            "evaluate": {"kind": "evaluate", "of": ["train", "prune"], "latency": None},
        },
        "matrix": {"seed": [0, 1, 2], "stages.prune.target.sparsity": SPARSITIES},
    }


WAITING = {"source": "tests.samples.tiny:slow_records", "batch_size": 9, "validation": 0.2}
SWEEPS = {
    "computes": _sweep({"source": "mnist5k", "batch_size": 50}, {"kind": "cnn"}, {"epochs": 8}, {"epochs": 6}),
    "waits": _sweep(WAITING, {"kind": "mlp", "widths": [64]}, {"steps": 40}, {"steps": 40}),
}


def many(seeds: int) -> dict[str, Any]:
    """A matrix of 100 sparsities and so many seeds: 301 stages a seed."""
    prune = {"kind": "prune", "criterion": "taylor", "target": {"sparsity": 0.5}}
    evaluate = {"kind": "evaluate", "of": ["train", "prune", "finetune"], "latency": None}
    return {
        "name": "many",
        "data": {"source": "xor"},
        "model": {"kind": "mlp", "widths": [4]},
        "objective": "regression",
        "stages": {
            "train": {"kind": "train", "epochs": 2},
            "prune": prune,
            "finetune": {"kind": "finetune", "epochs": 1},
            "evaluate": evaluate,
        },
        "matrix": {
            "stages.prune.target.sparsity": [round(0.1 + 0.008 * i, 4) for i in range(100)],
            "seed": list(range(seeds)),
        },
    }


def _swept(root: Path, kind: str, workers: int, place: int) -> float:
    script = root / "run.py"
    script.write_text(RUN)
    env = {**os.environ, "PREFECT_HOME": str(root / "prefect"), "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()}
    env["XDG_CACHE_HOME"] = str(
        root / f"cache-{kind}-{workers}-{place}"
    )  # else the second finds what the first compiled
    env[RUNS] = str(max(1, int(usable_cpus()) // workers))  # a core for each worker, whether there is one or two
    command = [sys.executable, script, kind, root / f"{kind}-{workers}-{place}", f"dask=local:{workers}"]
    done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout.split()[-1])


def _planned_and_walked(seeds: int) -> tuple[int, float, float, float]:
    """Stages; seconds to plan and check them, to walk them at no cost; bytes that it all took."""
    from prune_jax.checkpoints import Store
    from prune_jax.preparation import prepare
    from prune_jax.recipe import StageResult, read_recipe
    from prune_jax.walk import walk

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.process_time()
    plan = prepare(read_recipe(many(seeds)))
    planned = time.process_time()

    def submit(call, done):
        done(StageResult(name=call.name, kind=call.kind, key=call.key, status="ran"))

    with tempfile.TemporaryDirectory() as folder:
        results = walk(plan, Store(folder), submit, side_by_side=8)
    walked = time.process_time()
    assert all(result.good for result in results.values())
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return len(plan.calls), planned - begun, walked - planned, 1024.0 * grown


def measure(rounds: int = 3) -> dict[str, Figure]:
    found: dict[str, list[float]] = {}
    gc.set_threshold(50_000)  # as the command sets it
    _planned_and_walked(1)  # imports
    for i in range(rounds):
        few, some_planned, some_walked, _ = _planned_and_walked(3)
        stages, planned, walked, grown = _planned_and_walked(33)
        assert stages > 9900
        found.setdefault("plan of 10,000 stages, processor", []).append(planned * 10_000 / stages)
        found.setdefault("walk of 10,000 stages, processor", []).append(walked * 10_000 / stages)
        found.setdefault("plan: a stage of 10,000 / of 900", []).append(planned / stages / (some_planned / few))
        found.setdefault("walk: a stage of 10,000 / of 900", []).append(walked / stages / (some_walked / few))
        if i == 0:  # what grew stays with the process: later rounds find room
            found["memory of a stage among 10,000"] = [grown / stages / 1000]
    units = {"plan of": "s", "walk of": "s", "memory": "kB"}
    figures = {
        name: figure(v, next((u for p, u in units.items() if name.startswith(p)), "")) for name, v in found.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        for kind in SWEEPS:
            pairs = [[_swept(Path(folder), kind, workers, i) for workers in (1, 2)] for i in range(rounds)]
            figures[f"sweep of 24 points that {kind}, one worker"] = figure([one for one, _ in pairs], "s")
            figures[f"sweep of 24 points that {kind}, two workers"] = figure([two for _, two in pairs], "s")
            figures[f"sweep that {kind}: two workers / one"] = figure([two / one for one, two in pairs])
    return figures
