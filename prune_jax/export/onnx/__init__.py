"""ONNX: the program and its weights in one file, for any batch size, written from the jaxpr of the network."""

from prune_jax.export.onnx.convert import OPSET, to_onnx
from prune_jax.export.onnx.walk import MEND

__all__ = ["MEND", "OPSET", "to_onnx"]
