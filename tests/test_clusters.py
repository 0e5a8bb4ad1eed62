"""Stages on Dask: real worker processes come to what the plain loop comes to, and one that is killed is replaced."""

from __future__ import annotations

import sys

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
    "dasks=local:2": "is not known",
}


@pytest.mark.parametrize("runner", REFUSED)
def test_what_is_no_address_is_refused_before_anything_is_written(tmp_path, runner):
    with pytest.raises(UserMistake, match=f"runner = '{runner}': .*{REFUSED[runner]}"):
        run(tiny(train=TRAIN), store=tmp_path / "store", runner=runner)
    assert not (tmp_path / "store").exists()


def test_dask_is_named_where_it_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "prefect_dask", None)
    with pytest.raises(
        UserMistake, match=r"needs what is not installed: prefect-dask.*pip install 'prune-jax\[dask\]'"
    ):
        run(tiny(train=TRAIN), store=tmp_path / "store", runner="dask=local:2")
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_two_processes_come_to_what_the_plain_loop_comes_to(tmp_path):
    pytest.importorskip("prefect_dask")
    matrix = {"criterion": ["magnitude", "taylor"], "target.sparsity": [0.5, 0.75]}
    evaluate = {**EVALUATE, "of": ["train", "prune"]}
    raw = tiny(train=TRAIN, prune={**PRUNE, "matrix": matrix}, evaluate=evaluate)
    record = run(raw, store=tmp_path / "dask", name="two", runner="dask=local:2")
    plain = Store(tmp_path / "plain")
    _, results = run_plain(raw, plain)
    assert record["status"] == "completed", record["message"]
    assert set(record["stages"]) == set(results)
    assert [stage["kind"] for stage in record["stages"].values() if stage["status"] == "ran"].count("train") == 1
    for name, stage in record["stages"].items():
        assert (stage["kind"], stage["key"]) == results[name].ref
        same_bytes(arrays(Store(tmp_path / "dask"), results[name]), arrays(plain, results[name]))


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
