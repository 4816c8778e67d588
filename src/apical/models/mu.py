"""Residual perceptrons in the mu parametrisation (muPC, arXiv 2505.13124), which behave alike at every depth."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from apical.core.scaled import ScaledLinear, mu_factors
from apical.models.mlp import one_width


class ResidualLayer(nn.Module):
    """`s + a W relu(s)`: (N, width) -> (N, width)."""

    def __init__(self, width: int, factor: float) -> None:
        super().__init__()
        self.relu, self.linear = nn.ReLU(), ScaledLinear(width, width, factor)

    def forward(self, s: Tensor) -> Tensor:
        """Return the next state."""
        result: Tensor = s + self.linear(self.relu(s))
        return result


class ReadOut(nn.Module):
    """`a W relu(s)`: (N, width) -> (N, outputs). The activation belongs to the readout; states are pre-activations."""

    def __init__(self, width: int, outputs: int, factor: float) -> None:
        super().__init__()
        self.linear = ScaledLinear(width, outputs, factor)

    def forward(self, s: Tensor) -> Tensor:
        """Logits."""
        result: Tensor = self.linear(s.relu())
        return result


def mlp_mu(in_features: int, widths: Sequence[int], out_features: int) -> nn.Sequential:
    """Build a residual ReLU perceptron of L = len(widths) + 1 layers of equal width, with N(0, 1) weights and no biases.

    Raises:
        ConfigError: a size is not positive, or the widths differ.

    >>> [name for name, _ in mlp_mu(4, [3, 3], 2).named_children()]
    ['flatten', 'linear1', 'layer2', 'linear3']
    """
    width, depth = one_width("a mu perceptron needs layers", in_features, widths, out_features), len(widths) + 1
    factors = mu_factors(in_features, width, depth)
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    layers["linear1"] = ScaledLinear(in_features, width, factors[0])
    for k in range(2, depth):
        layers[f"layer{k}"] = ResidualLayer(width, factors[k - 1])
    layers[f"linear{depth}"] = ReadOut(width, out_features, factors[-1])
    return nn.Sequential(layers)
