"""StableHLO by `jax.export`: the program and its weights in one file, for any batch size and platform."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import export
from jax.extend.mlir import deserialize_portable_artifact, ir

from prune_jax.errors import DamagedArtifactError

HOST = re.compile("callback|python|call_tf", re.IGNORECASE)  # what XLA hands back to the process that runs it
PLATFORMS = ("cpu", "cuda", "tpu")

Forward = Callable[..., jax.Array]  # (x, ...) with a batch axis in front -> outputs [batch, ...]


def to_stablehlo(forward: Forward, inputs: Sequence[Any]) -> bytes:
    """A program that computes `forward` for any batch size, its weights inside.

    One example is traced and mapped over the batch, so that the program holds for every size, whatever the network
    does with the shapes that it sees.

    Args:
        forward: `(x, ...) -> outputs`, arrays with a batch axis in front; examples do not depend on one another.
        inputs: arrays or shapes and types of a batch of any size.
    """

    def one(*example: Any) -> Any:
        return jax.tree.map(lambda a: a[0], forward(*(a[None] for a in example)))

    (batch,) = export.symbolic_shape("batch")
    shapes = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in inputs]
    return bytes(export.export(jax.jit(jax.vmap(one)), platforms=PLATFORMS)(*shapes).serialize())


def load_stablehlo(data: bytes) -> Callable[..., np.ndarray]:
    """The function in a file that `to_stablehlo` made, of arrays; see `read_stablehlo`."""
    call = jax.jit(read_stablehlo(data))
    return lambda *inputs: np.asarray(call(*inputs))


def read_stablehlo(data: bytes) -> Forward:
    """The function in a file that `to_stablehlo` made; no model code is needed, and nothing is unpickled.

    A program of somebody else's computes and does nothing else: one that would call back into Python is refused.

    Raises:
        DamagedArtifactError: it is no such file, or one of a JAX too new or too old for this one.
    """
    try:
        program = export.deserialize(bytearray(data))
        targets = _called(program)
    except Exception as error:
        raise DamagedArtifactError(
            f"the StableHLO program cannot be read ({type(error).__name__}: {error}). It holds for the JAX versions of "
            "about half a year: run the recipe again to export it anew."
        ) from error
    if host := sorted(target for target in targets if HOST.search(target)):
        raise DamagedArtifactError(
            f"the StableHLO program calls {host[0]!r}, which runs code outside it; no network needs that. Export the "
            "network anew, from a recipe of your own."
        )
    return program.call


def _called(program: export.Exported) -> set[str]:
    """The targets of a program's custom calls."""
    found = set()

    def visit(operation: ir.Operation) -> ir.WalkResult:
        if "call_target_name" in operation.attributes:
            found.add(ir.StringAttr(operation.attributes["call_target_name"]).value)
        return ir.WalkResult.ADVANCE

    with ir.Context() as context:
        deserialize_portable_artifact(program.mlir_module_serialized, context).operation.walk(visit)
    return found
