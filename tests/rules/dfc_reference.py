"""Slow, independent re-implementation of deep feedback control: one sample and one time step at a time.

Written from the equations of arXiv 2106.07887 in absolute potentials with plain activations; nothing of `apical` is used.
A network is a list of sections, `v_i = affine_i(r_{i-1}), r_i = phi_i(v_i)`; its dense matrices are read off column by
column, and weight gradients of convolutions are autograd's.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Feedback = Sequence[Tensor]
"""Q_i (n_i, n_L)."""


class Section(NamedTuple):
    """The affine modules of a stage, and its activation."""

    affine: nn.Module
    phi: Callable[[Tensor], Tensor]

    def v(self, r: Tensor) -> Tensor:
        """The potential of one sample."""
        return self.affine(r.unsqueeze(0)).squeeze(0)


Net = list[Section]


class Point(NamedTuple):
    """One sample at one time: control, potentials, basal and apical compartments, rates (r[0] is the input)."""

    u: Tensor
    v: list[Tensor]
    basal: list[Tensor]
    apical: list[Tensor]
    r: list[Tensor]


def mlp(
    widths: Sequence[int], hidden: nn.Module, output: nn.Module | None = None, bias: bool = True, seed: int = 0
) -> tuple[nn.Sequential, Net]:
    """A dense float64 network as a model and as sections that share its layers; random biases, no output activation."""
    torch.manual_seed(seed)
    layers = [nn.Linear(n, m, bias) for n, m in pairwise(widths)]
    modules: list[nn.Module] = []
    net: Net = []
    for i, layer in enumerate(layers):
        nn.init.xavier_normal_(layer.weight)
        activation = hidden if i < len(layers) - 1 else output
        modules += [layer] if activation is None else [layer, activation]
        net.append(Section(layer, activation or (lambda v: v)))
    return nn.Sequential(*modules).double(), net


def conv_net(seed: int = 0) -> tuple[nn.Sequential, Net]:
    """A small float64 network of convolutions for samples (2, 6, 6), with stride, padding and pooling; 3 outputs."""
    torch.manual_seed(seed)
    first, second = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3, stride=2)
    pool, flatten, last = nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 3)
    model = nn.Sequential(first, nn.Tanh(), second, nn.LeakyReLU(0.1), pool, flatten, last).double()
    net = [
        Section(first, torch.tanh),
        Section(second, lambda v: F.leaky_relu(v, 0.1)),
        Section(nn.Sequential(pool, flatten, last), lambda v: v),
    ]
    return model, net


@torch.no_grad()
def feed_forward(net: Net, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """v^- and r^- of one sample; r starts with the input."""
    v: list[Tensor] = []
    r = [x]
    for section in net:
        v.append(section.v(r[-1]))
        r.append(section.phi(v[-1]))
    return v, r


@torch.no_grad()
def matrix(section: Section, shape: Sequence[int]) -> Tensor:
    """W of a section, (n_i, n_{i-1}), column by column."""
    size = torch.zeros(tuple(shape)).numel()
    kind = next(section.affine.parameters())
    zero = section.v(kind.new_zeros(tuple(shape)))
    units = torch.eye(size, dtype=kind.dtype)
    return torch.stack([(section.v(unit.view(tuple(shape))) - zero).flatten() for unit in units], 1)


@torch.enable_grad()
def slope(section: Section, v: Tensor) -> Tensor:
    """Diagonal of D_i."""
    v = v.clone().requires_grad_()
    return torch.autograd.grad(section.phi(v).sum(), v)[0].flatten()


def jacobian(net: Net, x: Tensor) -> list[Tensor]:
    """J_i = d r_L / d v_i, (n_L, n_i), by the chain rule in full matrices."""
    v, r = feed_forward(net, x)
    blocks = [torch.diag(slope(net[-1], v[-1]))]
    for i in range(len(net) - 1, 0, -1):
        blocks.insert(0, blocks[0] @ matrix(net[i], r[i].shape) @ torch.diag(slope(net[i - 1], v[i - 1])))
    return blocks


def linear_control(net: Net, x: Tensor, feedback: Feedback, delta: Tensor, a: float) -> Tensor:
    """u of the linearised steady state, from one system in all N potentials and the n_L controls at once.

    `dv_i - W_i D_{i-1} dv_{i-1} - Q_i u = 0` for every layer, and `D_L dv_L + a u = delta`.
    """
    v, r = feed_forward(net, x)
    sizes = [each.numel() for each in v]
    starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    n, outputs = starts[-1], len(delta)
    system, right = x.new_zeros(n + outputs, n + outputs), x.new_zeros(n + outputs)
    for i, q in enumerate(feedback):
        rows = slice(starts[i], starts[i + 1])
        system[rows, rows] = torch.eye(sizes[i], dtype=x.dtype)
        system[rows, n:] = -q
        if i:
            below = slice(starts[i - 1], starts[i])
            system[rows, below] = -matrix(net[i], r[i].shape) @ torch.diag(slope(net[i - 1], v[i - 1]))
    system[n:, starts[-2] : n] = torch.diag(slope(net[-1], v[-1]))
    system[n:, n:] = a * torch.eye(outputs, dtype=x.dtype)
    right[n:] = delta
    return torch.linalg.solve(system, right)[n:]


@torch.no_grad()
def controlled(net: Net, x: Tensor, feedback: Feedback, u: Tensor) -> Point:
    """The forward pass with `Q_i u` added to every potential."""
    point = Point(u, [], [], [], [x])
    for section, q in zip(net, feedback, strict=True):
        basal = section.v(point.r[-1])
        point.basal.append(basal)
        point.apical.append((q @ u).view_as(basal))
        point.v.append(basal + point.apical[-1])
        point.r.append(section.phi(point.v[-1]))
    return point


@torch.no_grad()
def simulate(
    net: Net,
    x: Tensor,
    feedback: Feedback,
    delta: Tensor,
    *,
    points: int,
    dt: float,
    tau: float,
    alpha: float,
    k_p: float,
    leak: str,
    proactive: bool = True,
    instant_transmission: bool = True,
) -> list[Point]:
    """The discrete dynamics from the feed-forward state, all points; basal compartments belong to their own instant."""
    v, r = feed_forward(net, x)
    target = r[-1].flatten() + delta
    u = integral = torch.zeros_like(target)
    history = [Point(u, v, v, [torch.zeros_like(each) for each in v], r)]
    for _ in range(points - 1):
        now = history[-1]
        e = target - now.r[-1].flatten()
        integral = integral + dt * (e - alpha * (now.u if leak == "code" else integral))
        u = integral + k_p * e
        seen = u if proactive else now.u
        after = Point(u, [], [], [], [x])
        for i, section in enumerate(net):
            given = section.v(after.r[i] if instant_transmission else now.r[i])
            apical = (feedback[i] @ seen).view_as(given)
            after.v.append(now.v[i] + dt / tau * (apical + given - now.v[i]))
            after.apical.append(apical)
            after.r.append(section.phi(after.v[-1]))
        after.basal.extend(section.v(rate) for section, rate in zip(net, after.r, strict=False))
        history.append(after)
    return history


def deltas(output: Tensor, targets: Tensor, nudge: float) -> Tensor:
    """`-lambda dLoss/dr_L` of each sample for the cross-entropy, (batch, n_L)."""
    rows = []
    for each, target in zip(output, targets, strict=True):
        leaf = each.detach().clone().requires_grad_()
        rows.append(-nudge * torch.autograd.grad(F.cross_entropy(leaf.unsqueeze(0), target.unsqueeze(0)), leaf)[0])
    return torch.stack(rows)


def gradients(net: Net, points: Sequence[Point], scale: float, difference: str) -> list[Tensor]:
    """`-scale sum over points [phi(v) - phi(v^ff)] r^T` of every parameter, layer by layer (voltages: v - v^ff)."""
    parameters = [p for section in net for p in section.affine.parameters()]
    total = torch.zeros((), dtype=parameters[0].dtype)
    for point in points:
        for i, section in enumerate(net):
            if difference == "rate":
                signal = section.phi(point.v[i]) - section.phi(point.basal[i])
            else:
                signal = point.v[i] - point.basal[i]
            total = total + (section.v(point.r[i]) * signal.detach()).sum()
    return [-scale * each for each in torch.autograd.grad(total, parameters)]


def ssa(net: Net, inputs: Tensor, feedback: Feedback, delta: Tensor, a: float, difference: str = "rate") -> list[Tensor]:
    """Gradients of DFC-SSA for a batch."""
    points = [
        controlled(net, x, feedback, linear_control(net, x, feedback, d, a)) for x, d in zip(inputs, delta, strict=True)
    ]
    return gradients(net, points, 2 / len(inputs), difference)


def simulated(
    net: Net, inputs: Tensor, feedback: Feedback, delta: Tensor, variant: str, difference: str = "rate", **loop: float
) -> list[Tensor]:
    """Gradients of simulated DFC (variant "dfc": all points; "ss": the last one) for a batch; `loop` as of `simulate`."""
    histories = [simulate(net, x, feedback, d, **loop) for x, d in zip(inputs, delta, strict=True)]
    if variant == "ss":
        return gradients(net, [history[-1] for history in histories], 2 / len(inputs), difference)
    points = [point for history in histories for point in history]
    return gradients(net, points, 2 / len(points), difference)
