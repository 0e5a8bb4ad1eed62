"""The k lowest of several arrays, without sorting them.

Floats are ordered as their bit patterns are, so the k-th smallest is an integer, found by counting. XLA sorts on CPU
a hundred times slower than it counts. A sample brackets the answer; a few passes over all values pin it down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Leaves = Sequence[jax.Array]
Tiers = Sequence[jax.Array | None]

TOP = jnp.iinfo(jnp.uint32).max
FIRST = 1  # the key of what goes before every score
LAST = TOP  # the key of what goes after every score
LANES = 16  # sums of so many comparisons; XLA would write the comparisons of a plain sum to memory
HALF = 1 << 15  # two sums that are less fit in one number
INTERPOLATED = 6  # from so many passes on, ties or a strange distribution are at work, and bits are cut in thirds
STRIDES = (127, 509, 2039)  # one value in so many is sampled; primes, lest a sample see one column of a matrix
SAMPLED = 1 << 16  # more values make a finer sample than any pass needs
LARGE = 1 << 16  # fewer values are not worth a sample
PAGE = 4096
COMPARED = 16  # in groups of so many each is compared with each, twenty times faster than sorting fours on a CPU
SMALL = 1 << 18  # leaves of fewer values are laid end to end, lest each costs a tenth of a second to compile for


@partial(jax.tree_util.register_dataclass, data_fields=("values", "tier"), meta_fields=("magnitude",))
@dataclass(frozen=True)
class Line:
    """Values that compete, their tiers, and whether they do so by their magnitudes."""

    values: jax.Array
    tier: jax.Array | None
    magnitude: bool = False

    def part(self, positions: slice) -> Line:
        """Those at some positions of the values laid end to end."""
        tier = None if self.tier is None else jnp.ravel(self.tier)[positions]
        return Line(jnp.ravel(self.values)[positions], tier, self.magnitude)

    def sample(self, stride: int) -> Line:
        """One in so many of the values laid end to end, picked where they lie: shards stay where they are."""
        places = jnp.unravel_index(jnp.arange(0, self.values.size, stride), self.values.shape)
        tier = None if self.tier is None else self.tier.at[places].get(mode="promise_in_bounds")
        return Line(self.values.at[places].get(mode="promise_in_bounds"), tier, self.magnitude)

    def page(self, start: jax.Array) -> Line:
        """The `PAGE` values from a position on."""
        tier = None if self.tier is None else lax.dynamic_slice_in_dim(jnp.ravel(self.tier), start, PAGE)
        return Line(lax.dynamic_slice_in_dim(jnp.ravel(self.values), start, PAGE), tier, self.magnitude)


Lines = Sequence[Line]


class Cut(NamedTuple):
    """Where the k lowest end: keys below `key` are among them, and the first `ties` of those equal to it."""

    key: jax.Array  # [] uint32
    ties: jax.Array  # [] int32
    whole: jax.Array  # [] bool: all those equal to the key are among them


def _keys(line: Line) -> jax.Array:
    """Unsigned integers in the order of the values; 0.0 and -0.0 are equal, subnormals are not zero."""
    bits = lax.bitcast_convert_type(line.values.astype(jnp.float32), jnp.int32)
    bits = bits & 0x7FFFFFFF if line.magnitude else bits ^ ((bits >> 31) & 0x7FFFFFFF)
    bits = jnp.where(bits == -1, 0, bits)
    keys = lax.bitcast_convert_type(bits, jnp.uint32) ^ jnp.uint32(1 << 31)
    if line.tier is None:
        return keys
    keys = jnp.where(line.tier == 0, jnp.uint32(FIRST), keys)
    return keys if line.tier.dtype == bool else jnp.where(line.tier == 2, jnp.uint32(LAST), keys)


def _at_most(line: Line, key: jax.Array) -> jax.Array:
    """`_keys(line) <= key`, in one comparison."""
    bits = lax.bitcast_convert_type(line.values.astype(jnp.float32), jnp.uint32)
    if line.magnitude:
        bits = bits & jnp.uint32((1 << 31) - 1)
    positive = key >= jnp.uint32(1 << 31)
    flip = jnp.where(positive, jnp.uint32(1 << 31), jnp.uint32(TOP))
    bound = jnp.where(positive, key, jnp.minimum(key, jnp.uint32((1 << 31) - 2)))  # -0.0 is not negative
    hits = (bits ^ flip) <= bound
    if line.tier is None:
        return hits
    hits = jnp.where(line.tier == 0, key >= jnp.uint32(FIRST), hits)
    return hits if line.tier.dtype == bool else jnp.where(line.tier == 2, key == jnp.uint32(LAST), hits)


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


def _join(leaves: Leaves, tiers: Tiers, magnitude: bool = False) -> Lines:
    """Large leaves as they are; small ones in lines of few different lengths, filled up with what never goes."""
    lines = []
    for run in _runs([leaf.size for leaf in leaves]):
        values, tier = leaves[run[0]], tiers[run[0]]
        if values.size <= SMALL:
            values, tier = _joined([leaves[i] for i in run], [tiers[i] for i in run])
        lines.append(Line(values, tier, magnitude))
    return lines


@jax.jit
def _joined(leaves: Leaves, tiers: Tiers) -> tuple[jax.Array, jax.Array]:
    size = sum(leaf.size for leaf in leaves)
    room = (0, max(PAGE, 1 << (size - 1).bit_length()) - size)
    values = jnp.concatenate([jnp.ravel(leaf).astype(jnp.float32) for leaf in leaves])
    known = jnp.concatenate([jnp.ravel(_tier(leaf, tier)) for leaf, tier in zip(leaves, tiers, strict=True)])
    return jnp.pad(values, room, constant_values=jnp.inf), jnp.pad(known, room, constant_values=1)


def _split(masks: Leaves, shapes: Sequence[tuple[int, ...]]) -> tuple[jax.Array, ...]:
    """Undoes `_join`."""
    leaves: list[jax.Array] = []
    for joined, run in zip(masks, _runs([math.prod(shape) for shape in shapes]), strict=True):
        whole = tuple(shapes[i] for i in run)
        leaves += [joined] if whole == (joined.shape,) else _parted(joined, whole)
    return tuple(leaves)


@partial(jax.jit, static_argnums=1)
def _parted(joined: jax.Array, shapes: tuple[tuple[int, ...], ...]) -> list[jax.Array]:
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    return [joined[end - math.prod(shape) : end].reshape(shape) for end, shape in zip(ends, shapes, strict=True)]


def _both(low: jax.Array, high: jax.Array) -> jax.Array:
    """How many of each are true, `[2]`; the last axis is lanes, shorter than `HALF`."""
    hits = low.astype(jnp.int16) + jnp.where(high, jnp.int16(256), jnp.int16(0))  # two sums in one cost little more
    lanes = jnp.sum(hits.reshape(*hits.shape[:-1], -1, LANES), axis=-1, dtype=jnp.int16).astype(jnp.int32)
    rows = jnp.sum((lanes & 255) | ((lanes >> 8) << 16), axis=-1)
    return jnp.stack([jnp.sum(rows & 0xFFFF), jnp.sum(rows >> 16)])


def _totals(line: Line, low: jax.Array, high: jax.Array) -> jax.Array:
    """How many keys are at most `low`, and at most `high`, `[2]`."""
    last, size = line.values.shape[-1], line.values.size
    if last % LANES == 0 and last < HALF:
        return _both(_at_most(line, low), _at_most(line, high))  # in the leaf's own shape: shards stay where they are
    even = size - size % PAGE
    pages, rest = line.part(slice(0, even)), line.part(slice(even, None))
    counts = _both(*(_at_most(pages, key).reshape(-1, PAGE) for key in (low, high)))
    return counts + jnp.stack([jnp.sum(_at_most(rest, key), dtype=jnp.int32) for key in (low, high)])


def _counts(lines: Lines, low: jax.Array, high: jax.Array) -> jax.Array:
    return sum((_totals(line, low, high) for line in lines), start=jnp.zeros(2, jnp.int32))


def _bracket(lines: Lines, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys that hold the k-th smallest between them, unless the sample deceives."""
    size = sum(line.values.size for line in lines)
    if size < LARGE:
        return jnp.uint32(0), jnp.uint32(TOP)
    stride = next((s for s in STRIDES if size <= s * SAMPLED), STRIDES[-1])
    sample = jnp.concatenate([_keys(line.sample(stride)) for line in lines])
    share = k.astype(jnp.float32) / size
    margin = 3 * jnp.sqrt(sample.size * share * (1 - share)) + 3
    ranks = share * sample.size + jnp.stack([-margin, margin])
    low, high = _bisect(jnp.pad(sample, (0, -sample.size % PAGE), constant_values=jnp.uint32(LAST)), ranks)
    return low - 1, high


