"""The store: what is written is read, what is damaged is not trusted, and who comes second waits."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prune_jax.checkpoints import FORMAT, Store
from prune_jax.disks import check_room
from prune_jax.errors import DamagedArtifactError, StoreError, UserMistake
from prune_jax.recipe import Ref
from prune_jax.trees import leaves_by_path

REF = Ref("train", "k" * 20)
PARAMS = {"params": {"hidden": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}}


def files(store):
    return sorted(p for p in Path(store.root).rglob("*") if p.is_file())


def folder(store, ref=REF):
    return Path(store.path(ref))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.array([True, False, True]),
        jnp.array([1.5, -2], jnp.bfloat16),
        np.ones((2, 2, 2), np.float16),
        np.array([1.0, np.nan, np.inf, -0.0], np.float64),
        np.arange(3, dtype=np.uint8),
        np.arange(3, dtype=np.int32),
        np.int64(2**40),
        np.float32(3),
        np.zeros((0, 3), np.float32),
        np.zeros(0, bool),
    ],
    ids=lambda a: f"{a.dtype}{list(a.shape)}",
)
def test_an_array_comes_back_bit_for_bit(store, array):
    store.write(REF, {"params": {"deep": {"w": array}}}, {})
    found, _ = store.read(REF)
    w = found["params"]["deep"]["w"]
    assert isinstance(w, np.ndarray | np.generic)
    assert w.dtype == array.dtype
    assert w.shape == array.shape
    assert np.asarray(w).tobytes() == np.asarray(array).tobytes()


def test_trees_keep_their_form_and_meta_what_it_was_told(store):
    arrays = {**PARAMS, "state": {}, "masks": {"hidden": {"kernel": np.ones((2, 3), bool), "bias": None}}}
    written = store.write(REF, arrays, {"metrics": {"loss": 0.5}, "seconds": 1.5})
    found, meta = store.read(REF)
    assert list(leaves_by_path(found)) == ["masks/hidden/kernel", "params/hidden/kernel"]
    assert meta == written == store.meta(REF)
    assert (meta["kind"], meta["key"], meta["metrics"], meta["seconds"]) == (*REF, {"loss": 0.5}, 1.5)
    assert {"jax", "orbax-checkpoint", "prune-jax", "python"} <= set(meta["versions"])
    there = {str(p.relative_to(folder(store))) for p in folder(store).rglob("*") if p.is_file()}
    assert set(meta["files"]) == there - {"meta.json"}


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="there is no /proc")
def test_a_store_where_none_can_be_is_told():
    with pytest.raises(StoreError, match="the store /proc/none/store cannot be made there; name another folder"):
        Store("/proc/none/store").make()


def test_an_artifact_without_arrays(store):
    store.write(REF, {}, {"metrics": {"a": 1}})
    assert store.read(REF)[0] == {}
    assert store.intact(REF)


def test_arrays_on_several_devices_are_written_whole(store):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    spread = jax.device_put(jnp.arange(4.0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    store.write(REF, {"w": spread}, {})
    np.testing.assert_array_equal(store.read(REF)[0]["w"], [0, 1, 2, 3])


def test_nothing_is_pickled(store):
    store.write(REF, {**PARAMS, "masks": {"w": np.ones(3, bool)}}, {"metrics": {}})
    with store.steps(REF) as steps:
        steps.save(1, {"w": np.ones(3)})
    assert files(store)
    for file in files(store):
        content = file.read_bytes()
        assert file.suffix not in {".pkl", ".pickle", ".npy", ".npz"}
        assert not content.startswith((b"\x80\x04", b"\x80\x05", b"\x80\x03")), file


def test_what_is_not_there_is_told(store):
    assert store.meta(REF) is None
    assert store.damage(REF) is None
    assert not store.intact(REF)
    with pytest.raises(DamagedArtifactError) as caught:
        store.read(REF)
    assert str(caught.value) == f"train/{REF.key}: not in the store. Run the recipe again: it will be made anew."


@pytest.mark.parametrize(
    ("arrays", "meta"),
    [
        ({"w": np.array(["text"])}, {}),
        (PARAMS, {"metrics": {"loss": float("nan")}}),
        (PARAMS, {"metrics": object()}),
    ],
    ids=["array", "nan", "object"],
)
def test_a_write_that_fails_midway_leaves_nothing(store, arrays, meta):
    with pytest.raises(Exception):  # noqa: PT011  (whose error it is does not matter)
        store.write(REF, arrays, meta)
    assert list(folder(store).parent.iterdir()) == []
    assert not store.intact(REF)
    store.write(REF, PARAMS, {})
    assert store.intact(REF)


def test_an_artifact_appears_whole_or_not_at_all(store, monkeypatch):
    """All that is written lies aside until the one rename."""
    seen = []
    rename = type(store.root).rename
    monkeypatch.setattr(
        type(store.root), "rename", lambda a, b: (seen.append((folder(store).exists(), Path(a))), rename(a, b))[1]
    )
    store.write(REF, PARAMS, {})
    last_seen, aside = seen[-1]
    assert not last_seen
    assert aside.parent == folder(store).parent  # the same file system
    assert aside.name.startswith(".")
    assert not aside.exists()


def test_the_second_write_keeps_the_first(store):
    store.write(REF, PARAMS, {"metrics": {"turn": 1}})
    before = [f.stat().st_mtime_ns for f in files(store)]
    told = store.write(REF, {"w": np.zeros(3)}, {"metrics": {"turn": 2}})
    assert told["metrics"] == {"turn": 1}
    assert [f.stat().st_mtime_ns for f in files(store)] == before


def _array_file(store):
    return max(folder(store).glob("arrays/**/*"), key=lambda p: p.stat().st_size if p.is_file() else -1)


def _flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


DAMAGES = {
    "byte": (lambda s: _flip(_array_file(s)), "is not the file that was written (its sha256 differs from meta.json)"),
    "cut": (lambda s: os.truncate(_array_file(s), 3), "is not the file that was written"),
    "missing": (lambda s: _array_file(s).unlink(), "is missing"),
    "meta cut": (lambda s: os.truncate(folder(s) / "meta.json", 40), "meta.json"),
    "meta empty": (lambda s: os.truncate(folder(s) / "meta.json", 0), "meta.json"),
    "meta braces": (lambda s: (folder(s) / "meta.json").write_text("{}"), "meta.json"),
    "meta list": (lambda s: (folder(s) / "meta.json").write_text("[]"), "meta.json"),
    "meta null": (lambda s: (folder(s) / "meta.json").write_text("null"), "meta.json"),
    "meta no text": (lambda s: (folder(s) / "meta.json").write_bytes(b"\xff\xfe"), "meta.json"),
    "meta metric": (
        lambda s: (folder(s) / "meta.json").write_text((folder(s) / "meta.json").read_text().replace("0.5", "0.9")),
        "meta.json",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_seen_told_and_never_trusted(store, kind):
    store.write(REF, PARAMS, {"metrics": {"accuracy": 0.5}})
    damage, told = DAMAGES[kind]
    damage(store)
    assert told in str(store.damage(REF))
    assert not store.intact(REF)
    with pytest.raises(DamagedArtifactError) as caught:
        store.read(REF)
    assert told in str(caught.value)
    assert str(caught.value).startswith(f"train/{REF.key}: ")
    assert str(caught.value).endswith(". Run the recipe again: it will be made anew.")


@pytest.mark.parametrize("kind", ["byte", "missing", "meta cut"])
def test_a_damaged_artifact_is_set_aside_when_it_is_made_anew(store, kind):
    store.write(REF, PARAMS, {"metrics": {"accuracy": 0.5}})
    DAMAGES[kind][0](store)
    store.write(REF, PARAMS, {"metrics": {"accuracy": 0.7}})
    assert store.intact(REF)
    assert store.read(REF)[1]["metrics"] == {"accuracy": 0.7}
    aside = list(folder(store).parent.glob(f"{REF.key}.damaged-*"))
    assert len(aside) == 1


def test_a_finished_stage_leaves_no_step_checkpoints(store):
    with store.steps(REF) as steps:
        steps.save(3, {"w": np.ones(2)})
    assert Path(store.work(REF)).exists()
    store.write(REF, PARAMS, {})
    assert not Path(store.work(REF)).exists()


def test_step_checkpoints_keep_the_last_two_and_come_back(store):
    tree = {"w": np.arange(3, dtype=np.float32), "mask": np.array([True, False]), "step": np.array(0)}
    with store.steps(REF) as steps:
        assert steps.latest(tree) is None
        for step in (1, 5, 9):
            steps.save(step, {**tree, "step": np.array(step)})
        steps.save(9, {**tree, "step": np.array(99)})  # what is there stays
    with store.steps(REF) as steps:
        step, found = steps.latest(tree)
        assert step == found["step"] == 9
        np.testing.assert_array_equal(found["mask"], [True, False])
    kept = {p.name for p in Path(store.work(REF)).iterdir() if p.name.isdigit()}
    assert kept == {"5", "9"}


def test_threads_write_side_by_side(store):
    """Orbax numbers its temporary folders for the whole process: that must not mix artifacts up."""
    refs = [Ref("train", f"{i}" * 20) for i in range(4)]
    errors = []

    def work(i):
        try:
            for _ in range(2):
                store.write(refs[i], {"w": np.full(1000, i)}, {"metrics": {"i": i}})
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for i, ref in enumerate(refs):
        arrays, meta = store.read(ref)
        assert meta["metrics"] == {"i": i}
        np.testing.assert_array_equal(arrays["w"], np.full(1000, i))


def test_threads_that_write_the_same_leave_one(store):
    with_lock = []

    def work(i):
        with store.lock(REF):
            with_lock.append(i)
            store.write(REF, PARAMS, {"metrics": {"i": i}})

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.read(REF)[1]["metrics"] == {"i": with_lock[0]}
    assert not list(folder(store).parent.glob("*.damaged*"))
    assert not list(folder(store).parent.glob("*.tmp"))


HOLDER = """
import sys, time
import numpy as np
from prune_jax.checkpoints import FORMAT, Store
from prune_jax.disks import check_room
from prune_jax.recipe import Ref
store, ref = Store(sys.argv[1]), Ref("train", "k" * 20)
with store.lock(ref):
    print("locked", flush=True)
    sys.stdin.readline()
    store.write(ref, {"w": np.ones(3)}, {"metrics": {"by": "the first"}})
