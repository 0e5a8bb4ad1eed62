"""The terminal, Markdown and HTML show the same cells, and each network is compared with its own training."""

import ast
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from prune_jax.checkpoints import Store
from prune_jax.report import tables
from prune_jax.roles import role_of
from tests import report_runs as runs


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    builds = {"plain": runs.one_run, "matrix": runs.matrix_run, "failed": runs.failed_run}
    stores = {word: Store(tmp_path_factory.mktemp(word)) for word in builds}
    return {word: stores[word].record(build(stores[word])) for word, build in builds.items()}


def console_text(record, width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(tables.results_rich(record))
    return console.export_text()


def test_terminal_and_markdown_show_the_same_cells(records):
    record = records["plain"]
    results = tables.results_table(record)
    assert results.networks == ("train", "prune")
    assert results.dense == (True, False)
    lines = tables.results_markdown(record).splitlines()
    assert lines[:3] == ["|  | train | prune |", "| --- | ---: | ---: |", "|  | dense | masked |"]
    text = console_text(record, 80)
    for i, (quantity, dense, pruned) in enumerate(zip(results.quantities, *results.columns, strict=True)):
        versus = f" ({pruned.versus})" if pruned.versus else ""
        assert lines[3 + i] == f"| {quantity} | {dense.text} | {pruned.text}{versus} |"
        assert re.search(rf"{re.escape(quantity)} +{re.escape(dense.text)} +{re.escape(pruned.text)}", text)
        assert dense.versus == ""


def test_many_networks_have_a_row_each(records):
    record = records["matrix"]
    results = tables.results_table(record)
    assert results.many
    lines = tables.results_markdown(record).splitlines()
    assert len(lines) == 2 + 14
    assert lines[4].startswith(r"| prune\[criterion=magnitude,sparsity=0.8,seed=0\] | masked | 0.9")
    text = console_text(record, 80)
    assert "[criterion=magnitude," in text  # brackets are no markup
    assert max(map(len, text.splitlines())) <= 80
    assert "0.9790" in text


def test_each_network_is_compared_with_the_training_it_descends_from(records):
    record = records["matrix"]
    for name in record["results"]:
        seed = name[name.index("seed=") :].rstrip("]")
        assert tables.dense_of(record, name) == f"train[{seed}]"
    results = tables.results_table(record)
    column = results.columns[results.networks.index("prune[criterion=taylor,sparsity=0.8,seed=1]")]
    pruned = record["results"]["prune[criterion=taylor,sparsity=0.8,seed=1]"]["accuracy"]
    assert column[0].versus == tables.signed(pruned - 0.981)


def test_controls_are_told_by_their_roles(records):
    record = runs.controls_run()
    results = tables.results_table(record)
    assert dict(zip(results.networks, results.roles, strict=True)) == {
        "train": "dense",
        "longer": "dense, trained longer",
        "prune[prune.target.sparsity=0.5]": "masked",
        "cut[prune.target.sparsity=0.5]": "compact",
        "finetuned[prune.target.sparsity=0.5]": "compact, fine-tuned",
        "scratch[prune.target.sparsity=0.5]": "fresh",
        "random[by-chance.target.sparsity=0.5]": "compact, at random, fine-tuned",
    }
    text = console_text(record, 80)
    assert max(map(len, text.splitlines())) <= 80
    for told in ("parameters", "MACs", "bytes", "memory,", "latency", "accuracy", "finetuned", "fine-tuned", "fresh"):
        assert told in text
    assert "prune.target" not in text  # one axis has this last word
    assert "effective" not in text  # the page has all


def test_criteria_of_a_matrix_make_roles(records):
    record = runs.controls_run()
    place = {"criterion": "random", "prune.target.sparsity": "0.5"}
    record["stages"]["prune[prune.target.sparsity=0.5]"]["row"] = place
    assert role_of(record, "finetuned[prune.target.sparsity=0.5]") == "compact, at random, fine-tuned"
    assert role_of(record, "scratch[prune.target.sparsity=0.5]") == "fresh"
    assert role_of({"results": {"mine": {"kind": "finetune"}}}, "mine") == ""


def test_no_result_makes_no_table(records):
    record = records["failed"]
    assert tables.results_table(record).networks == ()
    assert tables.results_markdown(record) == "No network was evaluated.\n"


def test_the_tables_need_neither_jax_nor_matplotlib():
    source = Path(tables.__file__).read_text()
    imported = {
        name.name.partition(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import)
        for name in node.names
    } | {node.module.partition(".")[0] for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    assert not imported & {"jax", "matplotlib", "jinja2"}
    code = "import sys, prune_jax.report.tables; print([m for m in ('matplotlib', 'jinja2') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "[]\n"
