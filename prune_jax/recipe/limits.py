"""What a network must keep to: of a gate in a recipe, and of a candidate that is to become champion."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from prune_jax.recipe.parts import Frozen, mistake


class Times(Frozen):
    """A budget beside another network's."""

    times: float = Field(gt=0, description="so many times what the other network takes")


Budget = Annotated[float, Field(gt=0)] | Times


class Robustness(Frozen):
    """What must be left of the metric on test inputs x + noise * n, n normal."""

    noise: float = Field(gt=0, description="standard deviation, in units of the inputs")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of n: both networks are given the same")
    at_least: float | None = None
    at_most: float | None = None
    max_drop: float | None = Field(default=None, ge=0, description="against the other network under the same noise")

    @model_validator(mode="after")
    def _some_limit(self) -> Robustness:
        if self.at_least is None and self.at_most is None and self.max_drop is None:
            raise ValueError("needs a limit: at_least, at_most or max_drop")
        return self


class Limits(Frozen):
    """What a network must keep to on the test split, alone or beside another network; what is left out is free."""

    metric: str | None = Field(default=None, description="a metric of the objective, or loss; left out, its own")
    at_least: float | None = Field(default=None, description="of the metric, such as accuracy")
    at_most: float | None = Field(default=None, description="of the metric, such as mse or loss")
    max_drop: float | None = Field(default=None, ge=0, description="largest loss of the metric, absolute")
    params: Budget | None = Field(default=None, description="a number, or {times: 1.0}")
    macs: Budget | None = Field(default=None, description="of one example")
    bytes: Budget | None = Field(default=None, description="of weights and state, uncompressed")
    latency_ms: Budget | None = Field(default=None, description="median of a call, both networks timed in turns")
    latency_batch: int = Field(default=1, ge=1, description="examples in a call that is timed")
    robustness: Robustness | None = None

    @property
    def relative(self) -> bool:
        """Whether some limit needs another network to compare with."""
        budgets = (self.params, self.macs, self.bytes, self.latency_ms)
        drops = (self.max_drop, self.robustness.max_drop if self.robustness else None)
        return any(isinstance(budget, Times) for budget in budgets) or any(drop is not None for drop in drops)

    @model_validator(mode="after")
    def _batches_are_timed(self) -> Limits:
        if self.latency_batch != 1 and self.latency_ms is None:
            raise mistake("latency_batch", "says which calls are timed, but none is; add `latency_ms`")
        return self


LIMITS = tuple(name for name in Limits.model_fields if name not in {"metric", "latency_batch"})
