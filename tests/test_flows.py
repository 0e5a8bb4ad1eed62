"""The flow: it comes to what the plain loop comes to, retries faults and not mistakes, and is told in the UI."""

from __future__ import annotations

import base64
import itertools
import json
import time
from pathlib import Path
from xml.etree import ElementTree

import httpx
import prefect
import pytest
from prefect import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.sorting import FlowRunSort, TaskRunSort
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings
from prune_jax.flows import tasks
from prune_jax.flows.prune import prune, run_flow
from prune_jax.flows.tasks import delays, device_tags

from prune_jax.checkpoints import Store
from prune_jax.doctor import examine
from prune_jax.launch import lifecycle, run
from prune_jax.promotion import champion
from prune_jax.recipe import Limits, read_recipe
from tests.plain import EVALUATE, PRUNE, TRAIN, arrays, run_plain, same_bytes, tiny
from tests.samples import faults

RECOVERY = {"steps": 3, "optimizer": {"learning_rate": 0.01}}


pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """No waits between tries."""
    monkeypatch.setattr(tasks, "RETRY_DELAYS", [0, 0, 0])
    faults.ATTEMPTS.clear()


def flow_runs(client, name):
    wanted = FlowRunFilter(name={"any_": [name]})
    return client.read_flow_runs(flow_run_filter=wanted, sort=FlowRunSort.START_TIME_DESC, limit=10)


def told(name):
    """The flow run of that name as the server tells it, and its task runs, once all have come in."""
    with get_client(sync_client=True) as client:
        for _ in range(100):
            flow_run, *_ = flow_runs(client, name)
            wanted = FlowRunFilter(id={"any_": [flow_run.id]})
            runs = client.read_task_runs(flow_run_filter=wanted, sort=TaskRunSort.EXPECTED_START_TIME_ASC, limit=100)
            if runs and all(r.state and r.state.is_final() for r in runs):
                return flow_run, sorted(runs, key=lambda r: r.start_time or r.created)
            time.sleep(0.1)
    raise AssertionError(f"{[(r.name, r.state_name) for r in runs]} did not end")


def artifacts_of(flow_run, kind):
    filters = {"flow_runs": {"id": {"any_": [str(flow_run.id)]}}, "artifacts": {"type": {"any_": [kind]}}}
    answer = httpx.post(f"{PREFECT_API_URL.value()}/artifacts/filter", json=filters)
    answer.raise_for_status()
    return answer.json()


@pytest.fixture(scope="module")
def branches():
    """A recipe with branches and rounds."""
    rounds = {**PRUNE, "criterion": "taylor", "schedule": {"kind": "iterative", "rounds": 2}, "finetune": RECOVERY}
    other = {**PRUNE, "criterion": "random", "after": "train", "finetune": RECOVERY}
    evaluate = {**EVALUATE, "of": ["train", "rounds", "other"]}
    return tiny(train=TRAIN, rounds=rounds, other=other, evaluate=evaluate)


@pytest.fixture(scope="module")
def both(branches, tmp_path_factory, prefect_server):
    """The recipe once through the flow and once through the plain loop."""
    folder = tmp_path_factory.mktemp("flows")
    record = run(branches, store=folder / "flow", name="both")
    plain = Store(folder / "plain")
    _, results = run_plain(branches, plain)
    return record, Store(folder / "flow"), results, plain


def test_the_flow_comes_to_what_the_plain_loop_comes_to(both):
    record, store, results, plain = both
    assert record["status"] == "completed"
    assert set(record["stages"]) == set(results)
    for name, stage in record["stages"].items():
        assert (stage["kind"], stage["key"], stage["status"]) == (*results[name].ref, results[name].status)
        same_bytes(arrays(store, results[name]), arrays(plain, results[name]))
        if stage["kind"] != "evaluate":
            assert stage["metrics"] == results[name].metrics


def test_the_record_tells_what_was_done(both, branches):
    record, store, _, _ = both
    assert record == store.record("both")
    assert record["name"] == "both"
    assert read_recipe(record["recipe"]) == read_recipe(branches)
    assert list(record["results"]) == ["train", "rounds", "other"]
    assert record["results"]["rounds"]["sparsity"] == pytest.approx(0.5)
    assert record["stages"]["rounds.2.score"]["after"] == ["rounds.1.finetune"]
    assert record["stages"]["evaluate"]["after"] == ["train", "rounds", "other"]
    begun = {name: stage["begin"] for name, stage in record["stages"].items()}
    assert all(begin is not None and begin >= 0 for begin in begun.values())
    assert max(begun, key=begun.get) == "evaluate"
    assert all(s["seconds"] == pytest.approx(s["made_in_seconds"], abs=1) for s in record["stages"].values())
    assert record["message"].startswith("50 % sparse at accuracy ")
    assert {"python", "jax", "flax", "prefect", "prune-jax"} <= set(record["versions"])
    assert record["devices"] == ["cpu x2"]


