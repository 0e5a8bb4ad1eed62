"""Networks out of the store, compact ones too, and how they are judged while a stage works."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from prune_jax.bias_correction import correct_bias
from prune_jax.checkpoints import Store
from prune_jax.compaction import TracedNetwork, cut
from prune_jax.datasets import Dataset, Split
from prune_jax.errors import UserMistake
from prune_jax.evaluation import evaluator
from prune_jax.masks import sparsity
from prune_jax.models import Network, Variables
from prune_jax.moments import masked_moments
from prune_jax.objectives import composed, inputs_of, objective
from prune_jax.order import dense
from prune_jax.problems import dataset_of, examples_of, network_of, records_at, sample_of
from prune_jax.progress import Progress, Report
from prune_jax.recipe import Problem, Ref, StageCall, Teaching
from prune_jax.structure import cut_network, groups_of, restored
from prune_jax.trees import PyTree, leaves_by_path, map_by_path

Arrays = dict[str, Any]
Metrics = dict[str, Any]


class Loaded(NamedTuple):
    """A network out of the store."""

    variables: Variables
    masks: PyTree | None
    keep: PyTree | None = None  # of a compact network, as `structure.stored` has it
    moments: PyTree | None = None  # of the optimizer, where the training stored them


def read_network(store: Store, ref: Ref) -> Loaded:
    """Reads the network of an artifact."""
    arrays, _ = store.read(ref)
    params = arrays.get("params", {})
    masks = like(params, arrays["masks"]) if "masks" in arrays else None
    return Loaded(Variables(params, arrays.get("state", {})), masks, arrays.get("keep"), arrays.get("moments"))


def as_arrays(loaded: Loaded) -> Arrays:
    """A network as the store holds it."""
    more = {"masks": loaded.masks, "keep": loaded.keep, "moments": loaded.moments}
    return {**loaded.variables._asdict(), **{name: tree for name, tree in more.items() if tree is not None}}


def shapes_of(problem: Problem) -> PyTree:
    """Shapes and types of the whole network's variables."""
    return jax.eval_shape(network_of(problem).init, jax.random.key(0))._asdict()


def network_for(problem: Problem, keep: PyTree | None) -> Network:
    """The problem's network, cut to `keep` where it is compact."""
    whole = network_of(problem)
    return whole if keep is None else cut_network(whole, restored(keep, shapes_of(problem)))


def cut_variables(problem: Problem, variables: Variables, keep: PyTree | None) -> Variables:
    """Variables of the whole network, cut to `keep`."""
    if keep is None:
        return variables
    shapes = shapes_of(problem)
    return Variables(**jax.device_get(cut(variables._asdict(), shapes, restored(keep, shapes))))


def columns_of(problem: Problem, student: PyTree | None, teacher: PyTree | None) -> dict[str, tuple[np.ndarray, ...]]:
    """By parameter and axis, which of a teacher's indices a student has; both as `structure.stored` has them.

    Raises:
        UserMistake: the student has units that the teacher lacks.
    """
    if student is None and teacher is None:
        return {}
    shapes = shapes_of(problem)
    kept, its = (restored({} if keep is None else keep, shapes) for keep in (student, teacher))
    found = {}
    for name in (name for name in kept if name.startswith("params/")):
        path = name.removeprefix("params/")
        if not all(np.isin(a, b).all() for a, b in zip(kept[name], its[name], strict=True)):
            raise UserMistake(
                f"the teacher lacks units of {path!r} that its student has: it must not be the smaller of the two"
            )
        found[path] = tuple(np.flatnonzero(np.isin(b, a)) for a, b in zip(kept[name], its[name], strict=True))
    return found


def temperature_of(problem: Problem, teaching: Teaching) -> float | None:
    """The temperature of the softmaxes that are matched; None where outputs are no logits."""
    return teaching.temperature or (4.0 if problem.objective == "classification" else None)


def groups_for(problem: Problem, keep: PyTree | None) -> TracedNetwork:
    """The groups of the problem's network, cut to `keep` where it is compact."""
    return groups_of(network_for(problem, keep), inputs_of(sample_of(dataset_of(problem))))


def like(params: PyTree, part: PyTree) -> PyTree:
    """`part` in the containers of `params`, `None` where it holds nothing."""
    flat = leaves_by_path(part)
    return map_by_path(lambda path, _: flat.get(path), params)


def sparsity_of(masks: PyTree | None) -> float:
    """The fraction pruned of the masked weights; 0 without masks."""
    return 0.0 if masks is None else sparsity(masks)


def validated(problem: Problem, variables: Variables, data: Dataset, keep: PyTree | None = None) -> Metrics:
    """Loss and metrics on the validation split, if there is one."""
    if data.validation is None:
        return {}
    measure = evaluator_of(network_for(problem, keep), problem.objective, problem.data.batch_size)
    return {
        f"validation_{name}": value for name, value in measure(variables, data.validation, name="validation").items()
    }


