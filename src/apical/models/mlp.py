"""Multilayer perceptrons: Flatten, then Linear and an activation per hidden layer, then a Linear readout."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from apical.core.sigmoids import ShiftedSigmoid
from apical.errors import ConfigError
from apical.models.initialisation import xavier_, xavier_normal_


def mlp(
    in_features: int, widths: Sequence[int], out_features: int, activation: Callable[[], nn.Module] = nn.ReLU
) -> nn.Sequential:
    """Build a perceptron with hidden layers of the given widths: (N, ...) with `in_features` entries -> (N, out_features).

    Its modules are named flatten, linear1, relu1, linear2, ... An empty `widths` gives a linear classifier.

    Args:
        activation: returns the module after each hidden layer, which is named after its class: nn.Tanh gives tanh1, tanh2.

    Raises:
        ConfigError: a size is not positive.

    >>> [name for name, _ in mlp(4, [3], 2).named_children()]
    ['flatten', 'linear1', 'relu1', 'linear2']
    >>> [name for name, _ in mlp(4, [3], 2, nn.Tanh).named_children()]
    ['flatten', 'linear1', 'tanh1', 'linear2']
    """
    model = _perceptron(in_features, widths, out_features, [activation] * len(widths))
    xavier_(model)
    return model


def mlp_tanh(in_features: int, widths: Sequence[int], out_features: int) -> nn.Sequential:
    """Build the tanh perceptron of the feedback-control papers (arXiv 2106.07887): Xavier-normal weights, zero biases.

    Raises:
        ConfigError: a size is not positive.
    """
    model = _perceptron(in_features, widths, out_features, [nn.Tanh] * len(widths))
    xavier_normal_(model)
    return model


def mlp_sigmoid(in_features: int, widths: Sequence[int], out_features: int) -> nn.Sequential:
    """Build the perceptron of holomorphic equilibrium propagation (arXiv 2209.00530): `sigma(4 v - 2)` after hidden layers.

    Weights keep PyTorch's default initialisation, which is smaller than Xavier's: whether bidirectionally coupled states
    settle depends on it.

    Raises:
        ConfigError: a size is not positive.

    >>> [name for name, _ in mlp_sigmoid(4, [3], 2).named_children()]
    ['flatten', 'linear1', 'sigmoid1', 'linear2']
    """
    model = _perceptron(in_features, widths, out_features, [ShiftedSigmoid] * len(widths))
    named = ((name.replace("shiftedsigmoid", "sigmoid"), module) for name, module in model.named_children())
    return nn.Sequential(OrderedDict(named))


def mlp_clip(in_features: int, widths: Sequence[int], out_features: int) -> nn.Sequential:
    """Build the perceptron of the original equilibrium propagation: `clip(v, 0, 1)` after every layer, including the last.

    Weights are Glorot-uniform and biases zero. It is trained with the squared error to one-hot targets.

    Raises:
        ConfigError: a size is not positive.

    >>> [name for name, _ in mlp_clip(4, [3], 2).named_children()]
    ['flatten', 'linear1', 'clip1', 'linear2', 'clip2']
    """
    model = mlp(in_features, widths, out_features, nn.Identity)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name, module in model.named_children():
        if isinstance(module, nn.Linear):
            layers[name] = module
            nn.init.zeros_(module.bias)
            layers[name.replace("linear", "clip")] = nn.Hardtanh(0.0, 1.0)
        elif isinstance(module, nn.Flatten):
            layers[name] = module
    return nn.Sequential(layers)


def mlp_box(in_features: int, widths: Sequence[int], out_features: int) -> nn.Sequential:
    """Build :func:`mlp_clip` without biases: the perceptron of CorInfoMax (arXiv 2306.04810).

    Raises:
        ConfigError: a size is not positive.
    """
    model = mlp_clip(in_features, widths, out_features)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_parameter("bias", None)
    return model


def mlp_elu(in_features: int, widths: Sequence[int], out_features: int) -> nn.Sequential:
    """Build the ELU perceptron of counter-current learning (arXiv 2409.19841): no biases, PyTorch's default weights.

    Raises:
        ConfigError: a size is not positive.
    """
    return _perceptron(in_features, widths, out_features, [nn.ELU] * len(widths), bias=False)


def mlp_bn(in_features: int, widths: Sequence[int], out_features: int) -> nn.Sequential:
    """Build the ReLU perceptron of local classifiers (arXiv 1901.06656): BatchNorm before activations, default weights.

    Raises:
        ConfigError: a size is not positive.

    >>> [name for name, _ in mlp_bn(4, [3], 2).named_children()]
    ['flatten', 'linear1', 'norm1', 'relu1', 'linear2']
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name, module in _perceptron(in_features, widths, out_features, [nn.ReLU] * len(widths)).named_children():
        if name.startswith("relu"):
            layers[name.replace("relu", "norm")] = nn.BatchNorm1d(widths[int(name.removeprefix("relu")) - 1])
        layers[name] = module
    return nn.Sequential(layers)


