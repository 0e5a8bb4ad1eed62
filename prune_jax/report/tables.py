"""The evaluated networks side by side, dense and pruned: one set of cells for the terminal, Markdown and HTML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import compress
from textwrap import wrap
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from prune_jax.roles import descends, role_of, trained_sparse

Record = Mapping[str, Any]

MANY = 5  # with more networks than this, each has a row instead of a column
HIGHER_IS_BETTER = {"accuracy"}
MISSING = "–"
SIZES = {
    "params": "parameters",
    "nonzero": "non-zeros",
    "sparsity": "sparsity",
    "sparsity_total": "sparsity of the whole model",
    "macs": "MACs",
    "effective_macs": "effective MACs",
    "bytes": "bytes",
    "bytes_compressed": "bytes compressed",
}


class Cell(NamedTuple):
    """One number as text, and how it compares with the dense network's (empty for the dense network itself)."""

    text: str
    versus: str = ""


class Results(NamedTuple):
    """One column of cells for each network."""

    networks: tuple[str, ...]
    roles: tuple[str, ...]  # what each network is to the question: dense, masked, compact, a control
    dense: tuple[bool, ...]
    quantities: tuple[str, ...]  # what each cell of a column is
    vital: tuple[bool, ...]  # which quantities are shown where there is little room
    columns: tuple[tuple[Cell, ...], ...]

    @property
    def compared(self) -> tuple[bool, ...]:
        """For each quantity, whether any network's is compared with the dense one's."""
        return tuple(any(column[i].versus for column in self.columns) for i in range(len(self.quantities)))

    @property
    def many(self) -> bool:
        """Whether each network is better given a row."""
        return len(self.networks) > MANY

    @property
    def order(self) -> tuple[int, ...]:
        """The quantities as rows of many columns have them: the vital ones first."""
        return tuple(sorted(range(len(self.quantities)), key=lambda i: not self.vital[i]))


def metrics_of(result: Mapping[str, Any]) -> list[str]:
    """The names of a network's metrics: every plain number that is not its loss or its size."""
    return [k for k, v in result.items() if isinstance(v, int | float) and k not in {"loss", "seconds", *SIZES}]


def primary_metric(record: Record) -> str:
    """The metric that the run is about: that of its evaluated networks, else that of its validation."""
    for result in record.get("results", {}).values():
        if metrics_of(result):
            return metrics_of(result)[0]
    told = [m for s in record.get("stages", {}).values() for m in s.get("metrics", {}) if m.startswith("validation_")]
    return next((m.removeprefix("validation_") for m in told if m != "validation_loss"), "loss")


def dense_of(record: Record, network: str) -> str | None:
    """The evaluated dense training from which a network descends; itself for such a training.

    Of what was sparse from the first step on, the one beside it in the matrix; where there is none, any training.
    """
    stages, results = record.get("stages", {}), record.get("results", {})
    seen, ahead = set(), [network]
    while ahead:
        name = ahead.pop(0)
        if name in results and results[name].get("kind") == "train" and not trained_sparse(record, name):
            return name
        if name not in seen:
            seen.add(name)
            ahead += descends(stages, name)
    trained = [n for n, r in results.items() if r.get("kind") == "train"]
    row = results.get(network, {}).get("row") or {}
    beside = [n for n in trained if all(row.get(axis) == v for axis, v in (results[n].get("row") or {}).items())]
    return next((n for n in [*beside, *trained] if not trained_sparse(record, n)), next(iter(trained), None))


def short(name: str) -> str:
    """The name of a matrix's row with the last words of its axes, where they tell them apart.

    >>> short("random[by-chance.target.sparsity=0.5,seed=1]"), short("prune[a.x=1,b.x=2]")
    ('random[sparsity=0.5,seed=1]', 'prune[a.x=1,b.x=2]')
    """
    axes = re.findall(r"[\[,]([\w.-]+)=", name)
    words = [axis.rpartition(".")[2] for axis in axes]
    if len(set(words)) < len(words):
        return name
    return re.sub(r"([\[,])[\w.-]+\.(\w+)=", r"\1\2=", name)


def results_table(record: Record) -> Results:
    """Metric, loss, sizes and latency of every evaluated network, each with its ratio to the dense one.

    Accuracies are compared by their difference, all else by `value / dense`; sparsity is not compared.
    """
    results = record.get("results", {})
    metrics = list(dict.fromkeys(m for r in results.values() for m in metrics_of(r)))
    batches = sorted({b for r in results.values() for b in r.get("latency_ms") or {}}, key=int)
    sizes = [q for q in SIZES if any(q in r for r in results.values())]
    paths: list[tuple[str, ...]] = [(m,) for m in (*metrics, "loss", *sizes)]
    paths += [("peak_bytes", b) for b in batches if any(_at(r, ("peak_bytes", b)) for r in results.values())]
    paths += [("latency_ms", b, p) for b in batches for p in ("p50", "p90")]
    columns, dense = [], []
    for name, result in results.items():
        reference = dense_of(record, name)
        base = {**results[reference], **_beside(result)} if reference not in (None, name) else {}
        columns.append(tuple(Cell(shown(p, _at(result, p)), versus(p, _at(result, p), _at(base, p))) for p in paths))
        dense.append(reference == name)
    roles = tuple(role_of(record, name) for name in results)
    cut = any(role.startswith(("compact", "fresh")) for role in roles)
    counts = ("params", "macs", "bytes") if cut else ("nonzero", "sparsity")
    most: set[tuple[str, ...]] = {(q,) for q in (*metrics, *counts)} | {("latency_ms", b, "p50") for b in batches[:1]}
    most |= {("peak_bytes", b) for b in batches[-1:]} if cut else set()
    vital = tuple(p in most for p in paths)
    return Results(tuple(results), roles, tuple(dense), tuple(_title(p) for p in paths), vital, tuple(columns))


