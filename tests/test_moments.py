"""Moments that go from one training to the next: by name, under masks, cut with the network, refused where none are."""

import jax
import numpy as np
import optax
import pytest

from prune_jax.checkpoints import Store
from prune_jax.errors import UserMistake
from prune_jax.moments import moments_of, with_moments
from prune_jax.recipe import Optimizer, read_recipe
from prune_jax.recipe.parts import OPTIMIZERS
from prune_jax.training import make_optimizer
from prune_jax.trees import leaves_by_path
from tests.plain import TRAIN, arrays, part, run_plain, tiny
from tests.test_plan import keys
from tests.test_training import data, network, start, train

ADAM = {"name": "adam", "learning_rate": 0.01}
MOMENTUM = {"name": "sgd", "learning_rate": 0.02, "momentum": 0.9}
FIELDS = {
    "sgd": {"trace"},
    "adam": {"count", "mu", "nu"},
    "adamw": {"count", "mu", "nu"},
    "nadam": {"count", "mu", "nu"},
    "rmsprop": {"nu", "trace"},
    "adagrad": {"sum_of_squares"},
    "lion": {"count", "mu"},
    "lamb": {"count", "mu", "nu"},
}


def optimizer(name, **more):
    return Optimizer(name=name, **({"momentum": 0.9} if "momentum" in OPTIMIZERS[name] else {}), **more)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("moments") / "store")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_go_over_by_name_and_the_schedule_begins_anew(name):
    params = {"layer": {"kernel": np.ones((3, 2), np.float32), "bias": np.zeros(2, np.float32)}}
    decaying = make_optimizer(optimizer(name, warmup_steps=2, decay_to=0.0, clip_norm=1.0), 10)
    state = decaying.init(params)
    for i in range(3):
        gradients = jax.tree.map(lambda w, i=i: w + i, params)
        _, state = decaying.update(gradients, state, params)
    moments = moments_of(state)
    assert set(moments) == FIELDS[name]
    for field, tree in moments.items():
        assert int(tree) == 3 if field == "count" else set(leaves_by_path(tree)) == {"layer/bias", "layer/kernel"}

    for other in (optimizer(name, learning_rate=0.1), optimizer(name, decay_to=0.5)):
        fresh = make_optimizer(other, 20).init(params)
        kept = with_moments(fresh, moments)
        assert jax.tree.structure(kept) == jax.tree.structure(fresh)
        found = leaves_by_path(moments_of(kept))
        for path, moment in leaves_by_path(moments).items():
            np.testing.assert_array_equal(found[path], moment)
        schedules = [s for s in jax.tree.leaves(kept, is_leaf=_is_schedule) if _is_schedule(s)]
        assert [int(s.count) for s in schedules] == ([0] if other.decay_to is not None else [])


def _is_schedule(part):
    return isinstance(part, optax.ScaleByScheduleState)


def test_moments_of_another_optimizer_or_network_are_refused():
    params = {"w": np.ones(3, np.float32)}
    adam = moments_of(optax.adam(0.1).init(params))
    for other, w, name in [
        (optax.sgd(0.1), 3, "count"),
        (optax.sgd(0.1, 0.9), 3, "trace/w"),
        (optax.adam(1), 2, "mu/w"),
    ]:
        with pytest.raises(UserMistake, match=f"not those of this optimizer and network: {name} differs"):
            with_moments(other.init({"w": np.ones(w, np.float32)}), adam)


