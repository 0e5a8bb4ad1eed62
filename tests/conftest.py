"""Checks set once for all tests: ranks are explicit, two CPU devices, a Prefect home of its own, no telemetry."""

import os
import subprocess
import sys
import tempfile

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("PREFECT_HOME", tempfile.mkdtemp(prefix="prefect-home-"))
os.environ["DO_NOT_TRACK"] = "1"
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what one test compiled is not in another's count
os.environ["PREFECT_UI_URL"] = ""  # nobody looks: runs draw no reports

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# Most of the tests' time is XLA's, which works long at tiny programs that run once. With these settings it makes
# machine code plainly: without LLVM's optimizer, with its older emitters of fused operations, in one piece.
PLAINLY = {  # and as users have it
    "xla_backend_optimization_level": (0, 3),
    "xla_llvm_disable_expensive_passes": (True, False),
    "xla_cpu_use_fusion_emitters": (False, True),
    "xla_cpu_parallel_codegen_split_count": (1, 32),
}
FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, (value, _) in PLAINLY.items())
ASK = "from jaxlib import xla_client; xla_client.CompileOptions().executable_build_options.debug_options"


def pytest_configure(config):
    """Quick tests compile plainly; slow ones, and processes that stand for a user's own, with all that XLA has."""
    given = os.environ["XLA_FLAGS"]
    if config.option.markexpr != "not slow" or FLAGS in given:  # processes of pytest-xdist inherit them
        return
    asked = {**os.environ, "XLA_FLAGS": FLAGS}  # a flag that XLA does not know ends the process: another one asks
    if not subprocess.run([sys.executable, "-c", ASK], env=asked, capture_output=True).returncode:
        os.environ["XLA_FLAGS"] = f"{FLAGS} {given}"


@pytest.fixture
def optimized(monkeypatch):
    """What is compiled ahead of its call is planned as it is for users."""
    if FLAGS in os.environ["XLA_FLAGS"]:
        compiled, theirs = jax.stages.Lowered.compile, {name: value for name, (_, value) in PLAINLY.items()}
        monkeypatch.setattr(jax.stages.Lowered, "compile", lambda lowered: compiled(lowered, compiler_options=theirs))


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
