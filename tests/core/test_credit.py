"""The contract: what `Credit.backward` accumulates, and what a rule leaves on a model."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import apical
from apical.core.credit import Credit, CreditRule
from apical.core.wrapped import WrappedRule
from apical.errors import ConfigError, InstabilityError, UnsupportedModelError


def test_backward_sends_each_signal_through_its_own_root() -> None:
    """`sum_k <signal_k, root_k>` is what is differentiated; None means 1."""
    w = torch.tensor([2.0, 3.0], dtype=torch.double, requires_grad=True)
    vector, scalar = w**2, w.prod()
    signal = torch.tensor([10.0, -1.0], dtype=torch.double)
    Credit([vector, scalar], [signal, None], vector, scalar).backward()
    expected = torch.tensor([2 * 2 * 10.0 + 3.0, 2 * 3 * -1.0 + 2.0], dtype=torch.double)
    assert torch.equal(w.grad, expected)


def test_backward_accumulates_into_grad() -> None:
    w = torch.tensor([2.0], requires_grad=True)
    for _ in range(3):
        loss = (5 * w).sum()
        Credit([loss], [None], loss, loss).backward()
    assert w.grad.item() == 15.0


def test_type_checkers_know_what_a_rule_returns() -> None:
    """`nn.Module.__call__` says Any, after which a misspelt attribute of the credit would pass every type checker."""
    assert get_type_hints(CreditRule.__call__)["return"] is Credit


def test_logs_are_not_shared_between_credits() -> None:
    loss = torch.zeros(())
    one, two = (Credit([loss], [None], loss, loss) for _ in range(2))
    one.logs["x"] = loss
    assert two.logs == {}


class Half(CreditRule):
    """Half the gradient, by a hook."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, F.cross_entropy)
        self._hooks.append(model.register_forward_hook(lambda module, args, output: None))

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        output = self.model(inputs)
        loss = self.loss(output, targets)
        return Credit([loss], [torch.tensor(0.5)], output, loss)


def test_a_rule_of_ones_own() -> None:
    model, inputs, targets = nn.Linear(3, 2), torch.randn(4, 3), torch.arange(4) % 2
    F.cross_entropy(model(inputs), targets).backward()
    exact = model.weight.grad.clone()
    model.zero_grad()
    rule = Half(model)
    rule(inputs, targets).backward()
    assert torch.allclose(model.weight.grad, exact / 2)
    assert rule.feedback_weights() == {}
    assert model._forward_hooks
    assert rule.detach() is model
    assert not model._forward_hooks
    assert rule.detach() is model  # once more does no harm


