import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prune_jax.scoring as pj
from prune_jax.errors import UserMistake
from prune_jax.granularity import living_units, unit_scores, weight_masks
from prune_jax.masks import apply_masks

KERNELS = {"dense": (3, 4), "conv": (2, 2, 3, 5), "scale": (6,)}


@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(np.abs(rng.standard_normal(shape)), jnp.float32) for name, shape in KERNELS.items()}


@pytest.mark.parametrize(
    ("combine", "oracle"),
    [
        ("sum", lambda unit: unit.sum()),
        ("l2", lambda unit: np.sqrt((unit**2).sum())),
        ("max", lambda unit: unit.max()),
        ("first", lambda unit: unit[0]),
    ],
)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_neuron_is_a_slice_along_the_last_axis(scores, combine, oracle, transform):
    units = transform(lambda s: unit_scores(s, "neuron", combine=combine))(scores)
    for name, leaf in scores.items():
        rows = np.asarray(leaf).reshape(-1, leaf.shape[-1])
        np.testing.assert_allclose(units[name], [oracle(rows[:, i]) for i in range(leaf.shape[-1])], rtol=1e-6)


def test_masks_of_neurons_cover_their_weights_and_back(scores):
    units = {name: jnp.arange(shape[-1]) % 2 == 0 for name, shape in KERNELS.items()}
    whole = weight_masks(units, scores, "neuron")
    for name, shape in KERNELS.items():
        assert whole[name].shape == shape
        for i in range(shape[-1]):
            assert np.all(np.asarray(whole[name])[..., i] == (i % 2 == 0))
    for name, back in living_units(whole, "neuron").items():
        np.testing.assert_array_equal(back, units[name])


def test_the_bias_dies_with_its_neurons():
    params = {
        "hidden": {"kernel": jnp.array([[1.0, 9.0, 2.0], [1.0, 9.0, 3.0]]), "bias": jnp.ones(3)},
        "norm": {"bias": jnp.ones(3)},
        "out": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)},
    }
    scores = pj.score("magnitude", params, exclude=["out"])
    masks = pj.mask(scores, keep=1, granularity="neuron", params=params)
    np.testing.assert_array_equal(masks["hidden"]["bias"], [False, True, False])
    np.testing.assert_array_equal(masks["hidden"]["kernel"], [[False, True, False]] * 2)
    assert masks["norm"]["bias"] is None
    assert masks["out"] == {"kernel": None, "bias": None}
    x = jnp.array([[0.3, -0.7]])
    layer = apply_masks(params, masks)["hidden"]
    np.testing.assert_array_equal((x @ layer["kernel"] + layer["bias"][None])[:, [0, 2]], [[0.0, 0.0]])

    again = pj.mask(scores, sparsity=0.0, granularity="neuron", params=params, alive=masks)
    np.testing.assert_array_equal(again["hidden"]["bias"], masks["hidden"]["bias"])


def test_without_params_only_kernels_have_masks():
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    masks = pj.mask(pj.score("magnitude", params), keep=2, granularity="neuron")
    assert masks["bias"] is None
    assert masks["kernel"].shape == (2, 3)


@pytest.mark.parametrize(
    ("p", "survivor"), [(1, 0), (2, 1), ("inf", 2), (float("inf"), 2)], ids=["1", "2", "inf", "float inf"]
)
def test_magnitude_of_neurons_by_norm(p, survivor):
    """Three neurons, each the largest in one norm."""
    kernel = jnp.array([[2.0, 3.5, 4.0], [2.0, 2.5, 0.0], [2.0, 0.0, 0.0], [2.0, 0.0, 0.0]])  # L1 8, 6, 4; L2 4, 4.3, 4
    params = {"kernel": kernel}
    scores = pj.score("magnitude", params, granularity="neuron", options={"p": p})
    oracle = np.linalg.norm(np.asarray(kernel), ord=np.inf if p == "inf" else p, axis=0)
    np.testing.assert_allclose(scores["kernel"], oracle, rtol=1e-6)
    masks = pj.mask(scores, keep=1, granularity="neuron", params=params)
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(masks["kernel"])[0]), [survivor])


def test_the_90th_percentile_of_incoming_weights():
    """The seeds' case: importance of a neuron is the sum of its absolute incoming weights."""
    kernel = np.random.default_rng(0).standard_normal((784, 128)).astype(np.float32)
    params = {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(128)}
    masks = pj.mask(pj.score("magnitude", params), percentile=90, granularity="neuron", params=params)
    importance = np.abs(kernel).sum(axis=0)
    np.testing.assert_array_equal(masks["bias"], importance >= np.percentile(importance, 90))
    assert int(np.sum(masks["bias"])) == 13


def test_mistakes():
    with pytest.raises(UserMistake, match=r"granularity 'neurons' is not possible here; did you mean 'neuron'\?"):
        unit_scores({}, "neurons")
    with pytest.raises(
        UserMistake, match=r"granularity 'neuron' is not possible here .*\(allowed: weight\)|allowed: weight"
    ):
        pj.score("taylor", {"w": jnp.ones((2, 2))}, loss=jnp.sum, batches=[], granularity="neuron")
    with pytest.raises(UserMistake, match=r"the scores of 'w' are \[3\] but the parameter is \[2, 2\]"):
        pj.mask({"w": jnp.ones(3)}, keep=1, params={"w": jnp.ones((2, 2))})
