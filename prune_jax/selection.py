"""The k lowest of several arrays, without sorting them.

Floats are ordered as their bit patterns are, so the k-th smallest is an integer, found by counting. XLA sorts on CPU
a hundred times slower than it counts. A sample brackets the answer; a few passes over all values pin it down. Where
tiers make values dear to compare, passes go over codes of one byte, written two or three times, each time finer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from prune_jax.draws import Draws, places

Leaves = Sequence[jax.Array]
Values = Sequence[jax.Array | Draws]
Tiers = Sequence[jax.Array | None]

TOP = jnp.iinfo(jnp.uint32).max
FIRST = 1  # the key of what goes before every score
LAST = TOP  # the key of what goes after every score
WRITTEN = 255  # the last code that is written to memory
DEEP = 30  # bits of codes that are not
LANES = 16  # sums of so many comparisons; XLA would write the comparisons of a plain sum to memory
HALF = 1 << 15  # two sums that are less fit in one number
INTERPOLATED = 6  # from so many passes on, ties or a strange distribution are at work, and codes are cut in thirds
STRIDES = (127, 509, 2039)  # one value in so many is sampled; primes, lest a sample see one column of a matrix
SAMPLED = 1 << 13  # more values make a finer sample than any pass needs
LARGE = 1 << 16  # fewer values are not worth a sample
PAGE = 4096
COMPARED = 16  # in groups of so many each is compared with each, twenty times faster than sorting fours on a CPU
SMALL = 1 << 18  # leaves of fewer values are laid end to end, lest each costs a tenth of a second to compile for


@partial(jax.tree_util.register_dataclass, data_fields=("values", "tier"), meta_fields=("magnitude",))
@dataclass(frozen=True)
class Line:
    """Values that compete, their tiers, and whether they do so by their magnitudes."""

    values: jax.Array | Draws
    tier: jax.Array | None
    magnitude: bool = False

    def at(self, part: Callable[[jax.Array], jax.Array]) -> Line:
        """A part of the values."""
        values = self.values.part(part) if isinstance(self.values, Draws) else part(self.values)
        return Line(values, None if self.tier is None else part(self.tier), self.magnitude)

    def sample(self, stride: int) -> Line:
        """One in so many of the values laid end to end, picked where they lie: shards stay where they are."""
        picked = jnp.arange(0, self.values.size, stride)
        where = jnp.unravel_index(picked, self.values.shape)

        def some(a: jax.Array) -> jax.Array:
            return a.at[where].get(mode="promise_in_bounds")

        values = self.values.at(picked) if isinstance(self.values, Draws) else some(self.values)
        return Line(values, None if self.tier is None else some(self.tier), self.magnitude)

    def page(self, start: jax.Array) -> Line:
        """The `PAGE` values from a position on."""
        return self.at(lambda a: lax.dynamic_slice_in_dim(jnp.ravel(a), start, PAGE))

    def parts(self) -> list[Line]:
        """The values as they are counted: in the leaf's own shape, so that shards stay where they are, or in pages."""
        last, even = self.values.shape[-1], self.values.size - self.values.size % PAGE
        if last % LANES == 0 and last < HALF:
            return [self]
        pages, rest = self.at(lambda a: jnp.ravel(a)[:even].reshape(-1, PAGE)), self.at(lambda a: jnp.ravel(a)[even:])
        return [part for part in (pages, rest) if part.values.size]


Lines = Sequence[Line]


def _bits(line: Line) -> jax.Array:
    """Unsigned integers in the order of the values; 0.0 and -0.0 are equal, subnormals are not zero."""
    bits = lax.bitcast_convert_type(line.values.astype(jnp.float32), jnp.int32)
    bits = bits & 0x7FFFFFFF if line.magnitude else bits ^ ((bits >> 31) & 0x7FFFFFFF)
    bits = jnp.where(bits == -1, 0, bits)
    return lax.bitcast_convert_type(bits, jnp.uint32) ^ jnp.uint32(1 << 31)


def _keys(line: Line) -> jax.Array:
    """Unsigned integers in the order in which values go."""
    keys = _bits(line)
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


def _tier(leaf: jax.Array | Draws, tier: jax.Array | None) -> jax.Array:
    return jnp.ones(leaf.shape, bool) if tier is None else tier


