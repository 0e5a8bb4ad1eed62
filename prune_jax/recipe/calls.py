"""What passes between the plan, the stages and the record: calls and results, small and JSON-friendly; never arrays."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal, NamedTuple

from pydantic import Field

from prune_jax.recipe.model import Model
from prune_jax.recipe.parts import Data, Devices, Frozen, Operation

Status = Literal["ran", "cached", "failed", "skipped"]


class Ref(NamedTuple):
    """Names an artifact: `STORE/<kind>/<key>/`."""

    kind: str
    key: str


class Problem(Frozen):
    """What is learned from what, by which network."""

    data: Data
    data_digest: str
    fold: tuple[int, int] | None = Field(default=None, description="(i, k): fold i of k is held out for validation")
    model: Model
    objective: str
    code: dict[str, str] = Field(default_factory=dict, description="digest of the user's code, by module:object")
    devices: Devices | None = None


class StageCall(Frozen):
    """One stage to carry out: all that it needs, and the key under which its artifact lies."""

    name: str = Field(description="its name in the plan and the record")
    label: str = Field(description="its name in the UI: `score · taylor · 0.68`")
    kind: str
    key: str
    settings: dict[str, Any]
    inputs: dict[str, Ref] = Field(default_factory=dict)
    problem: Problem
    seed: int
    operation: Operation = Operation()
    origin: StageCall | None = Field(default=None, description="the training from which its network descends")
    facts: dict[str, Any] = Field(default_factory=dict, description="for the record; not part of the key")

    @property
    def ref(self) -> Ref:
        """The artifact that it makes."""
        return Ref(self.kind, self.key)


class StageResult(Frozen):
    """What came of a call."""

    name: str
    kind: str
    key: str
    status: Status
    seconds: float = 0.0
    metrics: dict[str, Any] = Field(default_factory=dict)
    message: str = ""
    user_mistake: bool = Field(default=False, description="trying again will not help")
    rejected: bool = Field(default=False, description="a gate said no")
    fault: str = Field(default="", description="the error's name, of a stage that failed: DivergedError")

    @property
    def ref(self) -> Ref:
        """The artifact that was made."""
        return Ref(self.kind, self.key)

    @property
    def good(self) -> bool:
        """Whether the artifact is there."""
        return self.status in {"ran", "cached"}


def digest(payload: Any) -> str:
    """The sha256 of canonical JSON: sorted keys, no spaces, no NaN."""
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
