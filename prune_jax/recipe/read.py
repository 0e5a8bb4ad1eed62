"""YAML, a built-in name or a mapping -> `Recipe`; mistakes -> one clear line each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import yaml
from pydantic import ValidationError

from prune_jax.errors import UserMistake, did_you_mean, shortened
from prune_jax.recipe.bounds import BYTES, DEPTH, PARTS
from prune_jax.recipe.limits import Limits
from prune_jax.recipe.recipe import A_ROW, Recipe

RECIPES = resources.files("prune_jax.recipes")
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
DIGITS = 40  # of a number, as it is written
DEVICES = ("CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10)))
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
        name = source.get("name")
        label, raw = name if isinstance(name, str) and len(name) <= 100 else "recipe", dict(source)
    else:
        label, raw = _parse(str(source))
    for change in changes:
        raw = _with_change(raw, change)
    return validate(raw, label)


def validate(raw: Mapping[str, Any], label: str, *, row: bool = False) -> Recipe:
    """Checks a mapping, or a `row` of a recipe that was checked; `label` says in messages where it came from."""
    try:
        return Recipe.model_validate(raw, context=A_ROW if row else None)
    except ValidationError as error:
        lines = [f"{label}: {line}" for line in explain(error, raw)]
        raise UserMistake("\n".join(lines)) from None


def read_limits(given: Mapping[str, Any], changes: Iterable[str] = ()) -> Limits:
    """Reads limits.

    Args:
        given: a mapping.
        changes: `"bytes.times=1"`: set before the limits are checked; values are YAML.

    Raises:
        UserMistake: one line for each mistake.
    """
    raw = dict(given)
    for change in changes:
        raw = _with_change(raw, change, "--limit", "max_drop=0.01")
    try:
        return Limits.model_validate(raw)
    except ValidationError as error:
        raise UserMistake("\n".join(f"limits: {line}" for line in explain(error, raw))) from None


def check_run_name(name: str) -> None:
    """Refuses a run's name that could not be a folder's."""
    if not _RUN_NAME.fullmatch(name):
        raise UserMistake(
            f"name = {name[:120]!r}: a run's name has letters, digits, '.', '_' and '-', begins with a letter or a "
            "digit and has at most 100 characters"
        )
    if not is_run_name(name):
        raise UserMistake(f"name = {name!r}: Windows keeps this name for itself, or the '.' at its end; choose another")


def is_run_name(name: str) -> bool:
    """Whether a folder can have this name anywhere, and lies below the folder that it is made in.

    >>> is_run_name("lenet-5"), is_run_name("../lenet-5"), is_run_name("nul.txt")
    (True, False, False)
    """
    return bool(_RUN_NAME.fullmatch(name)) and name[-1] != "." and name.partition(".")[0].upper() not in DEVICES


def _parse(source: str) -> tuple[str, dict[str, Any]]:
    texts = built_in()
    text = texts[source] if source in texts else _text(source, texts)
    try:
        raw = yaml.load(text, _Loader)
    except RecursionError:
        raise UserMistake(f"{source}: is nested too deep for a recipe") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        at = f":{where.line + 1}:{where.column + 1}" if where else ""
        raise UserMistake(f"{source}{at}: not YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(raw, dict):
        raise UserMistake(
            f"{source}: a recipe is a mapping of name, data, model and stages; this is of type {type(raw).__name__}"
        )
    return source, raw


def _text(source: str, texts: Iterable[str]) -> str:
    try:
        if not Path(source).is_file():
            raise FileNotFoundError
        with open(source, "rb") as file:
            data = file.read(BYTES + 1)
    except (FileNotFoundError, ValueError):  # ValueError: what no path can hold
        raise UserMistake(
            f"{source[:200]}: no such file and no built-in recipe{did_you_mean(source[:200], texts)} "
            f"(built in: {', '.join(texts)})"
        ) from None
    except OSError as error:
        raise UserMistake(f"{source[:200]}: cannot be read ({error.strerror})") from None
    if len(data) > BYTES:
        raise UserMistake(f"{source}: has more than {BYTES // 1024} KiB; a recipe is a page of YAML")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise UserMistake(f"{source}: is no text; a recipe is YAML in UTF-8") from None


class _Loader(yaml.SafeLoader):
    """YAML's safe loader without tags and dates, bounded in depth and in what aliases stand for.

    The safe loader itself would silently take the last of two fields of one name.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {  # type: ignore[misc]  # the stubs call it an instance's
        first: [(tag, form) for tag, form in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: str):
        super().__init__(stream)
        self._depth = self._parts = 0
        self._sizes: dict[int, int] = {}  # of a node, with all that stands in it

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event, before = self.peek_event(), self._parts
        if getattr(event, "tag", None) is not None:
            self._refuse(f"the tag {event.tag[:60]!r} has no place in a recipe", event.start_mark)
        self._depth += 1
        if self._depth > DEPTH:
            self._refuse(f"this is nested more than {DEPTH} deep", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                self._refuse(f"*{shortened(event.anchor, 60)} stands within what it names", event.start_mark)
            self._parts += self._sizes[id(node)]
        else:
            self._parts += 1
            self._sizes[id(node)] = self._parts - before
        if self._parts > PARTS:
            self._refuse(f"there are more than {PARTS:,} values; a recipe has dozens", event.start_mark)
        return node

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        if node.tag.endswith((":int", ":float")) and len(node.value) > DIGITS:
            self._refuse(f"a number of {len(node.value):,} characters", node.start_mark)
        return super().construct_scalar(node)

    def _refuse(self, what: str, mark: Any) -> NoReturn:
        raise yaml.constructor.ConstructorError(None, None, what, mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:  # of a key that is a list, the text will do: it is refused later
                self._refuse(f"{_short(key.value)} stands twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _with_change(
    raw: dict[str, Any], change: str, option: str = "--set", example: str = "stages.train.epochs=3"
) -> dict[str, Any]:
    path, equals, text = change.partition("=")
    told = f"{option} {shortened(change, 60)}"
    if not equals or not path.strip():
        raise UserMistake(f"{told}: write path=value, such as {option} {example}")
    value = read_value(text, told)
    steps = path.strip().split(".")
    if len(steps) > DEPTH:
        raise UserMistake(f"{told}: the path is more than {DEPTH} deep")
    stages = [str(name) for name in raw["stages"]] if isinstance(raw.get("stages"), Mapping) else []
    if steps[0] == "stages" and len(steps) > 2 and steps[1] not in stages:
        raise UserMistake(
            f"{told}: there is no stage {shortened(steps[1], 60)!r}{did_you_mean(steps[1], stages)} "
            f"(stages: {shortened(', '.join(stages))})"
        )
    return with_value(raw, steps, value)


def read_value(text: str, told: str) -> Any:
    """A value as YAML has it; `told` says in messages where it stands."""
    try:
        return yaml.load(text[: BYTES + 1], _Loader)
    except (yaml.YAMLError, RecursionError):
        raise UserMistake(f"{told}: {_short(text)} is not a YAML value") from None


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
        path.append(shortened(part, 60))
    return ".".join(path) or "recipe", value, found


def _is_tag(part: Any, value: dict[str, Any]) -> bool:
    text = str(part)
    return text in {str(value.get("kind")), "custom"} or "[" in text or text[:1].isupper()


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # a number of too many digits
        return "..."
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
