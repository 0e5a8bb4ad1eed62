"""A tiny network, optimizers around it, and training methods replayed by hand: numpy and the bare optimizer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prune_jax.trees import leaves_by_path
from tests.compiling import compilations

LABELS = {"hidden": {"kernel": "a", "bias": "b"}, "out": {"kernel": "b"}}
OPTIMIZERS = {
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "lion": optax.lion(1e-2, weight_decay=0.1),
    "clip, decay, adam": optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.add_decayed_weights(0.1),
        optax.adam(optax.cosine_decay_schedule(1e-2, 10)),
    ),
    "multi_transform": optax.multi_transform({"a": optax.adamw(1e-2), "b": optax.sgd(0.1, momentum=0.9)}, LABELS),
    "MultiSteps": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
}


def loss(params, batch):
    h = jnp.tanh(batch["x"] @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    return jnp.mean(jnp.square(h @ params["out"]["kernel"] - batch["y"]))


def network():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {"hidden": {"kernel": draw(5, 8), "bias": draw(8)}, "out": {"kernel": draw(8, 3)}}


def batch_of(step):
    rng = np.random.default_rng([2, step])
    return {"x": rng.standard_normal((16, 5)).astype(np.float32), "y": rng.standard_normal((16, 3)).astype(np.float32)}


def stepper(tx, *, jit=True, donate=False):
    def step(params, state, batch):
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1) if donate else ()) if jit else step


def trajectory(tx, steps, *, jit=True, start=None):
    """The weights and the state after each step."""
    step, params = stepper(tx, jit=jit), start or network()
    state, found = tx.init(params), []
    for t in range(steps):
        params, state = step(params, state, batch_of(t))
        found.append((params, state))
    return found


def by_hand(inner, rule, steps, masks):
    """The weights and the masks after each step, as dicts of numpy arrays.

    `rule(t, masks, weights, gradients)` answers new masks; then the bare optimizer steps with the weights that lived
    before and live on, and sees zeros elsewhere.
    """
    tree = network()
    structure = jax.tree.structure(tree)
    weights = {path: np.array(w) for path, w in leaves_by_path(tree).items()}
    shapes = {m.shape: path for path, m in masks.items()}

    def grow(values):
        return jax.tree.unflatten(structure, [jnp.asarray(v) for v in values.values()])

    def kill(leaf, masks):
        path = shapes.get(np.shape(leaf))
        return leaf if path is None else jnp.where(masks[path], leaf, 0)

    state, found = inner.init(tree), []
    gradient, update = jax.jit(jax.grad(loss)), jax.jit(inner.update)
    for t in range(steps):
        g = {path: np.array(leaf) for path, leaf in leaves_by_path(gradient(grow(weights), batch_of(t))).items()}
        for path, mask in masks.items():
            weights[path] = np.where(mask, weights[path], 0).astype(np.float32)
        before, masks = masks, rule(t, masks, weights, g)
        steady = {path: before[path] & mask for path, mask in masks.items()}
        state = jax.tree.map(lambda leaf, steady=steady: kill(leaf, steady), state)
        for path, mask in steady.items():
            g[path] = np.where(mask, g[path], 0)
            weights[path] = np.where(mask, weights[path], 0)
        updates, state = update(grow(g), state, grow(weights))
        weights = {path: weights[path] + np.array(u) for path, u in leaves_by_path(updates).items()}
        for path, mask in steady.items():
            weights[path] = np.where(mask, weights[path], 0).astype(np.float32)
        found.append((dict(weights), dict(masks)))
    return found


def without_lowest(scores, dead, alive=None):
    """Masks of all but so many lowest; what is not alive goes first, and of equal ones the first."""
    flat = np.concatenate([np.asarray(s, np.float64).ravel() for s in scores.values()])
    if alive is not None:
        flat[~np.concatenate([alive[path].ravel() for path in scores])] = -np.inf
    mask = np.ones(flat.size, bool)
    mask[np.argsort(flat, kind="stable")[:dead]] = False
    parts = np.split(mask, np.cumsum([np.size(s) for s in scores.values()])[:-1])
    return {path: part.reshape(np.shape(s)) for part, (path, s) in zip(parts, scores.items(), strict=True)}


def alike(found, wanted):
    """Holds the weights and masks of two trainings against each other, step by step."""
    assert len(found) == len(wanted)
    for (params, state), (weights, masks) in zip(found, wanted, strict=True):
        for path, mask in leaves_by_path(state.masks).items():
            np.testing.assert_array_equal(mask, masks[path])
        for path, w in leaves_by_path(params).items():
            np.testing.assert_allclose(w, weights[path], rtol=2e-5, atol=2e-6)


def dead_are_zero(params, state):
    """Weights and, in every leaf shaped like one, moments are exactly zero where the mask says so."""
    by_shape = {m.shape: np.asarray(m) for m in leaves_by_path(state.masks).values()}
    for leaf in jax.tree.leaves((params, state.inner)):
        if np.shape(leaf) in by_shape:
            np.testing.assert_array_equal(np.asarray(leaf)[~by_shape[np.shape(leaf)]], 0)


def living(state):
    """How many weights of each masked leaf live."""
    return {path: int(mask.sum()) for path, mask in leaves_by_path(state.masks).items()}


def all_alive():
    return {path: np.ones(w.shape, bool) for path, w in leaves_by_path(network()).items() if w.ndim == 2}


def mostly_slow(names, *quick):
    """Parameters of a test of which only a few run by default."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def check_goes_on(tx):
    """A method's step compiles once, donates its buffers, and goes on from plain numpy arrays; a key is state."""
    step = stepper(tx, donate=True)

    def go(params, state, steps):
        for t in steps:
            params, state = step(params, state, jax.device_put(batch_of(t)))
        return params, state

    def held(tree):
        return jax.tree.map(np.array, tree)  # a copy: a view would keep a buffer from being donated

    params = network()
    state = tx.init(params)  # of the very weights that the step takes over
    begun = jax.device_put((params, state))
    start = go(*begun, range(1))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(begun[0]))
    with compilations() as seconds:
        half = held(go(*start, range(1, 4)))
        whole = held(go(*jax.device_put(half), range(4, 8)))
    assert not seconds
    resumed = go(*jax.device_put(half), range(4, 8))
    for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        assert np.asarray(a).tobytes() == b.tobytes()