@pytest.mark.parametrize("settings", [ADAM, MOMENTUM], ids=["adam", "momentum"])
def test_two_trainings_are_the_loop_of_optax_that_never_lets_go_of_its_state(settings):
    chosen = Optimizer(**settings)
    net, split = network("linear", bias=True), data()
    first = train(net, split, epochs=1, optimizer=chosen)
    second = train(net, split, first.variables, epochs=1, optimizer=chosen, moments=first.moments, seed=1)
    fresh = train(net, split, first.variables, epochs=1, optimizer=chosen, seed=1)

    params, tx = start(net).params, make_optimizer(chosen, 12)
    state = tx.init(params)
    for seed in (0, 1):
        order = np.random.default_rng([seed, 0]).permutation(54).reshape(6, 9)
        for rows in order:
            gradients = jax.grad(_loss)(params, net, split["x"][rows], split["y"][rows])
            updates, state = tx.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
    for found, expected in ((second.variables.params, params), (second.moments, moments_of(state))):
        found = leaves_by_path(found)
        for path, array in leaves_by_path(expected).items():
            np.testing.assert_allclose(found[path], array, rtol=1e-4, atol=1e-6, err_msg=path)
    assert not np.allclose(fresh.variables.params["output"]["kernel"], params["output"]["kernel"], atol=1e-3)


def _loss(params, net, x, y):
    outputs, _ = net.apply(params, {}, (x,), train=True, key=jax.random.key(0))
    return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()


GROUPS = {"kind": "prune", "criterion": "magnitude", "granularity": "group", "target": {"sparsity": 0.5}}
WEIGHTS = {"kind": "prune", "criterion": "magnitude", "target": {"sparsity": 0.5}}
WIDE = {"kind": "mlp", "widths": [12, 8], "batch_norm": True}
SLOW = ("adamw", "nadam", "rmsprop", "adagrad", "lion", "lamb")


def stages(settings, **more):
    return {"train": {**TRAIN, "optimizer": settings, "store_moments": True}, **more}


def recovery(settings, **more):
    return {"kind": "finetune", "steps": 6, "optimizer": settings, "moments": "kept", "store_moments": True, **more}


def cut(keep, path, array):
    """The oracle: what is left of an array, axis by axis."""
    for axis in range(array.ndim):
        array = np.take(array, keep.get(f"{path}/{axis}", np.arange(array.shape[axis])), axis=axis)
    return array


