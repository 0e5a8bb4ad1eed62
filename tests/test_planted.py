"""Units of which one knows what they are worth, planted in a network trained on digits: each principle ranks them so.

Redundancy: a twin, and a unit in the middle of all others. Information: units that are dead, constant, or noise.
Forgetting and performance: the one unit that tells a class. Stability: a unit that a breath of noise makes a nuisance.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import prune_jax as pj
from prune_jax.criteria import CRITERIA
from prune_jax.datasets.bundled import digits
from prune_jax.group_scoring import score_groups

LEARNED = range(12)
SOLE, BRITTLE, TWIN, MIDDLE, DEAD, CONSTANT, NOISE = range(12, 19)
IDLE = [DEAD, CONSTANT, NOISE]
LONE, MARKED = 3, 5  # classes: of the unit that alone tells it, and of the one that a faint mark tells
HIDDEN, INPUTS, MARK, RANDOM = 19, 66, 64, 65  # 64 pixels, a mark, a column of noise
FAINT = 0.005


def apply(params, x):
    return jax.nn.relu(x @ params["in"]["kernel"] + params["in"]["bias"][None]) @ params["out"]["kernel"]


def loss(params, batch):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(apply(params, batch["x"]), batch["y"]))


def correct(params, batch):
    return jnp.argmax(apply(params, batch["x"]), axis=1) == batch["y"]


def wiring():
    """Which weights may differ from zero: what only one unit reads, and what is read of it."""
    inward, outward = np.zeros((INPUTS, HIDDEN), bool), np.zeros((HIDDEN, 10), bool)
    inward[:64, LEARNED] = True
    outward[: len(LEARNED)] = True
    outward[:, [LONE, MARKED]] = False
    outward[SOLE, LONE] = outward[BRITTLE, MARKED] = True
    return {"in": {"kernel": inward, "bias": np.isin(np.arange(HIDDEN), LEARNED)}, "out": {"kernel": outward}}


def median(points):
    """The geometric median, by Weiszfeld's iteration."""
    place = points.mean(axis=0)
    for _ in range(300):
        weights = 1 / np.maximum(np.linalg.norm(points - place, axis=1), 1e-9)
        place = weights @ points / weights.sum()
    return place


@pytest.fixture(scope="module")
def planted():
    rng = np.random.default_rng(0)
    data = digits()
    y = data["y_train"].astype(np.int32)
    pixels = data["x_train"].reshape(len(y), 64)
    x = np.concatenate([pixels, FAINT * (y == MARKED)[:, None], rng.normal(size=(len(y), 1))], axis=1).astype(
        np.float32
    )
    there = wiring()
    first = jax.tree.map(lambda m: jnp.asarray(0.15 * rng.normal(size=m.shape) * m, jnp.float32), there)
    first["in"]["bias"] = jnp.asarray(there["in"]["bias"], jnp.float32)  # all begin alive
    ones = np.ones((len(y), 1))
    fit = np.linalg.lstsq(np.concatenate([pixels, ones], axis=1), (y == LONE).astype(float), rcond=None)[0]
    kernel = first["in"]["kernel"].at[:64, SOLE].set(4 * fit[:64]).at[MARK, BRITTLE].set(2 / FAINT)
    first["in"] = {"kernel": kernel, "bias": first["in"]["bias"].at[SOLE].set(4 * fit[64] - 1)}
    first["out"]["kernel"] = first["out"]["kernel"].at[[SOLE, BRITTLE], [LONE, MARKED]].set(4)
    tx, batch = optax.adam(0.01), {"x": x, "y": y}

    def step(_, carry):
        params, state = carry
        gradient = jax.tree.map(jnp.multiply, jax.grad(loss)(params, batch), there)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    trained, _ = jax.jit(partial(jax.lax.fori_loop, 0, 300, step))((first, tx.init(first)))
    inward, bias, out = (np.array(leaf) for leaf in (*reversed(trained["in"].values()), trained["out"]["kernel"]))
    inward[:, TWIN], bias[TWIN] = inward[:, 0], bias[0]
    out[TWIN] = out[0] = out[0] / 2
    bias[DEAD], bias[CONSTANT], inward[RANDOM, NOISE] = -1, 1, 1
    out[IDLE] = 0.01 * rng.normal(size=(3, 10))
    inward[:, MIDDLE], out[MIDDLE] = np.split(
        median(np.delete(np.concatenate([inward.T, out], 1), MIDDLE, 0)), [INPUTS]
    )
    params = {"in": {"kernel": inward, "bias": bias}, "out": {"kernel": out}}
    params = jax.tree.map(jnp.asarray, params)
    assert np.mean(correct(params, batch)) > 0.85
    return params, [{"x": x[i : i + 300], "y": y[i : i + 300]} for i in range(0, len(y), 300)]


