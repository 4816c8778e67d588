"""Models as a row of blocks, and the mirror image of such a row.

A block is what lies between two populations whose activity a rule looks at: a weighted layer with what shapes its input
(flattening, upsampling) and what follows it (normalisation, activation, pooling). Unlike the stages of
:mod:`apical.core.chain` a block need not be affine-then-element-wise; its own derivative is left to autograd.

The mirror image of a row runs from the last population to the first: every block has a counterpart that maps the shape of
its output to that of its input, with weights of its own.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from apical.core.activations import is_activation
from apical.core.chain import Call, example_of, traced
from apical.core.layers import Layer, is_known_in_row, is_norm, is_own, is_weighted, shapes_input
from apical.core.transport import geometry
from apical.core.units import leaves, weighted_layers
from apical.errors import UnsupportedModelError

Enlarge = Literal["nearest", "transposed"]


@dataclass(frozen=True)
class Block:
    """One block of a row.

    Attributes:
        name: module name of the weighted layer.
        layer: the layer.
        modules: all modules of the block in order.
        input_shape: of one sample.
        shape: of one sample's output.
        image: of the output before flattening, where the block ends with that; otherwise `shape`.
        seen: of the first image that the block's leading modules make of a flat input; otherwise `input_shape`.
    """

    name: str
    layer: Layer
    modules: tuple[nn.Module, ...]
    input_shape: tuple[int, ...]
    shape: tuple[int, ...]
    image: tuple[int, ...]
    seen: tuple[int, ...]

    def __call__(self, activity: Tensor) -> Tensor:
        """(batch, *input_shape) -> (batch, *shape)."""
        for module in self.modules:
            activity = module(activity)
        return activity

    @property
    def tail(self) -> tuple[nn.Module, ...]:
        """The modules behind the layer."""
        return self.modules[self.modules.index(self.layer) + 1 :]


def blocks(model: nn.Module, input_shape: Sequence[int] | None = None) -> tuple[list[nn.Module], list[Block]]:
    """Modules before the first weighted layer, and the blocks, in the order in which the model calls them.

    Args:
        model: the network; it is only read, and run once on zeros.
        input_shape: of one sample; needed where a model has convolutions, whose sizes depend on it.

    Raises:
        UnsupportedModelError: the model is no such row, or a module has no place in one; it is named.
    """
    layers = weighted_layers(model, exact=None)
    for name, module in leaves(model):
        if is_own(module) and not (is_weighted(module) or is_activation(module) or is_known_in_row(module)):
            raise UnsupportedModelError(
                f"module {name!r} ({type(module).__name__}) has no place in a row of blocks; replace it"
            )
    calls = traced(model, example_of(model, layers, input_shape))
    places = [i for i, call in enumerate(calls) if is_weighted(call.module)]
    names = [calls[i].name for i in places]
    for name in layers:
        if names.count(name) != 1:
            what = "is called twice; give each place a layer of its own" if name in names else "was not called; remove it"
            raise UnsupportedModelError(f"layer {name!r} {what}")
    kind = next(iter(layers.values())).weight.dtype
    if odd := next((name for name, layer in layers.items() if layer.weight.dtype != kind), None):
        raise UnsupportedModelError(f"layer {odd!r} is kept in another precision than the layers before it; use one for all")
    starts = [_start(calls, place) for place in places]
    starts[0] = next(i for i, call in enumerate(calls) if list(call.module.parameters()))  # before, the input is prepared
    ends = [*starts[1:], len(calls)]
    head = [call.module for call in calls[: starts[0]]]
    return head, [_block(calls[start:end]) for start, end in zip(starts, ends, strict=True)]


def _start(calls: Sequence[Call], place: int) -> int:
    """Where the block of the layer at `place` starts: at the leading modules right before it."""
    while place and shapes_input(calls[place - 1].module):
        place -= 1
    return place


def _block(calls: Sequence[Call]) -> Block:
    layer = next(call for call in calls if is_weighted(call.module))
    assert is_weighted(layer.module)
    if (own := layer.module.weight.dtype) != calls[-1].made.dtype:
        raise UnsupportedModelError(
            f"layer {layer.name!r} ({type(layer.module).__name__}) keeps its weight in {own}, but its block makes "
            f"{calls[-1].made.dtype}; keep the weight in that type, or use another rule"
        )
    given, made = tuple(calls[0].given.shape[1:]), tuple(calls[-1].made.shape[1:])
    last = calls[-1]
    return Block(
        layer.name,
        layer.module,
        tuple(call.module for call in calls),
        given,
        made,
        tuple(last.given.shape[1:]) if isinstance(last.module, nn.Flatten) else made,
        tuple(calls[0].made.shape[1:]) if isinstance(calls[0].module, nn.Unflatten) else given,
    )


def mirrored(row: Sequence[Block], enlarge: Enlarge = "nearest", depths: int | None = None) -> list[nn.Sequential]:
    """The mirror image, from the last block's counterpart down: module i maps (n, *row[-1 - i].shape) to its input's shape.

    A Linear layer becomes a Linear layer without bias (one bias for the codes of all classes would make them alike). A
    convolution becomes one from its output to its input channels with the same kernel, behind an upsampling where the block
    shrinks its images, and strided where it enlarges them. Normalisation and activation are those of the population that is
    made; that at the input is made by the layer alone. Weights are drawn by PyTorch's own law; a convolution's bias, where
    the mirrored one has a bias, starts at zero.

    Args:
        row: the blocks.
        enlarge: "nearest" repeats pixels before an ordinary convolution; "transposed" takes a transposed convolution.
        depths: how many counterparts from the top; all by default.

    Raises:
        UnsupportedModelError: a block has no counterpart; it is named.
    """
    result = []
    for level in range(len(row) - 1, len(row) - 1 - (len(row) if depths is None else depths), -1):
        block, below = row[level], row[level - 1] if level else None
        like = block.layer.weight
        modules = [
            *_back(block, enlarge),
            *(_fresh(m) for m in (below.tail if below else ()) if is_norm(m) or is_activation(m)),
        ]
        mirror = nn.Sequential(*modules).to(device=like.device, dtype=like.dtype)
        _check(block, mirror)
        result.append(mirror)
    return result


def _fresh(module: nn.Module) -> nn.Module:
    twin = copy.deepcopy(module)
    if hasattr(twin, "inplace"):
        twin.inplace = False  # type: ignore[assignment]
    if callable(getattr(twin, "reset_parameters", None)):
        twin.reset_parameters()  # type: ignore[operator]
    return twin


def _back(block: Block, enlarge: Enlarge) -> list[nn.Module]:
    """The counterpart's layer, with what shapes its input and output."""
    layer, bias = block.layer, getattr(block.layer, "bias", None) is not None
    if geometry(layer) is None:
        if len(block.shape) != 1 or layer.weight.shape[0] != block.shape[0]:
            raise _without_mirror(block, "it does not make one vector per sample")
        back: list[nn.Module] = [nn.Linear(block.shape[0], math.prod(block.input_shape), bias=False)]
        if len(block.input_shape) != 1:
            back.append(nn.Unflatten(1, block.input_shape))
    else:
        if not isinstance(layer, _ConvNd):
            raise _without_mirror(block, "its type is no convolution of PyTorch's")
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
    """From the image the block makes to the one it is given."""
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
    """Run the counterpart once."""
    like, training = block.layer.weight, mirror.training
    try:
        with torch.no_grad():
            made = tuple(mirror.eval()(like.new_zeros(1, *block.shape)).shape[1:])
    except (RuntimeError, ValueError) as error:
        raise _without_mirror(block, str(error)) from error
    finally:
        mirror.train(training)
    if made != block.input_shape:
        raise _without_mirror(block, f"going back from {block.shape} gives {made} instead of {block.input_shape}")


def _without_mirror(block: Block, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"layer {block.name!r} ({type(block.layer).__name__}) has no mirror: {why}; pass a feedback network of your own"
    )


def is_transposed(layer: Layer) -> bool:
    """Whether the layer keeps its weight as (in, out, ...) instead of (out, in, ...)."""
    shape = geometry(layer)
    return shape is not None and shape.transposed


def facing(weight: Tensor, layer: Layer, back: Layer) -> Tensor | None:
    """A counterpart's weight laid out as its layer's own, so that the two can be compared; None where shapes differ.

    Channels change places; kernels of ordinary convolutions are turned by 180 degrees, as the transposed map has them.
    """
    if is_transposed(layer) != is_transposed(back):  # both are then laid out alike
        return weight if weight.shape == layer.weight.shape else None
    turned = weight.transpose(0, 1)
    turned = turned.flip(tuple(range(2, weight.dim()))) if weight.dim() > 2 else turned
    return turned if turned.shape == layer.weight.shape else None
