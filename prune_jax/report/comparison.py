"""Methods side by side as ShrinkBench wants them (Blalock et al. 2020, arXiv:2003.03033).

The metric against compression and against the reduction of MACs, means and spreads over seeds, and differences of
networks that share their seed, which say more than differences of means: what a seed is worth cancels out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text
from scipy.special import stdtrit

from prune_jax.errors import UserMistake, did_you_mean
from prune_jax.report.facts import base_name, word
from prune_jax.report.tables import HIGHER_IS_BETTER, Record, dense_of, percent, primary_metric, shown, signed
from prune_jax.roles import LONGER, is_control, lineage, role_of

RANDOM = "random"
DENSE = "dense"
OF_NETWORK = ("model", "data", "objective")  # what the dense network is of, beside its training
CONFIDENCE = 0.95


class Network(NamedTuple):
    """One evaluated network."""

    value: float  # its metric on the test split
    compression: float  # weights of the dense network / weights that are not zero
    speedup: float  # MACs of the dense network / MACs of weights that are not zero


class Place(NamedTuple):
    """A method at one level of pruning, over seeds."""

    level: Any  # the sparsity that was asked for; None for a method without levels
    networks: Mapping[Any, Network]  # by seed

    @property
    def mean(self) -> float:
        """Mean of the metric."""
        return fmean(n.value for n in self.networks.values())

    @property
    def deviation(self) -> float:
        """Standard deviation of the metric over seeds, 0 of one seed."""
        values = [n.value for n in self.networks.values()]
        return stdev(values) if len(values) > 1 else 0.0

    def ratio(self, name: str) -> float:
        """Mean of `compression` or of `speedup`: geometric, as of any ratios."""
        return math.exp(fmean(math.log(getattr(n, name)) for n in self.networks.values()))


class Difference(NamedTuple):
    """How two methods differ at one level, by seeds that both have."""

    mean: float
    error: float | None  # standard error of the mean; None of one pair
    pairs: int

    @property
    def clear(self) -> bool:
        """Whether a two-sided t-test tells it from zero, at 95 %."""
        if self.error is None:
            return False
        return abs(self.mean) > float(stdtrit(self.pairs - 1, (1 + CONFIDENCE) / 2)) * self.error


class Panel(NamedTuple):
    """The methods that pruned one network."""

    title: str  # which network, if the run has several
    dense: Place
    longer: Place | None  # the dense network trained as long as the pruned ones
    curves: Mapping[str, tuple[Place, ...]]  # by method, levels ascending
    controls: frozenset[str]  # methods that are there to be beaten

    @property
    def levels(self) -> list[Any]:
        """All levels, ascending."""
        return sorted({p.level for places in self.curves.values() for p in places}, key=_rank)

    @property
    def reference(self) -> str:
        """What methods are compared with: random pruning, if it is there, else the dense network."""
        return RANDOM if RANDOM in self.curves else DENSE

    def known(self, label: str | None) -> str:
        """The method that is called so; the reference for None. Raises `UserMistake` where there is none."""
        if label is None:
            return self.reference
        if label != DENSE and label not in self.curves:
            known = (DENSE, *self.curves)
            raise UserMistake(f"no method {label!r} here{did_you_mean(label, known)} (there are: {', '.join(known)})")
        return label

    def at(self, label: str, level: Any) -> Place | None:
        """A method at a level."""
        if label == DENSE:
            return self.dense
        return next((p for p in self.curves[label] if p.level == level), None)

    def difference(self, label: str, level: Any, reference: str) -> Difference | None:
        """`mean(a_s - b_s)` over the seeds s of both, with its standard error `sd(a_s - b_s) / sqrt(n)`."""
        a, b = self.at(label, level), self.at(reference, level)
        if a is None or b is None or label == reference:
            return None
        gaps = [a.networks[s].value - b.networks[s].value for s in a.networks if s in b.networks]
        if not gaps:
            return None
        return Difference(fmean(gaps), stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None, len(gaps))


def merged(records: Sequence[Record]) -> dict[str, Any]:
    """Several runs as one record: names of stages begin with the run's; one run stays as it is.

    Runs that pruned different networks have their axis `network`.

    Raises:
        UserMistake: the runs measure different things.
    """
    if len(records) == 1:
        return dict(records[0])
    metrics = {primary_metric(record): record["name"] for record in records if record.get("results")}
    if len(metrics) > 1:
        told = ", ".join(f"{name} {metric}" for metric, name in metrics.items())
        raise UserMistake(f"the runs measure different things ({told}): compare those of one metric")
    homes: list[list[Record]] = []
    for record in records:
        home = next((home for home in homes if _same_network(home[0], record)), None)
        if home is None:
            homes.append(home := [])
        home.append(record)
    networks = {r["name"]: " · ".join(other["name"] for other in home) for home in homes for r in home}
    whole: dict[str, Any] = {"name": " · ".join(r["name"] for r in records), "recipe": {"stages": {}, "matrix": {}}}
    whole |= {"stages": {}, "results": {}}
    for record in records:
        start = f"{record['name']}: "
        row: dict[str, Any] = {"run": record["name"]} | (
            {"network": networks[record["name"]]} if len(homes) > 1 else {}
        )
        recipe = record.get("recipe", {})
        axes = {axis for stage in record["stages"].values() for axis in stage.get("row") or {}}
        if not any(axis.rpartition(".")[2] == "seed" for axis in axes):
            row["seed"] = str(recipe.get("seed", 0))
        whole["recipe"]["matrix"] |= recipe.get("matrix") or {}
        whole["recipe"]["stages"] |= {start + n: s for n, s in recipe.get("stages", {}).items()}
        for name, stage in record["stages"].items():
            after = [start + n for n in stage.get("after", [])]
            whole["stages"][start + name] = {**stage, "after": after, "row": {**row, **(stage.get("row") or {})}}
        for name, result in record["results"].items():
            whole["results"][start + name] = {**result, "row": {**row, **(result.get("row") or {})}}
    return whole


def _same_network(a: Record, b: Record) -> bool:
    """Whether two runs trained one dense network, or would have by other seeds."""
    mine, its = ({r.get("key") for r in record["results"].values() if r.get("kind") == "train"} for record in (a, b))
    return bool(mine & its) or _trained(a) == _trained(b)


def _trained(record: Record) -> dict[str, Any]:
    """What a run says of the networks that it trains, but for their seeds."""
    recipe = record.get("recipe") or {}
    stages = [stage for stage in recipe.get("stages", {}).values() if stage.get("kind") == "train"]
    trainings = [{k: v for k, v in stage.items() if k != "seed"} for stage in stages]
    axes = {axis: v for axis, v in (recipe.get("matrix") or {}).items() if axis.startswith(OF_NETWORK)}
    return {word: recipe.get(word) for word in OF_NETWORK} | {"axes": axes, "trainings": trainings}


class Row(NamedTuple):
    """A method's cells, one for each level: the metric, how it differs from the reference, whether that is clear."""

    label: str
    cells: tuple[tuple[str, str, bool], ...]


