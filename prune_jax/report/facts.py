"""What the charts of a report show, read from the run's record and from what the store still has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from prune_jax.checkpoints import Store
from prune_jax.errors import DamagedArtifactError
from prune_jax.recipe import Ref
from prune_jax.report.tables import HIGHER_IS_BETTER, Record, dense_of, primary_metric
from prune_jax.roles import TUNED, is_control, lineage, role_of
from prune_jax.trees import leaves_by_path

SHOWN_NETWORKS = 4  # whose weights and losses are drawn; a matrix may have hundreds
SHOWN_LAYERS = 24
BINS = 48


class Point(NamedTuple):
    """A metric at a sparsity: the mean over seeds and its range."""

    sparsity: float
    value: float
    low: float
    high: float


@dataclass
class Series:
    """What is drawn in one colour: a pruning method, or the dense networks."""

    label: str
    lines: list[list[Point]] = field(default_factory=list)  # validation metric, round after round
    breached: list[Point] = field(default_factory=list)  # rounds that the guard refused
    tests: list[Point] = field(default_factory=list)  # test metric of evaluated networks


class Losses(NamedTuple):
    """The losses of one network's training, or of its fine-tunings one after the other."""

    label: str
    parts: list[np.ndarray]  # [steps] of each training


class LossPanel(NamedTuple):
    """Loss curves that share their axes."""

    title: str
    networks: list[Losses]
    left_out: int  # networks that there was no room for


class Histogram(NamedTuple):
    """The weights of one layer; counts [BINS] by network, the dense one's under its name."""

    path: str
    edges: np.ndarray  # [BINS + 1]
    counts: dict[str, np.ndarray]
    alive: dict[str, int]


class Arrays:
    """Reads artifacts and remembers those that could not be read."""

    def __init__(self, store: Store):
        self.store = store
        self.missing: list[str] = []

    def read(self, kind: str, key: str) -> dict[str, Any]:
        """The arrays of an artifact, none if it is gone or damaged."""
        try:
            return self.store.read(Ref(kind, key))[0]
        except (DamagedArtifactError, OSError) as error:
            self.missing.append(f"{kind}/{key}: {error}")
            return {}


def base_name(name: str) -> str:
    """The stage of the recipe from which a row of a matrix comes.

    >>> base_name("prune[criterion=taylor,seed=0]")
    'prune'
    """
    return name.partition("[")[0]


def owner(name: str, stages: Mapping[str, Any]) -> str | None:
    """The prune stage whose turn a stage is: `prune` for `prune.1.score`."""
    owners = [o for o in stages if name.startswith(f"{o}.") and stages[o]["kind"] == "prune"]
    return max(owners, key=len, default=None)


def turns_of(name: str, stages: Mapping[str, Any]) -> dict[str, Any]:
    """The stages that a prune stage started."""
    return {n: s for n, s in stages.items() if owner(n, stages) == name}


