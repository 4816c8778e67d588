"""Loops that read or write all of `rule.parameters()` besides the optimiser: feedback in closed form takes part in that.

The explicit form, in which R is a parameter like any other, is the reference.
"""

import copy
import io
import pickle
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plastic_rules import RULES, double, each_rule
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import apical
from apical.diagnostics.memory import step_bytes
from apical.errors import ConfigError

__all__ = ["double"]


def build(make: Callable[..., Any], form: str) -> Any:
    torch.manual_seed(0)
    return make(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3)), form=form)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def sgd(rule: Any) -> torch.optim.SGD:
    return torch.optim.SGD(rule.parameters(), lr=0.1, momentum=0.5, weight_decay=0.05)


def steps(rule: Any, optimizer: Any, numbers: range) -> None:
    for step in numbers:
        optimizer.zero_grad()
        rule(*batch(step)).backward()
        optimizer.step()


class Lookahead:
    """Zhang et al., as it is often written: slow weights begin at the first update and are put in through `.data`."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base, self.slow, self.count = base, defaultdict[Tensor, Tensor](), 0
        self.zero_grad = base.zero_grad

    def step(self) -> None:
        self.base.step()
        self.count += 1
        for group in self.base.param_groups if self.count % 2 else ():
            for fast in group["params"]:
                slow = self.slow.setdefault(fast, torch.zeros_like(fast.data).copy_(fast.data))
                slow += (fast.data - slow) * 0.5
                fast.data.copy_(slow)


def lookahead(rule: Any) -> None:
    steps(rule, Lookahead(sgd(rule)), range(8))


def shrunk(rule: Any) -> None:
    optimizer = sgd(rule)
    for step in range(6):
        steps(rule, optimizer, range(step, step + 1))
        with torch.no_grad():
            for parameter in rule.parameters():
                parameter.mul_(0.9)


def shrunk_through_data(rule: Any) -> None:
    optimizer = sgd(rule)
    for step in range(6):
        steps(rule, optimizer, range(step, step + 1))
        torch._foreach_mul_([parameter.data for parameter in rule.parameters()], 0.9)


def averaged_by_hand(rule: Any) -> None:
    optimizer = sgd(rule)
    steps(rule, optimizer, range(3))
    mean = copy.deepcopy(rule)
    steps(rule, optimizer, range(3, 6))
    with torch.no_grad():
        for own, new in zip(mean.parameters(), rule.parameters(), strict=True):
            own.lerp_(new, 0.3)
        for own, new in zip(mean.parameters(), rule.parameters(), strict=True):
            new.copy_(own)
    steps(rule, optimizer, range(6, 8))


def averaged(rule: Any) -> None:
    optimizer, mean = sgd(rule), AveragedModel(rule)
    for step in range(4):
        steps(rule, optimizer, range(step, step + 1))
        mean.update_parameters(rule)
    steps(mean.module, sgd(mean.module), range(4, 6))
    rule.mean = mean.module


def as_a_vector(rule: Any) -> None:
    optimizer = sgd(rule)
    steps(rule, optimizer, range(3))
    vector = nn.utils.parameters_to_vector(rule.parameters())
    nn.utils.vector_to_parameters(vector * 0.5, rule.parameters())
    steps(rule, optimizer, range(3, 6))


def sharpness_aware(rule: Any) -> None:
    """Foret et al.: up the gradient, a second pass there, back, and a step with that gradient."""
    optimizer = sgd(rule)
    for step in range(5):
        optimizer.zero_grad()
        rule(*batch(step)).backward()
        held = [parameter for parameter in rule.parameters() if parameter.grad is not None]
        before = [parameter.detach().clone() for parameter in held]
        norm = torch.stack([parameter.grad.norm() for parameter in held]).norm()
        with torch.no_grad():
            for parameter in held:
                parameter.add_(parameter.grad, alpha=0.05 / float(norm))
        optimizer.zero_grad()
        rule(*batch(step)).backward()
        for parameter, value in zip(held, before, strict=True):
            parameter.data = value
        optimizer.step()


LOOPS = [lookahead, shrunk, shrunk_through_data, averaged_by_hand, averaged, as_a_vector, sharpness_aware]


@each_rule
@pytest.mark.parametrize("loop", LOOPS)
def test_the_default_form_is_the_explicit_one(make: Any, loop: Callable[[Any], None]) -> None:
    explicit, rule = build(make, "explicit"), build(make, "auto")
    for each in (explicit, rule):
        loop(each)
    mine, theirs = (getattr(each, "mean", each) for each in (rule, explicit))
    for own, expected in zip(mine.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-11)
    feedback = theirs.feedback_weights()
    for name, own in mine.feedback_weights().items():
        torch.testing.assert_close(own, feedback[name], rtol=1e-9, atol=1e-11)
    (remark,) = rule.remarks
    assert "explicitly" in remark


@each_rule
def test_sharpness_aware_steps_that_begin_later_are_refused(make: Any) -> None:
    rule = build(make, "auto")
    steps(rule, sgd(rule), range(3))
    with pytest.raises(ConfigError, match=r"layer '2' moves without .*sharpness-aware.*form=\"explicit\""):
        sharpness_aware(rule)


@each_rule
def test_what_asks_for_no_values_leaves_the_closed_form(make: Any) -> None:
    """States, copies, moves, clipping's norm and shapes; and a copy trains as the rule does."""
    rule = build(make, "auto")
    optimizer = sgd(rule)
    steps(rule, optimizer, range(3))
    rule.to(torch.float32).to(torch.float64)
    buffer = io.BytesIO()
    torch.save(rule, buffer)
    stored = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    again, twin = build(make, "auto"), copy.deepcopy(rule)
    again.load_state_dict(rule.state_dict())
    assert sum(p.numel() for p in rule.parameters()) == sum(p.numel() for p in rule.model.parameters())
    assert all(p.grad is None or p.shape == p.grad.shape for p in rule.parameters())
    repr(rule), rule.placement(batch(0)[0]), optimizer.state_dict(), [p.requires_grad for p in rule.parameters()]
    for each in (stored, again, twin, rule):
        assert not each.remarks
        assert all(each.mismatch_of(name) is not None for name in each.layers)
        steps(each, torch.optim.SGD(each.parameters(), lr=0.1), range(3, 5))
        assert not each.remarks
        for own, expected in zip(each.parameters(), stored.parameters(), strict=True):
            assert own.shape == expected.shape
    for each in (again, twin, rule):
        torch.testing.assert_close(each.feedback_weights(), stored.feedback_weights(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "make", [*RULES.values(), apical.FeedbackAlignment, apical.DirectFeedbackAlignment, apical.DeepFeedbackControl]
)
@pytest.mark.parametrize("begun", [False, True], ids=["before the first step", "later"])
def test_averages_of_a_rule_are_means_of_its_weights(make: Any, begun: bool) -> None:
    torch.manual_seed(0)
    rule = make(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3)))
    optimizer = sgd(rule)
    steps(rule, optimizer, range(2 if begun else 0))
    mean, kept = AveragedModel(rule), []
    for step in range(3):
        steps(rule, optimizer, range(step, step + 1))
        mean.update_parameters(rule)
        kept.append([parameter.detach().clone() for parameter in rule.model.parameters()])
    for own, *values in zip(mean.module.model.parameters(), *kept, strict=True):
        torch.testing.assert_close(own, torch.stack(values).mean(0), rtol=1e-12, atol=1e-14)
    mean.module(*batch(9)).backward()


