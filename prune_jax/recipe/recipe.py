"""The stages of a recipe and the recipe itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from prune_jax.notation import read_granularity
from prune_jax.recipe.bounds import check_bounds, check_rows
from prune_jax.recipe.limits import LIMITS, Limits
from prune_jax.recipe.model import Model
from prune_jax.recipe.moments import check_moments
from prune_jax.recipe.parts import (
    Criterion,
    Data,
    Devices,
    Fraction,
    Frozen,
    Granularity,
    Guard,
    Name,
    OneShot,
    Operation,
    Optimizer,
    Plain,
    Recovery,
    RoundRecovery,
    Schedule,
    Search,
    Spare,
    Target,
    Teaching,
    mistake,
)
from prune_jax.recipe.sparsify import Sparsify
from prune_jax.recipe.wiring import TUNED, check_wiring, parents_of

A_ROW = {"row": True}  # context in which a row of a recipe is checked that is known to be no more than one
Matrix = dict[str, Annotated[list[Plain], Field(min_length=1)]]


class Stage(Operation):
    """What every stage may say. None of it but the seed changes what the stage computes."""

    after: str | None = Field(
        default=None, description="the stage whose result this one takes; left out, the one above"
    )
    of: str | None = Field(default=None, description="the same as `after`")
    seed: int | None = Field(default=None, ge=0, lt=2**31, description="left out, the recipe's")
    matrix: Matrix | None = Field(default=None, description="{dotted.path: [values]}: one row for each combination")

    @property
    def parents(self) -> tuple[str, ...]:
        """The stages that this one names, none if it takes the one above."""
        named = self.after or self.of
        return (named,) if named else ()

    @model_validator(mode="after")
    def _after_or_of(self) -> Stage:
        if self.after is not None and getattr(self, "of", None):
            raise ValueError("says both `after` and `of`, which mean the same; leave one out")
        return self

    def settings(self) -> dict[str, Any]:
        """What goes into the key: all that was set to other than its default, but for how the stage is operated."""
        elsewhere = {"kind", "after", "of", "seed", "matrix", *Operation.model_fields}
        return self.model_dump(mode="json", exclude=elsewhere, exclude_defaults=True)

    def operation(self) -> Operation:
        """How it is operated."""
        return Operation(**{name: getattr(self, name) for name in Operation.model_fields})


class Train(Stage):
    """Trains, from initialisation or from weights of a file."""

    kind: Literal["train"]
    optimizer: Optimizer = Optimizer()
    epochs: float | None = Field(
        default=None, gt=0, description="passes over the training split; left out with steps, 10"
    )
    steps: int | None = Field(default=None, ge=0, description="0: the weights stay as they begin")
    weights: str | None = Field(
        default=None,
        min_length=1,
        description="a safetensors file of arrays params/PATH and state/PATH to begin from; left out, initialisation",
    )
    l1: float = Field(default=0.0, ge=0, description="adds l1 * sum |w| over the kernels to the loss")
    l2: float = Field(default=0.0, ge=0, description="adds l2 / 2 * sum w^2 over the kernels to the loss")
    store_moments: bool = Field(default=False, description="with the network, for a stage whose `moments` are kept")
    sparsify: Sparsify | None = Field(
        default=None, description="prunes while it trains; the masks come with the network"
    )

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("needs one of epochs, steps; it says both")
        return self


class Retraining(Stage, Recovery):
    """What stages say that train a network on."""

    sparsify: Sparsify | None = Field(
        default=None, description="prunes while it trains, a network without masks; the masks come with the network"
    )


class Finetune(Retraining):
    """Trains on under the masks of the network it takes."""

    kind: Literal["finetune"]


class Distill(Retraining, Teaching):
    """Trains on, as `finetune` does, towards what a teacher answers."""

    kind: Literal["distill"]


class Prunable(Frozen):
    """What dies together, and where nothing may."""

    granularity: Granularity = Field(
        default="weight",
        description="what dies together; 'n:m': n are kept of each m weights along the inputs, "
        "{n_m: 'n:m', axis: a}: along an axis, both without a target; "
        "block: r inputs x c outputs; kernel: all positions of a convolution; neuron: all inputs of an output; "
        "group: what the network's wiring ties; layer: a residual branch as a whole; `compact` can take both away",
        examples=["weight", "2:4", {"n_m": "2:4", "axis": -1}, {"block": [4, 1]}, "kernel", "neuron", "group", "layer"],
    )
    kinds: tuple[Literal["neuron", "channel", "head", "head_dim", "width", "feature"], ...] = Field(
        default=(), description="groups of these kinds alone; left out, all"
    )
    exclude: tuple[str, ...] = Field(default=(), description="patterns of parameters that stay dense: `output/*`")
    spare: Spare = ()


class Score(Stage, Prunable):
    """Scores every prunable unit."""

    kind: Literal["score"]
    criterion: Criterion


class Allocation(Frozen):
    """Where how many die."""

    scope: Literal["global", "layer", "erk", "lamp", "output", "isomorphic"] | dict[str, Fraction] = Field(
        default="global",
        description="within which set scores compete; a table {pattern: sparsity} sets each layer's own; "
        "lamp: by their share s^2 / (sum of the squares not smaller in the layer) all compete; "
        "output: the inputs of each output; isomorphic: groups that do the same in different places",
    )
    target: Target | None = Field(default=None, description="how many die; left out with a table and with n:m")
    min_keep: int = Field(default=0, ge=0, description="so many units of each layer survive whatever their scores")
    round_to: int = Field(default=1, ge=1, description="groups keep a multiple of so many units")

    @model_validator(mode="after")
    def _scope_fits_target(self) -> Allocation:
        if isinstance(self.scope, dict):
            if self.target is not None:
                raise ValueError("a table in `scope` says how many die where; leave `target` out")
        elif self.scope == "erk" and self.target is not None and self.target.word not in {"sparsity", "keep"}:
            raise ValueError(
                f"erk shares out a number of survivors: its target is sparsity or keep, not {self.target.word}"
            )
        elif self.scope == "output" and self.target is not None and self.target.word != "sparsity":
            raise ValueError(
                f"each output loses the same share of its inputs: its target is sparsity, not {self.target.word}"
            )
        elif self.scope == "output" and self.min_keep:
            raise mistake("min_keep", "counts a layer's units, but scope output an output's; leave it out")
        return self


_BUDGETS = ("sparsity", "params", "macs", "latency")
_WIRED = ("group", "layer")
_SCOPES = {
    "group": ("global", "layer", "isomorphic"),
    "layer": ("global",),
    **dict.fromkeys(("weight", "kernel"), ("global", "layer", "erk", "lamp", "output")),
}
_TARGETS = {"group": _BUDGETS, "layer": _BUDGETS}


def check_units(stage: Allocation, written: Any, where: str = "") -> None:
    """Refuses scopes and targets that do not go with what dies together."""
    granularity = read_granularity(written)
    if granularity.fixed:
        for field in ("target", "scope", "min_keep"):
            if getattr(stage, field) != Allocation.model_fields[field].default:
                raise mistake(f"{where}{field}", granularity.alone(f"`{field}`"))
        return
    if stage.target is None and not isinstance(stage.scope, dict):
        message = "needs `target`, such as {sparsity: 0.9}, unless `scope` is a table {pattern: sparsity}"
        raise mistake(where.rstrip("."), message) if where else ValueError(message)
    scopes = _SCOPES.get(granularity.family, ("global", "layer", "erk", "lamp"))
    words = _TARGETS.get(granularity.family, ("sparsity", "keep", "threshold", "statistic", "percentile"))
    shown = stage.scope if isinstance(stage.scope, str) else "a table"
    if shown not in scopes and not (isinstance(stage.scope, dict) and granularity.family not in _WIRED):
        message = f"{shown} does not go with granularity {granularity} (allowed: {', '.join(scopes)})"
        raise mistake(f"{where}scope", message)
    word = stage.target.word if stage.target else words[0]
    if word not in words:
        message = f"does not go with granularity {granularity} (allowed: {', '.join(words)})"
        raise mistake(f"{where}target.{word}", message)


def untargeted(written: Any) -> str:
    """What says how many die where there is no target: n:m itself, or a table."""
    granularity = read_granularity(written)
    return str(granularity) if granularity.fixed else "table"


class Correction(Frozen):
    """What makes up for what dies."""

    correct_bias_batches: int | None = Field(
        default=None,
        ge=1,
        description="biases take over the mean of what died, over so many batches of the training split "
        "(after Nagel et al. 2019, arXiv:1906.04721)",
    )


class Mask(Stage, Allocation, Correction):
    """Masks the lowest scores."""

    kind: Literal["mask"]
    spare: Spare = ()


class Prune(Stage, Prunable, Allocation, Correction):
    """Rounds of score, mask, fine-tune."""

    kind: Literal["prune"]
    criterion: Criterion
    schedule: Schedule = OneShot(kind="one_shot")
    finetune: RoundRecovery | None = None
    guard: Guard | None = None
    search: Search | None = None

    @model_validator(mode="after")
    def _target_fits_units(self) -> Prune:
        check_units(self, self.granularity)
        return self

    @model_validator(mode="after")
    def _rounds_have_levels(self) -> Prune:
        word = self.target.word if self.target else untargeted(self.granularity)
        if self.schedule.kind == "iterative" and self.schedule.rounds > 1 and word not in {"sparsity", "keep"}:
            raise ValueError(
                f"an iterative schedule climbs to a sparsity: its target is sparsity or keep, not {word}; "
                "write `schedule: {kind: one_shot}`"
            )
        if self.search is not None:
            if word not in {"threshold", "sparsity", "percentile"}:
                raise ValueError(f"search tries values of threshold, sparsity or percentile, not of {word}")
            if self.schedule.kind != "one_shot":
                raise ValueError("search goes with `schedule: {kind: one_shot}`")
            for amount in self.search.amounts:
                _check_amount(word, amount)
            if self.finetune and self.finetune.distill and self.finetune.distill.teacher:
                message = (
                    "has seen what the folds of `search` hold out; leave it out: each fold learns from its training"
                )
                raise mistake("finetune.distill.teacher", message)
        if self.guard is not None and self.guard.breach.action == "back_off" and word != "sparsity":
            raise mistake("guard.breach.action", f"bisects a sparsity, but the target is {word}; write stop or fail")
        return self


def _check_amount(word: str, amount: float) -> None:
    """Refuses an amount to try that the target itself would refuse."""
    possible = {"sparsity": 0 <= amount < 1, "percentile": 0 < amount < 100}.get(word, True)
    if not possible:
        allowed = {"sparsity": "at least 0 and below 1", "percentile": "above 0 and below 100"}[word]
        raise mistake("search.amounts", f"{amount:g} cannot be a {word}, which must be {allowed}")


class Compact(Stage):
    """Takes dead units away: smaller arrays and a smaller function that compute the same."""

    kind: Literal["compact"]
    reestimate_batches: int | None = Field(
        default=None, ge=1, description="batch-norm statistics anew, from so many batches of the training split"
    )


EXPORTS: tuple[Literal["stablehlo", "safetensors"], ...] = ("stablehlo", "safetensors")


class Export(Stage):
    """Writes the network to files that need none of its code."""

    kind: Literal["export"]
    formats: tuple[Literal["stablehlo", "safetensors", "packed", "onnx"], ...] = Field(
        default=EXPORTS,
        min_length=1,
        description="stablehlo: a program with its weights, for any batch size; safetensors: the arrays alone; packed: "
        "the same, sparse ones as bits and values; onnx: as stablehlo, for other runtimes (needs the extra `onnx`)",
    )


class Latency(Frozen):
    """Which batches are timed."""

    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 64), min_length=1)


class Evaluate(Stage):
    """Measures networks on the untouched test split, side by side with the dense one."""

    kind: Literal["evaluate"]
    of: str | tuple[str, ...] | None = Field(default=None, description="the networks; left out, the stage above")  # type: ignore[assignment]
    latency: Latency | None = Field(default=Latency(), description="null: nothing is timed")

    @field_validator("of")
    @classmethod
    def _of_names_networks(cls, of: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if of == ():
            raise ValueError("names no network; leave it out to take the stage above")
        return of

    @property
    def parents(self) -> tuple[str, ...]:
        """The networks it names."""
        if self.after:
            return (self.after,)
        return (self.of,) if isinstance(self.of, str) else tuple(self.of or ())


class Gate(Stage, Limits):
    """Fails the run if a network does not keep to its limits on the untouched test split."""

    kind: Literal["gate"]
    against: str | None = Field(default=None, description="what limits compare with; left out, the dense training")

    def settings(self) -> dict[str, Any]:
        """What goes into the key; of `against`, that stage's own key does."""
        return {name: value for name, value in super().settings().items() if name != "against"}

    @model_validator(mode="after")
    def _limits_something(self) -> Gate:
        if all(getattr(self, name) is None for name in LIMITS):
            raise ValueError(f"limits nothing; say one of {', '.join(LIMITS)}")
        if self.against and not self.relative:
            raise mistake("against", "is compared with nothing; add `max_drop`, or a budget such as {times: 0.5}")
        return self


