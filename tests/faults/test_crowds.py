"""Many at once on one store: one computes, the others wait and get the same."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import pytest

from prune_jax.checkpoints import Store
from prune_jax.recipe import Ref
from tests.faults import crowds
from tests.plain import PRUNE, TRAIN, run_plain, tiny

REF = Ref("train", "k" * 20)


def test_runs_in_threads_compute_each_stage_once(tmp_path):
    """Two recipes three times each; their batches are spread over both devices, and share them in turn."""
    raws = [tiny(train=TRAIN, prune=PRUNE) | {"seed": seed} for seed in (0, 1)] * 3
    raws = [raw | {"data": raw["data"] | {"batch_size": 8}} for raw in raws]
    together, told = threading.Barrier(len(raws)), []

    def work(raw):
        together.wait()
        told.append(run_plain(raw, Store(tmp_path))[1])

    threads = [threading.Thread(target=work, args=(raw,), daemon=True) for raw in raws]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(told) == len(raws)
    ran = Counter(r.key for results in told for r in results.values() if r.status == "ran")
    keys = {r.key for results in told for r in results.values()}
    assert len(keys) == 2 * 4
    assert ran == dict.fromkeys(keys, 1)


def test_who_waits_for_a_lock_can_be_told_to_end(store):
    """A run that is interrupted or cancelled does not hang on another one's stage."""

    def told_to_end():
        raise RuntimeError("enough")

    with store.lock(REF), pytest.raises(RuntimeError, match="enough"), store.lock(REF, waiting=told_to_end):
        pass
    with store.lock(REF, waiting=told_to_end):  # and what it waited for is free afterwards
        pass


def test_what_a_killed_process_left_half_written_is_removed(store):
    with store.lock(REF):
        pass
    folder = Path(store.root) / "train"
    for name in (f".{REF.key}.1234abcd.tmp", f".{'o' * 20}.1234abcd.tmp"):
        (folder / name / "arrays").mkdir(parents=True)
    with store.lock(REF):
        pass
    assert [p.name for p in folder.glob(".*.tmp")] == [f".{'o' * 20}.1234abcd.tmp"]  # another one's, perhaps at work


def test_steps_are_kept_until_the_artifact_is_there_and_removed_if_a_kill_left_them(store):
    import numpy as np

    with store.lock(REF), store.steps(REF) as steps:
        steps.save(1, {"w": np.ones(2)})
    with store.lock(REF):
        assert Path(store.work(REF)).exists()
        store.write(REF, {"w": np.ones(2)}, {})
    Path(store.work(REF), "1").mkdir(parents=True)  # killed between the rename and this folder's end
    with store.lock(REF):
        assert not Path(store.work(REF)).exists()


def test_records_written_at_once_are_all_kept(store):
    threads = [threading.Thread(target=store.write_record, args=({"name": "same", "turn": i},)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {r["turn"] for r in crowds.records(Path(store.root), "same")} == set(range(12))


def test_a_record_whose_writer_was_killed_midway_is_kept_once(store):
    """Killed after the copy into the history, before the new record took its place."""
    store.write_record({"name": "same", "turn": 1})
    folder = Path(store.root) / "runs" / "same"
    (folder / "history").mkdir()
    (folder / "history" / "1.json").write_bytes((folder / "run.json").read_bytes())
    store.write_record({"name": "same", "turn": 2})
    store.write_record({"name": "same", "turn": 3})
    assert [r["turn"] for r in crowds.records(Path(store.root), "same")] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("inject", [crowds.threads, crowds.processes])
def test_many_runs_at_once(inject):
    outcome = inject(1)
    assert outcome.lost == 0
    assert outcome.survived == outcome.times >= 20
