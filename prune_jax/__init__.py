"""prune_jax: makes a JAX network as small and fast as it can be without losing what it knows.

Names are imported when they are used: `import prune_jax` costs nothing beyond itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prune_jax.bias_correction import correct_bias
    from prune_jax.compaction import trace
    from prune_jax.costs import Cost, cost
    from prune_jax.distillation import distilled
    from prune_jax.launch import run
    from prune_jax.masks import apply_masks
    from prune_jax.objectives import composed
    from prune_jax.order import ends
    from prune_jax.perturbation import perturbed
    from prune_jax.promotion import champions, promote, rollback
    from prune_jax.schedules import cubic
    from prune_jax.scoring import compensate, mask, score
    from prune_jax.searches import search
    from prune_jax.sparse_training import (
        ac_dc,
        gradual,
        l0,
        masked,
        movement,
        proximal_l1,
        rigl,
        settle,
        soft_threshold,
        sparse_evolution,
        static,
        ste,
        surgery,
        variational_dropout,
    )
    from prune_jax.sweeping import sparsegpt
    from prune_jax.verification import verify

_HOME = {
    "Cost": "prune_jax.costs",
    "ac_dc": "prune_jax.sparse_training",
    "apply_masks": "prune_jax.masks",
    "champions": "prune_jax.promotion",
    "compensate": "prune_jax.scoring",
    "composed": "prune_jax.objectives",
    "correct_bias": "prune_jax.bias_correction",
    "cost": "prune_jax.costs",
    "cubic": "prune_jax.schedules",
    "distilled": "prune_jax.distillation",
    "ends": "prune_jax.order",
    "gradual": "prune_jax.sparse_training",
    "l0": "prune_jax.sparse_training",
    "mask": "prune_jax.scoring",
    "masked": "prune_jax.sparse_training",
    "movement": "prune_jax.sparse_training",
    "perturbed": "prune_jax.perturbation",
    "proximal_l1": "prune_jax.sparse_training",
    "promote": "prune_jax.promotion",
    "rigl": "prune_jax.sparse_training",
    "rollback": "prune_jax.promotion",
    "run": "prune_jax.launch",
    "score": "prune_jax.scoring",
    "search": "prune_jax.searches",
    "settle": "prune_jax.sparse_training",
    "soft_threshold": "prune_jax.sparse_training",
    "sparse_evolution": "prune_jax.sparse_training",
    "sparsegpt": "prune_jax.sweeping",
    "static": "prune_jax.sparse_training",
    "ste": "prune_jax.sparse_training",
    "surgery": "prune_jax.sparse_training",
    "trace": "prune_jax.compaction",
    "variational_dropout": "prune_jax.sparse_training",
    "verify": "prune_jax.verification",
}

__all__ = [
    "Cost",
    "ac_dc",
    "apply_masks",
    "champions",
    "compensate",
    "composed",
    "correct_bias",
    "cost",
    "cubic",
    "distilled",
    "ends",
    "gradual",
    "l0",
    "mask",
    "masked",
    "movement",
    "perturbed",
    "promote",
    "proximal_l1",
    "rigl",
    "rollback",
    "run",
    "score",
    "search",
    "settle",
    "soft_threshold",
    "sparse_evolution",
    "sparsegpt",
    "static",
    "ste",
    "surgery",
    "trace",
    "variational_dropout",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'prune_jax' has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = found  # a submodule of the same name would hide it: `prune_jax.costs`
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
