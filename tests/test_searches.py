"""Searches beside exhaustive evaluation: the same choice, nothing twice, and nothing chosen by the test split."""

from __future__ import annotations

import contextvars
import json
import math
import sys

import prefect.main  # noqa: F401  (sets up logging, at which absl closes a stderr other than the present one)
import pytest

from prune_jax.errors import PruneError, UserMistake
from prune_jax.garbage import remove
from prune_jax.recipe import Knob, read_knob, read_recipe, read_steps
from prune_jax.records import Run
from prune_jax.searches import bisect, find
from prune_jax.studies import optimise
from prune_jax.trials import Trial, ask
from tests.plain import run_plain, tiny

TRAIN = {"kind": "train", "steps": 40, "optimizer": {"learning_rate": 0.05}}
EVALUATE = {"kind": "evaluate", "of": ["train", "prune"], "latency": None}
PRUNE = {"kind": "prune", "criterion": "magnitude", "target": {"sparsity": 0.5}}
SPARSITY = "stages.prune.target.sparsity"


def recipe(**stages):
    return read_recipe(
        tiny(model={"kind": "linear"}, **{"train": TRAIN, "prune": PRUNE, "evaluate": EVALUATE, **stages})
    )


def question(over=f"{SPARSITY}=0.1:0.9", raw=None, rungs=5, fidelity=None, smallest="nonzero", **asked):
    knobs = [read_knob(text, rungs=rungs) for text in ([over] if isinstance(over, str) else over)]
    steps = read_steps(fidelity) if fidelity else None
    return ask(raw or recipe(), knobs, fidelity=steps, smallest=smallest, name="s", **asked)


def plain(store, ran, stop_after=math.inf):
    """Runs a recipe without Prefect, and notes what was computed; as if killed before one run too many."""

    def carry_out(recipe, name):
        if len(ran) >= stop_after:
            raise KeyboardInterrupt
        plan, results = run_plain(recipe, store, name_failures=False)
        ran.append([result.key for result in results.values() if result.status == "ran"])
        return Run(plan, store, name).finish(results)

    return carry_out


def test_bisection_agrees_with_looking_at_every_rung():
    for count in range(1, 20):
        for first_no in range(count + 1):
            looked = []
            found = bisect(count, lambda rung, n=first_no, looked=looked: looked.append(rung) or rung < n)
            assert found == max((rung for rung in range(count) if rung < first_no), default=None)
            assert len(looked) == len({*looked}) <= math.ceil(math.log2(count + 1))


def test_the_chosen_network_is_that_of_an_exhaustive_search_and_nothing_is_computed_twice(store, tmp_path):
    ran, told, seen = [], [], []

    def tell(_, trial):
        told.append(trial)
        seen.append(json.loads(store.search_path("s").read_text()))

    asked = question(max_drop=0.2)
    answer = find(asked, store, plain(store, ran), tell=tell)
    assert len(told) == len(ran) <= 3
    ends = {"outcome", "message", "set", "chosen", "trials"}
    for number, file in enumerate(seen, 1):  # after each trial the file tells all up to it
        assert file == {**answer, **{e: file[e] for e in ends}}
        assert [file[e] for e in ("outcome", "set", "chosen")] == ["running", [], None]
        assert file["trials"] == answer["trials"][:number]
    assert answer["outcome"] == "found"

    rows = []  # by hand: every rung, read from the artifacts
    for value in asked.knobs[0].values:
        plan, results = run_plain(read_recipe(recipe(), changes=[f"{SPARSITY}={value}"]), store)
        call = next(call for call in plan.calls if call.kind == "evaluate")
        drop = results["train"].metrics["validation_accuracy"] - results["prune"].metrics["validation_accuracy"]
        rows.append((value, drop, results["evaluate"].metrics[call.inputs["prune"].key]["nonzero"]))
    assert [drop <= 0.2 for _, drop, _ in rows] == sorted((drop <= 0.2 for _, drop, _ in rows), reverse=True), rows
    assert rows[0][1] <= 0.2 < rows[-1][1], rows
    best = min((row for row in rows if row[1] <= 0.2), key=lambda row: row[2])
    chosen = answer["chosen"]
    assert (chosen["values"][SPARSITY], chosen["drop"], chosen["size"]) == best
    assert answer["set"] == [f"{SPARSITY}={best[0]}"]
    assert chosen["run"] == f"s-{best[0]}"
    assert json.loads(store.search_path("s").read_text()) == answer

    again = find(asked, store, plain(store, ran, stop_after=0))  # whoever would run is killed: all is known
    strip = [{**trial, "cached": True} for trial in answer["trials"]]
    assert again["trials"] == strip
    assert again["set"] == answer["set"]
    assert len(store.runs()) == len(told)
    assert not list(store.root.glob("runs/*/history"))
    remove(store, keep=0)
    assert store.runs() == [chosen["run"]]  # which searches/s.json names


