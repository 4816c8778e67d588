"""Which modules of a model a rule treats as layers, found and validated before anything is changed."""

from collections.abc import Collection
from typing import TypeAlias

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter

from apical.core.sigmoids import DoubleSiLU, HalfClip, ShiftedSigmoid
from apical.errors import UnsupportedModelError

Layer: TypeAlias = nn.Linear | _ConvNd

"""Layers with a weight between two populations: these are what credit-assignment rules differ in."""

LOCAL = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU, nn.Embedding, nn.EmbeddingBag)
"""Layers without such a weight: scales, shifts, slopes, look-ups. They always keep their exact derivative."""

ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.LogSigmoid),
    *(nn.Tanhshrink, nn.Hardshrink, nn.Softshrink, nn.Threshold, nn.Softmax),
    *(ShiftedSigmoid, DoubleSiLU, HalfClip),
)
"""Element-wise nonlinearities at whose output a unit ends."""


def key(name: str) -> str:
    """Module name as a key of a buffer or submodule: dots are not allowed there, and the root has no name.

    >>> key("layer1.0.conv1"), key("")
    ('layer1/0/conv1', 'model')
    """
    return name.replace(".", "/") or "model"


def weighted_layers(model: nn.Module, exact: Collection[str] = ()) -> dict[str, Layer]:
    """All weighted layers of the model by name, in registration order.

    Args:
        model: the network; it is only read.
        exact: names of modules or parameters that shall keep their exact derivative although no rule knows them.

    Raises:
        UnsupportedModelError: a module used under two names, a parameter shared by two modules, an orphan parameter,
            an unknown layer with parameters, a lazy layer, an unknown name in `exact`, or no weighted layer at all.
    """
    _check_names(model, exact)
    layers: dict[str, Layer] = {}
    seen: dict[int, str] = {}
    owner: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        where = f"module {name!r}" if name else "the model itself"
        own = dict(module.named_parameters(recurse=False))
        if next(module.parameters(), None) is not None and seen.setdefault(id(module), name) != name:
            raise UnsupportedModelError(
                f"{where} is the same object as module {seen[id(module)]!r}; give each place its own module"
            )
        if any(name == e or name.startswith(f"{e}.") for e in exact):
            continue
        for parameter_name, parameter in own.items():
            full = f"{name}.{parameter_name}" if name else parameter_name
            if isinstance(parameter, UninitializedParameter):
                raise UnsupportedModelError(f"{where} is lazy: run one batch through the model before making the rule")
            if full not in exact and owner.setdefault(id(parameter), full) != full:
                raise UnsupportedModelError(
                    f"parameter {full!r} is shared with {owner[id(parameter)]!r}; untie them: copy one to its own tensor"
                )
        own = {p: q for p, q in own.items() if (f"{name}.{p}" if name else p) not in exact}
        if isinstance(module, nn.Linear | _ConvNd):
            layers[name] = module
        elif own and not isinstance(module, LOCAL):
            raise _unknown(name, module, next(iter(own)))
    if not layers:
        raise UnsupportedModelError(f"{type(model).__name__} has no Linear or convolution layer to assign credit to")
    return layers


def _check_names(model: nn.Module, exact: Collection[str]) -> None:
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    known |= {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in exact:
        if name not in known:
            raise UnsupportedModelError(f"exact names {name!r}, but the model has no such module or parameter")


def _unknown(name: str, module: nn.Module, parameter: str) -> UnsupportedModelError:
    full = f"{name}.{parameter}" if name else parameter
    if type(module).__module__.startswith("torch.nn"):
        return UnsupportedModelError(
            f"layer {name!r} ({type(module).__name__}) is not supported: no feedback transport is known for it; "
            f"replace it, or pass exact=({name!r},) to give it its exact derivative"
        )
    return UnsupportedModelError(
        f"parameter {full!r} is an orphan: it belongs directly to {type(module).__name__} and to no layer; "
        f"move it into a layer, or pass exact=({full!r},) to give it its exact derivative"
    )
