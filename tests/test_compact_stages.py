"""Groups pruned, compacted, trained on and exported by stages: what was masked and what is compact are one network."""

import sys

import jax
import numpy as np
import pytest

from prune_jax import cli
from prune_jax.checkpoints import Store
from prune_jax.errors import UserMistake
from prune_jax.export import load_stablehlo
from prune_jax.models import Network, Variables
from prune_jax.networks import read_network
from prune_jax.prediction import predict, read_inputs
from prune_jax.records import Run
from prune_jax.structure import reading_order
from tests.plain import EVALUATE, TRAIN, arrays, part, run_plain, tiny
from tests.test_stages import MODELS


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("store"))


GROUPS = {"kind": "prune", "criterion": "magnitude", "granularity": "group", "target": {"sparsity": 0.5}}
COMPACT = {"kind": "compact"}
RECOVERY = {"kind": "finetune", "steps": 2}
KINDS = ("mlp", "cnn", "resnet", "autoencoder", "gru", "lstm", "transformer", "tokens", "nnx", "linen")
SLOW = ("cnn", "resnet", "lstm", "transformer", "tokens", "linen", "autoencoder", "nnx", "gru")


def size(store, result):
    return sum(a.size for a in part(arrays(store, result), "params").values())


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in KINDS])
def test_what_was_masked_and_what_is_compact_give_the_same_figures(shared, kind):
    data, model, objective = MODELS[kind]
    stages = {
        "train": {**TRAIN, "steps": 3},
        "prune": GROUPS,
        "compact": COMPACT,
        "finetune": RECOVERY,
        "evaluate": {**EVALUATE, "of": ["train", "prune", "compact", "finetune"]},
        "export": {"kind": "export", "of": "finetune"},
    }
    _, results = run_plain(tiny(data, model=model, objective=objective, **stages), shared)
    found = {name: results["evaluate"].metrics[results[name].key] for name in stages["evaluate"]["of"]}
    for metric in ("loss", "accuracy", "mse"):
        if metric in found["prune"]:
            assert found["compact"][metric] == pytest.approx(found["prune"][metric], rel=1e-4, abs=1e-5)
    assert found["compact"]["params"] == size(shared, results["compact"]) < found["train"]["params"]
    assert found["compact"]["params"] == found["finetune"]["params"]
    assert found["compact"]["macs"] < found["train"]["macs"]
    assert found["compact"]["nonzero"] <= found["prune"]["nonzero"]
    assert results["export"].metrics["stablehlo"]["largest_difference"] <= 1e-4
    assert any(group["dead"] for group in results["compact"].metrics["groups"].values())


@pytest.mark.parametrize("stage", ["prune.1.mask", "compact"])
def test_groups_are_told_with_their_members_and_shapes(shared, stage):
    _, results = run_plain(tiny(train=TRAIN, prune=GROUPS, compact=COMPACT), shared)
    told = results[stage].metrics
    whole, small = (part(arrays(shared, results[name]), "params") for name in ("train", "compact"))
    assert {p: (tuple(b), tuple(a)) for p, b, a in told["parameters"]} == {
        path: (values.shape, small[path].shape) for path, values in whole.items()
    }
    order = [path for path, _, _ in told["parameters"]]
    assert order == ["hidden_0/kernel", "hidden_0/bias", "output/kernel", "output/bias"]
    (group,) = told["groups"].values()
    assert group["kind"] == "neuron"
    assert sorted(group["members"]) == [["hidden_0/bias", 0], ["hidden_0/kernel", 1], ["output/kernel", 0]]


def test_parameters_are_read_in_the_order_of_their_use():
    inner = jax.jit(lambda p, x: x @ p["z"] + p["y"][None])

    def apply(params, state, inputs, *, train, key):
        x, _ = jax.lax.scan(lambda c, _: (c @ params["b"], None), inner(params, inputs[0]), None, 2)
        return x @ params["a"], state

    shapes = {name: jax.ShapeDtypeStruct((3, 3), "float32") for name in ("a", "b", "idle", "z")}
    params = {**shapes, "y": jax.ShapeDtypeStruct((3,), "float32")}
    network = Network(lambda key: Variables(params, {}), apply)
    assert reading_order(network, (np.zeros((1, 3), np.float32),)) == ["z", "y", "b", "a", "idle"]


