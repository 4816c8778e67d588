"""Build models by name, sized to a data set; recipes and the command line use these names."""

import math
import re
from collections.abc import Callable
from functools import partial

from torch import nn

from apical.core.pooling import SoftmaxPool2d
from apical.core.sigmoids import DoubleSiLU, HalfClip
from apical.errors import ConfigError, unknown_name
from apical.models import own
from apical.models.convnets import cnn_elu, cnn_pooled, cnn_stride, conv_autoencoder
from apical.models.first_spike import first_spike
from apical.models.graph import graph
from apical.models.lenet import LeNet, LeNetCIFAR
from apical.models.mlp import autoencoder, mlp, mlp_bn, mlp_box, mlp_clip, mlp_elu, mlp_residual, mlp_sigmoid, mlp_tanh
from apical.models.mu import mlp_mu
from apical.models.orthogonal_flow import flow_classifier
from apical.models.patches import Mixer, VisionTransformer
from apical.models.recurrent import Recurrent
from apical.models.resnet import CifarResNet, ResNet
from apical.models.spiking import spiking
from apical.models.transformer import Transformer

_WIDTHS = r"(-[1-9][0-9]{0,6}(x[1-9][0-9]{0,3})?)+"
_EXAMPLES = {
    "mlp": "mlp-512-512",
    "mlp-tanh": "mlp-tanh-256-256-256",
    "mlp-bn": "mlp-bn-256-256",
    "mlp-elu": "mlp-elu-256-256",
    "mlp-sigmoid": "mlp-sigmoid-256-256",
    "mlp-clip": "mlp-clip-500",
    "mlp-box": "mlp-box-500",
    "mlp-residual": "mlp-residual-100-100-100",
    "mlp-mu": "mlp-mu-128x29",
    "spiking": "spiking-128-64",
    "first-spike": "first-spike-340",
    "autoencoder": "autoencoder-256-32-256",
    "graph": "graph-64x8",
    "graph-attention": "graph-attention-64x8",
    "flow": "flow-32x50",
    "cnn-elu": "cnn-elu-128-128-256-256-512",
    "cnn-elu-bn": "cnn-elu-bn-128-128-256-256-512",
    "cnn-stride": "cnn-stride-128-128-256-256-512",
    "cnn-clip": "cnn-clip-128-256-512-512",
    "cnn-silu": "cnn-silu-128-256-512-512",
    "cnn-softmax-pool": "cnn-softmax-pool-128-256-512-512",
    "conv-autoencoder": "conv-autoencoder-64-128-256-512",
}
_IMAGENET_FORM_FROM = 64
_RECURRENT = re.compile(r"(lstm|gru|rnn)-([1-9][0-9]{0,4})")
_DECODER = re.compile(r"gpt-([1-9][0-9]{0,2})x([1-9][0-9]{0,4})")


def _build_lenet(name: str, shape: tuple[int, ...], num_classes: int) -> nn.Module:
    channels, height, width = _image(name, shape)
    if (height, width) not in ((28, 28), (32, 32)):
        raise ConfigError(f"model {name!r} needs 28x28 or 32x32 images; got {height}x{width}{_REMEDY}")
    return LeNet(channels, height, num_classes)


def _build_lenet_cifar(name: str, shape: tuple[int, ...], num_classes: int) -> nn.Module:
    channels, *_ = _image(name, shape, LeNetCIFAR.smallest)
    return LeNetCIFAR(channels, num_classes)


def _build_cifar_resnet(name: str, shape: tuple[int, ...], num_classes: int) -> nn.Module:
    channels, *_ = _image(name, shape, CifarResNet.smallest)
    return CifarResNet(int(name.removeprefix("resnet")), channels, num_classes)


def _build_resnet18(name: str, shape: tuple[int, ...], num_classes: int) -> nn.Module:
    channels, *sides = _image(name, shape, ResNet.smallest)
    return ResNet((2, 2, 2, 2), channels, num_classes, small_images=min(sides) < _IMAGENET_FORM_FROM)


_REMEDY = " (mlp-512-512 and resnet8 take any size)"
_CONVNETS: dict[str, Callable[[str, tuple[int, ...], int], nn.Module]] = {
    "lenet": _build_lenet,
    "lenet-cifar": _build_lenet_cifar,
    "resnet8": _build_cifar_resnet,
    "resnet20": _build_cifar_resnet,
    "resnet32": _build_cifar_resnet,
    "resnet56": _build_cifar_resnet,
    "resnet18": _build_resnet18,
    "mixer": lambda name, shape, num_classes: Mixer(_image(name, shape), num_classes),
    "vit": lambda name, shape, num_classes: VisionTransformer(_image(name, shape), num_classes),
}
_PERCEPTRONS: dict[str, Callable[[int, list[int], int], nn.Module]] = {
    "mlp": mlp,
    "mlp-tanh": mlp_tanh,
    "mlp-bn": mlp_bn,
    "mlp-elu": mlp_elu,
    "mlp-sigmoid": mlp_sigmoid,
    "mlp-clip": mlp_clip,
    "mlp-box": mlp_box,
    "mlp-residual": mlp_residual,
    "mlp-mu": mlp_mu,
    "spiking": spiking,
    "first-spike": first_spike,
    "autoencoder": autoencoder,
    "graph": graph,
    "graph-attention": partial(graph, edges="attention"),
    "flow": flow_classifier,
}
_ROWS: dict[str, Callable[[tuple[int, int, int], list[int], int], nn.Module]] = {
    "cnn-elu": cnn_elu,
    "cnn-elu-bn": partial(cnn_elu, norm=True),
    "cnn-stride": cnn_stride,
    "cnn-clip": partial(cnn_pooled, pool=partial(nn.MaxPool2d, 2), activation=HalfClip),
    "cnn-silu": partial(cnn_pooled, pool=SoftmaxPool2d, activation=DoubleSiLU),
    "cnn-softmax-pool": partial(cnn_pooled, pool=SoftmaxPool2d, activation=nn.ReLU),
    "conv-autoencoder": conv_autoencoder,
}


