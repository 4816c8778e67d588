"""The least-squares problem of one layer: the weight change that does to a batch what its errors ask for, and no more.

    dW^T = A^+ D,   A^+ = A^T (A A^T + lam I)^-1 = (A^T A + lam I)^-1 A^T      A : (m, n) inputs, D : (m, n_out) errors

A layer's gradient is `D^T A / B`, so by the second form it is all of the errors that is needed.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import Conv1d, Conv2d

from apical.core.processes import summed
from apical.core.stepping import distributed
from apical.core.transport import geometry, padded_input
from apical.errors import UnsupportedModelError


def require_patches(name: str, layer: nn.Module) -> None:
    """Refuse layers whose map is not one matrix on rows of inputs that can be read off.

    Raises:
        UnsupportedModelError: names the layer.
    """
    shape = geometry(layer)
    if shape is None:
        return
    if shape.transposed or shape.groups > 1 or not isinstance(layer, Conv1d | Conv2d):
        raise UnsupportedModelError(
            f"layer {name!r} ({type(layer).__name__}, {shape.groups} groups) is not one matrix on patches of its input; use "
            "Linear, Conv1d or Conv2d layers without groups"
        )


def patches(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Return what the layer's matrix acts on, (m, fan_in): samples of dense layers, at every place; patches of convolutions.

    Args:
        layer: Linear, Conv1d or Conv2d.
        inputs: (..., n) or (batch, channels, ...).
    """
    shape = geometry(layer)
    if shape is None:
        return inputs.reshape(-1, inputs.shape[-1])
    x = padded_input(layer, inputs)
    x = x if x.dim() == len(shape.stride) + 2 else x.unsqueeze(0)
    kernel: tuple[int, ...] = layer.kernel_size  # type: ignore[assignment]
    stride, padding, dilation = shape.stride, shape.padding, shape.dilation
    if len(kernel) == 1:
        x, kernel, stride, padding, dilation = x.unsqueeze(2), (1, *kernel), (1, *stride), (0, *padding), (1, *dilation)
    columns = F.unfold(x, kernel, dilation, padding, stride)  # (batch, fan_in, places)
    return columns.transpose(1, 2).flatten(0, 1)


def gram(rows: Tensor) -> Tensor:
    """Return A^T A (n, n)."""
    return rows.T @ rows


def strength(power: Tensor, n: int, damping: float) -> Tensor:
    """lam: `damping` times the mean eigenvalue of A^T A, whose trace is `power`; a batch twice over has twice as much."""
    return damping * power / n


def solved(gradient: Tensor, product: Tensor, lam: Tensor) -> Tensor:
    """Return `G (A^T A + lam I)^-1` for G (n_out, n), from A^T A."""
    factor = _factor(_shifted(product, lam))
    return torch.cholesky_solve(gradient.T, factor).T


def solved_by_rows(gradient: Tensor, rows: Tensor, lam: Tensor) -> Tensor:
    """Return the same from A (m, n), for a gradient `G = D^T A` and m < n: `D^T (A A^T + lam I)^-1 A`, with no rounding left
    outside the span of the rows.
    """
    product = rows @ rows.T
    if not bool(product.isfinite().all()):
        return gradient * torch.nan  # the loss's warning names the inputs
    power, v = torch.linalg.eigh(product)  # A A^T = V diag(s) V^T
    least = power.amax() * len(power) * torch.finfo(power.dtype).eps
    scale = torch.where(power > least, 1 / (power * (power + lam)), 0.0)  # D^T = G A^T (A A^T)^-1
    seen = v.T @ rows  # (m, n)
    result: Tensor = (gradient @ seen.T * scale) @ seen
    return result


def _shifted(product: Tensor, lam: Tensor) -> Tensor:
    return product + lam * torch.eye(len(product), dtype=product.dtype, device=product.device)


def _factor(matrix: Tensor) -> Tensor:
    """Cholesky's; NaN if there is none, as for NaN inputs, so that the loss's warning names them."""
    factor, failure = torch.linalg.cholesky_ex(matrix)
    result: Tensor = factor.masked_fill(failure != 0, torch.nan)
    return result


def off_span(gradient: Tensor, rows: Tensor) -> float:
    """Return the share of G (n_out, n) that no errors D make of these inputs, `|G - G A^+ A| / |G|`; 0 where G is 0."""
    size = gradient.norm()
    if size == 0:
        return 0.0
    within = gradient @ torch.linalg.pinv(rows) @ rows
    return float((gradient - within).norm() / size)


def errors_of(gradient: Tensor, rows: Tensor) -> Tensor:
    """D (m, n_out) with `D^T A = G`, of least norm: the errors themselves where the rows of A are independent."""
    errors: Tensor = torch.linalg.pinv(rows).T @ gradient.T
    return errors


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of two tensors as vectors."""
    sizes = a.norm() * b.norm()
    return float(torch.where(sizes > 0, (a * b).sum() / sizes, 0.0))


def stacked(rows: Sequence[Tensor], weight: bool, bias: bool) -> Tensor:
    """Return A in float64 from the inputs of one or more calls: their rows, and ones for the bias, if these are trained."""
    every = torch.cat([each.detach().double() for each in rows])
    ones = every.new_ones(len(every), 1)
    return torch.cat([*([every] if weight else []), *([ones] if bias else [])], 1)


def proximal(a: Tensor, d: Tensor, lam: Tensor) -> Tensor:
    """Return `D^T A (A^T A + lam I)^-1` (n_out, n) in A's type, for inputs A (m, n), errors D (m, n_out), all processes."""
    wide, errors = a.double(), d.double()
    if len(a) < a.shape[1] and not distributed():  # D^T (A A^T + lam I)^-1 A
        factor = _factor(_shifted(wide @ wide.T, lam.double()))
        return (torch.cholesky_solve(errors, factor).T @ wide).to(a.dtype)
    product, gradient = summed(gram(wide)), summed(errors.T @ wide)
    return solved(gradient, product, lam.double()).to(a.dtype)
