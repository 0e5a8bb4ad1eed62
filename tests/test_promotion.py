"""Champions: who may become one, compare-and-swap between processes, kills, rollback, and comparison on other data."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import prune_jax as pj
from prune_jax import cli, promotion
from prune_jax.checkpoints import Store
from prune_jax.contest import contest
from prune_jax.errors import DamagedArtifactError, PromotionError, UserMistake
from prune_jax.export import EXTENSIONS
from prune_jax.garbage import HOUR, remove
from prune_jax.gates import reason, rows
from prune_jax.inventory import artifacts
from prune_jax.prediction import predict
from prune_jax.promotion import candidate, champion, reject
from prune_jax.recipe import Limits, Ref
from prune_jax.records import Run
from prune_jax.snapshots import snapshot
from tests.plain import TRAIN, arrays, run_plain, tiny
from tests.samples.tiny import blobs

STAGES = {
    "train": TRAIN,
    "export": {"kind": "export", "formats": ["stablehlo"]},
    "evaluate": {"kind": "evaluate", "of": "train", "latency": None},
}


def trained(store, name, spread=0.5, seed=0):
    """A run of a linear network on blobs of some spread."""
    raw = tiny(model={"kind": "linear"}, **STAGES)
    raw |= {"seed": seed, "data": raw["data"] | {"args": {"spread": spread}}}
    plan, results = run_plain(raw, store)
    Run(plan, store, name).finish(results)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Runs a and b on the same data, c on others."""
    store = Store(tmp_path_factory.mktemp("champions") / "store")
    trained(store, "a")
    trained(store, "b", seed=1)
    trained(store, "c", spread=3.0)
    return store


def copied(store, folder):
    """The store as it is, without champions."""
    shutil.copytree(store.root, folder / "store", ignore=shutil.ignore_patterns("champions"))
    return Store(folder / "store")


def history(store, name):
    return [(e.generation, e.action, e.run) for e in champion(store, name).history]


def test_promote_and_roll_back_and_nothing_is_forgotten(store):
    assert pj.promote(store, "a", "line", by="ann", why="first").generation == 1
    pj.promote(store, "b", "line")
    made = pj.promote(store.root, "c", "line")
    assert (made.champion.run, made.champion.network, made.generation) == ("c", "train", 3)
    assert pj.rollback(store, "line", why="too noisy").champion.run == "b"
    assert pj.rollback(store, "line").champion.run == "a"  # not c: each takes back one promotion more
    with pytest.raises(UserMistake, match="champion 'line' has none before it"):
        pj.rollback(store, "line")
    pj.promote(store, "c", "line")
    assert pj.rollback(store, "line").champion.run == "a"
    expected = [(1, "promoted", "a"), (2, "promoted", "b"), (3, "promoted", "c"), (4, "rolled back", "b")]
    expected += [(5, "rolled back", "a"), (6, "promoted", "c"), (7, "rolled back", "a")]
    assert history(store, "line") == expected
    first, *_, last = champion(store, "line").history
    assert (first.by, first.why, last.restores, last.metrics) == ("ann", "first", 1, first.metrics)

    written = json.loads((Path(store.root) / "champions" / "line.json").read_text())
    record = store.record("a")
    assert written["format"] == 1
    assert written["champion"]["export"] == ["export", record["stages"]["export"]["key"]]
    assert written["champion"]["metrics"]["accuracy"] == record["results"]["train"]["accuracy"]
    assert [each.name for each in pj.champions(store) if each.name == "line"] == ["line"]


def test_the_champion_answers(store):
    pj.promote(store, "b", "answers")
    x = np.asarray(blobs()["x_test"], np.float32)
    np.testing.assert_array_equal(predict(store, "champions/answers", {"x": x}), predict(store, "b", {"x": x}))
    with pytest.raises(UserMistake, match=r"no champion 'answer' in .*; did you mean 'answers'\?"):
        predict(store, "champions/answer", {"x": x})


