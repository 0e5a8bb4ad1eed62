"""`python -m tests.faults.threads STORE < RECIPES`: runs recipes at once, each in a thread of this one process."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier


def main() -> int:
    from prune_jax.launch import run

    recipes, store = json.load(sys.stdin), sys.argv[1]
    together = Barrier(len(recipes))

    def one(raw: object) -> str:
        together.wait()
        return str(run(raw, store=store)["status"])  # type: ignore[arg-type]

    with ThreadPoolExecutor(len(recipes)) as pool:
        statuses = list(pool.map(one, recipes))
    sys.stderr.write(f"{statuses}\n")
    return int(set(statuses) != {"completed"})


if __name__ == "__main__":
    sys.exit(main())
