"""Data, losses and criteria of a few numbers each, found by `tests.samples.tiny:NAME`."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np

from prune_jax.criteria import Criterion


def blobs(samples=40, classes=3, width=4, spread=0.5):
    """Classes around corners: [samples, width]."""
    rng = np.random.default_rng(0)
    found = {"note": "made up"}
    for split in ("train", "test"):
        y = np.arange(samples) % classes
        found[f"x_{split}"] = np.eye(classes, width)[y] * 3 + spread * rng.normal(size=(samples, width))
        found[f"y_{split}"] = y
    return found


def images(samples=24, side=8):
    """Bright in the upper or the lower half: [samples, side, side, 1]."""
    found = blobs(samples, classes=2, width=2)
    half = np.repeat(np.eye(2), side // 2, axis=0)  # [side, 2]
    for split in ("train", "test"):
        rows = found[f"x_{split}"] @ half.T  # [samples, side]
        found[f"x_{split}"] = np.repeat(rows[:, :, None], side, axis=2)[..., None]
    return found


def series(samples=24, steps=5):
    """Padded sequences with their lengths: [samples, steps, 2]."""
    found = blobs(samples, classes=2, width=2)
    rng = np.random.default_rng(1)
    for split in ("train", "test"):
        found[f"x_{split}"] = np.repeat(found[f"x_{split}"][:, None], steps, axis=1)
        found[f"len_{split}"] = rng.integers(1, steps + 1, samples)
    return found


def tokens(samples=24, steps=5):
    """Integers that tell the class: [samples, steps]."""
    found = blobs(samples, classes=2, width=2)
    for split in ("train", "test"):
        found[f"x_{split}"] = (np.arange(steps) % 3 + 3 * found[f"y_{split}"][:, None]).astype(np.int32)
    return found


def numbers(samples=40, scale=1.0):
    """Two numbers to predict from three: [samples, 3] -> [samples, 2]."""
    rng = np.random.default_rng(0)
    weights = np.array([[1.0, 0.0], [0.0, -2.0], [0.0, 0.0]])
    found = {"note": "made up"}
    for split in ("train", "test"):
        x = rng.normal(size=(samples, 3))
        found |= {f"x_{split}": scale * x, f"y_{split}": x @ weights}
    return found


def slow_records(samples=40, seconds=0.02):
    """Records of Grain's that come from somewhere far."""
    import grain

    found = blobs(samples)

    def split(name):
        def read(i):
            time.sleep(seconds)
            return {"x": found[f"x_{name}"][i], "y": found[f"y_{name}"][i]}

        return grain.MapDataset.range(samples).map(read)

    return {"train": split("train"), "test": split("test"), "classes": 3}


def bent_records(samples=40, label=True):
    """Records of Grain's of which one is broken: a label of train, or a number of test."""
    import grain

    found = blobs(samples)

    def split(name):
        def read(i):
            x, y = found[f"x_{name}"][i].copy(), found[f"y_{name}"][i]
            if name == "test" and i == 5:
                x[2] = np.nan
            return {"x": x, "y": y if not label or (name, i) != ("train", 17) else np.int64(-1)}

        return grain.MapDataset.range(samples).map(read)

    return {"train": split("train"), "test": split("test"), "classes": 3}


def one():
    """One example to train on, and one to test on."""
    found = {"note": "made up"}
    for split in ("train", "test"):
        found |= {f"x_{split}": np.ones((1, 2)), f"y_{split}": np.ones((1, 2))}
    return found


def absolute_error(outputs, batch):
    """A user's loss: one number for each example."""
    return jnp.mean(jnp.abs(outputs - batch["y"]), axis=1)


def first_output(outputs, batch):
    """A user's loss whose gradient is the same everywhere."""
    return outputs[:, 0]


def mean_error(outputs, batch):
    """A user's mistake: the mean over the batch."""
    return jnp.mean(jnp.abs(outputs - batch["y"]))


def _by_position(params, stats):
    """A user's criterion: the first weights of each leaf die first."""
    return jax.tree.map(lambda w: jnp.arange(w.size, dtype=jnp.float32).reshape(w.shape), params)


def _broken(params, stats):
    """A criterion that answers NaN."""
    return jax.tree.map(lambda w: w * jnp.nan, params)


# Not registered: other tests walk the registry.
by_position = Criterion("tests-by-position", _by_position, formula="place in the leaf", paper="none")
broken = Criterion("tests-broken", _broken, formula="nan", paper="none")
