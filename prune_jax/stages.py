"""The stages: a call goes in, an artifact comes to lie in the store, a result goes out. Knows nothing of flows."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import TypeAdapter

from prune_jax.checkpoints import Store
from prune_jax.criteria import find
from prune_jax.datasets import Dataset
from prune_jax.errors import GateError, NonFiniteResultError, UserMistake
from prune_jax.evaluation import describe, latencies, noisy, peak_bytes
from prune_jax.export import EXTENSIONS, WRITERS
from prune_jax.gates import NOISY, checks, reason, rows
from prune_jax.granularity import check_granularity
from prune_jax.group_scoring import score_groups
from prune_jax.group_stages import WIRED, compact, kinds_of, mask_groups
from prune_jax.hosts import Group, group
from prune_jax.masks import apply_masks, check_collapse
from prune_jax.models import Variables
from prune_jax.moments import masked_moments
from prune_jax.networks import (
    Arrays,
    Batches,
    Loaded,
    Metrics,
    as_arrays,
    at_rest,
    columns_of,
    cut_variables,
    dense_for,
    evaluator_of,
    groups_for,
    like,
    masked,
    mean_loss,
    network_for,
    read_network,
    repeated,
    right_answers,
    shapes_of,
    sparsity_of,
    temperature_of,
    validated,
)
from prune_jax.objectives import inputs_of, objective
from prune_jax.perturbation import perturbed
from prune_jax.problems import dataset_of, network_of, sample_of
from prune_jax.progress import Progress, Report, silent
from prune_jax.recipe import EXPORTS, Evaluate, Limits, Optimizer, Sparsify, StageCall, StageResult, Status, Teaching
from prune_jax.schedules import iterative
from prune_jax.scoring import compensate, mask, prunable_paths, score
from prune_jax.space import check_space
from prune_jax.sweeping import sweep
from prune_jax.trees import PyTree, leaves_by_path
from prune_jax.weights import read_weights, weights_digest

if TYPE_CHECKING:
    from prune_jax.training import Fitted

SPARSIFY: TypeAdapter[Sparsify | None] = TypeAdapter(Sparsify | None)


def run_stage(call: StageCall, store: Store, *, report: Report = silent) -> StageResult:
    """Carries out a call unless its artifact is there already.

    Raises:
        PruneError: what went wrong, and how to mend it.
    """
    began = time.perf_counter()

    def waiting() -> None:
        report(Progress(call.name, f"{call.label}: another run is at it", 0, 1))

    with store.lock(call.ref, waiting=waiting):
        if damage := store.damage(call.ref):
            moved = store.set_aside(call.ref)
            report(Progress(call.name, f"{call.label}: {damage}; moved to {moved.name}, made anew", 0, 1))
        meta = store.meta(call.ref)
        status: Status = "cached"
        if meta is None:
            check_space(call, store)
            arrays, metrics, *files = STAGES[call.kind](call, store, report)
            _check_numbers(call, arrays, metrics)
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


def _check_numbers(call: StageCall, arrays: Arrays, metrics: Metrics) -> None:
    """Refuses to keep NaN or infinity as a result; what a network's state holds is its own business."""
    for path, leaf in leaves_by_path({name: tree for name, tree in arrays.items() if name != "state"}).items():
        array = np.asarray(leaf)
        if jnp.issubdtype(array.dtype, jnp.floating) and not (finite := np.isfinite(array)).all():
            place = [int(i) for i in np.argwhere(~finite)[0]]
            raise NonFiniteResultError(
                f"{call.name} made {array[tuple(place)]} in {path} {list(array.shape)}, first at {place}; "
                "it is not kept. Look at the data and the weights that it began from, or choose wider types."
            )
    for path, value in leaves_by_path(metrics).items():
        if isinstance(value, float) and not np.isfinite(value):
            raise NonFiniteResultError(f"{call.name} measured {path} = {value}; it is not kept. Look at the objective.")


def train(call: StageCall, store: Store, report: Report) -> tuple[Arrays, Metrics]:
    """Trains, from initialisation or from weights of a file."""
    return _fit(call, store, report)


def finetune(call: StageCall, store: Store, report: Report) -> tuple[Arrays, Metrics]:
    """Trains on under masks, from earlier weights if the call rewinds, towards a teacher if it has one."""
    return _fit(call, store, report)


def take_part(call: StageCall, store: Store, hosts: Group) -> None:
    """Another host's part of a training that host 0 carries out: nothing of it is written.

    Raises:
        UserMistake: the store is not the one of host 0.
    """
    if not store.is_held(call.ref):
        raise UserMistake(f"store = {str(store.root)!r}: is not the one of host 0; name a folder that all hosts share")
    _fitted(call, store, silent, _start(call, store), dataset_of(call.problem), hosts)


def _start(call: StageCall, store: Store) -> Loaded:
    if path := call.settings.get("weights"):
        if weights_digest(path) != call.problem.code[path]:
            raise UserMistake(f"{path} changed while the recipe was running. Run the recipe again.")
        return Loaded(read_weights(path, shapes_of(call.problem)), None)
    if call.kind == "train":
        return Loaded(jax.jit(network_of(call.problem).init)(jax.random.key(call.seed)), None)
    start = read_network(store, call.inputs["network"])
    if "rewind" in call.inputs:
        earlier = read_network(store, call.inputs["rewind"]).variables
        start = start._replace(variables=cut_variables(call.problem, earlier, start.keep))
    return start


