"""Sweeps and many stages: 24 points on one worker process and on two; 10,000 stages planned and walked."""

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

from tests.benchmarks.rounds import Figure, figure

SPARSITIES = [0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
LONG = {"optimizer": {"learning_rate": 0.001}}

# One process a run: the driver, its workers and a temporary Prefect server; the clock of the record starts when the
# workers are there.
RUN = """
import sys
from prune_jax.launch import run
from tests.benchmarks.bench_scaling import sweep

if __name__ == "__main__":
    record = run(sweep(), store=sys.argv[1], name="sweep", runner=sys.argv[2])
    assert record["status"] == "completed", record["message"]
    ran = [stage["kind"] for stage in record["stages"].values() if stage["status"] == "ran"]
    assert (ran.count("train"), ran.count("finetune"), len(record["results"])) == (3, 24, 27), ran
    print(record["seconds"])
"""


def sweep() -> dict[str, Any]:
    """Eight networks of three seeds: three trainings that they share, 24 fine-tunings, each network evaluated."""
    return {
        "name": "sweep",
        "data": {"source": "digits", "batch_size": 32},
        "model": {"kind": "mlp", "widths": [32]},
        "stages": {
            "train": {"kind": "train", "steps": 3000, **LONG},
            "prune": {
                "kind": "prune",
                "criterion": "magnitude",
                "target": {"sparsity": 0.5},
                "finetune": {"steps": 3000, **LONG},
            },
            "evaluate": {"kind": "evaluate", "of": ["train", "prune"], "latency": None},
        },
        "matrix": {"seed": [0, 1, 2], "stages.prune.target.sparsity": SPARSITIES},
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


def _swept(root: Path, place: str, workers: int) -> float:
    script = root / "run.py"
    script.write_text(RUN)
    env = {**os.environ, "PREFECT_HOME": str(root / "prefect"), "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, str(script), str(root / f"store-{place}-{workers}"), f"dask=local:{workers}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
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
        one, two = [], []
        for i in range(rounds):
            one.append(_swept(Path(folder), f"{i}", 1))
            two.append(_swept(Path(folder), f"{i}", 2))
    figures["sweep of 24 points, one worker"] = figure(one, "s")
    figures["sweep of 24 points, two workers"] = figure(two, "s")
    figures["sweep: two workers / one"] = figure([b / a for a, b in zip(one, two, strict=True)])
    return figures
