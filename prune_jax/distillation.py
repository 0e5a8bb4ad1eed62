"""Distillation: a network learns from the answers of another one, its teacher, and from what its layers see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from prune_jax.activations import Reading, capture
from prune_jax.errors import UserMistake, did_you_mean
from prune_jax.objectives import inputs_of
from prune_jax.trees import PyTree, matches, names_in

Seen = Mapping[str, list[Reading]]  # path of a kernel -> its readings
Columns = Mapping[str, Sequence[Any]]  # path of a kernel -> by axis, which of the teacher's units the student has


@dataclass(frozen=True)
class Lesson:
    """What is learned from a teacher, and how much of it.

    Attributes:
        temperature: T of the softmaxes; None: the outputs themselves are matched.
        soft: weight of the match; the hard loss has the rest.
        features: (pattern of kernels, weight): what they are multiplied with is matched too; the first that fits.
    """

    temperature: float | None = 4.0
    soft: float = 0.9
    features: tuple[tuple[str, float], ...] = ()

    def loss(
        self,
        hard: jax.Array,
        outputs: jax.Array,
        answers: jax.Array,
        seen: Callable[[], tuple[Seen, Seen]],
        columns: Columns | None = None,
    ) -> jax.Array:
        """`(1 - soft) hard + soft mean(soft_loss) + sum_l w_l feature_loss_l`.

        Args:
            hard: the loss against the labels, a scalar.
            outputs: the student's `[batch, ...]`.
            answers: the teacher's, of the same shape.
            seen: answers what the kernels of student and teacher see; called where there are features.
            columns: of a compact student, see `feature_losses`.
        """
        loss = hard
        if self.soft:  # without it, to the bit the plain loss
            soft = jnp.mean(soft_loss(outputs, answers, temperature=self.temperature))
            loss = (1 - self.soft) * hard + self.soft * soft
        if self.features:
            found = feature_losses(*seen(), dict(self.features), columns or {})
            loss = loss + sum((found[path] for path in found), start=jnp.float32(0))
        return loss


def soft_loss(outputs: jax.Array, answers: jax.Array, *, temperature: float | None) -> jax.Array:
    """How far a student's outputs z are from the teacher's v (Hinton et al. 2015, arXiv:1503.02531).

    With a temperature T, `T^2 KL(softmax(v / T) || softmax(z / T))`, whose gradient T (softmax(z / T) - softmax(v / T))
    keeps its size as T grows; for large T it is half the mean squared difference of logits about their means. Without,
    the mean squared difference. The paper has the cross entropy in place of KL, which differs by what z cannot change.

    Args:
        outputs: logits or numbers `[batch, ...]`, classes on the last axis.
        answers: the teacher's, of the same shape; no gradient goes into them.
        temperature: T > 0; None for outputs that are no logits.

    Returns:
        Losses `[batch]`, float32, in nats or in squared units of the outputs; means over axes between.
    """
    if outputs.shape != answers.shape:
        raise UserMistake(f"the student answers {list(outputs.shape)}, its teacher {list(answers.shape)}")
    z, v = outputs.astype(jnp.float32), jax.lax.stop_gradient(answers).astype(jnp.float32)
    if temperature is None:
        return jnp.mean(((z - v) ** 2).reshape(z.shape[0], -1), axis=1)
    log_p, log_q = jax.nn.log_softmax(v / temperature), jax.nn.log_softmax(z / temperature)
    divergence = temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return jnp.mean(divergence.reshape(z.shape[0], -1), axis=1)


def kernels_seen(apply: Callable[..., Any], params: PyTree, *inputs: Any) -> Seen:
    """What each kernel of a function is multiplied with, in the order of evaluation; lookups see no numbers."""
    found: dict[str, list[Reading]] = {}
    for reading in capture(apply, params, *inputs).readings:
        if jnp.issubdtype(reading.values.dtype, jnp.floating):
            found.setdefault(reading.path, []).append(reading)
    return found


def feature_losses(
    student: Seen,
    teacher: Seen,
    features: Mapping[str, float],
    columns: Columns,
) -> dict[str, jax.Array]:
    """Mean squared differences of what kernels see in student and teacher, times their weights.

    FitNets (Romero et al. 2015, arXiv:1412.6550) put a trained regressor between layers of two widths. Here a student
    that was cut out of its teacher's network is compared with the teacher's units that it still has.

    Args:
        student: path of a kernel -> its readings.
        teacher: the same; no gradient goes into it.
        features: {pattern of kernels: weight}; the first that fits.
        columns: path -> by axis of the kernel, which of the teacher's indices the student has; left out, all.

    Returns:
        By path, scalars, float32.

    Raises:
        UserMistake: a pattern fits no kernel, or the two see arrays of different shapes.
    """
    named = fitting(features, teacher)
    if missing := [path for path in named if path not in student]:
        raise UserMistake(f"the teacher has a layer {missing[0]!r}, but the student has it no more; leave it out")
    found = {}
    for path, weight in named.items():
        pairs = zip(student[path], teacher[path], strict=True)
        found[path] = weight * sum((_difference(path, s, t, columns.get(path)) for s, t in pairs), start=jnp.float32(0))
    return found


def fitting(features: Mapping[str, float], kernels: Sequence[str] | Mapping[str, Any]) -> dict[str, float]:
    """The weights of the kernels that patterns fit, by path.

    Raises:
        UserMistake: a pattern fits none.
    """
    for pattern in features:
        if not any(matches(path, pattern) for path in kernels):
            near = did_you_mean(pattern, names_in(kernels))
            raise UserMistake(
                f"{pattern!r} fits no kernel whose inputs can be seen{near} (those are: {', '.join(kernels) or 'none'})"
            )
    first = {path: next((p for p in features if matches(path, p)), None) for path in kernels}
    return {path: features[pattern] for path, pattern in first.items() if pattern is not None}


def check_features(apply: Callable[..., Any], params: PyTree, inputs: Sequence[Any], features: PyTree) -> None:
    """Refuses patterns that fit no kernel of a function; shapes will do, and nothing is computed."""

    def found(params: PyTree, *inputs: Any) -> dict[str, jax.Array]:
        seen = kernels_seen(apply, params, *inputs)
        return feature_losses(seen, seen, features, {})

    jax.eval_shape(found, params, *inputs)


def _difference(path: str, student: Reading, teacher: Reading, columns: Sequence[Any] | None) -> jax.Array:
    axes = [d for d in range(len(teacher.shape)) if teacher.reads(d)]
    mine, its = student.along(*axes), jax.lax.stop_gradient(teacher.along(*axes))
    if columns is not None:
        for i, d in enumerate(axes):
            its = jnp.take(its, jnp.asarray(columns[d]), axis=i + 1, mode="clip")
    if mine.shape != its.shape:
        raise UserMistake(
            f"{path!r} sees {list(mine.shape)} in the student but {list(its.shape)} in the teacher, of which it is not "
            "known which are the same; leave it out of the features"
        )
    return jnp.mean((mine.astype(jnp.float32) - its.astype(jnp.float32)) ** 2)


def distilled(
    loss: Callable[[Any, Any], jax.Array],
    apply: Callable[..., jax.Array],
    teacher: Callable[..., jax.Array],
    teacher_params: PyTree,
    *,
    temperature: float | None = 4.0,
    soft: float = 0.9,
    features: Mapping[str, float] | None = None,
    columns: Columns | None = None,
) -> Callable[[PyTree, Any], jax.Array]:
    """A loss that heeds labels and a teacher: `(1 - soft) mean(loss) + soft mean(soft_loss) + sum(feature_losses)`.

    The answer is a pytree that holds the teacher's weights: handed to a jitted function as an argument, they are its
    inputs and no constants, and another teacher compiles nothing. With features the student is differentiated once
    more, up to them.

    Args:
        loss: `(outputs, batch) -> scalar or [batch]`, against the labels.
        apply: `(params, *inputs) -> outputs` of the student; the inputs are the batch's `x`, and `lengths` if any.
        teacher: the same of the teacher, such as the dense network's.
        teacher_params: the teacher's weights.
        temperature: T of `soft_loss`; None for outputs that are no logits.
        soft: weight of the teacher's answers, in [0, 1].
        features: {pattern of kernels: weight}, see `feature_losses`.
        columns: of a compact student, `pj.trace(...).compact(dead).keep`: the teacher's units that it has.

    Returns:
        `(params, batch) -> scalar`, float32.

    Raises:
        UserMistake: a number is out of its range, or, when it is called, student and teacher do not fit.

    >>> student, teacher = {"w": jnp.zeros((1, 2))}, {"w": jnp.array([[4.0, 0.0]])}
    >>> apply, batch = lambda p, x: x @ p["w"], {"x": jnp.ones((1, 1))}
    >>> far = distilled(lambda outputs, batch: jnp.float32(0), apply, apply, teacher, soft=1.0)
    >>> f"{far(student, batch):.4f}"  # 16 KL((0.731, 0.269) || (0.5, 0.5))
    '1.7751'
    """
    if not 0 <= soft <= 1:
        raise UserMistake(f"soft = {soft}: must be from 0, which heeds no teacher, to 1, which heeds no label")
    if temperature is not None and not temperature > 0:
        raise UserMistake(f"temperature = {temperature}: must be above 0")
    lesson = Lesson(temperature, soft, tuple((features or {}).items()))
    return jax.tree_util.Partial(_heeding(loss, apply, teacher, lesson), teacher_params, columns)


@lru_cache(maxsize=64)
def _heeding(
    loss: Callable[[Any, Any], jax.Array], apply: Callable[..., Any], teacher: Callable[..., Any], lesson: Lesson
) -> Callable[..., jax.Array]:
    """The same function for the same parts, so that what is jitted compiles once."""

    def total(teacher_params: PyTree, columns: Columns | None, params: PyTree, batch: Any) -> jax.Array:
        inputs = inputs_of(batch)

        def seen() -> tuple[Seen, Seen]:
            return kernels_seen(apply, params, *inputs), kernels_seen(teacher, teacher_params, *inputs)

        outputs = apply(params, *inputs)
        return lesson.loss(jnp.mean(loss(outputs, batch)), outputs, teacher(teacher_params, *inputs), seen, columns)

    return total
