"""Optimisers as other packages write them: what a trial of their steps must see, and must leave alone.

The explicit form of Kolen-Pollack, in which B is a parameter like any other, is the reference.
"""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apical


class Other(torch.optim.Optimizer):
    """Steps of a tensor by `move`, which sees weight, gradient, state and group."""

    def __init__(self, parameters: Iterable[Tensor], **options: Any) -> None:
        super().__init__(parameters, {"lr": 0.02, **options})
        self.begin()

    def begin(self) -> None:
        """State that is there before the first step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.move(parameter, parameter.grad, self.state[parameter], group)

    def move(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError


class Projected(Other):
    """AdamP (Heo et al., arXiv 2006.08217): where gradient and weight are nearly at right angles, no step is radial."""

    def move(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        m = state.setdefault("m", torch.zeros_like(w)).mul_(0.9).add_(g, alpha=0.1)
        v = state.setdefault("v", torch.zeros_like(w)).mul_(0.99).addcmul_(g, g, value=0.01)
        step = m / (v.sqrt() + 1e-8)
        if w.dim() > 1:
            cosine = torch.nn.functional.cosine_similarity(w.flatten(), g.flatten(), dim=0)
            if cosine.abs() < 0.2:  # often
                n = w / (w.norm() + 1e-8)
                step = step - (n * step).sum() * n
        w.sub_(step, alpha=0.1 * group["lr"])


class Anchored(Other):
    """MADGRAD (Defazio & Jelassi, arXiv 2101.11075): weights are a moving average of steps from where they began."""

    def begin(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {"x0": parameter.detach().clone(), "s": torch.zeros_like(parameter)}

    def move(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["s"].add_(g)
        w.lerp_(state["x0"] - group["lr"] * state["s"], 0.1)


class Cached(Other):
    """RAdam as its authors wrote it: what depends on the step alone is kept in the group, in a list."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, cache=[[None, None] for _ in range(10)])

    def move(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["step"] = step = state.get("step", 0) + 1
        kept = group["cache"][step % 10]
        if kept[0] != step:
            kept[:] = step, group["lr"] / math.sqrt(step)
        w.sub_(g, alpha=kept[1])


class Shaped(Other):
    """SPlus (Frans et al., arXiv 2506.07254): step and decay by the shape of a weight."""

    def move(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        rate = group["lr"] * 2 / sum(w.shape)
        w.mul_(1 - rate).sub_(g.sign(), alpha=rate)


class Joint(Other):
    """Clips by one norm of all gradients, within its step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        super().step()

    def move(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        w.sub_(g / self.norm, alpha=group["lr"])


class Sign(Other):
    """Lion without momentum and with decay: one that a factor describes."""

    def move(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        w.mul_(1 - 0.1 * group["lr"]).sub_(g.sign(), alpha=0.02 * group["lr"])


OPTIMISERS: dict[Callable[..., Any], bool] = {
    **dict.fromkeys((Projected, Anchored, Shaped, Joint), False),
    **dict.fromkeys((Cached, Sign), True),
}
"""Whether one number says by how much a step shrinks a weight."""


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_the_default_form_is_the_explicit_one(optimiser: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    trained = []
    for form in ("auto", "explicit"):
        torch.manual_seed(1)
        rule = apical.KolenPollack(copy.deepcopy(model), form=form)
        optimizer = optimiser(rule.parameters())
        generator = torch.Generator().manual_seed(2)
        for _ in range(25):
            inputs = torch.randn(8, 6, dtype=torch.double, generator=generator)
            optimizer.zero_grad()
            rule(inputs, torch.arange(8) % 3).backward()
            optimizer.step()
        trained.append(rule)
    rule, explicit = trained
    for own, expected in zip(rule.model.parameters(), explicit.model.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-12)
    for name, expected in explicit.feedback_weights().items():
        torch.testing.assert_close(rule.feedback_weights()[name], expected, rtol=1e-10, atol=1e-12)
    assert all((rule.mismatch_of(name) is not None) == OPTIMISERS[optimiser] for name in rule.layers)
    assert ("not a decay plus a function of gradients alone" in " ".join(rule.remarks)) != OPTIMISERS[optimiser]
