"""One pass over batches for what criteria need to know of the activations of units.

The activation of a unit is what its reading kernels see at its indices: for each example as many values as there are
places: positions of an image, steps of a sequence, indices of the unit. Memory does not grow with the batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from prune_jax.activations import Captured, capture
from prune_jax.errors import UserMistake
from prune_jax.groups import Group

FINE = 256  # bins in which values are counted while the range of all of them is not known yet
Leaves = Mapping[str, Any]
Where = dict[str, dict[str, jax.Array]]  # group -> kernel and axis, as `_name` writes them -> indices `[units, m]`


class Histogram(NamedTuple):
    """How often which value came, unit by unit: bin j holds the values in [(first + j) 2^exponent, .. + 2^exponent).

    Attributes:
        counts: `[units, FINE]`, or `[units, classes, FINE]`.
        first: number of the first bin `[units]`.
        exponent: log2 of the width of the bins `[units]`, the least whole one for which all values have room.
        low: lowest value `[units]`.
        high: highest value `[units]`.
    """

    counts: Any
    first: Any
    exponent: Any
    low: Any
    high: Any

    def binned(self, bins: int) -> np.ndarray:
        """Counts in so many bins of equal width from the lowest value to the highest, `[units, (classes,) bins]`.

        Each value counts as the middle of its fine bin; of these, at least half are in use.
        """
        low, high = (np.asarray(x, np.float64)[:, None] for x in (self.low, self.high))
        numbers = np.asarray(self.first, np.float64)[:, None] + np.arange(FINE) + 0.5
        middles = np.ldexp(numbers, np.asarray(self.exponent)[:, None])
        share = (middles - low) / np.where(high > low, high - low, 1)
        bin_of = np.clip(np.floor(np.nan_to_num(share) * bins), 0, bins - 1).astype(int)  # [units, FINE]
        one_hot = bin_of[:, :, None] == np.arange(bins)  # [units, FINE, bins]
        return np.einsum("u...f,ufb->u...b", np.asarray(self.counts, np.float64), one_hot)


class UnitStatistics(NamedTuple):
    """By group, what is known of its units' activations; None where not asked for."""

    zeros: Any = None  # share of values that are exactly zero [units]
    histogram: Any = None  # Histogram of the mean over each example's values
    label_histogram: Any = None  # the same, for each label apart
    covariance: Any = None  # of values at the same place of the same example, [units, units]


def readers(loss: Any, leaves: Leaves, batch: Any) -> tuple[set[tuple[str, int]], Captured]:
    """Which axes of which parameters are summed over in a product with activations; and all else that was captured.

    Args:
        loss: `loss(leaves, batch)`, or any function of the same arguments.
        leaves: path -> parameter.
        batch: any batch; nothing is computed.
    """
    found: list[Captured] = []

    def look(leaves: Leaves, batch: Any) -> None:
        found.append(capture(loss, leaves, batch))

    jax.eval_shape(look, dict(leaves), batch)
    axes = {(r.path, d) for r in found[0].readings for d in range(len(r.shape)) if r.reads(d)}
    return axes, found[0]


def reading_members(
    groups: Mapping[str, Group], loss: Any, leaves: Leaves, batch: Any
) -> dict[str, list[tuple[str, int, np.ndarray]]]:
    """Of each group the members that read its activations; groups without are left out.

    Raises:
        UserMistake: no group has one.
    """
    axes, captured = readers(loss, leaves, batch)
    found = {
        name: [(path, axis, places) for path, axis, places in group.members if (path, axis) in axes]
        for name, group in groups.items()
    }
    found = {name: members for name, members in found.items() if members}
    if not found:
        within = ", ".join(f"{path!r} in {name}" for path, name in captured.unseen.items())
        raise UserMistake(
            "no group's activations can be seen: no kernel reads them outside loops and branches"
            f"{f' ({within})' if within else ''}; choose a criterion of weights, such as taylor."
        )
    return found


