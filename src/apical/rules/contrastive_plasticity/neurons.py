"""Leaky integrate-and-fire neurons in discrete time, their traces, and the goodness of traces; pure functions.

    v <- v + (dt / tau_m) (j - v),   s = 1[v > h],   v <- (1 - s) v
    h <- max(h + rho (sum_i s_i - 1), floor)                                  one increment for the whole layer
    t <- (1 - dt / tau_t) t (1 - s) + s                                       the gated trace, in [0, 1]
    G = sum_i t_i^2,   p = sigmoid(G - theta),   m = dL/dt = 2 t (p - y) / B  for L the logistic loss of y

Rows are samples: v, s, h and t are (rows, n), one threshold for each neuron of each sample.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Constants(NamedTuple):
    """Constants of the simulation, times in milliseconds; the released code's values.

    Attributes:
        dt: duration of one step.
        membrane: tau_m.
        trace: tau_t.
        resistance: R_m, of excitatory currents.
        inhibition: R_inh, of lateral currents.
        adaptation: rho, of thresholds.
        floor: lower bound of thresholds.
    """

    dt: float = 3.0
    membrane: float = 100.0
    trace: float = 13.0
    resistance: float = 0.1
    inhibition: float = 0.01
    adaptation: float = 0.001
    floor: float = 0.025


class Neurons(NamedTuple):
    """Potentials v, spikes s (0 or 1), thresholds h, traces t and modulators m, each (rows, n), written in place."""

    v: Tensor
    s: Tensor
    h: Tensor
    t: Tensor
    m: Tensor


def draw_(spikes: Tensor, p: Tensor, u: Tensor) -> Tensor:
    """Write 1 with probability p, otherwise 0, using uniform numbers u in [0, 1); all rows may share u."""
    return torch.gt(p, u, out=spikes)  # floats in one pass, no booleans


def draw_with_shift_(spikes: Tensor, p: Tensor, phase: Tensor, shift: Tensor) -> Tensor:
    """Write spikes with probability p (kinds, samples, n) by numbers `(phase + shift) mod 1`, much faster than new draws.

    With a phase (samples, n) for the stimulus and a shift (kinds, 1, n) for the step, both uniform, the numbers of one row
    are uniform and independent over inputs and steps; at any one step those of all rows are.
    """
    return torch.add(phase, shift, out=spikes.view(p.shape)).frac_().lt_(p)


def resting(rows: int, thresholds: Tensor) -> Neurons:
    """Return silent neurons (rows, n) with the initial thresholds (n,) of a stimulus."""
    v, s, t, m = (thresholds.new_zeros(rows, len(thresholds)) for _ in range(4))
    return Neurons(v, s, thresholds.repeat(rows, 1), t, m)


def charge_(v: Tensor, currents: Iterable[tuple[Tensor, Tensor, float]], bias: Tensor | None, constants: Constants) -> None:
    """Take the membrane's step for potentials (rows, n).

    Args:
        v: the potentials, updated in place.
        currents: at least one triple of spikes (rows, n_from), weights (n, n_from) and a factor.
        bias: a constant current (n,).
        constants: of the membrane.
    """
    share = constants.dt / constants.membrane
    left = 1 - share
    if bias is not None:
        v.lerp_(bias, share)
        left = 1.0
    for spikes, weight, factor in currents:  # currents are not stored: products are added to the leaked v
        v.addmm_(spikes, weight.T, beta=left, alpha=share * factor)
        left = 1.0


def fire_(neurons: Neurons, member: Tensor, constants: Constants) -> None:
    """Spikes, resets, thresholds and traces of a step; member (layers, n) is 1 where a neuron belongs to a layer."""
    v, s, h, t, _ = neurons
    draw_(s, v, h)
    v.addcmul_(v, s, value=-1)
    excess = (member @ s.T).sub_(1)  # sum_i s_i - 1, (layers, rows)
    h.addmm_(excess.T, member, alpha=constants.adaptation).clamp_min_(constants.floor)
    t.mul_(1 - constants.dt / constants.trace).clamp_min_(s)  # traces never exceed 1


def goodness(t: Tensor) -> Tensor:
    """G (rows,) of traces (rows, n)."""
    return t.square().sum(1)


def threshold_loss(g: Tensor, y: Tensor, theta: float) -> Tensor:
    """Mean of the logistic loss of goodness (..., rows) for y (rows,), 1 of positive and 0 of negative samples."""
    return F.binary_cross_entropy_with_logits(g - theta, y.expand_as(g))


def threshold_slope(g: Tensor, y: Tensor, theta: float) -> Tensor:
    """Its derivative by goodness (..., rows), `(p - y) / rows`."""
    return (g - theta).sigmoid_().sub_(y).div_(len(y))


def pairs_loss(g: Tensor, alpha: float) -> Tensor:
    """Mean of `log(1 + exp(-alpha (G+ - G-)))`, the first half of (..., rows) positive, the second their negatives."""
    positive, negative = g.chunk(2, -1)
    return F.softplus(alpha * (negative - positive)).mean()


def pairs_slope(g: Tensor, alpha: float) -> Tensor:
    """Its derivative by goodness (..., rows)."""
    positive, negative = g.chunk(2, -1)
    push = alpha * torch.sigmoid(alpha * (negative - positive)) / positive.shape[-1]
    return torch.cat([-push, push], -1)


def modulate_traces_(t: Tensor, slope: Tensor) -> Tensor:
    """Turn traces (rows, n) into m: the derivative of a loss of goodness by them, given that by goodness (rows, 1)."""
    return t.mul_(2 * slope)
