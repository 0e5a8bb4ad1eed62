import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prune_jax.scoring as pj
from prune_jax.blocks import grid
from prune_jax.criteria import CRITERIA, Criterion, criterion, find
from prune_jax.errors import NonFiniteScoreError, UserMistake
from prune_jax.notation import FAMILIES
from prune_jax.objectives import composed
from prune_jax.selection import shares
from prune_jax.statistics import Statistics
from tests.compiling import compilations

NAMES = [name for name in CRITERIA if "weight" in CRITERIA[name].granularities]  # others: test_unit_criteria
PAIRS = [(n, g) for n in NAMES for g in ("weight", "kernel", "neuron") if g in CRITERIA[n].granularities]
KERNELS = ("hidden/kernel", "out/kernel")


def apply(params, x):
    h = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    return h @ params["out"]["kernel"]


def loss(params, batch):
    """The mean over examples of half the squared error of a tanh network."""
    return jnp.sum(jnp.square(apply(params, batch["x"]) - batch["y"])) / (2 * batch["x"].shape[0])


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


def shares_by_hand(scores):
    """Lee et al. 2021: each square over the sum of those that come after it in ascending order, equals by position."""
    flat = np.ravel(scores).astype(np.float64)
    ranked = sorted(range(flat.size), key=lambda i: (flat[i], i))
    found = np.zeros(flat.size)
    for rank, i in enumerate(ranked):
        left = sum(flat[j] ** 2 for j in ranked[rank:])
        found[i] = flat[i] ** 2 / left if left else 0
    return found.reshape(np.shape(scores))


