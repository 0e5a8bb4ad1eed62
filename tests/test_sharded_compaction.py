"""Compaction of functions on several devices, and a drawing of their groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import prune_jax as pj


@pytest.fixture
def mesh():
    return jax.make_mesh((2,), ("m",), axis_types=(AxisType.Auto,))


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    shapes = {"a": (6, 8), "b": (8,), "c": (8, 3)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


X = jnp.asarray(np.random.default_rng(1).normal(size=(4, 6)), jnp.float32)


def on_shards(mesh):
    def apply(p, x):
        def shard(a, b, c, x):
            return jax.lax.psum(jnp.tanh(x @ a + b[None]) @ c, "m")

        specs = (P(None, "m"), P("m"), P("m", None), P())
        return jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=P())(p["a"], p["b"], p["c"], x)

    return apply


def constrained(mesh):
    def apply(p, x):
        hidden = jax.nn.relu(x @ p["a"] + p["b"][None])
        return jax.lax.with_sharding_constraint(hidden, NamedSharding(mesh, P(None, "m"))) @ p["c"]

    return apply


@pytest.mark.parametrize(("build", "units", "dead"), [(on_shards, 4, [1, 3]), (constrained, 8, [0, 5, 6])])
def test_a_function_on_shards_is_compacted(mesh, params, build, units, dead):
    apply = build(mesh)
    net = pj.trace(apply, params, X)
    assert [(group.name, group.size) for group in net.groups.values()] == [("a.out", units)]
    small = net.compact({"a.out": dead})
    masked = pj.apply_masks(params, net.masks({"a.out": dead}))
    np.testing.assert_allclose(small.apply(small.params, X), apply(masked, X), rtol=1e-5, atol=1e-6)
    assert small.params["a"].shape == (6, 8 - 8 // units * len(dead))


def test_a_compact_network_takes_sharded_parameters(mesh, params):
    net = pj.trace(lambda p, x: jax.nn.relu(x @ p["a"] + p["b"][None]) @ p["c"], params, X)
    small = net.compact({"a.out": [0, 3, 4, 6]})
    specs = {"a": P(None, "m"), "b": P("m"), "c": P("m", None)}
    spread = {name: jax.device_put(leaf, NamedSharding(mesh, specs[name])) for name, leaf in small.params.items()}
    np.testing.assert_allclose(small.apply(spread, X), small.apply(small.params, X), rtol=1e-5)


def test_a_drawing_shows_each_group_from_what_writes_to_what_reads(params):
    net = pj.trace(lambda p, x: jax.nn.relu(x @ p["a"] + p["b"][None]) @ p["c"], params, X)
    drawing = net.to_dot()
    assert drawing.startswith("digraph")
    assert '"a" -> "c"' in drawing
    assert "a.out (neuron, 8)" in drawing
    assert drawing.count("{") == drawing.count("}")
