"""One step, one loop: what it does to the weights, and that a killed training goes on as if nothing had happened."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prune_jax import training
from prune_jax.checkpoints import Store
from prune_jax.errors import DivergedError, UserMistake
from prune_jax.models import Variables, build
from prune_jax.recipe import Optimizer, Ref
from prune_jax.sparse_training import masked
from prune_jax.training import devices_for, fit, learning_rate, length, make_optimizer, make_step
from prune_jax.trees import leaves_by_path, map_by_path

ADAM = Optimizer(learning_rate=0.01)
MODELS = {
    "dropout": ("mlp", {"widths": [16], "dropout": 0.5}),
    "batch norm": ("mlp", {"widths": [16], "batch_norm": True}),
}
BOTH = {"widths": [16], "dropout": 0.5, "batch_norm": True}


def data(samples=54, seed=0):
    rng = np.random.default_rng(seed)
    y = (np.arange(samples) % 3).astype(np.int32)
    x = rng.normal(size=(samples, 4)).astype(np.float32) + np.eye(3, 4, dtype=np.float32)[y] * 3
    return {"x": x, "y": y}


def network(kind="mlp", **args):
    """The same object for the same arguments, so that its steps compile once for all tests."""
    return _build(kind, json.dumps(args or {"widths": [16]}))


@functools.cache
def _build(kind, args):
    return build(kind, json.loads(args), inputs=(jax.ShapeDtypeStruct((1, 4), "float32"),), outputs=3)


@functools.cache
def start(net, seed=0):
    return jax.device_get(jax.jit(net.init)(jax.random.key(seed)))


def train(net, split=None, variables=None, **options):
    options = {"objective_name": "classification", "optimizer": ADAM, "batch_size": 9, "seed": 0, **options}
    return fit(net, variables or start(net), data() if split is None else split, **options)


def same(a, b):
    a, b = leaves_by_path(a), leaves_by_path(b)
    assert list(a) == list(b)
    for path in a:
        assert np.asarray(a[path]).tobytes() == np.asarray(b[path]).tobytes(), path


def half(params, seed=0):
    rng = np.random.default_rng(seed)
    return map_by_path(lambda path, w: rng.random(w.shape) < 0.5 if w.ndim == 2 else None, params)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "nadam", "rmsprop", "adagrad", "lion", "lamb"])
def test_the_loss_goes_down_with_every_optimizer(name):
    linear = network("linear", bias=True)
    fitted = train(linear, optimizer=Optimizer(name=name, learning_rate=0.1), epochs=10)
    assert fitted.losses.shape == (60,)
    assert fitted.losses.dtype == np.float32
    assert fitted.losses[-6:].mean() < 0.5 * fitted.losses[:3].mean()


def by_hand(net, split, optimizer, steps, batch_size=9):
    """The oracle: a plain loop of Optax over the same order; losses and weights."""
    params, tx = start(net).params, make_optimizer(optimizer, steps)
    state, losses = tx.init(params), []
    examples = len(split["x"])

    @jax.jit
    def step(params, state, x, y):
        def loss_of(params):
            outputs, _ = net.apply(params, {}, (x,), train=True, key=jax.random.key(0))
            return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    for i in range(steps):
        epoch, place = divmod(i, examples // batch_size)
        rows = np.random.default_rng([0, epoch]).permutation(examples)[place * batch_size :][:batch_size]
        params, state, loss = step(params, state, split["x"][rows], split["y"][rows])
        losses.append(float(loss))
    return np.array(losses), leaves_by_path(params)


def test_it_is_the_training_that_optax_does():
    net, optimizer = network("linear", bias=True), Optimizer(name="sgd", learning_rate=0.1, momentum=0.9)
    fitted = train(net, epochs=2, optimizer=optimizer)
    losses, params = by_hand(net, data(), optimizer, 12)
    np.testing.assert_allclose(fitted.losses, losses, rtol=1e-4)
    for path, w in leaves_by_path(fitted.variables.params).items():
        np.testing.assert_allclose(w, params[path], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion"])
def test_pruned_weights_are_exactly_zero_after_training(name):
    more = {"weight_decay": 0.1} if name in {"adamw", "lion"} else {}
    more |= {"momentum": 0.9} if name == "sgd" else {}
    net = network(widths=[16], batch_norm=True)
    masks = half(start(net).params)
    fitted = train(net, optimizer=Optimizer(name=name, **more), epochs=2, masks=masks, l1=1e-3, l2=1e-3)
    params = leaves_by_path(fitted.variables.params)
    for path, mask in leaves_by_path(masks).items():
        assert not params[path][~mask].any()
        assert np.count_nonzero(params[path][mask]) > 0.9 * mask.sum()


def test_pruned_moments_are_exactly_zero_too(store):
    net = network()
    masks = half(start(net).params)
    with store.steps(Ref("finetune", "a")) as steps:
        _with_checkpoints(net, steps, masks=masks, steps=4)
        tree = _state_like(net, 4, masks)
        _, state = steps.latest(tree)
    moments = [state.optimizer.inner[0].mu, state.optimizer.inner[0].nu]
    for path, mask in leaves_by_path(masks).items():
        for moment in moments:
            assert not np.asarray(leaves_by_path(moment)[path])[~mask].any()
            assert np.asarray(leaves_by_path(moment)[path])[mask].any()


def _with_checkpoints(net, checkpoints, share=0, **options):
    """Trains with a checkpoint at every step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "BEAT_SECONDS", 0.0)
        patch.setattr(training, "CHECKPOINT_SHARE", share)
        return train(net, checkpoints=checkpoints, checkpoint_seconds=0.0, **options)


