"""How much a layer's activities can say: entropies, and the dimensions that they fill.

    gaussian = 1/2 log det(2 pi e (C + s^2 I)),   C: covariance over samples, scaled to a mean variance of 1
    marginal = sum over units of the entropy of a histogram of each, an upper bound for the code in that quantisation
    participation ratio = (sum lambda)^2 / sum lambda^2,   effective rank = exp(entropy of sigma / sum sigma)

lambda are the eigenvalues of C, sigma the singular values of the centred activities. That a structure should maximise the
entropy of its output is the claim of Yuan et al. (arXiv 2105.13905), whose own estimator could not be read; the effective
rank is that of Roy & Vetterli 2007 (RankMe, arXiv 2210.02885).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apical.core.activations import is_activation
from apical.core.layers import is_packed, is_weighted
from apical.core.rest import evaluating, kept_attributes
from apical.core.spike_times import SILENT, SpikingLinear
from apical.errors import ConfigError, require_count

NOISE = 0.1
"""Standard deviation of the noise that a code has to be read through, where activities have a mean variance of 1."""


def covariance_spectrum(activities: Tensor) -> Tensor:
    """Return the eigenvalues of the covariance of activities (samples, units), from large to small: (units,), in float64."""
    centred = activities.double() - activities.double().mean(0)
    values: Tensor = torch.linalg.eigvalsh(centred.mT @ centred / len(centred)).clamp(min=0)
    return values.flip(0)


def gaussian_entropy(spectrum: Tensor, noise: float = NOISE) -> float:
    """Return the nats of a Gaussian code with a covariance of this spectrum (units,), scaled to a mean variance of 1.

    White activities have the most: the log is concave.
    """
    scaled = spectrum / spectrum.mean() if spectrum.sum() > 0 else spectrum
    return float(0.5 * (2 * math.pi * math.e * (scaled + noise**2)).log().sum())


def marginal_entropy(activities: Tensor, bins: int = 32) -> float:
    """Return the nats of each unit's histogram over its own range, summed over units; activities are (samples, units)."""
    low, high = activities.amin(0), activities.amax(0)
    width = torch.where(high > low, high - low, 1)
    places = ((activities - low) / width * bins).long().clamp(max=bins - 1)
    shares = torch.stack([(places == place).double().mean(0) for place in range(bins)])  # (bins, units)
    return float(-torch.xlogy(shares, shares).sum())


def participation_ratio(spectrum: Tensor) -> float:
    """Return how many dimensions hold the variance: n for a white code, 1 for one of rank one, 0 for a silent one.

    >>> participation_ratio(torch.ones(5)), participation_ratio(torch.tensor([3.0, 0.0]))
    (5.0, 1.0)
    """
    square = float(spectrum.square().sum())
    return float(spectrum.sum()) ** 2 / square if square else 0.0


def effective_rank(spectrum: Tensor) -> float:
    """Return the exponential of the entropy of the singular values' shares; never above the rank.

    >>> round(effective_rank(torch.ones(5)), 6)
    5.0
    """
    sigma = spectrum.sqrt()
    if not sigma.sum():
        return 0.0
    shares = sigma / sigma.sum()
    return math.exp(-float(torch.xlogy(shares, shares).sum()))


@dataclass(frozen=True)
class Code:
    """What one layer's activities are like.

    Attributes:
        gaussian_nats, marginal_nats: entropies.
        participation_ratio, effective_rank: dimensions.
        dead: share of the units that do not vary over the samples.
        units: how many there are.
    """

    gaussian_nats: float
    marginal_nats: float
    participation_ratio: float
    effective_rank: float
    dead: float
    units: int


def code_of(activities: Tensor, noise: float = NOISE, bins: int = 32) -> Code:
    """Return the numbers of one layer.

    Args:
        activities: (samples, units).
        noise: see :func:`gaussian_entropy`.
        bins: see :func:`marginal_entropy`.

    Raises:
        ConfigError: there are fewer than two samples, or an activity is not finite.
    """
    if len(activities) < 2 or not torch.isfinite(activities).all():
        raise ConfigError("a code is measured on two samples or more, with finite activities")
    require_count("bins", bins)
    spectrum = covariance_spectrum(activities)
    dead = float((activities == activities[0]).all(0).double().mean())
    return Code(
        gaussian_entropy(spectrum, noise),
        marginal_entropy(activities, bins),
        participation_ratio(spectrum),
        effective_rank(spectrum),
        dead,
        activities.shape[1],
    )


def activities(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Activities of every layer in evaluation mode, (samples, units) by the name of the module that makes them.

    These are the outputs of activations, or of weighted layers in a model whose activations are functions; of recurrent and
    attention modules, which have activations within; and of the model itself as "output". Places of a feature map, moments
    and tokens count as samples. Neurons that fire later than at time 10, or never, count as if at 10, as read-outs have it.
    """
    modules = dict(model.named_modules())
    kind = is_activation if any(map(is_activation, modules.values())) else is_weighted
    names = {module: name for name, module in modules.items() if kind(module) or is_packed(module)}
    rates: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: Any, result: Any) -> None:
        result = result[0] if isinstance(result, tuple) and result else result  # next to the state or attention's weights
        if isinstance(module, SpikingLinear):
            result = result.clamp_max(SILENT)
        if isinstance(result, Tensor):
            name, times = names[module], sum(key.partition("#")[0] == names[module] for key in rates)
            rates[f"{name}#{times + 1}" if times else name] = _rows(result)

    handles = [module.register_forward_hook(keep) for module in names]
    try:
        with evaluating(model), kept_attributes(model), torch.no_grad():
            output = model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if isinstance(output, Tensor):
        rates["output"] = _rows(output)
    return rates


def coding(model: nn.Module, inputs: Tensor, noise: float = NOISE, bins: int = 32) -> dict[str, Code]:
    """Return the code of every layer on a batch of inputs (samples, ...); see :func:`activities`.

    Raises:
        ConfigError: see :func:`code_of`.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> {name: code.units for name, code in coding(model, torch.randn(8, 4)).items()}
    {'1': 3, 'output': 2}
    """
    return {name: code_of(rows, noise, bins) for name, rows in activities(model, inputs).items()}


def _rows(result: Tensor) -> Tensor:
    """Return (batch, units), (batch, channels, *places) of maps, or (batch, tokens, units), as (samples, units)."""
    if result.dim() > 3:
        result = result.movedim(1, -1)
    return result.detach().double().cpu().reshape(-1, result.shape[-1])
