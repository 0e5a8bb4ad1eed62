"""Data sources as users write them, found by `tests.samples.sources:NAME`."""

from __future__ import annotations

import numpy as np


def arrays(samples=20, classes=None):
    rng = np.random.default_rng(0)
    found = {
        "x_train": rng.normal(size=(samples, 3)),
        "y_train": np.arange(samples) % 4,
        "x_test": rng.normal(size=(8, 3)),
        "y_test": np.arange(8) % 4,
        "note": "made up",
    }
    return found if classes is None else found | {"classes": classes}


def a_list():
    return [1, 2]


NOT_A_FUNCTION = 3


def _numbers(count, first=0):
    import grain

    def record(i):
        return {"y": np.int64(i % 4), "x": np.full(2, i, np.float64)}

    return grain.MapDataset.range(first, first + count).map(record)


def grain_numbers(train=20, test=6, validation=None):
    found = {"train": _numbers(train), "test": _numbers(test, 100), "classes": 4, "note": "counted"}
    return found if validation is None else found | {"validation": _numbers(validation, 200)}


def grain_series():
    def record(r):
        return {"lengths": np.int64(2), "y": 0.5, "x": np.stack([r["x"]] * 3)}

    return {"train": _numbers(9).map(record), "test": _numbers(5).map(record)}


def grain_without_classes():
    return {"train": _numbers(4), "test": _numbers(4)}


def grain_endless():
    return {"train": _numbers(4).repeat(), "test": _numbers(4)}


def grain_iterator():
    return {"train": _numbers(4).to_iter_dataset(), "test": _numbers(4)}


def grain_tuples():
    return {"train": _numbers(4).map(lambda r: (r["x"], r["y"])), "test": _numbers(4)}


def grain_ragged():
    return {"train": _numbers(4).map(lambda r: r | {"x": np.zeros(1 + int(r["y"]))}), "test": _numbers(4)}


def grain_misnamed():
    return {"train": _numbers(4), "test": _numbers(4), "valid": _numbers(4)}


def grain_beyond():
    return {"train": _numbers(4), "test": _numbers(4), "classes": 3}
