"""The champions of a store: promoted by one atomic write, taken back by another, and nothing is ever forgotten.

Whoever promotes has looked at a champion of some generation. The write holds the store's gate and goes through only if
that one still reigns: of two who promote at once, one wins and the other is told. A store on a URL has no locks: there
two who write in the same moment may both go through, and the last one stays, whole.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from prune_jax.checkpoints import CHAMPIONS, Store
from prune_jax.disks import readable, told
from prune_jax.errors import DamagedArtifactError, PromotionError, UserMistake, did_you_mean
from prune_jax.files import replace, sync
from prune_jax.recipe import Champion, Entry, Ref, is_run_name, printable, why_no_champion

FACTS = (
    *("accuracy", "mse", "loss", "params", "nonzero", "sparsity", "macs", "effective_macs"),
    *("bytes", "bytes_compressed", "latency_ms"),
)


class Candidate(NamedTuple):
    """A network of a run that may become champion."""

    run: str
    network: str
    artifact: Ref
    export: Ref
    data: str
    objective: str
    metrics: Mapping[str, Any]


def promote(
    store: Store | str | os.PathLike[str],
    run: str,
    name: str,
    *,
    network: str | None = None,
    expected: int | None = None,
    checks: list[dict[str, Any]] | None = None,
    by: str | None = None,
    why: str = "",
) -> Champion:
    """Makes a run's network the champion of that name.

    Args:
        store: where the run lies: a folder, a URL, or a `Store`.
        run: its name; it completed, evaluated the network and exported it as StableHLO.
        name: the champion's, of letters, digits, '.', '_' and '-'.
        network: the stage whose network it is, if the run exported several.
        expected: the generation of the champion that this was decided against; left out, the present one's.
        checks: what it was held to, as `contest` answers them; kept in the history.
        by: who promotes; left out, the user of this process.
        why: kept in the history.

    Returns:
        The champion with its history.

    Raises:
        UserMistake: there is no such run, it has no such network, or it is the champion already.
        DamagedArtifactError: a file of the network is not the one that was written.
        PromotionError: somebody else promoted meanwhile.
    """
    store = store if isinstance(store, Store) else Store(store)
    before = champion(store, name)
    decided = before.generation if expected is None else expected
    found = candidate(store, run, network)
    with store.at_work([found.artifact, found.export]):
        check_intact(store, found)
        if before.champion and before.champion.export == found.export and before.generation == decided:
            raise UserMistake(
                f"run {run!r}: its network {found.network!r} is the champion {name!r} already "
                f"(generation {before.generation}); nothing was written"
            )
        entry = _entry(found, decided + 1, "promoted", by, why, checks or [])
        return _write(store, name, entry, decided)


def rollback(
    store: Store | str | os.PathLike[str],
    name: str,
    *,
    expected: int | None = None,
    by: str | None = None,
    why: str = "",
) -> Champion:
    """Makes the previous champion the champion again; another one takes back the promotion before.

    Args:
        store: where it lies: a folder, a URL, or a `Store`.
        name: the champion's.
        expected: the generation that is taken back; left out, the present one.
        by: who rolls back; left out, the user of this process.
        why: kept in the history.

    Raises:
        UserMistake: there is no such champion, or none before it.
        DamagedArtifactError: a file of the previous network is not the one that was written.
        PromotionError: somebody else promoted meanwhile.
    """
    store = store if isinstance(store, Store) else Store(store)
    before = reigning(store, name)
    decided, previous = before.generation if expected is None else expected, before.previous
    if previous is None:
        raise UserMistake(f"champion {name!r} has none before it: promote another run instead")
    with store.at_work([previous.artifact, previous.export]):
        check_intact(store, previous)
        entry = previous.model_copy(
            update={
                "generation": decided + 1,
                "action": "rolled back",
                "restores": previous.generation,
                "when": _now(),
                "by": _user() if by is None else by,
                "why": why,
            }
        )
        return _write(store, name, entry, decided)


def reject(store: Store, found: Candidate, name: str, *, checks: list[dict[str, Any]], why: str, by: str = "") -> None:
    """Keeps in the history that a candidate was turned away, and why; the champion stays."""
    with _turn(store, name) as now:
        _put(store, now.after(_entry(found, now.generation, "rejected", by, why, checks)))


def champions(store: Store | str | os.PathLike[str]) -> list[Champion]:
    """All champions of a store with their histories, by name."""
    store = store if isinstance(store, Store) else Store(store)
    folder = store.root / CHAMPIONS
    if not folder.exists():
        return []
    names = sorted(f.stem for f in folder.iterdir() if f.suffix == ".json" and is_run_name(f.stem))
    return [champion(store, name) for name in names]


def champion(store: Store, name: str) -> Champion:
    """The champion of that name; of generation 0 where nobody was promoted yet.

    Raises:
        DamagedArtifactError: its file is not one.
    """
    path = store.champion_path(name)
    with told(f"champion {name!r} cannot be read", str(store.root)):
        try:
            found = why_no_champion(path.read_text())
        except FileNotFoundError:
            return Champion(name=name)
        except UnicodeDecodeError:
            found = "no text"
    if isinstance(found, str):
        raise DamagedArtifactError(
            f"{path} is no champion with its history: {found}. Bring the file back from a copy; or delete it, and "
            "promote the run that is to reign."
        )
    return Champion.model_validate(printable(found.model_dump()))


def reigning(store: Store, name: str) -> Champion:
    """The champion of that name.

    Raises:
        UserMistake: nobody was promoted under that name.
    """
    found = champion(store, name) if is_run_name(name) else None
    if found is None or found.champion is None:
        known = [other.name for other in champions(store) if other.champion]
        raise UserMistake(
            f"no champion {name[:100]!r} in {store.root}{did_you_mean(name, known)} "
            f"(champions: {', '.join(known) or 'none'}); `prune-jax promote RUN --as NAME` makes one"
        )
    return found


def candidate(store: Store, run: str, network: str | None = None, *, rejected: bool = False) -> Candidate:
    """The network of a run that can be promoted.

    Args:
        store: where the run lies.
        run: its name.
        network: the stage whose network it is, if the run exported several.
        rejected: take one that a gate of its own recipe turned away, too: for the history.

    Raises:
        UserMistake: the run failed, or its network was not exported or not evaluated.
    """
    record = store.record(run)
    if record.get("status") != "completed" and not (rejected and record.get("rejected")):
        raise UserMistake(
            f"run {run!r} did not complete ({record.get('message', '')}): mend it, run its recipe again, promote then"
        )
    stages, results = record.get("stages", {}), record.get("results", {})
    exports = {n: s for n, s in stages.items() if s["kind"] == "export" and "stablehlo" in s.get("metrics", {})}
    by_network = {stage["after"][0]: Ref("export", stage["key"]) for stage in exports.values() if stage["after"]}
    if not by_network:
        raise UserMistake(
            f"run {run!r} has no StableHLO export to promote; add a stage such as "
            "`export: {kind: export, of: compact, formats: [stablehlo]}` to its recipe and run it"
        )
    named = f"exported: {', '.join(by_network)}"
    if network is not None and network not in by_network:
        raise UserMistake(f"run {run!r} exported no network {network!r}{did_you_mean(network, by_network)} ({named})")
    if network is None and len(by_network) > 1:
        raise UserMistake(f"run {run!r} exported several networks ({named}): name one with --network")
    chosen = network or next(iter(by_network))
    artifact = Ref(stages[chosen]["kind"], stages[chosen]["key"])
    measured = next((r for r in results.values() if r.get("key") == artifact.key), None)
    if measured is None:
        raise UserMistake(
            f"run {run!r} did not evaluate its network {chosen!r}; add it to a stage such as "
            f"`evaluate: {{kind: evaluate, of: [{chosen}]}}` and run the recipe again"
        )
    export = by_network[chosen]
    problem = (store.meta(export) or {}).get("call", {}).get("problem", {})
    facts = {fact: measured[fact] for fact in FACTS if fact in measured}
    return Candidate(run, chosen, artifact, export, problem.get("data_digest", ""), problem.get("objective", ""), facts)


def check_intact(store: Store, found: Candidate | Entry) -> None:
    """Refuses a network of which a file is missing or not the one that was written."""
    for ref in (found.export, found.artifact):
        damage = f"{store.path(ref)} is missing" if store.meta(ref) is None else store.damage(ref)
        if damage:
            raise DamagedArtifactError(f"{damage}. Run the recipe of {found.run!r} again: it will be made anew.")


@contextlib.contextmanager
def _turn(store: Store, name: str) -> Iterator[Champion]:
    """The champion as it is; on a disk of this machine nobody else writes one meanwhile."""
    with told(f"champion {name!r} cannot be written", str(store.root)):
        store.make(store.champion_path(name).parent)
        store.make(store.root / "runs")
        with store.gate() if store.local else contextlib.nullcontext():
            yield champion(store, name)


def _write(store: Store, name: str, entry: Entry, expected: int) -> Champion:
    with _turn(store, name) as now:
        if now.generation != expected:
            raise _too_late(now, expected)
        wanted = now.after(entry)
        _put(store, wanted)
        if not store.local and (there := champion(store, name)) != wanted:
            raise _too_late(there, expected)
        return wanted


def _put(store: Store, wanted: Champion) -> None:
    path = store.champion_path(wanted.name)
    replace(path, wanted.model_dump_json(indent=1))
    if store.local:
        sync(Path(path.parent))


def _too_late(now: Champion, expected: int) -> PromotionError:
    reign = now.champion
    who = f"run {reign.run!r} by {reign.by or 'somebody'} at {reign.when}" if reign else "nobody"
    return PromotionError(
        f"champion {now.name!r}: promoted by someone else meanwhile: generation {now.generation}, {who}; this was "
        f"decided against generation {expected}. Nothing was changed. Compare with the new champion, and "
        "promote again."
    )


def _entry(
    found: Candidate, generation: int, action: str, by: str | None, why: str, checks: list[dict[str, Any]]
) -> Entry:
    by = _user() if by is None else by
    return Entry.model_validate(
        {
            **found._asdict(),
            "generation": generation,
            "action": action,
            "checks": checks,
            "when": _now(),
            "by": by,
            "why": why,
        }
    )


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return ""


def champions_table(found: list[Champion]) -> Table:
    """Who reigns."""
    table = _table("champion", "generation", "since", "by")
    for each in found:
        if reign := each.champion:
            table.add_row(each.name, str(each.generation), *_told(reign), _minute(reign.when), escape(reign.by))
        else:
            table.add_row(each.name, "0", "[dim]nobody yet[/]")
    return table


def history_table(found: Champion) -> Table:
    """What came to pass under a champion's name, the latest last."""
    table = _table("generation", "what", "when", "by", "why")
    for entry in found.history:
        what = f"rolled back to {entry.restores}" if entry.restores is not None else entry.action
        mark = "[bold green]" if entry == found.champion else "[red]" if entry.action == "rejected" else "[not bold]"
        cells = (f"{mark}{what}[/]", *_told(entry), _minute(entry.when), escape(entry.by), escape(entry.why))
        table.add_row(str(entry.generation), *cells)
    return table


def _table(first: str, second: str, *more: str) -> Table:
    table = Table(first, second, box=None, pad_edge=False)
    table.add_column("run", no_wrap=True, overflow="fold")
    for column in ("network", "metric", "size", *more):
        table.add_column(column)
    return table


def _told(entry: Entry) -> tuple[str, str, str, str]:
    metric = next((fact for fact in FACTS if fact in entry.metrics), "")
    told = f"{metric} {entry.metrics[metric]:.4g}" if metric else ""
    size = readable(entry.metrics["bytes"]) if "bytes" in entry.metrics else ""
    return escape(entry.run), escape(entry.network), told, size


def _minute(when: str) -> str:
    return escape(when[:16].replace("T", " "))
