"""The report as one HTML file: the facts of a run, put into `page.html`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import resources
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from prune_jax.checkpoints import Store
from prune_jax.report import charts, comparison, dag, facts, network, tables
from prune_jax.report.tables import Record
from prune_jax.roles import LONGER, lineage

FILES = resources.files("prune_jax.report")
SHOWN_GROUPS = 24


def page(store: Store, record: Record) -> str:
    """The whole page; what the record or the store lacks is left out."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "percent": tables.percent,
        "duration": dag.duration,
        "count": "{:,}".format,
        "breakable": breakable,
        "short": tables.short,
    }
    template = environment.from_string((FILES / "page.html").read_text("utf-8"))
    record = {"recipe": {}, "stages": {}, "results": {}, **record}
    arrays = facts.Arrays(store)
    networks = facts.shown_networks(record)
    return template.render(
        record=record,
        css=Markup((FILES / "page.css").read_text("utf-8")),
        headline=headline(record),
        compact=facts.has_compact(record),
        messages=messages(record),
        results=tables.results_table(record),
        notes=sorted({n for r in record["results"].values() for n in r.get("notes", [])}),
        sparsity=_sparsity(store, record),
        controls=_controls(record),
        comparisons=_comparisons(record),
        layers=layers(record),
        drawn=drawings(store, record),
        widths=widths(store, record),
        weights=_weights(arrays, record, networks),
        losses=_losses(arrays, record, networks),
        searches=facts.search_of(store, record),
        dag={"right": dag.dag(record, down=False), "down": dag.dag(record, down=True), "reduced": dag.is_large(record)},
        bars=dag.bars_of(record),
        signs=dag.SIGNS,
        recipe=yaml.safe_dump(
            record.get("recipe", {}), sort_keys=False, allow_unicode=True, default_flow_style=None, width=96
        ),
        missing=list(dict.fromkeys(arrays.missing)),
    )


def picture(store: Store, record: Record) -> tuple[str, bytes] | None:
    """The chart that says most, as a file of its own with its media type; nothing where there is none to draw.

    Methods side by side if there are several, else the metric against sparsity.
    """
    record = {"recipe": {}, "stages": {}, "results": {}, **record}
    metric = tables.primary_metric(record)
    if panels := comparison.panels_of(record):
        return "image/png", charts.comparison_picture(panels, metric, "png")
    series = facts.series_of(store, record)
    if not _is_drawable(series):
        return None
    floor, compact = _floor(record, metric), facts.has_compact(record)
    chart = charts.sparsity_chart(series, metric, width=960, height=380, floor=floor, direct=True, compact=compact)
    return "image/svg+xml", charts.standalone(chart)


def headline(record: Record) -> dict[str, str]:
    """What came of the run in one sentence, and what that sentence is about."""
    stages = record["stages"]
    failed = [n for n, s in stages.items() if s["status"] == "failed" and facts.owner(n, stages) is None]
    metric, best = tables.primary_metric(record), facts.best_of(record)
    if failed or record.get("status") == "failed":
        return {"text": f"Failed at {', '.join(failed)}" if failed else "Failed", "about": ""}
    if best is None:
        dense = next(((n, r) for n, r in record["results"].items() if metric in r), None)
        if dense is None:
            return {"text": "No network was evaluated", "about": ""}
        return {"text": f"{metric} {_value(metric, dense[1][metric])}", "about": f"{dense[0]}; nothing was pruned"}
    versus = ""
    if best["difference"] is not None:
        by_ratio = tables.versus((metric,), best["value"], best["dense"])
        versus = tables.signed(best["difference"], 3) if metric == "accuracy" else by_ratio
    about = [f"mean of {len(best['names'])} seeds"] if len(best["names"]) > 1 else []
    if best["of"] > 1:
        about = [best["name"], *about, f"the {'smallest' if best['smaller'] > 1 else 'sparsest'} of {best['of']}"]
    sparse = f"{_rounded(best['sparsity'])} % sparse"
    if best["smaller"] > 1:
        sparse = f"{best['smaller']:.3g} times smaller" + (f", {sparse}" if best["sparsity"] else "")
    text = f"{sparse} at {metric} {_value(metric, best['value'])}"
    return {"text": text + (f" ({versus})" if versus else ""), "about": ", ".join(about)}


def breakable(name: str) -> Markup:
    """A name that may be broken after its commas and brackets, so that long ones fit.

    >>> breakable("prune[a=<b>,seed=0]")
    Markup('prune[<wbr>a=&lt;b&gt;,<wbr>seed=0]')
    """
    return Markup(re.sub(r"([,\[/.])(?=\D)", r"\1<wbr>", str(escape(name))))


