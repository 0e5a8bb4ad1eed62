"""One jitted step and one loop, for training, fine-tuning and distillation alike.

The data, the order of an epoch and the state stay on the device; a step is one call. Steps are not fused into a
`lax.scan`: XLA runs convolutions in a scan on CPU without its threads, eight times slower.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from prune_jax.checkpoints import Steps
from prune_jax.datasets import GrainSplit, Split
from prune_jax.distillation import Columns, Lesson, Seen, kernels_seen
from prune_jax.errors import DivergedError, PruneError, UserMistake
from prune_jax.hosts import Group, LeftError
from prune_jax.masks import apply_masks
from prune_jax.meshes import along_data, along_model, everywhere, make_mesh, spread
from prune_jax.models import Network, Variables
from prune_jax.moments import moments_of, with_moments
from prune_jax.objectives import inputs_of, objective, penalty
from prune_jax.recipe import Devices, Optimizer, Sparsify
from prune_jax.reestimation import reestimate
from prune_jax.sparse_training import MaskedState, masked, settle
from prune_jax.sparsification import sparsified
from prune_jax.trees import PyTree, leaves_by_path

BEAT_SECONDS = 0.25
REESTIMATED = 100  # batches, at most, of which batch statistics are taken anew
# Programs that span devices and are started side by side, by runs in threads, may wait for each other for ever.
SPANNING = threading.Lock()
CHECKPOINT_SHARE = 20  # a checkpoint may cost one part in so many of the time


class TrainState(NamedTuple):
    """What a step changes, and what a step checkpoint holds."""

    params: PyTree
    state: PyTree
    optimizer: optax.OptState
    step: jax.Array  # [] int32
    losses: jax.Array  # [steps] float32, filled as the steps come


class Fitted(NamedTuple):
    """What training answers."""

    variables: Variables
    losses: np.ndarray  # [steps]
    resumed_from: int
    moments: PyTree  # of the optimizer after the last step
    masks: PyTree | None  # those it was given, or that `sparsify` made


class Teacher(NamedTuple):
    """A network to learn from, at rest."""

    network: Network
    variables: Variables
    lesson: Lesson
    columns: Columns | None = None  # which of its units the student has, where it lacks some


def learning_rate(optimizer: Optimizer, steps: int, begin: int = 0) -> optax.Schedule:
    """The learning rate at each step: linear warm-up, then constant or a cosine to `decay_to` of it.

    Args:
        optimizer: names the rates.
        steps: of the whole training.
        begin: the step that counts as the first, where the training's end is repeated.
    """
    peak, warmup = optimizer.learning_rate, optimizer.warmup_steps
    if optimizer.decay_to is None:
        after: optax.Schedule = optax.constant_schedule(peak)
    else:
        after = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), alpha=optimizer.decay_to)
    if warmup:
        after = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])
    return (lambda step: after(step + begin)) if begin else after


def make_optimizer(optimizer: Optimizer, steps: int, begin: int = 0) -> optax.GradientTransformation:
    """The optimizer of Optax that a recipe names; `steps` and `begin` as for `learning_rate`."""
    plain = optimizer.decay_to is None and not optimizer.warmup_steps
    rate = optimizer.learning_rate if plain else learning_rate(optimizer, steps, begin)
    inner = getattr(optax, optimizer.name)(rate, **optimizer.hyperparameters())
    return optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), inner) if optimizer.clip_norm else inner


def length(split: Split, *, batch_size: int, epochs: float | None, steps: int | None) -> tuple[int, int]:
    """Steps in an epoch and in all; the last, smaller batch of an epoch is left for the next epoch's order."""
    examples = len(split) if isinstance(split, GrainSplit) else len(split["x"])
    per_epoch = max(examples // batch_size, 1)
    return per_epoch, steps if steps is not None else max(round((epochs or 0) * per_epoch), 1)


@lru_cache(maxsize=64)
def make_step(
    network: Network,
    objective_name: str,
    optimizer: Optimizer,
    *,
    steps: int,
    begin: int,
    per_epoch: int,
    batch_size: int,
    l1: float,
    l2: float,
    sparse: bool,
    gathered: bool,
    devices: int,
    parts: int,
    sparsify: Sparsify | None,
    examples: int | None,
    teacher: Network | None,
    lesson: Lesson | None,
) -> Callable[..., TrainState]:
    """Compiles one step; every later stage with the same arguments shares it.

    Args:
        network: pure functions of the model.
        objective_name: what the loss is.
        optimizer: how the weights move.
        steps: length of the whole training, which a decaying learning rate depends on.
        begin: the step of it with whose learning rate this one begins.
        per_epoch: steps in an epoch.
        batch_size: examples in a batch.
        l1: weight of the sum of absolute weights in the loss.
        l2: weight of half the sum of squared weights in the loss.
        sparse: whether the optimizer's state holds masks.
        gathered: whether batches are cut from arrays on the device, by the epoch's order, or handed in.
        devices: over how many devices a batch is spread.
        parts: over how many devices each share of it is spread by cutting the weights.
        sparsify: the method that makes masks while it trains.
        examples: in the training split; None without such a method, lest splits of other sizes compile anew.
        teacher: what answers beside the labels.
        lesson: what is learned from it.

    Returns:
        `(state, data, order, key, taught) -> state`, with the teacher's variables and columns in `taught`, None without
        a teacher; the state is donated.
    """
    goal = objective(objective_name)
    transformation = make_optimizer(optimizer, steps, begin)
    if sparsify is not None and examples is not None:
        transformation = _sparsified(optimizer, steps, begin, examples, sparsify, 0)  # the state has the key
    if sparse:
        transformation = masked(transformation, None)
    mesh = _mesh(devices, parts)

    def step(state: TrainState, data: PyTree, order: jax.Array, key: jax.Array, taught: PyTree = None) -> TrainState:
        batch = data
        if gathered:
            start = (state.step % per_epoch) * batch_size
            chosen = jax.lax.dynamic_slice(order, (start,), (batch_size,))  # [batch]
            batch = {name: jnp.take(array, chosen, axis=0, mode="clip") for name, array in data.items()}
        if mesh is not None:
            batch = jax.lax.with_sharding_constraint(batch, along_data(mesh))

        inputs, key = inputs_of(batch), jax.random.fold_in(key, state.step)

        def loss_of(params: PyTree) -> tuple[jax.Array, PyTree]:
            outputs, new = network.apply(params, state.state, inputs, train=True, key=key)
            loss = jnp.mean(goal.loss(outputs, batch))
            if teacher is not None and lesson is not None:
                learns = partial(_answers, network, state.state, train=True, key=key)
                loss = _heed(lesson, loss, outputs, learns, params, teacher, taught, inputs)
            if l1 or l2:
                loss = loss + penalty(params, l1=l1, l2=l2)
            return loss, new

        (loss, new), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, inner = transformation.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        losses = state.losses.at[state.step].set(loss)
        after = TrainState(params, new, inner, state.step + 1, losses)
        return after if mesh is None else jax.lax.with_sharding_constraint(after, _layout(mesh, after))

    return jax.jit(step, donate_argnums=0)


def _heed(
    lesson: Lesson,
    hard: jax.Array,
    outputs: jax.Array,
    student: Callable[..., jax.Array],
    params: PyTree,
    teacher: Network,
    taught: tuple[Variables, Columns | None],
    inputs: Any,
) -> jax.Array:
    """The loss with what a teacher adds to it: the student as it trains, the teacher at rest."""
    (its, state), columns = taught
    knows = partial(_answers, teacher, state, train=False, key=None)

    def seen() -> tuple[Seen, Seen]:
        return kernels_seen(student, params, *inputs), kernels_seen(knows, its, *inputs)

    return lesson.loss(hard, outputs, knows(its, *inputs), seen, columns)


def _answers(network: Network, state: PyTree, params: PyTree, *inputs: Any, **mode: Any) -> jax.Array:
    return network.apply(params, state, inputs, **mode)[0]


def _mesh(devices: int, parts: int) -> Mesh | None:
    return None if devices * parts == 1 else make_mesh(devices, parts)


def _layout(mesh: Mesh, state: TrainState) -> TrainState:
    """How a training's state lies on a mesh: weights, and what the optimizer has of them, cut; the rest whole."""
    whole = jax.tree.map(lambda _: everywhere(mesh), state)
    params, optimizer = along_model(mesh, (state.params, state.optimizer))
    return whole._replace(params=params, optimizer=optimizer)


def devices_for(batch_size: int) -> int:
    """Over how many devices a batch is spread: all of this host, if they divide it."""
    return jax.local_device_count() if batch_size % jax.local_device_count() == 0 else 1


def fit(
    network: Network,
    variables: Variables,
    split: Split,
    *,
    objective_name: str,
    optimizer: Optimizer,
    batch_size: int,
    seed: int,
    epochs: float | None = None,
    steps: int | None = None,
    stop_step: int | None = None,
    begin_step: int = 0,
    masks: PyTree | None = None,
    moments: PyTree | None = None,
    sparsify: Sparsify | None = None,
    teacher: Teacher | None = None,
    devices: Devices | None = None,
    hosts: Group | None = None,
    l1: float = 0.0,
    l2: float = 0.0,
    checkpoints: Steps | None = None,
    checkpoint_seconds: float = 20.0,
    beat: Callable[[int, int, float, float], None] = lambda done, total, loss, rate: None,
) -> Fitted:
    """Trains.

    Args:
        network: pure functions of the model.
        variables: where to start; weights that `masks` prunes are set to zero first.
        split: the training examples.
        objective_name: what the loss is.
        optimizer: how the weights move.
        batch_size: examples in a batch; at most the split's.
        seed: decides order and dropout.
        epochs: passes over the split, or
        steps: steps in all.
        stop_step: stop there, as if the training were cut off; the learning rate is that of the whole training.
        begin_step: with the learning rate of this step, in that many fewer steps: the end of a training repeated.
        masks: `True` = alive; pruned weights and their moments stay exactly zero.
        moments: of an earlier training by the same optimizer, zero where a weight is pruned; left out, fresh ones.
        sparsify: makes masks while it trains; there are none before. Where it trains under noise, batch statistics are
            taken anew in the end, of the weights without it over an epoch's batches, 100 at most.
        teacher: a network to learn from beside the labels.
        devices: how batches and weights are spread; left out, batches over all devices if they divide them.
        hosts: who trains together, if `devices` are of several hosts; each calls this with the same arguments. Host 0
            alone looks at the loss, saves, and calls `beat`; the others read step checkpoints.
        l1: weight of sum |w|.
        l2: weight of sum w^2 / 2.
        checkpoints: where step checkpoints lie; a killed training goes on from the last.
        checkpoint_seconds: at least so long between two checkpoints.
        beat: called a few times a second with steps done, all steps, loss and steps a second.

    Raises:
        DivergedError: the loss is not finite; step and learning rate are named.
        UserMistake: the training ends before `begin_step`, the teacher does not fit, or the devices do not.
        LeftError: on another host than the first: that one does not go on.
    """
    examples = len(split) if isinstance(split, GrainSplit) else len(split["x"])
    batch_size = min(batch_size, examples)
    per_epoch, whole = length(split, batch_size=batch_size, epochs=epochs, steps=steps)
    total = whole - begin_step
    if total < 1 and begin_step:
        raise UserMistake(f"there is no step from {begin_step} on: the training ends at step {whole}")
    devices = devices or Devices(data=devices_for(batch_size))
    if batch_size % devices.data:
        raise UserMistake(
            f"devices.data = {devices.data}: does not divide the batches of {batch_size} examples; choose a divisor, "
            "or another `data.batch_size`"
        )
    mesh = _mesh(devices.data, devices.model)
    gathered = not isinstance(split, GrainSplit)
    step_function = make_step(
        network,
        objective_name,
        optimizer,
        steps=whole,
        begin=begin_step,
        per_epoch=per_epoch,
        batch_size=batch_size,
        l1=l1,
        l2=l2,
        sparse=masks is not None,
        gathered=gathered,
        devices=devices.data,
        parts=devices.model,
        sparsify=sparsify,
        examples=None if sparsify is None else examples,
        teacher=teacher.network if teacher else None,
        lesson=teacher.lesson if teacher else None,
    )
    if sparsify is None:
        state = _begin(variables, optimizer, whole, masks, moments, begin_step)
    else:
        wrapped = _sparsified(optimizer, whole, begin_step, examples, sparsify, seed)
        state = _begin_sparsified(variables, optimizer, whole, wrapped, moments, begin_step)
    start = 0
    layout = None if mesh is None else _layout(mesh, state)
    if hosts is not None:
        start, state = _together(hosts, checkpoints, state)
    elif checkpoints is not None and (found := checkpoints.latest(_blank(state, layout))):
        start, state = found
    all_have = None if mesh is None else everywhere(mesh)
    state = spread(state, layout)
    data = None if isinstance(split, GrainSplit) else spread(dict(split), all_have)
    key = spread(jax.random.key(seed), all_have)
    taught = spread((teacher.variables, teacher.columns), all_have) if teacher else None
    end = total if stop_step is None else min(stop_step, total)
    rates = learning_rate(optimizer, whole, begin_step)
    clock = _Beats(optimizer, rates, total, end, start, beat, checkpoints, checkpoint_seconds, hosts)
    if hosts is not None:
        hosts.meet()
    # Devices of one CPU share its threads: steps in flight side by side would wait for each other for ever.
    one_at_a_time = mesh is not None and jax.default_backend() == "cpu"
    with SPANNING if mesh is not None else contextlib.nullcontext():
        for done, batch, order in _batches(split, data, start, end, per_epoch, batch_size, seed, mesh):
            state = step_function(state, batch, order, key, taught)
            if one_at_a_time:
                jax.block_until_ready(state.step)
            clock.tick(done, state)
        clock.finish(state)
        if hosts is not None:
            state = hosts.whole(state)
    params, last = jax.device_get((state.params, state.state))
    if sparsify is not None:
        settled = settle(state.params, state.optimizer)
        params, masks = jax.device_get((settled, state.optimizer.masks))
        if settled is not state.params:  # what the state has averaged is of weights under noise
            seen = _inputs(split, min(per_epoch, REESTIMATED), per_epoch, batch_size, seed)
            last = jax.device_get(reestimate(network, Variables(params, last), seen, seed=seed))
    inner = state.optimizer if masks is None else state.optimizer.inner
    return Fitted(Variables(params, last), np.asarray(state.losses)[:end], start, moments_of(inner), masks)


def _together(hosts: Group, checkpoints: Steps | None, state: TrainState) -> tuple[int, TrainState]:
    """The step and the state from which all hosts go on: the last that host 0 finds saved.

    Raises:
        PruneError: the hosts would begin from different weights.
    """
    start, blank = 0, _blank(state, None)
    if hosts.first and checkpoints is not None and (found := checkpoints.latest(blank)):
        start, state = found
    start, expected = hosts.agree([start, _digest(state)])
    if not hosts.first:
        if start and checkpoints is not None:
            state = checkpoints.read(start, blank)
        if _digest(state) != expected:
            raise PruneError(
                "the weights, or what the optimizer has of them, are others than those of host 0 before step "
                f"{start + 1}; let all hosts have the same software, processors and store"
            )
    return start, state


def _digest(tree: PyTree) -> str:
    hashed = hashlib.sha256()
    for path, leaf in leaves_by_path({"": tree}).items():
        hashed.update(path.encode() + np.asarray(leaf).tobytes())
    return hashed.hexdigest()


def _blank(state: TrainState, layout: TrainState | None) -> TrainState:
    """What a checkpoint is read into: arrays of this machine, or each device's parts, from whatever mesh they come."""
    if layout is None:
        return jax.tree.map(np.asarray, state)
    return jax.tree.map(lambda a, lies: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=lies), state, layout)


