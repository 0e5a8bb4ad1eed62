"""kill -9 at any moment: the same run then finishes, nothing is made twice, and the bytes are those of a quiet run."""

from __future__ import annotations

import random

import pytest

from tests.faults import kills
from tests.faults.forks import Forks
from tests.faults.kills import Moment, kill_and_finish, kill_often
from tests.faults.runs import contents, environment, finished, last_steps, recipe, records


def test_kills_in_a_training_and_in_a_save_cost_nothing(tmp_path):
    """One run is killed twice: while its training saves a step, and while a mask is being saved."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    raw = recipe(seconds=0.01, steps=20, rounds=1, formats=("safetensors",))
    with Forks(raw, environment(tmp_path / "home") | cache) as forks:
        assert forks.launch(tmp_path / "whole").wait(300) == 0
        (record,) = records(tmp_path / "whole")
        pool = {m.name: m for m in kills.moments(record)}
        wanted = [pool["step of train"], pool["saving prune.1.mask"]]
        whole = contents(tmp_path / "whole")
        done, wrong = kill_and_finish(forks.launch, tmp_path / "killed", whole, wanted, random.Random(0))
    assert done == ["step of train", "saving prune.1.mask"]
    assert wrong == []
    assert len(whole) == len(record["stages"]) == 8


def test_the_judge_sees_what_is_lost(store):
    """A store that lost a finished artifact, or holds another one in its place, does not pass."""
    import numpy as np

    from prune_jax.recipe import Ref

    ref = Ref("train", "k" * 20)
    store.write(ref, {"w": np.ones(3)}, {"metrics": {"loss": 1.0, "resumed_from_step": 3}})
    before, content = finished(store.root), contents(store.root)
    store.path(ref).rmtree()
    assert finished(store.root) == {}
    store.write(ref, {"w": np.ones(3)}, {"metrics": {"loss": 1.0}})
    assert finished(store.root) != before
    assert contents(store.root) == content  # where it went on from is no part of what it is
    store.path(ref).rmtree()
    store.write(ref, {"w": np.array([1.0, 1.0, np.nextafter(1.0, 2.0)])}, {"metrics": {"loss": 1.0}})
    assert contents(store.root) != content
    with store.steps(ref) as steps:
        steps.save(4, {"w": np.ones(3)})
    assert last_steps(store.root) == {f"train/{ref.key}": 4}


def test_a_moment_comes_once_its_file_is_new(tmp_path):
    moment = Moment("saving", 0, "*/.k.*.tmp", 0)
    (tmp_path / "train" / ".k.1.tmp").mkdir(parents=True)
    begun = (tmp_path / "train" / ".k.1.tmp").stat().st_mtime
    assert moment.come(tmp_path, begun)
    assert not moment.come(tmp_path, begun + 1)


@pytest.mark.slow
@pytest.mark.parametrize("inject", [kills.kill_plain, kills.kill_flow, kills.kill_flow_alone])
def test_many_kills(inject):
    outcome = inject(4)
    assert (outcome.survived, outcome.lost) == (4, 0)


@pytest.mark.slow
def test_repeated_kills_of_one_training(tmp_path):
    """Each time it goes on from its last checkpoint, so that it ends although no process lives to its end."""
    raw = recipe(formats=("safetensors",))
    with Forks(raw, environment(tmp_path)) as forks:
        assert kill_often(forks.launch, tmp_path, 6, seed=3).lost == 0
