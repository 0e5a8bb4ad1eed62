"""The stages: a call goes in, an artifact comes to lie in the store, a result goes out. Knows nothing of flows."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prune_jax.budgets import TRIES, within_latency
from prune_jax.checkpoints import Store
from prune_jax.compaction import TracedNetwork, cut
from prune_jax.criteria import find
from prune_jax.datasets import Dataset, Split
from prune_jax.evaluation import describe, evaluator, latencies, peak_bytes
from prune_jax.export import EXTENSIONS, WRITERS
from prune_jax.group_scoring import score_groups
from prune_jax.masks import apply_masks, sparsity
from prune_jax.models import Network, Variables
from prune_jax.objectives import inputs_of, objective
from prune_jax.problems import dataset_of, examples_of, network_of, records_at, sample_of
from prune_jax.progress import Progress, Report, silent
from prune_jax.recipe import EXPORTS, Evaluate, Optimizer, Problem, Ref, StageCall, StageResult, Status
from prune_jax.reestimation import reestimate
from prune_jax.schedules import iterative
from prune_jax.scoring import mask, score
from prune_jax.structure import after, cut_network, groups_of, restored, stored
from prune_jax.trees import PyTree, leaves_by_path, map_by_path

Arrays = dict[str, Any]
Metrics = dict[str, Any]


class Loaded(NamedTuple):
    """A network out of the store."""

    variables: Variables
    masks: PyTree | None
    keep: PyTree | None = None  # of a compact network, as `structure.stored` has it


def run_stage(call: StageCall, store: Store, *, report: Report = silent) -> StageResult:
    """Carries out a call unless its artifact is there already.

    Raises:
        PruneError: what went wrong, and how to mend it.
    """
    began = time.perf_counter()
    with store.lock(call.ref):
        if damage := store.damage(call.ref):
            moved = store.set_aside(call.ref)
            report(Progress(call.name, f"{call.label}: {damage}; moved to {moved.name}, made anew", 0, 1))
        meta = store.meta(call.ref)
        status: Status = "cached"
        if meta is None:
            arrays, metrics, *files = STAGES[call.kind](call, store, report)
            seconds = round(time.perf_counter() - began, 3)
            facts = {"call": call.model_dump(mode="json", exclude={"facts"}), "facts": call.facts}
            meta = store.write(call.ref, arrays, {"metrics": metrics, "seconds": seconds, **facts}, *files)
            status = "ran"
    return StageResult(
        name=call.name,
        kind=call.kind,
        key=call.key,
        status=status,
        seconds=time.perf_counter() - began,
        metrics=meta["metrics"],
    )


def train(call: StageCall, store: Store, report: Report) -> tuple[Arrays, Metrics]:
    """Trains from initialisation."""
    network = network_of(call.problem)
    variables = jax.jit(network.init)(jax.random.key(call.seed))
    return _fit(call, store, report, Loaded(variables, None), dataset_of(call.problem))


def finetune(call: StageCall, store: Store, report: Report) -> tuple[Arrays, Metrics]:
    """Trains on under masks, from earlier weights if the call rewinds."""
    start = read_network(store, call.inputs["network"])
    if "rewind" in call.inputs:
        earlier = read_network(store, call.inputs["rewind"]).variables
        start = start._replace(variables=_cut(call.problem, earlier, start.keep))
    return _fit(call, store, report, start, dataset_of(call.problem))


def _fit(call: StageCall, store: Store, report: Report, start: Loaded, data: Dataset) -> tuple[Arrays, Metrics]:
    from prune_jax.training import fit

    settings = dict(call.settings)
    optimizer = Optimizer.model_validate(settings.pop("optimizer", {}))
    network = _network(call.problem, start.keep)

    def beat(done: int, total: int, loss: float, rate: float) -> None:
        report(Progress(call.name, call.label, done, total, "step", loss, rate))

    with store.steps(call.ref) as checkpoints:
        fitted = fit(
            network,
            start.variables,
            data.train,
            objective_name=call.problem.objective,
            optimizer=optimizer,
            batch_size=call.problem.data.batch_size,
            seed=call.seed,
            masks=start.masks,
            checkpoints=checkpoints,
            checkpoint_seconds=call.operation.checkpoint_seconds,
            beat=beat,
            **settings,
        )
    metrics = _validated(call.problem, fitted.variables, data, start.keep)
    if fitted.losses.size:
        metrics["train_loss"] = float(np.mean(fitted.losses[-50:]))
    metrics |= {"sparsity": _sparsity(start.masks), "steps": int(fitted.losses.size)}
    if fitted.resumed_from:
        metrics["resumed_from_step"] = fitted.resumed_from
    return {**_arrays(start._replace(variables=fitted.variables)), "losses": fitted.losses}, metrics


def score_units(call: StageCall, store: Store, report: Report) -> tuple[Arrays, Metrics]:
    """Scores of every prunable unit."""
    loaded = read_network(store, call.inputs["network"])
    data = dataset_of(call.problem)
    criterion, granularity = call.settings["criterion"], call.settings.get("granularity", "weight")
    given: dict[str, Any] = {
        "loss": mean_loss(_network(call.problem, loaded.keep), call.problem.objective, loaded.variables.state),
        "batches": _counted(data.train, call, criterion.get("batches"), report),
        "exclude": tuple(call.settings.get("exclude", ())),
        "key": jax.random.key(call.seed),
        "options": criterion.get("options", {}),
    }
    entry, params = find(criterion["name"]), loaded.variables.params
    if granularity == "group":
        net, kinds = _groups(call.problem, loaded.keep), call.settings.get("kinds", ())
        scores: Any = score_groups(net, entry, params, prefix="params/", kinds=kinds, **given)
    else:
        scores = score(entry, params, granularity=granularity, **given)
    metrics = {"units": int(sum(leaf.size for leaf in jax.tree.leaves(scores)))}
    return {"scores": jax.device_get(scores)}, metrics


def _counted(split: Split, call: StageCall, most: int | None, report: Report) -> Iterator[dict[str, np.ndarray]]:
    """The batches of a split in its own order, the last one smaller; tells how many are through."""
    size = call.problem.data.batch_size
    examples = examples_of(split)
    total = min(-(-examples // size), most or examples)
    for i in range(total):
        rows = range(i * size, min((i + 1) * size, examples))
        yield records_at(split, rows)
        report(Progress(call.name, call.label, i + 1, total, "batch"))


def mask_network(call: StageCall, store: Store, report: Report) -> tuple[Arrays, Metrics]:
    """The network under masks of its lowest scores."""
    if call.settings.get("granularity") == "group":
        return _mask_groups(call, store, report)
    loaded = read_network(store, call.inputs["network"])
    (params, state), alive = loaded.variables, loaded.masks
    scores = _like(params, store.read(call.inputs["scores"])[0].get("scores", {}))
    settings = call.settings
    masks = mask(
        scores,
        **_target(settings, scores),
        scope=settings.get("scope", "global"),
        granularity=settings.get("granularity", "weight"),
        min_keep=settings.get("min_keep", 0),
        alive=alive,
        params=params,
    )
    if alive is not None:  # leaves that were not scored this time keep what they had: what is dead stays dead
        masks = _like(params, leaves_by_path(alive) | leaves_by_path(masks))
    variables = Variables(jax.device_get(apply_masks(params, masks)), state)
    return _masked(call, loaded._replace(variables=variables, masks=jax.device_get(masks)))


def _masked(call: StageCall, loaded: Loaded) -> tuple[Arrays, Metrics]:
    metrics = _validated(call.problem, loaded.variables, dataset_of(call.problem), loaded.keep)
    return _arrays(loaded), metrics | {"sparsity": _sparsity(loaded.masks)}


def _mask_groups(call: StageCall, store: Store, report: Report) -> tuple[Arrays, Metrics]:
    """The network under masks of its lowest groups' units; the batch statistics of dead units are zero too."""
    loaded = read_network(store, call.inputs["network"])
    net = _groups(call.problem, loaded.keep)
    scores = leaves_by_path(store.read(call.inputs["scores"])[0]["scores"])  # group names are paths, too
    settings = call.settings
    scope = settings.get("scope", "global")
    already = net.dead_in(_alive(loaded))
    choose = functools.partial(
        net.choose,
        scores,
        scope="group" if scope == "layer" else scope,
        min_keep=max(settings.get("min_keep", 1), 1),
        round_to=settings.get("round_to", 1),
        dead=already,
    )
    if share := settings["target"].get("latency"):
        sample = sample_of(dataset_of(call.problem))
        dead = within_latency(
            net,
            _network(call.problem, loaded.keep),
            loaded.variables,
            functools.partial(_inputs, sample),
            share,
            lambda fraction: choose(sparsity=min(fraction, 0.999999)),
            told=lambda done, found: report(Progress(call.name, f"{call.label} · {found:.2f}", done, TRIES + 1, "try")),
        )
    else:
        dead = choose(**settings["target"])
    masks = net.masks(dead)
    params = masks["params"]
    if loaded.masks is not None:  # what is dead stays dead
        params = jax.tree.map(jnp.logical_and, params, _full(loaded.masks, params))
    variables = Variables(
        jax.device_get(apply_masks(loaded.variables.params, params)),
        jax.device_get(apply_masks(loaded.variables.state, masks["state"])),
    )
    arrays, metrics = _masked(call, loaded._replace(variables=variables, masks=jax.device_get(params)))
    units = {name: {"dead": len(dead.get(name, ())), "units": group.size} for name, group in net.groups.items()}
    return arrays, metrics | {"groups": units}