def _fit(call: StageCall, store: Store, report: Report) -> tuple[Arrays, Metrics]:
    start, data, hosts = _start(call, store), dataset_of(call.problem), group()
    with hosts.training(call.model_dump_json()) if hosts else contextlib.nullcontext():
        fitted = _fitted(call, store, report, start, data, hosts)
    metrics = validated(call.problem, fitted.variables, data, start.keep)
    if fitted.losses.size:
        metrics["train_loss"] = float(np.mean(fitted.losses[-50:]))
    if call.settings.get("sparsify") is not None:
        check_collapse(fitted.masks)
    metrics |= {"sparsity": sparsity_of(fitted.masks), "steps": int(fitted.losses.size)}
    if fitted.resumed_from:
        metrics["resumed_from_step"] = fitted.resumed_from
    stores = call.settings.get("store_moments", False)
    moments = jax.device_get(fitted.moments) if stores else None
    if stores and call.settings.get("sparsify") is not None:
        moments = masked_moments(moments, fitted.masks)
    made = start._replace(variables=fitted.variables, masks=fitted.masks, moments=moments)
    return {**as_arrays(made), "losses": fitted.losses}, metrics


def _fitted(call: StageCall, store: Store, report: Report, start: Loaded, data: Dataset, hosts: Group | None) -> Fitted:
    from prune_jax.distillation import Lesson
    from prune_jax.training import Teacher, fit

    settings, teacher = {word: said for word, said in call.settings.items() if word != "weights"}, None
    taught = Teaching(**{word: settings.pop(word) for word in Teaching.model_fields if word in settings})
    if "teacher" in call.inputs:
        loaded = read_network(store, call.inputs["teacher"])
        teacher = Teacher(
            network_for(call.problem, loaded.keep),
            loaded.variables,
            Lesson(temperature_of(call.problem, taught), taught.soft, tuple(taught.features.items())),
            columns_of(call.problem, start.keep, loaded.keep) if taught.features else None,
        )
    optimizer = Optimizer.model_validate(settings.pop("optimizer", {}))
    sparsify = SPARSIFY.validate_python(settings.pop("sparsify", None))
    if sparsify is not None and sparsify.spare:
        dense = dense_for(call, start, sparsify.model_dump())
        sparsify = sparsify.model_copy(update={"exclude": dense, "spare": ()})
    goes_on = settings.pop("moments", "fresh") == "kept"
    settings.pop("store_moments", None)
    network = network_for(call.problem, start.keep)

    def beat(done: int, total: int, loss: float, rate: float) -> None:
        report(Progress(call.name, call.label, done, total, "step", loss, rate))

    with store.steps(call.ref) as checkpoints:
        return fit(
            network,
            start.variables,
            data.train,
            objective_name=call.problem.objective,
            optimizer=optimizer,
            batch_size=call.problem.data.batch_size,
            seed=call.seed,
            masks=start.masks,
            moments=(start.moments or {}) if goes_on else None,
            sparsify=sparsify,
            teacher=teacher,
            devices=call.problem.devices,
            hosts=hosts,
            checkpoints=checkpoints,
            checkpoint_seconds=call.operation.checkpoint_seconds,
            beat=beat,
            **settings,
        )


def score_units(call: StageCall, store: Store, report: Report) -> tuple[Arrays, Metrics]:
    """Scores of every prunable unit."""
    loaded = read_network(store, call.inputs["network"])
    data = dataset_of(call.problem)
    criterion, granularity = call.settings["criterion"], call.settings.get("granularity", "weight")
    given: dict[str, Any] = {
        **_on_data(call, loaded, criterion, jax.random.key(call.seed), report),
        "apply": at_rest(network_for(call.problem, loaded.keep), loaded.variables.state),
        "inputs": inputs_of(sample_of(data)),
        "exclude": dense_for(call, loaded, call.settings),
        "key": jax.random.key(call.seed),
        "options": criterion.get("options", {}),
        "combine": criterion.get("combine"),
    }
    entry, params = find(criterion["name"]), loaded.variables.params
    if granularity in WIRED:
        net, kinds = groups_for(call.problem, loaded.keep), kinds_of(call.settings)
        network = network_for(call.problem, loaded.keep)
        given["correct"] = right_answers(network, call.problem.objective, loaded.variables.state)
        scores: Any = score_groups(net, entry, params, prefix="params/", kinds=kinds, **given)
    else:
        scores = score(entry, params, granularity=granularity, **given)
    metrics = {"units": int(sum(leaf.size for leaf in jax.tree.leaves(scores)))}
    return {"scores": jax.device_get(scores)}, metrics


