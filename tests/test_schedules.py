from itertools import pairwise

import pytest

from prune_jax.errors import UserMistake
from prune_jax.schedules import cubic, iterative, one_shot


@pytest.mark.parametrize("levels", ["geometric", "cubic"])
@pytest.mark.parametrize("rounds", [1, 2, 5, 13])
@pytest.mark.parametrize("final", [0.0, 0.3, 0.9, 0.999])
def test_levels_rise_and_end_exactly(levels, rounds, final):
    found = iterative(final, rounds=rounds, levels=levels)
    assert len(found) == rounds
    assert found[-1] == final
    assert list(found) == sorted(found)
    assert all(type(level) is float for level in found)


def test_geometric_prunes_the_same_fraction_of_the_survivors():
    found = (0.0, *iterative(0.9, rounds=5))
    fractions = [(1 - b) / (1 - a) for a, b in pairwise(found)]
    assert fractions == pytest.approx([0.1 ** (1 / 5)] * 5)


def test_cubic_follows_the_paper():
    assert iterative(0.8, rounds=4, levels="cubic") == pytest.approx(
        [0.8 - 0.8 * (1 - r / 4) ** 3 for r in (1, 2, 3, 4)]
    )


def test_one_shot_is_one_level():
    assert one_shot(0.7) == (0.7,)


def test_mistakes():
    with pytest.raises(UserMistake, match=r"levels 'cubik' is not known; did you mean 'cubic'\?"):
        iterative(0.9, rounds=2, levels="cubik")
    with pytest.raises(UserMistake, match="rounds is 0 but must be at least 1"):
        iterative(0.9, rounds=0)


@pytest.mark.parametrize(("begin", "end", "every"), [(0, 10, 1), (100, 1000, 10), (5, 12, 4), (3, 3, 1)])
def test_the_cubic_ramp_is_the_formula_and_ends_exactly(begin, end, every):
    found = cubic(0.2, 0.9, begin=begin, end=end, every=every)
    assert found.steps == tuple(sorted({*range(begin, end, every), end}))
    assert found.sparsities[-1] == 0.9
    for t, level in zip(found.steps[:-1], found.sparsities, strict=False):
        assert level == pytest.approx(0.9 - 0.7 * (1 - (t - begin) / (end - begin)) ** 3)
    assert list(found.sparsities) == sorted(found.sparsities)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"begin": 20}, "begin = 20, end = 10: begin must be at least 0, and end not before it"),
        ({"every": 0}, "every = 0: must be at least 1"),
        ({"final": 90}, "final = 90: must be at least 0 and below 1; sparsity is the fraction pruned"),
    ],
)
def test_mistakes_of_a_ramp_are_named(changes, message):
    given = {"initial": 0.0, "final": 0.9, "begin": 0, "end": 10, "every": 1, **changes}
    with pytest.raises(UserMistake, match=message):
        cubic(given.pop("initial"), given.pop("final"), **given)
