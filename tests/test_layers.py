"""Residual branches: found where they are, taken away whole, and nothing else with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import prune_jax as pj
from prune_jax.compaction import trace
from prune_jax.errors import UserMistake
from tests.test_compaction import check, close, floats, half, scalar, traced, weights_like
from tests.zoo import ZOO, Make

make = Make()


def branch(width=4, hidden=6, names="ud"):
    return {names[0]: make(width, hidden), names[1]: make(hidden, width)}


def mlp(p, x, names="ud"):
    return jnp.tanh(x @ p[names[0]]) @ p[names[1]]


def chain(p, x):
    x = x @ p["in"]
    for name in ("a", "b"):
        x = x + mlp(p[name], x)
    return x @ p["out"]


CHAIN = {"in": make(3, 4), "a": branch(), "b": branch(), "out": make(4, 2)}


def reversed_operands(p, x):
    x = x @ p["in"]
    return (mlp(p["a"], x) + x) @ p["out"]


def in_parallel(p, x):
    x = x @ p["in"]
    normed = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * p["scale"][None]
    return (x + mlp(p["a"], normed) + mlp(p["b"], normed)) @ p["out"]


def one_in_the_other(p, x):
    x = x @ p["in"]
    inner = jnp.tanh(x @ p["a"]["u"])
    inner = inner + mlp(p["b"], inner)
    return (x + inner @ p["a"]["d"]) @ p["out"]


def shared_by_all(p, x):
    x = x @ p["in"]
    for _ in range(3):
        x = x + mlp(p["a"], x)
    return x @ p["out"]


def under_jit_and_checkpoint(p, x):
    x = x @ p["in"]
    block = jax.checkpoint(lambda q, h: h + mlp(q, h))
    x = block(p["a"], x)
    return jax.jit(lambda q, h: h + mlp(q, h))(p["b"], x) @ p["out"]


def gated_by_a_number(p, x):
    x = x @ p["in"]
    return (x + p["gate"] * mlp(p["a"], x)) @ p["out"]


def with_numbers_of_places(p, x):
    x = x @ p["in"]
    return (x + mlp(p["a"], x * jnp.arange(4.0)[None])) @ p["out"]


def in_two_types(p, x):
    x = (x @ p["in"]).astype(jnp.bfloat16)
    inner = mlp(jax.tree.map(lambda w: w.astype(jnp.bfloat16), p["a"]), x)
    return (x.astype(jnp.float32) + inner.astype(jnp.float32)) @ p["out"]


def with_a_bias_in_common(p, x):
    x = x @ p["in"]
    x = x + mlp(p["a"], x + p["bias"][None])
    x = x + mlp(p["b"], x + p["bias"][None])
    return x @ p["out"]


ENDS = {"in": make(3, 4), "out": make(4, 2)}


def with_a_scale_that_passes_by(p, x):
    x = x @ p["in"] * p["bias"][None]
    return (x + mlp(p["a"], x)) @ p["out"]


NETWORKS = {  # the function, its parameters, and what its layers hold
    "chain": (chain, CHAIN, {"a.layer": "a/d a/u", "b.layer": "b/d b/u"}),
    "reversed operands": (reversed_operands, {**ENDS, "a": branch()}, {"a.layer": "a/d a/u"}),
    "in parallel": (
        in_parallel,
        {**CHAIN, "scale": make(4)},
        {"a.layer": "a/d a/u", "b.layer": "b/d b/u"},
    ),
    "one in the other": (
        one_in_the_other,
        {**ENDS, "a": branch(4, 6), "b": branch(6, 5)},
        {"b.layer": "b/d b/u", "a.layer": "a/d a/u b/d b/u"},
    ),
    "shared by all": (shared_by_all, {**ENDS, "a": branch()}, {"a.layer": "a/d a/u"}),
    "under jit and checkpoint": (
        under_jit_and_checkpoint,
        CHAIN,
        {"a.layer": "a/d a/u", "b.layer": "b/d b/u"},
    ),
    "gated by a number": (gated_by_a_number, {**ENDS, "a": branch(), "gate": jnp.float32(0.7)}, {"a.layer": "a/d a/u"}),
    "with numbers of places": (with_numbers_of_places, {**ENDS, "a": branch()}, {"a.layer": "a/d a/u"}),
    "in two types": (in_two_types, {**ENDS, "a": branch()}, {"a.layer": "a/d a/u"}),
    "with a scale that passes by": (
        with_a_scale_that_passes_by,
        {**ENDS, "a": branch(), "bias": make(4)},
        {"a.layer": "a/d a/u"},
    ),
    "with a bias in common": (
        with_a_bias_in_common,
        {**CHAIN, "bias": make(4)},
        {"a.layer": "a/d a/u", "b.layer": "b/d b/u"},
    ),
}
X = make(5, 3)


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_are_those_that_the_network_has(name):
    apply, params, expected = NETWORKS[name]
    net = trace(apply, params, X)
    found = {layer: " ".join(path for path, _, _ in group.members) for layer, group in net.layers.items()}
    assert found == expected
    assert {(group.kind, group.size) for group in net.layers.values()} == {("layer", 1)}
    assert not net.layers.keys() & net.groups.keys()


QUICK = ("chain", "in parallel", "one in the other")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS])
def test_a_network_without_a_layer_computes_what_the_masked_one_computes(name):
    apply, params, layers = NETWORKS[name]
    net = trace(apply, params, X)
    tolerance = 1e-2 if name == "in two types" else 1e-5
    for dead in [*({layer: [0]} for layer in layers), {key: [0] for key in layers}]:
        masks, small = net.masks(dead), net.compact(dead)
        masked = pj.apply_masks(params, masks)
        gone = {path for layer in dead for path in layers[layer].split()}
        for path, leaf in pj.trees.leaves_by_path(small.params).items():
            assert leaf.size == (0 if path in gone else pj.trees.leaves_by_path(params)[path].size), path
        for x in (X, make(2, 3)):
            close(small.apply(small.params, x), apply(masked, x), tolerance)
        weights = weights_like(apply(params, X))
        slopes = jax.grad(lambda p, s=small, w=weights: scalar(s.apply(p, X), w))(small.params)
        expected = jax.grad(lambda p, m=masks, w=weights: scalar(apply(pj.apply_masks(p, m), X), w))(params)
        close(floats(slopes), floats(small.slice(expected)), 10 * tolerance, 1e-3)
        assert net.dead_in(masks).items() >= dead.items()


def positions_are_added(p, x):
    return (x @ p["in"] + p["pos"][None]) @ p["out"]


def a_shortcut_with_weights_of_its_own(p, x):
    x = x @ p["in"]
    return (x @ p["short"] + mlp(p["a"], x)) @ p["out"]


def what_is_left_would_not_be_zero(p, x):
    x = x @ p["in"]
    return (x + jax.nn.sigmoid(mlp(p["a"], x))) @ p["out"]


def read_elsewhere_too(p, x):
    h = x @ p["in"]
    return (h + mlp(p["a"], h)) @ p["out"], x @ p["in"] @ p["a"]["u"] @ p["a"]["d"]


def an_output_of_its_own(p, x):
    x = x @ p["in"]
    inner = mlp(p["a"], x)
    return (x + inner) @ p["out"], inner


def divided_by_its_own_length(p, x):
    x = x @ p["in"]
    inner = mlp(p["a"], x)
    return (x + inner * lax.rsqrt(jnp.mean(inner * inner, -1, keepdims=True))) @ p["out"]


def multiplied(p, x):
    x = x @ p["in"]
    return (x * mlp(p["a"], x)) @ p["out"]


def stacked_and_scanned(p, x):
    return lax.scan(lambda h, q: (h + mlp(q, h), None), x @ p["in"], p["a"])[0] @ p["out"]


NONE = {
    "positions are added": (positions_are_added, {**ENDS, "pos": make(4)}),
    "a shortcut with weights of its own": (
        a_shortcut_with_weights_of_its_own,
        {**ENDS, "a": branch(), "short": make(4, 4)},
    ),
    "what is left would not be zero": (what_is_left_would_not_be_zero, {**ENDS, "a": branch()}),
    "read elsewhere too": (read_elsewhere_too, {**ENDS, "a": branch()}),
    "an output of its own": (an_output_of_its_own, {**ENDS, "a": branch()}),
    "divided by its own length": (divided_by_its_own_length, {**ENDS, "a": branch()}),
    "multiplied": (multiplied, {**ENDS, "a": branch()}),
    "stacked and scanned": (
        stacked_and_scanned,
        {**ENDS, "a": {"u": make(2, 4, 6), "d": make(2, 6, 4)}},
    ),
}


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_residual_branch_is_no_layer(name):
    apply, params = NONE[name]
    net = trace(apply, params, X)
    assert not net.layers
    with pytest.raises(UserMistake, match="has no residual branch"):
        net.choose(params, sparsity=0.5, kinds="layer")


BRANCHY = [
    *("residual", "swiglu_with_rms_norm", "inverted_residual", "batch_norm_as_it_trains", "transformer_of_linen"),
    *("mlp_mixer", "mixture_of_experts", "convnext_block"),
]


@pytest.mark.parametrize("name", BRANCHY)
def test_layers_of_the_zoo_die_beside_halves_of_groups(name):
    net = traced(name)[3]
    assert net.layers
    check(name, {key: [0] for key in net.layers}, slopes=False)
    check(name, half(net, np.random.default_rng(0)) | {key: [0] for key in list(net.layers)[:1]}, slopes=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_each_layer_of_the_zoo_can_die(name):
    net = traced(name)[3]
    for layer in net.layers:
        check(name, {layer: [0]})


class Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train):
        y = nn.Conv(self.width, (3, 3), use_bias=False)(x)
        y = nn.relu(nn.BatchNorm(use_running_average=not train)(y))
        y = nn.BatchNorm(use_running_average=not train)(nn.Conv(self.width, (3, 3), use_bias=False)(y))
        if y.shape != x.shape:
            x = nn.Conv(self.width, (1, 1))(x)
        return nn.relu(x + y)


class Resnet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        for width in (4, 4, 6, 6):
            x = Block(width)(x, train)
        return nn.Dense(2)(x.mean((1, 2)))


def test_a_cut_made_where_a_network_rests_serves_where_it_trains():
    model, x = Resnet(), make(2, 6, 6, 4)
    variables = make.like(jax.eval_shape(model.init, jax.random.key(0), x))

    def training(v, x):
        return model.apply(v, x, train=True, mutable=["batch_stats"])

    net = trace(model.apply, variables, x)
    assert list(net.layers) == ["params/Block_0.layer", "params/Block_1.layer", "params/Block_3.layer"]
    assert list(trace(training, variables, x).layers) == list(net.layers)
    dead = {"params/Block_1.layer": [0], "params/Block_2/Conv_0.out": [1, 3]}
    small, masked = net.compact(dead), pj.apply_masks(variables, net.masks(dead))
    close(small.apply(small.params, x), model.apply(masked, x), 1e-5)
    outputs, state = small.of(training)(small.params, x)
    expected, new_state = training(masked, x)
    close(outputs, expected, 1e-5)
    close(state, small.slice(new_state), 1e-5)
    assert state["batch_stats"]["Block_1"]["BatchNorm_0"]["mean"].shape == (0,)


def test_a_norm_before_a_branch_dies_with_it_in_both_modes():
    class Branch(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            y = nn.BatchNorm(use_running_average=not train)(x)
            return nn.Dense(2)(x + nn.Dense(x.shape[-1])(nn.relu(nn.Dense(5)(y))))

    model, x = Branch(), make(3, 4)
    variables = make.like(jax.eval_shape(model.init, jax.random.key(0), x))

    def both(v, x):
        return model.apply(v, x, train=True, mutable=["batch_stats"]), model.apply(v, x)

    net = trace(both, variables, x)
    (layer,) = net.layers.values()
    assert {path.split("/", 2)[1] for path, _, _ in layer.members} == {"BatchNorm_0", "Dense_1", "Dense_2"}
    assert {path for path, _, _ in layer.members} >= {"batch_stats/BatchNorm_0/mean", "params/BatchNorm_0/scale"}
    masks = net.masks({layer.name: [0]})
    masks["batch_stats"] = jax.tree.map(jnp.ones_like, masks["batch_stats"])  # a masked network that trains fills them
    assert net.dead_in(masks) == {layer.name: [0]}
    small = net.compact({layer.name: [0]})
    close(small.of(model.apply)(small.params, x), model.apply(pj.apply_masks(variables, masks), x), 1e-5)


def test_layers_compete_by_their_scores_as_they_are():
    scores = jax.tree.map(jnp.ones_like, CHAIN)
    scores["a"] = jax.tree.map(lambda s: 3 * s, scores["a"])
    net = trace(chain, CHAIN, X)
    assert net.choose(scores, sparsity=0.5, kinds="layer") == {"b.layer": [0]}
    assert net.choose({"a.layer": [1.0], "b.layer": [2.0]}, sparsity=0.5, kinds=["layer"]) == {"a.layer": [0]}
    assert net.choose(scores, params=0.7, kinds="layer") == {"b.layer": [0]}
    assert net.choose(scores, sparsity=0.99, kinds="layer") == {"a.layer": [0], "b.layer": [0]}
    assert net.choose(scores, sparsity=0.5, kinds="layer", dead={"a.layer": [0]}) == {"a.layer": [0]}


def test_mistakes_are_told():
    net = trace(chain, CHAIN, X)
    with pytest.raises(UserMistake, match=r"group 'a.layr' is unknown; did you mean 'a.layer'\?"):
        net.compact({"a.layr": [0]})
    with pytest.raises(UserMistake, match=r"group 'a.layer' has no unit 1: it has 1, numbered from 0."):
        net.masks({"a.layer": [1]})


def test_another_function_that_reads_a_dead_layer_elsewhere_is_refused():
    net = trace(chain, CHAIN, X)
    small = net.compact({"a.layer": [0]})
    with pytest.raises(UserMistake, match="has no index left but is read beyond the residual branch"):
        small.of(lambda p, x: mlp(p["a"], x @ p["in"]) @ p["out"])(small.params, X)
