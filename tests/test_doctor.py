"""`prune-jax doctor`: what will fail is found before, and said with what to do; and a run's share of the CPUs."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import prefect.main  # noqa: F401  (what it does to logging closes what tests capture: before they do)
import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from prune_jax import cli, doctor, shares
from prune_jax.errors import UserMistake
from tests.faults.runs import free_port


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No server, and a home of its own."""
    monkeypatch.setenv("PJRT_NPROC", "1")  # what is set stays set: XLA of this process has its threads already
    with temporary_settings({PREFECT_HOME: tmp_path / "home"}, restore_defaults={PREFECT_API_URL}):
        yield


def findings(store):
    """What `--json` tells, by what was looked at; the last of each."""
    return {it.what: it for it in doctor.examine(str(store))}


def test_nothing_is_wrong_here_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prune-jax", "doctor", "--json", "--store", str(tmp_path / "new" / "store")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = json.loads(capsys.readouterr().out)
    assert (ended.value.code, told["good"]) == (0, True), told
    found = {it["what"]: it["found"] for it in told["findings"]}
    assert {"python", "packages", "devices", "threads", "prefect profile", "prefect server", "store"} <= set(found)
    assert found["devices"] == "cpu x2, cpu"
    assert found["prefect server"] == "a temporary one for each run"
    assert found["store"] == f"{tmp_path}/new/store, not there yet"
    assert not list(tmp_path.rglob("*"))


def test_what_will_fail_ends_with_1_and_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    file = tmp_path / "file"
    file.write_text("no folder")
    monkeypatch.setattr(sys, "argv", ["prune-jax", "doctor", "--store", str(file)])
    url = f"http://127.0.0.1:{free_port()}/api"
    with pytest.raises(SystemExit) as ended, temporary_settings({PREFECT_API_URL: url, PREFECT_HOME: file / "home"}):
        cli.main()
    assert ended.value.code == 1
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"bad store {file} is a file; a store is a folder. Give another one with --store." in lines
    (silent,) = [i for i, line in enumerate(lines) if line.startswith(f"bad prefect server {url} does not answer: Con")]
    assert lines[silent + 1].startswith("Start it (`prefect server start`), or have a temporary one: unset PREFECT_API")
    (home,) = [line for line in lines if line.startswith("bad prefect home")]
    assert "Not a directory" in home


def test_a_disk_without_room_is_bad_and_one_with_little_is_doubtful(tmp_path, monkeypatch):
    assert findings(tmp_path)["free disk"].state == "good"
    monkeypatch.setattr(doctor, "SCARCE", 1e18)
    assert findings(tmp_path)["free disk"].state == "doubtful"
    monkeypatch.setattr(doctor, "LEAST", 1e18)
    assert findings(tmp_path)["free disk"].state == "bad"


def test_packages_are_held_against_what_the_installed_one_asks_for(monkeypatch):
    asked = ["jax<0.1", "no-such-package>=2", "packaging", "onnx<0.1; extra == 'onnx'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked)
    jax, absent, rest = [it for it in doctor._software() if it.what == "packages"]
    version = importlib.metadata.version("jax")
    assert jax == ("packages", "bad", f"jax is {version}, not <0.1", "pip install 'jax<0.1'")
    assert absent == (
        "packages",
        "bad",
        "no-such-package is not installed, not >=2",
        "pip install 'no-such-package>=2'",
    )
    assert rest.found.endswith(f"packaging {importlib.metadata.version('packaging')}")


def test_a_package_that_cannot_be_imported_is_told_and_the_rest_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "prune_jax.checkpoints", None)  # as with Orbax missing
    monkeypatch.setitem(sys.modules, "prune_jax.flows.server", None)  # as with Prefect missing
    found = findings(tmp_path)
    assert found["store"].state == found["prefect"].state == "bad"
    assert found["store"].found.startswith("cannot be looked at: import of prune_jax.checkpoints halted")
    assert found["devices"].state == "good"


