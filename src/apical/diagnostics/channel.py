"""A network as a noisy channel: singular values of its Jacobian, and how many nats of the input its output holds.

    I = 1/2 log det(1 + N^-1 J S J^T),   N = s^2 sum_l J_l J_l^T   (noise in every layer),   N = s^2 1   (at the end)

J is the Jacobian of the output in the input, J_l that in the output of weighted layer l, S the covariance of the input, s
the noise. With noise at the end, J is first scaled to `|J|_F^2 = outputs`, a power budget: then I is at most `n/2 log(1 +
1/s^2)` for a white input, with equality if and only if all singular values are one (Jensen's inequality). That is the
provable form of the claim of Weng et al. (arXiv 2212.01744) that dynamical isometry is the best channel; see also Tanner &
Ughi (arXiv 2102.04374). With noise in every layer the best gain lies above one, for amplification beats the noise of later
layers: the two models of noise disagree, and a number means nothing without its own. Both linearise the network at each
input.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from apical.core.batch import require_rows
from apical.core.layers import is_weighted
from apical.core.rest import kept_attributes
from apical.errors import ConfigError

Where = Literal["every", "end"]


def singular_values(jacobians: Tensor) -> Tensor:
    """Return the singular values of Jacobians (samples, outputs, inputs): (samples, min(outputs, inputs)), falling.

    Those that rounding makes of zero are zero.
    """
    values: Tensor = torch.linalg.svdvals(jacobians)
    rounding = values[..., :1] * max(jacobians.shape[-2:]) * torch.finfo(values.dtype).eps
    return torch.where(values > rounding, values, 0)


def information(jacobian: Tensor, covariance: Tensor | None, noise: Tensor) -> Tensor:
    """Return `1/2 log det(1 + N^-1 J S J^T)` in nats, of each sample.

    Args:
        jacobian: (..., outputs, inputs).
        covariance: S (inputs, inputs), positive semi-definite; None is white.
        noise: N (..., outputs, outputs), positive definite.
    """
    signal = jacobian @ jacobian.mT if covariance is None else jacobian @ covariance @ jacobian.mT
    root = torch.linalg.cholesky(noise)
    # N^-1/2 J S J^T N^-1/2 is symmetric, and as good under the determinant
    half = torch.linalg.solve_triangular(root, signal, upper=False)
    white = torch.linalg.solve_triangular(root, half.mT, upper=False)
    eigenvalues = torch.linalg.eigvalsh((white + white.mT) / 2).clamp(min=0)
    nats: Tensor = 0.5 * torch.log1p(eigenvalues).sum(-1)
    return nats


def within_budget(jacobian: Tensor) -> Tensor:
    """J (..., outputs, inputs), scaled to a squared Frobenius norm of `outputs`; zero stays zero."""
    norm = jacobian.square().sum((-2, -1), keepdim=True).sqrt()
    return jacobian * math.sqrt(jacobian.shape[-2]) / torch.where(norm > 0, norm, 1)


def capacity(outputs: int, noise: float, variance: float = 1.0) -> float:
    """Return `n/2 log(1 + variance/s^2)`: the most nats that n outputs within the power budget can hold of the input.

    Args:
        outputs: n.
        noise: standard deviation s.
        variance: the largest of the input, over directions; 1 for a white one.

    >>> round(capacity(8, 1.0), 3)
    2.773
    """
    return outputs / 2 * math.log1p(variance / noise**2)


@dataclass(frozen=True)
class Channel:
    """What :func:`channel` measures; means over the inputs.

    Attributes:
        largest, smallest: singular values of the Jacobian; one that is no more than rounding counts as zero.
        log10_condition: of their ratio; infinite where the smallest is zero.
        mean_square: of the entries of `J J^T`'s diagonal; `chi^L` in the mean-field limit.
        nats: information under the noise that was asked for.
        bound: no network with as many outputs holds more of it: the capacity of the power budget for noise at the end; the
            same network without the noise of its inner layers for noise in every layer.
    """

    largest: float
    smallest: float
    log10_condition: float
    mean_square: float
    nats: float
    bound: float


def channel(
    model: nn.Module, inputs: Tensor, noise: float = 0.1, where: Where = "end", covariance: Tensor | None = None
) -> Channel:
    """Return the model in evaluation mode and in float64, linearised at each input.

    Args:
        model: any network whose output is one tensor and whose samples do not mix; it is only read.
        inputs: (samples, ...).
        noise: standard deviation s.
        where: "every": noise is added to the output of every weighted layer; "end": to the output alone, within the budget.
        covariance: of the flattened input; None is white.

    Raises:
        ConfigError: the noise is not positive, or the inputs are whole numbers.

    >>> found = channel(nn.Identity(), torch.randn(3, 4))
    >>> found.largest, round(found.bound - found.nats, 9)
    (1.0, 0.0)
    """
    if not 0 < noise < math.inf or where not in ("every", "end"):
        raise ConfigError(f'a channel needs noise above 0, in "every" layer or at the "end"; got {noise} and {where!r}')
    require_rows("a channel", inputs)
    if not inputs.is_floating_point():
        raise ConfigError("a channel needs floating-point inputs, not indices")
    with kept_attributes(model):  # also what is drawn
        jacobian, inner = jacobians(model, inputs)
    covariance = None if covariance is None else covariance.double().to(jacobian.device)
    values = singular_values(jacobian)
    unit = torch.eye(jacobian.shape[1], dtype=jacobian.dtype, device=jacobian.device).expand(len(jacobian), -1, -1)
    last = noise**2 * unit
    if where == "end":
        variance = 1.0 if covariance is None else float(torch.linalg.eigvalsh(covariance)[-1])
        nats = information(within_budget(jacobian), covariance, last)
        bound = unit.new_tensor(capacity(jacobian.shape[1], noise, variance))
    else:
        before = sum((layer @ layer.mT for layer in inner), torch.zeros_like(unit))
        nats, bound = information(jacobian, covariance, last + noise**2 * before), information(jacobian, covariance, last)
    ratio = (values[:, 0] / values[:, -1]).log10()
    return Channel(
        float(values[:, 0].mean()),
        float(values[:, -1].mean()),
        float(ratio.nan_to_num(math.inf, math.inf).mean()),
        float(jacobian.square().sum((1, 2)).mean() / jacobian.shape[1]),
        float(nats.mean()),
        float(bound.mean()),
    )


def jacobians(model: nn.Module, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return Jacobians of each sample's output: in its input, and in the output of every weighted layer but the last.

    Returns:
        (samples, outputs, inputs) and, for each call of a layer but the output's own, (samples, outputs, units); in float64.

    Raises:
        ConfigError: the output is not one tensor of a row for each sample.
    """
    twin = copy.deepcopy(model).double().eval().requires_grad_(False)
    responses: list[Tensor] = []

    def keep(module: nn.Module, args: Any, result: Any) -> Any:
        if isinstance(result, Tensor) and result.requires_grad:
            copy = result.clone()  # a copy, so that an activation in place does not change it
            responses.append(result)
            return copy
        return result

    for module in twin.modules():
        if is_weighted(module):
            module.register_forward_hook(keep)
    x = inputs.detach().double().requires_grad_()
    with torch.enable_grad():
        output = twin(x)
        if not isinstance(output, Tensor) or output.shape[:1] != inputs.shape[:1]:
            raise ConfigError("a channel needs a model that returns one tensor, with a row for each sample")
        output = output.flatten(1)
        places = [x, *responses]
        rows: list[list[Tensor]] = []
        for unit in range(output.shape[1]):
            errors = torch.autograd.grad(output[:, unit].sum(), places, retain_graph=True, allow_unused=True)
            rows.append([torch.zeros_like(p) if e is None else e for p, e in zip(places, errors, strict=True)])
    whole, *inner = (torch.stack([row[i].flatten(1) for row in rows], 1).detach() for i in range(len(places)))
    unit_matrix = torch.eye(output.shape[1], dtype=output.dtype, device=output.device)
    if inner and inner[-1].shape[1:] == unit_matrix.shape and bool((inner[-1] == unit_matrix).all()):
        inner = inner[:-1]  # the last layer's response is the output, whose noise is counted at the end
    return whole, inner