def test_what_diverges_or_breaches_is_a_no_and_stays_known_and_other_failures_stop(store):
    guarded = {**PRUNE, "guard": {"metric": "accuracy", "max_drop": 0.0, "breach": {"action": "fail"}}}
    ran = []
    asked = question(f"{SPARSITY}=[0.9, 0.95]", recipe(prune=guarded), max_drop=1.0)
    answer = find(asked, store, plain(store, ran))
    assert (answer["outcome"], answer["chosen"], answer["set"]) == ("none", None, [])
    assert "the guard allows 0" in answer["trials"][0]["why"]
    assert answer["message"].startswith("no trial keeps to the guard, accuracy worse by")
    assert find(asked, store, plain(store, ran, stop_after=0))["outcome"] == "none"

    wild = recipe(train={**TRAIN, "optimizer": {"name": "sgd", "learning_rate": 1e38}})
    with pytest.raises(PruneError, match=r"the search stops: run 's-0.9': train failed"):
        find(question(f"{SPARSITY}=[0.9, 0.95]", wild), store, plain(store, []))


def test_a_search_that_stops_says_so_and_keeps_its_trials(store):
    ran = plain(store, [])

    def carry_out(recipe, name):
        record = ran(recipe, name)
        if len(store.runs()) == 2:
            record |= {"status": "failed", "message": "evaluate failed: the disk is full"}
            record["stages"]["evaluate"] |= {"status": "failed", "fault": "OSError"}
        return record

    with pytest.raises(PruneError, match=r"the search stops: run 's-0\.3'") as stopped:
        find(question(f"{SPARSITY}=[0.1, 0.2, 0.3]", max_drop=1.0), store, carry_out)
    file = json.loads(store.search_path("s").read_text())
    assert (file["outcome"], file["message"]) == ("failed", str(stopped.value))
    assert [trial["name"] for trial in file["trials"]] == ["s-0.2"]


def test_a_gate_is_heard_at_the_end_only(store):
    raw = recipe(gate={"kind": "gate", "of": "prune", "at_least": 1.1})
    answer = find(question(f"{SPARSITY}=[0.1, 0.2, 0.3]", raw, max_drop=1.0), store, plain(store, []))
    assert (answer["outcome"], answer["chosen"]["values"][SPARSITY]) == ("rejected", 0.3)
    assert "gate said no: accuracy is" in answer["message"]


def test_rungs_from_small_to_large_are_refused_when_two_sizes_are_known(store):
    asked = question(
        "stages.prune.target.keep=[3, 6, 10]", recipe(prune={**PRUNE, "target": {"keep": 9}}), max_drop=1.0
    )
    with pytest.raises(UserMistake, match=r"nonzero rise from [\d,]+ at 6 to [\d,]+ at 10.*such as 10:3"):
        find(asked, store, plain(store, []))


