"""What Prefect costs for each stage: a flow beyond the time of its stages, one after another, with a running server."""

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

ROWS = 8  # each a mask and its result, of a network of a hundred weights


def measure(rounds: int = 3) -> dict[str, Figure]:
    amounts = {f"p{i}": {**PRUNE, "after": "train", "target": {"sparsity": (i + 1) / (ROWS + 1)}} for i in range(ROWS)}
    recipe = read_recipe(tiny(train=TRAIN, **amounts))
    beyond: dict[str, list[float]] = {"plain loop": [], "running server": []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with PrefectServer(root / "home") as server, temporary_settings({PREFECT_API_URL: server.url}):
            for i in range(rounds + 1):
                begun = time.perf_counter()
                _, results = run_plain(recipe, Store(root / f"plain-{i}"))
                plain = time.perf_counter() - begun - sum(result.seconds for result in results.values())
                begun = time.perf_counter()
                stages = run_flow(recipe, store=str(root / f"flow-{i}"), name="tasks", side_by_side=1)[
                    "stages"
                ].values()
                flow = time.perf_counter() - begun - sum(stage["seconds"] for stage in stages)
                ran = sum(stage["status"] == "ran" for stage in stages)
                if i:  # the first imports
                    beyond["plain loop"].append(1000 * plain / ran)
                    beyond["running server"].append(1000 * flow / ran)
    return {f"{name}, beyond each of {ran} stages": figure(values, "ms") for name, values in beyond.items()}
