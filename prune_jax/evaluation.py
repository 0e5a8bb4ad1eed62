"""What a network is worth and what it takes: metrics on a split, size and operations, measured latency."""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from prune_jax.costs import cost
from prune_jax.errors import DivergedError, UserMistake
from prune_jax.objectives import Objective, inputs_of
from prune_jax.trees import PyTree, leaves_by_path

if TYPE_CHECKING:
    from prune_jax.models import Network, Variables

Evaluator = Callable[..., dict[str, float]]
_TURN_SECONDS = 0.01  # long enough for warm caches, short enough to share the machine's moods


def evaluator(network: Network, objective: Objective, *, batch_size: int) -> Evaluator:
    """Makes a function that evaluates any weights of `network`; it compiles once for each size of split.

    Args:
        network: the function to evaluate, in its resting mode (no dropout, stored batch statistics).
        objective: its loss and metrics.
        batch_size: examples in one step; the result does not depend on it but by rounding.

    Returns:
        `evaluate(variables, split, *, name="test")`, see there.
    """

    @jax.jit
    def step(totals: dict, variables: Variables, batch: dict, real: jax.Array) -> dict:
        outputs, _ = network.apply(variables.params, variables.state, inputs_of(batch), train=False, key=None)
        losses = objective.loss(outputs, batch)
        values = {"loss": losses, **{name: metric(outputs, batch) for name, metric in objective.metrics.items()}}
        values["bad"] = ~jnp.isfinite(losses)
        return {name: totals[name] + jnp.sum(jnp.where(real, value, 0)) for name, value in values.items()}

    def nothing() -> dict:
        return {metric: jnp.float32(0) for metric in ("loss", *objective.metrics)} | {"bad": jnp.int32(0)}

    def first_bad(variables: Variables, split: Any, batch_size: int) -> int:
        """The first example without a finite loss, found by the compiled step."""
        for i, (batch, real) in enumerate(_batches(split, batch_size)):
            if step(nothing(), variables, batch, real)["bad"]:
                alone = np.eye(batch_size, dtype=bool)
                bad = [bool(step(nothing(), variables, batch, one & real)["bad"]) for one in alone]
                return i * batch_size + bad.index(True)
        raise AssertionError("unreachable: the loss of some example was not finite")

    def run(variables: Variables, split: Any, *, name: str = "test") -> dict[str, float]:
        size, totals = _size(split), nothing()
        for batch, real in _batches(split, min(batch_size, size)):
            totals = step(totals, variables, batch, real)
        totals = jax.device_get(totals)  # the only wait
        if totals["bad"]:
            first = first_bad(variables, split, min(batch_size, size))
            raise DivergedError(_why_not_finite(name, int(totals["bad"]), size, first, variables))
        return {metric: float(totals[metric]) / size for metric in ("loss", *objective.metrics)}

    return run


def evaluate(
    network: Network,
    variables: Variables,
    objective: Objective,
    split: Any,
    *,
    batch_size: int,
    name: str = "test",
) -> dict[str, float]:
    """The mean loss and metrics over every example of a split.

    `(1 / n) sum_i value(outputs_i, example_i)`: the last batch is filled up with copies of the first examples that
    count nothing, so that all batches have one shape and none is lost. To evaluate often, keep an `evaluator`.

    Args:
        network: the function to evaluate, in its resting mode (no dropout, stored batch statistics).
        variables: its weights and state.
        objective: loss and metrics.
        split: arrays by name (`x`, `y`, perhaps `lengths`), or a sequence of such records, as a `GrainSplit` is.
        batch_size: examples in one step; the result does not depend on it but by rounding.
        name: what the split is called in messages.

    Returns:
        `{"loss": ..., metric: ...}`, plain numbers.

    Raises:
        DivergedError: the loss of some example is not finite.
    """
    return evaluator(network, objective, batch_size=batch_size)(variables, split, name=name)


@dataclass(frozen=True)
class _Noisy:
    """Records with noise on their inputs, each drawn from its place alone."""

    records: Any
    noise: float
    seed: int

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        record = self.records[index]
        random = np.random.RandomState([self.seed, index])
        return {**record, "x": _with_noise(record["x"], self.noise, random)}