def test_who_promotes_late_is_told(store):
    pj.promote(store, "a", "late", expected=0)
    before = (Path(store.root) / "champions" / "late.json").read_text()
    told = r"champion 'late': promoted by someone else meanwhile: generation 1, run 'a' by .* against generation 0"
    with pytest.raises(PromotionError, match=told):
        pj.promote(store, "b", "late", expected=0)
    with pytest.raises(UserMistake, match=r"run 'a': its network 'train' is the champion 'late' already"):
        pj.promote(store, "a", "late")
    assert (Path(store.root) / "champions" / "late.json").read_text() == before


def test_without_locks_who_was_overwritten_is_told(store, tmp_path, monkeypatch):
    """As on a URL: two write in the same moment, the last one stays, whole, and the first one reads that."""
    store = copied(store, tmp_path)
    monkeypatch.setattr(Store, "local", False)
    write = promotion.replace

    def overtaken(path, text):
        write(path, text)
        monkeypatch.setattr(promotion, "replace", write)
        pj.promote(store, "b", "twice", expected=1)  # who has read generation 1 just now

    monkeypatch.setattr(promotion, "replace", overtaken)
    with pytest.raises(PromotionError, match="promoted by someone else meanwhile: generation 2, run 'b'"):
        pj.promote(store, "a", "twice")
    assert champion(store, "twice").champion.run == "b"