def _alive(loaded: Loaded) -> PyTree:
    """What is not masked, and which batch statistics are not zero, as those of masked units are."""
    return {"params": loaded.masks or {}, "state": jax.tree.map(lambda s: np.asarray(s) != 0, loaded.variables.state)}


def _full(masks: PyTree, like: PyTree) -> PyTree:
    found = leaves_by_path(masks)
    return map_by_path(lambda path, mask: found.get(path, np.ones(mask.shape, bool)), like)


def compact(call: StageCall, store: Store, report: Report) -> tuple[Arrays, Metrics]:
    """The network without its dead units: smaller arrays for a smaller function."""
    loaded = read_network(store, call.inputs["network"])
    net = _groups(call.problem, loaded.keep)
    dead = net.dead_in(_alive(loaded))
    small = net.compact(dead, loaded.variables._asdict())
    variables = jax.device_get(Variables(**small.params))
    masks = None if loaded.masks is None else jax.device_get(small.slice({"params": loaded.masks})["params"])
    if masks is not None and all(np.all(mask) for mask in jax.tree.leaves(masks)):
        masks = None
    shapes = _shapes(call.problem)
    keep = small.keep if loaded.keep is None else after(restored(loaded.keep, shapes), small.keep)
    made = Loaded(variables, masks, stored(keep, shapes))
    if most := call.settings.get("reestimate_batches"):
        batches = map(inputs_of, _counted(dataset_of(call.problem).train, call, most, report))
        state = reestimate(_network(call.problem, made.keep), variables, batches, seed=call.seed)
        variables = variables._replace(state=jax.device_get(state))
        made = made._replace(variables=variables)
    metrics = _validated(call.problem, variables, dataset_of(call.problem), made.keep)
    units = {
        name: {"dead": len(dead.get(name, ())), "units": group.size, "kind": group.kind}
        for name, group in net.groups.items()
    }
    return _arrays(made), metrics | {"sparsity": _sparsity(masks), "groups": units}


