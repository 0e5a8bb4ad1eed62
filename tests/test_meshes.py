"""Meshes: how arrays are cut, what is refused, and that eight devices train as one does."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from prune_jax.errors import UserMistake
from prune_jax.launch import run
from prune_jax.meshes import along_model
from prune_jax.plan import make_plan
from prune_jax.recipe import read_recipe
from tests.plain import TRAIN, tiny

CUTS = {
    ((8, 6), "float32", 2): PartitionSpec("model"),
    ((6, 8), "float32", 2): PartitionSpec(None, "model"),
    ((8, 8), "bool", 4): PartitionSpec(None, "model"),  # of equal axes the last
    ((9, 6), "float32", 2): PartitionSpec(None, "model"),  # the largest that is divided
    ((3, 3, 4, 16), "bfloat16", 8): PartitionSpec(None, None, None, "model"),
    ((9, 7), "float32", 2): PartitionSpec(),
    ((), "float32", 2): PartitionSpec(),
    ((0, 3), "float32", 2): PartitionSpec(),
    ((8,), "int32", 2): PartitionSpec(),
    ((8,), "float32", 1): PartitionSpec(),
}


@pytest.mark.parametrize(("shape", "dtype", "parts"), CUTS)
def test_an_array_is_cut_along_its_largest_axis_that_fits(shape, dtype, parts):
    mesh = AbstractMesh((2, parts), ("data", "model"))
    assert along_model(mesh, jax.ShapeDtypeStruct(shape, dtype)).spec == CUTS[shape, dtype, parts]


def keys(devices):
    raw = {**tiny(train=TRAIN), **({"devices": devices} if devices else {})}
    plan = make_plan(read_recipe(raw), digest_of=lambda data: "d", code_of=lambda recipe: {})
    return [call.key for call in plan.calls]


def test_the_mesh_is_part_of_the_key_and_none_is_not():
    found = [keys(devices) for devices in (None, {"data": 3}, {"data": 3, "model": 2})]
    assert len({key for (key,) in found}) == 3
    assert keys({"data": 3}) == keys({"data": 3, "model": 1})


def test_what_no_machine_or_batch_can_be_cut_into_is_refused(tmp_path):
    many = jax.device_count() + 1
    with pytest.raises(
        UserMistake, match=f"needs {9 * many} devices, and here are {many - 1} .*device_count={9 * many} "
    ):
        run({**tiny(train=TRAIN), "devices": {"data": 9, "model": many}}, store=tmp_path / "store")
    with pytest.raises(UserMistake, match=r"devices.data = 2: does not divide the batches of 9 examples"):
        run({**tiny(train=TRAIN), "devices": {"data": 2}}, store=tmp_path / "store")
    with pytest.raises(UserMistake, match=r"devices.model = 0"):
        read_recipe({**tiny(train=TRAIN), "devices": {"model": 0}})
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("script", ["mesh_steps", "sharded_steps"])
def test_who_collects_doctests_keeps_the_devices_that_conftest_asks_for(script):
    importlib.import_module(f"tests.{script}")
    assert os.environ["XLA_FLAGS"].endswith("--xla_force_host_platform_device_count=2")


@pytest.mark.slow
def test_eight_devices_train_as_one_does_and_checkpoints_go_on_upon_other_meshes():
    script = [sys.executable, "-m", "tests.mesh_steps"]
    done = subprocess.run(script, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
