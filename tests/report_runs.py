"""Runs as a report may meet them, written into a store with made-up but coherent numbers."""

from __future__ import annotations

import numpy as np

from prune_jax.checkpoints import Store
from prune_jax.recipe import Ref

SHAPES = {"hidden_0": (784, 300), "hidden_1": (300, 100), "output": (100, 10)}
LEVELS = (0.369, 0.602, 0.749, 0.842, 0.9)
VERSIONS = {"python": "3.11.2", "prune-jax": "0.1.0", "jax": "0.10.2", "flax": "0.12.8"}


def weights(rng, shapes=SHAPES):
    return {
        name: {
            "kernel": rng.normal(0, 1 / np.sqrt(shape[0]), shape).astype(np.float32),
            "bias": rng.normal(0, 0.02, shape[1]).astype(np.float32),
        }
        for name, shape in shapes.items()
    }


def magnitude_masks(params, sparsity):
    kernels = np.concatenate([np.abs(layer["kernel"]).ravel() for layer in params.values()])
    cut = np.quantile(kernels, sparsity)
    return {name: {"kernel": np.abs(layer["kernel"]) > cut} for name, layer in params.items()}


def masked(params, masks):
    return {
        name: {"kernel": layer["kernel"] * masks[name]["kernel"], "bias": layer["bias"]}
        for name, layer in params.items()
    }


def falling_losses(rng, steps, start, end):
    clean = end + (start - end) * np.exp(-np.arange(steps) / (steps / 6))
    return (clean * rng.lognormal(0, 0.35, steps)).astype(np.float32)


def result(params, masks, *, kind, key, metric=None, row=None):
    layers, dead, prunable, idle = {}, 0, 0, 0
    for name, layer in params.items():
        for leaf, values in layer.items():
            masked = bool(masks) and leaf in masks[name]
            alive = masks[name][leaf] if masked else np.ones(values.shape, bool)
            layers[f"{name}/{leaf}"] = {
                "shape": list(values.shape),
                "size": values.size,
                "nonzero": int(alive.sum()),
                "prunable": masked,
                "sparsity": 1 - float(alive.mean()),
            }
            dead += int((~alive).sum())
            idle += int((~alive).sum()) if leaf == "kernel" else 0
            prunable += values.size if masked else 0
    total = sum(v["size"] for v in layers.values())
    macs = sum(layer["kernel"].size for layer in params.values())
    return {
        **(metric or {}),
        "params": total,
        "nonzero": total - dead,
        "sparsity": dead / prunable if prunable else 0.0,
        "sparsity_total": dead / total,
        "macs": macs,
        "effective_macs": macs - idle,
        "bytes": 4 * total + 1800,
        "bytes_compressed": int(3.7 * (total - dead)) + 9000,
        "kind": kind,
        "key": key,
        "row": row or {},
        "layers": layers,
        "latency_ms": {"1": {"p50": 0.0412, "p90": 0.0475}, "64": {"p50": 0.288, "p90": 0.31}},
    }


def stage(kind, key, label, *, begin=None, seconds=0.0, after=(), status="ran", metrics=None, message="", row=None):
    return {
        "kind": kind,
        "key": key,
        "label": label,
        "status": status,
        "seconds": seconds,
        "made_in_seconds": seconds or 12.0,
        "begin": begin,
        "after": list(after),
        "message": message,
        "row": row or {},
        "metrics": metrics or {},
    }


def record(name, stages, results, *, recipe=None, status="completed", seconds=40.0):
    return {
        "name": name,
        "recipe": recipe or {"name": name},
        "started": "2026-03-01T12:34:56Z",
        "seconds": seconds,
        "status": status,
        "versions": VERSIONS,
        "devices": ["cpu x2"],
        "store": "artifacts",
        "stages": stages,
        "results": results,
    }


RECIPE = {
    "name": "lenet-300-100",
    "description": "LeNet-300-100 on MNIST digits, 90 % pruned by Taylor scores in five rounds",
    "seed": 0,
    "data": {"source": "mnist5k", "validation": 0.1, "batch_size": 64},
    "model": {"kind": "mlp", "widths": [300, 100]},
    "objective": "classification",
    "stages": {
        "train": {"kind": "train", "optimizer": {"name": "adam", "learning_rate": 0.001}, "epochs": 20},
        "prune": {
            "kind": "prune",
            "criterion": "taylor",
            "scope": "global",
            "target": {"sparsity": 0.9},
            "schedule": {"kind": "iterative", "rounds": 5},
            "finetune": {"epochs": 3, "optimizer": {"name": "adam", "learning_rate": 0.0003}},
            "guard": {"metric": "accuracy", "max_drop": 0.02},
        },
        "evaluate": {"kind": "evaluate", "of": ["train", "prune"], "latency": {"batch_sizes": [1, 64]}},
    },
}


