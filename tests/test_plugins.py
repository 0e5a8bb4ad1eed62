"""Another package's criterion and training method: found by their entry points, in a process of its own."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prune_jax.errors import UserMistake
from prune_jax.preparation import check_networks, prepare
from prune_jax.recipe import read_recipe
from prune_jax.registry import Registry
from prune_jax.sparse_training import METHODS, Method, find, rigl
from tests.plain import TRAIN, arrays, part, run_plain, tiny

CODE = '''
import jax, jax.numpy as jnp
from prune_jax.criteria import criterion
from prune_jax.schedules import Levels
from prune_jax.sparse_training import gradual, method

@criterion("power", formula="|w|^q", paper="of this test", granularities=("weight", "neuron"))
def power(params, stats, *, q: int = 3):
    """A power of each weight's size: s = |w|^q.

    Args:
        params: weights.
        stats: not used.
        q: which power.

    Returns:
        Scores shaped like `params`.
    """
    return jax.tree.map(lambda w: jnp.abs(w) ** q, params)

@method("late", formula="dense until a share of the steps is done, then masked for good", paper="of this test")
def late(inner, *, sparsity: float, begin: float = 0.5, steps: int, exclude=()):
    """Prunes once, late."""
    return gradual(inner, schedule=Levels((int(begin * steps),), (sparsity,)), exclude=exclude)

def dice():
    """What nobody learns."""
'''
ENTRIES = """[prune_jax.criteria]
power = tiny_plugin.methods:power
[prune_jax.sparse_training]
late = tiny_plugin.methods:late
[prune_jax.datasets]
dice = tiny_plugin.methods:dice
"""
SCRIPT = """
import json, sys
import numpy as np
import jax.numpy as jnp
import prune_jax as pj
from prune_jax import cli
from prune_jax.checkpoints import Store
from prune_jax.problems import code_of
from tests.plain import arrays, part, run_plain, tiny

