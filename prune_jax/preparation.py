"""Recipe -> plan with every name, number and shape checked, before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prune_jax.checkpoints import Store
from prune_jax.errors import PruneError, UserMistake, did_you_mean
from prune_jax.plan import Plan, expand, make_plan
from prune_jax.problems import code_of, data_of
from prune_jax.recipe import Problem, Prune, Recipe, Recovery, RewindStep, Sparsify, StageCall, parents_of


def prepare(recipe: Recipe) -> Plan:
    """Checks a recipe against the registries and the data, and plans it.

    Raises:
        UserMistake: where in the recipe, what is wrong, what is allowed.
    """
    for row in expand(recipe)[1]:
        _check_names(row)
        planned = _plan(row)
        _check_rewinds(planned)
        _check_sparsify(planned)
    return _plan(recipe)


def _plan(recipe: Recipe) -> Plan:
    return make_plan(recipe, digest_of=lambda data: data_of(data).digest, code_of=code_of)


def check_networks(plan: Plan) -> None:
    """Refuses models that do not fit data and objective, and targets that the networks cannot meet.

    Shapes are looked at; nothing is computed.

    Raises:
        UserMistake: where in the recipe, what is wrong, what is allowed.
    """
    for row in expand(plan.recipe)[1]:
        problem = next(call.problem for call in plan.calls if _is_of(call.problem, row))
        _check_network(problem, row)


def _is_of(problem: Problem, recipe: Recipe) -> bool:
    return (problem.data, problem.model, problem.objective) == (recipe.data, recipe.model, recipe.objective)


def is_cached(plan: Plan, store: Store) -> bool:
    """Whether there is nothing to compute."""
    return all(store.intact(call.ref) for call in plan.calls)


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
        if stage.kind == "export":
            with _at(recipe.name, f"{where}.formats", list(stage.formats)):
                _check_formats(stage.formats)
        if stage.kind == "prune" and stage.search:
            with _at(recipe.name, f"{where}.search.folds", stage.search.folds):
                data_of(recipe.data, (0, stage.search.folds))
        for part, metric in _metrics(stage):
            with _at(recipe.name, f"{where}.{part}", metric):
                _known("metric", metric, ["loss", *goal.metrics])
                if not recipe.data.validation:
                    raise UserMistake("needs a validation split: set `data.validation`, such as 0.1")


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
        if not isinstance(recovery, Recovery) or not isinstance(recovery.rewind, RewindStep) or not call.origin:
            continue
        search = stage.search if isinstance(stage, Prune) else None
        steps = _training_steps(call.origin, (0, search.folds) if search else None)
        field = "finetune.rewind.step" if isinstance(stage, Prune) else "rewind.step"
        with _at(plan.recipe.name, f"stages.{call.name}.{field}", recovery.rewind.step):
            if recovery.rewind.step > steps:
                raise UserMistake(
                    f"the training{' on a fold' if search else ''} ends at step {steps}: rewind to one from 0 to "
                    f"{steps}, or train longer"
                )


def _check_sparsify(plan: Plan) -> None:
    """Refuses methods that the training is too short for, and criteria that a training step cannot have."""
    for call in plan.calls:
        method = getattr(plan.recipe.stages.get(call.name), "sparsify", None)
        if method is not None:
            with _at(plan.recipe.name, f"stages.{call.name}.sparsify.kind", method.kind):
                _sparsified(method, _training_steps(call, None))


def _sparsified(method: Sparsify, steps: int) -> Any:
    import jax
    import optax

    from prune_jax.sparsification import sparsified

    rate = optax.constant_schedule(1.0)
    return sparsified(optax.sgd(1.0), method, steps=steps, learning_rate=rate, key=jax.random.key(0))


def _training_steps(training: StageCall, fold: tuple[int, int] | None) -> int:
    from prune_jax.training import length

    split = data_of(training.problem.data, fold).train
    epochs, steps = training.settings.get("epochs"), training.settings.get("steps")
    return length(split, batch_size=training.problem.data.batch_size, epochs=epochs, steps=steps)[1]


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


def _check_network(problem: Problem, recipe: Recipe) -> None:
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
    _check_targets(network, sample, variables, recipe)


def _check_targets(network: Any, sample: Any, variables: Any, recipe: Recipe) -> None:
    """Refuses patterns that fit no parameter, and more survivors than there are weights."""
    import jax

    from prune_jax.allocation import allocate
    from prune_jax.criteria import find
    from prune_jax.granularity import check_granularity, check_leaves, unit_shape
    from prune_jax.group_stages import WIRED, kinds_of
    from prune_jax.layers import check_layers
    from prune_jax.networks import mean_loss
    from prune_jax.objectives import inputs_of
    from prune_jax.scoring import prunable_paths
    from prune_jax.statistics import OF_INPUTS, OF_LAYERS, check_inputs
    from prune_jax.structure import groups_of
    from prune_jax.trees import leaves_by_path

    inputs, params = inputs_of(sample), variables.params
    wiring = parents_of(recipe.stages)
    for name, stage in recipe.stages.items():
        if method := getattr(stage, "sparsify", None):
            with _at(recipe.name, f"stages.{name}.sparsify.exclude", list(method.exclude)):
                prunable_paths(params, exclude=method.exclude)
            with _at(recipe.name, f"stages.{name}.sparsify.kind", method.kind):
                wrapper = _sparsified(method, 20 * getattr(method, "every", 1))
                jax.eval_shape(wrapper.update, params, jax.eval_shape(wrapper.init, params), params)
        if stage.kind not in {"score", "mask", "prune"}:
            continue
        scored: Any = recipe.stages[wiring[name][0]] if stage.kind == "mask" else stage
        with _at(recipe.name, f"stages.{name}.exclude", list(scored.exclude)):
            paths = prunable_paths(params, exclude=scored.exclude)
        if scored.granularity in WIRED:
            field, value = ("kinds", list(scored.kinds)) if scored.kinds else ("granularity", scored.granularity)
            with _at(recipe.name, f"stages.{name}.{field}", value):
                groups_of(network, inputs).groups_of(kinds_of(scored.model_dump()))
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
