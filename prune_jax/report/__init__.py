"""What came of a run: tables for the terminal and for Prefect, and one HTML file with everything in it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from prune_jax.errors import DamagedArtifactError, PruneError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from etils import epath

    from prune_jax.checkpoints import Store
    from prune_jax.report.comparison import Panel

__all__ = ["reading", "write_comparison", "write_report"]


@contextmanager
def reading(names: str) -> Iterator[None]:
    """Says of which runs the records are, where one has other figures than those that a run writes.

    Raises:
        DamagedArtifactError: in place of what reading them raised.
    """
    try:
        yield
    except PruneError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise DamagedArtifactError(
            f"{names}: what is stored of it is not what this version of prune_jax writes ({type(error).__name__}: "
            f"{error}). Run the recipe again: what it computed is there."
        ) from error


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
    from prune_jax.checkpoints import write_anew
    from prune_jax.report.page import page  # the tables are wanted without matplotlib, Jinja and Orbax

    path = store.record_path(name).parent / "report.html"
    record = store.record(name)
    with reading(f"run {name!r}"):
        text = page(store, record)
    write_anew(path, text.encode())
    return path


def write_comparison(panels: Sequence[Panel], metric: str, path: str | epath.Path) -> None:
    """Draws `comparison.panels_of` a run, or of several `comparison.merged`, into `path`: .png, .svg or .pdf.

    Raises:
        UserMistake: the picture cannot be of that kind, or cannot be written there.
    """
    from etils import epath

    from prune_jax.checkpoints import write_anew
    from prune_jax.errors import UserMistake
    from prune_jax.report.charts import comparison_picture

    target = epath.Path(path)
    kinds = (".png", ".svg", ".pdf")
    if target.suffix not in kinds:
        raise UserMistake(
            f"--output {path}: a picture of kind {target.suffix or 'none'!r} (allowed: {', '.join(kinds)})"
        )
    try:
        write_anew(target, comparison_picture(panels, metric, target.suffix[1:]))
    except OSError as error:
        raise UserMistake(
            f"--output {path}: cannot be written ({error.strerror}); name a file in a folder that is there"
        ) from None
