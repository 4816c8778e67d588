"""The small programs of public bug reports and of the authors' comparison (r1 to r8, c1 to c6): what is right, in short.

Each runs under a rule's default form and settings. Covered with more siblings elsewhere:

- r1: core/test_weight_functions.py, test_feedback_alignment_is_not_backpropagation_and_with_the_forward_weights_it_is
- r2, r5: core/test_separation.py, test_with_all_feedback_zero_the_last_unit_alone_learns, test_any_number_of_steps
- r3: rules/test_one_root.py, test_a_scaled_loss_scales_the_whole_update
- r4, r4b: core/test_checkpointing.py, test_gradients_with_checkpoints_are_those_without
- r6: rules/test_distributed_options.py, test_ranks_are_equal_and_equal_one_process (two processes; not repeated here)
- r7: rules/test_plastic_feedback.py, test_layers_with_a_function_of_their_weight_learn_feedback_by_the_literal_rule
- r8: rules/test_one_root.py, test_a_learned_temperature_gets_its_exact_gradient,
  test_a_penalty_on_a_weight_adds_its_exact_gradient
- c1, c2, c3: rules/test_plastic_feedback.py, test_a_frozen_layer_keeps_its_own_feedback,
  test_weights_that_move_from_outside_leave_the_feedback_where_it_is, test_clipping_keeps_the_feedback_explicit_and_says_so
- c4: rules/test_ccl.py, test_a_masked_sample_is_absent_from_every_pair
- c5: rules/test_holomorphic_pooling.py, test_pooling_settles_by_the_complex_energy
- c6: rules/test_steady_states.py, test_every_sample_is_at_rest_or_is_counted_in_a_warning
"""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, prune, weight_norm
from torch.utils.checkpoint import checkpoint

import apical
from apical.core.sigmoids import ShiftedSigmoid
from apical.errors import UnsupportedModelError

PLASTIC = [apical.KolenPollack, apical.ProductFeedbackAlignment]
Rule = type[apical.CreditRule]


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.double)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 4


def net(middle: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), middle or nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=0, atol=1e-12) for name in a)


class Half(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 0.5 * self.weight, self.bias)


@pytest.mark.parametrize("compiled", [False, True])
def test_r1_a_function_of_the_weight_is_feedback_alignment_and_not_backpropagation(compiled: bool) -> None:
    """The error at the first layer is that of the equations."""
    x, y = batch()
    model = nn.Sequential(Half(6, 8), nn.ReLU(), Half(8, 4))
    rule = apical.FeedbackAlignment(model)
    call: Any = torch.compile(rule, backend="aot_eager") if compiled else rule
    own = gradients(model, call(x, y).loss)
    error = (model(x).softmax(1) - F.one_hot(y, 4)) / 16
    expected = 0.5 * ((error @ rule.feedback_weight("2")) * (model[0](x) > 0)).T @ x
    torch.testing.assert_close(own["0.weight"], expected, rtol=0, atol=1e-12)
    assert not torch.allclose(own["0.weight"], gradients(model, F.cross_entropy(model(x), y))["0.weight"], atol=1e-3)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def learning_without_feedback(rule: apical.CreditRule, x: Tensor, y: Tensor) -> set[str]:
    for matrix in rule.feedback.buffers():
        matrix.zero_()
    return {name for name, grad in gradients(rule.model, rule(x, y).loss).items() if grad.any()}


def test_r2_no_exact_error_goes_round_a_cut() -> None:
    x, y = batch()
    rule = apical.DirectFeedbackAlignment(nn.Sequential(nn.Linear(6, 8), Residual(), Residual(), nn.Linear(8, 4)))
    whole = gradients(rule.model, rule(x, y).loss)
    assert whole.keys() == dict(rule.model.named_parameters()).keys()
    assert learning_without_feedback(rule, x, y) == {"3.weight", "3.bias"}


