"""The fuzzers again, guided: Atheris (libFuzzer) goes on from what reached new branches of the package.

`pip install atheris`, then `python -m tests.faults --only 'guided*' --times N`. libFuzzer ends the process it runs in,
so each runs in one of its own: `python -m tests.faults.guided NAME FOLDER [libFuzzer's options]`. What stands in text
or headers is changed byte by byte, from files that are valid; the rest as Hypothesis draws it, from the bytes given.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from mmap import mmap
from pathlib import Path
from typing import Any

from tests.faults.table import Outcome, fault

GUIDED = (
    "recipes",
    "YAML",
    "npz",
    "safetensors",
    "packed arrays",
    "exported programs",
    "metadata of artifacts",
    "run records",
)
READERS = ["prune_jax", "yaml", "zipfile", "numpy.lib"]  # whose branches guide
SLOW, MEMORY = 120, 2048  # seconds of one case by the clock, in native code too; MiB of the process
AVAILABLE = importlib.util.find_spec("atheris") is not None


def guided(name: str, times: int) -> Outcome:
    """Has libFuzzer run so many cases of a fuzzer; the first that is not answered is raised with its traceback."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        options = [
            f"-runs={times}",
            "-seed=1",
            f"-timeout={SLOW}",
            f"-rss_limit_mb={MEMORY}",
            "-max_len=8192",
            "-len_control=0",
        ]
        command = [sys.executable, "-m", "tests.faults.guided", name, folder, *options]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        told = "\n".join(line for line in done.stderr.splitlines() if not line.startswith(("INFO", "#")))
        assert done.returncode == 0, f"{name}: exit code {done.returncode}\n{told[-6000:]}"
        cases = int.from_bytes((Path(folder) / "cases").read_bytes(), "little")
    print(*re.findall(r"#\d+\s+(?:INITED|DONE) .*", done.stderr), sep="\n")
    return Outcome(cases, cases, 0, time.perf_counter() - began)


def target(name: str, folder: Path) -> Callable[[bytes], None]:
    """What libFuzzer calls: one case of bytes. Valid ones go to `folder/seeds`, their words to `folder/words`."""
    from tests.faults import bending, fuzz

    home, seeds, tally = folder / "store", folder / "seeds", folder / "cases"
    home.mkdir()
    seeds.mkdir()
    tally.write_bytes(bytes(8))
    prepared = fuzz.FUZZERS[name](home)
    judge = fuzz.Judge(prepared.survives)
    raw: dict[str, tuple[list[bytes], Callable[[bytes], Any]]] = {
        "YAML": ([text.encode() for text in fuzz.built_in().values()], lambda data: (data, [])),
        "npz": ([bending.npy(array) for array in bending.GOOD.values()], bending.archive_around),
        "safetensors": headers(fuzz.PLAIN),
        "packed arrays": headers(fuzz.SPARSE),
    }
    if name in raw:
        valid, case_of = raw[name]
        words = {word.decode() for data in valid for word in re.findall(rb"[\w.-]+|[{}\[\](),:<>]+", data)}
        run: Callable[[bytes], object] = lambda data: judge(case_of(data))  # noqa: E731
    else:
        valid = [random.Random(i).randbytes(2048) for i in range(50)]
        run = fuzz.property_of(prepared, judge, 1).hypothesis.fuzz_one_input
        words = {"."}
    for i, data in enumerate(valid):
        (seeds / str(i)).write_bytes(data)
    (folder / "words").write_text("".join(f'"{word}"\n' for word in sorted(words)))
    with tally.open("r+b") as file:
        counted = mmap(file.fileno(), 8)  # libFuzzer ends the process without a last word

    def one(data: bytes) -> None:
        run(data)
        counted[:] = judge.cases.to_bytes(8, "little")

    return one


def headers(file: bytes) -> tuple[list[bytes], Callable[[bytes], bytes]]:
    """The header of a safetensors file, and what makes a file of one."""
    from tests.faults.fuzz import arrays_file, parts_of

    header, body = parts_of(file)
    return [json.dumps(header).encode()], lambda text: arrays_file(text, body, [], 0)


def main(name: str, folder: str, *options: str) -> None:
    """Never comes back: libFuzzer exits when it has run its cases, or at the first that fails."""
    import atheris

    home = Path(folder)
    with atheris.instrument_imports(include=READERS):
        one = target(name, home)
    atheris.Setup([name, *options, f"-dict={home / 'words'}", f"-artifact_prefix={home}/", str(home / "seeds")], one)
    atheris.Fuzz()


if AVAILABLE:
    for name in GUIDED:
        fault(f"guided {name}")(lambda times, name=name: guided(name, times))

if __name__ == "__main__":
    main(*sys.argv[1:])
