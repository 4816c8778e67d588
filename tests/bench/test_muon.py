"""`--optimizer muon`: matrices and what learns with them by Muon, the rest by AdamW, as one optimiser."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from apical.bench.names import make_rule
from apical.bench.optimizer import clip, make_optimizer, parts
from apical.bench.recipe import Recipe
from apical.bench.restore import restore_optimizer
from apical.errors import ConfigError

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")
LR, DECAY, STEPS = 0.01, 0.3, 5


def recipe(rule: str, *options: str) -> Recipe:
    named: dict[str, Any] = {"optimizer": "muon", "lr": (LR,), "weight_decay": (DECAY,), "loss": "token_cross_entropy"}
    return Recipe(rule=rule, rule_options=options, **named)


def tokens_model(tied: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 7))
    if tied:
        model[0].weight = model[4].weight
    return model.double()


def steps(rule: Any, optimizer: torch.optim.Optimizer, count: int = STEPS) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        inputs, targets = torch.randint(7, (2, 4, 5), generator=generator)
        optimizer.zero_grad()
        rule(inputs, targets).backward()
        optimizer.step()


def kinds(optimizer: Any) -> dict[str, set[int]]:
    return {type(m).__name__: {id(p) for g in m.param_groups for p in g["params"]} for m in optimizer.members}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("decay_on", ["all", "matrices"])
def test_matrices_are_muons_and_the_rest_adamws(tied: bool, decay_on: Any) -> None:
    model = tokens_model(tied)
    setting = replace(recipe("bp"), decay_on=decay_on)
    optimizer = make_optimizer(setting, make_rule(setting, model))
    found = kinds(optimizer)
    assert found["Muon"] == {id(model[1].weight), id(model[4].weight)}
    rest = {id(p) for p in model.parameters()} - found["Muon"]
    assert found["AdamW"] == rest
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays[id(model[1].weight)] == DECAY
    assert decays[id(model[1].bias)] == (DECAY if decay_on == "all" else 0.0)


@pytest.mark.parametrize("form", ["explicit", "auto"])
def test_kolen_pollack_comes_together_by_the_decay_alone(form: str) -> None:
    """`B - W = (1 - lr decay)^n (B_0 - W_0)`, which Newton-Schulz in bfloat16 does not disturb: both take one step."""
    model = tokens_model()
    setting = recipe("kp", f"form={form}")
    torch.manual_seed(1)
    rule = make_rule(setting, model)
    apart = {name: b.clone() - model[int(name)].weight.detach() for name, b in rule.feedback_weights().items()}
    steps(rule, make_optimizer(setting, rule))
    assert {type(rule.mismatch_of(name)).__name__ for name in rule.layers} == {
        "NoneType" if form == "explicit" else "Mismatch"
    }
    for name, b in rule.feedback_weights().items():
        expected = (1 - LR * DECAY) ** STEPS * apart[name]
        assert (b - model[int(name)].weight - expected).abs().max() < 1e-7


def test_product_feedback_follows_the_weight() -> None:
    """`B R = M W + c B E_0`, where M = 1."""
    model = tokens_model()
    setting = recipe("pfa-o")
    torch.manual_seed(1)
    rule = make_rule(setting, model)
    apart = {name: path.clone() - model[int(name)].weight.detach() for name, path in rule.feedback_weights().items()}
    steps(rule, make_optimizer(setting, rule))
    for name, path in rule.feedback_weights().items():
        expected = (1 - LR * DECAY) ** STEPS * apart[name]
        assert (path - model[int(name)].weight - expected).abs().max() < 1e-7


def test_feedback_is_apart_and_clipped_as_one() -> None:
    model = tokens_model()
    setting = recipe("dfa", "units=activation")
    rule = make_rule(setting, model)
    rule.feedback_parameters = lambda: [model[1].weight, model[1].bias]  # type: ignore[method-assign]
    optimizer = make_optimizer(setting, rule)
    forward, feedback = parts(optimizer)
    assert {id(p) for g in feedback for p in g["params"]} == {id(model[1].weight), id(model[1].bias)}
    assert len(forward) + len(feedback) == len(optimizer.param_groups)
    for parameter in rule.parameters():
        parameter.grad = torch.ones_like(parameter)
    clip(optimizer, 1.0)
    apart = [p.grad.square().sum() for p in (model[1].weight, model[1].bias) if p.grad is not None]
    assert float(sum(apart)) == pytest.approx(1.0, abs=1e-5)


def test_a_checkpoint_goes_on_with_the_same_bits() -> None:
    setting = recipe("bp")
    trained, resumed = (make_rule(setting, tokens_model()) for _ in range(2))
    optimizer, other = make_optimizer(setting, trained), make_optimizer(setting, resumed)
    steps(trained, optimizer, 3)
    resumed.load_state_dict(trained.state_dict())
    restore_optimizer(other, copy.deepcopy(optimizer.state_dict()))
    steps(trained, optimizer, 2)
    steps(resumed, other, 2)
    for a, b in zip(trained.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_closure_makes_the_gradients() -> None:
    """Once, and both optimisers' steps are those of its gradients."""
    batch = torch.randint(7, (2, 4, 5), generator=torch.Generator().manual_seed(4))
    setting = recipe("bp")
    asked, own = (make_rule(setting, tokens_model()) for _ in range(2))
    optimizers = [make_optimizer(setting, rule) for rule in (asked, own)]
    losses = []

    def closure() -> float:
        credit = asked(*batch)
        credit.backward()
        losses.append(float(credit.loss))
        return losses[-1]

    with torch.no_grad():
        assert [optimizers[0].step(closure)] == losses
    assert len(losses) == 1
    own(*batch).backward()
    optimizers[1].step()
    for a, b in zip(asked.parameters(), own.parameters(), strict=True):
        assert torch.equal(a, b)


def test_pytorch_without_muon_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ConfigError, match=r"muon needs torch.optim.Muon, which PyTorch .* use adamw"):
        make_optimizer(recipe("bp"), make_rule(recipe("bp"), tokens_model()))
