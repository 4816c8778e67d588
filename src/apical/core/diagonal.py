"""Gains, offsets and norms that a user wrote: modules in which each number of a parameter belongs to one unit.

Such a module holds no weight between two populations, as no layer norm does. It is known by trying: on noise, a change of
some numbers of a vector moves the outputs of these units alone.
"""

import copy
from collections.abc import Iterator
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

Kind = Literal["norm", "gain", ""]

_known: WeakKeyDictionary[nn.Module, Kind] = WeakKeyDictionary()


def diagonal_kind(module: nn.Module) -> Kind:
    """What a module of a user is, whose parameters are vectors alone, each number of which acts on its own unit alone.

    "norm" where the output does not depend on the size of the input, else "gain"; "" for any other module.

    >>> class RMSNorm(nn.Module):
    ...     def __init__(self, n):
    ...         super().__init__()
    ...         self.gain = nn.Parameter(torch.ones(n))
    ...     def forward(self, x):
    ...         return self.gain * x / x.square().mean(-1, keepdim=True).sqrt()
    >>> diagonal_kind(RMSNorm(5))
    'norm'
    """
    if module not in _known:
        kinds = map(lambda places: _tried(module, places), ((), (2, 2))) if _has_vectors_alone(module) else ()
        _known[module] = next(filter(None, kinds), "")
    return _known[module]


def _has_vectors_alone(module: nn.Module) -> bool:
    own = list(module.parameters())
    if type(module).__module__.startswith("torch.nn") or next(module.children(), None) is not None or not own:
        return False
    if any(isinstance(p, UninitializedParameter) or p.is_meta or not p.is_floating_point() for p in own):
        return False
    return len({p.shape for p in own}) == 1 and own[0].dim() == 1 and len(own[0]) > 1


def _tried(module: nn.Module, places: tuple[int, ...]) -> Kind:
    """Its kind on noise (2, units, *places); "" where the module does not take that."""
    like = next(module.parameters())
    noise = torch.randn(2, len(like), *places, generator=torch.Generator().manual_seed(0), device="cpu").to(like)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            twin = copy.deepcopy(module).eval()
            before = twin(noise)
            if not isinstance(before, Tensor) or before.shape != noise.shape or not torch.equal(twin(noise), before):
                return ""
            if not all(_touches_its_own(twin, parameter, noise, before) for parameter in twin.parameters()):
                return ""
            return "norm" if torch.allclose(twin(4 * noise), before, rtol=0.02, atol=0.02) else "gain"
    except Exception:
        return ""  # whatever it is made for, it is not this


def _touches_its_own(twin: nn.Module, parameter: nn.Parameter, noise: Tensor, before: Tensor) -> bool:
    kept = parameter.detach().clone()
    for mask in _halves(len(kept), kept.device):
        parameter.copy_(torch.where(mask, kept + 0.5, kept))
        moved = (twin(noise) != before).transpose(0, 1).flatten(1).any(1)
        if bool((moved & ~mask).any()) or not bool(moved.any()):
            return False
    parameter.copy_(kept)
    return True


def _halves(n: int, device: torch.device) -> Iterator[Tensor]:
    """Sets of units such that of any two, in either order, one set holds the first and not the second."""
    units = torch.arange(n, device=device)
    for bit in range((n - 1).bit_length()):
        yield units >> bit & 1 == 1
        yield units >> bit & 1 == 0
