"""What `prune-jax methods` says: of every name a page that is whole, and a recipe that works as it stands."""

import json
import sys

import pytest
from rich.console import Console

from prune_jax import cli
from prune_jax.catalogue import Entry, entries, methods_tables
from prune_jax.criteria import CRITERIA, Criterion
from prune_jax.criteria.entry import FAMILY_ORDER
from prune_jax.errors import UserMistake
from prune_jax.manual import as_json, look_up, page, read_docstring, snippet
from prune_jax.preparation import check_networks, prepare
from prune_jax.recipe import read_recipe
from prune_jax.sparse_training import METHODS

ENTRIES = list(entries())
IDS = [f"{entry.table} {entry.name}" for entry in ENTRIES]


def read(entry, folder):
    file = folder / "r.yaml"
    file.write_text(snippet(entry))
    return read_recipe(file)


def uses(recipe, entry):
    """Whether a recipe has the name where it belongs."""
    stages = recipe.stages
    if entry.table == "training method":
        return stages["train"].sparsify.kind == entry.name
    prune, last = stages["prune"], list(stages.values())[-1]
    return {
        "recovery": lambda: {
            "rewind": lambda: last.rewind.model_dump(exclude_none=True) == {"step": 20},
            "learning_rate": lambda: last.rewind.learning_rate is not None,
            "features": lambda: last.kind == "distill" and last.features,
        }.get(entry.name, lambda: last.kind == entry.name or getattr(last, entry.name))(),
        "criterion": lambda: prune.criterion.name == entry.name,
        "perturbation": lambda: prune.criterion.perturbation.kind == entry.name,
        "granularity": lambda: (
            {"n:m": "2:4", "block": {"block": [4, 4]}}.get(entry.name, entry.name) == prune.granularity
        ),
        "scope": lambda: isinstance(prune.scope, dict) if entry.name == "table" else prune.scope == entry.name,
        "target": lambda: prune.target.word == entry.name,
        "schedule": lambda: entry.name in (prune.schedule.kind, getattr(prune.schedule, "levels", "")),
    }[entry.table]()


@pytest.mark.parametrize("entry", ENTRIES, ids=IDS)
def test_every_recipe_is_read_and_uses_what_it_is_for(entry, tmp_path):
    recipe = read(entry, tmp_path)
    assert uses(recipe, entry)
    prepare(recipe)


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES, ids=IDS)
def test_every_recipe_fits_its_network(entry, tmp_path):
    check_networks(prepare(read(entry, tmp_path)))


def test_everything_is_there_and_said():
    tables = [entry.table for entry in ENTRIES]
    assert [e.name for e in ENTRIES if e.table == "training method"] == list(METHODS)
    assert {e.name for e in ENTRIES if e.table == "criterion"} == set(CRITERIA)
    assert list(dict.fromkeys(tables)) == [
        *("criterion", "perturbation", "granularity", "scope", "target", "schedule", "training method", "recovery")
    ]
    for entry in ENTRIES:
        told = read_docstring(entry.text)
        assert entry.formula, entry.name
        if entry.table in ("criterion", "training method"):
            assert told.paragraphs, entry.name
            assert entry.paper, entry.name
        for option in entry.options:
            assert entry.told.get(option) or told.arguments.get(option) or entry.table != "criterion", option


def test_criteria_are_in_the_order_of_what_they_look_at():
    families = [entry.facts["looks at"] for entry in ENTRIES if entry.table == "criterion"]
    assert list(dict.fromkeys(families)) == list(FAMILY_ORDER)
    assert families == sorted(families, key=FAMILY_ORDER.index)


COSTS = {
    "magnitude": "none",
    "synflow": "1 gradient of the network at ones",
    "taylor": "1 gradient pass",
    "fisher": "per-example gradients",
    "obd": "`probes` Hessian products a batch",
    "wanda": "1 forward pass",
    "forgetting": "1 forward pass a unit",
    "oracle": "1 forward pass a unit",
    "head_importance": "per-example gradients",
}


def test_costs_follow_from_what_is_needed():
    assert {name: CRITERIA[name].cost for name in COSTS} == COSTS
    own = Criterion("mine", lambda params, stats: params, "-", "-", needs=frozenset({"gradient"}))
    assert (own.family, own.cost) == ("gradients", "1 gradient pass")


def printed(*renderables, width):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    console.print(*renderables, sep="\n")
    return console.export_text()


@pytest.mark.parametrize("width", [80, 120])
def test_pages_and_tables_keep_to_the_width(width):
    text = printed(*methods_tables(), width=width)
    names = [line.split("  ")[0] for line in text.splitlines()]
    assert all((entry.shown or entry.name) in names for entry in ENTRIES)
    for name in ("obd", "rigl", "fgsm", "oracle"):
        (entry,) = look_up(name)
        told = printed(*page(entry), width=width)
        assert max(map(len, told.splitlines())) <= width
        assert all(f"\n  {line}" in told for line in snippet(entry).splitlines()), "to be copied"
        assert all(option in told for option in entry.options)


def test_a_docstring_is_taken_apart():
    text = """One line.

        Two
        lines.

        Args:
            a: first
                part: with a colon.
            b: second.

        Returns:
            What it
            gives.

        >>> 1
        1
        """
    found = read_docstring(text)
    assert found.paragraphs == ["One line.", "Two lines."]
    assert found.arguments == {"a": "first part: with a colon.", "b": "second."}
    assert found.returns == "What it gives."


def test_names_are_found_as_they_are_written():
    assert [e.table for e in look_up("layer")] == ["granularity", "scope"]
    assert [e.name for e in look_up("2:4")] == ["n:m"]
    assert [e.name for e in look_up("iterative")] == ["geometric", "cubic"]
    assert [e.name for e in look_up("{block: [r, c]}")] == ["block"]
    with pytest.raises(UserMistake, match=r"^taylr: no such method; did you mean 'taylor'\? \(known: magnitude, "):
        look_up("taylr")


def test_json_holds_the_same():
    json.dumps([as_json(entry) for entry in ENTRIES])
    (obd,) = (as_json(entry) for entry in look_up("obd"))
    assert obd["options"]["probes"]["default"] == 10
    assert obd["cost"] == COSTS["obd"]
    plugin = Entry("training method", "x", "", options={"rate": ...})
    assert as_json(plugin)["options"]["rate"] == {"default": None, "required": True, "meaning": ""}


@pytest.mark.parametrize(("arguments", "code"), [(["taylor"], 0), (["obd", "--json"], 0), (["taylr"], 2)])
def test_the_command(arguments, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prune-jax", "methods", *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert ended.value.code == code
    if code:
        assert "did you mean 'taylor'?" in err
    elif "--json" in arguments:
        assert json.loads(out)[0]["name"] == "obd"
    else:
        assert "square of the sum" in " ".join(out.split())
