"""Methods that train other variables than the network's weights: STR, L0 gates, sparse variational dropout.

The network's parameters are w' = f(w, v, noise). The state holds the weights w, which the optimizer steps, and beside
them v, thresholds, gates or variances, with an optimizer of their own; the gradient by w' is pulled back through f.
What has noise in training has none in the end: `settle` answers the weights to use, zero where the masks are False.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from prune_jax.errors import UserMistake
from prune_jax.masks import apply_masks
from prune_jax.sparse_training.changing import SparseState, dense_masks, key_data, needed, of_masked, step_key
from prune_jax.sparse_training.entry import method
from prune_jax.trees import PyTree, leaves_by_path, map_by_path

GAMMA, ZETA, BETA = -0.1, 1.1, 2 / 3  # of the hard concrete distribution: its ends, and its temperature
K1, K2, K3 = 0.63576, 1.87320, 1.48695  # of the approximation to the divergence of sparse variational dropout


@dataclass(frozen=True)
class Form:
    """A reparametrisation of one leaf; w and v as in the module's docstring, w in float32 or wider."""

    name: str  # of v in the state's memory
    start: Callable[[jax.Array], jax.Array]  # w -> v, float32
    effective: Callable[[jax.Array, jax.Array, Any], jax.Array]  # w, v, noise -> w'
    penalty: Callable[[jax.Array, jax.Array], jax.Array]  # w, v -> [], added to the loss
    alive: Callable[[jax.Array, jax.Array], jax.Array]  # w, v -> bool
    draw: Callable[..., jax.Array] | None = None  # key, shape, dtype -> noise


