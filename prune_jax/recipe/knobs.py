"""What a search may turn: a field of the recipe and its rungs, from large networks to small ones."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from prune_jax.errors import UserMistake, shortened
from prune_jax.recipe.read import read_value

MOST = 1000  # rungs of a knob
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"\s*({_NUMBER})\s*:\s*({_NUMBER})\s*")


class Knob(NamedTuple):
    """A field of the recipe by its path, and its rungs in the order in which the network gets smaller."""

    path: str
    values: tuple[Any, ...]

    @property
    def word(self) -> str:
        """The last word of the path."""
        return self.path.rpartition(".")[2]

    def change(self, value: Any) -> str:
        """What `--set` takes to put the knob on a rung."""
        return f"{self.path}={written(value)}"


def read_knob(text: str, *, rungs: int, option: str = "--over") -> Knob:
    """Reads `PATH=LOW:HIGH` or `PATH=[a, b, c]`.

    Args:
        text: what the user wrote. Of a range both ends are rungs; if both are integers, all are.
        rungs: of a range, evenly spaced.
        option: how messages name it.

    Raises:
        UserMistake: it is neither, or has fewer than two rungs.

    >>> read_knob("stages.prune.target.sparsity=0.5:0.9", rungs=3).values
    (0.5, 0.7, 0.9)
    >>> read_knob("stages.prune.schedule.rounds=5:1", rungs=9).values
    (5, 4, 3, 2, 1)
    """
    path, equals, wanted = text.partition("=")
    told, path = f"{option} {shortened(text, 80)}", path.strip()
    example = f"such as {option} stages.prune.target.sparsity=0.5:0.98, or {option} 'stages.prune.target.keep=[90, 60]'"
    if not equals or not path:
        raise UserMistake(f"{told}: write path=LOW:HIGH or path=[a, b, c], {example}")
    if ends := _RANGE.fullmatch(wanted):
        values = _spaced(ends[1], ends[2], rungs)
    else:
        values = read_value(wanted, told)
        if not isinstance(values, list):
            raise UserMistake(f"{told}: is neither a range LOW:HIGH nor a list [a, b, c], {example}")
    distinct = tuple(value for i, value in enumerate(values) if value not in values[:i])
    if not 2 <= len(distinct) <= MOST:
        raise UserMistake(f"{told}: has {len(distinct)} rungs; a search chooses among 2 to {MOST}")
    return Knob(path, distinct)


def read_steps(text: str, *, option: str = "--fidelity") -> Knob:
    """Reads `PATH=1,3,9`: the rising values at which a trial shows what it is worth."""
    path, equals, wanted = text.partition("=")
    values = read_value(f"[{wanted.strip().strip('[]')}]", f"{option} {shortened(text, 80)}") if equals else None
    numbers = [v for v in values or () if isinstance(v, int | float) and not isinstance(v, bool)]
    if not path.strip() or len(numbers) < 2 or numbers != values or sorted({*numbers}) != numbers:
        raise UserMistake(
            f"{option} {shortened(text, 80)}: write path and two or more rising numbers, "
            f"such as {option} stages.prune.finetune.epochs=1,3,9"
        )
    return Knob(path.strip(), tuple(numbers))


def written(value: Any) -> str:
    """A value as YAML reads it back.

    >>> written(0.5), written(1e-05), written("layer")
    ('0.5', '1.0e-05', '"layer"')
    """
    text = json.dumps(value)
    return text.replace("e", ".0e") if isinstance(value, float) and "." not in text else text


def _spaced(low: str, high: str, rungs: int) -> list[Any]:
    if not 2 <= rungs <= MOST:
        raise UserMistake(f"--rungs {rungs}: must be 2 to {MOST}")
    begin, end = float(low), float(high)
    spaced = [begin + (end - begin) * i / (rungs - 1) for i in range(rungs)]
    if re.fullmatch(r"[-+]?\d+", low) and re.fullmatch(r"[-+]?\d+", high):
        return [round(value) for value in spaced]
    return [float(f"{value:.6g}") for value in spaced]
