"""The registry of criteria and what an entry says of itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax

from prune_jax.arguments import check_arguments
from prune_jax.errors import UserMistake, did_you_mean
from prune_jax.notation import FAMILIES
from prune_jax.registry import Registry, load_object
from prune_jax.statistics import CURVATURES, DRAWN, OF_NETWORK, OPTIONS
from prune_jax.trees import PyTree

CRITERIA: Registry[Criterion] = Registry("criterion", "prune_jax.criteria")


@dataclass(frozen=True)
class Criterion:
    """A criterion: its function and the facts that validate recipes, gather statistics, and are cited.

    `function(params, stats, *, key, **options)` answers float32 scores shaped like `params`, which holds None where
    nothing is prunable; the lowest die first. It takes `key` if it draws random numbers. An option that
    `statistics.gather` has, too, such as `probes`, is handed to it.
    """

    name: str
    function: Callable[..., PyTree]
    formula: str
    paper: str
    needs: frozenset[str] = frozenset()  # fields of Statistics or UnitStatistics; `correct`: answers right or wrong
    needs_if: Mapping[str, frozenset[str]] = field(default_factory=dict)  # needed instead where that option is set
    granularities: tuple[str, ...] = FAMILIES
    # Of a unit's scores, as in granularity.unit_scores. "p": the norm that the option p names; "square of sum": mean
    # over batches of (sum g w)^2, whatever the function makes of single weights. "unit": the function scores units,
    # `function(groups, leaves, **options)`, see criteria.units; "unit and loss": it takes `loss` (or `correct`) and
    # `batches`, too; "unit and activations": `function(groups, stats, **options)`, see criteria.activations.
    combine: str = "sum"
    # Of a solver: `compensate(params, stats, masks, **options)` answers the weights under masks, survivors corrected.
    compensate: Callable[..., PyTree] | None = None
    # Of a solver that chooses while it corrects, layer by layer: `sweep(w, products, **choice, **options)` answers mask
    # and weights, see `surgeon.solve`; its function scores layers, `{path: w}` with `input_products` alone.
    sweep: Callable[..., tuple[jax.Array, jax.Array]] | None = None
    family: str = ""  # of `FAMILY_OF`; left out, that of what it needs
    cost: str = ""  # in passes; left out, that of what it needs

    def __post_init__(self) -> None:
        family, cost = next((FAMILY_OF[need] for need in sorted(self.needs) if need in FAMILY_OF), NO_DATA)
        if not self.needs and self.combine == "unit and loss":
            family, cost = "the loss", "passes of its own"
        object.__setattr__(self, "family", self.family or family)
        object.__setattr__(self, "cost", self.cost or cost)

    @property
    def data_free(self) -> bool:
        """Whether it looks at no data: at the weights alone, or at the network."""
        return self.needs <= OF_NETWORK and self.combine != "unit and loss"

    @property
    def stochastic(self) -> bool:
        """Whether it, or what it needs, draws random numbers."""
        return self.takes_key or bool(self.needs & DRAWN)

    @cached_property
    def takes_key(self) -> bool:
        """Whether the function itself draws random numbers."""
        return "key" in inspect.signature(self.function).parameters

    @cached_property
    def options(self) -> dict[str, Any]:
        """Its options and their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in OURS}

    def needs_with(self, options: Mapping[str, Any]) -> frozenset[str]:
        """The fields of Statistics that it needs under these options."""
        return next((fields for name, fields in self.needs_if.items() if options.get(name)), self.needs)

    def gathering(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those of its options that say how statistics are gathered."""
        return {name: value for name, value in {**self.options, **options}.items() if name in OPTIONS}

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuses options that it does not take, and values of another kind than the default's."""
        try:
            check_arguments(self.function, options, ours=("params", "stats", "groups", "leaves", *OURS))
        except UserMistake as mistake:
            raise UserMistake(f"criterion {self.name!r}: {mistake}") from None
        for name, value in options.items():
            if isinstance(self.options[name], bool) and not isinstance(value, bool):
                raise UserMistake(f"criterion {self.name!r}: {name} = {value!r} must be true or false")
            if name in COUNTS and (type(value) is not int or value < 1):
                raise UserMistake(f"criterion {self.name!r}: {name} = {value!r} must be a whole number from 1 on")
            if name == "dampening" and (type(value) not in (int, float) or not 0 < value < float("inf")):
                raise UserMistake(f"criterion {self.name!r}: {name} = {value!r} must be a number above 0")
            if name == "curvature" and value not in CURVATURES:
                near = did_you_mean(str(value), CURVATURES)
                raise UserMistake(
                    f"criterion {self.name!r}: curvature = {value!r} is not possible{near} "
                    f"(allowed: {', '.join(CURVATURES)})"
                )
            if name == "p" and value not in NORMS:
                raise UserMistake(f"criterion {self.name!r}: p = {value!r} is not possible (allowed: 1, 2, inf)")
            if name == "bins" and value not in range(2, 65):
                raise UserMistake(f"criterion {self.name!r}: bins = {value!r} is not possible (allowed: 2 to 64)")

    def combine_with(self, options: Mapping[str, Any], wanted: str | None = None) -> str:
        """How a unit's score is made of its weights' scores: a name of `granularity.unit_scores`, the `wanted` one."""
        if wanted is not None:
            if self.combine.startswith("unit"):
                raise UserMistake(f"criterion {self.name!r} scores whole units: there is nothing to combine")
            if wanted not in COMBINE:
                raise UserMistake(
                    f"combine {wanted!r} is not possible{did_you_mean(wanted, COMBINE)} (allowed: {', '.join(COMBINE)})"
                )
            return wanted
        return NORMS[{**self.options, **options}["p"]] if self.combine == "p" else self.combine

    def __call__(self, *args: Any, **options: Any) -> PyTree:
        """Calls the function."""
        return self.function(*args, **options)


# What a criterion looks at, by what it needs, and what that costs.
NO_DATA = ("weights", "none")
FAMILY_OF = {
    "flow": ("weights", "1 gradient of the network at ones"),
    **dict.fromkeys(("gradient", "gradient_abs", "gradient_square"), ("gradients", "1 gradient pass")),
    "example_gradient_square": ("curvature", "per-example gradients"),
    "hessian_gradient": ("curvature", "1 gradient pass, 1 Hessian product a batch"),
    "hessian_diagonal": ("curvature", "`probes` Hessian products a batch"),
    "fisher_blocks": ("curvature", "per-example gradients, weights x block numbers"),
    **dict.fromkeys(
        ("input_square", "zeros", "histogram", "label_histogram", "covariance"), ("activations", "1 forward pass")
    ),
    "input_products": ("activations", "1 forward pass, in² numbers of a layer at a time"),
    "correct": ("the loss", "1 forward pass a unit"),
}
FAMILY_ORDER = ("weights", "gradients", "curvature", "activations", "the loss")
OURS = ("key", "loss", "correct", "batches")  # what a criterion is given, and no option
COMBINE = ("sum", "mean", "l1", "l2", "max")  # what one may want to be made of the scores of a unit's weights
COUNTS = ("probes", "block", "inputs")
NORMS = {1: "sum", 2: "l2", float("inf"): "max", "inf": "max"}


def criterion(
    name: str,
    *,
    formula: str,
    paper: str,
    needs: Collection[str] = (),
    needs_if: Mapping[str, Collection[str]] | None = None,
    granularities: tuple[str, ...] = FAMILIES,
    combine: str = "sum",
    compensate: Callable[..., PyTree] | None = None,
    sweep: Callable[..., tuple[jax.Array, jax.Array]] | None = None,
    family: str = "",
    cost: str = "",
) -> Callable[[Callable[..., PyTree]], Criterion]:
    """Registers the function below it under `name`, with the facts of `Criterion`.

    The function's keyword-only parameters are its options. Other packages announce their criteria through the entry
    point group `prune_jax.criteria`, or are named `module:object`.
    """

    def register(function: Callable[..., PyTree]) -> Criterion:
        instead = {option: frozenset(fields) for option, fields in (needs_if or {}).items()}
        facts = (formula, paper, frozenset(needs), instead, granularities, combine, compensate, sweep, family, cost)
        return CRITERIA.add(name, Criterion(name, function, *facts))

    return register


def find(name: str) -> Criterion:
    """The criterion called `name`, or the one that `module:object` names.

    >>> find("snip").formula
    '|w * mean g|'
    """
    entry = load_object(name) if ":" in name else CRITERIA[name]
    if not isinstance(entry, Criterion):
        raise UserMistake(
            f"{name!r} is of type {type(entry).__name__}, not a criterion; put @criterion(...) on the function."
        )
    return entry