def ranked(name, planted, batches=None):
    params, clean = planted
    net = pj.trace(apply, params, clean[0]["x"])
    found = score_groups(net, CRITERIA[name], params, loss=loss, correct=correct, batches=batches or clean)
    return np.asarray(found["in.out"])


def test_redundancy_a_twin_follows_from_the_other(planted):
    found = ranked("correlation", planted)
    assert min(found[0], found[TWIN]) < 1e-4 < max(found[0], found[TWIN])  # one of them is one of its kind
    assert found[[DEAD, CONSTANT]].max() == 0
    assert found[NOISE] > 0.9


def test_redundancy_what_is_in_the_middle_of_all_goes_first(planted):
    found = ranked("fpgm", planted)
    assert found.argmin() == MIDDLE
    params, batches = planted
    alone = jax.tree.map(jnp.asarray, params)
    alone["in"]["kernel"] = alone["in"]["kernel"].at[:, TWIN].set(params["in"]["kernel"][:, 5])  # as far off as another
    apart = ranked("fpgm", (alone, batches))
    assert found[0] < apart[0]  # its twin makes it the less needed


def test_information_is_none_in_what_never_changes_and_little_in_noise(planted):
    said = ranked("apoz", planted)
    assert said[DEAD] == said.min() == 0
    busy = np.setdiff1d(np.flatnonzero(said), IDLE)
    assert len(busy) > 10
    entropy, shared = ranked("entropy", planted), ranked("mutual_information", planted)
    assert max(entropy[[DEAD, CONSTANT]].max(), shared[[DEAD, CONSTANT]].max()) < 1e-12
    assert min(entropy[busy].min(), entropy[NOISE], shared[busy].min(), shared[NOISE]) > 1e-3
    assert entropy[NOISE] > entropy[busy].min()  # it changes all the time, and tells nothing
    assert shared[NOISE] < 0.5 * shared[busy].min()


def test_forgetting_is_of_the_class_that_hangs_on_one_unit(planted):
    found, (_, batches) = ranked("forgetting", planted), planted
    labels = np.concatenate([batch["y"] for batch in batches])
    assert found[SOLE] > 0.8 * (labels == LONE).mean()
    assert found[BRITTLE] > 0.8 * (labels == MARKED).mean()
    assert found[IDLE].max() < 0.01


def test_performance_falls_with_what_a_class_hangs_on_and_not_with_what_idles(planted):
    found = ranked("oracle", planted)
    idle = np.abs(found[IDLE]).max()
    assert found[SOLE] > 20 * idle
    assert np.sort(found[LEARNED])[3:].min() > idle  # a few may have died while they learned


def test_stability_what_noise_makes_a_nuisance_goes_first(planted):
    params, batches = planted
    clean = ranked("oracle", planted)
    noisy = [*pj.perturbed(batches, "gaussian", 0.05, loss=loss, params=params, key=jax.random.key(0))]
    robust = ranked("oracle", planted, noisy)
    assert clean[BRITTLE] > 20 * np.abs(clean[IDLE]).max()
    assert robust.argmin() == BRITTLE
    assert robust[BRITTLE] < 0 < 0.5 * clean[SOLE] < robust[SOLE]