def noisy(split: Any, noise: float, seed: int = 0) -> Any:
    """The same examples with `x + noise * n` in the place of x, n normal and the same for the same seed.

    Args:
        split: arrays by name, or a sequence of records, as `evaluate` takes it.
        noise: standard deviation, in units of the inputs.
        seed: of n.

    Raises:
        UserMistake: the inputs are integers.
    """
    if isinstance(split, Mapping):
        return {**split, "x": _with_noise(split["x"], noise, np.random.RandomState(seed))}
    return _Noisy(getattr(split, "dataset", split), noise, seed)


def _with_noise(x: np.ndarray, noise: float, random: np.random.RandomState) -> np.ndarray:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserMistake(f"noise on inputs needs floats, but x is {x.dtype}; leave `robustness` out")
    return x + (noise * random.standard_normal(x.shape)).astype(x.dtype)


def _size(split: Any) -> int:
    return len(split["x"]) if isinstance(split, Mapping) else len(split)


def _batches(split: Any, batch_size: int) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Batches of one shape, each with what is real of it: [batch] of bool."""
    size = _size(split)
    records = getattr(split, "dataset", split)  # a GrainSplit holds its records there
    for start in range(0, size, batch_size):
        rows = np.arange(start, start + batch_size)
        real = rows < size
        rows = np.where(real, rows, 0)
        if isinstance(split, Mapping):
            yield {name: np.asarray(values[rows]) for name, values in split.items()}, real
        else:
            chosen = [records[int(row)] for row in rows]
            yield {name: np.stack([record[name] for record in chosen]) for name in chosen[0]}, real


def _why_not_finite(name: str, bad: int, size: int, first: int, variables: Variables) -> str:
    arrays = leaves_by_path(variables.params) | leaves_by_path(variables.state)
    broken = [path for path, array in arrays.items() if not np.isfinite(np.asarray(array, np.float32)).all()]
    reason = (
        f"NaN or infinity stands in {', '.join(broken[:3])}{', ...' if len(broken) > 3 else ''}: training diverged; "
        "lower the learning rate."
        if broken
        else "All weights are finite: look for NaN, huge values or labels out of range in the data."
    )
    where = f"{bad} of {size} examples of the {name} split, the first is example {first}"
    return f"The loss is not finite on {where}. {reason}"


def describe(network: Network, variables: Variables, masks: PyTree | None, inputs: Sequence[Any]) -> dict[str, Any]:
    """How large a network is and how much it computes for one example.

    Args:
        network: the function, in its resting mode.
        variables: its weights (pruned ones are zero) and state.
        masks: bool leaves for the prunable weights, True = alive, None elsewhere; None: nothing was pruned.
        inputs: one array or `ShapeDtypeStruct` for each input, with a batch axis of any size.

    Returns:
        `params`, `nonzero` (of all weights); `sparsity` (pruned / prunable), `sparsity_total` (pruned / all);
        `macs`, `effective_macs` (of one example); `bytes`, `bytes_compressed` (weights and state as an `.npz` file,
        raw and deflated at level 6); `notes` of `cost`; and `layers`: path -> `shape`, `size`, `nonzero`, `prunable`,
        `sparsity`, `macs`, `effective_macs`. Plain numbers, lists and text.
    """
    forward = _forward(network)
    one = tuple(jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for x in inputs)
    counted = cost(lambda params, inputs: forward(params, variables.state, inputs), variables.params, one)
    alive = {path: np.asarray(mask) for path, mask in leaves_by_path(masks).items()}
    dead = {path: mask.size - int(mask.sum()) for path, mask in alive.items()}
    prunable = sum(mask.size for mask in alive.values())
    layers = {}
    for path, leaf in leaves_by_path(variables.params).items():
        if not leaf.size:  # of a layer that was taken away
            continue
        macs, effective_macs = counted.layers.get(path, (0, 0))
        layers[path] = {
            "shape": list(leaf.shape),
            "size": int(leaf.size),
            "nonzero": int(np.count_nonzero(leaf)),
            "prunable": path in alive,
            "sparsity": dead[path] / leaf.size if path in alive else 0.0,
            "macs": macs,
            "effective_macs": effective_macs,
        }
    arrays = leaves_by_path({"params": variables.params, "state": variables.state})
    return {
        "params": counted.params,
        "nonzero": counted.nonzero,
        "sparsity": sum(dead.values()) / prunable if prunable else 0.0,
        "sparsity_total": sum(dead.values()) / counted.params if counted.params else 0.0,
        "macs": counted.macs,
        "effective_macs": counted.effective_macs,
        "bytes": _npz_bytes(arrays, zipfile.ZIP_STORED),
        "bytes_compressed": _npz_bytes(arrays, zipfile.ZIP_DEFLATED),
        "notes": list(counted.notes),
        "layers": layers,
    }


def _npz_bytes(arrays: Mapping[str, Any], compression: int) -> int:
    """Size of the file that `numpy.savez` would write."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression, compresslevel=6) as archive:
        for path, array in arrays.items():
            with archive.open(f"{path}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
    return file.tell()


def latencies(
    networks: Mapping[str, tuple[Network, Variables]],
    inputs: Callable[[int], Sequence[Any]],
    batch_sizes: Sequence[int],
    *,
    min_calls: int = 50,
    min_seconds: float = 0.3,
    max_seconds: float = 2.0,
) -> dict[str, dict[str, dict[str, float]]]:
    """How long one call takes, in milliseconds: compiled, warm, inputs on the device, each call waited for.

    The networks take turns of a few calls, so that a busy machine slows them all alike. Measured is the resting
    forward pass with weights as arguments; networks that share their function (dense and masked) share one program.

    Args:
        networks: name -> (network, its variables).
        inputs: `inputs(batch_size) -> (x, ...)`, arrays.
        batch_sizes: what to measure.
        min_calls: each network is called at least so often,
        min_seconds: and for at least so long,
        max_seconds: but no longer than this, but for its first turn.

    Returns:
        name -> batch size, as text -> `{"p50", "p90"}` in milliseconds.
    """
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in networks}
    for batch_size in batch_sizes:
        x = jax.device_put(tuple(inputs(batch_size)))
        calls = {
            name: partial(_compiled(network, variables, x), *jax.device_put(variables), x)
            for name, (network, variables) in networks.items()
        }
        times = _take_turns(calls, min_calls=min_calls, min_seconds=min_seconds, max_seconds=max_seconds)
        for name, seconds in times.items():
            p50, p90 = np.percentile(np.array(seconds) * 1e3, [50, 90])
            found[name][str(batch_size)] = {"p50": float(p50), "p90": float(p90)}
    return found


