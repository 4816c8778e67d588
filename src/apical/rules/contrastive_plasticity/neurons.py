"""Leaky integrate-and-fire neurons in discrete time, their traces, and the goodness that traces have; pure functions.

    v <- v + (dt / tau_m) (j - v),   s = 1[v > h],   v <- (1 - s) v
    h <- max(h + rho (sum_i s_i - 1), floor)                                  one increment for the whole layer
    t <- (1 - dt / tau_t) t (1 - s) + s                                       the gated trace, in [0, 1]
    G = sum_i t_i^2,   p = sigmoid(G - theta),   m = dL/dt = 2 t (p - y) / B  for L the logistic loss of y

Rows are samples: v, s, h and t are (rows, n), one threshold for each neuron of each sample.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Constants(NamedTuple):
    """Of the simulation, times in milliseconds; the released code's values.

    Attributes:
        dt: one step.
        membrane: tau_m.
        trace: tau_t.
        resistance: R_m, of excitatory currents.
        inhibition: R_inh, of lateral currents.
        adaptation: rho, of thresholds.
        floor: below which no threshold falls.
    """

    dt: float = 3.0
    membrane: float = 100.0
    trace: float = 13.0
    resistance: float = 0.1
    inhibition: float = 0.01
    adaptation: float = 0.001
    floor: float = 0.025


class Neurons(NamedTuple):
    """A layer: potentials v, spikes s (0 or 1), thresholds h and traces t, each (rows, n)."""

    v: Tensor
    s: Tensor
    h: Tensor
    t: Tensor


def drawn(p: Tensor, u: Tensor) -> Tensor:
    """Spikes, 1 with probability p and else 0, made of uniform numbers u in [0, 1); u may be for all rows."""
    return p.clone().gt_(u)  # in place, so that no booleans have to become numbers


def drawn_with_shift(p: Tensor, phase: Tensor, shift: Tensor) -> Tensor:
    """Spikes with probability p (rows, n) of the numbers `(phase + shift) mod 1`, a tenth of the time of fresh ones.

    With a phase (rows, n) for the stimulus and a shift (n,) for the step, both uniform, the numbers of one row are uniform
    and independent over inputs and steps; at any one step those of all rows are.
    """
    return (phase + shift).frac_().lt_(p)


def resting(rows: int, thresholds: Tensor) -> Neurons:
    """Silent neurons (rows, n) with the thresholds (n,) that every stimulus starts from."""
    zero = thresholds.new_zeros(rows, len(thresholds))
    return Neurons(zero, zero, thresholds.expand(rows, -1), zero)


def stepped(neurons: Neurons, j: Tensor, constants: Constants) -> Neurons:
    """One step dt with currents j (rows, n)."""
    v = torch.lerp(neurons.v, j, constants.dt / constants.membrane)
    s = drawn(v, neurons.h)
    h = torch.add(neurons.h, s.sum(1, keepdim=True) - 1, alpha=constants.adaptation).clamp_min_(constants.floor)
    t = torch.maximum(neurons.t * (1 - constants.dt / constants.trace), s)  # traces never exceed 1
    return Neurons(v.addcmul_(v, s, value=-1), s, h, t)


def goodness(t: Tensor) -> Tensor:
    """G (rows,) of traces (rows, n)."""
    return t.square().sum(1)


def threshold_loss(g: Tensor, y: Tensor, theta: float) -> Tensor:
    """Mean of the logistic loss of goodness (..., rows) for y (rows,), 1 of positive and 0 of negative samples."""
    return F.binary_cross_entropy_with_logits(g - theta, y.expand_as(g))


def threshold_slope(g: Tensor, y: Tensor, theta: float) -> Tensor:
    """Its derivative by goodness, `(p - y) / rows`."""
    return (torch.sigmoid(g - theta) - y) / len(g)


def pairs_loss(g: Tensor, alpha: float) -> Tensor:
    """Mean of `log(1 + exp(-alpha (G+ - G-)))`, the first half of (..., rows) positive, the second their negatives."""
    positive, negative = g.chunk(2, -1)
    return F.softplus(alpha * (negative - positive)).mean()


def pairs_slope(g: Tensor, alpha: float) -> Tensor:
    """Its derivative by goodness (rows,)."""
    positive, negative = g.chunk(2)
    push = alpha * torch.sigmoid(alpha * (negative - positive)) / len(positive)
    return torch.cat([-push, push])


def modulator(t: Tensor, slope: Tensor) -> Tensor:
    """m (rows, n): the derivative of a loss of goodness by traces, given that by goodness (rows,)."""
    return t * (2 * slope).unsqueeze(1)
