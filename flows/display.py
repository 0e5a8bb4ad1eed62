"""What came of a run, in the UI: a table, and a summary with the report's main chart and where the report lies."""

from __future__ import annotations

import base64
import os
from typing import Any

from httpx import HTTPError
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_UI_URL

from prune_jax.checkpoints import Store
from prune_jax.errors import PruneError
from prune_jax.report import reading, write_report
from prune_jax.report.tables import results_markdown, results_table


def show(store: Store, record: dict[str, Any]) -> None:
    """Makes a run's artifacts in the UI; where there is one to look at, the report and its chart are drawn for it.

    The work is done and recorded: a server that is away, or a report that cannot be written, does not undo it.

    Args:
        store: where the run's record and artifacts lie.
        record: the run's.
    """
    key, told = artifact_key(record["name"]), record["message"]
    try:
        if record["results"]:
            create_table_artifact(key=f"{key}-results", table=_rows(record), description=told)
        summary = results_markdown(record)
        if PREFECT_UI_URL.value():
            summary = f"{_chart(store, record)}{summary}{_report(store, record)}"
        create_markdown_artifact(key=f"{key}-summary", markdown=summary, description=told)
    except (HTTPError, OSError, PruneError) as error:
        get_run_logger().warning("the run's results could not be shown in the UI: %s", error)


def artifact_key(name: str) -> str:
    """A name as Prefect takes it for its artifacts."""
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-") or "run"


def _chart(store: Store, record: dict[str, Any]) -> str:
    """The report's main chart, in the Markdown: below an image artifact the UI spells out all of its bytes."""
    from prune_jax.report.page import picture

    with reading(f"run {record['name']!r}"):
        drawn = picture(store, record)
    if drawn is None:
        return ""
    kind, data = drawn
    return f"![chart](data:{kind};base64,{base64.b64encode(data).decode()})\n\n"


def _report(store: Store, record: dict[str, Any]) -> str:
    """Writes the report and answers the line that leads to it.

    `PRUNE_JAX_REPORTS_URL` is where `STORE/runs` can be seen in a browser: pages must not link to files.
    """
    path = write_report(store, record["name"])
    served = os.environ.get("PRUNE_JAX_REPORTS_URL", "").rstrip("/")
    return f"\n[Report]({served}/{record['name']}/{path.name})\n" if served else f"\nReport: `{path}`\n"


def _rows(record: dict[str, Any]) -> list[dict[str, str]]:
    table = results_table(record)
    return [
        {"network": name, "role": role, **{q: cell.text for q, cell in zip(table.quantities, column, strict=True)}}
        for name, role, column in zip(table.networks, table.roles, table.columns, strict=True)
    ]