def test_the_ui_shows_names_tags_and_the_message(both):
    record, *_ = both
    flow_run, runs = told("both · seed 0")
    assert flow_run.state.name == "Completed"
    assert flow_run.state.message == record["message"]
    assert [r.name for r in runs] == [
        stage["label"] for stage in sorted(record["stages"].values(), key=lambda s: s["begin"])
    ]
    assert {"train · mlp", "score · taylor · 0.293", "mask · global · 0.293", "finetune · 3 steps · 0.5"} <= {
        r.name for r in runs
    }
    for r in runs:
        assert set(r.tags) == {r.name.partition(" ")[0], "cpu"}, r.name
        assert r.state.name == "Completed"


def test_the_ui_shows_the_table_and_the_summary(both):
    record, *_ = both
    flow_run, _ = told("both · seed 0")
    (table,) = artifacts_of(flow_run, "table")
    (summary,) = artifacts_of(flow_run, "markdown")
    assert (table["key"], summary["key"]) == ("both-results", "both-summary")
    assert table["description"] == summary["description"] == record["message"]
    rows = {row["network"]: row for row in json.loads(table["data"])}
    assert list(rows) == ["train", "rounds", "other"]
    for name, row in rows.items():
        assert row["accuracy"] == f"{record['results'][name]['accuracy']:.4f}"
        assert row["accuracy"] in summary["data"]
        assert row["non-zeros"] == str(record["results"][name]["nonzero"])


def test_nothing_of_the_arrays_goes_through_prefect(both):
    """References in, references out: a task run's inputs are names and its result is not persisted."""
    flow_run, runs = told("both · seed 0")
    assert len(str(flow_run.parameters)) < 5000
    for r in runs:
        assert not r.cache_key
        assert r.state.state_details.pause_key is None


def test_a_second_run_computes_nothing_and_says_so(both, branches):
    record, store, _, _ = both
    again = run(branches, store=store.root, name="again")
    assert again["message"].endswith("nothing to compute, all 4 stages cached")
    assert {stage["status"] for stage in again["stages"].values()} == {"cached"}
    assert again["results"] == record["results"]
    for name in again["stages"]:
        assert again["stages"][name]["key"] == record["stages"][name]["key"]
        assert again["stages"][name]["made_in_seconds"] == pytest.approx(record["stages"][name]["seconds"], abs=1)
    flow_run, _ = told("again · seed 0")  # a server is configured: the run is seen there
    assert flow_run.state.message == again["message"]


def test_another_branch_computes_that_branch_alone(both, branches):
    _, store, _, _ = both
    raw = {**branches, "stages": {**branches["stages"], "third": {**PRUNE, "criterion": "snip", "after": "train"}}}
    again = run(raw, store=store.root, name="third")
    ran = {name for name, stage in again["stages"].items() if stage["status"] == "ran"}
    assert ran == {"third.1.score", "third.1.mask", "third"}


def pruned_by(criterion, **more):
    return tiny(train=TRAIN, prune={**PRUNE, "criterion": f"tests.samples.faults:{criterion}", **more})


def test_a_fault_is_retried(tmp_path):
    record = run(pruned_by("fails_once"), store=tmp_path, name="fault")
    assert record["status"] == "completed", record["message"]
    assert faults.ATTEMPTS == ["fails_once"] * 2
    _, runs = told("fault · seed 0")
    assert {r.name: r.run_count for r in runs}["score · tests.samples.faults:fails_once · 0.5"] == 2


def test_limits_are_read_to_the_last_page(monkeypatch):
    monkeypatch.setattr(tasks, "PAGE", 2)
    names = ["other", *(f"tag:many-{i}" for i in range(4))]
    with get_client(sync_client=True) as client:
        for name in names:
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
        try:
            assert tasks.limited_tags() >= {f"many-{i}" for i in range(4)}
            assert "other" not in tasks.limited_tags()
        finally:
            for name in names:
                client.delete_global_concurrency_limit_by_name(name)


def test_the_doctor_tells_the_server_and_its_limits(tmp_path):
    with get_client(sync_client=True) as client:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name="tag:tpu", limit=3))
        try:
            found = {it.what: it for it in examine(str(tmp_path))}
        finally:
            client.delete_global_concurrency_limit_by_name("tag:tpu")
    assert found["prefect server"].state == "good"
    assert found["prefect server"].found.startswith(f"{PREFECT_API_URL.value()}, version {prefect.__version__}, ")
    assert "tpu: 3" in found["prefect limits"].found