def planted(size, drop, max_drop, asked):
    """A judge that knows the answer; a higher fidelity lessens the drop."""

    def judge(values, step):
        a, b = values.values()
        lost = drop(a, b) + (0.1 / step if step else 0)
        asked.append((a, b, step))
        return Trial("", values, step, 1 - lost, lost, size(a, b), lost <= max_drop, "", False)

    return judge


def test_optuna_finds_the_planted_best_of_two_knobs_and_goes_the_same_way_again():
    pytest.importorskip("optuna")
    knobs = (Knob("a", tuple(range(9))), Knob("b", tuple(range(9))))
    size, drop = lambda a, b: 200 - 10 * a - 9 * b, lambda a, b: 0.01 * (a + b) + 0.02 * (a > 6)
    every = [(size(a, b), a, b) for a in range(9) for b in range(9) if drop(a, b) <= 0.1]
    ways = []
    for _ in range(2):
        asked = []
        whole = optimise(knobs, planted(size, drop, 0.1, asked), max_drop=0.1, trials=40)
        ways.append(asked)
        assert min(trial.size for trial in whole if trial.ok) == min(every)[0]
    assert ways[0] == ways[1]
    assert len(ways[0]) == 40


def test_bad_trials_stop_early_and_the_good_ones_come_to_the_end():
    pytest.importorskip("optuna")
    knobs = (Knob("a", tuple(range(9))), Knob("b", ("x", "y")))
    asked = []
    judge = planted(lambda a, b: 100 - a, lambda a, b: 0.05 * a + 0.5 * (b == "y"), 0.4, asked)
    whole = optimise(knobs, judge, max_drop=0.4, trials=30, steps=(1, 3, 9))
    by_step = [sum(step == s for *_, step in asked) for s in (1, 3, 9)]
    assert by_step[0] == 18 > by_step[1] >= by_step[2] == len(whole)
    best = min((trial for trial in whole if trial.ok), key=lambda trial: trial.size)
    assert (best.values, best.step) == ({"a": 7, "b": "x"}, 9)  # which is beyond the guard at 1, and within at 9


def test_a_killed_search_of_two_knobs_makes_the_same_choice_and_computes_nothing_twice(store, tmp_path):
    pytest.importorskip("optuna")
    over = [f"{SPARSITY}=[0.3, 0.6, 0.9]", "stages.prune.scope=[global, layer]"]
    asked, ran = question(over, max_drop=0.2), []
    with pytest.raises(KeyboardInterrupt):
        find(asked, store, plain(store, ran, stop_after=2), trials=5)
    assert len(store.runs()) == 2
    left = json.loads(store.search_path("s").read_text())
    assert (left["outcome"], [trial["name"] for trial in left["trials"]]) == ("running", sorted(store.runs()))
    answer = find(asked, store, plain(store, ran), trials=5)
    keys = [key for keys in ran for key in keys]
    assert len(keys) == len({*keys})
    assert [trial["cached"] for trial in answer["trials"][:2]] == [True, True]

    other = type(store)(tmp_path / "other")
    whole = find(asked, other, plain(other, []), trials=5)
    assert [t["name"] for t in whole["trials"]] == [t["name"] for t in answer["trials"]]
    assert whole["chosen"]["values"] == answer["chosen"]["values"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"raw": {"data.validation": 0}}, "never at the test split; set it, such as --set data.validation=0.1"),
        (
            {"raw": {"stages.evaluate.of": '["train"]'}},
            "none evaluates prune, whose size is asked for; add one such as",
        ),
        ({"raw": {"stages.prune.matrix": "{criterion: [magnitude, random]}"}}, "a trial has one network"),
        ({"smallest": "params"}, "masks alone leave params as they are; add `compact: {kind: compact}`"),
        ({"smallest": "parms"}, "did you mean 'params'"),
        ({"metric": "mse"}, "--metric mse: is not known"),
        ({"of": "prun"}, "did you mean 'prune'"),
        ({"over": "stages.train.steps=10:40"}, "changes train, the dense training that every trial is held beside"),
        ({"over": "stages.evaluate.retries=[1, 2]"}, "changes nothing of prune"),
        ({"over": f"{SPARSITY}=0.5:1.5"}, "stages.prune.target.sparsity = 1.0: must be at least 0"),
        ({"over": f"{SPARSITY}=0.5"}, "is neither a range LOW:HIGH nor a list"),
        ({"over": f"{SPARSITY}=[0.5]"}, "has 1 rungs"),
        ({"over": [f"{SPARSITY}=0.5:0.9"] * 2}, "stands twice"),
        ({"fidelity": "stages.prune.finetune.steps=3,1"}, "two or more rising numbers"),
    ],
)
def test_questions_are_refused_before_anything_runs(asked, words):
    changes = [f"{path}={value}" for path, value in asked.get("raw", {}).items()]
    with pytest.raises(UserMistake) as told:
        question(**{**asked, "raw": read_recipe(recipe(), changes=changes)})
    assert words in str(told.value)


