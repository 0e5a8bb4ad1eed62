"""The k lowest of several arrays, without sorting them.

Floats are ordered as their bit patterns are, so the k-th smallest is an integer, found by counting. XLA sorts on CPU
a hundred times slower than it counts. A sample brackets the answer; a few passes over all values pin it down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Leaves = Sequence[jax.Array]
Tiers = Sequence[jax.Array | None]
Flat = Sequence[tuple[jax.Array, jax.Array | None]]  # one-dimensional values and their tiers

TOP = jnp.iinfo(jnp.uint32).max
FIRST = 1  # the key of what goes before every score
LAST = TOP  # the key of what goes after every score
LANES = 16  # eight-bit sums of so many comparisons; XLA would write the comparisons of a plain sum to memory
STRIDE = 127  # one value in so many is sampled; a prime, lest a sample see one column of a matrix
LARGE = 1 << 16  # fewer values are not worth a sample
PAGE = 4096
COMPARED = 16  # in groups of so many each is compared with each, twenty times faster than sorting fours on a CPU
SMALL = 1 << 18  # leaves of fewer values are laid end to end, lest each costs a tenth of a second to compile for


class Cut(NamedTuple):
    """Where the k lowest end: keys below `key` are among them, and the first `ties` of those equal to it."""

    key: jax.Array  # [] uint32
    ties: jax.Array  # [] int32
    whole: jax.Array  # [] bool: all those equal to the key are among them


def _keys(values: jax.Array, tier: jax.Array | None) -> jax.Array:
    """Unsigned integers in the order of the values; 0.0 and -0.0 are equal, subnormals are not zero."""
    bits = lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    bits = jnp.where(bits == -1, 0, bits)
    keys = lax.bitcast_convert_type(bits, jnp.uint32) ^ jnp.uint32(1 << 31)
    if tier is None:
        return keys
    keys = jnp.where(tier == 0, jnp.uint32(FIRST), keys)
    return keys if tier.dtype == bool else jnp.where(tier == 2, jnp.uint32(LAST), keys)


def _at_most(values: jax.Array, tier: jax.Array | None, key: jax.Array) -> jax.Array:
    """`_keys(values, tier) <= key`, in one comparison; `key` is at least `FIRST` and less than `LAST`."""
    bits = lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    positive = key >= jnp.uint32(1 << 31)
    flip = jnp.where(positive, jnp.uint32(1 << 31), jnp.uint32(TOP))
    bound = jnp.where(positive, key, jnp.minimum(key, jnp.uint32((1 << 31) - 2)))  # -0.0 is not negative
    hits = (bits ^ flip) <= bound
    if tier is None:
        return hits
    hits = hits | (tier == 0)
    return hits if tier.dtype == bool else hits & (tier != 2)


def _runs(sizes: Sequence[int]) -> list[list[int]]:
    """Neighbours that are small together, by their numbers; a large leaf stands alone."""
    runs: list[list[int]] = []
    for i, size in enumerate(sizes):
        if runs and sum(sizes[j] for j in runs[-1]) + size <= SMALL:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def _tier(leaf: jax.Array, tier: jax.Array | None) -> jax.Array:
    return jnp.ones(leaf.shape, bool) if tier is None else tier


@jax.jit
def _join(leaves: Leaves, tiers: Tiers) -> Flat:
    """Large leaves as they are; small ones in arrays of few different lengths, filled up with what never goes."""
    flat: list[tuple[jax.Array, jax.Array | None]] = []
    for run in _runs([leaf.size for leaf in leaves]):
        size = sum(leaves[i].size for i in run)
        if size > SMALL:
            leaf, tier = leaves[run[0]], tiers[run[0]]
            flat.append((jnp.ravel(leaf), None if tier is None else jnp.ravel(tier)))
            continue
        room = (0, max(PAGE, 1 << (size - 1).bit_length()) - size)
        values = jnp.concatenate([jnp.ravel(leaves[i]).astype(jnp.float32) for i in run])
        known = jnp.concatenate([jnp.ravel(_tier(leaves[i], tiers[i])) for i in run])
        flat.append((jnp.pad(values, room, constant_values=jnp.inf), jnp.pad(known, room, constant_values=1)))
    return flat


@partial(jax.jit, static_argnums=1)
def _split(flat: Leaves, shapes: tuple[tuple[int, ...], ...]) -> tuple[jax.Array, ...]:
    """Undoes `_join`."""
    sizes = [math.prod(shape) for shape in shapes]
    leaves = []
    for joined, run in zip(flat, _runs(sizes), strict=True):
        start = 0
        for i in run:
            leaves.append(joined[start : start + sizes[i]].reshape(shapes[i]))
            start += sizes[i]
    return tuple(leaves)


def _total(hits: Callable[[slice], jax.Array], size: int) -> jax.Array:
    even = size - size % LANES
    lanes = jnp.sum(hits(slice(0, even)).astype(jnp.int8).reshape(-1, LANES), axis=1, dtype=jnp.int8)
    return jnp.sum(lanes, dtype=jnp.int32) + jnp.sum(hits(slice(even, size)), dtype=jnp.int32)


def _count(flat: Flat, key: jax.Array) -> jax.Array:
    """How many keys are at most `key`."""

    def of(values: jax.Array, tier: jax.Array | None) -> jax.Array:
        return _total(lambda s: _at_most(values[s], None if tier is None else tier[s], key), values.size)

    return sum((of(*pair) for pair in flat), jnp.int32(0))


def _bracket(flat: Flat, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys that hold the k-th smallest between them, unless the sample deceives."""
    size = sum(values.size for values, _ in flat)
    if size < LARGE:
        return jnp.uint32(0), jnp.uint32(TOP)
    sample = jnp.concatenate([_keys(v[::STRIDE], None if t is None else t[::STRIDE]) for v, t in flat])
    share = k.astype(jnp.float32) / size
    margin = 3 * jnp.sqrt(sample.size * share * (1 - share)) + 3
    return _bisect(sample, share * sample.size - margin) - 1, _bisect(sample, share * sample.size + margin)