def _state_like(net, steps, masks=None):
    return jax.tree.map(np.asarray, training._begin(start(net), ADAM, steps, masks))


def test_what_is_dense_is_dense_and_what_is_pruned_starts_at_zero():
    net = network()
    masks = half(start(net).params)
    fitted = train(net, steps=1, masks=masks, optimizer=Optimizer(name="sgd", learning_rate=1e-44))
    for path, w in leaves_by_path(start(net).params).items():
        mask = leaves_by_path(masks).get(path, np.ones(w.shape, bool))
        np.testing.assert_array_equal(leaves_by_path(fitted.variables.params)[path], np.where(mask, w, 0))


@pytest.mark.parametrize("model", MODELS)
def test_the_same_seed_gives_the_same_bytes(model):
    kind, args = MODELS[model]
    once, again = (train(network(kind, **args), epochs=2) for _ in range(2))
    same(once.variables, again.variables)
    same(once.losses, again.losses)
    other = train(network(kind, **args), epochs=2, seed=1)
    assert other.losses.tobytes() != once.losses.tobytes()


@pytest.mark.parametrize("stop", [0, 1, 7, 99])
@pytest.mark.parametrize("model", MODELS)
def test_a_training_that_stops_is_the_beginning_of_the_whole(model, stop):
    """The learning rate decays over the whole length, wherever it stops."""
    kind, args = MODELS[model]
    net = network(kind, **args)
    optimizer = Optimizer(learning_rate=0.01, decay_to=0.0, warmup_steps=3)
    whole = train(net, epochs=2, optimizer=optimizer)
    part = train(net, epochs=2, optimizer=optimizer, stop_step=stop)
    same(part.losses, whole.losses[:stop])
    if stop >= 12:
        same(part.variables, whole.variables)
    if stop == 0:
        same(part.variables, start(net))


def test_a_checkpoint_is_gone_on_from(store):
    kind, args = MODELS["dropout"]
    net = network(kind, **args)
    whole = train(net, epochs=2)
    with store.steps(Ref("train", "a")) as steps:
        _with_checkpoints(net, steps, epochs=2, stop_step=7)
        again = train(net, epochs=2, checkpoints=steps)
    assert again.resumed_from == 7
    same(again.variables, whole.variables)
    same(again.losses, whole.losses)


KILLED = """
import sys
import jax, numpy as np
import prune_jax.training as training
from tests.test_training import ADAM, BOTH, data, half, network, start
from prune_jax.checkpoints import Store
from prune_jax.recipe import Ref

training.BEAT_SECONDS = training.CHECKPOINT_SHARE = 0
net = network(**BOTH)
masks = half(start(net).params)

def beat(done, total, loss, rate):
    print(done, flush=True)

with Store(sys.argv[1]).steps(Ref("train", "a")) as steps:
    training.fit(net, start(net), data(), objective_name="classification", optimizer=ADAM, batch_size=9, seed=0,
        steps=300, masks=masks, checkpoints=steps, checkpoint_seconds=0.0, beat=beat)
"""