def gather_units(
    needs: Collection[str], groups: Mapping[str, Group], loss: Any, leaves: Leaves, batches: Iterable[Any]
) -> UnitStatistics:
    """Gathers the fields of `UnitStatistics` that are needed, in one pass.

    Compiles once for each shape of batch, and not again in later calls with the same `loss`. Batches are taken apart
    into examples by `vmap`, so that it does not matter where the function keeps its batch axis.

    Args:
        needs: names of fields of `UnitStatistics`.
        groups: name -> group; those that no kernel reads are left out of the answer.
        loss: `loss(leaves, batch)`, or any function of the same arguments: its value does not matter.
        leaves: path -> parameter.
        batches: pytrees of arrays whose leading axis counts examples; for `label_histogram` mappings in which `y` holds
            whole numbers from 0 on.

    Raises:
        UserMistake: there is no batch, no group is read, or labels are missing.
    """
    needs = frozenset(needs)
    stream = iter(batches)
    first = next(stream, None)
    if first is None:
        raise UserMistake("there are no batches to gather statistics from; give at least one.")
    loss = loss if isinstance(loss, Partial) else Partial(loss)
    members = reading_members(groups, loss, leaves, first)
    where: Where = {
        name: {_name(path, axis): jnp.asarray(places) for path, axis, places in mine} for name, mine in members.items()
    }
    sums = {name: _start(needs, groups[name].size) for name in where}
    for batch in itertools.chain([first], stream):
        labels = None
        if "label_histogram" in needs:
            labels = _labels(batch)
            most = int(np.max(labels, initial=0)) + 1
            sums = {name: _with_classes(found, most) for name, found in sums.items()}
        sums = _add(sums, loss, dict(leaves), batch, labels, where)
    found = jax.device_get(_shares(sums))
    return UnitStatistics(**{need: {name: found[name][need] for name in found} for need in needs})


def _name(path: str, axis: int) -> str:
    return f"{path}[{axis}]"


def _start(needs: frozenset[str], units: int) -> dict[str, Any]:
    """Sums over nothing."""
    empty: dict[str, Any] = {}
    if "zeros" in needs:
        empty["zeros"] = (jnp.zeros(units), jnp.zeros(()))
    for need, shape in (("histogram", (units, FINE)), ("label_histogram", (units, 1, FINE))):
        if need in needs:
            whole, real = jnp.zeros(units, jnp.int32), jnp.zeros(units)
            empty[need] = Histogram(jnp.zeros(shape), whole, whole - _LEAST, real + jnp.inf, real - jnp.inf)
    if "covariance" in needs:
        empty["covariance"] = (jnp.zeros(()), jnp.zeros(units), jnp.zeros(units), jnp.zeros((units, units)))
    return empty


def _labels(batch: Any) -> Any:
    labels = batch.get("y") if isinstance(batch, Mapping) else None
    if labels is None or np.ndim(labels) != 1 or not jnp.issubdtype(labels.dtype, jnp.integer) or np.any(labels < 0):
        raise UserMistake(
            "mutual information needs labels: batches that are mappings with whole numbers from 0 on under 'y', one "
            "for each example."
        )
    return labels


def _with_classes(sums: dict[str, Any], most: int) -> dict[str, Any]:
    """Room for so many labels, or for more: it doubles, so that little is compiled anew."""
    found = sums["label_histogram"]
    room = max(found.counts.shape[1], 1 << (most - 1).bit_length())
    wider = jnp.pad(found.counts, ((0, 0), (0, room - found.counts.shape[1]), (0, 0)))
    return {**sums, "label_histogram": found._replace(counts=wider)}


@partial(jax.jit, donate_argnums=0)
def _add(sums: dict[str, Any], loss: Any, leaves: Leaves, batch: Any, labels: Any, where: Where) -> dict[str, Any]:
    def of_one(example: Any) -> dict[str, jax.Array]:
        batch_of_one = jax.tree.map(lambda a: a[None], example)
        seen = capture(loss, leaves, batch_of_one).readings
        values: dict[str, jax.Array] = {}
        for name, kernels in where.items():
            rows = [
                jnp.swapaxes(r.along(d).astype(jnp.float32)[:, kernels[_name(r.path, d)]], 1, 2)
                for r in seen
                for d in range(len(r.shape))
                if _name(r.path, d) in kernels and r.reads(d)
            ]  # [positions, m, units] each
            values[name] = jnp.concatenate([row.reshape(-1, row.shape[-1]) for row in rows])  # [places, units]
        return values

    values = jax.vmap(of_one)(batch)  # [batch, places, units] each
    return {
        name: {need: _FOLD[need](total, values[name], labels) for need, total in sums[name].items()} for name in sums
    }


