"""Swapping the weight autograd keeps: the same gradients as an edge, only inside the layer, never silently stale."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical.core.credit import CreditRule

RULES = {
    "fa": apical.FeedbackAlignment,
    "usf": apical.SignSymmetry,
    "frsf": partial(apical.SignSymmetry, variant="fixed"),
    "kp": apical.KolenPollack,
    "kp-explicit": partial(apical.KolenPollack, form="explicit"),
    "wm": partial(apical.WeightMirror, warmup=3, rate=0.0),
    "pfa": apical.ProductFeedbackAlignment,
    "pfa-o": partial(apical.ProductFeedbackAlignment, feedback="orthogonal"),
    "pfa-fused": partial(apical.ProductFeedbackAlignment, form="fused"),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, padding_mode="circular"), nn.ReLU(inplace=True)),
        *(nn.ConvTranspose2d(6, 4, 2, stride=2), nn.Flatten(), nn.Linear(256, 9), nn.ReLU(), nn.Linear(9, 4, bias=False)),
    ).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 2, 8, 8, dtype=torch.double, generator=generator), torch.arange(6) % 4


def gradients(rule: CreditRule) -> dict[str, Tensor]:
    rule(*batch()).backward()
    return {name: parameter.grad.clone() for name, parameter in rule.named_parameters()}


@pytest.mark.parametrize("name", RULES)
def test_swap_equals_edge(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for edges in (False, True):
        model = net()
        torch.manual_seed(2)
        rule = RULES[name](model)
        if edges:  # what the rule falls back to where a swap cannot work
            monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: True)
        found.append(gradients(rule))
    assert found[0].keys() == found[1].keys()
    for parameter, value in found[0].items():
        assert (value - found[1][parameter]).abs().max() <= 1e-12 * max(1.0, float(value.abs().max())), parameter


class Penalised(nn.Module):
    """Uses the weight of its second layer outside that layer as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.relu, self.second = nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.relu(self.first(x))) + (self.second.weight**2).sum(dim=1)
        return result


def test_a_weight_used_outside_its_layer_keeps_its_exact_derivative_there() -> None:
    inputs, targets = torch.randn(4, 5, dtype=torch.double), torch.tensor([0, 1, 2, 0])
    model = Penalised().double()
    F.cross_entropy(model(inputs), targets).backward()
    exact = model.second.weight.grad.clone()
    model.zero_grad()
    apical.FeedbackAlignment(model)(inputs, targets).backward()
    assert torch.allclose(model.second.weight.grad, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["fa", "usf", "kp", "pfa"])
def test_a_weight_changed_before_the_backward_pass_is_refused(name: str) -> None:
    rule = RULES[name](net())
    credit = rule(*batch())
    with torch.no_grad():
        rule.model[7].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified"):
        credit.backward()


def test_an_input_changed_before_the_backward_pass_is_refused() -> None:
    class Spoils(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = x
            return x

    spoils = Spoils()
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), spoils, nn.Linear(6, 3)).double()
    credit = apical.FeedbackAlignment(model)(torch.randn(4, 5, dtype=torch.double), torch.tensor([0, 1, 2, 0]))
    with torch.no_grad():
        spoils.kept.add_(1.0)
    with pytest.raises(RuntimeError, match="modified"):
        credit.backward()


def test_channels_last_weights_are_swapped_too() -> None:
    plain, turned = net(), net().to(memory_format=torch.channels_last)
    found = []
    for model in (plain, turned):
        torch.manual_seed(3)
        found.append(gradients(apical.SignSymmetry(model)))
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], rtol=0, atol=1e-12), name


@pytest.mark.parametrize("subset", ["swap", "edge", "attention", "recurrent"])
@pytest.mark.parametrize("name", ["brsf", "wm"])
def test_of_two_credits_each_is_led_back_through_its_own_feedback(name: str, subset: str) -> None:
    """As two passes with the backward pass after each: the second draws, or learns, other feedback."""

    class Halved(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, 0.5 * self.weight, self.bias)

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = nn.GRU(6, 4, batch_first=True) if subset == "recurrent" else nn.MultiheadAttention(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.core(x.unsqueeze(1))[0] if subset == "recurrent" else self.core(*[x.unsqueeze(1)] * 3)[0]
            return result.squeeze(1)

    def made() -> apical.CreditRule:
        torch.manual_seed(0)
        kind = Halved if subset == "edge" else nn.Linear
        middle = First() if subset in ("attention", "recurrent") else kind(6, 4)
        last = kind(4 if subset != "attention" else 6, 3)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), middle, nn.Tanh(), last).double()
        generator = torch.Generator().manual_seed(1)
        if name == "brsf":
            return apical.SignSymmetry(model, variant="batchwise", generator=generator)
        return apical.WeightMirror(model, rate=0.5, batch=3, warmup=1, generator=generator)

    batches = [(torch.randn(4, 5, dtype=torch.double), torch.tensor([0, 1, 2, 0])) for _ in range(2)]
    rule, found = made(), []
    for pair in batches:
        rule.zero_grad()
        rule(*pair).backward()
        found.append({key: p.grad.clone() for key, p in rule.model.named_parameters()})
    rule = made()
    for credit, own in zip([rule(*pair) for pair in batches], found, strict=True):
        rule.zero_grad()
        credit.backward()
        for key, p in rule.model.named_parameters():
            assert torch.allclose(p.grad, own[key], rtol=0, atol=1e-12), key


def test_signs_that_are_drawn_for_a_batch_are_the_same_at_every_use_and_in_a_second_backward_pass() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(5, 5, bias=False)
    model = nn.Sequential(nn.Linear(5, 5), shared, shared).double()
    credit = apical.SignSymmetry(model, lambda output, _: output[0, 0], variant="batchwise")(torch.eye(5).double(), None)
    credit.backward(retain_graph=True)
    once = model[0].bias.grad.clone()
    credit.backward()
    assert torch.equal(model[0].bias.grad, 2 * once)


@pytest.mark.parametrize("why", ["called again", "generator"])
def test_magnitudes_that_a_compiled_graph_cannot_draw(why: str) -> None:
    class Again(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[2](torch.tanh(self[1](torch.tanh(self[1](torch.tanh(self[0](x)))))))

    layers = (nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3))
    model = Again(*layers) if why == "called again" else nn.Sequential(*layers)
    rule = apical.SignSymmetry(
        model, variant="batchwise", generator=torch.Generator().manual_seed(0) if why == "generator" else None
    )
    words = "calls layer .*1.* again" if why == "called again" else "has its own generator"
    with pytest.raises(Exception, match=f"{words}, so a compiled graph cannot draw"):
        torch.compile(rule, backend="eager", fullgraph=True)(torch.randn(8, 4), torch.arange(8) % 3)
