"""A store on S3: a real server of its protocol on loopback, the same bytes as in a folder, runs that go on."""

from __future__ import annotations

import numpy as np
import pytest

from prune_jax.checkpoints import Store
from prune_jax.errors import UserMistake
from prune_jax.garbage import remove
from prune_jax.launch import run
from prune_jax.recipe import Ref
from prune_jax.report import write_report
from prune_jax.verification import verify
from tests.plain import EVALUATE, PRUNE, TRAIN, arrays, run_plain, same_bytes, tiny

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    pytest.importorskip("s3fs", reason="pip install 'prune-jax[s3]'")
    moto = pytest.importorskip("moto.server", reason="pip install 'moto[server]'")
    import boto3

    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")),
        }.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield "s3://bucket"
    server.stop()


RAW = tiny(train=TRAIN, prune=PRUNE, evaluate=EVALUATE, export={"kind": "export", "of": "prune"})


@pytest.fixture(scope="module")
def done(bucket):
    """The recipe, run with its store on S3."""
    record = run(RAW, store=f"{bucket}/store", name="first")
    assert record["status"] == "completed", record["message"]
    return record, Store(f"{bucket}/store")


def test_it_comes_to_what_a_folder_holds(done, tmp_path):
    record, store = done
    folder = Store(tmp_path)
    _, results = run_plain(RAW, folder)
    for name, result in results.items():
        assert (record["stages"][name]["kind"], record["stages"][name]["key"]) == result.ref
        same_bytes(arrays(store, result), arrays(folder, result))
    assert store.record("first") == record


def test_a_second_run_computes_nothing_and_is_the_latest(done):
    record, store = done
    again = run(RAW, store=store.root, name="earlier-by-name")
    assert {stage["status"] for stage in again["stages"].values()} == {"cached"}
    assert set(store.runs()) == {"first", "earlier-by-name"}
    assert again["results"] == record["results"]


def test_a_half_written_artifact_is_none_and_a_damaged_one_is_made_anew(done, bucket):
    store = Store(f"{bucket}/other")
    _, results = run_plain(RAW, store)
    assert verify(store).intact
    (store.path(results["prune"].ref) / "meta.json").unlink()  # the last file, so killed before it
    name = next(iter(store.meta(results["train"].ref)["files"]))
    (store.path(results["train"].ref) / name).write_text("x")
    assert [f"{store.path(results['train'].ref) / name} is not the file" in line for line in _damages(store)] == [True]
    _, again = run_plain(RAW, store)
    assert {name: result.status for name, result in again.items() if result.status == "ran"} == dict.fromkeys(
        ("train", "prune"), "ran"
    )
    found = verify(store)
    assert found.intact
    assert [left.what for left in found.leftovers] == ["set aside"]


def _damages(store):
    return [line for verdict in verify(store).verdicts for line in verdict.damages]


def test_step_checkpoints_stay_on_this_machine_until_the_artifact_is_there(done, bucket):
    store, ref = Store(f"{bucket}/steps"), Ref("train", "begun")
    with store.steps(ref) as steps:
        steps.save(3, {"w": np.arange(4.0)})
    again = Store(f"{bucket}/steps")
    with again.steps(ref) as steps:
        step, tree = steps.latest({"w": np.zeros(4)})
    assert step == 3
    np.testing.assert_array_equal(tree["w"], np.arange(4.0))
    again.write(ref, {"w": np.ones(2)}, {})
    assert not again.work(ref).exists()
    assert again.read(ref)[0]["w"].tolist() == [1, 1]


def test_a_report_lies_beside_the_record_and_gc_is_refused(done):
    _, store = done
    path = write_report(store, "first")
    assert str(path) == "s3://bucket/store/runs/first/report.html"
    assert "</html>" in path.read_text()
    with pytest.raises(UserMistake, match="s3://bucket/store: is no folder of this machine"):
        remove(store)


def test_a_server_that_is_away_is_told(done, monkeypatch):
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(UserMistake, match=r"store = 's3://bucket/store': cannot be reached .*credentials"):
            Store("s3://bucket/store")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
