"""Trainings over hosts: what is refused, and real processes that meet on loopback and come to what one comes to."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from prune_jax.checkpoints import Store
from prune_jax.errors import UserMistake
from prune_jax.hosts import Place, place
from prune_jax.launch import run
from prune_jax.meshes import check_share
from prune_jax.recipe import Ref
from prune_jax.trees import leaves_by_path
from tests.plain import PRUNE, TRAIN, tiny

AT = "10.0.0.1:8476"
REFUSED = {
    (None, 2, None): "of-hosts = 2: says nothing without --hosts",
    (None, None, 0): "host = 0: says nothing without --hosts",
    ("auto", None, 1): "host = 1: is found by `--hosts auto`",
    ("10.0.0.1", 2, 0): "hosts = '10.0.0.1': is no address .allowed: HOST:PORT of host 0",
    ("10.0.0.1:port", 2, 0): "is no address",
    ("10.0.0.1:65536", 2, 0): "is no address",
    (AT, None, 0): "needs --of-hosts, how many there are, and --host, which one this is, from 0",
    (AT, 1, 0): "of-hosts = 1: must be 2 or more",
    (AT, 2, 2): "host = 2: must be from 0 to 1",
    (AT, 2, -1): "host = -1: must be from 0 to 1",
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_names_no_hosts_is_refused(said):
    with pytest.raises(UserMistake, match=REFUSED[said]):
        place(*said)


def test_what_names_hosts():
    assert place(None, None, None) is None
    assert place("auto", None, None) == Place()
    assert place("[::1]:80", 3, 2) == Place("[::1]:80", 3, 2)


def test_what_cannot_be_shared_is_refused_before_anybody_is_waited_for(tmp_path):
    among = {"hosts": AT, "of_hosts": 2, "host": 0}
    with pytest.raises(UserMistake, match="runner = 'dask=local:2': over hosts stages run on host 0; choose threads"):
        run(tiny(train=TRAIN), store=tmp_path / "store", runner="dask=local:2", **among)
    with pytest.raises(UserMistake, match="store = 's3://bucket': hosts share step checkpoints, too"):
        run(tiny(train=TRAIN), store="s3://bucket", **among)
    assert not (tmp_path / "store").exists()


def test_a_mesh_takes_all_devices_of_all_hosts():
    there = jax.device_count()
    check_share((1, there), 2)
    with pytest.raises(UserMistake, match=f"devices: is not set.*all of the {there} devices of 2 hosts"):
        check_share(None, 2)
    with pytest.raises(UserMistake, match=f"data: 1, model: {2 * there}.*let data x model be {there}"):
        check_share((1, 2 * there), 2)


class Hosts:
    """Two processes with two devices each, that run one recipe."""

    def __init__(self, folder, raw, *, stores=("store", "store"), changes=((), ())):
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(raw, sort_keys=False))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        among = ["--hosts", f"127.0.0.1:{port}", "--of-hosts", "2", "--host"]
        sets = [[word for change in each for word in ("--set", change)] for each in changes]
        self.processes = [command(recipe, folder / stores[i], *sets[i], *among, str(i), devices=2) for i in (0, 1)]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.communicate()

    def ends(self, seconds=300):
        """Exit codes, what stands on stdout, and what on stderr."""
        told = [process.communicate(timeout=seconds) for process in self.processes]
        return [process.returncode for process in self.processes], *zip(*told, strict=True)


def command(recipe, store, *more, devices):
    words = [sys.executable, "-c", "from prune_jax.cli import main; main()", "run", str(recipe), "--store", str(store)]
    env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*words, *more, "--json"], cwd=Path(__file__).parents[1], env=env, **pipes)


def on_one(folder, store="one"):
    """The record of the same recipe, run by one process with four devices."""
    with command(folder / "recipe.yaml", folder / store, devices=4) as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out)


OPTIMIZER = {"learning_rate": 0.01}
RIGL = {"kind": "rigl", "sparsity": 0.5, "every": 4}


def spanning(devices, **train):
    recovery = {"steps": 4, "optimizer": OPTIMIZER, "moments": "kept"}
    raw = tiny(
        model={"kind": "mlp", "widths": [8, 6]},
        train={**TRAIN, "store_moments": True, **train},
        prune={**PRUNE, "finetune": recovery},
    )
    raw["data"]["batch_size"] = 8
    return {**raw, "devices": devices}


def arrays_of(store, record):
    return {
        f"{name}/{path}": array
        for name, stage in record["stages"].items()
        for path, array in leaves_by_path(store.read(Ref(stage["kind"], stage["key"]))[0]).items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("devices", [{"data": 2, "model": 2}, {"model": 4}, {"data": 4}], ids=str)
def test_two_hosts_come_to_what_one_comes_to(tmp_path, devices):
    raw = spanning(devices)
    raw["stages"]["grown"] = {**TRAIN, "sparsify": RIGL}
    raw["stages"]["taught"] = {"kind": "distill", "of": "prune", "teacher": "train", "steps": 3, "optimizer": OPTIMIZER}
    with Hosts(tmp_path, raw) as hosts:
        codes, outs, errs = hosts.ends()
    assert codes == [0, 0], errs
    assert outs[0] == outs[1]
    record, plain = json.loads(outs[0]), on_one(tmp_path)
    assert {name: stage["key"] for name, stage in record["stages"].items()} == {
        name: stage["key"] for name, stage in plain["stages"].items()
    }
    ours, theirs = arrays_of(Store(tmp_path / "store"), record), arrays_of(Store(tmp_path / "one"), plain)
    assert list(ours) == list(theirs)
    for path in ours:
        np.testing.assert_allclose(np.float32(ours[path]), np.float32(theirs[path]), rtol=1e-5, atol=1e-5, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_one_that_is_killed_ends_the_other_and_the_same_command_goes_on(tmp_path, killed):
    """After host 0 one process with as many devices goes on, after host 1 two again."""
    raw = {**spanning({"data": 2, "model": 2}, steps=4000, checkpoint_seconds=0)}
    with Hosts(tmp_path, raw) as hosts:
        until = time.monotonic() + 200
        while not any((tmp_path / "store").glob("train/*.work/*.meta.json")):
            assert time.monotonic() < until
            time.sleep(0.05)
        hosts.processes[killed].send_signal(signal.SIGKILL)
        begun = time.monotonic()
        codes, _, errs = hosts.ends()
        assert time.monotonic() - begun < 60
    assert codes[1 - killed] == 1
    assert codes[killed] == -signal.SIGKILL
    assert "Give the same command on all hosts: it goes on from the last checkpoint" in errs[1 - killed].replace(
        "\n", " "
    )
    if killed:
        assert "the training over 2 hosts broke off" in errs[0].replace("\n", " ")
        assert "stack trace" not in errs[0]
        with Hosts(tmp_path, raw) as hosts:
            codes, outs, errs = hosts.ends()
        assert codes == [0, 0], errs
        record = json.loads(outs[0])
    else:
        record = on_one(tmp_path, "store")
    assert record["stages"]["train"]["metrics"]["resumed_from_step"] > 0


@pytest.mark.slow
def test_hosts_that_differ_and_trainings_that_fail_end_on_both(tmp_path):
    raw = spanning({"data": 2, "model": 2})
    with Hosts(tmp_path, raw, changes=((), ["stages.train.steps=7"])) as hosts:
        codes, _, errs = hosts.ends()
    assert codes == [2, 2], errs
    assert all("host 1: the recipe's digest is" in err for err in errs)
    assert not (tmp_path / "store").exists()

    with Hosts(tmp_path, raw, changes=[["devices={data: 2}"]] * 2) as hosts:
        codes, _, errs = hosts.ends()
    assert codes == [2, 2], errs
    assert all("takes all of the 4 devices of 2 hosts" in err for err in errs)

    with Hosts(tmp_path, raw, stores=("store", "other")) as hosts:
        codes, _, errs = hosts.ends()
    assert codes == [1, 1], errs
    assert all("host 1:" in err and "that all hosts share" in err for err in (e.replace("\n", " ") for e in errs))

    with Hosts(tmp_path, raw, changes=[["stages.train.optimizer.learning_rate=1e30"]] * 2) as hosts:
        codes, _, errs = hosts.ends()
    assert codes == [1, 1], errs
    assert all("Lower `optimizer.learning_rate`" in err.replace("\n", " ") for err in errs), errs
