"""How arrays lie on several devices: a mesh of `data` x `model`, batches along the one, weights along the other."""

from __future__ import annotations

from typing import Any

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


def check_share(devices: tuple[int, int] | None, hosts: int) -> None:
    """Refuses a mesh, (data, model), that leaves devices of some host without work.

    Raises:
        UserMistake: what is missing, and what would fit.
    """
    there = jax.device_count()
    every = f"the {there} devices of {hosts} hosts ({jax.default_backend()})"
    if devices is None:
        raise UserMistake(
            f"devices: is not set, and a training over hosts takes all of {every}; set it, such as "
            f"`devices: {{data: {there}}}`, or leave --hosts out"
        )
    data, model = devices
    if data * model != there:
        raise UserMistake(
            f"devices = {{data: {data}, model: {model}}}: takes {data * model}, and a training over hosts takes all of "
            f"{every}; let data x model be {there}"
        )


def along_data(mesh: Mesh) -> NamedSharding:
    """Each device has its share of the examples."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def everywhere(mesh: Mesh) -> NamedSharding:
    """Each device has all."""
    return NamedSharding(mesh, PartitionSpec())


def spread(tree: PyTree, layout: Any) -> PyTree:
    """Arrays onto their devices; of a mesh over hosts, each host puts its own share.

    Args:
        tree: arrays, the same on all hosts.
        layout: one sharding, or one for each array; None for the first device.
    """
    if jax.process_count() == 1 or layout is None:
        return jax.device_put(tree, layout)
    lies = jax.tree.map(lambda _: layout, tree) if isinstance(layout, NamedSharding) else layout
    return jax.tree.map(_shares, tree, lies)


def _shares(array: Any, lies: NamedSharding) -> jax.Array:
    if jax.dtypes.issubdtype(jnp.result_type(array), jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_shares(jax.random.key_data(array), lies), impl=jax.random.key_impl(array))
    held = np.asarray(array)
    return jax.make_array_from_callback(held.shape, lies, lambda index: np.asarray(held[index]))


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
