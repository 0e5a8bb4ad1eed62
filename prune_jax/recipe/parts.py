"""The frozen models of what a recipe says outside its stages: data, optimizer, target, schedule, guard.

A discriminator (`kind`) never has a default: `exclude_defaults` would drop it from the key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)
from pydantic_core import PydanticCustomError

from prune_jax.errors import did_you_mean
from prune_jax.notation import read_granularity

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Reference = Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Width = Annotated[int, Field(ge=1)]


def _ends(written: Any) -> Any:
    return (written,) if isinstance(written, str) else written


def _plain(value: Any) -> Any:
    """What a field that takes anything takes: what JSON can hold, so that a key can be made of it."""
    if isinstance(value, Mapping):
        if strange := [name for name in value if not isinstance(name, str)]:
            raise ValueError(f"has the name {str(strange[0])[:60]}, which is no text; put it in quotes")
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"holds {value}; numbers are finite")
    if value is not None and not isinstance(value, str | int | float):
        raise ValueError(f"holds a value of type {type(value).__name__}; text, numbers, lists and mappings will do")
    return value


Plain = Annotated[Any, AfterValidator(_plain)]
Arguments = Annotated[dict[str, Any], AfterValidator(_plain)]

_End = Literal["first", "last"]
Spare = Annotated[
    tuple[_End, ...],
    BeforeValidator(_ends, json_schema_input_type=_End | tuple[_End, ...]),
    AfterValidator(lambda ends: tuple(sorted(set(ends)))),
    Field(
        description="layers that stay dense: of the parameters that may be pruned, the one that the network uses first "
        "or last; and all groups that hold an axis of it",
        examples=["first", ["first", "last"]],
    ),
]


def mistake(field: object, message: str) -> PydanticCustomError:
    """A mistake at `field` below the model that is being checked."""
    return PydanticCustomError("mistake", "{message}", {"field": str(field), "message": message})


class Frozen(BaseModel):
    """A part of a recipe: immutable, and unknown fields are mistakes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _only_known_fields(cls, data: Any) -> Any:
        if isinstance(data, dict):
            fields = cls.model_fields  # asked once: each asking is a search through the class's bases
            for field, value in data.items():
                if field not in fields:
                    known = ", ".join(fields)
                    raise mistake(field, f"is not a field here{did_you_mean(field, fields)} (allowed: {known})")
                if isinstance(value, bool):
                    taken = fields[field].annotation
                    if not {bool, Any} & {taken, *get_args(taken)}:  # else True were 1
                        raise mistake(field, "must not be true or false")
        return data


class Data(Frozen):
    """Where examples come from, how many are held out for validation, how many make a batch."""

    source: str = Field(
        description="a built-in set, `npz` with a path, or `module:function`",
        examples=["mnist5k", "npz", "my_pkg:load"],
    )
    path: str | None = Field(default=None, description="the file, for `source: npz`")
    args: Arguments = Field(default_factory=dict, description="arguments of the source")
    validation: Fraction = Field(default=0.1, description="share of the training split held out for decisions")
    batch_size: int = Field(default=64, ge=1)

    @model_validator(mode="after")
    def _path_belongs_to_npz(self) -> Data:
        if self.source == "npz" and self.path is None:
            raise ValueError("`source: npz` needs `path`, a file with x_train, y_train, x_test, y_test")
        if self.source != "npz" and self.path is not None:
            raise ValueError(
                f"`path` goes with `source: npz`; source is {self.source!r}, whose settings go into `args`"
            )
        return self


# What each optimizer of Optax takes beside the learning rate.
OPTIMIZERS = {
    "sgd": {"momentum", "nesterov"},
    "adam": {"b1", "b2", "eps"},
    "adamw": {"b1", "b2", "eps", "weight_decay"},
    "nadam": {"b1", "b2", "eps"},
    "rmsprop": {"decay", "eps", "momentum", "nesterov"},
    "adagrad": {"eps"},
    "lion": {"b1", "b2", "weight_decay"},
    "lamb": {"b1", "b2", "eps", "weight_decay"},
}


class Optimizer(Frozen):
    """An optimizer of Optax and its learning rate."""

    name: Literal["sgd", "adam", "adamw", "nadam", "rmsprop", "adagrad", "lion", "lamb"] = "adam"
    learning_rate: float = Field(default=1e-3, gt=0)
    decay_to: float | None = Field(default=None, ge=0, le=1, description="cosine decay to this share of the rate")
    warmup_steps: int = Field(default=0, ge=0, description="linear warm-up from 0")
    clip_norm: float | None = Field(default=None, gt=0, description="largest global norm of the gradient")
    momentum: float | None = Field(default=None, ge=0, lt=1)
    nesterov: bool | None = None
    b1: float | None = Field(default=None, ge=0, lt=1)
    b2: float | None = Field(default=None, ge=0, lt=1)
    decay: float | None = Field(default=None, ge=0, lt=1)
    eps: float | None = Field(default=None, gt=0)
    weight_decay: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _optimizer_takes_it(self) -> Optimizer:
        surplus = self.hyperparameters().keys() - OPTIMIZERS[self.name]
        if surplus:
            takers = [n for n, takes in OPTIMIZERS.items() if surplus <= takes]
            raise ValueError(
                f"{self.name} takes no {', '.join(sorted(surplus))} "
                f"(it takes {', '.join(sorted(OPTIMIZERS[self.name]))}; taken by: {', '.join(takers) or 'none'})"
            )
        return self

    def hyperparameters(self) -> dict[str, Any]:
        """What was set beside the learning rate, by the names that Optax uses."""
        names = ("momentum", "nesterov", "b1", "b2", "decay", "eps", "weight_decay")
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}


