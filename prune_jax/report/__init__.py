"""What came of a run: tables for the terminal and for Prefect, and one HTML file with everything in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from etils import epath

    from prune_jax.checkpoints import Store

__all__ = ["write_report"]


def write_report(store: Store, name: str) -> epath.Path:
    """Writes `STORE/runs/<name>/report.html`: self-contained, and the same bytes for the same record and artifacts.

    Args:
        store: where the run's record and artifacts lie; artifacts that are gone are left out, and the report says so.
        name: the run's.

    Returns:
        The path of the file.

    Raises:
        UserMistake: there is no run of that name.
    """
    from prune_jax.report.page import page  # the tables are wanted without matplotlib, Jinja and Orbax

    path = store.record_path(name).parent / "report.html"
    path.write_text(page(store, store.record(name)))
    return path
