"""The report shows what the record and the artifacts say, stands alone, and is the same each time."""

import copy
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from prune_jax.checkpoints import Store
from prune_jax.errors import UserMistake
from prune_jax.recipe import Ref
from prune_jax.records import _headline
from prune_jax.report import charts, dag, facts, network, page, write_report
from tests import report_runs as runs

WIDTHS = ["hidden_0.out neuron 120 of 300 left", "hidden_1.out neuron 25 of 100 left"]
SECTIONS = ["results", "sparsity", "layers", "weights", "losses", "stages", "recipe", "versions"]
RUNS = {
    "plain": runs.one_run,
    "breached": lambda store: runs.one_run(store, breach=True),
    "matrix": runs.matrix_run,
    "compact": runs.compact_run,
    "groups": lambda store: runs.compact_run(store, cut=False),
    "search": runs.search_run,
    "failed": runs.failed_run,
}


class Page(HTMLParser):
    """Gathers what a reader sees, section by section, and every tag."""

    def __init__(self, html):
        super().__init__()
        self.texts, self.tags, self.ids, self.here, self.skip = {"": ""}, [], [], "", 0
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append((tag, given))
        if "id" in given:
            self.ids.append(given["id"])
        if tag == "section":
            self.here = given["id"]
            self.texts[self.here] = ""
        self.skip += tag in {"style", "script"}

    def handle_endtag(self, tag):
        self.skip -= tag in {"style", "script"}
        self.texts[self.here] += " "

    def handle_data(self, data):
        if not self.skip:
            self.texts[self.here] += data


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Each run in a store of its own, with its report: name -> (store, record, HTML)."""
    found = {}
    for word, build in RUNS.items():
        store = Store(tmp_path_factory.mktemp(word))
        name = build(store)
        found[word] = store, store.record(name), write_report(store, name).read_text()
    return found


def words(text):
    return " ".join(text.split())


def test_the_file_lies_beside_the_record(made):
    store, record, html = made["plain"]
    path = write_report(store, record["name"])
    assert path == store.root / "runs" / "lenet-300-100" / "report.html"
    assert path.read_text() == html


@pytest.mark.parametrize("word", RUNS)
def test_the_same_bytes_each_time(made, word):
    store, record, html = made[word]
    assert page.page(Store(store.root), record) == html


@pytest.mark.parametrize("word", RUNS)
def test_stands_alone(made, word):
    parsed = Page(made[word][2])
    assert not re.search(r"https?://|@import|url\((?!#)", made[word][2])
    fetched = {"script", "link", "img", "iframe", "object", "video", "audio", "source", "base", "form"}
    assert not fetched & {tag for tag, _ in parsed.tags}
    references = [v for _, given in parsed.tags for k, v in given.items() if k in {"src", "href", "xlink:href"}]
    assert references
    assert all(v.startswith("#") and v[1:] in parsed.ids for v in references)
    assert len(parsed.ids) == len(set(parsed.ids))


@pytest.mark.parametrize("word", RUNS)
def test_charts_follow_the_page(made, word):
    """Every colour in a chart is a variable of the style sheet, and every picture says what it shows."""
    html = made[word][2]
    known = set(re.findall(r"--(\w+):", html))
    drawings = re.findall(r"<svg.*?</svg>", html, re.S)
    assert drawings
    for drawing in drawings:
        assert not re.search(r"#[0-9a-f]{6}\b|rgb\(|font-family", re.sub(r'(?:href="|url\()#\w+', "", drawing))
        assert set(re.findall(r"var\(--(\w+)\)", drawing)) <= known
        assert re.search(r'role="img"', drawing)
        assert re.search(r'aria-label="[^"]{10,}"', drawing)
    assert "<style" not in "".join(drawings)  # it would reach the whole page
    assert html.count("<figure>") == html.count("<figcaption>")
    assert "prefers-color-scheme: dark" in html


def test_says_what_came_of_the_run(made):
    parsed = Page(made["plain"][2])
    assert list(parsed.texts) == ["", *SECTIONS]
    head = words(parsed.texts[""])
    assert "90 % sparse at accuracy 0.951 (−0.004)" in head
    for told in ("lenet-300-100", "completed", "2026-03-01 12:34", "cpu x2", "five rounds"):
        assert told in head


def test_the_results_are_the_records(made):
    record = made["plain"][1]
    shown = words(Page(made["plain"][2]).texts["results"])
    dense, pruned = record["results"]["train"], record["results"]["prune"]
    ratio = f"×{pruned['nonzero'] / dense['nonzero']:.3f}"
    assert f"accuracy {dense['accuracy']:.4f} {pruned['accuracy']:.4f} −0.0040" in shown
    assert f"non-zeros {dense['nonzero']:,} {pruned['nonzero']:,} {ratio}" in shown
    assert f"effective MACs {dense['effective_macs']:,} {pruned['effective_macs']:,} ×0.100" in shown
    assert "sparsity 0.0 % 90.0 %" in shown
    assert "loss 0.1712 0.1934 ×1.13" in shown
    assert "bytes 1.07 MB 1.07 MB ×1.00" in shown
    assert "latency p50, batch 1 0.0412 ms 0.0412 ms ×1.00" in shown
    assert "latency p90, batch 64 0.310 ms 0.310 ms ×1.00" in shown


def test_every_layer_is_there(made):
    record = made["plain"][1]
    shown = words(Page(made["plain"][2]).texts["layers"])
    for path, layer in record["results"]["prune"]["layers"].items():
        if layer["prunable"]:
            told = f"{100 * layer['sparsity']:.1f} % {layer['nonzero']:,} of {layer['size']:,} left"
            assert f"{path} {' × '.join(map(str, layer['shape']))} {told}" in shown
        else:
            assert path not in shown


def test_stages_recipe_and_versions_are_told(made):
    _, record, html = made["plain"]
    texts = {k: words(v) for k, v in Page(html).texts.items()}
    for name, stage in record["stages"].items():
        assert name in texts["stages"]
        assert stage["key"] in texts["stages"]
    assert "✓ ran · 18.2 s · 5 turns" in texts["stages"]
    assert "15 stages within" in texts["stages"]
    assert "optimizer: {name: adam, learning_rate: 0.0003}" in texts["recipe"]
    for package, version in record["versions"].items():
        assert f"{package} {version}" in texts["versions"]
    assert "store artifacts" in texts["versions"]


def test_lines_go_through_the_rounds(made):
    store, record, _ = made["plain"]
    dense, pruned = facts.series_of(store, record)
    expected = [(0.0, 0.956), *zip(runs.LEVELS, (0.957, 0.958, 0.955, 0.952, 0.948), strict=True)]
    np.testing.assert_allclose([p[:2] for p in pruned.lines[0]], expected)
    np.testing.assert_allclose([p[:2] for p in dense.tests], [(0.0, 0.955)])
    np.testing.assert_allclose([p[:2] for p in pruned.tests], [(0.9, 0.951)], atol=1e-4)
    assert pruned.breached == []


def test_a_refused_round_is_hollow(made):
    store, record, html = made["breached"]
    pruned = facts.series_of(store, record)[1]
    assert len(pruned.lines[0]) == 5
    np.testing.assert_allclose([p[:2] for p in pruned.breached], [(0.9, 0.921)])
    hollow = "fill: var(--surface); stroke: var(--c0)"
    assert hollow in html
    assert hollow not in made["plain"][2]
    texts = Page(html).texts
    assert "Hollow: rounds that the guard refused." in texts["sparsity"]
    assert "the guard allows 0.02" in texts["messages"]


def test_a_matrix_shows_mean_and_range_over_seeds(made):
    store, record, html = made["matrix"]
    dense, *pruned = facts.series_of(store, record)
    assert [s.label for s in pruned] == ["criterion=magnitude", "criterion=taylor"]
    for series in pruned:
        assert len(series.lines) == 3  # one climb to each sparsity
        for point, target in zip(sorted(series.tests), ("0.8", "0.9", "0.95"), strict=True):
            of = [
                r["accuracy"]
                for r in record["results"].values()
                if str(r["row"].get("target.sparsity")) == target and r["row"]["criterion"] == series.label[10:]
            ]
            assert len(of) == 2
            np.testing.assert_allclose(point[1:], (np.mean(of), min(of), max(of)))
    np.testing.assert_allclose(dense.tests[0][1:], (0.980, 0.979, 0.981))
    texts = {k: words(v) for k, v in Page(html).texts.items()}
    best = np.mean([r["accuracy"] for n, r in record["results"].items() if "taylor,sparsity=0.95" in n])
    assert f"95 % sparse at accuracy {best:.3f} (−" in texts[""]
    assert "prune[criterion=taylor,sparsity=0.95], mean of 2 seeds, the sparsest of 6" in texts[""]
    assert "10 more were evaluated" in texts["weights"]
    assert all(name in texts["results"] for name in record["results"])


def test_one_shot_prunings_of_a_matrix_make_one_line(made):
    store, record, _ = made["matrix"]
    record = copy.deepcopy(record)
    for stage in record["stages"].values():
        if stage["kind"] == "prune":
            stage["key"] = "gone"
    for target in (0.8, 0.9, 0.95):  # the artifacts are gone: the rounds are those that the turns tell of
        name = f"prune[criterion=taylor,sparsity={target},seed=0]"
        metrics = {"validation_accuracy": 1 - target / 2, "sparsity": target}
        record["stages"][f"{name}.1.mask"] = runs.stage("mask", "m", "mask", metrics=metrics)
    taylor = next(s for s in facts.series_of(store, record) if s.label == "criterion=taylor")
    np.testing.assert_allclose([p[:2] for p in taylor.lines[0]], [(0, 0.981), (0.8, 0.6), (0.9, 0.55), (0.95, 0.525)])
    assert len(taylor.lines) == 1


def test_a_compact_run_is_told_by_its_smallest_network(made):
    _, record, html = made["compact"]
    texts = {k: words(v) for k, v in Page(html).texts.items()}
    dense, small = (record["results"][name]["params"] for name in ("train", "finetune"))
    assert dense / small == pytest.approx(266610 / 97485)
    assert "2.73 times smaller at accuracy 0.952 (−0.003)" in texts[""]
    assert "finetune, the smallest of 3" in texts[""]
    assert f"parameters {dense:,} {dense:,} ×1.00 {small:,} ×0.366 {small:,} ×0.366" in texts["results"]
    assert "a compact network, whose pruned weights are cut away, has none of it" in texts["results"]
    assert "compact network" not in Page(made["groups"][2]).texts["results"]


@pytest.mark.parametrize("word", ["compact", "groups"])
def test_the_terminal_and_the_report_tell_of_the_same_network(made, word):
    record = made[word][1]
    told = _headline(record["stages"], record["results"], record["recipe"])
    shown = page.headline(record)["text"].replace("−", "-")
    assert shown.partition(" at ")[0] == told.partition(" at ")[0]
    assert re.findall(r"accuracy \S+ \(\S+\)", shown) == re.findall(r"accuracy \S+ \(\S+\)", told)


def test_small_networks_that_are_sparse_too_are_told_so(made):
    record = copy.deepcopy(made["compact"][1])
    record["results"]["finetune"] |= {"sparsity": 0.5, "nonzero": record["results"]["finetune"]["nonzero"] // 2}
    assert page.headline(record)["text"] == "2.73 times smaller, 50 % sparse at accuracy 0.952 (−0.003)"
    record["results"]["compact"] |= {"nonzero": 9}  # as few parameters, fewer of them not zero
    assert page.headline(record)["text"] == "2.73 times smaller at accuracy 0.949 (−0.006)"


def test_of_equally_small_rows_the_best_is_told_seeds_taken_together(made):
    record = copy.deepcopy(made["compact"][1])
    results, stages = record["results"], record["stages"]
    rows = [("taylor", 0, 0.95), ("taylor", 1, 0.96), ("random", 0, 0.9), ("random", 1, 0.8)]
    for name in ("compact", "finetune"):
        result, stage = results.pop(name), stages.pop(name)
        for criterion, seed, accuracy in rows:
            words, row = f"[criterion={criterion},seed={seed}]", {"criterion": criterion, "seed": seed}
            after = [a if a == "prune" else a + words for a in stage["after"]]
            stages[name + words] = {**stage, "after": after, "row": row}
            change = 0.01 if name == "finetune" else 0
            results[name + words] = {**result, "accuracy": accuracy + change, "row": row}
    told = page.headline(record)
    assert told["text"] == "2.73 times smaller at accuracy 0.965 (+0.010)"
    assert told["about"] == "finetune[criterion=taylor], mean of 2 seeds, the smallest of 3"  # random rows are controls


def test_compact_networks_lie_where_their_weights_are_gone(made):
    store, record, html = made["compact"]
    series = {s.label: s for s in facts.series_of(store, record)}
    dense = record["results"]["train"]["params"]
    gone = 1 - record["results"]["compact"]["params"] / dense
    np.testing.assert_allclose(series["dense"].tests[0][:2], (0, 0.955))
    for name, accuracy in (("prune", 0.949), ("compact", 0.949), ("finetune", 0.952)):
        np.testing.assert_allclose([p[:2] for p in series[name].tests], [(gone, accuracy)])
    first = 1 - (784 * 220 + 220 * 60 + 60 * 10 + 220 + 60 + 10) / dense
    np.testing.assert_allclose([p[:2] for p in series["prune"].lines[0]], [(0, 0.956), (first, 0.955), (gone, 0.95)])
    shown = words(Page(html).texts["sparsity"])
    assert "Size and accuracy" in shown
    assert shown.count("weights gone, % of the dense network's") == 2  # wide and narrow
    assert "Across: the share of the dense network's weights that is gone, masked or cut away." in shown
    assert (
        "Where two networks agree, as a masked one and the compact one cut from it, one star covers the other." in shown
    )
    assert "accuracy against share of weights gone of dense, prune" in html
    for word in ("plain", "groups"):
        shown = words(Page(made[word][2]).texts["sparsity"])
        assert "Sparsity and accuracy" in shown
        assert "sparsity, % of prunable weights" in shown
        assert "gone" not in shown


def test_rounds_of_a_network_that_was_compact_before_begin_there(made, tmp_path):
    source, record, _ = made["compact"]
    record, store = copy.deepcopy(record), Store(tmp_path / "again")
    small, _ = source.read(Ref("finetune", "cf"))
    masks = runs.magnitude_masks(small["params"], 0.5)
    metrics = {"validation_accuracy": 0.93, "sparsity": 0.5}
    rounds = [{"round": 1, "level": 0.5, "kind": "mask", "key": "m", "kept": True, "metrics": metrics}]
    store.write(Ref("prune", "again"), {"params": small["params"], "masks": masks}, {"facts": {"rounds": rounds}})
    record["stages"]["finetune"]["metrics"]["validation_accuracy"] = 0.953
    record["stages"]["again"] = runs.stage("prune", "again", "prune", after=["finetune"])
    again = next(s for s in facts.series_of(store, record) if s.label == "again")
    dense, params = (record["results"][name]["params"] for name in ("train", "finetune"))
    kernels = sum(layer["kernel"].size for layer in small["params"].values())  # biases are not prunable
    expected = [(1 - params / dense, 0.953), (1 - (params - 0.5 * kernels) / dense, 0.93)]
    np.testing.assert_allclose([p[:2] for p in again.lines[0]], expected)


def test_layers_of_compact_networks_have_no_row(made):
    record, html = copy.deepcopy(made["compact"][1]), made["compact"][2]
    shown = words(Page(html).texts["layers"])
    assert "hidden_0/kernel 784 × 300 60.0 % 94,080 of 235,200 left hidden_0/bias 300 60.0 % 120 of 300 left" in shown
    assert "that is pruned in prune;" in shown
    assert "94,080 of 94,080" not in shown
    assert page.layers(record).networks == ("prune",)
    del record["results"]["prune"]["layers"]
    assert page.layers(record) is None


def test_the_network_is_drawn_with_its_groups(made):
    html = made["compact"][2]
    shown = words(Page(html).texts["network"])
    for told in ("hidden_0 784 × 300→120 · bias", "hidden_1 300→120 × 100→25 · bias", "output 100→25 × 10 · bias"):
        assert told in shown
    assert "hidden_0.out neuron 300 → 120" in shown
    assert "As compact found it and left it" in shown
    assert html.count('<g class="rail"') == 2
    for word in ("plain", "groups"):  # no groups; groups of an artifact that tells no members
        assert "network" not in Page(made[word][2]).texts


def test_of_several_compactions_the_one_that_matters_is_drawn_first(made):
    store, record, _ = made["compact"]
    record = copy.deepcopy(record)
    record["stages"] = {"other": record["stages"]["compact"], **record["stages"]}
    html = page.page(store, record)
    assert "As compact found it" in words(Page(html).texts["network"])
    assert "<summary>other</summary>" in html


def test_rails_share_lanes_but_no_colour_beside_each_other():
    layers = network.layers_of([(f"layer_{i}/kernel", [4, 4], [4, 4]) for i in range(9)])

    def group(*rows):
        return {"dead": 1, "units": 4, "members": [[f"layer_{row}/kernel", 1] for row in rows]}

    told = {"long": group(0, 8), **{f"short_{i}": group(i, i + 1) for i in range(8)}}
    rails = {rail.name: rail for rail in network.rails_of(told, layers)}
    assert [rails[f"short_{i}"].lane for i in range(8)] == [0, 2] * 4
    assert rails["long"].lane == 1
    for a in rails.values():
        for b in rails.values():
            beside = a.rows[0] <= b.rows[-1] + 1 and b.rows[0] <= a.rows[-1] + 1
            assert a is b or not beside or a.ink != b.ink


def test_norms_are_drawn_in_the_layer_before_them():
    told = [("positions", [1, 9, 4]), ("norm/scale", [4]), ("a/q", [4, 4]), ("a/k", [4, 4]), ("a/bias", [4])]
    layers = network.layers_of([(path, shape, shape) for path, shape in told])
    assert [(layer.title, layer.also) for layer in layers] == [("positions", ["norm"]), ("a/q", []), ("a/k", ["bias"])]
    alone = network.layers_of([("scale", [4], [2]), ("bias", [4], [2])])
    assert [(layer.title, layer.also) for layer in alone] == [("scale", ["bias"])]


def test_a_deep_network_is_drawn_in_part():
    deep = network.SHOWN_BOXES + 7
    parameters = [(f"layer_{i}/kernel", [4, 4], [4, 3]) for i in range(deep)]
    members = [[f"layer_{i}/kernel", 1] for i in range(deep)]
    drawn, left_out = network.drawing({"g": {"dead": 1, "units": 4, "members": members}}, parameters)
    assert left_out == 7
    assert drawn.count('<g class="box"') == network.SHOWN_BOXES
    assert network.drawing({"g": {"dead": 1, "units": 4}}, parameters) is None


def test_widths_are_those_of_the_compaction(made):
    shown = words(Page(made["compact"][2]).texts["widths"])
    assert shown.startswith(f"Widths before and after {' '.join(WIDTHS)} How many units")
    assert "left after compact: the whole bar is the width before" in shown
    assert "--w: 40.0%" in made["compact"][2]
    assert "widths" not in Page(made["plain"][2]).texts


def test_widths_of_masked_groups_are_those_of_the_last_kept_round(made):
    store, record, html = made["groups"]
    shown = words(Page(html).texts["widths"])
    assert all(told.replace(" neuron", "") in shown for told in WIDTHS)
    assert "left after prune:" in shown
    assert facts.widths_of(store, record) == {"prune": record["stages"]["prune.2.mask"]["metrics"]["groups"]}


def test_a_mask_stage_of_groups_has_widths_too(store):
    metrics = {"groups": {"params/conv.out": {"dead": 3, "units": 8}}}
    assert page.widths(store, {"stages": {"mask": runs.stage("mask", "m", "mask", metrics=metrics)}}).rows == {
        "conv.out": ("", {"mask": (0.625, "5 of 8", "left")})
    }


def test_of_many_groups_those_are_shown_that_lost_most(made):
    store, record, _ = made["compact"]
    record = copy.deepcopy(record)
    groups = {f"params/conv_{i}.out": {"dead": i, "units": 1000, "kind": "channel"} for i in range(30)}
    record["stages"]["compact"]["metrics"]["groups"] = groups
    shown = words(Page(page.page(store, record)).texts["widths"])
    assert re.findall(r"conv_(\d+)\.out channel", shown) == [str(i) for i in range(6, 30)]
    assert "Shown are the 24 groups that lost the largest share; 6 more are left out." in shown


@pytest.mark.parametrize("rows", [2, 6])
def test_widths_of_a_matrix_stand_side_by_side(made, rows):
    store, record, _ = made["compact"]
    record = copy.deepcopy(record)
    compact = record["stages"].pop("compact")
    for i in range(rows):
        metrics = {"groups": {"params/hidden_0.out": {"dead": i, "units": 10, "kind": "neuron"}}}
        record["stages"][f"compact[seed={i}]"] = {**compact, "metrics": metrics}
    shown = words(Page(page.page(store, record)).texts["widths"])
    assert "after compact" not in shown
    if rows == 2:
        assert "hidden_0.out neuron 10 of 10 left 9 of 10 left compact[seed=0] compact[seed=1]" in shown
    else:
        assert "network hidden_0.out compact[seed=0] 10 of 10 compact[seed=1] 9 of 10" in shown


def test_models_of_other_sizes_are_not_compact(made):
    """A matrix over widths has networks of fewer parameters that nobody cut."""
    record = copy.deepcopy(made["matrix"][1])
    for name in list(record["results"]):
        if name.startswith("train"):
            del record["results"][name]
        elif "seed=1" in name:
            record["results"][name]["params"] //= 2
    assert not facts.has_compact(record)
    assert " % sparse at " in page.headline(record)["text"]


def test_controls_stand_beside_the_pruned_network(store):
    record = runs.controls_run()
    series = {s.label: s.tests for s in facts.controls_of(record)}
    dense, small = 784 * 300 + 300 * 100 + 100 * 10, 784 * 150 + 150 * 50 + 50 * 10
    assert list(series)[:3] == ["dense", "dense, trained longer", "compact, fine-tuned"]  # not what these were made of
    expected = {
        "dense": (1, 0.965),
        "dense, trained longer": (1, 0.969),
        "compact, fine-tuned": (small / dense, 0.961),
        "fresh": (small / dense, 0.95),
        "compact, at random, fine-tuned": (small / dense, 0.94),
    }
    assert {label: [p[:2] for p in points] for label, points in series.items()} == {
        label: [pytest.approx(point)] for label, point in expected.items()
    }
    shown = words(Page(page.page(store, record)).texts["controls"])
    assert "MACs left, % of the dense network's" in shown
    assert all(label in shown for label in expected)
    assert "lacks" not in shown


def test_no_control_is_told_for_the_pruned_network():
    record = runs.controls_run()
    scratch = next(n for n in record["results"] if n.startswith("scratch"))
    record["results"][scratch]["accuracy"] = 0.99
    assert "at accuracy 0.961" in page.headline(record)["text"]
    for result in record["results"].values():
        result["row"] = {}
    told = _headline(record["stages"], record["results"], record["recipe"])
    assert "at accuracy 0.961" in told


def test_a_run_without_all_controls_says_which_it_lacks(store):
    record = runs.controls_run()
    for name in list(record["results"]):
        if name.startswith(("longer", "random")):
            del record["results"][name]
    shown = words(Page(page.page(store, record)).texts["controls"])
    assert "lacks units drawn at random and the dense network trained longer." in shown
    for name in list(record["results"]):
        if name.startswith("scratch"):
            del record["results"][name]
    assert "controls" not in Page(page.page(store, record)).texts


def test_histograms_count_every_survivor(made):
    store, record, html = made["plain"]
    found = facts.histograms(facts.Arrays(store), record, ["prune"])
    dense, _ = store.read(Ref("train", "t0"))
    pruned, _ = store.read(Ref("prune", "p0"))
    assert [h.path for h in found] == ["hidden_0/kernel", "hidden_1/kernel", "output/kernel"]
    for layer in found:
        name = layer.path.partition("/")[0]
        kernel, mask = pruned["params"][name]["kernel"], pruned["masks"][name]["kernel"]
        assert layer.counts["prune"].sum() == mask.sum()
        assert layer.counts["train"].sum() == dense["params"][name]["kernel"].size
        np.testing.assert_array_equal(layer.counts["prune"], np.histogram(kernel[mask], layer.edges)[0])
    assert "Pruned weights, which are zero, are left out." in words(Page(html).texts["weights"])


def test_losses_are_those_of_the_trainings(made):
    store, record, _ = made["plain"]
    train, prune = facts.loss_panels(facts.Arrays(store), record, ["prune"])
    assert (train.title, prune.title) == ("train: training", "prune: fine-tuning, round after round")
    np.testing.assert_array_equal(train.networks[0].parts[0], store.read(Ref("train", "t0"))[0]["losses"])
    assert [part.size for part in prune.networks[0].parts] == [210] * 5


def test_thinned_losses_keep_extremes_and_the_average():
    losses = np.random.default_rng(0).random(5000)
    losses[1234], losses[3210] = 9.0, -9.0
    x, raw, steps, smooth = charts._thinned(losses)
    assert x.shape == raw.shape
    assert raw.size <= 600
    assert (raw.max(), raw.min()) == (9.0, -9.0)
    expected = [losses[max(0, i - 50) : i + 51].mean() for i in steps]
    np.testing.assert_allclose(smooth, expected)


def test_loss_axis_is_logarithmic_from_two_decades_on():
    def drawn(lowest):
        panel = facts.LossPanel("train: training", [facts.Losses("train", [np.geomspace(1, lowest, 50)])], 0)
        return charts.loss_chart(panel, width=340, height=200)

    assert ">0.001<" in drawn(5e-4)
    assert ">0.2<" in drawn(0.05)


def test_a_search_shows_its_table_and_choice(made):
    _, _, html = made["search"]
    texts = {k: words(v) for k, v in Page(html).texts.items()}
    assert "threshold mean mse fold 1 fold 2 sparsity" in texts["search"]
    assert "0.1 chosen 0.9555 0.9100 1.0010 50.0 %" in texts["search"]
    assert texts["search"].count("chosen") == 2  # in the table once, and in the caption
    assert "53.3 % sparse at mse 0.9511 (×1.06)" in texts[""]


def test_what_is_gone_from_the_store_is_left_out_and_told(made, tmp_path):
    _, _, html = made["search"]
    told = words(Page(html).texts["versions"])
    assert "train/nowhere: train/nowhere: not in the store" in told
    source, record, _ = made["plain"]
    empty = Store(tmp_path / "empty")
    shutil.copytree(Path(source.root) / "runs", Path(empty.root) / "runs")
    parsed = Page(write_report(empty, record["name"]).read_text())
    assert [s for s in SECTIONS if s not in parsed.texts] == ["weights", "losses"]
    assert "prune/p0: prune/p0: not in the store" in words(parsed.texts["versions"])


def test_a_damaged_artifact_does_not_break_the_report(made, tmp_path):
    source, record, _ = made["plain"]
    root = tmp_path / "copy"
    shutil.copytree(source.root, root)
    file = next(f for f in (root / "prune" / "p0" / "arrays").rglob("*") if f.is_file())
    file.write_bytes(b"x")
    html = write_report(Store(root), record["name"]).read_text()
    assert "is not the file that was written" in html


def test_a_failed_run_says_what_failed_and_why(made):
    store, record, html = made["failed"]
    texts = {k: words(v) for k, v in Page(html).texts.items()}
    assert "Failed at prune" in texts[""]
    assert "failed 2026-03-01" in texts[""]
    assert "the guard was breached at round 2: 0.956 to 0.9" in texts["messages"]
    assert "– evaluate prune failed" in texts["messages"]
    assert "✗ failed" in texts["stages"]
    assert "results" not in texts
    series = facts.series_of(store, record)[0]
    np.testing.assert_allclose([p[:2] for p in series.lines[0]], [(0, 0.956), (0.4, 0.953)])
    np.testing.assert_allclose([p[:2] for p in series.breached], [(0.8, 0.9)])


def test_texts_of_users_are_escaped(made):
    html = made["failed"][2]
    assert "<script" not in html
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in html
    assert "a &lt;b&gt;bold&lt;/b&gt; &amp; &#34;quoted&#34; recipe" in html


def test_names_with_markup_and_formulas_are_drawn_as_they_are(store):
    series = facts.Series('<i>&"$x^2$', lines=[[facts.Point(0.0, 0.9, 0.9, 0.9), facts.Point(0.5, 0.8, 0.8, 0.8)]])
    drawn = charts.sparsity_chart([series], "accuracy", width=400, height=300, floor=None, direct=True)
    assert '>&lt;i&gt;&amp;"$x^2$</text>' in drawn
    assert "accuracy against sparsity of &lt;i&gt;&amp;&#34;$x^2$" in drawn
    stages = {"<b>": runs.stage("train", "k", 'train · "<u>"')}
    drawn = dag.dag({"stages": stages}, down=False)
    assert "&lt;b&gt;" in drawn
    assert "<b>" not in drawn
    assert "<u>" not in drawn


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_the_guards_name_stands_beside_the_dense_star_and_its_name(metric):
    dense = facts.Series("dense", tests=[facts.Point(0.0, 0.9, 0.9, 0.9)])
    pruned = facts.Series("prune", lines=[[facts.Point(0.5, 0.8, 0.8, 0.8)]])
    drawn = charts.sparsity_chart([dense, pruned], metric, width=960, height=380, floor=0.9, direct=True)
    star, guard = (float(re.search(rf'x="([\d.]+)"[^>]*>{name}</text>', drawn)[1]) for name in ("dense", "guard"))
    assert guard - star > 22  # half of the name's 44 pixels, and the star reaches 8


@pytest.mark.parametrize(
    "record",
    [
        {"name": "bare"},
        {"name": "bare", "stages": {"train": {"kind": "train", "key": "k", "status": "ran"}}},
        {"name": "bare", "results": {"net": {"loss": 0.5, "params": 3, "kind": "train", "key": "k"}}},
        {"name": "bare", "results": {"net": {"mine": 0.5, "sparsity": 0.5, "kind": "mask", "key": "k"}}},
    ],
    ids=["nothing", "a stage", "a dense network", "a network of no stage"],
)
def test_a_record_that_says_little_makes_a_report(store, record):
    store.write_record(record)
    parsed = Page(write_report(store, "bare").read_text())
    assert "bare" in parsed.texts[""]
    assert "versions" in parsed.texts


def test_an_unknown_run_is_refused(made):
    store = made["plain"][0]
    with pytest.raises(UserMistake, match=r"no run 'lenet' in .*\(runs: lenet-300-100\)"):
        write_report(store, "lenet")


# The DAG


def test_long_ways_keep_their_arrows_and_layers_follow(made):
    boxes, arrows = dag.boxes_of(made["plain"][1])
    assert [b.name for b in boxes] == ["train", "prune", "evaluate"]
    assert arrows == [("train", "prune"), ("train", "evaluate"), ("prune", "evaluate")]
    assert dag.layers_of([b.name for b in boxes], arrows) == [["train"], ["prune"], ["evaluate"]]


def test_a_large_dag_leaves_out_arrows_that_follow_from_others(made):
    boxes, arrows = dag.boxes_of(made["matrix"][1])
    assert len(boxes) == 26
    assert len(arrows) == 24  # twelve prunings and their evaluations, no training straight to an evaluation
    assert not [a for a in arrows if a[0].startswith("train") and a[1].startswith("evaluate")]


def test_bars_lie_within_the_run(made):
    for _, record, _ in made.values():
        for bar in dag.bars_of(record):
            assert 0 <= bar.left
            assert bar.left + bar.width <= 100 + 1e-9
            for turn in bar.turns:
                assert bar.left <= turn.left
                assert turn.left + turn.width <= bar.left + bar.width + 1e-9
    (prune,) = (b for b in dag.bars_of(made["plain"][1]) if b.name == "prune")
    assert len(prune.turns) == 15


def test_records_survive_json(made):
    store, record, html = made["matrix"]
    assert page.page(store, json.loads(json.dumps(record))) == html
