"""Data are checked, split the same way every time, and named by what they hold."""

from __future__ import annotations

import hashlib
import itertools
import re
import subprocess
import sys

import numpy as np
import pytest

from prune_jax.datasets import SOURCES, GrainSplit, check_labels, load
from prune_jax.datasets.splits import fold_of, hold_out, spread
from prune_jax.errors import UserMistake

# source: shapes of x in train and validation together and in test, dtype of x, shape of one y, classes
SHAPES = {
    "mnist5k": (4000, 1000, (28, 28, 1), "float32", (), 10),
    "japanese_vowels": (270, 370, (29, 12), "float32", (), 9),
    "digits": (1438, 359, (8, 8, 1), "float32", (), 10),
    "breast_cancer": (455, 114, (30,), "float32", (), 2),
    "diabetes": (354, 88, (10,), "float32", (1,), None),
    "line": (100, 100, (1,), "float32", (1,), None),
    "xor": (400, 400, (2,), "float32", (1,), None),
}


def test_every_source_is_tested():
    assert set(SOURCES) == {*SHAPES, "pydoc", "npz"}


@pytest.mark.parametrize("source", SHAPES)
def test_bundled_sources(source):
    samples, tests, x, dtype, y, classes = SHAPES[source]
    data = load(source)
    assert len(data.validation["y"]) == round(samples / 10)
    for split, size in ((data.train, samples - round(samples / 10)), (data.test, tests)):
        assert split["x"].shape == (size, *x)
        assert split["x"].dtype == dtype
        assert split["y"].shape == (size, *y)
        assert split["y"].dtype == ("float32" if classes is None else "int32")
        assert list(split) == (["x", "lengths", "y"] if source == "japanese_vowels" else ["x", "y"])
    assert data.classes == classes
    assert data.note


def test_no_source_is_imported_before_it_is_asked_for():
    late = ("sklearn", "grain", "pydoc_data", "flax")
    code = f"import prune_jax.datasets, sys; print([name for name in {late} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("source", "digest"),
    [
        ("mnist5k", "c451ba1f7884"),
        ("japanese_vowels", "ceec29188417"),
    ],
)
def test_golden_digests(source, digest):
    assert load(source).digest.startswith(digest)


def test_digest_by_hand():
    data = load("tests.samples.sources:arrays")
    expected = hashlib.sha256(b"classes=4\n")
    for name in ("x_train", "y_train", "x_test", "y_test"):
        split = load("tests.samples.sources:arrays", validation=0)
        array = getattr(split, name[2:])[name[0]]
        expected.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    assert data.digest == expected.hexdigest()
    assert data.note == "made up"


def test_digest_changes_with_the_data_and_not_with_the_split():
    same = {load("line", validation=v, fold=f).digest for v, f in ((0.1, None), (0.5, None), (0.1, (0, 3)))}
    others = {load("line", args=args).digest for args in ({"seed": 1}, {"points": 99}, {"noise": 0.2}, {"slope": 2})}
    assert len(same) == 1
    assert len(same | others) == 5


def test_ranges():
    for source in ("mnist5k", "digits"):
        data = load(source)
        assert data.train["x"].min() == data.test["x"].min() == 0
        assert data.train["x"].max() == data.test["x"].max() == 1
    vowels = load("japanese_vowels", validation=0)
    assert (vowels.train["lengths"].min(), vowels.train["lengths"].max()) == (7, 26)
    assert (vowels.test["lengths"].min(), vowels.test["lengths"].max()) == (7, 29)
    padded = np.arange(29)[None, :] >= vowels.test["lengths"][:, None]
    assert not vowels.test["x"][padded].any()
    assert vowels.test["x"][~padded].all(axis=-1).mean() > 0.9


@pytest.mark.parametrize("source", ["breast_cancer", "diabetes"])
def test_tables_are_standardised_by_train(source):
    data = load(source, validation=0)
    parts = ["x"] if source == "breast_cancer" else ["x", "y"]
    for part in parts:
        np.testing.assert_allclose(data.train[part].mean(0), 0, atol=1e-6)
        np.testing.assert_allclose(data.train[part].std(0), 1, atol=1e-5)
        assert not np.allclose(data.test[part].mean(0), 0, atol=1e-6)


