import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prune_jax.scoring as pj
from prune_jax.errors import LayerCollapseError, UserMistake
from prune_jax.granularity import living_units, unit_scores, unit_shape, weight_masks
from prune_jax.masks import apply_masks, choose_n_of_m
from tests.sparing import sparing

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


def blocks_of(shape, rows, columns):
    """The places of each block's weights, block by block."""
    *lead, inputs, outputs = shape
    for where in itertools.product(*map(range, lead)):
        for top in range(0, inputs, rows):
            for left in range(0, outputs, columns):
                yield [
                    (*where, i, o)
                    for i in range(top, min(top + rows, inputs))
                    for o in range(left, min(left + columns, outputs))
                ]


def kernels_of(shape):
    """The places of each kernel's weights; of fewer axes than three, each weight by itself."""
    for io in itertools.product(*map(range, shape[-2:])):
        yield [(*where, *io) for where in itertools.product(*map(range, shape[:-2]))]


UNITS = {  # name: (granularity, places of each unit, shape of the units, weights of a whole unit)
    "kernel": ("kernel", kernels_of, lambda shape: shape[-2:], None),
    "block 2 x 2": (
        {"block": [2, 2]},
        lambda s: blocks_of(s, 2, 2),
        lambda s: (*s[:-2], -(-s[-2] // 2), -(-s[-1] // 2)),
        4,
    ),
    "block 1 x 4": ({"block": (1, 4)}, lambda s: blocks_of(s, 1, 4), lambda s: (*s[:-1], -(-s[-1] // 4)), 4),
    "block 9 x 9": ({"block": [9, 9]}, lambda s: blocks_of(s, 9, 9), lambda s: (*s[:-2], 1, 1), 81),
}
TWO_AXES = {name: shape for name, shape in KERNELS.items() if len(shape) >= 2} | {"thin": (1, 7), "odd": (5, 2, 3)}


def drawn(shapes, *, ties=False):
    rng = np.random.default_rng(0)
    values = {name: np.abs(rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    return {name: np.round(v, 0 if ties else 6) for name, v in values.items()}


@pytest.mark.parametrize(
    ("combine", "oracle"),
    [
        ("sum", lambda unit, whole: sum(unit) * whole / len(unit)),
        ("l2", lambda unit, whole: sum(s * s for s in unit) ** 0.5 * (whole / len(unit)) ** 0.5),
        ("max", lambda unit, whole: max(unit)),
        ("first", lambda unit, whole: unit[0]),
    ],
)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", UNITS)
def test_units_are_scored_as_slow_loops_score_them(name, combine, oracle, transform):
    granularity, places_of, shape_of, whole = UNITS[name]
    scores = drawn(TWO_AXES)
    units = transform(lambda s: unit_scores(s, granularity, combine=combine))(scores)
    for path, leaf in scores.items():
        wanted = [oracle([float(leaf[p]) for p in places], whole or len(places)) for places in places_of(leaf.shape)]
        assert units[path].shape == unit_shape(leaf.shape, granularity) == shape_of(leaf.shape)
        assert units[path].dtype == np.float32
        np.testing.assert_allclose(np.ravel(units[path]), wanted, rtol=1e-6)


@pytest.mark.parametrize("name", UNITS)
def test_masks_of_units_cover_their_weights_and_back(name):
    granularity, places_of, shape_of, _ = UNITS[name]
    rng = np.random.default_rng(1)
    units = {path: rng.random(shape_of(shape)) < 0.5 for path, shape in TWO_AXES.items()}
    whole = weight_masks(units, {path: np.zeros(shape) for path, shape in TWO_AXES.items()}, granularity)
    for path, shape in TWO_AXES.items():
        wanted = np.zeros(shape, bool)
        for alive, places in zip(units[path].ravel(), places_of(shape), strict=True):
            for place in places:
                wanted[place] = alive
        np.testing.assert_array_equal(whole[path], wanted)
    for path, back in living_units(whole, granularity).items():
        np.testing.assert_array_equal(back, units[path])
    speck = {"a": np.zeros((4, 4), bool)}
    speck["a"][3, 2] = True
    assert int(np.sum(living_units(speck, granularity)["a"])) == 1, "one living weight is enough"


def lowest_units(scores, granularity, share, *, scope="global", dead=None):
    """Masks by slow loops: of all units, laid end to end, the lowest die, the first among equals."""
    _, places_of, _, whole = UNITS[granularity]
    masks = {path: np.ones(leaf.shape, bool) for path, leaf in scores.items()}
    pools = [sorted(scores)] if scope == "global" else [[path] for path in scores]
    for pool in pools:
        units = [(path, places) for path in pool for places in places_of(scores[path].shape)]
        ranks = []
        for path, places in units:
            gone = dead is not None and all(dead[path][place] for place in places)
            total = np.sum([scores[path][place] for place in places], dtype=np.float32)
            ranks.append(-np.inf if gone else total * np.float32((whole or len(places)) / len(places)))
        for which in np.argsort(ranks, kind="stable")[: round(share * len(units))]:
            path, places = units[which]
            for place in places:
                masks[path][place] = False
    return {path: mask & ~dead[path] if dead is not None else mask for path, mask in masks.items()}


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "tied"])
@pytest.mark.parametrize("name", ["kernel", "block 2 x 2", "block 1 x 4"])
def test_exactly_the_lowest_units_die(name, ties, scope):
    scores = {path: s if s.ndim > 2 else 4 * s for path, s in drawn(TWO_AXES, ties=ties).items()}
    words = {"granularity": UNITS[name][0], "scope": scope}
    wanted = lowest_units(scores, name, 0.4, scope=scope)
    masks = pj.mask(scores, sparsity=0.4, **words)
    of_units = unit_scores(scores, UNITS[name][0])
    params = {**scores, "bias": np.ones(5, np.float32)}
    again = pj.mask({**of_units, "bias": None}, sparsity=0.4, params=params, **words)
    assert again["bias"] is None
    for path in scores:
        np.testing.assert_array_equal(masks[path], wanted[path], err_msg=path)
        np.testing.assert_array_equal(again[path], wanted[path], err_msg=path)


@pytest.mark.parametrize("name", ["kernel", "block 2 x 2"])
def test_what_is_dead_stays_dead_in_units_that_live(name):
    scores = drawn(TWO_AXES)
    rng = np.random.default_rng(2)
    dead = {path: rng.random(shape) < 0.6 for path, shape in TWO_AXES.items()}
    dead["dense"][:2, :2] = True
    alive = {path: ~d for path, d in dead.items()}
    masks = pj.mask(scores, sparsity=0.4, granularity=UNITS[name][0], alive=alive)
    wanted = lowest_units(scores, name, 0.4, dead=dead)
    for path in scores:
        np.testing.assert_array_equal(masks[path], wanted[path], err_msg=path)


def test_a_weight_that_is_dead_stays_dead_in_a_neuron_that_lives():
    scores = {"w": jnp.array([[3.0, 1.0], [1.0, 1.0]])}
    alive = {"w": jnp.array([[True, True], [False, True]])}
    masks = pj.mask(scores, keep=1, granularity="neuron", alive=alive)
    np.testing.assert_array_equal(masks["w"], [[True, False], [False, False]])


@pytest.mark.parametrize("granularity", ["kernel", {"block": [2, 2]}], ids=["kernel", "block"])
def test_some_units_of_each_leaf_are_kept(granularity):
    scores = {"conv": np.full((2, 2, 3, 5), 9.0, np.float32), "dense": np.ones((4, 4), np.float32)}
    with pytest.raises(LayerCollapseError, match="'dense'"):
        pj.mask(scores, sparsity=0.6, granularity=granularity)
    masks = pj.mask(scores, sparsity=0.6, granularity=granularity, min_keep=2)
    assert int(np.sum(living_units(masks, granularity)["dense"])) == 2


@pytest.mark.parametrize(
    "target", [{"threshold": 6.0}, {"keep": 2}, {"percentile": 60}, {"statistic": "mean"}], ids=str
)
def test_every_target_counts_blocks(target):
    """One [3, 3] kernel in blocks of 2 x 2: sums 4, 2 * 2, 2 * 2 and 4 * 9 of a whole block."""
    kernel = np.ones((3, 3), np.float32)
    kernel[2, 2] = 9
    kernel[2, :2] = 1.6
    masks = pj.mask({"w": kernel}, granularity={"block": [2, 2]}, **target)["w"]
    wanted = np.zeros((3, 3), bool)
    wanted[2, :] = True  # 4 * 1.6 and 36, against 4 and 4
    wanted[2, :2] = target != {"statistic": "mean"}
    np.testing.assert_array_equal(masks, wanted)


def test_a_block_at_the_edge_does_not_die_for_its_smallness():
    kernel = np.ones((5, 5), np.float32)
    kernel[4, 4] = 1.5
    masks = pj.mask({"w": kernel}, granularity={"block": [4, 4]}, keep=1)
    assert np.argwhere(masks["w"]).tolist() == [[4, 4]]


def n_of_m(values, n, m, dead=None):
    """The oracle of n:m: group after group along the inputs, the lowest die, the dead first, then by position."""
    dead = np.zeros(values.shape, bool) if dead is None else dead
    alive = ~dead
    *lead, inputs, outputs = values.shape
    if inputs < m:
        return alive
    for where in itertools.product(*map(range, lead), range(outputs)):
        for start in range(0, inputs, m):
            group = [(*where[:-1], i, where[-1]) for i in range(start, min(start + m, inputs))]
            order = sorted(range(len(group)), key=lambda j: (not dead[group[j]], values[group[j]], j))
            for j in order[: max(len(group) - n, 0)]:
                alive[group[j]] = False
    return alive


N_M = sparing(["2:4", "1:4", "1:2", "3:5", "4:16", "2:17", "12:32"], ["1:4", "1:2", "4:16", "12:32"])  # > 16: sorted
LEAVES = {"dense": (64, 3), "tail": (37, 4), "conv": (2, 3, 34, 2), "short": (3, 8), "as long": (4, 5)}


DRAWS = {
    "distinct": lambda rng, shape: rng.standard_normal(shape),
    "tied": lambda rng, shape: rng.integers(-2, 3, shape) / 2,
    "signed zeros": lambda rng, shape: np.where(rng.random(shape) < 0.5, 0.0, -0.0),
    "subnormal": lambda rng, shape: rng.integers(-4, 5, shape) * 1.4e-45,
}


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("pattern", N_M)
def test_exactly_n_of_each_m_live(pattern, transform):
    n, m = map(int, pattern.split(":"))
    chosen = transform(lambda scores: choose_n_of_m(scores, n, m))
    for kind, draw in DRAWS.items():
        rng = np.random.default_rng(0)
        scores = {path: draw(rng, shape).astype(np.float32) for path, shape in LEAVES.items()}
        masks = chosen(scores)
        for path, leaf in scores.items():
            wanted = n_of_m(leaf.astype(np.float64), n, m)
            np.testing.assert_array_equal(masks[path], wanted, err_msg=f"{kind} {path}")
            assert masks[path].dtype == bool
        whole = np.asarray(masks["dense"])[: 64 // m * m].reshape(-1, m, 3)
        assert np.all(whole.sum(axis=1) == n)


@pytest.mark.parametrize("pattern", N_M)
def test_n_of_m_spares_what_lives_and_revives_nothing(pattern):
    n, m = map(int, pattern.split(":"))
    rng = np.random.default_rng(3)
    scores = drawn(LEAVES, ties=True)
    dead = {path: rng.random(shape) < 0.5 for path, shape in LEAVES.items()}
    params = {**scores, "bias": np.ones(3, np.float32)}
    masks = pj.mask(
        {**scores, "bias": None}, granularity=f"{n}:{m}", params=params, alive={path: ~d for path, d in dead.items()}
    )
    assert masks["bias"] is None
    for path, leaf in scores.items():
        np.testing.assert_array_equal(masks[path], n_of_m(leaf, n, m, dead[path]), err_msg=path)


def test_n_of_m_keeps_as_much_as_can_be_kept():
    """No other choice of 2 of each 4 is nearer to the weights."""
    kernel = np.random.default_rng(0).standard_normal((8, 1)).astype(np.float32)
    mask = np.asarray(pj.mask(pj.score("magnitude", {"w": kernel}, granularity="2:4"), granularity="2:4")["w"])
    halves = list(itertools.combinations(range(4), 2))
    best = max(sum(kernel[i, 0] ** 2 for i in (*a, *(4 + j for j in b))) for a in halves for b in halves)
    assert np.sum(np.square(kernel[mask])) == pytest.approx(best)


REFUSED = [
    ({"sparsity": 0.5}, "2:4 keeps 2 of each 4 inputs, which says how many die where; leave sparsity out"),
    ({"keep": 2, "scope": "layer"}, "leave keep and scope out"),
    ({"scope": {"*": 0.5}}, "leave scope out"),
    ({"min_keep": 1}, "leave min_keep out"),
]


@pytest.mark.parametrize(("words", "told"), REFUSED, ids=[t for _, t in REFUSED])
def test_n_of_m_takes_no_target(words, told):
    with pytest.raises(UserMistake) as caught:
        pj.mask({"w": jnp.ones((4, 2))}, granularity="2:4", **words)
    assert str(caught.value).endswith(told)


@pytest.mark.parametrize(
    ("granularity", "told"),
    [
        ("2:4", "2:4 needs a kernel [.., in, out] of 4 inputs or more, but there is only 'a' [3, 5], 'b' [6]"),
        ({"block": [2, 2]}, "{block: [2, 2]} needs kernels [.., in, out], but 'b' is [6]; exclude it"),
    ],
    ids=["2:4", "block"],
)
def test_leaves_without_such_units_are_named(granularity, told):
    leaves = {"a": jnp.ones((3, 5)), "b": jnp.ones(6)}
    for call in (
        lambda: pj.score("magnitude", leaves, prunable=["*"], granularity=granularity),
        lambda: pj.mask(leaves, granularity=granularity, **({} if granularity == "2:4" else {"keep": 1})),
    ):
        with pytest.raises(UserMistake) as caught:
            call()
        assert str(caught.value) == told


def test_a_leaf_of_one_axis_has_a_kernel_for_each_weight_and_stays_dense_in_n_of_m():
    leaves = {"w": jnp.arange(8.0).reshape(4, 2), "scale": jnp.array([9.0, 1.0, 8.0])}
    np.testing.assert_array_equal(pj.mask(leaves, keep=3, granularity="kernel")["scale"], [True, False, True])
    assert np.all(pj.mask(leaves, granularity="2:4")["scale"])


ALL = "(allowed: weight, n:m such as '2:4', {block: [r, c]}, kernel, neuron, group, layer)"
UNREADABLE = [
    ("kernels", f"granularity 'kernels' is not known; did you mean 'kernel'? {ALL}"),
    ("4:2", "granularity '4:2' keeps 4 of each 2: n must be at least 1 and below m, as in '2:4'"),
    ("0:4", "granularity '0:4' keeps 0 of each 4: n must be at least 1 and below m, as in '2:4'"),
    ("02:4", f"granularity '02:4' is not known {ALL}"),
    (124, 'granularity 124 is a number, which is what YAML makes of 2:4; write it in quotes: "2:4"'),
    ({"blocks": [2, 2]}, f"granularity {{'blocks': [2, 2]}} is not known {ALL}"),
    (
        {"block": [2, 0]},
        "granularity {'block': [2, 0]} gives [2, 0] where rows and columns are wanted, whole numbers from 1 on: "
        "{block: [4, 1]}",
    ),
    (
        {"block": 4},
        "granularity {'block': 4} gives 4 where rows and columns are wanted, whole numbers from 1 on: {block: [4, 1]}",
    ),
    (
        "group",
        f"granularity 'group' is not possible here {ALL.replace(', group, layer', '')}",
    ),
]


@pytest.mark.parametrize(("granularity", "told"), UNREADABLE, ids=[str(g) for g, _ in UNREADABLE])
def test_what_is_no_granularity_is_told(granularity, told):
    with pytest.raises(UserMistake) as caught:
        pj.mask({"w": jnp.ones((4, 4))}, keep=1, granularity=granularity)
    assert str(caught.value) == told


@pytest.mark.parametrize("granularity", ["kernel", "neuron", {"block": [2, 2]}], ids=str)
def test_a_criterion_that_does_not_fit_says_what_fits(granularity):
    with pytest.raises(UserMistake, match=r"is not possible here \(allowed: weight, n:m such as '2:4', group, layer\)"):
        pj.score("taylor", {"w": jnp.ones((2, 2))}, loss=jnp.sum, batches=[], granularity=granularity)


def test_a_block_of_random_scores_has_the_number_of_its_first_weight():
    params = {"w": jnp.ones((5, 5))}
    weights, units = (
        pj.score("random", params, key=jax.random.key(0), granularity=g)["w"] for g in ("weight", {"block": [2, 2]})
    )
    np.testing.assert_array_equal(units, weights[::2, ::2])


@pytest.mark.parametrize(("p", "order"), [(1, 1), (2, 2), ("inf", np.inf)], ids=["1", "2", "inf"])
def test_magnitude_of_kernels_by_norm(p, order):
    kernel = np.random.default_rng(0).standard_normal((3, 3, 2, 4)).astype(np.float32)
    scores = pj.score("magnitude", {"w": kernel}, granularity="kernel", options={"p": p})["w"]
    wanted = [[np.linalg.norm(kernel[..., i, o].ravel(), ord=order) for o in range(4)] for i in range(2)]
    np.testing.assert_allclose(scores, wanted, rtol=1e-6)


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
    with pytest.raises(UserMistake, match=r"granularity 'neurons' is not known; did you mean 'neuron'\?"):
        unit_scores({}, "neurons")
    with pytest.raises(
        UserMistake,
        match=r"granularity 'neuron' is not possible here \(allowed: weight, n:m such as '2:4', group, layer\)",
    ):
        pj.score("taylor", {"w": jnp.ones((2, 2))}, loss=jnp.sum, batches=[], granularity="neuron")
    with pytest.raises(UserMistake, match=r"the scores of 'w' are \[3\] but the parameter is \[2, 2\]"):
        pj.mask({"w": jnp.ones(3)}, keep=1, params={"w": jnp.ones((2, 2))})


@pytest.mark.parametrize(("shape", "axis"), [((3, 2, 5, 8), -1), ((6, 4), 0), ((2, 9, 3), 1)], ids=str)
def test_n_of_m_runs_along_the_axis_that_is_named(shape, axis):
    """By slow loops, what is dead before dying first; a group of fewer than four keeps at most two."""
    rng = np.random.default_rng(0)
    scores, alive = rng.random(shape, np.float32), rng.random(shape) > 0.3
    words = {"granularity": {"n_m": "2:4", "axis": axis}, "alive": {"w": jnp.asarray(alive)}}
    found = np.moveaxis(np.asarray(pj.mask({"w": jnp.asarray(scores)}, **words)["w"]), axis, -1)
    ranked = np.moveaxis(np.where(alive, scores, -1), axis, -1)
    for place in np.ndindex(ranked.shape[:-1]):
        for start in range(0, ranked.shape[-1], 4):
            group = ranked[place][start : start + 4]
            wanted = np.zeros(len(group), bool)
            wanted[np.argsort(-group, kind="stable")[:2]] = True
            np.testing.assert_array_equal(found[place][start : start + 4], wanted & (group >= 0))


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"n_m": "2:4", "axis": "out"}, "needs n:m in quotes and the number of an axis"),
        ({"n_m": "2:4", "axis": 2}, "needs a kernel of 4 or more along axis 2, but there is only 'w' .8, 8."),
        ({"n_m": "2:4", "of": 1}, "is not known"),
    ],
    ids=["a word", "no such axis", "unknown"],
)
def test_axes_that_cannot_be_are_refused(written, message):
    with pytest.raises(UserMistake, match=message):
        pj.mask({"w": jnp.ones((8, 8))}, granularity=written)