def _bisect(keys: jax.Array, rank: jax.Array) -> jax.Array:
    """The smallest key that at least `rank` of a few keys do not exceed."""

    def halve(_: int, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bracket
        middle = low + (high - low) // 2
        enough = _total(lambda s: keys[s] <= middle, keys.size) >= rank
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    return lax.fori_loop(0, 32, halve, (jnp.uint32(0), jnp.uint32(TOP)))[1]


def _cut(flat: Flat, k: jax.Array) -> Cut:
    size = sum(values.size for values, _ in flat)
    bracket = _bracket(flat, k)

    def unsettled(state: tuple) -> jax.Array:
        low, high, _, at_high, _ = state
        return (high - low > 1) & (at_high != k)

    def narrow(state: tuple) -> tuple:
        low, high, at_low, at_high, turn = state
        share = (k - at_low).astype(jnp.float32) / jnp.maximum(at_high - at_low, 1).astype(jnp.float32)
        share = jnp.where(turn % 2 == 0, 0.5, share)  # ties make interpolation crawl
        step = (share * (high - low).astype(jnp.float32)).astype(jnp.uint32)
        middle = jnp.where(turn == 0, bracket[0], jnp.where(turn == 1, bracket[1], low + step))
        middle = jnp.clip(middle, low + 1, high - 1)
        at_middle = _count(*lax.optimization_barrier((flat, middle)))  # else the loop copies all bits in front
        enough = at_middle >= k
        low, at_low = jnp.where(enough, low, middle), jnp.where(enough, at_low, at_middle)
        high, at_high = jnp.where(enough, middle, high), jnp.where(enough, at_middle, at_high)
        return low, high, at_low, at_high, turn + 1

    start = (jnp.uint32(0), jnp.uint32(TOP), jnp.int32(0), jnp.int32(size), jnp.int32(0))
    _, key, at_low, at_high, _ = lax.while_loop(unsettled, narrow, start)
    return Cut(key, k - at_low, at_high == k)


def _end_of_ties(tied: jax.Array, ties: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The position before which the first `ties` true values lie, and how many of them are to come after the end."""
    pages = jnp.pad(tied, (0, PAGE - tied.size % PAGE)).reshape(-1, PAGE)
    lanes = jnp.sum(pages.astype(jnp.int8).reshape(-1, LANES), axis=1, dtype=jnp.int8)
    ends = jnp.cumsum(jnp.sum(lanes.reshape(-1, PAGE // LANES), axis=1, dtype=jnp.int32))
    quota = jnp.minimum(ties, ends[-1])
    page = jnp.sum(ends < quota, dtype=jnp.int32)
    before = jnp.where(page == 0, 0, ends[page - 1])
    inside = jnp.sum(jnp.cumsum(pages[page].astype(jnp.int32)) < quota - before, dtype=jnp.int32)
    return jnp.where(quota == 0, 0, page * PAGE + inside + 1), ties - quota


def all_but_lowest(leaves: Leaves, tiers: Tiers, k: jax.Array | int) -> tuple[jax.Array, ...]:
    """Marks all values but the k lowest of all leaves together; of equal ones the first go.

    The same as `np.argsort(kind="stable")[:k]` over the leaves laid end to end, in about ten reads of memory.

    Args:
        leaves: arrays of any shapes, finite; at most 2**31 - 1 values in all.
        tiers: for each leaf None, or an array of its shape: 0 goes before every score, 1 goes by its score (so a bool
            array of what is alive will do) and, in integers, 2 goes after every score.
        k: how many go; may be traced. One compilation serves a whole schedule.

    Returns:
        Bool arrays shaped like the leaves; False for the k lowest.

    >>> all_but_lowest([jnp.array([3.0, 1.0]), jnp.array([2.0])], [None, None], 2)
    (Array([ True, False], dtype=bool), Array([False], dtype=bool))
    """
    survivors = _all_but_lowest(_join(leaves, tiers), jnp.asarray(k, jnp.int32))
    return _split(survivors, tuple(leaf.shape for leaf in leaves))


@jax.jit
def _all_but_lowest(flat: Flat, k: jax.Array) -> list[jax.Array]:
    cut = _cut(flat, k)

    def positions() -> tuple[jax.Array, ...]:
        ends, ties = [], cut.ties
        for values, tier in flat:
            end, ties = _end_of_ties(_keys(values, tier) == cut.key, ties)
            ends.append(end)
        return tuple(ends)

    ends = lax.cond(cut.whole, lambda: tuple(jnp.int32(values.size) for values, _ in flat), positions)
    masks = []
    for (values, tier), end in zip(flat, ends, strict=True):
        keys = _keys(values, tier)
        masks.append((keys > cut.key) | ((keys == cut.key) & (jnp.arange(keys.size, dtype=jnp.int32) >= end)))
    return masks


@partial(jax.jit, static_argnums=(2, 3))
def n_of_m(values: jax.Array, tier: jax.Array | None, n: int, m: int) -> jax.Array:
    """Marks the n highest of each m values that follow one another along the last axis but one.

    Of equal ones the first go. Where m does not divide the axis, the last group is shorter: at most n of it are marked.

    Args:
        values: array `[.., in, out]`, finite.
        tier: None, or a bool array of its shape: what is False goes first, but may be marked for want of others.
        n: how many are marked of each group.
        m: how many values are a group.

    Returns:
        Bool array shaped like `values`.

    >>> n_of_m(jnp.array([[1.0], [3.0], [3.0], [2.0], [5.0]]), None, 1, 2).ravel()
    Array([False,  True,  True, False,  True], dtype=bool)
    """
    *lead, size, out = values.shape
    room = [(0, 0)] * len(lead) + [(0, -size % m), (0, 0)]
    keys = jnp.pad(_keys(values, tier), room).reshape(*lead, -1, m, out)  # what is not there goes before all else
    if m <= COMPARED:
        lines = [keys[..., j, :] for j in range(m)]
        ranks = [
            sum((lines[j] <= lines[i] if j < i else lines[j] < lines[i]).astype(jnp.int8) for j in range(m) if j != i)
            for i in range(m)
        ]
        marked = jnp.stack(ranks, axis=-2) >= m - n
    else:
        last = lax.sort(keys, dimension=keys.ndim - 2)[..., m - n - 1 : m - n, :]  # the highest key that goes
        below, tied = keys < last, keys == last
        ties = m - n - jnp.sum(below, axis=-2, keepdims=True, dtype=jnp.int32)
        marked = ~(below | (tied & (jnp.cumsum(tied, axis=-2, dtype=jnp.int32) <= ties)))
    return marked.reshape(*lead, -1, out)[..., :size, :]


def kth_smallest(leaves: Leaves, tiers: Tiers, k: jax.Array | int) -> jax.Array:
    """The k-th smallest value (from 1) of all leaves together, counting only values of tier 1."""
    return _kth_smallest(_join(leaves, tiers), jnp.asarray(k, jnp.int32))


@jax.jit
def _kth_smallest(flat: Flat, k: jax.Array) -> jax.Array:
    key = _cut(flat, k + _count(flat, jnp.uint32(FIRST))).key
    found = jnp.uint32(0)
    for values, tier in flat:
        keys = _keys(values, tier)
        found = jnp.maximum(found, jnp.max(jnp.where(keys <= key, keys, 0), initial=0))
    bits = lax.bitcast_convert_type(found ^ jnp.uint32(1 << 31), jnp.int32)
    return lax.bitcast_convert_type(bits ^ ((bits >> 31) & 0x7FFFFFFF), jnp.float32)


def count_below(leaves: Leaves, tiers: Tiers, value: jax.Array | float) -> jax.Array:
    """How many values lie below `value`; all those of tier 0 do."""
    return _count_below(_join(leaves, tiers), jnp.asarray(value, jnp.float32))


@jax.jit
def _count_below(flat: Flat, value: jax.Array) -> jax.Array:
    return _count(flat, _keys(value, None) - 1)


@jax.jit
def shares(values: jax.Array) -> jax.Array:
    """Of each value, its square as a share of the squares that are left when it is the next to go.

    s_i = v_i^2 / sum_(j >= i) v_j^2, over all values in ascending order, equals by position (Lee et al. 2021,
    arXiv:2010.07611). The order stays, the last one's share is 1, and shares of different arrays can be compared. What
    is below 1e-19 of the largest value has the share 0.

    Args:
        values: array of any shape, >= 0 and finite.

    Returns:
        float32 array shaped like `values`, in [0, 1]; all 0 where all values are.

    >>> shares(jnp.array([2.0, 1.0, 0.0, 2.0]))
    Array([0.5       , 0.11111111, 0.        , 1.        ], dtype=float32)
    """
    flat = jnp.ravel(values).astype(jnp.float32)
    order = jnp.argsort(flat)  # stable
    largest = jnp.max(flat, initial=0)
    squares = jnp.square(flat[order] / jnp.where(largest > 0, largest, 1))
    left = lax.cumsum(squares, reverse=True)
    ascending = lax.cummax(squares / jnp.where(left > 0, left, 1))  # rounding must not turn neighbours round
    return jnp.zeros_like(flat).at[order].set(ascending, unique_indices=True).reshape(values.shape)