def _rounded(sparsity: float) -> str:
    return f"{100 * sparsity:.{2 if sparsity > 0.99 else 1}f}".rstrip("0").rstrip(".")


def _value(metric: str, value: float) -> str:
    return f"{value:.3f}" if metric == "accuracy" else tables.shown((metric,), value)


def messages(record: Record) -> list[tuple[str, str, str]]:
    """(stage, status, message) of what stages had to say: failures first, then guards."""
    told = [(n, s["status"], s["message"]) for n, s in record["stages"].items() if s.get("message")]
    again = [m for m in told if m[1] == "failed" and any(m[2] in o[2] and len(m[2]) < len(o[2]) for o in told)]
    told = [m for m in told if m not in again]  # a prune stage repeats what its turns say
    order = {"failed": 0, "ran": 1, "cached": 1, "skipped": 2}
    return sorted(told, key=lambda m: order[m[1]])


class Share(NamedTuple):
    """One bar: how much of it is filled, and what is told beside it."""

    fraction: float
    text: str
    note: str


class Bars(NamedTuple):
    """Rows of bars, one bar for each network."""

    networks: tuple[str, ...]
    rows: dict[str, tuple[str, dict[str, Share]]]  # name -> what else is known of it, network -> bar
    left_out: int = 0

    @property
    def many(self) -> bool:
        """Whether each network is better given a row of a table."""
        return len(self.networks) > tables.MANY


def layers(record: Record) -> Bars | None:
    """The sparsity of each prunable layer of each network with masks; those of compact networks are gone."""
    told = {n: r["layers"] for n, r in record["results"].items() if r.get("kind") != "train" and r.get("layers")}
    pruned = {n: found for n, found in told.items() if any(layer.get("prunable") for layer in found.values())}
    paths = dict.fromkeys(p for found in pruned.values() for p, layer in found.items() if layer.get("prunable"))
    if not paths:
        return None
    rows = {}
    for path in paths:
        of = {name: found[path] for name, found in pruned.items() if path in found}
        bars = {
            name: Share(v["sparsity"], tables.percent(v["sparsity"]), f"{v['nonzero']:,} of {v['size']:,} left")
            for name, v in of.items()
        }
        rows[path] = " × ".join(map(str, next(iter(of.values()))["shape"])), bars
    return Bars(tuple(pruned), rows)


def drawings(store: Store, record: Record) -> list[tuple[str, Markup, int]]:
    """(stage, drawing, layers left out) of networks with groups: first the one from which the best network descends."""
    stages = facts.widths_of(store, record)
    best = facts.best_of(record)
    first = {a for name in best["names"][:1] for a in lineage(record, name)} if best else set()
    found = []
    for name in sorted(stages, key=lambda n: n not in first):
        parameters = record["stages"][facts.masked_by(store, record, name)]["metrics"].get("parameters", ())
        if drawn := network.drawing(stages[name], parameters):
            found.append((name, *drawn))
    return found[: facts.SHOWN_NETWORKS]


def widths(store: Store, record: Record) -> Bars | None:
    """How many units of each group are left; of many groups, those that lost the largest share."""
    stages = facts.widths_of(store, record)
    kinds: dict[str, str] = {}
    lost: dict[str, float] = {}
    for groups in stages.values():
        for name, group in groups.items():
            kinds[name] = group.get("kind") or kinds.get(name, "")
            lost[name] = max(lost.get(name, 0.0), group["dead"] / group["units"])
    most = set(sorted(lost, key=lambda name: -lost[name])[:SHOWN_GROUPS])
    rows = {
        name.removeprefix("params/"): (
            kinds[name],
            {stage: _width(groups[name]) for stage, groups in stages.items() if name in groups},
        )
        for name in lost
        if name in most
    }
    return Bars(tuple(stages), rows, len(lost) - len(rows)) if rows else None


def _width(group: Mapping[str, Any]) -> Share:
    dead, units = group["dead"], group["units"]
    return Share(1 - dead / units, f"{units - dead:,} of {units:,}", "left")


def _sparsity(store: Store, record: Record) -> dict[str, Any] | None:
    series = facts.series_of(store, record)
    if not _is_drawable(series):
        return None
    metric = tables.primary_metric(record)
    floor = _floor(record, metric)
    pruned = [s for s in series if s.label != "dense"]
    direct = len(pruned) <= 6 and all(len(s.label) <= 24 for s in pruned)
    compact = facts.has_compact(record)
    stars = [p[:2] for s in series for p in s.tests]
    chart = partial(charts.sparsity_chart, series, metric, floor=floor, compact=compact)
    return {
        "wide": chart(width=960, height=380, direct=direct),
        "narrow": chart(width=340, height=280, direct=False),
        "compact": compact,
        "covered": compact and len({(round(x, 3), round(y, 3)) for x, y in stars}) < len(stars),
        "legend": charts.series_colours(series),
        "direct": direct,
        "metric": metric,
        "lines": any(s.lines for s in series),
        "breached": any(s.breached for s in series),
        "tests": any(s.tests for s in series),
        "joined": any(len(s.lines) > 1 for s in series),
        "seeds": any(p.high > p.low for s in series for p in (*s.tests, *(q for line in s.lines for q in line))),
        "floor": floor,
    }


