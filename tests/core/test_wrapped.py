"""Rules come and go on one model, in any order and number, and leave it as it was."""

import copy
import gc
import io
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical.core.layers import computes_plainly
from apical.errors import ConfigError

RULES = (apical.FeedbackAlignment, apical.SignSymmetry, apical.KolenPollack, apical.ProductFeedbackAlignment)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 4


def is_untouched(model: nn.Module) -> bool:
    return not any(
        "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks for module in model.modules()
    )


def gradients(step: Any, model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    step()
    return [p.grad.clone() for p in model.parameters()]


def learn(rule: Any) -> list[Tensor]:
    return gradients(lambda: rule(*batch()).backward(), rule.model)


def backprop(model: nn.Module) -> list[Tensor]:
    inputs, targets = batch()
    return gradients(lambda: F.cross_entropy(model(inputs), targets).backward(), model)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("order", ["created", "reversed", "random"])
def test_two_hundred_rules_detached_in_any_order(order: str) -> None:
    model = network()
    exact = backprop(model)
    rules = [RULES[i % len(RULES)](model) for i in range(200)]
    if order == "reversed":
        rules.reverse()
    elif order == "random":
        random.Random(0).shuffle(rules)
    kept = next(rule for rule in rules if rule is not rules[0])
    alone = learn(kept)
    for rule in rules:
        if rule is not kept:
            rule.detach()
    assert not is_untouched(model)
    assert same(learn(kept), alone)  # the others' going changes nothing
    assert same(backprop(model), exact)
    kept.detach()
    assert is_untouched(model)


def test_attached_and_detached_by_turns() -> None:
    model, chance = network(), random.Random(1)
    rules: list[Any] = []
    for _ in range(200):
        if rules and chance.random() < 0.5:
            rules.pop(chance.randrange(len(rules))).detach()
        else:
            rules.append(apical.FeedbackAlignment(model))
        assert is_untouched(model) == (not rules)
    for rule in rules:
        rule.detach()
    assert is_untouched(model)


def test_two_thousand_rules_one_after_the_other_without_detaching() -> None:
    """Rules that nobody holds any more are gone, and so is what they put on the model."""
    model = network()
    exact = backprop(model)
    for i in range(2000):
        rule = apical.FeedbackAlignment(model)
        if i % 500 == 0:
            learn(rule)
    last = learn(rule)
    assert not same(last, exact)
    del rule
    gc.collect()
    assert is_untouched(model)
    assert same(backprop(model), exact)


def test_two_thousand_rules_at_once() -> None:
    """A call does not pass through the idle ones."""
    model = network()
    rules = [apical.FeedbackAlignment(model) for _ in range(2000)]
    first, last = learn(rules[0]), learn(rules[-1])
    assert not same(first, last)
    assert same(learn(rules[0]), first)
    del rules
    gc.collect()
    assert is_untouched(model)


def test_a_copied_or_stored_model_has_no_rule() -> None:
    model = network()
    exact = backprop(model)
    rule = apical.FeedbackAlignment(model)
    learn(rule)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        assert other[2].weight is not model[2].weight
        assert same(backprop(other), exact)
        assert all(computes_plainly(layer) for layer in (other[0], other[2], other[4]))
        with torch.no_grad():
            other[0].weight.zero_()  # it runs its own weights, not the original's
        assert not torch.equal(other(batch()[0]), model(batch()[0]))
        second = apical.FeedbackAlignment(other)
        assert second.is_plain("2")
        learn(second)
        second.detach()
        assert is_untouched(other)


def test_a_forward_of_the_users_own_comes_back() -> None:
    model = network()
    layer = model[2]

    def forward(x: Tensor) -> Tensor:
        return F.linear(x, 2 * layer.weight, layer.bias)

    layer.forward = forward
    exact = backprop(model)
    first, second = apical.FeedbackAlignment(model), apical.FeedbackAlignment(model)
    assert not same(learn(first), exact)
    first.detach()
    assert not same(learn(second), exact)
    second.detach()
    assert layer.forward is forward
    assert same(backprop(model), exact)


def test_a_forward_given_to_a_layer_afterwards_is_refused() -> None:
    """It would hide the layer from the rule: exact backpropagation without a word."""
    model = network()
    rule = apical.FeedbackAlignment(model)
    learn(rule)
    model[2].forward = lambda x: F.linear(x, model[2].weight)
    with pytest.raises(ConfigError, match=r"'2'.*another forward"):
        learn(rule)


def test_a_failed_pass_leaves_the_model_plain() -> None:
    model = network()
    exact = backprop(model)
    rule = apical.FeedbackAlignment(model)
    with pytest.raises(RuntimeError):
        rule(torch.randn(8, 3), batch()[1])
    assert same(backprop(model), exact)


def test_the_graph_outlives_the_rule() -> None:
    model = network()
    rule = apical.FeedbackAlignment(model)
    expected = learn(rule)
    model.zero_grad()
    credit = rule(*batch())
    del rule
    gc.collect()
    credit.backward()
    assert same([p.grad for p in model.parameters()], expected)
