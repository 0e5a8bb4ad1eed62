from itertools import pairwise

import pytest

from prune_jax.errors import UserMistake
from prune_jax.schedules import iterative, one_shot


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