def test_fine_tuning_moves_the_compact_network(shared):
    stages = {"train": TRAIN, "prune": GROUPS, "compact": COMPACT, "finetune": RECOVERY}
    _, results = run_plain(tiny(**stages), shared)
    before, after = (part(arrays(shared, results[name]), "params") for name in ("compact", "finetune"))
    assert all(before[path].shape == after[path].shape for path in before)
    assert any((before[path] != after[path]).any() for path in before)


def test_a_rewind_after_compaction_starts_from_the_cut_weights_at_initialisation(shared):
    recovery = {**RECOVERY, "rewind": "initialisation", "steps": 1, "optimizer": {"name": "sgd", "learning_rate": 1e-9}}
    stages = {"train": TRAIN, "prune": GROUPS, "compact": COMPACT, "finetune": recovery}
    _, results = run_plain(tiny(**stages), shared)
    first = part(arrays(shared, results["finetune.rewind"]), "params")
    keep = part(arrays(shared, results["compact"]), "keep/params")
    left = part(arrays(shared, results["finetune"]), "params")["hidden_0/kernel"]
    np.testing.assert_allclose(left, first["hidden_0/kernel"][:, keep["hidden_0/kernel/1"]], atol=1e-6)


def test_weights_are_pruned_after_structure(shared):
    stages = {
        "train": TRAIN,
        "prune": GROUPS,
        "compact": COMPACT,
        "thin": {"kind": "prune", "criterion": "magnitude", "target": {"sparsity": 0.5}},
        "evaluate": {**EVALUATE, "of": ["train", "compact", "thin"]},
    }
    _, results = run_plain(tiny(**stages), shared)
    found = results["evaluate"].metrics
    thin, compact = found[results["thin"].key], found[results["compact"].key]
    assert thin["params"] == compact["params"]
    assert thin["sparsity"] == pytest.approx(0.5, abs=0.05)


def test_a_compact_network_is_cut_again(shared):
    model = {"kind": "mlp", "widths": [12, 8]}
    again = {**GROUPS, "criterion": "random", "scope": "layer"}
    stages = {
        "train": TRAIN,
        "prune": GROUPS,
        "compact": COMPACT,
        "more": {**again, "after": "compact"},
        "smaller": {**COMPACT, "after": "more"},
        "evaluate": {**EVALUATE, "of": ["more", "smaller"]},
    }
    _, results = run_plain(tiny(model=model, **stages), shared)
    more, smaller = (results["evaluate"].metrics[results[name].key] for name in ("more", "smaller"))
    assert smaller["loss"] == pytest.approx(more["loss"], rel=1e-5)
    assert smaller["params"] < more["params"]


@pytest.mark.parametrize(("target", "quantity"), [({"params": 0.6}, "params"), ({"macs": 0.6}, "macs")])
def test_a_budget_is_kept(shared, target, quantity):
    stages = {
        "train": TRAIN,
        "prune": {**GROUPS, "target": target},
        "compact": COMPACT,
        "evaluate": {**EVALUATE, "of": ["train", "compact"]},
    }
    _, results = run_plain(tiny(model={"kind": "mlp", "widths": [12, 8]}, **stages), shared)
    dense, small = (results["evaluate"].metrics[results[name].key][quantity] for name in ("train", "compact"))
    assert 0.4 * dense < small <= 0.6 * dense


def test_rounds_prune_a_group_step_by_step_and_what_is_dead_stays_dead(shared):
    prune = {
        **GROUPS,
        "criterion": "taylor",
        "schedule": {"kind": "iterative", "rounds": 2},
        "finetune": {"steps": 2},
    }
    _, results = run_plain(tiny(model={"kind": "mlp", "widths": [12, 8]}, train=TRAIN, prune=prune), shared)
    dead = []
    for turn in (1, 2):
        groups = results[f"prune.{turn}.mask"].metrics["groups"]
        dead.append({name: group["dead"] for name, group in groups.items()})
    assert sum(dead[0].values()) < sum(dead[1].values()) == 10
    assert all(dead[0][name] <= dead[1][name] for name in dead[0])
    first, last = (read_network(shared, results[f"prune.{turn}.mask"].ref).masks for turn in (1, 2))
    assert not (last["hidden_0"]["kernel"] & ~first["hidden_0"]["kernel"]).any()


LAYERED = {
    "blobs": {"kind": "tests.samples.nets:Residual"},
    "series": {"kind": "transformer", "dim": 4, "heads": 2, "layers": 2},
    "images": {"kind": "resnet", "depth": 14, "width": 2},
}


