"""What `gc` takes and what it leaves: artifacts by who names them, locks, promoted models, leftovers, kills midway."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from prune_jax import garbage
from prune_jax.checkpoints import Store
from prune_jax.errors import DamagedArtifactError, UserMistake
from prune_jax.garbage import remove
from prune_jax.inventory import artifacts
from prune_jax.recipe import Ref
from prune_jax.verification import verify

OLD = time.time() - 2 * garbage.HOUR


def ref(letter, kind="train"):
    return Ref(kind, letter * 20)


def make(store, letter, *parents, kind="train"):
    """An artifact that was made from others."""
    call = {"inputs": {str(i): list(parent) for i, parent in enumerate(parents)}}
    store.write(ref(letter, kind), {"w": np.ones(2)}, {"metrics": {}, "call": call})
    return ref(letter, kind)


def record(store, name, *refs, at=None, status="ran"):
    stages = {f"s{i}": {"kind": r.kind, "key": r.key, "status": status} for i, r in enumerate(refs)}
    path = store.write_record({"name": name, "stages": stages})
    if at:
        os.utime(path, (at, at))


def gone(removals):
    return {removal.path for removal in removals}


def path(r):
    return f"{r.kind}/{r.key}"


@pytest.fixture
def three(store):
    """Runs a, b and c, made in this order: each trained on its own and shares one score; d is nobody's."""
    shared = make(store, "5", kind="score")
    for at, name in enumerate("abc"):
        record(store, name, make(store, name, shared), at=1000 + at)
    make(store, "d")
    return store


def test_without_keep_only_orphans_go_and_dry_run_takes_nothing(three):
    before = sorted(Path(three.root).rglob("*"))
    assert gone(remove(three, dry_run=True)) == {path(ref("d"))}
    assert sorted(Path(three.root).rglob("*")) == before
    removals = remove(three)
    assert gone(removals) == {path(ref("d"))}
    assert removals[0].bytes > 100
    assert set(artifacts(three)) == {ref("a"), ref("b"), ref("c"), ref("5", "score")}
    assert remove(three) == []


@pytest.mark.parametrize(("keep", "kept"), [(0, ""), (1, "c"), (2, "bc"), (3, "abc"), (9, "abc")])
def test_the_last_records_stay_with_all_that_they_were_made_from(three, keep, kept):
    remove(three, keep=keep)
    assert sorted(three.runs()) == list(kept)
    expected = {ref(name) for name in kept} | ({ref("5", "score")} if kept else set())
    assert set(artifacts(three)) == expected
    assert verify(three).intact


def test_the_records_of_earlier_runs_of_a_name_count_and_are_numbered_on(store):
    for i, letter in enumerate("abc"):
        record(store, "mine", make(store, letter), at=1000 + i)
    assert remove(store) == []
    remove(store, keep=2)
    assert set(artifacts(store)) == {ref("b"), ref("c")}
    record(store, "mine", make(store, "e"))
    history = Path(store.root) / "runs" / "mine" / "history"
    assert sorted(p.name for p in history.iterdir()) == ["2.json", "3.json"]


def test_a_promoted_model_stays(three):
    folder = Path(three.root) / "champions" / "best" / "history"
    folder.mkdir(parents=True)
    (folder / "1.json").write_text(json.dumps({"key": ref("d").key}))
    (folder.parent / "now.json").write_text(json.dumps({"run": "a"}))
    remove(three, keep=1)
    assert set(artifacts(three)) == {ref("a"), ref("c"), ref("d"), ref("5", "score")}
    assert sorted(three.runs()) == ["a", "c"]


def test_what_is_locked_stays(three):
    with three.lock(ref("d")):
        assert remove(three) == []
    assert gone(remove(three)) == {path(ref("d"))}


def test_what_a_run_at_work_plans_or_has_locked_stays(three):
    make(three, "e")
    make(three, "f")
    old = [Path(three.root) / "train" / f".{letter * 20}.lock" for letter in "df"]
    for lock in old:
        lock.touch()
        os.utime(lock, (OLD, OLD))
    with three.at_work([ref("d")]):
        with Store(three.root).lock(ref("e")):
            pass  # a stage of the run was done, and is in no record yet
        assert gone(remove(three)) == {path(ref("f"))}
    assert not list(Path(three.root).glob("runs/.*.at-work"))
    assert gone(remove(three)) == {path(ref("d")), path(ref("e"))}


def test_leftovers_go_after_an_hour_and_step_checkpoints_of_unfinished_stages_stay(store):
    record(store, "failed", ref("u"), status="failed")
    kind = Path(store.root) / "train"
    names = [f".{'t' * 20}.0.tmp", f"{'w' * 20}.work", f"{'u' * 20}.work", f"{'x' * 20}.damaged-0"]
    for name in names:
        (kind / name / "deep").mkdir(parents=True)
        (kind / name / "deep" / "file").write_bytes(b"12345")
    (Path(store.root) / "runs" / ".0.at-work").write_text("[]")  # of a killed run: nobody holds its lock
    assert gone(remove(store, dry_run=True)) == {f"train/{names[3]}", "runs/.0.at-work"}
    for file in kind.rglob("*"):
        os.utime(file, (OLD, OLD))
    with store.lock(ref("w")):
        assert gone(remove(store)) == {f"train/{names[0]}", f"train/{names[3]}", "runs/.0.at-work"}
    assert gone(remove(store)) == {f"train/{names[1]}"}
    assert (kind / names[2]).exists()
    assert verify(store).intact


def test_killed_at_any_moment_no_record_is_left_that_names_what_is_gone(three, monkeypatch):
    """Every deletion in turn is the last that happens."""

    class Killed(BaseException):
        pass

    delete, left = garbage._delete, 0
    for allowed in range(4):

        def until(path, allowed=allowed):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            delete(path)

        monkeypatch.setattr(garbage, "_delete", until)
        left = 1
        try:
            remove(three, keep=0)
        except Killed:
            pass
        there = set(artifacts(three))
        for name in three.runs():
            assert {Ref(s["kind"], s["key"]) for s in three.record(name)["stages"].values()} <= there
    monkeypatch.setattr(garbage, "_delete", delete)
    remove(three, keep=0)
    assert (artifacts(three), three.runs()) == ([], [])


def test_a_record_that_cannot_be_read_keeps_everything(three):
    file = Path(three.record_path("b"))
    file.write_text("{")
    before = artifacts(three)
    with pytest.raises(DamagedArtifactError) as caught:
        remove(three, keep=1)
    assert str(caught.value).startswith(
        f"{file} is no record of a run, so that what it needs is not known; nothing was removed."
    )
    assert artifacts(three) == before


def test_a_clock_that_was_set_back_does_not_make_the_last_run_old(store):
    record(store, "first", make(store, "a"), at=time.time() + 10_000)
    record(store, "second", make(store, "b"))
    assert store.runs() == ["first", "second"]
    remove(store, keep=1)
    assert store.runs() == ["second"]


def test_bad_input_is_refused(three, tmp_path):
    with pytest.raises(UserMistake, match="--keep -1: must be 0 or more records"):
        remove(three, keep=-1)
    with pytest.raises(UserMistake, match="there is no such store"):
        remove(Store(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
