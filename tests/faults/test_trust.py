"""Nothing is unpickled, nothing is imported that an artifact names, nothing outside the store is read or written."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from prune_jax import cli
from prune_jax.checkpoints import META, Store
from prune_jax.errors import DamagedArtifactError, PruneError, UserMistake
from prune_jax.export import load_stablehlo, stablehlo
from prune_jax.prediction import predict
from prune_jax.preparation import prepare
from prune_jax.recipe import Ref, check_run_name, read_recipe
from prune_jax.registry import without_plugins
from prune_jax.report import write_report
from tests.faults.trust import REF, Bomb, planted, rewritten
from tests.plain import TRAIN, tiny
from tests.report_runs import compact_run

ROOT = Path(__file__).parents[2]
SOURCES = [f for folder in ("prune_jax", "flows") for f in sorted((ROOT / folder).rglob("*.py"))]
UNSAFE = {"pickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle"}


def test_a_pickle_where_a_file_is_read_is_not_loaded(tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path / "mark"))
    pickle.loads(bomb)
    assert (tmp_path / "mark").exists()  # it would be seen
    outcome = planted(20)
    assert outcome.survived == outcome.times == 20


@pytest.mark.slow
def test_nor_is_it_anywhere_else_nor_an_array_of_objects():
    outcome = planted(10**6)
    assert outcome.survived == outcome.times > 60


def unsafe(source: str) -> list[str]:
    """The places in a source that could run what they read."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"{node.lineno}: imports {name}" for name in names if name.partition(".")[0] in UNSAFE]
        if not isinstance(node, ast.Call):
            continue
        called, said = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in {"eval", "exec", "compile", "__import__", "os.system", "yaml.unsafe_load", "yaml.full_load"}:
            found.append(f"{node.lineno}: calls {called}")
        if called in {"np.load", "numpy.load"} and said.get("allow_pickle") != "False":
            found.append(f"{node.lineno}: {called} without allow_pickle=False")
        if called.endswith("read_array") and said.get("allow_pickle") != "False":
            found.append(f"{node.lineno}: {called} without allow_pickle=False")
        if called == "yaml.load" and ast.unparse(node.args[1]) != "_Loader":
            found.append(f"{node.lineno}: yaml.load with another loader")
        if called in {"importlib.import_module"} and "load_module" not in source and "_HOME" not in source:
            found.append(f"{node.lineno}: imports by name outside the registry")
        if "shell" in said:
            found.append(f"{node.lineno}: a shell")
    return found


def test_no_module_could_run_what_it_reads():
    assert {str(f): told for f in SOURCES if (told := unsafe(f.read_text("utf-8")))} == {}
    planted = "import pickle\nfrom dill import load\neval('1')\nnp.load(f)\nyaml.load(t, yaml.Loader)\n"
    assert len(unsafe(planted)) == 5


NAMED = "planted_module_of_somebody"


