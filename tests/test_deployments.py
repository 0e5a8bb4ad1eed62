"""`deployments/`: what Prefect, Docker and Kubernetes are told is what they take; and all of it at work on loopback."""

from __future__ import annotations

import asyncio
import json
import re
import tomllib
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import pytest
import yaml
from jsonschema import Draft202012Validator
from prefect.cli.deploy._models import PrefectYamlModel
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, FlowRun
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.client.schemas.sorting import FlowRunSort
from prefect.flows import load_flow_from_entrypoint
from prefect.settings import Settings
from prefect.settings.legacy import _get_settings_fields
from prefect.utilities.schema_tools.validation import validate
from prefect.utilities.templating import apply_values, find_placeholders
from prefect.workers.process import ProcessJobConfiguration
from prune_jax.flows.prune import prune

from prune_jax.recipe import built_in, read_recipe
from prune_jax.recipe.model import BUILT_IN_MODELS
from tests.faults.runs import recipe, records, until
from tests.faults.workers import served

ROOT = Path(__file__).parents[1]
DEPLOYMENTS = ROOT / "deployments"
POOLS = sorted(path.stem for path in (DEPLOYMENTS / "pools").iterdir())
FORM = prune.parameters.model_dump_for_openapi()


@pytest.fixture(scope="module")
def deployments():
    written = yaml.safe_load((DEPLOYMENTS / "prefect.yaml").read_text())
    PrefectYamlModel.model_validate(written)
    return {each["name"]: each for each in written["deployments"]}


def test_each_deployment_has_what_it_needs(deployments):
    flows = {"prune": "prune", "sweep": "prune", "lifecycle": "lifecycle"}
    assert list(deployments) == list(flows)
    for name, each in deployments.items():
        assert load_flow_from_entrypoint(each["entrypoint"]).name == flows[name]
        assert ConcurrencyLimitStrategy(each["concurrency_limit"]["collision_strategy"])
        assert each["tags"]
        ways = [CronSchedule(cron=s["cron"]) for s in each["schedules"] if "cron" in s]
        ways += [
            IntervalSchedule(interval=timedelta(seconds=s["interval"])) for s in each["schedules"] if "interval" in s
        ]
        assert len(ways) == len(each["schedules"]) == len({s["slug"] for s in each["schedules"]}) == 2
        assert {type(way) for way in ways} == {CronSchedule, IntervalSchedule}
        assert not any(s["active"] for s in each["schedules"])  # nobody's machine begins to work by itself


def test_all_parameters_are_taken_by_the_server_and_by_the_flow(deployments):
    for each in deployments.values():
        flow = load_flow_from_entrypoint(each["entrypoint"])
        form = flow.parameters.model_dump_for_openapi()
        for parameters in (given["parameters"] for given in (each, *each["schedules"])):
            assert validate(parameters, form) == []
            assert flow.validate_parameters(parameters)["recipe"].stages
            read_recipe(parameters["recipe"], changes=parameters.get("changes", ()))


@pytest.mark.parametrize("written", ["lenet-5", "/recipes/my.yaml", *(yaml.safe_load(t) for t in built_in().values())])
def test_the_server_takes_recipes_as_users_write_them(written):
    assert validate({"recipe": written}, FORM) == []


def test_short_forms_are_taken_and_mistakes_are_not():
    raw = yaml.safe_load(built_in()["lenet-300-100"])
    raw["stages"]["prune"] |= {"criterion": "my_pkg:mine", "spare": "first"}
    assert validate({"recipe": raw}, FORM) == []
    raw["stages"]["prune"] |= {"criterion": {"name": "taylor", "batches": 3}, "spare": ["first", "last"]}
    assert validate({"recipe": raw}, FORM) == []
    for wrong in ({"criterion": 3}, {"spare": "middle"}, {"target": {"sparcity": 0.5}}):
        stages = {**raw["stages"], "prune": {**raw["stages"]["prune"], **wrong}}
        assert validate({"recipe": {**raw, "stages": stages}}, FORM)


@pytest.mark.parametrize("required", [True, False])  # without: as the server looks at a deployment's own parameters
@pytest.mark.parametrize("kind", [*BUILT_IN_MODELS, "my_pkg:net"])
def test_a_model_fits_one_kind_of_the_form_and_another_kinds_settings_do_not(kind, required):
    raw = yaml.safe_load(built_in()["lenet-300-100"])
    assert validate({"recipe": {**raw, "model": {"kind": kind}}}, FORM, ignore_required=not required) == []
    wrong = {"kind": kind, "args" if kind in BUILT_IN_MODELS else "widths": {}}
    assert validate({"recipe": {**raw, "model": wrong}}, FORM, ignore_required=not required)


def template(name):
    return json.loads((DEPLOYMENTS / "pools" / f"{name}.json").read_text())


def test_there_is_a_pool_for_each_way_and_accelerator():
    assert {tuple(name.split("-")) for name in POOLS} == {
        (way, accelerator) for way in ("process", "docker", "kubernetes") for accelerator in ("cpu", "gpu", "tpu")
    }