def _beside(result: Mapping[str, Any]) -> dict[str, Any]:
    """The dense network's latency as it was measured in turns with this one's."""
    times = (result.get("beside") or {}).get("latency_ms")
    return {"latency_ms": times} if times else {}


def results_rich(record: Record) -> Table:
    """The table that a run ends with in the terminal."""
    results = results_table(record)
    table = Table(title=Text(str(record.get("name", ""))), title_style="bold", header_style="bold", box=box.SIMPLE_HEAD)
    if not results.many:
        table.add_column("")
        for name, role in zip(results.networks, results.roles, strict=True):
            table.add_column(_named(short(name), role), justify="right")
        for i, quantity in enumerate(results.quantities):
            cells = [_rich_cell(column[i], " ") for column in results.columns]
            table.add_row(Text(quantity), *cells)
        return table
    table.padding = (0, 1, 0, 0)
    table.add_column("network", overflow="fold")
    for quantity in compress(results.quantities, results.vital):
        table.add_column(Text("\n".join(wrap(quantity, 9, break_long_words=False))), justify="right", no_wrap=True)
    for name, role, column in zip(results.networks, results.roles, results.columns, strict=True):
        spaced = short(name).replace(",", ", ").replace("[", " [")  # so that it breaks between the axes of a matrix
        table.add_row(_named(spaced, role), *(_rich_cell(cell, "\n") for cell in compress(column, results.vital)))
    return table


def results_markdown(record: Record) -> str:
    """The same table for a Markdown artifact."""
    results = results_table(record)
    if not results.networks:
        return "No network was evaluated.\n"
    if results.many:
        header: list[str] = ["network", "", *results.quantities]
        rows = [[short(n), r, *map(_text, c)] for n, r, c in zip(*results[:2], results.columns, strict=True)]
    else:
        header = ["", *map(short, results.networks)]
        rows = [["", *results.roles]] if any(results.roles) else []
        rows += [[q, *(_text(c[i]) for c in results.columns)] for i, q in enumerate(results.quantities)]
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(_plain(cell) for cell in line)} |\n" for line in lines)


def shown(path: tuple[str, ...], value: Any) -> str:
    """A number of a result as text, in the unit of what it is.

    >>> shown(("accuracy",), 0.95), shown(("sparsity",), 0.9), shown(("bytes",), 1066440)
    ('0.9500', '90.0 %', '1.07 MB')
    >>> shown(("latency_ms", "1", "p50"), 0.0214), shown(("macs",), 41200000), shown(("loss",), None)
    ('0.0214 ms', '41.2 M', '–')
    """
    if value is None:
        return MISSING
    match path[0]:
        case "accuracy":
            return f"{value:.4f}"
        case "sparsity" | "sparsity_total":
            return percent(value)
        case "params" | "nonzero" | "macs" | "effective_macs":
            return f"{value:,.0f}" if value < 1e7 else _scaled(value)
        case "bytes" | "bytes_compressed" | "peak_bytes":
            return f"{_scaled(value)}B" if value >= 1000 else f"{value:.0f} B"
        case "latency_ms":
            return f"{value:#.3g} ms"
    return f"{value:#.4g}"


def percent(fraction: float) -> str:
    """A fraction as a percentage; with more digits where one would round to 100 %.

    >>> percent(0.9), percent(0.9973)
    ('90.0 %', '99.73 %')
    """
    return f"{100 * fraction:.2f} %" if 0.99 <= fraction < 1 else f"{100 * fraction:.1f} %"


def versus(path: tuple[str, ...], value: float | None, dense: float | None) -> str:
    """How a number compares with the dense network's: a difference for accuracies, else a ratio.

    >>> versus(("accuracy",), 0.951, 0.955), versus(("nonzero",), 26660, 266610), versus(("sparsity",), 0.9, 0.0)
    ('−0.0040', '×0.100', '')
    """
    if value is None or dense is None or path[0] in {"sparsity", "sparsity_total"}:
        return ""
    if path[0] == "accuracy":
        return signed(value - dense)
    return f"×{value / dense:#.3g}".removesuffix(".") if dense else ""


def signed(difference: float, digits: int = 4) -> str:
    """A difference with its sign, a true minus.

    >>> signed(-0.004, 3), signed(0.0)
    ('−0.004', '±0.0000')
    """
    text = f"{abs(difference):.{digits}f}"
    return ("±" if float(text) == 0 else "−" if difference < 0 else "+") + text


def _scaled(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} "


def _at(result: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    found: Any = result
    for part in path:
        found = (found or {}).get(part)
    return found


def _title(path: tuple[str, ...]) -> str:
    if path[0] == "latency_ms":
        return f"latency {path[2]}, batch {path[1]}"
    if path[0] == "peak_bytes":
        return f"peak memory, batch {path[1]}"
    return SIZES.get(path[0], path[0])


def _text(cell: Cell) -> str:
    return f"{cell.text} ({cell.versus})" if cell.versus else cell.text


def _named(name: str, role: str) -> Text:
    """A network's name over its role, unless they are one word."""
    return Text.assemble(name, (f"\n{role}", "not bold dim")) if role and role != name else Text(name)


def _rich_cell(cell: Cell, between: str) -> Text:
    """Text, not markup: the names of a matrix's rows hold brackets."""
    return Text.assemble(cell.text, (f"{between}{cell.versus}", "dim")) if cell.versus else Text(cell.text)


def _plain(text: str) -> str:
    for special in "\\|[]<>*_`":
        text = text.replace(special, f"\\{special}")
    return text
