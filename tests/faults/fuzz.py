"""What is read from anywhere, bent at random: none of it may end in a traceback, hang, or take memory.

Only a `PruneError` of a few lines is an answer: the command line prints it, and exits with 1 or 2. Each case starts
from something valid, so that most of them get past the first check.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import typer
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from prune_jax import cli
from prune_jax.checkpoints import META, Store, _digest_of
from prune_jax.datasets import load
from prune_jax.errors import PruneError
from prune_jax.export import EXTENSIONS, load_packed
from prune_jax.export.packed import to_packed
from prune_jax.export.stablehlo import to_stablehlo
from prune_jax.export.tensors import load_safetensors, to_safetensors
from prune_jax.forecast import forecast
from prune_jax.garbage import remove
from prune_jax.prediction import _exported, predict, read_inputs
from prune_jax.preparation import prepare
from prune_jax.recipe import Ref, built_in, read_recipe
from tests.faults.bending import ARRAYS, CUTS, EDITS, FLIPS, MEMBERS, MOVES, archive, bent, edited, flipped
from tests.faults.table import Outcome, fault
from tests.plain import tiny
from tests.report_runs import compact_run

SECONDS, MEMORY = 5, 512 * 2**20  # of one case, in processor time; of all cases, beyond what was there before
LINE = 2000  # characters in a line of an answer
BLOCK = 1000  # cases of one seed: Hypothesis remembers all that it drew
REF = Ref("train", "k" * 20)


class Fuzzer(NamedTuple):
    """Cases, and what must get through each with a result or a `PruneError`."""

    cases: st.SearchStrategy[Any]
    survives: Callable[[Any], object]


FUZZERS: dict[str, Callable[[Path], Fuzzer]] = {}


def fuzzer(name: str) -> Callable[[Callable[[Path], Fuzzer]], Callable[[Path], Fuzzer]]:
    """Registers what makes a fuzzer in an empty folder, also as the fault `fuzz NAME`."""

    def register(prepare: Callable[[Path], Fuzzer]) -> Callable[[Path], Fuzzer]:
        FUZZERS[name] = prepare
        fault(f"fuzz {name}")(lambda times: hunt(name, times))
        return prepare

    return register


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


class Judge:
    """Runs a fuzzer's cases one by one, and counts them.

    Raises: whatever a case raises that is no `PruneError`, `Hang`, or an `AssertionError` where memory or an answer
        grew beyond its bound.
    """

    def __init__(self, survives: Callable[[Any], object]):
        self.survives, self.cases, self.before = survives, 0, _largest()

    def __call__(self, case: Any) -> None:
        self.cases += 1
        try:
            with limited():
                self.survives(case)
        except PruneError as error:
            told = str(error)
            assert told, "an error that says nothing"
            assert max(map(len, told.splitlines())) <= LINE, f"an answer of {len(told)} characters: {told[:200]}"
        except BaseException as error:
            error.add_note(f"the case: {case!r:.3000}")
            raise
        grown = _largest() - self.before
        assert grown < MEMORY, f"{grown / 2**20:.0f} MiB more than before, after {case!r:.3000}"


def _largest() -> int:
    """Bytes that this process had at most; where Linux tells, without those of the one that started it."""
    status = Path("/proc/self/status")
    told = re.search(r"VmHWM:\s*(\d+)", status.read_text()) if status.exists() else None
    return 1024 * (int(told[1]) if told else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def property_of(prepared: Fuzzer, judge: Judge, times: int, seeded: int = 0) -> Callable[[], None]:
    """The fuzzer as a test of Hypothesis's: called, it draws so many cases, and makes what fails small."""

    @seed(seeded)
    @settings(
        max_examples=times,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(prepared.cases)
    def one(case: Any) -> None:
        judge(case)

    return one


def hunt(name: str, times: int) -> Outcome:
    """Draws so many cases of a fuzzer; what is not answered by a `PruneError` or a result is shrunk and raised."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        prepared = FUZZERS[name](Path(folder))
        judge = Judge(prepared.survives)
        for block in count():
            done = judge.cases
            property_of(prepared, judge, min(BLOCK, times - done), block)()
            if not done < judge.cases < times:
                break
    return Outcome(times, judge.cases, 0, time.perf_counter() - began)


RECIPES = {name: yaml.safe_load(text) for name, text in built_in().items()}


@fuzzer("recipes")
def recipes(folder: Path) -> Fuzzer:
    """Mappings, as Python gives them."""
    return Fuzzer(
        st.builds(bent, st.sampled_from(list(RECIPES.values())), MOVES).filter(lambda raw: isinstance(raw, dict)),
        read_recipe,
    )


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


@fuzzer("plans")
def plans(folder: Path) -> Fuzzer:
    """Recipes, read, planned and held against a store."""
    store = Store(folder)
    return Fuzzer(
        st.builds(bent, st.sampled_from(SMALL), MOVES).filter(lambda raw: isinstance(raw, dict)),
        lambda raw: forecast(prepare(read_recipe(raw)), store),
    )


@fuzzer("YAML")
def yamls(folder: Path) -> Fuzzer:
    """A recipe's text, and what `--set` changes."""
    file = folder / "r.yaml"

    def read(case: tuple[bytes, list[str]]) -> None:
        text, changes = case
        file.write_bytes(text)
        read_recipe(str(file), changes=changes)

    texts = st.builds(edited, st.sampled_from(list(built_in().values())), EDITS)
    paths = st.sampled_from(
        ["name", "stages.train.epochs", "data.args.x", "stages.x.y", "a.b.c", "", "stages", "matrix.seed"]
    )
    changes = st.builds(edited, paths.map("{}=1".format), EDITS)
    encoded = texts.map(lambda text: text.encode("utf-8", "surrogatepass"))
    return Fuzzer(st.tuples(encoded, st.lists(changes, max_size=1)), read)


@fuzzer("npz")
def npzs(folder: Path) -> Fuzzer:
    """Archives of arrays, as data and as inputs of `predict`."""
    file = folder / "d.npz"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        with contextlib.suppress(PruneError):
            read_inputs(str(file))
        load("npz", path=str(file), validation=0)

    return Fuzzer(st.builds(archive, MEMBERS, st.booleans(), FLIPS, CUTS), read)


@fuzzer("metadata of artifacts")
def metas(folder: Path) -> Fuzzer:
    """`meta.json`, with a digest that fits."""
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
        with contextlib.suppress(TypeError, ValueError, AttributeError, RecursionError):  # no attacker could write it
            meta["digest"] = _digest_of(meta)
        try:
            file.write_text(json.dumps(meta, indent=1))
        except (TypeError, ValueError, RecursionError):
            return
        forecast(plan, store)
        with contextlib.suppress(PruneError):
            remove(store, dry_run=True)
        store.read(REF)

    return Fuzzer(st.builds(bent, st.just(good), MOVES), read)


@fuzzer("files of artifacts")
def files(folder: Path) -> Fuzzer:
    """Orbax's files, with digests that fit."""
    store = Store(folder)
    store.write(REF, {"params": {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}}, {"metrics": {}, "seconds": 1.0})
    home = Path(store.path(REF))
    good = {f.relative_to(home).as_posix(): f.read_bytes() for f in sorted(home.rglob("*")) if f.is_file()}
    meta = json.loads(good.pop(META))

    def read(case: tuple[str, list[tuple[int, int]], int]) -> None:
        name, flips, cut = case
        data = flipped(good[name], flips, cut)
        (home / name).write_bytes(data)
        told = meta | {"files": meta["files"] | {name: hashlib.sha256(data).hexdigest()}}
        (home / META).write_text(json.dumps(told | {"digest": _digest_of(told)}, indent=1))
        try:
            store.read(REF)
        finally:
            (home / name).write_bytes(good[name])

    return Fuzzer(st.tuples(st.sampled_from(sorted(good)), FLIPS, CUTS), read)


@fuzzer("run records")
def records(folder: Path) -> Fuzzer:
    """`run.json`, as every command reads it that does."""
    store, turns = Store(folder), count(1)
    record = store.record(compact_run(store))
    file, name, where = Path(store.record_path(record["name"])), record["name"], str(store.root)
    text = json.dumps(record)
    promoted = folder / "champions" / "best.json"  # what lies beside artifacts and records and names runs
    promoted.parent.mkdir()

    def read(case: Any) -> None:
        try:
            file.write_text(json.dumps(case) if not isinstance(case, str) else case, errors="surrogatepass")
        except (TypeError, ValueError, RecursionError):
            return
        promoted.write_bytes(file.read_bytes())
        turn = next(turns)
        commands: list[Callable[[], object]] = [lambda: cli.show(name, store=where), lambda: cli.runs(store=where)]
        if turn % 10 == 0:
            commands += [lambda: cli.verify(name, store=where), lambda: cli.gc_(dry_run=True, store=where)]
        if turn % 40 == 0:
            commands += [lambda: cli.report(name, store=where), lambda: cli.compare([name], store=where)]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            for command in commands:
                with contextlib.suppress(PruneError, typer.Exit):
                    command()

    return Fuzzer(st.builds(bent, st.just(record), MOVES) | st.builds(edited, st.just(text), EDITS), read)


def arrays_file(header: Any, body: bytes, flips: list[tuple[int, int]], cut: int) -> bytes:
    """A safetensors file of any header."""
    text = header if isinstance(header, bytes) else json.dumps(header, default=str, skipkeys=True).encode()
    return flipped(len(text).to_bytes(8, "little") + text + body, flips, cut)


def parts_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the body of a safetensors file."""
    size = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:size]), data[size:]


PLAIN = to_safetensors(
    {"a/kernel": np.ones((3, 2), np.float32), "b": np.ones(3, bool), "c": np.array(1), "d": np.ones((2, 0), np.uint8)}
)
SPARSE = to_packed({"w": np.float32(np.arange(64 * 64) % 37 == 0).reshape(64, 64), "b": np.ones(3, np.float32)})
TYPES = st.sampled_from(["BF16", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3", "I64", "C64", "BOOL", "x"])


@fuzzer("safetensors")
def safetensors(folder: Path) -> Fuzzer:
    """Exported arrays: headers, types, bytes."""
    header, body = parts_of(PLAIN)
    typed = st.builds(
        lambda name, kind: {**header, name: {**header[name], "dtype": kind}}, st.sampled_from(sorted(header)), TYPES
    )
    headers = st.just(header) | typed | st.builds(bent, st.just(header), MOVES)
    return Fuzzer(st.builds(arrays_file, headers, st.just(body), FLIPS, CUTS), load_safetensors)


@fuzzer("packed arrays")
def packed(folder: Path) -> Fuzzer:
    """Exported arrays as bits and values: headers, shapes, bytes."""
    header, body = parts_of(SPARSE)

    def shaped(shapes: Any) -> dict[str, Any]:
        told = {"shapes": json.dumps(shapes, default=str, skipkeys=True)}
        return header | {"__metadata__": header["__metadata__"] | told}

    shapes = st.builds(bent, st.just({"w": [64, 64]}), MOVES).map(shaped)
    headers = st.just(header) | shapes | st.builds(bent, st.just(header), MOVES)
    return Fuzzer(st.builds(arrays_file, headers, st.just(body), FLIPS, CUTS), load_packed)


@fuzzer("exported programs")
def programs(folder: Path) -> Fuzzer:
    """`predict`: JAX's reader, native code, gets the bytes that were exported or none; inputs of any kind."""
    weights = np.ones((2, 3), np.float32)
    program = to_stablehlo(lambda x: x @ weights, [np.ones((1, 2), np.float32)])
    store, ref = Store(folder), Ref("export", REF.key)
    store.write(ref, {}, {"metrics": {}}, {EXTENSIONS["stablehlo"]: program})
    stage = {"kind": "export", "key": REF.key, "status": "ran", "metrics": {"stablehlo": {"bytes": len(program)}}}
    record = {"name": "x", "stages": {"train": {"kind": "train", "key": REF.key, "status": "ran"}, "export": stage}}
    store.write_record(record)
    told, file = Path(store.record_path("x")), Path(store.path(ref)) / EXTENSIONS["stablehlo"]

    def read(case: tuple[str, Any]) -> None:
        what, given = case
        told.write_text(json.dumps(given if what == "record" else record, default=str, skipkeys=True))
        file.write_bytes(flipped(program, *given) if what == "program" else program)
        if what == "inputs":
            predict(store, "x", given)
        else:
            assert _exported(store, "x", given if what == "stage" else None) == program

    inputs = st.dictionaries(st.sampled_from(["x", "lengths", "y"]), ARRAYS.map(_array_of), max_size=2)
    cases = [
        st.tuples(st.just("record"), st.builds(bent, st.just(record), MOVES)),
        st.tuples(st.just("program"), st.tuples(FLIPS, CUTS)),
        st.tuples(st.just("stage"), st.text(max_size=5) | st.sampled_from(["train", "export"])),
        st.tuples(st.just("inputs"), inputs),
    ]
    return Fuzzer(st.one_of(cases), read)


def _array_of(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data))
