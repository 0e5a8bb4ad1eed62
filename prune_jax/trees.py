"""Pytrees by the paths of their leaves: `Dense_0/kernel`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

PyTree = Any


def path_name(path: tuple[Any, ...]) -> str:
    """Joins a JAX key path with `/`: `(DictKey('a'), SequenceKey(0))` is `a/0`."""
    return "/".join(_key_name(key) for key in path)


def _key_name(key: Any) -> str:
    match key:
        case DictKey(key=name) | FlattenedIndexKey(key=name):
            return str(name)
        case SequenceKey(idx=index):
            return str(index)
        case GetAttrKey(name=name):
            return name
    return str(key)


def leaves_by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves of `tree`, named by their paths, in the order of `jax.tree.leaves`.

    >>> leaves_by_path({"a": {"w": 1, "b": None}, "c": [2, 3]})
    {'a/w': 1, 'c/0': 2, 'c/1': 3}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves}


def map_by_path(function: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """Calls `function(path, leaf)` on every leaf; the answers keep the tree's containers.

    >>> map_by_path(lambda path, leaf: path, {"a": {"w": 1}})
    {'a': {'w': 'a/w'}}
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(path_name(path), leaf), tree)


def select(tree: PyTree, keep: Iterable[str]) -> PyTree:
    """`tree` with `None` in place of every leaf whose path is not in `keep`.

    >>> select({"w": 1, "b": 2}, ["w"])
    {'b': None, 'w': 1}
    """
    kept = set(keep)
    return map_by_path(lambda path, leaf: leaf if path in kept else None, tree)


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Paths back into nested dicts.

    >>> nest({"a/w": 1, "a/b": 2})
    {'a': {'w': 1, 'b': 2}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[name] = leaf
    return tree


def names_in(paths: Iterable[str]) -> list[str]:
    """What a pattern may name: the paths and their parts.

    >>> names_in(["out/kernel", "out/bias"])
    ['out/kernel', 'out', 'kernel', 'out/bias', 'bias']
    """
    return list(dict.fromkeys(name for path in paths for name in (path, *path.split("/"))))


def matches(path: str, pattern: str) -> bool:
    """Whether `path` fits the shell pattern, as a whole or from any `/` on; `/out` fits at the root alone.

    >>> matches("encoder/Dense_0/kernel", "Dense_*/kernel"), matches("out/kernel", "Dense_*")
    (True, False)
    >>> matches("encoder/Dense_0/kernel", "encoder/*"), matches("out/kernel", "out")
    (True, True)
    >>> matches("encoder/out/kernel", "/out"), matches("out/kernel", "/out")
    (False, True)
    """
    parts = path.split("/")
    starts = range(1) if pattern.startswith("/") else range(len(parts))
    tails = ["/".join(parts[i:j]) for i in starts for j in range(i + 1, len(parts) + 1)]
    return any(fnmatchcase(tail, pattern.removeprefix("/")) for tail in tails)
