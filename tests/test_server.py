"""The temporary server: starts while other work goes on, ends with its process, and says why it does not start."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import (
    PREFECT_API_DATABASE_CONNECTION_URL,
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_UI_URL,
    temporary_settings,
)
from prune_jax.flows import server

from prune_jax.errors import PruneError

STARTS_ONE_AND_IS_KILLED = """
import os, signal, sys
from prune_jax.flows import server
temporary = server.start_early()
with server.in_use(temporary):
    print(temporary.port, "prefect.server.api.server" in sys.modules, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("prefect")  # the first start in a home takes twice as long


@pytest.fixture
def home(shared):
    yield from _home(shared)


@pytest.fixture
def broken_home(tmp_path):
    (tmp_path / "prefect").write_text("a file where a folder is wanted")
    yield from _home(tmp_path / "prefect")


def _home(folder):
    server._start.cache_clear()
    with temporary_settings(
        {PREFECT_HOME: folder}, restore_defaults={PREFECT_API_URL, PREFECT_API_DATABASE_CONNECTION_URL}
    ):
        yield folder
    if server._start.cache_info().currsize:
        server._stop(server._start().process)
    server._start.cache_clear()


def _answers(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=2).status == http.client.OK
    except (urllib.error.URLError, OSError):
        return False


def _listens_at(port: int) -> set[str]:
    """The addresses at which somebody of this machine waits for connections to a port."""
    lines = [
        line.split() for table in ("tcp", "tcp6") for line in Path("/proc/net", table).read_text().splitlines()[1:]
    ]
    return {line[1].split(":")[0] for line in lines if line[3] == "0A" and int(line[1].split(":")[1], 16) == port}


def test_a_url_makes_a_server_configured(home):
    assert not server.configured()
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4200/api"}):
        assert server.configured()


@pytest.mark.slow
def test_one_server_serves_all_runs_of_a_process_and_another_one_those_after_its_end(home):
    first = server.start_early()
    assert server.start_early() is first
    with server.in_use(first):
        assert PREFECT_API_URL.value() == f"http://127.0.0.1:{first.port}/api"
        assert not PREFECT_UI_URL.value()
        assert _listens_at(first.port) == {"0100007F"}  # 127.0.0.1 alone, as the kernel writes it
        with get_client(sync_client=True) as client:
            assert client.api_healthcheck() is None
    assert not server.configured()
    assert (home / "prefect.db").exists()

    server._stop(first.process)
    assert not _answers(first.port)
    second = server.start_early()
    assert second is not first
    with server.in_use(second):
        assert _answers(second.port)


def test_it_ends_when_the_process_that_started_it_is_killed(home):
    script = [sys.executable, "-c", STARTS_ONE_AND_IS_KILLED]
    killed = subprocess.run(script, capture_output=True, text=True, env={**os.environ, "PREFECT_HOME": str(home)})
    port, imported = killed.stdout.split()
    assert imported == "False"  # the import that a server in a process of its own saves
    begun = time.monotonic()
    while _answers(int(port)) and time.monotonic() - begun < 10:
        time.sleep(0.1)
    assert not _answers(int(port))


def test_a_server_that_does_not_start_is_named_with_its_home(broken_home):
    with pytest.raises(PruneError) as raised, server.in_use(server.start_early()):
        pass
    assert str(raised.value) == (
        "Prefect's temporary server ended with exit code 1; what it wrote stands above. Its database lies in "
        f"{broken_home}: make sure that it can be written there, or set PREFECT_API_URL to a server that runs."
    )
