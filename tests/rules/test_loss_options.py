"""What a loss says beside the distance of output and targets is in the update, or it is refused."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_conformance import OF_CLASSES, RULES
from torch import Tensor, nn

import apical
from apical.core.losses import output_error, squared_error, terms, value_at
from apical.errors import ConfigError
from apical.testing import dense_network

COMPARE = ("local-sim", "local-both", "ff", "scff", "csdp")
"""Rules that compare samples by their labels, or with each other."""

WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 4.0], dtype=torch.double)
SMALL_NUDGE = {
    "dfc": {"nudge": 1e-6},
    "dfc-ss": {"nudge": 1e-6},
    "dfc-ssa": {"nudge": 1e-6},
    "dtp-drl": {"eta": 1e-6},
    "dtp": {"eta": 1e-6},
    "ddtp-rhl": {"eta": 1e-6},
    "ep": {"beta": 1e-4},
    "ep-directed": {"beta": 1e-4},
}
"""Rules that nudge are linear in the error only for small nudges."""


def update(name: str, loss: Any, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)
    factory = partial(RULES[name], **SMALL_NUDGE.get(name, {}))
    rule = factory(dense_network(), loss)
    torch.manual_seed(1)
    rule(inputs, targets).backward()
    return {key: p.grad for key, p in rule.model.named_parameters() if p.grad is not None}


def refuses(name: str, loss: Any) -> str | None:
    """What a rule says to a loss that ignores samples, where it cannot follow it."""
    if name.startswith("hep") and loss is not F.cross_entropy:
        return "complex"
    visible = loss is not F.cross_entropy and getattr(loss, "ignore_index", 0) != -100
    if name.startswith(("strong-dfc", "corinfomax", "ccl", "pc", "tdca", "dualprop", "sibp", *COMPARE)) and visible:
        return "ignore_index"
    one_hot = name.startswith(("corinfomax", "ccl", "hep", *COMPARE))
    if one_hot or (name.startswith("ep") and loss is F.cross_entropy):
        return "from the batch"
    return None


def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(8, 6, dtype=torch.double, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4


IGNORE = [(name, F.cross_entropy) for name in RULES]
IGNORE += [
    (name, loss)
    for name in dict.fromkeys((*OF_CLASSES, *SMALL_NUDGE))  # what a loss says is read in one place for each class
    for loss in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(ignore_index=7), partial(F.cross_entropy, ignore_index=0))
]


@pytest.mark.parametrize(("name", "loss"), IGNORE)
def test_samples_that_the_loss_ignores_teach_nothing(name: str, loss: Any) -> None:
    """The update is that of the batch without them; or the rule says what to do."""
    inputs, targets = batch()
    ignored = targets == 0
    if not (isinstance(loss, partial) or getattr(loss, "ignore_index", -100) == 7):
        targets = targets.masked_fill(ignored, -100)
    elif isinstance(loss, nn.Module):
        targets = targets.masked_fill(ignored, 7)
    refused = refuses(name, loss)
    if refused:
        with pytest.raises(ConfigError, match=refused):
            update(name, loss, inputs, targets)
        return
    found = update(name, loss, inputs, targets)
    if name.startswith(("ep", "dfc", "dtp", "ddtp")) and name not in SMALL_NUDGE:
        return
    expected = update(name, loss, inputs[~ignored], targets[~ignored])
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        gap = (found[key] - value).abs().max()
        assert gap <= (1e-3 if name in SMALL_NUDGE else 1e-12) * value.abs().max(), (key, float(gap))


FOLLOWS_THE_LOSS = ["bp", "fa", "pfa", "kp", "dfa", "dtp-drl", "ep", "ccl", "local-pred", "mono-forward"]


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(WEIGHTS), partial(F.cross_entropy, label_smoothing=0.3)])
@pytest.mark.parametrize("name", FOLLOWS_THE_LOSS)
def test_the_error_at_the_output_is_that_of_the_whole_loss(name: str, loss: Any) -> None:
    """The last layer's bias gets the summed error at the output; from settled states it is the same for small nudges."""
    torch.manual_seed(0)
    inputs, targets = batch()
    rule = partial(RULES[name], **SMALL_NUDGE.get(name, {}))(dense_network(), loss)
    credit = rule(inputs, targets)
    credit.backward()
    error = output_error(loss, credit.output.detach(), targets)[1]
    bias = rule.model[4].bias.grad
    assert torch.allclose(bias, error.sum(0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(WEIGHTS),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(ignore_index=0),
        nn.NLLLoss(WEIGHTS),
        partial(F.cross_entropy, weight=WEIGHTS),
        partial(F.cross_entropy, label_smoothing=0.1),
    ],
)
@pytest.mark.parametrize("name", ["strong-dfc", "corinfomax", "tdca", "local-sim", "local-both", "ff"])
def test_rules_that_learn_from_labels_refuse_options_they_would_drop(name: str, loss: Any) -> None:
    with pytest.raises(ConfigError, match=r"option (weight|label_smoothing|ignore_index) of the loss would have no effect"):
        RULES[name](dense_network(), loss)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), partial(F.cross_entropy, reduction="mean"), nn.MSELoss()])