@pytest.mark.parametrize(
    "kind", [apical.CounterCurrentLearning, apical.ProductFeedbackAlignment, apical.DirectFeedbackAlignment]
)
def test_r3_a_scaled_loss_trains_the_whole_rule(kind: Rule) -> None:
    """Without momentum and decay, half the loss at twice the learning rate is the plain loop."""
    states = []
    for scale in (1.0, 0.5):
        rule = kind(net())
        optimizer = torch.optim.SGD(rule.parameters(), lr=0.1 / scale)
        for _ in range(10):
            optimizer.zero_grad()
            (rule(*batch()).loss * scale).backward()
            optimizer.step()
        states.append({name: value.clone() for name, value in rule.model.named_parameters()})
    assert close(*states)
    start = dict(net().named_parameters())
    assert not any(torch.equal(value, start[name]) for name, value in states[1].items())


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.reentrant: bool | None = None
        self.stem, self.body, self.head = nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.head(self.body(h) if self.reentrant is None else checkpoint(self.body, h, use_reentrant=self.reentrant))


@pytest.mark.parametrize("kind", [apical.FeedbackAlignment, apical.DirectFeedbackAlignment])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_r4_checkpoints_change_nothing_or_are_refused(kind: Rule) -> None:
    model = Checkpointed()
    rule = kind(model)
    plain = gradients(model, rule(*batch()).loss)
    model.reentrant = False
    assert close(gradients(model, rule(*batch()).loss), plain)
    model.reentrant = True
    with pytest.raises(UnsupportedModelError, match="use_reentrant=False"):
        rule(*batch()).loss.backward()
    model.reentrant = None
    assert close(gradients(model, rule(*batch()).loss), plain)


def test_r4b_a_checkpointed_block_with_its_own_weights_as_feedback_is_backpropagation() -> None:
    model = Checkpointed()
    model.reentrant = False
    rule = apical.FeedbackAlignment(model)
    for name in ("body.0", "head"):
        rule.set_feedback(name, B=model.get_submodule(name).weight.detach())
    exact = gradients(model, F.cross_entropy(model(batch()[0]), batch()[1]))
    assert close(gradients(model, rule(*batch()).loss), exact)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ih, self.hh, self.out, self.tanh = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 8)
        for t in range(x.shape[1]):
            h = self.tanh(self.ih(x[:, t]) + self.hh(h))
        return self.out(h)


@pytest.mark.parametrize("steps", [3, 6])
def test_r5_another_number_of_steps_than_at_first(steps: int) -> None:
    rule, y = apical.DirectFeedbackAlignment(Recurrent()), batch()[1]
    rule(torch.randn(16, 4, 6), y)
    x = torch.randn(16, steps, 6)
    assert all(grad.any() for grad in gradients(rule.model, rule(x, y).loss).values())
    assert learning_without_feedback(rule, x, y) == {"out.weight", "out.bias"}


@pytest.mark.parametrize("kind", PLASTIC)
@pytest.mark.parametrize(
    "change", [lambda layer: prune.l1_unstructured(layer, "weight", 0.5), weight_norm], ids=["prune", "norm"]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_r7_feedback_learns_at_a_layer_whose_weight_is_computed(kind: Rule, change: Any) -> None:
    rule = kind(net(change(nn.Linear(8, 8))))
    rule(*batch()).backward()
    own = {name: p.grad for name, p in rule.named_parameters() if not name.startswith("model")}
    assert own
    assert all(grad is not None and grad.any() for grad in own.values())


class Temperature(nn.Module):
    """A learned temperature, and a penalty on a weight."""

    def __init__(self, layer: nn.Linear, strength: float) -> None:
        super().__init__()
        self.t, self.layer, self.strength = nn.Parameter(torch.tensor(1.5)), [layer], strength

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output * self.t, targets) + self.strength * self.layer[0].weight.square().sum()


@pytest.mark.parametrize("kind", [apical.FeedbackAlignment, apical.DirectFeedbackAlignment])
def test_r8_terms_in_the_loss_are_in_the_update(kind: Rule) -> None:
    x, y = batch()
    updates = []
    for strength in (0.0, 0.3):
        model = net()
        loss = Temperature(model[0], strength)
        rule = kind(model, loss)
        assert any(p is loss.t for p in rule.parameters())
        updates.append(gradients(rule, rule(x, y).loss))
        exact = torch.autograd.grad(F.cross_entropy(model(x).detach() * loss.t, y), loss.t)[0]
        torch.testing.assert_close(loss.t.grad, exact, rtol=0, atol=1e-12)
    updates[0]["model.0.weight"] += 0.6 * model[0].weight.detach()
    assert close(*updates)


