"""Whether every file of a store is still the one that was written."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from prune_jax.checkpoints import Store
from prune_jax.disks import readable
from prune_jax.files import files_below
from prune_jax.inventory import Leftover, artifacts, check_is_store, leftovers, measure, records
from prune_jax.progress import Progress, Report, silent
from prune_jax.recipe import Ref


class Verdict(NamedTuple):
    """What is said of one artifact."""

    ref: Ref
    files: int
    bytes: int
    damages: tuple[str, ...]  # each names a file and says what is wrong with it; none: intact


class Verification(NamedTuple):
    """What was found."""

    verdicts: tuple[Verdict, ...]
    records: int
    unreadable: tuple[str, ...]  # files that are no records
    leftovers: tuple[Leftover, ...]  # told, and no damage

    @property
    def intact(self) -> bool:
        """Whether nothing is damaged."""
        return not any(verdict.damages for verdict in self.verdicts)


def verify(store: Store | str | os.PathLike[str], run: str | None = None, *, report: Report = silent) -> Verification:
    """Hashes every file of the artifacts anew and holds it against what was written down with it.

    Args:
        store: where they lie: a folder, a URL, or a `Store`.
        run: only the artifacts that this run's record names; left out, all, and those that any record names.
        report: hears of each artifact.

    Raises:
        UserMistake: there is no such store or run.
    """
    store = store if isinstance(store, Store) else Store(store)
    check_is_store(store)
    written = records(store)
    if run is not None:
        store.record(run)  # refuses an unknown name
        written = [record for record in written if record.run == run and record.latest]
    named = {ref for record in written for ref in record.refs}
    refs = sorted(named if run is not None else named | set(artifacts(store)))
    verdicts = []
    for i, ref in enumerate(refs):
        report(Progress("verify", f"{ref.kind}/{ref.key[:12]}", i, len(refs), "artifact"))
        verdicts.append(_verdict(store, ref))
    left = () if run is not None else tuple(leftovers(store))
    unreadable = tuple(str(record.path) for record in written if record.content is None)
    return Verification(tuple(verdicts), len(written), unreadable, left)


def _verdict(store: Store, ref: Ref) -> Verdict:
    folder = store.path(ref)
    if not folder.exists():
        return Verdict(ref, 0, 0, (f"{folder} is missing",))
    return Verdict(ref, len(list(files_below(folder))), measure(folder)[0], tuple(store.damages(ref)))


def verification_table(found: Verification) -> Table:
    """The artifacts with what was found."""
    table = Table("kind", "key", box=None, pad_edge=False)
    table.add_column("files", justify="right")
    table.add_column("size", justify="right")
    table.add_column("verdict")
    for verdict in found.verdicts:
        told = f"[red]damaged[/], {len(verdict.damages)}" if verdict.damages else "[green]intact[/]"
        table.add_row(verdict.ref.kind, verdict.ref.key, str(verdict.files), readable(verdict.bytes), told)
    return table


def verification_lines(found: Verification) -> Iterable[str]:
    """What is to be said below the table: each damaged file and what to do, then what is no damage."""
    for verdict in found.verdicts:
        for damage in verdict.damages:
            yield f"[red]damaged[/] {escape(damage)}"
    broken = sum(bool(verdict.damages) for verdict in found.verdicts)
    count, size = len(found.verdicts), readable(sum(verdict.bytes for verdict in found.verdicts))
    total = f"{count} artifact{'s' * (count != 1)}, {size}"
    if broken:
        yield (
            f"{total}: {broken} damaged. Run their recipes again: what is damaged is moved aside and made anew, "
            "nothing else is."
        )
    else:
        yield f"{total}: all intact"
    for path in found.unreadable:
        yield f"{escape(path)} is no record of a run. Run its recipe again; what it computed is there."
    kinds = [left.what for left in found.leftovers]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    records = f"{found.records} record{'s' * (found.records != 1)} of runs"
    yield f"[dim]{records}" + (f"; no damage: {counts} (`prune-jax gc`)[/]" if kinds else "[/]")


def verification_json(store: Store, found: Verification) -> dict[str, Any]:
    """The same for programs."""
    return {
        "store": str(store.root),
        "intact": found.intact,
        "artifacts": [
            {
                **verdict.ref._asdict(),
                "files": verdict.files,
                "bytes": verdict.bytes,
                "verdict": "damaged" if verdict.damages else "intact",
                "damages": list(verdict.damages),
            }
            for verdict in found.verdicts
        ],
        "records": found.records,
        "unreadable": list(found.unreadable),
        "leftovers": [{"path": str(left.path), "what": left.what} for left in found.leftovers],
    }
