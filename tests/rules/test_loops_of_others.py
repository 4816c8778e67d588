"""What people's loops do to states, gradients and feedback in addition to the usual order of calls.

The explicit form, in which R is a parameter like any other, is the reference for the default one.
"""

import copy
import io
import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from plastic_rules import RULES, double, each_rule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import apical
from apical.core import stepping
from apical.errors import ConfigError, UnsupportedModelError

__all__ = ["double"]


def build(make: Callable[..., Any], form: str = "auto") -> Any:
    torch.manual_seed(0)
    layers = [nn.Linear(12, 15), nn.Tanh(), nn.Linear(15, 14), nn.Tanh(), nn.Linear(14, 13), nn.Tanh(), nn.Linear(13, 3)]
    return make(nn.Sequential(*layers), form=form)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 12, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def sgd(rule: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(rule.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)


def adamw(rule: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(rule.parameters(), lr=0.01, weight_decay=0.1)


def steps(rule: Any, optimizer: Any, numbers: range) -> None:
    for step in numbers:
        optimizer.zero_grad()
        rule(*batch(step)).backward()
        optimizer.step()


def alike(own: Any, other: Any, tolerance: float = 1e-10) -> None:
    for mine, expected in zip(own.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=tolerance, atol=tolerance)
    expected_feedback = other.feedback_weights()
    for name, feedback in own.feedback_weights().items():
        torch.testing.assert_close(feedback, expected_feedback[name], rtol=tolerance, atol=tolerance)


def shrunk(optimizer: Any, factor: float) -> None:
    for state in optimizer.state.values():
        state["momentum_buffer"].mul_(factor)


@each_rule
@pytest.mark.parametrize("factor", [0.1, 0.0])
def test_a_momentum_that_is_scaled_in_place_is_refused(make: Any, factor: float) -> None:
    """The optimiser holds that of the weights alone: the loop cannot have meant the feedback's to go on."""
    rule, explicit = build(make), build(make, "explicit")
    optimizer = sgd(rule)
    steps(rule, optimizer, range(6))
    shrunk(optimizer, factor)
    with pytest.raises(ConfigError, match=r"momentum of layer '2' was .*changed.*form=\"explicit\""):
        steps(rule, optimizer, range(6, 7))
    optimizer = sgd(explicit)
    steps(explicit, optimizer, range(6))
    shrunk(optimizer, factor)
    steps(explicit, optimizer, range(6, 12))  # the remedy


@each_rule
def test_a_skipped_fused_step_is_no_change_of_the_momentum(make: Any) -> None:
    rule, plain = build(make), build(make)
    for each, broken in ((rule, True), (plain, False)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for step in range(12):
            for inputs in ([batch(step)[0] * torch.inf] if broken and step % 4 == 3 else []) + [batch(step)[0]]:
                optimizer.zero_grad()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    scaler.scale(each(inputs, batch(step)[1]).loss).backward()
                scaler.step(optimizer)
                scaler.update()
    alike(rule, plain)
    assert not rule.remarks


def frozen(rule: Any, optimizer: Any, on: bool = False) -> None:
    own = {id(parameter) for parameter in rule.model.parameters()}
    for parameter in rule.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(on)


@each_rule
@pytest.mark.parametrize("form", ["auto", "explicit"])
@pytest.mark.parametrize("optimiser", [sgd, adamw])
def test_feedback_that_is_frozen_in_mid_training_rests(make: Any, form: str, optimiser: Any) -> None:
    """Its weights learn on: from here on this is feedback alignment."""
    rule = build(make, form)
    optimizer = optimiser(rule)
    steps(rule, optimizer, range(8))
    optimizer.zero_grad()
    frozen(rule, optimizer)
    before = {name: value.clone() for name, value in rule.feedback_weights().items()}
    weight = rule.model[2].weight.detach().clone()
    steps(rule, optimizer, range(8, 20))
    for name, value in rule.feedback_weights().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-12)
    assert float((rule.model[2].weight.detach() - weight).abs().max()) > 1e-3
    assert form == "explicit" or any("frozen" in remark for remark in rule.remarks)


@each_rule
@pytest.mark.parametrize("copied", [False, True])
def test_feedback_that_is_frozen_without_values_is_a_parameter_like_any_other(make: Any, copied: bool) -> None:
    explicit, rule = build(make, "explicit"), build(make)
    ran = []
    for each in (explicit, rule):
        optimizer = sgd(each)
        steps(each, optimizer, range(8))
        optimizer.zero_grad()
        for parameter in each.parameters():
            parameter.requires_grad = False  # as loops of two networks do while the other one learns
        if copied:
            each, optimizer = copy.deepcopy((each, optimizer))
        for parameter in each.model.parameters():
            parameter.requires_grad = True
        steps(each, optimizer, range(8, 14))
        ran.append(each)
    alike(ran[1], ran[0])


@each_rule
def test_feedback_that_is_frozen_between_batches_alone_stays_closed(make: Any) -> None:
    explicit, rule = build(make, "explicit"), build(make)
    for each in (explicit, rule):
        optimizer = sgd(each)
        for step in range(20):
            each.requires_grad_(False)
            each.model(batch(step)[0])
            each.requires_grad_(True)
            steps(each, optimizer, range(step, step + 1))
    alike(rule, explicit)
    assert not rule.remarks


def cleared(rule: Any) -> None:
    for step in range(4):
        rule.model.zero_grad()
        rule(*batch(step)).backward()


@each_rule
def test_gradients_of_the_feedback_that_are_never_cleared_are_warned_of(make: Any) -> None:
    """`model.zero_grad()` clears the weights' alone, and the feedback would sum those of all batches."""
    with pytest.warns(RuntimeWarning, match=r"gradient of the feedback of layer '2' .*rule\.zero_grad\(\)"):
        cleared(build(make, "explicit"))
    rule = build(make, "explicit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(rule, rule, range(0))
        for step in range(4):
            rule.zero_grad()
            rule(*batch(step)).backward()


def test_a_feedback_that_forgets_what_b_ignores_says_so() -> None:
    """R of 2 n rows has a part that B does not see; without values it is lost, and what is no product of B finds zeros."""
    rule = build(RULES["pfa"])
    steps(rule, sgd(rule), range(4))
    for parameter in rule.parameters():
        parameter.data.clamp_(-0.2, 0.2)
    assert any("'2'" in remark and "B ignores" in remark for remark in rule.remarks), rule.remarks
    for name in ("kp", "pfa-o"):
        whole = build(RULES[name])
        steps(whole, sgd(whole), range(4))
        for parameter in whole.parameters():
            parameter.data.clamp_(-0.2, 0.2)
        assert whole.remarks
        assert not any("B ignores" in remark for remark in whole.remarks)


@each_rule
@pytest.mark.parametrize("element", [(3, 7), (12, 13), (0, 1), (7, 5)])
def test_any_element_of_a_gradient_may_change_through_data(make: Any, element: tuple[int, int]) -> None:
    rule = build(make)

    def train() -> None:
        optimizer = sgd(rule)
        for step in range(24):
            optimizer.zero_grad()
            rule(*batch(step)).backward()
            if step > 2:
                rule.model[4].weight.grad.data[element] *= 1.5
            optimizer.step()

    with pytest.raises(ConfigError, match="gradient of layer '4' was changed"):
        train()


class Newcomer:
    def concerns(self, optimizer: Any) -> bool:
        return False

    before_step = after_step = concerns


class Host(Newcomer):
    """Another thread makes a rule while observers are asked."""

    def __init__(self) -> None:
        self.made: list[Newcomer] = []

    def concerns(self, optimizer: Any) -> bool:
        self.made.append(Newcomer())
        maker = threading.Thread(target=stepping.observe, args=(self.made[-1],))
        maker.start()
        maker.join(timeout=10)
        assert not maker.is_alive()
        return False


def test_rules_may_be_made_while_another_thread_takes_a_step() -> None:
    host = Host()
    stepping.observe(host)
    try:
        weight = nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        for _ in range(3):
            weight.grad = torch.ones(2)
            optimizer.step()
        assert torch.allclose(weight, torch.full((2,), 0.7))
    finally:
        for each in (host, *host.made):
            stepping.ignore(each)


def read(rule: Any) -> None:
    sum(parameter.sum() for parameter in rule.parameters())


def loaded(rule: Any) -> None:
    rule.load_state_dict(copy.deepcopy(rule.state_dict()))


def saved(rule: Any) -> None:
    torch.save(rule.state_dict(), io.BytesIO())


def saved_after_a_move(rule: Any) -> None:
    rule.model[2].weight.mul_(0.9)
    saved(rule)


@each_rule
@pytest.mark.parametrize("look", [read, loaded, saved, saved_after_a_move])
@pytest.mark.parametrize("optimiser", [sgd, adamw])
def test_what_is_done_in_inference_mode_can_learn_afterwards(make: Any, look: Any, optimiser: Any) -> None:
    """A validation loop that also loads, saves or averages."""
    rule, reference = build(make), build(make)
    for each, mode in ((rule, torch.inference_mode), (reference, torch.no_grad)):
        optimizer = optimiser(each)
        for step in range(8):
            steps(each, optimizer, range(step, step + 1))
            with mode():
                look(each)
    alike(rule, reference)


@pytest.mark.parametrize("name", ["fa", "usf", "dfa", "kp", "pfa", "bp"])
def test_a_rule_within_a_checkpoint_is_refused(name: str) -> None:
    """What the rule does while a checkpoint records cannot be repeated; backpropagation is a plain pass."""
    kinds: dict[str, Callable[..., Any]] = {
        "fa": apical.FeedbackAlignment,
        "usf": apical.SignSymmetry,
        "dfa": apical.DirectFeedbackAlignment,
        "bp": apical.Backprop,
        **RULES,
    }
    rule = kinds[name](build(RULES["kp"]).detach())

    def loss(*given: Tensor) -> Tensor:
        found: Tensor = rule(*given).loss
        return found

    if name == "bp":
        checkpoint(loss, *batch(0), use_reentrant=False).backward()
        return
    with pytest.raises(UnsupportedModelError, match=f"{type(rule).__name__} was called within torch.utils.checkpoint"):
        checkpoint(loss, *batch(0), use_reentrant=False)
    rule(*batch(0)).backward()  # the remedy


def sharers(make: Any, form: str) -> tuple[Any, Any]:
    """Two rules with a body in common, as of an actor and a critic."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 9), nn.Tanh())
    return tuple(make(nn.Sequential(body, nn.Linear(9, 3)), form=form) for _ in range(2))


def all_of(*rules: Any) -> list[nn.Parameter]:
    return [*{id(parameter): parameter for rule in rules for parameter in rule.parameters()}.values()]


def in_turn(first: Any, second: Any, optimiser: Any) -> None:
    """One optimiser, which one rule serves at each step."""
    optimizer = optimiser(all_of(first, second))
    for step in range(20):
        optimizer.zero_grad()
        (first if step % 2 else second)(*batch(step)).backward()
        optimizer.step()


def each_with_its_own(first: Any, second: Any, optimiser: Any) -> None:
    optimizers = [optimiser(rule.parameters()) for rule in (first, second)]
    for step in range(20):
        for rule, optimizer in zip((first, second), optimizers, strict=True):
            optimizer.zero_grad()
            rule(*batch(step)).backward()
            optimizer.step()


def one_after_the_other(first: Any, second: Any, optimiser: Any) -> None:
    for rule in (first, second):
        optimizer = optimiser(rule.parameters())
        for step in range(10):
            optimizer.zero_grad()
            rule(*batch(step)).backward()
            optimizer.step()


def looked_at(first: Any, second: Any, optimiser: Any) -> None:
    """The same, and the one that rests is evaluated."""
    for rule, other in ((first, second), (second, first), (first, second)):
        optimizer = optimiser(all_of(first, second))
        for step in range(6):
            with torch.no_grad():
                other(*batch(step))
            optimizer.zero_grad()
            rule(*batch(step)).backward()
            with torch.no_grad():
                other(*batch(step + 1))
            optimizer.step()


@pytest.mark.parametrize("run", [in_turn, each_with_its_own, one_after_the_other, looked_at])
@pytest.mark.parametrize(
    ("make", "optimiser"),
    [
        *((make, partial(torch.optim.SGD, lr=0.05)) for make in RULES.values()),
        (RULES["kp"], partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)),
    ],
    ids=[*RULES, "kp-adamw"],
)
def test_rules_that_share_a_body_each_have_their_own_feedback(make: Any, run: Any, optimiser: Any) -> None:
    """The body's weights learn from both, and the feedback of each rule from that rule alone."""
    explicit, default = sharers(make, "explicit"), sharers(make, "auto")
    for rules in (explicit, default):
        run(*rules, optimiser)
    for own, expected in zip(default, explicit, strict=True):
        alike(own, expected)


def test_feedback_rests_while_another_rule_trains_the_body() -> None:
    first, second = sharers(RULES["kp"], "auto")
    before = second.feedback_weights()["0.2"].clone()
    optimizer = torch.optim.SGD(first.parameters(), lr=0.05)
    for step in range(10):
        optimizer.zero_grad()
        first(*batch(step)).backward()
        optimizer.step()
    assert torch.equal(second.feedback_weights()["0.2"], before)


@pytest.mark.parametrize("optimiser", [adamw, partial(torch.optim.RMSprop, lr=0.002)], ids=["adamw", "rmsprop"])
def test_weights_that_backpropagation_has_trained_bring_a_state_that_the_feedback_lacks(optimiser: Any) -> None:
    ran = []
    for form in ("auto", "explicit"):
        rule = build(RULES["kp"], form)
        optimizer = optimiser(rule.parameters() if optimiser is not adamw else rule)
        for step in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(rule.model(batch(step)[0]), batch(step)[1]).backward()
            optimizer.step()
        steps(rule, optimizer, range(5, 20))
        ran.append(rule)
    alike(*ran)
    assert any("state" in remark for remark in ran[0].remarks)


def test_a_feedback_that_becomes_explicit_has_its_state_in_every_optimiser_that_holds_it() -> None:
    """Two optimisers in turn, each with its own moments of the same weights and feedback."""
    ran = []
    for form in ("auto", "explicit"):
        rule = build(RULES["kp"], form)
        optimizers = [torch.optim.AdamW(rule.parameters(), lr=rate, weight_decay=0.1) for rate in (0.01, 0.003)]
        for step in range(24):
            if step == 11:
                read(rule)
            steps(rule, optimizers[step % 2], range(step, step + 1))
        ran.append(rule)
    alike(*ran)
    assert ran[0].remarks


def leaves(rule: Any, optimizer: Any) -> Any:
    parameters = optimizer.param_groups[0]["params"]
    parameters[:] = [parameter for parameter in parameters if parameter is not rule.model[2].weight]
    return optimizer


def replaced(rule: Any, optimizer: Any) -> Any:
    parameters = optimizer.param_groups[0]["params"]
    place = next(i for i, parameter in enumerate(parameters) if parameter is rule.model[2].weight)
    parameters[place] = torch.nn.Parameter(torch.zeros(3))  # of something else
    return optimizer


def succeeded(rule: Any, optimizer: Any) -> Any:
    rest = [parameter for parameter in rule.parameters() if parameter is not rule.model[2].weight]
    return torch.optim.SGD(rest, lr=0.05, momentum=0.9, weight_decay=1e-2)


@each_rule
@pytest.mark.parametrize("change", [leaves, replaced, succeeded])
def test_a_weight_that_leaves_the_optimiser_stands_still_and_its_feedback_learns_on(make: Any, change: Any) -> None:
    ran = []
    for form in ("auto", "explicit"):
        rule = build(make, form)
        optimizer = sgd(rule)
        steps(rule, optimizer, range(8))
        optimizer.zero_grad()
        before = rule.feedback_weights()["2"].clone()
        optimizer = change(rule, optimizer)
        for step in range(8, 20):
            rule.zero_grad()
            rule(*batch(step)).backward()
            optimizer.step()
        assert float((rule.feedback_weights()["2"] - before).abs().max()) > 1e-3
        ran.append(rule)
    alike(*ran)
    assert any("different optimisers" in remark for remark in ran[0].remarks)


@each_rule
def test_a_step_that_is_interrupted_is_said(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook, and then the loop goes on: some weights have moved, and no feedback."""
    rule = build(make)
    optimizer = torch.optim.AdamW(rule.parameters(), lr=0.01, weight_decay=0.1, foreach=False)
    steps(rule, optimizer, range(6))
    before = {name: value.clone() for name, value in rule.feedback_weights().items()}
    calls = iter(range(4))

    def divide(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    original = Tensor.addcdiv_
    monkeypatch.setattr(Tensor, "addcdiv_", divide)
    with pytest.raises(KeyboardInterrupt):
        steps(rule, optimizer, range(6, 7))
    monkeypatch.undo()
    for name, value in rule.feedback_weights().items():
        assert torch.equal(value, before[name])
    steps(rule, optimizer, range(7, 12))
    assert any("did not end" in remark for remark in rule.remarks), rule.remarks
