"""Methods side by side: means, spreads and paired differences against numpy and scipy, panels, several runs."""

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from prune_jax.checkpoints import Store
from prune_jax.cli import app
from prune_jax.errors import UserMistake
from prune_jax.report import comparison
from prune_jax.report.page import page
from tests.report_runs import record, stage

CRITERIA, LEVELS, SEEDS, MODELS = ("random", "magnitude", "snip"), (0.8, 0.95), range(4), ("mlp", "cnn")
DENSE = {"params": 1000, "macs": 5000}


def _result(value, kind, row, *, left=1.0):
    sizes = {"nonzero": int(1000 * left), "effective_macs": int(5000 * left), "sparsity": 1 - left}
    return {"accuracy": value, "loss": 0.1, **DENSE, **sizes, "kind": kind, "key": "k", "row": row, "layers": {}}


def _run(name="many", *, models=MODELS, values=None):
    """A run of `criteria x sparsities x seeds` on each model, with the dense network trained longer."""
    rng = np.random.default_rng(len(name))
    values = rng.uniform(0.5, 0.99, (len(models), len(CRITERIA), len(LEVELS), len(SEEDS))) if values is None else values
    stages, results = {}, {}
    for m, model in enumerate(models):
        for seed in SEEDS:
            row = {**({"kind": model} if len(models) > 1 else {}), "seed": seed}
            end = f"{model},{seed}"
            stages[f"train[{end}]"] = stage("train", "t", "train", row=row)
            results[f"train[{end}]"] = _result(0.97 + 0.001 * seed, "train", row)
            stages[f"longer[{end}]"] = stage("finetune", "t", "finetune", after=[f"train[{end}]"], row=row)
            results[f"longer[{end}]"] = _result(0.98, "finetune", row)
            for c, criterion in enumerate(CRITERIA):
                for s, level in enumerate(LEVELS):
                    there = f"prune[{end},{criterion},{level}]"
                    full = {**row, "name": criterion, "prune.target.sparsity": str(level)}
                    stages[there] = stage("prune", "p", "prune", after=[f"train[{end}]"], row=full)
                    results[there] = _result(values[m, c, s, seed], "prune", full, left=1 - level)
    recipe = {
        "name": name,
        "matrix": {"model.kind": list(models), "seed": list(SEEDS)} if len(models) > 1 else {"seed": list(SEEDS)},
        "stages": {
            "train": {"kind": "train"},
            "longer": {"kind": "finetune"},
            "prune": {"kind": "prune", "criterion": {"name": "snip"}, "matrix": {"criterion.name": [*CRITERIA]}},
        },
    }
    return record(name, stages, results, recipe=recipe), values


def test_means_spreads_and_paired_differences():
    run, values = _run()
    panels = comparison.panels_of(run)
    assert [p.title for p in panels] == list(MODELS)
    for m, panel in enumerate(panels):
        assert list(panel.curves) == list(CRITERIA)
        assert panel.levels == list(LEVELS)
        assert panel.reference == "random"
        assert panel.controls == {"random"}
        assert panel.dense.mean == pytest.approx(0.9715)
        assert panel.longer.mean == pytest.approx(0.98)
        for c, criterion in enumerate(CRITERIA):
            for s, level in enumerate(LEVELS):
                place = panel.at(criterion, level)
                assert place.mean == pytest.approx(values[m, c, s].mean())
                assert place.deviation == pytest.approx(values[m, c, s].std(ddof=1))
                assert place.ratio("compression") == pytest.approx(1 / (1 - level), rel=1e-2)
                gap = panel.difference(criterion, level, "random")
                if criterion == "random":
                    assert gap is None
                    continue
                gaps = values[m, c, s] - values[m, 0, s]
                assert gap.mean == pytest.approx(gaps.mean())
                assert gap.error == pytest.approx(stats.sem(gaps))
                assert gap.pairs == len(SEEDS)
                assert gap.clear == (stats.ttest_rel(values[m, c, s], values[m, 0, s]).pvalue < 0.05)


def test_a_difference_of_pairs_is_clear_where_seeds_differ_more_than_methods():
    luck = np.array([0.5, 0.7, 0.8, 0.9])
    values = np.empty((1, 3, 2, 4))
    values[0, 0], values[0, 1], values[0, 2] = luck, luck + np.array([0.01, 0.011, 0.012, 0.009]), luck[::-1]
    (panel,) = comparison.panels_of(_run(models=("mlp",), values=values)[0])
    assert panel.difference("magnitude", 0.8, "random").clear
    assert not panel.difference("snip", 0.8, "random").clear
    cells = {row.label: row.cells[0] for row in comparison.rows_of(panel, "accuracy", "random")}
    assert cells["magnitude"] == ("0.7355 ± 0.1707", "+0.0105 ± 0.0006", True)
    assert cells["random"] == ("0.7250 ± 0.1708", "", False)


def test_one_method_or_one_seed():
    values = np.full((1, 3, 2, 4), 0.9)
    run, _ = _run(models=("mlp",), values=values)
    alone = {n: r for n, r in run["results"].items() if "snip" in n or n.startswith("train")}
    assert comparison.panels_of({**run, "results": alone}) == []
    (panel,) = comparison.panels_of({**run, "results": alone}, least=1)
    assert panel.reference == "dense"
    assert panel.longer is None
    once = {n: r for n, r in run["results"].items() if r["row"]["seed"] == 0}
    (panel,) = comparison.panels_of({**run, "results": once})
    gap = panel.difference("snip", 0.8, "random")
    assert gap == comparison.Difference(0.0, None, 1)
    assert not gap.clear