@pytest.mark.parametrize("name", POOLS)
def test_a_pools_variables_are_those_that_its_template_uses(name):
    found = template(name)
    variables = found["variables"]
    Draft202012Validator.check_schema(variables)
    used = {p.name for p in find_placeholders(found["job_configuration"])}
    assert used == set(variables["properties"])
    Draft202012Validator(variables).validate(
        {n: v["default"] for n, v in variables["properties"].items() if "default" in v}
    )
    env = variables["properties"]["env"]["default"]
    accelerator = name.split("-")[1]
    assert env["JAX_PLATFORMS"] == {"cpu": "cpu", "gpu": "cuda,cpu", "tpu": "tpu,cpu"}[accelerator]
    assert ("XLA_CLIENT_MEM_FRACTION" in env) == (accelerator == "gpu")
    assert ("PRUNE_JAX_STORE" in env) == (not name.startswith("process"))


def rendered(name, model, **values):
    """The configuration of a run, as the worker makes it; its client asks for blocks, and there are none to ask for."""

    async def make():
        async with PrefectClient("http://127.0.0.1:9/api") as client:
            return await model.from_template_and_values(template(name), values, client=client)

    made = asyncio.run(make())
    made.prepare_for_flow_run(FlowRun(id=uuid4(), name="lenet · seed 0", flow_id=uuid4()))
    return made


