"""Retrain, gate, promote through Prefect: what is promoted, by limits and by a person, and on whose data."""

from __future__ import annotations

import contextvars
import json
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from prefect import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.sorting import FlowRunSort
from prefect.settings import PREFECT_API_URL

from prune_jax import cli
from prune_jax.checkpoints import Store
from prune_jax.errors import PromotionError, UserMistake
from prune_jax.garbage import remove
from prune_jax.launch import lifecycle
from prune_jax.progress import Listeners, listeners, silent
from prune_jax.promotion import champion, promote
from prune_jax.recipe import Limits
from tests.plain import TRAIN, tiny
from tests.samples.tiny import blobs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]

STAGES = {
    "train": TRAIN,
    "export": {"kind": "export", "formats": ["stablehlo"]},
    "evaluate": {"kind": "evaluate", "of": "train", "latency": None},
}
RAW = tiny(model={"kind": "linear"}, **STAGES)


def flow_run(name):
    """The latest flow run for a champion."""
    with get_client(sync_client=True) as client:
        wanted = FlowRunFilter(name={"any_": [f"{name} · tiny"]})
        found = client.read_flow_runs(flow_run_filter=wanted, sort=FlowRunSort.START_TIME_DESC, limit=1)
    return found[0] if found else None


def told(path, **filters):
    answer = httpx.post(f"{PREFECT_API_URL.value()}/{path}/filter", json=filters)
    answer.raise_for_status()
    return answer.json()


def events(what, run):
    for _ in range(100):
        found = told("events", filter={"event": {"name": [f"prune_jax.model.{what}"]}})["events"]
        if mine := [event["payload"] for event in found if event["payload"]["run"] == run]:
            return mine
        time.sleep(0.1)
    return []


def test_a_better_one_is_promoted_and_a_worse_one_is_turned_away(tmp_path):
    first = lifecycle(RAW, "web", store=tmp_path)
    store, run = Store(tmp_path), first["run"]["name"]
    assert (first["outcome"], first["generation"]) == ("promoted", 1)
    assert flow_run("web").state.name == "Promoted"
    assert flow_run("web").state.message == f"generation 1: train of run {run}"
    assert events("promoted", run) == [{"run": run, "network": "train", "generation": 1}]
    assert lifecycle(RAW, "web", store=tmp_path)["outcome"] == "unchanged"

    change = ["stages.train.steps=1", "stages.train.optimizer.learning_rate=0.000001"]
    worse = lifecycle(
        RAW, "web", store=tmp_path, changes=change, limits=Limits(metric="loss", max_drop=0.01, bytes={"times": 1})
    )
    state = flow_run("web").state
    assert (worse["outcome"], worse["generation"]) == ("rejected", 1)
    assert (state.name, state.message) == ("Rejected", worse["message"])
    assert worse["message"].startswith("loss is ")
    assert worse["message"].endswith(", allowed is worse by at most 0.01")
    assert store.record(worse["run"]["name"])["status"] == "completed"  # its run, and its report, stay
    assert [(e.action, e.why) for e in champion(store, "web").history] == [
        ("promoted", ""),
        ("rejected", worse["message"]),
    ]
    assert events("rejected", worse["run"]["name"])[0]["reason"] == worse["message"]
    (table,) = told(
        "artifacts", artifacts={"flow_run_id": {"any_": [str(flow_run("web").id)]}, "key": {"like_": "verd"}}
    )
    assert [row["passed"] for row in json.loads(table["data"])] == ["no", "yes"]


def test_whom_the_recipes_own_gate_turns_away_stands_in_the_history_with_run_and_reason(tmp_path):
    gate = {"kind": "gate", "of": "train", "at_least": 1.1, "params": 15}
    for changes in ([], ["seed=5"]):  # nobody reigns, somebody does
        found = lifecycle({**RAW, "stages": {**STAGES, "gate": gate}}, "gated", store=tmp_path, changes=changes)
        store, run = Store(tmp_path), found["run"]
        now = champion(store, "gated")
        last = now.history[-1]
        assert (found["outcome"], flow_run("gated").state.name) == ("rejected", "Rejected")
        assert (last.action, last.generation, last.run) == ("rejected", now.generation, run["name"])
        assert last.why == found["message"] == run["message"]
        assert last.why.startswith("gate said no: accuracy is ")
        assert [check["passed"] for check in last.checks] == [False, True] == [c["passed"] for c in found["checks"]]
        assert last.metrics["accuracy"] == run["results"]["train"]["accuracy"]
        assert events("rejected", last.run)[0] == {"run": last.run, "network": "train", "reason": last.why}
        assert now.generation == (1 if changes else 0)
        lifecycle(RAW, "gated", store=tmp_path)
    remove(store, keep=0)
    assert (
        store.record(last.run)["status"] == "failed"
    )  # the record, of which the report is drawn, and the network stay
    assert store.intact(last.artifact)
    assert store.intact(last.export)


