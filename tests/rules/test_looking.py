"""Whoever looks at a rule leaves the model as it is: spectral norm moves its buffers whenever its weight is asked for."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import apical
from apical.errors import UnsupportedModelError
from apical.rules.modulated import Modulated
from apical.rules.node_importance import Matched, NodeImportance
from apical.testing import check_model

RULES: dict[str, Callable[[nn.Module], apical.CreditRule]] = {
    "fa": apical.FeedbackAlignment,
    "usf": apical.SignSymmetry,
    "kp": apical.KolenPollack,
    "pfa": apical.ProductFeedbackAlignment,
    "wm": apical.WeightMirror,
    "dfa": apical.DirectFeedbackAlignment,
    "tdca": apical.TopDownCreditAssignment,
    "dtp": apical.DifferenceTargetPropagation,
    "dfc": apical.DeepFeedbackControl,
    "ep": apical.EquilibriumPropagation,
    "pc": apical.PredictiveCoding,
    "ccl": apical.CounterCurrentLearning,
    "grapes": lambda model: Modulated(apical.FeedbackAlignment(model), NodeImportance()),
    "matched": lambda model: Modulated(apical.KolenPollack(model), Matched()),
    "outgoing": lambda model: Modulated(apical.Backprop(model), NodeImportance(weights="outgoing")),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    for layer in (model[0], model[2], model[4]):
        parametrizations.spectral_norm(layer)
    return model


def buffers(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", RULES)
def test_a_look_moves_no_buffer_and_a_batch_moves_it_as_the_model_does(name: str) -> None:
    x, y = torch.rand(7, 6, dtype=torch.float64), torch.arange(7) % 4
    model, plain = network(), network()
    rule = RULES[name](model)
    assert same(buffers(model), buffers(plain))
    if name == "ccl":  # begins with weights of its own
        plain.load_state_dict({key: model.state_dict()[key] for key in plain.state_dict()})
    for _ in range(3):
        output = rule(x, y).output
        expected = plain(x)
        if rule.feed_forward:
            torch.testing.assert_close(output, expected.detach(), rtol=1e-12, atol=0)
        assert same(buffers(model), buffers(plain))
    looks: list[Callable[[], object]] = [
        rule.state_dict,
        lambda: rule.placement(x),
        lambda: repr(rule),
        lambda: rule.remarks,
    ]
    looks += [lambda: list(rule.parameters()), lambda: check_model(rule, x, y, skip=("compiled",))]
    if hasattr(rule, "feedback_weights"):
        looks.append(rule.feedback_weights)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)  # a step
    for look in looks:
        look()
        assert same(buffers(model), buffers(plain))


class Half(nn.Module):
    """A weight of which half the entries are left out, others at every call."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (torch.rand_like(weight) < 0.5)


@pytest.mark.parametrize(("place", "weights"), [(2, "incoming"), (2, "outgoing")])
def test_gains_of_weights_drawn_at_every_call_are_refused(place: int, weights: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 4))
    parametrize.register_parametrization(model[place], "weight", Half())
    rule = Modulated(apical.FeedbackAlignment(model), NodeImportance(weights=weights))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match=f"layer '{place}' computes a new weight|draws random numbers"):
        rule(torch.rand(7, 6), torch.arange(7) % 4)


WITHOUT_GRADIENT: dict[str, Callable[[nn.Module], apical.CreditRule]] = {
    **RULES,
    "corinfomax": apical.CorInfoMax,
    "dualprop": apical.DualPropagation,
    "local": apical.LocalClassifiers,
    "ff": apical.ForwardForward,
    "csdp": apical.ContrastiveSignalPlasticity,
    "cwu": lambda model: apical.LocalSolve(apical.DirectFeedbackAlignment(model)),
}


@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
def test_a_batch_without_gradient_moves_nothing(name: str) -> None:
    """As a loop takes the loss of a validation set; a model with running averages would follow it, and has none here."""
    torch.manual_seed(0)
    act = nn.ReLU if name == "csdp" else lambda: nn.Hardtanh(0, 1)
    model = nn.Sequential(nn.Linear(6, 5), act(), nn.Linear(5, 5), act(), nn.Linear(5, 4)).double()
    rule = WITHOUT_GRADIENT[name](model)
    x, y = torch.rand(7, 6, dtype=torch.float64), torch.arange(7) % 4
    rule(x, y).backward()
    before = {key: value.clone() for key, value in rule.state_dict().items() if isinstance(value, Tensor)}
    with torch.no_grad():
        rule(x, y)
    after = rule.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


class Shrinking(nn.Linear):
    """Makes its own weight smaller at each call."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.mul_(0.9)
        return super().forward(x)


class Replaced(nn.Linear):
    """The same, in another storage."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = self.weight.data * 0.9
        return super().forward(x)


class Bounded(nn.Linear):
    """Its neurons' weights have a greatest norm, as in EEGNet; the second call in a row changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.5)
        return super().forward(x)


class Around(nn.Sequential):
    """Makes the weights of the layers inside smaller before they are called."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(0.9)
        return super().forward(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [Shrinking, Replaced, Bounded, Around])
@pytest.mark.parametrize("name", ["fa", "usf", "kp", "pfa", "dfa", "tdca", "grapes"])
def test_weights_that_a_forward_changes_are_changed_once_a_batch(name: str, kind: type[nn.Module]) -> None:
    """The look at the first batch and trials of a layer changed them too, or refused the layer."""
    torch.manual_seed(0)

    def network() -> nn.Sequential:
        middle = Around(nn.Linear(5, 5)) if kind is Around else kind(5, 5)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), middle, nn.Tanh(), nn.Linear(5, 4)).double()

    model, plain = network(), network()
    plain.load_state_dict(model.state_dict())
    x, y = torch.rand(7, 6, dtype=torch.float64), torch.arange(7) % 4
    rule = RULES[name](model)
    for _ in range(3):
        output = rule(x, y).output
        torch.testing.assert_close(output, plain(x), rtol=1e-12, atol=0)
        rule.placement(x), rule.state_dict()
        torch.testing.assert_close(list(model.parameters()), list(plain.parameters()), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["kp", "pfa"])
def test_a_look_leaves_feedback_in_closed_form(name: str) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 4))
    x, y = torch.rand(7, 6), torch.arange(7) % 4
    rule = RULES[name](model)
    optimizer = torch.optim.SGD(rule.parameters(), 0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad(), rule(x, y).backward(), optimizer.step()
        rule.placement(x), repr(rule)
    assert getattr(rule, "remarks") == []  # noqa: B009
    rule.load_state_dict(rule.state_dict())
