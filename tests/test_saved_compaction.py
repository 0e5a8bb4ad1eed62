"""What is compact is data: indices and arrays, restored with the function, or exported and run without it."""

import jax
import numpy as np
import pytest
from jax import export

from prune_jax.compaction import shrink
from prune_jax.export import load_packed
from prune_jax.export.packed import to_packed
from prune_jax.structure import restored, stored
from prune_jax.trees import leaves_by_path, map_by_path
from tests.test_compaction import FAST, close, half, traced
from tests.zoo import ZOO

QUICK = ("mlp", "batch_norm_as_it_trains", "attention_fused_and_split")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ZOO])
def test_a_compact_network_is_restored_and_exported(name):
    apply, params, inputs, net = traced(name)
    dead = half(net, np.random.default_rng(0)) | {layer: [0] for layer in list(net.layers)[:1]}
    small = net.compact(dead, params)
    expected = jax.jit(small.apply, compiler_options=FAST)(small.params, *inputs)

    shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), params)
    again = load_packed(to_packed({path: np.asarray(leaf) for path, leaf in leaves_by_path(small.params).items()}))
    arrays = map_by_path(lambda path, _: again[path], params)
    function = shrink(apply, shapes, restored(stored(small.keep, shapes), shapes))
    close(jax.jit(function, compiler_options=FAST)(arrays, *inputs), expected, 1e-6)

    program = export.export(jax.jit(lambda *x: small.apply(small.params, *x)))(*inputs)
    close(export.deserialize(program.serialize()).call(*inputs), expected, 1e-5)
