"""STE, surgery, movement, AC/DC and proximal L1: each against its formula by hand, with the bare optimizer."""

from itertools import pairwise

import jax
import numpy as np
import optax
import pytest

import prune_jax as pj
from prune_jax.errors import UserMistake
from prune_jax.schedules import cubic
from prune_jax.trees import leaves_by_path
from tests.sparse_steps import (
    OPTIMIZERS,
    alike,
    all_alive,
    batch_of,
    by_hand,
    check_goes_on,
    dead_are_zero,
    living,
    loss,
    mostly_slow,
    network,
    stepper,
    trajectory,
    without_lowest,
)

RAMP = cubic(0.0, 0.6, begin=1, end=5, every=2)  # at steps 1, 3, 5
METHODS = {
    "ste": lambda inner: pj.ste(inner, sparsity=0.6),
    "surgery": lambda inner: pj.surgery(inner, every=2, end=6, c=0.2, margin=0.02),
    "movement": lambda inner: pj.movement(inner, schedule=RAMP),
    "ac_dc": lambda inner: pj.ac_dc(inner, sparsity=0.6, begin=1, every=2, end=6),
    "proximal_l1": lambda inner: pj.proximal_l1(inner, l1=0.8, learning_rate=0.1),
}


def hidden_by_hand(inner, steps, masks, rule, *, rests=False):
    """Dense weights that the network sees masked; `rule(t, masks, weights, scores)`; scores are -sum of g w."""
    tree = network()
    structure = jax.tree.structure(tree)
    weights = {path: np.array(w) for path, w in leaves_by_path(tree).items()}
    scores = {path: np.zeros(m.shape) for path, m in masks.items()}
    shapes = {m.shape: path for path, m in masks.items()}
    grow = lambda values: jax.tree.unflatten(structure, list(values.values()))  # noqa: E731
    show = lambda: {path: np.where(masks[path], w, 0) if path in masks else w for path, w in weights.items()}  # noqa: E731
    state, found = inner.init(tree), []
    gradient, update = jax.jit(jax.grad(loss)), jax.jit(inner.update)
    for t in range(steps):
        g = {path: np.array(leaf) for path, leaf in leaves_by_path(gradient(grow(show()), batch_of(t))).items()}
        for path in masks:
            scores[path] -= g[path] * weights[path]
        if rests:
            g = {path: np.where(masks[path], leaf, 0) if path in masks else leaf for path, leaf in g.items()}
        updates, state = update(grow(g), state, grow(weights))
        for path, u in leaves_by_path(updates).items():
            u = np.where(masks[path], u, 0) if rests and path in masks else np.array(u)
            weights[path] = weights[path] + u
        masks = rule(t, masks, weights, scores)
        if rests:
            state = jax.tree.map(lambda leaf, m=masks: _kill(leaf, m, shapes), state)
        found.append((show(), masks))
    return found


def _kill(leaf, masks, shapes):
    return np.where(masks[shapes[np.shape(leaf)]], leaf, 0) if np.shape(leaf) in shapes else leaf


def masks_of(tree):
    return {path: np.asarray(mask) for path, mask in leaves_by_path(tree).items()}


def run(tx, steps):
    """As `trajectory`, from the dense weights, under the first masks."""
    step, state, found = stepper(tx), tx.init(network()), []
    params = pj.apply_masks(network(), state.masks)
    for t in range(steps):
        params, state = step(params, state, batch_of(t))
        found.append((params, state))
    return found


@pytest.mark.parametrize("name", mostly_slow(OPTIMIZERS, "momentum"))
def test_ste_trains_all_weights_through_the_largest(name):
    def rule(t, masks, weights, scores):
        return without_lowest({path: abs(weights[path]) for path in masks}, round(0.6 * 64))

    tx = METHODS["ste"](OPTIMIZERS[name])
    found = run(tx, 7)
    alike(found, hidden_by_hand(OPTIMIZERS[name], 7, masks_of(tx.init(network()).masks), rule))
    assert {sum(living(state).values()) for _, state in found} == {64 - round(0.6 * 64)}
    if name == "momentum":  # the others move the weights little in so few steps
        assert any(
            (masks_of(a.masks)["out/kernel"] != masks_of(found[0][1].masks)["out/kernel"]).any() for _, a in found
        )
    for params, state in found:
        np.testing.assert_array_equal(np.asarray(params["out"]["kernel"])[~masks_of(state.masks)["out/kernel"]], 0)


def test_ste_may_follow_a_schedule():
    found = run(pj.ste(OPTIMIZERS["momentum"], sparsity=pj.cubic(0.0, 0.6, begin=1, end=5, every=2)), 7)
    levels = [0.0, 0.0, 0.0, 0.6 * (1 - 0.5**3), 0.6 * (1 - 0.5**3), 0.6, 0.6]
    assert [sum(living(state).values()) for _, state in found] == [64 - round(level * 64) for level in levels]


