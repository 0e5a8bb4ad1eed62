"""The command line: bad input ends with 2 and one clear line, a failed stage with 1, and nothing is half-written."""

from __future__ import annotations

import contextvars
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import prefect.main  # noqa: F401  (sets up logging, at which absl closes a stderr other than the present one)
import pytest

from prune_jax import cli
from prune_jax.recipe import built_in
from tests.plain import EVALUATE, PRUNE, TRAIN, tiny
from tests.samples.tiny import blobs

ROOT = Path(__file__).parents[1]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs the command in this process, in a folder of its own; answers (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setenv("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    interrupt = signal.getsignal(signal.SIGINT)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["prune-jax", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            contextvars.copy_context().run(cli.main)
        return ended.value.code, *capsys.readouterr()

    yield run
    signal.signal(signal.SIGINT, interrupt)


def write(folder, changes=None):
    """A tiny recipe with other values at the dotted paths, as a file."""
    raw = copy.deepcopy(tiny())
    for path, value in (changes or {}).items():
        *folders, last = path.split(".")
        branch = raw
        for name in folders:
            branch = branch[name]
        branch[last] = value
    file = Path(folder) / "r.yaml"
    file.write_text(json.dumps(raw))  # JSON is YAML
    return file


def npz(folder, **changes):
    arrays = {name: array for name, array in blobs().items() if name != "note"} | changes
    np.savez(Path(folder) / "d.npz", **{name: array for name, array in arrays.items() if array is not None})


SETS = "(known: mnist5k, japanese_vowels, digits, breast_cancer, diabetes, pydoc, line, xor, npz)"
BAD = {
    # names
    "criterion": (
        {"stages.prune.criterion": "taylr"},
        "stages.prune.criterion.name = 'taylr': criterion 'taylr' is not known; did you mean 'taylor'? (known: ",
    ),
    "option": (
        {"stages.prune.criterion": {"name": "magnitude", "options": {"q": 1}}},
        "stages.prune.criterion.options = {'q': 1}: criterion 'magnitude': 'q' is not an argument (accepted: p)",
    ),
    "option value": (
        {"stages.prune.criterion": {"name": "magnitude", "options": {"p": 3}}},
        "stages.prune.criterion.options = {'p': 3}: criterion 'magnitude': p = 3 is not possible (allowed: 1, 2, inf)",
    ),
    "granularity": (
        {"stages.prune.criterion": "taylor", "stages.prune.granularity": "neuron"},
        "stages.prune.granularity = 'neuron': granularity 'neuron' is not possible here "
        "(allowed: weight, n:m such as '2:4', group, layer)",
    ),
    "objective": (
        {"objective": "clasification"},
        "objective = 'clasification': objective 'clasification' is not known; did you mean 'classification'? (known: "
        "classification, regression, reconstruction)",
    ),
    "source": (
        {"data.source": "mnist"},
        f"data.source = 'mnist': data source 'mnist' is not known; did you mean 'mnist5k'? {SETS}",
    ),
    "metric": (
        {"stages.prune.guard": {"metric": "acuracy", "max_drop": 0.1}},
        "stages.prune.guard.metric = 'acuracy': metric 'acuracy' is not known; did you mean 'accuracy'? "
        "(allowed: loss, accuracy)",
    ),
    "metric of another objective": (
        {"data.source": "tests.samples.tiny:numbers", "objective": "regression", "stages.prune.guard": {"max_drop": 0}},
        "stages.prune.guard.metric = 'accuracy': metric 'accuracy' is not known (allowed: loss, mse)",
    ),
    "guard without validation": (
        {"data.validation": 0, "stages.prune.guard": {"max_drop": 0.1}},
        "stages.prune.guard.metric = 'accuracy': needs a validation split: set `data.validation`, such as 0.1",
    ),
    # the user's own
    "module": (
        {"data.source": "no_such_pkg:load"},
        "data.source = 'no_such_pkg:load': 'no_such_pkg:load' could not be imported: no module 'no_such_pkg'. "
        "Install its package, or add its folder to PYTHONPATH.",
    ),
    "function": (
        {"data.source": "tests.samples.tiny:blub"},
        "data.source = 'tests.samples.tiny:blub': 'tests.samples.tiny' has no 'blub'; did you mean 'blobs'?",
    ),
    "argument": (
        {"data.args": {"sample": 3}},
        "data.source = 'tests.samples.tiny:blobs': data 'tests.samples.tiny:blobs': 'sample' is not an argument; "
        "did you mean 'samples'? (accepted: samples, classes, width, spread)",
    ),
    "class": (
        {"model": {"kind": "tests.samples.nets:NnxNett"}},
        "model.kind = 'tests.samples.nets:NnxNett': 'tests.samples.nets' has no 'NnxNett'; did you mean 'NnxNet'?",
    ),
    "class argument": (
        {"model": {"kind": "tests.samples.nets:NnxNet", "args": {"widht": 3}}},
        "model.kind = 'tests.samples.nets:NnxNet': model 'tests.samples.nets:NnxNet': 'widht' is not an argument; "
        "did you mean 'width'? (accepted: width)",
    ),
    "no model": ({"model": {"kind": "tests.samples.nets:NOT_A_MODEL"}}, "neither a Flax module nor a function"),
    "loss": (
        {"objective": "tests.samples.tiny:nope"},
        "objective = 'tests.samples.tiny:nope': 'tests.samples.tiny' has",
    ),
    # what does not fit
    "model and data": (
        {"model": {"kind": "cnn"}},
        "model.kind = 'cnn': model 'cnn': images arrive as [height, width, channel], but one sample of x is [4]",
    ),
    "model's input": (
        {"model": {"kind": "tests.samples.nets:WrongWidth"}},
        "model 'tests.samples.nets:WrongWidth' with {} does not take inputs float32[batch, 4]: ",
    ),
    "model's output": (
        {"model": {"kind": "tests.samples.nets:AnswersTuple"}},
        "model 'tests.samples.nets:AnswersTuple' answers a value of type tuple; it must answer one array, its outputs",
    ),
    "objective and data": (
        {"data.source": "tests.samples.tiny:numbers"},
        "classification needs integer labels, but y holds floats; save y as int32 class numbers from 0, or choose "
        "`objective: regression`",
    ),
    "loss's answer": (
        {"data.source": "tests.samples.tiny:numbers", "objective": "tests.samples.tiny:mean_error"},
        "objective 'tests.samples.tiny:mean_error' answers float32 []; it must answer one loss for each example, "
        "float [1]. Leave out the mean over the batch: it is taken later.",
    ),
    # impossible targets
    "sparsity": (
        {"stages.prune.target": {"sparsity": 1.0}},
        "stages.prune.target.sparsity = 1.0: must be at least 0 and below 1",
    ),
    "percent": ({"stages.prune.target": {"sparsity": 90}}, "did you mean 0.9?"),
    "keep": (
        {"stages.prune.target": {"keep": 43}},
        "stages.prune.target = {'keep': 43}: keep = 43: must be a whole number from 1 to 42, the number of prunable "
        "units; to say which fraction dies, give sparsity",
    ),
    "min_keep": ({"stages.prune.min_keep": 40}, "min_keep = 40 keeps 42 units in 2 l"),
    "exclude": (
        {"stages.prune.exclude": ["hiden_0"]},
        "stages.prune.exclude = ['hiden_0']: exclude pattern 'hiden_0' fits no parameter; did you mean 'hidden_0'"
        "? (parameters: hidden_0/bias, hidden_0/kernel, output/bias, output/kernel)",
    ),
    "exclude all": ({"stages.prune.exclude": ["*"]}, "stages.prune.exclude = ['*']: there is nothing to prune: of "),
    "scope": (
        {"stages.prune.scope": {"outptu": 0.5}, "stages.prune.target": None},
        "stages.prune.scope = {'outptu': 0.5}: scope['outptu'] fits no prunable leaf; did you mean 'output'?",
    ),
    # rewinding
    "rewind": (
        {"stages.prune.finetune": {"steps": 1, "rewind": {"step": 9}}},
        "stages.prune.finetune.rewind.step = 9: the training ends at step 8: rewind to one from 0 to 8, or train "
        "longer",
    ),
    "rewind of a learning rate": (
        {"stages.prune.finetune": {"rewind": {"learning_rate": {"step": 8}}}},
        "stages.prune.finetune.rewind.learning_rate.step = 8: the training ends at step 8: rewind to one from 0 to 7, "
        "or train longer",
    ),
    "rewind of a finetune stage": (
        {
            "stages.train": {"kind": "train", "epochs": 2},  # of 32 examples in batches of 9
            "stages.prune": {"kind": "finetune", "steps": 1, "rewind": {"step": 7}},
        },
        "stages.prune.rewind.step = 7: the training ends at step 6: ",
    ),
    "rewind in a search": (
        {
            "stages.train": {"kind": "train", "epochs": 3},  # 9 steps, but 6 on 20 of 40 examples
            "stages.prune.finetune": {"steps": 1, "rewind": {"step": 7}},
            "stages.prune.search": {"amounts": [0.1, 0.2], "folds": 2},
        },
        "stages.prune.finetune.rewind.step = 7: the training on a fold ends at step 6: ",
    ),
    # searching
    "folds": (
        {"data.args": {"samples": 20}, "stages.prune.search": {"amounts": [0.1, 0.2], "folds": 21}},
        "stages.prune.search.folds = 21: data 'tests.samples.tiny:blobs': fold = [0, 21]: must be [i, k] with 0 <= i < "
        "k and 2 <= k <= 20, the training samples",
    ),
    # types
    "type": ({"stages.train.steps": "ten"}, "stages.train.steps = 'ten': "),
    "field": ({"stages.train.step": 3}, "stages.train.step = 3: is not a field here; did you mean 'steps'?"),
    # files
    "no file": (
        {"data": {"source": "npz", "path": "dd.npz"}},
        "data.source = 'npz': data 'npz' at dd.npz: there is no such file; did you mean 'd.npz'? (looked in ",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_2_a_clear_line_and_nothing_written(command, tmp_path, case):
    changes, told = BAD[case]
    npz(tmp_path)
    code, out, err = command("run", write(tmp_path, changes), "--store", "store")
    assert code == 2
    assert told in err, err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "store").exists()


def _nan():
    x = blobs()["x_train"].copy()
    x[3, 1] = np.nan
    return x


FILES = {
    "nan": (
        {"x_train": _nan()},
        "1 of 160 values in 'x_train' are not finite in float32, the first: x_train[3, 1] = nan. Remove these samples, "
        "or fill the values in",
    ),
    "shape": (
        {"x_test": np.zeros((40, 5))},
        "'x_train' is float32 [40, 4] but 'x_test' is float32 [40, 5]; they may differ in the number of samples only",
    ),
    "label": ({"y_test": np.full(40, 7)}, "y_test[0] = 7, but the labels of 'y_train' go from 0 to 2"),
    "negative label": ({"y_train": np.full(40, -1)}, "y_train[0] = -1, but labels start at 0."),
    "missing": (
        {"y_test": None},
        "array 'y_test' is missing (found: x_train, y_train, x_test; needed: x_train, y_train, x_test, y_test)",
    ),
    "length": ({"y_train": np.arange(3)}, "'x_train' holds 40 samples but 'y_train' 3; each sample needs its own"),
    "objects": (
        {"x_train": np.array([[1, 2], [3]], object)},
        "array 'x_train' holds Python objects, which are not read",
    ),
    "empty": ({"x_train": np.zeros((0, 4))}, "array 'x_train' is empty, [0, 4]"),
    "text": (None, "is not an .npz archive, or was cut off; write it with numpy.savez(path, x_train=..., ...)"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_ends_with_2(command, tmp_path, case):
    changes, told = FILES[case]
    if changes is None:
        (tmp_path / "d.npz").write_text("hello")
    else:
        npz(tmp_path, **changes)
    recipe = write(tmp_path, {"data": {"source": "npz", "path": "d.npz"}})
    for verb in ("plan", "run"):
        code, _, err = command(verb, recipe, "--store", "store")
        assert code == 2
        assert err.startswith(f"tiny: data.source = 'npz': data 'npz' at d.npz: {told}"), err
    assert not (tmp_path / "store").exists()


OPTIONS = {
    ("run", "lenet-300"): "lenet-300: no such file and no built-in recipe; did you mean 'lenet-300-100'?",
    ("plan", "nope.yaml"): "nope.yaml: no such file and no built-in recipe (built in: autoencoder, ",
    ("run", "xor", "--runner", "thread"): "runner = 'thread': is not known",
    ("run", "xor", "--name", "a/b"): "name = 'a/b': a run's name has letters, digits, '.', '_' and '-'",
    ("run", "xor", "--set", "x"): "--set x: write path=value, such as --set stages.train.epochs=3",
    ("run", "xor", "--set", "stages.train.epoch=3"): "xor: stages.train.epoch = 3: is not a field here",
    ("run", "xor", "--stoer", "x"): "No such option: --stoer",
    ("run",): "Missing argument",
    ("show", "nope"): "no run 'nope' in ",
    ("report", "nope"): "no run 'nope' in ",
    ("recipes", "xorr"): "xorr: no built-in recipe; did you mean 'xor'?",
    ("nocommand",): "No such command",
}


@pytest.mark.parametrize("arguments", OPTIONS, ids=" ".join)
def test_a_bad_option_ends_with_2(command, tmp_path, arguments):
    code, _, err = command(*arguments)
    assert code == 2
    assert OPTIONS[arguments] in err
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_is_no_text_ends_with_2(command, tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    assert command("plan", "r.yaml")[0] == 2


USERS = {
    "raises": "def load():\n    raise ValueError('my data is broken')\n",
    "no Python": "def load(:\n",
    "import fails": "1 / 0\n",
}


@pytest.mark.parametrize("case", USERS)
def test_broken_code_of_the_users_is_told_with_its_place_in_the_recipe(command, tmp_path, case):
    (tmp_path / "users_broken.py").write_text(USERS[case])
    sys.modules.pop("users_broken", None)
    code, _, err = command("plan", write(tmp_path, {"data": {"source": "users_broken:load"}}))
    assert code in {1, 2}
    assert "data.source = 'users_broken:load'" in err


@pytest.mark.usefixtures("prefect_server")
def test_a_store_that_is_a_file_is_told(command, tmp_path):
    (tmp_path / "store").write_text("x")
    code, _, err = command("run", write(tmp_path), "--store", "store")
    assert code == 2
    assert "store" in err


@pytest.fixture(scope="module")
def finished(tmp_path_factory, prefect_server):
    """A folder with a store in which the tiny recipe ran, and one run of it failed."""
    from prune_jax.launch import run

    folder = tmp_path_factory.mktemp("cli")
    timed = {**EVALUATE, "latency": {"batch_sizes": [1]}}
    record = run(tiny(train=TRAIN, prune=PRUNE, evaluate=timed), store=folder / "store")
    assert record["status"] == "completed"
    run(tiny(train=TRAIN, prune={**PRUNE, "target": {"keep": 1}}), store=folder / "store", name="failed")
    return folder


def test_json_prints_the_record_and_nothing_else_on_stdout(command, finished, tmp_path):
    code, out, err = command("run", write(tmp_path), "--store", finished / "store", "--name", "as-json", "--json")
    assert code == 0
    record = json.loads(out)
    assert record == json.loads((finished / "store" / "runs" / "as-json" / "run.json").read_text())
    assert record["stages"]["prune"]["status"] == "cached"
    assert "prune · magnitude · 0.5" in err
    assert "dense" in err or "train" in err


def test_a_run_ends_with_a_table_and_where_to_look(command, finished, tmp_path):
    code, out, _ = command("run", write(tmp_path), "--store", finished / "store", "--name", "told")
    assert code == 0
    for text in (
        "accuracy",
        "sparsity",
        "effective MACs",
        "bytes",
        "50.0 %",
        "runs/told/run.json",
        "prune-jax report told",
    ):
        assert text in out


def test_a_diverging_loss_ends_with_1_and_is_no_success(command, finished, tmp_path):
    changes = {"stages.train": {"kind": "train", "steps": 30, "optimizer": {"name": "sgd", "learning_rate": 1e30}}}
    arguments = ("run", write(tmp_path, changes), "--store", finished / "store", "--name", "diverged")
    for _ in range(2):
        code, out, err = command(*arguments)
        assert code == 1
        assert "the loss became nan at step 2 of 30, at learning rate 1e+30 (sgd)." in out + err
        assert "Traceback" not in out + err
    record = json.loads((finished / "store" / "runs" / "diverged" / "run.json").read_text())
    key = record["stages"]["train"]["key"]
    assert record["status"] == "failed"
    assert not (finished / "store" / "train" / key).exists()


def test_a_layer_that_would_die_ends_with_1_and_keeps_what_was_done(command, finished, tmp_path):
    recipe = write(tmp_path, {"stages.prune.target": {"keep": 1}})
    code, out, err = command("run", recipe, "--store", finished / "store", "--name", "collapse")
    assert code == 1
    told = out + err
    assert (
        "Pruning would leave nothing alive in 'output/kernel' (all 18), at a sparsity of 0.9762 over all layers."
        in told
    )
    assert "2 of 5 stages are done and kept: mend it and give the same command to go on." in told
    recipe = write(tmp_path, {"stages.prune.target": {"keep": 1}, "stages.prune.scope": "layer"})
    code, out, err = command("run", recipe, "--store", finished / "store", "--name", "collapse", "--json")
    record = json.loads(out)
    assert record["stages"]["train"]["status"] == "cached"
    assert record["stages"]["prune.1.score"]["status"] == "cached"


def test_plan_says_what_is_cached_and_why_something_must_run(command, finished, tmp_path):
    def rows(**options):
        arguments = [f"--set={path}={json.dumps(value)}" for path, value in options.items()]
        recipe = tmp_path / "r.yaml"
        recipe.write_text(json.dumps(tiny(train=TRAIN, prune=PRUNE)))
        code, out, _ = command("plan", recipe, "--store", finished / "store", "--json", *arguments)
        assert code == 0
        return {row["stage"]: (row["status"], row["why"]) for row in json.loads(out)}

    assert rows() == {"train": ("cached", ""), "prune": ("cached", "")}
    found = rows(**{"stages.prune.target.sparsity": 0.9})
    assert found == {
        "train": ("cached", ""),
        "prune.1.score": ("cached", ""),
        "prune.1.mask": ("to run", "not yet made"),
        "prune": ("to run", "target.sparsity: 0.5 -> 0.9"),
    }
    found = rows(**{"stages.train.optimizer.learning_rate": 0.5})
    assert found["train"] == ("to run", "optimizer.learning_rate: 0.01 -> 0.5")
    assert found["prune"] == ("to run", "network changed")
    assert "seed: 0 -> 3" in rows(seed=3)["train"][1]
    assert "model.widths: [6] -> [7]" in rows(**{"model.widths": [7]})["train"][1]
    assert "data_digest: " in rows(**{"data.args": {"spread": 0.7}})["train"][1]
    assert "data.batch_size: 9 -> 20" in rows(**{"data.batch_size": 20})["train"][1]


def test_plan_tells_damage(command, finished, tmp_path):
    import shutil

    shutil.copytree(finished / "store", tmp_path / "store")
    (file,) = list((tmp_path / "store" / "prune").glob("*/arrays/_METADATA"))[:1]
    file.write_text("cut")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps(tiny(train=TRAIN, prune=PRUNE)))
    _, out, _ = command("plan", recipe, "--store", "store", "--json")
    found = {row["stage"]: row for row in json.loads(out)}["prune"]
    assert found["status"] == "to run"
    assert found["why"].startswith("damaged: ")
    assert "is not the file that was written" in found["why"]


def test_plan_of_a_matrix_shows_its_rows(command):
    code, out, _ = command("plan", "sensitivities")
    assert code == 0
    assert "prune[statistic=mean]" in out
    assert "evaluate[statistic=median]" in out
    assert "to run" in out


def test_plan_writes_nothing(command, tmp_path):
    assert command("plan", "xor")[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_recipes_are_listed_printed_and_described(command):
    code, out, _ = command("recipes")
    assert code == 0
    for name in built_in():
        assert name in out
    assert command("recipes", "xor")[1] == built_in()["xor"]
    schema = json.loads(command("recipes", "--schema")[1])
    assert schema["$schema"].endswith("2020-12/schema")
    assert set(schema["required"]) == {"name", "data", "model", "stages"}


def test_methods_are_listed_with_formula_and_paper(command):
    from prune_jax.criteria import CRITERIA
    from prune_jax.sparse_training import METHODS

    code, out, _ = command("methods")
    assert code == 0
    for name in CRITERIA:
        entry = CRITERIA[name]
        assert name in out
        assert entry.formula in out, "brackets are markup to Rich: escape them"
        assert entry.paper.split(":")[-1] in out
    for word in (
        "global",
        "layer",
        "erk",
        "lamp",
        "sparsity",
        "keep",
        "threshold",
        "percentile",
        "one_shot",
        "iterative",
    ):
        assert word in out
    for entry in (METHODS["gradual"], METHODS["rigl"]):
        assert entry.name in out
        assert entry.paper.split(":")[-1] in out
    for word in ("2:4", "{block: [r, c]}", "kernel", "arXiv:2104.08378", "arXiv:1711.02782", "arXiv:1705.08922"):
        assert word in out
    for word in ("distill", "arXiv:1503.02531", "arXiv:2003.02389", "reestimate_batches", "correct_bias_batches"):
        assert word in out


def test_runs_show_and_report(command, finished):
    store = ("--store", str(finished / "store"))
    code, out, _ = command("runs", *store)
    assert code == 0
    assert "tiny" in out
    assert "failed" in out
    records = json.loads(command("runs", *store, "--json")[1])
    assert {"tiny", "failed"} <= {record["name"] for record in records}
    code, out, _ = command("show", "tiny", *store)
    assert code == 0
    assert "prune · magnitude · 0.5" in out
    assert "effective MACs" in out
    assert json.loads(command("show", "tiny", *store, "--json")[1])["name"] == "tiny"
    code, out, _ = command("show", "failed", *store)
    assert "Pruning would leave nothing alive in 'output/kernel' (all 18)" in out
    for name in ("tiny", "failed"):
        code, out, _ = command("report", name, *store)
        assert code == 0
        assert Path(out.strip()).read_text().lstrip().lower().startswith("<!doctype html>")


def test_verify_names_the_damaged_file_and_gc_what_goes(command, finished, tmp_path):
    store = shutil.copytree(finished / "store", tmp_path / "store")
    for run in {*(store / "runs").iterdir()} - {store / "runs" / "tiny"}:
        shutil.rmtree(run) if run.is_dir() else run.unlink()
    code, out, _ = command("verify", "--store", store)
    assert code == 0
    assert ": all intact" in out
    assert "\n1 record of runs" in out
    record = json.loads((store / "runs" / "tiny" / "run.json").read_text())
    file = store / "train" / record["stages"]["train"]["key"] / "meta.json"
    os.truncate(file, 9)
    code, out, _ = command("verify", "tiny", "--store", store)
    assert code == 1
    assert f"damaged {file} is not the file that was written" in out
    assert "1 damaged. Run their recipes again" in out
    code, out, _ = command("verify", "--store", store, "--json")
    told = json.loads(out)
    assert (code, told["intact"]) == (1, False)
    assert [a["damages"] for a in told["artifacts"] if a["verdict"] == "damaged"] == [
        [f"{file} is not the file that was written"]
    ]
    code, out, _ = command("gc", "--keep", "0", "--dry-run", "--store", store)
    assert code == 0
    assert "would be freed; nothing was removed" in out
    code, out, _ = command("gc", "--keep", "0", "--store", store, "--json")
    removed = json.loads(out)
    assert code == 0
    assert {r["what"] for r in removed["removed"]} == {"record", "artifact"}
    assert removed["bytes"] == sum(r["bytes"] for r in removed["removed"]) > 0
    young = {p.name for p in store.glob("*/*.work")}  # of a stage that failed a moment ago
    assert {p.name for p in store.glob("*/*") if not p.name.startswith(".")} == young


@pytest.mark.parametrize("arguments", [("verify",), ("gc",), ("gc", "--keep", "-1")])
def test_a_store_that_is_not_there_is_bad_input(command, tmp_path, arguments):
    code, _, err = command(*arguments, "--store", "nowhere")
    assert code == 2
    assert "nowhere" in err or "--keep -1: must be 0 or more" in err
    assert not (tmp_path / "nowhere").exists()


def test_runs_of_an_empty_store(command):
    code, out, _ = command("runs")
    assert code == 0
    assert "no runs in artifacts" in out


@pytest.mark.parametrize("verb", ["", "run", "plan", "recipes", "report", "verify", "gc"])
def test_help_has_examples(command, verb):
    code, out, _ = command(*([verb] if verb else []), "--help")
    assert code == 0
    assert "prune-jax " in out
    assert not verb or "Example" in out


# In processes of their own: what a shell sees.


def shell(*arguments, folder, **environment):
    script = Path(sys.executable).parent / "prune-jax"
    inherited = {k: v for k, v in os.environ.items() if k not in {"XLA_FLAGS", "PREFECT_API_URL"}}
    return subprocess.run(
        [script, *map(str, arguments)],
        cwd=folder,
        env={**inherited, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


HELP = """
import sys
sys.argv = ["prune-jax", "--help"]
from prune_jax.cli import main
try:
    main()
except SystemExit:
    pass
heavy = {"jax", "prefect", "flax", "numpy", "matplotlib", "pydantic"}
print(sorted(heavy & set(sys.modules)))
"""


def test_help_imports_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip().splitlines()[-1] == "[]", done.stderr


def test_the_shell_gets_2_and_one_line_and_no_server_is_left(tmp_path):
    recipe = write(tmp_path, {"stages.prune.target": {"keep": 43}})  # found only when the server is starting already
    done = shell("run", recipe, folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "artifacts").exists()


def test_the_shell_runs_with_a_server_of_its_own_and_needs_none_the_second_time(tmp_path):
    """The default store, one device, no server configured; then all is cached, and Prefect's home is no matter."""
    recipe = write(tmp_path)
    first = shell("run", recipe, "--json", folder=tmp_path)
    assert first.returncode == 0, first.stderr
    record = json.loads(first.stdout)
    assert record["status"] == "completed"
    assert (tmp_path / "artifacts" / "runs" / "tiny" / "run.json").exists()
    assert "Traceback" not in first.stderr
    second = shell("run", recipe, "--json", folder=tmp_path, PREFECT_HOME="/dev/null/nowhere")
    assert second.returncode == 0, second.stderr
    assert {stage["status"] for stage in json.loads(second.stdout)["stages"].values()} == {"cached"}
    assert json.loads(second.stdout)["results"] == record["results"]