def _join(leaves: Values, tiers: Tiers, magnitude: bool = False) -> Lines:
    """Large leaves as they are; small ones in lines of few different lengths, filled up with what never goes."""
    lines = []
    for run in _runs([leaf.size for leaf in leaves]):
        values, tier = leaves[run[0]], tiers[run[0]]
        if values.size <= SMALL:
            values, tier = _joined([leaves[i] for i in run], [tiers[i] for i in run])
        lines.append(Line(values, tier, magnitude))
    return lines


@jax.jit
def _joined(leaves: Values, tiers: Tiers) -> tuple[jax.Array, jax.Array]:
    size = sum(leaf.size for leaf in leaves)
    room = (0, max(PAGE, 1 << (size - 1).bit_length()) - size)
    values = jnp.concatenate([jnp.ravel(leaf.astype(jnp.float32)) for leaf in leaves])
    known = jnp.concatenate([jnp.ravel(_tier(leaf, tier)) for leaf, tier in zip(leaves, tiers, strict=True)])
    return jnp.pad(values, room, constant_values=jnp.inf), jnp.pad(known, room, constant_values=2)  # True, in bools


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


class Frame(NamedTuple):
    """Codes of keys: which of so many equal spans a key lies in; all below belong to the first, above to the last."""

    base: jax.Array  # [] uint32: the lowest key
    shift: jax.Array  # [] uint32: a span has 2**shift keys
    width: jax.Array  # [] int32: of so many spans it is made

    @classmethod
    def of(cls, low: jax.Array, high: jax.Array, bits: int) -> Frame:
        """The finest from `low` to `high` that has codes of so many bits."""
        shift = 32 - bits - jnp.minimum(lax.clz(high - low), 32 - bits)
        return cls(low, shift, ((high - low) >> shift).astype(jnp.int32))

    def code(self, keys: jax.Array) -> jax.Array:
        """Codes of keys, in eight bits."""
        return jnp.minimum((jnp.maximum(keys, self.base) - self.base) >> self.shift, WRITTEN).astype(jnp.uint8)

    def end(self, code: jax.Array) -> jax.Array:
        """The last key of a code that is not the last."""
        return self.base + jnp.minimum(((code.astype(jnp.uint32) + 1) << self.shift) - 1, jnp.uint32(TOP) - self.base)


def _parts(lines: Lines) -> list[Line]:
    return [part for line in lines for part in line.parts()]


def _codes(part: Line, frame: Frame) -> jax.Array:
    codes = frame.code(_bits(part))
    if part.tier is None:
        return codes
    codes = jnp.where(part.tier == 0, frame.code(jnp.uint32(FIRST)), codes)
    return codes if part.tier.dtype == bool else jnp.where(part.tier == 2, frame.code(jnp.uint32(LAST)), codes)


