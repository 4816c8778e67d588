"""`credit.loss` is the one root of every rule's whole update: whatever a trainer does with a loss, it does to the update."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_conformance import BRIEF, OF_CLASSES, PATHS, RULES, SKIPPED, class_of
from torch import Tensor, nn

import apical
from apical.core.credit import Credit, CreditRule
from apical.errors import ApicalError, ConfigError
from apical.testing import Factory, dense_network, settings

OUTPUT_CARRIES = (apical.Backprop, apical.core.edge.EdgeRule)
SETTLES = (apical.CorInfoMax, apical.EquilibriumPropagation)


def make(name: str, loss: Any = F.cross_entropy, network: Callable[[], nn.Module] = dense_network) -> CreditRule:
    torch.manual_seed(0)
    return RULES[name](network(), loss)


def batch(seed: int = 0, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(size, 6, dtype=torch.double, generator=generator)
    return inputs, torch.randint(0, 4, (size,), generator=generator)


def credit_of(rule: CreditRule, *given: Tensor) -> Credit:
    """The rule's credit, whatever it draws drawn again."""
    torch.manual_seed(1)
    credit: Credit = rule(*(given or batch()))
    return credit


def gradients(rule: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in rule.named_parameters() if p.grad is not None}


def same(a: dict[str, Tensor], b: dict[str, Tensor], factor: float = 1.0, tolerance: float = 1e-12) -> None:
    assert a.keys() == b.keys()
    for name, value in b.items():
        gap = float((a[name] - factor * value).abs().sum())
        assert gap <= tolerance * max(1.0, abs(factor) * float(value.abs().sum())), (name, gap)


def check_scaled_loss(factory: Factory) -> None:
    """`(s * credit.loss).backward()` gives s times the update that `credit.backward()` gives, on every network."""
    for network, some in settings(factory):
        results = []
        for scale in (None, 0.37, -1000.0):
            torch.manual_seed(0)
            rule = factory(network(), F.cross_entropy)
            torch.manual_seed(1)
            credit = rule(*some(0))
            if scale is None:
                credit.backward()
            else:
                (scale * credit.loss).backward()
            results.append((scale or 1.0, gradients(rule)))
        (_, whole), *scaled = results
        for scale, found in scaled:
            if found.keys() != whole.keys():
                raise AssertionError(f"credit.loss does not reach {sorted(found.keys() ^ whole.keys())}")
            for name, gradient in found.items():
                gap = float((gradient - scale * whole[name]).abs().sum())
                if not gap <= 1e-12 * abs(scale) * max(1.0, float(whole[name].abs().sum())):
                    raise AssertionError(f"the loss times {scale} changes the gradient of {name!r} by {gap:.3g} too much")


@pytest.mark.parametrize("name", RULES)
def test_a_scaled_loss_scales_the_whole_update(name: str) -> None:
    check_scaled_loss(RULES[name])


@pytest.mark.parametrize("name", PATHS)
def test_a_term_beside_the_loss_adds_its_own_gradient(name: str) -> None:
    """`credit.loss + penalty`, and a weight on the loss that is learned itself."""
    alone, both = make(name), make(name)
    credit_of(alone).backward()
    weight = torch.tensor(3.0, dtype=torch.double, requires_grad=True)
    credit = credit_of(both)
    first = next(both.model.parameters())
    (weight * credit.loss + first.square().sum()).backward()
    expected = {key: 3 * value for key, value in gradients(alone).items()}
    own = next(key for key, p in both.named_parameters() if p is first)
    expected[own] = expected.get(own, torch.zeros_like(first)) + 2 * first.detach()
    same(gradients(both), expected)
    assert weight.grad == credit.loss.detach()


@pytest.mark.parametrize("name", OF_CLASSES)
def test_the_loss_behaves_as_a_scalar(name: str) -> None:
    credit = credit_of(make(name))
    assert credit.loss is credit.loss
    assert credit.loss.shape == ()
    assert credit.loss.requires_grad
    assert not credit.loss.detach().requires_grad
    assert credit.loss.item() == pytest.approx(float(F.cross_entropy(credit.output, batch()[1])), rel=1e-14)


@pytest.mark.parametrize("way", ["backward", "loss"])
@pytest.mark.parametrize("name", PATHS)
def test_a_second_backward_pass_is_refused_or_doubles(name: str, way: str) -> None:
    rule, once = make(name), make(name)
    credits = credit_of(once), credit_of(rule)
    torch.manual_seed(2)  # batchwise sign symmetry draws in the backward pass
    credits[0].backward()
    back = credits[1].backward if way == "backward" else credits[1].loss.backward
    torch.manual_seed(2)
    back(retain_graph=True)
    torch.manual_seed(2)
    back()
    same(gradients(rule), gradients(once), 2.0)
    with pytest.raises(RuntimeError, match="a second time"):
        back()


