"""The stages as boxes and arrows, drawn in layers, and as bars in time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from prune_jax.report.facts import base_name, owner, turns_of, words_of
from prune_jax.report.tables import Record

NARROWEST, WIDEST, TALL, GAP, LAYER_GAP, LANE = 184, 290, 62, 14, 44, 12  # pixels
SIGNS = {"ran": "✓", "cached": "↺", "failed": "✗", "skipped": "–"}
LARGE = 12  # stages
LETTER = 6.4  # pixels, on average, of a box's small text


class Box(NamedTuple):
    """A stage of the recipe: three lines of text."""

    name: str
    title: str
    subtitle: str
    foot: str
    status: str


class Bar(NamedTuple):
    """What ran, from its beginning, in percent of the run."""

    name: str
    label: str
    status: str
    seconds: float
    left: float
    width: float
    turns: list[Bar]


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(0.042), duration(12.34), duration(200), duration(3720)
    ('0.04 s', '12.3 s', '3 min 20 s', '1 h 02 min')
    """
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def boxes_of(record: Record) -> tuple[list[Box], list[tuple[str, str]]]:
    """The stages of the recipe, and the arrows between them; the turns of a prune stage are told in its box."""
    stages = record["stages"]
    own = {n: s for n, s in stages.items() if owner(n, stages) is None}
    boxes = [_box(n, s, turns_of(n, stages)) for n, s in own.items()]
    arrows = []
    for name, stage in own.items():
        parents = dict.fromkeys(owner(p, stages) or p for p in stage.get("after", []))
        arrows += [(p, name) for p in parents if p in own and p != name]
    return boxes, _reduced(arrows) if len(boxes) > LARGE else arrows


def is_large(record: Record) -> bool:
    """Whether there are so many stages that arrows which follow from others are not drawn."""
    return sum(owner(n, record["stages"]) is None for n in record["stages"]) > LARGE