def _target(settings: dict[str, Any], scores: PyTree) -> dict[str, Any]:
    """The words of `mask` for a target; on the way to a number of survivors, the level of this round."""
    target = settings.get("target", {})
    climb = settings.get("climb")
    if not climb or climb["round"] == climb["rounds"]:
        return target
    total = sum(leaf.size for leaf in jax.tree.leaves(scores))
    levels = iterative(1 - target["keep"] / total, rounds=climb["rounds"], levels=climb["levels"])
    return {"sparsity": levels[climb["round"] - 1]}


def prune(call: StageCall, store: Store, report: Report) -> tuple[Arrays, Metrics]:
    """Publishes the network that the rounds chose."""
    chosen = call.inputs["result"]
    arrays, meta = store.read(chosen)
    arrays.pop("losses", None)
    kept = ("sparsity", "validation_")
    return arrays, {k: v for k, v in meta["metrics"].items() if k.startswith(kept)}


def export(call: StageCall, store: Store, report: Report) -> tuple[Arrays, Metrics, dict[str, bytes]]:
    """The network in files that need none of its code, each read again and compared."""
    loaded = read_network(store, call.inputs["network"])
    network, (params, state) = _network(call.problem, loaded.keep), loaded.variables

    def forward(*inputs: Any) -> jax.Array:
        return network.apply(params, state, inputs, train=False, key=None)[0]

    files, metrics = {}, {}
    sample = inputs_of(sample_of(dataset_of(call.problem)))
    formats = call.settings.get("formats", EXPORTS)
    for i, name in enumerate(formats):
        report(Progress(call.name, f"{call.label}: {name}", i, len(formats), "format"))
        files[EXTENSIONS[name]], metrics[name] = WRITERS[name](forward, loaded.variables._asdict(), sample)
    return {}, metrics, files


