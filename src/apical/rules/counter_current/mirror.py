"""The mirror image of a sequence of blocks: it runs from the last population to the first.

Every block has a counterpart, with its own weights, that maps the block's output shape to its input shape.
"""

import copy
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from apical.core.activations import is_activation
from apical.core.agreement import acts_on_each
from apical.core.blocks import Block
from apical.core.effective import weight_now
from apical.core.layers import Layer, is_linear, is_norm, is_own, is_pool
from apical.core.rest import undisturbed
from apical.core.transport import geometry
from apical.errors import UnsupportedModelError

Enlarge = Literal["nearest", "transposed"]


def mirrored(row: Sequence[Block], enlarge: Enlarge = "nearest", depths: int | None = None) -> list[nn.Sequential]:
    """Build the mirror image, from the last block down: module i maps (n, *row[-1 - i].shape) to that block's input shape.

    A Linear layer becomes a Linear layer without bias (a bias shared by the codes of all classes would make them similar). A
    convolution becomes one from its output to its input channels with the same kernel size, after upsampling where the block
    shrinks its images, and strided where it enlarges them. Normalisation and activation are those of the reconstructed
    population; the input gets the layer alone. Weights have PyTorch's default initialisation; a convolution's bias, where
    the mirrored one has a bias, starts at zero.

    Args:
        row: the blocks.
        enlarge: "nearest" repeats pixels before an ordinary convolution; "transposed" uses a transposed convolution.
        depths: number of counterparts, from the top; all by default.

    Raises:
        UnsupportedModelError: a block has no counterpart; the message names it.
    """
    result = []
    for level in range(len(row) - 1, len(row) - 1 - (len(row) if depths is None else depths), -1):
        block, below = row[level], row[level - 1] if level else None
        like = block.like
        modules = [
            *_back(block, enlarge),
            *(_fresh(m) for m in (below.tail if below else ()) if is_norm(m) or _is_activation(m)),
        ]
        mirror = nn.Sequential(*modules).to(device=like.device, dtype=like.dtype)
        _check(block, mirror)
        result.append(mirror)
    return result


