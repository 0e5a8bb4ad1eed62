"""Some of the faults of `corruption`, and what `verify` and `gc` say."""

from __future__ import annotations

import pytest

from tests.faults import corruption


def test_a_changed_file_is_named_and_its_stage_alone_is_made_anew():
    """Each way to damage a file, once."""
    outcome = corruption.corrupt(len(corruption.DAMAGES), small=True)
    assert (outcome.survived, outcome.lost) == (outcome.times, 0)


@pytest.mark.slow
def test_two_hundred_changed_files():
    outcome = corruption.corrupt(200)
    assert (outcome.survived, outcome.lost) == (200, 0)


def test_a_damaged_step_checkpoint_is_never_gone_on_from():
    outcome = corruption.corrupt_step(len(corruption.DAMAGES))
    assert (outcome.survived, outcome.lost) == (outcome.times, 0)