def evaluate(call: StageCall, store: Store, report: Report) -> tuple[Arrays, Metrics]:
    """Measures networks on the test split, and times them in turns."""
    data = dataset_of(call.problem)
    loaded = {name: read_network(store, ref) for name, ref in call.inputs.items()}
    networks = {name: (_network(call.problem, each.keep), each.variables) for name, each in loaded.items()}
    sample = sample_of(data)
    found: dict[str, Any] = {}
    for i, (name, (network, variables)) in enumerate(networks.items()):
        report(Progress(call.name, call.label, i, len(loaded) + 1, "network"))
        measure = _evaluator(network, call.problem.objective, call.problem.data.batch_size)
        found[name] = measure(variables, data.test)
        found[name] |= describe(network, variables, loaded[name].masks, inputs_of(sample))
    timed = Evaluate.model_validate({"kind": "evaluate", **call.settings}).latency
    if timed:
        report(Progress(call.name, f"{call.label}: latency", len(loaded), len(loaded) + 1, "network"))
        for name, times in latencies(networks, functools.partial(_inputs, sample), timed.batch_sizes).items():
            found[name]["latency_ms"] = times
        for name, (network, variables) in networks.items():
            found[name]["peak_bytes"] = {
                str(size): peak_bytes(network, variables, _inputs(sample, size)) for size in timed.batch_sizes
            }
    return {}, {call.inputs[name].key: facts for name, facts in found.items()}


def _inputs(sample: dict[str, np.ndarray], batch_size: int) -> tuple[np.ndarray, ...]:
    return tuple(np.repeat(array, batch_size, axis=0) for array in inputs_of(sample))


STAGES: dict[str, Callable[[StageCall, Store, Report], tuple[Any, ...]]] = {
    "train": train,
    "score": score_units,
    "mask": mask_network,
    "finetune": finetune,
    "prune": prune,
    "compact": compact,
    "export": export,
    "evaluate": evaluate,
}


def read_network(store: Store, ref: Ref) -> Loaded:
    """Reads the network of an artifact."""
    arrays, _ = store.read(ref)
    params = arrays.get("params", {})
    masks = _like(params, arrays["masks"]) if "masks" in arrays else None
    return Loaded(Variables(params, arrays.get("state", {})), masks, arrays.get("keep"))


def _arrays(loaded: Loaded) -> Arrays:
    arrays = loaded.variables._asdict()
    if loaded.masks is not None:
        arrays["masks"] = loaded.masks
    return arrays if loaded.keep is None else {**arrays, "keep": loaded.keep}


def _shapes(problem: Problem) -> PyTree:
    """Shapes and types of the whole network's variables."""
    return jax.eval_shape(network_of(problem).init, jax.random.key(0))._asdict()


def _network(problem: Problem, keep: PyTree | None) -> Network:
    """The problem's network, cut to `keep` where it is compact."""
    whole = network_of(problem)
    return whole if keep is None else cut_network(whole, restored(keep, _shapes(problem)))


def _cut(problem: Problem, variables: Variables, keep: PyTree | None) -> Variables:
    if keep is None:
        return variables
    shapes = _shapes(problem)
    return Variables(**jax.device_get(cut(variables._asdict(), shapes, restored(keep, shapes))))


def _groups(problem: Problem, keep: PyTree | None) -> TracedNetwork:
    return groups_of(_network(problem, keep), inputs_of(sample_of(dataset_of(problem))))


def _like(params: PyTree, part: PyTree) -> PyTree:
    """`part` in the containers of `params`, `None` where it holds nothing."""
    flat = leaves_by_path(part)
    return map_by_path(lambda path, _: flat.get(path), params)


def _sparsity(masks: PyTree | None) -> float:
    return 0.0 if masks is None else sparsity(masks)


def _validated(problem: Problem, variables: Variables, data: Dataset, keep: PyTree | None = None) -> Metrics:
    """Loss and metrics on the validation split, if there is one."""
    if data.validation is None:
        return {}
    measure = _evaluator(_network(problem, keep), problem.objective, problem.data.batch_size)
    return {
        f"validation_{name}": value for name, value in measure(variables, data.validation, name="validation").items()
    }


@functools.lru_cache(maxsize=16)
def _evaluator(network: Network, objective_name: str, batch_size: int) -> Callable[..., dict[str, float]]:
    return evaluator(network, objective(objective_name), batch_size=max(batch_size, 256))


@functools.lru_cache(maxsize=16)
def _loss_function(network: Network, objective_name: str) -> Callable[[PyTree, PyTree, PyTree], jax.Array]:
    goal = objective(objective_name)

    def loss(state: PyTree, params: PyTree, batch: PyTree) -> jax.Array:
        outputs, _ = network.apply(params, state, inputs_of(batch), train=False, key=None)
        return jnp.mean(goal.loss(outputs, batch))

    return loss


def mean_loss(network: Network, objective_name: str, state: PyTree) -> Callable[[PyTree, PyTree], jax.Array]:
    """The resting network's mean loss, `(params, batch) -> scalar`; its state is an argument, so it compiles once."""
    return jax.tree_util.Partial(_loss_function(network, objective_name), state)