def _bisect(keys: jax.Array, ranks: jax.Array) -> jax.Array:
    """The smallest keys that at least so many of a few keys do not exceed, for two ranks."""

    def halve(_: int, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bracket
        middle = low + (high - low) // 2
        enough = _both(*((keys <= middle[i]).reshape(-1, PAGE) for i in range(2))) >= ranks
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    return lax.fori_loop(0, 32, halve, (jnp.zeros(2, jnp.uint32), jnp.full(2, TOP)))[1]


def _cut(lines: Lines, k: jax.Array) -> Cut:
    size = sum(line.values.size for line in lines)
    bracket = _bracket(lines, k)

    def unsettled(state: tuple) -> jax.Array:
        low, high, _, at_high, _ = state
        return (high - low > 1) & (at_high != k)

    def aim(low: jax.Array, high: jax.Array, at_low: jax.Array, at_high: jax.Array) -> list[jax.Array]:
        """Keys half a deviation to each side of where the k-th should be, if those between spread evenly."""
        between = jnp.maximum(at_high - at_low, 1).astype(jnp.float32)
        wanted = (k - at_low).astype(jnp.float32)
        half = jnp.sqrt(wanted * (1 - wanted / between)) / 2  # nearer or further takes more passes
        shares = jnp.clip(jnp.stack([wanted - half, wanted + half]) / between, 0, 1)
        return list(low + (shares * (high - low).astype(jnp.float32)).astype(jnp.uint32))

    def narrow(state: tuple) -> tuple:
        low, high, at_low, at_high, turn = state
        third = (high - low) // 3
        ways = zip(bracket, aim(low, high, at_low, at_high), (low + third, high - third), strict=True)
        keys = [
            jnp.clip(jnp.select([turn == 0, turn < INTERPOLATED], way[:2], way[2]), low + 1, high - 1) for way in ways
        ]
        held, *keys = lax.optimization_barrier((lines, *keys))  # else the loop copies all bits in front
        for key, found in zip(keys, _counts(held, *keys), strict=True):
            enough = found >= k
            lower, raised = enough & (key < high), ~enough & (key > low)
            low, at_low = jnp.where(raised, key, low), jnp.where(raised, found, at_low)
            high, at_high = jnp.where(lower, key, high), jnp.where(lower, found, at_high)
        return low, high, at_low, at_high, turn + 1

    start = (jnp.uint32(0), jnp.uint32(TOP), jnp.int32(0), jnp.int32(size), jnp.int32(0))
    _, key, at_low, at_high, _ = lax.while_loop(unsettled, narrow, start)
    return Cut(key, k - at_low, at_high == k)


def _end_of_ties(line: Line, key: jax.Array, ties: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The position before which the first `ties` keys equal to `key` lie, and how many are to come after the end."""
    size = line.values.size
    even = size - size % PAGE
    tied = _keys(line.part(slice(0, even))) == key
    lanes = jnp.sum(tied.astype(jnp.int8).reshape(-1, LANES), axis=1, dtype=jnp.int8)
    pages = jnp.sum(lanes.reshape(-1, PAGE // LANES), axis=1, dtype=jnp.int32)
    rest = jnp.sum(_keys(line.part(slice(even, None))) == key, dtype=jnp.int32)
    ends = jnp.cumsum(jnp.append(pages, rest))
    quota = jnp.minimum(ties, ends[-1])
    page = jnp.sum(ends < quota, dtype=jnp.int32)
    start = jnp.minimum(page * PAGE, size - PAGE)
    inside = (_keys(line.page(start)) == key) & (start + jnp.arange(PAGE, dtype=jnp.int32) >= page * PAGE)
    wanted = quota - jnp.where(page == 0, 0, ends[page - 1])
    return jnp.where(quota == 0, 0, start + jnp.sum(jnp.cumsum(inside) < wanted, dtype=jnp.int32) + 1), ties - quota


def all_but_lowest(
    leaves: Leaves, tiers: Tiers, k: jax.Array | int, *, magnitude: bool = False
) -> tuple[jax.Array, ...]:
    """Marks all values but the k lowest of all leaves together; of equal ones the first go.

    The same as `np.argsort(kind="stable")[:k]` over the leaves laid end to end, in about ten reads of memory.

    Args:
        leaves: arrays of any shapes, finite; at most 2**31 - 1 values in all.
        tiers: for each leaf None, or an array of its shape: 0 goes before every score, 1 goes by its score (so a bool
            array of what is alive will do) and, in integers, 2 goes after every score.
        k: how many go; may be traced. One compilation serves a whole schedule.
        magnitude: whether |value| is the score; it is never written to memory.

    Returns:
        Bool arrays shaped like the leaves; False for the k lowest.

    >>> all_but_lowest([jnp.array([3.0, 1.0]), jnp.array([2.0])], [None, None], 2)
    (Array([ True, False], dtype=bool), Array([False], dtype=bool))
    """
    survivors = _all_but_lowest(_join(leaves, tiers, magnitude), jnp.asarray(k, jnp.int32))
    return _split(survivors, [leaf.shape for leaf in leaves])


@jax.jit
def _all_but_lowest(lines: Lines, k: jax.Array) -> list[jax.Array]:
    cut = _cut(lines, k)

    def parted() -> list[jax.Array]:
        masks, ties = [], cut.ties
        for line in lines:
            end, ties = _end_of_ties(line, cut.key, ties)
            masks.append(~_at_most(line, jnp.where(_places(line) < end, cut.key, cut.key - 1)))
        return masks

    return lax.cond(cut.whole, lambda: [~_at_most(line, cut.key) for line in lines], parted)


def _places(line: Line) -> jax.Array:
    """The position of each value if all are laid end to end."""
    shape = line.values.shape
    steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    places = (lax.broadcasted_iota(jnp.int32, shape, axis) * step for axis, step in enumerate(steps))
    return sum(places, start=jnp.int32(0))


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
    keys = jnp.pad(_keys(Line(values, tier)), room).reshape(*lead, -1, m, out)  # what is not there goes before all else
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
def _kth_smallest(lines: Lines, k: jax.Array) -> jax.Array:
    first = jnp.uint32(FIRST)
    key = _cut(lines, k + _counts(lines, first, first)[0]).key
    found = jnp.uint32(0)
    for keys in map(_keys, lines):
        found = jnp.maximum(found, jnp.max(jnp.where(keys <= key, keys, 0), initial=0))
    bits = lax.bitcast_convert_type(found ^ jnp.uint32(1 << 31), jnp.int32)
    return lax.bitcast_convert_type(bits ^ ((bits >> 31) & 0x7FFFFFFF), jnp.float32)


def count_below(leaves: Leaves, tiers: Tiers, value: jax.Array | float) -> jax.Array:
    """How many values lie below `value`; all those of tier 0 do."""
    return _count_below(_join(leaves, tiers), jnp.asarray(value, jnp.float32))


@jax.jit
def _count_below(lines: Lines, value: jax.Array) -> jax.Array:
    key = _keys(Line(value, None)) - 1
    return _counts(lines, key, key)[0]


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
