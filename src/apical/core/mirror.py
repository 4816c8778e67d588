"""A weight copied by correlation: a layer driven by noise x answers y = W x, and the mean of `y x^T` is W."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from apical.errors import UnsupportedModelError

if TYPE_CHECKING:
    from apical.core.edge import EdgeRule

CHUNK = 2**22
"""Number of noise values held at the same time."""


def mirror(weight: Tensor, noise: Tensor) -> Tensor:
    """Return `y x^T / batch` with `y = W x`, for unit-variance noise (batch, fan_in): an unbiased estimate of the weight."""
    rows = weight.flatten(1)
    return ((noise @ rows.T).T @ noise / len(noise)).view_as(weight)


@torch.no_grad()
def mirrored(weight: Tensor, per_input: int, generator: torch.Generator | None = None) -> Tensor:
    """Return the mean of `y x^T` over `per_input` Gaussian vectors x per input, of the weight's shape (n_out, n_in, ...).

    Its angle to W is about `arctan sqrt((n_in + 1) / vectors)`: 9 degrees at 40 vectors per input.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    rows = weight.detach().flatten(1).to(wide)
    n_in = rows.shape[1]
    left = vectors = per_input * n_in
    total = torch.zeros_like(rows)
    device = rows.device if generator is None else generator.device
    with torch.autocast(rows.device.type, enabled=False):
        while left:
            count = min(left, max(1, CHUNK // n_in))
            noise = torch.randn(count, n_in, generator=generator, dtype=wide, device=device).to(rows.device)
            total.add_(mirror(rows, noise), alpha=count / vectors)
            left -= count
    return total.to(weight.dtype).view_as(weight)


def require_affine(rule: "EdgeRule", name: str) -> None:
    """Refuse a layer that does more to noise than an affine map, unless that map is one product inside, which is driven.

    Raises:
        UnsupportedModelError: names the layer.
    """
    layer = rule.layers[name]
    site = rule._sites[name][1] if name in rule._sites else None
    if site is not None and not (rule.is_plain(name) or site.probed):
        raise UnsupportedModelError(
            f"layer {name!r} ({type(layer).__name__}) is not an affine map of noise alone, as the weight mirror "
            f"requires; move the rest into a separate module, or pass exact=({name!r},)"
        )