def names() -> list[str]:
    """Return the names that :func:`build` accepts; `mlp-<widths>` matches names such as mlp-512-512 or mlp-128x30."""
    sequences = ("gpt-<blocks>x<width>", "lstm-<width>", "gru-<width>", "rnn-<width>")
    return [*(f"{kind}-<widths>" for kind in (*_PERCEPTRONS, *_ROWS)), *_CONVNETS, *sequences]


def build(name: str, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Build the model `name` for samples of `input_shape`, with Xavier weights drawn from the global torch RNG.

    Args:
        name: one of :func:`names`, with any hidden widths filled in; or the user's own class or function that returns a
            module, "path/to/file.py:NAME" or "module:NAME" (:mod:`apical.models.own`), which then draws the weights.
        input_shape: shape of one sample, such as (1, 28, 28).
        num_classes: number of logits, or number of outputs for numeric targets.

    Returns:
        A module mapping (N, *input_shape) to (N, num_classes), or tokens (N, T) to (N, T, num_classes).

    Raises:
        ConfigError: the name is unknown, or samples of this shape do not fit the model.

    >>> sum(p.numel() for p in build("mlp-512-512", (1, 28, 28), 10).parameters())
    669706
    """
    if min(input_shape, default=0) < 1 or num_classes < 1:
        raise ConfigError(f"model {name!r} needs non-empty samples and classes; got {input_shape}, {num_classes}")
    if own.is_own(name):
        return own.build(name, input_shape, num_classes)
    if decoder := _DECODER.fullmatch(name):
        blocks, width = map(int, decoder.groups())
        return Transformer(num_classes, width, blocks, context=_tokens(name, input_shape))
    if recurrent := _RECURRENT.fullmatch(name):
        _tokens(name, input_shape)
        return Recurrent(num_classes, int(recurrent[2]), recurrent[1])
    for kind in (*_PERCEPTRONS, *_ROWS):
        if re.fullmatch(kind + _WIDTHS, name):
            widths = [width for part in name.removeprefix(kind + "-").split("-") for width in _repeated(part)]
            if kind in _ROWS:
                return _ROWS[kind](_image(name, input_shape), widths, num_classes)
            return _PERCEPTRONS[kind](math.prod(input_shape), widths, num_classes)
    for kind in sorted((*_PERCEPTRONS, *_ROWS), key=len, reverse=True):
        if name == kind or name.startswith(f"{kind}-"):
            raise ConfigError(
                f"model {name!r} does not give its hidden widths; write for example {_EXAMPLES.get(kind, kind + '-512')}"
            )
    for kind, example in (("gpt", "gpt-2x96"), ("lstm", "lstm-128"), ("gru", "gru-96"), ("rnn", "rnn-96")):
        if name == kind or name.startswith(f"{kind}-"):
            raise ConfigError(f"model {name!r} does not give its size; write for example {example}")
    if name not in _CONVNETS:
        raise ConfigError(f"{unknown_name('model', name, names())}; or your own: FILE.py:CLASS_OR_FUNCTION")
    return _CONVNETS[name](name, input_shape, num_classes)


def _tokens(name: str, shape: tuple[int, ...]) -> int:
    """Return T for samples of shape (T,); raise `ConfigError` for any other shape."""
    if len(shape) != 1:
        raise ConfigError(f"model {name!r} needs sequences of tokens (T,); got samples of shape {shape}")
    return shape[0]


def _repeated(part: str) -> list[int]:
    """Return the widths encoded by one part of a name.

    >>> _repeated("128x3"), _repeated("10")
    ([128, 128, 128], [10])
    """
    width, _, times = part.partition("x")
    return [int(width)] * int(times or 1)


def _image(name: str, shape: tuple[int, ...], smallest: int = 1) -> tuple[int, int, int]:
    """Return `shape` as (channels, height, width); raise unless it is an image of at least `smallest` pixels a side."""
    if len(shape) != 3:
        raise ConfigError(f"model {name!r} needs images (channels, height, width); got samples of shape {shape}")
    channels, height, width = shape
    if min(height, width) < smallest:
        raise ConfigError(f"model {name!r} needs images of at least {smallest}x{smallest}; got {height}x{width}{_REMEDY}")
    return channels, height, width
