"""Every network of the zoo: its groups are the true ones, and without them it computes what it computes masked."""

from contextlib import suppress
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import prune_jax as pj
from prune_jax.compaction import trace
from prune_jax.errors import UserMistake
from prune_jax.trees import leaves_by_path
from tests.compiling import compilations
from tests.sparing import sparing
from tests.zoo import ZOO, Make

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile soon


every_network = pytest.mark.parametrize("name", ZOO)


@cache
def traced(name):
    entry = ZOO[name]
    apply, params, inputs = entry.build(Make(), entry.batch)
    return apply, params, inputs, trace(apply, params, *inputs)


QUICK = ["mlp", "residual", "batch_norm_as_it_trains", "group_norm_of_linen", "attention_fused_and_split", "gru_of_nnx"]
SLOPES = {
    *("mlp", "a_derivative_that_its_author_chose", "straight_through_rounding", "checkpointed_blocks", "fori_loop"),
    *("batch_norm_as_it_trains", "divided_by_the_largest_channel", "layer_norm_by_hand", "attention_of_jax_nn"),
    *("recurrent_by_scan", "scan_over_stacked_layers", "one_of_two_branches", "calls_in_calls", "dropout"),
}  # the others' are compared among the slow tests


def some(rng, size, count):
    return sorted(rng.choice(size, count, replace=False).tolist())