def test_several_runs_are_methods_of_one_panel():
    runs = [_run(name, models=("mlp",))[0] for name in ("first", "second run")]
    (panel,) = comparison.panels_of(comparison.merged(runs))
    assert list(panel.curves) == [f"{r}, {c}" for r in ("first", "second run") for c in CRITERIA]
    assert panel.controls == {"first, random", "second run, random"}
    assert panel.difference("first, snip", 0.8, "second run, snip").pairs == len(SEEDS)
    with pytest.raises(UserMistake, match=r"no method 'snop' here.*dense, first, random"):
        panel.known("snop")


def test_the_report_and_the_command(store, tmp_path):
    run, _ = _run()
    html = page(store, run)
    assert '<section id="comparison">' in html
    assert html.count("speedup in theory") == 4
    store.write_record(run)
    out = tmp_path / "many.png"
    given = ["compare", "many", "--store", str(store.root)]
    done = CliRunner().invoke(app, [*given, "-o", str(out), "--against", "magnitude"])
    assert done.exit_code == 0
    assert done.stdout.endswith(f"{out}\n")
    assert "difference from magnitude" in " ".join(done.stdout.split())
    assert out.read_bytes().startswith(b"\x89PNG")
    assert CliRunner().invoke(app, given).stdout.endswith("runs/many/comparison.png\n")
    refused = CliRunner().invoke(app, [*given, "-o", "many.doc"])
    assert isinstance(refused.exception, UserMistake)
    assert "allowed: .png, .svg, .pdf" in str(refused.exception)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def test_runs_of_different_networks_are_compared_each_with_its_own_dense_one():
    small, large = (_run(name, models=("mlp",))[0] for name in ("small", "large"))
    for run, shift, model in ((small, -0.2, {"kind": "mlp"}), (large, 0.0, {"kind": "cnn"})):
        run["recipe"]["model"] = model
        for r in run["results"].values():
            r["accuracy"] += shift
            r["key"] = f"{model}"
    merged = comparison.panels_of(comparison.merged([small, large]))
    assert [(p.title, list(p.curves)) for p in merged] == [
        (n, [f"{n}, {c}" for c in CRITERIA]) for n in ("small", "large")
    ]
    for run, panel in zip((small, large), merged, strict=True):
        (alone,) = comparison.panels_of(run)
        assert panel.dense.mean == alone.dense.mean
        assert panel.difference(f"{run['name']}, snip", 0.8, "dense") == alone.difference("snip", 0.8, "dense")


def _single(name, seed, value, *, dense=0.97, metric="accuracy", **train):
    """A run of one seed: dense, and pruned to a half."""
    stages = {"train": stage("train", "t", "train"), "prune": stage("prune", "p", "prune", after=["train"])}
    results = {"train": _result(dense, "train", {}), "prune": _result(value, "prune", {}, left=0.5)}
    for n, r in results.items():
        r["key"] = f"{n} {seed}"
        r[metric] = r.pop("accuracy")
    recipe = {"name": name, "seed": seed, "stages": {"train": {"kind": "train", **train}, "prune": {"kind": "prune"}}}
    return record(name, stages, results, recipe=recipe)


def test_runs_without_a_matrix_are_paired_by_the_seeds_of_their_recipes():
    runs = [_single("a", 0, 0.9, dense=0.97), _single("b", 1, 0.8, dense=0.95), _single("c", 1, 0.7, dense=0.95)]
    (panel,) = comparison.panels_of(comparison.merged(runs))
    assert {seed: n.value for seed, n in panel.dense.networks.items()} == {"0": 0.97, "1": 0.95}
    assert panel.difference("b", None, "a") is None  # other seeds
    assert panel.difference("b", None, "c").mean == pytest.approx(0.1)
    assert panel.difference("a", None, "dense").mean == pytest.approx(-0.07)


def test_errors_show_their_digits_and_which_way_is_up():
    run = _single("a", 0, 3.21e-5, dense=1.25e-5, metric="mse")
    (panel,) = comparison.panels_of(run, least=1)
    ((_, (cell,)),) = comparison.rows_of(panel, "mse", "dense")
    assert cell == ("3.210e-05", "+0.0000196", False)
    assert "mse (lower is better)" in str(comparison.comparison_rich(panel, "mse", "dense").title)
    with pytest.raises(UserMistake, match=r"different things \(a mse, b accuracy\)"):
        comparison.merged([run, _single("b", 0, 0.9)])


def test_what_was_trained_sparse_is_a_method_and_another_training_another_network():
    run = _single("a", 0, 0.9)
    run["recipe"]["stages"]["rigl"] = {"kind": "train", "sparsify": {"kind": "rigl"}}
    run["stages"]["rigl"] = stage("train", "r", "rigl")
    run["results"]["rigl"] = _result(0.93, "train", {}, left=0.5)
    (panel,) = comparison.panels_of(run)
    assert list(panel.curves) == ["prune", "rigl"]
    assert panel.dense.mean == 0.97
    assert panel.difference("rigl", None, "dense").mean == pytest.approx(-0.04)
    run["recipe"]["stages"]["rigl"] = {"kind": "train", "l1": 0.1}
    titles = [(p.title, list(p.curves), p.dense.mean) for p in comparison.panels_of(run, least=1)]
    assert titles == [("train", ["prune"], 0.97)]
    again = _single("b", 0, 0.8, dense=0.9, l1=0.1)
    again["results"]["train"]["key"] = "another"
    assert [p.dense.mean for p in comparison.panels_of(comparison.merged([run, again]), least=1)] == [0.97, 0.9]
