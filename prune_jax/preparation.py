"""Recipe -> plan with every name, number and shape checked, before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from prune_jax.checkpoints import Store
from prune_jax.errors import PruneError, UserMistake, did_you_mean
from prune_jax.plan import Plan, expand, join, plan_row
from prune_jax.problems import code_of, data_of
from prune_jax.recipe import (
    CustomMethod,
    CustomModel,
    Limits,
    Problem,
    Prune,
    Recipe,
    Recovery,
    Rewind,
    Sparsify,
    StageCall,
    parents_of,
)
from prune_jax.registry import check_plugin
from prune_jax.rounds import is_sound

if TYPE_CHECKING:
    from prune_jax.datasets import Dataset
    from prune_jax.objectives import Objective


def prepare(recipe: Recipe) -> Plan:
    """Checks a recipe against the registries and the data, and plans it.

    Raises:
        UserMistake: where in the recipe, what is wrong, what is allowed.
    """
    axes, rows = expand(recipe)
    plans = []
    for row in rows:
        _check_names(row)
        plan = plan_row(row, data_of(row.data).digest, code_of(row))
        _check_rewinds(plan)
        _check_sparsify(plan)
        plans.append(plan)
    return join(recipe, axes, plans)


def check_networks(plan: Plan) -> None:
    """Refuses models that do not fit data and objective, and targets that the networks cannot meet.

    Shapes are looked at; nothing is computed.

    Raises:
        UserMistake: where in the recipe, what is wrong, what is allowed.
    """
    problems = {_told(call.problem): call.problem for call in plan.calls}
    networks: dict[str, _Shapes] = {}
    checked = set()
    for row in expand(plan.recipe)[1]:
        what = row.model_dump_json(exclude={"seed"}, exclude_unset=True)  # shapes know nothing of it
        if what not in checked:
            checked.add(what)
            about = _told(row)
            if about not in networks:
                networks[about] = _check_network(problems[about], row)
            _check_targets(*networks[about], row)


def _told(of: Problem | Recipe) -> str:
    """The data, the model and the objective in one text."""
    return "\n".join((of.data.model_dump_json(), of.model.model_dump_json(), of.objective))


class _Shapes(NamedTuple):
    """A network with the shapes of one example and of its variables."""

    network: Any
    sample: dict[str, Any]
    variables: Any


def is_cached(plan: Plan, store: Store) -> bool:
    """Whether there is nothing to compute."""
    return all(is_sound(call, store) for call in plan.calls)


@contextmanager
def _at(recipe: str, path: str, value: Any) -> Iterator[None]:
    try:
        yield
    except UserMistake as mistake:
        raise UserMistake(f"{recipe}: {path} = {value!r}: {mistake}") from None
    except PruneError:
        raise
    except Exception as fault:  # whatever the user's own code raises, and its place in the recipe
        raise PruneError(f"{recipe}: {path} = {value!r}: {type(fault).__name__}: {fault}") from fault


def _check_names(recipe: Recipe) -> None:
    if isinstance(recipe.model, CustomModel):
        with _at(recipe.name, "model.kind", recipe.model.kind):
            check_plugin(recipe.model.kind)
    from prune_jax.criteria import find
    from prune_jax.datasets import check_labels
    from prune_jax.granularity import check_granularity
    from prune_jax.objectives import objective

    with _at(recipe.name, "objective", recipe.objective):
        goal = objective(recipe.objective)
    with _at(recipe.name, "data.source", recipe.data.source):
        data = data_of(recipe.data)
        if recipe.objective == "classification":
            check_labels(data, recipe.data.source)
    for name, stage in recipe.stages.items():
        where = f"stages.{name}"
        if stage.kind in {"score", "prune"}:
            with _at(recipe.name, f"{where}.criterion.name", stage.criterion.name):
                criterion = find(stage.criterion.name)
                if "correct" in criterion.needs and "accuracy" not in goal.metrics:
                    raise UserMistake("needs answers that are right or wrong: objective `classification`")
                if "label_histogram" in criterion.needs and data.classes is None:
                    raise UserMistake("needs labels, but `y` holds numbers; choose entropy, which does without")
            with _at(recipe.name, f"{where}.criterion.options", stage.criterion.options):
                criterion.check_options(stage.criterion.options)
            with _at(recipe.name, f"{where}.criterion.combine", stage.criterion.combine):
                criterion.combine_with(stage.criterion.options, stage.criterion.combine)
            if stage.criterion.perturbation and criterion.data_free:
                with _at(recipe.name, f"{where}.criterion.perturbation", stage.criterion.perturbation.kind):
                    raise UserMistake(
                        f"{criterion.name} looks at no data; leave it out, or choose snip, taylor, fisher"
                    )
            with _at(recipe.name, f"{where}.granularity", stage.granularity):
                check_granularity(stage.granularity, criterion.granularities)
        if custom := getattr(stage, "sparsify", None):
            _check_method(recipe.name, f"{where}.sparsify", custom)
        if stage.kind == "export":
            with _at(recipe.name, f"{where}.formats", list(stage.formats)):
                _check_formats(stage.formats)
        if stage.kind == "gate":
            with _at(recipe.name, f"{where}.metric", stage.metric):
                check_limits(stage, goal, data)
        if stage.kind == "prune" and stage.search:
            with _at(recipe.name, f"{where}.search.folds", stage.search.folds):
                data_of(recipe.data, (0, stage.search.folds))
        for part, metric in _metrics(stage):
            with _at(recipe.name, f"{where}.{part}", metric):
                _known("metric", metric, ["loss", *goal.metrics])
                if not recipe.data.validation:
                    raise UserMistake("needs a validation split: set `data.validation`, such as 0.1")


def _check_method(recipe: str, where: str, sparsify: Sparsify) -> None:
    """Refuses methods that nobody registered, and options that their functions do not take."""
    from prune_jax.sparse_training import find
    from prune_jax.sparsification import options_of

    with _at(recipe, f"{where}.kind", sparsify.kind):
        method = find(sparsify.kind)
    if isinstance(sparsify, CustomMethod):
        options = options_of(sparsify)
        with _at(recipe, where, options):
            method.check_options(options)


def _check_formats(formats: tuple[str, ...]) -> None:
    from prune_jax.export import missing

    for name in formats:
        if packages := missing(name):
            raise UserMistake(
                f"{name} needs what is not installed: {', '.join(packages)}. Run `pip install 'prune-jax[{name}]'`, "
                "or leave the format out"
            )


def _check_rewinds(plan: Plan) -> None:
    """Refuses to rewind to a step that the training does not reach; that of a fold has fewer steps."""
    for call in plan.calls:
        stage = plan.recipe.stages.get(call.name)
        recovery = stage.finetune if isinstance(stage, Prune) else stage
        if not isinstance(recovery, Recovery) or not isinstance(recovery.rewind, Rewind) or not call.origin:
            continue
        search = stage.search if isinstance(stage, Prune) else None
        steps = _training_steps(call.origin, (0, search.folds) if search else None)
        begin = recovery.repeated_from
        word, step, last = ("step", recovery.rewind.step or 0, steps)
        if begin is not None:  # a step at least is left to be repeated
            word, step, last = "learning_rate.step", begin, steps - 1
        field = f"{'finetune.' if isinstance(stage, Prune) else ''}rewind.{word}"
        with _at(plan.recipe.name, f"stages.{call.name}.{field}", step):
            if step > last:
                raise UserMistake(
                    f"the training{' on a fold' if search else ''} ends at step {steps}: rewind to one from 0 to "
                    f"{last}, or train longer"
                )


def _check_sparsify(plan: Plan) -> None:
    """Refuses methods that the training, or that on a fold, is too short for; and criteria that no step can have."""
    for call in plan.calls:
        stage, training, fold = plan.recipe.stages.get(call.name), call, None
        if isinstance(stage, Prune) and stage.search and call.origin:
            training, fold = call.origin, (0, stage.search.folds)
        method = getattr(plan.recipe.stages.get(training.name), "sparsify", None)
        if method is not None:
            with _at(plan.recipe.name, f"stages.{training.name}.sparsify.kind", method.kind):
                _sparsified(method, _training_steps(training, fold))


def _sparsified(method: Sparsify, steps: int) -> Any:
    import jax
    import optax

    from prune_jax.sparsification import sparsified

    rate = optax.constant_schedule(1.0)
    return sparsified(optax.sgd(1.0), method, steps=steps, examples=1, learning_rate=rate, key=jax.random.key(0))


def _training_steps(training: StageCall, fold: tuple[int, int] | None) -> int:
    from prune_jax.training import length

    split = data_of(training.problem.data, fold).train
    epochs, steps = training.settings.get("epochs"), training.settings.get("steps")
    total = length(split, batch_size=training.problem.data.batch_size, epochs=epochs, steps=steps)[1]
    return total - training.settings.get("begin_step", 0)


def check_limits(limits: Limits, goal: Objective, data: Dataset) -> None:
    """Refuses a metric that the objective does not have, and noise on inputs that take none."""
    import numpy as np

    from prune_jax.problems import sample_of

    _known("metric", limits.metric or goal.primary, ["loss", *goal.metrics])
    if limits.robustness and not np.issubdtype(sample_of(data)["x"].dtype, np.floating):
        raise UserMistake("robustness puts noise on floats, but x holds integers; leave `robustness` out")


def _metrics(stage: Any) -> Iterator[tuple[str, str]]:
    if stage.kind == "prune" and stage.guard:
        yield "guard.metric", stage.guard.metric
    if stage.kind == "prune" and stage.search and stage.search.metric:
        yield "search.metric", stage.search.metric


def _known(what: str, name: str, known: Any) -> None:
    if name not in known:
        raise UserMistake(
            f"{what} {name!r} is not known{did_you_mean(name, known)} (allowed: {', '.join(known) or 'none'})"
        )


def _check_network(problem: Problem, recipe: Recipe) -> _Shapes:
    import jax

    from prune_jax.objectives import check, inputs_of, objective
    from prune_jax.problems import network_of, sample_of

    data = data_of(problem.data)
    sample = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in sample_of(data).items()}
    with _at(recipe.name, "model.kind", problem.model.kind):
        network = network_of(problem)
        variables = jax.eval_shape(network.init, jax.random.key(0))
        outputs, _ = jax.eval_shape(
            lambda v, inputs: network.apply(v.params, v.state, inputs, train=False, key=None),
            variables,
            inputs_of(sample),
        )
        check(objective(problem.objective), outputs, sample, classes=data.classes)
    return _Shapes(network, sample, variables)


def _features(stage: Any) -> dict[str, float]:
    """The features that a stage matches with its teacher's."""
    recovery = stage.finetune if stage.kind == "prune" else stage
    return getattr(getattr(recovery, "distill", None) or recovery, "features", {})


