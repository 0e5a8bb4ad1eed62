"""The first and the last layer are those of the dataflow, whatever their names; a recipe keeps them dense by a word."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import prune_jax as pj
from prune_jax.checkpoints import Store
from prune_jax.errors import UserMistake
from prune_jax.models import build
from prune_jax.order import uses
from prune_jax.preparation import check_networks, prepare
from prune_jax.recipe import read_recipe
from tests.plain import TRAIN, arrays, part, run_plain, tiny

X = jnp.ones((2, 3))


def ones(*shape):
    return jnp.ones(shape)


def mlp(p, x):
    """Layers whose names sort otherwise than they come, cast in the order of their names before they are used."""
    p = jax.tree.map(lambda w: w.astype(jnp.bfloat16), p)
    h = jax.nn.relu(x.astype(jnp.bfloat16) @ p["z"]["kernel"] + p["z"]["bias"][None])
    aside = h @ p["b"]["kernel"].T  # nobody asks for it
    h = jax.nn.relu(h @ p["m"]["kernel"])
    return [h @ p["a"]["kernel"], aside][0]


MLP = {"z": {"kernel": ones(3, 4), "bias": ones(4)}, "b": {"kernel": ones(4, 4)}, "m": {"kernel": ones(4, 4)}}
MLP["a"] = {"kernel": ones(4, 2)}


def conv_net(p, x):
    for name in ("stem", "body"):
        x = jax.lax.conv_general_dilated(x, p[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return x.mean((1, 2)) @ p["class"]


def recurrent(p, x):
    """Loops: what a loop carries begins as a parameter; the deepest layer is scanned over a stack."""
    h = jnp.broadcast_to(p["h0"][0][None], (x.shape[0], 3))
    h, _ = jax.lax.scan(lambda h, x: (jnp.tanh(h @ p["a"] + x @ p["u"]), None), h, jnp.stack([x, x]))
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["b"])
    h = jax.lax.cond(h.sum() > 0, lambda h: h @ p["c"], lambda h: h, h)
    return jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] @ p["d"]), (0, h))[1]


NETWORKS = {
    "mlp": (mlp, MLP, X, ["z/kernel", "z/bias", "m/kernel", "a/kernel"]),
    "convolutions": (
        conv_net,
        {"stem": ones(3, 3, 1, 2), "body": ones(3, 3, 2, 2), "class": ones(2, 5)},
        ones(1, 4, 4, 1),
        ["stem", "body", "class"],
    ),
    "loops": (
        recurrent,
        {"h0": ones(1, 3), **{n: ones(3, 3) for n in "aucd"}, "b": ones(2, 3, 3)},
        X,
        ["h0", "a", "u", "b", "c", "d"],
    ),
    "tied": (
        lambda p, x: jnp.tanh(p["e"][x] @ p["w"]) @ p["e"].T,
        {"e": ones(7, 3), "w": ones(3, 3)},
        jnp.arange(4),
        "ewe",
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_are_used_where_they_meet_the_data(name):
    apply, params, x, expected = NETWORKS[name]
    assert uses(apply, params, x) == list(expected)
    assert pj.ends(apply, params, x) == (f"/{expected[0]}", f"/{expected[-1]}")


def test_the_ends_of_a_transformer_are_its_embedding_and_its_output():
    tokens, lengths = jax.ShapeDtypeStruct((1, 5), "int32"), jax.ShapeDtypeStruct((1,), "int32")
    args = {"dim": 8, "heads": 2, "layers": 2, "vocab": 11}
    network = build("transformer", args, inputs=(tokens, lengths), outputs=3)
    variables = jax.eval_shape(network.init, jax.random.key(0))
    forward = lambda p, *x: network.apply(p, variables.state, x, train=False, key=None)[0]  # noqa: E731
    first, last = pj.ends(forward, variables.params, tokens, lengths)
    paths = pj.scoring.prunable_paths(variables.params)
    assert len(paths) > 8
    assert (first, last) == ("/embedding/embedding", "/output/kernel"), paths


def test_an_anchored_pattern_leaves_its_namesakes_alone():
    """Names that hold signs of patterns, and a layer of the same name further down."""
    params = {"out[0]": ones(3, 2), "block": {"out[0]": ones(3, 3)}, "in": ones(3, 3)}
    first, last = pj.ends(lambda p, x: x @ p["in"] @ p["block"]["out[0]"] @ p["out[0]"], params, X)
    assert pj.scoring.prunable_paths(params, exclude=[first, last]) == ("block/out[0]",)


def test_inputs_that_meet_no_layer_are_refused():
    with pytest.raises(UserMistake, match="no layer is first or last: the inputs meet none of w"):
        pj.ends(lambda p, x: x, {"w": ones(2, 2)}, X)


def test_python_excludes_them():
    first, last = pj.ends(mlp, MLP, X)
    scores = pj.score("magnitude", MLP, exclude=[first, last])
    assert [path for path, leaf in scores.items() if leaf["kernel"] is not None] == ["b", "m"]
    state = pj.ste(optax.sgd(0.1), sparsity=0.5, exclude=pj.ends(mlp, MLP, X)).init(MLP)
    assert state.masks["z"]["kernel"] is state.masks["a"]["kernel"] is None


def pruned(**more):
    return {"kind": "prune", "criterion": "magnitude", "target": {"sparsity": 0.5}, **more}


WIDE = {"kind": "mlp", "widths": [6, 5, 4]}
KERNELS = ["hidden_0/kernel", "hidden_1/kernel", "hidden_2/kernel", "output/kernel"]


def test_a_pruning_spares_the_ends(tmp_path):
    store = Store(tmp_path)
    _, results = run_plain(tiny(train={"kind": "train", "steps": 1}, prune=pruned(spare=["first"])), store)
    masks = part(arrays(store, results["prune"]), "masks")
    assert list(masks) == ["output/kernel"]
    assert (~masks["output/kernel"]).sum() == masks["output/kernel"].size / 2


@pytest.mark.slow
def test_stages_spare_the_ends(tmp_path):
    """In pruning of weights and of groups, in a mask of scores of everything, and in a training that prunes."""
    stages = {
        "train": {**TRAIN, "sparsify": {"kind": "static", "sparsity": 0.5, "spare": ["first", "last"]}},
        "plain": {"kind": "train", "steps": 1},
        "prune": pruned(after="plain", spare=["last", "first"]),
        "groups": pruned(after="plain", spare="first", granularity="group"),
        "score": {"kind": "score", "criterion": "magnitude", "after": "plain"},
        "mask": {"kind": "mask", "target": {"sparsity": 0.5}, "spare": ["last"]},
    }
    store = Store(tmp_path)
    _, results = run_plain(tiny(model=WIDE, **stages), store)
    found = {name: part(arrays(store, results[name]), "masks") for name in ("train", "prune", "groups", "mask")}
    sparse = {name: [k for k in KERNELS if k in masks and not masks[k].all()] for name, masks in found.items()}
    assert sparse["train"] == sparse["prune"] == KERNELS[1:3]
    assert sparse["mask"] == KERNELS[:3]
    assert sparse["groups"] == KERNELS[1:]  # nothing of the first layer's outputs, nor of what reads them, by them
    for name in ("train", "prune"):
        dead, size = (sum(f(found[name][k]) for k in KERNELS[1:3]) for f in (lambda m: (~m).sum(), np.size))
        assert dead == round(0.5 * size)
    first = found["groups"][KERNELS[0]]
    assert first.all()


def test_it_is_in_the_key_where_something_is_spared_in_whatever_order():
    def key(**more):
        return prepare(read_recipe(tiny(train=TRAIN, prune=pruned(**more)))).calls[1].key

    assert key() == key(spare=[])
    assert key(spare="first") == key(spare=["first"]) != key()
    assert key(spare=["first", "last"]) == key(spare=["last", "first", "last"])


MISTAKES = [
    ({"prune": pruned(spare="middle")}, "stages.prune.spare = 'middle': is not known (allowed: first, last)"),
    (
        {"prune": pruned(spare=["first", "last"])},
        "stages.prune.spare = ['first', 'last']: there is nothing to prune: of hidden_0/bias, ",
    ),
    (
        {"prune": pruned(spare="first", granularity="group")},
        "stages.prune.spare = ['/hidden_0/kernel']: no group is left",
    ),
    (
        {"prune": {"kind": "train", "steps": 9, "sparsify": {"kind": "ste", "spare": ["last", "first"]}}},
        "stages.prune.sparsify.spare = ['first', 'last']: there is nothing to prune",
    ),
]


@pytest.mark.parametrize(("stages", "message"), MISTAKES, ids=range(len(MISTAKES)))
def test_nothing_left_is_refused_before_anything_runs(stages, message):
    with pytest.raises(UserMistake) as caught:
        check_networks(prepare(read_recipe(tiny(train=TRAIN, **stages))))
    assert message in str(caught.value)
