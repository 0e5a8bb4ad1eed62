"""Some of each fuzzing by default, many when named; and what it found, one test for each."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from prune_jax.archives import read_archive
from prune_jax.checkpoints import _digest_of
from prune_jax.datasets import load
from prune_jax.errors import DamagedArtifactError, PruneError, UserMistake
from prune_jax.export import load_packed
from prune_jax.export.tensors import load_safetensors
from prune_jax.garbage import remove
from prune_jax.prediction import read_inputs
from prune_jax.recipe import read_recipe
from prune_jax.verification import verify
from tests.faults import bending, fuzz, guided
from tests.faults.trust import REF, rewritten
from tests.plain import tiny

FEW = {"run records": 3, "files of artifacts": 3, "metadata of artifacts": 5, "exported programs": 5}


@pytest.mark.parametrize("name", fuzz.FUZZERS)
def test_nothing_bent_ends_in_a_traceback_a_hang_or_a_large_allocation(name):
    times = FEW.get(name, 10)
    assert fuzz.hunt(name, times)[:3] == (times, times, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz.FUZZERS)
def test_nor_does_it_in_many_cases(name):
    assert fuzz.hunt(name, 2000).survived == 2000


@pytest.mark.slow
@pytest.mark.skipif(not guided.AVAILABLE, reason="needs the package atheris")
@pytest.mark.parametrize("name", guided.GUIDED)
def test_nor_where_coverage_guides(name):
    assert guided.guided(name, 2000).survived > 1000


def refuse_at_length(told):
    raise UserMistake(told)


@pytest.mark.parametrize(
    ("survives", "told"),
    [
        (lambda case: 1 // case, ZeroDivisionError),
        (lambda case: [None for _ in iter(int, 1) if case], fuzz.Hang),
        (lambda case: refuse_at_length("x" * 3000), AssertionError),
    ],
    ids=["traceback", "hang", "page of an answer"],
)
def test_a_fuzzer_notices(survives, told, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 0.5)
    with pytest.raises(told):
        fuzz.Judge(survives)(0)


def test_a_fuzzer_notices_an_allocation():
    """In a process of its own: what this one had before would hide it."""
    script = "import numpy as np; from tests.faults import fuzz; fuzz.MEMORY = 2**24; fuzz.Judge(np.ones)(2**24)"
    words = [sys.executable, "-c", script]
    ended = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert ended.returncode == 1
    assert "MiB more than before, after 16777216" in ended.stderr


def test_a_case_is_not_changed_by_the_next():
    grow = [(1, 0, "replace", []), (1, 60, "repeat", 0), (1, 0, "wrap", 0)]
    held = grow[0][3]
    first = bending.bent({"a": [1, 2]}, grow)
    assert held == []
    assert bending.bent({"a": [1, 2]}, grow) == first


def complaint(text, folder, **options):
    path = folder / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    begun = time.process_time()
    with pytest.raises(UserMistake) as caught:
        read_recipe(path, **options)
    assert time.process_time() - begun < 5
    assert len(str(caught.value)) < 2000
    return str(caught.value)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)
LARGE = [
    (LAUGHS, "there are more than 20,000 values"),
    ("name: x\n" + "# " + "x" * 100_000_000, "has more than 256 KiB"),
    ("a: " + "[" * 10_000, "this is nested more than 32 deep"),
    ("a: " + "{a: " * 10_000, "this is nested more than 32 deep"),
    ("".join(" " * i + "a:\n" for i in range(600)), "this is nested more than 32 deep"),
    ("a: &a [*a]", "*a stands within what it names"),
    ("a: &a {b: *a}", "*a stands within what it names"),
    ("a: " + "9" * 5000, "a number of 5,000 characters"),
    ("a: 0x" + "f" * 50_000, "a number of 50,002 characters"),
    ("a: 1" + ":1" * 50_000, "a number of 100,001 characters"),
    ("a: [" + "1," * 100_000 + "]", "there are more than 20,000 values"),
    ("name: !!timestamp x", "the tag 'tag:yaml.org,2002:timestamp' has no place in a recipe"),
    ("name: x\nname: y", "'name' stands twice"),
    ('name: "\\ud800"', "name = '\\ud800': holds the control character '\\ud800'"),
    ('name: "a\\0b"', "holds the control character '\\x00'"),
]


@pytest.mark.parametrize(("text", "told"), LARGE, ids=[told[:30] for _, told in LARGE])
def test_what_is_far_beyond_a_recipe_is_refused_quickly(text, told, tmp_path):
    assert told in complaint(text, tmp_path)


AXES = {f"stages.train.x{i}": list(range(1000)) for i in range(3)}
FOUND = [
    ({**tiny(), "matrix": AXES}, "the matrices make 1,000,000,000 rows; at most 10,000 are planned"),
    ({**tiny(), "model": {"kind": []}}, "model.kind = []: input should be a valid string"),
    (
        {**tiny(), "model": {"kind": "mlp", "widths": [10**5000]}},
        "model.widths = ...: is a whole number beyond 64 bits",
    ),
    ({**tiny(), "model": {"kind": "transformer", "layers": 10**9}}, "model.layers = 1000000000: "),
    ({**tiny(), "model": {"kind": "a:b", "args": {"x": float("nan")}}}, "holds nan; numbers are finite"),
    ({**tiny(), "model": {"kind": "a:b", "args": {"x": {1: 2}}}}, "has the name 1, which is no text"),
    ({**tiny(), "model": {"kind": "a:b", "args": {"x": b"x"}}}, "holds a value of type bytes"),
    (tiny(train={"kind": "train", "sparsify": {"kind": []}}), "stages.train.sparsify.kind = []: "),
    (tiny(train={"kind": "train", "sparsify": {"kind": "a:b", "x": {1}}}), "holds a value of type set"),
    ({**tiny(), "description": "x" * 10_001}, "is a text of 10,001 characters; at most 10,000 are read"),
]


@pytest.mark.parametrize(("raw", "told"), FOUND, ids=[told[:30] for _, told in FOUND])
def test_mappings_are_refused_as_files_are(raw, told):
    with pytest.raises(UserMistake) as caught:
        read_recipe(raw)
    assert told in str(caught.value)


def test_a_mapping_that_holds_itself_is_refused():
    raw = tiny()
    raw["data"] = {"source": "xor", "args": raw}
    with pytest.raises(UserMistake, match=r"is nested more than 32 deep|has more than 20,000 values"):
        read_recipe(raw)


@pytest.mark.parametrize(
    "change", ["a=" + "[" * 10_000, ".".join("a" * 5000) + "=1", "a=" + "9" * 5000, "stages.a.b=1"]
)
def test_changes_are_bounded_too(change):
    with pytest.raises(UserMistake):
        read_recipe({"name": "x", "stages": 3}, changes=[change])


@pytest.mark.parametrize("source", ["x" * 5000, "a\0b", "/dev/zero"], ids=["long", "nul", "device"])
def test_what_is_no_file_is_refused(source):
    with pytest.raises(UserMistake, match=r"no such file|cannot be read"):
        read_recipe(source)
    with pytest.raises(UserMistake):
        read_inputs(source)
    with pytest.raises(UserMistake):
        load("npz", path=source)


def archived(folder, header, data=b"", *, compressed=False):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if compressed else 0, compresslevel=1) as file:
        with file.open("x.npy", "w", force_zip64=True) as member:
            member.write(bending.member(header, data if isinstance(data, bytes) else b"", 1))
            for _ in range(data if isinstance(data, int) else 0):
                member.write(bytes(2**20))
    (folder / "d.npz").write_bytes(buffer.getvalue())
    return folder / "d.npz"


def test_a_header_that_claims_what_is_not_there_makes_no_array(tmp_path):
    header = {"descr": "<f8", "fortran_order": False, "shape": (10**15,)}
    with pytest.raises(UserMistake, match=r"its header says float64 \[1000000000000000\], and 8 bytes are there"):
        read_archive(archived(tmp_path, header, bytes(8)))


@pytest.mark.parametrize("name", ["y_train", "len_train"])
def test_an_array_without_samples_is_refused(name, tmp_path):
    arrays = bending.GOOD | {"len_train": np.ones(6, int), "len_test": np.ones(2, int), name: np.array(1)}
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(UserMistake, match=f"array '{name}' is one number, but must be "):
        load("npz", path=str(tmp_path / "d.npz"))


def test_arrays_without_metadata_are_refused():
    header = json.dumps({"__metadata__": None}).encode()
    with pytest.raises(DamagedArtifactError, match="it is not packed"):
        load_packed(len(header).to_bytes(8, "little") + header)


def test_a_bomb_is_not_unpacked(tmp_path):
    header = {"descr": "|u1", "fortran_order": False, "shape": (300 * 2**20,)}
    with pytest.raises(UserMistake, match=r"unpacks to 0.3 GiB, 2\d\d times its size"):
        read_archive(archived(tmp_path, header, 300, compressed=True))


def test_metadata_that_claim_what_is_not_there_make_no_array(store):
    store.write(REF, {"w": np.ones(3, np.float32)}, {"metrics": {}}, {"f": b"x"})
    file = Path(store.path(REF)) / "meta.json"
    told = json.loads(file.read_text())
    for shape in ([10**15], [10**9]):
        file.write_text(json.dumps(told | {"arrays": {"w": [shape, "float32"]}}))
        rewritten(file.parent, "f", b"x")
        with pytest.raises(DamagedArtifactError, match="its arrays cannot be read"):
            store.read(REF)


@pytest.mark.parametrize(
    "text", ["[]", "[" * 100_000, '{"name": 3}', '{"name": "x", "stages": {"a": {"kind": "../.."}}}']
)
def test_a_record_that_is_none_is_named(text, store):
    store.write_record({"name": "x"})
    store.record_path("x").write_text(text)
    with pytest.raises(DamagedArtifactError, match="the record of run 'x', is not"):
        store.record("x")


STAGE = {"kind": "train", "key": "k", "status": "ran"}


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "x", "stages": {"a": {}}}',
        '{"name": "x", "stages": {"a": 3}}',
        '{"name": "x", "stages": []}',
        "[" * 9999,
    ],
)
def test_what_is_no_record_stops_gc_and_is_named_by_verify(text, store):
    store.write_record({"name": "x", "stages": {"a": STAGE}})
    store.record_path("x").write_text(text)
    with pytest.raises(DamagedArtifactError, match=r"run\.json is no record of a run, .* nothing was removed"):
        remove(store, dry_run=True)
    assert [Path(path).name for path in verify(store).unreadable] == ["run.json"]


@pytest.mark.parametrize("data", [b"[" * 9999, b'{"run": ' + b"[" * 900 + b"]" * 900 + b"}", b"\xff"])
def test_any_file_may_lie_where_promoted_models_are_named(data, store):
    store.write_record({"name": "x"})
    (store.root / "champions").mkdir()
    (store.root / "champions" / "best.json").write_bytes(data)
    assert remove(store, dry_run=True) == []


@pytest.mark.parametrize("inputs", [{"a": 3}, {"a": ["train"]}, {"a": ["train", 3]}, [], {"a": None}])
def test_metadata_that_name_no_inputs_are_damaged(inputs, store):
    store.write(REF, {}, {"metrics": {}, "call": {"inputs": inputs}})
    store.write_record({"name": "x", "stages": {"a": {"kind": REF.kind, "key": REF.key, "status": "ran"}}})
    remove(store, dry_run=True)
    assert store.meta(REF) == {}


def long_mistakes(folder):
    """What a user may be wrong about, at length, and the function that says so."""
    name = "n" * 5000
    np.savez(folder / "named.npz", **bending.GOOD, **{name[:3000]: np.ones(1)})
    data = bytearray((folder / "named.npz").read_bytes())
    data[data.rindex(b"nnn")] ^= 1  # in the directory: the name there and at the array differ
    (folder / "torn.npz").write_bytes(data)
    yield lambda: load("npz", path=str(folder / "named.npz"))
    yield lambda: load("npz", path=str(folder / "torn.npz"))
    yield lambda: read_inputs(str(folder / "named.npz"))
    yield lambda: read_recipe({**tiny(), "stages": {name: {"kind": "x"}}})
    yield lambda: read_recipe(tiny(), changes=[f"stages.{name}.epochs=1"])
    yield lambda: read_recipe(tiny(), changes=[name])
    header = json.dumps({name: {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    yield lambda: load_safetensors(len(header).to_bytes(8, "little") + header + b"x")
    (folder / "twice.yaml").write_text(f"{name[:1000]}: 1\n{name[:1000]}: 2")
    yield lambda: read_recipe(folder / "twice.yaml")


def test_answers_stay_short(tmp_path):
    for wrong in long_mistakes(tmp_path):
        with pytest.raises(PruneError) as caught:
            wrong()
        assert max(map(len, str(caught.value).splitlines())) < 1000


def test_inputs_that_are_no_numbers_are_named(tmp_path):
    read = fuzz.programs(tmp_path).survives
    with pytest.raises(UserMistake, match="the inputs do not fit the network of run 'x': x is <U1, no numbers"):
        read(("inputs", {"x": np.array(["a"] * 6)}))
    read(("inputs", {"x": np.ones((4, 2), np.float32)}))


def test_an_export_that_is_gone_is_named(tmp_path):
    read = fuzz.programs(tmp_path).survives
    stage = {"kind": "export", "key": "gone", "status": "ran", "metrics": {"stablehlo": {}}}
    with pytest.raises(
        DamagedArtifactError, match=r"export/gone/model\.stablehlo is not there, though a record names it"
    ):
        read(("record", {"name": "x", "stages": {"export": stage}}))


@pytest.mark.parametrize("name", ["x" * 20_000, "x" * 300, "é" * 200, "\ud800", "a\nb"], ids=ascii)
def test_metadata_that_name_what_can_be_no_file_are_damaged(name, store):
    store.write(REF, {}, {"metrics": {}})
    file = Path(store.path(REF)) / "meta.json"
    told = json.loads(file.read_text()) | {"files": {name: "0"}}
    file.write_text(json.dumps(told | {"digest": _digest_of(told)}, indent=1))
    with pytest.raises(
        DamagedArtifactError, match=r"leads out of it, or is no file's name|cannot be read from the disk"
    ):
        store.read(REF)
