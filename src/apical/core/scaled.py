"""Layers whose weight has a constant factor: parametrisations in which depth and width change neither activity nor updates.

muPC (Innocenti et al., arXiv 2505.13124) for L layers of N units: weights are drawn from N(0, 1), without biases; layer l
applies a_l W_l with a_1 = d_0^(-1/2), a_L = 1/N, and between them (N L)^(-1/2) in a residual branch, N^(-1/2) elsewhere.
"""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.blocks import Block
from apical.core.layers import is_weighted, register_layer
from apical.errors import UnsupportedModelError


class ScaledLinear(nn.Linear):
    """`factor * W h`, W drawn from N(0, 1): (batch, ..., in_features) -> (batch, ..., out_features).

    >>> layer = ScaledLinear(4, 3, factor=0.5)
    >>> sorted(layer.state_dict())
    ['weight']
    """

    def __init__(self, in_features: int, out_features: int, factor: float) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.factor = factor

    def reset_parameters(self) -> None:
        """Draw W from N(0, 1)."""
        super().reset_parameters()  # draws as before, so that a seed gives the same numbers
        nn.init.normal_(self.weight)

    def forward(self, h: Tensor) -> Tensor:
        """See the class."""
        return F.linear(h, self.factor * self.weight, self.bias)

    def extra_repr(self) -> str:
        """Return the options, as printed."""
        return f"{super().extra_repr()}, factor={self.factor:.4g}"


def _effective(layer: ScaledLinear) -> Tensor:
    weight: Tensor = layer.factor * layer.weight
    return weight


register_layer(ScaledLinear, weight=_effective)


def mu_factors(inputs: int, width: int, layers: int) -> list[float]:
    """a_1..a_L of residual networks.

    >>> mu_factors(100, 4, 4)
    [0.1, 0.25, 0.25, 0.25]
    """
    return [inputs**-0.5, *[(width * layers) ** -0.5] * (layers - 2), 1 / width]


def require_mu(row: Sequence[Block]) -> None:
    """Refuse blocks whose layers have not the factors of muPC.

    Raises:
        UnsupportedModelError: names the first such layer.
    """
    for k, block in enumerate(row):
        layers = [part for module in block.modules for part in module.modules() if is_weighted(part)]
        n, branches = block.layer.weight.shape[1], block.layer not in block.modules
        wanted = n**-0.5 if k == 0 else 1 / n if k == len(row) - 1 else (n * len(row) if branches else n) ** -0.5
        layer = layers[0]
        if (
            len(layers) == 1
            and isinstance(layer, ScaledLinear)
            and math.isclose(layer.factor, wanted)
            and layer.bias is None
        ):
            continue
        found = f"factor {layer.factor:.4g}" if isinstance(layer, ScaledLinear) else f"a {type(layer).__name__}"
        raise UnsupportedModelError(
            f"the block {block.name!r} is not in the mu parametrisation: of its {len(layers)} layers the first has {found}, "
            f"where one ScaledLinear of factor {wanted:.4g} without bias should be; make the model with "
            "apical.models.mlp_mu (mlp-mu-128-128 on the command line), or use parametrisation='standard'"
        )