@pytest.mark.slow
def test_stages_take_turns_on_a_device_with_a_limit(tmp_path):
    """Two at a time are allowed, but the device has a limit of 1."""
    (tag, *_) = sorted(device_tags())
    a, b = ({**PRUNE, "criterion": f"tests.samples.faults:slow_{x}", "after": "train"} for x in "ab")
    with get_client(sync_client=True) as client:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=f"tag:{tag}", limit=1))
        try:
            recipe = read_recipe(tiny(train=TRAIN, a=a, b=b))
            record = run_flow(recipe, store=str(tmp_path), name="turns", side_by_side=2)
        finally:
            client.delete_global_concurrency_limit_by_name(f"tag:{tag}")
    assert record["status"] == "completed", record["message"]
    _, runs = told("turns · seed 0")
    spans = sorted((r.start_time, r.end_time) for r in runs)
    assert all(tag in r.tags for r in runs)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans)), spans


@pytest.mark.parametrize(("retries", "attempts"), [(0, 1), (1, 2)])
def test_a_fault_that_stays_fails_after_so_many_retries(tmp_path, retries, attempts):
    record = run(pruned_by("fails_always", retries=retries), store=tmp_path, name=f"fault-{retries}")
    assert faults.ATTEMPTS == ["fails_always"] * attempts
    assert record["status"] == "failed"
    assert not record["user_mistake"]
    assert record["message"] == "prune.1.score failed: OSError: the disk is away"


def test_a_users_mistake_is_not_retried(tmp_path):
    record = run(pruned_by("mistaken"), store=tmp_path, name="mistake")
    assert faults.ATTEMPTS == ["mistaken"]
    assert record["user_mistake"]
    assert record["message"] == "prune.1.score failed: there is nothing to score here"


def test_a_result_that_would_come_again_is_not_retried(tmp_path):
    raw = tiny(train={**TRAIN, "optimizer": {"name": "sgd", "learning_rate": 1e30}, "steps": 30}, prune=PRUNE)
    record = run(raw, store=tmp_path, name="diverged-flow")
    _, runs = told("diverged-flow · seed 0")
    assert [(r.run_count, r.state.name) for r in runs] == [(1, "Failed")]
    assert record["stages"]["train"]["message"].startswith("the loss became ")
    assert record["stages"]["prune"]["status"] == "skipped"
    assert record["results"] == {}


def test_waits_grow():
    assert delays(0) == []
    assert delays(2) == tasks.RETRY_DELAYS[:2]
    assert len(delays(7)) == 7


def test_the_waits_are_those_of_a_patient_user():
    import importlib

    source = importlib.util.find_spec("prune_jax.flows.tasks").loader.get_source("prune_jax.flows.tasks")
    assert "RETRY_DELAYS = [5, 30, 120]" in source


def test_a_stage_that_takes_too_long_is_stopped(tmp_path):
    began = time.perf_counter()
    record = run(pruned_by("sleeps", timeout_seconds=1, retries=0), store=tmp_path, name="timeout")
    assert time.perf_counter() - began < 20
    assert record["status"] == "failed"
    assert record["stages"]["train"]["status"] == "ran"
    assert "1" in record["message"]
    assert "second" in record["message"]


def test_a_failure_keeps_what_was_done_and_goes_on_from_there(tmp_path):
    raw = tiny(
        train=TRAIN,
        good=PRUNE,
        bad={**PRUNE, "target": {"keep": 1}, "after": "train"},
        after_bad={"kind": "finetune", "steps": 1, "after": "bad"},
        evaluate={**EVALUATE, "of": ["train", "good"]},
    )
    record = run(raw, store=tmp_path, name="partly")
    status = {name: stage["status"] for name, stage in record["stages"].items()}
    assert record["status"] == "failed"
    assert (status["good"], status["bad"], status["after_bad"], status["evaluate"]) == (
        "ran",
        "failed",
        "skipped",
        "ran",
    )
    assert set(record["results"]) == {"train", "good"}
    assert "bad.1.mask failed: Pruning would leave nothing alive in" in record["message"]
    flow_run, runs = told("partly · seed 0")
    assert flow_run.state.name == "Failed"
    assert flow_run.state.message == record["message"]
    assert {r.name: r.state.name for r in runs}["mask · global · keep 1"] == "Failed"
    mended = run(
        {**raw, "stages": {**raw["stages"], "bad": {**PRUNE, "after": "train"}}}, store=tmp_path, name="partly"
    )
    assert mended["status"] == "completed"
    assert {n for n, s in mended["stages"].items() if s["status"] == "ran"} <= {"after_bad", "bad"}


