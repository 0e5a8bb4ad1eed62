"""The command `prune-jax`: thin over the package, whose rooms are imported inside the command that needs them."""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from prune_jax.errors import GateError, PruneError, UserMistake

app = typer.Typer(
    name="prune-jax",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Makes a JAX network as small and fast as it can be without losing what it knows.\n\n"
    "[bold]prune-jax run lenet-300-100[/]  trains, prunes and evaluates a network on MNIST digits.",
)

RecipeArgument = Annotated[
    str, typer.Argument(help="A YAML file or the name of a built-in recipe.", show_default=False)
]
StoreOption = Annotated[str, typer.Option(help="Folder or URL of artifacts and run records.", envvar="PRUNE_JAX_STORE")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PATH=VALUE", help="Sets a field of the recipe; repeat it for several.", show_default=False
    ),
]
RunArgument = Annotated[str, typer.Argument(help="Name of a run, as `prune-jax runs` lists it.", show_default=False)]
AsOption = Annotated[str, typer.Option("--as", metavar="NAME", help="Name of the champion.", show_default=False)]
LimitOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FIELD=VALUE",
        help="What it must keep to beside the champion: max_drop, at_least, bytes, bytes.times, macs, params, "
        "latency_ms, robustness, ...; repeat it for several.",
        show_default=False,
    ),
]
WhyOption = Annotated[str, typer.Option(help="Kept in the history.", show_default=False)]
ByOption = Annotated[str | None, typer.Option(help="Who decides; left out, you.", show_default=False)]
RunnerOption = Annotated[
    str, typer.Option(help="threads: independent branches side by side; local: one stage at a time.")
]
PluginsOption = Annotated[
    bool,
    typer.Option(
        "--no-plugins",
        envvar="PRUNE_JAX_NO_PLUGINS",
        help="Refuses module:object and what other packages register, before any of it is imported.",
    ),
]
LogOption = Annotated[
    str,
    typer.Option(
        metavar="SINK=PLACE",
        envvar="PRUNE_JAX_LOG",
        help="Metrics go there, too: tensorboard=DIR, mlflow=URI; several with commas.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON on stdout; everything else goes to stderr.")]