def words_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a matrix by the last words of its axes: `target.sparsity` is `sparsity`."""
    return {axis.rpartition(".")[2]: value for axis, value in row.items()}


def group_of(name: str, row: Mapping[str, Any], *, siblings: Iterable[str]) -> str:
    """What a network is called beside others: its stage if they differ in it, and its row but for sparsity and seed."""
    words = [f"{k}={word(v)}" for k, v in words_of(row).items() if k not in {"sparsity", "seed"}]
    if not words or len({base_name(s) for s in siblings}) > 1:
        words.insert(0, base_name(name))
    return ", ".join(words)


def word(value: Any) -> str:
    """A value of a matrix's axis as one word.

    >>> word({"name": "pgd", "steps": 3}), word([300, 100]), word("taylor")
    ('pgd+3', '300-100', 'taylor')
    """
    if isinstance(value, Mapping):
        return "+".join(word(v) for v in value.values())
    return "-".join(map(word, value)) if isinstance(value, list) else str(value)


def dense_params(record: Record, name: str) -> int | None:
    """How many parameters a network had before anything was cut away: those of its largest evaluated forebear."""
    results = record.get("results", {})
    family = {name, dense_of(record, name), *lineage(record, name)}
    return max((r["params"] for n, r in results.items() if n in family and "params" in r), default=None)


def times_smaller(record: Record, name: str) -> float:
    """Dense parameters by the parameters of an evaluated network, 1 unless it descends from a compaction."""
    result, stages = record["results"][name], record.get("stages", {})
    compacted = result.get("kind") == "compact" or any(stages[n]["kind"] == "compact" for n in lineage(record, name))
    dense = dense_params(record, name)
    return dense / result["params"] if compacted and dense and result.get("params") else 1.0


def has_compact(record: Record) -> bool:
    """Whether any evaluated network has fewer parameters than the dense one: sparsity does not tell its size."""
    return any(times_smaller(record, name) > 1 for name in record.get("results", {}))


def extents(record: Record) -> dict[str, float]:
    """How far each evaluated network is pruned: its sparsity; in a run with compact networks, the share that is gone.

    The share is `1 - nonzero / dense parameters`, whether weights are masked or cut away.
    """
    results = record.get("results", {})
    found = {name: result.get("sparsity", 0.0) for name, result in results.items()}
    if has_compact(record):
        for name, result in results.items():
            dense = dense_params(record, name)
            if result.get("kind") != "train" and dense and "nonzero" in result:
                found[name] = 1 - result["nonzero"] / dense
    return found


def rounds_of(store: Store, record: Record, name: str) -> list[dict[str, Any]]:
    """The rounds of a prune stage; of one that failed, those that its turns tell of."""
    stages = record["stages"]
    meta = store.meta(Ref(stages[name]["kind"], stages[name]["key"])) or {}
    if meta.get("facts", {}).get("rounds"):
        return meta["facts"]["rounds"]
    turns = turns_of(name, stages)
    good = [s["status"] in {"ran", "cached"} for s in turns.values()]
    if any(".fold " in turn for turn in turns):
        return []  # the turns of a search are no rounds
    last: dict[str, dict[str, Any]] = {}
    for turn, stage in turns.items():
        number, _, word = turn.removeprefix(f"{name}.").partition(".")
        if word in {"mask", *TUNED} and stage["status"] in {"ran", "cached"} and stage.get("metrics"):
            last[number] = {"round": int(number), "level": None, "kept": True, **stage}
    if last and all(good) and stages[name]["status"] == "failed":
        list(last.values())[-1]["kept"] = False  # all went well but for the guard, which stops at the breach
    return list(last.values())


def widths_of(store: Store, record: Record) -> dict[str, dict[str, Mapping[str, Any]]]:
    """The groups of units by stage, `{"dead", "units"}` each, and `"kind"` where it is known.

    Those of the compactions; of a run that has none, those of the last mask that each pruning kept.
    """
    stages = record["stages"]
    groups = {n: found for n, s in stages.items() if (found := (s.get("metrics") or {}).get("groups"))}
    compact = {n: found for n, found in groups.items() if stages[n]["kind"] == "compact"}
    if compact:
        return compact
    kept = {}
    for name, stage in stages.items():
        if stage["kind"] == "prune" or (stage["kind"] == "mask" and owner(name, stages) is None):
            last = masked_by(store, record, name)
            if last in groups:
                kept[name] = groups[last]
    return kept


def masked_by(store: Store, record: Record, name: str) -> str:
    """The stage that tells of a stage's groups: of a pruning the last mask that it kept, else the stage itself."""
    if record["stages"][name]["kind"] != "prune":
        return name
    rounds = [r["round"] for r in rounds_of(store, record, name) if r.get("kept", True)]
    return f"{name}.{rounds[-1]}.mask" if rounds else name


def search_of(store: Store, record: Record) -> dict[str, dict[str, Any]]:
    """The searches of the run by stage: `{"metric", "over", "table", "chosen"}`."""
    found = {}
    for name, stage in record["stages"].items():
        if stage["kind"] == "prune":
            facts = (store.meta(Ref("prune", stage["key"])) or {}).get("facts", {})
            if facts.get("search"):
                found[name] = facts["search"]
    return found


