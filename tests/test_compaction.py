"""Every network of the zoo: its groups are the true ones, and without them it computes what it computes masked."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prune_jax as pj
from prune_jax.compaction import trace
from prune_jax.trees import leaves_by_path
from tests.zoo import ZOO, Make

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile soon


def every_network(why):
    """The names of all; those with a reason, by `why`, are known to fail."""
    marks = {e.name: [pytest.mark.xfail(strict=True, reason=why(e))] if why(e) else [] for e in ZOO.values()}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks[name]) for name in ZOO])


@cache
def traced(name):
    entry = ZOO[name]
    apply, params, inputs = entry.build(Make(), entry.batch)
    return apply, params, inputs, trace(apply, params, *inputs)


def some(rng, size, count):
    return sorted(rng.choice(size, count, replace=False).tolist())


def half(net, rng):
    return {name: some(rng, group.size, group.size // 2) for name, group in net.groups.items() if group.size > 1}


def masks_by_hand(net, dead):
    """Zeros wherever `members` says that a dead unit is."""
    masks = {path: np.ones(np.shape(leaf), bool) for path, leaf in leaves_by_path(net.params).items()}
    for name, units in dead.items():
        for path, axis, indices in net.groups[name].members:
            masks[path][(slice(None),) * axis + (np.ravel(indices[units]),)] = False
    return masks


def close(found, expected, tolerance, floor=0.0):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(leaves_by_path(found).items(), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype, path
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


def check(name, dead, inputs=None, slopes=True):
    """Masked and compact agree: outputs, slopes and sizes."""
    entry, (apply, params, first, net) = ZOO[name], traced(name)
    inputs = first if inputs is None else inputs
    masks, small = net.masks(dead), net.compact(dead)
    by_hand = masks_by_hand(net, dead)
    for path, mask in leaves_by_path(masks).items():
        np.testing.assert_array_equal(mask, by_hand[path], err_msg=path)
    for path, leaf in leaves_by_path(small.params).items():
        kept = small.keep[path]
        alive = np.zeros(by_hand[path].shape, bool)
        alive[np.ix_(*kept)] = True
        assert leaf.shape == tuple(len(k) for k in kept), path
        np.testing.assert_array_equal(alive, by_hand[path], err_msg=path)

    def masked(p, *x):
        return apply(pj.apply_masks(p, masks), *x)

    if not slopes:
        found = jax.jit(small.apply, compiler_options=FAST)(small.params, *inputs)
        expected = jax.jit(masked, compiler_options=FAST)(params, *inputs)
        close(found, small.slice(expected), entry.tolerance)
        return
    weights = weights_like(jax.eval_shape(apply, params, *inputs))
    expected, slopes_of_whole = jax.jit(with_slopes(masked), compiler_options=FAST)(params, weights, *inputs)
    found, slopes_of_small = jax.jit(with_slopes(small.apply), compiler_options=FAST)(
        small.params, small.slice(weights), *inputs
    )
    close(found, small.slice(expected), entry.tolerance)
    largest = max((np.abs(leaf).max(initial=0) for leaf in floats(slopes_of_whole)), default=0)
    assert np.isfinite(largest)
    close(floats(slopes_of_small), floats(small.slice(slopes_of_whole)), 10 * entry.tolerance, 1e-2 * largest)


@every_network(lambda entry: entry.missed)
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


@every_network(lambda entry: entry.wrong)
def test_half_of_every_group(name):
    check(name, half(traced(name)[3], np.random.default_rng(1)))
