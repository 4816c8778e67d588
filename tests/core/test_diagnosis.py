"""Losses and targets that a rule cannot use are refused in words, and no term of a loss is left out unsaid."""

import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).parent.parent / "rules"))

from test_conformance import OF_CLASSES, PATHS, RULES

import apical
from apical.core.credit import CreditRule
from apical.errors import ApicalError, InstabilityError
from apical.losses import squared_error
from apical.testing import dense_network

FOLLOWS_LABELS = ("ccl", "corinfomax", "ep", "hep")


def make(name: str, loss: Any) -> CreditRule:
    torch.manual_seed(0)
    return RULES[name](dense_network(), loss)


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(8, 6, dtype=torch.double), torch.arange(8) % 4


@pytest.mark.parametrize("name", OF_CLASSES)
@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda output, targets: float(F.cross_entropy(output, targets)), "float"),
        (lambda output, targets: None, "NoneType"),
        (nn.CrossEntropyLoss, "the loss is the class CrossEntropyLoss: give .* an object"),
        ("mse", "the loss is 'mse': give a function"),
        (partial(F.cross_entropy, reduction="none"), r"shape \(8,\)"),
    ],
)
def test_a_loss_that_is_no_scalar_tensor(name: str, loss: Any, words: str) -> None:
    try:
        rule = make(name, loss)
    except ApicalError:
        return  # refused when the rule is made
    with pytest.raises(ApicalError) as info:
        rule(*batch())
    if not name.startswith(FOLLOWS_LABELS):
        assert info.match(words)


@pytest.mark.parametrize("name", OF_CLASSES)
def test_several_targets_are_taken_or_refused_in_words(name: str) -> None:
    try:
        rule = make(name, lambda output, targets: F.cross_entropy(output, targets[0]) + (output[:, 0] - targets[1]).mean())
    except ApicalError:
        return
    inputs, labels = batch()
    with suppress(ApicalError):
        rule(inputs, (labels, inputs[:, 0])).backward()


@pytest.mark.parametrize("name", PATHS)
def test_a_term_that_reads_activities_is_followed_or_refused(name: str) -> None:
    model, kept = dense_network(), {}
    found = []
    for weight in (0.0, 0.1):
        torch.manual_seed(0)
        model = dense_network()
        first = next(m for m in model.modules() if isinstance(m, nn.Linear))
        first.register_forward_hook(lambda module, inputs, output: kept.__setitem__("a", output))

        def loss(output: Tensor, targets: Tensor, weight: float = weight) -> Tensor:
            return F.cross_entropy(output, targets) + weight * kept["a"].square().sum()

        try:
            rule = RULES[name](model, loss)
            torch.manual_seed(2)
            rule(*batch()).backward()
        except ApicalError:
            return
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert not all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_output_is_named_when_the_loss_does_not_take_it() -> None:
    class Named(nn.Sequential):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": super().forward(x)}

    for rule in (apical.FeedbackAlignment, apical.DirectFeedbackAlignment):
        with pytest.raises(ApicalError, match=r"output is a dict.*wrap"):
            rule(Named(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)))(torch.rand(8, 6), torch.arange(8) % 4)


ODD_SHAPES = {
    "a number": (torch.tensor(1.0), torch.tensor(1)),
    "a sample": (torch.rand(6), torch.tensor(1)),
    "numbers": (torch.rand(8), torch.arange(8) % 4),
    "no features": (torch.rand(8, 0), torch.arange(8) % 4),
    "one target": (torch.rand(8, 6), torch.tensor(1)),
    "too few targets": (torch.rand(8, 6), torch.arange(3)),
    "a label too many": (torch.rand(8, 6), torch.arange(8)),
    "int32": (torch.rand(8, 6), torch.arange(8).int() % 4),
    "none": (torch.rand(8, 6), None),
}


@pytest.mark.parametrize("shape", ODD_SHAPES)
@pytest.mark.parametrize("name", ["bp", "fa", "dfa", "tdca", "ccl", "dtp", "dfc", "ep", "pc", "local-pred", "ff", "sibp"])
def test_odd_shapes_work_or_are_refused_in_a_line(name: str, shape: str) -> None:
    """What the model itself cannot multiply is left to PyTorch's words."""
    inputs, targets = ODD_SHAPES[shape]
    with suppress(ApicalError):
        model = nn.Sequential(nn.Linear(0 if shape == "no features" else 6, 5), nn.Tanh(), nn.Linear(5, 4))
        rule = RULES[name](model.double())
        try:
            rule(inputs.double(), targets).backward()
        except RuntimeError as error:
            assert "mat1" in str(error)  # noqa: PT017


@pytest.mark.parametrize("name", ["ccl", "dfc", "ff"])
def test_a_loss_of_the_users_is_not_compiled_unseen(name: str) -> None:
    rule = make(name, lambda output, targets: F.cross_entropy(output, targets, label_smoothing=0.1))
    with pytest.raises(Exception, match=r"before torch\.compile, so that it sees"):
        torch.compile(rule, backend="eager", fullgraph=True)(*batch())


@pytest.mark.parametrize("name", ["dfa", "tdca", "pc", "dfc"])
def test_tensors_without_numbers_are_named(name: str) -> None:
    def call() -> Any:
        rule = RULES[name](nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), F.cross_entropy)
        return rule(torch.rand(8, 6), torch.arange(8) % 4)

    with FakeTensorMode(), pytest.raises(ApicalError, match=r"FakeTensorMode have no values.*outside that mode$"):
        call()


class Smoothed(nn.CrossEntropyLoss):
    """A loss of the user's that only looks like PyTorch's."""

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        return super().forward(output, targets) + output.square().mean()


