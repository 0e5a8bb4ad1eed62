"""Where metrics go beside the record: TensorBoard and MLflow, each behind its extra and imported when it is named.

`PRUNE_JAX_LOG="tensorboard=DIR,mlflow=URI"`. No key and no artifact depends on it.
"""

from __future__ import annotations

import os
import queue
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from prune_jax.errors import UserMistake
from prune_jax.progress import Progress, listeners

PATIENCE = 30  # seconds that a run waits in the end for a sink that does not answer


class Sink(NamedTuple):
    """A run at some place."""

    write: Callable[[str, float, int], None]  # name, value, step
    close: Callable[[bool], None]  # whether all went well


def _tensorboard(folder: str, run: str) -> Sink:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(os.path.join(folder, run))
    return Sink(writer.add_scalar, lambda well: writer.close())


def _mlflow(uri: str, run: str) -> Sink:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name("prune_jax")
    experiment = found.experiment_id if found else client.create_experiment("prune_jax")
    id = client.create_run(experiment, run_name=run).info.run_id

    def write(name: str, value: float, step: int) -> None:
        client.log_metric(id, re.sub(r"[^\w./ -]", "_", name), value, step=step)

    return Sink(write, lambda well: client.set_terminated(id, "FINISHED" if well else "FAILED"))


SINKS = {"tensorboard": ("tensorboardX", _tensorboard), "mlflow": ("mlflow", _mlflow)}


def targets(written: str) -> list[tuple[str, str]]:
    """Reads `tensorboard=DIR,mlflow=URI`.

    Raises:
        UserMistake: it names something else, or what a package is missing for.
    """
    from importlib.util import find_spec

    found = []
    for part in filter(None, written.split(",")):
        kind, _, place = part.partition("=")
        if kind not in SINKS or not place:
            allowed = ", ".join(f"{name}=PLACE" for name in SINKS)
            raise UserMistake(f"log = {part!r}: is not known (allowed: {allowed}; several with commas)")
        if find_spec(SINKS[kind][0]) is None:
            raise UserMistake(f"log = {part!r}: the package is missing; pip install 'prune-jax[{kind}]'")
        found.append((kind, place))
    return found


@contextmanager
def logged(written: str, run: str) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Sends what a run tells to the sinks of `targets`, from a thread of its own; a sink that fails is left alone.

    Loss by step as `STAGE/loss`, while trainings report it; what the yielded function is told of a record as
    `STAGE/METRIC` and, of evaluated networks, `results/NETWORK/METRIC`, at step 0.
    """
    places = targets(written)
    if not places:
        yield lambda record: None
        return
    told: queue.SimpleQueue[tuple[str, float, int] | None] = queue.SimpleQueue()
    status = {"well": False}
    thread = threading.Thread(target=_send, args=(places, run, told, status), daemon=True)
    thread.start()
    heard = listeners.get()

    def progress(progress: Progress) -> None:
        heard.progress(progress)
        if progress.loss is not None:
            told.put((f"{progress.name}/loss", float(progress.loss), progress.done))

    def finish(record: Mapping[str, Any]) -> None:
        status["well"] = record["status"] == "completed"
        parts = [*record["stages"].items()]
        named = {name: stage["metrics"] for name, stage in parts} | {
            f"results/{name}": result for name, result in record["results"].items()
        }
        for name, metrics in named.items():
            for metric, value in metrics.items():
                if isinstance(value, int | float):
                    told.put((f"{name}/{metric}", float(value), 0))

    token = listeners.set(heard._replace(progress=progress))
    try:
        yield finish
    finally:
        listeners.reset(token)
        told.put(None)
        thread.join(PATIENCE)


def _send(places: list[tuple[str, str]], run: str, told: queue.SimpleQueue[Any], status: dict[str, bool]) -> None:
    sinks: dict[str, Sink] = {}

    def guarded(place: str, does: Callable[[], Any]) -> Any:
        try:
            return does()
        except Exception as error:  # whatever it is: metrics are not worth a run
            sinks.pop(place, None)
            warnings.warn(f"no more metrics go to {place}: {type(error).__name__}: {error}", stacklevel=2)

    for kind, place in places:
        if sink := guarded(place, lambda kind=kind, place=place: SINKS[kind][1](place, run)):  # type: ignore[misc]
            sinks[place] = sink
    while (item := told.get()) is not None:
        for place, sink in list(sinks.items()):
            guarded(place, lambda sink=sink, item=item: sink.write(*item))  # type: ignore[misc]
    for place, sink in list(sinks.items()):
        guarded(place, lambda sink=sink: sink.close(status["well"]))  # type: ignore[misc]