@pytest.mark.parametrize("name", ["strong-dfc", "corinfomax", "tdca"])
def test_options_that_change_nothing_are_taken(name: str, loss: Any) -> None:
    RULES[name](dense_network(), loss)


LABELS = ["strong-dfc", "corinfomax", "tdca", "local-sim", "local-both", "ff", "csdp"]
OWN = {
    "smooth": lambda o, t: F.cross_entropy(o, t, label_smoothing=0.1),
    "lecun": lambda o, t: F.mse_loss(o, 0.1 + 0.8 * F.one_hot(t, 4).to(o)),
    "penalty": lambda o, t: F.cross_entropy(o, t) + 0.1 * o.square().mean(),
    "weights": lambda o, t: F.cross_entropy(o, t, weight=WEIGHTS),
    "prior": lambda o, t: F.cross_entropy(o + WEIGHTS.log(), t),
    "ignored": lambda o, t: F.cross_entropy(o, t, ignore_index=0),
    "sum": lambda o, t: F.cross_entropy(o, t, reduction="sum"),
}
WORDS = {"weights": "weighs", "prior": "weighs", "ignored": "ignores a class", "sum": "takes means over the batch itself"}


@pytest.mark.parametrize("loss", OWN)
@pytest.mark.parametrize("name", LABELS)
def test_a_function_of_ones_own_is_asked_for_what_labels_alone_do_not_say(name: str, loss: str) -> None:
    with pytest.raises(ConfigError, match=WORDS.get(loss, "minimum at outputs other than the labels")):
        RULES[name](dense_network(), OWN[loss])(*batch())


@pytest.mark.parametrize("name", ["pc", "dualprop", "sibp", "ccl", "scff"])
def test_rules_that_follow_the_loss_still_refuse_what_they_would_drop(name: str) -> None:
    for loss in ("ignored", "sum"):
        with pytest.raises(ConfigError, match=rf"{WORDS[loss]}"):
            RULES[name](dense_network(), OWN[loss])(*batch())
    RULES[name](dense_network(), OWN["smooth"])(*batch())


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, t: F.cross_entropy(o, t),
        lambda o, t: F.cross_entropy(o / 5, t),
        lambda o, t: F.nll_loss(o.log_softmax(1), t),
        lambda o, t: F.mse_loss(o, F.one_hot(t, 4).to(o)),
        lambda o, t: F.mse_loss(o.tanh(), 2 * F.one_hot(t, 4).to(o) - 1),
        lambda o, t: F.multi_margin_loss(o, t),
        lambda o, t: F.binary_cross_entropy_with_logits(o, F.one_hot(t, 4).to(o)),
    ],
)
@pytest.mark.parametrize("name", LABELS)
def test_a_function_that_asks_for_the_labels_is_taken(name: str, loss: Any) -> None:
    rule = RULES[name](dense_network(), loss)
    rule(*batch()).backward()
    assert rule.model[4].weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["tdca", "strong-dfc"])
def test_probabilities_of_classes_are_not_taken_for_outputs(name: str) -> None:
    """Cross-entropy with soft labels is not least where the outputs are the labels; a distance is."""
    inputs, targets = batch()
    soft = F.one_hot(targets, 4).double() * 0.7 + 0.075
    with pytest.raises(ConfigError, match="drives the outputs to numerical targets"):
        RULES[name](dense_network(), F.cross_entropy)(inputs, soft)
    RULES[name](dense_network(), F.mse_loss)(inputs, soft).backward()


