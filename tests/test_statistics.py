import gc

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import prune_jax.statistics as statistics
from prune_jax.errors import UserMistake
from prune_jax.gauss_newton import product
from prune_jax.objectives import composed
from prune_jax.outer_products import Outer
from prune_jax.statistics import Statistics, flow, gather
from tests.compiling import compilations


def loss(params, batch):
    return jnp.mean(jnp.square(batch["x"] @ params["kernel"] + params["bias"][None] - batch["y"]))


def gradients_by_hand(params, x, y):
    """Of the mean over examples and outputs of (xW + b - y)^2."""
    rest = 2 * (x @ params["kernel"] + params["bias"] - y) / y.size
    return {"kernel": x.T @ rest, "bias": rest.sum(axis=0)}


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {
        "kernel": jnp.asarray(rng.standard_normal((4, 3)), jnp.float32),
        "bias": jnp.ones(3),
        "steps": jnp.arange(2),
    }


def make_batches(*sizes):
    rng = np.random.default_rng(1)
    return [
        {"x": rng.standard_normal((n, 4)).astype(np.float32), "y": rng.standard_normal((n, 3)).astype(np.float32)}
        for n in sizes
    ]


def oracle(params, batches):
    given = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    sizes = [len(b["x"]) for b in batches]
    of_batches = [gradients_by_hand(given, b["x"], b["y"]) for b in batches]
    of_examples = [
        gradients_by_hand(given, b["x"][i : i + 1], b["y"][i : i + 1]) for b in batches for i in range(len(b["x"]))
    ]
    mean = lambda f: {n: np.average([f(g[n]) for g in of_batches], axis=0, weights=sizes) for n in ("kernel", "bias")}  # noqa: E731
    return Statistics(
        gradient=mean(lambda g: g),
        gradient_abs=mean(np.abs),
        gradient_square=mean(np.square),
        example_gradient_square={n: np.mean([g[n] ** 2 for g in of_examples], axis=0) for n in ("kernel", "bias")},
    )


FIRST_ORDER = ("gradient", "gradient_abs", "gradient_square", "example_gradient_square")


@pytest.mark.parametrize("sizes", [(8,), (8, 8, 8), (8, 8, 3)], ids=["one", "equal", "remainder"])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20], ids=["one by one", "all at once"])
def test_means_agree_with_gradients_by_hand(params, sizes, chunk_bytes, monkeypatch):
    monkeypatch.setitem(statistics.CHUNK_BYTES, "cpu", chunk_bytes)
    batches = make_batches(*sizes)
    found = gather(FIRST_ORDER, loss, params, batches)
    wanted_of = oracle(params, batches)
    for field in FIRST_ORDER:
        wanted = getattr(wanted_of, field)
        for name in ("kernel", "bias"):
            leaf = getattr(found, field)[name]
            assert leaf.dtype == jnp.float32
            np.testing.assert_allclose(leaf, wanted[name], rtol=2e-5, atol=1e-6, err_msg=f"{field} {name}")
        assert getattr(found, field)["steps"] is None


@pytest.mark.parametrize("sizes", [(8,), (8, 3)], ids=["one", "remainder"])
def test_squares_of_what_a_weight_is_multiplied_with(params, sizes):
    batches = make_batches(*sizes)
    found = gather({"input_square"}, loss, params, iter(batches), prunable=["kernel"]).input_square
    x = np.concatenate([batch["x"] for batch in batches])
    np.testing.assert_allclose(found["kernel"], np.mean(x**2, axis=0)[:, None] * np.ones((4, 3)), rtol=1e-5)
    assert found["bias"] is None
    with pytest.raises(UserMistake, match="what 'bias' is multiplied with cannot be seen: it goes into 'add'"):
        gather({"input_square"}, loss, params, batches)


def test_the_gradient_of_all_examples_does_not_depend_on_the_batches(params):
    (whole,) = make_batches(10)
    parts = [jax.tree.map(lambda a: a[:7], whole), jax.tree.map(lambda a: a[7:], whole)]
    one, two = (gather({"gradient"}, loss, params, b).gradient for b in ([whole], parts))
    np.testing.assert_allclose(one["kernel"], two["kernel"], rtol=1e-5, atol=1e-7)