def peak_bytes(network: Network, variables: Variables, inputs: Sequence[Any]) -> int | None:
    """Memory that one call needs at most: weights, inputs, outputs and what XLA keeps between, as it planned it.

    Args:
        network: the function, in its resting mode.
        variables: its weights and state.
        inputs: `(x, ...)`, arrays of a batch.

    Returns:
        Bytes; None where the backend does not tell.
    """
    plan = _compiled(network, variables, inputs).memory_analysis()
    if plan is None:
        return None
    return plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes - plan.alias_size_in_bytes


def _compiled(network: Network, variables: Variables, inputs: Sequence[Any]) -> Any:
    leaves, structure = jax.tree.flatten((*variables, tuple(inputs)))
    return _program(network, structure, tuple((np.shape(a), str(jnp.result_type(a))) for a in leaves))


@lru_cache(maxsize=32)
def _program(network: Network, structure: Any, shapes: tuple[tuple[tuple[int, ...], str], ...]) -> Any:
    """The compiled resting forward pass; networks that share their function and shapes share it."""
    arguments = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes])
    return jax.jit(_forward(network)).lower(*arguments).compile()


def _forward(network: Network) -> Callable[..., jax.Array]:
    return lambda params, state, inputs: network.apply(params, state, inputs, train=False, key=None)[0]


def _take_turns(
    calls: Mapping[str, Callable[[], Any]], *, min_calls: int, min_seconds: float, max_seconds: float
) -> dict[str, list[float]]:
    """The seconds of each call; the calls take turns of equal time until all were measured long enough."""
    for call in calls.values():
        for _ in range(3):
            jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)

    def enough(name: str) -> bool:
        return spent[name] >= max_seconds or (len(times[name]) >= min_calls and spent[name] >= min_seconds)

    while not all(enough(name) for name in calls):
        for name, call in calls.items():
            began = now = time.perf_counter()
            while spent[name] < max_seconds and now - began < _TURN_SECONDS:
                start = time.perf_counter()
                jax.block_until_ready(call())
                now = time.perf_counter()
                times[name].append(now - start)
            spent[name] += now - began
    return times
