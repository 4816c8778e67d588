"""Random numbers of a rule: from its own generator, or from PyTorch's global state if it has none."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return standard normal numbers of the tensor's shape, dtype and device, drawn where the generator lives."""
    if generator is None:
        return torch.randn_like(like)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=generator.device).to(like.device)


def coins(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return -1 or 1, whole numbers, on the tensor's device."""
    device = like.device if generator is None else generator.device
    drawn: Tensor = 1 - 2 * torch.randint(2, tuple(shape), generator=generator, device=device)
    return drawn.to(like.device)


def initial(draw: Callable[..., Tensor], shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return a tensor drawn by a function of `torch.nn.init`, of the dtype and on the device of `like`."""
    device = like.device if generator is None else generator.device
    empty = torch.empty(tuple(shape), dtype=like.dtype, device=device)
    return draw(empty, generator=generator).to(like.device)