def test_only_what_is_needed_is_gathered_and_only_of_prunable_leaves(params):
    found = gather({"gradient_abs"}, loss, params, make_batches(4), prunable=["kernel"])
    assert [field for field in Statistics._fields if getattr(found, field) is not None] == ["gradient_abs"]
    assert found.gradient_abs["bias"] is None
    jaxpr = str(
        jax.make_jaxpr(lambda p, b: statistics._gradient(Partial(loss), p, b, frozenset({"kernel"})))(
            params, make_batches(4)[0]
        )
    )
    assert jaxpr.count("reduce_sum") == 1  # of the loss; the bias's gradient would be a second


@pytest.mark.parametrize(
    "needs",
    [
        {"gradient_abs", "gradient_square"},
        {"example_gradient_square"},
        {"hessian_gradient"},
        {"hessian_diagonal"},
        {"fisher_blocks"},
    ],
    ids=lambda needs: "+".join(sorted(needs)),
)
def test_one_compilation_serves_all_batches_and_later_calls(params, needs):
    traced = []

    def counted(params, batch):
        traced.append(batch["x"].shape)
        return loss(params, batch)

    passes = 2 if "hessian_gradient" in needs else 1
    key, other = jax.random.split(jax.random.key(0))
    gather(needs, counted, params, make_batches(8, 8, 8), key=key)
    first = len(traced)
    newer = jax.tree.map(lambda a: a + 1, params)
    with compilations() as seconds:
        gather(needs, counted, newer, make_batches(8, 8, 8, 8), key=other)
    assert len(traced) == first == passes
    assert not seconds
    gather(needs, counted, params, make_batches(8, 3), key=key)
    assert len(traced) == (1 if "example_gradient_square" in needs else 2 * passes)  # one example has one shape


def test_a_partial_loss_hands_its_arrays_in(params):
    traced = []

    def scaled(scale, params, batch):
        traced.append(scale)
        return scale * loss(params, batch)

    one, two = (
        gather({"gradient"}, Partial(scaled, jnp.float32(s)), params, make_batches(4)).gradient["kernel"]
        for s in (1, 2)
    )
    np.testing.assert_allclose(two, 2 * one, rtol=1e-6)
    assert len(traced) == 1


LONG = ("example_gradient_square", "hessian_gradient", "hessian_diagonal", "fisher_blocks")


@pytest.mark.parametrize(
    "needs",
    ["gradient_abs", *(pytest.param(need, marks=pytest.mark.slow) for need in LONG)],
)
def test_memory_does_not_grow_with_the_number_of_batches(params, needs):
    held = []

    class Batches:
        def __iter__(self):
            held.append([])
            for batch in make_batches(*[8] * 5):
                gc.collect()
                held[-1].append(len(jax.live_arrays()))
                yield batch

    gc.freeze()  # what other tests hold is not looked through again and again
    try:
        gather({needs}, loss, params, Batches(), key=jax.random.key(0))
    finally:
        gc.unfreeze()
    for of_one_pass in held:
        assert max(of_one_pass[2:], default=0) <= of_one_pass[1]


def twice(params, batch):
    """One kernel in two layers: its gradient is the sum of two outer products."""
    return jnp.mean(jnp.square(jnp.tanh(batch["x"] @ params["w"]) @ params["w"].T + params["b"][None]))


def tokens(params, batch):
    """Four tokens of an example through one kernel: its gradient is no outer product; that of the last one is."""
    h = jnp.tanh(jnp.einsum("bti,io->bto", batch["x"].reshape(-1, 4, 2), params["in"]))
    return jnp.mean(jnp.square(jax.jit(jnp.dot)(h.reshape(h.shape[0], -1), params["out"])))