def half(net, rng):
    return {name: some(rng, group.size, group.size // 2) for name, group in net.groups.items() if group.size > 1}


def masks_by_hand(net, dead):
    """Zeros wherever `members` says that a dead unit is."""
    masks = {path: np.ones(np.shape(leaf), bool) for path, leaf in leaves_by_path(net.params).items()}
    for name, units in dead.items():
        for path, axis, indices in {**net.groups, **net.layers}[name].members:
            masks[path][(slice(None),) * axis + (np.ravel(indices[units]),)] = False
    return masks


def close(found, expected, tolerance, floor=0.0):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(leaves_by_path(found).items(), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        scale = max(np.abs(b).max(initial=0), floor)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale + 1e-30, err_msg=path)


def weights_like(outputs):
    """Numbers by which outputs are told apart when they are summed."""
    return jax.tree.map(lambda o: jnp.cos(jnp.arange(o.size, dtype=jnp.float32)).reshape(o.shape), outputs)


def scalar(outputs, weights):
    parts = zip(jax.tree.leaves(outputs), jax.tree.leaves(weights), strict=True)
    return sum(jnp.sum(jnp.sin(o.astype(jnp.float32)) * w) for o, w in parts if jnp.issubdtype(o.dtype, jnp.floating))


def with_slopes(apply):
    """Outputs of `apply`, and the gradients of a scalar made of them."""

    def function(params, weights, *inputs):
        def loss(p):
            outputs = apply(p, *inputs)
            return scalar(outputs, weights), outputs

        return jax.grad(loss, has_aux=True, allow_int=True)(params)[::-1]

    return function


def floats(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def check(name, dead, *more_inputs, slopes=True):
    """Masked and compact agree, for the inputs of the trace or for each of `more_inputs`: outputs, slopes and sizes."""
    entry, (apply, params, first, net) = ZOO[name], traced(name)
    by_hand = masks_by_hand(net, dead)
    masks = net.masks(dead)
    for path, mask in leaves_by_path(masks).items():
        np.testing.assert_array_equal(mask, by_hand[path], err_msg=path)

    def both(params, inputs):
        small = net.compact(dead, params)
        keep.update(small.keep)

        def sliced(outputs):
            return small.slice(outputs) if entry.mirrors else outputs

        def masked(p, *x):
            return sliced(apply(pj.apply_masks(p, masks), *x))

        if not slopes:
            return small.params, small.apply(small.params, *inputs), masked(params, *inputs)
        weights = weights_like(jax.eval_shape(apply, params, *inputs))
        weights = sliced(weights)
        found = with_slopes(small.apply)(small.params, weights, *inputs)
        outputs, slopes_of_whole = with_slopes(masked)(params, weights, *inputs)
        return small.params, found, (outputs, small.slice(slopes_of_whole))

    for inputs in more_inputs or (first,):
        keep = {}
        small_params, found, expected = jax.jit(both, compiler_options=FAST)(params, inputs)
        for path, leaf in leaves_by_path(small_params).items():
            alive = np.zeros(by_hand[path].shape, bool)
            alive[np.ix_(*keep[path])] = True
            assert leaf.shape == tuple(len(kept) for kept in keep[path]), path
            np.testing.assert_array_equal(alive, by_hand[path], err_msg=path)
        close(found[0] if slopes else found, expected[0] if slopes else expected, entry.tolerance)
        if slopes:
            largest = max((np.abs(leaf).max(initial=0) for leaf in floats(expected[1])), default=0)
            assert np.isfinite(largest)
            close(floats(found[1]), floats(expected[1]), 10 * entry.tolerance, 1e-2 * largest)


@every_network
def test_groups_are_those_that_the_network_has(name):
    found = {}
    for group in traced(name)[3].groups.values():
        members = frozenset(f"{path}:{axis}" for path, axis, _ in group.members)
        found[members] = (*found.get(members, ()), group.size)
    expected = {
        frozenset(members.split()): size if isinstance(size, tuple) else (size,)
        for members, size in ZOO[name].groups.items()
    }
    assert {members: tuple(sorted(sizes)) for members, sizes in found.items()} == expected


HALVED_WHEN_NAMED = {name for i, name in enumerate(ZOO) if i % 4} - SLOPES  # most of the zoo, to save time


@pytest.mark.parametrize("name", sparing(ZOO, HALVED_WHEN_NAMED))
def test_half_of_every_group(name):
    check(name, half(traced(name)[3], np.random.default_rng(1)), slopes=name in SLOPES)


@pytest.mark.slow
@every_network
def test_slopes_without_half_of_every_group(name):
    check(name, half(traced(name)[3], np.random.default_rng(2)))


@pytest.mark.slow
@every_network
def test_half_of_one_group_at_a_time(name):
    net, rng = traced(name)[3], np.random.default_rng(3)
    for group, units in half(net, rng).items():
        check(name, {group: units}, slopes=False)


@pytest.mark.slow
@every_network
def test_all_but_one_unit_of_every_group(name):
    net, rng = traced(name)[3], np.random.default_rng(4)
    dead = {group.name: some(rng, group.size, group.size - 1) for group in net.groups.values()}
    with suppress(UserMistake):  # groups that share an axis may empty it together
        net.compact(dead)
        check(name, dead, slopes=False)


@pytest.mark.slow
@every_network
def test_one_unit_of_one_group(name):
    net, rng = traced(name)[3], np.random.default_rng(5)
    for group in net.groups.values():
        if group.size > 1:
            check(name, {group.name: some(rng, group.size, 1)}, slopes=False)


@pytest.mark.slow
@every_network
def test_another_batch_size(name):
    entry, net = ZOO[name], traced(name)[3]
    if entry.other is None:
        pytest.skip("it has one batch size only")
    check(name, half(net, np.random.default_rng(6)), entry.build(Make(), entry.other)[2], slopes=False)


@pytest.mark.slow
@every_network
def test_vmap_over_inputs(name):
    entry, (apply, params, inputs, net) = ZOO[name], traced(name)
    dead = half(net, np.random.default_rng(7))
    masks, small = net.masks(dead), net.compact(dead)
    several = jax.tree.map(lambda x: jnp.stack([x, x[::-1] if x.ndim else x]), inputs)
    over = (None, *(0 for _ in inputs))
    mapped = jax.jit(jax.vmap(apply, over), compiler_options=FAST)
    if name == "ragged_experts":  # JAX cannot map it whole
        with pytest.raises(NotImplementedError):
            mapped(pj.apply_masks(params, masks), *several)
        return
    expected = mapped(pj.apply_masks(params, masks), *several)
    found = jax.jit(jax.vmap(small.apply, over), compiler_options=FAST)(small.params, *several)
    for one in range(2):
        expected_one = jax.tree.map(lambda x, i=one: x[i], expected)
        expected_one = small.slice(expected_one) if entry.mirrors else expected_one
        close(jax.tree.map(lambda x, i=one: x[i], found), expected_one, entry.tolerance)


@pytest.mark.parametrize("name", QUICK)
def test_shapes_are_enough(name):
    entry, net = ZOO[name], traced(name)[3]
    apply, params, inputs = entry.build(Make(), entry.batch)
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, inputs))
    other = trace(apply, structs[0], *structs[1])
    assert [(g.name, g.kind, g.size) for g in other.groups.values()] == [
        (g.name, g.kind, g.size) for g in net.groups.values()
    ]
    dead = half(net, np.random.default_rng(8))
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), net.compact(dead).params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), other.compact(dead).params) == shapes


@pytest.mark.parametrize("name", QUICK)
def test_nothing_dead_is_the_identity(name):
    apply, params, inputs, net = traced(name)
    small = net.compact({})
    assert all(mask.all() for mask in jax.tree.leaves(net.masks({})))
    jax.tree.map(np.testing.assert_array_equal, small.params, params)
    close(small.apply(small.params, *inputs), apply(params, *inputs), 1e-6)
    for empty in net.groups:
        assert jax.tree.map(jnp.shape, net.compact({empty: []}).params) == jax.tree.map(jnp.shape, params)