AnyStage = Annotated[
    Train | Score | Mask | Finetune | Distill | Prune | Compact | Export | Evaluate | Gate, Field(discriminator="kind")
]


class Recipe(Frozen):
    """What is wanted: data, model, objective and the stages from training to evaluation."""

    name: Name
    description: str = ""
    seed: int = Field(default=0, ge=0, lt=2**31)
    data: Data
    model: Model
    objective: str = Field(
        default="classification",
        description="classification, regression, reconstruction, or `module:loss`",
        examples=["classification", "regression", "reconstruction", "my_pkg.losses:loss"],
    )
    devices: Devices | None = Field(
        default=None,
        description="how training is spread over devices; left out, batches over all of the machine's, if these divide "
        "them",
        examples=[{"data": 4, "model": 2}],
    )
    stages: dict[Name, AnyStage] = Field(min_length=1)
    matrix: Matrix | None = Field(default=None, description="{dotted.path: [values]}: one recipe for each combination")

    @model_validator(mode="before")
    @classmethod
    def _is_no_more_than_a_recipe(cls, data: Any, info: ValidationInfo) -> Any:
        if isinstance(data, Mapping) and info.context is not A_ROW:
            check_bounds(data)
        return data

    @field_validator("stages", mode="before")
    @classmethod
    def _stages_have_names(cls, stages: Any) -> Any:
        for name in stages if isinstance(stages, dict) else ():
            if not isinstance(name, str):
                raise ValueError(
                    f"{name!r} cannot be a stage's name: YAML takes on, off, yes, no, null and numbers for values; "
                    'put the name in quotes, such as "on"'
                )
        return stages

    @field_validator("stages")
    @classmethod
    def _stages_follow_stages(cls, stages: dict[str, Any]) -> dict[str, Any]:
        check_wiring(stages)
        wiring = parents_of(stages)
        for name, stage in stages.items():
            if isinstance(stage, Mask):
                check_units(stage, stages[wiring[name][0]].granularity, f"{name}.")
        check_moments(stages, wiring)
        for name, stage in stages.items():
            if stage.kind in TUNED and stage.sparsify and (masked := _masked_by(wiring[name][0], stages, wiring)):
                message = f"{masked} has masked the network already; take one without masks, such as a train stage's"
                raise mistake(f"{name}.sparsify", message)
        return stages

    @model_validator(mode="after")
    def _devices_divide_batches(self) -> Recipe:
        if self.devices and self.data.batch_size % self.devices.data:
            raise mistake(
                "devices.data",
                f"does not divide the batches of {self.data.batch_size} examples (`data.batch_size`); choose a divisor",
            )
        return self

    @model_validator(mode="after")
    def _rows_can_be_planned(self) -> Recipe:
        check_rows(stage.matrix or {} for stage in (self, *self.stages.values()))
        return self

    @model_validator(mode="after")
    def _temperatures_have_softmaxes(self) -> Recipe:
        for name, stage in self.stages.items():
            teaching: Teaching | None
            teaching, where = (stage, name) if isinstance(stage, Distill) else (None, name)
            if isinstance(stage, Prune) and stage.finetune:
                teaching, where = stage.finetune.distill, f"{name}.finetune.distill"
            if teaching and teaching.temperature and self.objective in {"regression", "reconstruction"}:
                message = f"is one of class probabilities, but {self.objective} answers numbers; leave it out"
                raise mistake(f"stages.{where}.temperature", message)
        return self


def _masked_by(name: str, stages: dict[str, Any], wiring: dict[str, tuple[str, ...]]) -> str | None:
    """The stage under whose masks the network of a stage may be."""
    stage = stages[name]
    if stage.kind in {"mask", "prune"} or getattr(stage, "sparsify", None):
        return name
    return None if stage.kind in {"train", "compact"} else _masked_by(wiring[name][0], stages, wiring)
