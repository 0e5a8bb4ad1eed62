"""Charts as inline SVG whose colours are CSS variables, so that one drawing serves light and dark pages.

Matplotlib draws with sentinel colours, which are replaced in the SVG's text; texts stay texts, in the page's font.
"""

from __future__ import annotations

import io
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prune_jax.report.comparison import DENSE as DENSE_LABEL
from prune_jax.report.comparison import Panel, directed
from prune_jax.report.facts import Histogram, LossPanel, Series
from prune_jax.report.tables import HIGHER_IS_BETTER
from prune_jax.roles import LONGER

DRAWING = threading.Lock()  # matplotlib reads its settings for SVG from the process
COLOURS = 9  # of pruned networks; page.css has as many
INK, MUTED, GRID, SURFACE, DENSE = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05"
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", SURFACE: "surface", DENSE: "dense"}
VARIABLES |= {f"#0a0b1{i}": f"c{i}" for i in range(COLOURS)}
MARKS = "osD^vP"
RATIOS = {
    "compression": "compression: dense weights / weights left",
    "speedup": "speedup in theory: dense MACs / MACs left",
}
PAGE_CSS = resources.files("prune_jax.report") / "page.css"
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # to measure with: it is wide, so what fits in it fits in any
    "font.size": 12,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "lines.solid_capstyle": "round",
    "axes.unicode_minus": True,
}


def colour(index: int) -> str:
    """The sentinel of a pruned network's colour."""
    return f"#0a0b1{index % COLOURS}"


def sparsity_chart(
    series: Sequence[Series],
    metric: str,
    *,
    width: int,
    height: int,
    floor: float | None,
    direct: bool,
    compact: bool = False,
) -> Markup:
    """The metric against sparsity, high sparsities pulled apart.

    Args:
        series: what to draw; the one called `dense` is grey.
        metric: its name.
        width: of the drawing, in pixels.
        height: likewise.
        floor: the guard's limit.
        direct: whether lines are labelled at their ends; if not, the page has a legend.
        compact: whether `sparsity` is a share of the dense network's weights instead of the prunable ones.
    """
    colours = _colours(series)
    dense = [p for s in series if s.label == "dense" for p in s.tests]
    points = [p for s in series for p in (*(q for line in s.lines for q in line), *s.breached, *s.tests)]
    top = max(p.sparsity for p in points)

    def draw(figure: Figure) -> None:
        axes = _axes(figure)
        for number, s in enumerate(series):
            mark = MARKS[number % len(MARKS)]
            several = len(s.lines) > 1  # climbs to several sparsities: where each ends counts
            for line in s.lines:
                x, y, low, high = np.array(line).T
                style: dict[str, Any] = {"lw": 1, "alpha": 0.6, "ms": 3} if several else {"lw": 1.8, "ms": 4.5}
                axes.plot(x, y, color=colours[s.label], marker=mark, zorder=3, **style)
                if not several:
                    _band(axes, x, low, high, colours[s.label])
            if several and s.tests:
                x, y, low, high = np.array(sorted([*dense, *s.tests])).T
                axes.plot(x, y, color=colours[s.label], lw=1.8, zorder=3)
                _band(axes, x, low, high, colours[s.label])
            for p in s.breached:
                axes.plot(p.sparsity, p.value, mark, ms=6, mfc=SURFACE, mec=colours[s.label], mew=1.4, zorder=4)
            for p in s.tests:
                bars = [[p.value - p.low], [p.high - p.value]]
                if p.high > p.low and not several:
                    axes.errorbar(p.sparsity, p.value, bars, color=colours[s.label], lw=1.4, capsize=3, zorder=4)
                axes.plot(p.sparsity, p.value, "*", ms=15, mfc=colours[s.label], mec=SURFACE, mew=1.2, zorder=5)
        if floor is not None:
            axes.axhline(floor, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
            beyond = (24, -12) if metric in HIGHER_IS_BETTER else (24, 3)  # beside the dense star and its name
            axes.annotate("guard", (0, floor), beyond, textcoords="offset points", color=MUTED, size=10)
        values = [v for p in points for v in (p.low, p.high)]
        if metric != "accuracy" and min(values) > 0 and max(values) > 100 * min(values):
            _log_axis(axes)
        _sparsity_axis(axes, top)
        axes.set_xlabel("weights gone, % of the dense network's" if compact else "sparsity, % of prunable weights")
        axes.margins(y=0.12)
        axes.set_ylabel(metric)
        if direct:
            _label_ends(axes, series, colours)

    names = ", ".join(s.label for s in series)
    across = "share of weights gone" if compact else "sparsity"
    return _svg(draw, f"sparsity {width}", f"{metric} against {across} of {names}", width, height)


def controls_chart(series: Sequence[Series], metric: str, *, width: int, height: int) -> Markup:
    """The metric against the share of the dense network's MACs, on a log scale; dense networks as dashed lines."""
    colours = _colours(series)
    points = [p for s in series for p in s.tests]

    def draw(figure: Figure) -> None:
        axes = _axes(figure)
        for number, s in enumerate(series):
            x, y, low, high = np.array(s.tests).T
            style: dict[str, Any] = {"color": colours[s.label], "marker": MARKS[number % len(MARKS)], "ms": 8}
            if s.label.startswith("dense"):
                axes.axhline(y.mean(), color=colours[s.label], lw=1, ls=(0, (4, 3)), zorder=1)
            axes.plot(x, y, lw=1.8, mec=SURFACE, mew=1.2, zorder=3, **style)
            if (high > low).any():
                axes.errorbar(x, y, [y - low, high - y], color=colours[s.label], lw=1.4, capsize=3, zorder=2)
        axes.set_xscale("log")
        least = min(p.sparsity for p in points)
        ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if t >= least / 1.5]
        axes.set_xticks(ticks, [f"{100 * t:g}" for t in ticks])
        axes.minorticks_off()
        axes.margins(x=0.08, y=0.12)
        axes.set_xlabel("MACs left, % of the dense network's")
        axes.set_ylabel(metric)

    names = ", ".join(s.label for s in series)
    return _svg(draw, f"controls {width}", f"{metric} against MACs of {names}", width, height)


