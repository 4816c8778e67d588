"""What the tests of strong deep feedback control share: problems, and slow loops, one sample and one time step at a time.

Written from the equations (arXiv 2204.07249 and 2106.07887) in absolute potentials.
"""

import math
from itertools import pairwise

import dfc_reference as ref
import torch
import torch.nn.functional as F
from test_dfc import batch
from torch import Tensor, nn

from apical import StrongDeepFeedbackControl
from apical.rules.feedback_control.trajectory import Loop

KINDS = ["classes", "regression"]
LOOP = {"alpha": 0.05, "k_p": 0.6, "dt": 0.05, "points": 25, "tau": 0.12}


def made(kind: str, widths: tuple[int, ...] = (5, 7, 6, 3), size: int = 4, **options: object) -> tuple:
    """Rule, sections, inputs, targets; the targets of a regression lie about 1 away."""
    model, net = ref.mlp(widths, nn.Tanh())
    inputs, targets = batch((widths[0],), widths[-1], size)
    if kind == "regression":
        targets = torch.randn(size, widths[-1], dtype=torch.double, generator=torch.Generator().manual_seed(2))
    loss = F.cross_entropy if kind == "classes" else F.mse_loss
    return StrongDeepFeedbackControl(model, loss, **options), net, inputs, targets


def named(rule: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in rule.named_parameters() if p.grad is not None}


def gradients(rule: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    rule.zero_grad()
    rule(inputs, targets).backward()
    return named(rule)


def set_feedback(rule: StrongDeepFeedbackControl, feedback: list[Tensor]) -> None:
    with torch.no_grad():
        for weights, q in zip(rule.feedback, feedback, strict=True):
            weights.copy_(q)


def goals(targets: Tensor, outputs: int, label: float) -> Tensor:
    """Where the outcome of each sample is driven, (batch, n_L): the targets, or `label` on the true class."""
    if targets.is_floating_point():
        return targets
    goal = torch.full((len(targets), outputs), (1 - label) / (outputs - 1), dtype=torch.double)
    goal[torch.arange(len(targets)), targets] = label
    return goal


def jacobian_at(net: ref.Net, point: ref.Point) -> list[Tensor]:
    """`d r_L / d v_i` at the potentials of one sample, whatever holds them there."""
    blocks = [torch.diag(ref.slope(net[-1], point.v[-1]))]
    for i in range(len(net) - 1, 0, -1):
        weight = ref.matrix(net[i], point.r[i].shape)
        blocks.insert(0, blocks[0] @ weight @ torch.diag(ref.slope(net[i - 1], point.v[i - 1])))
    return blocks


def slope_at(point: ref.Point, kind: str) -> Tensor:
    """H: `d out / d r_L`."""
    if kind == "regression":
        return torch.eye(len(point.u), dtype=torch.double)
    p = point.r[-1].softmax(0)
    return torch.diag(p) - torch.outer(p, p)


def noise_draws(net: ref.Net, inputs: Tensor, points: int, sigmas: list[float], seed: int) -> list[list[Tensor | None]]:
    """White noise per step and stage (batch, *shape), in the order of the simulation; None where sigma is 0."""
    shapes = [v.shape for v in ref.feed_forward(net, inputs[0])[0]]
    torch.manual_seed(seed)
    stages = list(zip(sigmas, shapes, strict=True))
    return [
        [torch.randn(len(inputs), *shape, dtype=torch.double) if sigma else None for sigma, shape in stages]
        for _ in range(points - 1)
    ]


def noisy_trajectory(
    net: ref.Net, x: Tensor, q: list[Tensor], goal: Tensor, kind: str, loop: Loop, sigmas: list[float], draws: list
) -> list[ref.Point]:
    """One sample in absolute potentials: `v_fb = Q u + sigma eps`, eps an Ornstein-Uhlenbeck process from 0."""
    v, r = ref.feed_forward(net, x)
    u = integral = torch.zeros_like(goal)
    eps = [torch.zeros_like(each) for each in v]
    history = [ref.Point(u, v, v, [torch.zeros_like(each) for each in v], r)]
    for drawn in draws:
        now = history[-1]
        output = now.r[-1].flatten()
        e = goal - (output.softmax(0) if kind == "classes" else output)
        integral = integral + loop.dt * (e - loop.alpha * (now.u if loop.leak == "code" else integral))
        after = ref.Point(integral + loop.k_p * e, [], [], [], [x])
        for i, section in enumerate(net):
            if drawn[i] is not None:
                eps[i] = (1 - loop.dt / loop.tau_noise) * eps[i] + math.sqrt(loop.dt) / loop.tau_noise * drawn[i]
            basal = section.v(after.r[-1])
            apical = (q[i] @ after.u).view_as(basal) + sigmas[i] * eps[i]
            after.basal.append(basal)
            after.apical.append(apical)
            after.v.append(now.v[i] + loop.dt / loop.tau * (basal + apical - now.v[i]))
            after.r.append(section.phi(after.v[i]))
        history.append(after)
    return history


def high_passed_products(history: list[ref.Point], rate: float) -> list[Tensor]:
    """Mean over t of `v_fb[t] (u[t+1] - u_lp[t+1])^T`; the low-pass starts at u[1]."""
    slow = history[1].u
    sums = [torch.zeros(v.numel(), len(slow), dtype=torch.double) for v in history[0].v]
    for now, after in pairwise(history):
        slow = slow + rate * (after.u - slow)
        for total, apical in zip(sums, now.apical, strict=True):
            total += torch.outer(apical.flatten(), after.u - slow)
    return [total / (len(history) - 1) for total in sums]


@torch.no_grad()
def single_phase(net: ref.Net, inputs: Tensor, goal: Tensor, kind: str, rule: nn.Module, scaled: bool, seed: int) -> tuple:
    """Points of all samples and the feedback gradients, by the slow loops with the rule's own noise."""
    loop, depth = rule.loop, len(net)
    last = loop.sigma if loop.sigma_output is None else loop.sigma_output
    sigmas = [*[loop.sigma] * (depth - 1), last]
    draws = noise_draws(net, inputs, loop.points, sigmas, seed)
    points, means = [], []
    for sample, x in enumerate(inputs):
        own = [[None if xi is None else xi[sample] for xi in step] for step in draws]
        history = noisy_trajectory(net, x, rule.q, goal[sample], kind, loop, sigmas, own)
        points += history
        means.append(high_passed_products(history, loop.dt / 0.7))
    feedback = []
    for i, sigma in enumerate(sigmas):
        s = (1 + loop.tau / loop.tau_noise) ** (depth - 1 - i) if scaled else 1.0
        feedback.append(s / max(sigma, 0.01) ** 2 * torch.stack([mean[i] for mean in means]).mean(0))
    return points, feedback


def open_loop(loop: Loop, depth: int, rate: float) -> float:
    """Minus the mean over t of `E[eps[t] u_hp[t+1]]` in a chain of unit weights, kick by kick; u only listens."""
    section, total = [ref.Section(nn.Identity(), lambda v: v)] * depth, 0.0
    zero, silent = torch.zeros(1, dtype=torch.double), [torch.zeros(1, 1, dtype=torch.double)] * depth
    for at in range(loop.points - 1):
        draws = [[zero + (t == at), *[None] * (depth - 1)] for t in range(loop.points - 1)]
        history = noisy_trajectory(section, zero, silent, zero, "regression", loop, [1.0] + [0.0] * (depth - 1), draws)
        total -= float(high_passed_products(history, rate)[0])
    return total