def test_a_killed_training_goes_on_bit_for_bit(store):
    """kill -9 in a real process; the resumed training ends as the one that nobody disturbed."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", KILLED, str(store.root)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    told = []
    for line in process.stdout:
        told.append(int(line))
        if told[-1] >= 7:
            break
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    told += map(int, process.communicate()[0].split())
    assert process.returncode == -signal.SIGKILL

    net = network(**BOTH)
    options = {"steps": 300, "masks": half(start(net).params)}
    with Store(store.root).steps(Ref("train", "a")) as steps:
        resumed = train(net, checkpoints=steps, **options)
    assert told[-2] <= resumed.resumed_from <= told[-1] < 300  # one interval between checkpoints is lost at most
    whole = train(net, **options)
    same(resumed.losses, whole.losses)
    same(resumed.variables, whole.variables)


def test_checkpoints_that_cost_much_become_rarer(store):
    """A checkpoint may cost one part in twenty of the time, whatever the recipe asks for."""
    net = network()
    with store.steps(Ref("train", "a")) as steps:
        saved = []
        save = steps.save
        steps.save = lambda step, tree: (saved.append(step), save(step, tree), time.sleep(0.05))
        began = time.perf_counter()
        _with_checkpoints(net, steps, share=20, steps=300)
        seconds = time.perf_counter() - began
    assert 1 <= len(saved) <= 2 + seconds / (20 * 0.05)


@pytest.mark.parametrize(
    ("optimizer", "rate"),
    [
        (Optimizer(name="sgd", learning_rate=1e30), "1e+30"),
        (Optimizer(name="sgd", learning_rate=1e30, decay_to=1.0), "1e+30"),
    ],
)
def test_a_diverging_loss_is_named_with_step_and_learning_rate(optimizer, rate):
    with pytest.raises(DivergedError) as caught:
        train(network(), optimizer=optimizer, steps=30)
    text = str(caught.value)
    losses, _ = by_hand(network(), data(), optimizer, 30)
    first = int(np.flatnonzero(~np.isfinite(losses))[0])
    assert text.startswith(
        f"the loss became {losses[first]} at step {first + 1} of 30, at learning rate {rate} (sgd). "
    )
    mend = "Lower `optimizer.learning_rate`, add `optimizer.warmup_steps` or `optimizer.clip_norm`. "
    assert f"{mend}NaN or infinity stands in hidden_0/" in text


def test_weights_that_diverge_in_the_last_step_are_not_answered_as_a_success():
    far = {**data(), "x": 1e4 * data()["x"]}
    with pytest.raises(DivergedError) as caught:
        train(network(), far, optimizer=Optimizer(name="sgd", learning_rate=3e38), steps=1)
    assert str(caught.value).startswith("the weights became infinite at step 1 of 1, at learning rate 3e+38 (sgd). ")


@pytest.mark.parametrize("stop", [1, 5])
def test_a_grain_split_trains_and_resumes(store, stop):
    pytest.importorskip("grain")
    import grain

    from prune_jax.datasets import GrainSplit

    arrays = data()
    records = [{"x": x, "y": y} for x, y in zip(arrays["x"], arrays["y"], strict=True)]
    split = GrainSplit(grain.MapDataset.source(records))
    net = network(widths=[16], dropout=0.5)
    whole = train(net, split, epochs=2)
    assert whole.losses[-3:].mean() < whole.losses[:3].mean()
    with store.steps(Ref("train", "a")) as steps:
        _with_checkpoints(net, steps, split=split, epochs=2, stop_step=stop)
        again = train(net, split, epochs=2, checkpoints=steps)
    assert again.resumed_from == stop
    same(again.losses, whole.losses)
    same(again.variables, whole.variables)


def test_two_trainings_of_one_shape_compile_once():
    net = network(widths=[11])
    train(net, epochs=2)
    built = make_step.cache_info().currsize
    step = _step(net)
    compiled = step._cache_size()
    train(net, epochs=2, seed=5, variables=start(net, 3))
    train(net, data(seed=1), epochs=2)
    assert make_step.cache_info().currsize == built
    assert step._cache_size() == compiled == 1


def _step(net, *, batch_size=9, devices=1, sparse=False):
    return make_step(
        net,
        "classification",
        ADAM,
        steps=12,
        begin=0,
        per_epoch=6,
        batch_size=batch_size,
        l1=0.0,
        l2=0.0,
        sparse=sparse,
        gathered=True,
        devices=devices,
        parts=1,
        sparsify=None,
        examples=None,
        teacher=None,
        lesson=None,
    )


def test_rounds_of_other_masks_compile_once():
    net = network(widths=[13])
    for seed in range(3):
        train(net, epochs=2, masks=half(start(net).params, seed))
    assert _step(net, sparse=True)._cache_size() == 1


@pytest.mark.parametrize(
    ("examples", "batch_size", "epochs", "steps", "expected"),
    [
        (60, 10, 2, None, (6, 12)),
        (60, 10, 0.5, None, (6, 3)),
        (60, 10, 0.01, None, (6, 1)),
        (65, 10, 1, None, (6, 6)),
        (5, 10, 3, None, (1, 3)),
        (60, 10, None, 7, (6, 7)),
    ],
)
def test_the_length_of_a_training(examples, batch_size, epochs, steps, expected):
    split = {"x": np.zeros((examples, 1))}
    assert length(split, batch_size=batch_size, epochs=epochs, steps=steps) == expected


def test_a_batch_larger_than_the_data_is_the_data():
    net = network()
    fitted = train(net, data(7), batch_size=64, epochs=3)
    same(fitted.losses, train(net, data(7), batch_size=7, epochs=3).losses)
    assert fitted.losses.shape == (3,)


def test_every_example_is_seen_once_in_an_epoch():
    """With a loss that is linear in the examples, the mean of an epoch's losses is the mean over the split."""
    net = network("linear", bias=True)
    fitted = train(net, optimizer=Optimizer(name="sgd", learning_rate=1e-30), epochs=3)
    variables, split = start(net), data()
    outputs, _ = net.apply(variables.params, {}, (split["x"],), train=False, key=None)
    mean = optax.softmax_cross_entropy_with_integer_labels(outputs, split["y"]).mean()
    np.testing.assert_allclose(fitted.losses.reshape(3, 6).mean(1), mean, rtol=1e-5)
    assert len({row.tobytes() for row in fitted.losses.reshape(3, 6)}) == 3  # each in an order of its own


