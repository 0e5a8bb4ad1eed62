"""What a run's record must hold to be read again: it may come from a shared store, written by anybody."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prune_jax.recipe.calls import Status


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Stage(_Part):
    kind: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    key: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    status: Status
    label: str = ""
    message: str = ""
    fault: str = ""
    seconds: float = 0.0
    made_in_seconds: float = 0.0
    begin: float | None = None
    after: list[str] = Field(default_factory=list)
    row: dict[str, str | float | bool] = Field(default_factory=dict)
    metrics: dict[str, Any] = Field(default_factory=dict)


class _Result(_Part):
    row: dict[str, str | float | bool] = Field(default_factory=dict)
    params: float | None = None
    nonzero: float | None = None
    sparsity: float | None = None


class _Record(_Part):
    name: str
    status: str = ""
    message: str = ""
    started: str = ""
    seconds: float = 0.0
    recipe: dict[str, Any] = Field(default_factory=dict)
    stages: dict[str, _Stage] = Field(default_factory=dict)
    results: dict[str, _Result] = Field(default_factory=dict)


def why_no_record(record: Any) -> str | None:
    """Says why something is no record of a run: the first place that is not as a run writes it."""
    try:
        _Record.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))[:100] or 'all of it'}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    return None


def printable(value: Any) -> Any:
    """The same with no control characters in any text: a terminal would obey them."""
    if isinstance(value, dict):
        return {printable(name): printable(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [printable(inner) for inner in value]
    return value.translate(_CONTROLS) if isinstance(value, str) else value


_CONTROLS = {code: "\ufffd" for code in (*range(9), *range(11, 32), *range(127, 160), *range(0xD800, 0xE000))}
