"""What a network is trained and judged by: losses and metrics, one number for each example of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from prune_jax.errors import UserMistake
from prune_jax.gauss_newton import Composed
from prune_jax.registry import Registry, load_object
from prune_jax.scoring import prunable_paths
from prune_jax.trees import PyTree, leaves_by_path

Batch = Mapping[str, Any]
PerExample = Callable[[jax.Array, Batch], jax.Array]


@dataclass(frozen=True, eq=False)
class Objective:
    """A loss, and the metrics that go with it.

    Attributes:
        name: as written in the recipe.
        loss: `loss(outputs, batch) -> [batch]`, float32; its mean over the examples is minimised.
        metrics: name -> function like `loss`; the mean over the examples is reported.
        primary: the metric (or `loss`) by which networks are compared.
        higher_is_better: whether more of `primary` is better.
    """

    name: str
    loss: PerExample
    metrics: Mapping[str, PerExample]
    primary: str
    higher_is_better: bool


def inputs_of(batch: Batch) -> tuple[Any, ...]:
    """What the model is given of a batch: `(x,)`, or `(x, lengths)` for sequences.

    >>> inputs_of({"x": 1, "y": 2}), inputs_of({"x": 1, "y": 2, "lengths": 3})
    ((1,), (1, 3))
    """
    return tuple(batch[name] for name in ("x", "lengths") if name in batch)


def cross_entropy(outputs: jax.Array, batch: Batch) -> jax.Array:
    """Softmax cross entropy with integer labels: `-log softmax(outputs)[y]`, in nats.

    A label that is no class gives NaN, not a neighbour's probability.

    Args:
        outputs: logits [batch, classes].
        batch: its `y` holds the labels [batch], integers in [0, classes).

    Returns:
        Losses [batch], float32.
    """
    labels = _labels(outputs, batch)
    log_probabilities = jax.nn.log_softmax(outputs.astype(jnp.float32))
    chosen = jnp.take_along_axis(log_probabilities, labels[:, None], axis=1, mode="fill", fill_value=jnp.nan)[:, 0]
    return jnp.where(labels < 0, jnp.nan, -chosen)  # negative indices would count from the end


def accuracy(outputs: jax.Array, batch: Batch) -> jax.Array:
    """1 where the largest logit is the label's, else 0; of equal logits the first counts.

    Args:
        outputs: logits [batch, classes].
        batch: its `y` holds the labels [batch].

    Returns:
        Zeros and ones [batch], float32.
    """
    return (jnp.argmax(outputs, axis=1) == _labels(outputs, batch)).astype(jnp.float32)


def squared_error(outputs: jax.Array, batch: Batch) -> jax.Array:
    """Squared error `mean_k (outputs_k - y_k)^2`.

    Args:
        outputs: [batch] or [batch, ...].
        batch: its `y` holds as many numbers for each example; `[batch]` and `[batch, 1]` are the same.

    Returns:
        Errors [batch], float32.
    """
    return _squared_error(outputs, batch["y"], "y")


def reconstruction_error(outputs: jax.Array, batch: Batch) -> jax.Array:
    """Squared error against the input: `mean_i (outputs_i - x_i)^2` over all numbers of an example.

    Args:
        outputs: [batch, ...].
        batch: its `x` holds as many numbers for each example, in the same order.

    Returns:
        Errors [batch], float32.
    """
    return _squared_error(outputs, batch["x"], "x")


def _squared_error(outputs: jax.Array, wanted: jax.Array, name: str) -> jax.Array:
    batch = wanted.shape[0]
    width = math.prod(wanted.shape[1:])
    if outputs.ndim == 0 or outputs.shape[0] != batch or math.prod(outputs.shape[1:]) != width:
        raise UserMistake(
            f"The model answers {list(outputs.shape)}, but {name} is {list(wanted.shape)}: it must answer {width} "
            f"number(s) for each of the {batch} example(s)."
        )
    difference = outputs.astype(jnp.float32) - wanted.reshape(outputs.shape).astype(jnp.float32)
    return jnp.mean(difference.reshape(batch, width) ** 2, axis=1)


def _labels(outputs: jax.Array, batch: Batch) -> jax.Array:
    labels = batch["y"]
    if labels.ndim != 1 or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise UserMistake(
            f"Classification needs integer labels y [batch], but they are {labels.dtype} {list(labels.shape)}. "
            "For one-hot labels store their argmax; for numbers write `objective: regression`."
        )
    if outputs.ndim != 2 or outputs.shape[0] != labels.shape[0]:
        raise UserMistake(
            f"The model answers {list(outputs.shape)}, but classification needs [batch, classes] "
            f"with batch = {labels.shape[0]}."
        )
    return labels


OBJECTIVES: Registry[Objective] = Registry("objective", "prune_jax.objectives")
OBJECTIVES.add(
    "classification",
    Objective("classification", cross_entropy, {"accuracy": accuracy}, primary="accuracy", higher_is_better=True),
)
OBJECTIVES.add(
    "regression", Objective("regression", squared_error, {"mse": squared_error}, primary="mse", higher_is_better=False)
)
OBJECTIVES.add(
    "reconstruction",
    Objective(
        "reconstruction", reconstruction_error, {"mse": reconstruction_error}, primary="mse", higher_is_better=False
    ),
)


def objective(name: str) -> Objective:
    """The objective called `name`; the same name gives the same object, until its module is loaded anew.

    Args:
        name: `classification`, `regression`, `reconstruction`, a plug-in's, or `module:loss` with
            `loss(outputs, batch) -> [batch]`.

    >>> objective("classification").primary
    'accuracy'
    """
    if ":" not in name:
        return OBJECTIVES[name]
    function = load_object(name)
    if not callable(function):
        raise UserMistake(f"objective {name!r} is {function!r}; it must be a function loss(outputs, batch) -> [batch].")
    return _of_users(name, function)


@cache
def _of_users(name: str, function: Callable[..., Any]) -> Objective:
    def loss(outputs: jax.Array, batch: Batch) -> jax.Array:
        losses = jnp.asarray(function(outputs, batch))
        wanted = batch["x"].shape[:1]
        if losses.shape != wanted or not jnp.issubdtype(losses.dtype, jnp.floating):
            raise UserMistake(
                f"objective {name!r} answers {losses.dtype} {list(losses.shape)}; it must answer one loss for each "
                f"example, float {list(wanted)}. Leave out the mean over the batch: it is taken later."
            )
        return losses.astype(jnp.float32)

    return Objective(name, loss, {}, primary="loss", higher_is_better=False)


def check(objective: Objective, outputs: jax.ShapeDtypeStruct, batch: Batch, *, classes: int | None) -> None:
    """Refuses a model whose outputs do not fit the objective; computes nothing.

    Args:
        objective: what it shall be trained by.
        outputs: shape and type of what the model answers to `batch`.
        batch: arrays or `ShapeDtypeStruct`s.
        classes: number of classes in the data, or None where it is not known.

    Raises:
        UserMistake: the shapes or types do not fit, or a user's loss fails on them.
    """
    try:
        for function in (objective.loss, *objective.metrics.values()):
            jax.eval_shape(function, outputs, dict(batch))
    except UserMistake:
        raise
    except Exception as error:  # a user's loss may raise anything
        raise UserMistake(
            f"objective {objective.name!r} fails on outputs {list(outputs.shape)}: {type(error).__name__}: {error}"
        ) from error
    if objective.name == "classification" and classes is not None and outputs.shape[1] != classes:
        raise UserMistake(
            f"The model answers {outputs.shape[1]} logits for each example, but the data have {classes} classes. "
            "Give its last layer one output for each class."
        )


def composed(
    loss: Callable[[PyTree, PyTree], jax.Array],
    apply: Callable[..., PyTree],
    *,
    inputs: Callable[[PyTree], tuple[Any, ...]] = inputs_of,
) -> Partial:
    """A network's mean loss `(params, batch) -> scalar` of two parts, which `obd` with `gauss_newton` asks for.

    Equal parts compile once. Arrays that a `jax.tree_util.Partial` holds as `apply` are arguments of what is compiled.

    Args:
        loss: `(outputs, batch) -> scalar or [batch]`, of which the mean is taken.
        apply: `(params, *inputs) -> outputs`.
        inputs: of a batch, a tuple; left out, its `x`, and `lengths` if any.

    >>> loss = composed(squared_error, lambda p, x: x @ p["w"])
    >>> float(loss({"w": jnp.ones((2, 1))}, {"x": jnp.ones((3, 2)), "y": jnp.zeros((3, 1))}))
    4.0
    """
    held = apply if isinstance(apply, Partial) else Partial(apply)
    return Partial(Composed(loss, held.func, inputs), *held.args, **held.keywords)


def penalty(params: PyTree, *, l1: float, l2: float, prunable: Collection[str] | None = None) -> jax.Array:
    """Weight penalty `l1 * sum |w| + l2 / 2 * sum w^2` over the prunable parameters.

    Biases and normalisation are left alone, as the pruner leaves them.

    Args:
        params: weights, leaves of any shape.
        l1: weight of the absolute values; draws weights towards exactly zero (Tibshirani 1996).
        l2: weight of the squares, halved so that its gradient is `l2 * w`.
        prunable: paths of the leaves that count; left out, what is prunable by default: floating arrays of at least
            two axes, or all floating arrays where none has two.

    Returns:
        A float32 scalar, to be added to the mean loss.

    >>> float(penalty({"w": jnp.array([[1.0, -2.0]]), "b": jnp.ones(2)}, l1=0.5, l2=0.2))
    2.0
    """
    chosen = prunable_paths(params) if prunable is None else prunable
    weights = [w.astype(jnp.float32) for path, w in leaves_by_path(params).items() if path in chosen]
    absolute = sum((jnp.sum(jnp.abs(w)) for w in weights), start=jnp.float32(0))
    squares = sum((jnp.sum(w**2) for w in weights), start=jnp.float32(0))
    return l1 * absolute + l2 / 2 * squares
