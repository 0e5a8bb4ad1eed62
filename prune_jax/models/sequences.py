"""Networks for sequences, padded to one length or not: GRU, LSTM, transformer encoder."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from prune_jax.errors import UserMistake, did_you_mean
from prune_jax.models import settings

_CELLS: dict[str, Any] = {"gru": nnx.GRUCell, "lstm": nnx.OptimizedLSTMCell}


class Rnn(nnx.Module):
    """Stacked recurrent layers, read after the last real step of each sequence.

    GRU: Cho et al. 2014, arXiv:1406.1078. LSTM: Hochreiter & Schmidhuber 1997.

    Args:
        inputs: shape of one sample: [steps, features], or [steps] for tokens.
        outputs: width of the answer.
        cell: `gru` or `lstm`.
        width: units of each layer.
        layers: how many layers.
        vocab: for tokens, how many there are; each becomes a vector of `width`.
        dropout: fraction of units dropped in training, between layers and before the output.
        rngs: random streams.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: int,
        *,
        cell: str = "gru",
        width: int = 64,
        layers: int = 1,
        vocab: int | None = None,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        settings.positive(width=width, layers=layers)
        if cell not in _CELLS:
            raise UserMistake(f"cell = {cell!r} is not known{did_you_mean(cell, _CELLS)} (known: {', '.join(_CELLS)})")
        features = _features(inputs, vocab)
        if vocab is not None:
            self.embedding = nnx.Embed(vocab, width, rngs=rngs)
            features = width
        self.tokens = vocab is not None
        self.cells = tuple(f"{cell}_{i}" for i in range(layers))
        for i, name in enumerate(self.cells):
            setattr(self, name, _CELLS[cell](width if i else features, width, rngs=rngs))
        self.width, self.carries = width, 2 if cell == "lstm" else 1
        self.dropout = settings.dropout(dropout, rngs)
        self.output = nnx.Linear(width, outputs, rngs=rngs)

    def __call__(self, x: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """`x` [batch, steps, features] or tokens [batch, steps], `lengths` [batch] -> [batch, outputs]."""
        lengths, real = _real_steps(x, lengths)
        x = _blank(x, real)
        x = self.embedding(x) if self.tokens else x  # [batch, steps, features]
        start = jnp.zeros((x.shape[0], self.width), x.dtype)
        for name in self.cells:
            # jax.lax.scan, not nnx.RNN: that one carries the weights through the loop, and reverse mode would
            # then keep a copy of them for every step.
            _, states = jax.lax.scan(
                getattr(self, name), start if self.carries == 1 else (start, start), jnp.swapaxes(x, 0, 1)
            )
            x = self.dropout(jnp.swapaxes(states, 0, 1))  # [batch, steps, width]
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)  # [batch, 1, width]
        return self.output(last[:, 0])