class Perturbation(Frozen):
    """What is done to the inputs of the batches that score (Sehwag et al. 2020, arXiv:2002.10509)."""

    kind: Literal["fgsm", "pgd", "gaussian"]
    epsilon: float = Field(gt=0, description="how far inputs move, in their own units; of gaussian, the deviation")
    steps: int = Field(default=7, ge=1, description="of pgd")


def _or_its_name(schema: dict[str, Any]) -> None:
    """A criterion's JSON schema, beside which its bare name will do."""
    whole = dict(schema)
    schema.clear()
    schema |= {"title": "Criterion", "anyOf": [{"type": "string", "title": "Name"}, whole]}


class Criterion(Frozen):
    """What makes a score."""

    model_config = ConfigDict(json_schema_extra=_or_its_name)

    name: str = Field(description="see `prune-jax methods`", examples=["magnitude", "taylor"])
    options: Arguments = Field(default_factory=dict)
    combine: Literal["sum", "mean", "l1", "l2", "max"] | None = Field(
        default=None, description="what is made of the scores of a unit's weights; left out, what the criterion says"
    )
    batches: int | None = Field(default=None, ge=1, description="score on so many batches; left out, on all")
    perturbation: Perturbation | None = Field(default=None, description="of the inputs; left out, none")

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, data: Any) -> Any:
        return {"name": data} if isinstance(data, str) else data


def _readable(written: Any) -> Any:
    read_granularity(written)
    return written


Granularity = Annotated[
    Literal["weight", "kernel", "neuron", "group", "layer"]
    | Annotated[str, Field(pattern=r"^[1-9]\d*:[1-9]\d*$")]
    | Annotated[dict[Literal["n_m", "axis"], str | int], Field(min_length=1)]
    | Annotated[dict[Literal["block"], Annotated[list[Width], Field(min_length=2, max_length=2)]], Field(min_length=1)],
    BeforeValidator(_readable),
]