def test_mistakes_are_told():
    net = traced("residual")[3]
    (first,) = (name for name, group in net.groups.items() if group.size == 8)
    for made in (net.masks, net.compact):
        with pytest.raises(
            UserMistake, match=rf"group '{first}x' is unknown; did you mean '{first}'\? \(groups: .*{first}"
        ):
            made({first + "x": [0]})
        with pytest.raises(UserMistake, match=rf"group '{first}' has no unit 8: it has 8, numbered from 0\."):
            made({first: [1, 8]})
        with pytest.raises(UserMistake, match=rf"group '{first}' has no unit -1: it has 8, numbered from 0\."):
            made({first: [-1]})
        with pytest.raises(UserMistake, match=rf"all 8 units of group '{first}' are dead: .* Keep one or more\."):
            made({first: range(8)})


def test_groups_that_share_an_axis_may_not_empty_it_together():
    net = traced("uneven_split")[3]
    sizes = {name: group.size for name, group in net.groups.items()}
    small = net.compact({name: range(size - 1) for name, size in sizes.items()})
    assert small.params["a"].shape == (3, 2)


def test_units_may_be_named_twice_and_in_any_order():
    net = traced("mlp")[3]
    (name,) = net.groups
    shapes = [jax.tree.map(jnp.shape, net.compact({name: units}).params) for units in ([4, 1], (1, 4, 1), {4, 1})]
    assert shapes[0] == shapes[1] == shapes[2]


def test_an_optimizers_state_is_sliced_like_the_parameters():
    apply, params, inputs, net = traced("residual")
    optimizer = optax.adam(1e-2)
    dead = half(net, np.random.default_rng(9))
    masks, small = net.masks(dead), net.compact(dead)
    weights = weights_like(apply(params, *inputs))
    masked = pj.masked(optimizer, masks)
    whole, pruned = pj.apply_masks(params, masks), small.params
    states = masked.init(whole), optimizer.init(pruned)
    for _ in range(3):
        slopes = with_slopes(apply)(whole, weights, *inputs)[1], with_slopes(small.apply)(pruned, weights, *inputs)[1]
        steps = masked.update(slopes[0], states[0], whole), optimizer.update(slopes[1], states[1], pruned)
        whole, pruned = optax.apply_updates(whole, steps[0][0]), optax.apply_updates(pruned, steps[1][0])
        states = steps[0][1], steps[1][1]
    close(pruned, small.slice(whole), 1e-4)
    close(states[1], small.slice(states[0].inner), 1e-4)


def test_a_second_call_compiles_nothing():
    _, _, inputs, net = traced("mlp")
    small = net.compact(half(net, np.random.default_rng(10)))
    small.apply(small.params, *inputs)
    with compilations() as seconds:
        small.apply(small.params, *inputs)
        small.apply(jax.tree.map(lambda w: w, small.params), *inputs)
    assert not seconds


def test_the_table_names_groups_and_reasons():
    text = repr(traced("residual")[3])
    assert all(name in text for name in traced("residual")[3].groups)
    assert "it meets an input's axis" in text
    assert "it meets an output's axis" in text
    assert "primitive 'lu' has no rule (lu, " in repr(traced("linear_algebra")[3])


def test_a_loop_whose_length_is_computed_ties_its_carry():
    make = Make()
    params = {"a": make(5, 6), "r": make(6, 6), "o": make(6, 3)}
    x = make(4, 5)

    def apply(p, x):
        def turn(carry):
            return carry[0] + 1, jnp.tanh(carry[1] @ p["r"])

        steps = jnp.where(x.sum() > 100, 1, 3)  # no number that a trace knows: it stays a while loop
        return jax.lax.while_loop(lambda carry: carry[0] < steps, turn, (0, jnp.tanh(x @ p["a"])))[1] @ p["o"]

    net = trace(apply, params, x)
    ((name, group),) = net.groups.items()
    assert {(path, axis) for path, axis, _ in group.members} == {("a", 1), ("r", 0), ("r", 1), ("o", 0)}
    small = net.compact({name: [1, 4]})
    masked = pj.apply_masks(params, net.masks({name: [1, 4]}))
    close(small.apply(small.params, x), apply(masked, x), 1e-5)
    tangents = jax.tree.map(jnp.ones_like, params)  # a while loop has no backward pass
    slope = jax.jvp(lambda p: apply(pj.apply_masks(p, net.masks({name: [1, 4]})), x), (params,), (tangents,))[1]
    found = jax.jvp(lambda p: small.apply(p, x), (small.params,), (small.slice(tangents),))[1]
    close(found, slope, 1e-5)
