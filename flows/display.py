"""What came of a run, in the UI: a table, the report's main chart, and a summary that says where the report lies."""

from __future__ import annotations

import base64
import os
from typing import Any

from httpx import HTTPError
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact
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
        drawn = _draw(store, record, key) if PREFECT_UI_URL.value() else ""
        create_markdown_artifact(
            key=f"{key}-summary", markdown=f"{told}\n\n{results_markdown(record)}{drawn}", description=told
        )
    except (HTTPError, OSError, PruneError) as error:
        get_run_logger().warning("the run's results could not be shown in the UI: %s", error)


def artifact_key(name: str) -> str:
    """A name as Prefect takes it for its artifacts."""
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-") or "run"


def _draw(store: Store, record: dict[str, Any], key: str) -> str:
    """Writes the report, shows its main chart, and answers the line that leads to it.

    `PRUNE_JAX_REPORTS_URL` is where `STORE/runs` can be seen in a browser: pages must not link to files.
    """
    from prune_jax.report.page import picture

    path = write_report(store, record["name"])
    with reading(f"run {record['name']!r}"):
        drawn = picture(store, record)
    if drawn is not None:
        kind, data = drawn
        url = f"data:{kind};base64,{base64.b64encode(data).decode()}"
        create_image_artifact(key=f"{key}-chart", image_url=url, description=record["message"])
    served = os.environ.get("PRUNE_JAX_REPORTS_URL", "").rstrip("/")
    return f"\n[Report]({served}/{record['name']}/{path.name})\n" if served else f"\nReport: `{path}`\n"


def _rows(record: dict[str, Any]) -> list[dict[str, str]]:
    table = results_table(record)
    return [
        {"network": name, "role": role, **{q: cell.text for q, cell in zip(table.quantities, column, strict=True)}}
        for name, role, column in zip(table.networks, table.roles, table.columns, strict=True)
    ]