def _add_zeros(total: tuple[jax.Array, jax.Array], values: jax.Array, labels: Any) -> tuple[jax.Array, jax.Array]:
    zeros, count = total
    return zeros + jnp.sum(values == 0, axis=(0, 1)), count + values.shape[0] * values.shape[1]


_LEAST = 120  # no bin is narrower than 2^-120: a float of that size still is a normal one
_DIGITS = 22  # nor narrower than the largest value times 2^-22: there, floats themselves are that far apart


def _add_histogram(total: Histogram, values: jax.Array, labels: Any) -> Histogram:
    """Counts means over places; where the range has grown, bins are merged by halves until all have room.

    The bins' edges are multiples of a power of two, so that merging is exact, and no order of the batches matters.
    """
    pooled = jnp.mean(values, axis=1)  # [batch, units]
    low, high = jnp.minimum(total.low, pooled.min(axis=0)), jnp.maximum(total.high, pooled.max(axis=0))
    exponent = _exponent(low, high)
    first = _number(low, exponent)
    shift = jnp.minimum(exponent - total.exponent, 31)
    places = ((total.first[:, None] + jnp.arange(FINE)[None]) >> shift[:, None]) - first[:, None]  # [units, FINE]
    new = _number(pooled, exponent[None]) - first[None]  # [batch, units]

    def of_unit(counts: jax.Array, places: jax.Array, new: jax.Array) -> jax.Array:
        kept = jnp.where((places >= 0) & (places < FINE), places, FINE)  # what has no room is empty
        merged = jnp.zeros_like(counts).at[..., kept].add(counts, mode="drop")
        rows = (new,) if total.counts.ndim == 2 else (labels, new)
        return merged.at[rows].add(1, mode="drop")

    counts = jax.vmap(of_unit, in_axes=(0, 0, 1))(total.counts, places, new)
    return Histogram(counts, first, exponent, low, high)


def _number(values: jax.Array, exponent: jax.Array) -> jax.Array:
    half = exponent // 2  # in two steps, lest 2^-exponent overflow
    return jnp.floor(jnp.ldexp(jnp.ldexp(values, -half), half - exponent)).astype(jnp.int32)


def _exponent(low: jax.Array, high: jax.Array) -> jax.Array:
    """The least e for which floor(high / 2^e) - floor(low / 2^e) < FINE, within the bounds above."""
    size = jnp.maximum(jnp.abs(low), jnp.abs(high))
    least = jnp.maximum(jnp.where(size > 0, jnp.frexp(size)[1] - _DIGITS, -_LEAST), -_LEAST)
    exponent = jnp.maximum(jnp.frexp((high - low) / FINE)[1], least)
    room = _number(high, exponent) - _number(low, exponent) < FINE
    return jnp.where((low == high) | room, jnp.where(low == high, least, exponent), exponent + 1).astype(jnp.int32)


def _add_covariance(total: tuple[jax.Array, ...], values: jax.Array, labels: Any) -> tuple[jax.Array, ...]:
    """Joins sums of products about two means (Chan et al. 1983): sums of squares would lose what is small.

    Values are those above the first one, so that what never varies does not vary by rounding either.
    """
    count, origin, mean, products = total
    rows = values.reshape(-1, values.shape[-1])  # [places, units]
    origin = jnp.where(count == 0, rows[0], origin)
    rows = rows - origin[None]
    new = jnp.mean(rows, axis=0)
    centred = rows - new[None]
    both = count + rows.shape[0]
    apart = new - mean
    between = jnp.outer(apart, apart) * (count * rows.shape[0] / both)
    inner = jax.lax.dot(centred.T, centred, precision=jax.lax.Precision.HIGHEST)
    return both, origin, mean + apart * (rows.shape[0] / both), products + inner + between


_FOLD: dict[str, Callable[[Any, jax.Array, Any], Any]] = {
    "zeros": _add_zeros,
    "histogram": _add_histogram,
    "label_histogram": _add_histogram,
    "covariance": _add_covariance,
}


@jax.jit
def _shares(sums: dict[str, Any]) -> dict[str, Any]:
    final = {
        "zeros": lambda total: total[0] / total[1],
        "covariance": lambda total: total[3] / total[0],
    }
    return {
        name: {need: final.get(need, lambda total: total)(total) for need, total in found.items()}
        for name, found in sums.items()
    }