def test_independent_branches_run_side_by_side(tmp_path):
    a, b = ({**PRUNE, "criterion": f"tests.samples.faults:slow_{x}", "after": "train"} for x in "ab")
    raw = read_recipe(tiny(train=TRAIN, a=a, b=b))
    record = run_flow(raw, store=str(tmp_path), name="together", side_by_side=2)
    first, second = record["stages"]["a.1.score"], record["stages"]["b.1.score"]
    assert first["seconds"] >= 1
    assert second["seconds"] >= 1
    assert abs(first["begin"] - second["begin"]) < 0.9


def test_local_runs_one_stage_at_a_time(tmp_path):
    a, b = ({**PRUNE, "criterion": name, "after": "train"} for name in ("magnitude", "random"))
    record = run(tiny(train=TRAIN, a=a, b=b), store=tmp_path, name="alone", runner="local")
    spans = sorted((s["begin"], s["begin"] + s["seconds"]) for s in record["stages"].values())
    assert all(end <= begin + 0.05 for (_, end), (begin, _) in itertools.pairwise(spans))


def test_a_long_stage_shows_its_progress(tmp_path):
    """Its records come slowly: 60 steps of 9 take more than two seconds."""
    pytest.importorskip("grain")
    record = run(tiny("slow_records", train={**TRAIN, "steps": 60}), store=tmp_path, name="long")
    assert record["status"] == "completed", record["message"]
    flow_run, _ = told("long · seed 0")
    (progress,) = artifacts_of(flow_run, "progress")
    assert progress["data"] == 100
    assert progress["description"] == "train · mlp"


def events(prefix, least, **resource):
    """The events of the run of a kind and of some resources, the oldest first, once as many as that have come in."""
    wanted = {"event": {"prefix": [prefix]}, "resource": resource, "order": "ASC"}
    for _ in range(100):
        answer = httpx.post(f"{PREFECT_API_URL.value()}/events/filter", json={"filter": wanted, "limit": 50})
        found = answer.json()["events"]
        found = [e for e in found if "guarded · seed 0" in {r.get("prefect.resource.name") for r in e["related"]}]
        if len(found) >= least:
            return found
        time.sleep(0.1)
    raise AssertionError(f"{len(found)} of {least} events {prefix} came in")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory, prefect_server):
    """A run whose guard refuses its only round, on a server that somebody looks at; and the same again."""
    guard = {"metric": "accuracy", "max_drop": 0.0}
    prune = {**PRUNE, "target": {"sparsity": 0.7}, "guard": guard}
    raw, store = tiny(train=TRAIN, prune=prune, evaluate=EVALUATE), tmp_path_factory.mktemp("guarded")
    with temporary_settings({PREFECT_UI_URL: "http://127.0.0.1:9"}):
        record = run(raw, store=store, name="guarded")
    run(raw, store=store, name="guarded")
    return record, store


def test_each_stage_that_ran_is_told_once(guarded):
    record, _ = guarded
    ran = {name: stage for name, stage in record["stages"].items() if stage["status"] == "ran"}
    found = events("prune_jax.stage", len(ran), id_prefix=["prune_jax.stage.guarded."])
    told = {e["payload"]["stage"]: e for e in found}
    assert len(found) == len(told) == len(ran) == 5  # nothing of the second run
    for name, stage in ran.items():
        payload = told[name]["payload"]
        assert (payload["run"], payload["kind"], payload["key"]) == ("guarded", stage["kind"], stage["key"])
        assert payload["seconds"] == stage["seconds"]
        roles = {r["prefect.resource.role"]: r["prefect.resource.name"] for r in told[name]["related"]}
        assert {"flow-run": "guarded · seed 0", "flow": "prune", "task-run": stage["label"]}.items() <= roles.items()
    metrics = record["stages"]["train"]["metrics"]
    assert told["train"]["payload"]["metrics"]["validation_accuracy"] == metrics["validation_accuracy"]
    assert told["evaluate"]["payload"]["metrics"]["prune.accuracy"] == record["results"]["prune"]["accuracy"]


