"""Prefect flows and tasks: thin over `prune_jax`, installed as `prune_jax.flows`. The one room that knows Prefect.

No telemetry leaves the machine unless the user turned it on: `DO_NOT_TRACK=0`,
`PREFECT_SERVER_ANALYTICS_ENABLED=true`.
"""

import os

from prune_jax import shares

os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", "6")  # two minutes of patience with a server that starts anew
shares.settle()