def spread(place: Place, metric: str) -> str:
    """The metric of a place: mean ± standard deviation, of one seed the value."""
    told = (place.mean, place.deviation) if len(place.networks) > 1 else (place.mean,)
    return " ± ".join(shown((metric,), value) for value in told)


def gap_text(gap: Difference, metric: str) -> str:
    """A difference ± its standard error, with as many digits as the metric's values have."""
    digits = 4
    if metric != "accuracy" and (size := max(abs(gap.mean), gap.error or 0.0)):
        digits = max(0, 2 - math.floor(math.log10(size)))
    return signed(gap.mean, digits) + ("" if gap.error is None else f" ± {gap.error:.{digits}f}")


def rows_of(panel: Panel, metric: str, reference: str) -> list[Row]:
    """The table of a panel: mean ± standard deviation; mean difference ± its standard error."""
    rows = []
    for label in panel.curves:
        cells = []
        for level in panel.levels:
            place, gap = panel.at(label, level), panel.difference(label, level, reference)
            text, told = "" if place is None else spread(place, metric), "" if gap is None else gap_text(gap, metric)
            cells.append((text, told, gap is not None and gap.clear))
        rows.append(Row(label, tuple(cells)))
    return rows


def directed(metric: str) -> str:
    """A metric's name, and which way is up where that is not plain."""
    return metric if metric in HIGHER_IS_BETTER else f"{metric} (lower is better)"