def autoencoder(in_features: int, widths: Sequence[int], out_features: int) -> nn.Sequential:
    """Build the autoencoder of arXiv 2106.07887, table 1: tanh hidden layers, a linear code in the middle, a linear output.

    The middle entry of `widths` is the code, whose `nn.Identity` is named code; the other activations are tanh1, tanh2, ...
    Weights are Xavier-normal and biases zero.

    Raises:
        ConfigError: a size is not positive, or the number of hidden layers is even.

    >>> [name for name, _ in autoencoder(8, [4, 2, 4], 8).named_children()]
    ['flatten', 'linear1', 'tanh1', 'linear2', 'code', 'linear3', 'tanh3', 'linear4']
    """
    if len(widths) % 2 == 0:
        raise ConfigError(f"an autoencoder needs an odd number of hidden layers; got {'-'.join(map(str, widths)) or 'none'}")
    activations: list[Callable[[], nn.Module]] = [nn.Tanh] * len(widths)
    activations[len(widths) // 2] = nn.Identity
    model = _perceptron(in_features, widths, out_features, activations)
    xavier_normal_(model)
    return model


class ResidualBlock(nn.Module):
    """`tanh(W2 tanh(W1 x + v1) + v2 + x)`: (N, width) -> (N, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear1, self.tanh1 = nn.Linear(width, width), nn.Tanh()
        self.linear2, self.tanh2 = nn.Linear(width, width), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the block."""
        hidden = self.linear2(self.tanh1(self.linear1(x)))
        result: Tensor = self.tanh2(hidden + x)
        return result


def mlp_residual(in_features: int, widths: Sequence[int], out_features: int) -> nn.Sequential:
    """Build the residual tanh perceptron of TDCA's released code: a first layer, then a residual block per further width.

    Weights keep PyTorch's default, uniform on +-1/sqrt(inputs); biases are zero.

    Raises:
        ConfigError: a size is not positive, or the widths differ.

    >>> sum(p.numel() for p in mlp_residual(784, [100, 100, 100], 10).parameters())
    119910
    """
    width = one_width("residual blocks need layers", in_features, widths, out_features)
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten(), linear1=nn.Linear(in_features, width))
    layers["tanh1"] = nn.Tanh()
    for depth in range(1, len(widths)):
        layers[f"block{depth}"] = ResidualBlock(width)
    layers["linear2"] = nn.Linear(width, out_features)
    model = nn.Sequential(layers)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return model


def one_width(what: str, in_features: int, widths: Sequence[int], out_features: int) -> int:
    """Return the common width of all hidden layers.

    Args:
        what: subject of the error message, such as "a graph needs nodes".

    Raises:
        ConfigError: a size is not positive, or the widths differ.
    """
    sizes = [in_features, *widths, out_features]
    if min(sizes) < 1 or len(set(widths)) != 1:
        raise ConfigError(f"{what} of one width, each with at least one unit; got {'-'.join(map(str, sizes))}")
    return widths[0]


def _perceptron(
    in_features: int,
    widths: Sequence[int],
    out_features: int,
    activations: Sequence[Callable[[], nn.Module]],
    bias: bool = True,
) -> nn.Sequential:
    sizes = [in_features, *widths, out_features]
    if min(sizes) < 1:
        raise ConfigError(f"every layer of an mlp needs at least one unit; got {'-'.join(map(str, sizes))}")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for depth, (fan_in, fan_out) in enumerate(pairwise(sizes), start=1):
        layers[f"linear{depth}"] = nn.Linear(fan_in, fan_out, bias=bias)
        if depth <= len(widths):
            module = activations[depth - 1]()
            kind = type(module).__name__.lower()
            layers["code" if kind == "identity" else f"{kind}{depth}"] = module
    return nn.Sequential(layers)