@pytest.mark.parametrize("data", [d if d == "blobs" else pytest.param(d, marks=pytest.mark.slow) for d in LAYERED])
def test_residual_branches_are_pruned_taken_away_and_what_is_left_trains_on(shared, data):
    formats = ["stablehlo", "safetensors", *(["onnx"] if data != "blobs" else [])]
    stages = {
        "train": TRAIN,
        "prune": {
            **GROUPS,
            "criterion": "taylor",
            "granularity": "layer",
            "schedule": {"kind": "iterative", "rounds": 2},
            "finetune": {"steps": 2},
        },
        "compact": COMPACT,
        "finetune": RECOVERY,
        "thin": {**GROUPS, "after": "finetune"},
        "smaller": COMPACT,
        "evaluate": {**EVALUATE, "of": ["train", "prune", "compact", "thin", "smaller"]},
        "export": {"kind": "export", "of": "smaller", "formats": formats},
    }
    _, results = run_plain(tiny(data, model=LAYERED[data], **stages), shared)
    found = {name: results["evaluate"].metrics[results[name].key] for name in stages["evaluate"]["of"]}
    for small, masked in (("compact", "prune"), ("smaller", "thin")):
        assert found[small]["loss"] == pytest.approx(found[masked]["loss"], rel=1e-4)
        assert found[small]["params"] < found[masked]["params"]
    groups = results["compact"].metrics["groups"]
    layers = {name: group for name, group in groups.items() if group["kind"] == "layer"}
    assert layers
    assert all(group["dead"] == group["units"] == 1 for group in layers.values())
    assert any(group["dead"] == group["units"] > 1 for group in groups.values())  # what was in them
    assert results["export"].metrics["stablehlo"]["largest_difference"] <= 1e-4


def test_excluded_layers_keep_their_units(shared):
    prune = {**GROUPS, "exclude": ["hidden_0/*"]}
    model = {"kind": "mlp", "widths": [12, 8, 6]}
    _, results = run_plain(tiny(model=model, train=TRAIN, prune=prune, compact=COMPACT), shared)
    groups = results["compact"].metrics["groups"]
    assert groups["params/hidden_0.out"]["dead"] == 0
    assert groups["params/hidden_2.out"]["dead"] > 0


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({"kinds": ["head"]}, "stages.prune.kinds = ['head']: there is no group of kind 'head' (kinds: neuron)"),
        (
            {"scope": "erk"},
            "stages.prune.scope: erk does not go with granularity group (allowed: global, layer, isomorphic)",
        ),
        (
            {"target": {"threshold": 0.1}},
            "stages.prune.target.threshold: does not go with granularity group "
            "(allowed: sparsity, params, macs, latency)",
        ),
        (
            {"granularity": "weight", "target": {"macs": 0.5}},
            "stages.prune.target.macs: does not go with granularity weight",
        ),
        (
            {"criterion": "taylor", "granularity": "neuron"},
            "'neuron' is not possible here (allowed: weight, n:m such as '2:4', group, layer)",
        ),
        (
            {"granularity": "layer"},
            "stages.prune.granularity = 'layer': the function has no residual branch",
        ),
        (
            {"granularity": "layer", "scope": "layer"},
            "scope: layer does not go with granularity layer (allowed: global)",
        ),
        (
            {"granularity": "layer", "criterion": "fpgm"},
            "stages.prune.granularity = 'layer': granularity 'layer' is not possible here",
        ),
    ],
)
def test_what_does_not_go_with_groups_is_refused(shared, prune, message):
    with pytest.raises(UserMistake) as mistake:
        run_plain(tiny(train=TRAIN, prune={**GROUPS, **prune}), shared)
    assert message.partition(":")[0] in str(mistake.value)
    assert message.partition(": ")[2] in str(mistake.value)


def test_an_export_answers_what_the_network_answers(store):
    stages = {"train": TRAIN, "prune": GROUPS, "compact": COMPACT, "export": {"kind": "export"}}
    plan, results = run_plain(tiny(**stages), store)
    Run(plan, store, "tiny").finish(results)
    x = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    params = part(arrays(store, results["compact"]), "params")
    hidden = np.maximum(x @ params["hidden_0/kernel"] + params["hidden_0/bias"], 0)
    expected = hidden @ params["output/kernel"] + params["output/bias"]
    np.testing.assert_allclose(predict(store, "tiny", {"x": x}), expected, rtol=1e-5, atol=1e-6)
    folder = store.path(results["export"].ref)
    again = load_stablehlo((folder / "model.stablehlo").read_bytes())
    np.testing.assert_allclose(again(x[:2]), expected[:2], rtol=1e-5, atol=1e-6)
    import safetensors.numpy

    saved = safetensors.numpy.load((folder / "model.safetensors").read_bytes())
    np.testing.assert_array_equal(saved["params/hidden_0/kernel"], params["hidden_0/kernel"])
    with pytest.raises(UserMistake, match=r"the inputs do not fit the network of run 'tiny': x \[7, 3\]"):
        predict(store, "tiny", {"x": x[:, :3]})
    (folder / "model.stablehlo").write_bytes(b"something else")
    with pytest.raises(Exception, match="is not the file that was written"):
        predict(store, "tiny", {"x": x})


