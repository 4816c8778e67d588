"""Directed equilibrium propagation in complete networks (DEEP: Tristany Farinha et al., arXiv 2006.08798).

    ds_j/dt = sum_i W_ij s_i - s_j sum_k W_jk,   s in [0, 1],   ds_out/dt += beta (y - s_out) while nudged
    dW = mean over samples and nudged steps of S_t^T (S_t - S_{t-1})

Every neuron may reach every other but inputs, by a weight of its own for each direction. What a neuron sends away counts as
its leak, so that the field summed over all neurons is zero. No theorem ties the update to a gradient; the authors' follow-up
reports trouble with convergence. There is no model of layers here, and so no rule of :mod:`apical.rules`: these are
functions.

Neurons are columns: inputs, then hidden ones, then outputs. The last input is the bias, always 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from apical.errors import ConfigError


class Complete(NamedTuple):
    """Sizes of a complete network: `inputs` with the bias, `hidden`, `outputs`."""

    inputs: int
    hidden: int
    outputs: int

    @property
    def size(self) -> int:
        """Neurons N."""
        return sum(self)

    def mask(self) -> Tensor:
        """1 where a weight may be (N, N): none to itself, none into inputs."""
        allowed = 1 - torch.eye(self.size)
        allowed[:, : self.inputs] = 0
        return allowed

    def start(self, inputs: Tensor) -> Tensor:
        """States (batch, N) with the inputs (batch, inputs - 1) and the bias clamped, the others drawn from [0, 0.1).

        Raises:
            ConfigError: the inputs have another size.
        """
        if inputs.shape[1] != self.inputs - 1:
            raise ConfigError(f"this network has {self.inputs - 1} inputs and a bias, not {inputs.shape[1]}")
        free = 0.1 * inputs.new_empty(len(inputs), self.size - self.inputs).uniform_()
        return torch.cat((inputs, inputs.new_ones(len(inputs), 1), free), 1)


def flow(s: Tensor, weight: Tensor) -> Tensor:
    """`ds/dt` of all neurons (batch, N), nothing clamped: inflow minus what each neuron sends away, which sums to zero."""
    return s @ weight - s * weight.sum(1)


def settle(
    network: Complete, s: Tensor, weight: Tensor, steps: int, dt: float, beta: float = 0.0, y: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """States after `steps` Euler steps, and the mean over them of `S_t^T (S_t - S_{t-1})` (N, N), summed over the batch.

    Args:
        network: sizes.
        s: (batch, N); inputs stay as they are.
        weight: (N, N), from row to column.
        steps: at least 1.
        dt: of a step.
        beta: nudge of the outputs towards `y` (batch, outputs).
        y: targets in [0, 1].
    """
    product = torch.zeros_like(weight)
    for _ in range(steps):
        change = flow(s, weight)
        if beta and y is not None:
            change[:, -network.outputs :] += beta * (y - s[:, -network.outputs :])
        change[:, : network.inputs] = 0
        after = (s + dt * change).clamp_(0, 1)
        after[:, : network.inputs] = s[:, : network.inputs]
        product.addmm_(after.T, after - s)
        s = after
    return s, product / steps


def asymmetric_settle(
    network: Complete, s: Tensor, weight: Tensor, steps: int, dt: float, beta: float = 0.0, y: Tensor | None = None
) -> Tensor:
    """The baseline's states: the leak is 1 instead of what a neuron sends away, `ds_j/dt = sum_i W_ij s_i - s_j`."""
    for _ in range(steps):
        change = s @ weight - s
        if beta and y is not None:
            change[:, -network.outputs :] += beta * (y - s[:, -network.outputs :])
        after = (s + dt * change).clamp_(0, 1)
        after[:, : network.inputs] = s[:, : network.inputs]
        s = after
    return s


def asymmetric_update(free: Tensor, nudged: Tensor, beta: float) -> Tensor:
    """What the baseline adds to the weights: `mean S_free^T (S_nudged - S_free) / beta`, (N, N)."""
    return free.T @ (nudged - free) / (beta * len(free))


def shrunk(weight: Tensor, amount: float) -> Tensor:
    """Weights moved towards zero by `amount`, by the sign of each."""
    return weight - amount * weight.sign()


def is_surely_stable(network: Complete, weight: Tensor) -> bool:
    """Gershgorin's condition on the neurons that are no inputs: each sends away more than reaches it; sufficient only."""
    own = weight[network.inputs :]
    leak = own.sum(1)
    reaching = own[:, network.inputs :].abs().sum(0)
    return bool((leak > 0).all() and (reaching < leak).all())
