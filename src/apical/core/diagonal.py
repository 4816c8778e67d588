"""Gains, offsets and norms written by users: modules in which each entry of a parameter belongs to one unit.

Such a module has no weight between two populations, just like layer norm. It is recognised by a trial: on noise, changing
some entries of a vector changes the outputs of only these units.
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
    """A user's module whose parameters are all vectors, each number of which acts only on its own unit.

    "norm" if the output does not depend on the size of the input, else "gain"; "" for any other module.

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
        n = _units_of(module)
        first, last = ((2, n), (2, n, 2, 2), (2, n, 3), (2, n, 2, 2, 2)), ((2, 3, n), (2, 2, 2, n))
        trials = [*((shape, 1) for shape in first), *((shape, len(shape) - 1) for shape in last)] if n else []
        kinds = (_tried(module, shape, axis) for shape, axis in trials)
        _known[module] = next(filter(None, kinds), "")
    return _known[module]


# a graph would guard the dictionary, which changes when modules are freed; the compiler looks for this attribute
diagonal_kind._torchdynamo_disable = True  # type: ignore[attr-defined]


def _units_of(module: nn.Module) -> int:
    """Return the size of a module's parameters if all are vectors (perhaps with axes of size one) of one size, else 0."""
    own = list(module.parameters())
    if type(module).__module__.startswith("torch.nn") or next(module.children(), None) is not None or not own:
        return 0
    if any(isinstance(p, UninitializedParameter) or p.is_meta or not p.is_floating_point() for p in own):
        return 0
    sizes = {p.numel() for p in own}
    return sizes.pop() if len(sizes) == 1 and all(max(p.shape, default=1) == p.numel() > 1 for p in own) else 0


def _tried(module: nn.Module, shape: tuple[int, ...], axis: int) -> Kind:
    """Return the kind on noise of a shape whose `axis` holds the units; "" if the module does not accept that shape."""
    like = next(module.parameters())
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu").to(like)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            twin = copy.deepcopy(module).eval()
            before = twin(noise)
            if not isinstance(before, Tensor) or before.shape != noise.shape or not torch.equal(twin(noise), before):
                return ""
            if not all(_touches_its_own(twin, parameter, noise, before, axis) for parameter in twin.parameters()):
                return ""
            return "norm" if torch.allclose(twin(4 * noise), before, rtol=0.02, atol=0.02) else "gain"
    except Exception:
        return ""  # whatever it is made for, it is not this kind


def _touches_its_own(twin: nn.Module, parameter: nn.Parameter, noise: Tensor, before: Tensor, axis: int) -> bool:
    kept = parameter.detach().clone()
    for mask in _halves(kept.numel(), kept.device):
        parameter.copy_(torch.where(mask.view(kept.shape), kept + 0.5, kept))
        moved = (twin(noise) != before).transpose(0, axis).flatten(1).any(1)
        if bool((moved & ~mask).any()) or not bool(moved.any()):
            return False
    parameter.copy_(kept)
    return True


def _halves(n: int, device: torch.device) -> Iterator[Tensor]:
    """Yield sets of units such that for any two units, in either order, one set contains the first but not the second."""
    units = torch.arange(n, device=device)
    for bit in range((n - 1).bit_length()):
        yield units >> bit & 1 == 1
        yield units >> bit & 1 == 0
