"""One name of the catalogue explained: its docstring, options, facts, and a recipe that uses it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.console import RenderableType
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from prune_jax.catalogue import Entry, entries
from prune_jax.errors import UserMistake, did_you_mean
from prune_jax.notation import FAMILIES, read_granularity

_SECTION = re.compile(r"^(Args|Returns|Raises|Attributes):$")


def look_up(name: str) -> list[Entry]:
    """The entries of this name: `layer` is a scope and a granularity; `iterative` stands for its two ramps.

    Raises:
        UserMistake: there is none; with the nearest name.
    """
    known = list(entries())
    if ":" in name and name not in FAMILIES:
        try:
            name = read_granularity(name).family  # 2:4
        except UserMistake:
            pass
    found = [entry for entry in known if name in (entry.name, entry.shown, *entry.shown.split(", "))]
    if not found:
        names = dict.fromkeys(entry.name for entry in known)
        raise UserMistake(f"{name}: no such method{did_you_mean(name, names)} (known: {', '.join(names)})")
    return found


class Docstring(NamedTuple):
    """A docstring in Google's form, taken apart."""

    paragraphs: list[str]
    arguments: dict[str, str]
    returns: str


def read_docstring(text: str) -> Docstring:
    r"""Takes a docstring apart; examples are left out.

    >>> read_docstring("Sums.\n\nArgs:\n    x: what is\n        summed.\n\nReturns:\n    A number.")
    Docstring(paragraphs=['Sums.'], arguments={'x': 'what is summed.'}, returns='A number.')
    """
    parts: dict[str, list[str]] = {"": []}
    section = ""
    for line in inspect.cleandoc(text).split(">>>")[0].splitlines():
        if match := _SECTION.match(line):
            section = match[1]
        parts.setdefault(section, []).append("" if match else line)
    arguments: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc("\n".join(parts.get("Args", []))).splitlines():
        head, colon, rest = line.partition(":")
        if colon and not line.startswith(" "):
            name, line = head, rest
        arguments[name] = f"{arguments.get(name, '')} {line.strip()}".strip()
    paragraphs = [" ".join(p.split()) for p in "\n".join(parts[""]).split("\n\n")]
    return Docstring([p for p in paragraphs if p], arguments, " ".join(" ".join(parts.get("Returns", [])).split()))


def page(entry: Entry) -> Iterator[RenderableType]:
    """What there is to say of an entry, from top to bottom."""
    told = read_docstring(entry.text)
    yield Text.assemble((entry.shown or entry.name, "bold"), (f"  {entry.table}", "dim"))
    for paragraph in told.paragraphs:
        yield Text()
        yield _prose(paragraph)
    yield Text()
    facts = {
        "formula": entry.formula,
        **entry.facts,
        "scores": told.returns if entry.facts else "",
        "paper": entry.paper,
    }
    yield _rows({name: fact for name, fact in facts.items() if fact})
    if entry.options:
        yield Text("\noptions", "bold")
        meanings = {name: entry.told.get(name) or told.arguments.get(name, "") for name in entry.options}
        yield _rows({_option(name, default): meanings[name] for name, default in entry.options.items()})
    yield Text("\nrecipe", "bold")
    yield Padding(Syntax(snippet(entry), "yaml", theme="ansi_dark", background_color="default", word_wrap=True), (0, 2))


def as_json(entry: Entry) -> dict[str, Any]:
    """The same as plain data."""
    told = read_docstring(entry.text)
    options = {
        name: {
            "default": None if default is ... else default,
            "required": default is ...,
            "meaning": entry.told.get(name) or told.arguments.get(name, ""),
        }
        for name, default in entry.options.items()
    }
    return {
        "table": entry.table,
        "name": entry.name,
        "formula": entry.formula,
        "paper": entry.paper,
        **entry.facts,
        "text": "\n\n".join(told.paragraphs),
        "options": options,
        "recipe": snippet(entry),
    }


def _prose(text: str) -> Text:
    """Words in backticks stand out."""
    parts = text.split("`")
    return Text.assemble(*((part, "cyan" if i % 2 else "") for i, part in enumerate(parts)))


def _rows(rows: dict[str, str]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 2))
    table.add_column(no_wrap=True, style="dim")
    table.add_column()
    for name, text in rows.items():
        table.add_row(Text(name), _prose(text))
    return table


def _option(name: str, default: Any) -> str:
    return name if default in (..., inspect.Parameter.empty) else f"{name} = {_yaml(default)}"


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(map(_yaml, value))}]" if isinstance(value, list | tuple) else str(value)


