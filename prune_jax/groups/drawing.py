"""A network's groups as a table and as a drawing: coloured arrows from what writes to what reads."""

from __future__ import annotations

import colorsys
from collections.abc import Collection, Iterable, Mapping, Sequence

from prune_jax.groups.layers import LAYER
from prune_jax.groups.trace import Group

_SHOWN = 4  # members of a group in the table; kernels first


def table(
    groups: Mapping[str, Group],
    layers: Mapping[str, Group],
    shapes: Mapping[str, tuple[int, ...]],
    frozen: Iterable[tuple[str, int, str]],
) -> str:
    """The groups, the layers and what is frozen, as text."""
    rows = [("group", "kind", "units", "members")]
    for group in [*groups.values(), *layers.values()]:
        held = [
            path if group.kind == LAYER else f"{path}[{axis}]" + (f" x{places.shape[1]}" if places.shape[1] > 1 else "")
            for path, axis, places in sorted(group.members, key=lambda member: -len(shapes[member[0]]))
        ]
        more = [f"and {len(held) - _SHOWN} more"] if len(held) > _SHOWN else []
        rows.append((group.name, group.kind, str(group.size), ", ".join([*held[:_SHOWN], *more])))
    fixed = [("frozen", "axis", "why"), *((path, str(axis), why) for path, axis, why in frozen)]
    return "\n".join([*_columns(rows), "", *_columns(fixed)])


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]


def dot(groups: Mapping[str, Group], shapes: Mapping[str, tuple[int, ...]], reads: Collection[tuple[str, int]]) -> str:
    """The network in the DOT language of Graphviz.

    Args:
        groups: name -> group.
        shapes: path -> shape of each parameter.
        reads: (path, axis) of those axes that a product sums over.
    """
    lines = ["digraph groups {", "  rankdir=LR; node [shape=box, fontname=Helvetica]; edge [fontname=Helvetica];"]
    big = [path for path, shape in shapes.items() if len(shape) > 1]
    lines += [f"  {_quoted(path)} [label={_quoted(f'{path} {list(shapes[path])}')}];" for path in big]
    for number, group in enumerate(groups.values()):
        colour = _colour(number)
        held = [(path, axis) for path, axis, _ in group.members if path in big]
        readers = [path for path, axis in held if (path, axis) in reads]
        writers = [path for path, axis in held if (path, axis) not in reads]
        label = _quoted(f"{group.name} ({group.kind}, {group.size})")
        for a, b in [(a, b) for a in writers for b in readers] or [(path, path) for path, _ in held[:1]]:
            lines.append(f'  {_quoted(a)} -> {_quoted(b)} [color="{colour}", fontcolor="{colour}", label={label}];')
    return "\n".join([*lines, "}", ""])


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _colour(number: int) -> str:
    """Colours far apart, dark enough on white: hues by the golden ratio."""
    red, green, blue = colorsys.hls_to_rgb(number * 0.618034 % 1, 0.38, 0.75)
    return "#" + "".join(f"{round(255 * part):02x}" for part in (red, green, blue))