def comparison_rich(panel: Panel, metric: str, reference: str) -> Table:
    """The table in the terminal."""
    title = ", ".join(filter(None, (panel.title, directed(metric))))
    for place, label in ((panel.dense, DENSE), (panel.longer, LONGER)):
        title += f"\n{label} {spread(place, metric)}" if place else ""
    table = Table(title=Text(title), title_style="bold", header_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("sparsity")
    for level in panel.levels:
        table.add_column("" if level is None else percent(level), justify="right")
    for row in rows_of(panel, metric, reference):
        cells = [
            Text.assemble(text, (f"\n{told}{'*' if clear else ' '}" if told else "", "bold" if clear else "dim"))
            for text, told, clear in row.cells
        ]
        table.add_row(Text(row.label), *cells)
    seeds = len(panel.dense.networks)
    table.caption = (
        f"mean ± sd over {seeds} seeds; below: difference from {reference}, paired, ± its standard error; "
        "* where a t-test tells it from 0 at 95 %"
    )
    return table


def panels_of(record: Record, *, least: int = 2) -> list[Panel]:
    """The comparisons that a run holds, one for each network that was pruned by at least so many methods.

    Axes of a matrix are read as what they are: `seed` repeats, `sparsity` makes levels, those of the dense network (of
    the model, the data, its training) make panels, all others name methods. Networks that others were made of stand for
    these others alone.
    """
    results = record.get("results", {})
    used = {n for name in results for n in lineage(record, name)[1:]}
    trainings = {_stage(name) for name in results if _dense(record, name) == name}
    ends = {
        name: _axes(record, name, several=len(trainings) > 1)
        for name in results
        if name not in used or _dense(record, name) == name
    }
    stages_by_words: dict[str, set[str]] = {}
    longer_keys: dict[tuple[str, Any], set[str]] = {}
    for name, axes in ends.items():
        if _dense(record, name) != name:
            stages_by_words.setdefault(axes.words, set()).add(_stage(name))
        if role_of(record, name) == LONGER:
            longer_keys.setdefault((axes.panel, axes.seed), set()).add(results[name]["key"])
    found: dict[str, dict[str, dict[Any, dict[Any, Network]]]] = {}
    controls: set[str] = set()
    for name, axes in ends.items():
        network, label, level, role = _network(record, name), axes.words, axes.level, role_of(record, name)
        if network is None:
            continue
        if _dense(record, name) == name:
            label, level = DENSE, None
        elif role == LONGER and len(longer_keys[axes.panel, axes.seed]) == 1:
            label, level = LONGER, None
        elif not label or len(stages_by_words[label]) > 1:
            label = ", ".join(filter(None, (_stage(name), label)))
        if is_control(role) or "from scratch" in role:
            controls.add(label)
        found.setdefault(axes.panel, {}).setdefault(label, {}).setdefault(level, {})[axes.seed] = network
    panels = []
    for title, methods in found.items():
        curves: dict[str, tuple[Place, ...]] = {
            label: tuple(Place(level, levels[level]) for level in sorted(levels, key=_rank))
            for label, levels in methods.items()
        }
        dense, longer = curves.pop(DENSE, None), curves.pop(LONGER, None)
        if dense and len(curves) >= least:
            panels.append(
                Panel(title, dense[0], longer[0] if longer else None, curves, frozenset(controls & curves.keys()))
            )
    return panels


class _Axes(NamedTuple):
    """Where a network stands in its matrix."""

    panel: str
    words: str
    level: Any
    seed: Any


def _axes(record: Record, name: str, *, several: bool) -> _Axes:
    """Of a network in a run of one training stage, or of several."""
    row, dense = record["results"][name].get("row") or {}, _dense(record, name)
    matrix: Mapping[str, Any] = (record.get("recipe") or {}).get("matrix") or {}
    own: Mapping[str, Any] = record["results"][dense].get("row") or {} if dense else {}
    title = [_stage(dense)] if dense and several else []
    words: list[str] = []
    levels: list[Any] = []
    seeds: list[Any] = []
    for axis, value in row.items():
        end = axis.rpartition(".")[2]
        if end in ("seed", "sparsity"):
            (seeds if end == "seed" else levels).append(value)
        elif axis == "run" or axis not in own:
            words.append(word(value))
        else:
            plain = axis == "network" or any(f".{m}".endswith(f".{axis}") and m.startswith(OF_NETWORK) for m in matrix)
            title.append(word(value) if plain else f"{axis}={word(value)}")
    level = float(levels[-1]) if levels else None
    return _Axes(", ".join(title), ", ".join(words), level, seeds[0] if len(seeds) == 1 else tuple(seeds) or None)


def _stage(name: str) -> str:
    """The stage of a network without its run."""
    return base_name(name).rpartition(": ")[2]


def _dense(record: Record, name: str) -> str | None:
    """The dense network of a network, if it was evaluated: not that of another place in the matrix."""
    dense, results = dense_of(record, name), record["results"]
    own = results.get(dense, {}).get("row") or {}
    return dense if all((results[name].get("row") or {}).get(axis) == value for axis, value in own.items()) else None


def _network(record: Record, name: str) -> Network | None:
    """What is compared of a network; None where it, or the dense network, was not evaluated so far."""
    metric, result, dense = primary_metric(record), record["results"][name], _dense(record, name)
    start = record["results"].get(dense, {})
    if metric not in result or metric not in start or not {"nonzero", "effective_macs"} <= result.keys():
        return None
    smaller, faster = start["params"] / max(1, result["nonzero"]), start["macs"] / max(1, result["effective_macs"])
    return Network(result[metric], smaller, faster)


def _rank(level: Any) -> tuple[bool, Any]:
    """Levels in ascending order, what has none first."""
    return (False, 0.0) if level is None else (True, level)
