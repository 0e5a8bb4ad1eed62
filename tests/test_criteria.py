import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prune_jax.scoring as pj
from prune_jax.criteria import CRITERIA, Criterion, criterion, find
from prune_jax.errors import NonFiniteScoreError, UserMistake
from prune_jax.notation import FAMILIES
from prune_jax.statistics import Statistics
from tests.compiling import compilations

NAMES = [name for name in CRITERIA if "weight" in CRITERIA[name].granularities]  # others: test_unit_criteria
PAIRS = [(n, g) for n in NAMES for g in ("weight", "kernel", "neuron") if g in CRITERIA[n].granularities]
KERNELS = ("hidden/kernel", "out/kernel")


def loss(params, batch):
    """The mean over examples of half the squared error of a tanh network."""
    h = jnp.tanh(batch["x"] @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    return jnp.sum(jnp.square(h @ params["out"]["kernel"] - batch["y"])) / (2 * batch["x"].shape[0])


def gradients_by_hand(w, b, v, x, y):
    """Backpropagation through `loss`, in float64."""
    h = np.tanh(x @ w + b)
    error = (h @ v - y) / len(x)
    back = (error @ v.T) * (1 - h**2)
    return {"hidden/kernel": x.T @ back, "out/kernel": h.T @ error}


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {"hidden": {"kernel": draw(3, 4), "bias": draw(4)}, "out": {"kernel": draw(4, 2)}}


@pytest.fixture
def batches():
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return [{"x": draw(n, 3), "y": draw(n, 2)} for n in (5, 5, 2)]


def by_path(tree):
    return {"hidden/kernel": np.asarray(tree["hidden"]["kernel"]), "out/kernel": np.asarray(tree["out"]["kernel"])}


ORACLES = {
    "magnitude": lambda w, of_batches, sizes, of_examples: np.abs(w),
    "sensitivity": lambda w, g, n, g_i: np.average(np.abs(g), axis=0, weights=n),
    "sensitivity signed": lambda w, g, n, g_i: np.average(g, axis=0, weights=n),
    "snip": lambda w, g, n, g_i: np.abs(w * np.average(g, axis=0, weights=n)),
    "taylor": lambda w, g, n, g_i: np.average((g * w) ** 2, axis=0, weights=n),
    "fisher": lambda w, g, n, g_i: w**2 * np.mean(g_i**2, axis=0) / 2,
}


@pytest.mark.parametrize("name", ORACLES)
def test_scores_agree_with_the_formula_by_hand(name, params, batches):
    options = {"signed": True} if "signed" in name else {}
    scores = by_path(pj.score(name.split()[0], params, loss=loss, batches=batches, options=options))

    weights = {path: leaf.astype(np.float64) for path, leaf in by_path(params).items()}
    bias = np.asarray(params["hidden"]["bias"], np.float64)
    gradients = lambda x, y: gradients_by_hand(weights["hidden/kernel"], bias, weights["out/kernel"], x, y)  # noqa: E731
    of_batches = [gradients(b["x"], b["y"]) for b in batches]
    of_examples = [gradients(b["x"][i : i + 1], b["y"][i : i + 1]) for b in batches for i in range(len(b["x"]))]
    for path in KERNELS:
        wanted = ORACLES[name](
            weights[path],
            np.stack([g[path] for g in of_batches]),
            [len(b["x"]) for b in batches],
            np.stack([g[path] for g in of_examples]),
        )
        np.testing.assert_allclose(scores[path], wanted, rtol=2e-4, atol=1e-7)


def test_every_criterion_has_an_oracle():
    assert {name.split()[0] for name in ORACLES} | {"random", "wanda"} == set(
        NAMES
    )  # of wanda: test_activation_criteria


def scored(name, params, batches, **words):
    return pj.score(name, params, loss=loss, batches=batches, key=jax.random.key(0), **words)


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_finite_float32_shaped_like_the_prunable_leaves(name, params, batches):
    low = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    for given in (params, low):
        scores = scored(name, given, batches)
        assert scores["hidden"]["bias"] is None
        for path, leaf in by_path(scores).items():
            assert leaf.shape == by_path(params)[path].shape
            assert leaf.dtype == np.float32
            assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize("name", NAMES)
def test_jit_equals_eager_and_compiles_once(name, params, batches):
    entry = CRITERIA[name]
    weights = {"w": params["hidden"]["kernel"]}
    stats = Statistics(*({"w": jnp.cos(i + weights["w"])} for i in range(len(Statistics._fields))))
    words = {"key": jax.random.key(3)} if entry.stochastic else {}
    jitted = jax.jit(entry.function)
    eager = entry(weights, stats, **words)["w"]
    np.testing.assert_allclose(jitted(weights, stats, **words)["w"], eager, rtol=1e-6)
    with compilations() as seconds:
        jitted(weights, stats, **words)
    assert not seconds


@pytest.mark.parametrize("name", NAMES)
def test_a_second_call_compiles_nothing(name, params, batches):
    scored(name, params, batches)
    key = jax.random.key(1)
    newer = jax.tree.map(lambda w: 2 * w, params)
    with compilations() as seconds:
        pj.score(name, newer, loss=loss, batches=batches, key=key)
    assert not seconds


@pytest.mark.parametrize(("name", "granularity"), [(n, g) for n, g in PAIRS if not CRITERIA[n].stochastic])
def test_permuting_units_permutes_scores(name, granularity, params, batches):
    order = np.array([2, 0, 3, 1])
    hidden = params["hidden"]
    permuted = {
        "hidden": {"kernel": hidden["kernel"][:, order], "bias": hidden["bias"][order]},
        "out": {"kernel": params["out"]["kernel"][order]},
    }
    before = by_path(scored(name, params, batches, granularity=granularity))
    after = by_path(scored(name, permuted, batches, granularity=granularity))
    np.testing.assert_allclose(after["hidden/kernel"], before["hidden/kernel"][..., order], rtol=1e-3, atol=1e-7)
    rows = slice(None) if granularity == "neuron" else order
    np.testing.assert_allclose(after["out/kernel"], before["out/kernel"][rows], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", [name for name, granularity in PAIRS if granularity == "neuron"])
def test_scores_of_neurons_sum_those_of_their_weights(name, params, batches):
    weights, units = (by_path(scored(name, params, batches, granularity=g)) for g in ("weight", "neuron"))
    for path in KERNELS:
        wanted = weights[path][0] if name == "random" else weights[path].sum(axis=0)
        np.testing.assert_allclose(units[path], wanted, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_entries_say_what_is_so(name):
    entry = CRITERIA[name]
    assert entry.name == name
    assert entry.formula
    assert entry.paper
    assert entry.needs <= set(Statistics._fields)
    assert entry.data_free == (name in {"magnitude", "random"})
    assert entry.stochastic == (name == "random")
    assert entry.options == {"magnitude": {"p": 1}, "sensitivity": {"signed": False}}.get(name, {})
    assert set(entry.granularities) <= set(FAMILIES)
    assert "Returns:" in (inspect.getdoc(entry.function) or "")


@pytest.mark.parametrize("name", NAMES)
def test_a_criterion_looks_at_what_it_needs_alone(name):
    entry = CRITERIA[name]
    weights = {"w": jnp.ones((2, 2))}
    words = {"key": jax.random.key(0)} if entry.stochastic else {}
    given = Statistics(**{field: weights for field in entry.needs})
    assert entry(weights, given, **words)["w"].shape == (2, 2)


def test_signed_sensitivity_gathers_the_gradient_instead():
    entry = CRITERIA["sensitivity"]
    assert entry.needs_with({}) == entry.needs_with({"signed": False}) == {"gradient_abs"}
    assert entry.needs_with({"signed": True}) == {"gradient"}


def test_random_scores_come_from_the_key_alone(params):
    one, two, other = (
        by_path(pj.score("random", params, key=jax.random.key(seed)))["hidden/kernel"] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, two)
    assert not np.any(one == other)
    assert np.all((one >= 0) & (one < 1))


def test_prunable_leaves_are_chosen_by_pattern(params):
    assert pj.prunable_paths(params) == KERNELS
    assert pj.prunable_paths(params, ["hidden/*"]) == ("hidden/bias", "hidden/kernel")
    assert pj.prunable_paths(params, exclude=["out"]) == ("hidden/kernel",)
    assert pj.prunable_paths({"w": jnp.ones(3), "n": jnp.arange(3)}) == ("w",)
    assert pj.prunable_paths(jax.eval_shape(lambda: params)) == KERNELS


def test_a_criterion_of_ones_own():
    entry = Criterion("negative", lambda params, stats: jax.tree.map(jnp.negative, params), "-w", "-")
    scores = pj.score(entry, {"w": jnp.array([[1.0, -2.0]])})
    np.testing.assert_array_equal(scores["w"], [[-1.0, 2.0]])
    assert find("prune_jax.criteria.gradients:snip") is CRITERIA["snip"]
    with pytest.raises(ValueError, match="criterion 'snip' is registered twice"):
        criterion("snip", formula="", paper="")(lambda params, stats: params)


MISTAKES = [
    (("taylr",), {}, "criterion 'taylr' is not known; did you mean 'taylor'? (known: "),
    (("math:hypot",), {}, "'math:hypot' is of type builtin_function_or_method, not a criterion; put @criterion(...)"),
    (("snip",), {}, "criterion 'snip' needs gradients: give loss=, (params, batch) -> scalar, and batches=."),
    (("random",), {}, "criterion 'random' draws random numbers: give key=, such as jax.random.key(0)."),
    (
        ("sensitivity",),
        {"options": {"signd": True}},
        "criterion 'sensitivity': 'signd' is not an argument; did you mean",
    ),
    (("sensitivity",), {"options": {"signed": 1}}, "criterion 'sensitivity': signed = 1 must be true or false"),
    (("magnitude",), {"options": {"p": 3}}, "criterion 'magnitude': p = 3 is not possible (allowed: 1, 2, inf)"),
    (("magnitude",), {"exclude": ["output"]}, "exclude pattern 'output' fits no parameter"),
    (
        ("magnitude",),
        {"prunable": ["out/kernl"]},
        "prunable pattern 'out/kernl' fits no parameter; did you mean 'out/ke",
    ),
    (("magnitude",), {"exclude": ["*"]}, "there is nothing to prune: of hidden/bias, hidden/kernel, out/kernel no"),
]


@pytest.mark.parametrize(("names", "words", "message"), MISTAKES, ids=[f"{n[0]} {w}" for n, w, _ in MISTAKES])
def test_mistakes(params, names, words, message):
    with pytest.raises(UserMistake) as caught:
        pj.score(*names, params, **words)
    assert str(caught.value).startswith(message)


def test_a_batch_with_nan_is_told_by_criterion_and_leaf(params, batches):
    batches[1]["x"][0, 0] = np.nan
    with pytest.raises(NonFiniteScoreError, match=r"Criterion 'snip' gave 12 of 12 .* in 'hidden/kernel' \[3, 4\]"):
        pj.score("snip", params, loss=loss, batches=batches)
