"""Compaction: a network without its dead units, as smaller arrays and a smaller function.

The function is the user's own, walked again on smaller arrays; nothing of its code is changed.
"""

from prune_jax.compaction.compact import CompactNetwork
from prune_jax.compaction.cutting import Keep, cut, shrink
from prune_jax.compaction.network import Dead, TracedNetwork, trace

__all__ = ["CompactNetwork", "Dead", "Keep", "TracedNetwork", "cut", "shrink", "trace"]