def one_run(store: Store, *, breach=False) -> str:
    """Train, five rounds, evaluate; with `breach`, the guard refuses the last round."""
    rng = np.random.default_rng(0)
    dense = weights(rng)
    store.write(Ref("train", "t0"), {"params": dense, "state": {}, "losses": falling_losses(rng, 1400, 2.3, 0.004)}, {})
    metrics = {"validation_accuracy": 0.956, "validation_loss": 0.16, "sparsity": 0.0}
    stages = {"train": stage("train", "t0", "train · mlp", begin=1.2, seconds=11.4, metrics=metrics)}
    stages["prune"] = stage("prune", "p0", "prune · taylor · 0.9", begin=33.9, seconds=0.2, after=["train"])
    rounds, clock, before, params, kept = [], 12.8, "train", dense, None
    for number, (level, accuracy) in enumerate(zip(LEVELS, (0.957, 0.958, 0.955, 0.952, 0.948), strict=True), 1):
        masks = magnitude_masks(params, level)
        params = masked(params, masks)
        params = masked(
            {n: {**layer, "kernel": (layer["kernel"] * 1.04).astype(np.float32)} for n, layer in params.items()}, masks
        )
        refused = breach and number == 5
        accuracy = 0.921 if refused else accuracy
        losses = falling_losses(rng, 210, 0.02 * 1.8**number, 0.006)
        arrays = {"params": params, "state": {}, "masks": masks, "losses": losses}
        store.write(Ref("finetune", f"f{number}"), arrays, {})
        metrics = {"validation_accuracy": accuracy, "validation_loss": 0.2, "sparsity": level}
        for word, kind, seconds in (("score", "score", 0.4), ("mask", "mask", 0.3), ("finetune", "finetune", 2.9)):
            name = f"prune.{number}.{word}"
            stages[name] = stage(
                kind,
                f"{word[0]}{number}",
                f"{word} · {level:g}",
                begin=clock,
                seconds=seconds,
                after=[before],
                metrics=metrics if word == "finetune" else {},
            )
            clock, before = clock + seconds + 0.35, name
        rounds.append(
            {
                "round": number,
                "level": level,
                "kind": "finetune",
                "key": f"f{number}",
                "kept": not refused,
                "metrics": metrics,
            }
        )
        if not refused:
            kept = (params, masks)
    message = (
        "stopped at round 5: accuracy went from 0.956 to 0.921, worse by 0.035; the guard allows 0.02" if breach else ""
    )
    stages["prune"]["message"] = message
    params, masks = kept
    store.write(
        Ref("prune", "p0"),
        {"params": params, "state": {}, "masks": masks},
        {"facts": {"rounds": rounds, "message": message}},
    )
    stages["evaluate"] = stage(
        "evaluate", "e0", "evaluate · train, prune", begin=clock + 0.4, seconds=4.6, after=["train", "prune"]
    )
    results = {
        "train": result(dense, None, kind="train", key="t0", metric={"accuracy": 0.955, "loss": 0.1712}),
        "prune": result(params, masks, kind="prune", key="p0", metric={"accuracy": 0.951, "loss": 0.1934}),
    }
    name = "breached" if breach else "lenet-300-100"
    store.write_record(record(name, stages, results, recipe={**RECIPE, "name": name}, seconds=clock + 5.2))
    return name


