"""What is valid, bent: trees, texts, archives and bytes. Hypothesis draws how, and makes what fails small."""

from __future__ import annotations

import copy
import io
import struct
import zipfile
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from hypothesis import strategies as st

ODD = st.sampled_from(
    [
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        10**9,
        2**31,
        2**63,
        -(2**63),
        10**30,
        10**4000,
        0.0,
        -0.0,
        0.5,
        1.0,
        1e-300,
        1e300,
        float("nan"),
        float("inf"),
        "",
        "0",
        "none",
        "null",
        ":",
        "a:b",
        "os:system",
        "../..",
        "/etc/passwd",
        "\x00",
        "�",
        "\u202e",
        "．．",
        "x" * 300,
        "x" * 20000,
        "*",
        "[",
        "2:4",
        "0:0",
        "99999:99999",
        "train",
        "prune",
        "magnitude",
        "group",
        "layer",
        "global",
        [],
        {},
        [[]],
        [{}],
        {"": 0},
        {"kind": "x"},
        {1: 2},
        {"block": [0, 0]},
        [0] * 50,
    ]
)
LEAVES = ODD | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
PLACES = 5000  # of a tree that are looked at: repeats of repeats may make millions
WAYS = ("drop", "replace", "replace", "rename", "wrap", "deepen", "swap", "repeat", "field")
MOVES = st.lists(
    st.tuples(st.integers(0, 10**4), st.integers(0, 10**4), st.sampled_from(WAYS), VALUES), min_size=1, max_size=4
)


def bent(tree: Any, moves: list[tuple[int, int, str, Any]]) -> Any:
    """A copy of a tree of lists and dicts with some of its places changed."""
    tree = {"": copy.deepcopy(tree)}
    for first, second, way, drawn in moves:
        value = copy.deepcopy(drawn)  # the next move may change it, and it would hold itself in the next case
        places = list(islice(_places(tree), PLACES))
        (holder, name), (other, there) = places[first % len(places)], places[second % len(places)]
        if way == "drop":
            del holder[name]
        elif way == "rename" and isinstance(holder, dict):
            holder[value if isinstance(value, str | int | float) else str(value)] = holder.pop(name)
        elif way == "wrap":
            holder[name] = [holder[name]] if first % 2 else {str(there): holder[name]}
        elif way == "deepen":
            for _ in range(second % 200):
                holder[name] = [holder[name]]
        elif way == "swap":
            holder[name] = copy.deepcopy(other[there])
        elif way == "repeat" and isinstance(holder, list):
            holder += [holder[name]] * (second % 50)
        elif way == "field" and isinstance(holder[name], dict):
            holder[name][str(there)] = value
        else:
            holder[name] = value
        if not tree:
            return value
    return tree.get("", tree)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    waiting = [tree]
    while waiting:
        holder = waiting.pop()
        items = list(holder.items()) if isinstance(holder, dict) else list(enumerate(holder))
        for name, inner in items:
            yield holder, name
            if isinstance(inner, dict | list):
                waiting.append(inner)


TOKENS = st.sampled_from(
    [
        "&a ",
        "*a",
        "<<: *a",
        "!!python/object:os.system ",
        "!!binary x",
        "!x ",
        "? ",
        "- ",
        "[",
        "{",
        "}",
        "]",
        ":",
        ": ",
        "#",
        "'",
        '"',
        "|",
        ">",
        "%YAML 9",
        "---",
        "...",
        "\n",
        "\t",
        "\x00",
        "\ufeff",
        "2020-13-99",
        "1:1:1",
        "=",
        "~",
        ".inf",
        "0x1",
        "[" * 500,
        "&a [*a]",
        "9" * 5000,
        '"\\ud800"',
        "é",
        "\u2028",
    ]
)
EDITS = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(0, 3), TOKENS | st.text(max_size=3)), min_size=1, max_size=5
)


def edited(text: str, edits: list[tuple[int, int, str]]) -> str:
    """A text with something put in and something left out."""
    for where, out, token in edits:
        place = where % (len(text) + 1)
        text = text[:place] + token + text[place + out :]
    return text


GOOD = {
    "x_train": np.ones((6, 2), np.float32),
    "y_train": np.array([0, 1, 0, 1, 0, 1]),
    "x_test": np.ones((2, 2), np.float32),
    "y_test": np.array([0, 1]),
}
HEADERS = st.fixed_dictionaries(
    {
        "descr": st.sampled_from(
            ["<f4", "<i8", "|O", "<U5", "|b1", "<c8", ">f2", "<M8[s]", "|V0", "|S0", "<f16", "x", ""]
        )
        | st.just([("a", "<f4"), ("b", "|O")]),
        "fortran_order": st.booleans(),
        "shape": st.lists(st.integers(-1, 7) | st.sampled_from([10**15, 2**64]), max_size=3).map(tuple),
    }
)


def member(header: dict[str, Any] | bytes, data: bytes, version: int) -> bytes:
    """An array as `.npy` holds it, its header whatever it may be."""
    text = header if isinstance(header, bytes) else repr(header).encode()
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + data


def archive(members: dict[str, bytes], compressed: bool, flips: list[tuple[int, int]], cut: int) -> bytes:
    """An archive of these, bytes of it changed, its end cut off."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return flipped(buffer.getvalue(), flips, cut)


def flipped(data: bytes, flips: list[tuple[int, int]], cut: int = 0) -> bytes:
    """Bytes with some of them changed, and the end cut off."""
    bent = bytearray(data)
    for where, by in flips:
        if bent:
            bent[where % len(bent)] ^= by
    return bytes(bent[: max(len(bent) - cut, 0)])


FLIPS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=4)
CUTS = st.just(0) | st.integers(0, 400)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


ARRAYS = st.sampled_from(
    [
        *GOOD.values(),
        np.full((6, 2), np.nan),
        np.zeros((0, 2)),
        np.ones(6),
        np.array(1.0),
        np.ones((6, 2), complex),
        np.array(["a"] * 6),
        np.arange(6) - 3,
        np.full(6, 2**40),
        np.ones((6, 2, 1, 1)),
        np.array([1], "M8[s]"),
        np.ones(6, bool),
    ]
).map(npy)
MEMBERS = st.builds(
    lambda over, drop: {
        k: v for k, v in ({f"{n}.npy": npy(a) for n, a in GOOD.items()} | over).items() if k not in drop
    },
    st.dictionaries(
        st.sampled_from(
            [f"{n}.npy" for n in GOOD]
            + ["x.npy", "len_train.npy", "len_test.npy", "../x.npy", "x", "classes.npy", "n" * 3000]
        ),
        ARRAYS | st.builds(member, HEADERS | st.binary(max_size=40), st.binary(max_size=64), st.integers(0, 4)),
        max_size=2,
    ),
    st.sets(st.sampled_from([f"{n}.npy" for n in GOOD]), max_size=1),
)


def archive_around(data: bytes) -> bytes:
    """An archive with this as an array, its checksum right; or these bytes themselves if they look like one."""
    members = {f"{name}.npy": npy(array) for name, array in GOOD.items()} | {"x_train.npy": data}
    return data if data.startswith(b"PK") else archive(members, False, [], 0)