def test_the_commands(store, tmp_path, monkeypatch, capsys):
    store = copied(store, tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["prune-jax", *arguments, "--store", str(store.root)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    assert command("champions") == (0, f"no champions in {store.root}\n", "")
    assert command("promote", "a", "--as", "net") == (0, "net is a's train, generation 1\n", "")
    code, out, err = command("promote", "b", "--as", "net", "--limit", "params=14")
    assert (code, err) == (3, "run 'b' is not promoted to 'net': params is 15 beside 15, allowed is at most 14\n")
    assert out.splitlines()[1].split() == ["params", "15", "15", "at", "most", "14", "failed"]
    code, out, _ = command("promote", "b", "--as", "net", "--limit", "params.times=1", "--why", "newer", "--json")
    assert (code, json.loads(out)["champion"]["why"]) == (0, "newer")
    code, out, _ = command("champions", "net")
    assert [line.split()[1:3] for line in out.splitlines()[1:]] == [
        ["promoted", "a"],
        ["rejected", "b"],
        ["promoted", "b"],
    ]
    assert command("rollback", "net") == (0, "net is a's train, generation 3\n", "")
    assert command("rollback", "net")[0] == 2
    assert json.loads(command("champions", "--json")[1])[0]["generation"] == 3
    code, _, err = command("promote", "b", "--as", "net", "--limit", "max_drp=1")
    assert (code, "limits: max_drp = 1: is not a field here; did you mean 'max_drop'?" in err) == (2, True)


PROMOTER = """
import os, signal, sys
import prune_jax as pj
from prune_jax import promotion
from prune_jax.checkpoints import Store
from prune_jax.errors import PromotionError
store, run, dies = Store(sys.argv[1]), sys.argv[2], sys.argv[3] == "dies"
before = promotion.champion(store, "race").generation
print("ready", flush=True)
sys.stdin.readline()
try:
    pj.promote(store, run, "race", expected=before)
    print("won", flush=True)
except PromotionError as error:
    print(error, flush=True)
if dies:  # between write and rename
    type(store.root).replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    pj.promote(store, "c", "killed")
"""


def promoter(store, run, after):
    command = [sys.executable, "-c", PROMOTER, str(store.root), run, after]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_of_two_processes_at_once_one_wins_and_one_killed_midway_changes_nothing(store):
    both = promoter(store, "a", "lives"), promoter(store, "b", "dies")
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    told = {process.args[-2]: process.communicate(timeout=60)[0].strip() for process in both}
    (winner,) = [run for run, said in told.items() if said == "won"]
    (loser,) = told.keys() - {winner}
    assert f"promoted by someone else meanwhile: generation 1, run {winner!r}" in told[loser]
    assert history(store, "race") == [(1, "promoted", winner)]

    assert [process.returncode for process in both] == [0, -signal.SIGKILL]
    (left,) = (Path(store.root) / "champions").glob(".killed.*.tmp")
    assert champion(store, "killed").generation == 0
    assert pj.promote(store, "c", "killed").generation == 1  # the dead one holds no lock
    old = time.time() - 2 * HOUR
    os.utime(left, (old, old))
    remove(store)
    assert not left.exists()
    assert champion(store, "killed").champion.run == "c"


def test_gc_keeps_whom_a_history_names_and_what_they_are_made_of(store, tmp_path):
    store = copied(store, tmp_path)
    keys = {run: {stage["key"] for stage in store.record(run)["stages"].values()} for run in "abc"}
    pj.promote(store, "a", "kept")
    pj.promote(store, "b", "kept")
    remove(store, keep=0)
    assert sorted(store.runs()) == ["a", "b"]
    assert {ref.key for ref in artifacts(store)} == keys["a"] | keys["b"]
    assert pj.rollback(store, "kept").champion.run == "a"


def test_other_test_data_are_answered_anew_by_the_champions_program(store):
    """By numpy: x k + b of the champion's weights on the candidate's test split."""
    reign, found = pj.promote(store, "a", "anew").champion, candidate(store, "c")
    noise = {"noise": 0.7, "seed": 3, "max_drop": 1.0}
    limits = Limits(max_drop=1.0, bytes={"times": 1.0}, robustness=noise, latency_ms=1e9, at_least=2.0)
    judged = contest(store, found, reign, limits)
    x, y = (np.asarray(blobs(spread=3.0)[name]) for name in ("x_test", "y_test"))
    n = np.random.RandomState(3).standard_normal(x.shape)

    def accuracy(run, x):
        stage = store.record(run)["stages"]["train"]
        flat = {p.rpartition("/")[2]: a for p, a in arrays(store, Ref("train", stage["key"])).items()}
        return np.mean((x @ flat["kernel"] + flat["bias"]).argmax(1) == y)

    assert accuracy("a", x) != store.record("a")["results"]["train"]["accuracy"]
    clean, noisy = judged[0], judged[2]
    assert (clean.champion, clean.candidate) == (pytest.approx(accuracy("a", x)), pytest.approx(accuracy("c", x)))
    expected = [pytest.approx(accuracy(run, x + 0.7 * n)) for run in "ac"]
    assert [noisy.champion, noisy.candidate] == expected
    assert [check.passed for check in judged] == [False, True, True, True, True]
    assert judged[4].champion > 0
    assert reason(judged).startswith(f"accuracy is {clean.candidate:.4g} beside ")


def test_a_rejected_candidate_stands_in_the_history_and_the_champion_stays(store):
    reign, found = pj.promote(store, "a", "proud"), candidate(store, "b")
    judged = contest(store, found, reign.champion, Limits(bytes={"times": 0.5}))
    reject(store, found, "proud", checks=rows(judged), why=reason(judged))
    now = champion(store, "proud")
    assert (now.generation, now.champion) == (1, reign.champion)
    assert history(store, "proud") == [(1, "promoted", "a"), (1, "rejected", "b")]
    size = store.record("a")["results"]["train"]["bytes"]
    assert now.history[-1].why == f"bytes is {size:.4g} beside {size:.4g}, allowed is at most 0.5 times"
    assert now.history[-1].checks[0]["passed"] is False


def test_what_cannot_be_promoted_is_refused_with_what_to_do(store, tmp_path):
    store = copied(store, tmp_path)
    whole = store.record("a")
    stages, export = whole["stages"], whole["stages"]["export"]
    second = {"tuned": stages["train"], "again": {**export, "after": ["tuned"]}}
    for name, changes in {
        "failed": {"status": "failed", "message": "train failed: NaN"},
        "gated": {"status": "failed", "rejected": True, "message": "gate said no: accuracy is 0.9"},
        "unexported": {"stages": {name: stage for name, stage in stages.items() if name != "export"}},
        "unjudged": {"results": {}},
        "two": {"stages": {**stages, **second}},
    }.items():
        store.write_record({**whole, "name": name, **changes})
    for run, told in (
        ("d", "no run 'd' in"),
        ("failed", "run 'failed' did not complete (train failed: NaN): mend it"),
        ("gated", "run 'gated' did not complete (gate said no: accuracy is 0.9): mend it"),
        ("unexported", "run 'unexported' has no StableHLO export to promote; add a stage such as `export:"),
        ("unjudged", "run 'unjudged' did not evaluate its network 'train'; add it to a stage such as `evaluate:"),
        ("two", "exported several networks (exported: train, tuned): name one with --network"),
    ):
        with pytest.raises(UserMistake, match=re.escape(told)):
            pj.promote(store, run, "refused")
    assert candidate(store, "gated", rejected=True)[1:] == candidate(store, "a")[1:]  # for the history
    with pytest.raises(UserMistake, match="run 'failed' did not complete"):
        candidate(store, "failed", rejected=True)
    with pytest.raises(UserMistake, match=r"'tunde'; did you mean 'tuned'\? \(exported: train, tuned\)"):
        pj.promote(store, "two", "refused", network="tunde")
    for name in ("../up", "", "con", "a/b"):
        with pytest.raises(UserMistake, match=f"name = '{re.escape(name)}'"):
            pj.promote(store, "a", name)
    assert champion(store, "refused").history == ()

    program = Path(store.path(Ref("export", export["key"]))) / EXTENSIONS["stablehlo"]
    program.write_bytes(b"x" + program.read_bytes()[1:])
    with pytest.raises(DamagedArtifactError, match=r"is not the file that was written .*Run the recipe of 'a' again"):
        pj.promote(store, "a", "refused")
    shutil.rmtree(store.path(Ref("train", stages["train"]["key"])))
    shutil.rmtree(program.parent)
    with pytest.raises(DamagedArtifactError, match=r"is missing\. Run the recipe of 'a' again"):
        pj.promote(store, "a", "refused")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"name": "x", "generation": 1}', '{"format": 2, "name": "x"}'], ids=range(5)
)
def test_a_file_that_is_no_champion_is_said_to_be_none(tmp_path, text):
    folder = tmp_path / "champions"
    folder.mkdir()
    (folder / "x.json").write_text(text)
    with pytest.raises(DamagedArtifactError, match=r"is no champion with its history: .*Bring the file back"):
        pj.champions(tmp_path)


