"""What came of a run: `STORE/runs/<name>/run.json`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from prune_jax.checkpoints import Store, versions
from prune_jax.plan import Plan
from prune_jax.progress import listeners
from prune_jax.recipe import StageCall, StageResult
from prune_jax.roles import is_control, role_of


class Run:
    """Gathers the record of one run.

    Args:
        plan: what is to be done.
        store: where the record will lie.
        name: the run's name.
    """

    def __init__(self, plan: Plan, store: Store, name: str):
        self.plan, self.store, self.name = plan, store, name
        self.clock = time.perf_counter()
        self.started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.listeners = listeners.get()  # asked here: results come from threads that know no context
        self.begun: dict[str, tuple[StageCall, float]] = {}

    def begin(self, call: StageCall) -> None:
        """Notes that a call was started."""
        self.begun[call.name] = (call, time.perf_counter() - self.clock)

    def end(self, call: StageCall, result: StageResult) -> None:
        """Tells who listens that a call is done."""
        self.listeners.finished(call.name, call.label, result.status, result.seconds, _told(result))

    def finish(self, results: Mapping[str, StageResult]) -> dict[str, Any]:
        """Writes the record and answers it."""
        stages = self._stages(results)
        evaluated = self._results(results)
        failed = sorted((r for r in results.values() if r.status == "failed"), key=lambda r: r.rejected)
        recipe = self.plan.recipe.model_dump(mode="json", exclude_unset=True)
        record = {
            "name": self.name,
            "recipe": recipe,
            "started": self.started,
            "seconds": round(time.perf_counter() - self.clock, 3),
            "status": "failed" if failed else "completed",
            "user_mistake": any(r.user_mistake for r in failed),
            "rejected": bool(failed) and all(r.rejected for r in failed),
            "message": f"{failed[0].name} {'said no' if failed[0].rejected else 'failed'}: {failed[0].message}"
            if failed
            else _headline(stages, evaluated, recipe),
            "versions": versions(),
            "devices": _devices(stages),
            "store": str(self.store.root),
            "stages": stages,
            "results": evaluated,
        }
        self.store.write_record(record)
        return record

    def _stages(self, results: Mapping[str, StageResult]) -> dict[str, Any]:
        calls = {call.name: call for call in self.plan.calls} | {name: call for name, (call, _) in self.begun.items()}
        makers: dict[str, list[tuple[int, str]]] = {}  # of each key, those who make it and their places
        for place, (name, call) in enumerate(calls.items()):
            makers.setdefault(call.key, []).append((place, name))
        return {name: self._stage(name, result, calls.get(name), makers) for name, result in results.items()}

    def _stage(
        self, name: str, result: StageResult, call: StageCall | None, makers: Mapping[str, list[tuple[int, str]]]
    ) -> dict[str, Any]:
        begin = self.begun[name][1] if name in self.begun else None
        inputs = sorted({maker for ref in call.inputs.values() for maker in makers.get(ref.key, ())}) if call else ()
        meta = self.store.meta(result.ref) if result.good else None
        return {
            "kind": result.kind,
            "key": result.key,
            "label": call.label if call else name,
            "status": result.status,
            "seconds": round(result.seconds, 3),
            "made_in_seconds": (meta or {}).get("seconds", result.seconds),
            "begin": None if begin is None else round(begin, 3),
            "after": list(self.plan.after.get(name, [maker for _, maker in inputs])),
            **({"teacher": call.facts["teacher"]} if call and "teacher" in call.facts else {}),
            "message": result.message or (meta or {}).get("facts", {}).get("message", ""),
            **({"fault": result.fault} if result.fault else {}),
            "row": dict(call.facts.get("row", {})) if call else {},
            "metrics": result.metrics,
        }

    def _results(self, results: Mapping[str, StageResult]) -> dict[str, Any]:
        """One entry for each network that was evaluated; the first evaluation of a network counts."""
        found: dict[str, Any] = {}
        rows = {call.name: call.facts.get("row", {}) for call in self.plan.calls}
        for call in self.plan.calls:
            result = results.get(call.name)
            if call.kind != "evaluate" or result is None or not result.good:
                continue
            dense = next((name for name, ref in call.inputs.items() if ref.kind == "train"), None)
            for name, ref in call.inputs.items():
                entry = {"kind": ref.kind, "key": ref.key, "row": rows.get(name, {})}
                if dense not in (None, name):  # timed in turns with this one: times of another moment do not compare
                    timed = result.metrics[call.inputs[dense].key].get("latency_ms")
                    entry["beside"] = {"name": dense, "latency_ms": timed}
                found.setdefault(name, {**result.metrics[ref.key], **entry})
        return found


def _told(result: StageResult) -> str:
    """The one figure of a stage that people look for."""
    if not result.good:
        return result.message.partition("\n")[0]
    words: list[str] = [] if result.status == "ran" else [result.status]
    for metric in ("accuracy", "mse"):
        if (value := result.metrics.get(f"validation_{metric}")) is not None:
            words.append(f"validation {metric} {value:.4g}")
    if sparsity := result.metrics.get("sparsity"):
        words.append(f"{100 * sparsity:.3g} % sparse")
    return ", ".join(words)


def _headline(stages: Mapping[str, Any], results: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """`90 % sparse at accuracy 0.951 (-0.004)`: the smallest network that is no control, against the dense one."""
    if all(stage["status"] == "cached" for stage in stages.values()):
        did = f"nothing to compute, all {len(stages)} stages cached"
    else:
        did = f"{sum(stage['status'] == 'ran' for stage in stages.values())} of {len(stages)} stages ran"
    refused = [
        f"{n} {s['message'].partition(':')[0]}" for n, s in stages.items() if s["kind"] == "prune" and s["message"]
    ]
    did += "".join(f"; {told}" for told in (refused if len(refused) < 3 else [f"{len(refused)} guards were breached"]))
    if not results:
        return did
    if any(result["row"] for result in results.values()):
        return f"{len(results)} networks evaluated; {did}"
    largest = max(results.values(), key=lambda r: r["nonzero"])
    dense = next((r for r in results.values() if r["kind"] == "train"), largest)
    metric = next((m for m in ("accuracy", "mse") if m in dense), "loss")
    sign = -1 if metric == "accuracy" else 1  # of networks of one size, the best
    record = {"stages": stages, "results": results, "recipe": recipe}
    pruned = {name: r for name, r in results.items() if r is not dense}
    small = min(
        [r for name, r in pruned.items() if not is_control(role_of(record, name))] or list(pruned.values()),
        key=lambda r: (r["params"], round(r["nonzero"] / max(r["params"], 1), 3), sign * r[metric]),
        default=dense,
    )
    change = small[metric] - dense[metric]
    size = f"{100 * small['sparsity']:.3g} % sparse"
    if small["params"] < dense["params"]:
        size = f"{dense['params'] / small['params']:.3g} times smaller" + (f", {size}" if small["sparsity"] else "")
    return f"{size} at {metric} {small[metric]:.4g} ({change:+.3g}); {did}"


def _devices(stages: Mapping[str, Any]) -> list[str]:
    """The devices that were used; none if nothing was computed."""
    if all(stage["status"] == "cached" for stage in stages.values()):
        return []
    import jax

    kinds = [device.device_kind for device in jax.devices()]
    return [f"{kind} x{kinds.count(kind)}" for kind in dict.fromkeys(kinds)]
