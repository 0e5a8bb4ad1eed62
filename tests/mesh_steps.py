"""Run by `test_meshes` by itself, on eight devices of one CPU: a recipe's mesh, and checkpoints from one to another."""

from __future__ import annotations

import contextlib
import os
import tempfile

if __name__ == "__main__":  # else whoever looks here for doctests would have eight devices, too
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec

from prune_jax import training
from prune_jax.checkpoints import Store
from prune_jax.models import build
from prune_jax.recipe import Devices, Optimizer, Ref
from prune_jax.training import fit, make_step
from prune_jax.trees import leaves_by_path
from tests.plain import PRUNE, arrays, run_plain, tiny
from tests.samples.tiny import blobs

training.BEAT_SECONDS = 0  # hear of every step
RECOVERY = {"steps": 4, "optimizer": {"learning_rate": 0.01}}
TRAIN = {"kind": "train", "steps": 6, "optimizer": {"learning_rate": 0.01}}
MODEL = {"kind": "mlp", "widths": [8, 6]}


def recipe(devices, **train):
    raw = tiny(model=MODEL, train={**TRAIN, **train}, prune={**PRUNE, "finetune": RECOVERY})
    raw["data"]["batch_size"] = 8
    return {**raw, "devices": devices} if devices else raw


def close(a, b):
    assert list(a) == list(b)
    for path in a:
        np.testing.assert_allclose(np.float32(a[path]), np.float32(b[path]), rtol=1e-5, atol=1e-6, err_msg=path)


def recipes_come_to_the_same(folder):
    """Trained, masked and fine-tuned on one device and on two meshes: the same within a tolerance, other keys."""
    found, keys = {}, set()
    for data, model in ((1, 1), (4, 2), (1, 8)):
        store = Store(f"{folder}/{data}-{model}")
        before = make_step.cache_info().misses
        _, results = run_plain(recipe({"data": data, "model": model}), store)
        assert make_step.cache_info().misses == before + 2  # dense and masked
        found[data, model] = arrays(store, results["prune"])
        keys.add(results["train"].key)
    assert len(keys) == 3
    close(found[4, 2], found[1, 1])
    close(found[1, 8], found[1, 1])


NET = build("mlp", {"widths": [8, 6]}, inputs=(jax.ShapeDtypeStruct((1, 4), "float32"),), outputs=3)
START = jax.device_get(jax.jit(NET.init)(jax.random.key(0)))


def trained(devices, **options):
    data = blobs()
    split = {"x": data["x_train"].astype(np.float32), "y": data["y_train"]}
    options |= {"optimizer": Optimizer(learning_rate=0.01), "batch_size": 8, "seed": 0, "steps": 6}
    return fit(NET, START, split, objective_name="classification", devices=devices, checkpoint_seconds=0, **options)


def weights_and_moments_are_cut_and_one_step_is_compiled(folder):
    """The rule by hand: widths 4, 8, 6, 3 on `model: 2`."""
    seen = []

    class Watch:
        def latest(self, like):
            seen.append(like)

        def save(self, step, tree):
            seen.append(tree)

    steps = []
    made = training.make_step
    training.make_step = lambda *given, **options: steps.append(made(*given, **options)) or steps[-1]
    trained(Devices(data=4, model=2), checkpoints=Watch())
    training.make_step = made
    whole, first = PartitionSpec(), PartitionSpec("model")
    rules = {
        "hidden_0/kernel": PartitionSpec(None, "model"),  # [4, 8]
        "hidden_0/bias": first,
        "hidden_1/kernel": first,  # [8, 6]
        "hidden_1/bias": first,
        "output/kernel": first,  # [6, 3]
        "output/bias": whole,  # [3]
    }
    assert len(seen) == 7
    for state in seen:
        assert specs(state.params) == rules
        adam = state.optimizer[0]
        assert isinstance(adam, optax.ScaleByAdamState)
        assert specs(adam.mu) == specs(adam.nu) == rules
        assert adam.count.sharding.spec == state.losses.sharding.spec == whole
    (kernel,) = {shard.data.shape for shard in seen[-1].params["hidden_1"]["kernel"].addressable_shards}
    assert kernel == (4, 6)
    assert steps[0]._cache_size() == 1


def specs(tree):
    return {path: leaf.sharding.spec for path, leaf in leaves_by_path(tree).items()}


def a_checkpoint_goes_on_upon_another_mesh(folder):
    """Cut off after step 3 upon 8 devices, it goes on upon 4, 2 and one of them to where it would have come."""

    def killed(done, total, loss, rate):
        if done == 3:
            raise KeyboardInterrupt

    whole = trained(Devices())
    for place, mesh in enumerate((Devices(data=2, model=2), Devices(model=2), Devices())):
        store, ref = Store(f"{folder}/steps-{place}"), Ref("train", "killed")
        with store.steps(ref) as steps, contextlib.suppress(KeyboardInterrupt):
            trained(Devices(data=4, model=2), checkpoints=steps, beat=killed)
        with store.steps(ref) as steps:
            fitted = trained(mesh, checkpoints=steps)
        assert fitted.resumed_from == 3
        close(leaves_by_path(fitted.variables.params), leaves_by_path(whole.variables.params))
        np.testing.assert_allclose(fitted.losses, whole.losses, rtol=1e-5)


def main():
    assert jax.device_count() == 8
    with tempfile.TemporaryDirectory() as folder:
        recipes_come_to_the_same(folder)
        weights_and_moments_are_cut_and_one_step_is_compiled(folder)
        a_checkpoint_goes_on_upon_another_mesh(folder)


if __name__ == "__main__":
    main()
