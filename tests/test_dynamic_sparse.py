"""Static, SET and RigL: masks by hand, density to the unit, growth where |g| is largest, zeros, one compilation."""

from itertools import pairwise

import jax
import numpy as np
import optax
import pytest

import prune_jax as pj
from prune_jax.allocation import allocate
from prune_jax.errors import UserMistake
from prune_jax.trees import leaves_by_path
from tests.sparse_steps import (
    OPTIMIZERS,
    alike,
    by_hand,
    check_goes_on,
    dead_are_zero,
    living,
    mostly_slow,
    network,
    trajectory,
    without_lowest,
)

KEY = jax.random.key(3)
OPTIONS = {"sparsity": 0.6, "key": KEY, "every": 2, "end": 7}  # at steps 2, 4, 6
MOVING = {"set": pj.sparse_evolution, "rigl": pj.rigl}


def leaves():
    return {path: w for path, w in leaves_by_path(network()).items() if w.ndim == 2}


def erk(sparsity=0.6):
    return {p.paths[0]: leaves()[p.paths[0]].size - p.prune for p in allocate(leaves(), scope="erk", sparsity=sparsity)}


def masks_of(state):
    return {path: np.asarray(mask) for path, mask in leaves_by_path(state.masks).items()}


def rigl_rule(t, masks, weights, gradients):
    """Evci et al. 2020, algorithm 1, with numpy."""
    if t not in (2, 4, 6):
        return masks
    found = {}
    for path, mask in masks.items():
        n = int(np.floor(0.3 / 2 * (1 + np.cos(np.pi * t / 7)) * mask.sum()))
        kept = without_lowest({path: abs(weights[path])}, mask.size - mask.sum() + n, masks)[path]
        grows = np.where(kept, np.inf, abs(gradients[path]))
        found[path] = without_lowest({path: grows}, mask.size - mask.sum())[path]
    return found


@pytest.mark.parametrize("name", mostly_slow(OPTIMIZERS, "momentum"))
def test_rigl_is_the_training_by_hand(name):
    found = trajectory(pj.rigl(OPTIMIZERS[name], **OPTIONS), 9)
    wanted = by_hand(OPTIMIZERS[name], rigl_rule, 9, masks_of(found[0][1]))
    alike(found, wanted)
    assert any((a[path] != b[path]).any() for (_, a), (_, b) in pairwise(wanted) for path in a)
    for params, state in found:
        dead_are_zero(params, state)
        assert living(state) == erk()


def test_rigl_grows_from_zero_where_the_gradient_is_largest():
    grew = 0
    for t, ((_, old), (after, new)) in enumerate(pairwise(trajectory(pj.rigl(optax.adam(1e-2), **OPTIONS), 8)), 1):
        for path, mask in masks_of(new).items():
            grown = mask & ~masks_of(old)[path]
            grew += grown.sum()
            assert t in (2, 4, 6) or not grown.any()
            np.testing.assert_array_equal(leaves_by_path(after)[path][grown], 0)
            np.testing.assert_array_equal(leaves_by_path(new.inner[0].nu)[path][grown], 0)
    assert grew


@pytest.mark.parametrize("name", mostly_slow(OPTIMIZERS, "adamw"))
def test_set_keeps_the_density_and_drops_the_least(name):
    found = trajectory(pj.sparse_evolution(OPTIMIZERS[name], **OPTIONS, drop=0.4), 9)
    masks = [masks_of(state) for _, state in found]
    alike(found, by_hand(OPTIMIZERS[name], lambda t, *_: masks[t], 9, masks[0]))  # the weights, given the masks
    for t, ((before, old), (params, state)) in enumerate(pairwise(found), 1):
        dead_are_zero(params, state)
        assert living(state) == erk()
        for path, mask in masks_of(state).items():
            was = masks_of(old)[path]
            gone = was & ~mask
            assert t in (2, 4, 6) or not gone.any()
            n = int(0.4 * was.sum())
            least = np.sort(abs(np.asarray(leaves_by_path(before)[path]))[was])[:n]
            assert np.isin(abs(np.asarray(leaves_by_path(before)[path]))[gone], least).all()
    assert (masks[1]["hidden/kernel"] != masks[2]["hidden/kernel"]).any()


def test_the_share_that_moves_may_fall():
    tx = pj.sparse_evolution(optax.adam(1e-2), sparsity=0.2, key=KEY, every=2, end=9, drop=0.9, falling=True)
    masks = [masks_of(state) for _, state in trajectory(tx, 9)]
    for t, (old, new) in enumerate(pairwise(masks), 1):
        for path, mask in new.items():
            most = int(0.9 / 2 * (1 + np.cos(np.pi * t / 9)) * mask.sum()) if t % 2 == 0 else 0
            assert (old[path] & ~mask).sum() <= most
    assert (masks[1]["hidden/kernel"] != masks[2]["hidden/kernel"]).any()


def test_static_is_masked():
    tx = pj.static(optax.adamw(1e-2), sparsity=0.6, key=KEY, scope="layer")
    found = trajectory(tx, 3)
    masks = tx.init(network()).masks
    wanted = trajectory(pj.masked(optax.adamw(1e-2), masks), 3)
    for (a, _), (b, _) in zip(found, wanted, strict=True):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6)
    assert living(found[-1][1]) == {"hidden/kernel": 16, "out/kernel": 24 - round(0.6 * 24)}


@pytest.mark.parametrize("name", MOVING)
def test_it_compiles_once_and_goes_on_from_any_step(name):
    check_goes_on(MOVING[name](optax.adam(1e-2), **OPTIONS))


@pytest.mark.slow
@pytest.mark.parametrize("name", MOVING)
def test_jit_is_eager(name):
    tx = MOVING[name](optax.adam(1e-2), **OPTIONS)
    for (a, s), (b, z) in zip(trajectory(tx, 4), trajectory(tx, 4, jit=False), strict=True):
        for x, y in zip(jax.tree.leaves((a, s.masks)), jax.tree.leaves((b, z.masks)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_other_keys_draw_other_masks():
    drawn = [
        masks_of(pj.static(optax.sgd(0.1), sparsity=0.6, key=jax.random.key(i)).init(network())) for i in (0, 0, 1)
    ]
    np.testing.assert_array_equal(drawn[0]["hidden/kernel"], drawn[1]["hidden/kernel"])
    assert (drawn[0]["hidden/kernel"] != drawn[2]["hidden/kernel"]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "global"}, r"scope 'global' is not possible: each layer keeps its density \(allowed: layer, erk\)"),
        ({"every": 7}, "every = 7, end = 7: every must be at least 1, and end after it, or nothing moves"),
        ({"drop": 1.0}, "drop = 1.0: must be above 0 and below 1"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserMistake, match=message):
        pj.rigl(optax.sgd(0.1), **{**OPTIONS, **options})