def test_a_subclass_of_a_loss_is_a_loss_of_the_users() -> None:
    with pytest.raises(Exception, match=r"before torch\.compile, so that it sees"):
        torch.compile(make("dfc", Smoothed()), backend="eager", fullgraph=True)(*batch())


@pytest.mark.parametrize("loss", [F.mse_loss, nn.SmoothL1Loss(), squared_error, partial(F.huber_loss, delta=0.5)])
def test_losses_of_the_libraries_compile_at_once(loss: Any) -> None:
    inputs, _ = batch()
    with torch.no_grad():
        targets = torch.randn_like(dense_network()(inputs))
    compiled, eager = make("dtp", loss), make("dtp", loss)
    got, wanted = torch.compile(compiled, backend="eager")(inputs, targets).loss, eager(inputs, targets).loss
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", OF_CLASSES)
def test_a_batch_of_inference_mode_has_the_same_loss(name: str) -> None:
    """Validation loops make their batches there."""
    try:
        rule = make(name, F.cross_entropy)
    except ApicalError:
        return
    rule.eval()
    torch.manual_seed(2)
    with torch.no_grad():
        loss = rule(*batch()).loss
    torch.manual_seed(2)
    with torch.inference_mode():
        assert torch.allclose(rule(*batch()).loss, loss, rtol=0, atol=1e-12)


UNFIT: dict[str, tuple[Any, str]] = {
    "another type": (
        lambda x: x.float(),
        r"the inputs are torch.float32, but the model's parameters are torch.float64: use inputs.to\(torch.float64\)",
    ),
    "whole numbers": (lambda x: x.long(), "torch.int64, but the model's parameters are torch.float64"),
    "another device": (lambda x: x.to("meta"), "the inputs are on the meta device"),
    "an array": (lambda x: x.numpy(), r"are a ndarray that contains no tensor.*torch.as_tensor"),
    "a list": (lambda x: x.tolist(), "are a list that contains no tensor"),
}


EACH = ("bp", "fa", "dfa", "tdca", "ccl", "dtp", "dfc", "strong-dfc", "ep", "corinfomax", "pc", "local-pred", "ff", "csdp")


@pytest.mark.parametrize("name", EACH)
def test_a_batch_made_in_inference_mode_is_learned_from_or_refused_in_words(name: str) -> None:
    with torch.inference_mode():
        inputs, targets = torch.rand(8, 6, dtype=torch.double), torch.arange(8) % 4
    rule = RULES[name](dense_network(), F.cross_entropy)
    try:
        rule(inputs, targets).backward()
    except ApicalError as error:
        assert "inputs.clone()" in str(error)  # noqa: PT017
    rule(inputs.clone(), targets.clone()).backward()


@pytest.mark.parametrize("name", EACH)
def test_inputs_that_the_model_does_not_take(name: str) -> None:
    x, y = batch()
    for change, words in UNFIT.values():
        with pytest.raises(ApicalError) as info:
            make(name, F.cross_entropy)(change(x), y)
        assert "\n" not in str(info.value)
        refuses_itself = any(word in str(info.value) for word in ("floating-point", "in place of"))
        assert refuses_itself or info.match(words)


@pytest.mark.parametrize("name", EACH)
def test_labels_of_another_type_of_whole_numbers(name: str) -> None:
    """Those that PyTorch's loss takes."""
    found = []
    for kind in (torch.int64, torch.uint8):
        rule, (x, y) = make(name, F.cross_entropy), batch()
        rule(x, y.to(kind)).backward()
        found.append([p.grad for p in rule.model.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [apical.Backprop, apical.FeedbackAlignment])
def test_outputs_without_an_axis_of_samples(kind: type[CreditRule]) -> None:
    """As a model that squeezes its output makes of a batch of one: PyTorch's loss takes it, and its derivative fails."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    rule, (x, _) = kind(model), batch()
    refusal = r"came with targets of shape \(1,\).*give a batch"
    with pytest.raises(
        ApicalError, match=rf"outputs of shape \(3,\) ({refusal}|.* size mismatch)"
    ):  # PyTorch 2.6 sees it itself
        rule(x[0], torch.tensor([1]))
    rule(x[0], torch.tensor(1)).backward()  # a single sample, as PyTorch takes it


def test_nothing_to_learn_and_what_is_no_model() -> None:
    for model in (nn.Linear, None, "mlp-8"):
        with pytest.raises(ApicalError, match=r"must be an object of a subclass of nn\.Module, not"):
            apical.FeedbackAlignment(model)  # type: ignore[arg-type]
    credit = apical.FeedbackAlignment(dense_network().requires_grad_(False))(*batch())
    with pytest.raises(ApicalError, match="nothing learns: all parameters are frozen"):
        credit.backward()


@pytest.mark.parametrize(
    "make",
    [
        apical.EquilibriumPropagation,
        lambda model: apical.DeepFeedbackControl(model, solver="simulate", points=12, learn="none"),
        lambda model: apical.DeepFeedbackControl(model, learn="noise", points_fb=12),
        lambda model: apical.StrongDeepFeedbackControl(model, solver="simulate", points=12, learn="none"),
    ],
)
@pytest.mark.filterwarnings("ignore:the steady state is not a stable one")
def test_dynamics_that_run_away_on_inputs_that_are_no_numbers_say_so(make: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3))
    inputs, targets = torch.rand(6, 4), torch.arange(6) % 3
    inputs[0, 0] = torch.nan
    with pytest.raises(InstabilityError, match="the inputs hold NaN or infinite values; clean the data"):
        make(model)(inputs, targets)
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(InstabilityError, match=r"diverged|weights are not"):
        make(model)(inputs.nan_to_num(), targets)