ORACLES = {
    "lamp": lambda w, of_batches, sizes, of_examples: shares_by_hand(np.abs(w)),
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
    elsewhere = {"random", "grasp", "obd", "synflow", "woodfisher", "wanda", "sparsegpt"}  # of wanda: test_wanda
    assert {name.split()[0] for name in ORACLES} | elsewhere == set(NAMES)


GIVEN = {"loss": loss, "apply": apply, "inputs": jnp.zeros((2, 3))}


def scored(name, params, batches, **words):
    return pj.score(name, params, batches=batches, key=jax.random.key(0), **GIVEN, **words)


def hessian_by_hand(params, batches):
    """The whole set's Hessian and gradient over both kernels laid end to end."""
    bias, sizes = params["hidden"]["bias"], [len(b["x"]) for b in batches]

    def total(flat):
        given = {
            "hidden": {"kernel": flat[:12].reshape(3, 4), "bias": bias},
            "out": {"kernel": flat[12:].reshape(4, 2)},
        }
        return sum(n * loss(given, b) for n, b in zip(sizes, batches, strict=True)) / sum(sizes)

    flat = joined(params)
    return jax.jit(jax.hessian(total))(flat), jax.jit(jax.grad(total))(flat), total


def joined(tree):
    return np.concatenate([leaf.ravel() for leaf in by_path(tree).values()])


def test_grasp_is_what_the_norm_of_the_gradient_loses(params, batches):
    scores, w = joined(pj.score("grasp", params, loss=loss, batches=batches)), joined(params)
    H, g, total = hessian_by_hand(params, batches)
    np.testing.assert_allclose(scores, w * (H @ g), rtol=1e-4, atol=1e-6)

    step = 1e-3  # shrinks one weight by a thousandth; the score says what all of it would do, to first order
    norm = jax.jit(lambda flat: jnp.sum(jnp.square(jax.grad(total)(flat))))
    for i in (0, 7, 15):
        less = norm(jnp.asarray(w).at[i].multiply(1 - step)) - norm(jnp.asarray(w).at[i].multiply(1 + step))
        np.testing.assert_allclose(less / (2 * step), -2 * scores[i], rtol=0.02, atol=2e-3)


def test_grasp_reads_its_batches_twice(params, batches):
    with pytest.raises(UserMistake, match="the Hessian times the gradient takes a second pass over the batches: give"):
        pj.score("grasp", params, loss=loss, batches=iter(batches))


def test_obd_nears_half_the_curvature_times_the_square(params, batches):
    words = {"loss": loss, "batches": batches, "key": jax.random.key(0)}
    scores, w = joined(pj.score("obd", params, options={"probes": 3000}, **words)), joined(params)
    H, _, _ = hessian_by_hand(params, batches)
    wanted = w**2 * np.diag(H) / 2
    np.testing.assert_allclose(scores, wanted, atol=0.05 * np.abs(wanted).max())
    assert np.corrcoef(joined(pj.score("obd", params, **words)), wanted)[0, 1] > 0.8


def test_obd_with_gauss_newton_is_the_hessian_where_the_network_is_linear(params, batches):
    """In `out/kernel` it is: half the squared error has H_L = 1 / n and the diagonal E[h^2]."""
    halves = composed(lambda y, batch: jnp.sum(jnp.square(y - batch["y"]), axis=1) / 2, apply)
    words = {"loss": halves, "batches": batches, "key": jax.random.key(0), "prunable": ["out/kernel"]}
    options = {"curvature": "gauss_newton", "probes": 3000}
    found = np.asarray(pj.score("obd", params, options=options, **words)["out"]["kernel"])
    x = np.concatenate([b["x"] for b in batches])
    h = np.tanh(x @ np.asarray(params["hidden"]["kernel"]) + np.asarray(params["hidden"]["bias"]))
    wanted = np.square(params["out"]["kernel"]) * np.mean(np.square(h), axis=0)[:, None] / 2
    np.testing.assert_allclose(found, wanted, atol=0.05 * wanted.max())
    stats = Statistics(hessian_diagonal={"w": jnp.array([[-1.0, 4.0]])})  # of few signs
    weights = {"w": jnp.ones((1, 2))}
    np.testing.assert_array_equal(CRITERIA["obd"](weights, stats, curvature="gauss_newton")["w"], [[0, 2]])
    np.testing.assert_array_equal(CRITERIA["obd"](weights, stats)["w"], [[-0.5, 2]])


def test_obd_of_a_linear_layer_is_exact_with_one_probe_per_output():
    """Half the mean square of x w has the Hessian E[x x^T], which is diagonal here: half of w^2 x^2 is the score."""
    w, x = jnp.array([[2.0], [-3.0], [0.5]]), jnp.diag(jnp.array([1.0, 2.0, 4.0]))
    scores = pj.score(
        "obd",
        {"w": w},
        loss=lambda p, x: jnp.mean(jnp.square(x @ p["w"])) / 2,
        batches=[x],
        key=jax.random.key(0),
        options={"probes": 1},
    )
    np.testing.assert_allclose(scores["w"], [[4 / 6], [9 * 4 / 6], [0.25 * 16 / 6]], rtol=1e-6)


def test_synflow_of_a_linear_network_by_hand(params):
    """R = sum of (|W| + |b|) |V|: through w_ij flows |w_ij| sum_k |v_jk|, and as much through both layers but for b."""

    def linear(p, x):
        return (x @ p["hidden"]["kernel"] + p["hidden"]["bias"][None]) @ p["out"]["kernel"]

    scores = by_path(pj.score("synflow", params, apply=linear, inputs=(jax.ShapeDtypeStruct((64, 3), jnp.float32),)))
    w, v = (np.abs(by_path(params)[path]).astype(np.float64) for path in KERNELS)
    b = np.abs(np.asarray(params["hidden"]["bias"], np.float64))
    np.testing.assert_allclose(scores["hidden/kernel"], w * v.sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(scores["out/kernel"], (w.sum(axis=0) + b)[:, None] * v, rtol=1e-5)
    no_bias = {**params, "hidden": {**params["hidden"], "bias": jnp.zeros(4)}}
    sums = [
        np.sum(leaf) for leaf in by_path(pj.score("synflow", no_bias, apply=linear, inputs=jnp.ones((1, 3)))).values()
    ]
    np.testing.assert_allclose(sums[0], sums[1], rtol=1e-5)  # the law that keeps layers alive


def test_the_largest_of_a_layer_has_the_lamp_score_one_whatever_its_equals():
    w = jnp.array([[0.5, -0.5, 0.5], [0.0, 0.5, 0.5]])
    scores = pj.score("lamp", {"a": w, "b": 1e-3 * w, "c": jnp.zeros((2, 2))})
    np.testing.assert_allclose(scores["a"], [[1 / 5, 1 / 4, 1 / 3], [0, 1 / 2, 1]], rtol=1e-6)
    np.testing.assert_allclose(scores["b"], scores["a"], rtol=1e-6)
    np.testing.assert_array_equal(scores["c"], 0)


@pytest.mark.parametrize("keep", [2, 9, 15])
def test_the_scope_lamp_of_magnitudes_is_the_criterion_lamp(params, keep):
    of_scope = pj.mask(pj.score("magnitude", params), keep=keep, scope="lamp")
    of_criterion = pj.mask(pj.score("lamp", params), keep=keep)
    for path, mask in by_path(of_scope).items():
        np.testing.assert_array_equal(mask, by_path(of_criterion)[path])


def test_the_scope_lamp_compares_shares_of_any_scores_and_of_what_lives():
    rng = np.random.default_rng(3)
    scores = {"a": rng.random((4, 3)).astype(np.float32), "b": 1e-4 * rng.random((5, 3)).astype(np.float32)}
    alive = {"a": rng.random((4, 3)) < 0.7}
    living = {path: alive.get(path, True) * leaf for path, leaf in scores.items()}
    wanted = np.concatenate([shares_by_hand(leaf).ravel() for leaf in living.values()])
    dead = np.concatenate([~alive["a"].ravel(), np.zeros(15, bool)])
    first = np.lexsort((np.arange(27), wanted, ~dead))[:14]
    masks = pj.mask(scores, keep=13, scope="lamp", alive=alive)
    found = np.concatenate([np.ravel(m) for m in masks.values()])
    np.testing.assert_array_equal(np.flatnonzero(~found), np.sort(first))
    units = pj.mask({"a": scores["a"]}, keep=2, scope="lamp", granularity="neuron")["a"]
    np.testing.assert_array_equal(units[0], scores["a"].sum(axis=0) > scores["a"].sum(axis=0).min())


def test_shares_keep_the_order_of_many_scores():
    values = np.sort(np.random.default_rng(0).lognormal(0, 3, 200_000).astype(np.float32))
    found = np.asarray(shares(values))
    assert np.all(np.diff(found) >= 0)
    assert found[-1] == 1
    exact = np.square(values, dtype=np.float64)
    np.testing.assert_allclose(found, exact / np.cumsum(exact[::-1])[::-1], rtol=1e-4)


def test_the_scope_lamp_refuses_scores_below_zero():
    with pytest.raises(UserMistake, match="scope lamp compares squares of scores, but the lowest of 'w' is -2: choose"):
        pj.mask({"w": jnp.array([1.0, -2.0])}, keep=1, scope="lamp")


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


def made_up(fields, weights):
    """Statistics of the right shapes."""
    given = {field: {"w": jnp.cos(i + weights["w"])} for i, field in enumerate(fields)}
    if "fisher_blocks" in given:
        outputs, blocks, size = grid(weights["w"].shape, 64)
        matrix = jnp.eye(size) + 0.1
        given["fisher_blocks"] = {"w": jnp.broadcast_to(matrix, (outputs, blocks, size, size))}
    if "input_products" in given:
        inputs = weights["w"].shape[0]
        given["input_products"] = {"w": (jnp.eye(inputs) + 0.1,)}
    return Statistics(**given)


@pytest.mark.parametrize("name", NAMES)
def test_jit_equals_eager_and_compiles_once(name, params, batches):
    entry = CRITERIA[name]
    weights = {"w": params["hidden"]["kernel"]}
    stats = made_up(Statistics._fields, weights)
    words = {"key": jax.random.key(3)} if entry.takes_key else {}
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
        pj.score(name, newer, batches=batches, key=key, **GIVEN)
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


OPTIONS = {
    "magnitude": {"p": 1},
    "sensitivity": {"signed": False},
    "obd": {"probes": 10, "curvature": "hessian"},
    "woodfisher": {"block": 64, "dampening": 0.01},
    "sparsegpt": {"block": 128, "dampening": 0.01, "inputs": 4096},
}


@pytest.mark.parametrize("name", NAMES)
def test_entries_say_what_is_so(name):
    entry = CRITERIA[name]
    assert entry.name == name
    assert entry.formula
    assert entry.paper
    assert entry.needs <= set(Statistics._fields)
    assert entry.data_free == (name in {"magnitude", "random", "lamp", "synflow"})
    assert entry.stochastic == (name in {"random", "obd"})
    assert entry.options == OPTIONS.get(name, {})
    assert set(entry.granularities) <= set(FAMILIES)
    assert "Returns:" in (inspect.getdoc(entry.function) or "")


@pytest.mark.parametrize("name", NAMES)
def test_a_criterion_looks_at_what_it_needs_alone(name):
    entry = CRITERIA[name]
    weights = {"w": jnp.ones((2, 2))}
    words = {"key": jax.random.key(0)} if entry.takes_key else {}
    given = made_up(sorted(entry.needs), weights)
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
    (("obd",), {"options": {"probes": 0}}, "criterion 'obd': probes = 0 must be a whole number from 1 on"),
    (
        ("obd",),
        {"options": {"curvature": "gauss-newton"}},
        "criterion 'obd': curvature = 'gauss-newton' is not possible; did you mean 'gauss_newton'? (allowed: hessian, ",
    ),
    (
        ("synflow",),
        {},
        "criterion 'synflow' needs the network: give apply=, (params, *inputs) -> outputs, and inputs=.",
    ),
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
