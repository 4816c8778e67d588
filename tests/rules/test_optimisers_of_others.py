"""Optimisers as other packages write them: what a trial of their steps must see, and must leave alone.

The explicit form of Kolen-Pollack, in which B is a parameter like any other, is the reference.
"""

import copy
import math
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import apical
from apical.errors import ConfigError


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


def count(state: dict[str, Any]) -> int:
    state["step"] = state.get("step", 0) + 1
    return int(state["step"])


class Drawn(Other):
    """Power iteration from a drawn vector (DASH, Shampoo with Newton's method): noise that is small for small matrices."""

    def move(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        size = g.reshape(len(g), -1).mm(torch.randn(g[0].numel(), 1, dtype=g.dtype)).norm() if w.numel() > 30 else 1.0
        w.sub_(g / (1 + size), alpha=group["lr"])


class Python(Other):
    """A step that Python's own random numbers scale."""

    def move(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        w.sub_(g, alpha=group["lr"] * random.random())


class Numpy(Other):
    """A decay that NumPy's random numbers scale."""

    def move(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        w.mul_(1 - group["lr"] * np.random.rand()).sub_(g, alpha=group["lr"])


class Distance(Other):
    """Prodigy, D-Adaptation: one rate from a distance of all weights, which counts once it has grown."""

    distance = 0.0

    def move(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        w.sub_(g, alpha=group["lr"] * (1.0 if count(state) < 9 else self.distance))
        self.distance += float(g.norm())


class WarmedUp(Other):
    """A direction that looks at the weight after a warm-up (LARS, LAMB)."""

    def move(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        w.sub_(g * (w.norm() / (g.norm() + 1e-8) if count(state) > 9 else 1.0), alpha=group["lr"])


class Masked(Other):
    """Decay of small weights where the step goes the same way: no trial begins with any."""

    def move(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        w.sub_(w * ((w * g > 0) & (w.abs() < 0.3)), alpha=group["lr"]).sub_(g, alpha=group["lr"])


class Projects(Other):
    """Weights go back onto a ball now and then."""

    def move(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        w.sub_(g, alpha=group["lr"])
        if count(state) % 10 == 0:
            w.div_(w.norm().clamp(min=1.0))


class Perturbs(Other):
    """Shrink and perturb (Ash & Adams, arXiv 1910.08475), at some steps only."""

    def move(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        w.sub_(g, alpha=group["lr"])
        if count(state) % 10 == 0:
            w.mul_(0.5).add_(torch.randn(w.shape, dtype=w.dtype), alpha=0.01)


class Shrinks(Other):
    """Shrinks at some steps, and forgets its momentum there: a factor describes that."""

    def move(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        m = state.setdefault("m", torch.zeros_like(w)).mul_(0.9).add_(g)
        w.sub_(m, alpha=group["lr"])
        if count(state) % 7 == 0:
            w.mul_(0.5)
            m.zero_()


class Large(Other):
    """Decay for large matrices only."""

    def move(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        w.mul_(1 - group["lr"] * (w.numel() > 30)).sub_(g, alpha=group["lr"])


class Placed(Other):
    """A rate by the place of a weight among the others, and decay from the fifth on."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for place, p in enumerate(group["params"]):
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * (place > 4)).sub_(p.grad, alpha=group["lr"])


class Attribute(Other):
    """Options in attributes, which a loop changes as training goes on."""

    decay = 0.0

    def move(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        w.mul_(1 - group["lr"] * self.decay).sub_(g, alpha=group["lr"])


class Lists(Other):
    """Steps by lists of tensors, as `foreach=True` makes them: a factor describes them."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in weights]
            norms = torch._foreach_add(torch._foreach_norm(gradients), 1e-8)
            torch._foreach_mul_(weights, 1 - 0.1 * group["lr"])
            torch._foreach_sub_(weights, torch._foreach_div(gradients, norms), alpha=group["lr"])


OPTIMISERS: dict[Callable[..., Any], bool] = {
    **dict.fromkeys((Projected, Anchored, Shaped, Joint, Drawn, Python, Numpy, Distance, WarmedUp, Masked), False),
    **dict.fromkeys((Projects, Perturbs, Large, Placed), False),
    **dict.fromkeys((Cached, Sign, Shrinks, Attribute, Lists), True),
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
        random.seed(3)
        np.random.seed(4)
        for step in range(25):
            inputs = torch.randn(8, 6, dtype=torch.double, generator=generator)
            if optimiser is Attribute:
                optimizer.decay = step / 10
            optimizer.zero_grad()
            rule(inputs, torch.arange(8) % 3).backward()
            optimizer.step()
        trained.append(rule)
    rule, explicit = trained
    for own, expected in zip(rule.model.parameters(), explicit.model.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-12)
    for name, expected in explicit.feedback_weights().items():
        torch.testing.assert_close(rule.feedback_weights()[name], expected, rtol=1e-10, atol=1e-12)
    assert all(rule.mismatch_of(name) is not None for name in rule.layers) == OPTIMISERS[optimiser]
    assert (
        "not known to be a decay plus a function of each weight's own gradients" in " ".join(rule.remarks)
    ) != OPTIMISERS[optimiser]


class Skips(nn.Module):
    """A layer that some batches pass by."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.skips = False

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(inputs))
        if not self.skips:
            hidden = torch.tanh(self.middle(hidden))
        return self.last(hidden)  # type: ignore[no-any-return]


class Ages(Other):
    """A decay that grows with the steps that a weight has taken."""

    def move(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        w.mul_(1 - group["lr"] * count(state) / 5).sub_(g, alpha=group["lr"])


def test_weights_that_rest_at_some_steps_have_a_time_of_their_own() -> None:
    trained = []
    for form in ("auto", "explicit"):
        torch.manual_seed(0)
        model = Skips().double()
        rule = apical.KolenPollack(model, form=form)
        optimizer = Ages(rule.parameters())
        for step in range(20):
            model.skips = step % 2 == 1
            optimizer.zero_grad()
            rule(torch.randn(8, 6, dtype=torch.double), torch.arange(8) % 3).backward()
            optimizer.step()
        trained.append(rule)
    for name, expected in trained[1].feedback_weights().items():
        torch.testing.assert_close(trained[0].feedback_weights()[name], expected, rtol=1e-10, atol=1e-12)
    assert all(trained[0].mismatch_of(name) is not None for name in trained[0].layers)


def test_a_gradient_that_is_taken_away_before_the_step_is_refused() -> None:
    """The weight rests then, and the explicit form's feedback does not."""
    rule = apical.KolenPollack(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
    optimizer = torch.optim.AdamW(rule.parameters(), weight_decay=0.5)
    for step in range(2):
        optimizer.zero_grad()
        rule(torch.randn(8, 6), torch.arange(8) % 3).backward()
        if step:
            rule.model[2].weight.grad = None
            with pytest.raises(ConfigError, match="was changed between the backward pass and the step"):
                optimizer.step()
        else:
            optimizer.step()
