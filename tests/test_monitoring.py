"""`deployments/`: the automations are what Prefect takes, and on loopback they fire."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import httpx
import pytest
import yaml
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter
from prefect.events.schemas.automations import AutomationCore
from prefect.settings import PREFECT_API_URL, temporary_settings

from tests.faults.runs import PrefectServer, command, environment, kill_session, recipe, until
from tests.faults.workers import served
from tests.plain import PRUNE, TRAIN, tiny

DEPLOYMENTS = Path(__file__).parents[1] / "deployments"
RUNNING = FlowRunFilter(state={"name": {"any_": ["Running"]}})


def written(name):
    return yaml.safe_load((DEPLOYMENTS / name).read_text().replace("BLOCK", "00000000-0000-0000-0000-000000000000"))


@pytest.mark.parametrize(("name", "number"), [("automations.yaml", 2), ("notifications.yaml", 3)])
def test_prefect_takes_the_automations_as_they_stand(name, number):
    found = [AutomationCore.model_validate(each) for each in written(name)["automations"]]
    assert len({each.name for each in found}) == len(found) == number
    assert all(each.enabled and each.actions for each in found)


class Told(BaseHTTPRequestHandler):
    """What is posted to a webhook on loopback."""

    heard: ClassVar[list[dict[str, str]]] = []

    def do_POST(self):
        self.heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def webhook():
    with ThreadingHTTPServer(("127.0.0.1", 0), Told) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def prefect(env, *words, folder):
    answer = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *words], cwd=folder, env=env, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


def created(env, folder, name, text):
    """Automations created by Prefect's own command, from the file in `deployments/` with other figures in it."""
    file = folder / name
    file.write_text(text)
    return prefect(env, "automation", "create", "--from-file", str(file), folder=folder)


@pytest.mark.slow
def test_a_killed_run_becomes_crashed_and_somebody_is_told(tmp_path, webhook):
    """A run is killed with its process: its heartbeats end. Beats come every 30 s, the least that Prefect allows."""
    guard = {"metric": "accuracy", "max_drop": 0.0}
    breaching = tiny(train=TRAIN, prune={**PRUNE, "target": {"sparsity": 0.7}, "guard": guard})
    with PrefectServer(tmp_path / "home") as server, SyncPrefectClient(server.url) as client:
        env = {**environment(tmp_path / "home", server.url), "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
        with temporary_settings({PREFECT_API_URL: server.url}):
            block = {"name": "ops", "url": webhook, "json_data": {"subject": "{{subject}}", "body": "{{body}}"}}
            id = CustomWebhookNotificationBlock(**block).save("ops")
        text = (DEPLOYMENTS / "automations.yaml").read_text()
        assert text.count("within: 400") == 1
        created(env, tmp_path, "automations.yaml", text.replace("within: 400", "within: 45"))
        text = (DEPLOYMENTS / "notifications.yaml").read_text().replace("BLOCK", str(id))
        assert "Created 3 automation(s)" in created(env, tmp_path, "notifications.yaml", text)
        assert str(id) in prefect(env, "block", "inspect", "custom-webhook/ops", folder=tmp_path)
        time.sleep(5)  # services look for new automations

        command(breaching, tmp_path / "breaching", env).wait(300)
        (heard,) = until(lambda: Told.heard, "a notification")
        assert heard["subject"] == "prune_jax: tiny breached the guard of prune"
        assert heard["body"].startswith("Round 1: accuracy went from ")

        process = command(recipe(seconds=2), tmp_path / "killed", env)
        begun = until(lambda: client.read_flow_runs(flow_run_filter=RUNNING), "the run begins")[0]
        until(lambda: beats(server.url, begun.id), "a heartbeat")
        process.kill()
        process.wait()
        killed = time.monotonic()
        state = until(lambda: (s := client.read_flow_run(begun.id).state).is_crashed() and s, "Crashed", 200, every=1)
        sys.stderr.write(f"crashed {time.monotonic() - killed:.0f} s after it was killed\n")
        assert state.message.startswith("No heartbeat - its process is gone.")
        until(lambda: len(Told.heard) == 2, "a notification")
        assert Told.heard[1]["subject"] == f"prune_jax: {begun.name} crashed"
        assert Told.heard[1]["body"] == state.message


@pytest.mark.slow
def test_a_run_that_nobody_takes_is_cancelled_and_one_that_is_late_alone_is_not(tmp_path):
    linear = {"recipe": tiny(model={"kind": "linear"}, train=TRAIN), "store": str(tmp_path / "store")}
    with served(tmp_path) as it:
        kill_session(it.worker[0])
        text = (DEPLOYMENTS / "automations.yaml").read_text()
        assert text.count("within: 1800") == 1
        env = environment(tmp_path / "home", it.env["PREFECT_API_URL"])
        created(env, tmp_path, "automations.yaml", text.replace("within: 1800", "within: 60"))
        time.sleep(5)  # services look for new automations

        def begin():
            run = it.client.create_flow_run_from_deployment(it.deployment, parameters=linear).id
            it.wait(run, "Late", patience=60)
            return run

        taken = begin()
        it.work()
        assert it.wait(taken, "Completed", "Cancelled", patience=60) == "Completed"
        kill_session(it.worker[1])
        left, begun = begin(), time.monotonic()
        assert it.wait(left, "Cancelled", patience=200)
        assert 50 < time.monotonic() - begun
        assert it.state(taken) == "Completed"


def beats(url, run):
    wanted = {"event": {"name": ["prefect.flow-run.heartbeat"]}, "resource": {"id": [f"prefect.flow-run.{run}"]}}
    return httpx.post(f"{url}/events/filter", json={"filter": wanted}).json()["events"]
