"""Wanda against slow loops, and the scope in which the inputs of each output compete."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prune_jax as pj
from prune_jax.checkpoints import Store
from prune_jax.errors import UserMistake
from tests.plain import TRAIN, arrays, part, run_plain, tiny
from tests.zoo import Make

make = Make()


def apply(p, x):
    h = jax.lax.conv_general_dilated(x, p["conv"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jax.nn.relu(h).reshape(len(x), -1) @ p["out"]["kernel"] + p["out"]["bias"][None]


def loss(p, batch):
    return jnp.mean(jnp.square(apply(p, batch["x"])))


PARAMS = {"conv": make(2, 2, 3, 4), "out": {"kernel": make(16, 5), "bias": make(5)}}
BATCHES = [{"x": make(n, 3, 3, 3)} for n in (4, 4, 3)]


def test_scores_are_those_of_slow_loops():
    found = pj.score("wanda", PARAMS, loss=loss, batches=iter(BATCHES))
    assert found["out"]["bias"] is None
    x = np.concatenate([np.asarray(batch["x"], np.float64) for batch in BATCHES])
    w, v = np.asarray(PARAMS["conv"], np.float64), np.asarray(PARAMS["out"]["kernel"], np.float64)
    h = np.zeros((11, 2, 2, 4))
    squares = np.zeros((2, 2, 3))
    for n in range(11):
        for i in range(2):
            for j in range(2):
                patch = x[n, i : i + 2, j : j + 2]
                squares += patch**2
                h[n, i, j] = np.maximum(np.einsum("abc,abco->o", patch, w), 0)
    expected = np.abs(w) * np.sqrt(squares / 11)[..., None]
    np.testing.assert_allclose(found["conv"], expected, rtol=1e-4)
    norms = np.linalg.norm(h.reshape(11, 16), axis=0) / np.sqrt(11)
    np.testing.assert_allclose(found["out"]["kernel"], np.abs(v) * norms[:, None], rtol=1e-4, atol=1e-7)


def test_the_paper_s_masks_are_those_of_scope_output():
    scores = pj.score("wanda", PARAMS, loss=loss, batches=BATCHES)
    masks = pj.mask(scores, sparsity=0.5, scope="output")
    for leaf, mask in ((scores["conv"], masks["conv"]), (scores["out"]["kernel"], masks["out"]["kernel"])):
        rows, alive = (
            np.asarray(leaf).reshape(-1, leaf.shape[-1]),
            np.ones((leaf.size // leaf.shape[-1], leaf.shape[-1])),
        )
        for output in range(leaf.shape[-1]):
            alive[np.argsort(rows[:, output], kind="stable")[: len(rows) // 2], output] = 0
        np.testing.assert_array_equal(np.asarray(mask).reshape(alive.shape), alive)
    pattern = pj.mask(scores, granularity="2:4")["out"]["kernel"]
    assert (np.asarray(pattern).reshape(4, 4, 5).sum(axis=1) == 2).all()


@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "tied"])
def test_each_output_loses_exactly_so_many_and_what_is_dead_dies_first(rows, ties):
    rng = np.random.default_rng(0)
    scores = rng.random((rows, 6)).astype(np.float32)
    scores = np.round(scores, 1) if ties else scores
    earlier = rng.random((rows, 6)) < 0.8
    for alive in (None, earlier):
        given = {} if alive is None else {"alive": {"w": alive}}
        mask = np.asarray(pj.mask({"w": scores}, sparsity=0.6, scope="output", **given)["w"])
        for output in range(6):
            tier = np.zeros(rows) if alive is None else alive[:, output]
            order = np.lexsort((np.arange(rows), scores[:, output], tier))
            expected = np.ones(rows, bool) if alive is None else alive[:, output].copy()
            expected[order[: round(0.6 * rows)]] = False
            np.testing.assert_array_equal(mask[:, output], expected)


def test_kernels_of_a_convolution_compete_for_their_output():
    scores = {"w": jnp.asarray(np.random.default_rng(0).random((3, 3, 8, 5)), jnp.float32)}
    mask = pj.mask(scores, sparsity=0.25, scope="output", granularity="kernel")["w"]
    assert (np.asarray(mask).all((0, 1)).sum(axis=0) == 6).all()


@pytest.mark.parametrize(("shape", "sparsity", "alive"), [((1, 4), 0.4, 4), ((8, 3), 0.05, 24), ((2, 1, 3), 0.5, 3)])
def test_outputs_of_few_inputs_lose_what_rounding_leaves_them(shape, sparsity, alive):
    mask = pj.mask({"w": np.arange(np.prod(shape), dtype=np.float32).reshape(shape)}, sparsity=sparsity, scope="output")
    assert int(mask["w"].sum()) == alive


MISTAKES = [
    ({"keep": 3}, "each output loses the same share of its inputs: its target is sparsity, not keep"),
    ({"sparsity": 0.5, "min_keep": 2}, "min_keep = 2 counts a leaf's units, but scope output an output's"),
    (
        {"sparsity": 0.5, "granularity": "neuron"},
        "scope output goes with granularity weight or kernel, not with neuron",
    ),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_mistakes(words, message):
    with pytest.raises(UserMistake, match=message):
        pj.mask({"w": jnp.ones((4, 4))}, scope="output", **words)
    with pytest.raises(UserMistake, match=r"needs kernels \[.., in, out\], but 'b' is \[4\]; exclude it"):
        pj.mask({"b": jnp.ones(4)}, scope="output", sparsity=0.5)


def test_what_a_loop_reads_is_told():
    def recurrent(p, batch):
        return jnp.mean(jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), batch["x"], None, length=2)[0] @ p["o"])

    params = {"w": make(3, 3), "o": make(3, 1)}
    given = {"loss": recurrent, "batches": [{"x": make(2, 3)}]}
    with pytest.raises(UserMistake, match="what 'w' is multiplied with cannot be seen: it goes into 'scan'"):
        pj.score("wanda", params, **given)
    assert pj.score("wanda", params, **given, exclude=["w"])["o"].shape == (3, 1)


def pruned(**more):
    return {"kind": "prune", "criterion": "wanda", "scope": "output", "target": {"sparsity": 0.5}, **more}


def test_a_recipe_prunes_the_inputs_of_each_output(tmp_path):
    store = Store(tmp_path / "store")
    pairs = {"kind": "prune", "criterion": "wanda", "granularity": "2:4", "after": "train"}
    _, results = run_plain(tiny(train=TRAIN, prune=pruned(), pairs=pairs), store)
    masks = part(arrays(store, results["prune"]), "masks")
    for mask in masks.values():
        assert (mask.sum(axis=0) == len(mask) - round(len(mask) / 2)).all()
    assert results["pairs"].metrics["sparsity"] >= 0.4


REFUSED = [
    (
        {"granularity": "group", "scope": "global"},
        {},
        r"stages.prune.granularity = 'group': granularity 'group' is not possible here",
    ),
    ({"criterion": "magnitude", "granularity": "neuron"}, {}, "output does not go with granularity neuron"),
    ({"criterion": "magnitude", "granularity": "group"}, {}, "output does not go with granularity group"),
    ({"target": {"keep": 5}}, {}, "its target is sparsity, not keep"),
    ({"min_keep": 2}, {}, "min_keep = 2: counts a layer's units"),
    ({}, {"kind": "rnn", "width": 4}, "criterion.name = 'wanda': what '.*' is multiplied with .* goes into 'scan'"),
]


@pytest.mark.parametrize(("more", "model", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_makes_no_sense_is_refused_when_the_recipe_is_read(more, model, message, tmp_path):
    data = "series" if model else "blobs"
    with pytest.raises(UserMistake, match=message):
        run_plain(tiny(data, model=model or None, train=TRAIN, prune=pruned(**more)), Store(tmp_path / "store"))
    assert not (tmp_path / "store").exists()
