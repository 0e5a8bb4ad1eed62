"""What each network of a run is beside the others, by the stages that it went through: dense, pruned, a control."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LONGER, TAUGHT = "dense, trained longer", "dense, distilled"
TUNED = {"finetune": "fine-tuned", "distill": "distilled"}  # what became of a network that such a stage trained on


def descends(stages: Mapping[str, Any], name: str) -> list[str]:
    """The stages whose network a stage goes on from, nearest first; a teacher's is another network."""
    stage = stages.get(name, {})
    return [parent for parent in stage.get("after", []) if parent != stage.get("teacher")]


def lineage(record: Mapping[str, Any], name: str) -> list[str]:
    """A stage and those from which it descends, nearest first."""
    stages = record.get("stages", {})
    seen: list[str] = []
    ahead = [name]
    while ahead:
        here = ahead.pop(0)
        if here in stages and here not in seen:
            seen.append(here)
            ahead += descends(stages, here)
    return seen


def role_of(record: Mapping[str, Any], name: str) -> str:
    """What a network is beside the others, by the stages that it went through.

    `dense` or `trained sparse`; `masked` or `compact`, at random where units were drawn by lot, and fine-tuned,
    distilled, or trained from scratch under its masks; `fresh`, a compact network trained from its initialisation,
    which tells what its widths alone are worth; `dense, trained longer`, or distilled.
    """
    stages = record.get("stages", {})
    told = record.get("results", {}).get(name, {}).get("kind", "")
    kinds = {n: stages[n]["kind"] for n in lineage(record, name)} or {name: told}
    line = list(kinds)
    cut = next((i for i, n in enumerate(line) if kinds[n] == "compact"), None)
    masked = next((i for i, n in enumerate(line) if kinds[n] in {"prune", "mask"}), None)
    if cut is None and masked is None:
        if "train" not in kinds.values():
            return ""
        if any(trained_sparse(record, n) for n in line):
            return "trained sparse"
        return TAUGHT if "distill" in kinds.values() else LONGER if "finetune" in kinds.values() else "dense"
    tuned = [n for n in line[: masked if cut is None else cut] if kinds[n] in TUNED]
    if cut is not None and tuned and _replaced(_setting(record, tuned[0], "rewind")):
        return "fresh"
    words = ["masked" if cut is None else "compact"]
    words += ["at random"] if any(_setting(record, n, "criterion") == "random" for n in line) else []
    again = tuned and _setting(record, tuned[0], "rewind") == "initialisation"
    return ", ".join([*words, *(["from scratch"] if again else [TUNED[kinds[n]] for n in tuned[:1]])])


def trained_sparse(record: Mapping[str, Any], name: str) -> bool:
    """Whether a stage pruned while it trained."""
    return _setting(record, name, "sparsify") not in (None, "None")


def is_control(role: str) -> bool:
    """Whether a network is there to be beaten by the pruned one."""
    return role in {"fresh", LONGER, TAUGHT} or "at random" in role


def _replaced(rewind: Any) -> bool:
    """Whether earlier weights took the place of the pruned ones."""
    return rewind not in (None, "none") and not (isinstance(rewind, Mapping) and "learning_rate" in rewind)


def _setting(record: Mapping[str, Any], name: str, word: str) -> Any:
    """What a stage's recipe says, with the value of its row; of a criterion its name."""
    recipe = record.get("recipe", {})
    stage = recipe.get("stages", {}).get(name.partition("[")[0], {})
    axes = [*(stage.get("matrix") or {}), *(recipe.get("matrix") or {})]
    row = record.get("stages", {}).get(name, {}).get("row") or {}
    whole = {next((a for a in axes if f".{a}".endswith(f".{axis}")), axis): v for axis, v in row.items()}
    ends = (f".{word}", f".{word}.name")
    found = next((value for axis, value in whole.items() if f".{axis}".endswith(ends)), stage.get(word))
    return found.get("name") if isinstance(found, Mapping) and "name" in found else found