@app.command(
    epilog="Examples:\n\n"
    "  prune-jax run lenet-300-100\n\n"
    "  prune-jax run lenet-300-100 --set stages.prune.criterion=magnitude --name by-magnitude\n\n"
    "  prune-jax run my.yaml --store s3://bucket/artifacts --json > run.json\n\n"
    "  prune-jax run my.yaml --store /shared/artifacts --hosts 10.0.0.1:8476 --of-hosts 2 --host 0  "
    "(and --host 1 on the other)"
)
def run(
    recipe: RecipeArgument,
    set_: SetOption = None,
    store: StoreOption = "artifacts",
    name: Annotated[
        str | None, typer.Option(help="Name of the run; left out, the recipe's.", show_default=False)
    ] = None,
    runner: Annotated[
        str,
        typer.Option(
            help="threads: independent branches side by side; local: one stage at a time; dask=tcp://HOST:PORT, "
            "ray=ray://HOST:10001: on a cluster's workers; dask=local:N, ray=local:N: in N processes of this machine."
        ),
    ] = "threads",
    log: LogOption = "",
    no_plugins: PluginsOption = False,
    hosts: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Trains over several hosts: the same command on each, with a port of host 0 that all reach; or auto, "
            "under SLURM, Kubernetes, Open MPI and on TPUs.",
            show_default=False,
        ),
    ] = None,
    of_hosts: Annotated[int | None, typer.Option(help="How many hosts.", show_default=False)] = None,
    host: Annotated[int | None, typer.Option(help="Which one this is, from 0.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """Runs a recipe through Prefect; what is already in the store is not computed again."""
    _quiet()
    if hosts:
        _own_stdout()
    _find_code(no_plugins)
    _log_to(log)
    from rich.console import Console

    from prune_jax.console import Board
    from prune_jax.launch import run as launch
    from prune_jax.progress import Listeners, listeners
    from prune_jax.report.tables import results_rich

    console = Console(stderr=as_json)
    with Board(console) as board:
        board.waiting("checking the recipe, starting Prefect")
        listeners.set(Listeners(board.hear, board.finished))
        signal.signal(signal.SIGINT, lambda *_: board.interrupt())
        among = {"hosts": hosts, "of_hosts": of_hosts, "host": host}
        wanted = {"changes": set_ or (), "runner": runner, "no_plugins": no_plugins, **among}
        record = launch(recipe, store=store, name=name, **wanted)  # type: ignore[arg-type]
    if record["results"]:
        console.print(results_rich(record))
    _close(console, record, store)
    if as_json:
        sys.stdout.write(json.dumps(record, indent=1) + "\n")
    if record["status"] == "failed":
        raise typer.Exit(130 if board.interrupted else 2 if record["user_mistake"] else 3 if record["rejected"] else 1)


def _close(console: Any, record: dict[str, Any], store: str) -> None:
    path = os.path.join(store, "runs", record["name"], "run.json")
    if record["status"] == "failed":
        console.print(f"[red]{'rejected' if record['rejected'] else 'failed'}[/]: {_escaped(record['message'])}")
        done = sum(stage["status"] in {"ran", "cached"} for stage in record["stages"].values())
        mend = (
            "loosen its limits or ask for less" if record["rejected"] else "mend it and give the same command to go on"
        )
        console.print(
            f"{done} of {len(record['stages'])} stages are done and kept: {mend}.",
            highlight=False,
        )
    else:
        console.print(f"[bold]{_escaped(record['message'])}[/] in {record['seconds']:.1f} s", highlight=False)
    console.print(f"[dim]record: {path}[/]", highlight=False, soft_wrap=True)
    console.print(
        f"[dim]report: prune-jax report {record['name']}{_store_option(store)}[/]", highlight=False, soft_wrap=True
    )


def _log_to(written: str) -> None:
    from prune_jax.sinks import targets

    targets(written)
    os.environ["PRUNE_JAX_LOG"] = written  # the flow reads it, here and in workers


def _store_option(store: str) -> str:
    return "" if store == "artifacts" else f" --store {store}"


@app.command(epilog="Example:\n\n  prune-jax plan lenet-300-100 --set stages.prune.target.sparsity=0.95")
def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    store: StoreOption = "artifacts",
    no_plugins: PluginsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Shows what a run would do: each stage, its key, whether it is cached, and why it must run again."""
    from rich.console import Console

    from prune_jax.checkpoints import Store
    from prune_jax.forecast import forecast, forecast_table
    from prune_jax.preparation import prepare
    from prune_jax.recipe import read_recipe
    from prune_jax.registry import without_plugins

    _find_code(no_plugins)
    with without_plugins(no_plugins):
        wanted = read_recipe(recipe, changes=set_ or ())
        rows = forecast(prepare(wanted), Store(store))
    if as_json:
        sys.stdout.write(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
    else:
        Console().print(forecast_table(wanted.name, rows))


@app.command(
    epilog="Examples:\n\n  prune-jax recipes lenet-300-100 > my.yaml\n\n  prune-jax recipes --schema > schema.json"
)
def recipes(
    name: Annotated[str | None, typer.Argument(help="Prints this recipe's YAML.", show_default=False)] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Prints the JSON schema of recipes.")] = False,
) -> None:
    """Lists the built-in recipes, prints one, or prints the JSON schema of all."""
    from prune_jax.errors import did_you_mean
    from prune_jax.recipe import built_in

    texts = built_in()
    if schema:
        from prune_jax.schema import recipe_schema

        sys.stdout.write(json.dumps(recipe_schema(), indent=2) + "\n")
    elif name is None:
        _list_recipes(texts)
    elif name in texts:
        sys.stdout.write(texts[name])
    else:
        raise UserMistake(f"{name}: no built-in recipe{did_you_mean(name, texts)} (built in: {', '.join(texts)})")


def _list_recipes(texts: dict[str, str]) -> None:
    import yaml
    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", "what it does", "stages", box=None, pad_edge=False)
    for name, text in texts.items():
        raw = yaml.safe_load(text)
        table.add_row(f"[bold]{name}[/]", raw.get("description", ""), ", ".join(raw["stages"]))
    Console().print(table)


@app.command(epilog="Examples:\n\n  prune-jax methods\n\n  prune-jax methods taylor")
def methods(
    name: Annotated[str | None, typer.Argument(help="Explains this one.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """Lists criteria, granularities, scopes, targets, schedules and training methods, or explains one by its name."""
    from rich.console import Console

    from prune_jax.catalogue import entries, methods_tables
    from prune_jax.manual import as_json as plain
    from prune_jax.manual import look_up, page

    found = look_up(name) if name else list(entries())
    console = Console()
    if as_json:
        sys.stdout.write(json.dumps([plain(entry) for entry in found], indent=1) + "\n")
    elif name is None:
        for table in methods_tables():
            console.print(table, "")
    else:
        for i, entry in enumerate(found):
            console.print(*["\n"] * bool(i), *page(entry), sep="\n", highlight=False)


@app.command()
def runs(store: StoreOption = "artifacts", as_json: JsonOption = False) -> None:
    """Lists the runs of a store, the latest last."""
    from rich.console import Console
    from rich.table import Table

    from prune_jax.checkpoints import Store
    from prune_jax.report import reading

    artifacts = Store(store)
    records = [artifacts.record(name) for name in artifacts.runs()]
    if as_json:
        sys.stdout.write(json.dumps(records, indent=1) + "\n")
        return
    table = Table("run", "started", "status", "seconds", "outcome", box=None, pad_edge=False)
    for record in records:
        with reading(f"run {record['name']!r}"):
            words = [_escaped(record[word]) for word in ("name", "started", "status", "message")]
            table.add_row(*words[:3], f"{record['seconds']:.1f}", words[3])
    Console().print(table if records else f"no runs in {store}")


@app.command()
def show(name: RunArgument, store: StoreOption = "artifacts", as_json: JsonOption = False) -> None:
    """Shows one run: its stages and its results."""
    from rich.console import Console

    from prune_jax.checkpoints import Store
    from prune_jax.console import stages_table
    from prune_jax.report import reading
    from prune_jax.report.tables import results_rich

    record = Store(store).record(name)
    if as_json:
        sys.stdout.write(json.dumps(record, indent=1) + "\n")
        return
    console = Console()
    with reading(f"run {name!r}"):
        console.print(stages_table(record))
        if record["results"]:
            console.print(results_rich(record))
        console.print(f"{_escaped(record['message'])}", highlight=False)


@app.command(epilog="Example:\n\n  prune-jax predict lenet-5-compact digits.npz -o answers.npz")
def predict(
    name: RunArgument,
    inputs: Annotated[str, typer.Argument(metavar="INPUT.npz", help="Holds x, and lengths if needed.")],
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="OUT.npz", help="Where the answers go; left out, stdout.")
    ] = None,
    store: StoreOption = "artifacts",
) -> None:
    """Runs a run's exported network on arrays, with no code of the model loaded."""
    import numpy as np

    from prune_jax.checkpoints import Store
    from prune_jax.prediction import predict as answer
    from prune_jax.prediction import read_inputs

    found = answer(Store(store), name, read_inputs(inputs))
    if output is None:
        np.savetxt(sys.stdout, found.reshape(len(found), -1), fmt="%.6g")
        return
    try:
        with open(output, "wb") as file:
            np.savez(file, outputs=found)
    except OSError as error:
        raise UserMistake(
            f"--output {output}: cannot be written ({error.strerror}); name a file in a folder that is there"
        ) from None
    sys.stdout.write(f"{output}: outputs {list(found.shape)}\n")


@app.command(
    epilog="Examples:\n\n"
    "  prune-jax promote lenet-5-compact --as digits\n\n"
    "  prune-jax promote lenet-5-compact --as digits --limit max_drop=0.01 --limit bytes.times=1\n\n"
    "  prune-jax predict champions/digits digits.npz"
)
def promote(
    name: RunArgument,
    as_: AsOption,
    network: Annotated[
        str | None, typer.Option(help="The stage whose network it is, if the run exported several.", show_default=False)
    ] = None,
    limit: LimitOption = None,
    why: WhyOption = "",
    by: ByOption = None,
    store: StoreOption = "artifacts",
    as_json: JsonOption = False,
) -> None:
    """Makes a run's exported network the champion of a name; exit code 3 if it does not keep to the limits."""
    from prune_jax.checkpoints import Store
    from prune_jax.promotion import candidate, champion, reject
    from prune_jax.promotion import promote as make_champion

    artifacts = Store(store)
    before, found, rows = champion(artifacts, as_), candidate(artifacts, name, network), []
    if limit:
        from prune_jax.contest import contest, contest_table
        from prune_jax.gates import reason
        from prune_jax.gates import rows as as_rows
        from prune_jax.recipe import read_limits

        _find_code(no_plugins=False)
        judged = contest(artifacts, found, before.champion, read_limits({}, limit))
        rows = as_rows(judged)
        _console(as_json).print(contest_table(rows))
        if no := reason(judged):
            reject(artifacts, found, as_, checks=rows, why=no, by=by or "")
            raise GateError(f"run {name!r} is not promoted to {as_!r}: {no}", {})
    made = make_champion(artifacts, name, as_, network=network, expected=before.generation, checks=rows, by=by, why=why)
    _tell_champion(made, as_json)


@app.command(
    epilog="Examples:\n\n"
    "  prune-jax lifecycle my.yaml --as digits\n\n"
    "  prune-jax lifecycle my.yaml --as digits --max-drop 0.005 --limit bytes=100000 --limit latency_ms.times=1.1\n\n"
    "  PREFECT_API_URL=http://127.0.0.1:4200/api prune-jax lifecycle my.yaml --as digits --approval-seconds 86400"
)
def lifecycle(
    recipe: RecipeArgument,
    as_: AsOption,
    max_drop: Annotated[float, typer.Option(help="Largest loss of the metric beside the champion, absolute.")] = 0.01,
    limit: LimitOption = None,
    approval_seconds: Annotated[
        int | None,
        typer.Option(min=1, help="Wait so long for a person, who answers in Prefect's UI.", show_default=False),
    ] = None,
    network: Annotated[
        str | None, typer.Option(help="The stage whose network it is, if several are exported.", show_default=False)
    ] = None,
    set_: SetOption = None,
    store: StoreOption = "artifacts",
    runner: RunnerOption = "threads",
    no_plugins: PluginsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Runs a recipe on today's data and promotes its network, or turns it away: exit code 3."""
    _quiet()
    _find_code(no_plugins)
    from prune_jax.console import Board
    from prune_jax.contest import contest_table
    from prune_jax.launch import lifecycle as launch
    from prune_jax.progress import Listeners, listeners
    from prune_jax.recipe import read_limits

    limits, console = read_limits({"max_drop": max_drop}, limit or ()), _console(as_json)
    with Board(console) as board:
        board.waiting("checking the recipe, starting Prefect")
        listeners.set(Listeners(board.hear, board.finished))
        signal.signal(signal.SIGINT, lambda *_: board.interrupt())
        asked = {"limits": limits, "approval_seconds": approval_seconds, "network": network, "changes": set_ or ()}
        found = launch(recipe, as_, store=store, runner=runner, no_plugins=no_plugins, **asked)  # type: ignore[arg-type]
    if found["checks"]:
        console.print(contest_table(found["checks"]))
    console.print(f"[bold]{as_}[/] {found['outcome']}: {_escaped(found['message'])}", highlight=False, soft_wrap=True)
    if as_json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    if found["outcome"] == "failed":
        raise typer.Exit(130 if board.interrupted else 2 if found["run"]["user_mistake"] else 1)
    raise typer.Exit(3 if found["outcome"] == "rejected" else 0)


@app.command(
    epilog="Examples:\n\n"
    "  prune-jax search lenet-5-compact --over stages.prune.target.sparsity=0.5:0.98 --max-drop 0.01\n\n"
    "  prune-jax search my.yaml --over stages.prune.target.sparsity=0.5:0.98 --over stages.prune.schedule.rounds=1:5 "
    "--fidelity stages.finetune.epochs=1,3,9 --trials 30"
)
def search(
    recipe: RecipeArgument,
    over: Annotated[
        list[str],
        typer.Option(
            metavar="PATH=LOW:HIGH",
            help="A setting to search, from larger networks to smaller ones; or PATH=[a, b, c]; repeat it for several.",
            show_default=False,
        ),
    ],
    max_drop: Annotated[
        float, typer.Option(help="Largest loss of the metric on the validation split, absolute.")
    ] = 0.01,
    of: Annotated[
        str | None, typer.Option(help="The stage whose network is searched, if several could be.", show_default=False)
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="A metric of the objective, or loss; left out, its own.", show_default=False)
    ] = None,
    smallest: Annotated[str, typer.Option(help="params, macs, bytes; nonzero for masked networks.")] = "params",
    rungs: Annotated[int, typer.Option(help="Values of a range, both ends included.")] = 9,
    trials: Annotated[int, typer.Option(help="With several settings: how many trials.")] = 20,
    fidelity: Annotated[
        str | None,
        typer.Option(
            metavar="PATH=1,3,9",
            help="With several settings: trials rise through these values, and bad ones stop.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the search; left out, the recipe's and -search.", show_default=False)
    ] = None,
    set_: SetOption = None,
    store: StoreOption = "artifacts",
    runner: RunnerOption = "threads",
    no_plugins: PluginsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Searches the smallest network within a budget of the metric; every trial is a run. Exit code 3: there is none."""
    _quiet()
    _find_code(no_plugins)
    from prune_jax.console import Board
    from prune_jax.progress import Listeners, listeners
    from prune_jax.searches import search as look
    from prune_jax.searches import set_line, trial_line, trials_table

    console = _console(as_json)
    with Board(console) as board:
        board.waiting("checking the recipe, starting Prefect")
        listeners.set(Listeners(board.hear, lambda stage, *_: board.end(stage)))
        signal.signal(signal.SIGINT, lambda *_: board.interrupt())
        wanted = {"max_drop": max_drop, "of": of, "metric": metric, "smallest": smallest, "name": name}
        wanted |= {"rungs": rungs, "trials": trials, "fidelity": fidelity, "runner": runner, "no_plugins": no_plugins}

        def tell(question: Any, trial: Any) -> None:
            console.print(trial_line(question, trial), highlight=False, soft_wrap=True)

        try:
            found = look(recipe, over, changes=set_ or (), store=store, tell=tell, **wanted)  # type: ignore[arg-type]
        except PruneError:
            if board.interrupted:
                raise KeyboardInterrupt from None
            raise
    console.print(trials_table(found))
    console.print(f"[bold]{_escaped(found['message'])}[/]", highlight=False, soft_wrap=True)
    if chosen := found["chosen"]:
        told = ", ".join(f"{network} {value:.4f}" for network, value in chosen["test"].items())
        console.print(f"on the test split, which decided nothing: {found['metric']} {told}", highlight=False)
        line = f"prune-jax run {recipe} {set_line(found)}{_store_option(store)}"
        console.print(f"[dim]run: {chosen['run']}; again: {_escaped(line)}[/]", highlight=False, soft_wrap=True)
    if as_json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    raise typer.Exit(0 if found["outcome"] == "found" else 3)


@app.command(epilog="Example:\n\n  prune-jax rollback digits --why 'wrong on the new scanner'")
def rollback(
    name: Annotated[str, typer.Argument(help="Name of a champion.", show_default=False)],
    why: WhyOption = "",
    by: ByOption = None,
    store: StoreOption = "artifacts",
    as_json: JsonOption = False,
) -> None:
    """Makes the previous champion the champion again; another one takes back the promotion before."""
    from prune_jax.checkpoints import Store
    from prune_jax.promotion import rollback as take_back

    _tell_champion(take_back(Store(store), name, by=by, why=why), as_json)


@app.command(epilog="Examples:\n\n  prune-jax champions\n\n  prune-jax champions digits --json")
def champions(
    name: Annotated[
        str | None, typer.Argument(help="Shows this one's history; left out, all.", show_default=False)
    ] = None,
    store: StoreOption = "artifacts",
    as_json: JsonOption = False,
) -> None:
    """Lists who reigns under which name, or one champion's history: promoted, rolled back, rejected."""
    from prune_jax.checkpoints import Store
    from prune_jax.promotion import champion, champions_table, history_table, reigning
    from prune_jax.promotion import champions as all_of

    artifacts = Store(store)
    found = all_of(artifacts) if name is None else [champion(artifacts, name)]
    if name is not None and not found[0].history:
        reigning(artifacts, name)  # refuses the name
    if as_json:
        told = [each.model_dump(mode="json") for each in found]
        sys.stdout.write(json.dumps(told if name is None else told[0], indent=1) + "\n")
    elif name is None:
        _console().print(champions_table(found) if found else f"no champions in {store}")
    else:
        _console().print(history_table(found[0]))


def _console(as_json: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=as_json)


def _tell_champion(made: Any, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(made.model_dump_json(indent=1) + "\n")
        return
    reign = made.champion
    _console().print(
        f"[bold]{_escaped(made.name)}[/] is {_escaped(reign.run)}'s {_escaped(reign.network)}, "
        f"generation {made.generation}",
        highlight=False,
    )


@app.command(epilog="Examples:\n\n  prune-jax verify\n\n  prune-jax verify lenet-300-100 --json")
def verify(
    name: Annotated[
        str | None,
        typer.Argument(metavar="RUN", help="Only this run's artifacts; left out, all.", show_default=False),
    ] = None,
    store: StoreOption = "artifacts",
    as_json: JsonOption = False,
) -> None:
    """Hashes every file of the store anew; exit code 1 if one is not what was written."""
    from rich.console import Console

    from prune_jax.checkpoints import Store
    from prune_jax.console import Board
    from prune_jax.verification import verification_json, verification_lines, verification_table
    from prune_jax.verification import verify as check

    artifacts, console = Store(store), Console()
    with Board(Console(stderr=True)) as board:
        found = check(artifacts, name, report=board.hear)
    if as_json:
        sys.stdout.write(json.dumps(verification_json(artifacts, found), indent=1) + "\n")
    else:
        console.print(verification_table(found))
        for line in verification_lines(found):
            console.print(line, highlight=False, soft_wrap=True)
    raise typer.Exit(0 if found.intact else 1)


@app.command("gc", epilog="Examples:\n\n  prune-jax gc --dry-run\n\n  prune-jax gc --keep 20")
def gc_(
    keep: Annotated[
        int | None, typer.Option(help="So many records of runs stay, the latest; left out, all.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tells what would go.")] = False,
    store: StoreOption = "artifacts",
    as_json: JsonOption = False,
) -> None:
    """Removes what no kept run needs: artifacts, leftovers of killed processes, damaged files that were set aside."""
    from rich.console import Console

    from prune_jax.checkpoints import Store
    from prune_jax.disks import readable
    from prune_jax.garbage import removals_json, removals_table, remove

    artifacts, console = Store(store), Console()
    removals = remove(artifacts, keep=keep, dry_run=dry_run)
    if as_json:
        sys.stdout.write(json.dumps(removals_json(artifacts, removals), indent=1) + "\n")
        return
    if removals:
        console.print(removals_table(removals))
    freed = readable(sum(removal.bytes for removal in removals))
    console.print(f"{freed} {'would be freed; nothing was removed' if dry_run else 'freed'}", highlight=False)


@app.command(epilog="Example:\n\n  prune-jax doctor --store /data/artifacts")
def doctor(store: StoreOption = "artifacts", as_json: JsonOption = False) -> None:
    """Looks over software, devices, threads, Prefect, store and disk; exit code 1 if something will fail."""
    _quiet()
    from rich.console import Console

    from prune_jax.doctor import examine, findings_json, findings_table, healthy

    findings = examine(store)
    if as_json:
        sys.stdout.write(json.dumps(findings_json(findings), indent=1) + "\n")
    else:
        Console().print(findings_table(findings))
    raise typer.Exit(0 if healthy(findings) else 1)


@app.command(epilog="Example:\n\n  prune-jax report lenet-300-100")
def report(name: RunArgument, store: StoreOption = "artifacts") -> None:
    """Writes a run's report, one self-contained HTML file, and prints its path."""
    from prune_jax.checkpoints import Store
    from prune_jax.report import write_report

    sys.stdout.write(f"{write_report(Store(store), name)}\n")


@app.command(
    epilog="Examples:\n\n  prune-jax compare by-magnitude by-taylor\n\n  prune-jax compare comparison -o comparison.png"
)
def compare(
    names: Annotated[list[str], typer.Argument(metavar="RUN...", help="Runs to set side by side.", show_default=False)],
    output: Annotated[
        str | None,
        typer.Option(
            "-o", "--output", help="The picture: .png, .svg or .pdf; left out, beside the first run's record."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Method that differences are taken from; left out, random, else dense.", show_default=False),
    ] = None,
    store: StoreOption = "artifacts",
) -> None:
    """Sets runs, and the methods within them, side by side: tables of means and paired differences, and a picture."""
    from rich.console import Console

    from prune_jax.checkpoints import Store
    from prune_jax.report import reading, write_comparison
    from prune_jax.report.comparison import comparison_rich, merged, panels_of
    from prune_jax.report.tables import primary_metric

    artifacts, console = Store(store), Console()
    records = [artifacts.record(name) for name in dict.fromkeys(names)]
    with reading(f"{', '.join(names)}"):
        record = merged(records)
        panels, metric = panels_of(record, least=1), primary_metric(record)
    if not panels:
        raise UserMistake(
            f"{', '.join(names)}: no pruned network was evaluated beside a dense one; see `prune-jax show`"
        )
    with reading(f"{', '.join(names)}"):
        for panel in panels:
            console.print(comparison_rich(panel, metric, panel.known(against)))
    path = output or artifacts.record_path(names[0]).parent / "comparison.png"
    with reading(f"{', '.join(names)}"):
        write_comparison(panels, metric, path)
    sys.stdout.write(f"{path}\n")


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _find_code(no_plugins: bool) -> None:
    """Has `my_pkg.nets:Net` found where the user stands; last of all, so that no file there takes a package's place."""
    if not no_plugins:
        sys.path.append(str(Path.cwd()))


def _quiet() -> None:
    """Leaves the terminal to the bars and the table; Prefect's API still gets every log."""
    import logging

    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    silent = logging.StreamHandler()
    silent.setLevel(os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"])
    logging.basicConfig(
        handlers=[silent]
    )  # the first one stands: what others add to the root logger later, they do not
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def _own_stdout() -> None:
    """Keeps stdout for Python: what XLA's collectives print there goes to stderr."""
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(ours, "w", encoding=sys.stdout.encoding, errors="backslashreplace")


def main() -> NoReturn:
    """Runs the command line. Exit codes: 0 done, 1 a stage failed, 2 bad input, 3 a gate said no, 130 interrupted."""
    gc.set_threshold(50_000)  # what imports make stays: a fifth of their time went into looking for garbage in it
    atexit.register(gc.freeze)  # and most of a second at the end
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a file's name may be what no encoding holds
    try:
        app(standalone_mode=True)
    except UserMistake as mistake:
        sys.stderr.write(f"{mistake}\n")
        raise SystemExit(2) from None
    except PruneError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(3 if isinstance(error, GateError) else 1) from None
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on from what is done\n")
        raise SystemExit(130) from None
    raise SystemExit(0)
