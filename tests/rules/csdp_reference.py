"""Slow, independent re-implementation of contrastive-signal-dependent plasticity: layer by layer, weights (from, to).

Written from the equations; nothing of `apical` is used. The modulator is autograd's derivative of the loss of goodness.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Weights(NamedTuple):
    """W_1..W_L, V_2..V_L, M_1..M_L, U_1..U_L (or none), C_1..C_L; thresholds and biases of L layers and the read-out."""

    up: list[Tensor]
    down: list[Tensor]
    lateral: list[Tensor]
    context: list[Tensor]
    read: list[Tensor]
    thresholds: list[Tensor]
    bias: list[Tensor]


class Step(NamedTuple):
    """Spikes p_0..p_L and of the context that arrive; spikes and traces of L layers and the read-out that follow."""

    p: list[Tensor]
    context: Tensor
    s: list[Tensor]
    t: list[Tensor]


def simulate(w: Weights, inputs: Iterable[Tensor], context: Tensor, c: Any) -> Iterator[Step]:
    """A stimulus from rest: input spikes (rows, n_0) by step, context (rows, K); what a step draws, the next reads."""
    rows, layers = len(context), len(w.up)
    h = [each.expand(rows, -1).clone() for each in w.thresholds]
    v, s, t = ([torch.zeros_like(each) for each in h] for _ in range(3))
    p0, pc = context.new_zeros(rows, len(w.up[0])), torch.zeros_like(context)
    for s0 in inputs:
        p = [p0, *(each.clone() for each in s[:layers])]
        j = [c.resistance * p[k] @ w.up[k] - c.inhibition * p[k + 1] @ w.lateral[k] for k in range(layers)]
        for k in range(layers - 1):
            j[k] += c.resistance * p[k + 2] @ w.down[k]
        for k, u in enumerate(w.context):
            j[k] += c.resistance * pc @ u
        for k in range(layers):
            j[k] += c.resistance * w.bias[k]
        j.append(w.bias[-1] + torch.stack([p[k + 1] @ w.read[k] for k in range(layers)]).sum(0))
        for k in range(layers + 1):
            v[k] = v[k] + c.dt / c.membrane * (-v[k] + j[k])
            s[k] = (v[k] > h[k]).double()
            v[k] = (1 - s[k]) * v[k]
            h[k] = (h[k] + c.adaptation * (s[k].sum(1, keepdim=True) - 1)).clamp_min(c.floor)
            t[k] = (1 - c.dt / c.trace) * t[k] * (1 - s[k]) + s[k]
        yield Step(p, pc, list(s), list(t))
        p0, pc = s0, context


def threshold_loss(theta: float, y: Tensor) -> Callable[[Tensor], Tensor]:
    """Of goodness (rows,): the logistic loss of "is this data?", y (rows,) 1 or 0."""
    return lambda g: (torch.log(1 + torch.exp(g - theta)) - (g - theta) * y).mean()


def pairs_loss(alpha: float) -> Callable[[Tensor], Tensor]:
    """Of goodness (rows,): that of a positive less that of its negative, half the rows further down."""
    return lambda g: torch.log(1 + torch.exp(-alpha * (g[: len(g) // 2] - g[len(g) // 2 :]))).mean()


def learn(
    w: Weights, steps: Iterable[Step], loss: Callable[[Tensor], Tensor], target: Tensor, c: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of all steps, the gradients of each matrix, and how often its neurons fired without the synapse; (to, from).

    `target` (positives, K) is what the read-out is to answer to the first rows.
    """
    layers, gradients, silence = len(w.up), dict[str, Tensor](), dict[str, Tensor]()

    def add(name: str, pre: Tensor, m: Tensor, s: Tensor, r: float) -> None:
        gradients[name] = gradients.get(name, 0.0) + (pre.T @ (r * m)).T
        silence[name] = silence.get(name, 0.0) + ((1 - pre).T @ s).T

    def add_bias(k: int, product: Tensor) -> None:
        gradients[f"bias.{k}"] = gradients.get(f"bias.{k}", 0.0) + product

    for p, context, s, t in steps:
        for k in range(layers):
            with torch.enable_grad():
                trace = t[k].clone().requires_grad_()
                (m,) = torch.autograd.grad(loss(trace.square().sum(1)), trace)
            add_bias(k, c.resistance * m.sum(0))
            add(f"up.{k}", p[k], m, s[k], c.resistance)
            add(f"lateral.{k}", p[k + 1], m, s[k], c.inhibition)
            if k < layers - 1:
                add(f"down.{k}", p[k + 2], m, s[k], c.resistance)
            if w.context:
                add(f"context.{k}", context, m, s[k], c.resistance)
            e = 2 * (target - t[-1][: len(target)]) / len(target)
            read = f"read.{k}"
            if k == layers - 1:
                add_bias(k + 1, -(c.resistance * e).sum(0) * (1 - w.bias[-1].abs()))
            product = -(p[k + 1][: len(target)].T @ (c.resistance * e)) * (1 - w.read[k].abs())
            gradients[read] = gradients.get(read, 0.0) + product.T
    for k in range(layers):
        gradients[f"lateral.{k}"].fill_diagonal_(0.0)
    return gradients, silence