DIGITS = "data: {source: digits}\nmodel: {kind: mlp, widths: [64, 32]}"
# Where another network is needed than the smallest one.
ELSEWHERE = {
    **dict.fromkeys(
        ("bn_scale", "reestimate_batches"),
        "data: {source: digits}\nmodel: {kind: mlp, widths: [64, 32], batch_norm: true}",
    ),
    "kernel": "data: {source: digits}\nmodel: {kind: cnn}",
    **dict.fromkeys(
        ("head_importance", "block_influence", "layer"),
        "data: {source: japanese_vowels}\nmodel: {kind: transformer, dim: 32, heads: 4}",
    ),
}
# What each name of these tables puts into a prune stage, in place of what stands there else.
PRUNES: dict[str, dict[str, dict[str, str]]] = {
    "perturbation": {
        name: {"criterion": f"{{name: snip, perturbation: {{kind: {name}, epsilon: 0.1}}}}"}
        for name in ("fgsm", "pgd", "gaussian")
    },
    "granularity": {
        "n:m": {"granularity": '"2:4"', "target": ""},
        "block": {"granularity": "{block: [4, 4]}"},
        "layer": {"granularity": "layer", "criterion": "block_influence"},
    },
    "scope": {
        "output": {"scope": "output", "criterion": "wanda"},
        "isomorphic": {"scope": "isomorphic", "granularity": "group"},
        "table": {"scope": '{"hidden_*": 0.9, output: 0.5}', "target": ""},
    },
    "target": {
        "keep": {"target": "{keep: 1000}"},
        "threshold": {"target": "{threshold: 0.02}"},
        "statistic": {"target": "{statistic: mean}"},
        "percentile": {"target": "{percentile: 50}"},
        **{word: {"target": f"{{{word}: 0.5}}", "granularity": "group"} for word in ("params", "macs", "latency")},
    },
    "schedule": {
        "one_shot": {"schedule": "{kind: one_shot}"},
        **{
            levels: {"schedule": f"{{kind: iterative, rounds: 5, levels: {levels}}}", "finetune": "{epochs: 1}"}
            for levels in ("geometric", "cubic")
        },
    },
}


# What follows on a pruning of the recovery table's names; of those that are settings of the pruning, nothing.
RECOVERS = {
    "finetune": "  finetune: {kind: finetune, epochs: 3}\n",
    "rewind": "  finetune: {kind: finetune, epochs: 3, rewind: {step: 20}}\n",
    "learning_rate": "  finetune: {kind: finetune, rewind: {learning_rate: {step: 20}}}\n",
    "distill": "  distill: {kind: distill, epochs: 3, temperature: 4, soft: 0.9}\n",
    "features": "  distill: {kind: distill, epochs: 3, features: {output: 1.0}}\n",
    "reestimate_batches": "  compact: {kind: compact, reestimate_batches: 10}\n",
}
PRUNES["recovery"] = {
    "correct_bias_batches": {"correct_bias_batches": "10"},
    "reestimate_batches": {"granularity": "group"},
}


def snippet(entry: Entry) -> str:
    """A recipe that uses it and works as it stands; an option without a default is left for the reader to fill."""
    name = re.sub(r"\W", "-", entry.name)
    elsewhere = DIGITS if entry.table == "scope" else ELSEWHERE.get(entry.name, DIGITS)  # `layer` is a scope, too
    head = f"name: try-{name}\n{elsewhere}\nstages:\n"
    if entry.table == "training method":
        required = (
            f", {option}: ..." for option, default in entry.options.items() if default is inspect.Parameter.empty
        )
        return f"{head}  train: {{kind: train, epochs: 20, sparsify: {{kind: {entry.name}{''.join(required)}}}}}\n"
    words = {"criterion": "magnitude", "granularity": "", "scope": "", "target": "{sparsity: 0.5}"}
    if entry.table == "criterion":
        granularity = entry.granularities[0] if entry.granularities else "weight"
        options = ", ".join(f"{option}: {_yaml(default)}" for option, default in entry.options.items())
        criterion = f"{{name: {entry.name}, options: {{{options}}}}}" if options else entry.name
        words |= {"criterion": criterion, "granularity": granularity}
    else:
        own = {} if entry.table in ("target", "recovery") else {entry.table: entry.name}
        words |= PRUNES[entry.table].get(entry.name, own)
    lines = "".join(f"    {word}: {value}\n" for word, value in words.items() if value)
    then = "  compact: {kind: compact}\n" if words["granularity"] in ("group", "layer") else ""
    if entry.table == "recovery":
        then = RECOVERS.get(entry.name, "")
    return f"{head}  train: {{kind: train, epochs: 5}}\n  prune:\n    kind: prune\n{lines}{then}"
