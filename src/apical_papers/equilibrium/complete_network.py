"""Directed equilibrium propagation in complete networks (DEEP: Tristany Farinha et al., arXiv 2006.08798).

    ds_j/dt = sum_i W_ij s_i - s_j sum_k W_jk,   s in [0, 1],   ds_out/dt += beta (y - s_out) while nudged
    dW = mean over samples and nudged steps of S_t^T (S_t - S_{t-1})

Every neuron may reach every other except inputs, with a separate weight for each direction. A neuron's outflow is its leak,
so that the field summed over all neurons is zero. No theorem relates the update to a gradient; the authors' follow-up
reports convergence problems. The network has no layers, so this is not a rule of :mod:`apical.rules` but a set of functions.

Neurons are columns: inputs, then hidden neurons, then outputs. The last input is the bias, always 1.
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
        """Return a mask (N, N), 1 where a weight is allowed: not to itself, not into inputs."""
        allowed = 1 - torch.eye(self.size)
        allowed[:, : self.inputs] = 0
        return allowed

    def start(self, inputs: Tensor) -> Tensor:
        """Return states (batch, N) with the inputs (batch, inputs - 1) and the bias clamped, the others drawn from [0, 0.1).

        Raises:
            ConfigError: the inputs have another size.
        """
        if inputs.shape[1] != self.inputs - 1:
            raise ConfigError(f"this network has {self.inputs - 1} inputs and a bias, not {inputs.shape[1]}")
        free = 0.1 * inputs.new_empty(len(inputs), self.size - self.inputs).uniform_()
        return torch.cat((inputs, inputs.new_ones(len(inputs), 1), free), 1)


def flow(s: Tensor, weight: Tensor) -> Tensor:
    """Return `ds/dt` of all neurons (batch, N), nothing clamped: inflow minus outflow, which sums to zero."""
    return s @ weight - s * weight.sum(1)


def settle(
    network: Complete, s: Tensor, weight: Tensor, steps: int, dt: float, beta: float = 0.0, y: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return states after `steps` Euler steps, and their mean `S_t^T (S_t - S_{t-1})` (N, N), summed over the batch.

    Args:
        network: sizes.
        s: (batch, N); inputs do not change.
        weight: (N, N), from row to column.
        steps: number of steps, at least 1.
        dt: size of a step.
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
    """Return the baseline's states: the leak is 1 instead of the outflow, `ds_j/dt = sum_i W_ij s_i - s_j`."""
    for _ in range(steps):
        change = s @ weight - s
        if beta and y is not None:
            change[:, -network.outputs :] += beta * (y - s[:, -network.outputs :])
        after = (s + dt * change).clamp_(0, 1)
        after[:, : network.inputs] = s[:, : network.inputs]
        s = after
    return s


def asymmetric_update(free: Tensor, nudged: Tensor, beta: float) -> Tensor:
    """Return the baseline's weight update: `mean S_free^T (S_nudged - S_free) / beta`, (N, N)."""
    return free.T @ (nudged - free) / (beta * len(free))


def shrunk(weight: Tensor, amount: float) -> Tensor:
    """Return weights moved towards zero by `amount`, by the sign of each."""
    return weight - amount * weight.sign()


def is_surely_stable(network: Complete, weight: Tensor) -> bool:
    """Return Gershgorin's condition on all neurons but inputs: outflow exceeds inflow; it is only sufficient."""
    own = weight[network.inputs :]
    leak = own.sum(1)
    reaching = own[:, network.inputs :].abs().sum(0)
    return bool((leak > 0).all() and (reaching < leak).all())