"""


@pytest.fixture
def holder(store):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(store.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def _waiter(store, got):
    def work():
        with store.lock(REF):
            got.append((store.meta(REF) or {}).get("metrics"))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_a_second_process_waits_and_finds_what_the_first_one_made(store, holder):
    got = []
    thread = _waiter(store, got)
    time.sleep(0.3)
    assert thread.is_alive()
    holder.stdin.write("go on\n")
    holder.stdin.flush()
    thread.join(60)
    assert got == [{"by": "the first"}]


def test_a_killed_process_lets_go(store, holder):
    got = []
    thread = _waiter(store, got)
    time.sleep(0.1)
    assert thread.is_alive()
    os.kill(holder.pid, signal.SIGKILL)
    thread.join(20)
    assert got == [None]


def test_records_are_found_listed_and_their_history_kept(store):
    assert store.runs() == []
    for i in range(3):
        store.write_record({"name": "mine", "started": f"2026-01-01T00:00:0{i}Z", "turn": i})
    store.write_record({"name": "mine", "started": "2026-01-01T00:00:02Z", "turn": "2 again"})
    store.write_record({"name": "other", "started": "2026-01-01T00:00:09Z"})
    os.utime(store.record_path("other"), (1, 1))
    assert store.record("mine")["turn"] == "2 again"
    assert store.runs() == ["other", "mine"]
    history = sorted((Path(store.root) / "runs" / "mine" / "history").iterdir())
    assert [json.loads(p.read_text())["turn"] for p in history] == [0, 1, 2]
    assert not [p for p in files(store) if p.suffix == ".tmp"]


def test_two_runs_in_one_second_both_stay(store):
    """The start is told to the second; a run that follows at once must not swallow the one before."""
    for turn in range(2):
        store.write_record({"name": "mine", "started": "2026-01-01T00:00:00Z", "seconds": turn})
    history = list((Path(store.root) / "runs" / "mine").glob("history/*"))
    assert [json.loads(p.read_text())["seconds"] for p in history] == [0]


def test_a_record_that_is_not_there_is_told_with_the_nearest_name(store):
    with pytest.raises(UserMistake) as caught:
        store.record("lenet")
    assert str(caught.value) == f"no run 'lenet' in {store.root} (runs: none)"
    for name in ("lenet-300", "xor"):
        store.write_record({"name": name, "started": "now"})
    with pytest.raises(UserMistake) as caught:
        store.record("lenet-30")
    assert "; did you mean 'lenet-300'? (runs: " in str(caught.value)


def test_a_record_that_was_cut_off_is_told(store):
    store.write_record({"name": "mine", "started": "now"})
    os.truncate(store.record_path("mine"), 10)
    with pytest.raises((UserMistake, DamagedArtifactError), match="mine"):
        store.record("mine")


def test_a_store_on_a_file_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserMistake, match="file"):
        Store(tmp_path / "file").write(REF, PARAMS, {})


def test_a_url_that_no_package_can_open_is_refused(monkeypatch):
    pytest.importorskip("fsspec", reason="etils needs it for URLs")
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(UserMistake, match=r"store = 'az://bucket/x': needs adlfs .*`pip install adlfs`"):
        Store("az://bucket/x")


def test_relative_stores_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store("artifacts")
    store.write(REF, PARAMS, {})
    with store.steps(Ref("train", "other")) as steps:
        steps.save(1, {"w": np.ones(2)})
    assert Store(tmp_path / "artifacts").intact(REF)


def test_a_store_tells_its_format_and_a_newer_one_is_refused(store):
    store.write(REF, PARAMS, {})
    file = Path(store.root) / "format.json"
    assert json.loads(file.read_text()) == {"format": FORMAT}
    file.write_text(json.dumps({"format": FORMAT + 1}))
    with pytest.raises(UserMistake) as caught:
        Store(store.root)
    assert str(caught.value) == (
        f"{store.root} is a store of format {FORMAT + 1}, but this prune-jax reads formats up to {FORMAT}. "
        "Install a newer one (`pip install -U prune-jax`), or name another folder with --store."
    )
    file.write_text("{")
    with pytest.raises(DamagedArtifactError, match=r"format.json is not the file that was written. Delete it if"):
        Store(store.root)


@pytest.mark.parametrize("before", [None, FORMAT], ids=["without a version", "an earlier version"])
def test_an_older_store_is_read_and_gone_on_with(store, before, monkeypatch):
    store.write(REF, PARAMS, {})
    file = Path(store.root) / "format.json"
    if before is None:
        file.unlink()
    else:
        monkeypatch.setattr("prune_jax.checkpoints.FORMAT", FORMAT + 1)
    older = Store(store.root)
    assert older.intact(REF)
    older.write(Ref("train", "other"), PARAMS, {})
    assert json.loads(file.read_text()) == {"format": FORMAT}


def test_a_store_that_went_away_is_not_begun_anew(store, tmp_path):
    with store.lock(REF):
        away = Path(store.root).rename(tmp_path / "away")
        with pytest.raises(StoreError) as caught:
            store.write(REF, PARAMS, {})
    assert str(caught.value) == (
        f"the store {store.root} is gone: format.json, which was there when the run began, is not. Bring it back "
        "(mount its disk, move the folder back); what is done is kept, and the same command goes on."
    )
    for refused in (lambda: Store(store.root, there=True), lambda: store.read(REF), lambda: store.steps(REF)):
        with pytest.raises(StoreError, match="is gone"):
            refused()
    assert not Path(store.root).exists()
    away.rename(store.root)
    store.write(REF, PARAMS, {})
    assert store.intact(REF)


def test_a_file_that_may_not_grow_is_told_and_leaves_nothing_half_written(store):
    """A record, its history, an artifact and a step: what was there stays."""
    store.write_record({"name": "mine", "turn": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with store.steps(REF) as steps:
        steps.save(1, {"w": np.arange(99.0)})
        resource.setrlimit(resource.RLIMIT_FSIZE, (8, hard))
        try:
            for write, what in (
                (lambda: store.write_record({"name": "mine", "turn": 2}), "the record of run 'mine' cannot be written"),
                (lambda: store.write(REF, PARAMS, {}), f"train/{REF.key} cannot be written"),
                (lambda: steps.save(2, {"w": np.arange(99.0)}), f"step 2 of train/{REF.key} cannot be saved"),
            ):
                with pytest.raises(StoreError) as caught:
                    write()
                assert str(caught.value).startswith(f"{what}: a file would become larger than this process may write")
                assert "Raise the limit (`ulimit -f`); what is done is kept, and the same command goes on." in str(
                    caught.value
                )
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert steps.latest({"w": np.zeros(99)})[0] == 1
    assert store.record("mine")["turn"] == 1
    assert not [p for p in Path(store.root).rglob("*") if p.name.endswith((".tmp", "-tmp"))]


def test_a_stage_without_room_is_not_begun(store, monkeypatch):
    """What is free is as we say: the one place where a disk is made up; `tests.faults.disks` fills real ones."""
    monkeypatch.setattr("prune_jax.disks.free_bytes", lambda root: 20_000)
    check_room("train is not begun", str(store.root), 20_000)
    with pytest.raises(StoreError) as caught:
        check_room("train is not begun", str(store.root), 20_001)
    assert str(caught.value).startswith(
        f"train is not begun: there is not enough room at {store.root} (20.0 kB free, about 20.0 kB needed). Make room "
    )


def test_a_folder_without_its_meta_is_damaged(store):
    store.write(REF, PARAMS, {})
    (folder(store) / "meta.json").unlink()
    assert store.damage(REF) == f"{folder(store) / 'meta.json'} is missing"
    store.write(REF, PARAMS, {"metrics": {"turn": 2}})
    assert store.read(REF)[1]["metrics"] == {"turn": 2}


def test_a_meta_that_says_the_same_in_other_bytes_is_damaged(store):
    """Such as the case of a hexadecimal digit: one bit, and the same JSON."""
    store.write(REF, PARAMS, {"label": "train · mlp"})
    file = folder(store) / "meta.json"
    for old, new in (("\\u00b7", "\\u00B7"), ("}", "}\n")):
        text = file.read_text()
        file.write_text(new.join(text.rsplit(old, 1)))
        assert json.loads(file.read_text()) == json.loads(text)
        assert file.read_text() != text
        assert store.damage(REF) == f"{file} is not the file that was written"
        file.write_text(text)
        assert store.damage(REF) is None
