"""Some of the faults of `disks`: each is told with what to do, loses nothing, and the run goes on when it is over."""

from __future__ import annotations

import pytest

from tests.faults import disks

MOUNTS = pytest.mark.skipif(not disks.possible(), reason="mount namespaces are not allowed here")


@MOUNTS
@pytest.mark.slow
@pytest.mark.parametrize("name", disks.FAULTS)
def test_a_disk_that_fails_loses_nothing(name):
    assert disks.on_a_small_disk(name, 4) == [""] * 4
