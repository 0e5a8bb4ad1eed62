"""The network as a column of its layers, and its groups as coloured rails beside them.

A rail goes from the first layer that a group's units go through to the last, with a mark at each. Rails that do not
overlap share a lane, as branches do in the log of a version control.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from markupsafe import Markup

from prune_jax.report.charts import COLOURS

SHOWN_BOXES = 150
BOX, GAP, LINE, LANE, LETTER = 46, 10, 19, 15, 7.0  # pixels; LETTER: of small text, on average
NARROWEST, WIDEST = 150, 330


class Part(NamedTuple):
    """A parameter: its path and its shape with and without the dead units."""

    path: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass
class Layer:
    """One box: the parameter that gives it its shape, and what was folded into it."""

    title: str
    main: Part
    folded: list[Part] = field(default_factory=list)
    also: list[str] = field(default_factory=list)  # what was folded, in words

    @property
    def paths(self) -> set[str]:
        """Of all its parameters."""
        return {self.main.path, *(part.path for part in self.folded)}


class Rail(NamedTuple):
    """A group: where it goes through, and how many of its units are left."""

    name: str
    kind: str
    units: int
    left: int
    rows: tuple[int, ...]  # layers
    axes: frozenset[tuple[str, int]]  # (path, axis)
    lane: int
    ink: str


def layers_of(parameters: Sequence[Sequence[Any]]) -> list[Layer]:
    """One layer for each kernel; biases are folded into theirs, norms into the layer before them.

    Args:
        parameters: (path, shape, shape without the dead units), in reading order.

    >>> shapes = [("conv/kernel", [3, 8]), ("conv/bias", [8]), ("norm/scale", [8]), ("norm/bias", [8])]
    >>> [(layer.title, layer.also) for layer in layers_of([(path, shape, shape) for path, shape in shapes])]
    [('conv', ['bias', 'norm'])]
    """
    parts = [Part(path, tuple(before), tuple(after)) for path, before, after in parameters]
    kernels: dict[str, list[str]] = {}
    for part in parts:
        if len(part.before) > 1:
            kernels.setdefault(_home(part.path), []).append(part.path)
    layers: list[Layer] = []
    by_home: dict[str, Layer] = {}
    for part in parts:
        home = _home(part.path)
        if len(part.before) > 1 or not (layers or home in kernels):
            layers.append(Layer(home if home and len(kernels.get(home, ())) < 2 else part.path, part))
            by_home[home] = layers[-1]
        elif home in by_home or layers:
            layer = by_home.get(home, layers[-1] if layers else None)
            assert layer is not None  # one of the two is there
            layer.folded.append(part)
            word = part.path.rpartition("/")[2] if home in by_home else _beside(home or part.path, layer.title)
            layer.also += [word] if word not in layer.also else []
    return layers


def _home(path: str) -> str:
    return path.rpartition("/")[0]


def _beside(path: str, other: str) -> str:
    """A path without what it shares with another.

    >>> _beside("block_0/norm_1", "block_0/conv_1"), _beside("norm", "block_1/output")
    ('norm_1', 'norm')
    """
    mine, theirs = path.split("/"), other.split("/")
    while len(mine) > 1 and theirs and mine[0] == theirs[0]:
        mine, theirs = mine[1:], theirs[1:]
    return "/".join(mine)


def rails_of(groups: Mapping[str, Mapping[str, Any]], layers: Sequence[Layer]) -> list[Rail]:
    """The groups in the order in which they begin, in the first lane that is free, in a colour that none beside has."""
    found = []
    for name, group in groups.items():
        axes = frozenset((path, axis) for path, axis in group["members"])
        paths = {path for path, _ in axes}
        if rows := tuple(row for row, layer in enumerate(layers) if paths & layer.paths):
            found.append((rows, name, axes, group))
    found.sort(key=lambda it: (it[0][0], it[0][-1]))
    rails: list[Rail] = []
    ends: list[int] = []  # of the lanes: the last row that is taken
    for rows, name, axes, group in found:
        lane = next((i for i, end in enumerate(ends) if end < rows[0]), len(ends))
        ends[lane:] = [rows[-1], *ends[lane + 1 :]]
        left = group["units"] - group["dead"]
        beside = [rail.ink for rail in rails if rail.rows[-1] >= rows[0] - 1]
        inks = [f"c{(len(rails) + i) % COLOURS}" for i in range(COLOURS)]
        ink = next((ink for ink in inks if ink not in beside), inks[0])
        kind, name = group.get("kind", ""), name.removeprefix("params/")
        rails.append(Rail(name, kind, group["units"], left, rows, axes, lane, ink))
    return rails


def drawing(groups: Mapping[str, Mapping[str, Any]], parameters: Sequence[Sequence[Any]]) -> tuple[Markup, int] | None:
    """The network as SVG and how many layers there was no room for; None where members are not known.

    Args:
        groups: name -> `dead`, `units`, `kind`, `members` as (path, axis).
        parameters: (path, shape, shape without the dead units), in reading order.
    """
    if not parameters or not groups or not all("members" in group for group in groups.values()):
        return None
    every = layers_of(parameters)
    layers = every[:SHOWN_BOXES]
    rails = rails_of(groups, layers)
    if not rails:
        return None
    longest = max(max(len(layer.title) * 1.12, len(_words(layer))) for layer in layers)
    wide = min(WIDEST, max(NARROWEST, LETTER * longest + 22))
    lanes = 1 + max(rail.lane for rail in rails)
    told = wide + 20 + LANE * lanes + 4  # where the groups' names begin
    total = told + LETTER * max(len(_label(rail)) * 1.06 for rail in rails) + 8
    through = [[rail for rail in rails if row in rail.rows] for row in range(len(layers))]
    tall = [max(BOX, LINE * len(here) + 6) for here in through]
    tops = [sum(tall[:row]) + GAP * row for row in range(len(layers))]

    def height(rail: Rail, row: int) -> float:
        here = through[row]
        return tops[row] + tall[row] / 2 + (here.index(rail) - (len(here) - 1) / 2) * LINE

    def x(rail: Rail) -> float:
        return wide + 20 + LANE * (rail.lane + 0.5)

    ties = [tie for rail in rails for tie in _rail(rail, [height(rail, row) for row in rail.rows], wide, x(rail), told)]
    boxes = [_box(layer, rails, tops[row], wide, tall[row]) for row, layer in enumerate(layers)]
    text = ", ".join(f"{rail.name} {rail.units} to {rail.left}" for rail in rails[:20])
    high = tops[-1] + tall[-1]
    svg = Markup(
        '<svg class="network" role="img" aria-label="layers and groups: {}" viewBox="-1 -1 {:.0f} {:.0f}" '
        'width="{:.0f}" height="{:.0f}">{}{}</svg>'
    ).format(text, total + 2, high + 2, total + 2, high + 2, Markup("").join(ties), Markup("").join(boxes))
    return svg, len(every) - len(layers)


def _label(rail: Rail) -> str:
    return f"{rail.name} {_facts(rail)}"


def _facts(rail: Rail) -> str:
    size = f"{rail.units:,} → {rail.left:,}" if rail.left < rail.units else f"{rail.units:,}, all left"
    return f"{rail.kind} {size}".strip()


def _rail(rail: Rail, heights: Sequence[float], begin: float, x: float, told: float) -> list[Markup]:
    """The rail, its ties to the boxes, and its name at the first of them."""
    lines = "".join(f"M{begin:g} {y:g}H{x:g}" for y in heights) + f"M{x:g} {heights[0]:g}V{heights[-1]:g}"
    marks = Markup("").join(Markup('<circle cx="{:g}" cy="{:g}" r="3.4"/>').format(x, y) for y in heights)
    return [
        Markup('<g class="rail" style="--ink: var(--{})"><title>{}</title>').format(rail.ink, _label(rail)),
        Markup('<path class="far" d="M{:g} {:g}H{:g}"/><path d="{}"/>').format(x, heights[0], told - 3, lines),
        marks,
        Markup(
            '<text x="{:g}" y="{:g}"><tspan class="name">{}</tspan> <tspan class="size">{}</tspan></text></g>'
        ).format(told, heights[0] + 4, rail.name, _facts(rail)),
    ]


def _words(layer: Layer) -> str:
    """The second line of a box, without its colours."""
    sizes = (f"{b:,}" if a == b else f"{b:,}→{a:,}" for b, a in zip(layer.main.before, layer.main.after, strict=True))
    return " · ".join([" × ".join(sizes) or "one number", *layer.also])


def _box(layer: Layer, rails: Sequence[Rail], y: float, wide: float, tall: float) -> Markup:
    """A layer: its name; its shape, the axes of groups in their colours; what was folded into it."""
    room = int((wide - 22) / LETTER)
    dims = []
    for axis, (before, after) in enumerate(zip(layer.main.before, layer.main.after, strict=True)):
        text = f"{before:,}" if before == after else f"{before:,}→{after:,}"
        ink = next((rail.ink for rail in rails if (layer.main.path, axis) in rail.axes), None)
        dims.append(
            Markup('<tspan class="tied" style="--ink: var(--{})">{}</tspan>').format(ink, text) if ink else text
        )
    shape = Markup(" × ").join(dims) or "one number"
    also = "".join(f" · {word}" for word in layer.also)
    spare = room - len(_words(layer)) + len(also)
    also = also if len(also) <= spare else also[: max(0, spare - 1)] + "…"
    middle = tall / 2
    title = layer.title if len(layer.title) * 1.12 <= room else "…" + layer.title[-int(room / 1.12) + 1 :]
    return Markup(
        '<g class="box" transform="translate(0 {:g})"><title>{}</title><rect width="{:g}" height="{:g}" rx="7"/>'
        '<text class="title" x="11" y="{:g}">{}</text><text class="subtitle" x="11" y="{:g}">{}{}</text></g>'
    ).format(y, ", ".join(sorted(layer.paths)), wide, tall, middle - 5, title, middle + 14, shape, also)