def _reduced(arrows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The arrows that no longer way stands for."""
    into: dict[str, set[str]] = {}
    for a, b in arrows:
        into.setdefault(b, set()).add(a)

    def above(name: str) -> set[str]:
        return into.get(name, set()).union(*(above(p) for p in into.get(name, set())))

    return [(a, b) for a, b in arrows if not any(a in above(p) for p in into[b] - {a})]


def _box(name: str, stage: Mapping[str, Any], turns: Mapping[str, Any]) -> Box:
    row = words_of(stage.get("row") or {}).items() if "[" in name else ()
    told = " · ".join(f"{k} {v}" if str(v)[:1].isdigit() else str(v) for k, v in row)
    label = str(stage.get("label") or stage["kind"]).removeprefix(f"{base_name(name)} · ")
    seconds = (stage.get("seconds") or 0.0) + sum(t.get("seconds") or 0.0 for t in turns.values())
    status = stage["status"]
    foot = f"{SIGNS[status]} {status}"
    if status == "cached":
        made = stage.get("made_in_seconds")
        foot += f" · took {duration(made)}" if made is not None else ""
    elif status != "skipped":
        foot += f" · {duration(seconds)}" + _turns(name, turns)
    title = base_name(name) if base_name(name) == stage["kind"] else f"{base_name(name)} ({stage['kind']})"
    return Box(name, title, told or label, foot, status)


def _turns(name: str, turns: Mapping[str, Any]) -> str:
    numbers = {t.removeprefix(f"{name}.").partition(".")[0] for t in turns} - {"rewind"}
    count = sum(n.isdigit() for n in numbers)
    return f" · {count} turn{'s' if count > 1 else ''}" if count else ""


def layers_of(names: Sequence[str], arrows: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Each stage in the first layer behind all that it takes.

    Within a layer stages stand in the order of the mean place of what they take, which keeps arrows apart (the
    barycentre step of Sugiyama et al. 1981, one sweep).
    """
    depth = dict.fromkeys(names, 0)
    for _ in names:  # as many sweeps as the longest chain could need
        before = dict(depth)
        for a, b in arrows:
            depth[b] = max(depth[b], depth[a] + 1)
        if depth == before:
            break
    layers: list[list[str]] = []
    place: dict[str, float] = {}
    for layer in range(max(depth.values(), default=-1) + 1):
        here = [n for n in names if depth[n] == layer]
        into = {n: [place[a] for a, b in arrows if b == n] for n in here}
        here.sort(key=lambda n: sum(into[n]) / len(into[n]) if into[n] else 0.0)
        place |= {n: turn - (len(here) - 1) / 2 for turn, n in enumerate(here)}
        layers.append(here)
    return layers


def dag(record: Record, *, down: bool) -> Markup:
    """The DAG as SVG, its layers from left to right or from top to bottom; what spans layers runs beside them."""
    boxes, arrows = boxes_of(record)
    layers = layers_of([b.name for b in boxes], arrows)
    longest = max((len(text) for box in boxes for text in (box.subtitle, box.foot)), default=0)
    wide = min(WIDEST, max(NARROWEST, LETTER * longest + 22))
    down = (
        down and max((len(layer) for layer in layers), default=1) <= 2
    )  # a wide layer is easier to scroll as a column
    along, across = (TALL, wide) if down else (wide, TALL)
    pitch = across + GAP
    layer_of = {name: i for i, layer in enumerate(layers) for name in layer}
    centre = _centres(layers, arrows, pitch)
    edge = max(map(abs, centre.values()), default=0) + across / 2
    spanning = list(dict.fromkeys(a for a, b in arrows if layer_of[b] - layer_of[a] > 1))
    lane = {name: edge + LANE * (1 + i) for i, name in enumerate(spanning)}  # arrows from one stage share one

    def start(layer: int) -> float:
        return layer * (along + LAYER_GAP)

    paths = []
    for a, b in arrows:
        points = [(start(layer_of[a]) + along, centre[a])]
        if layer_of[b] - layer_of[a] > 1:
            points += [(start(layer_of[a] + 1), lane[a]), (start(layer_of[b] - 1) + along, lane[a])]
        points.append((start(layer_of[b]) - 4, centre[b]))
        paths.append(_path(points, down=down))
    length = start(len(layers)) - LAYER_GAP
    thick = edge + LANE * (len(lane) + 0.5 if lane else 0)
    low, total = -edge - 1, edge + thick + 2
    view = (low, -1.0, total, length + 2) if down else (-1.0, low, length + 2, total)
    drawn = Markup("").join(
        _drawn(
            box,
            wide,
            centre[box.name] - wide / 2 if down else start(layer_of[box.name]),
            start(layer_of[box.name]) if down else centre[box.name] - TALL / 2,
        )
        for box in boxes
    )
    lines = Markup("").join(Markup('<path class="arrow" d="{}"/>').format(p) for p in paths)
    told = ", ".join(f"{a} to {b}" for a, b in arrows[:20])
    return Markup(
        '<svg class="dag" role="img" aria-label="stages: {}" viewBox="{}" width="{:.0f}" height="{:.0f}">{}{}</svg>'
    ).format(told, " ".join(f"{v:g}" for v in view), view[2], view[3], lines, drawn)


def _centres(layers: list[list[str]], arrows: Sequence[tuple[str, str]], pitch: float) -> dict[str, float]:
    """Where stages stand across: evenly, but before a wider layer each amid those that it leads to."""
    centre = {n: (turn - (len(layer) - 1) / 2) * pitch for layer in layers for turn, n in enumerate(layer)}
    for layer, wider in reversed(list(itertools.pairwise(layers))):
        if len(layer) < len(wider):
            last = -math.inf
            for name in layer:
                ahead = [centre[b] for a, b in arrows if a == name and b in wider]
                last = max(last + pitch, sum(ahead) / len(ahead) if ahead else centre[name])
                centre[name] = last
    return centre


def _path(points: Sequence[tuple[float, float]], *, down: bool) -> str:
    """A curve through points (along, across) that leaves and enters each along the layers, and an arrow's head."""

    def at(along: float, across: float) -> str:
        x, y = (across, along) if down else (along, across)
        return f"{x:g} {y:g}"

    words = [f"M{at(*points[0])}"]
    for (a, b), (c, d) in itertools.pairwise(points):
        half = (a + c) / 2
        words.append(f"C{at(half, b)} {at(half, d)} {at(c, d)}" if b != d else f"L{at(c, d)}")
    tip, side = points[-1]
    words.append(f"M{at(tip - 6, side - 4)}L{at(tip, side)}L{at(tip - 6, side + 4)}")
    return "".join(words)


def _drawn(box: Box, wide: float, x: float, y: float) -> Markup:
    texts = ((box.title, 19, "title"), (box.subtitle, 36, "subtitle"), (box.foot, 53, "foot"))
    lines = [Markup('<text class="{}" x="11" y="{}">{}</text>').format(k, v, _cut(t, wide)) for t, v, k in texts]
    rectangle = Markup('<rect width="{:g}" height="{}" rx="7"/>').format(wide, TALL)
    return Markup('<g class="box {}" transform="translate({:g} {:g})"><title>{}</title>{}{}</g>').format(
        box.status, x, y, box.name, rectangle, Markup("").join(lines)
    )


def _cut(text: str, wide: float) -> str:
    room = int((wide - 22) / LETTER)
    return text if len(text) <= room else text[: room - 1] + "…"


def bars_of(record: Record) -> list[Bar]:
    """What ran in this run, by its beginning; the turns of a prune stage within it."""
    stages = record["stages"]
    begun = {n: s for n, s in stages.items() if s.get("begin") is not None}
    ends = [s["begin"] + (s.get("seconds") or 0.0) for s in begun.values()]
    whole = max([record.get("seconds") or 0.0, *ends, 1e-9])

    def bar(name: str, begin: float, end: float, turns: list[Bar], label: str) -> Bar:
        stage = stages[name]
        return Bar(name, label, stage["status"], end - begin, 100 * begin / whole, 100 * (end - begin) / whole, turns)

    bars = []
    for name, stage in stages.items():
        if owner(name, stages) is not None:
            continue
        spans = {
            n: (s["begin"], s["begin"] + (s.get("seconds") or 0.0))
            for n, s in {**turns_of(name, stages), name: stage}.items()
            if s.get("begin") is not None
        }
        if spans:
            turns = [bar(n, *spans[n], [], n.removeprefix(f"{name}.")) for n in spans if n != name]
            begin, end = min(b for b, _ in spans.values()), max(e for _, e in spans.values())
            bars.append(bar(name, begin, end, sorted(turns, key=lambda b: b.left), name))
    return sorted(bars, key=lambda b: (b.left, b.name))