def matrix_run(store: Store) -> str:
    """Two criteria, three sparsities, two seeds: twelve networks."""
    shapes = {"conv_0": (25, 16), "conv_1": (400, 32), "hidden_0": (512, 64), "output": (64, 10)}
    stages, results, clock = {}, {}, 0.5
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        dense, name = weights(rng, shapes), f"train[seed={seed}]"
        store.write(Ref("train", f"mt{seed}"), {"params": dense, "losses": falling_losses(rng, 900, 2.3, 0.03)}, {})
        metrics = {"validation_accuracy": 0.981 + 0.003 * seed, "validation_loss": 0.08, "sparsity": 0.0}
        stages[name] = stage(
            "train", f"mt{seed}", "train · cnn", begin=clock, seconds=8.0, metrics=metrics, row={"seed": seed}
        )
        test = {"accuracy": 0.979 + 0.002 * seed, "loss": 0.08}
        results[name] = result(dense, None, kind="train", key=f"mt{seed}", metric=test, row={"seed": seed})
        clock += 1.0
    for criterion, cost in (("magnitude", 0.05), ("taylor", 0.03)):
        for target in (0.8, 0.9, 0.95):
            for seed in (0, 1):
                rng = np.random.default_rng(seed)
                row = {"criterion": criterion, "target.sparsity": target, "seed": seed}
                words = f"[criterion={criterion},sparsity={target},seed={seed}]"
                key, dense = f"{criterion[0]}{target}{seed}", weights(rng, shapes)
                rounds = []
                for number, level in enumerate((1 - (1 - target) ** (i / 3) for i in (1, 2, 3)), 1):
                    masks = magnitude_masks(dense, level)
                    params = masked(dense, masks)
                    accuracy = 0.982 - cost * level**6 + 0.004 * (seed - 0.5)
                    metrics = {"validation_accuracy": accuracy, "sparsity": level}
                    arrays = {"params": params, "masks": masks, "losses": falling_losses(rng, 120, 0.3, 0.05)}
                    store.write(Ref("finetune", f"{key}r{number}"), arrays, {})
                    rounds.append(
                        {
                            "round": number,
                            "level": level,
                            "kind": "finetune",
                            "key": f"{key}r{number}",
                            "kept": True,
                            "metrics": metrics,
                        }
                    )
                store.write(
                    Ref("prune", key), {"params": params, "masks": masks}, {"facts": {"rounds": rounds, "message": ""}}
                )
                stages[f"prune{words}"] = stage(
                    "prune",
                    key,
                    f"prune · {criterion} · {target}",
                    begin=clock,
                    seconds=6.0,
                    after=[f"train[seed={seed}]"],
                    row=row,
                )
                stages[f"evaluate{words}"] = stage(
                    "evaluate",
                    f"e{key}",
                    f"evaluate · train, prune{words}",
                    begin=clock + 6,
                    seconds=1.5,
                    after=[f"train[seed={seed}]", f"prune{words}"],
                    row=row,
                )
                test = {"accuracy": accuracy - 0.002, "loss": 0.1}
                results[f"prune{words}"] = result(params, masks, kind="prune", key=key, metric=test, row=row)
                clock += 2.1
    recipe = {
        **RECIPE,
        "name": "matrix",
        "matrix": {"criterion": ["magnitude", "taylor"], "target.sparsity": [0.8, 0.9, 0.95], "seed": [0, 1]},
    }
    store.write_record(record("matrix", stages, results, recipe=recipe, seconds=clock + 7))
    return "matrix"


LEFT = {"hidden_0": (300, 220, 120), "hidden_1": (100, 60, 25)}  # units before, after one round and after the other


