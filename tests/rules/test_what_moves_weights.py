"""Kolen-Pollack and PFA in the default form are their explicit form, whatever moves weights and gradients; or they say so.

The layers are larger than the samples by which changes are noticed. The explicit form, in which B and R are parameters like
any other, is the reference; tests/rules/test_plastic_feedback.py holds it against the equations.
"""

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apical
from apical.core.wrappers import COMPILES
from apical.errors import ConfigError

RULES = {"kp": apical.KolenPollack, "pfa-o": partial(apical.ProductFeedbackAlignment, feedback="orthogonal")}
each_rule = pytest.mark.parametrize("make", RULES.values(), ids=RULES)
Act = Callable[[Any, Any, int], object]


@pytest.fixture(autouse=True)
def _double() -> object:
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


def build(make: Callable[..., Any], form: str) -> Any:
    torch.manual_seed(0)
    sizes = (12, 30, 28, 26)
    layers = [module for a, b in pairwise(sizes) for module in (nn.Linear(a, b), nn.Tanh())]
    return make(nn.Sequential(*layers, nn.Linear(26, 3)), form=form)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 12, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def sgd(rule: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(rule.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def train(rule: Any, *, start: Act | None = None, before: Act | None = None, after: Act | None = None) -> None:
    optimizer = sgd(rule)
    for step in range(45):
        optimizer.zero_grad()
        if start is not None:
            start(rule, optimizer, step)
        rule(*batch(step)).backward()
        if before is not None:
            before(rule, optimizer, step)
        optimizer.step()
        if after is not None:
            after(rule, optimizer, step)


def agree(make: Callable[..., Any], run: Callable[[Any], None]) -> Any:
    """The rule in its default form, after it was found to be where the explicit one is."""
    explicit, rule = build(make, "explicit"), build(make, "auto")
    for each in (explicit, rule):
        run(each)
    for own, expected in zip(rule.model.parameters(), explicit.model.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-10)
    feedback = explicit.feedback_weights()
    for name, own in rule.feedback_weights().items():
        torch.testing.assert_close(own, feedback[name], rtol=1e-9, atol=1e-10)
    return rule


def at(when: int, change: Callable[[Tensor], object]) -> Act:
    """Change the weight of a layer through `.data`, which leaves no version behind."""
    return lambda rule, optimizer, step: step == when and change(rule.model[2].weight.data)


def clamped(rule: Any, optimizer: Any, step: int) -> None:
    for parameter in rule.model.parameters():
        parameter.data.clamp_(-0.15, 0.15)


MOVES = {
    "one element": at(20, lambda w: w[1, 1].fill_(3.0)),
    "one row": at(20, lambda w: w[7].zero_()),
    "one column": at(20, lambda w: w[:, 7].zero_()),
    "few elements": at(20, lambda w: w.mul_(w.abs() > w.abs().flatten().kthvalue(5).values)),
    "rows swapped": at(20, lambda w: w.copy_(w[torch.arange(len(w)).roll(1)])),
    "clamped at every step": clamped,
}


@each_rule
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_any_element_may_move_through_data(make: Any, move: Act) -> None:
    assert not agree(make, partial(train, after=move)).remarks


def bounded(weight: Tensor) -> None:
    with torch.no_grad():
        weight.clamp_(-0.15, 0.15)


def bounded_elsewhere(weight: Tensor) -> None:
    weight.data = weight.data.clamp(-0.15, 0.15)


@each_rule
@pytest.mark.parametrize("form", ["auto", "explicit"])
@pytest.mark.parametrize("bound", [bounded, bounded_elsewhere])
def test_a_layer_may_bound_its_weight_in_a_hook(make: Any, form: str, bound: Callable[[Tensor], None]) -> None:
    """Where something stands in for the weight, the hook changes the weight all the same."""
    hooked, before = build(make, form), build(make, form)
    for layer in hooked.model[::2]:
        layer.register_forward_pre_hook(lambda layer, inputs: bound(layer.weight))
    train(hooked)
    train(before, start=lambda rule, optimizer, step: [bounded(layer.weight) for layer in rule.model[::2]])
    for own, expected in zip(hooked.model.parameters(), before.model.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-10)


def hooked(kind: str) -> Callable[[Any], None]:
    """A hook of the user's within the optimiser's step, there from the beginning or later."""

    def clip(optimizer: Any, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.clamp_(-1e-3, 1e-3)

    def run(rule: Any) -> None:
        def shrink(optimizer: Any, args: Any, kwargs: Any) -> None:
            rule.model[2].weight.data.clamp_(-0.1, 0.1)

        def add(rule: Any, optimizer: Any, step: int) -> None:
            if step == (20 if "later" in kind else 0):
                if "before" in kind:
                    optimizer.register_step_pre_hook(clip)
                else:
                    optimizer.register_step_post_hook(shrink)

        train(rule, start=add)

    return run


@each_rule
@pytest.mark.parametrize("kind", ["before", "before, later", "after", "after, later"])
def test_hooks_within_the_optimisers_step(make: Any, kind: str) -> None:
    (remark,) = agree(make, hooked(kind)).remarks
    assert "hooks run within the optimiser's step" in remark


def replaced(rule: Any, optimizer: Any, step: int) -> None:
    if step == 20:
        old, parameters = rule.model[2].weight, optimizer.param_groups[0]["params"]
        rule.model[2].weight = nn.Parameter(2 * old.detach())
        parameters[next(i for i, parameter in enumerate(parameters) if parameter is old)] = rule.model[2].weight


@each_rule
def test_a_weight_that_is_replaced_by_another_parameter(make: Any) -> None:
    (remark,) = agree(make, partial(train, start=replaced)).remarks
    assert "'2' explicitly: its weight was replaced" in remark


@each_rule
def test_a_state_that_comes_back_without_the_optimisers(make: Any) -> None:
    """R's momentum stays where the optimiser is, as that of any parameter."""

    def run(rule: Any) -> None:
        kept: dict[str, Any] = {}

        def act(rule: Any, optimizer: Any, step: int) -> None:
            if step == 10:
                kept.update(copy.deepcopy(rule.state_dict()))
            if step == 30:
                rule.load_state_dict(kept)

        train(rule, after=act)

    assert not agree(make, run).remarks


def optimiser_alone() -> Act:
    kept: list[Any] = []

    def act(rule: Any, optimizer: Any, step: int) -> None:
        if step == 10:
            kept.append(copy.deepcopy(optimizer.state_dict()))
        if step == 30:
            optimizer.load_state_dict(kept[0])

    return act


def lost(rule: Any, optimizer: Any, step: int) -> None:
    if step == 20:
        rule.model[2].weight.grad = None


def zeroed(rule: Any, optimizer: Any, step: int) -> None:
    if step == 20:
        rule.model[2].weight.grad.zero_()


def penalty(rule: Any, optimizer: Any, step: int) -> None:
    if step >= 20:
        rule.model[2].weight.abs().sum().backward()


def other_loss(rule: Any, optimizer: Any, step: int) -> None:
    if step >= 20:
        x, y = batch(step)
        nn.functional.cross_entropy(rule.model(x), y).backward()


def gradient_hook(rule: Any, optimizer: Any, step: int) -> None:
    if step == 20:
        rule.model[2].weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))


REFUSED: dict[str, tuple[dict[str, Act], str]] = {
    "the optimiser's state alone": ({"after": optimiser_alone()}, "layer '2' was replaced, but .* load both states"),
    "a gradient lost": ({"before": lost}, "gradient of layer '2' was changed"),
    "a gradient zeroed": ({"before": zeroed}, "gradient of layer '2' was changed"),
    "a penalty before": ({"start": penalty}, "layer '2' also receives gradients"),
    "a penalty after": ({"before": penalty}, "layer '2' also receives gradients"),
    "another loss": ({"before": other_loss}, "layer '2' also receives gradients"),
    "a hook on the weight": ({"start": gradient_hook}, "layer '2' also receives gradients"),
}


@each_rule
@pytest.mark.parametrize(("acts", "words"), REFUSED.values(), ids=REFUSED)
def test_what_the_closed_form_cannot_do_to_the_feedback_is_refused(make: Any, acts: dict[str, Act], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train(build(make, "auto"), **acts)
    train(build(make, "explicit"), **acts)  # the remedy


def by_hand(parameters: Callable[[Any], Any], through_data: bool, rate: float = 0.05) -> Callable[[Any], None]:
    def run(rule: Any) -> None:
        for step in range(12):
            rule.zero_grad()
            rule(*batch(step)).backward()
            with torch.no_grad():
                for parameter in (p for p in parameters(rule) if p.grad is not None):
                    (parameter.data if through_data else parameter).sub_(rate * parameter.grad)

    return run


@each_rule
@pytest.mark.parametrize("through_data", [False, True])
def test_a_loop_by_hand_that_forgets_the_feedback_is_warned(make: Any, through_data: bool, recwarn: Any) -> None:
    by_hand(lambda rule: rule.parameters(), through_data)(build(make, "auto"))
    assert not recwarn.list
    with pytest.warns(RuntimeWarning, match=r"own trainable parameters.* train all of rule.parameters\(\)"):
        by_hand(lambda rule: rule.model.parameters(), through_data)(build(make, "auto"))


@each_rule
def test_steps_that_rounding_swallows_forget_nothing(make: Any, recwarn: Any) -> None:
    """As at the beginning of a rate's rise: biases, which are zero, move, while feedback weights stay where they are."""
    rule = build(make, "explicit")
    for name, parameter in rule.model.named_parameters():
        parameter.data.zero_() if name.endswith("bias") else None
    before = [parameter.clone() for parameter in rule.parameters()]
    by_hand(lambda rule: rule.parameters(), through_data=False, rate=1e-20)(rule)
    moved = [not torch.equal(a, b) for a, b in zip(before, rule.parameters(), strict=True)]
    assert any(moved)
    assert not all(moved)
    assert not recwarn.list


@each_rule
@pytest.mark.parametrize("through_data", [False, True])
def test_a_loop_by_hand_after_an_optimiser_is_refused(make: Any, through_data: bool) -> None:
    rule = build(make, "auto")
    train(rule)
    with pytest.raises(ConfigError, match=r"moves without the steps of a torch.optim.Optimizer"):
        by_hand(lambda rule: rule.parameters(), through_data)(rule)


@each_rule
def test_a_second_loss_of_the_rule_is_its_own(make: Any) -> None:
    def second(rule: Any, optimizer: Any, step: int) -> None:
        rule(*batch(step + 100)).backward()

    assert not agree(make, partial(train, before=second)).remarks


def by_data(rule: Any) -> None:
    for parameter in rule.parameters():
        if parameter.grad is not None:
            parameter.data = parameter.data - 0.05 * parameter.grad


@each_rule
@pytest.mark.parametrize("begins", [0, 2, 20])
def test_steps_by_hand_through_data_between_those_of_an_optimiser(make: Any, begins: int) -> None:
    """Every step is `W - lr G`, whoever makes it, and B's the same; or the rule says that it cannot follow."""

    def run(rule: Any) -> None:
        optimizer = torch.optim.SGD(rule.parameters(), lr=0.05)
        for step in range(30):
            optimizer.zero_grad()
            rule(*batch(step)).backward()
            by_data(rule) if step >= begins and step % 2 == 0 else optimizer.step()

    if begins == 0:
        assert "also moves between passes" in agree(make, run).remarks[0]
        return
    run(build(make, "explicit"))
    with pytest.raises(ConfigError, match=r"layer '2' moves without the steps of a torch.optim.Optimizer"):
        run(build(make, "auto"))


@each_rule
@pytest.mark.parametrize("new", [False, True], ids=["old optimiser", "new optimiser"])
def test_a_state_may_be_assigned(make: Any, new: bool) -> None:
    """`assign=True` puts other parameters in their place: an optimiser of the former ones moves nothing."""

    def run(rule: Any) -> None:
        optimizer = sgd(rule)
        for step in range(14):
            if step == 6:
                rule.load_state_dict({name: value.clone() for name, value in rule.state_dict().items()}, assign=True)
                optimizer = sgd(rule) if new else optimizer
            optimizer.zero_grad()
            rule(*batch(step)).backward()
            optimizer.step()

    assert not agree(make, run).remarks


@pytest.mark.skipif(not COMPILES, reason="this compiler cannot follow rules")
@each_rule
@pytest.mark.parametrize("whole", [False, True], ids=["the optimiser's step", "the whole step"])
def test_a_step_that_is_compiled_moves_an_explicit_feedback(make: Any, whole: bool) -> None:
    def run(rule: Any, *, compiled: bool) -> None:
        optimizer = sgd(rule)

        def learn(inputs: Tensor, targets: Tensor) -> None:
            optimizer.zero_grad()
            rule(inputs, targets).loss.backward()
            optimizer.step()

        if whole:
            learn = torch.compile(learn, backend="eager") if compiled else learn
        elif compiled:
            optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign]
        for step in range(4):
            learn(*batch(step))

    torch.compiler.reset()
    explicit, rule = build(make, "explicit"), build(make, "auto")
    run(explicit, compiled=False)
    run(rule, compiled=True)
    for own, expected in zip(rule.model.parameters(), explicit.model.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-10)
    for name, expected in explicit.feedback_weights().items():
        torch.testing.assert_close(rule.feedback_weights()[name], expected, rtol=1e-9, atol=1e-10)
    assert "step is compiled" in rule.remarks[0]


@pytest.mark.parametrize("factor", [1.0, 1.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("make", [apical.KolenPollack, apical.ProductFeedbackAlignment])
def test_swapped_tensors_are_followed_in_closed_form(make: Any, momentum: float, factor: float) -> None:
    """`torch.utils.swap_tensors` leaves a weight's hooks behind; it was refused as if its gradient had been changed."""
    ends = []
    for form in ("auto", "explicit"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).double()
        rule = make(model, form=form)
        optimizer = torch.optim.SGD(rule.parameters(), 0.1, momentum=momentum, weight_decay=0.1)
        inputs, targets = torch.randn(6, 4).double(), torch.arange(6) % 3
        for step in range(6):
            if step == 3:
                torch.utils.swap_tensors(model[2].weight, nn.Parameter(model[2].weight.detach() * factor))
            optimizer.zero_grad()
            rule(inputs, targets).backward()
            optimizer.step()
        assert not rule.remarks
        ends.append(rule.feedback_weights()["2"].clone())
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-12)