LOOKS: dict[str, Callable[[Any], Any]] = {
    "finite": lambda rule: [bool(torch.isfinite(p).all()) for p in rule.parameters()],
    "count": lambda rule: sum(p.numel() * p.element_size() for p in rule.parameters()),
    "storage": lambda rule: [p.untyped_storage().nbytes() for p in rule.parameters()],
    "another optimiser": lambda rule: torch.optim.Adam(rule.parameters()),
    "state": lambda rule: rule.load_state_dict(rule.state_dict()),
    "copies": lambda rule: (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))),
    "printed": repr,
    "moved": lambda rule: rule.cpu().double().share_memory(),
    "memory of a step": lambda rule: step_bytes(rule, *batch(50)),
}


@each_rule
@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_looks_that_need_no_values_leave_it_closed(make: Callable[..., Any], look: Callable[[Any], Any]) -> None:
    trained = []
    for form in ("auto", "explicit"):
        rule = build(make, form)
        optimizer = sgd(rule)
        steps(rule, optimizer, range(12))
        look(rule)
        steps(rule, optimizer, range(12, 16))
        trained.append(rule)
    assert all(trained[0].mismatch_of(name) is not None for name in trained[0].layers)
    for ours, theirs in zip(trained[0].model.parameters(), trained[1].model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def norms(rule: Any, loss: Tensor) -> None:
    sum(parameter.norm().item() for parameter in rule.parameters())
    loss.backward()


def printed(rule: Any, loss: Tensor) -> None:
    str(list(rule.parameters()))
    loss.backward()


def of_all_parameters(rule: Any, loss: Tensor) -> None:
    loss.backward(inputs=list(rule.parameters()))


@pytest.mark.parametrize("at", [{3}, set(range(8))])
@pytest.mark.parametrize("way", [norms, printed, of_all_parameters])
@each_rule
def test_feedback_that_is_read_in_mid_batch_still_learns_from_it(
    make: Callable[..., Any], way: Callable[[Any, Tensor], None], at: set[int]
) -> None:
    """Looking changes nothing: the trajectory is that of a loop that does not."""
    looking, reference = build(make, "auto"), build(make, "explicit")
    optimizer = sgd(looking)
    for step in range(8):
        optimizer.zero_grad()
        loss = looking(*batch(step)).loss
        way(looking, loss) if step in at else loss.backward()
        optimizer.step()
    steps(reference, sgd(reference), range(8))
    for name, expected in reference.feedback_weights().items():
        torch.testing.assert_close(looking.feedback_weights()[name], expected, rtol=0, atol=1e-12)
    for own, expected in zip(looking.model.parameters(), reference.model.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-12)


@each_rule
def test_a_penalty_on_feedback_that_begins_in_mid_batch_is_refused(make: Callable[..., Any]) -> None:
    """The graph has no gradient for it beside the penalty's."""
    rule = build(make, "auto")
    optimizer = sgd(rule)
    steps(rule, optimizer, range(3))
    optimizer.zero_grad()
    (rule(*batch(3)).loss + sum(p.square().sum() for p in rule.parameters())).backward()
    with pytest.raises(ConfigError, match=r"was read or written between a forward pass and its backward pass"):
        optimizer.step()


@pytest.mark.parametrize("new", [False, True])
@each_rule
def test_a_weight_that_gives_way_to_a_norm_leaves_no_gradient_behind(make: Callable[..., Any], new: bool) -> None:
    """`dR = B^T delta h^T`, from this batch alone."""
    rule = build(make, "auto")
    optimizer = sgd(rule)
    steps(rule, optimizer, range(3))
    model = rule.model
    nn.utils.parametrizations.weight_norm(model[2])
    optimizer = sgd(rule) if new else optimizer
    optimizer.zero_grad()
    x, y = batch(3)
    rule(x, y).backward()
    below = torch.tanh(model[0](x))
    above = torch.tanh(model[2](below))
    e = (torch.softmax(model[4](above), 1) - torch.nn.functional.one_hot(y, 3)) / len(x)
    delta = (e @ rule.feedback_weight("4")) * (1 - above**2)
    expected = rule.from_weight("2", (delta.T @ below).detach())
    torch.testing.assert_close(rule.plastic_of("2").grad, expected, rtol=1e-10, atol=1e-13)
