"""Checks set once for all tests: ranks are explicit, two CPU devices, a Prefect home of its own, no telemetry."""

import os
import tempfile

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("PREFECT_HOME", tempfile.mkdtemp(prefix="prefect-home-"))
os.environ["DO_NOT_TRACK"] = "1"
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["PREFECT_UI_URL"] = ""  # nobody looks: runs draw no reports

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def store(tmp_path):
    from prune_jax.checkpoints import Store

    return Store(tmp_path / "store")


@pytest.fixture(scope="session")
def prefect_server():
    """One server of Prefect's for all tests that run flows."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield
