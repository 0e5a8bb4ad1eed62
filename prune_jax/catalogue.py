"""What there is to choose from, as tables: every name that a recipe knows, with its formula, facts and paper."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.markup import escape
from rich.table import Table

from prune_jax.criteria import CRITERIA, find
from prune_jax.criteria.entry import FAMILY_ORDER
from prune_jax.errors import UserMistake
from prune_jax.notation import FAMILIES, listed
from prune_jax.recipe import BUILT_IN_METHODS
from prune_jax.recipe.parts import Iterative, OneShot, Perturbation, Teaching
from prune_jax.sparse_training import METHODS
from prune_jax.sparse_training import find as find_method


@dataclass(frozen=True)
class Entry:
    """One name of one table."""

    table: str
    name: str
    formula: str
    paper: str = ""
    shown: str = ""  # how it is written, where a name is not
    text: str = ""  # its docstring
    options: Mapping[str, Any] = field(default_factory=dict)  # name -> default, `...` where there is none
    told: Mapping[str, str] = field(default_factory=dict)  # option -> what it means
    facts: Mapping[str, str] = field(default_factory=dict)  # looks at, needs, granularity, cost
    granularities: tuple[str, ...] = ()


# name: (how it is written, meaning, paper)
SCOPES = {
    "global": ("", "all layers compete", ""),
    "layer": ("", "each layer loses the same share", ""),
    "erk": ("", "density of a layer ∝ sum(shape) / prod(shape)", "Evci et al. 2020, arXiv:1911.11134"),
    "lamp": (
        "",
        "all compete by s² / (sum of the squares not smaller in their layer); scores >= 0",
        "Lee et al. 2021, arXiv:2010.07611",
    ),
    "output": ("", "the inputs of each output compete, each loses the same share", "Sun et al. 2024, arXiv:2306.11695"),
    "isomorphic": ("", "groups that do the same in different places compete", "Fang et al. 2024, arXiv:2407.04616"),
    "table": ("{pattern: sparsity}", "each layer has its own sparsity; first pattern that fits; no target", ""),
}
TARGETS = {
    "sparsity": ("", "fraction pruned, in [0, 1)", ""),
    "keep": (
        "",
        "so many survive: the projection min ||W - W'||² s.t. ||W'||₀ <= k when the criterion is magnitude",
        "",
    ),
    "threshold": ("", "scores below it die", ""),
    "statistic": ("", "scores below their mean or median die", ""),
    "percentile": ("", "scores below this percentile die", ""),
    "params": ("", "groups: so large a share of the parameters is left", ""),
    "macs": ("", "groups: so large a share of the multiplications is left", ""),
    "latency": ("", "groups: it takes so large a share of the time, measured on this machine by bisection", ""),
}
SCHEDULES = {
    "one_shot": ("", "all at once", ""),
    "geometric": (
        "iterative, geometric",
        "s_r = 1 - (1 - s)^(r/R): each round prunes the same share of the living",
        "Frankle & Carbin 2019, arXiv:1803.03635",
    ),
    "cubic": ("iterative, cubic", "s_r = s (1 - (1 - r/R)³)", "Zhu & Gupta 2017, arXiv:1710.01878"),
}
GRANULARITIES = {
    "weight": ("", "each weight by itself", ""),
    "n:m": (
        "n:m, such as '2:4'",
        "w[m g : m g + m, o]: n are kept of each m weights along the inputs, or along another axis: "
        "{n_m: '2:4', axis: -1}; no target",
        "Mishra et al. 2021, arXiv:2104.08378",
    ),
    "block": (
        "{block: [r, c]}",
        "w[r a : r a + r, c b : c b + c]: r inputs x c outputs; of k weights at an edge, s · r c / k",
        "Gray et al. 2017; Narang et al. 2017, arXiv:1711.02782",
    ),
    "kernel": ("", "w[:, :, i, o]: all positions of a convolution's slice", "Mao et al. 2017, arXiv:1705.08922"),
    "neuron": ("", "w[..., o]: the incoming weights of a unit, and its bias", "Li et al. 2017, arXiv:1608.08710"),
    "group": (
        "",
        "channels, neurons, heads, widths: what the network's wiring ties; `compact` takes them away",
        "Fang et al. 2023, arXiv:2301.12900",
    ),
    "layer": (
        "",
        "residual branches, each as a whole; what it is added to goes on alone; `compact` takes them away",
        "",
    ),
}
PERTURBATIONS = {
    "fgsm": ("", "x + ε sign(dL/dx)", "Goodfellow et al. 2015, arXiv:1412.6572"),
    "pgd": ("", "such steps of 2.5 ε / steps, held within ε of x", "Madry et al. 2018, arXiv:1706.06083"),
    "gaussian": ("", "x + ε n, n ~ N(0, 1)", "Sehwag et al. 2020, arXiv:2002.10509: pruning for robustness"),
}
RECOVERY = {
    "finetune": (
        "",
        "w trained on under its masks: pruned weights and their moments stay zero",
        "Han et al. 2015, arXiv:1506.02626",
    ),
    "rewind": (
        "rewind: {step: n}, initialisation",
        "w of step n under the masks, trained anew",
        "Frankle & Carbin 2019, arXiv:1803.03635; Frankle et al. 2020, arXiv:1912.05671",
    ),
    "learning_rate": (
        "rewind: {learning_rate: {step: n}}",
        "w stays; the training's learning rates of steps n..N again",
        "Renda et al. 2020, arXiv:2003.02389",
    ),
    "distill": (
        "",
        "(1 - α) L + α T² KL(softmax(v / T) || softmax(z / T)), v of the teacher; α is `soft`; numbers: mean (z - v)²",
        "Hinton et al. 2015, arXiv:1503.02531",
    ),
    "features": (
        "distill, features",
        "+ λ mean (x - x')² of what a kernel sees in student and teacher",
        "Romero et al. 2015, arXiv:1412.6550",
    ),
    "correct_bias_batches": (
        "",
        "b + E[v] - E[v'], v and v' what b is added to before and after pruning",
        "Nagel et al. 2019, arXiv:1906.04721",
    ),
    "reestimate_batches": (
        "",
        "batch norm's mean and variance anew, averaged over batches",
        "Li et al. 2020, arXiv:2007.02491; Wu & Johnson 2021, arXiv:2105.07576",
    ),
}


def entries() -> Iterator[Entry]:
    """All of them, table by table; criteria by what they look at."""
    found = [_criterion(name) for name in CRITERIA]
    order = {family: place for place, family in enumerate(FAMILY_ORDER)}
    yield from sorted(found, key=lambda entry: order.get(entry.facts.get("looks at", ""), len(order)))
    yield from _of("perturbation", PERTURBATIONS, lambda name: Perturbation)
    yield from _of("granularity", GRANULARITIES)
    yield from _of("scope", SCOPES)
    yield from _of("target", TARGETS)
    yield from _of("schedule", SCHEDULES, lambda name: OneShot if name == "one_shot" else Iterative)
    yield from map(_method, METHODS)
    yield from _of("recovery", RECOVERY, {"distill": Teaching}.get)


def _of(
    table: str, rows: Mapping[str, tuple[str, str, str]], model: Callable[[str], Any] | None = None
) -> Iterator[Entry]:
    for name, (shown, meaning, paper) in rows.items():
        found = model(name) if model else None
        told, text = (_fields(found), found.__doc__ or "") if found else ({}, "")
        yield Entry(table, name, meaning, paper, shown, text, **told)


def _fields(model: Any) -> dict[str, Any]:
    """Options, their defaults and what they mean, of a recipe's model."""
    fields = {name: info for name, info in model.model_fields.items() if name != "kind"}
    return {
        "options": {
            name: ... if info.is_required() else info.get_default(call_default_factory=True)
            for name, info in fields.items()
        },
        "told": {name: info.description or "" for name, info in fields.items()},
    }


