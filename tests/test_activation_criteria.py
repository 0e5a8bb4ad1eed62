"""Criteria of what units answer to data: planted structure is ranked as it should be, scores are those of loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prune_jax as pj
from prune_jax.checkpoints import Store
from prune_jax.criteria import CRITERIA
from prune_jax.datasets.bundled import digits
from prune_jax.errors import UserMistake
from prune_jax.group_scoring import score_groups
from prune_jax.unit_statistics import FINE, gather_units
from tests.compiling import compilations
from tests.plain import TRAIN, run_plain, tiny
from tests.test_stages import MODELS
from tests.zoo import Make

make = Make()
DETECTORS, TWIN, CONSTANT, DEAD, NOISE = range(10), 10, 11, 12, 13  # hidden neurons; the twin is that of the seven's


def hidden(params, x):
    return jax.nn.relu(x @ params["in"]["kernel"] + params["in"]["bias"][None])


def logits(params, x):
    return hidden(params, x) @ params["out"]["kernel"]


def loss(params, batch):
    each = -jax.nn.log_softmax(logits(params, batch["x"]))
    return jnp.mean(jnp.take_along_axis(each, batch["y"][:, None], axis=1))


def correct(params, batch):
    return jnp.argmax(logits(params, batch["x"]), axis=1) == batch["y"]


@pytest.fixture(scope="module")
def planted():
    """Digits and a column of noise; a neuron for each class, fitted by least squares, and four that are planted."""
    rng = np.random.default_rng(0)
    data = digits()
    x = np.concatenate([data["x_train"].reshape(-1, 64), rng.normal(size=(len(data["x_train"]), 1))], axis=1)
    y = data["y_train"].astype(np.int32)
    ones = np.ones((len(x), 1))
    fit = np.linalg.lstsq(np.concatenate([x[:, :64], ones], 1), np.eye(10)[y], rcond=None)[0]
    kernel, bias, out = np.zeros((65, 14)), np.zeros(14), np.zeros((14, 10))
    kernel[:64, :10], bias[:10], out[:10] = fit[:64], fit[64], 10 * np.eye(10)
    kernel[:, TWIN], bias[TWIN] = kernel[:, 7], bias[7]
    out[7, 7], out[TWIN, 7] = 6, 4
    bias[CONSTANT], bias[DEAD] = 1, -1
    kernel[64, NOISE] = 1
    out[[CONSTANT, DEAD, NOISE]] = 0.01 * rng.normal(size=(3, 10))
    tree = {"in": {"kernel": kernel, "bias": bias}, "out": {"kernel": out}}
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)
    batches = [{"x": x[i : i + 250].astype(np.float32), "y": y[i : i + 250]} for i in range(0, len(x), 250)]
    return params, batches


def scored(name, planted, **options):
    params, batches = planted
    net = pj.trace(logits, params, batches[0]["x"])
    given = {"loss": loss, "correct": correct, "batches": iter(batches), "options": options}
    return score_groups(net, CRITERIA[name], params, **given)["in.out"]


@pytest.fixture(scope="module")
def activations(planted):
    params, batches = planted
    return np.concatenate([np.asarray(hidden(params, batch["x"])) for batch in batches])


@pytest.fixture(scope="module")
def labels(planted):
    return np.concatenate([batch["y"] for batch in planted[1]])


def test_apoz_is_the_share_of_zeros_and_a_dead_neuron_is_lowest(planted, activations):
    found = scored("apoz", planted)
    np.testing.assert_allclose(found, (activations != 0).mean(axis=0), atol=2e-3)
    assert found.argmin() == DEAD
    assert found[DEAD] == 0
    assert found[CONSTANT] == 1


def entropy_of(counts):
    p = counts[counts > 0] / counts.sum()
    return -(p * np.log(p)).sum()


def test_entropy_is_that_of_a_histogram_and_a_constant_neuron_has_none(planted, activations):
    found = scored("entropy", planted, bins=8)
    expected = [entropy_of(np.histogram(column, bins=8)[0]) for column in activations.T]
    np.testing.assert_allclose(found, expected, atol=0.03)
    assert found[CONSTANT] == found[DEAD] == 0
    assert sorted(found.argsort()[:2]) == [CONSTANT, DEAD]


def test_mutual_information_is_high_where_a_class_depends_on_a_neuron_and_low_for_noise(planted, activations, labels):
    found = scored("mutual_information", planted, bins=8)
    expected = []
    for column in activations.T:
        of_class = [np.histogram(column[labels == y], bins=8, range=(column.min(), column.max()))[0] for y in range(10)]
        joint = np.array(of_class) / len(labels)
        apart = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
        expected.append((joint[joint > 0] * np.log(joint[joint > 0] / apart[joint > 0])).sum())
    np.testing.assert_allclose(found, expected, atol=0.02)
    assert found[CONSTANT] == found[DEAD] == 0
    assert sorted(found.argsort()[:3]) == [CONSTANT, DEAD, NOISE]
    assert found[NOISE] < 0.25 * found[:10].min()


def test_correlation_finds_one_of_two_twins(planted, activations):
    found = scored("correlation", planted)
    with np.errstate(invalid="ignore", divide="ignore"):
        near = np.abs(np.nan_to_num(np.corrcoef(activations.T)))
    assert found[CONSTANT] == found[DEAD] == 0
    living = [unit for unit in range(14) if unit not in (CONSTANT, DEAD)]
    expected = dict.fromkeys(range(14), 0.0) | {living[0]: 1.0}
    while len(living) > 1:  # slowly
        pairs = [(near[a, b], a, b) for a in living for b in living if a < b]
        most, a, b = max(pairs, key=lambda pair: round(pair[0], 5))
        spread = activations.std(axis=0)
        goes = b if spread[b] <= spread[a] * (1 + 1e-5) else a
        expected[goes] = 1 - most
        living.remove(goes)
        expected[living[0]] = 1.0
    np.testing.assert_allclose(found, [expected[unit] for unit in range(14)], atol=1e-4)
    assert found[TWIN] < 1e-5
    assert found[7] > 0.3  # what is left of the two is one of its kind


def test_forgetting_is_what_is_right_with_the_neuron_and_wrong_without(planted, activations, labels):
    params, _ = planted
    found = scored("forgetting", planted)
    out = np.asarray(params["out"]["kernel"])
    right = (activations @ out).argmax(axis=1) == labels
    without = [(np.delete(activations, u, 1) @ np.delete(out, u, 0)).argmax(axis=1) == labels for u in range(14)]
    expected = [(right & ~now).mean() for now in without]
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert found[[CONSTANT, DEAD, NOISE]].max() < 0.01
    others = [unit for unit in DETECTORS if unit != 7]  # the seven's twin stands in for it
    assert found[others].min() > 0.05
    assert found[7] < found[others].min()


@pytest.mark.parametrize("name", ["apoz", "entropy", "mutual_information", "correlation", "forgetting"])
def test_a_second_call_compiles_nothing_and_how_examples_are_batched_does_not_matter(name, planted):
    params, batches = planted
    before, newer = scored(name, planted), jax.tree.map(lambda w: w * 1, params)
    with compilations() as seconds:
        scored(name, (newer, batches))
    assert not seconds
    whole = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    np.testing.assert_allclose(scored(name, (params, [whole])), before, atol=1e-4)


def test_a_histogram_counts_exactly_while_its_range_grows():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(50, 3)), 1000 * rng.normal(size=(7, 3)), np.full((9, 3), -3e-5)])
    x = (x * [1, 1e-12, 3e9]).astype(np.float32)
    y = rng.integers(0, 5, len(x))
    params = {"w": jnp.eye(3), "o": jnp.eye(3)}
    net = pj.trace(lambda p, x: x @ p["w"] @ p["o"], params, jnp.ones((1, 3)))
    (group,) = net.groups.values()

    def gathered(rows):
        batches = [{"x": jnp.asarray(x[i]), "y": jnp.asarray(y[i])} for i in rows]
        apply = jax.tree_util.Partial(lambda p, batch: batch["x"] @ p["w"] @ p["o"])
        stats = gather_units({"histogram", "label_histogram"}, net.groups, apply, params, batches)
        return stats.histogram[group.name], stats.label_histogram[group.name]

    whole, of_labels = gathered([np.arange(len(x))])
    for unit in range(3):
        column = x[:, unit].astype(np.float64)
        numbers = np.floor(column / 2.0 ** float(whole.exponent[unit])).astype(int)
        halves = np.floor(column / 2.0 ** float(whole.exponent[unit] - 1)).astype(int)
        assert numbers.max() - numbers.min() < FINE <= halves.max() - halves.min()
        expected = np.bincount(numbers - numbers.min(), minlength=FINE)
        np.testing.assert_array_equal(whole.counts[unit], expected)
        for label in range(5):
            expected = np.bincount((numbers - numbers.min())[y == label], minlength=FINE)
            np.testing.assert_array_equal(of_labels.counts[unit, label], expected)
    parts = gathered(np.split(rng.permutation(len(x)), 2))
    for a, b in zip(jax.tree.leaves((whole, of_labels)), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(a, b)


def conv(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def test_a_channel_is_all_that_its_readers_see_of_it():
    params = {"a": make(3, 3, 1, 4), "b": make(1, 1, 4, 2), "o": make(4 * 16, 2)}

    def apply(p, x):
        h = jax.nn.relu(conv(x, p["a"]))
        return conv(h, p["b"]).mean((1, 2)) + (2 * h).reshape(x.shape[0], -1) @ p["o"]

    x = make(6, 4, 4, 1)
    net = pj.trace(apply, params, x)
    batches = [{"x": x[:4], "y": jnp.zeros(4, int)}, {"x": x[4:], "y": jnp.zeros(2, int)}]
    function = jax.tree_util.Partial(lambda p, batch: apply(p, batch["x"]))
    stats = gather_units({"zeros", "histogram", "covariance"}, net.groups, function, params, batches)
    (name,) = stats.zeros
    h = np.asarray(jax.nn.relu(conv(x, params["a"])))
    values = np.concatenate([h.reshape(6, 16, 4), 2 * h.reshape(6, 16, 4)], axis=1)  # [batch, places, channels]
    np.testing.assert_allclose(stats.zeros[name], (values == 0).mean((0, 1)), atol=1e-6)
    pooled = values.mean(axis=1)
    np.testing.assert_allclose(stats.histogram[name].low, pooled.min(axis=0), rtol=1e-5)
    np.testing.assert_allclose(stats.histogram[name].high, pooled.max(axis=0), rtol=1e-5)
    np.testing.assert_allclose(stats.covariance[name], np.cov(values.reshape(-1, 4).T, bias=True), rtol=1e-4)


def attention(p, x, gates=None):
    """Two blocks of three heads each; `gates` `[2, 3]` stand on what the heads answer."""
    for i in range(2):
        q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[f"{name}{i}"]) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        held = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        held = held if gates is None else held * gates[i][None, None, :, None]
        x = x + jnp.einsum("bqhd,hde->bqe", held, p[f"out{i}"])
    return x.mean(1) @ p["o"]


HEADS = {
    **{f"{name}{i}": make(4, 3, 2) for i in range(2) for name in "qkv"},
    **{f"out{i}": make(3, 2, 4) for i in range(2)},
    "o": make(4, 2),
}


def attention_loss(p, batch, gates=None):
    return jnp.mean(jnp.square(attention(p, batch["x"], gates) - batch["y"]))


def test_the_importance_of_a_head_is_that_of_a_gate_on_what_it_answers():
    batches = [{"x": make(n, 5, 4), "y": make(n, 2)} for n in (4, 3)]
    params = {**HEADS, "out0": HEADS["out0"].at[1].set(0)}  # nothing reads the first block's second head
    net = pj.trace(attention, params, batches[0]["x"])
    found = score_groups(net, CRITERIA["head_importance"], params, loss=attention_loss, batches=iter(batches))
    by_gates = jax.jit(jax.grad(lambda gates, example: attention_loss(params, example, gates)))
    examples = [jax.tree.map(lambda a, i=i: a[i : i + 1], batch) for batch in batches for i in range(len(batch["x"]))]
    expected = np.mean([np.abs(by_gates(jnp.ones((2, 3)), example)) for example in examples], axis=0)
    assert [net.groups[name].kind for name in found] == ["head", "head"]
    np.testing.assert_allclose(np.stack(list(found.values())), expected, rtol=1e-4, atol=1e-7)
    assert np.stack(list(found.values()))[0].argmin() == 1
    newer = jax.tree.map(lambda w: w * 2, params)
    with compilations() as seconds:
        score_groups(net, CRITERIA["head_importance"], newer, loss=attention_loss, batches=iter(batches))
    assert not seconds


def blocks(p, x):
    x = x @ p["in"]
    x = x + jnp.tanh(x @ p["a"]["u"]) @ p["a"]["d"]
    x = jax.checkpoint(lambda q, h: h + jnp.tanh(h @ q["u"]) @ q["d"])(p["b"], x)
    return x @ p["out"]


def test_the_influence_of_a_block_is_how_far_it_turns_its_input():
    params = {"in": make(3, 4), "out": make(4, 2), **{n: {"u": make(4, 6), "d": make(6, 4)} for n in "ab"}}
    params["b"]["d"] = 1e-3 * params["b"]["d"]
    batches = [{"x": make(n, 5, 3)} for n in (6, 2)]
    net = pj.trace(blocks, params, batches[0]["x"])

    def loss(p, batch):
        return jnp.mean(jnp.square(blocks(p, batch["x"])))

    given = {"loss": loss, "kinds": "layer", "batches": iter(batches)}
    found = score_groups(net, CRITERIA["block_influence"], params, **given)
    x = np.concatenate([np.asarray(batch["x"]) for batch in batches]) @ np.asarray(params["in"])
    for name in "ab":
        y = x + np.tanh(x @ np.asarray(params[name]["u"])) @ np.asarray(params[name]["d"])
        cosines = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
        np.testing.assert_allclose(found[f"{name}.layer"], [1 - cosines.mean()], rtol=1e-3, atol=1e-6)
        x = y
    assert found["b.layer"] < 1e-3 < found["a.layer"]
    assert net.choose(found, sparsity=0.5, kinds="layer") == {"b.layer": [0]}
    with compilations() as seconds:
        score_groups(net, CRITERIA["block_influence"], params, **{**given, "batches": iter(batches)})
    assert not seconds


def loop(p, x):
    return jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]) @ p["v"], None), x, None, length=2)[0]


MISTAKES = [
    ("apoz", {"batches": []}, "there are no batches to gather statistics from; give at least one."),
    ("forgetting", {"correct": None}, "criterion 'forgetting' needs answers that are right or wrong: give correct="),
    ("mutual_information", {"batches": [{"x": np.ones((2, 65), np.float32)}]}, "mutual information needs labels: "),
    ("head_importance", {}, "no group is one of attention heads; choose taylor"),
    ("entropy", {"loss": None}, "criterion 'entropy' needs the loss: give loss= and batches=."),
]


@pytest.mark.parametrize(("name", "given", "message"), MISTAKES, ids=[name for name, _, _ in MISTAKES])
def test_mistakes(name, given, message, planted):
    params, batches = planted
    net = pj.trace(logits, params, batches[0]["x"])
    words = {"loss": lambda p, b: jnp.mean(logits(p, b["x"])), "correct": correct, "batches": batches[:1], **given}
    with pytest.raises(UserMistake) as caught:
        score_groups(net, CRITERIA[name], params, **words)
    assert str(caught.value).startswith(message)


def test_groups_that_are_read_in_loops_alone_are_told():
    params = {"w": make(3, 4), "v": make(4, 3)}
    net = pj.trace(loop, params, make(2, 3))
    with pytest.raises(UserMistake, match=r"no group's activations can be seen: .* \('w' in scan, 'v' in scan\)"):
        score_groups(
            net, CRITERIA["apoz"], params, loss=lambda p, b: jnp.mean(loop(p, b["x"])), batches=[{"x": make(2, 3)}]
        )


OF_GROUPS = ("apoz", "entropy", "mutual_information", "correlation", "forgetting")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("store"))


def pruned_by(criterion, granularity="group", **more):
    return {"kind": "prune", "criterion": criterion, "granularity": granularity, "target": {"sparsity": 0.5}, **more}


@pytest.mark.slow
def test_a_recipe_prunes_groups_by_each(shared):
    stages = {"train": TRAIN}
    for name in OF_GROUPS:
        stages |= {name: pruned_by(name, after="train"), f"small-{name}": {"kind": "compact"}}
    _, results = run_plain(tiny(model={"kind": "mlp", "widths": [8, 6]}, **stages), shared)
    for name in OF_GROUPS:
        groups = results[f"small-{name}"].metrics["groups"].values()
        assert sum(group["dead"] for group in groups) == 7


@pytest.mark.slow
def test_a_recipe_takes_away_the_layer_that_turns_least(shared):
    stages = {"train": TRAIN, "prune": pruned_by("block_influence", "layer"), "compact": {"kind": "compact"}}
    _, results = run_plain(tiny(model={"kind": "tests.samples.nets:Residual"}, **stages), shared)
    assert sorted(g["dead"] for g in results["prune.1.mask"].metrics["groups"].values()) == [0, 1]


@pytest.mark.slow
def test_a_recipe_prunes_heads_by_their_importance(shared):
    model = {"kind": "transformer", "dim": 8, "heads": 4, "layers": 2}
    stages = {"train": TRAIN, "prune": pruned_by("head_importance"), "compact": {"kind": "compact"}}
    _, results = run_plain(tiny("series", model=model, **stages), shared)
    groups = results["compact"].metrics["groups"]
    assert sum(group["dead"] for group in groups.values() if group["kind"] == "head") == 4


@pytest.mark.parametrize("name", [*OF_GROUPS, "head_importance", "block_influence"])
def test_other_granularities_are_refused_when_the_recipe_is_read(name, shared):
    allowed = ", ".join(CRITERIA[name].granularities)
    for granularity in ("weight", "2:4", "neuron"):
        more = {"target": None} if granularity == "2:4" else {}
        with pytest.raises(UserMistake, match=rf"stages.prune.granularity = .* not possible here \(allowed: {allowed}"):
            run_plain(tiny(train=TRAIN, prune=pruned_by(name, granularity, **more)), shared)


REFUSED = [
    ("forgetting", {}, "stages.prune.criterion.name = 'forgetting': needs answers that are right or wrong"),
    ("mutual_information", {}, "stages.prune.criterion.name = 'mutual_information': needs labels, but `y` holds numb"),
    ("entropy", {"bins": 1}, "stages.prune.criterion.options = {'bins': 1}: criterion 'entropy': bins = 1 is not poss"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_what_the_recipe_cannot_mean_is_refused(name, options, message, shared):
    stages = {"train": TRAIN, "prune": pruned_by({"name": name, "options": options})}
    model = {"kind": "linear"}
    with pytest.raises(UserMistake, match="tiny: ") as caught:
        run_plain(tiny("numbers", model=model, objective="regression", **stages), shared)
    assert message in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cnn", "resnet", "gru", "nnx", "linen"])
def test_what_is_compact_is_pruned_again(shared, kind):
    data, model, objective = MODELS[kind]
    stages = {"train": TRAIN, "prune": pruned_by("mutual_information"), "compact": {"kind": "compact"}}
    stages |= {
        "again": pruned_by("correlation", schedule={"kind": "iterative", "rounds": 2}),
        "smaller": {"kind": "compact"},
        "thin": {"kind": "prune", "criterion": "wanda", "scope": "output", "target": {"sparsity": 0.25}},
    }
    if kind == "gru":  # its kernels are read in a loop
        stages.pop("thin")
    _, results = run_plain(tiny(data, model=model, objective=objective, **stages), shared)
    dead = [sum(g["dead"] for g in results[name].metrics["groups"].values()) for name in ("compact", "smaller")]
    assert min(dead) > 0
