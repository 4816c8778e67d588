"""Convolutional networks of counter-current learning (arXiv 2409.19841) and its backpropagation baselines, and of
equilibrium propagation (arXiv 2006.03824, 2209.00530).

Each is a plain sequence of layers; the widths are the channels after each convolution. All kernels are 3x3 with one pixel of
padding. Weights keep PyTorch's default initialisation unless stated otherwise.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import nn

from apical.errors import ConfigError

SMALL = 1e-3
"""Scale of the orthogonal decoder weights of an autoencoder."""


def cnn_elu(shape: tuple[int, int, int], widths: Sequence[int], num_classes: int, norm: bool = False) -> nn.Sequential:
    """Per width a convolution without bias, ELU and 2x2 max pooling, then a linear readout: (N, *shape) -> (N, num_classes).

    Args:
        norm: add BatchNorm before each convolution, as in the paper's backpropagation baseline.

    Raises:
        ConfigError: the images are too small for that many pooling layers.
    """
    channels, *side = shape
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for depth, width in enumerate(widths, start=1):
        if min(side) < 2:
            raise _too_small(shape, widths)
        if norm:
            layers[f"norm{depth}"] = nn.BatchNorm2d(channels)
        layers[f"conv{depth}"] = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        layers[f"elu{depth}"] = nn.ELU()
        layers[f"pool{depth}"] = nn.MaxPool2d(2)
        channels, side = width, [size // 2 for size in side]
    return _read_out(layers, channels * math.prod(side), num_classes, bias=False)


def cnn_stride(shape: tuple[int, int, int], widths: Sequence[int], num_classes: int) -> nn.Sequential:
    """Per width a stride-2 convolution with zero-initialised bias and ELU, then a linear readout without bias.

    Raises:
        ConfigError: the images are too small for that many strides.
    """
    channels, *side = shape
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for depth, width in enumerate(widths, start=1):
        if min(side) < 2:
            raise _too_small(shape, widths)
        layers[f"conv{depth}"] = _zeroed(nn.Conv2d(channels, width, 3, stride=2, padding=1))
        layers[f"elu{depth}"] = nn.ELU()
        channels, side = width, [(size + 1) // 2 for size in side]
    return _read_out(layers, channels * math.prod(side), num_classes, bias=False)


def cnn_pooled(
    shape: tuple[int, int, int],
    widths: Sequence[int],
    num_classes: int,
    pool: Callable[[], nn.Module],
    activation: Callable[[], nn.Module],
) -> nn.Sequential:
    """Per width a convolution, pooling and an activation, then a linear readout; the last convolution is not padded.

    Args:
        pool: halves height and width. It comes before the activation, so that an equilibrium network pools potentials.

    Raises:
        ConfigError: the images are too small for that many pooling layers.
    """
    channels, *side = shape
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for depth, width in enumerate(widths, start=1):
        padding = int(depth < len(widths))
        side = [(size - 2 + 2 * padding) // 2 for size in side]
        if min(side) < 1:
            raise _too_small(shape, widths)
        layers[f"conv{depth}"] = nn.Conv2d(channels, width, 3, padding=padding)
        layers[f"pool{depth}"], layers[f"activation{depth}"] = pool(), activation()
        channels = width
    return _read_out(layers, channels * math.prod(side), num_classes)


def conv_autoencoder(shape: tuple[int, int, int], widths: Sequence[int], outputs: int) -> nn.Sequential:
    """Strided encoder and upsampling decoder with BatchNorm and ReLU: (N, *shape) -> (N, outputs), the flattened image.

    The last of `widths` is the number of channels of the code; the decoder mirrors the encoder. Weights are orthogonal, a
    thousand times smaller in the decoder, and zero in the layer that produces the image; biases are zero.

    Raises:
        ConfigError: `outputs` is not the image's size, or the images are too small for that many strides.
    """
    channels, *side = shape
    if outputs != math.prod(shape):
        raise ConfigError(f"an autoencoder reconstructs its input and needs {math.prod(shape)} outputs; got {outputs}")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    stages = [(channels, side)]
    for depth, width in enumerate(widths, start=1):
        if min(side) < 2:
            raise _too_small(shape, widths)
        layers[f"conv{depth}"] = _orthogonal(nn.Conv2d(channels, width, 3, stride=2, padding=1), 1.0)
        layers[f"norm{depth}"], layers[f"relu{depth}"] = nn.BatchNorm2d(width), nn.ReLU()
        channels, side = width, [(size + 1) // 2 for size in side]
        stages.append((channels, side))
    for back, (width, size) in enumerate(reversed(stages[:-1])):
        depth, last = len(widths) + 1 + back, back == len(widths) - 1
        layers[f"up{depth}"] = nn.Upsample(size=tuple(size), mode="nearest")
        layers[f"conv{depth}"] = _orthogonal(nn.Conv2d(channels, width, 3, padding=1), 0.0 if last else SMALL)
        if not last:
            layers[f"norm{depth}"], layers[f"relu{depth}"] = nn.BatchNorm2d(width), nn.ReLU()
        channels = width
    layers["flatten"] = nn.Flatten()
    return nn.Sequential(layers)


def _read_out(layers: OrderedDict[str, nn.Module], features: int, num_classes: int, bias: bool = True) -> nn.Sequential:
    """Return the layers followed by a linear readout."""
    layers |= {"flatten": nn.Flatten(), "linear": nn.Linear(features, num_classes, bias=bias)}
    return nn.Sequential(layers)


def _zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


@torch.no_grad()
def _orthogonal(layer: nn.Conv2d, factor: float) -> nn.Conv2d:
    nn.init.orthogonal_(layer.weight)
    layer.weight.mul_(factor)
    return _zeroed(layer)


def _too_small(shape: tuple[int, ...], widths: Sequence[int]) -> ConfigError:
    size = "x".join(map(str, shape[1:]))
    return ConfigError(f"images of {size} pixels are too small to be halved {len(widths)} times; give fewer widths")
