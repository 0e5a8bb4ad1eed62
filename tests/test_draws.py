"""Random numbers by place: any part alike, uniform, and of one another and of their keys independent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prune_jax.draws import Draws, places
from prune_jax.selection import all_but_lowest

SHAPE = (512, 1024)


def drawn(seed, shape=SHAPE):
    return np.asarray(Draws.of(jax.random.key(seed), shape).astype(jnp.float32))


def ranks(numbers):
    return numbers.view(np.uint32).astype(float) / 2**30


@pytest.mark.parametrize("shape", [(7,), (5, 9), (3, 4, 5, 6), (300, 1000)], ids=lambda s: "x".join(map(str, s)))
def test_a_part_is_what_the_whole_has_there(shape):
    draws, whole = Draws.of(jax.random.key(1), shape), drawn(1, shape)
    assert whole.shape == shape
    assert np.all((whole >= 0) & (whole < 2))
    np.testing.assert_array_equal(draws.at(jnp.arange(draws.size)), whole.ravel())
    np.testing.assert_array_equal(draws.part(lambda a: jnp.ravel(a)[2:6]), whole.ravel()[2:6])
    np.testing.assert_array_equal(places(shape), np.arange(draws.size).reshape(shape))


def test_numbers_are_those_of_the_paper():
    """pcg3d by hand, in whole numbers of any size."""
    word = 2**32
    words = [int(n) for n in Draws.of(jax.random.key(1), SHAPE).words]

    def wanted(place):
        x, y, z = ((n * 1664525 + 1013904223) % word for n in (place + words[0] * 1025, *words))
        for last in (False, True):
            x = (x + y * z) % word
            y = (y + z * x) % word
            z = (z + x * y) % word
            if not last:
                x, y, z = (n ^ n >> 16 for n in (x, y, z))
        return z >> 2

    found = drawn(1).view(np.uint32).ravel()
    assert [int(found[i]) for i in (0, 1, 1024, 524_287)] == [wanted(i) for i in (0, 1, 1024, 524_287)]


def test_numbers_are_uniform_and_neighbours_and_keys_tell_nothing():
    found = np.stack([ranks(drawn(seed)) for seed in range(8)])
    counts = np.stack([np.histogram(f, 256, (0, 1))[0] for f in found])
    chi = ((counts - found[0].size / 256) ** 2 / (found[0].size / 256)).sum(axis=1)  # 255 degrees: 255 +- 22.6
    assert np.all(abs(chi - 255) < 5 * 22.6)
    centred, least = found - 0.5, 5 / np.sqrt(found[0].size)
    for axis, lag in ((0, 1), (0, 2), (0, 64), (1, 1), (1, 2), (1, 16), (1, 512)):
        ahead = np.roll(centred, -lag, axis + 1)
        assert np.all(abs((centred * ahead).mean(axis=(1, 2)) * 12) < least)
    assert abs((centred[0] * centred[1]).mean() * 12) < least  # of another key
    picked = found < 0.1
    for axis in (1, 2):  # as many in each row and column as chance has
        of = picked.sum(axis=axis)
        share = of.var() / (picked.shape[axis] * 0.1 * 0.9)
        assert abs(share - 1) < 5 * np.sqrt(2 / of.size)


@pytest.mark.parametrize("shape", [(40, 50), (700, 500), (512, 640)], ids=["joined", "in pages", "as it lies"])
def test_a_selection_among_draws_is_that_among_their_numbers(shape):
    draws, tier = Draws.of(jax.random.key(5), shape), jax.random.bernoulli(jax.random.key(6), 0.5, shape)
    numbers = draws.astype(jnp.float32)
    for tiers in ([None], [tier], [tier.astype(jnp.int8) + 1]):
        for k in (0, 17, draws.size // 3, draws.size - 1):
            (found,) = all_but_lowest([draws], tiers, k, magnitude=True)
            (wanted,) = all_but_lowest([numbers], tiers, k, magnitude=True)
            np.testing.assert_array_equal(found, wanted)
            assert int(found.sum()) == draws.size - k