def test_what_an_artifact_names_is_not_imported(tmp_path, monkeypatch, capsys):
    (tmp_path / f"{NAMED}.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    store = Store(tmp_path / "store")
    name = compact_run(store)
    reference, script = f"{NAMED}:Net", "<script>alert(1)</script>"
    record = json.loads(store.record_path(name).read_text())
    record["recipe"] |= {"model": {"kind": reference}, "objective": reference, "data": {"source": reference}}
    record["message"] = f"\x1b]0;title\x07{script}"
    for stage in record["stages"].values():
        stage |= {"label": f"{reference} {script}", "message": script}
        if (meta := Path(store.path(Ref(stage["kind"], stage["key"]))) / META).exists():
            told = json.loads(meta.read_text()) | {
                "call": {"problem": {"model": {"kind": reference}}},
                "model": reference,
            }
            meta.write_text(json.dumps(told, indent=1))
            rewritten(meta.parent, "note", b"")
    store.write_record(record)
    (tmp_path / "file").write_text("mine")
    (Path(store.record_path(name)).parent / "report.html").symlink_to(tmp_path / "file")
    html = write_report(store, name).read_text()
    assert (tmp_path / "file").read_text() == "mine"
    cli.show(name, store=str(store.root))
    cli.runs(store=str(store.root))
    with pytest.raises(UserMistake, match="has no StableHLO export"):
        predict(store, name, {"x": np.ones((1, 2))})
    assert not (tmp_path / "mark").exists()
    assert NAMED not in sys.modules
    assert script not in html
    assert "\x1b]0" not in capsys.readouterr().out


def test_a_program_that_calls_back_into_python_is_refused():
    x = jax.ShapeDtypeStruct((2,), jnp.float32)
    target = "xla_ffi_python_cpu_callback"
    call = jax.jit(lambda x: jax.ffi.ffi_call(target, x)(x, index=np.uint64(0)))
    program = export.export(call, disabled_checks=[export.DisabledSafetyCheck.custom_call(target)])(x).serialize()
    with pytest.raises(DamagedArtifactError, match=f"calls '{target}', which runs code outside it"):
        load_stablehlo(bytes(program))
    plain = export.export(jax.jit(jnp.sin))(x)
    torn = dataclasses.replace(plain, mlir_module_serialized=plain.mlir_module_serialized[:40]).serialize()
    with pytest.raises(DamagedArtifactError, match="cannot be read"):
        load_stablehlo(bytes(torn))
    assert stablehlo.HOST.search("lapack_sgetrf_ffi") is None


# Plug-ins


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (tiny(), "data.source = 'tests.samples.tiny:blobs'"),
        (tiny(model={"kind": f"{NAMED}:Net"}), f"model.kind = '{NAMED}:Net'"),
        (tiny(objective=f"{NAMED}:loss"), f"objective = '{NAMED}:loss'"),
    ],
    ids=["data", "model", "objective"],
)
def test_code_of_others_is_refused_before_it_is_imported(raw, told, monkeypatch):
    monkeypatch.delenv("PRUNE_JAX_NO_PLUGINS", raising=False)
    imported = set(sys.modules)
    with without_plugins(), pytest.raises(UserMistake) as caught:
        prepare(read_recipe(raw))
    assert f"tiny: {told}: " in str(caught.value)
    assert "is code beside prune_jax's own, and such is switched off" in str(caught.value)
    assert NAMED not in set(sys.modules) - imported
    assert "PRUNE_JAX_NO_PLUGINS" not in os.environ


@pytest.mark.parametrize("field", ["criterion", "sparsify"])
def test_so_are_criteria_and_methods(field, monkeypatch):
    stages = {
        "criterion": {"train": TRAIN, "p": {"kind": "prune", "criterion": f"{NAMED}:f", "target": {"sparsity": 0.5}}},
        "sparsify": {"train": {**TRAIN, "sparsify": {"kind": f"{NAMED}:f"}}},
    }[field]
    monkeypatch.setenv("PRUNE_JAX_NO_PLUGINS", "1")
    raw = {**tiny(**stages), "data": {"source": "xor"}, "objective": "regression"}
    with pytest.raises(UserMistake, match=f"{NAMED}:f' is code beside"):
        prepare(read_recipe(raw))


ENTRY = f"[prune_jax.criteria]\nplanted = {NAMED}:f\n[prune_jax.models]\nplanted = {NAMED}:f\n"


