import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prune_jax.errors import UserMistake
from prune_jax.masks import apply_masks
from prune_jax.sparse_training import MaskedState, masked
from prune_jax.sparse_training.bits import in_bits
from tests.compiling import compilations

LABELS = {"hidden": {"kernel": "a", "bias": "b"}, "out": {"kernel": "b"}}
OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "nadam": optax.nadam(1e-2),
    "lion": optax.lion(1e-2, weight_decay=0.1),
    "rmsprop": optax.rmsprop(1e-2, momentum=0.9, centered=True),
    "adagrad": optax.adagrad(1e-2, initial_accumulator_value=0.0),
    "lamb": optax.lamb(1e-2, weight_decay=0.1),
    "l2 before adam": optax.chain(optax.add_decayed_weights(0.1), optax.adam(1e-2)),
    "clip, then adam": optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2)),
    "schedule": optax.adam(optax.cosine_decay_schedule(1e-2, 10)),
    "multi_transform": optax.multi_transform({"a": optax.adamw(1e-2), "b": optax.sgd(0.1, momentum=0.9)}, LABELS),
    "noise": optax.chain(optax.sgd(0.1), optax.add_noise(0.1, 0.5, jax.random.key(0))),
}


def loss(params, batch):
    h = jnp.tanh(batch["x"] @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    return jnp.mean(jnp.square(h @ params["out"]["kernel"] - batch["y"]))


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {"hidden": {"kernel": draw(5, 8), "bias": draw(8)}, "out": {"kernel": draw(8, 3)}}


@pytest.fixture
def masks():
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.random(shape) < 0.4)  # noqa: E731
    return {"hidden": {"kernel": draw(5, 8), "bias": None}, "out": {"kernel": draw(8, 3)}}


@pytest.fixture
def batch():
    rng = np.random.default_rng(2)
    return {"x": rng.standard_normal((16, 5)).astype(np.float32), "y": rng.standard_normal((16, 3)).astype(np.float32)}


def make_step(tx, batch, gradients_of=loss):
    @jax.jit
    def step(params, state):
        gradients = jax.grad(gradients_of)(params, batch)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def train(tx, params, step):
    state = tx.init(params)
    for _ in range(4):
        params, state = step(params, state)
    return params, state


def dead_of(array, masks):
    """The entries of a weight or a moment at the pruned places of the leaf of its shape."""
    by_shape = {m.shape: np.asarray(m) for m in jax.tree.leaves(masks)}
    return np.asarray(array)[~by_shape[array.shape]] if array.shape in by_shape else np.zeros(0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_and_their_moments_are_exactly_zero(name, params, masks, batch):
    tx = masked(OPTIMIZERS[name], masks)
    step = make_step(tx, batch)
    for start in (params, apply_masks(params, masks)):
        trained, state = train(tx, start, step)
        for leaf in jax.tree.leaves((trained, state.inner)):
            if hasattr(leaf, "shape") and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                np.testing.assert_array_equal(dead_of(leaf, masks), 0)
        assert jax.tree.structure(state.masks) == jax.tree.structure(masks)


@pytest.mark.parametrize("name", ["momentum", "adamw", "lion", "rmsprop", "l2 before adam", "multi_transform"])
def test_survivors_train_as_in_the_network_without_the_pruned_weights(name, params, masks, batch):
    """The oracle: a dense optimizer on a loss in which pruned weights are multiplied away."""

    def without(params, batch):
        return loss(apply_masks(params, masks), batch)

    zeroed = apply_masks(params, masks)
    dense, sparse = OPTIMIZERS[name], masked(OPTIMIZERS[name], masks)
    wanted, _ = train(dense, zeroed, make_step(dense, batch, without))
    found, _ = train(sparse, zeroed, make_step(sparse, batch))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_full_masks_change_nothing(params, batch):
    full = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
    dense, sparse = optax.adam(1e-2), masked(optax.adam(1e-2), full)
    wanted, _ = train(dense, params, make_step(dense, batch))
    found, _ = train(sparse, params, make_step(sparse, batch))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)  # XLA fuses them differently


