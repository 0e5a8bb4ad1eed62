"""Stages on Dask and Ray: worker processes come to what the plain loop comes to, and one that is killed is replaced."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress

import pytest

from prune_jax.checkpoints import Store
from prune_jax.errors import UserMistake
from prune_jax.launch import run
from tests.plain import EVALUATE, PRUNE, TRAIN, arrays, run_plain, same_bytes, tiny

REFUSED = {
    "dask=": "is no address of a cluster",
    "dask=local": "is no address of a cluster",
    "dask=local:0": "is no address of a cluster",
    "dask=local:two": "allowed: dask=tcp://HOST:PORT of a Dask scheduler, or dask=local:N",
    "ray=local:0": "is no address of a cluster",
    "ray=auto": "is no address of a cluster",
    "ray=tcp://head:10001": "allowed: ray=ray://HOST:10001 of a Ray head, ray=HOST:6379 .*, or ray=local:N",
    "ray=ray://head": "is no address of a cluster",
    "dasks=local:2": "is not known .allowed: threads, local, dask=ADDRESS, ray=ADDRESS",
}


@pytest.mark.parametrize("runner", REFUSED)
def test_what_is_no_address_is_refused_before_anything_is_written(tmp_path, runner):
    with pytest.raises(UserMistake, match=f"runner = '{runner}': .*{REFUSED[runner]}"):
        run(tiny(train=TRAIN), store=tmp_path / "store", runner=runner)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("kind", ["dask", "ray"])
def test_what_is_not_installed_is_named(tmp_path, monkeypatch, kind):
    monkeypatch.setitem(sys.modules, f"prefect_{kind}", None)
    with pytest.raises(
        UserMistake, match=rf"needs what is not installed: prefect-{kind}.*pip install 'prune-jax\[{kind}\]'"
    ):
        run(tiny(train=TRAIN), store=tmp_path / "store", runner=f"{kind}=local:2")
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dask", "ray"])
@pytest.mark.usefixtures("prefect_server")
def test_two_processes_come_to_what_the_plain_loop_comes_to(tmp_path, kind):
    pytest.importorskip(f"prefect_{kind}")
    matrix = {"criterion": ["magnitude", "taylor"], "target.sparsity": [0.5, 0.75]}
    evaluate = {**EVALUATE, "of": ["train", "prune"]}
    raw = tiny(train=TRAIN, prune={**PRUNE, "matrix": matrix}, evaluate=evaluate)
    record = run(raw, store=tmp_path / kind, name="two", runner=f"{kind}=local:2")
    plain = Store(tmp_path / "plain")
    _, results = run_plain(raw, plain)
    assert record["status"] == "completed", record["message"]
    assert set(record["stages"]) == set(results)
    assert [stage["kind"] for stage in record["stages"].values() if stage["status"] == "ran"].count("train") == 1
    for name, stage in record["stages"].items():
        assert (stage["kind"], stage["key"]) == results[name].ref
        same_bytes(arrays(Store(tmp_path / kind), results[name]), arrays(plain, results[name]))


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_a_scheduler_that_is_there_and_a_worker_that_is_killed(tmp_path, monkeypatch):
    """The criterion kills the process that first asks for it; Dask gives the stage to another."""
    distributed = pytest.importorskip("distributed")
    monkeypatch.setenv("PRUNE_JAX_TEST_KILLED", str(tmp_path / "killed"))
    raw = tiny(train=TRAIN, prune={**PRUNE, "criterion": "tests.samples.faults:kills_once"})
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        runner = f"dask={cluster.scheduler_address}"
        record = run(raw, store=tmp_path / "store", name="there", runner=runner)
        assert record["status"] == "completed", record["message"]
        assert (tmp_path / "killed").exists()
        cluster.scale(0)
        with distributed.Client(cluster) as client:
            while client.nthreads():
                pass
        with pytest.raises(UserMistake, match="has no workers; start some with `dask worker tcp://"):
            run(raw, store=tmp_path / "other", runner=runner)
    monkeypatch.setattr("prune_jax.flows.clusters.PATIENCE", 1)
    with pytest.raises(UserMistake, match=f"runner = '{runner}': no Dask scheduler answers there"):
        run(raw, store=tmp_path / "other", runner=runner)
    assert not (tmp_path / "other").exists()


@contextmanager
def ray_head(processes):
    """A head with so many processes: its address for clients, and the one for this machine."""
    with socket.socket(type=socket.SOCK_DGRAM) as asked:
        asked.connect(("192.0.2.1", 9))  # sends nothing, but tells by which address this machine is known
        host = asked.getsockname()[0]
    with socket.create_server((host, 0)) as one, socket.create_server((host, 0)) as other:
        port, of_clients = one.getsockname()[1], other.getsockname()[1]
    folder = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True)
    ports = [f"--port={port}", f"--ray-client-server-port={of_clients}", f"--node-ip-address={host}"]
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    few = [f"--num-cpus={processes}", "--include-dashboard=false", "--object-store-memory=100000000"]
    with folder as where:
        command, env = [*start, *few, *ports, f"--temp-dir={where}"], {**os.environ, "PYTHONPATH": os.getcwd()}
        head = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
        try:
            for number in (port, of_clients):
                while head.poll() is None:
                    with suppress(OSError), socket.create_connection((host, number), timeout=1):
                        break
                    time.sleep(0.2)
            yield f"ray=ray://{host}:{of_clients}", f"ray={host}:{port}"
        finally:
            head.terminate()
            head.wait()


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_a_ray_head_that_is_there_and_a_worker_that_is_killed(tmp_path, monkeypatch):
    """As above, by both ways to a head; SIGTERM does afterwards what it did before."""
    pytest.importorskip("prefect_ray")
    monkeypatch.setenv("PRUNE_JAX_TEST_KILLED", str(tmp_path / "killed"))
    raw = tiny(train=TRAIN, prune={**PRUNE, "criterion": "tests.samples.faults:kills_once"})
    sigterm = signal.getsignal(signal.SIGTERM)
    with ray_head(processes=2) as runners:
        for place, runner in enumerate(runners):
            record = run(raw, store=tmp_path / f"{place}", name="there", runner=runner)
            assert record["status"] == "completed", record["message"]
            assert (tmp_path / "killed").exists()
            (tmp_path / "killed").unlink()
    for runner in runners:
        with pytest.raises(UserMistake, match=f"runner = '{runner}': no Ray head answers there"):
            run(raw, store=tmp_path / "other", runner=runner)
    assert not (tmp_path / "other").exists()
    assert signal.getsignal(signal.SIGTERM) is sigterm


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_a_ray_head_without_workers_and_a_port_of_something_else(tmp_path, monkeypatch):
    pytest.importorskip("prefect_ray")
    raw = tiny(train=TRAIN)
    with ray_head(processes=0) as (_, runner), pytest.raises(UserMistake, match="has no workers; start some with `ray"):
        run(raw, store=tmp_path / "store", runner=runner)
    monkeypatch.setattr("prune_jax.flows.ray_cluster.START", 5)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        runner = f"ray=127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(UserMistake, match=f"runner = '{runner}': no Ray head answers there .TimeoutExpired"):
            run(raw, store=tmp_path / "store", runner=runner)
    assert not (tmp_path / "store").exists()