def comparison_chart(panel: Panel, metric: str, *, width: int, height: int, down: bool) -> Markup:
    """The metric against compression and against the reduction of MACs, side by side or one below the other."""

    def draw(figure: Figure) -> None:
        _compare(panel, metric, figure.subplots(2, 1) if down else figure.subplots(1, 2, sharey=True), colours)

    colours = curve_colours([panel])
    told = f"{metric} against compression and speedup of {', '.join(panel.curves)}"
    return _svg(draw, f"comparison {panel.title} {width}", told, width, height)


def comparison_picture(panels: Sequence[Panel], metric: str, format: str) -> bytes:
    """The same as a picture of its own, a row for each panel: a file of format `png`, `svg` or `pdf`."""
    palette = _palette()
    light = {sentinel: palette[name] for sentinel, name in VARIABLES.items()}
    settings = {k: light.get(v, v) if isinstance(v, str) else v for k, v in SETTINGS.items()}
    colours = {label: light[ink] for label, ink in curve_colours(panels).items()}
    with DRAWING, matplotlib.rc_context({**settings, "figure.facecolor": "white"}):
        figure = Figure(figsize=(13, 4.2 * len(panels) + 0.6), layout="constrained")
        rows = figure.subplots(len(panels), 2, sharey="row", squeeze=False)
        for panel, axes in zip(panels, rows, strict=True):
            _compare(panel, metric, axes, colours, light)
            axes[0].set_title(panel.title, loc="left", weight="bold")
        handles = {h.get_label(): h for axes in rows[:, 0] for h in axes.get_legend_handles_labels()[0]}
        figure.legend(
            handles=list(handles.values()), loc="outside lower center", ncols=min(6, len(handles)), frameon=False
        )
        file = io.BytesIO()
        figure.savefig(file, format=format, dpi=110)
    return file.getvalue()


