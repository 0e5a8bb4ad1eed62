"""Bias correction: what died added something on average, and the biases that follow take it over.

Biases are corrected in the order of evaluation, each on what reaches it through those corrected before: so it also
makes up for what earlier deaths did to its inputs, and nothing is made up for twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prune_jax.activations import capture
from prune_jax.errors import UserMistake
from prune_jax.masks import apply_masks, masks_of
from prune_jax.trees import PyTree, leaves_by_path, map_by_path


class Corrected(NamedTuple):
    """A pruned network whose biases make up for what died.

    Attributes:
        params: its weights.
        biases: paths of the biases that changed.
        left: paths of the kernels that lost weights and are followed by no bias, or are read in a loop.
    """

    params: PyTree
    biases: tuple[str, ...]
    left: tuple[str, ...]


def correct_bias(
    params: PyTree,
    masks: PyTree,
    *,
    apply: Callable[..., Any],
    batches: Iterable[Sequence[Any]],
    pruned: PyTree | None = None,
    pruned_apply: Callable[..., Any] | None = None,
) -> Corrected:
    """Moves into biases what died added on average: `b' = b + E[v] - E[v']`, so that E[v' + b'] is E[v + b].

    v and v' are what a bias is added to in the whole and in the pruned network: x W and x' (W o mask) of a dense layer,
    a convolution's sum at all positions. Where inputs are the same, that is `b' = b + sum over dead E[x_j] w_j`; a unit
    that always answers the same is replaced exactly. After Nagel et al. 2019, arXiv:1906.04721 (sec. 4.2), who correct
    what quantization shifts. It takes one pass over the batches for the whole network, and one for each bias.

    A bias is a parameter that any JAX function adds to what is made of its inputs, outside loops: also that of a layer
    norm, or of a batch norm at rest.

    Args:
        params: weights before pruning.
        masks: bool arrays under the same paths; leaves that it lacks are dense. Dead elements of biases stay zero.
        apply: `(params, *inputs) -> outputs`, at rest; a `jax.tree_util.Partial` compiles once for any of its arrays.
        batches: inputs of batches, `(x,)`; gone through again and again.
        pruned: weights after pruning, where survivors were moved too; left out, `params` under the masks.
        pruned_apply: what answers for them, where more than the weights changed; left out, `apply`.

    Raises:
        UserMistake: there is no batch, or masks do not fit the parameters.

    >>> params = {"a": jnp.array([[1.0, 0.0]]), "b": jnp.array([0.0, 3.0]), "c": jnp.array([[1.0], [2.0]])}
    >>> params["d"] = jnp.zeros(1)
    >>> apply = lambda p, x: jax.nn.relu(x @ p["a"] + p["b"][None]) @ p["c"] + p["d"][None]
    >>> masks = {"b": jnp.array([True, False]), "c": jnp.array([[True], [False]])}  # the second unit always answers 3
    >>> correct_bias(params, masks, apply=apply, batches=[(jnp.ones((4, 1)),)]).params["d"]
    Array([6.], dtype=float32)
    """
    held = [tuple(inputs) for inputs in batches]
    if not held:
        raise UserMistake("there is no batch: give at least one to take means over")
    alive = masks_of(params, masks)
    whole, small = _partial(apply), _partial(pruned_apply or apply)
    current = leaves_by_path(apply_masks(params, masks) if pruned is None else pruned)
    order, kernels, read = _biases(whole, params, held[0])

    def filled() -> PyTree:
        return map_by_path(lambda path, _: current[path], params)

    wanted, found, changed = _means(whole, params, held), None, []
    for path in order:
        if found is None:
            found = _means(small, filled(), held)
        bias, shift = jnp.asarray(current[path]), wanted[path] - found[path]
        shift = jnp.where(alive[path], shift, 0) if path in alive else shift
        if np.any(jax.device_get(shift)):
            current[path], found = (bias + shift).astype(bias.dtype), None
            changed.append(path)
    dead = (path for path, mask in alive.items() if path in read and not np.all(jax.device_get(mask)))
    return Corrected(filled(), tuple(changed), tuple(path for path in dead if path not in kernels))


def _partial(apply: Callable[..., Any]) -> jax.tree_util.Partial:
    return apply if isinstance(apply, jax.tree_util.Partial) else jax.tree_util.Partial(apply)


def _biases(apply: Any, params: PyTree, inputs: Sequence[Any]) -> tuple[list[str], set[str], set[str]]:
    """Paths of the biases as they are added, of the kernels that they follow, and of all kernels; nothing is run."""
    order: dict[str, None] = {}
    kernels: set[str] = set()
    read: set[str] = set()

    def look(params: PyTree, *inputs: Any) -> None:
        seen = capture(apply, params, *inputs)
        order.update(dict.fromkeys(addition.path for addition in seen.additions))
        kernels.update(*(addition.kernels for addition in seen.additions))
        read.update(reading.path for reading in seen.readings)
        read.update(path for path, leaf in leaves_by_path(params).items() if path in seen.unseen and leaf.ndim > 1)

    jax.eval_shape(look, params, *inputs)
    return list(order), kernels, read - order.keys()


def _means(apply: Any, params: PyTree, batches: Iterable[Sequence[Any]]) -> dict[str, jax.Array]:
    """The mean of each bias and what it is added to, over all batches and all places."""
    total = None
    for inputs in batches:
        found = _sums(apply, params, tuple(inputs))
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    assert total is not None  # there is a batch
    biases = leaves_by_path(params)
    return {path: sums / counts + biases[path] for path, (sums, counts) in total.items()}


@jax.jit
def _sums(apply: Any, params: PyTree, inputs: tuple[Any, ...]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """By bias, the sum of what it is added to, and of how many values."""
    found: dict[str, tuple[jax.Array, jax.Array]] = {}
    for addition in capture(apply, params, *inputs).additions:
        sums, counts = found.get(addition.path, (jnp.float32(0), jnp.float32(0)))
        found[addition.path] = (sums + addition.sums(), counts + addition.counts())
    return found
