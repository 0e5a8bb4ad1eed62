"""Gradual pruning inside the training step: its levels, its masks by hand, zeros, one compilation, going on."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import prune_jax as pj
from prune_jax.allocation import allocate
from prune_jax.errors import UserMistake
from prune_jax.schedules import Levels, cubic
from prune_jax.sparse_training.changing import among, table
from prune_jax.trees import leaves_by_path
from tests.compiling import compilations
from tests.sparse_steps import (
    OPTIMIZERS,
    alike,
    all_alive,
    batch_of,
    by_hand,
    dead_are_zero,
    living,
    loss,
    mostly_slow,
    network,
    stepper,
    trajectory,
    without_lowest,
)

RAMP = cubic(0.1, 0.8, begin=1, end=6, every=2)  # at steps 1, 3, 5, 6
SIZES = {"hidden/kernel": 40, "out/kernel": 24}


def wanted(t):
    """The sparsity after step t, from the formula."""
    due = max((s for s in (1, 3, 5, 6) if s <= t), default=None)
    return 0.0 if due is None else 0.8 + (0.1 - 0.8) * (1 - (due - 1) / 5) ** 3


def magnitude_rule(t, masks, weights, gradients):
    if t not in (1, 3, 5, 6):
        return masks
    return without_lowest({path: abs(weights[path]) for path in masks}, round(wanted(t) * 64), masks)


@pytest.mark.parametrize("name", mostly_slow(OPTIMIZERS, "adamw"))
def test_it_is_the_training_by_hand(name):
    tx = pj.gradual(OPTIMIZERS[name], schedule=RAMP)
    found = trajectory(tx, 9)
    alike(found, by_hand(OPTIMIZERS[name], magnitude_rule, 9, all_alive()))
    for t, (params, state) in enumerate(found):
        dead_are_zero(params, state)
        assert sum(living(state).values()) == 64 - round(wanted(t) * 64)
    for (_, before), (_, after) in pairwise(found):
        for path, mask in leaves_by_path(after.masks).items():
            assert not np.any(np.asarray(mask) & ~np.asarray(leaves_by_path(before.masks)[path]))  # dead stays dead


def test_every_layer_has_exactly_so_many():
    found = trajectory(pj.gradual(optax.adam(1e-2), schedule=RAMP, scope="layer"), 8)
    for t, (_, state) in enumerate(found):
        assert living(state) == {path: size - round(wanted(t) * size) for path, size in SIZES.items()}
    assert living(found[-1][1]) == {"hidden/kernel": 8, "out/kernel": 24 - round(0.8 * 24)}


def test_by_erk_each_layer_follows_the_schedule_between_its_own_ends():
    found = trajectory(pj.gradual(optax.adam(1e-2), schedule=RAMP, scope="erk"), 8)
    leaves = {path: w for path, w in leaves_by_path(network()).items() if w.ndim == 2}
    first, last = ([pool.prune for pool in allocate(leaves, scope="erk", sparsity=s)] for s in (0.1, 0.8))
    for t, (_, state) in enumerate(found[1:], 1):
        share = (wanted(t) - 0.1) / (0.8 - 0.1)
        dead = [round(a + share * (b - a)) for a, b in zip(first, last, strict=True)]
        assert living(state) == {path: size - n for (path, size), n in zip(SIZES.items(), dead, strict=True)}


def test_by_erk_no_layer_dies_late_and_fast():
    shapes = {"a": (64, 128), "b": (128, 64), "c": (64, 10)}
    levels = cubic(0.0, 0.98, begin=0, end=30)
    prune = table({path: np.ones(shape, bool) for path, shape in shapes.items()}, levels, "erk").prune
    eps = 0.02 * 17024 / (192 + 192 + 74)  # so that the densities eps (n + m) / (n m) leave 2 % of all weights
    for (n, m), dead in zip(shapes.values(), prune.T, strict=True):
        last = 1 - eps * (n + m) / (n * m)
        by_the_paper = [n * m * last * (1 - (1 - t / 30) ** 3) for t in levels.steps]
        np.testing.assert_allclose(dead, by_the_paper, atol=1.5)  # whole numbers, of whole numbers
    assert prune[-1].sum() == round(0.98 * 17024)


@pytest.mark.parametrize(
    ("criterion", "score"),
    [
        ("snip", lambda w, g: abs(w * g)),
        pytest.param("taylor", lambda w, g: (w * g) ** 2, marks=pytest.mark.slow),
        pytest.param("sensitivity", lambda w, g: abs(g), marks=pytest.mark.slow),
    ],
)
def test_criteria_of_the_gradient_get_that_of_the_batch(criterion, score):
    def rule(t, masks, weights, gradients):
        if t not in (1, 3, 5, 6):
            return masks
        scores = {path: score(weights[path], gradients[path]) for path in masks}
        return without_lowest(scores, round(wanted(t) * 64), masks)

    inner = OPTIMIZERS["momentum"]
    alike(trajectory(pj.gradual(inner, criterion=criterion, schedule=RAMP), 7), by_hand(inner, rule, 7, all_alive()))


def test_a_drawn_criterion_draws_by_its_key():
    step = stepper(pj.gradual(optax.sgd(0.1), criterion="random", schedule=Levels((0,), (0.5,)), key=jax.random.key(9)))

    def masks(seed):  # the key is state, so that another one compiles nothing
        tx = pj.gradual(optax.sgd(0.1), criterion="random", schedule=RAMP, key=jax.random.key(seed))
        return np.asarray(step(network(), tx.init(network()), batch_of(0))[1].masks["hidden"]["kernel"])

    np.testing.assert_array_equal(masks(0), masks(0))
    assert (masks(0) != masks(1)).any()
    with pytest.raises(UserMistake, match="'random' draws random numbers: give key="):
        pj.gradual(optax.sgd(0.1), criterion="random", schedule=RAMP)


def test_jit_is_eager():
    tx = pj.gradual(optax.sgd(1e-2, momentum=0.9), schedule=Levels((1,), (0.5,)))
    for (a, _), (b, _) in zip(trajectory(tx, 2), trajectory(tx, 2, jit=False), strict=True):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_it_compiles_once_and_buffers_may_be_donated():
    tx = pj.gradual(optax.adam(1e-2), schedule=RAMP)

    def plain(params, state, batch):
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(plain, donate_argnums=(0, 1))
    params = network()
    state = jax.tree.map(jnp.array, tx.init(params))
    params, state = step(params, state, jax.device_put(batch_of(0)))
    with compilations() as seconds:
        for t in range(1, 9):
            params, state = step(params, state, jax.device_put(batch_of(t)))
    assert not seconds
    assert step._cache_size() == 1
    dead_are_zero(params, state)
    assert sum(living(state).values()) == 64 - round(0.8 * 64)


def test_masks_and_step_are_state_and_go_on_from_any_step():
    """Through plain numpy arrays, into a wrapper that is built anew."""
    build = lambda: pj.gradual(optax.adam(1e-2), schedule=RAMP)  # noqa: E731
    whole = trajectory(build(), 8)
    params, state = jax.tree.map(np.asarray, whole[3])
    step = stepper(build())
    for t in range(4, 8):
        params, state = step(params, state, batch_of(t))
    for a, b in zip(jax.tree.leaves((params, state)), jax.tree.leaves(whole[-1]), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_inside_other_wrappers():
    """In MultiSteps, steps are those that the optimizer takes; in multi_transform, layers of the part compete."""
    inside = optax.MultiSteps(pj.gradual(optax.adam(1e-2), schedule=RAMP), 2).gradient_transformation()
    found = trajectory(inside, 8)
    assert [sum(living(s.inner_opt_state).values()) for _, s in found][::2] == [64, 64, 64 - 6, 64 - 6]
    labels = {"hidden": {"kernel": "a", "bias": "b"}, "out": {"kernel": "b"}}
    parts = {"a": pj.gradual(optax.adamw(1e-2), schedule=RAMP), "b": optax.sgd(0.1)}
    params, state = trajectory(optax.multi_transform(parts, labels), 8)[-1]
    assert living(state.inner_states["a"].inner_state) == {"hidden/kernel": 8}
    assert np.count_nonzero(params["hidden"]["kernel"]) == 8


def test_leaves_stay_dense_by_pattern_and_weights_live_by_floor():
    tx = pj.gradual(optax.adam(1e-2), schedule=Levels((0,), (0.9,)), exclude=["out/*"])
    assert living(tx.init(network())) == {"hidden/kernel": 40}
    start = network()
    start["out"]["kernel"] *= 1e-3
    for floor, left in ((0, 0), (2, 2)):
        tx = pj.gradual(optax.adam(1e-5), schedule=Levels((0,), (0.8,)), min_keep=floor)
        assert living(trajectory(tx, 1, start=start)[0][1]) == {"hidden/kernel": 13 - left, "out/kernel": left}


def test_low_precision_weights_end_at_zero():
    low = jax.tree.map(lambda w: w.astype(jnp.bfloat16), network())
    params, state = trajectory(pj.gradual(optax.adam(1e-2), schedule=RAMP), 7, start=low)[-1]
    assert params["out"]["kernel"].dtype == jnp.bfloat16
    dead_are_zero(params, state)


def test_moments_are_found_by_name_not_by_shape():
    """Two leaves of one shape, one of them dense."""
    params = {"a": {"w": jnp.array([[1.0, 5.0]])}, "w": jnp.array([[1.0, 5.0]])}
    tx = pj.gradual(optax.adam(0.1), schedule=Levels((1,), (0.5,)), exclude=["a/*"])
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    mu = state.inner[0].mu
    assert np.count_nonzero(mu["a"]["w"]) == 2
    np.testing.assert_array_equal(np.asarray(mu["w"]) != 0, [[False, True]])


MISTAKES = [
    (
        {"criterion": "fisher"},
        "'fisher' needs example_gradient_square, but inside a training step there are only the",
    ),
    ({"criterion": "magnitud"}, "criterion 'magnitud' is not known"),
    ({"schedule": Levels((0, 5), (0.9, 0.5))}, "the sparsities of a gradual schedule fall"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserMistake, match=message):
        pj.gradual(optax.sgd(0.1), **{"schedule": RAMP, **options})


def test_it_asks_for_the_weights():
    tx = pj.gradual(optax.sgd(0.1), schedule=RAMP)
    with pytest.raises(UserMistake, match=r"the weights are needed: call update\(gradients, state, params\)"):
        tx.update(network(), tx.init(network()))


def test_scopes_that_a_step_does_not_know_are_refused():
    params = {"w": jnp.ones((4, 4))}
    tx = pj.gradual(optax.sgd(0.1), schedule=pj.cubic(0.0, 0.5, begin=0, end=2), scope="lamp")
    with pytest.raises(UserMistake, match=r"scope 'lamp' is not possible inside a training step.*layer, erk"):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize(
    "steps", [[5], [0, 1], [3, 5, 7, 9], [3, 5, 7, 8], [0, 4, 5, 6, 11], [2, 3, 9, 10], [10, 20, 30, 41, 52]]
)
def test_a_step_is_found_among_those_of_a_schedule(steps):
    found = jax.vmap(lambda t: among(np.array(steps, np.int32), t))(jnp.arange(60))
    assert np.flatnonzero(found).tolist() == steps
