"""YAML, a built-in name or a mapping -> `Recipe`; mistakes -> one clear line each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from prune_jax.errors import UserMistake, did_you_mean
from prune_jax.recipe.recipe import Recipe

RECIPES = resources.files("prune_jax.recipes")
# What these fields take beside the words that they know.
OTHER_FORMS = {"scope": "a table {pattern: sparsity}", "rewind": "{step: n}, {learning_rate: {step: n}}"}


def built_in() -> dict[str, str]:
    """The texts of the recipes that ship with the package, by name."""
    files = sorted((f for f in RECIPES.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {f.name.removesuffix(".yaml"): f.read_text("utf-8") for f in files}


def read_recipe(source: str | Path | Mapping[str, Any] | Recipe, *, changes: Iterable[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        source: a YAML path, the name of a built-in recipe, a mapping, or a recipe.
        changes: `"stages.train.epochs=3"`: set before the recipe is checked; values are YAML.

    Raises:
        UserMistake: one line for each mistake: path, value, what is allowed, the nearest known name.
    """
    if isinstance(source, Recipe):
        if not changes:
            return source
        source = source.model_dump(mode="json", exclude_unset=True)
    if isinstance(source, Mapping):
        label, raw = str(source.get("name", "recipe")), dict(source)
    else:
        label, raw = _parse(str(source))
    for change in changes:
        raw = _with_change(raw, change)
    return validate(raw, label)


def validate(raw: Mapping[str, Any], label: str) -> Recipe:
    """Checks a mapping; `label` says in messages where it came from."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        lines = [f"{label}: {line}" for line in explain(error, raw)]
        raise UserMistake("\n".join(lines)) from None


def check_run_name(name: str) -> None:
    """Refuses a run's name that could not be a folder's."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UserMistake(
            f"name = {name!r}: a run's name has letters, digits, '.', '_' and '-', begins with a letter or a digit and "
            "has at most 100 characters"
        )


def _parse(source: str) -> tuple[str, dict[str, Any]]:
    texts = built_in()
    path = Path(source)
    if source in texts:
        text = texts[source]
    elif path.is_file():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            raise UserMistake(f"{source}: is no text; a recipe is YAML in UTF-8") from None
    else:
        raise UserMistake(
            f"{source}: no such file and no built-in recipe{did_you_mean(source, texts)} (built in: {', '.join(texts)})"
        )
    try:
        raw = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        at = f":{where.line + 1}:{where.column + 1}" if where else ""
        raise UserMistake(f"{source}{at}: not YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(raw, dict):
        raise UserMistake(
            f"{source}: a recipe is a mapping of name, data, model and stages; this is of type {type(raw).__name__}"
        )
    return source, raw


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which would silently take the last of two fields of one name."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:  # of a key that is a list, the text will do: it is refused later
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _with_change(raw: dict[str, Any], change: str) -> dict[str, Any]:
    path, equals, text = change.partition("=")
    if not equals or not path.strip():
        raise UserMistake(f"--set {change}: write path=value, such as --set stages.train.epochs=3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserMistake(f"--set {change}: {text!r} is not a YAML value") from None
    steps = path.strip().split(".")
    stages = [str(name) for name in raw.get("stages") or ()]
    if steps[0] == "stages" and len(steps) > 2 and steps[1] not in stages:
        raise UserMistake(
            f"--set {change}: there is no stage {steps[1]!r}{did_you_mean(steps[1], stages)} "
            f"(stages: {', '.join(stages)})"
        )
    return with_value(raw, steps, value)


def with_value(raw: Mapping[str, Any], path: str | Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of `raw` with `value` at the (dotted) path; mappings on the way are made where they are missing.

    >>> with_value({"a": {"b": 1}}, "a.c.d", 2)
    {'a': {'b': 1, 'c': {'d': 2}}}
    """
    head, *rest = path.split(".") if isinstance(path, str) else path
    inner = raw.get(head)
    if head == "criterion" and isinstance(inner, str):
        inner = {"name": inner}
    return {**raw, head: with_value(inner if isinstance(inner, Mapping) else {}, rest, value) if rest else value}


def explain(error: ValidationError, raw: Any) -> list[str]:
    """One line for each mistake: `path = value: what is wrong (what is allowed)`."""
    lines: dict[str, str] = {}  # the first of each path: of a union's complaints, the one of its first member
    for mistake in error.errors(include_url=False):
        location = list(mistake["loc"])
        context = mistake.get("ctx", {})
        if mistake["type"] == "mistake":
            location += context["field"].split(".")
        if mistake["type"] == "union_tag_invalid":
            location.append("kind")
        path, value, found = _locate(location, raw, missing=mistake["type"] == "missing")
        shown = f" = {_short(value)}" if found and not isinstance(value, dict) else ""
        lines.setdefault(path, f"{path}{shown}: {_sentence(mistake, context, value, path)}")
    deeper = [path for path in lines if any(other.startswith(f"{path}.") for other in lines)]
    return [line for path, line in lines.items() if path not in deeper]  # of a union, the member that was meant


def _locate(location: list[Any], raw: Any, *, missing: bool) -> tuple[str, Any, bool]:
    """Drops the tags that pydantic puts into a location and finds the value that stands there."""
    path: list[str] = []
    value, found = raw, True
    for i, part in enumerate(location):
        last = i == len(location) - 1
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list | tuple) and isinstance(part, int) and part < len(value):
            value = value[part]
        elif last and (missing or (isinstance(value, dict) and not _is_tag(part, value))):
            found = False
        else:
            continue
        path.append(str(part))
    return ".".join(path) or "recipe", value, found


def _is_tag(part: Any, value: dict[str, Any]) -> bool:
    text = str(part)
    return text in {str(value.get("kind")), "custom"} or "[" in text or text[:1].isupper()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _sentence(mistake: Mapping[str, Any], context: Mapping[str, Any], value: Any, path: str) -> str:
    kind = mistake["type"]
    if kind == "mistake":
        return str(context["message"])
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return str(context.get("error", mistake["msg"]))
    if kind in {"union_tag_invalid", "literal_error"}:
        allowed = re.findall(r"'([^']*)'", str(context.get("expected_tags", context.get("expected", ""))))
        given = context.get("tag", value)
        near = did_you_mean(given, allowed)
        if other := OTHER_FORMS.get(path.rpartition(".")[2]):
            allowed.append(f"or {other}")
        return f"is not known{near} (allowed: {', '.join(allowed)})"
    if kind in {"model_type", "model_attributes_type", "dict_type"}:
        return "must be a mapping of fields to values"
    if kind in {"tuple_type", "list_type"}:
        return "must be a list, such as [a, b]"
    if kind == "too_short":
        return f"must have {context['min_length']} or more"
    if kind == "union_tag_not_found":
        return "is missing its `kind`"
    if kind == "string_pattern_mismatch":
        return f"must match {context.get('pattern')}"
    return mistake["msg"][0].lower() + mistake["msg"][1:]
