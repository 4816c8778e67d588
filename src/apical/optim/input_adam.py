"""Adam with one second moment per input of a layer, so that feedback can learn by its own local step.

    m <- beta1 m + (1 - beta1) G,   v_j <- beta2 v_j + (1 - beta2) |G_:j|^2 / n_out
    W_ij <- (1 - lr decay) W_ij - lr (m_ij / (1 - beta1^t)) / (sqrt(v_j / (1 - beta2^t)) + eps)

A scale per input is a multiplication from the right, which commutes with `B^T` from the left: the step of `B^T G` is
`B^T` times the step of G if both have the same v. For PFA's R, whose gradient is `B^T G`, n_out is that of the weight,
since `|B^T g| = |g|`: exactly for orthogonal B, on average for random B. The method is ours; the decay is AdamW's.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from apical.errors import ConfigError


class InputAdam(torch.optim.Optimizer):
    """Adam whose second moment is one number per input of a weight (n_out, n_in, ...).

    Vectors (biases, gains) have the usual second moment. Dimension 0 of a weight is its outputs.

    Args:
        params: as for any PyTorch optimiser.
        lr: learning rate.
        betas: decay rates of the running means of gradients and of their squares.
        eps: added to the square root of the second moment.
        weight_decay: decoupled weight decay, as in AdamW.

    Raises:
        ConfigError: an option is out of range.

    >>> layer = torch.nn.Linear(3, 2)
    >>> optimizer = InputAdam(layer.parameters(), lr=0.01)
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.state[layer.weight]["exp_avg_sq"].shape
    torch.Size([1, 3])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if not all(0 <= value < math.inf for value in (lr, eps, weight_decay)) or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(
                f"InputAdam needs lr, eps and weight_decay of 0 or more and betas in [0, 1); got {lr=}, {betas=}, {eps=}, "
                f"{weight_decay=}"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; `closure`, if given, first computes the gradients, and its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                # for PFA's R: the weight's number of outputs, which the rule stores on it
                square = (
                    p.grad.square() if p.dim() < 2 else p.grad.square().sum(0, keepdim=True) / getattr(p, "outputs", len(p))
                )
                state = self.state[p]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(square))
                state["step"] += 1
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].lerp_(square, 1 - beta2)
                root = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(state["exp_avg"] / root * (group["lr"] / (1 - beta1 ** state["step"])))
        return loss
