"""Networks pruned layer by layer, each layer's masks and weights found together: `pj.sparsegpt`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prune_jax.allocation import Scope
from prune_jax.criteria import Criterion, find
from prune_jax.errors import UserMistake
from prune_jax.granularity import Written, check_granularity, has_groups
from prune_jax.layers import Layer, visit
from prune_jax.masks import check_collapse, check_finite, masks_of
from prune_jax.notation import Granularity
from prune_jax.scoring import mask, score
from prune_jax.statistics import Loss
from prune_jax.trees import PyTree, leaves_by_path, map_by_path

COUNTED = ("layer", "erk", "output")  # scopes in which how many die where does not hang on scores


def sparsegpt(
    params: PyTree,
    *,
    loss: Loss,
    batches: Iterable[PyTree],
    sparsity: float | None = None,
    scope: Scope = "layer",
    granularity: Written = "weight",
    alive: PyTree | None = None,
    prunable: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
) -> tuple[PyTree, PyTree]:
    """SparseGPT: masks, and weights that make up for them, layer by layer (Frantar & Alistarh 2023, arXiv:2301.00774).

    Each layer sees what those before it answer once they are pruned. Layers of any JAX function will do: dense kernels
    of any layout and convolutions, with strides, dilation and groups. Those inside loops are refused.

    Args:
        params: any pytree of arrays.
        loss: `loss(params, batch)`; any function will do, since it is only looked at for the layers in it.
        batches: pytrees of arrays `[batch, ...]`, calibration data; read once unless what layers see takes more than
            1 GiB, or a kernel is used in several places.
        sparsity: fraction that dies, in [0, 1); none with n:m, or with a table as `scope`.
        scope: `layer` as in the paper; or as of `pj.mask`: with `global` or `lamp` scores of the dense layers say how
            many of each die.
        granularity: `weight`, or n:m such as `"2:4"`.
        alive: earlier masks: what is dead there stays dead.
        prunable: patterns of the leaves that may be pruned; left out, floating leaves of two axes or more.
        exclude: patterns of leaves that stay dense.
        options: of the criterion `sparsegpt`: `block`, `dampening`, `inputs`.

    Returns:
        `params` with zeros where masked and other weights corrected, types kept; masks, bool, True = alive, None for
        other leaves.

    Raises:
        UserMistake: the target is missing or impossible, or what a leaf is multiplied with cannot be seen.
        NonFiniteScoreError: a weight came out NaN or infinite.
        LayerCollapseError: a leaf would be left without a living weight.

    >>> params = {"w": jnp.array([[3.0], [1.0]])}  # two inputs that are always equal
    >>> words = {"loss": lambda p, x: jnp.mean(x @ p["w"]), "batches": [jnp.array([[1.0, 1.0], [2.0, 2.0]])]}
    >>> sparsegpt(params, sparsity=0.5, **words)[0]["w"].round(1).ravel()
    Array([0., 4.], dtype=float32)
    """
    entry = find("sparsegpt")
    unit = check_granularity(granularity, entry.granularities)
    where: dict[str, Any] = {"prunable": prunable, "exclude": exclude}
    if unit.fixed or scope in COUNTED or isinstance(scope, Mapping):
        scores = score("magnitude", params, **where)
    else:
        batches = batches if iter(batches) is not batches else list(batches)
        scores = score(entry, params, loss=loss, batches=batches, options=options, **where)
    shared = "global" if unit.fixed and scope == "layer" else scope  # n:m says by itself how many die where
    masks = mask(scores, sparsity=sparsity, scope=shared, granularity=unit, alive=alive)
    given: dict[str, Any] = {"granularity": unit, "scope": scope, "alive": alive, "options": options}
    return sweep(entry, params, masks, loss=loss, batches=batches, **given)


def sweep(
    entry: Criterion,
    params: PyTree,
    masks: PyTree,
    *,
    loss: Loss,
    batches: Iterable[PyTree],
    granularity: Granularity,
    scope: Scope = "layer",
    alive: PyTree | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[PyTree, PyTree]:
    """As many die of each leaf as in `masks`, but those that the criterion finds in its sweep over the layers.

    Args:
        entry: a criterion with a `sweep`.
        params: any pytree of arrays.
        masks: bool arrays under the same paths; leaves of which nothing dies are left as they are.
        loss: as of `sparsegpt`.
        batches: as of `sparsegpt`.
        granularity: `weight` or n:m.
        scope: `output`: of each output the same number dies.
        alive: earlier masks.
        options: of the criterion.

    Returns:
        Weights and masks, as of `sparsegpt`.
    """
    options = dict(options or {})
    entry.check_options(options)
    chosen = {path: jnp.asarray(each, bool) for path, each in masks_of(params, masks).items()}
    earlier = {path: jnp.asarray(each, bool) for path, each in leaves_by_path(alive).items() if path in chosen}
    dying = {path: each.size - int(jnp.sum(each)) for path, each in chosen.items()}
    m = granularity.numbers[1] if granularity.fixed else 1
    paths = [
        path
        for path, count in dying.items()
        if count and (m == 1 or has_groups(chosen[path].shape, m, granularity.axis))
    ]

    def of_layer(layer: Layer) -> jax.Array:
        before = layer.matrix(earlier[layer.path]) if layer.path in earlier else None
        if granularity.fixed:
            found, w = _fixed(entry, layer, before, granularity, options)
        else:
            prune = dying[layer.path]
            if scope == "output":  # what each has to lose; of some, more may be dead already
                lost = jnp.sum(~layer.matrix(chosen[layer.path]), axis=1)  # [groups, out]
                prune = int(jnp.min(lost)) * lost.size
            words = {"prune": prune, "by_output": scope == "output", "alive": before}
            found, w = entry.sweep(layer.w, layer.products, **words, **options)  # type: ignore[misc]
        chosen[layer.path] = layer.leaf(found)
        return w

    most = {**entry.options, **options}["inputs"]
    swept = visit(of_layer, loss, params, batches, paths, inputs=most, multiple=m)
    check_finite({path: leaf for path, leaf in leaves_by_path(swept).items() if path in chosen}, entry.name)
    check_collapse(chosen)
    return swept, map_by_path(lambda path, _: chosen.get(path), params)


def _fixed(
    entry: Criterion, layer: Layer, alive: jax.Array | None, granularity: Granularity, options: Mapping[str, Any]
) -> tuple[jax.Array, jax.Array]:
    """Mask and weights of a layer of which n of each m weights are kept along an axis of the parameter."""
    line, (n, m) = layer.along(granularity.axis), granularity.numbers[:2]
    turned, products = bool((np.diff(line.order) != 1).any()), layer.products
    if len(products) > 1 and not line.across and (turned or (line.size % m and line.size < layer.w.shape[1])):
        raise UserMistake(
            f"groups of {m} in {layer.path!r} {list(layer.shape)} lie in several pieces of its {layer.w.shape[1]} "
            f"inputs; set the option inputs to {layer.w.shape[1]}"
        )
    if line.across and line.size % m and line.size < layer.w.shape[2]:
        raise UserMistake(f"axis of {line.size} in {layer.path!r} is no multiple of {m}: exclude it")
    axis, order = 2 if line.across else 1, line.order
    if turned and not line.across:
        products = (products[0][:, order][:, :, order],)
    w, before = (a if a is None or not turned else jnp.take(a, order, axis=axis) for a in (layer.w, alive))
    words = {"n_m": (n, m), "across": line.across, "period": line.size, "alive": before}
    found = entry.sweep(w, products, **words, **options)  # type: ignore[misc]
    return tuple(jnp.take(a, np.argsort(order), axis=axis) for a in found) if turned else found  # type: ignore[return-value]
