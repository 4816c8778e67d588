"""A user's own models: a class or function in a file or module, or in memory, that makes an `nn.Module`."""

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
"""How names of models begin that only this process has."""

SHAPE = ("input_shape",)
FEATURES = ("in_features", "input_size")
OUTPUTS = ("num_outputs", "num_classes", "outputs", "n_classes", "out_features", "vocab_size", "vocabulary")
CONTEXT = ("block_size", "context", "context_length")
"""Parameters that are filled in: the shape of one sample, how many numbers that are, how many outputs the data need (of a
text: how many tokens there are), and the tokens of a window."""

_EXAMPLE = "my_model.py:Net"
_memory: dict[str, Callable[..., nn.Module]] = {}
_made: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def is_own(name: str) -> bool:
    """Whether a name says a model of the user's."""
    return name.startswith(IN_MEMORY) or own_code.is_code(name)


def absolute(name: str) -> str:
    """The same name, whatever the current folder."""
    return name if name.startswith(IN_MEMORY) else own_code.absolute(name)


def remember(factory: Callable[..., nn.Module]) -> str:
    """Keep what makes a model in this process; returns the name by which :func:`build` knows it.

    Raises:
        ConfigError: it is a model that has been made already, or cannot be called.
    """
    name = IN_MEMORY + getattr(factory, "__name__", type(factory).__name__).strip("<>")
    _check_factory(factory, name)
    _memory[name] = factory
    return name


def checksum(name: str) -> str:
    """Sixteen hex digits of the SHA-256 of the file that defines the model, or of the source of one in memory."""
    factory = _factory(name)
    return own_code.source_checksum(factory) if name.startswith(IN_MEMORY) else own_code.checksum(factory, name)


def build(name: str, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """The model that `name` says, made for samples of `input_shape` and so many outputs.

    Parameters of the class or function are filled in by their names: :data:`SHAPE`, :data:`FEATURES`, :data:`OUTPUTS`.

    Raises:
        ConfigError: there is no such class or function, it fails, needs something else, or makes no new module.
    """
    factory, where, seed = _factory(name), name.rpartition("/")[2], torch.initial_seed()
    try:
        with own_code.settings_kept(f"model {where}"):
            model = factory(**_given(factory, where, input_shape, outputs))
    except ApicalError:
        raise
    except (Exception, SystemExit) as error:
        path = None if name.startswith(IN_MEMORY) else own_code.file_of(name)
        raise ConfigError(f"model {where} cannot be made: {own_code.described(error, path)}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model {where} returns a value of type {type(model).__name__}, not a torch.nn.Module")
    if torch.initial_seed() != seed:
        raise ConfigError(f"model {where} calls torch.manual_seed, so that all seeds begin with equal weights; leave it out")
    if model in _made:
        raise ConfigError(f"model {where} returns the same module again; make a new one at each call, with new weights")
    _made.add(model)
    return model


def check_output(
    model: nn.Module, name: str, inputs: Tensor, outputs: int, data: str, positions: tuple[int, ...] = ()
) -> None:
    """See what the model makes of a few samples (n, ...): it must be (n, *positions, outputs). Changes nothing.

    Raises:
        ConfigError: it fails, or the shape is another; names both shapes.
    """
    where, shape = name.rpartition("/")[2], tuple(inputs.shape)
    try:
        with evaluating(model), torch.no_grad(), torch.random.fork_rng([]):
            result = model(inputs)
    except ApicalError:
        raise
    except Exception as error:
        path = None if name.startswith(IN_MEMORY) else own_code.file_of(name)
        hint = "" if inputs.is_floating_point() else "; they are whole numbers: return floats, unless the model embeds them"
        hint = "; they are tokens, which a model embeds first, as gpt-2x64 does" if positions else hint
        raise ConfigError(
            f"model {where} does not take inputs of shape {shape}, {len(inputs)} samples of {data}: "
            f"{own_code.described(error, path)}{hint}"
        ) from error
    if not isinstance(result, Tensor):
        raise ConfigError(
            f"model {where} must return one tensor; for inputs {shape} it returns a {type(result).__name__}: name a module "
            "around it whose forward returns the outputs alone"
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
                f"the model {name!r} was in the memory of the program that began this; "
                "give it again, with apical.compare(..., resume=True)"
            )
        return _memory[name]
    factory = own_code.import_from(name, "model", _EXAMPLE)
    _check_factory(factory, name)
    build: Callable[..., nn.Module] = factory
    return build


def _check_factory(factory: object, name: str) -> None:
    if isinstance(factory, nn.Module):
        raise ConfigError(
            f"model {name} is a module that has been made already: give the class, or a function that makes one, "
            "so that every seed begins with its own weights"
        )
    if not callable(factory):
        raise ConfigError(f"model {name} has type {type(factory).__name__}, no class or function that makes a module")


def _given(factory: Callable[..., Any], where: str, shape: tuple[int, ...], outputs: int) -> dict[str, Any]:
    """Arguments for the parameters that are known by name."""
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
                f"model {where} needs an argument {name!r}; give it a default, or name a function that makes the model. "
                f"Filled in are {names}"
            )
    return {name: fillings[name] for name, item in parameters.items() if name in fillings and item.kind in plain}
