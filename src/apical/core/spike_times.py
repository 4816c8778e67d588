"""Neurons that fire once: a layer of spike times in closed form (ReL-PSP), exact in both derivatives.

    V_j(t) = sum_i w_ji max(t - t_i, 0),   t_j = the first t with V_j(t) = theta
    C_j = {i: t_i < t_j},   S_j = sum_{C_j} w_ji,   t_j = (theta + sum_{C_j} w_ji t_i) / S_j
    dt_j/dw_ji = (t_i - t_j) / S_j,   dt_j/dt_i = w_ji / S_j   for i in C_j, else zero

A neuron that never reaches theta is silent: its time is infinite, and it has no gradient. In dt_j/dt_i a rule with feedback
weights puts its own in the place of w_ji.

Source: arXiv 2003.11837 (the neuron), whose closed form and gradients follow from it; encoding, threshold and first weights
are choices of ours, as the paper's are not known here.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from apical.core.layers import register_layer
from apical.errors import ConfigError

CHUNK = 4_000_000
"""Numbers in the largest tensor of a forward or backward pass: samples are taken in turn."""


SILENT = 10.0
"""When a silent neuron counts as firing, for a read-out."""


class Sorted(NamedTuple):
    """Inputs that fire, in the order in which they do, up to the most of any sample (batch, k).

    Attributes:
        times: zero where a sample has fewer.
        order: whose they are.
        fires: whether there is one.
        until: the next one's time, infinity behind the last.
    """

    times: Tensor
    order: Tensor
    fires: Tensor
    until: Tensor


def sort(t: Tensor) -> Sorted:
    """Of input times (batch, n)."""
    times, order = t.sort(1)
    most = t.shape[1]
    if t.numel() and not torch.compiler.is_compiling():
        most = max(1, int(times.isfinite().sum(1).max()))
    until = torch.cat([times[:, 1 : most + 1], times.new_full((len(t), 1), torch.inf)], 1)[:, :most]
    fires = times[:, :most].isfinite()
    return Sorted(times[:, :most].masked_fill(~fires, 0.0), order[:, :most], fires, until)


def spike_times(t: Tensor, weight: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """Return the times (batch, m) and slopes S (batch, m) at them; infinity and 1 of silent neurons.

    Args:
        t: input times (batch, n); infinity for silent inputs.
        weight: (m, n).
        theta: the threshold.
    """
    inputs = sort(t)
    w = weight.T[inputs.order] * inputs.fires.unsqueeze(2)  # (batch, k, m)
    slope = w.cumsum(1)
    crossing = (w * inputs.times.unsqueeze(2)).cumsum_(1).add_(theta).div_(slope)  # (theta + P) / S after k inputs
    valid = (slope > 0) & (crossing >= inputs.times.unsqueeze(2)) & (crossing <= inputs.until.unsqueeze(2))
    valid &= inputs.fires.unsqueeze(2)
    first = valid.to(torch.int8).argmax(1, keepdim=True)
    fires = valid.any(1)
    times = crossing.gather(1, first).squeeze(1).masked_fill(~fires, torch.inf)
    return times, slope.gather(1, first).squeeze(1).masked_fill(~fires, 1.0)


def spike_gradients(t: Tensor, out: Tensor, slope: Tensor, weight: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of input times (batch, n) and weights (m, n), of g (batch, m) by the times `out`.

    Args:
        t: input times.
        out: the layer's.
        slope: S, or what it is held above.
        weight: hands the gradient to the inputs: the layer's weight, or a feedback weight in its place.
        g: gradient of the output times.
    """
    inputs = sort(t)
    q = (g / slope).masked_fill(~out.isfinite(), 0.0)
    causal = (inputs.times.unsqueeze(2) < out.unsqueeze(1)) & inputs.fires.unsqueeze(2)
    share = causal * q.unsqueeze(1)  # (batch, k, m)
    below = torch.zeros_like(t).scatter_(1, inputs.order, (share * weight.T[inputs.order]).sum(2))
    late = inputs.times.unsqueeze(2) - out.masked_fill(~out.isfinite(), 0.0).unsqueeze(1)
    products = torch.zeros_like(weight.T).index_add_(0, inputs.order.flatten(), share.mul_(late).flatten(0, 1))
    return below, products.T