def test_ste_is_dense_before_its_schedule_begins():
    found = run(pj.ste(OPTIMIZERS["momentum"], sparsity=pj.cubic(0.25, 0.5, begin=2, end=3)), 5)
    levels = [0.0, 0.0, 0.25, 0.5, 0.5]
    assert [sum(living(state).values()) for _, state in found] == [64 - round(level * 64) for level in levels]


@pytest.mark.parametrize("name", mostly_slow(OPTIMIZERS, "momentum"))
def test_surgery_prunes_below_one_threshold_and_splices_above_another(name):
    sizes = {path: abs(np.asarray(leaf)) for path, leaf in leaves_by_path(network()).items()}
    bars = {path: sizes[path].mean() + 0.2 * sizes[path].std() for path in all_alive()}

    def rule(t, masks, weights, scores):
        if t not in (0, 2, 4, 6):
            return masks
        found = {}
        for path, mask in masks.items():
            size = abs(weights[path])
            found[path] = np.where(size < 0.98 * bars[path], False, np.where(size > 1.02 * bars[path], True, mask))
        return found

    found = run(METHODS["surgery"](OPTIMIZERS[name]), 9)
    wanted = hidden_by_hand(OPTIMIZERS[name], 9, all_alive(), rule)
    alike(found, wanted)
    masks = [m for _, m in wanted]
    assert 0 < sum(living(found[-1][1]).values()) < 64
    if name == "momentum":
        assert any((b[path] & ~a[path]).any() for a, b in pairwise(masks) for path in a)  # spliced


@pytest.mark.parametrize("name", mostly_slow(OPTIMIZERS, "adamw"))
def test_movement_kills_what_moves_towards_zero(name):
    def rule(t, masks, weights, scores):
        if t not in (1, 3, 5):
            return masks
        return without_lowest(scores, round((0.6 - 0.6 * (1 - (t - 1) / 4) ** 3) * 64))

    found = run(METHODS["movement"](OPTIMIZERS[name]), 8)
    alike(found, hidden_by_hand(OPTIMIZERS[name], 8, all_alive(), rule, rests=True))
    assert sum(living(found[-1][1]).values()) == 64 - round(0.6 * 64)
    for params, state in found:
        dead_are_zero(params, state)


@pytest.mark.parametrize("name", mostly_slow(OPTIMIZERS, "adamw"))
def test_ac_dc_alternates_and_ends_compressed(name):
    levels = {1: 0.6, 3: 0.0, 5: 0.6, 6: 0.6}

    def rule(t, masks, weights, gradients):
        if t not in levels:
            return masks
        return without_lowest({path: abs(weights[path]) for path in masks}, round(levels[t] * 64))

    found = trajectory(METHODS["ac_dc"](OPTIMIZERS[name]), 9)
    alike(found, by_hand(OPTIMIZERS[name], rule, 9, all_alive()))
    dense, left = 64, 64 - round(0.6 * 64)
    assert [sum(living(s).values()) for _, s in found] == [dense, left, left, dense, dense, left, left, left, left]
    if name != "MultiSteps":  # they move again, but for those whose gradient is zero: neurons that were cut off
        assert np.count_nonzero(found[4][0]["hidden"]["kernel"]) > 30
    for params, state in found:
        dead_are_zero(params, state)


@pytest.mark.parametrize("name", mostly_slow(OPTIMIZERS, "momentum"))
def test_proximal_l1_is_the_step_and_then_the_soft_threshold(name):
    params, inner = network(), OPTIMIZERS[name]
    state, update = inner.init(params), jax.jit(inner.update)
    for t, (found, now) in enumerate(trajectory(METHODS["proximal_l1"](inner), 6)):
        updates, state = update(jax.grad(loss)(params, batch_of(t)), state, params)
        params = optax.apply_updates(params, updates)
        for part in (params["hidden"], params["out"]):
            v = np.asarray(part["kernel"])
            part["kernel"] = jax.numpy.asarray(np.sign(v) * np.maximum(abs(v) - np.float32(0.08), 0))
        for path, w in leaves_by_path(params).items():
            np.testing.assert_allclose(leaves_by_path(found)[path], w, rtol=1e-4, atol=1e-5)
        for path, mask in masks_of(now.masks).items():
            np.testing.assert_array_equal(mask, np.asarray(leaves_by_path(found)[path]) != 0)
    assert 0 < sum(living(now).values()) < 64


@pytest.mark.parametrize("name", METHODS)
def test_it_compiles_once_and_goes_on_from_any_step(name):
    check_goes_on(METHODS[name](optax.adam(1e-2)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: pj.surgery(optax.sgd(1), every=0, end=3),
            "begin = 0, end = 3, every = 0: begin <= end",
        ),
        (lambda: pj.surgery(optax.sgd(1), every=1, end=3, margin=1), "margin = 1: must be at least 0 and below 1"),
        (lambda: pj.proximal_l1(optax.sgd(1), l1=-1, learning_rate=1), "l1 = -1: must be at least 0"),
    ],
)
def test_mistakes_are_named(build, message):
    with pytest.raises(UserMistake, match=message):
        build()