@functools.lru_cache(maxsize=16)
def evaluator_of(network: Network, objective_name: str, batch_size: int) -> Callable[..., dict[str, float]]:
    """Evaluates weights of a network; the same function for the same network, so that it compiles once."""
    return evaluator(network, objective(objective_name), batch_size=max(batch_size, 256))


def mean_loss(network: Network, objective_name: str, state: PyTree) -> Callable[[PyTree, PyTree], jax.Array]:
    """The resting network's mean loss, `(params, batch) -> scalar`; its state is an argument, so it compiles once."""
    return composed(objective(objective_name).loss, at_rest(network, state))


@functools.lru_cache(maxsize=16)
def _right_function(network: Network, objective_name: str) -> Callable[[PyTree, PyTree, PyTree], jax.Array]:
    accuracy = objective(objective_name).metrics["accuracy"]

    def right(state: PyTree, params: PyTree, batch: PyTree) -> jax.Array:
        return accuracy(network.apply(params, state, inputs_of(batch), train=False, key=None)[0], batch)

    return right


def right_answers(network: Network, objective_name: str, state: PyTree) -> Callable[[PyTree, PyTree], jax.Array] | None:
    """Which answers of the resting network are right, `(params, batch) -> [batch]`; None for an objective without."""
    if "accuracy" not in objective(objective_name).metrics:
        return None
    return jax.tree_util.Partial(_right_function(network, objective_name), state)


def dense_in(network: Network, variables: Variables, inputs: Sequence[Any], said: Mapping[str, Any]) -> tuple[str, ...]:
    """Patterns of the parameters of a network that stay dense, of which `exclude` and `spare` are said."""

    def apply(params: PyTree, state: PyTree, *inputs: Any) -> PyTree:
        return network.apply(params, state, inputs, train=False, key=None)[0]

    return dense(said.get("exclude", ()), said.get("spare", ()), apply, variables.params, variables.state, *inputs)


def dense_for(call: StageCall, loaded: Loaded, said: Mapping[str, Any]) -> tuple[str, ...]:
    """The same of the network that a call was handed."""
    inputs = inputs_of(sample_of(dataset_of(call.problem)))
    return dense_in(network_for(call.problem, loaded.keep), loaded.variables, inputs, said)


@functools.lru_cache(maxsize=16)
def _forward(network: Network) -> Callable[..., PyTree]:
    return lambda state, params, *inputs: network.apply(params, state, inputs, train=False, key=None)[0]


def at_rest(network: Network, state: PyTree) -> Callable[..., PyTree]:
    """The resting network, `(params, *inputs) -> outputs`; its state is an argument, so it compiles once."""
    return jax.tree_util.Partial(_forward(network), state)


@dataclass(frozen=True)
class Batches:
    """The batches of a split in its own order, the last one smaller, as often as asked; tells how many are through."""

    split: Split
    call: StageCall
    most: int | None
    report: Report

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        size = self.call.problem.data.batch_size
        examples = examples_of(self.split)
        total = min(-(-examples // size), self.most or examples)
        for i in range(total):
            rows = range(i * size, min((i + 1) * size, examples))
            yield records_at(self.split, rows)
            self.report(Progress(self.call.name, self.call.label, i + 1, total, "batch"))


def repeated(sample: dict[str, np.ndarray], batch_size: int) -> tuple[np.ndarray, ...]:
    """The inputs of a batch that holds one example many times."""
    return tuple(np.repeat(array, batch_size, axis=0) for array in inputs_of(sample))


def masked(call: StageCall, before: Loaded, loaded: Loaded, report: Report) -> tuple[Arrays, Metrics]:
    """What a masked network leaves in the store, and how it does on the validation split.

    Args:
        call: says whether biases take over what died.
        before: the network before it was masked.
        loaded: the network under its masks.
        report: hears of the batches that the means are taken over.
    """
    told: Metrics = {}
    if most := call.settings.get("correct_bias_batches"):
        loaded, told = _corrected(call, before, loaded, Batches(dataset_of(call.problem).train, call, most, report))
    metrics = validated(call.problem, loaded.variables, dataset_of(call.problem), loaded.keep)
    if loaded.moments is not None:
        loaded = loaded._replace(moments=masked_moments(loaded.moments, loaded.masks))
    return as_arrays(loaded), metrics | {"sparsity": sparsity_of(loaded.masks)} | told


def _corrected(call: StageCall, before: Loaded, after: Loaded, batches: Batches) -> tuple[Loaded, Metrics]:
    network, (params, state) = network_for(call.problem, after.keep), after.variables
    found = correct_bias(
        before.variables.params,
        after.masks,
        apply=at_rest(network, before.variables.state),
        batches=map(inputs_of, batches),
        pruned=params,
        pruned_apply=at_rest(network, state),
    )
    told = {"corrected_biases": list(found.biases), "without_bias": list(found.left)}
    return after._replace(variables=Variables(jax.device_get(found.params), state)), told