class SpikeTimes(torch.autograd.Function):
    """Times of a layer, whose backward pass hands errors to the inputs through the feedback, or the weight if it is None."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, weight: Tensor, theta: float, floor: float, feedback: Tensor | None = None) -> Tensor:
        """Return the times (batch, m) for inputs (batch, n) and weights (m, n)."""
        parts = [spike_times(part, weight, theta) for part in t.split(_rows(t, weight))]
        out, slope = (torch.cat([part[k] for part in parts]) for k in range(2))
        ctx.save_for_backward(t, weight if feedback is None else feedback, out, slope.clamp_min(floor))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of times and weights."""
        t, weight, out, slope = ctx.saved_tensors
        rows = _rows(t, weight)
        parts = zip(*(each.split(rows) for each in (t, out, slope, g)), strict=True)
        gradients = [spike_gradients(times, made, s, weight, error) for times, made, s, error in parts]
        products = torch.stack([each for _, each in gradients]).sum(0)
        return torch.cat([below for below, _ in gradients]), products, None, None, None


def _rows(t: Tensor, weight: Tensor) -> int:
    """Samples at a time."""
    return max(1, CHUNK // max(1, weight.numel()))


class SpikingLinear(nn.Linear):
    """Times of neurons that fire once: (batch, in_features) -> (batch, out_features), infinite for silent ones.

    It has no bias. Rules that take layers for affine maps refuse it; those that only need a weight between two populations,
    to hand an error down, train it.

    Args:
        in_features: n.
        out_features: m.
        theta: the threshold.
        floor: the least slope that the backward pass divides by; 0 is the exact derivative.
        active: approximate number of inputs that fire; initial weights are scaled for it (by default all inputs).

    Raises:
        ConfigError: an option out of range.

    >>> layer = SpikingLinear(1, 1)
    >>> _ = nn.init.constant_(layer.weight, 2.0)
    >>> layer(torch.tensor([[0.3]]))  # 0.3 + theta / w
    tensor([[0.8000]], grad_fn=<SpikeTimesBackward>)
    """

    def __init__(
        self, in_features: int, out_features: int, theta: float = 1.0, floor: float = 0.1, active: float | None = None
    ) -> None:
        active = float(in_features) if active is None else active
        if not (theta > 0 and floor >= 0 and active > 0):
            raise ConfigError(
                f"theta and active must be positive, floor not negative; got theta={theta}, active={active}, floor={floor}"
            )
        self.theta, self.floor, self.active = theta, floor, active
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Draw weights of mean 3 theta / active and deviation 0.8 theta / sqrt(active), with which most neurons fire."""
        nn.init.normal_(self.weight, 3 * self.theta / self.active, 0.8 * self.theta / self.active**0.5)

    def forward(self, input: Tensor) -> Tensor:
        """Return the times of the neurons for those of the inputs.

        Raises:
            ConfigError: no (batch, in_features).
        """
        if input.dim() != 2 or input.shape[1] != self.in_features:
            raise ConfigError(f"SpikingLinear takes times (batch, {self.in_features}), not {tuple(input.shape)}")
        return self._times(input, None)

    def _times(self, input: Tensor, feedback: Tensor | None) -> Tensor:
        result: Tensor = cast(Any, SpikeTimes).apply(input, self.weight, self.theta, self.floor, feedback)
        return result

    def extra_repr(self) -> str:
        """Return the sizes and threshold."""
        return f"in_features={self.in_features}, out_features={self.out_features}, theta={self.theta}"


class FirstSpike(nn.Module):
    """Times of inputs between 0 and 1, (batch, ...) -> (batch, n): `1 - x`, and no spike up to `silent`.

    >>> FirstSpike()(torch.tensor([[0.0, 0.25, 1.0]]))
    tensor([[   inf, 0.7500, 0.0000]])
    """

    def __init__(self, silent: float = 0.1) -> None:
        super().__init__()
        self.silent = silent

    def forward(self, x: Tensor) -> Tensor:
        """Times; above 1 counts as 1."""
        x = x.flatten(1)
        return (1 - x.clamp_max(1.0)).masked_fill(x <= self.silent, torch.inf)


class Readout(nn.Module):
    """Scores of classes: the earlier, the larger. `-scale t`, and `-scale latest` where no spike has come by then.

    With scale 1 a cross entropy continues to make the other classes later when the right one leads by a whole unit of time,
    until they are silent, from where no gradient brings them back; then their own samples have no answer.
    """

    def __init__(self, latest: float = SILENT, scale: float = 16.0) -> None:
        super().__init__()
        self.latest, self.scale = latest, scale

    def forward(self, t: Tensor) -> Tensor:
        """Return logits (batch, K) of times (batch, K)."""
        return -self.scale * t.clamp_max(self.latest)


register_layer(SpikingLinear, through=SpikingLinear._times)
