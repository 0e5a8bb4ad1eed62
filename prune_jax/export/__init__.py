"""Exports: a network in one file that runs, or can be read, without its code."""

from prune_jax.export.formats import EXTENSIONS, WRITERS, Written, missing
from prune_jax.export.packed import load_packed
from prune_jax.export.stablehlo import load_stablehlo, read_stablehlo

__all__ = ["EXTENSIONS", "WRITERS", "Written", "load_packed", "load_stablehlo", "missing", "read_stablehlo"]