scores = pj.score("power", {"w": jnp.array([[2.0, -3.0]])}, options={"q": 2})["w"].tolist()
stages = json.loads(sys.argv[1])
store = Store(sys.argv[2])
plan, results = run_plain(tiny(**stages), store)
dead = {
    name: {path: int((~m).sum()) for path, m in part(arrays(store, results[name]), "masks").items()}
    for name in ("train", "prune")
}
recipe = plan.recipe
thrown = code_of(recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": "dice"})}))
code = {**plan.calls[0].problem.code, "dice": thrown["dice"]}
labels = [call.label for call in plan.calls]
print(json.dumps({"scores": scores, "dead": dead, "code": code, "labels": labels}))
sys.argv = ["prune-jax", "methods"]
cli.main()
"""
STAGES = {
    "train": {"kind": "train", "steps": 8, "sparsify": {"kind": "late", "sparsity": 0.5, "exclude": ["output/*"]}},
    "prune": {
        "kind": "prune",
        "criterion": "power",
        "granularity": "neuron",
        "target": {"sparsity": 0.5},
        "min_keep": 1,
    },
}


def installed(folder):
    """As an installer leaves a package: its code, and a `.dist-info` beside it."""
    (folder / "tiny_plugin").mkdir()
    (folder / "tiny_plugin" / "__init__.py").touch()
    (folder / "tiny_plugin" / "methods.py").write_text(CODE)
    told = folder / "tiny_plugin-1.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-plugin\nVersion: 1.0\n")
    (told / "entry_points.txt").write_text(ENTRIES)


def test_a_plug_in_is_used_by_name_from_recipes_and_from_python(tmp_path):
    installed(tmp_path)
    root = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tmp_path), str(root)])
    arguments = [sys.executable, "-c", SCRIPT, json.dumps(STAGES), str(tmp_path / "store")]
    environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "120"}
    ended = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=root, check=False)
    assert ended.returncode == 0, ended.stderr
    told, listed = ended.stdout.split("\n", 1)
    found = json.loads(told)
    assert found["scores"] == [[4, 9]]
    assert found["dead"]["train"] == {"hidden_0/kernel": 12}  # of 4 x 6, in mid-training
    assert sum(found["dead"]["prune"][path] for path in ("hidden_0/bias", "output/bias")) == 4  # of 9 neurons
    digest = hashlib.sha256(CODE.encode()).hexdigest()[:20]
    assert {found["code"][name] for name in ("power", "late", "dice")} == {digest}
    assert found["labels"][0] == "train · mlp · late"
    assert "power" in listed
    assert "late" in listed


def halfway(inner, *, sparsity: float, begin: int = 1, key, exclude=()):
    """One's own function, which nobody registered."""
    return rigl(inner, sparsity=sparsity, every=begin, end=4, key=key, exclude=exclude)


def stateless(inner):
    return optax.with_extra_args_support(inner)


class Own(NamedTuple):
    """A state of one's own."""

    masks: Any
    inner: Any
    key: Any


def checkered(inner, *, key, typed: bool = False):
    """Every other weight is dead; the state is one's own."""
    inner = optax.with_extra_args_support(inner)

    def init(params):
        masks = jax.tree.map(lambda w: jnp.arange(w.size).reshape(w.shape) % 2 == 0, params)
        return Own(masks, inner.init(params), key if typed else jax.random.key_data(key))

    def update(updates, state, params=None, **extra):
        steps, moved = inner.update(updates, state.inner, params, **extra)
        return jax.tree.map(lambda m, u, w: jnp.where(m, u, -w), state.masks, steps, params), state._replace(
            inner=moved
        )

    return optax.GradientTransformationExtraArgs(init, update)


OWN = "tests.test_plugins:halfway"


def planned(**method):
    return prepare(read_recipe(tiny(train={**TRAIN, "sparsify": {"kind": OWN, "sparsity": 0.5, **method}})))


def test_keys_are_made_of_the_code_and_of_options_that_are_no_defaults():
    call = planned().calls[0]
    assert list(call.problem.code) == ["tests.samples.tiny:blobs", OWN]
    assert call.key == planned(begin=1).calls[0].key != planned(begin=2).calls[0].key
    check_networks(planned(exclude=["output/*"]))


MISTAKES = [
    ({"sparsiti": 0.5}, "train.sparsify = {'sparsity': 0.5, 'sparsiti': 0.5}: training method", "did you mean 'spars"),
    ({"key": 3}, "'key' is not an argument", "(accepted: sparsity, begin, exclude)"),
    ({"kind": "lat"}, "train.sparsify.kind = 'lat': training method 'lat' is not known", "(known: "),
    ({"kind": "tests.test_plugins:halfwy"}, "has no 'halfwy'; did you mean 'halfway'?", ""),
    ({"kind": "tests.test_plugins:OWN"}, "is of type str, not a training method", ""),
    ({"exclude": ["outptu"]}, "train.sparsify.exclude = ['outptu']: exclude pattern 'outptu' fits no parameter", ""),
    ({"begin": 9}, "every = 9, end = 4: every must be at least 1", ""),
]


@pytest.mark.parametrize(("method", "message", "more"), MISTAKES, ids=range(len(MISTAKES)))
def test_mistakes_are_named_before_anything_runs(method, message, more):
    with pytest.raises(UserMistake) as caught:
        check_networks(planned(**method))
    assert message in str(caught.value)
    assert more in str(caught.value)


def test_a_state_without_masks_is_refused():
    stages = {"train": {**TRAIN, "sparsify": {"kind": "tests.test_plugins:stateless"}}}
    with pytest.raises(UserMistake, match=r"sparsify.kind = 'tests.test_plugins:stateless': its state has no `masks`"):
        check_networks(prepare(read_recipe(tiny(**stages))))


def test_a_state_of_ones_own_is_trained_to_the_end(store):
    stages = {"train": {**TRAIN, "sparsify": {"kind": "tests.test_plugins:checkered"}}}
    _, results = run_plain(tiny(**stages), store)
    assert results["train"].metrics["sparsity"] == pytest.approx(0.5, abs=0.02)
    found = arrays(store, results["train"])
    for path, mask in part(found, "masks").items():
        np.testing.assert_array_equal(found[f"params/{path}"][~mask], 0)
    stages["train"]["sparsify"]["typed"] = True
    with pytest.raises(UserMistake, match=r"its state holds a PRNG key, .* keep `jax.random.key_data\(key\)`"):
        run_plain(tiny(**stages), store)


@pytest.mark.parametrize("kind", ["finetune", "distill"])
def test_keys_hold_the_code_of_methods_of_later_stages_too(kind):
    later = {"kind": kind, "steps": 4, "sparsify": {"kind": OWN, "sparsity": 0.5}}
    plan = prepare(read_recipe(tiny(train=TRAIN, later=later)))
    assert OWN in plan.calls[0].problem.code


def test_a_plug_in_that_cannot_be_loaded_is_named_with_its_package(tmp_path, monkeypatch):
    installed(tmp_path)
    (tmp_path / "tiny_plugin" / "methods.py").write_text("import no_such_thing")
    monkeypatch.syspath_prepend(tmp_path)
    message = r"criterion 'power' cannot be loaded from 'tiny-plugin' \(tiny_plugin.methods:power\): ModuleNotFoundErr"
    with pytest.raises(UserMistake, match=message):
        Registry("criterion", "prune_jax.criteria")["power"]


def test_methods_are_found_as_what_they_are():
    assert find("rigl") is find("prune_jax.sparse_training:rigl") is METHODS["rigl"]
    own = find(OWN)
    assert isinstance(own, Method)
    assert list(own.options) == ["sparsity", "begin", "exclude"]
