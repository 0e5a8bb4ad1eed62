"""What is told while and after a run: events, lineage, artifacts; and automations at work on a server of one's own."""

from __future__ import annotations

import base64
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from xml.etree import ElementTree

import httpx
import pytest
import yaml
from prefect.events.schemas.automations import AutomationCore
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

from prune_jax.launch import run
from tests.faults.runs import PrefectServer, command, environment, kill_session, recipe, until
from tests.plain import EVALUATE, PRUNE, TRAIN, tiny

DEPLOYMENTS = Path(__file__).parents[1] / "deployments"
RAW = tiny(
    train=TRAIN,
    prune={**PRUNE, "target": {"sparsity": 0.7}, "guard": {"metric": "accuracy", "max_drop": 0.0}},
    evaluate=EVALUATE,
)


def asked(url, path, **filters):
    answer = httpx.post(f"{url}/{path}/filter", json=filters, timeout=30)
    answer.raise_for_status()
    return answer.json()


def events(prefix, least, **resource):
    """The events of the run of a kind and of some resources, the oldest first, once as many as that have come in."""
    wanted = {"event": {"prefix": [prefix]}, "resource": resource, "order": "ASC"}

    def found():
        told = asked(PREFECT_API_URL.value(), "events", filter=wanted, limit=50)["events"]
        told = [e for e in told if "guarded · seed 0" in {r.get("prefect.resource.name") for r in e["related"]}]
        return told if len(told) >= least else None

    return until(found, f"{least} events {prefix}", patience=30)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory, prefect_server):
    """A run whose guard refuses its only round, on a server that somebody looks at; and the same again."""
    store = tmp_path_factory.mktemp("monitoring")
    with temporary_settings({PREFECT_UI_URL: "http://127.0.0.1:9"}):
        record = run(RAW, store=store, name="guarded")
    run(RAW, store=store, name="guarded")
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
    record, store = guarded
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


def test_the_summary_shows_the_chart_and_where_the_report_lies(guarded, monkeypatch):
    record, store = guarded
    told = asked(PREFECT_API_URL.value(), "artifacts", artifacts={"key": {"any_": ["guarded-summary"]}}, sort="ID_DESC")
    (with_chart,) = [a["data"] for a in told if a["data"].startswith("![chart](data:image/svg+xml;base64,")]
    assert len(told) == 2  # of the second nobody looked
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


def written(name):
    return yaml.safe_load((DEPLOYMENTS / name).read_text().replace("BLOCK", "00000000-0000-0000-0000-000000000000"))


@pytest.mark.parametrize(("name", "number"), [("automations.yaml", 2), ("notifications.yaml", 3)])
def test_prefect_takes_the_automations_as_they_stand(name, number):
    found = [AutomationCore.model_validate(each) for each in written(name)["automations"]]
    assert len({each.name for each in found}) == len(found) == number
    assert all(each.enabled and each.actions for each in found)