@pytest.mark.parametrize("name", [name for name in OF_CLASSES if name != "bp"])
def test_second_derivatives_of_what_is_no_derivative_are_refused(name: str) -> None:
    rule = make(name)
    with pytest.raises(ConfigError, match="create_graph=True"), warnings.catch_warnings(action="ignore"):
        credit_of(rule).loss.backward(create_graph=True)


@pytest.mark.parametrize("name", OF_CLASSES)
def test_what_made_the_inputs_gets_an_error_or_a_refusal(name: str) -> None:
    """An encoder before the model would stay as it is, in silence."""
    inputs, targets = batch()
    rule, encoder = make(name), nn.Linear(6, 6).double()
    rule(encoder(inputs).clamp(0, 1).detach(), targets).backward()
    try:
        rule.restart()
        rule(encoder(inputs).clamp(0, 1), targets).backward()
        assert encoder.weight.grad is not None
    except ApicalError as error:
        assert "first_layer=True" in str(error) or "inputs.detach()" in str(error)  # noqa: PT017


@pytest.mark.parametrize("name", OF_CLASSES)
def test_nothing_to_learn_is_an_error(name: str) -> None:
    rule = make(name).requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing learns"):
        rule(*batch()).backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", OF_CLASSES)
def test_validation_without_gradients(name: str, mode: Callable[[], Any]) -> None:
    rule, other = make(name), make(name)
    inputs, targets = batch()
    expected = credit_of(other)
    with mode():
        credit = credit_of(rule, inputs, targets)
        loss, output = credit.loss, credit.output
    assert not loss.requires_grad
    assert not output.requires_grad
    torch.testing.assert_close(output, expected.output.detach(), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(loss, expected.loss.detach(), rtol=1e-14, atol=1e-14)
    credit_of(rule).backward()  # and training goes on
    assert gradients(rule)


@pytest.mark.parametrize("name", OF_CLASSES)
def test_a_look_without_gradients_leaves_the_loss_its_graph(name: str) -> None:
    credit = credit_of(make(name))
    with torch.no_grad():
        assert credit.loss.isfinite()
        assert credit.output.isfinite().all()
    credit.loss.backward()


STATEFUL = {
    "sibp": "its step solves for the batch as one",
    "wm": "it learns its feedback from noise in every call",
    **dict.fromkeys(("corinfomax", "corinfomax-sparse"), "it follows correlations"),
    **dict.fromkeys(("local-sim", "local-both"), "it compares the samples of a batch with each other"),
}


@pytest.mark.parametrize("name", [name for name in PATHS if (name, "batch_mean") not in SKIPPED and name not in STATEFUL])
def test_four_micro_batches_are_one_batch(name: str) -> None:
    whole, parts = make(name), make(name)
    if whole.random_per_sample:
        pytest.skip("every sample has random numbers of its own, so a batch in parts is another draw")
    inputs, targets = batch(size=16)
    credit_of(whole, inputs, targets).backward()
    for k in range(4):
        parts.restart()
        (credit_of(parts, inputs[4 * k : 4 * k + 4], targets[4 * k : 4 * k + 4]).loss / 4).backward()
    same(gradients(parts), gradients(whole))


def train(rule: CreditRule, step: Callable[[torch.optim.Optimizer, Callable[[], Tensor]], None]) -> None:
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = credit_of(rule, *batch(closure.calls // rule.repeats)).loss
        closure.calls += 1
        return loss

    closure.calls = 0
    for _ in range(4 * rule.repeats):
        step(optimizer, closure)


def by_hand(optimizer: torch.optim.Optimizer, closure: Callable[[], Tensor]) -> None:
    closure().backward()
    optimizer.step()


def with_closure(optimizer: torch.optim.Optimizer, closure: Callable[[], Tensor]) -> None:
    def evaluated() -> Tensor:
        loss = closure()
        loss.backward()
        return loss

    assert optimizer.step(evaluated).requires_grad


def with_scaler(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, closure: Callable[[], Tensor]) -> None:
    scaler.scale(closure()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("name", OF_CLASSES)
def test_closures_and_gradient_scaling_are_the_plain_loop(name: str) -> None:
    results = []
    for step in (
        by_hand,
        with_closure,
        partial(with_scaler, torch.amp.GradScaler(device="cpu", init_scale=2.0**10)),
    ):
        rule = make(name)
        train(rule, step)
        results.append({key: p.detach().clone() for key, p in rule.model.named_parameters()} | rule.feedback_weights())
    plain, *others = results
    for other in others:
        same(other, plain)


@pytest.mark.parametrize("name", OF_CLASSES)
def test_lbfgs(name: str) -> None:
    """The loss goes down, or at least the search ends with finite weights, under an optimiser that needs closures."""
    rule = make(name)
    optimizer = torch.optim.LBFGS(rule.parameters(), lr=0.1, max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = credit_of(rule).loss
        loss.backward()
        return loss

    before = [p.detach().clone() for p in rule.model.parameters()]
    assert float(optimizer.step(closure)) > 0
    assert all(p.isfinite().all() for p in rule.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, rule.model.parameters(), strict=True))


@pytest.mark.parametrize("name", PATHS)
def test_a_loss_made_of_the_output_is_the_rules_or_refused(name: str) -> None:
    rule, whole = make(name), make(name)
    credit = credit_of(rule)
    own = F.cross_entropy(credit.output, batch()[1])
    if isinstance(rule, OUTPUT_CARRIES):
        own.backward()
        credit_of(whole).backward()
        same({k: v for k, v in gradients(rule).items() if k.startswith("model.")}, model_gradients(whole))
    else:
        with pytest.raises(ConfigError, match="add the term to the loss"):
            own.backward()
        with pytest.raises(ConfigError, match="add the term to the loss"):
            (credit_of(rule).loss + 0.1 * credit_of(rule).output.square().mean()).backward()


def model_gradients(rule: CreditRule) -> dict[str, Tensor]:
    return {name: value for name, value in gradients(rule).items() if name.startswith("model.")}


class Temperature(nn.Module):
    """Cross-entropy of the output times a learned temperature, and a penalty on a weight."""

    def __init__(self, penalised: Tensor | None = None, strength: float = 0.0) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.tensor(1.5, dtype=torch.double))
        self.penalised, self.strength = [penalised], strength

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(output * self.t, targets)
        penalised = self.penalised[0]
        return loss if penalised is None else loss + self.strength * penalised.square().sum()


def with_real_points(name: str) -> bool:
    """hEP knows the complex form of three losses only, and says so."""
    return not name.startswith("hep")


@pytest.mark.parametrize("name", [path for path in PATHS if with_real_points(path)])
def test_a_learned_temperature_gets_its_exact_gradient(name: str) -> None:
    loss = Temperature()
    rule = make(name, loss)
    credit = credit_of(rule)
    at = loss.t.detach().clone().requires_grad_()
    exact = torch.autograd.grad(F.cross_entropy(credit.output.detach() * at, batch()[1]), at)[0]
    (0.5 * credit.loss).backward()
    torch.testing.assert_close(loss.t.grad, 0.5 * exact, rtol=1e-12, atol=1e-14)
    loss.t.grad = None
    credit_of(rule).backward()
    torch.testing.assert_close(loss.t.grad, credit_gradient(rule, loss), rtol=1e-12, atol=1e-14)


def credit_gradient(rule: CreditRule, loss: Temperature) -> Tensor:
    with torch.no_grad():
        output = credit_of(rule).output
    at = loss.t.detach().clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(output * at, batch()[1]), at)[0]


@pytest.mark.parametrize("index", [0, 4])
@pytest.mark.parametrize("name", [path for path in PATHS if with_real_points(path)])
def test_a_penalty_on_a_weight_adds_its_exact_gradient(name: str, index: int) -> None:
    """The rest of the update is that of the same loss without the penalty."""
    results = []
    for strength in (0.0, 0.3):
        torch.manual_seed(0)
        model = dense_network()
        rule = RULES[name](model, Temperature(model[index].weight, strength))
        credit_of(rule).backward()
        results.append((model[index].weight, gradients(rule)))
    (_, without), (weight, penalised) = results
    key = f"model.{index}.weight"
    without[key] = without.get(key, 0) + 0.6 * weight.detach()
    shared = {k: v for k, v in penalised.items() if "mismatch" not in k and "difference" not in k}
    same(shared, {k: without[k] for k in shared})


def test_a_penalty_is_not_scaled_with_the_height_of_matched_images() -> None:
    """The pairs' form "match" scales the error at the output by the height of the images; a penalty is nobody's error."""
    results = []
    for strength in (0.0, 0.3):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ELU(), nn.Conv2d(2, 1, 3, padding=1)).double()
        weight = model[2].weight

        def loss(output: Tensor, targets: Tensor, weight: Tensor = weight, strength: float = strength) -> Tensor:
            return F.mse_loss(output, targets) + strength * weight.square().sum()

        rule = apical.CounterCurrentLearning(model, loss, pair="match", input_shape=(1, 4, 4))
        images = torch.randn(3, 1, 4, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0))
        rule(images, images).backward()
        results.append((weight.grad.clone(), weight.detach()))
    (without, weight), (penalised, _) = results
    torch.testing.assert_close(penalised, without + 0.6 * weight, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["dfa", "tdca", "dtp-drl", "ep-one-sided", "ccl"])
def test_terms_under_compile(name: str) -> None:
    """The backward pass is traced once: those of the rules are in their conformance."""
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = dense_network()
        loss = Temperature(model[2].weight, 0.3)
        rule = partial(RULES[name], **BRIEF.get(class_of(name), {}))(model, loss)
        credit_of(rule)
        call = torch.compile(rule, backend="aot_eager" if name == "dfa" else "eager", fullgraph=True) if compiled else rule
        torch.manual_seed(1)
        (2 * call(*batch()).loss).backward()
        results.append(gradients(rule))
    same(*results)
    assert "loss.t" in results[0]