def series_of(store: Store, record: Record) -> list[Series]:
    """The chosen metric against sparsity, the dense networks first; one series for each group of a matrix.

    In a run with compact networks, against the share of the dense network's weights that is gone (see `extents`).
    Over seeds the points are means with their range. A matrix over sparsity of one-shot prunings makes one line.
    """
    metric, stages, results = primary_metric(record), record["stages"], record.get("results", {})
    names = [n for n, s in stages.items() if s["kind"] == "prune"]
    pruned = [n for n, r in results.items() if r.get("kind") != "train"]
    extent, compact = extents(record), has_compact(record)
    found: dict[str, Series] = {}
    climbs: dict[tuple[str, Any], dict[Any, list[tuple[float, float]]]] = {}
    breaches: dict[tuple[str, Any], list[tuple[float, float]]] = {}
    for name in names:
        row = stages[name].get("row") or {}
        place = (group_of(name, row, siblings=[*names, *pruned]), words_of(row).get("sparsity"))
        gone = _share_gone(store, record, name) if compact else (lambda sparsity: sparsity)
        for step, sparsity, value, kept in _climb(store, record, name, f"validation_{metric}"):
            sparsity = gone(sparsity)
            if kept:
                climbs.setdefault(place, {}).setdefault(step, []).append((sparsity, value))
            else:
                breaches.setdefault((place[0], step), []).append((sparsity, value))
    one_shot = all(len(steps) <= 2 for steps in climbs.values())
    for (label, _), steps in climbs.items():
        series = found.setdefault(label, Series(label))
        line = sorted(_mean(pairs) for pairs in steps.values())
        if one_shot and series.lines:
            series.lines[0] = sorted({*series.lines[0], *line})
        else:
            series.lines.append(line)
    for (label, _), pairs in breaches.items():
        found.setdefault(label, Series(label)).breached.append(_mean(pairs))
    tests: dict[tuple[str, Any], list[tuple[float, float]]] = {}
    for name, result in results.items():
        row = result.get("row") or {}
        dense = result.get("kind") == "train"
        place = (
            ("dense", None)
            if dense
            else (group_of(name, row, siblings=[*names, *pruned]), words_of(row).get("sparsity"))
        )
        if metric in result:
            tests.setdefault(place, []).append((extent[name], result[metric]))
    for (label, _), pairs in tests.items():
        found.setdefault(label, Series(label)).tests.append(_mean(pairs))
    return sorted(found.values(), key=lambda s: s.label != "dense")


def controls_of(record: Record) -> list[Series]:
    """The chosen metric against the share of the dense network's MACs, one series for each role; none without controls.

    Controls are what the pruned network must beat: units drawn by lot, a fresh network of the same widths, the dense
    one trained as long. Networks that others were made of stand for these others alone. Over seeds the points are
    means with their range.
    """
    metric, results = primary_metric(record), record.get("results", {})
    roles = {name: role_of(record, name) for name in results}
    if not any(map(is_control, roles.values())):
        return []
    used = {n for name in results for n in lineage(record, name)[1:]}
    found: dict[str, dict[Any, list[tuple[float, float]]]] = {}
    for name, result in results.items():
        dense = dense_of(record, name)
        if metric not in result or not dense or (name in used and roles[name] != "dense"):
            continue
        row = words_of(result.get("row") or {})
        told = [f"{k}={word(v)}" for k, v in row.items() if k not in {"sparsity", "seed", "criterion"}]
        share = result["effective_macs"] / max(1, results[dense]["macs"])
        label = ", ".join([roles[name] or base_name(name), *told])
        found.setdefault(label, {}).setdefault(row.get("sparsity"), []).append((share, result[metric]))
    series = [Series(label, tests=sorted(map(_mean, places.values()))) for label, places in found.items()]
    return sorted(series, key=lambda s: (not s.label.startswith("dense"), "at random" in s.label or "fresh" in s.label))