def test_line_has_its_slope():
    data = load("line", args={"points": 1000, "slope": -2.0, "noise": 0.5}, validation=0)
    x, y = data.train["x"][:, 0], data.train["y"][:, 0]
    slope, intercept = np.polyfit(x, y, 1)
    assert slope == pytest.approx(-2, abs=0.1)
    assert intercept == pytest.approx(0, abs=0.1)
    assert (y - slope * x).std() == pytest.approx(0.5, abs=0.05)
    assert not np.array_equal(x, data.test["x"][:, 0])


def test_xor_without_noise():
    data = load("xor", args={"points": 4, "noise": 0.0}, validation=0)
    np.testing.assert_array_equal(data.train["x"], [[0, 0], [0, 1], [1, 0], [1, 1]])
    np.testing.assert_array_equal(data.train["y"], [[0], [1], [1], [0]])


def test_pydoc_windows_are_of_the_text_and_do_not_overlap_the_test_split():
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))[:5000]
    data = load("pydoc", args={"limit": 5000, "context": 16, "stride": 4}, validation=0)
    assert data.classes == 97
    assert data.train["x"].shape[1:] == (16,)
    assert data.train["x"].dtype == data.train["y"].dtype == np.int32

    def decode(tokens):
        return "".join("\n" if t == 0 else chr(t + 31) if t < 96 else "?" for t in tokens)

    plain = "".join(c if c == "\n" or " " <= c <= "~" else "?" for c in text)
    for split in (data.train, data.test):
        for window, following in list(zip(split["x"], split["y"], strict=True))[::50]:
            assert decode([*window, following]) in plain
    boundary = plain.index(decode(data.test["x"][0]) + decode([data.test["y"][0]]))
    last = (len(data.train["x"]) - 1) * 4
    assert decode(data.train["x"][-1]) == plain[last : last + 16]
    assert last + 16 < boundary
    assert len(data.test["x"]) == pytest.approx(len(data.train["x"]) / 4, rel=0.05)
    whole = load("pydoc", args={"limit": 5000})
    assert whole.train["x"].shape[1] == 32


# --- splits


@pytest.mark.parametrize("samples", [10, 101, 997])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.9, 0.999])
def test_hold_out_is_disjoint_complete_and_stratified(samples, fraction):
    y = np.random.default_rng(1).integers(0, 5, samples)
    kept, held_out = hold_out(y, fraction)
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held_out])), np.arange(samples))
    assert len(held_out) == (min(max(round(fraction * samples), 1), samples - 1) if fraction else 0)
    for label in range(5):
        share = len(held_out) / samples * (y == label).sum()
        assert abs((y[held_out] == label).sum() - share) <= 1
    np.testing.assert_array_equal(held_out, hold_out(y, fraction)[1])


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "numbers"])
def test_folds_partition(labels):
    y = np.random.default_rng(1).integers(0, 5, 103)
    y = y if labels else y.astype(np.float32)[:, None]
    folds = [fold_of(y, (i, 4)) for i in range(4)]
    np.testing.assert_array_equal(np.sort(np.concatenate([held_out for _, held_out in folds])), np.arange(103))
    for kept, held_out in folds:
        assert len(held_out) in (25, 26)
        assert not set(kept) & set(held_out)
        assert len(kept) + len(held_out) == 103
        if labels:
            for label in range(5):
                assert abs((y[held_out] == label).sum() - (y == label).sum() / 4) <= 1


def test_splits_stay_what_they_are():
    assert spread(np.zeros(8, np.int64)).tolist() == [6, 2, 1, 7, 3, 0, 5, 4]
    assert hold_out(np.arange(20) % 4, 0.2)[1].tolist() == [6, 11, 13, 16]
    assert fold_of(np.arange(12) % 3, (1, 4))[1].tolist() == [2, 9, 10]


