"""What is read from anywhere, bent at random: none of it may end in a traceback, hang, or take memory.

Only a `PruneError` is an answer: the command line makes one line and exit code 1 or 2 of it. Each case starts from
something valid, so that most of them get past the first check.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import resource
import signal
import struct
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from prune_jax import cli
from prune_jax.checkpoints import META, Store, _digest_of
from prune_jax.datasets import load
from prune_jax.errors import PruneError
from prune_jax.export import load_packed
from prune_jax.export.packed import to_packed
from prune_jax.export.tensors import load_safetensors
from prune_jax.forecast import forecast
from prune_jax.prediction import read_inputs
from prune_jax.preparation import prepare
from prune_jax.recipe import Ref, built_in, read_recipe
from tests.faults.table import Outcome, fault
from tests.plain import tiny
from tests.report_runs import compact_run

SECONDS, MEMORY = 5, 512 * 2**20  # of one case, in processor time; of all cases, beyond what was there before
REF = Ref("train", "k" * 20)


class Hang(BaseException):
    """A case took too long; no `except Exception` takes it for something else."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Ends what takes more than its seconds."""

    def end(*_: object) -> None:
        raise Hang(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def hunt(cases: st.SearchStrategy[Any], survives: Callable[[Any], object], times: int) -> Outcome:
    """Draws so many cases; what is not answered by a `PruneError` or a result is shrunk and raised."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @seed(times)
    @settings(
        max_examples=times,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def one(case: Any) -> None:
        with limited(), contextlib.suppress(PruneError):
            survives(case)

    one()
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < MEMORY, f"{grown / 2**20:.0f} MiB more than before"
    return Outcome(times, times, 0, time.perf_counter() - began)


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
WAYS = ("drop", "replace", "replace", "rename", "wrap", "deepen", "swap", "repeat", "field")
MOVES = st.lists(
    st.tuples(st.integers(0, 10**4), st.integers(0, 10**4), st.sampled_from(WAYS), VALUES), min_size=1, max_size=4
)


def bent(tree: Any, moves: list[tuple[int, int, str, Any]]) -> Any:
    """A copy of a tree of lists and dicts with some of its places changed."""
    tree = {"": copy.deepcopy(tree)}
    for first, second, way, value in moves:
        places = list(_places(tree))
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


RECIPES = {name: yaml.safe_load(text) for name, text in built_in().items()}
BENT_RECIPES = st.builds(bent, st.sampled_from(list(RECIPES.values())), MOVES)


@fault("fuzz recipes")
def recipes(times: int) -> Outcome:
    return hunt(BENT_RECIPES, lambda raw: read_recipe(raw) if isinstance(raw, dict) else None, times)


SMALL = [
    tiny(),
    tiny(train={"kind": "train", "epochs": 1, "sparsify": {"kind": "rigl"}}, compact={"kind": "compact"}),
    {
        "name": "x",
        "data": {"source": "xor", "args": {"points": 40}},
        "model": {"kind": "mlp"},
        "objective": "regression",
    }
    | {
        "stages": {"train": {"kind": "train", "steps": 5}, "evaluate": {"kind": "evaluate", "matrix": {"seed": [0, 1]}}}
    },
]


@fault("fuzz plans")
def plans(times: int) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        return hunt(
            st.builds(bent, st.sampled_from(SMALL), MOVES),
            lambda raw: forecast(prepare(read_recipe(raw)), store) if isinstance(raw, dict) else None,
            times,
        )


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


@fault("fuzz YAML")
def yamls(times: int) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "r.yaml"

        def read(case: tuple[str, list[str]]) -> None:
            text, changes = case
            file.write_bytes(text.encode("utf-8", "surrogatepass"))
            read_recipe(str(file), changes=changes)

        texts = st.builds(edited, st.sampled_from(list(built_in().values())), EDITS)
        paths = st.sampled_from(
            ["name", "stages.train.epochs", "data.args.x", "stages.x.y", "a.b.c", "", "stages", "matrix.seed"]
        )
        changes = st.builds(edited, paths.map("{}=1".format), EDITS)
        return hunt(st.tuples(texts, st.lists(changes, max_size=1)), read, times)


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
            [f"{n}.npy" for n in GOOD] + ["x.npy", "len_train.npy", "len_test.npy", "../x.npy", "x", "classes.npy"]
        ),
        ARRAYS | st.builds(member, HEADERS | st.binary(max_size=40), st.binary(max_size=64), st.integers(0, 4)),
        max_size=2,
    ),
    st.sets(st.sampled_from([f"{n}.npy" for n in GOOD]), max_size=1),
)


@fault("fuzz npz")
def npzs(times: int) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "d.npz"

        def read(data: bytes) -> None:
            file.write_bytes(data)
            with contextlib.suppress(PruneError):
                read_inputs(str(file))
            load("npz", path=str(file), validation=0)

        return hunt(st.builds(archive, MEMBERS, st.booleans(), FLIPS, CUTS), read, times)


@fault("fuzz metadata of artifacts")
def metas(times: int) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        arrays = {"params": {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "empty": np.zeros((0, 3))}}
        store.write(REF, arrays, {"metrics": {"loss": 1.0}, "seconds": 1.0}, {"extra.bin": b"x"})
        file = Path(store.path(REF)) / META
        good = json.loads(file.read_text())
        record = {"name": "tiny", "stages": {"train": {"kind": REF.kind, "key": REF.key, "status": "ran"}}}
        store.write_record(record)
        plan = prepare(read_recipe(tiny()))
        good["call"] = plan.calls[0].model_dump(mode="json")

        def read(meta: Any) -> None:
            with contextlib.suppress(
                TypeError, ValueError, AttributeError, RecursionError
            ):  # no attacker could write it
                meta["digest"] = _digest_of(meta)
            try:
                file.write_text(json.dumps(meta, indent=1))
            except (TypeError, ValueError, RecursionError):
                return
            forecast(plan, store)
            store.read(REF)

        return hunt(st.builds(bent, st.just(good), MOVES), read, times)


@fault("fuzz files of artifacts")
def files(times: int) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        store.write(
            REF, {"params": {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}}, {"metrics": {}, "seconds": 1.0}
        )
        home = Path(store.path(REF))
        good = {f.relative_to(home).as_posix(): f.read_bytes() for f in sorted(home.rglob("*")) if f.is_file()}
        meta = json.loads(good.pop(META))

        def read(case: tuple[str, list[tuple[int, int]], int]) -> None:
            name, flips, cut = case
            data = flipped(good[name], flips, cut)
            (home / name).write_bytes(data)
            files = meta["files"] | {name: hashlib.sha256(data).hexdigest()}
            told = meta | {"files": files}
            (home / META).write_text(json.dumps(told | {"digest": _digest_of(told)}, indent=1))
            try:
                store.read(REF)
            finally:
                (home / name).write_bytes(good[name])

        return hunt(st.tuples(st.sampled_from(sorted(good)), FLIPS, CUTS), read, times)


@fault("fuzz run records")
def records(times: int) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        record = store.record(compact_run(store))
        file, turn = Path(store.record_path(record["name"])), iter(range(10**9))

        def read(raw: Any) -> None:
            try:
                file.write_text(json.dumps(raw))
            except (TypeError, ValueError, RecursionError):
                return
            name, where = record["name"], str(store.root)
            with contextlib.redirect_stdout(io.StringIO()):
                for command in (cli.show, cli.report if next(turn) % 40 == 0 else cli.show):
                    with contextlib.suppress(PruneError):
                        command(name, store=where)
                with contextlib.suppress(PruneError):
                    cli.runs(store=where)
                if next(turn) % 40 == 0:
                    cli.compare([name], store=where)

        return hunt(st.builds(bent, st.just(record), MOVES), read, times)


@fault("fuzz files of arrays")
def exports(times: int) -> Outcome:
    sparse = np.zeros((64, 64), np.float32)
    sparse[::7, ::5] = 1
    data = to_packed({"w": sparse, "b": np.ones(3, np.float32)})
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]

    def with_header(header: Any, flips: list[tuple[int, int]], cut: int) -> bytes:
        text = json.dumps(header, default=str, skipkeys=True).encode()
        return flipped(len(text).to_bytes(8, "little") + text + body, flips, cut)

    def read(data: bytes) -> None:
        with contextlib.suppress(PruneError):
            load_safetensors(data)
        load_packed(data)

    bent_shapes = st.builds(
        lambda moves: (
            header
            | {
                "__metadata__": header["__metadata__"]
                | {"shapes": json.dumps(bent({"w": [64, 64]}, moves), default=str, skipkeys=True)}
            }
        ),
        MOVES,
    )
    headers = bent_shapes | st.builds(bent, st.just(header), MOVES) | st.just(header)
    return hunt(st.builds(with_header, headers, FLIPS, CUTS), read, times)
