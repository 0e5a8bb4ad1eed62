"""Criteria of whole units, held against what is plain by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prune_jax as pj
from prune_jax.checkpoints import Store
from prune_jax.criteria import CRITERIA
from prune_jax.errors import UserMistake
from prune_jax.group_scoring import score_groups
from tests.plain import EVALUATE, TRAIN, arrays, run_plain, tiny

RNG = np.random.default_rng(0)


def apply(params, x):
    hidden = x @ params["in"]["kernel"] * params["norm"]["scale"][None]
    return jax.nn.relu(hidden) @ params["out"]["kernel"]


@pytest.fixture
def params():
    def draw(*shape):
        return jnp.asarray(RNG.normal(size=shape), jnp.float32)

    return {"in": {"kernel": draw(4, 5)}, "norm": {"scale": draw(5)}, "out": {"kernel": draw(5, 3)}}


BATCHES = [
    {"x": jnp.asarray(RNG.normal(size=(n, 4)), jnp.float32), "y": jnp.asarray(RNG.normal(size=(n, 3)), jnp.float32)}
    for n in (6, 4)
]


def loss(params, batch):
    return jnp.mean(jnp.square(apply(params, batch["x"]) - batch["y"]))


def scores(name, params, **given):
    net = pj.trace(apply, params, BATCHES[0]["x"])
    (found,) = score_groups(net, CRITERIA[name], params, **given).values()
    return net, found


def test_a_norms_scale_is_the_score_of_its_channel(params):
    _, found = scores("bn_scale", params)
    np.testing.assert_allclose(found, np.abs(params["norm"]["scale"]))


def test_a_network_without_a_norm_has_no_scales():
    params = {"in": {"kernel": jnp.ones((4, 5))}, "out": {"kernel": jnp.ones((5, 3))}}
    net = pj.trace(lambda p, x: jax.nn.relu(x @ p["in"]["kernel"]) @ p["out"]["kernel"], params, jnp.ones((2, 4)))
    with pytest.raises(UserMistake, match="no group goes through a norm with a scale"):
        score_groups(net, CRITERIA["bn_scale"], params)


def test_what_others_stand_for_scores_lowest(params):
    kernel, out = np.array(params["in"]["kernel"]), np.array(params["out"]["kernel"])
    kernel[:, 3], out[3] = kernel.mean(axis=1), out.mean(axis=0)  # in the middle of all others
    params["in"]["kernel"], params["out"]["kernel"] = jnp.asarray(kernel), jnp.asarray(out)
    _, found = scores("fpgm", params)
    w = np.concatenate([kernel.T, out], axis=1)
    expected = [sum(np.linalg.norm(w[i] - w[j]) for j in range(5)) for i in range(5)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert found.argmin() == 3


def test_the_oracle_is_the_loss_without_the_unit(params):
    net, found = scores("oracle", params, loss=loss, batches=iter(BATCHES))
    (name,) = net.groups

    def total(p):
        return (6 * loss(p, BATCHES[0]) + 4 * loss(p, BATCHES[1])) / 10

    for unit in range(5):
        without = pj.apply_masks(params, net.masks({name: [unit]}))
        assert found[unit] == pytest.approx(float(total(without) - total(params)), rel=1e-3, abs=1e-5)


def test_taylor_of_a_unit_is_the_square_of_its_sum(params):
    _, found = scores("taylor", params, loss=loss, batches=iter(BATCHES))
    expected = np.zeros(5)
    for batch, count in zip(BATCHES, (6, 4), strict=True):
        g = jax.grad(loss)(params, batch)
        terms = jax.tree.map(lambda g, w: np.asarray(g * w), g, params)
        expected += count * np.square(terms["in"]["kernel"].sum(0) + terms["out"]["kernel"].sum(1)) / 10
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize(
    "criterion", [pytest.param(name, marks=pytest.mark.slow) for name in ("bn_scale", "fpgm", "synflow")] + ["oracle"]
)
def test_a_recipe_prunes_by_them(tmp_path, criterion):
    model = {"kind": "mlp", "widths": [8, 6], "batch_norm": True}
    prune = {"kind": "prune", "criterion": criterion, "granularity": "group", "target": {"sparsity": 0.5}}
    stages = {"train": TRAIN, "prune": prune, "compact": {"kind": "compact"}, "evaluate": {**EVALUATE, "of": "compact"}}
    _, results = run_plain(tiny(model=model, **stages), Store(tmp_path / "store"))
    groups = results["compact"].metrics["groups"].values()
    assert sum(group["dead"] for group in groups) == 7


def test_weights_are_not_scored_by_what_only_units_have(params):
    with pytest.raises(UserMistake, match=r"granularity 'weight' is not possible here \(allowed: group\)"):
        pj.score("fpgm", params)


BY_HAND = {
    "sum": np.sum,
    "mean": np.mean,
    "l1": lambda s: np.abs(s).sum(),
    "l2": lambda s: np.sqrt(np.square(s).sum()),
    "max": np.max,
}


@pytest.mark.parametrize("combine", BY_HAND)
@pytest.mark.parametrize("criterion", ["magnitude", "sensitivity", "taylor"])
def test_the_scores_of_a_units_weights_are_combined_as_one_wants(params, criterion, combine):
    given = {"loss": loss, "batches": BATCHES} if criterion != "magnitude" else {}
    weights = pj.score(criterion, params, **given)
    kernel, out = np.asarray(weights["in"]["kernel"]), np.asarray(weights["out"]["kernel"])
    expected = [BY_HAND[combine](np.concatenate([kernel[:, u], out[u]])) for u in range(5)]
    np.testing.assert_allclose(scores(criterion, params, combine=combine, **given)[1], expected, rtol=1e-5)
    if criterion != "taylor":
        found = pj.score(criterion, params, granularity="neuron", combine=combine, **given)["in"]["kernel"]
        np.testing.assert_allclose(found, [BY_HAND[combine](kernel[:, u]) for u in range(5)], rtol=1e-5)
        found = pj.score(criterion, params, granularity={"block": [4, 2]}, combine=combine, **given)["in"]["kernel"]
        np.testing.assert_allclose(found[0, 0], BY_HAND[combine](kernel[:, :2]), rtol=1e-5)


def test_a_recipe_combines_as_it_says(tmp_path):
    stages = {"train": TRAIN, "score": {"kind": "score", "granularity": "group", "criterion": {"name": "magnitude"}}}
    found = []
    for combine in (None, "mean"):
        stages["score"]["criterion"] = {"name": "magnitude"} | ({"combine": combine} if combine else {})
        _, results = run_plain(tiny(**stages), Store(tmp_path))
        found.append(arrays(Store(tmp_path), results["score"])["scores/params/hidden_0.out"])
    np.testing.assert_allclose(found[0] / found[1], found[0][0] / found[1][0], rtol=1e-5)  # 4 inputs + 3 outputs
    assert found[0][0] / found[1][0] == pytest.approx(7)
    stages["score"]["criterion"] = {"name": "fpgm", "combine": "mean"}
    with pytest.raises(UserMistake, match=r"criterion.combine = 'mean': criterion 'fpgm' scores whole units: there is"):
        run_plain(tiny(**stages), Store(tmp_path))