@pytest.mark.parametrize(
    ("env", "runs", "state"),
    [
        ({}, 1, "good"),
        ({}, 2, "doubtful"),
        ({"XLA_CLIENT_MEM_FRACTION": "0.45"}, 2, "good"),
        ({"XLA_CLIENT_MEM_FRACTION": "0.9", "CUDA_VISIBLE_DEVICES": "1"}, 2, "good"),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, 4, "good"),
    ],
)
def test_runs_that_share_a_device_must_find_room_on_it(env, runs, state):
    assert doctor._preallocation(runs, env).state == state


def test_threads_that_take_turns_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PJRT_NPROC", "4096")
    assert findings(tmp_path)["threads"].state == "doubtful"


@pytest.mark.slow
def test_a_device_that_is_not_there_is_told(tmp_path):
    env = {**os.environ, "JAX_PLATFORMS": "tpu", "COLUMNS": "200"}
    words = [sys.executable, "-c", "from prune_jax.cli import main; main()", "doctor", "--store", str(tmp_path)]
    ended = subprocess.run(words, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 1, ended.stderr
    assert "bad   devices          JAX_PLATFORMS=tpu: " in ended.stdout
    assert "Unset JAX_PLATFORMS, or install what the device needs" in ended.stdout


def test_the_share_is_that_of_the_quota_where_there_is_one(tmp_path, monkeypatch):
    for text, cpus in (("max 100000\n", math.inf), ("250000 100000\n", 2.5), ("nonsense", math.inf)):
        (tmp_path / "cpu.max").write_text(text)
        assert shares._quota(tmp_path / "cpu.max") == cpus
    monkeypatch.setattr(shares, "QUOTA", tmp_path / "none")
    assert shares.usable_cpus() == len(os.sched_getaffinity(0))
    (tmp_path / "cpu.max").write_text("50000 100000")
    monkeypatch.setattr(shares, "QUOTA", tmp_path / "cpu.max")
    assert shares.usable_cpus() == 0.5


@pytest.mark.parametrize(
    ("env", "given"),
    [({}, 8), ({shares.RUNS: "3"}, 2), ({shares.RUNS: "99"}, 1), ({shares.RUNS: "2", "PJRT_NPROC": "7"}, 7)],
)
def test_a_run_has_its_share_of_threads_unless_the_user_says_otherwise(env, given, monkeypatch):
    monkeypatch.setattr(shares, "usable_cpus", lambda: 8)
    shares.settle(env)
    assert env["PJRT_NPROC"] == str(given)


@pytest.mark.parametrize("text", ["0", "two", "-1", "1.5", ""])
def test_what_is_no_number_of_runs_is_refused(text):
    with pytest.raises(UserMistake, match="must be the number of runs that share this machine, 1 or more"):
        shares.settle({shares.RUNS: text})


def test_xla_starts_as_many_threads_as_it_is_given():
    """What `settle` relies on: a thread of XLA's pool for each that `PJRT_NPROC` says."""
    count = (
        "import os, time, jax; jax.numpy.ones(3).block_until_ready(); end = time.time() + 20; found = 0\n"
        "while found < int(os.environ['PJRT_NPROC']) and time.time() < end:\n"
        "    names = [open(f'/proc/self/task/{t}/comm').read() for t in os.listdir('/proc/self/task')]\n"
        "    found = sum('XLAEigen' in name for name in names)\n"
        "print(found)"
    )
    if not Path("/proc/self/task").exists():
        pytest.skip("Linux tells the names of threads")

    def started(threads: int) -> int:
        env = {
            **os.environ,
            "PJRT_NPROC": str(threads),
            "XLA_FLAGS": "",
        }  # each of several devices has a thread at least
        return int(subprocess.run([sys.executable, "-c", count], env=env, capture_output=True, text=True).stdout)

    assert started(9) >= 9 > started(1)