def test_masks_in_the_state_are_replaced_without_compiling(params, masks, batch):
    step = make_step(masked(optax.sgd(0.1), None), batch)  # the transformation itself need not know them
    state = MaskedState(masks, optax.sgd(0.1).init(params))
    params, state = step(params, state)
    flipped = jax.device_put(jax.tree.map(lambda m: np.roll(np.asarray(m), 1), masks))
    with compilations() as seconds:
        params, state = step(params, state._replace(masks=flipped))
    assert not seconds
    np.testing.assert_array_equal(dead_of(params["hidden"]["kernel"], flipped), 0)


def test_buffers_may_be_donated(params, masks, batch):
    tx = masked(optax.adam(1e-2), masks)
    step = jax.jit(lambda p, s, g: tx.update(g, s, p), donate_argnums=1)
    gradients = jax.grad(loss)(params, batch)
    state = jax.tree.map(jnp.array, tx.init(params))
    _, state = step(params, state, gradients)
    _, state = step(params, state, gradients)
    np.testing.assert_array_equal(state.masks["out"]["kernel"], masks["out"]["kernel"])


def test_low_precision_weights_end_at_zero(params, masks, batch):
    low = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    tx = masked(optax.adam(1e-2), masks)
    updates, _ = tx.update(jax.grad(loss)(low, batch), tx.init(low), low)
    trained = optax.apply_updates(low, updates)
    assert trained["out"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(dead_of(trained["out"]["kernel"], masks), 0)


def test_it_asks_for_the_weights(params, masks):
    tx = masked(optax.sgd(0.1), masks)
    with pytest.raises(UserMistake, match=r"masked needs the weights: call update\(gradients, state, params\)"):
        tx.update(params, tx.init(params))


@pytest.mark.parametrize(
    "shape", [(256, 300), (300, 260), (3, 3, 64, 128), (65_536,), (8, 16)], ids=lambda s: "x".join(map(str, s))
)
def test_masks_by_way_of_bits_are_the_same(shape):
    mask = jax.random.bernoulli(jax.random.key(0), 0.3, shape)
    np.testing.assert_array_equal(jax.jit(in_bits)({"w": mask})["w"], mask)


@pytest.mark.parametrize("axes", [("part", None), (None, "part")], ids=["rows", "columns"])
@pytest.mark.parametrize("shape", [(256, 300), (264, 300)], ids=["shards of eights", "shards across eights"])
def test_sharded_masks_by_way_of_bits_are_the_same(shape, axes):
    mesh = Mesh(np.array(jax.devices()[:2]), ("part",))
    mask = jax.random.bernoulli(jax.random.key(0), 0.3, shape)
    sharded = jax.device_put(mask, NamedSharding(mesh, PartitionSpec(*axes)))
    np.testing.assert_array_equal(jax.jit(in_bits)(sharded), mask)


def test_large_masks_are_read_as_bits_on_cpus():
    mask = jnp.ones((256, 300), bool)
    assert "ui8" in jax.jit(in_bits).lower(mask).as_text()
    assert "ui8" not in jax.jit(in_bits).trace(mask).lower(lowering_platforms=("cuda",)).as_text()
    assert "ui8" not in jax.jit(in_bits).lower(jnp.ones((300, 260), bool)).as_text()  # rows do not come in eights


def test_large_layers_train_alike_with_masks_as_bits_and_bytes(monkeypatch):
    w, g = jax.random.normal(jax.random.key(1), (2, 512, 160))
    mask = jnp.abs(w) > 1.5

    def trained():
        tx = masked(optax.adam(1e-2), {"w": mask})
        params, state = {"w": w}, tx.init({"w": w})
        for _ in range(3):
            updates, state = jax.jit(lambda *now: tx.update({"w": g}, *now))(state, params)
            params = optax.apply_updates(params, updates)
        return params["w"], state.inner[0].mu["w"], state.inner[0].nu["w"]

    found = trained()
    monkeypatch.setattr("prune_jax.sparse_training.bits.SMALL", 1 << 30)
    for a, b in zip(found, trained(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
        assert np.array_equal(np.asarray(a) != 0, np.asarray(mask))