def image(params, batch):
    x = batch["x"].reshape(-1, 4, 2, 1)
    h = jax.lax.conv_general_dilated(x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.mean(jnp.square(jax.nn.relu(h).reshape(x.shape[0], -1) @ params["out"]))


@pytest.mark.parametrize(
    ("function", "shapes", "products"),
    [
        (twice, {"w": (8, 5), "b": (8,)}, set()),
        (tokens, {"in": (2, 3), "out": (12, 2)}, {"out"}),
        (image, {"conv": (2, 2, 1, 3), "out": (24, 2)}, {"out"}),
    ],
)
def test_gradients_that_are_outer_products_are_never_formed(function, shapes, products):
    rng = np.random.default_rng(3)
    params = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    batch = {"x": rng.standard_normal((6, 8)).astype(np.float32)}
    found = gather({"example_gradient_square"}, function, params, [batch]).example_gradient_square
    one = jax.jit(jax.grad(function))
    squares = [jax.tree.map(np.square, one(params, {"x": batch["x"][i : i + 1]})) for i in range(6)]
    for name in params:
        np.testing.assert_allclose(found[name], np.mean([s[name] for s in squares], axis=0), rtol=2e-5, atol=1e-7)
    leaves = statistics._of_one(Partial(function), params, {"x": batch["x"][:1]}, paths=frozenset(params))
    assert {name for name, leaf in zip(sorted(params), leaves, strict=True) if isinstance(leaf, Outer)} == products


def test_a_chunk_divides_the_batch(monkeypatch):
    monkeypatch.setitem(statistics.CHUNK_BYTES, "cpu", 40 * 4)
    assert [statistics._chunk(jnp.zeros(4), n) for n in (64, 12, 7, 11, 3)] == [8, 6, 7, 1, 3]


def test_low_precision_weights_have_float32_statistics():
    params = {"kernel": jnp.ones((4, 3), jnp.bfloat16), "bias": jnp.ones(3, jnp.bfloat16)}
    found = gather({"gradient_square"}, loss, params, make_batches(4))
    assert found.gradient_square["kernel"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": []}, "there are no batches to gather statistics from; give at least one"),
        ({"needs": {"hessian_diagonal"}}, "hessian_diagonal is estimated with random signs: give key=, such as jax.r"),
        (
            {"needs": {"hessian_gradient"}, "batches": iter([])},
            "the Hessian times the gradient takes a second pass over",
        ),
        ({"needs": {"gradients"}}, "statistic 'gradients' is not known; did you mean 'gradient'? (known: gradient, "),
        ({"loss": lambda p, b: b["x"] @ p["kernel"]}, "the loss answered an array [4, 3] but must answer one number"),
        ({"batches": [{"x": np.float32(3)}]}, "a batch holds no array with a leading axis of examples"),
    ],
    ids=["no batches", "no key", "read once", "unknown", "no scalar", "no examples"],
)
def test_mistakes(params, change, message):
    words = {"needs": {"gradient"}, "loss": loss, "batches": make_batches(4), **change}
    with pytest.raises(UserMistake) as caught:
        gather(words["needs"], words["loss"], params, words["batches"])
    assert str(caught.value).startswith(message)


def curved(params, batch):
    """Not quadratic, and all weights meet: the Hessian has no zeros."""
    h = jnp.tanh(batch["x"] @ params["kernel"] + params["bias"][None])
    return jnp.mean(jnp.square(jnp.sum(h, axis=1) - batch["y"][:, 0]))


def hessian(params, batches, *names):
    """The whole set's, over `names` laid end to end, and the gradient beside it."""
    count = [len(b["x"]) for b in batches]
    ends = np.cumsum([params[name].size for name in names])

    def total(flat):
        parts = {n: f.reshape(params[n].shape) for n, f in zip(names, jnp.split(flat, ends[:-1]), strict=True)}
        values = [curved({**params, **parts}, b) for b in batches]
        return sum(n * v for n, v in zip(count, values, strict=True)) / sum(count)

    flat = jnp.concatenate([params[name].ravel() for name in names])
    return jax.jit(jax.hessian(total))(flat), jax.jit(jax.grad(total))(flat)