def test_a_breached_guard_is_told_once_and_stands_in_the_message(guarded):
    record, _ = guarded
    (event,) = events("prune_jax.guard", 1, id_prefix=["prune_jax.stage.guarded."])
    payload, mask = event["payload"], record["stages"]["prune.1.mask"]
    before = record["stages"]["train"]["metrics"]["validation_accuracy"]
    assert (payload["run"], payload["stage"], payload["round"]) == ("guarded", "prune", 1)
    assert (payload["key"], payload["action"]) == (mask["key"], "stop")
    assert payload["message"].startswith(f"accuracy went from {before:.4g} to ")
    assert payload["metrics"]["validation_accuracy"] == mask["metrics"]["validation_accuracy"] < before
    assert record["message"].endswith("; 5 of 5 stages ran; prune stopped at round 1")
    assert record["stages"]["prune"]["message"] == f"stopped at round 1: {payload['message']}"


def test_the_lineage_of_networks_is_told(guarded):
    record, _ = guarded
    key = {name: f"prunejax://{stage['kind']}/{stage['key']}" for name, stage in record["stages"].items()}
    found = events("prefect.asset.mat", 2, id=[key["train"], key["prune"]])
    made = {e["resource"]["prefect.resource.id"]: e for e in found}
    assert len(found) == 2
    assert list(made) == [key["train"], key["prune"]]
    parents = {
        asset: [r["prefect.resource.id"] for r in event["related"] if r["prefect.resource.role"] == "asset"]
        for asset, event in made.items()
    }
    (data,) = parents[key["train"]]
    assert data.startswith("prunejax://data/")
    assert parents[key["prune"]] == [key["train"]]
    assert Path(made[key["prune"]]["resource"]["prefect.asset.url"], "meta.json").exists()
    train = record["stages"]["train"]["metrics"]
    assert made[key["train"]]["payload"]["validation_loss"] == train["validation_loss"]


def test_the_summary_shows_the_chart_and_where_the_report_lies(guarded):
    _, store = guarded
    wanted = {"artifacts": {"key": {"any_": ["guarded-summary"]}}, "sort": "CREATED_DESC"}
    told = httpx.post(f"{PREFECT_API_URL.value()}/artifacts/filter", json=wanted).json()
    (with_chart,) = [a["data"] for a in told if a["data"].startswith("![chart](data:image/svg+xml;base64,")]
    assert len(told) == 2  # the second run was not looked at
    picture = base64.b64decode(with_chart.partition("base64,")[2].partition(")")[0])
    drawn = ElementTree.fromstring(picture)
    assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
    texts = {"".join(t.itertext()).strip() for t in drawn.iter("{http://www.w3.org/2000/svg}text")}
    assert {"dense", "prune", "accuracy", "guard"} <= texts
    assert b"var(" not in picture
    assert len(picture) < 30_000
    report = store / "runs" / "guarded" / "report.html"
    assert with_chart.endswith(f"\nReport: `{report}`\n")
    assert "stopped at round 1" in report.read_text()


def test_the_flow_is_what_a_server_calls(tmp_path):
    """A deployment hands in JSON: recipe, store and name."""
    state = prune(tiny(train=TRAIN), store=str(tmp_path), name="served", return_state=True)
    assert state.is_completed()
    assert state.message == "1 of 1 stages ran"
    assert Store(tmp_path).record("served")["status"] == "completed"


def test_a_bad_recipe_writes_nothing_and_is_not_a_run(tmp_path):
    from prune_jax.errors import UserMistake

    with pytest.raises(UserMistake):
        run(tiny(train=TRAIN, prune={**PRUNE, "target": {"keep": 43}}), store=tmp_path / "store", name="bad")
    assert not (tmp_path / "store").exists()
    with get_client(sync_client=True) as client:
        assert not flow_runs(client, "bad · seed 0")


def test_the_lifecycle_turns_away_and_promotes(tmp_path):
    stages = {
        "train": TRAIN,
        "export": {"kind": "export", "formats": ["stablehlo"]},
        "evaluate": {"kind": "evaluate", "latency": None},
    }
    raw = tiny(model={"kind": "linear"}, **stages)
    rejected = lifecycle(raw, "nets", store=tmp_path, limits=Limits(params=14))
    assert (rejected["outcome"], rejected["message"]) == ("rejected", "params is 15, allowed is at most 14")
    promoted = lifecycle(raw, "nets", store=tmp_path)
    assert (promoted["outcome"], promoted["run"]["name"]) == ("promoted", rejected["run"]["name"])
    now = champion(Store(tmp_path), "nets")
    assert [(entry.action, entry.generation) for entry in now.history] == [("rejected", 0), ("promoted", 1)]
    flow_run, _ = told("nets · tiny")
    assert (flow_run.state.name, flow_run.state.message) == ("Promoted", promoted["message"])