@pytest.mark.parametrize("rule", [apical.Backprop, apical.FeedbackAlignment, apical.DirectFeedbackAlignment])
def test_the_loss_is_the_callers(rule: type[CreditRule]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    inputs, targets = torch.randn(4, 3), torch.randn(4, 2)
    credit = rule(model, F.mse_loss)(inputs, targets)
    assert torch.allclose(credit.loss, (model(inputs) - targets).square().mean())


@pytest.mark.parametrize("rule", [apical.FeedbackAlignment, apical.DirectFeedbackAlignment])
def test_a_detached_rule_refuses_to_work(rule: type[CreditRule]) -> None:
    each = rule(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    each.detach()
    with pytest.raises(ConfigError, match=r"detached.*make a new rule"):
        each(torch.randn(8, 4), torch.arange(8) % 3)


def test_the_loss_hands_every_root_its_signal_times_the_incoming_gradient() -> None:
    """Roots may be parameters, unit outputs and scalars; `d (s loss)` arrives as s times each signal."""
    leaf = torch.tensor([1.0, 2.0], dtype=torch.double, requires_grad=True)
    w = torch.tensor([2.0, 3.0], dtype=torch.double, requires_grad=True)
    signals = [torch.tensor([5.0, 7.0], dtype=torch.double), torch.tensor([10.0, -1.0], dtype=torch.double), None]
    value = torch.tensor(4.0, dtype=torch.double)
    credit = Credit([leaf, w**2, w.prod()], signals, w**2, value)
    (credit.loss / 4).backward()
    assert torch.equal(leaf.grad, signals[0] / 4)
    assert torch.equal(w.grad, torch.tensor([2 * 2 * 10.0 + 3.0, 2 * 3 * -1.0 + 2.0], dtype=torch.double) / 4)
    assert credit.loss == value


def test_a_loss_that_is_the_only_root_is_itself() -> None:
    loss = torch.tensor(1.0, requires_grad=True) * 2
    assert Credit([loss], [None], loss, loss).loss is loss


def test_roots_added_later_count() -> None:
    w = torch.tensor(1.0, requires_grad=True)
    loss = 2 * w
    credit = Credit([loss], [None], loss, loss)
    credit.roots, credit.signals = [*credit.roots, 3 * w], [*credit.signals, None]
    credit.loss.backward()
    assert w.grad == 5.0


def test_half_precision_signals_are_scaled_before_they_are_rounded() -> None:
    """A scale that float16 cannot hold (65536, where `GradScaler` begins) times a small signal is a number."""
    w = torch.ones(2, dtype=torch.float16, requires_grad=True)
    signal = torch.tensor([1e-3, -1e-3], dtype=torch.float16)
    credit = Credit([w * 1], [signal], w, torch.tensor(1.0))
    (65536 * credit.loss).backward()
    assert torch.equal(w.grad, (65536 * signal.float()).half())


def test_a_loss_that_nothing_learns_from_says_so() -> None:
    loss = torch.tensor(1.0)
    with pytest.raises(RuntimeError, match="does not require grad"):
        Credit([], [], loss, loss).loss.backward()


def test_a_credit_is_a_tree_of_tensors() -> None:
    """What wrappers do to outputs they may do to a credit; both ways of learning are there afterwards."""
    results = []
    for way in ("backward", "loss", "plain"):
        w = torch.tensor([2.0, 3.0], dtype=torch.double, requires_grad=True)
        credit = Credit([w**2, w.prod()], [torch.ones(2).double(), None], (w**2).detach(), w.sum(), {"x": w.sum().detach()})
        if way != "plain":
            credit = tree_map(lambda tensor: 2 * tensor, credit)
        (credit.loss if way == "loss" else credit).backward()
        results.append(w.grad)
    assert torch.equal(credit.output.detach() * 2, tree_map(lambda tensor: 2 * tensor, credit).output.detach())
    assert torch.equal(results[0], 2 * results[2])
    assert torch.equal(results[1], 2 * results[2])
    assert tree_map(lambda tensor: 2 * tensor, credit).logs == {"x": torch.tensor(10.0, dtype=torch.double)}


def test_values_of_an_output_without_credit_are_free_to_use() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    credit = apical.DirectFeedbackAlignment(model)(torch.randn(4, 3), torch.arange(4) % 2)
    output = credit.output
    assert torch.equal(output, model(torch.zeros(0, 3)).new_tensor(output.detach().numpy()))
    output.add_(1)  # in place too
    assert output.argmax(1).shape == (4,)
    with pytest.raises(ConfigError, match=r"does not travel through the output.*detach"):
        output.sum().backward()
    credit.backward()


RULES = [kind for name in apical.__all__ if isinstance(kind := getattr(apical, name), type) and issubclass(kind, CreditRule)]


@pytest.mark.parametrize("kind", [kind for kind in RULES if kind is not CreditRule and not issubclass(kind, WrappedRule)])
def test_inputs_that_are_not_numbers_are_named_once(kind: type[CreditRule]) -> None:
    rule = kind(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)))
    inputs, targets = torch.rand(4, 6), torch.arange(4) % 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rule(inputs, targets)
    inputs[0, -1] = float("nan")  # forward-forward writes the label over the first numbers
    if kind is apical.EquilibriumPropagation:
        with pytest.raises(InstabilityError, match="because the inputs hold NaN"):
            rule(inputs, targets)
        return
    with pytest.warns(RuntimeWarning, match="not finite because the inputs hold NaN or infinite values"):
        rule(inputs, targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rule(inputs, targets)


def test_infinite_targets_are_named() -> None:
    rule, targets = apical.FeedbackAlignment(nn.Linear(3, 2), F.mse_loss), torch.full((4, 2), torch.inf)
    with pytest.warns(RuntimeWarning, match="because the targets hold"):
        rule(torch.ones(4, 3), targets)


def test_a_loss_that_is_not_finite_without_such_inputs_is_divergence() -> None:
    model = nn.Linear(3, 2)
    rule = apical.Backprop(model)
    rule.model.weight.data.fill_(float("nan"))
    with pytest.warns(RuntimeWarning, match="training has diverged"):
        rule(torch.ones(4, 3), torch.arange(4) % 2)
    tokens = apical.Backprop(
        nn.Sequential(nn.Embedding(3, 2), nn.Flatten()), lambda output, targets: output.sum() * torch.inf
    )
    with pytest.warns(RuntimeWarning, match="training has diverged"):
        tokens(torch.ones(4, 1, dtype=torch.long), torch.arange(4) % 2)


@pytest.mark.parametrize("kind", [apical.EquilibriumPropagation, apical.CorInfoMax])
def test_infinite_inputs_are_named_where_bounded_states_hide_them(kind: type[CreditRule]) -> None:
    rule = kind(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)))
    inputs = torch.rand(4, 6)
    inputs[0, 0] = torch.inf
    with pytest.warns(RuntimeWarning, match="because the inputs hold"):
        rule(inputs, torch.arange(4) % 3)