def compact_run(store: Store, *, cut=True, evaluated=("train", "prune", "compact", "finetune")) -> str:
    """Train, two rounds of groups, the guard refusing a third; with `cut`, compact and fine-tune the small network."""
    rng = np.random.default_rng(5)
    dense = weights(rng)
    store.write(Ref("train", "ct"), {"params": dense, "losses": falling_losses(rng, 700, 2.3, 0.01)}, {})
    told = {"validation_accuracy": 0.956, "sparsity": 0.0}
    stages = {"train": stage("train", "ct", "train · mlp", begin=0.5, seconds=6.0, metrics=told)}
    networks, rounds, left, before = {"train": (dense, None)}, [], {n: u[0] for n, u in LEFT.items()}, "train"
    for number, accuracy in enumerate((0.955, 0.950, 0.81), 1):
        left = {name: units[number] if number < 3 else 1 for name, units in LEFT.items()}
        outs = [np.arange(size) < left.get(name, size) for name, (_, size) in SHAPES.items()]
        ins = [np.ones(784, bool), *outs[:-1]]
        masks = {n: {"kernel": np.outer(i, o), "bias": o} for n, i, o in zip(SHAPES, ins, outs, strict=True)}
        params = {n: {leaf: values * masks[n][leaf] for leaf, values in layer.items()} for n, layer in dense.items()}
        if number < 3:
            networks["prune"] = params, masks
        metrics = {
            "validation_accuracy": accuracy,
            "sparsity": result(params, masks, kind="mask", key="")["sparsity"],
            "groups": {f"params/{n}.out": {"dead": u[0] - left[n], "units": u[0]} for n, u in LEFT.items()},
        }
        name = f"prune.{number}.mask"
        stages[name] = stage("mask", f"cm{number}", "mask", begin=6.0 + number, seconds=0.5, after=[before])
        stages[name]["metrics"], before = metrics, name
        fact = {"round": number, "level": None, "kind": "mask", "key": f"cm{number}", "kept": number < 3}
        rounds.append({**fact, "metrics": {k: v for k, v in metrics.items() if k != "groups"}})
    params, masks = networks["prune"]
    store.write(Ref("prune", "cp"), {"params": params, "masks": masks}, {"facts": {"rounds": rounds, "message": ""}})
    stages["prune"] = stage("prune", "cp", "prune · taylor", begin=9.6, seconds=0.1, after=["train"])
    if cut:
        keep = {n: np.ix_(masks[n]["kernel"].any(1), masks[n]["bias"]) for n in SHAPES}
        small = {n: {"kernel": p["kernel"][keep[n]], "bias": p["bias"][masks[n]["bias"]]} for n, p in params.items()}
        units = {n: {**g, "kind": "neuron"} for n, g in stages["prune.2.mask"]["metrics"]["groups"].items()}
        for (n, group), reader in zip(units.items(), ("hidden_1", "output"), strict=True):
            layer = n.removeprefix("params/").removesuffix(".out")
            group["members"] = [[f"{layer}/kernel", 1], [f"{layer}/bias", 0], [f"{reader}/kernel", 0]]
        parameters = [
            [f"{n}/{leaf}", list(values.shape), list(small[n][leaf].shape)]
            for n, layer in dense.items()
            for leaf, values in layer.items()
        ]
        for name, key, after in (("compact", "cc", "prune"), ("finetune", "cf", "compact")):
            stages[name] = stage(name, key, name, begin=10.0, seconds=0.5, after=[after], metrics={"sparsity": 0.0})
            store.write(Ref(name, key), {"params": small, "losses": falling_losses(rng, 90, 0.3, 0.02)}, {})
            networks[name] = small, None
        stages["compact"]["metrics"] |= {"groups": units, "parameters": parameters}
    stages["evaluate"] = stage("evaluate", "ce", "evaluate", begin=11.0, seconds=1.0, after=[*networks])
    accuracies = {"train": 0.955, "prune": 0.949, "compact": 0.949, "finetune": 0.952}
    results = {
        name: result(*network, kind=name, key=stages[name]["key"], metric={"accuracy": accuracies[name], "loss": 0.2})
        for name, network in networks.items()
        if name in evaluated
    }
    store.write_record(record("compact", stages, results, seconds=12.5))
    return "compact"