@pytest.mark.parametrize("name", ["tdca", "strong-dfc"])
def test_a_loss_is_asked_again_when_it_or_the_targets_are_of_another_kind(name: str) -> None:
    """Also where the rule is called by keywords."""
    inputs, targets = batch()
    rule = RULES[name](dense_network(), F.cross_entropy)
    rule(inputs=inputs, targets=targets).backward()
    with pytest.raises(ConfigError, match="drives the outputs to numerical targets"):
        rule(inputs=inputs, targets=F.one_hot(targets, 4).double())
    rule.loss = OWN["smooth"]
    with pytest.raises(ConfigError, match="minimum at outputs other than the labels"):
        rule(targets=targets, inputs=inputs)


def test_output_error_of_a_plain_loss_keeps_no_graph() -> None:
    output, targets = torch.randn(8, 4, requires_grad=True), batch()[1]
    value, error = output_error(F.cross_entropy, output, targets)
    assert not value.requires_grad
    assert terms(value) == []
    torch.testing.assert_close(error, torch.autograd.grad(F.cross_entropy(output, targets), output)[0])


@pytest.mark.parametrize("traced", [False, True])
def test_a_parameter_in_the_loss_makes_it_a_root(traced: bool) -> None:
    t = torch.tensor(2.0, dtype=torch.double, requires_grad=True)
    output, targets = torch.randn(8, 4, dtype=torch.double, requires_grad=True), batch()[1]

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(t.exp() * output, targets)

    with torch.no_grad():
        value, error = output_error(loss, output, targets, traced=traced)
    ((root, signal),) = terms(value)
    assert signal is None
    expected = torch.autograd.grad(loss(output, targets), [t, output])
    torch.testing.assert_close(error, expected[1])
    assert not error.requires_grad
    root.backward()
    torch.testing.assert_close(t.grad, expected[0])
    assert output.grad is None


def test_a_penalty_reached_through_a_long_graph_is_found_once() -> None:
    """The walk along the loss's graph visits every node once: 2^200 paths lead to the weight."""
    w = torch.tensor(0.5, dtype=torch.double, requires_grad=True)

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        path = output.mean()
        for _ in range(200):
            path = (path + path) / 2
        return path + squared_error(output, targets)

    assert not output_error(loss, torch.randn(8, 4), batch()[1])[0].requires_grad
    assert output_error(lambda o, t: loss(o, t) + w, torch.randn(8, 4).double(), batch()[1])[0].requires_grad


@pytest.mark.parametrize(
    "name",
    [
        "dfa",
        "dtp-drl",
        "dfc-ss",
        "ep",
        "ep-directed",
        "pc",
        "local-pred",
        "local-sim",
        "ff",
        "scff",
        "ccl",
        "dualprop",
        "sibp",
    ],
)
def test_a_loss_that_autograd_cannot_follow_is_refused(name: str) -> None:
    """Nothing learns from such a loss, or under counter-current learning all but the last block."""
    w = torch.tensor(0.5, requires_grad=True)
    for loss in (
        lambda output, targets: torch.tensor(output.sum().item()),
        lambda output, targets: w * F.cross_entropy(output.detach(), targets),
    ):
        with pytest.raises(ConfigError, match="does not depend on the output"):
            RULES[name](dense_network(), loss)(*batch())


@pytest.mark.parametrize("name", ["strong-dfc", "corinfomax", "csdp"])
def test_rules_that_learn_from_labels_need_no_derivative_of_the_loss(name: str) -> None:
    rule = RULES[name](dense_network(), lambda output, targets: F.cross_entropy(output.detach(), targets))
    rule(*batch()).backward()
    assert rule.model[4].weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["dfc", "dfc-ssa", "dtp", "ddtp-linear", "ep-directed"])
def test_targets_and_nudges_whose_size_would_grow_with_the_batch_are_refused(name: str) -> None:
    """Their feedback learns from noise, not from the loss, so that a sum would not scale the whole update either."""
    with pytest.raises(ConfigError, match="takes means over the batch itself"):
        RULES[name](dense_network(), OWN["sum"])(*batch())


def test_value_at_leaves_the_outputs_graph_out() -> None:
    output = torch.randn(8, 4, requires_grad=True)
    assert not value_at(F.cross_entropy, output, batch()[1]).requires_grad
    t = torch.ones((), requires_grad=True)
    value_at(lambda o, y: F.cross_entropy(o * t, y), output, batch()[1]).backward()
    assert output.grad is None
    assert t.grad is not None


