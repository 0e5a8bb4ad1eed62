"""How much a stage will write at most, read off the shapes of its network before it starts."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import numpy as np

from prune_jax.checkpoints import KEPT_STEPS, Store
from prune_jax.disks import check_room
from prune_jax.files import files_below
from prune_jax.models import Network
from prune_jax.problems import dataset_of, network_of
from prune_jax.recipe import EXPORTS, Optimizer, StageCall
from prune_jax.training import length, make_optimizer
from prune_jax.trees import PyTree

SPARE = 1 << 20  # bytes that files take beside their arrays
TRAININGS = {"train", "finetune", "distill"}


def check_space(call: StageCall, store: Store) -> None:
    """Refuses to start a stage whose artifact and step checkpoints may not fit on the disk.

    Raises:
        StoreError: how much is needed, how much is free.
    """
    if not store.local:
        return
    work = store.work(call.ref)
    lies = sum(file.stat().length for file in files_below(work)) if work.exists() else 0  # of a stage that goes on
    check_room(f"{call.name} ({call.kind}/{call.key}) is not begun", str(store.root), max(space_of(call) - lies, SPARE))


def space_of(call: StageCall) -> int:
    """Bytes that a stage writes at most: those of the whole network, dense, nothing compressed.

    A network is its variables V, masks of a byte a weight, and what compaction keeps of each axis; with the optimizer's
    state M a training writes (kept + 1) step checkpoints of V + M and an artifact of as much. A score is 4 bytes a
    weight; an export writes V in each of its formats, with a half for what stands beside the numbers.
    """
    if call.kind in {"evaluate", "gate"}:
        return SPARE
    variables, weights = _sizes(network_of(call.problem))
    network = variables + weights + SPARE
    if call.kind == "score":
        return 4 * weights + SPARE
    if call.kind == "export":
        return SPARE + variables * 3 // 2 * len(call.settings.get("formats", EXPORTS))
    if call.kind not in TRAININGS:
        return network + _moments(call)
    return network + (KEPT_STEPS + 2) * (variables + weights + _moments(call) + 4 * _steps(call))


def _steps(call: StageCall) -> int:
    batch_size = call.problem.data.batch_size
    train = dataset_of(call.problem).train
    return length(train, batch_size=batch_size, epochs=call.settings.get("epochs"), steps=call.settings.get("steps"))[1]


def _moments(call: StageCall) -> int:
    """Of the optimizer and what a method that prunes while it trains keeps beside each weight: at most three more."""
    training = call if call.kind in TRAININGS else call.origin
    optimizer = Optimizer.model_validate(training.settings.get("optimizer", {})) if training else Optimizer()
    network = network_of(call.problem)
    more = 3 * _sizes(network)[0] if call.settings.get("sparsify") else 0
    return _state_bytes(network, optimizer) + more


@functools.lru_cache(maxsize=16)
def _shapes(network: Network) -> PyTree:
    return jax.eval_shape(network.init, jax.random.key(0))


def _sizes(network: Network) -> tuple[int, int]:
    """Bytes of a network's variables, and the number of its weights."""
    shapes = _shapes(network)
    return _bytes(shapes), sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.params))


@functools.lru_cache(maxsize=64)
def _state_bytes(network: Network, optimizer: Optimizer) -> int:
    return _bytes(jax.eval_shape(make_optimizer(optimizer, 1).init, _shapes(network).params))


def _bytes(shapes: Any) -> int:
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(shapes))
