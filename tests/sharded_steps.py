"""Run by `test_sparsify` by itself: masks that change, of weights cut along both axes for eight devices."""

from __future__ import annotations

import math
import os
import re

if __name__ == "__main__":  # else whoever looks here for doctests would have eight devices, too
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import prune_jax as pj
from prune_jax.trees import leaves_by_path

RAMP = pj.cubic(0.0, 0.7, begin=0, end=4, every=2)
METHODS = {
    "gradual": pj.gradual(optax.adam(1e-2), criterion="magnitude", schedule=RAMP),
    "rigl": pj.rigl(optax.adam(1e-2), sparsity=0.7, every=2, end=6, key=jax.random.key(0)),
}
SHAPES = {"small": (16, 8), "large": (640, 512), "odd": (24, 6)}  # large: sampled; odd: no lanes along its last axis


def values(seed: int) -> dict[str, jax.Array]:
    """Two decimals, so that many are equal."""
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(np.round(rng.standard_normal(shape), 2), jnp.float32) for name, shape in SHAPES.items()}


def gathered(program: str) -> list[str]:
    """Arrays of many floats that each device is sent parts of, but for where ties are told apart."""
    lines = [line for line in program.splitlines() if " all-gather" in line and "cond/branch" not in line]
    shapes = [shape for line in lines for shape in re.findall(r"= \(?f32\[([0-9,]+)\]", line)]
    return [shape for shape in shapes if math.prod(map(int, shape.split(","))) > 1 << 15]


def main() -> None:
    """Fails where a mask of eight devices is not that of one, or where a large leaf is gathered to be chosen from."""
    assert jax.device_count() == 8
    sharding = NamedSharding(Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b")), PartitionSpec("a", "b"))
    for name, tx in METHODS.items():

        def step(params, state, gradients, tx=tx):
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        found = []
        for place in (lambda tree: tree, lambda tree: jax.device_put(tree, sharding)):
            params = place(values(0))
            state = jax.tree.map(lambda leaf, place=place: place(leaf) if leaf.ndim == 2 else leaf, tx.init(params))
            go = jax.jit(step).lower(params, state, params).compile() if found else jax.jit(step)
            for t in range(5):
                params, state = go(params, state, place(values(1 + t)))
                found.append(jax.device_get(state.masks))
        assert not gathered(go.as_text()), (name, gathered(go.as_text()))
        assert len(params["large"].addressable_shards) == 8
        assert params["large"].addressable_shards[0].data.shape == (160, 256)
        for alone, spread in zip(found[:5], found[5:], strict=True):
            for path, mask in leaves_by_path(alone).items():
                np.testing.assert_array_equal(leaves_by_path(spread)[path], mask, err_msg=f"{name} {path}")
        dead = sum(int((~mask).sum()) for mask in found[-1].values())
        assert dead == round(0.7 * sum(mask.size for mask in found[-1].values())), (name, dead)


if __name__ == "__main__":
    main()
