"""Name -> entry. Unknown names are answered with near ones; plug-ins register through entry points.

The one room that imports the code of others, which a user may switch off.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, Generic, TypeVar

from prune_jax.errors import UserMistake, did_you_mean

T = TypeVar("T")


SWITCH = "PRUNE_JAX_NO_PLUGINS"


def plugins_allowed() -> bool:
    """Whether the code of others may be imported: unless the environment says `PRUNE_JAX_NO_PLUGINS=1`."""
    return os.environ.get(SWITCH, "").lower() in {"", "0", "false", "no", "off"}


@contextmanager
def without_plugins(wanted: bool = True) -> Iterator[None]:
    """Switches the code of others off, in this process and in those that it starts; if it is wanted."""
    before = os.environ.get(SWITCH)
    if wanted:
        os.environ[SWITCH] = "1"
    try:
        yield
    finally:
        if wanted and before is None:
            del os.environ[SWITCH]
        elif wanted and before is not None:
            os.environ[SWITCH] = before


def check_plugin(name: str) -> None:
    """Refuses the code of others where it is switched off."""
    if not plugins_allowed():
        raise UserMistake(
            f"{name!r} is code beside prune_jax's own, and such is switched off; use what is built in, or leave out "
            f"--no-plugins (and {SWITCH})"
        )


def plugin_module(group: str, name: str) -> str | None:
    """The module in which another package announces `name`; None if none does."""
    return next((plugin.module for plugin in entry_points(group=group) if plugin.name == name), None)


class Registry(Generic[T]):
    """A table of named entries of one kind.

    Args:
        kind: what the entries are, for messages: `"criterion"`.
        group: the entry-point group in which other packages announce theirs: `"prune_jax.criteria"`.
    """

    def __init__(self, kind: str, group: str):
        self.kind = kind
        self._group = group
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> T:
        """Enters `entry` under `name`; a name is given once."""
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is registered twice; choose another name.")
        self._entries[name] = entry
        return entry

    def names(self) -> tuple[str, ...]:
        """All names, ours first, then those of installed plug-ins."""
        if not plugins_allowed():
            return tuple(self._entries)
        plugins = (p.name for p in entry_points(group=self._group) if p.name not in self._entries)
        return (*self._entries, *plugins)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self._entries or any(p.name == name for p in entry_points(group=self._group))

    def __getitem__(self, name: str) -> T:
        """The entry called `name`; raises `UserMistake` with the known names otherwise."""
        if name not in self._entries:
            for plugin in entry_points(group=self._group):
                if plugin.name == name:
                    check_plugin(name)
                    self._entries.setdefault(name, self._loaded(plugin))  # loading may have registered it already
                    break
            else:
                raise UserMistake(
                    f"{self.kind} {name!r} is not known{did_you_mean(name, self.names())} "
                    f"(known: {', '.join(self.names())})"
                )
        return self._entries[name]

    def entries(self) -> tuple[T, ...]:
        """What is registered so far; plug-ins that nobody has asked for are not."""
        return tuple(self._entries.values())

    def _loaded(self, plugin: EntryPoint) -> Any:
        try:
            return plugin.load()
        except Exception as error:  # whatever the other package raises
            package = plugin.dist.name if plugin.dist else plugin.value
            raise UserMistake(
                f"{self.kind} {plugin.name!r} cannot be loaded from {package!r} ({plugin.value}): "
                f"{type(error).__name__}: {error}. Mend or uninstall that package."
            ) from error


def load_module(reference: str) -> ModuleType:
    """Imports the module that `"package.module:object"` names, if the code of others is not switched off."""
    check_plugin(reference)
    return importlib.import_module(reference.partition(":")[0])


def load_object(reference: str) -> Any:
    """Imports what `"package.module:object"` names.

    >>> load_object("math:hypot")(3, 4)
    5.0
    """
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise UserMistake(f"{reference!r} is not of the form 'package.module:object'.")
    try:
        module = load_module(reference)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if missing != module_name and not module_name.startswith(missing + "."):
            raise UserMistake(
                f"{reference!r} could not be imported: it needs {missing!r}, which is missing."
            ) from error
        raise UserMistake(
            f"{reference!r} could not be imported: no module {missing!r}. "
            "Install its package, or add its folder to PYTHONPATH."
        ) from error
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = [n for n in vars(found) if not n.startswith("_")]
            raise UserMistake(f"{module_name!r} has no {attribute!r}{did_you_mean(part, known)}")
        found = getattr(found, part)
    return found
