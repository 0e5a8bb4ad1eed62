"""`python -m tests.faults.forks RECIPE`: a process with everything imported that forks one for each run of a recipe.

A store's path comes in on a line; out go the number of the fork and, once it has ended, its exit status. JAX is
imported but not started before the fork: its threads are the child's own. Dozens of kills in the time of a few starts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any


def _run(raw: Any, folder: str) -> None:
    from prune_jax.checkpoints import Store
    from prune_jax.records import Run
    from tests.plain import run_plain

    store = Store(folder)
    plan, results = run_plain(raw, store)
    Run(plan, store, raw["name"]).finish(results)


def _serve(raw: Any) -> None:
    import grain  # noqa: F401
    import orbax.checkpoint  # noqa: F401

    import tests.plain  # noqa: F401

    warnings.filterwarnings("ignore", message="os.fork")
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                _run(raw, line.strip())
                os._exit(0)
            except BaseException as error:
                sys.stderr.write(f"{type(error).__name__}: {error}\n")
                os._exit(1)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        sys.stdout.flush()


class Forks:
    """The process that forks, as a context; `launch(store)` starts a run."""

    def __init__(self, raw: Any, env: dict[str, str]):
        words = [sys.executable, "-m", "tests.faults.forks", json.dumps(raw)]
        self.process = subprocess.Popen(words, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def launch(self, store: Path) -> Fork:
        """Starts a run on a store."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{store}\n")
        self.process.stdin.flush()
        return Fork(self.process)


class Fork:
    """One run."""

    def __init__(self, parent: subprocess.Popen[str]):
        self.parent = parent
        self.pid = int(self._line())
        self.code: int | None = None
        self.thread = threading.Thread(target=self._wait, daemon=True)
        self.thread.start()

    def _line(self) -> str:
        assert self.parent.stdout is not None
        return self.parent.stdout.readline()

    def _wait(self) -> None:
        self.code = int(self._line())

    def poll(self) -> int | None:
        """The exit code, or nothing while it runs."""
        return self.code

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, in the end."""
        self.thread.join(timeout)
        if self.code is None:
            raise TimeoutError(f"the run did not end within {timeout} s")
        return self.code


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