def trained(kind: Rule, form: str, loop: Any) -> tuple[Any, Tensor]:
    model = net()
    torch.manual_seed(3)
    rule: Any = kind(model, form=form)
    loop(rule)
    return rule, rule.feedback_weight("2")


def loop(rule: Any, shape: Any = None) -> None:
    optimizer = torch.optim.SGD([p for p in rule.parameters() if p.requires_grad], lr=0.1, momentum=0.9, weight_decay=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        rule(*batch()).backward()
        if shape:
            shape(rule)
        optimizer.step()


def frozen(rule: Any) -> None:
    rule.model[2].requires_grad_(False)
    loop(rule)


def loaded(rule: Any) -> None:
    loop(rule)
    generator = torch.Generator().manual_seed(9)
    state = rule.model[2].state_dict()
    rule.model[2].load_state_dict({name: torch.randn(v.shape, generator=generator) for name, v in state.items()})


def pruned(rule: Any) -> None:
    loop(rule)
    with torch.no_grad():
        rule.model[2].weight.mul_(rule.model[2].weight.abs() > 0.1)
    loop(rule)


@pytest.mark.parametrize("kind", PLASTIC)
@pytest.mark.parametrize(
    "how",
    [
        frozen,
        loaded,
        pruned,
        lambda rule: loop(rule, lambda r: clip_grad_norm_(r.parameters(), 0.1)),
        lambda rule: loop(rule, lambda r: clip_grad_norm_(r.model.parameters(), 0.1)),
        lambda rule: loop(rule, lambda r: clip_grad_value_(r.parameters(), 0.01)),
    ],
    ids=["c1 frozen", "c2 loaded", "c2 pruned", "c3 norm", "c3 norm of the model", "c3 value"],
)
def test_c1_c2_c3_the_default_form_is_the_explicit_form(kind: Rule, how: Any) -> None:
    (rule, own), (literal, expected) = trained(kind, "auto", how), trained(kind, "explicit", how)
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-10)
    assert close(dict(rule.model.named_parameters()), dict(literal.model.named_parameters()))
    weight = rule.model[2].weight
    if how in (frozen, loaded):
        assert abs(F.cosine_similarity(own.flatten(), weight.flatten(), dim=0)) < 0.5


def test_c4_masked_samples_leave_the_input_pair_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ELU(), nn.Linear(6, 3, bias=False))
    x = torch.randn(8, 4)
    with torch.no_grad():
        model[2].weight.mul_(1000)
        assert (model(x).softmax(1).amax(1) > 0.9).all()
    rule = apical.CounterCurrentLearning(model, mask=True, input_pair=True)
    rule(x, model(x).argmax(1)).backward()
    assert not any(p.grad.any() for part in rule.feedback for p in part.parameters())


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_c5_average_pooling_under_complex_nudges(dtype: torch.dtype) -> None:
    parts = [nn.Conv2d(1, 3, 3, padding=1), nn.AvgPool2d(2), ShiftedSigmoid()]
    parts += [nn.Conv2d(3, 3, 3, padding=1), ShiftedSigmoid(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4)]
    model = nn.Sequential(*parts).to(dtype)
    rule = apical.EquilibriumPropagation(model, estimator="holomorphic", points=6, beta=0.2, input_shape=(1, 8, 8))
    rule(torch.rand(4, 1, 8, 8, dtype=dtype), torch.arange(4)).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("newton", [None, 20])
def test_c6_a_steady_state_that_was_not_reached_is_said(newton: int | None) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(13, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 6))
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.mul_(4)
    inputs, targets = torch.randn(16, 13), torch.randint(6, (16,))
    options: dict[str, Any] = {} if newton is None else {"newton": newton}
    rule = apical.DeepFeedbackControl(model, variant="ss", learn="none", feedback="random", **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        credit = rule(inputs, targets)
    credit.backward()
    assert credit.logs["residual"] < 0.2
    assert any("no steady state was found" in str(each.message) and "residual" in str(each.message) for each in caught)
    assert all(p.grad.norm() < 100 for p in model.parameters())