def mirrors(feedback: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """The modules of a mirror image that have options, each with the module it mirrors."""
    return [(module, module.__dict__["mirrors"]) for module in feedback.modules() if "mirrors" in module.__dict__]


def follow(pairs: Sequence[tuple[nn.Module, nn.Module]]) -> None:
    """Update modules of a mirror image to the present class and options of the modules they mirror."""
    for module, own in pairs:
        if type(module) is not type(own):
            module.__class__ = type(own)
        here = module.__dict__
        for name, value in own.__dict__.items():
            if name[0] != "_" and here.get(name) is not value and _is_option(name, value):
                here[name] = value


def _is_option(name: str, value: object) -> bool:
    return name not in ("training", "inplace") and isinstance(value, bool | int | float | str | tuple)


def _is_activation(module: nn.Module) -> bool:
    """Whether the module is an activation, including unregistered ones of users."""
    other = is_own(module) or is_linear(module) or is_pool(module)
    return is_activation(module) or (not other and acts_on_each(module))


def _fresh(module: nn.Module) -> nn.Module:
    twin = copy.deepcopy(module)
    if hasattr(twin, "inplace"):
        twin.inplace = False  # type: ignore[assignment]
    if callable(getattr(twin, "reset_parameters", None)):
        twin.reset_parameters()  # type: ignore[operator]
    twin.__dict__["mirrors"] = module  # not as a submodule
    return twin


def _back(block: Block, enlarge: Enlarge) -> list[nn.Module]:
    """The counterpart's layer, with the modules that reshape its input and output."""
    layer, bias = block.layer, getattr(block.layer, "bias", None) is not None
    if geometry(layer) is None:
        if len(block.shape) != 1 or len(weight_now(layer)) != block.shape[0]:
            raise _without_mirror(block, "it does not return one vector per sample")
        back: list[nn.Module] = [nn.Linear(block.shape[0], math.prod(block.input_shape), bias=False)]
        if len(block.input_shape) != 1:
            back.append(nn.Unflatten(1, block.input_shape))
    else:
        if not isinstance(layer, _ConvNd):
            raise _without_mirror(block, "it is not a PyTorch convolution")
        if len(block.image) != len(layer.kernel_size) + 1 or len(block.seen) != len(block.image):
            raise _without_mirror(block, f"it maps shape {block.input_shape} to {block.shape}")
        back = [] if block.image == block.shape else [nn.Unflatten(1, block.image)]
        back += _convolution(block, enlarge, bias)
        back += [] if block.seen == block.input_shape else [nn.Flatten()]
    for module in back:
        own = getattr(module, "bias", None)
        if isinstance(own, Tensor):
            nn.init.zeros_(own)
    return back


def _convolution(block: Block, enlarge: Enlarge, bias: bool) -> list[nn.Module]:
    """From the block's output image to its input image."""
    layer = block.layer
    assert isinstance(layer, _ConvNd)
    kernel, dilation, rank = layer.kernel_size, layer.dilation, len(layer.kernel_size)
    small, large = block.image[1:], block.seen[1:]
    grow = [math.ceil(a / b) for a, b in zip(large, small, strict=True)]
    shrink = [math.ceil(b / a) for a, b in zip(large, small, strict=True)]
    half = [d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True)]
    plain, transposed = (getattr(nn, f"{kind}{rank}d") for kind in ("Conv", "ConvTranspose"))
    channels = (layer.out_channels, layer.in_channels)
    options = {"dilation": dilation, "groups": layer.groups, "bias": bias}
    if max(shrink) > 1:
        return [plain(*channels, kernel, stride=shrink, padding=half, **options)]
    if enlarge == "transposed" and max(grow) > 1:
        reached = [
            (n - 1) * s - 2 * p + d * (k - 1) + 1 for n, s, p, d, k in zip(small, grow, half, dilation, kernel, strict=True)
        ]
        missing = [a - b for a, b in zip(large, reached, strict=True)]
        return [transposed(*channels, kernel, stride=grow, padding=half, output_padding=missing, **options)]
    back: list[nn.Module] = [] if small == large else [nn.Upsample(size=large, mode="nearest")]
    return [*back, plain(*channels, kernel, padding="same", **options)]


def _check(block: Block, mirror: nn.Sequential) -> None:
    """Run the counterpart once, as in training."""
    try:
        with undisturbed(mirror), torch.no_grad():
            made = tuple(mirror(block.like.new_zeros(2, *block.shape)).shape[1:])
    except (RuntimeError, ValueError) as error:
        raise _without_mirror(block, str(error)) from error
    if made != block.input_shape:
        raise _without_mirror(block, f"going back from {block.shape} gives {made} instead of {block.input_shape}")


def _without_mirror(block: Block, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"layer {block.name!r} ({type(block.layer).__name__}) has no mirror: {why}; pass your own feedback network"
    )


def is_transposed(layer: Layer) -> bool:
    """Whether the layer keeps its weight as (in, out, ...) instead of (out, in, ...)."""
    shape = geometry(layer)
    return shape is not None and shape.transposed


def facing(weight: Tensor, layer: Layer, back: Layer) -> Tensor | None:
    """A counterpart's weight in the layout of its layer's weight, for comparison; None where shapes differ.

    Channels are swapped; kernels of ordinary convolutions are rotated by 180 degrees, as in the transposed map.
    """
    wanted = weight_now(layer).shape
    if is_transposed(layer) != is_transposed(back):  # both then have the same layout
        return weight if weight.shape == wanted else None
    turned = weight.transpose(0, 1)
    turned = turned.flip(tuple(range(2, weight.dim()))) if weight.dim() > 2 else turned
    return turned if turned.shape == wanted else None
