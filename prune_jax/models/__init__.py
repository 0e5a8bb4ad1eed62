"""Models by name, or by `module:object`, as pure functions: the one room that knows Flax."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from prune_jax.arguments import check_arguments, parameters
from prune_jax.errors import UserMistake
from prune_jax.models.convolutional import Cnn, ResNet
from prune_jax.models.dense import Autoencoder, Linear, Mlp
from prune_jax.models.from_functions import from_functions
from prune_jax.models.from_linen import from_linen
from prune_jax.models.from_nnx import from_nnx
from prune_jax.models.network import Network, Variables
from prune_jax.models.sequences import Rnn, Transformer
from prune_jax.registry import Registry, load_object

__all__ = ["MODELS", "Network", "Variables", "build"]

_BUILT_IN: Mapping[str, Any] = {
    "linear": Linear,
    "mlp": Mlp,
    "cnn": Cnn,
    "resnet": ResNet,
    "autoencoder": Autoencoder,
    "rnn": Rnn,
    "transformer": Transformer,
}
MODELS: Registry[Any] = Registry("model", "prune_jax.models")
for _name, _module in _BUILT_IN.items():
    MODELS.add(_name, _module)


def build(kind: str, args: Mapping[str, Any], *, inputs: tuple[jax.ShapeDtypeStruct, ...], outputs: int) -> Network:
    """Makes the network that a recipe names.

    A model is an NNX class, a Linen class or instance, or a function that answers either, or two functions, `init`
    and `apply`. It is called with `args`; NNX models also with `rngs`; and with `inputs` (shape of one sample, a
    tuple) and `outputs` (a number) if it takes arguments of these names which `args` leave open. The network is
    traced once, without computing anything.

    Args:
        kind: a registered name, or `"module:object"`.
        args: what the recipe says about the model.
        inputs: `(x,)` or `(x, lengths)`, each with a batch axis of size 1.
        outputs: number of classes, or width of the answer.

    Raises:
        UserMistake: the model is not known, its arguments are wrong, or it does not take these inputs.
    """
    factory = load_object(kind) if ":" in kind else MODELS[kind]
    try:
        if kind in _BUILT_IN:
            _check_tokens(args, integers=jnp.issubdtype(inputs[0].dtype, jnp.integer))
        network = _adapt(factory, args, inputs, outputs)
        answer = jax.eval_shape(lambda key: _first_outputs(network, key, inputs), jax.random.key(0))
    except UserMistake as mistake:
        raise UserMistake(f"model {kind!r}: {mistake}") from mistake.__cause__
    except Exception as error:  # whatever a user's module raises: it would raise it again
        if kind in _BUILT_IN:
            raise
        shapes = ", ".join(f"{x.dtype.name}{[None, *x.shape[1:]]}".replace("None", "batch") for x in inputs)
        raise UserMistake(
            f"model {kind!r} with {dict(args)} does not take inputs {shapes}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(answer, jax.ShapeDtypeStruct):
        raise UserMistake(
            f"model {kind!r} answers a value of type {type(answer).__name__}; it must answer one array, its outputs"
        )
    return network


def _adapt(factory: Any, args: Mapping[str, Any], inputs: tuple[jax.ShapeDtypeStruct, ...], outputs: int) -> Network:
    if isinstance(factory, nnx.Module):
        raise UserMistake("is an NNX module already made; name its class, or a function of `rngs` that makes it")
    if isinstance(factory, linen.Module):
        if args:
            raise UserMistake(f"is a Linen module already made: it takes no arguments, found {', '.join(args)}")
        return from_linen(factory, inputs)
    if not callable(factory):
        raise UserMistake(f"is of type {type(factory).__name__}, neither a Flax module nor a function that answers one")
    taken = parameters(factory)
    open_ = {"inputs": tuple(inputs[0].shape[1:]), "outputs": outputs}
    given = {name: value for name, value in open_.items() if name in taken and name not in args}
    is_linen = inspect.isclass(factory) and issubclass(factory, linen.Module)
    check_arguments(factory, args, ours={*given, "rngs", *(("name", "parent") if is_linen else ())})
    make = partial(factory, **given, **args)
    if "rngs" in taken:
        return from_nnx(lambda rngs: make(rngs=rngs), inputs)
    module = make()
    if isinstance(module, tuple) and len(module) == 2 and all(map(callable, module)):
        return from_functions(*module, inputs)
    if not isinstance(module, linen.Module):
        raise UserMistake(
            f"answers a value of type {type(module).__name__} but takes no `rngs`, so that the recipe's seed cannot "
            "reach its weights; an NNX model is made as Net(..., rngs=rngs), any other one answers two functions, "
            "init(key) -> params and apply(params, x) -> outputs"
        )
    return from_linen(module, inputs)


def _first_outputs(network: Network, key: jax.Array, inputs: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
    variables = network.init(key)
    arrays = tuple(jnp.zeros(x.shape, x.dtype) for x in inputs)
    return network.apply(variables.params, variables.state, arrays, train=False, key=None)[0]


def _check_tokens(args: Mapping[str, Any], *, integers: bool) -> None:
    if integers and args.get("vocab") is None:
        raise UserMistake(
            "x holds integers, which are tokens and need an embedding; use kind rnn or transformer and set `vocab` "
            "to the number of tokens, or make x floats"
        )
    if not integers and args.get("vocab") is not None:
        raise UserMistake("vocab is for integer tokens, but x holds floats; leave it out, or make x int32")