def _key(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def controls_run() -> dict:
    """The record of a network cut to half beside its three controls."""
    place, by_chance = {"prune.target.sparsity": "0.5"}, {"by-chance.target.sparsity": "0.5"}
    mine, theirs = "[prune.target.sparsity=0.5]", "[by-chance.target.sparsity=0.5]"
    wiring = {  # name: (kind, after, row)
        "train": ("train", (), {}),
        "longer": ("finetune", ("train",), {}),
        f"prune{mine}": ("prune", ("train",), place),
        f"cut{mine}": ("compact", (f"prune{mine}",), place),
        f"finetuned{mine}": ("finetune", (f"cut{mine}",), place),
        f"scratch{mine}": ("finetune", (f"cut{mine}",), place),
        f"by-chance{theirs}": ("prune", ("train",), by_chance),
        f"cut-by-chance{theirs}": ("compact", (f"by-chance{theirs}",), by_chance),
        f"random{theirs}": ("finetune", (f"cut-by-chance{theirs}",), by_chance),
    }
    stages = {n: stage(kind, _key(n), n, after=after, row=row) for n, (kind, after, row) in wiring.items()}
    of = {name: {"kind": name} for name in ("train", "cut", "cut-by-chance")}
    of |= {"prune": {"criterion": "taylor"}, "by-chance": {"criterion": {"name": "random"}}}
    of |= {"longer": {}, "finetuned": {}, "random": {}, "scratch": {"rewind": "initialisation"}}
    rng = np.random.default_rng(0)
    dense, small = weights(rng), weights(rng, {"hidden_0": (784, 150), "hidden_1": (150, 50), "output": (50, 10)})
    accuracies = dict(zip(wiring, (0.965, 0.969, 0.8, 0.8, 0.961, 0.95, 0.0, 0.0, 0.94), strict=True))
    results = {
        name: result(
            dense if kind in {"train", "prune"} or name == "longer" else small,
            None,
            kind=kind,
            key=_key(name),
            metric={"accuracy": accuracies[name], "loss": 0.1},
            row=row,
        )
        | {"peak_bytes": {"1": 4000, "64": 64000}}
        for name, (kind, _, row) in wiring.items()
        if "by-chance[" not in name
    }
    return record("controls", stages, results, recipe={"name": "controls", "stages": of})


def search_run(store: Store) -> str:
    """A regression whose threshold was searched for; its training was there already, its artifact is gone."""
    params = {"linear": {"kernel": np.linspace(-1, 1, 30, dtype=np.float32)[:, None], "bias": np.zeros(1, np.float32)}}
    masks = magnitude_masks(params, 0.5)
    table = [
        {"threshold": t, "folds": [m, m * 1.1], "mean": m * 1.05, "sparsity": s}
        for t, m, s in ((0.01, 0.9, 0.1), (0.1, 0.91, 0.5), (0.5, 4.2, 0.8))
    ]
    metrics = {"validation_mse": 0.93, "validation_loss": 0.93, "sparsity": 0.5}
    rounds = [{"round": 1, "level": None, "kind": "mask", "key": "gone", "kept": True, "metrics": metrics}]
    facts = {
        "rounds": rounds,
        "message": "",
        "search": {"metric": "mse", "over": "threshold", "table": table, "chosen": 0.1},
    }
    store.write(Ref("prune", "s0"), {"params": masked(params, masks), "masks": masks}, {"facts": facts})
    dense = {"validation_mse": 0.88, "validation_loss": 0.88, "sparsity": 0.0}
    stages = {
        "train": stage("train", "nowhere", "train · linear", status="cached", metrics=dense),
        "prune": stage("prune", "s0", "prune · magnitude · threshold", begin=0.3, seconds=3.0, after=["train"]),
        "prune.fold 1": stage("train", "fold1", "train · fold 1 of 2", begin=0.4, seconds=1.0),
        "evaluate": stage(
            "evaluate", "se", "evaluate · train, prune", begin=3.5, seconds=1.0, after=["train", "prune"]
        ),
    }
    results = {
        "train": result(params, None, kind="train", key="nowhere", metric={"mse": 0.9012, "loss": 0.9012}),
        "prune": result(masked(params, masks), masks, kind="prune", key="s0", metric={"mse": 0.9511, "loss": 0.9511}),
    }
    store.write_record(record("search", stages, results, seconds=4.7))
    return "search"


def failed_run(store: Store) -> str:
    """Two rounds, the guard's breach fails; what was to follow is skipped. Its name and message hold markup."""
    rng = np.random.default_rng(3)
    stages = {
        "train": stage(
            "train",
            "t0",
            "train · mlp",
            begin=0.5,
            seconds=9.0,
            metrics={"validation_accuracy": 0.956, "sparsity": 0.0},
        ),
        "prune": stage(
            "prune",
            "never",
            "prune · taylor · 0.9",
            status="failed",
            after=["train"],
            message="<script>alert('x')</script> the guard was breached at round 2: 0.956 to 0.9 & fell",
        ),
    }
    for number, accuracy in ((1, 0.953), (2, 0.9)):
        arrays = {"params": weights(rng), "masks": {}, "losses": falling_losses(rng, 100, 1, 0.01)}
        store.write(Ref("finetune", f"x{number}"), arrays, {})
        stages[f"prune.{number}.finetune"] = stage(
            "finetune",
            f"x{number}",
            "finetune · 3 epochs",
            begin=10.0 + 3 * number,
            seconds=2.5,
            after=["train"],
            metrics={"validation_accuracy": accuracy, "sparsity": 0.4 * number},
        )
    stages["evaluate"] = stage(
        "evaluate", "never2", "evaluate", status="skipped", after=["train", "prune"], message="prune failed"
    )
    recipe = {"name": "failed", "description": 'a <b>bold</b> & "quoted" recipe'}
    store.write_record(record("failed", stages, {}, recipe=recipe, status="failed", seconds=19.0))
    return "failed"