@pytest.mark.parametrize("kind", [apical.Backprop, apical.FeedbackAlignment])
def test_an_empty_batch_is_not_called_divergence(kind: type[CreditRule]) -> None:
    with pytest.warns(RuntimeWarning, match="the batch is empty"):
        kind(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)))(torch.ones(0, 6), torch.ones(0, dtype=torch.long))


@pytest.mark.parametrize("kind", [kind for kind in RULES if kind is not CreditRule and not issubclass(kind, WrappedRule)])
def test_a_model_within_a_wrapper_for_several_processes_is_refused(kind: type[CreditRule]) -> None:
    """Its reducer would wait for gradients that do not pass the wrapper's forward, and ranks would drift apart."""
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    with pytest.raises(UnsupportedModelError, match=r"wrapped in DataParallel.*DistributedDataParallel\(rule\)"):
        kind(nn.DataParallel(model))


LEARNS_APART = [
    *(apical.DeepFeedbackControl, apical.StrongDeepFeedbackControl, apical.DifferenceTargetPropagation),
    *(apical.CounterCurrentLearning, apical.LocalClassifiers, apical.CorInfoMax),
]


def by_an_optimiser(rule: CreditRule, parameters: list[nn.Parameter]) -> Callable[[Tensor], None]:
    optimizer = torch.optim.SGD(parameters, lr=0.01)

    def step(loss: Tensor) -> None:
        rule.zero_grad()  # of all
        loss.backward()
        optimizer.step()

    return step


def accumulated(rule: CreditRule, parameters: list[nn.Parameter]) -> Callable[[Tensor], None]:
    optimizer = torch.optim.SGD(parameters, lr=0.01)

    def step(loss: Tensor) -> None:
        loss.backward()
        rule(torch.rand(8, 6), torch.arange(8) % 3).backward()  # moves nothing
        optimizer.step()
        optimizer.zero_grad()

    return step


def by_hand(rule: CreditRule, parameters: list[nn.Parameter]) -> Callable[[Tensor], None]:
    def step(loss: Tensor) -> None:
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.data -= 0.01 * gradient

    return step


PLASTIC = partial(apical.KolenPollack, form="explicit")  # refuses an optimiser without its feedback
LOOPS = [*((kind, loop) for kind in LEARNS_APART for loop in (by_an_optimiser, accumulated, by_hand)), (PLASTIC, by_hand)]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("kind", "loop"), LOOPS)
def test_own_parameters_that_no_loop_moves_are_named_once(kind: Any, loop: Any, own: bool) -> None:
    torch.manual_seed(0)
    rule = kind(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)))
    step = loop(rule, [p for p in (rule if own else rule.model).parameters() if p.requires_grad])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(8):
            step(rule(torch.rand(8, 6), torch.arange(8) % 3).loss)
    assert sum("train all of rule.parameters()" in str(warning.message) for warning in caught) == (0 if own else 1)


@pytest.mark.parametrize("kind", [apical.DeepFeedbackControl, apical.DifferenceTargetPropagation])
def test_feedback_that_learns_in_passes_of_its_own_may_rest(kind: Any) -> None:
    rule = kind(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)))
    rule.phase = "forward"
    step = by_an_optimiser(rule, list(rule.model.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(8):
            step(rule(torch.rand(8, 6), torch.arange(8) % 3).loss)