def _check_targets(network: Any, sample: Any, variables: Any, recipe: Recipe) -> None:
    """Refuses patterns that fit no parameter or no kernel, and more survivors than there are weights."""
    import jax

    from prune_jax.allocation import allocate
    from prune_jax.criteria import find
    from prune_jax.distillation import check_features
    from prune_jax.granularity import check_granularity, check_leaves, unit_shape
    from prune_jax.group_scoring import free_groups
    from prune_jax.group_stages import WIRED, kinds_of
    from prune_jax.layers import check_layers
    from prune_jax.networks import at_rest, dense_in, mean_loss
    from prune_jax.objectives import inputs_of
    from prune_jax.scoring import prunable_paths
    from prune_jax.statistics import OF_INPUTS, OF_LAYERS, check_inputs
    from prune_jax.structure import groups_of
    from prune_jax.trees import leaves_by_path
    from prune_jax.weights import read_weights

    inputs, params = inputs_of(sample), variables.params
    wiring = parents_of(recipe.stages)

    def dense(where: str, said: Any, more: tuple[str, ...] = ()) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Patterns of what stays dense, and the paths of what is left."""
        with _at(recipe.name, f"{where}.exclude", list(said.exclude)):
            prunable_paths(params, exclude=said.exclude)
        spare = tuple(dict.fromkeys((*said.spare, *more)))
        with _at(recipe.name, f"{where}.spare", list(spare)):
            kept = dense_in(network, variables, inputs, {"exclude": said.exclude, "spare": spare})
            return kept, prunable_paths(params, exclude=kept)

    for name, stage in recipe.stages.items():
        if weights := getattr(stage, "weights", None):
            with _at(recipe.name, f"stages.{name}.weights", weights):
                read_weights(weights, variables._asdict())
        if patterns := _features(stage):
            where = "finetune.distill.features" if stage.kind == "prune" else "features"
            with _at(recipe.name, f"stages.{name}.{where}", patterns):
                check_features(at_rest(network, variables.state), params, inputs, patterns)
        if method := getattr(stage, "sparsify", None):
            kept, _ = dense(f"stages.{name}.sparsify", method)
            with _at(recipe.name, f"stages.{name}.sparsify.kind", method.kind):
                bare = method.model_copy(update={"exclude": kept, "spare": ()})
                wrapper = _sparsified(bare, 20 * getattr(method, "every", 1))
                state = jax.eval_shape(wrapper.init, params)
                if not {"masks", "inner"} <= set(dir(state)):
                    raise UserMistake(
                        "its state has no `masks` and `inner`, such as prune_jax.sparse_training.SparseState"
                    )
                if any(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(state)):
                    raise UserMistake(
                        "its state holds a PRNG key, which no checkpoint can hold; keep `jax.random.key_data(key)`"
                    )
                jax.eval_shape(wrapper.update, params, state, params)
        if stage.kind not in {"score", "mask", "prune"}:
            continue
        scored: Any = recipe.stages[wiring[name][0]] if stage.kind == "mask" else stage
        kept, paths = dense(f"stages.{name}", scored, stage.spare)
        if scored.granularity in WIRED:
            field, value = ("kinds", list(scored.kinds)) if scored.kinds else ("granularity", scored.granularity)
            kinds = kinds_of(scored.model_dump())
            with _at(recipe.name, f"stages.{name}.{field}", value):
                net = groups_of(network, inputs)
                net.groups_of(kinds)
            with _at(recipe.name, f"stages.{name}.{'spare' if stage.spare or scored.spare else 'exclude'}", list(kept)):
                free_groups(net, params, kinds, kept, "params/")
            continue
        weights = {path: leaf for path, leaf in leaves_by_path(params).items() if path in paths}
        shapes = {path: leaf.shape for path, leaf in weights.items()}
        with _at(recipe.name, f"stages.{name}.granularity", scored.granularity):
            unit = check_granularity(scored.granularity)
            check_leaves(shapes, unit)
        if looked := find(scored.criterion.name).needs & OF_INPUTS:
            with _at(recipe.name, f"stages.{name}.criterion.name", scored.criterion.name):
                loss = mean_loss(network, recipe.objective, variables.state)
                if looked & OF_LAYERS:
                    check_layers(loss, params, sample, paths)
                else:
                    check_inputs(loss, params, sample, prunable=paths)
        if unit.fixed or stage.kind == "score" or (stage.target and stage.target.word not in {"sparsity", "keep"}):
            continue
        target = stage.target.model_dump(exclude_none=True) if stage.target else {}
        with _at(recipe.name, f"stages.{name}.{'target' if target else 'scope'}", target or stage.scope):
            units = {p: jax.ShapeDtypeStruct(unit_shape(w.shape, unit), w.dtype) for p, w in weights.items()}
            allocate(units, scope=stage.scope, shapes=shapes, min_keep=stage.min_keep, **target)
