"""Which units die: exactly as many as asked, the lowest first, within budgets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prune_jax as pj
from prune_jax.errors import NonFiniteScoreError, UserMistake

SIZES = {"a": (4, 6), "b": (6, 10), "c": (10, 3)}


def apply(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]


@pytest.fixture(scope="module")
def net():
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SIZES.items()}
    return pj.trace(apply, params, jnp.ones((2, 4)))


SCORES = {"a.out": np.arange(6.0), "b.out": 100 - 10 * np.arange(10.0)}


def dead_of(net, **words):
    return {name: sorted(units) for name, units in net.choose(SCORES, **words).items()}


def test_the_lowest_of_all_die_once_groups_are_made_alike(net):
    relative = {name: values / values.mean() for name, values in SCORES.items()}
    order = sorted((value, name, unit) for name, values in relative.items() for unit, value in enumerate(values))
    expected = {}
    for _, name, unit in order[:8]:
        expected.setdefault(name, []).append(unit)
    assert dead_of(net, sparsity=0.5) == {name: sorted(units) for name, units in expected.items()}


def test_each_group_loses_its_share_in_the_scope_group(net):
    assert dead_of(net, sparsity=0.5, scope="group") == {"a.out": [0, 1, 2], "b.out": [5, 6, 7, 8, 9]}


def test_min_keep_and_round_to_hold(net):
    kept = {name: net.groups[name].size - len(units) for name, units in dead_of(net, sparsity=0.99).items()}
    assert kept == {"a.out": 1, "b.out": 1}
    kept = {n: net.groups[n].size - len(u) for n, u in dead_of(net, sparsity=0.99, min_keep=3).items()}
    assert kept == {"a.out": 3, "b.out": 3}
    kept = {n: net.groups[n].size - len(u) for n, u in dead_of(net, sparsity=0.5, scope="group", round_to=4).items()}
    assert kept == {"a.out": 4, "b.out": 8}


def test_what_is_dead_already_dies_first_and_counts(net):
    assert dead_of(net, sparsity=0.5, scope="group", dead={"a.out": [5, 4]})["a.out"] == [0, 4, 5]


@pytest.mark.parametrize("budget", [0.6, 60])
def test_a_number_of_parameters_is_kept_with_as_few_dead_as_can_be(net, budget):
    whole = sum(np.prod(shape) for shape in SIZES.values())
    most = budget * whole if budget <= 1 else budget
    dead = dead_of(net, params=budget)
    left = sum(leaf.size for leaf in jax.tree.leaves(net.compact(dead).params))
    assert left <= most
    count = sum(map(len, dead.values()))
    fewer = net.choose(SCORES, sparsity=(count - 1) / 16)
    assert sum(leaf.size for leaf in jax.tree.leaves(net.compact(fewer).params)) > most


def test_multiplications_are_counted_on_the_compact_network(net):
    small = net.compact(net.choose(SCORES, macs=0.4))
    dense = pj.cost(apply, net.params, jnp.ones((2, 4))).macs
    assert pj.cost(small.apply, small.params, jnp.ones((2, 4))).macs <= 0.4 * dense


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, r"give one target \(of sparsity, params, macs\); none is given"),
        ({"sparsity": 0.5, "macs": 0.5}, r"give one target .*; sparsity, macs is given"),
        ({"sparsity": 1.0}, r"sparsity = 1\.0 must be at least 0 and below 1"),
        ({"params": 0}, r"params = 0 must be above 0"),
        (
            {"params": 0.001},
            r"params = 0\.001 is out of reach: with min_keep units left in every group it is 8, of 114",
        ),
        ({"sparsity": 0.5, "scope": "groups"}, r"scope 'groups' is not possible for groups; did you mean 'group'\?"),
        ({"sparsity": 0.5, "kinds": "chanel"}, r"there is no group of kind 'chanel' \(kinds: neuron\)"),
    ],
)
def test_impossible_wishes_are_refused(net, words, message):
    with pytest.raises(UserMistake, match=message):
        net.choose(SCORES, **words)


def test_scores_that_do_not_fit_are_refused(net):
    with pytest.raises(UserMistake, match=r"group 'a.out' has 6 units but its scores are \[5\]"):
        net.choose({"a.out": np.ones(5)}, sparsity=0.5)
    with pytest.raises(UserMistake, match=r"scores 'a' are \[6, 4\] but should be \[4, 6\]"):
        net.choose({"a": np.ones((6, 4))}, sparsity=0.5)
    with pytest.raises(NonFiniteScoreError, match=r"The score of unit 2 of group 'a.out' is nan"):
        net.choose({"a.out": np.array([1, 2, np.nan, 4, 5, 6])}, sparsity=0.5)


@pytest.mark.parametrize("combine", ["sum", "mean", "l1", "l2", "max"])
def test_scores_of_units_are_made_of_all_their_weights(net, combine):
    found = net.unit_scores(net.params, combine=combine)["a.out"]
    rows = np.concatenate([np.asarray(net.params["a"]).T, np.asarray(net.params["b"])], axis=1)  # [units, weights]
    expected = {
        "sum": rows.sum(1),
        "mean": rows.mean(1),
        "l1": np.abs(rows).sum(1),
        "l2": np.sqrt(np.square(rows).sum(1)),
        "max": rows.max(1),
    }[combine]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_units_that_hold_masked_weights_only_are_found(net):
    masks = net.masks({"a.out": [1, 4], "b.out": [0]})
    assert net.dead_in(masks) == {"a.out": [1, 4], "b.out": [0]}
    masks["a"] = masks["a"].at[0, 1].set(True)  # one weight of a unit lives: so does the unit
    assert net.dead_in(masks) == {"a.out": [4], "b.out": [0]}
