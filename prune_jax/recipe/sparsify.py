"""What a training says of the method that prunes while it trains: `sparsify: {kind: rigl, sparsity: 0.9}`.

Shares are of the training's steps, so that a longer training stretches the schedule.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from prune_jax.recipe.parts import Fraction, Frozen, Plain, Spare, mistake

Share = Annotated[float, Field(ge=0, le=1, description="a share of the training's steps")]
Sparsity = Annotated[float, Field(ge=0, lt=1, description="fraction of the prunable weights that is dead at the end")]
Scope = Annotated[Literal["global", "layer", "erk"], Field(description="within which set weights compete")]
Density = Annotated[Literal["layer", "erk"], Field(description="how many live in each layer, which keeps its number")]
Every = Annotated[int, Field(ge=1, description="steps between two changes of the masks")]
Exclude = Annotated[tuple[str, ...], Field(description="patterns of parameters that stay dense: `output/*`")]
Floor = Annotated[int, Field(ge=0, description="so many weights of each layer survive whatever their scores")]
Drop = Annotated[float, Field(gt=0, lt=1, description="share of a layer's living weights that moves at a change")]

Rate = Annotated[float, Field(gt=0, description="of the Adam that trains what stands beside the weights")]


def _in_order(begin: float, end: float) -> None:
    if begin >= end:
        raise mistake("end", f"must come after begin, {begin:g}; both are shares of the training's steps")


class Gradual(Frozen):
    """Prunes by and by along a cubic ramp; what is dead stays dead (Zhu & Gupta 2017, arXiv:1710.01878)."""

    kind: Literal["gradual"]
    sparsity: Sparsity = 0.9
    criterion: str = Field(default="magnitude", description="of the weights and the gradient of the step's batch")
    initial: Fraction = Field(default=0.0, description="sparsity at `begin`")
    begin: Share = 0.0
    end: Share = 0.75
    every: Every = 100
    scope: Scope = "global"
    exclude: Exclude = ()
    spare: Spare = ()
    min_keep: Floor = 0

    @model_validator(mode="after")
    def _ramp_rises(self) -> Gradual:
        _in_order(self.begin, self.end)
        if self.initial > self.sparsity:
            raise mistake("initial", f"must not be above sparsity, {self.sparsity:g}: what is dead stays dead")
        return self


class Movement(Frozen):
    """Prunes what training pushes towards zero, along a cubic ramp (Sanh et al. 2020, arXiv:2005.07683)."""

    kind: Literal["movement"]
    sparsity: Sparsity = 0.9
    begin: Share = 0.1
    end: Share = 0.75
    every: Every = 100
    scope: Scope = "global"
    exclude: Exclude = ()
    spare: Spare = ()
    min_keep: Floor = 0

    @model_validator(mode="after")
    def _ramp_has_length(self) -> Movement:
        _in_order(self.begin, self.end)
        return self


class Static(Frozen):
    """A random sparse network, fixed from the first step on."""

    kind: Literal["static"]
    sparsity: Sparsity = 0.9
    scope: Density = "erk"
    exclude: Exclude = ()
    spare: Spare = ()


class Set(Frozen):
    """Sparse from the first step on; the least weights move to random places (Mocanu et al. 2018, arXiv:1707.04780)."""

    kind: Literal["set"]
    sparsity: Sparsity = 0.9
    every: Every = 100
    end: Share = 0.75
    drop: Drop = 0.3
    falling: bool = Field(default=False, description="whether the share that moves falls to 0 at `end`, as in rigl")
    scope: Density = "erk"
    exclude: Exclude = ()
    spare: Spare = ()


class Rigl(Frozen):
    """As `set`, but weights move to where the gradient is largest (Evci et al. 2020, arXiv:1911.11134)."""

    kind: Literal["rigl"]
    sparsity: Sparsity = 0.9
    every: Every = 100
    end: Share = 0.75
    drop: Drop = 0.3
    scope: Density = "erk"
    exclude: Exclude = ()
    spare: Spare = ()


class Ste(Frozen):
    """All weights train, the network sees the largest (Bengio et al. 2013, arXiv:1308.3432)."""

    kind: Literal["ste"]
    sparsity: Sparsity = 0.9
    scope: Scope = "global"
    exclude: Exclude = ()
    spare: Spare = ()
    min_keep: Floor = 0


class Surgery(Frozen):
    """Weights die below one threshold and come back above a higher one (Guo et al. 2016, arXiv:1608.04493)."""

    kind: Literal["surgery"]
    c: float = Field(default=0.5, description="thresholds lie around a layer's mean |w| + c std |w|; larger kills more")
    margin: Fraction = Field(default=0.1, description="half the gap between the thresholds, relative")
    begin: Share = 0.0
    end: Share = 0.75
    every: Every = 100
    exclude: Exclude = ()
    spare: Spare = ()

    @model_validator(mode="after")
    def _lasts(self) -> Surgery:
        _in_order(self.begin, self.end)
        return self


class AcDc(Frozen):
    """By turns compressed and dense; compressed at the end (Peste et al. 2021, arXiv:2106.12379)."""

    kind: Literal["ac_dc"]
    sparsity: Sparsity = 0.9
    begin: Share = 0.1
    end: Share = 0.75
    every: Every = Field(default=100, description="steps in a phase")
    scope: Scope = "global"
    exclude: Exclude = ()
    spare: Spare = ()
    min_keep: Floor = 0

    @model_validator(mode="after")
    def _lasts(self) -> AcDc:
        _in_order(self.begin, self.end)
        return self


class ProximalL1(Frozen):
    """After each step all weights shrink towards zero, and the smallest become zero (ISTA)."""

    kind: Literal["proximal_l1"]
    l1: float = Field(default=1e-4, ge=0, description="weight of sum |w| beside the loss")
    exclude: Exclude = ()
    spare: Spare = ()


class SoftThreshold(Frozen):
    """Each layer learns below which size its weights are zero (STR, Kusupati et al. 2020, arXiv:2002.03231)."""

    kind: Literal["soft_threshold"]
    decay: float = Field(default=0.1, ge=0, description="pulls thresholds up; larger kills more")
    start: float = Field(default=-6.0, description="the first threshold is its sigmoid")
    learning_rate: Rate = 0.01
    exclude: Exclude = ()
    spare: Spare = ()


class L0(Frozen):
    """Stochastic gates, of which training closes all it can do without (Louizos et al. 2018, arXiv:1712.01312)."""

    kind: Literal["l0"]
    l0: float = Field(default=1e-4, ge=0, description="weight of the number of living weights beside the loss")
    drop: Drop = Field(default=0.1, description="how closed the gates are at first")
    learning_rate: Rate = 0.01
    exclude: Exclude = ()
    spare: Spare = ()


class VariationalDropout(Frozen):
    """Noise on each weight, which drowns what is not needed (Molchanov et al. 2017, arXiv:1701.05369)."""

    kind: Literal["variational_dropout"]
    weight: float = Field(default=0.1, ge=0, description="of the divergence; it rises to it from `begin` to `end`")
    begin: Share = 0.0
    end: Share = 0.5
    threshold: float = Field(default=3.0, description="of log alpha; above it a weight is dead")
    learning_rate: Rate = 0.003
    exclude: Exclude = ()
    spare: Spare = ()

    @model_validator(mode="after")
    def _rises(self) -> VariationalDropout:
        _in_order(self.begin, self.end)
        return self


class CustomMethod(BaseModel):
    """A method of somebody else's: all beside `kind`, `exclude` and `spare` are options of its function."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, Plain] = Field(init=False)

    kind: str = Field(
        description="module:object, or the name of a registered method, such as an installed plug-in's",
        json_schema_extra=lambda schema: schema.update({"not": {"enum": list(BUILT_IN_METHODS)}}),
    )
    exclude: Exclude = ()
    spare: Spare = ()


