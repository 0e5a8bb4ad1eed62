"""Numbers that are none: each is named with its stage, step and leaf, or its record, and is never kept as a result."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prune_jax as pj
from prune_jax import stages
from prune_jax.errors import NonFiniteResultError, NonFiniteScoreError, UserMistake
from prune_jax.preparation import prepare
from prune_jax.recipe import read_recipe
from tests.plain import PRUNE, TRAIN, run_plain, tiny

LINEAR = {"kind": "linear"}
LOOK = {"kind": "evaluate", "of": "train"}


def exploding(rate, steps, model=LINEAR):
    train = {**TRAIN, "steps": steps, "optimizer": {"name": "sgd", "learning_rate": rate}}
    return tiny("numbers", objective="regression", validation=0, model=model, train=train)


CASES = {
    "exploding gradients": (
        exploding(1e10, 12),
        "train",
        ["the loss became ", " at step ", "at learning rate 1e+10 (sgd)", "NaN or infinity stands in "],
    ),
    "a label that is none": (
        tiny("bent_records", validation=0, model=LINEAR, train={**TRAIN, "epochs": 1, "steps": None}),
        "train",
        ["record 17 of 'train': y = -1, but classes is 3, and labels start at 0. Leave the record out, or mend it"],
    ),
    "nan in the test data": (
        tiny(
            "bent_records",
            validation=0,
            model=LINEAR,
            train={**TRAIN, "steps": 1},
            look=LOOK,
        ),
        "look",
        ["record 5 of 'test': x[2] = nan, is not finite in float32. Leave the record out, or mend it"],
    ),
    "half precision": (
        exploding(1e4, 6, {"kind": "tests.samples.nets:Half"}),
        "train",
        ["became ", " at step ", " of 6", "NaN or infinity stands in output/"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_number_is_named_and_never_kept(case, store, monkeypatch):
    monkeypatch.setattr("prune_jax.training.BEAT_SECONDS", 1e9)  # looked at in the end: a look midway finds less broken
    raw, stage, texts = CASES[case]
    if "bent" in raw["data"]["source"]:
        pytest.importorskip("grain")
        raw["data"]["args"] = {"label": stage == "train"}
    for _ in range(2):  # nothing of it is cached
        _, results = run_plain(raw, store, name_failures=False)
        assert results[stage].status == "failed"
        for text in texts:
            assert text in results[stage].message, results[stage].message
        assert store.meta(results[stage].ref) is None


def test_results_that_are_no_numbers_are_not_kept():
    """Whatever a stage comes to is looked at before it is kept."""
    call = prepare(read_recipe(tiny(validation=0, model=LINEAR, train=TRAIN))).calls[0]
    arrays = {
        "params": {"a": np.ones(3), "b": np.array([[1, np.inf]], np.float16)},
        "state": {"least": np.float32(np.inf)},
    }
    with pytest.raises(NonFiniteResultError) as caught:
        stages._check_numbers(call, arrays, {})
    assert str(caught.value).startswith("train made inf in params/b [1, 2], first at [0, 1]; it is not kept. ")
    with pytest.raises(NonFiniteResultError, match="train measured loss = nan; it is not kept"):
        stages._check_numbers(call, {}, {"steps": 3, "loss": float("nan")})


def loss(params, batch):
    return jnp.mean((batch["x"] @ params["w"]) ** 2)


ONES = {"w": jnp.ones((4, 3))}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_batch_that_is_no_number_gives_no_scores(bad):
    batches = [{"x": jnp.ones((2, 4))}, {"x": jnp.ones((2, 4)).at[1, 2].set(bad)}]
    with pytest.raises(
        NonFiniteScoreError, match=r"Criterion 'taylor' gave \d+ of 12 non-finite scores in 'w' \[4, 3\]"
    ):
        pj.score("taylor", ONES, loss=loss, batches=batches)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_scores_that_overflow_half_precision_are_named(dtype):
    weights = {"w": jnp.full((4, 3), 1e4, dtype)}
    huge = [{"x": jnp.full((2, 4), jnp.finfo(dtype).max, dtype)}]
    with pytest.raises(NonFiniteScoreError, match="'w'"):
        pj.score("taylor", weights, loss=loss, batches=huge)


@pytest.mark.parametrize("batches", [[], [{"x": jnp.ones((0, 4))}]], ids=["none", "empty"])
def test_no_examples_are_refused(batches):
    with pytest.raises(UserMistake, match="there are no batches to gather statistics from"):
        pj.score("taylor", ONES, loss=loss, batches=batches)


@pytest.mark.parametrize("scope", ["global", "layer", "erk", "lamp"])
@pytest.mark.parametrize("value", [0.0, 1.0], ids=["zero", "equal"])
def test_scores_that_are_all_alike_are_pruned_exactly_and_by_position(value, scope):
    masks = pj.mask({"w": jnp.full(6, value)}, sparsity=0.5, scope=scope)
    assert np.asarray(masks["w"]).tolist() == [False] * 3 + [True] * 3


def test_one_example_trains_prunes_and_is_measured(store):
    raw = tiny("one", validation=0, model=LINEAR, objective="regression", train={**TRAIN, "steps": 2}, prune=PRUNE)
    _, results = run_plain(raw, store)
    assert results["prune"].metrics["sparsity"] == pytest.approx(0.5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(store.read(results["train"].ref)[0]["params"]))