def test_the_hessian_of_the_whole_set_times_its_gradient(params):
    batches = make_batches(8, 8, 3)
    names = ("bias", "kernel")
    found = gather({"hessian_gradient"}, curved, params, batches)
    H, g = hessian(params, batches, *names)
    joined = np.concatenate([np.ravel(found.hessian_gradient[name]) for name in names])
    np.testing.assert_allclose(joined, H @ g, rtol=1e-4, atol=1e-5)
    assert found.gradient is None
    alone = gather({"hessian_gradient", "gradient"}, curved, params, batches, prunable=["kernel"])
    H, g = hessian(params, batches, "kernel")
    np.testing.assert_allclose(alone.hessian_gradient["kernel"].ravel(), H @ g, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(alone.gradient["kernel"].ravel(), g, rtol=1e-4, atol=1e-6)
    assert alone.hessian_gradient["bias"] is None


def test_random_signs_estimate_the_diagonal_of_the_hessian(params):
    """The variance of z_i (H z)_i is the sum of the squares beside the diagonal."""
    batches = make_batches(8, 8, 3)
    probes = 4000
    found = gather({"hessian_diagonal"}, curved, params, batches, key=jax.random.key(0), probes=probes)
    H, _ = hessian(params, batches, "bias", "kernel")
    estimate = np.concatenate([np.ravel(found.hessian_diagonal[name]) for name in ("bias", "kernel")])
    shares = np.array([8, 8, 3]) / 19
    spread = 0
    for batch, share in zip(batches, shares, strict=True):
        alone = np.array(hessian(params, [batch], "bias", "kernel")[0])
        np.fill_diagonal(alone, 0)
        spread += share**2 * np.square(alone).sum(axis=1) / probes
    assert np.all(np.abs(estimate - np.diag(H)) < 5 * np.sqrt(spread))


def test_one_probe_is_exact_where_the_hessian_is_diagonal():
    curvature = jnp.array([[1.0, -2.0, 3.0]])
    found = gather(
        {"hessian_diagonal"},
        lambda p, x: jnp.mean(x) * jnp.sum(curvature * p["w"] ** 2) / 2,
        {"w": jnp.ones((1, 3), jnp.float32)},
        [jnp.full(2, 3.0), jnp.full(1, 6.0)],
        key=jax.random.key(1),
        probes=1,
    )
    np.testing.assert_allclose(found.hessian_diagonal["w"], 4 * curvature, rtol=1e-6)


def answers(params, x):
    """A network that is curved itself, and of whose loss Hessian and Gauss-Newton part differ."""
    return jnp.tanh(x @ params["kernel"] + params["bias"][None]) ** 2


def cross_entropies(outputs, batch):
    return -jnp.sum(jax.nn.softmax(batch["y"]) * jax.nn.log_softmax(outputs), axis=1)


def test_the_gauss_newton_product_with_unit_vectors_gives_the_matrix(params):
    """J^T H J with both matrices formed, one example at a time; it is not the Hessian."""
    (batch,), parts = make_batches(4), composed(cross_entropies, answers)
    chosen = {name: params[name] for name in ("bias", "kernel")}
    flat, grow = jax.flatten_util.ravel_pytree(chosen)

    def of_one(x, y):
        J = jax.jacobian(lambda v: answers(grow(v), x[None])[0])(flat)
        H = jax.hessian(lambda z: cross_entropies(z[None], {"y": y[None]})[0])(answers(chosen, x[None])[0])
        return J.T @ H @ J

    G = np.mean(jax.jit(jax.vmap(of_one))(batch["x"], batch["y"]), axis=0)
    assert np.linalg.eigvalsh(G).min() > -1e-6
    along = jax.vmap(lambda v: jax.flatten_util.ravel_pytree(product(grow(v), parts, lambda w: w, chosen, batch))[0])
    units = jnp.eye(flat.size)
    np.testing.assert_allclose(jax.jit(along)(units), G, rtol=1e-4, atol=1e-6)
    H = jax.jit(jax.hessian(lambda v: parts(grow(v), batch)))(flat)
    assert np.abs(H - G).max() > 0.1 * np.abs(G).max()


def test_the_gauss_newton_part_takes_a_loss_in_two_parts(params):
    words = {"curvature": "gauss_newton", "key": jax.random.key(0)}
    with pytest.raises(UserMistake, match=r"but the loss is one function: give loss=pj\.composed\(loss, apply\), of"):
        gather({"hessian_diagonal"}, loss, params, make_batches(4), **words)


def test_flow_takes_tokens_as_they_are_and_sums_all_outputs():
    params = {"table": jnp.array([[1.0, -2.0], [3.0, 4.0]]), "n": jnp.arange(2), "w": jnp.array([[-1.0], [2.0]])}

    def apply(params, tokens, x):
        return {"out": (params["table"][tokens] + x) @ params["w"], "tokens": tokens}

    inputs = (jnp.array([1, 0, 0]), jax.ShapeDtypeStruct((3, 2), jnp.float32))
    found = flow(apply, params, inputs, prunable=["table", "w"])
    np.testing.assert_array_equal(found["table"], [[0, 0], [1, 2]])
    np.testing.assert_array_equal(found["w"], [[4], [5]])
    assert found["n"] is None