def test_the_command_refuses_plug_ins_with_exit_code_2(tmp_path):
    told = tmp_path / "planted-1.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n")
    (told / "entry_points.txt").write_text(ENTRY)
    for name in (NAMED, "yaml", "optax"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    raw = {"name": "r", "data": {"source": "xor"}, "objective": "regression", "model": {"kind": "mlp"}} | {
        "stages": {"train": TRAIN, "prune": {"kind": "prune", "criterion": "planted", "target": {"sparsity": 0.5}}}
    }
    (tmp_path / "r.yaml").write_text(json.dumps(raw))
    code = "import sys; sys.path.append(sys.argv.pop(1)); from prune_jax.cli import main; main()"
    command = [sys.executable, "-P", "-c", code, str(tmp_path), "run", "r.yaml", "--no-plugins"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2, ended.stderr
    assert "r: stages.prune.criterion.name = 'planted': 'planted' is code beside prune_jax's own" in ended.stderr
    assert not (tmp_path / "mark").exists()
    assert not (tmp_path / "artifacts").exists()


# Names and paths

ODD = [
    "..",
    "../x",
    "/etc",
    "a/b",
    "a\\b",
    "",
    ".x",
    "x.",
    "a\0b",
    "a\u202eb",
    "é",
    "．．",
    "e\u0301",
    "x" * 101,
    "NUL",
    "con.txt",
]


@pytest.mark.parametrize("name", ODD, ids=range(len(ODD)))
def test_odd_names_are_refused(name, store):
    with pytest.raises(UserMistake, match=r"a run's name has letters|Windows keeps this name"):
        check_run_name(name)
    with pytest.raises(UserMistake, match="no run"):
        store.record(name)
    with pytest.raises(PruneError):
        store.record_path(name)
    if name not in {"NUL", "con.txt", "x.", "x" * 101}:  # harmless where a run's name is not
        with pytest.raises(DamagedArtifactError, match="is no name of the store"):
            store.path(Ref("train", name))


@pytest.mark.parametrize("root", ["a\0b", "x" * 5000, "foo://x"], ids=["nul", "long", "url"])
def test_a_store_that_cannot_be_a_folder_is_refused(root):
    with pytest.raises(UserMistake, match="cannot be a folder"):
        Store(root)


@pytest.fixture
def outside(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("mine")
    return tmp_path / "outside"


def test_links_out_of_the_store_are_not_followed(store, outside):
    store.write(REF, {"w": np.ones(3)}, {"metrics": {}})
    folder = Path(store.path(REF))
    (folder / "link").symlink_to(outside / "file")
    assert store.damage(REF) == f"{folder / 'link'} is a symbolic link"
    (folder / "link").unlink()
    assert store.damage(REF) is None

    (folder.parent / f".{REF.key}.lock").symlink_to(outside / "made")
    with pytest.raises(OSError, match="symbolic link"), store.lock(REF):
        pass
    folder.rename(outside / "moved")
    folder.symlink_to(outside / "moved")
    for use in (store.read, store.path, store.meta, store.set_aside):
        with pytest.raises(DamagedArtifactError, match="is a symbolic link, and a store follows none"):
            use(REF)
    Path(store.root, "mask").symlink_to(outside)
    with pytest.raises(DamagedArtifactError, match="is a symbolic link"):
        store.write(Ref("mask", REF.key), {"w": np.ones(3)}, {})
    assert sorted(f.name for f in outside.iterdir()) == ["file", "moved"]


def test_records_are_not_read_or_written_through_links(store, outside):
    name = "run"
    store.write_record({"name": name})
    folder = Path(store.record_path(name)).parent
    (folder / "history").symlink_to(outside)
    with pytest.raises(DamagedArtifactError, match="is a symbolic link"):
        store.write_record(store.record(name))
    folder.rename(outside / name)
    folder.symlink_to(outside / name)
    assert store.runs() == []
    with pytest.raises(DamagedArtifactError, match="is a symbolic link"):
        store.record(name)


def test_files_of_an_artifact_that_lie_elsewhere_are_damage(store, outside):
    store.write(REF, {"w": np.ones(3)}, {"metrics": {}}, {"f": b"x"})
    rewritten(Path(store.path(REF)), "../../../outside/file", b"mine")
    assert store.damage(REF) == f"'../../../outside/file' in {META} leads out of it, or is no file's name"


# What the repository itself says

TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
SECRETS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{30,}|\bglpat-[\w-]{20}|"
    r"\bxox[abpr]-[\w-]{10}|\bsk-[A-Za-z0-9]{32,}|\bpypi-[\w-]{40,}|\bhf_[A-Za-z0-9]{30,}|\bpnu_[A-Za-z0-9]{30,}|"
    r"\bAIza[\w-]{35}|://[^/\s:@{}]+:[^/\s:@{}]+@"
)


@pytest.mark.skipif(not TRACKED, reason="not a checkout")
def test_no_tracked_file_holds_a_secret_and_no_server_listens_to_the_world():
    texts = {f: (ROOT / f).read_text("utf-8", "replace") for f in TRACKED if (ROOT / f).is_file()}
    assert [f for f, text in texts.items() if SECRETS.search(text)] == []
    assert SECRETS.search("AKIA" + "A" * 16)
    assert SECRETS.search("https://me:word" + "@host")
    listening = re.compile(r"0\.0\.0\.0|--host[\s=\"',]+(::|\*|[a-z]+\.)|\bINADDR_ANY\b|create_server\(\(\"\"")
    inside = {"deployments/compose.yaml"}  # listens within its containers' network, and publishes on loopback
    told = {f for f, text in texts.items() if listening.search(text)} - {"tests/faults/test_trust.py"}
    assert told <= inside
    for f in inside & set(texts):
        assert all(port.startswith('["${BIND:-127.0.0.1}:') for port in re.findall(r"ports: (.*)", texts[f]))
