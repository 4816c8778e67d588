"""User-defined models: a class or function in a file, in a module or in memory that returns an `nn.Module`."""

import inspect
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from apical import own_code
from apical.core.rest import evaluating
from apical.errors import ApicalError, ConfigError

IN_MEMORY = "in-memory:"
"""Prefix of the names of models that exist only in this process."""

SHAPE = ("input_shape",)
FEATURES = ("in_features", "input_size")
OUTPUTS = ("num_outputs", "num_classes", "outputs", "n_classes", "out_features", "vocab_size", "vocabulary")
CONTEXT = ("block_size", "context", "context_length")
"""Parameters that are filled in: the shape of one sample, its number of entries, the number of outputs the data need (for
text: the vocabulary size), and the tokens per window."""

_EXAMPLE = "my_model.py:Net"
_memory: dict[str, Callable[..., nn.Module]] = {}
_made: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def is_own(name: str) -> bool:
    """Return whether a name refers to a user-defined model."""
    return name.startswith(IN_MEMORY) or own_code.is_code(name)


def absolute(name: str) -> str:
    """Return the name with an absolute path, so that it does not depend on the working directory."""
    return name if name.startswith(IN_MEMORY) else own_code.absolute(name)


def remember(factory: Callable[..., nn.Module]) -> str:
    """Register a model factory in this process; return the name under which :func:`build` finds it.

    Raises:
        ConfigError: it is an existing module instead of a factory, or cannot be called.
    """
    name = IN_MEMORY + getattr(factory, "__name__", type(factory).__name__).strip("<>")
    _check_factory(factory, name)
    _memory[name] = factory
    return name


def checksum(name: str) -> str:
    """Return 16 hex digits of the SHA-256 of the file that defines the model, or of the source of an in-memory model."""
    factory = _factory(name)
    return own_code.source_checksum(factory) if name.startswith(IN_MEMORY) else own_code.checksum(factory, name)


def build(name: str, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """Build the user's model `name` for samples of `input_shape` with the given number of outputs.

    Parameters of the class or function are filled in by name: :data:`SHAPE`, :data:`FEATURES`, :data:`OUTPUTS`.

    Raises:
        ConfigError: the class or function does not exist, fails, needs other arguments, or does not return a new module.
    """
    factory, where, seed = _factory(name), name.rpartition("/")[2], torch.initial_seed()
    try:
        with own_code.settings_kept(f"model {where}"):
            model = factory(**_given(factory, where, input_shape, outputs))
    except ApicalError:
        raise
    except (Exception, SystemExit) as error:
        path = None if name.startswith(IN_MEMORY) else own_code.file_of(name)
        raise ConfigError(f"model {where} cannot be built: {own_code.described(error, path)}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model {where} returns a value of type {type(model).__name__}, not a torch.nn.Module")
    if torch.initial_seed() != seed:
        raise ConfigError(f"model {where} calls torch.manual_seed, so all seeds would start alike; remove the call")
    if model in _made:
        raise ConfigError(f"model {where} returns the same module twice; return a new module with new weights at each call")
    _made.add(model)
    return model


def check_output(
    model: nn.Module, name: str, inputs: Tensor, outputs: int, data: str, positions: tuple[int, ...] = ()
) -> None:
    """Check that the model maps a few samples (n, ...) to (n, *positions, outputs). Changes nothing.

    Raises:
        ConfigError: the model fails, or its output has a different shape; names both shapes.
    """
    where, shape = name.rpartition("/")[2], tuple(inputs.shape)
    try:
        with evaluating(model), torch.no_grad(), torch.random.fork_rng([]):
            result = model(inputs)
    except ApicalError:
        raise
    except Exception as error:
        path = None if name.startswith(IN_MEMORY) else own_code.file_of(name)
        hint = "" if inputs.is_floating_point() else "; they are integers: return floats, unless the model embeds them"
        hint = "; they are tokens, which the model must embed first, as gpt-2x64 does" if positions else hint
        raise ConfigError(
            f"model {where} does not accept inputs of shape {shape}, {len(inputs)} samples of {data}: "
            f"{own_code.described(error, path)}{hint}"
        ) from error
    if not isinstance(result, Tensor):
        raise ConfigError(
            f"model {where} must return one tensor; for inputs {shape} it returns a {type(result).__name__}: wrap it in a "
            "module whose forward returns only the outputs"
        )
    needed = (len(inputs), *positions, outputs)
    if tuple(result.shape) != needed:
        raise ConfigError(
            f"model {where} maps inputs {shape} to {tuple(result.shape)}, but {data} needs {needed}: "
            f"{outputs} outputs for each {'token, at every position of the window' if positions else 'sample'}"
        )


def _factory(name: str) -> Callable[..., nn.Module]:
    if name.startswith(IN_MEMORY):
        if name not in _memory:
            raise ConfigError(
                f"the model {name!r} existed only in the memory of the program that started this run; "
                "pass it again to apical.compare(..., resume=True)"
            )
        return _memory[name]
    factory = own_code.import_from(name, "model", _EXAMPLE)
    _check_factory(factory, name)
    build: Callable[..., nn.Module] = factory
    return build


def _check_factory(factory: object, name: str) -> None:
    if isinstance(factory, nn.Module):
        raise ConfigError(
            f"model {name} is an existing module: pass its class, or a function that returns a new module, "
            "so that every seed starts from its own weights"
        )
    if not callable(factory):
        raise ConfigError(f"model {name} has type {type(factory).__name__}; pass a class or function that returns a module")


def _given(factory: Callable[..., Any], where: str, shape: tuple[int, ...], outputs: int) -> dict[str, Any]:
    """Return the arguments for the parameters that are filled in by name."""
    fillings: dict[str, Any] = dict.fromkeys(SHAPE, shape)
    fillings |= dict.fromkeys(FEATURES, math.prod(shape))
    fillings |= dict.fromkeys(OUTPUTS, outputs)
    fillings |= dict.fromkeys(CONTEXT, shape[0]) if len(shape) == 1 else {}
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return {}
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for name, parameter in parameters.items():
        fixed = parameter.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        if (
            parameter.default is inspect.Parameter.empty
            and not fixed
            and (name not in fillings or parameter.kind not in plain)
        ):
            names = ", ".join((*SHAPE, *FEATURES[:1], *OUTPUTS[:2], "vocab_size", *CONTEXT[:1]))
            raise ConfigError(
                f"model {where} needs an argument {name!r}; give it a default, or pass a function that builds the model. "
                f"These are filled in: {names}"
            )
    return {name: fillings[name] for name, item in parameters.items() if name in fillings and item.kind in plain}