def test_a_process_has_the_deployments_environment_over_that_of_the_pool_over_that_of_the_worker(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # a worker's own device
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    given = {"env": {"XLA_CLIENT_MEM_FRACTION": "0.45"}, "working_dir": "/work"}
    found = rendered("process-gpu", ProcessJobConfiguration, **given)
    wanted = {"CUDA_VISIBLE_DEVICES": "3", "JAX_PLATFORMS": "cuda,cpu", "XLA_CLIENT_MEM_FRACTION": "0.45"}
    assert wanted.items() <= found.env.items()
    assert str(found.working_dir) == "/work"


@pytest.mark.parametrize("name", [name for name in POOLS if name.startswith("kubernetes")])
def test_a_job_asks_for_its_devices_and_mounts_the_store(name):
    found = template(name)
    values = {n: v["default"] for n, v in found["variables"]["properties"].items() if "default" in v}
    job = apply_values(found["job_configuration"]["job_manifest"], values)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (job["apiVersion"], job["kind"], pod["restartPolicy"]) == ("batch/v1", "Job", "Never")
    device = {"gpu": "nvidia.com/gpu", "tpu": "google.com/tpu"}.get(name.split("-")[1])
    for asked in container["resources"].values():
        assert {n: v for n, v in asked.items() if n not in {"cpu", "memory"}} == ({device: 1} if device else {})
    assert bool(pod["nodeSelector"]) == bool(pod["tolerations"]) == bool(device)
    claim = yaml.safe_load((DEPLOYMENTS / "store.yaml").read_text())
    (volume,), (mount,) = pod["volumes"], container["volumeMounts"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert (volume["name"], values["env"]["PRUNE_JAX_STORE"]) == (mount["name"], mount["mountPath"])


def misfits(found, kind, client, path="job"):
    """Fields that a kind of Kubernetes' does not have or whose values are of another type."""
    if match := re.fullmatch(r"(list|dict)[\[(](?:str, ?)?(\w+)[\])]", kind):
        inner = found if match[1] == "list" else list(found.values())
        assert isinstance(found, list if match[1] == "list" else dict), path
        return [m for i, each in enumerate(inner) for m in misfits(each, match[2], client, f"{path}[{i}]")]
    if not hasattr(client, kind):
        types = {"str": (str,), "int": (int,), "bool": (bool,), "object": (object,)}[kind]
        return [] if isinstance(found, types) or "resources" in path else [f"{path} = {found!r} is no {kind}"]
    model = getattr(client, kind)
    names = {key: attribute for attribute, key in model.attribute_map.items()}
    wrong = [f"{path}.{key}: {kind} has no such field" for key in found if key not in names]
    known = {key: value for key, value in found.items() if key in names}
    return wrong + [
        m
        for key, value in known.items()
        for m in misfits(value, model.openapi_types[names[key]], client, f"{path}.{key}")
    ]


@pytest.mark.parametrize("name", [name for name in POOLS if name.startswith("kubernetes")])
def test_kubernetes_knows_every_field_of_a_job(name):
    worker = pytest.importorskip("prefect_kubernetes.worker")
    client = pytest.importorskip("kubernetes_asyncio.client")
    job = rendered(name, worker.KubernetesWorkerJobConfiguration, env={"A": "b"}).job_manifest
    assert misfits(job, "V1Job", client) == []
    (container,) = job["spec"]["template"]["spec"]["containers"]
    env = {each["name"]: each["value"] for each in container["env"]}
    assert {"A": "b", "PRUNE_JAX_STORE": "/artifacts", "PREFECT_HOME": "/home/prune/.prefect"}.items() <= env.items()
    job["spec"]["template"]["spec"]["parallelism"] = 1  # where Prefect's own template has it
    assert misfits(job, "V1Job", client) == ["job.spec.template.spec.parallelism: V1PodSpec has no such field"]


@pytest.mark.parametrize("name", [name for name in POOLS if name.startswith("docker")])
def test_docker_takes_what_a_container_is_made_with(name):
    worker = pytest.importorskip("prefect_docker.worker")
    docker = pytest.importorskip("docker")
    found = rendered(name, worker.DockerWorkerJobConfiguration, mem_limit="16g", nano_cpus=4_000_000_000)
    made = docker.types.HostConfig(
        version="1.45",
        mem_limit=found.mem_limit,
        privileged=found.privileged,
        network_mode=found.network_mode or "default",
        binds=found.volumes,
        **found.container_create_kwargs,
    )
    assert (made["Memory"], made["NanoCpus"]) == (16 * 2**30, 4_000_000_000)
    assert made["Binds"] == ["prune-jax-store:/artifacts"]
    devices = [(r["DeviceIDs"], r["Capabilities"]) for r in made.get("DeviceRequests") or ()]
    assert devices == ([(["0"], [["gpu"]])] if name == "docker-gpu" else [])


def test_the_image_holds_all_packages_and_nothing_that_is_not_there():
    lines = (DEPLOYMENTS / "Dockerfile").read_text().splitlines()
    copied = {source for line in lines if line.startswith("COPY") for source in line.split()[1:-1]}
    assert all((ROOT / source).exists() for source in copied)
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package in setup["packages"]:
        assert setup["package-dir"].get(package, package.partition(".")[0]) in copied, package
    allowed = (DEPLOYMENTS / "Dockerfile.dockerignore").read_text().splitlines()
    assert {f"!{source.partition('/')[0]}" for source in copied} <= set(allowed)


def test_the_services_are_seen_from_this_machine_alone_and_wait_for_each_other():
    services = yaml.safe_load((DEPLOYMENTS / "compose.yaml").read_text())["services"]
    assert list(services) == ["database", "server", "deploy", "worker"]
    assert {n: s["ports"] for n, s in services.items() if "ports" in s} == {"server": ["${BIND:-127.0.0.1}:4200:4200"]}
    assert "POSTGRES_PASSWORD:?" in services["database"]["environment"]["POSTGRES_PASSWORD"]
    assert {n: list(s.get("depends_on", ())) for n, s in services.items()} == {
        "database": [],
        "server": ["database"],
        "deploy": ["server"],
        "worker": ["deploy"],
    }


def test_prefect_knows_every_setting_that_is_set():
    known = {name.upper() for name in _get_settings_fields(Settings)}
    text = "".join(p.read_text() for p in DEPLOYMENTS.rglob("*") if p.is_file())
    named = set(re.findall(r"PREFECT_[A-Z_]+", text))
    assert named >= {"PREFECT_API_DATABASE_CONNECTION_URL", "PREFECT_HOME", "PREFECT_UI_API_URL"}
    assert named <= known


@pytest.mark.slow
def test_server_pool_worker_deployments_triggers_and_schedules_on_loopback(tmp_path):
    """All of `prefect.yaml` as it stands: a run asked for, one that a schedule begins, one too many of a sweep."""
    ends = ("Completed", "Failed", "Crashed", "Cancelled")
    (tmp_path / "written.yaml").write_text(json.dumps(recipe()))
    with served(tmp_path) as it:
        whole = it.client.read_deployment_by_name("prune/prune")
        assert (whole.tags, whole.global_concurrency_limit.limit) == (["prune-jax", "prune"], 4)
        assert [schedule.active for schedule in whole.schedules] == [False, False]
        assert it.wait(it.begin(tmp_path / "store"), *ends) == "Completed"

        given = {"recipe": "written.yaml", "store": "store", "name": "timed"}  # below the folder deployed from
        every = {"schedule": {"interval": 10}, "active": True, "slug": "soon", "parameters": given}
        of = {"path_params": {"id": it.deployment}}
        (made,) = it.client.request("POST", "/deployments/{id}/schedules", **of, json=[every]).json()
        by_clock = FlowRunFilter(tags={"all_": ["auto-scheduled"]})
        sort = FlowRunSort.EXPECTED_START_TIME_ASC
        (run,) = until(lambda: it.client.read_flow_runs(flow_run_filter=by_clock, sort=sort, limit=1), "a run is due")
        assert it.wait(run.id, *ends) == "Completed"
        it.client.delete_deployment_schedule(it.deployment, made["id"])
        assert it.client.read_flow_run(run.id).state.message.endswith("stages cached")
        assert {r["status"] for r in records(tmp_path / "store", "timed")} == {"completed"}

        sweep = it.client.read_deployment_by_name("prune/sweep").id
        slow = {"recipe": recipe(seconds=0.5), "store": "sweeps"}
        first = it.client.create_flow_run_from_deployment(sweep, parameters=slow).id
        it.wait(first, "Running", *ends)
        second = it.client.create_flow_run_from_deployment(sweep, parameters={**slow, "name": "second"}).id
        assert it.wait(second, *ends) == "Cancelled"
        assert it.state(first) == "Running"