def test_the_choice_does_not_change_with_the_test_split(store):
    """A judge that saw the test split would be told other figures by these."""
    asked, ran = question(f"{SPARSITY}=[0.1, 0.5, 0.9]", max_drop=0.2), plain(store, [])

    def spoiled(recipe, name):
        record = ran(recipe, name)
        for result in record["results"].values():
            result |= {"accuracy": 0.0 if result["nonzero"] > 5 else 1.0, "loss": -result["nonzero"]}
        return record

    spoiled_choice = find(asked, store, spoiled)["chosen"]
    assert spoiled_choice["values"] == find(asked, store, plain(store, []))["chosen"]["values"]


@pytest.mark.slow
def test_the_command_runs_trials_as_runs_and_ends_with_0_2_and_3(prefect_server, tmp_path, monkeypatch, capsys):
    from prefect import get_client

    from prune_jax import cli

    pruned = {**PRUNE, "granularity": "group"}
    raw = tiny(train=TRAIN, prune=pruned, compact={"kind": "compact"}, evaluate={"kind": "evaluate", "latency": None})
    raw["stages"]["evaluate"]["of"] = ["train", "compact"]
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(raw))

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["prune-jax", "search", str(file), *arguments, "--store", str(tmp_path / "s")])
        with pytest.raises(SystemExit) as ended:
            contextvars.copy_context().run(cli.main)
        return ended.value.code, *capsys.readouterr()

    one = ("--over", f"{SPARSITY}=[0.2, 0.5, 0.8]", "--name", "one")
    code, out, _ = command(*one, "--max-drop", "1", "--json")
    found = json.loads(out)
    sizes = {trial["values"][SPARSITY]: trial["size"] for trial in found["trials"]}
    assert (code, found["network"], found["chosen"]["size"]) == (0, "compact", min(sizes.values()))
    code, out, _ = command(*one, "--max-drop", "1")
    assert (code, "← chosen" in out, f"--set {SPARSITY}=0.8" in out, "cached" in out) == (0, True, True, True)
    with get_client(sync_client=True) as client:
        names = {run.name for run in client.read_flow_runs()}
    assert {f"{trial['name']} · seed 0" for trial in found["trials"]} <= names
    gate = json.dumps({"kind": "gate", "of": "compact", "at_least": 1.1})
    code, out, _ = command(*one, "--max-drop", "1", "--set", f"stages.gate={gate}")
    assert (code, "but gate said no: accuracy is" in out) == (3, True)
    guard = json.dumps({"metric": "accuracy", "max_drop": 0.0, "breach": {"action": "fail"}})
    code, out, _ = command("--over", f"{SPARSITY}=[0.7, 0.8]", "--set", f"stages.prune.guard={guard}")
    assert (code, "no trial keeps to the guard" in out) == (3, True)  # the fault's name comes through Prefect
    code, _, err = command("--over", f"{SPARSITY}=0.5")
    assert (code, "is neither a range LOW:HIGH nor a list" in err) == (2, True)