@pytest.mark.parametrize("name", ["adam", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sgd", *SLOW))])
def test_the_small_network_trains_on_as_the_masked_one_does(shared, name):
    settings = optimizer(name, learning_rate=0.01).model_dump(exclude_defaults=True) | {"name": name}
    more = {
        "prune": GROUPS,
        "compact": {"kind": "compact"},
        "small": recovery(settings),
        "large": recovery(settings, after="prune"),
        "fresh": recovery(settings, moments="fresh", after="compact"),
    }
    _, results = run_plain(tiny(model=WIDE, **stages(settings, **more)), shared)
    keep = part(arrays(shared, results["compact"]), "keep/params")
    assert keep
    small, large, fresh = (arrays(shared, results[name]) for name in ("small", "large", "fresh"))
    compared = 0
    for path, array in large.items():
        kind, _, rest = path.partition("/")
        if kind not in {"params", "moments"}:
            continue
        owner = rest if kind == "params" else rest.partition("/")[2]
        expected = cut(keep, owner, array)
        assert small[path].shape == expected.shape
        np.testing.assert_allclose(small[path], expected, rtol=1e-5, atol=1e-5, err_msg=path)
        compared += 1
    assert compared == len([path for path in small if path.startswith(("params", "moments"))])
    # a slip of one moment would show: without them the weights are others
    assert max(np.abs(fresh[path] - small[path]).max() for path in small if path.startswith("params")) > 1e-3


@pytest.mark.parametrize("prune", [WEIGHTS, GROUPS], ids=["weights", "groups"])
def test_the_moments_of_pruned_weights_are_zero_and_the_others_as_they_were(shared, prune):
    _, results = run_plain(tiny(model=WIDE, **stages(ADAM, prune=prune)), shared)
    before, after = (part(arrays(shared, results[name]), "moments") for name in ("train", "prune"))
    masks = part(arrays(shared, results["prune"]), "masks")
    assert set(after) == set(before)
    assert after["count"] == 8
    assert any(not mask.all() for mask in masks.values())
    for path, moment in before.items():
        alive = masks.get(path.partition("/")[2], np.ones(moment.shape, bool))
        np.testing.assert_array_equal(after[path], np.where(alive, moment, 0), err_msg=path)


def test_rounds_hand_their_moments_on(shared):
    """Two rounds of a prune stage are the stages that one would write by hand."""
    finetune = {k: v for k, v in recovery(ADAM, steps=3).items() if k != "kind"}
    climb = {"kind": "iterative", "rounds": 2}
    rounds = {**WEIGHTS, "finetune": finetune, "schedule": climb}
    _, results = run_plain(tiny(**stages(ADAM, prune=rounds)), shared)
    counts = [int(arrays(shared, results[f"prune.{turn}.finetune"])["moments/count"]) for turn in (1, 2)]
    assert counts == [8 + 3, 8 + 3 + 3]
    level = round(1 - 0.5**0.5, 6)
    again = recovery(ADAM, steps=3)
    by_hand = {
        "first": {**WEIGHTS, "target": {"sparsity": level}},
        "on": again,
        "second": WEIGHTS,
        "end": again,
    }
    _, plain = run_plain(tiny(**stages(ADAM, **by_hand)), shared)
    found, expected = arrays(shared, results["prune"]), arrays(shared, plain["end"])
    for path in found:
        np.testing.assert_array_equal(found[path], expected[path], err_msg=path)
    assert any(path.startswith("moments/mu/") for path in found)


def test_a_training_that_is_not_asked_stores_none_and_passes_none_on(shared):
    again = recovery(ADAM, store_moments=False)
    _, results = run_plain(tiny(**stages(ADAM, prune=WEIGHTS, finetune=again)), shared)
    assert not part(arrays(shared, results["finetune"]), "moments")
    _, results = run_plain(tiny(train=TRAIN, prune=WEIGHTS, compact={"kind": "compact"}), shared)
    assert not any(part(arrays(shared, result), "moments") for result in results.values())


def test_an_optimizer_without_moments_has_none_to_keep(shared):
    plain = {"name": "sgd", "learning_rate": 0.01}
    _, results = run_plain(tiny(**stages(plain, prune=GROUPS, compact={"kind": "compact"}, on=recovery(plain))), shared)
    assert results["on"].metrics["steps"] == 6


def test_the_options_are_in_the_keys_and_a_rewound_training_stores_none():
    on = {"kind": "finetune", "steps": 3}
    rewound = {"kind": "finetune", "steps": 3, "rewind": {"step": 2}}
    plain, stored = ({"train": {**TRAIN, "store_moments": s}, "on": on, "rewound": rewound} for s in (False, True))
    kept = {**stored, "on": {**on, "moments": "kept"}}
    also = {**stored, "on": {**on, "store_moments": True}}
    found = [keys(tiny(**s)) for s in (plain, stored, kept, also)]
    assert len({f["train"] for f in found}) == 2
    assert len({f["on"] for f in found}) == 4
    assert len({f["rewound.rewind"] for f in found}) == 1
    assert keys(tiny(train=TRAIN, on={**on, "moments": "fresh"}))["on"] == found[0]["on"]


STORED = {**TRAIN, "store_moments": True}
KEPT = {"kind": "finetune", "steps": 2, "moments": "kept"}
PART = {"steps": 2, "moments": "kept"}
GUARD = {"metric": "accuracy", "max_drop": 0.1}
REFUSED = {
    "not stored": (
        {"train": TRAIN, "on": KEPT},
        "stages.on.moments = 'kept': train, whose network it may start from, stores none: "
        "set `stages.train.store_moments: true`, or leave `moments` out",
    ),
    "not stored, seen through masks": (
        {
            "train": TRAIN,
            "score": {"kind": "score", "criterion": "magnitude"},
            "mask": {"kind": "mask", "target": {"sparsity": 0.5}},
            "compact": {"kind": "compact"},
            "on": KEPT,
        },
        "stages.on.moments = 'kept': train, whose network it may start from, stores none",
    ),
    "not stored by the rounds": (
        {"train": STORED, "prune": {**WEIGHTS, "finetune": {"steps": 2}}, "on": KEPT},
        "stages.on.moments = 'kept': prune.finetune, whose network it may start from, stores none: "
        "set `stages.prune.finetune.store_moments: true`",
    ),
    "the guard may publish the dense network": (
        {
            "train": TRAIN,
            "prune": {**WEIGHTS, "guard": GUARD, "finetune": {"steps": 2, "store_moments": True}},
            "on": KEPT,
        },
        "stages.on.moments = 'kept': train, whose network it may start from, stores none",
    ),
    "the folds of a search train anew": (
        {
            "train": TRAIN,
            "first": {"kind": "finetune", "steps": 2, "store_moments": True},
            "prune": {**WEIGHTS, "finetune": PART, "search": {"amounts": [0.1, 0.5], "folds": 2}},
        },
        "stages.prune.finetune.moments = 'kept': train, whose network it may start from, stores none",
    ),
    "rounds that do not store": (
        {"train": STORED, "prune": {**WEIGHTS, "finetune": PART, "schedule": {"kind": "iterative", "rounds": 2}}},
        "stages.prune.finetune.store_moments: each round goes on with the moments that the one before stores: "
        "set it to true",
    ),
    "another optimizer": (
        {"train": STORED, "on": {**KEPT, "optimizer": {"name": "lion"}}},
        "stages.on.moments = 'kept': lion cannot go on with those of adam, which train stores; "
        "make the optimizers the same, or leave `moments` out",
    ),
    "with and without momentum": (
        {"train": {**STORED, "optimizer": {"name": "sgd"}}, "on": {**KEPT, "optimizer": MOMENTUM}},
        "stages.on.moments = 'kept': sgd with momentum cannot go on with those of sgd, which train stores",
    ),
    "rewound": (
        {"train": STORED, "on": {**KEPT, "rewind": "initialisation"}},
        "stages.on.moments = 'kept': belong to the weights that `rewind` replaces: leave one of the two out",
    ),
    "another than that which is repeated": (
        {
            "train": {**STORED, "optimizer": {"name": "lion"}},
            "first": {"kind": "finetune", "steps": 2, "store_moments": True},
            "on": {"kind": "finetune", "moments": "kept", "rewind": {"learning_rate": {"step": 1}}},
        },
        "stages.on.moments = 'kept': lion cannot go on with those of adam, which first stores",
    ),
    "misspelt": (
        {"train": STORED, "on": {**KEPT, "moments": "keep"}},
        "stages.on.moments = 'keep': is not known; did you mean 'kept'? (allowed: fresh, kept)",
    ),
}


def test_a_repeated_training_goes_on_with_moments_of_its_own_optimizer():
    train = {**STORED, "optimizer": {"name": "lion"}}
    on = {"kind": "finetune", "moments": "kept", "rewind": {"learning_rate": {"step": 1}}}
    read_recipe(tiny(train=train, on=on, further={**on, "kind": "distill"} | {"after": "train"}))


@pytest.mark.parametrize("how", REFUSED)
def test_moments_that_are_not_there_are_refused_before_anything_runs(how):
    chosen, message = REFUSED[how]
    with pytest.raises(UserMistake) as mistake:
        read_recipe(tiny(**chosen))
    assert str(mistake.value).startswith(f"tiny: {message}")


@pytest.mark.parametrize(
    "prune",
    [
        {**WEIGHTS, "guard": {**GUARD, "breach": {"action": "fail"}}, "finetune": {"steps": 2, "store_moments": True}},
        {**WEIGHTS, "finetune": {"steps": 2, "store_moments": True}},
    ],
)
def test_moments_that_are_sure_to_be_there_are_not_refused(prune):
    assert read_recipe(tiny(train={**TRAIN, "optimizer": {"name": "sgd"}}, prune=prune, on=KEPT))
