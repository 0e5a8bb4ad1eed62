"""STR, L0 gates and sparse variational dropout: against losses written plainly, and their formulas in numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import prune_jax as pj
from prune_jax.errors import UserMistake
from prune_jax.trees import leaves_by_path
from tests.sparse_steps import (
    OPTIMIZERS,
    batch_of,
    check_goes_on,
    loss,
    mostly_slow,
    network,
    stepper,
    trajectory,
)

KEY = jax.random.key(5)
MASKED = ("hidden/kernel", "out/kernel")
OWN = optax.sgd(0.5, momentum=0.5)
METHODS = {
    "soft_threshold": lambda inner, own=OWN: pj.soft_threshold(inner, decay=0.5, start=-2.0, optimizer=own),
    "l0": lambda inner, own=OWN: pj.l0(inner, l0=1.0, key=KEY, drop=0.85, optimizer=own),
    "variational_dropout": lambda inner, own=OWN: pj.variational_dropout(
        inner, examples=2, key=KEY, weight=0.5, begin=1, end=4, start=-1.0, optimizer=own
    ),
}
BESIDE = {
    "soft_threshold": lambda w: np.float32(-2.0),
    "l0": lambda w: np.full(w.shape, math.log(0.15 / 0.85), np.float32),
    "variational_dropout": lambda w: np.full(w.shape, -1.0, np.float32),
}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def plainly(name, w, v, noise):
    """The weights that the network sees, and the penalty of a leaf, as the papers have them."""
    if name == "soft_threshold":
        bar = 1 / (1 + jnp.exp(-v))
        return jnp.where(jnp.abs(w) > bar, w - jnp.sign(w) * bar, 0.0), 0.25 * v**2
    if name == "l0":
        y = 1 / (1 + jnp.exp(-(noise + v) * 1.5))
        z = jnp.minimum(1.0, jnp.maximum(0.0, y * 1.2 - 0.1))
        return w * z, jnp.sum(1 / (1 + jnp.exp(-(v - 2 / 3 * math.log(0.1 / 1.1)))))
    log_alpha = v - jnp.log(w**2 + 1e-8)
    negative = 0.63576 / (1 + jnp.exp(-(1.8732 + 1.48695 * log_alpha))) - 0.5 * jnp.log1p(jnp.exp(-log_alpha)) - 0.63576
    return w + jnp.sqrt(jnp.exp(v)) * noise, -0.25 * jnp.sum(negative)


def composed(name, inner):
    """The oracle: Optax on w and v by `jax.grad` of loss(w') + penalty; a step answers w' before it."""

    def total(w, v, noise, batch, ramp):
        leaves, noise = leaves_by_path(w), leaves_by_path(noise)
        made = {p: plainly(name, leaf, v[p], noise.get(p)) if p in v else (leaf, 0.0) for p, leaf in leaves.items()}
        seen = jax.tree.unflatten(jax.tree.structure(w), [leaf for leaf, _ in made.values()])
        return loss(seen, batch) + ramp * sum(penalty for _, penalty in made.values()), seen

    @jax.jit
    def step(w, v, states, noise, batch, ramp):
        gradients, seen = jax.grad(total, argnums=(0, 1), has_aux=True)(w, v, noise, batch, ramp)
        updates, moved = inner.update(gradients[0], states[0], w)
        turns, own = OWN.update(gradients[1], states[1], v)
        return seen, optax.apply_updates(w, updates), optax.apply_updates(v, turns), (moved, own)

    w = network()
    v = {path: jnp.asarray(BESIDE[name](leaf)) for path, leaf in leaves_by_path(w).items() if path in MASKED}
    return step, w, v, (inner.init(w), OWN.init(v))


def rest(name, w, v):
    """The weights to use and what of them lives, by the papers, with numpy."""
    w, v = np.asarray(w, np.float64), np.asarray(v, np.float64)
    if name == "soft_threshold":
        shrunk = np.sign(w) * np.maximum(abs(w) - sigmoid(v), 0)
        return shrunk, shrunk != 0
    if name == "l0":
        z = np.clip(sigmoid(v) * 1.2 - 0.1, 0, 1)
        return w * z, z > 0
    alive = v - np.log(w**2 + 1e-8) <= 3
    return w * alive, alive


@pytest.mark.parametrize("optimizer", mostly_slow(OPTIMIZERS, "momentum"))
@pytest.mark.parametrize("name", METHODS)
def test_it_is_the_training_of_the_composed_loss(name, optimizer):
    """Under the same noise; what that is, other tests tell."""
    tx = METHODS[name](OPTIMIZERS[optimizer])
    step, state, params, died = stepper(tx), tx.init(network()), None, 0
    plain, w, v, states = composed(name, OPTIMIZERS[optimizer])
    for t in range(7):
        ramp = np.float32(np.clip((t - 1) / 3, 0, 1) if name == "variational_dropout" else 1)
        before = {path: (leaves_by_path(w)[path], v[path]) for path in MASKED}
        seen, w, v, states = plain(w, v, states, state.memory["noise"], batch_of(t), ramp)
        params = seen if params is None else params
        shown, settled, masks = (leaves_by_path(x) for x in (params, pj.settle(params, state), state.masks))
        assert sorted(masks) == sorted(MASKED)
        for path, leaf in leaves_by_path(seen).items():
            np.testing.assert_allclose(shown[path], leaf, rtol=1e-4, atol=1e-5)
            if path not in masks:
                np.testing.assert_array_equal(settled[path], shown[path])
                continue
            expected, alive = rest(name, *before[path])
            np.testing.assert_array_equal(masks[path], alive)
            np.testing.assert_array_equal(np.asarray(settled[path])[~alive], 0)
            np.testing.assert_allclose(settled[path], expected, rtol=1e-4, atol=1e-5)
            died += int((~alive).sum())
        params, state = step(params, state, batch_of(t))
    assert 0 < died < 64 * 7


def quiet(name, leaf, **options):
    """The parameters after one step in which w does not move, nor v unless `options` say how, and the state."""
    still = optax.sgd(0.0)
    make = {"l0": pj.l0, "variational_dropout": pj.variational_dropout}[name]
    tx = make(still, key=KEY, **{"optimizer": still, **options})

    @jax.jit
    def once(params):
        updates, state = tx.update({"w": jnp.zeros_like(leaf)}, tx.init(params), params)
        return optax.apply_updates(params, updates)["w"], state

    return once({"w": leaf})


def test_hard_concrete_gates_live_as_often_as_their_formula_says():
    drop, n = 0.7, 40_000
    gates, state = quiet("l0", jnp.ones((200, 200)), l0=0.0, drop=drop)
    gates, log_alpha = np.asarray(gates), math.log(0.3 / 0.7)
    assert 0 <= gates.min() < gates.max() <= 1
    for bound, share in ((0.1 / 1.2, np.mean(gates > 0)), (1.1 / 1.2, np.mean(gates == 1))):
        expected = 1 - sigmoid(2 / 3 * math.log(bound / (1 - bound)) - log_alpha)  # 1 - CDF of the binary concrete
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / n)
    np.testing.assert_allclose(pj.settle({"w": gates}, state)["w"], 1.2 * 0.3 - 0.1, rtol=1e-5)


def test_the_expected_number_of_living_weights_falls_by_its_slope():
    _, state = quiet("l0", jnp.ones((2, 3)), l0=0.5, drop=0.7, optimizer=optax.sgd(1.0))
    start = math.log(0.3 / 0.7)
    alive = sigmoid(start - 2 / 3 * math.log(0.1 / 1.1))
    np.testing.assert_allclose(state.memory["log_alpha"]["w"], start - 0.5 * alive * (1 - alive), rtol=1e-5)


def test_the_noise_of_variational_dropout_has_its_variance():
    seen, _ = quiet("variational_dropout", jnp.ones((200, 200)), examples=1, start=-2.0)
    assert abs(np.mean(seen) - 1) < 4 * math.exp(-1) / 200
    assert abs(np.var(seen) / math.exp(-2) - 1) < 4 * math.sqrt(2 / 40_000)


def test_the_divergence_is_that_from_the_log_uniform_prior():
    """Its slope by log alpha, against KL = E log|e| - log(alpha) / 2 + c, e ~ N(1, alpha), summed over a fine grid."""
    log_alphas = np.array([-6.0, -3.0, -1.0, 0.0, 1.0, 2.0, 4.0])
    n = np.linspace(-8, 8, 400_001)
    density = np.exp(-(n**2) / 2) / math.sqrt(2 * math.pi) * (n[1] - n[0])

    def divergence(log_alpha):
        return np.sum(density * np.log(np.abs(1 + math.exp(log_alpha / 2) * n) + 1e-12)) - log_alpha / 2

    slopes = [(divergence(a + 0.05) - divergence(a - 0.05)) / 0.1 for a in log_alphas]
    w = jnp.asarray(np.exp((-2.0 - log_alphas) / 2), jnp.float32)[None]  # log alpha = -2 - log w^2
    own = {"optimizer": optax.sgd(1.0), "start": -2.0, "examples": 4, "weight": 4.0}
    _, state = quiet("variational_dropout", w, **own)
    np.testing.assert_allclose(-2.0 - np.asarray(state.memory["log_variance"]["w"])[0], slopes, atol=0.02)
    np.testing.assert_array_equal(np.asarray(state.masks["w"])[0], log_alphas <= 3)


def test_soft_thresholds_and_their_slopes_by_hand():
    """One step of gradient descent with rates 1 on w = [0.9, -0.6, 0.2], at a threshold of one half."""
    tx = pj.soft_threshold(optax.sgd(1.0), decay=0.25, start=0.0, optimizer=optax.sgd(1.0))
    params, g = {"w": jnp.array([[0.9, -0.6, 0.2]])}, np.array([0.1, 0.2, 0.4])
    update = jax.jit(tx.update)
    updates, state = update({"w": jnp.asarray(g, jnp.float32)[None]}, tx.init(params), params)
    w, s = np.array([0.9 - 0.1, -0.6 - 0.2, 0.2]), (0.1 - 0.2) * 0.25  # the dead rest; sigmoid' is a quarter
    seen = np.sign(w) * np.maximum(abs(w) - sigmoid(s), 0)
    np.testing.assert_allclose(optax.apply_updates(params, updates)["w"][0], seen, rtol=1e-5)
    assert state.masks["w"].tolist() == [[True, True, False]]
    _, state = update({"w": jnp.zeros((1, 3))}, state, params)
    np.testing.assert_allclose(state.memory["threshold"]["w"], s - 0.25 * s, rtol=1e-5)  # the decay


def test_noise_is_drawn_anew_for_each_step_and_leaf_and_by_the_key():
    params = {"a": jnp.ones((3, 3)), "b": jnp.ones((3, 3))}
    draws = set()
    txs = [pj.l0(optax.sgd(0.0), l0=0.0, key=jax.random.key(key)) for key in (0, 1)]
    update = jax.jit(txs[0].update)  # the key is state
    for tx in txs:
        state = tx.init(params)
        for _ in range(2):
            _, state = update(params, state, params)
            draws |= {leaf.tobytes() for leaf in map(np.asarray, state.memory["noise"].values())}
    assert len(draws) == 8


@pytest.mark.parametrize("name", mostly_slow(METHODS, "l0"))
def test_it_compiles_once_and_goes_on_from_any_step(name):
    check_goes_on(METHODS[name](optax.adam(1e-2)))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_jit_is_eager(name):
    tx = METHODS[name](optax.adam(1e-2))
    for (a, s), (b, z) in zip(trajectory(tx, 4), trajectory(tx, 4, jit=False), strict=True):
        for x, y in zip(jax.tree.leaves((a, s.memory)), jax.tree.leaves((b, z.memory)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_low_precision_weights_are_those_of_the_gates_rounded_once():
    leaf = jnp.ones((20, 20))
    wide, _ = quiet("l0", leaf, l0=0.0, drop=0.7)
    low, state = quiet("l0", leaf.astype(jnp.bfloat16), l0=0.0, drop=0.7)
    assert low.dtype == pj.settle({"w": low}, state)["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(low, np.asarray(wide).astype(jnp.bfloat16))


def test_settle_leaves_the_weights_of_other_methods_alone():
    params = network()
    for tx in (pj.masked(OWN, None), pj.proximal_l1(OWN, l1=1.0, learning_rate=1.0), METHODS["soft_threshold"](OWN)):
        assert pj.settle(params, tx.init(params)) is params
    with pytest.raises(UserMistake, match=r"settle needs the state of a training method; in a chain .* state\[-1\]"):
        pj.settle(params, optax.chain(optax.clip(1.0), METHODS["l0"](OWN)).init(params))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda tx: pj.soft_threshold(tx, decay=-1), "decay = -1: must be at least 0"),
        (lambda tx: pj.l0(tx, l0=-1, key=KEY), "l0 = -1: must be at least 0"),
        (lambda tx: pj.l0(tx, l0=1, key=KEY, drop=1), "drop = 1: must be above 0 and below 1"),
        (lambda tx: pj.variational_dropout(tx, examples=0, key=KEY), "examples = 0: must be at least 1, the size of"),
        (lambda tx: pj.variational_dropout(tx, examples=9, key=KEY, begin=2, end=1), "begin = 2, end = 1: 0 <= begin"),
        (lambda tx: pj.variational_dropout(tx, examples=9, key=KEY, weight=-1), "weight = -1: must be at least 0"),
    ],
)
def test_mistakes_are_named(build, message):
    with pytest.raises(UserMistake, match=message):
        build(optax.sgd(1.0))
