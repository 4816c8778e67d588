"""Modules that hold several weights and apply them within one call: attention, recurrent networks, a user's own.

Each weight is a :class:`Part`, which stands where rules expect a layer. A matrix whose rows are several populations
(queries, keys and values; gates) has as many row blocks, each initialised as a separate layer, so that a
fused and a separate parametrisation are the same rule.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNBase

from apical.core.layers import PACKED
from apical.core.transport import GEOMETRIES, Geometry, dense
from apical.errors import ConfigError, UnsupportedModelError


class Part:
    """One weight of a packed module.

    Args:
        module: who holds the parameter; the packed module, or one inside.
        parameter: its name there.
        owner: the packed module, whose call applies the weight.
        blocks: how many populations its rows are.
        recurrent: leads from one moment to the next.
        whole: no error leaves the packed module's call by its inputs but through this weight.
    """

    def __init__(
        self,
        module: nn.Module,
        parameter: str,
        owner: nn.Module,
        blocks: int = 1,
        recurrent: bool = False,
        whole: bool = False,
    ) -> None:
        self.module, self.parameter, self.owner = module, parameter, owner
        self.blocks, self.recurrent, self.whole = blocks, recurrent, whole

    @property
    def weight(self) -> nn.Parameter:
        """Return the parameter, or what replaces it now."""
        weight: nn.Parameter = getattr(self.module, self.parameter)
        return weight

    @property
    def _parameters(self) -> dict[str, Any]:
        """As a layer has them; empty where the parameter was replaced by a function of others."""
        held = self.module._parameters
        return {"weight": held[self.parameter]} if self.parameter in held else {}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return the weight."""
        yield "weight", self.weight

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the weight."""
        yield self.weight


GEOMETRIES[Part] = dense


def caller(layer: Any) -> nn.Module:
    """Return the module whose call applies the layer's weight: the layer itself, but for a part."""
    module: nn.Module = layer.owner if isinstance(layer, Part) else layer
    return module


def refuse_compiled(rule: str, names: Collection[str]) -> None:
    """Refuse recurrent modules in a compiled graph; PyTorch's compiler supports none.

    Without `fullgraph=True` the compiler leaves this part of the rule uncompiled.

    Args:
        rule: name of the rule's class.
        names: of the recurrent modules.

    Raises:
        UnsupportedModelError: names them.
    """
    if names and torch.compiler.is_compiling():
        raise UnsupportedModelError(
            f"{', '.join(map(repr, names))} cannot be compiled under {rule}: torch.compile takes no nn.RNN, nn.GRU or "
            "nn.LSTM; leave out fullgraph=True, or write the recurrence with a cell"
        )


def row_blocks(layer: Any) -> int:
    """Return how many populations the rows of a layer's weight are."""
    return layer.blocks if isinstance(layer, Part) else 1


def xavier_(tensor: Tensor, layer: Any, generator: torch.Generator | None = None) -> Tensor:
    """Draw from the Xavier uniform law of each of the layer's row blocks, in place."""
    for block in tensor.chunk(row_blocks(layer)):
        nn.init.xavier_uniform_(block, generator=generator)
    return tensor


def parts_of(module: nn.Module) -> dict[str, Part]:
    """Return the weights of a packed module, by their names within it.

    >>> {name: part.blocks for name, part in parts_of(nn.MultiheadAttention(4, 2)).items()}
    {'in_proj': 3, 'out_proj': 1}
    >>> {name: part.blocks for name, part in parts_of(nn.GRU(3, 5)).items()}
    {'weight_ih_l0': 3, 'weight_hh_l0': 3}
    """
    if isinstance(module, nn.MultiheadAttention):
        inner = {"in_proj": Part(module, "in_proj_weight", module, 3, whole=True)}
        if module.in_proj_weight is None:
            inner = {f"{kind}_proj": Part(module, f"{kind}_proj_weight", module) for kind in "qkv"}
        return inner | {"out_proj": Part(module.out_proj, "weight", module, whole=True)}
    kind = next(kind for kind in type(module).__mro__ if kind in PACKED)
    gates = {"LSTM": 4, "GRU": 3}.get(kind.__name__.removesuffix("Cell"), 1)
    names = [name for name in parameter_names(module) if name.startswith("weight")]
    both = getattr(module, "bidirectional", False)
    return {
        name: Part(
            module,
            name,
            module,
            1 if "_hr" in name else gates,
            recurrent="_hh" in name,
            whole="_ih" in name and not both,
        )
        for name in names
    }


def parameter_names(module: nn.Module) -> list[str]:
    """Return the names of the parameters that a packed module itself may have; any other was added."""
    if isinstance(module, nn.MultiheadAttention):
        return [*(f"{kind}_proj_weight" for kind in ("in", "q", "k", "v")), "in_proj_bias", "bias_k", "bias_v"]
    if isinstance(module, RNNBase):
        return list(module._flat_weights_names)
    return ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]


def full_name(owner: str, part: str) -> str:
    """Return the name of a part in a model.

    >>> full_name("blocks.0.attn", "in_proj"), full_name("", "weight_ih_l0")
    ('blocks.0.attn.in_proj', 'weight_ih_l0')
    """
    return f"{owner}.{part}" if owner else part


def own_parts(model: nn.Module, sites: Collection[str]) -> dict[str, Part]:
    """Return the parameters of a user's modules that get feedback where their module uses them, by full name.

    Raises:
        ConfigError: no such parameter, or not a matrix.
    """
    parts = {}
    for name in sites:
        owner, _, parameter = name.rpartition(".")
        try:
            module = model.get_submodule(owner)
            weight = module._parameters.get(parameter)
        except AttributeError:
            weight = None
        if weight is None:
            raise ConfigError(f"sites names {name!r}, but the model has no such parameter")
        if weight.dim() != 2:
            raise ConfigError(f"sites names {name!r}, which is no matrix (n_out, n_in) but has shape {tuple(weight.shape)}")
        while isinstance(called := model.get_submodule(owner), nn.ParameterList | nn.ParameterDict):
            owner = owner.rpartition(".")[0]  # these are never called
        parts[name] = Part(module, parameter, called)
    return parts


def block_of(compute: Callable[..., Tensor], block: int, blocks: int, shape: Geometry | None, *tensors: Tensor) -> Tensor:
    """Return a block of rows of a feedback weight."""
    return compute(shape, *tensors).chunk(blocks)[block]