@pytest.mark.parametrize("decay_to", [0.1, None])
def test_rewound_learning_rates_are_those_of_the_trainings_last_steps(decay_to):
    """A loss whose gradient is 1 shows the rate of each step in how far a bias moved."""
    net, steps, begin = network("linear", bias=True), 9, 2
    optimizer = Optimizer(name="sgd", learning_rate=0.5, warmup_steps=4, decay_to=decay_to)

    def rates(begin):
        options = {"objective_name": "tests.samples.tiny:first_output", "optimizer": optimizer, "steps": steps}
        fits = [train(net, **options, begin_step=begin, stop_step=k) for k in range(steps - begin + 1)]
        return -np.diff([fitted.variables.params["output"]["bias"][0] for fitted in fits])

    t = np.arange(steps)
    after = 1.0 if decay_to is None else 0.1 + 0.9 * (1 + np.cos(np.pi * (t - 4) / (steps - 4))) / 2
    expected = 0.5 * np.where(t < 4, t / 4, after)
    np.testing.assert_allclose(rates(0), expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(rates(begin), expected[begin:], rtol=1e-3, atol=1e-5)
    assert learning_rate(optimizer, steps, begin)(0) == learning_rate(optimizer, steps)(begin)
    with pytest.raises(UserMistake, match="there is no step from 9 on: the training ends at step 9"):
        train(net, optimizer=optimizer, steps=steps, begin_step=9)


@pytest.mark.parametrize("penalty", ["l1", "l2"])
def test_a_penalty_makes_weights_smaller_and_shows_in_the_loss(penalty):
    net = network()
    plain, drawn = train(net, steps=30), train(net, steps=30, **{penalty: 0.1})

    def size(fitted):
        return sum(np.abs(w).sum() for w in leaves_by_path(fitted.variables.params).values() if w.ndim == 2)

    assert size(drawn) < 0.8 * size(plain)
    kernels = [np.asarray(w) for w in leaves_by_path(start(net).params).values() if w.ndim == 2]
    more = 0.1 * sum(np.abs(w).sum() for w in kernels) if penalty == "l1" else 0.05 * sum((w**2).sum() for w in kernels)
    np.testing.assert_allclose(drawn.losses[0] - plain.losses[0], more, rtol=1e-4)


@pytest.mark.parametrize(("batch_size", "devices"), [(10, 2), (7, 1), (1, 1)])
def test_a_batch_is_spread_over_the_devices_that_divide_it(batch_size, devices):
    assert jax.device_count() == 2
    assert devices_for(batch_size) == devices


def test_a_spread_batch_trains_as_one_device_would():
    """What two devices come to is what one comes to, to rounding."""
    net, split = network(widths=[16], batch_norm=True), data(60)
    spread = train(net, split, batch_size=10, epochs=2)
    state, step = training._begin(start(net), ADAM, 12, None), _step(net, batch_size=10)
    for i in range(12):
        order = np.random.default_rng([0, i // 6]).permutation(60).astype(np.int32)
        state = step(state, split, order, jax.random.key(0))
    np.testing.assert_allclose(spread.losses, state.losses, rtol=2e-3, atol=1e-4)


def test_many_spread_steps_do_not_wait_for_each_other_for_ever():
    """Steps in flight on the devices of one CPU once held all of its threads."""
    fitted = train(network("linear", bias=True), data(60), batch_size=10, epochs=100)
    assert fitted.losses[-1] < fitted.losses[0]


def test_the_spread_step_runs_on_both_devices():
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    net = network()
    mesh = Mesh(np.array(jax.devices()), ("data",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    state = jax.device_put(training._begin(start(net), ADAM, 12, None), everywhere)
    order = jax.device_put(np.arange(60, dtype=np.int32), everywhere)
    key = jax.device_put(jax.random.key(0), everywhere)
    text = (
        _step(net, batch_size=10, devices=2)
        .lower(state, jax.device_put(data(60), everywhere), order, key)
        .compile()
        .as_text()
    )
    assert "num_partitions=2" in text
    assert "all-reduce" in text


@pytest.mark.parametrize(
    ("optimizer", "steps", "expected"),
    [
        (Optimizer(learning_rate=0.5), 10, [0.5] * 5),
        (Optimizer(learning_rate=1.0, warmup_steps=4), 10, [0, 0.25, 0.5, 0.75, 1.0]),
        (Optimizer(learning_rate=1.0, decay_to=0.0), 4, [1, 0.853553, 0.5, 0.146447, 0]),
        (Optimizer(learning_rate=1.0, decay_to=0.5), 4, [1, 0.926777, 0.75, 0.573223, 0.5]),
        (Optimizer(learning_rate=1.0, decay_to=0.0, warmup_steps=2), 4, [0, 0.5, 1.0, 0.5, 0]),
    ],
)
def test_the_learning_rate_over_the_steps(optimizer, steps, expected):
    rates = [float(learning_rate(optimizer, steps)(i)) for i in range(5)]
    np.testing.assert_allclose(rates, expected, atol=1e-6)


def test_a_gradient_is_clipped_to_its_norm():
    tx = make_optimizer(Optimizer(name="sgd", learning_rate=1.0, clip_norm=1.0), 10)
    updates, _ = tx.update({"w": jnp.array([3.0, 4.0])}, tx.init({"w": jnp.zeros(2)}), {"w": jnp.zeros(2)})
    np.testing.assert_allclose(updates["w"], [-0.6, -0.8], rtol=1e-6)


def test_progress_is_told_and_ends_at_the_end(monkeypatch):
    monkeypatch.setattr(training, "BEAT_SECONDS", 0.0)
    beats = []
    fitted = train(network(), epochs=1, beat=lambda *beat: beats.append(beat))
    assert [done for done, *_ in beats] == [1, 2, 3, 4, 5, 6, 6]
    assert {total for _, total, *_ in beats} == {6}
    np.testing.assert_array_equal([loss for _, _, loss, _ in beats[:6]], fitted.losses)
    assert all(rate > 0 for *_, rate in beats[:6])


def test_what_it_starts_from_is_left_as_it_was():
    net = network()
    variables = jax.tree.map(np.array, start(net))
    before = jax.tree.map(np.array, variables)
    train(net, variables=Variables(*variables), epochs=1, masks=half(variables.params))
    same(variables, before)


def test_masked_is_what_sparse_training_uses():
    net = network()
    masks = half(start(net).params)
    tx = masked(make_optimizer(ADAM, 12), masks)
    assert tx.init(start(net).params).masks is masks
