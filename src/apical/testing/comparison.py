"""What the checks of the conformance suite share: making a rule, training it, comparing tensors."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.credit import CreditRule, Loss
from apical.testing.networks import dense_batch, dense_network

Factory = Callable[[nn.Module, Loss], CreditRule]
Setting = tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, Tensor]]]


def make(factory: Factory, network: Callable[[], nn.Module] = dense_network, seed: int = 0) -> CreditRule:
    """Return the rule on a network drawn from the seed, with the cross-entropy."""
    torch.manual_seed(seed)
    return factory(network(), F.cross_entropy)


def gradients(rule: nn.Module) -> dict[str, Tensor]:
    """Return copies of all `.grad` that are there, by parameter name."""
    return {name: p.grad.clone() for name, p in rule.named_parameters() if p.grad is not None}


def train(
    rule: CreditRule,
    steps: range,
    optimizer: torch.optim.Optimizer | None = None,
    parallel: nn.Module | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> torch.optim.Optimizer:
    """Steps on dense batches drawn from the step's number, in parallel on this rank's share; returns the optimiser."""
    optimizer = optimizer or torch.optim.SGD(rule.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    for step in steps:
        inputs, targets = dense_batch(step)
        rule.restart()
        for _ in range(rule.repeats):
            optimizer.zero_grad()
            (parallel or rule)(inputs[rank::ranks], targets[rank::ranks]).backward()
            optimizer.step()
            rule.constrain_()
    return optimizer


def require_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float, what: str) -> None:
    """Raise AssertionError, beginning with `what`, unless both hold the same tensors up to `tolerance` times the largest."""
    if a.keys() != b.keys():
        raise AssertionError(f"{what}: different tensors: {sorted(a.keys() ^ b.keys())}")
    for name, value in a.items():
        if value.is_floating_point():
            far = (value.to(b[name]) - b[name]).abs().max() if value.numel() else torch.zeros(())
            if not far <= tolerance * max(1.0, float(b[name].detach().abs().max() if value.numel() else 0.0)):
                raise AssertionError(f"{what}: {name!r} differs by {float(far):.3g}")
