"""The frozen models of networks: the built-in kinds with their widths and depths, and the user's own."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from prune_jax.errors import did_you_mean
from prune_jax.recipe.parts import Arguments, Fraction, Frozen, Width, mistake

MOST_LAYERS = 2000  # each is traced by itself: 1,202 are the most that He et al. trained
Layers = Annotated[int, Field(ge=1, le=MOST_LAYERS)]
Activation = Literal["relu", "tanh", "sigmoid", "gelu"]
OutputActivation = Literal["none", "relu", "tanh", "sigmoid", "gelu"]


class Linear(Frozen):
    """One dense layer."""

    kind: Literal["linear"]
    bias: bool = True


class Mlp(Frozen):
    """Dense layers of the given widths, then the output layer."""

    kind: Literal["mlp"]
    widths: tuple[Width, ...] = (300, 100)
    activation: Activation = "relu"
    output_activation: OutputActivation = "none"
    dropout: Fraction = 0.0
    batch_norm: bool = False
    bias: bool = True


class Cnn(Frozen):
    """LeNet-5: convolutions with pooling, then dense layers (LeCun et al. 1998)."""

    kind: Literal["cnn"]
    widths: tuple[Width, ...] = Field(default=(6, 16), description="channels of the convolutions")
    dense: tuple[Width, ...] = (120, 84)
    kernel: Width = 5
    padding: Literal["same", "valid"] = "same"
    activation: Activation = "relu"
    dropout: Fraction = 0.0
    batch_norm: bool = False


class Resnet(Frozen):
    """The CIFAR residual network of depth 6n + 2 (He et al. 2016, arXiv:1512.03385)."""

    kind: Literal["resnet"]
    depth: int = Field(default=20, ge=8, le=MOST_LAYERS)
    width: Width = 16

    @model_validator(mode="after")
    def _depth_is_6n_plus_2(self) -> Resnet:
        if (self.depth - 2) % 6:
            below = self.depth - (self.depth - 2) % 6
            raise ValueError(f"depth is {self.depth} but must be 6n + 2, such as {max(below, 8)} or {below + 6}")
        return self


class Autoencoder(Frozen):
    """Dense encoder and mirrored decoder around a code."""

    kind: Literal["autoencoder"]
    widths: tuple[Width, ...] = (64, 32)
    code: Width = 8
    activation: Activation = "relu"
    output_activation: OutputActivation = "none"
    dropout: Fraction = 0.0
    bias: bool = True


class Rnn(Frozen):
    """Recurrent layers over a sequence; the last real step is classified."""

    kind: Literal["rnn"]
    cell: Literal["gru", "lstm"] = "gru"
    width: Width = 64
    layers: Layers = 1
    vocab: int | None = Field(default=None, ge=1, description="number of tokens, for integer inputs")
    dropout: Fraction = 0.0


class Transformer(Frozen):
    """Encoder blocks, mean over the real steps, output layer."""

    kind: Literal["transformer"]
    dim: Width = 64
    heads: Width = 4
    layers: Layers = 2
    mlp_ratio: Width = 4
    vocab: int | None = Field(default=None, ge=1, description="number of tokens, for integer inputs")
    dropout: Fraction = 0.0

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> Transformer:
        if self.dim % self.heads:
            raise ValueError(f"dim is {self.dim} but must be a multiple of heads, {self.heads}")
        return self


class CustomModel(Frozen):
    """A Flax NNX or Linen module, or a function that answers one: `my_pkg.nets:Net`."""

    kind: str = Field(
        description="module:object, or the name of an installed plug-in",
        json_schema_extra=lambda schema: schema.update(_of_others()),
    )
    args: Arguments = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _kind_is_known(cls, data: Any) -> Any:
        kind = data.get("kind") if isinstance(data, dict) else None
        plugins = [p.name for p in entry_points(group="prune_jax.models")]
        known = [*BUILT_IN_MODELS, *plugins]
        if isinstance(kind, str) and ":" not in kind and kind not in plugins:
            message = f"is not known{did_you_mean(kind, known)} (allowed: {', '.join(known)}, or module:object)"
            raise mistake("kind", message)
        return data


BUILT_IN_MODELS = {
    "linear": Linear,
    "mlp": Mlp,
    "cnn": Cnn,
    "resnet": Resnet,
    "autoencoder": Autoencoder,
    "rnn": Rnn,
    "transformer": Transformer,
}


def _of_others() -> dict[str, Any]:
    return {"not": {"enum": list(BUILT_IN_MODELS)}}


def _model_tag(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return kind if isinstance(kind, str) and kind in BUILT_IN_MODELS else "custom"


Model = Annotated[
    Annotated[Linear, Tag("linear")]
    | Annotated[Mlp, Tag("mlp")]
    | Annotated[Cnn, Tag("cnn")]
    | Annotated[Resnet, Tag("resnet")]
    | Annotated[Autoencoder, Tag("autoencoder")]
    | Annotated[Rnn, Tag("rnn")]
    | Annotated[Transformer, Tag("transformer")]
    | Annotated[CustomModel, Tag("custom")],
    Discriminator(_model_tag),
]
