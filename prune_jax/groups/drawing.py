"""A network's groups as a drawing: parameters as boxes, groups as coloured arrows from what writes to what reads."""

from __future__ import annotations

import colorsys
from collections.abc import Collection, Mapping

from prune_jax.groups.trace import Group


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
