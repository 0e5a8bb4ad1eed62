"""Every built-in recipe keeps the promise at its head; the slower ones run when named."""

import re

import pytest

from prune_jax.preparation import check_networks, prepare
from prune_jax.recipe import built_in, read_recipe
from prune_jax.records import Run
from prune_jax.stages import run_stage
from prune_jax.walk import walk

TOLERANCE = {"accuracy": 0.03, "mse": 0.02, "sparsity": 0.002}
SEARCHED = {"threshold-search"}  # the search may choose a neighbouring value on another machine
CUT = {"prune", "cut", "corrected"}  # with many units gone and before fine-tuning, what is left is luck
QUICK = {
    "xor",
    "line",
}


def promised(text):
    """What the head of a recipe expects: {network: {quantity: value}}."""
    lines = re.findall(r"^#   (\S+): (.+)$", text, re.MULTILINE)
    return {name: {q: float(v) for q, v in re.findall(r"(\w+) ([-\d.e]+)", told)} for name, told in lines}


def run(name, store):
    plan = prepare(read_recipe(name))
    check_networks(plan)
    record = Run(plan, store, name)

    def submit(call, done):
        record.begin(call)
        done(run_stage(call, store))

    return record.finish(walk(plan, store, submit))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow])
        for n in built_in()
        if n not in {"criteria", "comparison"}
    ],
)
def test_a_recipe_gives_the_figures_at_its_head(name, store):
    expected = promised(built_in()[name])
    record = run(name, store)
    assert record["status"] == "completed", record["message"]
    assert set(expected) == set(record["results"])
    for network, figures in expected.items():
        for quantity, value in figures.items():
            unsure = name in SEARCHED and quantity == "sparsity"
            unsure |= name.startswith(("controls", "recovery")) and network.partition("[")[0] in CUT
            slack = 0.25 if unsure else TOLERANCE[quantity]
            assert record["results"][network][quantity] == pytest.approx(value, abs=slack), (network, quantity)


def test_the_threshold_of_one_half_removes_the_dead_neuron_and_nothing_else(store):
    results = run("xor", store)["results"]
    assert results["by-threshold"]["sparsity"] == pytest.approx(1 / 3)
    assert results["by-threshold"]["mse"] == pytest.approx(results["train"]["mse"], abs=1e-3)
    assert results["to-four"]["effective_macs"] == 4


def test_percentile_pruning_of_a_line_leaves_the_one_input_that_matters(store):
    record = run("line", store)
    from prune_jax.recipe import Ref

    entry = record["results"]["prune"]
    kernel = store.read(Ref(entry["kind"], entry["key"]))[0]["params"]["output"]["kernel"]
    assert (kernel[1:] == 0).all()
    assert kernel[0, 0] == pytest.approx(3, abs=0.1)


@pytest.mark.slow
def test_criteria_side_by_side_train_once_for_each_seed(store):
    record = run("criteria", store)
    assert record["status"] == "completed", record["message"]
    kinds = [stage["kind"] for stage in record["stages"].values()]
    assert (kinds.count("train"), kinds.count("prune"), kinds.count("evaluate")) == (3, 36, 36)
    by_seed = {row["row"]["seed"] for row in record["results"].values() if row["kind"] == "train"}
    assert by_seed == {"0", "1", "2"}