def _begin(
    variables: Variables,
    optimizer: Optimizer,
    steps: int,
    masks: PyTree | None,
    moments: PyTree | None = None,
    begin: int = 0,
) -> TrainState:
    params = jax.tree.map(jnp.array, variables.params)  # a copy: the step donates it
    if masks is not None:
        params = apply_masks(params, masks)
    inner = make_optimizer(optimizer, steps, begin).init(params)
    if moments is not None:
        inner = with_moments(inner, moments)
    if masks is not None:
        inner = MaskedState(masks, inner)
    inner = jax.tree.map(jnp.array, inner)
    state = jax.tree.map(jnp.array, variables.state)
    return TrainState(params, state, inner, jnp.zeros((), jnp.int32), jnp.zeros((steps - begin,), jnp.float32))


def _sparsified(
    optimizer: Optimizer, steps: int, begin: int, examples: int, sparsify: Sparsify, seed: int
) -> optax.GradientTransformationExtraArgs:
    inner, rate = make_optimizer(optimizer, steps, begin), learning_rate(optimizer, steps, begin)
    key = jax.random.key(seed)
    return sparsified(inner, sparsify, steps=steps - begin, examples=examples, learning_rate=rate, key=key)


def _begin_sparsified(
    variables: Variables,
    optimizer: Optimizer,
    steps: int,
    wrapped: optax.GradientTransformationExtraArgs,
    moments: PyTree | None,
    begin: int,
) -> TrainState:
    plain = _begin(variables, optimizer, steps, None, moments, begin)
    state = wrapped.init(plain.params)
    params = apply_masks(plain.params, state.masks)
    if moments is not None:
        state = state._replace(inner=plain.optimizer)
    return plain._replace(params=params, optimizer=jax.tree.map(jnp.array, state))