class Target(Frozen):
    """How many die: exactly one of these."""

    sparsity: float | None = Field(default=None, description="fraction pruned, in [0, 1)")
    keep: int | None = Field(default=None, ge=1, description="so many survive")
    threshold: float | None = Field(default=None, description="scores below die")
    statistic: Literal["mean", "median"] | None = Field(default=None, description="scores below it die")
    percentile: float | None = Field(default=None, gt=0, lt=100, description="scores below it die")
    params: float | None = Field(default=None, gt=0, le=1, description="groups: so large a share of parameters is left")
    macs: float | None = Field(default=None, gt=0, le=1, description="groups: so large a share of MACs is left")
    latency: float | None = Field(
        default=None, gt=0, le=1, description="groups: it takes so large a share of the time, measured here at batch 1"
    )

    @model_validator(mode="after")
    def _one_and_possible(self) -> Target:
        given = [n for n in Target.model_fields if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(
                f"says {' and '.join(given) or 'nothing'} but needs exactly one of {', '.join(Target.model_fields)}"
            )
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise mistake("sparsity", _sparsity_mistake(self.sparsity))
        return self

    @property
    def word(self) -> str:
        """The one that was given: `sparsity`, `keep`, ..."""
        return next(n for n in Target.model_fields if getattr(self, n) is not None)

    @property
    def amount(self) -> Any:
        """Its value."""
        return getattr(self, self.word)


def _sparsity_mistake(value: float) -> str:
    hint = f"; sparsity is a fraction, did you mean {value / 100:g}?" if 1 < value < 100 else ""
    return f"must be at least 0 and below 1{hint}"


class OneShot(Frozen):
    """All at once."""

    kind: Literal["one_shot"]


class Iterative(Frozen):
    """Rounds of score, mask, fine-tune. Geometric: each round the same share of the living dies (Frankle 2019)."""

    kind: Literal["iterative"]
    rounds: int = Field(default=5, ge=1, le=1000)
    levels: Literal["geometric", "cubic"] = "geometric"


Schedule = Annotated[OneShot | Iterative, Field(discriminator="kind")]


class Breach(Frozen):
    """What follows when the guard's limit is crossed."""

    action: Literal["stop", "back_off", "fail"] = Field(
        default="stop",
        description="stop: keep the last good round; back_off: bisect towards it, where the target is a sparsity; "
        "fail: the stage fails",
    )
    tries: int = Field(default=3, ge=1, le=20, description="bisections of back_off")


class Guard(Frozen):
    """A limit on what pruning may cost on the validation split."""

    metric: str = Field(default="accuracy", description="a metric of the objective, or loss")
    max_drop: float = Field(ge=0, description="largest loss of the metric against the dense network, absolute")
    breach: Breach = Breach()


class RewindStep(Frozen):
    """A step of the training."""

    step: int = Field(ge=0)


class Rewind(Frozen):
    """What is as it was at a step of the training: the weights, or the learning rate alone."""

    step: int | None = Field(default=None, ge=0, description="weights as they were after so many training steps")
    learning_rate: RewindStep | None = Field(
        default=None,
        description="weights stay; the training is repeated from there to its end, with its optimizer and its learning "
        "rates (Renda et al. 2020, arXiv:2003.02389)",
    )

    @model_validator(mode="after")
    def _one(self) -> Rewind:
        if (self.step is None) == (self.learning_rate is None):
            word = "learning_rate" if self.learning_rate else "step"
            raise mistake(word, "one of step, learning_rate is needed, and no more than one")
        return self


class Recovery(Frozen):
    """Training on under masks."""

    optimizer: Optimizer = Optimizer()
    epochs: float | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, ge=1)
    l1: float = Field(default=0.0, ge=0)
    l2: float = Field(default=0.0, ge=0)
    rewind: Literal["none", "initialisation"] | Rewind = Field(
        default="none", description="start from the weights at initialisation or at a step (Frankle 2019, 2020)"
    )
    moments: Literal["fresh", "kept"] = Field(
        default="fresh", description="kept: go on with the optimizer's moments that are stored with the network"
    )
    store_moments: bool = Field(default=False, description="with the network, for a stage whose `moments` are kept")

    @property
    def repeated_from(self) -> int | None:
        """The step from which the training's learning rates are repeated; None if they are not."""
        again = self.rewind.learning_rate if isinstance(self.rewind, Rewind) else None
        return again.step if again else None

    @model_validator(mode="after")
    def _one_length(self) -> Recovery:
        if self.repeated_from is not None:
            own = {name: Recovery.model_fields[name].default for name in ("optimizer", "epochs", "steps")}
            if given := [name for name, default in own.items() if getattr(self, name) != default]:
                raise mistake(given[0], "is the training's own where `rewind` repeats its learning rates; leave it out")
        elif (self.epochs is None) == (self.steps is None):
            raise ValueError("needs exactly one of epochs, steps")
        return self

    @model_validator(mode="after")
    def _moments_belong_to_weights(self) -> Recovery:
        if self.moments == "kept" and self.rewind != "none" and self.repeated_from is None:
            raise mistake("moments", "belong to the weights that `rewind` replaces: leave one of the two out")
        return self


class Teaching(Frozen):
    """What a network learns from another one beside the labels (Hinton et al. 2015, arXiv:1503.02531)."""

    teacher: str | None = Field(default=None, description="the stage whose network it is; left out, the dense training")
    temperature: float | None = Field(
        default=None,
        gt=0,
        description="softmax(outputs / temperature) of the two is matched; left out, 4 with objective classification, "
        "and with others the outputs themselves, by their mean squared difference",
    )
    soft: float = Field(
        default=0.9, ge=0, le=1, description="weight of the match; the objective's own loss has the rest"
    )
    features: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="{pattern of kernels: weight}: what they are multiplied with is matched too, by its mean squared "
        "difference (FitNets, Romero et al. 2015, arXiv:1412.6550)",
        examples=[{"output": 1.0}],
    )


class RoundRecovery(Recovery):
    """Training on under masks after each round of pruning."""

    distill: Teaching | None = Field(default=None, description="towards a teacher")


class Search(Frozen):
    """Grid search of the target by k-fold cross-validation: the best mean metric wins, the sparsest of equals."""

    amounts: tuple[float, ...] = Field(min_length=2, description="values of the target to try")
    folds: int = Field(default=5, ge=2, le=50)
    metric: str | None = Field(default=None, description="left out, the objective's own")
    tolerance: float = Field(default=0.0, ge=0, description="sparsest within so much of the best")


class Devices(Frozen):
    """How training is spread over the devices of a machine, or of all hosts."""

    data: int = Field(default=1, ge=1, le=2**20, description="each batch is cut into so many parts")
    model: int = Field(
        default=1,
        ge=1,
        le=2**20,
        description="each weight is cut into so many parts along its largest axis that this divides, of equal ones the "
        "last; its mask and moments alike",
    )


class Operation(Frozen):
    """How a stage is operated; nothing of it changes what the stage computes."""

    retries: int = Field(default=2, ge=0, le=100, description="tries after a fault; a user's mistake is not retried")
    timeout_seconds: float | None = Field(default=None, gt=0)
    checkpoint_seconds: float = Field(default=20.0, ge=0, description="at least so long between step checkpoints")
