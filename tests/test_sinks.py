"""Metrics in TensorBoard and MLflow: what was written is read back by their own libraries."""

from __future__ import annotations

import pytest

from prune_jax.errors import UserMistake
from prune_jax.progress import Progress, listeners
from prune_jax.sinks import logged, targets

RECORD = {
    "status": "completed",
    "stages": {"train": {"metrics": {"validation_accuracy": 0.75, "table": {"a": 1}}}},
    "results": {"prune[seed=0]": {"accuracy": 0.5, "kind": "prune"}},
}


def told(written):
    """A run of two reports and a record; the listener that was there before hears, too."""
    heard = []
    token = listeners.set(listeners.get()._replace(progress=heard.append))
    with logged(written, "tiny") as finish:
        for step, loss in ((3, 0.5), (6, 0.25)):
            listeners.get().progress(Progress("train", "train · mlp", step, 6, loss=loss))
        listeners.get().progress(Progress("evaluate", "evaluate", 1, 2))
        finish(RECORD)
    assert len(heard) == 3
    assert listeners.get().progress == heard.append
    listeners.reset(token)


def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    told(f"tensorboard={tmp_path}")
    (file,) = (tmp_path / "tiny").iterdir()
    data, found, at = file.read_bytes(), {}, 0
    while at < len(data):  # a TFRecord: length, its checksum, the event, its checksum
        length = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + length])
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        at += length + 16
    assert found == WANTED


def test_mlflow_reads_what_was_written(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder in place of a server
    told(f"mlflow={tmp_path.as_uri()}")
    client = mlflow.MlflowClient(tracking_uri=tmp_path.as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("prune_jax").experiment_id])
    assert (run.info.run_name, run.info.status) == ("tiny", "FINISHED")
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")] == [
        (3, 0.5),
        (6, 0.25),
    ]
    assert run.data.metrics == {
        "train/loss": 0.25,
        "train/validation_accuracy": 0.75,
        "results/prune_seed_0_/accuracy": 0.5,
    }


def test_a_sink_that_fails_is_left_alone(tmp_path):
    pytest.importorskip("tensorboardX")
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="no more metrics go to .*file: NotADirectoryError"):
        told(f"tensorboard={tmp_path / 'file'}")


@pytest.mark.parametrize("written", ["wandb=x", "tensorboard", "tensorboard=", "a=b,mlflow=c"])
def test_others_are_refused(written):
    with pytest.raises(
        UserMistake, match=r"is not known \(allowed: tensorboard=PLACE, mlflow=PLACE; several with commas"
    ):
        targets(written)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserMistake, match=r"log = 'mlflow=x': the package is missing; pip install 'prune-jax\[mlflow\]'"
    ):
        targets("mlflow=x")


WANTED = {
    ("train/loss", 3): 0.5,
    ("train/loss", 6): 0.25,
    ("train/validation_accuracy", 0): 0.75,
    ("results/prune_seed_0_/accuracy", 0): 0.5,
}