def standalone(chart: Markup) -> bytes:
    """A chart as an SVG file of its own, in the colours of light pages."""
    palette = _palette()
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" font-family="sans-serif"'
    text = re.sub(r"var\(--(\w+)\)", lambda m: palette[m[1]], str(chart).replace('<svg class="chart"', head, 1))
    return text.replace(">", f'><rect width="100%" height="100%" fill="{palette["surface"]}"/>', 1).encode()


def _palette() -> dict[str, str]:
    """The colours of light pages by their names in `page.css`."""
    return dict(re.findall(r"--(\w+): (#\w{6})", PAGE_CSS.read_text("utf-8").partition("@media")[0]))


def legend_of(panel: Panel) -> list[tuple[str, str]]:
    """(label, CSS variable) of each method, for the page's legend."""
    return [(label, VARIABLES[ink]) for label, ink in curve_colours([panel]).items()]


def curve_colours(panels: Sequence[Panel]) -> dict[str, str]:
    """The sentinel of each method's colour; the dense network's is grey."""
    labels = list(dict.fromkeys(label for panel in panels for label in panel.curves))
    return {DENSE_LABEL: DENSE, **{label: colour(i) for i, label in enumerate(labels)}}


def _compare(
    panel: Panel, metric: str, axes: Sequence[Axes], colours: Mapping[str, str], light: Mapping[str, str] | None = None
) -> None:
    """Draws one panel: means, a band of one standard deviation, the dense networks as lines across."""
    paint = light or {ink: ink for ink in VARIABLES}
    for one, ratio, across in zip(axes, RATIOS, RATIOS.values(), strict=True):
        one.grid(axis="y", lw=0.8)
        one.set_axisbelow(True)
        one.spines[["top", "right", "left"]].set_visible(False)
        one.tick_params(length=0, pad=5)
        for place, style, label in ((panel.dense, "-", DENSE_LABEL), (panel.longer, (0, (4, 3)), LONGER)):
            if place:
                one.axhline(place.mean, color=colours[DENSE_LABEL], lw=1.4, ls=style, zorder=1, label=label)
        for number, (label, places) in enumerate(panel.curves.items()):
            x, y = [p.ratio(ratio) for p in places], np.array([p.mean for p in places])
            spread = np.array([p.deviation for p in places])
            ink, mark = colours[label], MARKS[number % len(MARKS)]
            style = (0, (4, 3)) if label in panel.controls else "-"
            one.plot(
                x, y, color=ink, marker=mark, ms=6, mec=paint[SURFACE], mew=0.8, lw=1.8, ls=style, zorder=3, label=label
            )
            if spread.any():
                one.fill_between(x, y - spread, y + spread, color=ink, alpha=0.14, lw=0, zorder=2)
        if metric == "accuracy":
            _accuracy_axis(one, [p.mean for places in panel.curves.values() for p in places] + [panel.dense.mean])
        one.set_xscale("log")
        ratios = [p.ratio(ratio) for places in panel.curves.values() for p in places]
        ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if min(ratios) / 1.5 <= t <= 1.5 * max(ratios)]
        one.set_xticks(ticks, [f"×{t}" for t in ticks])
        one.minorticks_off()
        one.set_xlabel(across)
    axes[0].set_ylabel(directed(metric))


def _accuracy_axis(axes: Axes, values: Sequence[float]) -> None:
    """On a log scale of what is wrong, so that 95 and 99 % stand apart."""
    axes.set_yscale("function", functions=(_pulled_apart, lambda z: 1 - np.exp(-np.asarray(z))))
    low, high = min(values), min(max(values), 0.9995)
    ticks = [t for t in (0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999) if low - 0.1 <= t]
    ticks = [t for t in ticks if t <= 1 - (1 - high) / 1.3]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()


