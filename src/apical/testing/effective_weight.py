"""The matrix that a layer really applies to its input, measured by probing it: the reference for interventions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from apical.core.layers import computes_plainly
from apical.core.packed import Part


def effective_weight(layer: nn.Module) -> Tensor | None:
    """Return the weight, in the layer's layout, by which `layer(x) - layer(0)` multiplies x; None if none is found.

    Layers that apply their weight as it is are read; other dense layers and convolutions are probed with impulses.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, Part) or computes_plainly(layer):
        return weight.detach().clone()
    forward = type(layer).forward.__get__(layer)
    own = layer.__dict__.get("forward")
    while own is not None and hasattr(own, "before"):
        own = own.before
    forward = own or forward
    with torch.enable_grad():
        if isinstance(layer, nn.Linear):
            result = _dense(forward, weight)
        elif isinstance(layer, _ConvNd) and not isinstance(layer, _ConvTransposeNd):
            result = _convolution(layer, forward, weight)
        else:
            return None
    return result


def _dense(forward: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor | None:
    eye = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        zero = forward(eye.new_zeros(1, len(eye)))
        matrix: Tensor = (forward(eye) - zero).T.contiguous()
        x = torch.randn(5, len(eye), dtype=eye.dtype, device=eye.device)
        y = forward(x)
    if matrix.shape != weight.shape or not _close(x @ matrix.T + zero, y):
        return None
    return matrix


def _convolution(layer: _ConvNd, forward: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor | None:
    """Each output channel's kernel is the error that an impulse well inside its map sends to the input."""
    d = len(layer.stride)
    if isinstance(layer.padding, str):
        same = layer.padding == "same"
        padding = [di * (k - 1) // 2 if same else 0 for di, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    else:
        padding = list(layer.padding)
    extent = [di * (k - 1) + 1 for di, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    at = [-(-p // s) + 1 for p, s in zip(padding, layer.stride, strict=True)]
    first = [a * s - p for a, s, p in zip(at, layer.stride, padding, strict=True)]
    sizes = [f + e + 2 * p + 1 for f, e, p in zip(first, extent, padding, strict=True)]
    c_out, per_group = weight.shape[0], weight.shape[1]
    x = torch.randn(c_out, layer.in_channels, *sizes, dtype=weight.dtype, device=weight.device, requires_grad=True)
    y = forward(x)
    impulse = torch.zeros_like(y)
    channel = torch.arange(c_out)
    place: list[Any] = [channel, channel, *at]
    impulse[tuple(place)] = 1.0
    (error,) = torch.autograd.grad(y, x, impulse)
    index: list[Any] = [slice(None), slice(None)]
    index += [slice(f, f + e, di) for f, e, di in zip(first, extent, layer.dilation, strict=True)]
    window = error[tuple(index)]
    group = channel // (c_out // layer.groups)
    inputs = group[:, None] * per_group + torch.arange(per_group)
    kernel = window[channel[:, None], inputs].detach()
    zero = forward(torch.zeros_like(x[:1]))
    conv = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[d]
    if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        output = conv(x, kernel, None, layer.stride, padding, layer.dilation, layer.groups)
        if not _close(output + zero, y):
            return None
    return kernel


def _close(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach(), b.detach()
    scale = max(float(b.abs().max()), 1e-30)
    return a.shape == b.shape and float((a - b).abs().max()) <= scale * 1e3 * torch.finfo(b.dtype).eps