def test_the_command_predicts_and_tells_what_does_not_go(store, tmp_path, monkeypatch, capsys):
    stages = {"train": TRAIN, "export": {"kind": "export", "formats": ["stablehlo"]}}
    plan, results = run_plain(tiny(**stages), store)
    Run(plan, store, "tiny").finish(results)
    np.savez(tmp_path / "in.npz", x=np.ones((2, 4), np.float32))

    def command(*more):
        arguments = ["prune-jax", "predict", "tiny", tmp_path / "in.npz", "--store", store.root, *more]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    code, printed, _ = command()
    assert (code, len(printed.splitlines()), len(printed.split())) == (0, 2, 6)
    code, printed, _ = command("-o", tmp_path / "out")
    assert (code, printed) == (0, f"{tmp_path / 'out'}: outputs [2, 3]\n")
    assert np.load(tmp_path / "out")["outputs"].shape == (2, 3)
    code, _, told = command("-o", tmp_path / "none" / "out.npz")
    assert code == 2
    assert "out.npz: cannot be written (No such file or directory)" in told


def test_inputs_are_read_and_never_unpickled(tmp_path):
    np.savez(tmp_path / "one.npz", digits=np.ones((2, 3)))
    assert read_inputs(str(tmp_path / "one.npz"))["x"].shape == (2, 3)
    np.savez(tmp_path / "two.npz", a=np.ones(2), b=np.ones(2))
    with pytest.raises(UserMistake, match="holds a, b but no x"):
        read_inputs(str(tmp_path / "two.npz"))
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], dtype=object))
    with pytest.raises(UserMistake, match=r"is no \.npz file of plain arrays"):
        read_inputs(str(tmp_path / "pickled.npz"))
    with pytest.raises(UserMistake, match="there is no such file"):
        read_inputs(str(tmp_path / "none.npz"))


def test_batch_statistics_are_estimated_anew(shared):
    model = {"kind": "mlp", "widths": [12, 8], "batch_norm": True}
    anew = {**COMPACT, "reestimate_batches": 3, "after": "prune"}
    stages = {"train": {**TRAIN, "steps": 30}, "prune": GROUPS, "compact": COMPACT, "anew": anew}
    plan, results = run_plain(tiny(model=model, **stages), shared)
    before, after = (part(arrays(shared, results[name]), "state") for name in ("compact", "anew"))
    params = part(arrays(shared, results["anew"]), "params")
    from prune_jax.problems import dataset_of

    problem = plan.calls[0].problem
    split = dataset_of(problem).train["x"]
    size = problem.data.batch_size
    inputs = [np.asarray(split[i * size : (i + 1) * size], np.float32) for i in range(3)]
    hidden = [x @ params["hidden_0/kernel"] + params.get("hidden_0/bias", 0) for x in inputs]
    (mean,) = [path for path in after if path.endswith("mean") and after[path].shape == (hidden[0].shape[1],)][:1]
    np.testing.assert_allclose(after[mean], np.mean([h.mean(0) for h in hidden], axis=0), rtol=1e-4, atol=1e-5)
    assert not np.allclose(before[mean], after[mean], rtol=1e-3)


@pytest.mark.slow
def test_a_latency_is_measured_and_kept(shared):
    wide = {"kind": "mlp", "widths": [1500, 1500]}
    stages = {"train": {**TRAIN, "steps": 1}, "prune": {**GROUPS, "target": {"latency": 0.5}}, "compact": COMPACT}
    _, results = run_plain(tiny(model=wide, **stages), shared)
    dead = sum(group["dead"] for group in results["compact"].metrics["groups"].values())
    assert 300 < dead < 2998
    impossible = {**GROUPS, "target": {"latency": 1e-6}}
    _, results = run_plain(tiny(train=TRAIN, prune=impossible), shared, name_failures=False)
    assert "target.latency = 1e-06 is out of reach" in results["prune"].message
