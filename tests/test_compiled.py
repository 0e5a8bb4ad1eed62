"""Compiled programs are kept from process to process, where that is this user's and nobody chose otherwise."""

import json
import os
import socket
import subprocess
import sys

import pytest

from prune_jax import compiled

COMPILES = """
import json, os, sys, jax, jax.numpy as jnp
if "HOST" in os.environ:
    jax.distributed.initialize(os.environ["HOST"], 1, 0, coordinator_bind_address=os.environ["HOST"])
from prune_jax.compiled import keep
heard = []
jax.monitoring.register_event_listener(lambda event, **_: heard.append(event))
jnp.ones(3) + 1  # something is compiled before
where = keep()
assert keep() is None, "once is enough"
value = jax.jit(lambda x: jnp.sort(x @ x.T, axis=0)[::2].sum())(jnp.arange(12.0).reshape(4, 3))
print(json.dumps([str(where), float(value), heard.count("/jax/compilation_cache/cache_hits")]))
"""


def compiles(cache, **env):
    env = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "true", "XDG_CACHE_HOME": str(cache), **env}
    env.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    done = subprocess.run([sys.executable, "-c", COMPILES], env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return *json.loads(done.stdout), done.stderr


def test_the_next_process_takes_what_is_there_and_a_torn_file_is_no_harm(tmp_path):
    where, value, hits, _ = compiles(tmp_path)
    assert where.startswith(str(tmp_path / "prune_jax" / "compiled"))
    assert hits == 0
    files = [file for file in (tmp_path / "prune_jax").glob("*/*/*") if file.stat().st_size]
    assert files
    assert (tmp_path / "prune_jax" / "compiled").stat().st_mode & 0o077 == 0
    assert compiles(tmp_path) == (where, value, hits + len(files), "")
    for file in files:  # as if the process that wrote it had been killed
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert compiles(tmp_path)[:3] == (where, value, 0)


def test_nothing_is_kept_where_the_user_chose(tmp_path):
    theirs = tmp_path / "theirs"
    assert compiles(tmp_path, JAX_COMPILATION_CACHE_DIR=str(theirs))[0] == "None"
    assert list(theirs.iterdir())
    assert compiles(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")[0] == "None"
    assert not (tmp_path / "prune_jax").exists()


def test_nothing_is_kept_over_hosts(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
    assert compiles(tmp_path, HOST=host)[0] == "None"
    assert not (tmp_path / "prune_jax").exists()


@pytest.mark.parametrize("trouble", ["", "a file", "others write"])
def test_nothing_is_kept_where_others_may_write_or_nobody(tmp_path, trouble):
    folder = tmp_path / "compiled" / "cpu"
    if trouble == "a file":
        folder.parent.write_text("")
    elif trouble:
        folder.parent.mkdir()
        folder.parent.chmod(0o777)
    assert compiled._is_ours(folder) == (not trouble)


def test_what_was_not_used_for_longest_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "LIMIT", 250)
    for age, name in enumerate(["new", "used", "old"]):
        file = tmp_path / "cpu" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes(100))
        os.utime(file, (1e9 - 100 * age, 1e9 - 100 * age))
    os.utime(tmp_path / "cpu" / "old", (2e9, 1e9))  # read since
    compiled._trim(tmp_path)
    assert {file.name for file in (tmp_path / "cpu").iterdir()} == {"new", "old"}


def test_processors_have_folders_of_their_own(tmp_path, monkeypatch):
    told = tmp_path / "cpuinfo"
    monkeypatch.setattr(compiled, "CPUS", told)
    found = set()
    for text in ("model name: A\nflags: avx\nMHz: 1", "model name: A\nflags: avx\nMHz: 2", "model name: A\nflags: sse"):
        told.write_text(text)
        found.add(compiled._processor())
    told.unlink()
    assert len(found | {compiled._processor()}) == 3