def _climb(store: Store, record: Record, name: str, metric: str) -> list[tuple[Any, float, float, bool]]:
    """(which step, sparsity, metric, kept) of the network that a prune stage took and of each of its rounds."""
    stages = record["stages"]
    start: dict[str, Any] = next((stages[p]["metrics"] for p in stages[name].get("after", []) if p in stages), {}) or {}
    points: list[tuple[Any, float, float, bool]] = (
        [(0, start.get("sparsity", 0.0), start[metric], True)] if metric in start else []
    )
    for round_ in rounds_of(store, record, name):
        metrics = round_.get("metrics", {})
        sparsity = metrics.get("sparsity", round_.get("level"))
        if metric in metrics and sparsity is not None:
            points.append(((round_["round"], round_.get("level")), sparsity, metrics[metric], round_.get("kept", True)))
    return points if len(points) > 1 else []


def _share_gone(store: Store, record: Record, name: str) -> Callable[[float], float]:
    """From the sparsity of a prune stage's masks to the share of the dense network's weights that is gone.

    With P weights of which M are prunable, out of D of the dense network: `1 - (P - sparsity * M) / D`.
    """
    result = record["results"].get(name)
    if result and result.get("layers"):
        params, prunable = result["params"], sum(v["size"] for v in result["layers"].values() if v.get("prunable"))
    else:
        arrays = Arrays(store).read(record["stages"][name]["kind"], record["stages"][name]["key"])
        sizes = {k: sum(np.size(v) for v in leaves_by_path(arrays.get(k) or {}).values()) for k in ("params", "masks")}
        params, prunable = sizes["params"], sizes["masks"]
    dense = dense_params(record, name)
    if not (params and prunable and dense):
        return lambda sparsity: sparsity
    return lambda sparsity: 1 - (params - sparsity * prunable) / dense


def _mean(pairs: list[tuple[float, float]]) -> Point:
    values = [value for _, value in pairs]
    return Point(fmean(s for s, _ in pairs), fmean(values), min(values), max(values))


def best_of(record: Record) -> dict[str, Any] | None:
    """The smallest pruned networks, seeds taken together: `smaller` times smaller than the dense one; no controls.

    Few parameters come first, then few that are not zero; of equals the best by the metric. Where no network has fewer
    parameters than the dense one, the sparsest.
    """
    metric = primary_metric(record)
    results = record.get("results", {})
    groups: dict[tuple[str, str], list[str]] = {}
    pruned = [n for n, r in results.items() if r.get("kind") != "train" and metric in r]
    for name in [n for n in pruned if not is_control(role_of(record, n))] or pruned:
        row = {k: v for k, v in words_of(results[name].get("row") or {}).items() if k != "seed"}
        groups.setdefault((base_name(name), str(row)), []).append(name)
    found: list[dict[str, Any]] = []
    extent, bases = extents(record), list(dict.fromkeys(base for base, _ in groups))
    for (base, _), names in groups.items():
        words = [f"{k}={word(v)}" for k, v in words_of(results[names[0]].get("row") or {}).items() if k != "seed"]
        pairs = [(results[n][metric], results[d][metric]) for n in names if (d := dense_of(record, n))]
        value = fmean(results[n][metric] for n in names)
        found.append(
            {
                "names": names,
                "name": f"{base}[{','.join(words)}]" if words else base,
                "sparsity": fmean(results[n].get("sparsity", 0.0) for n in names),
                "value": value,
                "difference": fmean(a - b for a, b in pairs) if pairs else None,
                "dense": fmean(b for _, b in pairs) if pairs else None,
                "of": len(groups),
                "smaller": 1 / fmean(1 / times_smaller(record, n) for n in names),
                "left": fmean(1 - extent[n] for n in names),
                "stage": bases.index(base),
            }
        )
    sign = 1 if metric in HIGHER_IS_BETTER else -1
    if any(g["smaller"] > 1 for g in found):
        return max(found, key=lambda g: (round(g["smaller"], 3), -round(g["left"], 3), sign * g["value"], g["stage"]))
    return max(found, key=lambda g: (round(g["sparsity"], 3), sign * g["value"]), default=None)


