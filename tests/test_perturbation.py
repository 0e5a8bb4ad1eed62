"""Perturbed batches, and scores of them, in plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prune_jax as pj
from prune_jax.errors import UserMistake
from prune_jax.preparation import prepare
from prune_jax.recipe import read_recipe
from tests.compiling import compilations
from tests.plain import PRUNE, TRAIN, arrays, run_plain, tiny

W = np.array([[1.0], [-2.0], [0.5]], np.float32)


def loss(params, batch):
    return jnp.mean(jnp.square(batch["x"] @ params["w"] - batch["y"])) / 2


@pytest.fixture
def batches():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return [{"x": draw(n, 3), "y": draw(n, 1)} for n in (4, 4, 2)]


def uphill(x, y):
    return (x @ W - y) @ W.T


def test_fgsm_steps_along_the_sign_of_the_gradient(batches):
    params = {"w": jnp.asarray(W)}
    for given, found in zip(batches, pj.perturbed(batches, "fgsm", 0.1, loss=loss, params=params), strict=True):
        np.testing.assert_allclose(found["x"], given["x"] + 0.1 * np.sign(uphill(given["x"], given["y"])), rtol=1e-6)
        np.testing.assert_array_equal(found["y"], given["y"])


def test_pgd_goes_back_into_the_box_and_hurts_no_less_than_fgsm(batches):
    params = {"w": jnp.asarray(W)}
    attack = {k: list(pj.perturbed(batches, k, 0.3, loss=loss, params=params, steps=4)) for k in ("fgsm", "pgd")}
    for i, given in enumerate(batches):
        x = given["x"]
        for _ in range(4):
            stepped = x + 2.5 * 0.3 / 4 * np.sign(uphill(x, given["y"]))
            x = np.clip(stepped, given["x"] - np.float32(0.3), given["x"] + np.float32(0.3))
        np.testing.assert_allclose(attack["pgd"][i]["x"], x, rtol=1e-5)
        assert loss(params, attack["pgd"][i]) >= loss(params, attack["fgsm"][i]) - 1e-5 > loss(params, given)


def test_noise_has_its_spread_comes_from_the_key_and_differs_between_batches():
    zeros = [{"x": np.zeros((200, 50), np.float32)}] * 2
    one, two = pj.perturbed(zeros, "gaussian", 0.2, key=jax.random.key(0))
    assert abs(float(jnp.std(one["x"])) - 0.2) < 0.005
    assert abs(float(jnp.mean(one["x"]))) < 0.01
    assert not np.any(one["x"] == two["x"])
    again, _ = pj.perturbed(zeros, "gaussian", 0.2, key=jax.random.key(0))
    np.testing.assert_array_equal(one["x"], again["x"])


@pytest.mark.parametrize("criterion", ["snip", "grasp", "fisher"])
def test_criteria_score_what_is_perturbed(batches, criterion):
    """The attack is no part of what is differentiated."""
    params = {"w": jnp.asarray(W)}
    disturbed = pj.perturbed(batches, "fgsm", 0.1, loss=loss, params=params)
    by_hand = [{**b, "x": b["x"] + 0.1 * np.sign(uphill(b["x"], b["y"]))} for b in batches]
    found = pj.score(criterion, params, loss=loss, batches=disturbed)["w"]
    np.testing.assert_allclose(found, pj.score(criterion, params, loss=loss, batches=by_hand)["w"], rtol=1e-4)
    assert np.any(found != pj.score(criterion, params, loss=loss, batches=batches)["w"])


def test_a_second_reading_compiles_nothing(batches):
    params = {"w": jnp.asarray(W)}
    list(pj.perturbed(batches, "pgd", 0.1, loss=loss, params=params))
    newer = {"w": 2 * params["w"]}
    with compilations() as seconds:
        list(pj.perturbed(batches, "pgd", 0.2, loss=loss, params=newer))
    assert not seconds


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("fgms", 0.1), "perturbation 'fgms' is not known; did you mean 'fgsm'? (known: fgsm, pgd, gaussian)"),
        (("fgsm", 0), "epsilon = 0: must be above 0, in units of the inputs"),
        (("fgsm", 0.1), "perturbation 'fgsm' needs gradients: give loss=, (params, batch) -> scalar, and params=."),
        (("gaussian", 0.1), "gaussian perturbation draws random numbers: give key=, such as jax.random.key(0)."),
    ],
    ids=str,
)
def test_mistakes(words, message):
    with pytest.raises(UserMistake) as caught:
        pj.perturbed([], *words)
    assert str(caught.value) == message


def test_tokens_cannot_be_perturbed():
    with pytest.raises(UserMistake, match=r"no floating array of the batch fits 'x' \(arrays: x int32\)"):
        list(pj.perturbed([{"x": jnp.arange(3)}], "gaussian", 0.1, key=jax.random.key(0)))


def test_a_batch_read_but_once_is_told(batches):
    disturbed = pj.perturbed(iter(batches), "fgsm", 0.1, loss=loss, params={"w": jnp.asarray(W)})
    with pytest.raises(UserMistake, match="the Hessian times the gradient takes a second pass over the batches"):
        pj.score("grasp", {"w": jnp.asarray(W)}, loss=loss, batches=disturbed)


FGSM = {"kind": "fgsm", "epsilon": 0.3}


def test_a_recipe_scores_under_attack(store):
    scores = {}
    for name, perturbation in {"plain": None, "fgsm": FGSM, "noise": {"kind": "gaussian", "epsilon": 0.3}}.items():
        criterion = {"name": "snip", "perturbation": perturbation}
        _, results = run_plain(tiny(train=TRAIN, score={"kind": "score", "criterion": criterion}), store)
        scores[name] = arrays(store, results["score"])["scores/hidden_0/kernel"]
    assert np.any(scores["plain"] != scores["fgsm"])
    assert np.any(scores["plain"] != scores["noise"])


def test_only_noise_depends_on_the_seed():
    def key(perturbation, seed):
        stages = {"train": {**TRAIN, "seed": 0}, "prune": {**PRUNE, "seed": seed}}
        stages["prune"]["criterion"] = {"name": "snip", "perturbation": perturbation}
        return prepare(read_recipe(tiny(**stages))).calls[-1].key

    assert key(FGSM, 0) == key(FGSM, 1)
    assert key(None, 0) == key(None, 1) != key(FGSM, 0)
    noise = {"kind": "gaussian", "epsilon": 0.3}
    assert key(noise, 0) != key(noise, 1)


def test_a_criterion_that_looks_at_no_data_is_refused():
    prune = {**PRUNE, "criterion": {"name": "magnitude", "perturbation": FGSM}}
    with pytest.raises(UserMistake, match=r"perturbation = .*: magnitude looks at no data; leave it out, or choose"):
        prepare(read_recipe(tiny(train=TRAIN, prune=prune)))