def test_data_are_put_aside_once_and_keep_their_digest(tmp_path):
    from prune_jax.problems import data_of
    from prune_jax.recipe import Data

    store, file = Store(tmp_path / "store"), tmp_path / "d.npz"
    rows = {name: array for name, array in blobs().items() if name != "note"}
    np.savez(file, **rows, classes=5)
    data = Data(source="npz", path=str(file), validation=0.2)
    kept, ref = snapshot(store, data)
    was = data_of(data)
    assert was.classes == 5  # as the file states, though it has three
    assert snapshot(store, data) == (kept, ref)
    np.savez(file, **{**rows, "x_test": rows["x_test"] + 1}, classes=5)
    os.utime(file, ns=(1, 1))
    assert data_of(data).digest != was.digest
    now = data_of(kept)
    assert (now.digest, len(now.validation["y"])) == (was.digest, len(was.validation["y"]))
    np.testing.assert_array_equal(now.train["x"], was.train["x"])
    assert snapshot(store, data)[1] != ref
    assert snapshot(store, Data(source="digits")) == (Data(source="digits"), None)
    store.write_record({"name": "r", "stages": {}, "recipe": {"data": kept.model_dump(mode="json")}})
    remove(store)
    assert artifacts(store) == [ref]  # the other one no record names