def test_validation_and_folds_come_out_of_train():
    whole = load("japanese_vowels", validation=0)
    assert whole.validation is None
    for options in ({"validation": 0.2}, {"fold": (1, 5)}):
        data = load("japanese_vowels", **options)
        for part in ("x", "y", "lengths"):
            both = np.concatenate([data.train[part], data.validation[part]])
            assert sorted(row.tobytes() for row in both) == sorted(row.tobytes() for row in whole.train[part])
            np.testing.assert_array_equal(data.test[part], whole.test[part])
        assert np.bincount(data.validation["y"]).tolist() == [6] * 9


# --- files and functions of the user's


GOOD = {
    "x_train": np.zeros((6, 4, 2)),
    "y_train": np.array([0, 1, 2, 0, 1, 2]),
    "x_test": np.zeros((3, 4, 2)),
    "y_test": np.array([2, 1, 0]),
    "len_train": np.array([1, 2, 3, 4, 4, 4]),
    "len_test": np.array([4, 4, 4]),
}


def at(array, place, value):
    array = np.array(array)
    array[place] = value
    return array


def test_npz(tmp_path):
    np.savez(tmp_path / "d.npz", **GOOD)
    data = load("npz", path=str(tmp_path / "d.npz"), validation=0.5)
    assert {name: array.dtype.name for name, array in data.train.items()} == {
        "x": "float32",
        "lengths": "int32",
        "y": "int32",
    }
    assert data.classes == 3
    assert data.note == "d.npz"
    assert len(data.train["lengths"]) == len(data.validation["lengths"]) == 3


def test_forms_that_are_brought_into_one(tmp_path):
    tokens = GOOD | {"x_train": np.ones((6, 4), np.uint16), "x_test": np.ones((3, 4), np.uint16)}
    numbers = GOOD | {"y_train": np.arange(6.0), "y_test": np.arange(3, dtype=np.float16)}
    flags = GOOD | {"y_train": np.arange(6) % 2 == 0, "y_test": np.zeros(3, bool)}
    for name, arrays in (("tokens", tokens), ("numbers", numbers), ("flags", flags)):
        np.savez(tmp_path / f"{name}.npz", **arrays)
    tokens, numbers, flags = (
        load("npz", path=str(tmp_path / f"{name}.npz"), validation=0) for name in ("tokens", "numbers", "flags")
    )
    assert tokens.train["x"].dtype == np.int32
    assert numbers.classes is None
    assert (numbers.train["y"].shape, numbers.test["y"].dtype) == ((6, 1), np.float32)
    assert (flags.classes, flags.train["y"].tolist()) == (2, [1, 0, 1, 0, 1, 0])