@pytest.mark.parametrize("rule", [apical.Backprop, apical.FeedbackAlignment])
def test_a_penalty_on_captured_activities_travels_on_by_the_rules_own_feedback(rule: type[apical.CreditRule]) -> None:
    """It is an error at that activity: with the feedback weights B = W it gives backpropagation's update."""
    results = []
    for kind in (rule, apical.Backprop):
        torch.manual_seed(0)
        model, seen = dense_network(), []
        model[3].register_forward_hook(lambda module, args, made, seen=seen: seen.append(made))
        taught = kind(model, lambda o, y, seen=seen: F.cross_entropy(o, y) + seen[-1].square().mean())
        if isinstance(taught, apical.FeedbackAlignment):
            for name, buffer in taught.feedback.named_buffers():
                buffer.copy_(model[int(name)].weight.detach())
        taught(*batch()).backward()
        results.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


def test_a_penalty_on_activities_captured_before_a_cut_teaches_their_own_unit() -> None:
    updates = []
    for strength in (0.0, 0.3):
        torch.manual_seed(0)
        model, seen = dense_network(), []
        model[2].register_forward_hook(lambda module, args, made, seen=seen: seen.append(made))
        rule = apical.DirectFeedbackAlignment(
            model, lambda o, y, seen=seen, s=strength: F.cross_entropy(o, y) + s * seen[-1].square().mean()
        )
        torch.manual_seed(1)
        rule(*batch()).backward()
        updates.append([p.grad.clone() for p in model.parameters()])
    torch.manual_seed(0)
    model = dense_network()
    below = model[:2](batch()[0]).detach()
    own = torch.autograd.grad(0.3 * model[2](below).square().mean(), list(model[2].parameters()))
    moved = [after - before for before, after in zip(*updates, strict=True)]
    for index, expected in enumerate([0, 0, *own, 0, 0]):
        torch.testing.assert_close(moved[index], torch.zeros_like(moved[index]) + expected, rtol=1e-12, atol=1e-14)


MEANS = ("tdca", "strong-dfc", "corinfomax", "ccl", "ep", "hep", "pc", "dualprop", "sibp", "dfc", "dtp", "ddtp", *COMPARE)
"""Rules that take means over the batch themselves: of targets, nudges, energies, or what feedback learns from."""


SUMS = [(name, nn.CrossEntropyLoss(reduction="sum")) for name in RULES]
SUMS += [(name, partial(F.cross_entropy, reduction="sum")) for name in OF_CLASSES]


@pytest.mark.parametrize(("name", "loss"), SUMS)
def test_a_sum_over_the_batch_is_a_batch_of_means_or_refused(name: str, loss: Any) -> None:
    inputs, targets = batch()
    if name.startswith(MEANS):
        with pytest.raises(ConfigError, match="reduction='mean'"):
            update(name, loss, inputs, targets)
        return
    mean, summed = (update(name, one, inputs, targets) for one in (F.cross_entropy, loss))
    for key, value in mean.items():
        torch.testing.assert_close(summed[key], len(inputs) * value, rtol=1e-9, atol=1e-9)


def doubled(output: Tensor, targets: Tensor) -> Tensor:
    output.mul_(2)
    return F.cross_entropy(output, targets)


@pytest.mark.parametrize("name", [name for name in RULES if not name.startswith("hep")])
def test_a_loss_that_changes_the_output_in_place_is_followed_or_refused(name: str) -> None:
    """As one that works on a copy."""
    expected = update(name, lambda output, targets: doubled(output.clone(), targets), *batch())
    try:
        made = update(name, doubled, *batch())
    except ConfigError as error:
        assert "changes the output in place" in str(error)  # noqa: PT017
        return
    assert made.keys() == expected.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(made[key], grad, rtol=1e-9, atol=1e-12, msg=key)


class Counting(nn.CrossEntropyLoss):
    """A loss that keeps something."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(output, targets)


class OldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        return output.clone()

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> Tensor:
        return error


@pytest.mark.parametrize("kind", ["module", "function"])
def test_losses_that_transforms_do_not_follow_are_refused_in_words(kind: str) -> None:
    loss = Counting() if kind == "module" else lambda o, y: F.cross_entropy(OldStyle.apply(o), y)
    with pytest.raises(ConfigError, match=r"equilibrium propagation differentiates the loss by torch.func.grad"):
        update("ep", loss, *batch())