BUILT_IN_METHODS: dict[str, type[Frozen]] = {
    "gradual": Gradual,
    "movement": Movement,
    "static": Static,
    "set": Set,
    "rigl": Rigl,
    "ste": Ste,
    "surgery": Surgery,
    "ac_dc": AcDc,
    "proximal_l1": ProximalL1,
    "soft_threshold": SoftThreshold,
    "l0": L0,
    "variational_dropout": VariationalDropout,
}


def _method_tag(value: Any) -> str | None:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return kind if kind is None or (isinstance(kind, str) and kind in BUILT_IN_METHODS) else "custom"


Sparsify = Annotated[
    Annotated[Gradual, Tag("gradual")]
    | Annotated[Movement, Tag("movement")]
    | Annotated[Static, Tag("static")]
    | Annotated[Set, Tag("set")]
    | Annotated[Rigl, Tag("rigl")]
    | Annotated[Ste, Tag("ste")]
    | Annotated[Surgery, Tag("surgery")]
    | Annotated[AcDc, Tag("ac_dc")]
    | Annotated[ProximalL1, Tag("proximal_l1")]
    | Annotated[SoftThreshold, Tag("soft_threshold")]
    | Annotated[L0, Tag("l0")]
    | Annotated[VariationalDropout, Tag("variational_dropout")]
    | Annotated[CustomMethod, Tag("custom")],
    Discriminator(_method_tag),
]