def _counts(lows: Leaves, highs: Leaves, *, written: bool) -> jax.Array:
    """How many are true of some arrays and of as many others of the same shapes, `[2]`.

    What was computed from codes in memory is summed across, which a CPU does with whole vectors; what is computed from
    values, with more between two of them, along.
    """

    def both(low: jax.Array, high: jax.Array) -> jax.Array:
        hits = low.astype(jnp.int16) + jnp.where(high, jnp.int16(256), jnp.int16(0))  # two in one cost little more
        *lead, last = hits.shape
        hits = jnp.pad(hits, [(0, 0)] * len(lead) + [(0, -last % LANES)])
        across = max(8, math.gcd(32, hits.shape[-1] // LANES))
        hits = hits.reshape(*lead, across, -1) if written else jnp.swapaxes(hits.reshape(*lead, -1, LANES), -1, -2)
        lanes = jnp.sum(hits, axis=-2, dtype=jnp.int16).astype(jnp.int32)
        sums = jnp.sum((lanes & 255) | ((lanes >> 8) << 16), axis=-1)
        return jnp.stack([jnp.sum(sums & 0xFFFF), jnp.sum(sums >> 16)])

    return sum(map(both, lows, highs), start=jnp.zeros(2, jnp.int32))


def _bracket(lines: Lines, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys that hold the k-th smallest between them, unless the sample deceives."""
    size = sum(line.values.size for line in lines)
    if size < LARGE:
        return jnp.uint32(0), jnp.uint32(TOP)
    stride = next((s for s in STRIDES if size <= s * SAMPLED), STRIDES[-1])
    sample = jnp.sort(jnp.concatenate([_keys(line.sample(stride)) for line in lines]))
    share = k.astype(jnp.float32) / size
    margin = 3 * jnp.sqrt(sample.size * share * (1 - share)) + 3
    ranks = share * sample.size + jnp.stack([-margin, margin])
    low, high = sample[jnp.clip(ranks.astype(jnp.int32), 0, sample.size - 1)]
    return low - jnp.minimum(low, 1 + ((high - low) >> 7)), high  # what is below has a code of its own


class Found(NamedTuple):
    """Keys between which the k-th smallest lies, both included, and what is known of them."""

    low: jax.Array  # [] uint32
    high: jax.Array  # [] uint32
    before: jax.Array  # [] int32: keys below `low`
    within: jax.Array  # [] int32: keys up to `high`


def _cut(lines: Lines, k: jax.Array) -> Found:
    sizes = [line.values.size for line in lines]
    tiered = sum(size for size, line in zip(sizes, lines, strict=True) if line.tier is not None)
    written = 2 * tiered > sum(sizes)  # values under tiers take twice as long to compare, and longer than their codes
    bits = WRITTEN.bit_length() if written else DEEP
    low, high = _bracket(lines, k)
    bracket, last = Frame.of(low, high, bits), (1 << bits) - 1

    def unsettled(state: tuple[jax.Array, Found]) -> jax.Array:
        found = state[1]
        return (found.high > found.low) & (found.within != k)

    def narrow(state: tuple[jax.Array, Found]) -> tuple[jax.Array, Found]:
        first, found = state
        frame: Frame = jax.tree.map(partial(jnp.where, first), bracket, Frame.of(found.low, found.high, bits))
        if written:
            held, frame = lax.optimization_barrier((lines, frame))  # else the loop copies all bits in front
            codes = [_codes(part, frame) for part in _parts(held)]

        def count(low: jax.Array, high: jax.Array) -> jax.Array:
            if written:
                return _counts(
                    *([part <= code.astype(jnp.uint8) for part in codes] for code in (low, high)), written=True
                )
            held, *ends = lax.optimization_barrier((lines, frame.end(low), frame.end(high)))
            return _counts(*([_at_most(part, end) for part in _parts(held)] for end in ends), written=False)

        code, before, within = _search(count, k, found, jnp.where(first, frame.width, 0), last)
        low = jnp.where(code == 0, found.low, frame.end(code - 1) + 1)
        high = jnp.where(code == last, found.high, jnp.minimum(frame.end(code), found.high))
        return jnp.zeros((), bool), Found(low, high, before, within)

    start = Found(jnp.uint32(0), jnp.uint32(TOP), jnp.int32(0), jnp.int32(sum(sizes)))
    return lax.while_loop(unsettled, narrow, (jnp.ones((), bool), start))[1]


def _search(
    count: Callable[[jax.Array, jax.Array], jax.Array], k: jax.Array, found: Found, width: jax.Array, last: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The lowest code up to which at least k lie; how many lie below it; how many up to it.

    `width` is the number of codes between which the k-th should be, three deviations to each side of their middle; 0 if
    it lies between all codes for sure.
    """

    def unsettled(state: tuple) -> jax.Array:
        low, high, _, at_high, _ = state
        return (high - low > 1) & (at_high != k)

    def aim(low: jax.Array, high: jax.Array, at_low: jax.Array, at_high: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Codes half a deviation to each side of where the k-th should be, if those between spread evenly."""
        between = jnp.maximum(at_high - at_low, 1).astype(jnp.float32)
        wanted = (k - at_low).astype(jnp.float32)
        half = jnp.sqrt(wanted * (1 - wanted / between)) / 2  # nearer or further takes more passes
        shares = jnp.clip(jnp.stack([wanted - half, wanted + half]) / between, 0, 1) * (high - low).astype(jnp.float32)
        return low + jnp.ceil(shares[0]).astype(jnp.int32) - 1, low + jnp.ceil(shares[1]).astype(jnp.int32)

    def narrow(state: tuple) -> tuple:
        low, high, at_low, at_high, turn = state
        third = (high - low) // 3
        missed = (turn == 1) & ((low < 0) | (high == last))
        cases = [(width > 0) & (turn == 0), (width > 0) & missed, turn < INTERPOLATED]
        ways = zip(
            (width // 3, width - width // 3),
            (jnp.int32(0), jnp.minimum(width, last - 1)),
            aim(low, high, at_low, at_high),
            (low + third, high - third),
            strict=True,
        )
        tried = [jnp.clip(jnp.select(cases, way[:3], way[3]), low + 1, high - 1) for way in ways]
        for code, found in zip(tried, count(*tried), strict=True):
            enough = found >= k
            lower, raised = enough & (code < high), ~enough & (code > low)
            low, at_low = jnp.where(raised, code, low), jnp.where(raised, found, at_low)
            high, at_high = jnp.where(lower, code, high), jnp.where(lower, found, at_high)
        return low, high, at_low, at_high, turn + 1

    start = (jnp.int32(-1), jnp.int32(last), found.before, found.within, jnp.int32(0))
    _, code, before, within, _ = lax.while_loop(unsettled, narrow, start)
    return code, before, within


def _end_of_ties(line: Line, key: jax.Array, ties: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The position before which the first `ties` keys equal to `key` lie, and how many are to come after the end."""
    size = line.values.size
    even = size - size % PAGE
    tied = _keys(line.at(lambda a: jnp.ravel(a)[:even])) == key
    lanes = jnp.sum(tied.astype(jnp.int8).reshape(-1, LANES), axis=1, dtype=jnp.int8)
    pages = jnp.sum(lanes.reshape(-1, PAGE // LANES), axis=1, dtype=jnp.int32)
    rest = jnp.sum(_keys(line.at(lambda a: jnp.ravel(a)[even:])) == key, dtype=jnp.int32)
    ends = jnp.cumsum(jnp.append(pages, rest))
    quota = jnp.minimum(ties, ends[-1])
    page = jnp.sum(ends < quota, dtype=jnp.int32)
    start = jnp.minimum(page * PAGE, size - PAGE)
    inside = (_keys(line.page(start)) == key) & (start + jnp.arange(PAGE, dtype=jnp.int32) >= page * PAGE)
    wanted = quota - jnp.where(page == 0, 0, ends[page - 1])
    return jnp.where(quota == 0, 0, start + jnp.sum(jnp.cumsum(inside) < wanted, dtype=jnp.int32) + 1), ties - quota


def all_but_lowest(
    leaves: Values, tiers: Tiers, k: jax.Array | int, *, magnitude: bool = False
) -> tuple[jax.Array, ...]:
    """Marks all values but the k lowest of all leaves together; of equal ones the first go.

    The same as `np.argsort(kind="stable")[:k]` over the leaves laid end to end, in about ten reads of memory.

    Args:
        leaves: arrays of any shapes, finite, or `Draws`; at most 2**31 - 1 values in all.
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
    found = _cut(lines, k)

    def parted() -> list[jax.Array]:
        masks, ties = [], k - found.before
        for line in lines:
            end, ties = _end_of_ties(line, found.high, ties)
            masks.append(~_at_most(line, jnp.where(places(line.values.shape) < end, found.high, found.high - 1)))
        return masks

    return lax.cond(found.within == k, lambda: [~_at_most(line, found.high) for line in lines], parted)


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
    high = _cut(lines, k + _below(lines, jnp.uint32(FIRST + 1))).high
    found = jnp.uint32(0)
    for keys in map(_keys, lines):
        found = jnp.maximum(found, jnp.max(jnp.where(keys <= high, keys, 0), initial=0))
    bits = lax.bitcast_convert_type(found ^ jnp.uint32(1 << 31), jnp.int32)
    return lax.bitcast_convert_type(bits ^ ((bits >> 31) & 0x7FFFFFFF), jnp.float32)


def _below(lines: Lines, key: jax.Array) -> jax.Array:
    below = [_at_most(part, key - 1) for part in _parts(lines)]
    return _counts(below, below, written=False)[0]


def count_below(leaves: Leaves, tiers: Tiers, value: jax.Array | float) -> jax.Array:
    """How many values lie below `value`; all those of tier 0 do."""
    return _count_below(_join(leaves, tiers), jnp.asarray(value, jnp.float32))


@jax.jit
def _count_below(lines: Lines, value: jax.Array) -> jax.Array:
    return _below(lines, _keys(Line(value, None)))


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
