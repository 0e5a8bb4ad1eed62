"""A worker's run is killed or cancelled, and ends well when it is retried as the UI does."""

from __future__ import annotations

import pytest

from tests.faults import outages, workers


@pytest.mark.slow
@pytest.mark.parametrize("inject", [workers.kill_served, workers.kill_worker, workers.cancel_served])
def test_a_served_run_goes_on_where_it_was(inject):
    outcome = inject(1)
    assert (outcome.survived, outcome.lost) == (1, 0)


@pytest.mark.slow
def test_a_server_that_comes_back_costs_nothing():
    outcome = outages.server_away(1)
    assert (outcome.survived, outcome.lost) == (1, 0)
