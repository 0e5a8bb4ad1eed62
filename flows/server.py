"""Prefect's server: whether the user has one, and a temporary one started while other work goes on."""

from __future__ import annotations

import threading

from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import get_current_settings


def configured() -> bool:
    """Whether `PREFECT_API_URL` is set, in the environment or in the active profile."""
    return bool(get_current_settings().api.url)


def start_early() -> threading.Thread:
    """Starts Prefect's temporary server in a thread; the first flow then finds it running.

    Its start takes seconds, most of them in another process: time to import Flax and check the recipe.
    """
    thread = threading.Thread(target=SubprocessASGIServer().start, name="temporary server", daemon=True)
    thread.start()
    return thread
