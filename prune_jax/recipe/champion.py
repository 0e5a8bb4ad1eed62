"""The champions of a store as they are written: who is, who was, and who was turned away."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from prune_jax.recipe.calls import Ref
from prune_jax.recipe.parts import Frozen, Name

FORMAT = 1


class Entry(Frozen):
    """One line of a champion's history."""

    generation: int = Field(ge=0, description="of the champion after it; a rejection leaves it as it was")
    action: Literal["promoted", "rolled back", "rejected"]
    run: str
    network: str = Field(description="the stage of the run whose network it is")
    artifact: Ref = Field(description="of the network")
    export: Ref = Field(description="of its StableHLO program")
    data: str = Field(description="digest of the data on whose test split the metrics were taken")
    objective: str
    metrics: dict[str, Any]
    checks: list[dict[str, Any]] = Field(default_factory=list, description="limits that it was held to")
    restores: int | None = Field(default=None, description="the generation that a rollback brings back")
    when: str
    by: str = ""
    why: str = ""


class Champion(Frozen):
    """`STORE/champions/NAME.json`."""

    format: Literal[1] = FORMAT  # type: ignore[assignment]
    name: Name
    generation: int = Field(default=0, ge=0, description="counts promotions and rollbacks")
    champion: Entry | None = None
    history: tuple[Entry, ...] = Field(default=(), description="the oldest first; nothing is ever taken out")

    @model_validator(mode="after")
    def _is_its_history(self) -> Champion:
        reigns = [entry for entry in self.history if entry.action != "rejected"]
        if self.champion != (reigns[-1] if reigns else None) or self.generation != len(reigns):
            raise ValueError("the champion is not the one that its history ends with")
        return self

    @property
    def previous(self) -> Entry | None:
        """Whom a rollback brings back: each takes back one promotion more."""
        stack: list[Entry] = []
        for entry in self.history:
            if entry.action == "promoted":
                stack.append(entry)
            elif entry.action == "rolled back":
                stack.pop()
        return stack[-2] if len(stack) > 1 else None

    def after(self, entry: Entry) -> Champion:
        """The same with one more entry."""
        history = (*self.history, entry)
        if entry.action == "rejected":
            return self.model_copy(update={"history": history})
        return self.model_copy(update={"history": history, "champion": entry, "generation": entry.generation})


def why_no_champion(text: str) -> str | Champion:
    """What a file holds; or what is wrong with it, since a shared store may be written by anybody."""
    try:
        return Champion.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))[:100] or 'all of it'}: {first['msg'][:1].lower()}{first['msg'][1:]}"