def _is_drawable(series: Sequence[facts.Series]) -> bool:
    return any(s.lines or s.breached or s.label != "dense" for s in series)


def _controls(record: Record) -> dict[str, Any] | None:
    series = facts.controls_of(record)
    if not series:
        return None
    metric = tables.primary_metric(record)
    return {
        "wide": charts.controls_chart(series, metric, width=960, height=340),
        "narrow": charts.controls_chart(series, metric, width=340, height=260),
        "legend": charts.series_colours(series),
        "lacking": [
            told
            for told, there in (
                ("units drawn at random", any("at random" in s.label for s in series)),
                ("a fresh network of the same widths", any(s.label.startswith("fresh") for s in series)),
                ("the dense network trained longer", any(s.label.startswith(LONGER) for s in series)),
            )
            if not there
        ],
        "seeds": any(p.high > p.low for s in series for p in s.tests),
    }


def _comparisons(record: Record) -> list[dict[str, Any]]:
    metric = tables.primary_metric(record)
    return [
        {
            "panel": panel,
            "metric": comparison.directed(metric),
            "wide": charts.comparison_chart(panel, metric, width=960, height=360, down=False),
            "narrow": charts.comparison_chart(panel, metric, width=340, height=520, down=True),
            "legend": charts.legend_of(panel),
            "dense": [
                (n, comparison.spread(p, metric))
                for n, p in ((comparison.DENSE, panel.dense), (LONGER, panel.longer))
                if p
            ],
            "rows": comparison.rows_of(panel, metric, panel.reference),
        }
        for panel in comparison.panels_of(record)
    ]


def _floor(record: Record, metric: str) -> float | None:
    """The limit that the guards set, if all prune stages have the same one."""
    limits = set()
    for name, stage in record["stages"].items():
        if stage["kind"] != "prune":
            continue
        guard = _stage_of(record, name).get("guard") or {}
        told = f"validation_{metric}"
        start = next(
            (s["metrics"] for p in _ancestors(record, name) if told in (s := record["stages"][p]).get("metrics", {})),
            None,
        )
        drop = guard.get("max_drop")
        if guard.get("metric") != metric or drop is None or start is None:
            return None
        limits.add(start[told] - drop if metric in tables.HIGHER_IS_BETTER else start[told] + drop)
    return limits.pop() if len(limits) == 1 else None


def _ancestors(record: Record, name: str) -> list[str]:
    """The trainings from which a stage descends."""
    return [n for n in lineage(record, name) if record["stages"][n]["kind"] == "train"]


def _stage_of(record: Record, name: str) -> Mapping[str, Any]:
    return record.get("recipe", {}).get("stages", {}).get(facts.base_name(name), {})


def _weights(arrays: facts.Arrays, record: Record, networks: list[str]) -> dict[str, Any] | None:
    layers = facts.histograms(arrays, record, networks)
    if not layers:
        return None
    dense = next((d for n in networks if (d := tables.dense_of(record, n))), None)
    shown = [n for n in networks if any(n in layer.counts for layer in layers)]
    total = sum(r.get("kind") != "train" for r in record["results"].values())
    return {
        "layers": [(layer, charts.histogram_chart(layer, dense, networks)) for layer in layers],
        "legend": [(dense, "dense")] * (dense is not None)
        + [(n, f"c{networks.index(n) % charts.COLOURS}") for n in shown],
        "left_out": total - len(shown),
        "full": len(layers) == facts.SHOWN_LAYERS,
    }


def _losses(arrays: facts.Arrays, record: Record, networks: list[str]) -> list[dict[str, Any]]:
    panels = facts.loss_panels(arrays, record, networks)
    return [
        {
            "title": panel.title,
            "wide": charts.loss_chart(panel, width=480, height=240),
            "narrow": charts.loss_chart(panel, width=340, height=200),
            "legend": [(n.label, f"c{i % charts.COLOURS}") for i, n in enumerate(panel.networks)],
            "several": len(panel.networks) > 1,
            "rounds": max(len(n.parts) for n in panel.networks),
            "left_out": panel.left_out,
        }
        for panel in panels
    ]