def _on_data(
    call: StageCall, loaded: Loaded, criterion: Mapping[str, Any], key: jax.Array, report: Report
) -> dict[str, Any]:
    """The loss of a network and the batches that a criterion is to see of it."""
    loss = mean_loss(network_for(call.problem, loaded.keep), call.problem.objective, loaded.variables.state)
    batches: Any = Batches(dataset_of(call.problem).train, call, criterion.get("batches"), report)
    if perturbation := criterion.get("perturbation"):
        batches = perturbed(batches, **perturbation, loss=loss, params=loaded.variables.params, key=key)
    return {"loss": loss, "batches": batches}


def mask_network(call: StageCall, store: Store, report: Report) -> tuple[Arrays, Metrics]:
    """The network under masks of its lowest scores; a solver corrects the weights that survive, or chooses anew."""
    if call.settings.get("granularity") in WIRED:
        return mask_groups(call, store, report)
    loaded = read_network(store, call.inputs["network"])
    (params, state), alive = loaded.variables, loaded.masks
    scored, meta = store.read(call.inputs["scores"])
    left = prunable_paths(params, exclude=dense_for(call, loaded, call.settings))
    scores = like(params, {p: s for p, s in leaves_by_path(scored.get("scores", {})).items() if p in left})
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
    criterion = meta["call"]["settings"]["criterion"]
    entry = find(criterion["name"])
    if entry.compensate or entry.sweep:
        given = _on_data(call, loaded, criterion, jax.random.key(meta["call"]["seed"]), report)
        given["options"] = criterion.get("options", {})
        if entry.sweep:
            where: dict[str, Any] = {"granularity": check_granularity(settings.get("granularity", "weight"))}
            where["scope"] = settings.get("scope", "global")
            params, masks = sweep(entry, params, masks, alive=alive, **where, **given)
        else:
            params = compensate(entry, params, masks, **given)
    if alive is not None:  # leaves that were not scored this time keep what they had: what is dead stays dead
        masks = like(params, leaves_by_path(alive) | leaves_by_path(masks))
    variables = Variables(jax.device_get(apply_masks(params, masks)), state)
    return masked(call, loaded, loaded._replace(variables=variables, masks=jax.device_get(masks)), report)


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
    network, (params, state) = network_for(call.problem, loaded.keep), loaded.variables

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
    networks = {name: (network_for(call.problem, each.keep), each.variables) for name, each in loaded.items()}
    sample = sample_of(data)
    found: dict[str, Any] = {}
    for i, (name, (network, variables)) in enumerate(networks.items()):
        report(Progress(call.name, call.label, i, len(loaded) + 1, "network"))
        measure = evaluator_of(network, call.problem.objective, call.problem.data.batch_size)
        found[name] = measure(variables, data.test)
        found[name] |= describe(network, variables, loaded[name].masks, inputs_of(sample))
    timed = Evaluate.model_validate({"kind": "evaluate", **call.settings}).latency
    if timed:
        report(Progress(call.name, f"{call.label}: latency", len(loaded), len(loaded) + 1, "network"))
        for name, times in latencies(networks, functools.partial(repeated, sample), timed.batch_sizes).items():
            found[name]["latency_ms"] = times
        for name, (network, variables) in networks.items():
            found[name]["peak_bytes"] = {
                str(size): peak_bytes(network, variables, repeated(sample, size)) for size in timed.batch_sizes
            }
    return {}, {call.inputs[name].key: facts for name, facts in found.items()}


def gate(call: StageCall, store: Store, report: Report) -> tuple[Arrays, Metrics]:
    """Holds a network to its limits on the test split, beside another one where some of them compare.

    Raises:
        GateError: it does not keep to them.
    """
    data, limits = dataset_of(call.problem), Limits(**call.settings)
    metric = limits.metric or objective(call.problem.objective).primary
    loaded = {role: read_network(store, ref) for role, ref in call.inputs.items()}
    networks = {role: (network_for(call.problem, each.keep), each.variables) for role, each in loaded.items()}
    found: dict[str, Any] = {}
    for i, (role, (network, variables)) in enumerate(networks.items()):
        report(Progress(call.name, call.label, i, len(networks), "network"))
        measure = evaluator_of(network, call.problem.objective, call.problem.data.batch_size)
        found[role] = measure(variables, data.test)
        found[role] |= describe(network, variables, loaded[role].masks, inputs_of(sample_of(data)))
        if robust := limits.robustness:
            noise = noisy(data.test, robust.noise, robust.seed)
            found[role][NOISY] = measure(variables, noise, name="noisy test")[metric]
    if limits.latency_ms:
        sizes = [limits.latency_batch]
        for role, times in latencies(networks, functools.partial(repeated, sample_of(data)), sizes).items():
            found[role]["latency_ms"] = times
    judged = checks(limits, found["network"], found.get("against"), metric=metric)
    told = {"checks": rows(judged)}
    if no := reason(judged):
        raise GateError(no, told)
    return {}, told


STAGES: dict[str, Callable[[StageCall, Store, Report], tuple[Any, ...]]] = {
    "train": train,
    "score": score_units,
    "mask": mask_network,
    "finetune": finetune,
    "distill": finetune,
    "prune": prune,
    "compact": compact,
    "export": export,
    "evaluate": evaluate,
    "gate": gate,
}
