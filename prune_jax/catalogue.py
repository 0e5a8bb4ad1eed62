"""What there is to choose from, as tables."""

from __future__ import annotations

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from prune_jax.criteria import CRITERIA
from prune_jax.sparse_training import METHODS

SCOPES = {
    "global": ("all layers compete", ""),
    "layer": ("each layer loses the same share", ""),
    "erk": ("density of a layer ∝ sum(shape) / prod(shape)", "Evci et al. 2020, arXiv:1911.11134"),
    "lamp": (
        "all compete by s² / (sum of the squares not smaller in their layer); scores >= 0",
        "Lee et al. 2021, arXiv:2010.07611",
    ),
    "output": ("the inputs of each output compete, each loses the same share", "Sun et al. 2024, arXiv:2306.11695"),
    "isomorphic": ("groups that do the same in different places compete", "Fang et al. 2024, arXiv:2407.04616"),
    "{pattern: sparsity}": ("each layer has its own sparsity; first pattern that fits", ""),
}
TARGETS = {
    "sparsity": "fraction pruned, in [0, 1)",
    "keep": "so many survive: the projection min ||W - W'||² s.t. ||W'||₀ <= k when the criterion is magnitude",
    "threshold": "scores below it die",
    "statistic": "scores below their mean or median die",
    "percentile": "scores below this percentile die",
    "params": "groups: so large a share of the parameters is left",
    "macs": "groups: so large a share of the multiplications is left",
    "latency": "groups: it takes so large a share of the time, measured on this machine by bisection",
}
SCHEDULES = {
    "one_shot": ("all at once", ""),
    "iterative, geometric": (
        "s_r = 1 - (1 - s)^(r/R): each round prunes the same share of the living",
        "Frankle & Carbin 2019, arXiv:1803.03635",
    ),
    "iterative, cubic": ("s_r = s (1 - (1 - r/R)³)", "Zhu & Gupta 2017, arXiv:1710.01878"),
}
GRANULARITIES = {
    "weight": ("each weight by itself", ""),
    "n:m, such as '2:4'": (
        "w[m g : m g + m, o]: n are kept of each m weights along the inputs, or along another axis: "
        "{n_m: '2:4', axis: -1}; no target",
        "Mishra et al. 2021, arXiv:2104.08378",
    ),
    "{block: [r, c]}": (
        "w[r a : r a + r, c b : c b + c]: r inputs x c outputs; of k weights at an edge, s · r c / k",
        "Gray et al. 2017; Narang et al. 2017, arXiv:1711.02782",
    ),
    "kernel": ("w[:, :, i, o]: all positions of a convolution's slice", "Mao et al. 2017, arXiv:1705.08922"),
    "neuron": ("w[..., o]: the incoming weights of a unit, and its bias", "Li et al. 2017, arXiv:1608.08710"),
    "group": ("channels, neurons, heads, widths: what the network's wiring ties; `compact` takes them away", ""),
    "layer": ("residual branches, each as a whole; what it is added to goes on alone; `compact` takes them away", ""),
}
PERTURBATIONS = {
    "fgsm": ("x + ε sign(dL/dx)", "Goodfellow et al. 2015, arXiv:1412.6572"),
    "pgd": ("such steps of 2.5 ε / steps, held within ε of x", "Madry et al. 2018, arXiv:1706.06083"),
    "gaussian": ("x + ε n, n ~ N(0, 1)", "Sehwag et al. 2020, arXiv:2002.10509: pruning for robustness"),
}


def methods_tables() -> Iterator[Table]:
    """One table each for criteria, perturbations, granularities, scopes, targets, schedules and training methods."""
    table = _table("criterion", "score (the lowest dies first)", "needs", "granularity", "paper")
    for name in CRITERIA:
        entry = CRITERIA[name]
        needs = ", ".join(sorted(entry.needs)) or ("nothing" if entry.data_free else "loss")
        table.add_row(name, escape(entry.formula), needs, escape(", ".join(entry.granularities)), escape(entry.paper))
    yield table
    table = _table("perturbation", "of the inputs that a criterion sees", "paper")
    for name, (formula, paper) in PERTURBATIONS.items():
        table.add_row(name, formula, paper)
    yield table
    table = _table("granularity", "what dies together", "paper")
    for name, (meaning, paper) in GRANULARITIES.items():
        table.add_row(escape(name), escape(meaning), paper)
    yield table
    table = _table("scope", "within which set scores compete", "paper")
    for name, (meaning, paper) in SCOPES.items():
        table.add_row(name, meaning, paper)
    yield table
    table = _table("target", "how many die")
    for name, meaning in TARGETS.items():
        table.add_row(name, escape(meaning))
    yield table
    table = _table("schedule", "sparsity of round r of R", "paper")
    for name, (formula, paper) in SCHEDULES.items():
        table.add_row(name, formula, paper)
    yield table
    table = _table("sparsify", "while it trains", "paper")
    for name in METHODS:
        table.add_row(name, escape(METHODS[name].formula), METHODS[name].paper)
    yield table


def _table(*columns: str) -> Table:
    return Table(*columns, box=None, pad_edge=False, header_style="bold", padding=(0, 2, 1, 0))