@method(
    "soft_threshold",
    formula="w' = sign(w) max(|w| - sigmoid(s_l), 0); the threshold s_l of a layer is trained, with decay",
    paper="Kusupati et al. 2020, arXiv:2002.03231 (STR)",
)
def soft_threshold(
    inner: optax.GradientTransformation,
    *,
    decay: float,
    start: float = -6.0,
    optimizer: optax.GradientTransformation | None = None,
    prunable: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """Soft threshold reparametrisation: each layer learns below which size its weights are zero.

    Minimises loss(w') + decay / 2 sum_l s_l^2 with w' = sign(w) max(|w| - sigmoid(s_l), 0). The decay pulls s_l from
    its start, far below zero, towards a threshold of one half; how many die comes of itself. A dead weight has no
    gradient and rests, until the threshold falls below it.

    Deviations from the paper: s has an optimizer of its own; the decay of w is that of `inner`, if it has one.

    Args:
        inner: any optimizer; it steps w.
        decay: larger kills more.
        start: s_l as the transformation is initialised.
        optimizer: steps s; left out, Adam at 0.01.
        prunable: patterns of the leaves that may be pruned; left out, floating leaves of two axes or more.
        exclude: patterns of leaves that stay dense.

    Returns:
        A transformation whose state is a `SparseState`; it stands outermost in a chain.
    """
    _at_least_zero("decay", decay)
    form = Form(
        "threshold",
        start=lambda w: jnp.full((), start, jnp.float32),
        effective=lambda w, s, noise: _shrunk(w, s),
        penalty=lambda w, s: decay / 2 * jnp.square(s),
        alive=lambda w, s: _shrunk(w, s) != 0,
    )
    own = optax.adam(1e-2) if optimizer is None else optimizer
    return _reparametrised(inner, form, own, prunable=prunable, exclude=exclude)


@method(
    "l0",
    formula="w' = w z, z hard concrete with log alpha trained; loss + l0 sum P(z != 0); dead where z at rest is 0",
    paper="Louizos et al. 2018, arXiv:1712.01312",
)
def l0(
    inner: optax.GradientTransformation,
    *,
    l0: float,
    key: jax.Array,
    drop: float = 0.1,
    optimizer: optax.GradientTransformation | None = None,
    prunable: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """Minimises the expected loss + l0 times the expected number of living weights, by gates that are stochastic.

    w' = w z, z = min(1, max(0, 1.2 y - 0.1)), y = sigmoid((log u - log(1 - u) + log alpha) / beta), u uniform,
    beta = 2/3; P(z != 0) = sigmoid(log alpha - beta log(0.1 / 1.1)). At rest z = min(1, max(0, 1.2 sigmoid(log alpha)
    - 0.1)), and what has z = 0 is dead: `settle`.

    Deviation from the paper: one draw of the gates for a batch, of each weight by itself; there, most are of groups.

    Args:
        inner: any optimizer; it steps w.
        l0: weight of the expected number of living weights beside the loss.
        key: a PRNG key, of the gates.
        drop: log alpha starts at log(1 - drop) - log(drop), in (0, 1).
        optimizer: steps log alpha; left out, Adam at 0.01.
        prunable: patterns of the leaves that may be pruned; left out, floating leaves of two axes or more.
        exclude: patterns of leaves that stay dense.

    Returns:
        A transformation whose state is a `SparseState`; it stands outermost in a chain.
    """
    _at_least_zero("l0", l0)
    if not 0 < drop < 1:
        raise UserMistake(f"drop = {drop}: must be above 0 and below 1")
    form = Form(
        "log_alpha",
        start=lambda w: jnp.full(w.shape, math.log(1 - drop) - math.log(drop), jnp.float32),
        effective=lambda w, a, noise: w * _gate((noise + a) / BETA),
        penalty=lambda w, a: l0 * jnp.sum(jax.nn.sigmoid(a - BETA * math.log(-GAMMA / ZETA))),
        alive=lambda w, a: _gate(a) > 0,
        draw=jax.random.logistic,
    )
    own = optax.adam(1e-2) if optimizer is None else optimizer
    return _reparametrised(inner, form, own, key=key, prunable=prunable, exclude=exclude)


@method(
    "variational_dropout",
    formula="w' = w + sigma n, n ~ N(0, 1); loss + KL(q || log-uniform) / N; dead where log(sigma^2 / w^2) > 3",
    paper="Molchanov et al. 2017, arXiv:1701.05369",
)
def variational_dropout(
    inner: optax.GradientTransformation,
    *,
    examples: int,
    key: jax.Array,
    weight: float = 0.1,
    begin: int = 0,
    end: int = 0,
    threshold: float = 3.0,
    start: float = -10.0,
    optimizer: optax.GradientTransformation | None = None,
    prunable: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """Sparse variational dropout: weights that drown in the noise that training allows them are dead.

    w' = w + sigma n; minimises the mean loss + weight / examples sum of KL, where with log alpha = log sigma^2 -
    log w^2, KL = k1 - k1 sigmoid(k2 + k3 log alpha) + log(1 + 1 / alpha) / 2 (k1 = 0.63576, k2 = 1.87320,
    k3 = 1.48695). w and log sigma^2 are trained; what has log alpha > threshold is dead, the others are their mean w:
    `settle`.

    Deviations from the paper: noise on weights, one draw for a batch, since noise on each example's pre-activations
    (local reparametrisation) is not possible for any JAX function; the gradient is as unbiased and varies more. So the
    KL weighs less unless told: at 1, some thousand examples are underfitted.

    Args:
        inner: any optimizer; it steps w.
        examples: how many the training set has; the loss is a mean over them.
        key: a PRNG key, of the noise.
        weight: of the KL; the paper has 1.
        begin: up to this step it is 0; from there it rises linearly,
        end: until this step.
        threshold: of log alpha; at 3, a weight's noise is 4.5 times its mean.
        start: log sigma^2 as the transformation is initialised.
        optimizer: steps log sigma^2; left out, Adam at 0.003.
        prunable: patterns of the leaves that may be pruned; left out, floating leaves of two axes or more.
        exclude: patterns of leaves that stay dense.

    Returns:
        A transformation whose state is a `SparseState`; it stands outermost in a chain.
    """
    _at_least_zero("weight", weight)
    if examples < 1:
        raise UserMistake(f"examples = {examples}: must be at least 1, the size of the training set")
    if not 0 <= begin <= end:
        raise UserMistake(f"begin = {begin}, end = {end}: 0 <= begin <= end")
    form = Form(
        "log_variance",
        start=lambda w: jnp.full(w.shape, start, jnp.float32),
        effective=lambda w, v, noise: w + jnp.exp(v / 2) * noise,
        penalty=lambda w, v: weight / examples * jnp.sum(_divergence(_log_alpha(w, v))),
        alive=lambda w, v: _log_alpha(w, v) <= threshold,
        draw=jax.random.normal,
    )
    ramp = optax.linear_schedule(0.0, 1.0, end - begin, begin) if end > begin else optax.constant_schedule(1.0)
    own = optax.adam(3e-3) if optimizer is None else optimizer
    return _reparametrised(inner, form, own, key=key, ramp=ramp, prunable=prunable, exclude=exclude)


def settle(params: PyTree, state: Any) -> PyTree:
    """The weights that a training method means: without the noise of training, exactly zero where its masks are False.

    Args:
        params: weights, as training left them.
        state: of the method, outermost in a chain: a `SparseState`, or what else has `masks`.

    Returns:
        For `l0`, w times the gate at rest; for `variational_dropout`, the means; for all others, `params`.

    >>> params = {"w": jnp.array([[1.0, 0.0]])}
    >>> tx = variational_dropout(optax.sgd(0.0), examples=10, key=jax.random.key(0))
    >>> updates, state = tx.update({"w": jnp.zeros((1, 2))}, tx.init(params), params)
    >>> settle(optax.apply_updates(params, updates), state)["w"], state.masks["w"]
    (Array([[1., 0.]], dtype=float32), Array([[ True, False]], dtype=bool))
    """
    if not hasattr(state, "masks"):
        raise UserMistake("settle needs the state of a training method; in a chain it is the last one's: state[-1]")
    memory = state.memory if isinstance(state, SparseState) else None
    if not isinstance(memory, dict) or memory.keys().isdisjoint(("log_alpha", "log_variance")):
        return params
    settled = apply_masks(memory["latent"], state.masks)
    if "log_alpha" in memory:
        settled = jax.tree.map(lambda w, a: (_wide(w) * _gate(a)).astype(w.dtype), settled, memory["log_alpha"])
    return _filled(params, settled)


def _shrunk(w: jax.Array, s: jax.Array) -> jax.Array:
    return jnp.sign(w) * jax.nn.relu(jnp.abs(w) - jax.nn.sigmoid(s))


def _gate(logit: jax.Array) -> jax.Array:
    """The sigmoid, stretched beyond 0 and 1 and cut there."""
    return jnp.clip(jax.nn.sigmoid(logit) * (ZETA - GAMMA) + GAMMA, 0, 1)


def _log_alpha(w: jax.Array, log_variance: jax.Array) -> jax.Array:
    return log_variance - jnp.log(jnp.square(w) + 1e-8)


def _divergence(log_alpha: jax.Array) -> jax.Array:
    return K1 - K1 * jax.nn.sigmoid(K2 + K3 * log_alpha) + jax.nn.softplus(-log_alpha) / 2


def _at_least_zero(name: str, value: float) -> None:
    if value < 0:
        raise UserMistake(f"{name} = {value}: must be at least 0")


def _reparametrised(
    inner: optax.GradientTransformation,
    form: Form,
    own: optax.GradientTransformation,
    *,
    key: jax.Array | None = None,
    ramp: optax.Schedule = lambda step: 1.0,
    prunable: Iterable[str] | None,
    exclude: Iterable[str],
) -> optax.GradientTransformationExtraArgs:
    """Wraps `inner`, which trains w, in a form under which the network sees w'.

    The network's first parameters are w itself, without noise; after each step they are w' under noise drawn anew. It
    is kept until the next gradient has gone back through it, since to draw it twice costs more.

    Args:
        inner: any optimizer; it sees the gradient by w, and w.
        form: what w' is.
        own: the optimizer of v.
        key: what noise is drawn from.
        ramp: step -> share of the penalty.
        prunable: patterns of the leaves that may be pruned.
        exclude: patterns of leaves that stay dense.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> SparseState:
        masks = dense_masks(params, prunable, exclude)
        w = jax.tree.map(jnp.copy, of_masked(params, masks))  # the step may donate both
        v = _each(form.start, w)
        still = jax.tree.map(lambda w: None if form.draw is None else jnp.zeros(w.shape, jnp.float32), w)
        memory = {"latent": w, form.name: v, "noise": still, "optimizer": own.init(v)}
        state = inner.init(params)
        return SparseState(_each(form.alive, w, v), state, jnp.zeros((), jnp.int32), key_data(key), memory)

    def update(
        updates: PyTree, state: SparseState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, SparseState]:
        params = needed(params)
        w, v = state.memory["latent"], state.memory[form.name]

        def composed(w: PyTree, v: PyTree) -> tuple[PyTree, jax.Array]:
            seen = _each(form.effective, w, v, state.memory["noise"])
            shown = jax.tree.map(lambda e, u: e.astype(u.dtype), seen, of_masked(updates, w))
            return shown, sum(jax.tree.leaves(_each(form.penalty, w, v)), jnp.zeros(()))

        (_, penalty), pull = jax.vjp(composed, w, v)
        by_w, by_v = pull((of_masked(updates, w), jnp.asarray(ramp(state.step), penalty.dtype)))
        dense, gradients = _filled(params, w), _filled(updates, by_w)
        steps, moved = inner.update(gradients, state.inner, dense, **extra)
        turns, own_state = own.update(by_v, state.memory["optimizer"], v)
        w, v = optax.apply_updates(w, of_masked(steps, w)), optax.apply_updates(v, turns)
        noise = state.memory["noise"] if form.draw is None else _drawn(form.draw, w, step_key(key, state))
        shown = leaves_by_path(_each(form.effective, w, v, noise))

        def step(path: str, u: jax.Array, old: jax.Array) -> jax.Array:
            if path not in shown:
                return u
            new, old = _wide(shown[path].astype(old.dtype)), _wide(old)  # so that the sum rounds once
            return jnp.where(new == 0, -old, new - old)  # w + (-w) is 0

        out = jax.tree.map(step, map_by_path(lambda path, _: path, params), steps, params)
        memory = {"latent": w, form.name: v, "noise": noise, "optimizer": own_state}
        return out, SparseState(_each(form.alive, w, v), moved, state.step + 1, state.key, memory)

    return optax.GradientTransformationExtraArgs(init, update)


def _drawn(draw: Callable[..., jax.Array], w: PyTree, key: Any) -> PyTree:
    """Noise for every leaf, from a key of its own."""
    leaves, structure = jax.tree.flatten(w)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        structure, [draw(k, leaf.shape, jnp.float32) for k, leaf in zip(keys, leaves, strict=True)]
    )


def _wide(w: jax.Array) -> jax.Array:
    return w.astype(jnp.promote_types(w.dtype, jnp.float32))


def _each(function: Callable[..., jax.Array], *trees: PyTree) -> PyTree:
    """`function(w, ...)` of every leaf, w in float32 at least."""
    return jax.tree.map(lambda w, *more: function(_wide(w), *more), *trees)


def _filled(params: PyTree, part: PyTree) -> PyTree:
    """`params` with the leaves of `part` in place of its own."""
    found = leaves_by_path(part)
    return map_by_path(lambda path, w: found.get(path, w), params)
