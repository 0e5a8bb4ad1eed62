"""What a stage costs beside itself: stages of no work as Prefect's tasks, with a server, and in the plain loop."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from prefect.settings import PREFECT_API_URL, temporary_settings
from prune_jax.flows.prune import run_flow

from prune_jax.checkpoints import Store
from prune_jax.recipe import read_recipe
from tests.benchmarks.rounds import Figure, figure
from tests.faults.runs import PrefectServer
from tests.plain import PRUNE, TRAIN, run_plain, tiny

ROWS = 10  # each of three stages: score, mask, and the result of both


def _recipe() -> dict[str, object]:
    return tiny(train=TRAIN, **{f"prune-{i}": {**PRUNE, "seed": i, "after": "train"} for i in range(ROWS)})


def measure(rounds: int = 5) -> dict[str, Figure]:
    raw = _recipe()
    recipe = read_recipe(raw)
    milliseconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with PrefectServer(root / "home") as server, temporary_settings({PREFECT_API_URL: server.url}):
            for i in range(rounds + 1):
                begun = time.perf_counter()
                plan, _ = run_plain(raw, Store(root / f"plain-{i}"))
                plain = time.perf_counter() - begun
                begun = time.perf_counter()
                record = run_flow(recipe, store=str(root / f"flow-{i}"), name="tasks", side_by_side=1)
                flow = time.perf_counter() - begun
                count = len(plan.calls)
                assert {stage["status"] for stage in record["stages"].values()} == {"ran"}
                if i:  # the first compiles
                    milliseconds.setdefault("plain loop, a stage", []).append(1000 * plain / count)
                    milliseconds.setdefault("running server, a stage", []).append(1000 * flow / count)
                    milliseconds.setdefault("running server beyond the plain loop, a stage", []).append(
                        1000 * (flow - plain) / count
                    )
    return {f"{name} of {count}": figure(values, "ms") for name, values in milliseconds.items()}