def histogram_chart(layer: Histogram, dense: str | None, networks: Sequence[str]) -> Markup:
    """How the weights of one layer are distributed, counts on a log scale."""

    def draw(figure: Figure) -> None:
        axes = _axes(figure)
        for name, counts in layer.counts.items():
            ink = DENSE if name == dense else colour(networks.index(name))
            face: dict[str, Any] = (
                {"fill": True, "alpha": 0.35, "lw": 0} if name == dense else {"fill": False, "lw": 1.6}
            )
            axes.stairs(np.maximum(counts, 0.5), layer.edges, baseline=0.5, color=ink, **face)  # 0.5: log of none
        axes.set_yscale("log")
        most = max(int(c.max()) for c in layer.counts.values())
        axes.set_ylim(0.5, max(10, 2 * most))
        decades = range(0, 1 + math.floor(math.log10(max(10, most))), 1 if most < 1e4 else 2)
        axes.set_yticks([10**d for d in decades], [_short(10**d) for d in decades])
        axes.minorticks_off()
        axes.locator_params(axis="x", nbins=5)

    return _svg(draw, f"weights {layer.path}", f"distribution of the weights of {layer.path}", 340, 170)


def loss_chart(panel: LossPanel, *, width: int, height: int) -> Markup:
    """Loss against steps: as it was, faint, and smoothed; trainings one after the other, lines between them."""
    several = len(panel.networks) > 1
    dense = panel.title.endswith(": training") and not several

    def draw(figure: Figure) -> None:
        axes = _axes(figure)
        lowest, highest = math.inf, -math.inf
        for i, network in enumerate(panel.networks):
            ink = DENSE if dense else colour(i)
            start = 0
            for number, part in enumerate(network.parts, 1):
                if not part.size:
                    continue
                x, raw, smooth_x, smooth = _thinned(part)
                if not several:
                    axes.plot(start + x, raw, color=ink, lw=0.7, alpha=0.35, zorder=2)
                if i == 0 and len(network.parts) > 1:
                    _round_mark(axes, start, number)
                axes.plot(start + smooth_x, smooth, color=ink, lw=1.8, zorder=3)
                positive = part[part > 0]
                lowest = min(lowest, positive.min(initial=math.inf))
                highest = max(highest, part.max())
                start += part.size
        if highest > 100 * lowest:
            _log_axis(axes)
        axes.margins(x=0.02)
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")
        axes.locator_params(axis="x", nbins=5)

    return _svg(draw, f"loss {panel.title} {width}", f"loss of {panel.title}", width, height)


def series_colours(series: Sequence[Series]) -> list[tuple[str, str]]:
    """(label, CSS variable) of each series, for the page's legend."""
    return [(label, VARIABLES[ink]) for label, ink in _colours(series).items()]


def _colours(series: Sequence[Series]) -> dict[str, str]:
    pruned = [s.label for s in series if s.label != "dense"]
    return {s.label: DENSE if s.label == "dense" else colour(pruned.index(s.label)) for s in series}


def _axes(figure: Figure) -> Axes:
    axes = figure.add_subplot()
    axes.grid(axis="y", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, pad=5)
    return axes


def _log_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()


def _sparsity_axis(axes: Axes, top: float) -> None:
    """Percent; from 80 % on a log scale of what is left, so that 90, 95 and 99 % stand apart."""
    ticks = [0.0, 0.2, 0.4, 0.6, 0.8]
    if top >= 0.8:
        axes.set_xscale("function", functions=(_pulled_apart, lambda z: 1 - np.exp(-np.asarray(z))))
        ticks = [0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999]
        ticks = [t for t in ticks if t <= 1 - (1 - top) / 1.05 and (top < 0.995 or t in {0, 0.9, 0.99, 0.999})]
    else:
        ticks = [t for t in ticks if t <= top + 0.1]
    axes.set_xticks(ticks, [f"{100 * t:g}" for t in ticks])
    axes.minorticks_off()


