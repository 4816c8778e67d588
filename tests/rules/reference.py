"""Slow, independent re-implementations of the rules' equations, for dense ReLU networks trained with SGD.

Written from the papers with explicit matrices and numpy-like loops over layers; nothing of `apical` is used.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class SGD:
    """Momentum SGD with coupled weight decay, as the papers' code uses it: u <- mu u + g + omega p; p <- p - eta u."""

    lr: float
    momentum: float
    decay: float
    velocity: dict[str, Tensor] = field(default_factory=dict)

    def step(self, name: str, parameter: Tensor, gradient: Tensor) -> Tensor:
        u = self.momentum * self.velocity.get(name, torch.zeros_like(parameter)) + gradient + self.decay * parameter
        self.velocity[name] = u
        return parameter - self.lr * u


@dataclass
class Pass:
    """One forward and backward pass: activities h_0 .. h_L, pre-activations a_1 .. a_L, errors delta_1 .. delta_L."""

    h: list[Tensor]
    a: list[Tensor]
    delta: list[Tensor]


def softmax_error(logits: Tensor, targets: Tensor) -> Tensor:
    """(p - y) / batch: the gradient of the mean cross-entropy."""
    p = torch.exp(logits - logits.max(dim=1, keepdim=True).values)
    p = p / p.sum(dim=1, keepdim=True)
    y = torch.zeros_like(p)
    y[torch.arange(len(targets)), targets] = 1.0
    return (p - y) / len(targets)


def run(
    weights: list[Tensor], biases: list[Tensor], x: Tensor, targets: Tensor, below: Callable[[int, Tensor, Tensor], Tensor]
) -> Pass:
    """`below(layer, delta of that layer, output error)` is the error that reaches the activity under layer l."""
    h, a = [x], []
    for index, (w, b) in enumerate(zip(weights, biases, strict=True)):
        a.append(h[-1] @ w.T + b)
        h.append(a[-1].clamp(min=0.0) if index < len(weights) - 1 else a[-1])
    error = softmax_error(a[-1], targets)
    delta = [error]
    for index in range(len(weights) - 1, 0, -1):
        delta.insert(0, below(index, delta[0], error) * (a[index - 1] > 0))
    return Pass(h, a, delta)


def weight_gradients(result: Pass) -> list[Tensor]:
    """delta_l^T h_{l-1}."""
    return [d.T @ h for d, h in zip(result.delta, result.h, strict=False)]