class Transformer(nnx.Module):
    """Transformer encoder that classifies the mean over the real steps of a sequence.

    Vaswani et al. 2017, arXiv:1706.03762, with layer norms before the branches (Xiong et al. 2020, arXiv:2002.04745)
    and learned positions.

    Args:
        inputs: shape of one sample: [steps, features], or [steps] for tokens.
        outputs: width of the answer.
        dim: width of the residual stream.
        heads: attention heads; `dim` is a multiple.
        layers: how many blocks.
        mlp_ratio: hidden units of a block's dense part, as a multiple of `dim`.
        vocab: for tokens, how many there are.
        dropout: fraction dropped in training, of attention weights and of each branch.
        rngs: random streams.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: int,
        *,
        dim: int = 64,
        heads: int = 4,
        layers: int = 2,
        mlp_ratio: int = 4,
        vocab: int | None = None,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        settings.positive(dim=dim, heads=heads, layers=layers, mlp_ratio=mlp_ratio)
        if dim % heads:
            raise UserMistake(f"dim = {dim}: must be a multiple of heads, {heads}")
        features = _features(inputs, vocab)
        self.embedding: Any = (
            nnx.Linear(features, dim, rngs=rngs) if vocab is None else nnx.Embed(vocab, dim, rngs=rngs)
        )
        self.position = nnx.Embed(inputs[0], dim, rngs=rngs)
        self.layers = layers
        for i in range(layers):
            setattr(self, f"block_{i}", EncoderBlock(dim, heads, mlp_ratio * dim, dropout=dropout, rngs=rngs))
        self.norm = nnx.LayerNorm(dim, rngs=rngs)
        self.output = nnx.Linear(dim, outputs, rngs=rngs)

    def __call__(self, x: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """`x` [batch, steps, features] or tokens [batch, steps], `lengths` [batch] -> [batch, outputs]."""
        lengths, real = _real_steps(x, lengths)
        x = self.embedding(_blank(x, real)) + self.position(jnp.arange(x.shape[1]))[None]  # [batch, steps, dim]
        for i in range(self.layers):
            x = getattr(self, f"block_{i}")(x, real)
        total = jnp.sum(_blank(self.norm(x), real), axis=1)  # [batch, dim]
        return self.output(total / lengths[:, None].astype(x.dtype))


class EncoderBlock(nnx.Module):
    """`x + attention(norm(x))`, then `x + dense(gelu(dense(norm(x))))`.

    Args:
        dim: width of the residual stream.
        heads: attention heads.
        hidden: hidden units of the dense part.
        dropout: fraction dropped in training.
        rngs: random streams.
    """

    def __init__(self, dim: int, heads: int, hidden: int, *, dropout: float, rngs: nnx.Rngs):
        self.norm_0 = nnx.LayerNorm(dim, rngs=rngs)
        self.attention = SelfAttention(dim, heads, dropout=dropout, rngs=rngs)
        self.norm_1 = nnx.LayerNorm(dim, rngs=rngs)
        self.hidden = nnx.Linear(dim, hidden, rngs=rngs)
        self.output = nnx.Linear(hidden, dim, rngs=rngs)
        self.dropout = settings.dropout(dropout, rngs)

    def __call__(self, x: jax.Array, seen: jax.Array) -> jax.Array:
        """`x` [batch, steps, dim], `seen` [batch, steps] -> [batch, steps, dim]."""
        x = x + self.dropout(self.attention(self.norm_0(x), seen))
        return x + self.dropout(self.output(nnx.gelu(self.hidden(self.norm_1(x)))))


class SelfAttention(nnx.Module):
    """`softmax(Q K^T / sqrt(d)) V` in several heads, over the steps that are seen.

    Not `nnx.MultiHeadAttention`: its biases are matrices, [heads, d], and would be taken for weights to prune.

    Args:
        dim: width of the residual stream.
        heads: attention heads, each of d = dim / heads.
        dropout: fraction of attention weights dropped in training.
        rngs: random streams.
    """

    def __init__(self, dim: int, heads: int, *, dropout: float, rngs: nnx.Rngs):
        self.query, self.key, self.value, self.output = (nnx.Linear(dim, dim, rngs=rngs) for _ in range(4))
        self.heads = heads
        self.dropout = settings.dropout(dropout, rngs)

    def __call__(self, x: jax.Array, seen: jax.Array) -> jax.Array:
        """`x` [batch, steps, dim], `seen` [batch, steps] -> [batch, steps, dim]."""
        split = (*x.shape[:2], self.heads, x.shape[2] // self.heads)
        q, k, v = (layer(x).reshape(split) for layer in (self.query, self.key, self.value))  # [batch, steps, heads, d]
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * split[-1] ** -0.5
        scores = jnp.where(seen[:, None, None, :], scores, jnp.finfo(x.dtype).min)
        weights = self.dropout(jax.nn.softmax(scores))  # [batch, heads, steps, steps]
        return self.output(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))


def _features(inputs: tuple[int, ...], vocab: int | None) -> int:
    """Features of one step, 0 for tokens."""
    if vocab is None:
        if len(inputs) != 2:
            raise UserMistake(f"sequences arrive as [steps, features], but one sample of x is {list(inputs)}")
        return inputs[1]
    settings.positive(vocab=vocab)
    if len(inputs) != 1:
        raise UserMistake(f"sequences of tokens arrive as [steps], but one sample of x is {list(inputs)}")
    return 0


def _real_steps(x: jax.Array, lengths: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Lengths [batch] and which steps are no padding [batch, steps]."""
    if lengths is None:
        lengths = jnp.full(x.shape[:1], x.shape[1], jnp.int32)
    return lengths, jnp.arange(x.shape[1])[None, :] < lengths[:, None]


def _blank(x: jax.Array, real: jax.Array) -> jax.Array:
    """Zeros in place of padded steps, so that whatever stands there has no effect, not even through gradients."""
    return jnp.where(real.reshape(real.shape + (1,) * (x.ndim - 2)), x, 0)