def shown_networks(record: Record) -> list[str]:
    """The pruned networks whose weights are drawn: all if they are few, else the sparsest of each group."""
    results = record.get("results", {})
    pruned = [n for n, r in results.items() if r.get("kind") != "train"]
    if len(pruned) <= SHOWN_NETWORKS:
        return pruned
    chosen: dict[str, str] = {}
    extent = extents(record)
    for name in pruned:
        group = group_of(name, results[name].get("row") or {}, siblings=pruned)
        if group not in chosen or extent[name] > extent[chosen[group]] + 1e-3:
            chosen[group] = name
    return list(chosen.values())[:SHOWN_NETWORKS]


def histograms(arrays: Arrays, record: Record, networks: list[str]) -> list[Histogram]:
    """Weights of the dense network and the survivors of the pruned ones, layer by layer, the largest layers first.

    The zeros that pruning made are left out; all networks of a layer share their bins.
    """
    results = record.get("results", {})
    dense = next((d for n in networks if (d := dense_of(record, n))), None)
    weights: dict[str, dict[str, np.ndarray]] = {}
    for name in dict.fromkeys([*([dense] if dense else []), *networks]):
        found = arrays.read(results[name]["kind"], results[name]["key"])
        masks = leaves_by_path(found.get("masks") or {})
        for path, leaf in leaves_by_path(found.get("params") or {}).items():
            if results[name].get("layers", {}).get(path, {}).get("prunable", path in masks) or name == dense:
                values = np.asarray(leaf, np.float32)
                alive = np.asarray(masks[path], bool) if path in masks else values != 0
                weights.setdefault(path, {})[name] = values[alive & np.isfinite(values)]
    prunable = {p: w for p, w in weights.items() if set(w) - {dense}}
    largest = sorted(prunable, key=lambda p: -max(w.size for w in prunable[p].values()))[:SHOWN_LAYERS]
    return [_histogram(p, prunable[p]) for p in prunable if p in largest]


def _histogram(path: str, weights: Mapping[str, np.ndarray]) -> Histogram:
    every = np.concatenate([w.ravel() for w in weights.values()])
    if not every.size:
        every = np.zeros(1)
    edges = np.histogram_bin_edges(every, BINS)
    counts = {name: np.histogram(w, edges)[0] for name, w in weights.items()}
    return Histogram(path, edges, counts, {name: int(w.size) for name, w in weights.items()})


def loss_panels(arrays: Arrays, record: Record, networks: list[str]) -> list[LossPanel]:
    """The losses of each stage of the recipe that trains; of a matrix those of `networks`, else its first rows."""
    stages = record["stages"]
    panels = []
    told = {n: s for n, s in stages.items() if owner(n, stages) is None and s["status"] in {"ran", "cached", "failed"}}
    for base in dict.fromkeys(base_name(n) for n, s in told.items() if s["kind"] in {"train", "prune", *TUNED}):
        siblings = [n for n in told if base_name(n) == base]
        shown = [n for n in siblings if n in networks] or siblings[:SHOWN_NETWORKS]
        curves = []
        for name in shown:
            if told[name]["kind"] == "prune":
                refs = [(r["kind"], r["key"]) for r in rounds_of(arrays.store, record, name) if r["kind"] in TUNED]
            else:
                refs = [(told[name]["kind"], told[name]["key"])] if told[name]["status"] != "failed" else []
            parts = [
                np.asarray(losses, np.float64)
                for ref in refs
                if (losses := arrays.read(*ref).get("losses")) is not None
            ]
            parts = [part[np.isfinite(part)] for part in parts]
            if any(part.size for part in parts):
                curves.append(Losses(name, parts))
        if curves:
            what = {
                "train": "training",
                "finetune": "fine-tuning",
                "distill": "distillation",
                "prune": "fine-tuning, round after round",
            }
            panels.append(LossPanel(f"{base}: {what[told[siblings[0]]['kind']]}", curves, len(siblings) - len(curves)))
    return panels