def test_the_command_ends_with_3_where_a_gate_says_no(tmp_path, monkeypatch, capsys):
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps(RAW))
    gate = json.dumps({"kind": "gate", "of": "train", "at_least": 1.1})

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["prune-jax", *arguments, "--store", str(tmp_path / "s")])
        with pytest.raises(SystemExit) as ended:
            contextvars.copy_context().run(cli.main)
        return ended.value.code, *capsys.readouterr()

    code, out, _ = command("lifecycle", str(file), "--as", "web", "--limit", "params=1")
    assert (code, "web rejected: params is 15, allowed is at most 1" in out) == (3, True)
    code, out, _ = command("lifecycle", str(file), "--as", "web", "--set", f"stages.gate={gate}")
    assert (code, "web rejected: gate said no: accuracy is" in out) == (3, True)
    code, out, _ = command("run", str(file), "--set", f"stages.gate={gate}")
    assert (code, "rejected: gate said no: accuracy is" in out) == (3, True)
    code, out, _ = command("lifecycle", str(file), "--as", "web", "--json")
    assert (code, json.loads(out)["outcome"]) == (0, "promoted")


def answering(name, answer):
    """A person who answers as soon as the run waits for one."""

    def run():
        with get_client(sync_client=True) as client:
            for _ in range(600):
                found = flow_run(name)
                if found and found.state.name == "Paused":
                    client.resume_flow_run(found.id, run_input=answer)
                    return
                time.sleep(0.1)

    person = threading.Thread(target=run)
    person.start()
    return person


@pytest.mark.parametrize(
    ("answer", "outcome", "message"),
    [
        ({"approve": True, "by": "ann", "why": "looks good"}, "promoted", ""),
        ({"approve": False, "by": "ann", "why": "not today"}, "rejected", "turned away by ann: not today"),
        (None, "rejected", "nobody approved it within 2 s"),
    ],
)
def test_a_person_has_the_last_word(tmp_path, answer, outcome, message):
    name = f"asked-{outcome}-{answer is None}"
    person = answering(name, answer) if answer else None
    found = lifecycle(RAW, name, store=tmp_path, approval_seconds=60 if answer else 2)
    if person:
        person.join()
    last = champion(Store(tmp_path), name).history[-1]
    assert (found["outcome"], last.action) == (outcome, outcome)
    assert flow_run(name).state.name == outcome.capitalize()
    assert last.by == ("ann" if answer else "")
    assert message in (found["message"], "")
    if outcome == "promoted":
        assert last.why == "looks good"


def test_tomorrows_file_does_not_change_todays_run(tmp_path):
    """The file is written anew while the run is at work: it goes on with the data that it began with."""
    file = tmp_path / "d.npz"
    rows = {name: array for name, array in blobs().items() if name != "note"}
    np.savez(file, **rows)
    raw = {**RAW, "data": {"source": "npz", "path": str(file), "batch_size": 9}}

    def tomorrow(name, *_):
        if name == "train":
            np.savez(file, **{**rows, "x_test": rows["x_test"][::-1]})  # the labels fit no more

    token = listeners.set(Listeners(silent, tomorrow))
    first = lifecycle(raw, "data", store=tmp_path / "s")
    listeners.reset(token)
    second = lifecycle(raw, "data", store=tmp_path / "s")
    kept = [Path(found["run"]["recipe"]["data"]["path"]) for found in (first, second)]
    assert kept[0] != kept[1]
    np.testing.assert_array_equal(np.load(kept[0])["x_test"], np.asarray(rows["x_test"], np.float32))
    # the champion is measured anew on the second one's data, and does as badly there
    (check,) = second["checks"]
    assert (first["outcome"], second["outcome"]) == ("promoted", "promoted")
    assert check["champion"] == pytest.approx(second["run"]["results"]["train"]["accuracy"])
    assert check["champion"] < first["run"]["results"]["train"]["accuracy"]


def test_who_is_overtaken_while_a_person_thinks_is_told(tmp_path):
    store = Store(tmp_path)
    run = lifecycle(RAW, "other", store=tmp_path)["run"]["name"]

    def overtake():
        while not ((found := flow_run("slow")) and found.state.name == "Paused"):
            time.sleep(0.1)
        promote(store, run, "slow")
        with get_client(sync_client=True) as client:
            client.resume_flow_run(found.id, run_input={"approve": True})

    person = threading.Thread(target=overtake)
    person.start()
    with pytest.raises(PromotionError, match=f"promoted by someone else meanwhile: generation 1, run '{run}'"):
        lifecycle(RAW, "slow", store=tmp_path, changes=["seed=5"], approval_seconds=60)
    person.join()
    assert champion(store, "slow").generation == 1


def test_recipes_of_which_nothing_could_be_promoted_are_refused_before_they_run(tmp_path):
    for missing, message in (("export", "none exports StableHLO"), ("evaluate", "none evaluates what is exported")):
        raw = {**RAW, "stages": {name: stage for name, stage in STAGES.items() if name != missing}}
        with pytest.raises(UserMistake, match=message):
            lifecycle(raw, "refused", store=tmp_path / "s")
    assert not (tmp_path / "s").exists()