def _criterion(name: str) -> Entry:
    try:
        entry = find(name)
    except UserMistake as mistake:  # of another package, which does not load: the others are listed all the same
        return Entry("criterion", name, str(mistake))
    facts = {
        "looks at": entry.family,
        "needs": ", ".join(sorted(entry.needs)) or ("nothing" if entry.data_free else "loss"),
        "granularity": listed(entry.granularities),
        "cost": entry.cost,
    }
    text = entry.function.__doc__ or ""
    told: dict[str, Any] = {"text": text, "options": entry.options, "facts": facts}
    return Entry("criterion", name, entry.formula, entry.paper, granularities=entry.granularities, **told)


def _method(name: str) -> Entry:
    try:
        entry = find_method(name)
    except UserMistake as mistake:
        return Entry("training method", name, str(mistake))
    model = BUILT_IN_METHODS.get(name)
    told = _fields(model) if model else {"options": entry.options}
    return Entry("training method", name, entry.formula, entry.paper, text=entry.function.__doc__ or "", **told)


_HEADS = {
    "criterion": "score (the lowest dies first)",
    "perturbation": "of the inputs that a criterion sees",
    "granularity": "what dies together",
    "scope": "within which set scores compete",
    "target": "how many die",
    "schedule": "sparsity of round r of R",
    "training method": "while it trains: `sparsify`",
    "recovery": "after units or weights died",
}


def methods_tables() -> Iterator[Table]:
    """One table each for criteria, perturbations, granularities, scopes, targets, schedules, training and recovery."""
    rows: dict[str, list[Entry]] = {}
    for entry in entries():
        rows.setdefault(entry.table, []).append(entry)
    for name, found in rows.items():
        more = ("looks at: needs, cost", "granularity") if name == "criterion" else ()
        papers = any(entry.paper for entry in found)
        table = Table(name, _HEADS[name], *more, box=None, pad_edge=False, header_style="bold", padding=(0, 2, 1, 0))
        table.columns[0].no_wrap = True
        for column, width in zip(table.columns[2:], (24, 12), strict=False):
            column.max_width = width  # what there is beyond is for the formula
        for entry in found:
            formula = escape(entry.formula) + (f"\n[dim]{escape(entry.paper)}[/]" if papers and entry.paper else "")
            cells = [_needs(entry), _briefly(entry.granularities)] if more else []
            table.add_row(escape(entry.shown or entry.name), formula, *cells)
        yield table


def _needs(entry: Entry) -> str:
    if not entry.facts:
        return ""
    family, needs, cost = (escape(entry.facts[name]) for name in ("looks at", "needs", "cost"))
    return f"{family}: {needs}\n[dim]{cost}[/]"


def _briefly(granularities: tuple[str, ...]) -> str:
    return "any" if granularities == FAMILIES else ", ".join(granularities)