BAD = {
    "missing array": (
        {"x_test": None},
        "array 'x_test' is missing (found: x_train, y_train, y_test, len_train, len_test",
    ),
    "misspelt array": (
        {"y_test": None, "ytest": np.zeros(3)},
        "array 'y_test' is missing; did you mean 'ytest'? (found: x_train, ",
    ),
    "one length": ({"len_test": None}, "array 'len_test' is missing"),
    "stranger": (
        {"len_train": None, "len_test": None, "length_train": np.ones(6)},
        "array 'length_train' is not known; did you mean 'len_train'? (allowed: x_train, y_train, len_train, x_test",
    ),
    "objects": (
        {"x_train": np.array([[1, 2], [3]], object)},
        "array 'x_train' holds Python objects, which are not read since unpickling runs code; save it as a plain array",
    ),
    "strings": ({"y_train": np.array(list("abcabc"))}, "array 'y_train' is of dtype <U1; only floats and integers"),
    "complex": ({"x_train": np.zeros((6, 4, 2), complex)}, "array 'x_train' is of dtype complex128"),
    "empty": ({"x_test": np.zeros((0, 4, 2)), "y_test": np.zeros(0)}, "array 'x_test' is empty, [0, 4, 2]"),
    "flat x": ({"x_train": np.zeros(6)}, "array 'x_train' is [6], but must be [samples, ...]"),
    "unequal": (
        {"y_train": np.zeros(5, int)},
        "'x_train' holds 6 samples but 'y_train' 5; each sample needs its own",
    ),
    "unequal lengths": ({"len_test": np.ones(2, int)}, "'x_test' holds 3 samples but 'len_test' 2"),
    "shapes": (
        {"x_test": np.zeros((3, 4, 3))},
        "'x_train' is float32 [6, 4, 2] but 'x_test' is float32 [3, 4, 3]; they may differ in the number of samples",
    ),
    "kinds": ({"y_test": np.zeros(3)}, "'y_train' is int32 [6] but 'y_test' is float32 [3, 1]"),
    "nan in x": (
        {"x_train": at(GOOD["x_train"], (2, 1, 0), np.nan)},
        "1 of 48 values in 'x_train' are not finite in float32, the first: x_train[2, 1, 0] = nan. "
        "Remove these samples, or fill the values in",
    ),
    "infinity in y": ({"y_train": at(np.zeros(6), 4, -np.inf)}, "the first: y_train[4, 0] = -inf"),
    "too large": ({"x_test": at(GOOD["x_test"], (0, 0, 1), 1e300)}, "the first: x_test[0, 0, 1] = 1e+300"),
    "pixels": (
        {"x_train": np.zeros((6, 4, 2), np.uint8)},
        "array 'x_train' is uint8, which may be pixels or tokens; save pixels as float32 (divided by 255), tokens",
    ),
    "negative token": ({"x_train": at(np.zeros((6, 4), int), (1, 3), -2)}, "x_train[1, 3] = -2, but integers in x are"),
    "huge token": (
        {"x_train": at(np.zeros((6, 4), int), (1, 3), 2**40)},
        "x_train[1, 3] = 1099511627776, which does not",
    ),
    "one-hot": (
        {"y_train": np.eye(6, dtype=int)},
        "array 'y_train' holds integers [6, 6], but labels are [samples]; of one",
    ),
    "negative label": (
        {"y_train": at(GOOD["y_train"], 3, -1)},
        "y_train[3] = -1, but labels start at 0. Number the classes from 0, or make y floats",
    ),
    "labels from 1": (
        {"y_train": GOOD["y_train"] + 1, "y_test": GOOD["y_test"] + 1},
        "no label in 'y_train' is 0, though they go from 1 to 3. Number the classes from 0, or make y floats if",
    ),
    "gap": ({"y_train": np.array([0, 1, 3, 0, 1, 3])}, "no label in 'y_train' is 2, though they go from 0 to 3"),
    "unseen label": (
        {"y_test": np.array([0, 12, 1])},
        "y_test[1] = 12, but the labels of 'y_train' go from 0 to 2",
    ),
    "length 0": (
        {"len_train": at(GOOD["len_train"], 2, 0)},
        "len_train[2] = 0, but lengths are 1 to 4, the steps of x",
    ),
    "length beyond": ({"len_test": at(GOOD["len_test"], 1, 5)}, "len_test[1] = 5, but lengths are 1 to 4"),
    "float lengths": ({"len_train": np.ones(6)}, "array 'len_train' is float64 [6], but must be integers [samples]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arrays_are_told(case, tmp_path):
    changes, text = BAD[case]
    path = str(tmp_path / "d.npz")
    np.savez(path, **{name: array for name, array in (GOOD | changes).items() if array is not None})
    with pytest.raises(UserMistake) as told:
        load("npz", path=path)
    assert str(told.value).startswith(f"data 'npz' at {path}: ")
    assert text in str(told.value)


def test_bad_files_are_told(tmp_path):
    np.savez(tmp_path / "d.npz", **GOOD)
    whole = (tmp_path / "d.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:500])
    (tmp_path / "text.npz").write_text("x,y\n1,2\n")
    position = whole.index(b"y_test.npy") + 150
    (tmp_path / "bent.npz").write_bytes(whole[:position] + b"\x55" + whole[position + 1 :])
    for name, text in {
        "dd.npz": f"there is no such file; did you mean 'd.npz'? (looked in {tmp_path})",
        "no/where.npz": f"there is no such file (looked in {tmp_path / 'no'})",
        ".": "is a folder; name the .npz file in it",
        "cut.npz": "is not an .npz archive, or was cut off; write it with numpy.savez(path, x_train=..., ...)",
        "text.npz": "is not an .npz archive",
        "bent.npz": "array 'y_test' is damaged (Bad CRC-32 for file 'y_test.npy'); write the file again",
    }.items():
        with pytest.raises(UserMistake, match=re.escape(text)):
            load("npz", path=str(tmp_path / name))


MISTAKES = {
    "unknown": (("mnist5", {}), "data source 'mnist5' is not known; did you mean 'mnist5k'? (known: mnist5k, japanese"),
    "no path": (("npz", {}), "data 'npz': the argument 'path' is missing (accepted: path)"),
    "a path too many": (("digits", {"path": "d.npz"}), "'path' is not an argument (accepted: none)"),
    "argument": (
        ("line", {"args": {"slop": 2}}),
        "data 'line': 'slop' is not an argument; did you mean 'slope'? (accepted: points, slope, noise, distractors, seed)",  # noqa: E501
    ),
    "points": (("xor", {"args": {"points": 0}}), "data 'xor': points = 0: must be an integer from 1 to 10,000,000"),
    "noise": (("line", {"args": {"noise": -1}}), "noise = -1: must be a number, at least 0"),
    "seed": (("line", {"args": {"seed": -1}}), "seed = -1: must be an integer from 0 to 2**32 - 1"),
    "context": (("pydoc", {"args": {"context": 0}}), "context = 0: must be a positive integer"),
    "limit": (("pydoc", {"args": {"limit": 50}}), "limit = 50: 50 characters are too few for windows of 32"),
    "validation": (
        ("line", {"validation": 1.0}),
        "validation = 1.0: must be at least 0 and below 1, a fraction of train",
    ),
    "fold": (
        ("line", {"fold": (3, 3)}),
        "fold = [3, 3]: must be [i, k] with 0 <= i < k and 2 <= k <= 100, the training samples",
    ),
    "nothing to split": (("line", {"args": {"points": 1}}), "1 sample cannot be split; set `validation: 0`"),
    "module": (("tests.samples.source:arrays", {}), "could not be imported: no module 'tests.samples.source'"),
    "function": (("tests.samples.sources:array", {}), "has no 'array'; did you mean 'arrays'?"),
    "no function": (("tests.samples.sources:NOT_A_FUNCTION", {}), "is of type int, not a function that answers data"),
    "a list": (
        ("tests.samples.sources:a_list", {}),
        "answers a value of type list; it must answer a dict of arrays, or of Grain datasets",
    ),
    "too few classes": (("tests.samples.sources:arrays", {"args": {"classes": 3}}), "y_train[3] = 3, but classes is 3"),
    "classes": (
        ("tests.samples.sources:arrays", {"args": {"classes": 2.5}}),
        "classes = 2.5: must be a positive integer",
    ),
    "grain: classes": (
        ("tests.samples.sources:grain_without_classes", {}),
        "y holds labels, but not all are read; answer their number under 'classes' too",
    ),
    "grain: endless": (("tests.samples.sources:grain_endless", {}), "'train' repeats without end; leave out repeat()"),
    "grain: iterator": (("tests.samples.sources:grain_iterator", {}), "IterDataset, but must be a grain.MapDataset"),
    "grain: tuples": (
        ("tests.samples.sources:grain_tuples", {}),
        "record 0 of 'train' is tuple; a record is a dict of x, y and",
    ),
    "grain: ragged": (
        ("tests.samples.sources:grain_ragged", {}),
        "the first record of 'train' is shaped {'y': [], 'x': [1]}, the last {'y': [], 'x': [4]}; all must be alike",
    ),
    "grain: name": (("tests.samples.sources:grain_misnamed", {}), "'valid' is not known; did you mean 'validation'?"),
    "grain: label": (("tests.samples.sources:grain_beyond", {}), "y_train[1] = 3, but classes is 3"),
    "grain: fold": (("tests.samples.sources:grain_numbers", {"fold": (0, 21)}), "fold = [0, 21]: must be [i, k] with"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_told(case):
    (source, options), text = MISTAKES[case]
    if case.startswith("grain"):
        pytest.importorskip("grain")
    with pytest.raises(UserMistake, match=re.escape(text)):
        load(source, **options)


def test_classes_stated_by_the_source_need_no_examples():
    assert load("tests.samples.sources:arrays", args={"classes": 9}).classes == 9


def test_check_labels():
    check_labels(load("digits"), "digits")
    text = "data 'line': classification needs integer labels, but y holds floats; save y as int32 class numbers from 0"
    with pytest.raises(UserMistake, match=text):
        check_labels(load("line"), "line")


# --- Grain


def numbers(split):
    return [int(split.dataset[i]["x"][0]) for i in range(len(split))]


def test_grain_records_come_in_the_normal_form():
    pytest.importorskip("grain")
    data = load("tests.samples.sources:grain_numbers", validation=0)
    assert isinstance(data.train, GrainSplit)
    assert data.validation is None
    assert (len(data.train), len(data.test), data.classes, data.note) == (20, 6, 4, "counted")
    record = data.train.dataset[5]
    assert list(record) == ["x", "y"]
    assert (record["x"].dtype, record["y"].dtype, record["y"].shape) == (np.float32, np.int32, ())
    series = load("tests.samples.sources:grain_series", validation=0)
    record = series.train.dataset[0]
    assert {name: (value.dtype.name, value.shape) for name, value in record.items()} == {
        "x": ("float32", (3, 2)),
        "lengths": ("int32", ()),
        "y": ("float32", (1,)),
    }
    assert list(record) == ["x", "lengths", "y"]
    assert series.classes is None


def test_grain_batches_in_order_for_evaluation():
    pytest.importorskip("grain")
    split = load("tests.samples.sources:grain_numbers", validation=0).train
    batches = list(split.batches(8))
    assert [len(batch["y"]) for batch in batches] == [8, 8, 4]
    assert np.concatenate([batch["x"][:, 0] for batch in batches]).tolist() == list(range(20))
    assert [batch["y"].tolist() for batch in split.batches(8, start=2)] == [[0, 1, 2, 3]]


def test_grain_training_goes_on_from_any_step():
    pytest.importorskip("grain")
    split = load("tests.samples.sources:grain_numbers", validation=0).train

    def order(seed, start, count):
        stream = split.batches(6, seed=seed, start=start)
        return [batch["x"][:, 0].astype(int).tolist() for batch in itertools.islice(stream, count)]

    whole = order(7, 0, 12)  # three batches an epoch: four epochs
    assert all(len(batch) == 6 for batch in whole)
    for start in (1, 3, 5, 11):
        assert order(7, start, 12 - start) == whole[start:]
    epochs = [[*itertools.chain(*whole[i : i + 3])] for i in range(0, 12, 3)]
    assert all(len(set(epoch)) == 18 for epoch in epochs)  # each record at most once an epoch
    assert len({tuple(epoch) for epoch in epochs}) == 4  # each epoch in an order of its own
    assert order(8, 0, 3) != whole[:3]
    assert order(2**40 + 7, 0, 1) == whole[:1]  # seeds of any size


def test_grain_validation_and_folds_partition_train():
    pytest.importorskip("grain")
    for options in ({"validation": 0.25}, {"validation": 0.9}):
        data = load("tests.samples.sources:grain_numbers", **options)
        assert sorted(numbers(data.train) + numbers(data.validation)) == list(range(20))
        assert len(data.validation) == 20 * options["validation"]
    for folds in (2, 3, 20):
        held_out = []
        for index in range(folds):
            data = load("tests.samples.sources:grain_numbers", fold=(index, folds))
            assert sorted(numbers(data.train) + numbers(data.validation)) == list(range(20))
            held_out += numbers(data.validation)
            assert numbers(data.test) == list(range(100, 106))
        assert sorted(held_out) == list(range(20))
    own = load("tests.samples.sources:grain_numbers", args={"validation": 3})
    assert numbers(own.validation) == [200, 201, 202]
    assert numbers(own.train) == list(range(20))


def test_grain_digest_follows_size_and_arguments():
    pytest.importorskip("grain")
    digests = [
        load("tests.samples.sources:grain_numbers", args=args, validation=validation).digest
        for args, validation in (({}, 0.1), ({}, 0.2), ({"train": 21}, 0.1), ({"validation": 3}, 0.1))
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_missing_grain_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(UserMistake, match=re.escape("Grain is not installed: pip install 'prune-jax[grain]'")):
        load("tests.samples.sources:grain_numbers")
