"""A ResNet-20 with BatchNorm trains under every rule, and in the oracle limit its gradients are backpropagation's."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import apical
from apical import models
from apical.bench.names import RULES, make_rule
from apical.bench.recipe import Recipe
from apical.core.units import key
from apical.errors import UnsupportedModelError


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Eight images of 8 x 8 whose class is their brightest colour."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8, 3, 8, 8, generator=generator).to(dtype)
    return inputs, inputs.mean(dim=(2, 3)).argmax(dim=1)


BEGINNINGS = ("ccl", "ep", "hep", "mupc", "dualprop", "corinfomax", "local", "mono-forward", "ff", "scff", "csdp", "sibp")
CHAINS = [name for name in RULES if "dfc" in name or name.startswith(BEGINNINGS) or "dtp" in name]
"""Rules whose mathematics is about chains of layers, or about models of one parametrisation."""
SIBLINGS = ("pc", "pc-incremental", "pc-one-step", *(name for name, entry in RULES.items() if "initial" in entry.options))
"""Rules that are tried by a sibling: `pc-error` trains the same blocks in fewer passes; feedback begins at other numbers."""


@pytest.mark.parametrize("name", CHAINS)
def test_rules_of_chains_refuse_resnet20_by_a_module(name: str) -> None:
    model = models.build("resnet20", (3, 8, 8), 3)
    with pytest.raises(UnsupportedModelError) as refused:
        make_rule(Recipe(rule=name), model, (3, 8, 8))
    assert any(repr(module) in str(refused.value) for module, _ in model.named_modules() if module)


@pytest.mark.parametrize(
    "name", [name for name in RULES if name not in (*CHAINS, *SIBLINGS) and not name.startswith("tdca")]
)
def test_resnet20_trains(name: str) -> None:
    torch.manual_seed(0)
    model = models.build("resnet20", (3, 8, 8), 3)
    options = ("warmup=50",) if name == "wm" else ()
    rule = make_rule(Recipe(rule=name, rule_options=options), model, (3, 8, 8) if name.startswith("pc") else None)
    before = {parameter: value.detach().clone() for parameter, value in rule.model.named_parameters()}
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.002, momentum=0.9, weight_decay=1e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        credit = rule(*batch(torch.float32))
        credit.backward()
        optimizer.step()
        losses.append(credit.loss.item())
    assert sum(losses[-5:]) / 5 < 0.8 * losses[0], losses
    for parameter, value in rule.model.named_parameters():
        assert value.isfinite().all()
        assert not torch.equal(value, before[parameter]), f"{parameter} did not learn"


def test_feedback_alignment_with_the_forward_weights_is_backpropagation() -> None:
    torch.manual_seed(0)
    model = models.build("resnet20", (3, 8, 8), 3).double()
    inputs, targets = batch(torch.double)
    F.cross_entropy(model(inputs), targets).backward()
    exact = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    rule = apical.FeedbackAlignment(model)
    for name, layer in rule.layers.items():
        rule.feedback.get_buffer(key(name)).copy_(layer.weight.detach())
    rule(inputs, targets).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad - exact[name]).abs().max() <= 1e-12 * max(1.0, float(exact[name].abs().max())), name