def _pulled_apart(sparsity: Any) -> np.ndarray:
    return -np.log(np.maximum(1 - np.asarray(sparsity), 1e-6))


def _label_ends(axes: Axes, series: Sequence[Series], colours: dict[str, str]) -> None:
    """Names at the right edge, at the height of each line's last point, moved apart where they would touch."""
    ends = []
    for s in series:
        points = [p for line in s.lines for p in line] or s.tests
        if points and s.label != "dense":
            ends.append((max(points).value, s.label))
    axes.autoscale_view()
    low, high = (axes.transData.transform((0, y))[1] for y in axes.get_ylim())
    gap, last = 13 / max(1.0, high - low), -math.inf
    for value, label in sorted(ends):
        place = (axes.transData.transform((0, value))[1] - low) / max(1.0, high - low)
        last = max(place, last + gap)
        axes.annotate(
            label,
            (1.015, last),
            xycoords="axes fraction",
            va="center",
            color=colours[label],
            parse_math=False,
            annotation_clip=False,
        )
    for p in (p for s in series if s.label == "dense" for p in s.tests):
        axes.annotate("dense", (p.sparsity, p.low), (0, -20), textcoords="offset points", ha="center", color=MUTED)


def _band(axes: Axes, x: np.ndarray, low: np.ndarray, high: np.ndarray, ink: str) -> None:
    if (high > low).any():
        axes.fill_between(x, low, high, color=ink, alpha=0.15, lw=0, zorder=1)


def _round_mark(axes: Axes, start: int, number: int) -> None:
    axes.axvline(start, color=GRID, lw=0.8, zorder=0)
    axes.annotate(
        f"{number}",
        (start, 1),
        (4, -10),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        color=MUTED,
        size=10,
    )


def _thinned(losses: np.ndarray, most: int = 300) -> tuple[np.ndarray, ...]:
    """At most `most` blocks of steps: the raw losses by each block's extremes, and a moving average.

    The average is over a fiftieth of the steps, at least 5, fewer at the ends: `mean(losses[i - h : i + h + 1])`.
    """
    size = math.ceil(losses.size / most)
    starts = np.arange(0, losses.size, size)
    low, high = np.minimum.reduceat(losses, starts), np.maximum.reduceat(losses, starts)
    x = starts if size == 1 else np.repeat(starts, 2)
    raw = losses if size == 1 else np.stack([low, high], axis=1).ravel()
    half = max(2, losses.size // 100)
    total = np.concatenate([[0.0], np.cumsum(losses)])
    begin, end = np.maximum(starts - half, 0), np.minimum(starts + half + 1, losses.size)
    return x, raw, starts, (total[end] - total[begin]) / (end - begin)


def _short(count: int) -> str:
    return {0: f"{count}", 1: f"{count // 1000} k", 2: f"{count // 10**6} M"}.get(
        math.floor(math.log10(count)) // 3, f"{count:.0e}"
    )


def _svg(draw: Callable[[Figure], None], salt: str, label: str, width: int, height: int) -> Markup:
    """Draws and makes the SVG fit to stand in a page: no ids that clash, no fonts, no colours, no namespaces."""
    file = io.StringIO()
    with DRAWING, matplotlib.rc_context({**SETTINGS, "svg.hashsalt": salt}):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        draw(figure)
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<svg[^>]*>", "", text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = re.sub("#0a0b[0-9]{2}", lambda m: f"var(--{VARIABLES[m[0]]})", text)
    text = re.sub(r"\s*\n\s*", " ", text)
    head = f'<svg class="chart" role="img" viewBox="0 0 {width} {height}" aria-label="{escape(label)}">'
    return Markup(head) + Markup(text)
