"""A training that begins from weights of a file: which ones, under which key, and what is refused."""

import numpy as np
import pytest
import safetensors.numpy

from prune_jax.errors import UserMistake
from prune_jax.preparation import check_networks, prepare
from prune_jax.recipe import read_recipe
from tests.plain import TRAIN, arrays, part, run_plain, same_bytes, tiny

MODEL = {"kind": "mlp", "widths": [6], "batch_norm": True}


def weights(seed=0):
    """Those of `MODEL` on blobs, drawn by numpy."""
    shapes = {
        "params/hidden_0/kernel": (4, 6), "params/norm_0/bias": (6,), "params/norm_0/scale": (6,),
        "params/output/bias": (3,), "params/output/kernel": (6, 3), "state/norm_0/mean": (6,), "state/norm_0/var": (6,),
    }  # fmt: skip
    rng = np.random.default_rng(seed)
    return {path: rng.random(shape, np.float32) for path, shape in shapes.items()}


def recipe(path, steps=0, **more):
    return tiny(model=MODEL, train={"kind": "train", "weights": str(path), "steps": steps}, **more)


@pytest.fixture
def file(tmp_path):
    """A file of them."""
    path = tmp_path / "own.safetensors"
    safetensors.numpy.save_file(weights(), path)
    return path


def test_a_training_of_no_steps_is_the_file(file, store):
    rewound = {"kind": "finetune", "steps": 1, "optimizer": {"learning_rate": 1e-30}, "rewind": "initialisation"}
    _, results = run_plain(recipe(file, finetune=rewound), store)
    found = arrays(store, results["train"])
    kept = {path: found[path] for path in weights()}
    same_bytes(kept, weights())
    assert results["train"].metrics["steps"] == found["losses"].size == 0
    same_bytes(part(arrays(store, results["finetune"]), "params"), part(found, "params"))  # begins from the file, too


def test_a_training_goes_on_from_the_file(file, store):
    _, results = run_plain(recipe(file, steps=1), store)
    moved = part(arrays(store, results["train"]), "params")
    for path, before in part(weights(), "params").items():
        assert 0 < np.abs(moved[path] - before).max() < 2e-3, path  # Adam's first step is its rate, 1e-3
    assert results["train"].metrics["steps"] == 1


def test_the_key_is_of_what_the_file_holds(file):
    def key():
        return prepare(read_recipe(recipe(file))).calls[0].key

    first = key()
    assert key() == first
    safetensors.numpy.save_file(weights(1), file)
    assert key() != first
    assert "weights" not in prepare(read_recipe(tiny(train=TRAIN))).calls[0].settings


def without(name):
    return {path: array for path, array in weights().items() if path != name}


MISTAKES = {
    "missing": (
        {**without("params/output/bias"), "params/ouput/bias": np.ones(3, np.float32)},
        "array 'params/output/bias' is missing; did you mean 'params/ouput/bias'? (found: ",
    ),
    "not ours": (weights() | {"params/extra": np.ones(3, np.float32)}, "array 'params/extra' is not the network's"),
    "shape": (
        weights() | {"params/output/bias": np.ones(4, np.float32)},
        "array 'params/output/bias' is float32 [4], but the network's is float32 [3]",
    ),
    "wider": (
        weights() | {"params/output/bias": np.ones(3)},
        "array 'params/output/bias' is float64 [3], but the network's is float32 [3]",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named_before_anything_runs(case, tmp_path):
    found, message = MISTAKES[case]
    path = tmp_path / "own.safetensors"
    safetensors.numpy.save_file(found, path)
    with pytest.raises(UserMistake) as caught:
        check_networks(prepare(read_recipe(recipe(path))))
    assert f"tiny: stages.train.weights = {str(path)!r}: {message}" in str(caught.value)


def test_files_that_are_none_are_refused(tmp_path):
    path = tmp_path / "own.safetensors"
    with pytest.raises(UserMistake, match=r"cannot be read \(No such file or directory; looked in "):
        check_networks(prepare(read_recipe(recipe(path))))
    path.write_bytes(b"x" * 40)
    with pytest.raises(UserMistake, match="is no safetensors file: "):
        check_networks(prepare(read_recipe(recipe(path))))


def test_narrower_numbers_are_widened(file, store):
    safetensors.numpy.save_file({path: array.astype(np.float16) for path, array in weights().items()}, file)
    _, results = run_plain(recipe(file), store)
    found = arrays(store, results["train"])
    for path, array in weights().items():
        assert found[path].dtype == np.float32
        np.testing.assert_array_equal(found[path], array.astype(np.float16))