def _batches(
    split: Split, data: Any, start: int, end: int, per_epoch: int, batch_size: int, seed: int, mesh: Mesh | None
) -> Iterator[tuple[int, Any, Any]]:
    """For each step its number from 1, the data and the epoch's order; the same from any start."""
    if isinstance(split, GrainSplit):
        stream = split.batches(batch_size, seed=seed, start=start)
        for step in range(start, end):
            yield step + 1, next(stream) if mesh is None else spread(next(stream), along_data(mesh)), None
        return
    examples = len(split["x"])
    for step in range(start, end):
        if step == start or step % per_epoch == 0:
            order = np.random.default_rng([seed, step // per_epoch]).permutation(examples).astype(np.int32)
            order = spread(order, None if mesh is None else everywhere(mesh))
        yield step + 1, data, order


def _inputs(split: Split, count: int, per_epoch: int, batch_size: int, seed: int) -> Iterator[tuple[Any, ...]]:
    """What the network was given in the first steps of the training."""
    for step, batch, order in _batches(split, split, 0, count, per_epoch, batch_size, seed, None):
        if order is not None:
            rows = np.asarray(order)[(step - 1) * batch_size :][:batch_size]
            batch = {name: np.take(array, rows, axis=0) for name, array in batch.items()}
        yield inputs_of(batch)


class _Beats:
    """What happens now and then while the steps run: progress, a look at the loss, a checkpoint."""

    def __init__(
        self,
        optimizer: Optimizer,
        rates: optax.Schedule,
        total: int,
        end: int,
        start: int,
        beat: Callable[[int, int, float, float], None],
        checkpoints: Steps | None,
        checkpoint_seconds: float,
        hosts: Group | None = None,
    ):
        self.optimizer, self.rates, self.total, self.end, self.beat = optimizer, rates, total, end, beat
        self.checkpoints, self.interval = checkpoints, checkpoint_seconds
        self.last, self.last_step, self.saved = time.perf_counter(), start, time.perf_counter()
        self.hosts, self.due, self.gap = hosts, start + 1, 1  # hosts look up at the same steps, by no clock of theirs

    def tick(self, done: int, state: TrainState) -> None:
        if not self._is_due(done):
            return
        fault, save = self._tell(done, state)
        if self.hosts is not None:
            gap, save, stop = self.hosts.agree([self.gap, save, fault is not None])
            self.due = done + gap
            self.hosts.listening = stop
        if save:
            self._save(done, state, stop=fault is not None)
        if fault is not None:
            raise fault
        if self.hosts is not None and stop:
            raise LeftError

    def _is_due(self, done: int) -> bool:
        if self.hosts is None:
            return time.perf_counter() - self.last >= BEAT_SECONDS
        if done == self.due:
            self.hosts.listening = True  # the step is on its way everywhere, and the others wait after it
        return done == self.due

    def _tell(self, done: int, state: TrainState) -> tuple[BaseException | None, bool]:
        """Why to end, if so, and whether to save; on a host that follows neither."""
        if self.hosts is not None and not self.hosts.first:
            return None, False
        try:
            loss = self._look(done, state)
        except DivergedError as fault:
            return fault, False
        now = time.perf_counter()
        rate = (done - self.last_step) / (now - self.last)
        try:
            self.beat(done, self.end, loss, rate)
        except BaseException as fault:  # whoever listens wants it to end; what is done is not lost
            return fault, self.checkpoints is not None
        self.last, self.last_step = now, done
        self.gap = max(1, min(2 * self.gap, int(rate * BEAT_SECONDS)))
        return None, self.checkpoints is not None and now - self.saved >= self.interval

    def _save(self, done: int, state: TrainState, *, stop: bool) -> None:
        begun = time.perf_counter()
        if self.hosts is not None:
            state, self.hosts.listening = self.hosts.whole(state), True
        if self.checkpoints is not None and (self.hosts is None or self.hosts.first):
            self.checkpoints.save(done, state)
        if self.hosts is not None:
            self.hosts.agree()  # none waits in a step, where its patience is short, until the disk is done
            self.hosts.listening = stop
        self.saved = time.perf_counter()
        self.interval = max(self.interval, CHECKPOINT_SHARE * (self.saved - begun))

    def finish(self, state: TrainState) -> None:
        if self.hosts is None:
            self._judge(state)
            return
        fault: BaseException | None = None
        self.hosts.listening = True
        if self.hosts.first:
            try:
                self._judge(state)
            except BaseException as error:
                fault = error
        stop = self.hosts.agree(fault is not None)
        self.hosts.listening = stop
        if fault is not None:
            raise fault
        if stop:
            raise LeftError

    def _judge(self, state: TrainState) -> None:
        if self.end:
            loss = self._look(self.end, state)
            if _not_finite(state.params):  # the last step's: no loss has seen them
                raise self._diverged("the weights became infinite", self.end, state)
            self.beat(self.end, self.end, loss, 0.0)

    def _look(self, done: int, state: TrainState) -> float:
        """The last loss; refuses to go on with one that is not finite."""
        losses = np.asarray(state.losses)[:done]
        bad = np.flatnonzero(~np.isfinite(losses))
        if bad.size:
            raise self._diverged(f"the loss became {losses[bad[0]]}", int(bad[0]) + 1, state)
        return float(losses[-1])

    def _diverged(self, what: str, step: int, state: TrainState) -> DivergedError:
        rate, broken = float(self.rates(step - 1)), _not_finite(state.params)
        where = f"NaN or infinity stands in {', '.join(broken[:3])}{', ...' if len(broken) > 3 else ''}"
        return DivergedError(
            f"{what} at step {step} of {self.total}, at learning rate {rate:g} ({self.optimizer.name}). "
            "Lower `optimizer.learning_rate`, add `optimizer.warmup_steps` or `optimizer.clip_norm`. "
            f"{where if broken else 'All weights are finite: the data or the loss are too large'}."
        )


def _not_finite(params: PyTree) -> list[str]:
    """The paths of the leaves that hold NaN or infinity; of those on several hosts, in this one's share."""
    return [path for path, leaf in leaves_by_path(params).items() if not _finite(leaf)]


def _finite(leaf: jax.Array) -> bool:
    if leaf.is_fully_addressable:
        return bool(jnp.isfinite(leaf).all())
    return all(np.isfinite(np.asarray(shard.data)).all() for shard in leaf.addressable_shards)
