"""How arrays lie on several devices: a mesh of `data` x `model`, batches along the one, weights along the other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prune_jax.errors import UserMistake
from prune_jax.trees import PyTree

DATA, MODEL = "data", "model"


def make_mesh(data: int, model: int = 1) -> Mesh:
    """A mesh of the first devices, [data, model].

    Raises:
        UserMistake: there are not so many.
    """
    check_devices(data, model)
    return Mesh(np.array(jax.devices()[: data * model]).reshape(data, model), (DATA, MODEL))


def check_devices(data: int, model: int) -> None:
    """Refuses a mesh that is larger than the machine."""
    there = jax.device_count()
    if data * model > there:
        raise UserMistake(
            f"devices = {{data: {data}, model: {model}}}: needs {data * model} devices, and here "
            f"{'is one' if there == 1 else f'are {there}'} ({jax.default_backend()}). Lower them or leave them out; on "
            f"a CPU, XLA_FLAGS=--xla_force_host_platform_device_count={data * model} makes so many of it"
        )


def along_data(mesh: Mesh) -> NamedSharding:
    """Each device has its share of the examples."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def everywhere(mesh: Mesh) -> NamedSharding:
    """Each device has all."""
    return NamedSharding(mesh, PartitionSpec())


def along_model(mesh: Mesh, tree: PyTree) -> PyTree:
    """The sharding of each array of weights, masks or moments.

    An array is cut along its largest axis that `model` divides, of equal ones the last; one that has no such axis, or
    holds whole numbers, lies whole on each device. So a weight, its mask and its moments are cut alike.

    Args:
        mesh: [data, model].
        tree: arrays, or their shapes and types.
    """
    return jax.tree.map(lambda leaf: NamedSharding(mesh, _cut(leaf, mesh.shape[MODEL])), tree)


def _cut(leaf: jax.Array, parts: int) -> PartitionSpec:
    whole = not (jnp.issubdtype(leaf.dtype, jnp.inexact) or leaf.dtype == bool)
    fitting = [axis for axis, size in enumerate(leaf.shape) if size and size % parts == 0]
    if whole or parts == 1 or not fitting:
        return PartitionSpec()
    longest = max(fitting, key=lambda axis: (leaf.shape[axis], axis))
    return PartitionSpec(*(MODEL if axis == longest else None for axis in range(longest + 1)))
