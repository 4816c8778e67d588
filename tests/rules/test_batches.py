"""What rules that compute with targets themselves make of odd batches, dtypes and moved models: right, or one clear line."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical import CreditRule
from apical.core.batch import fitted, require_classes
from apical.core.losses import squared_error
from apical.errors import ConfigError, UnsupportedModelError
from apical.testing import CHECKS, dense_network

Factory = Callable[..., CreditRule]


def dfc(variant: str, **options: object) -> Factory:
    return lambda model, **more: apical.DeepFeedbackControl(model, variant=variant, learn="none", **options, **more)


def target_propagation(variant: str) -> Factory:
    return lambda model, **more: apical.DifferenceTargetPropagation(model, variant=variant, learn=False, **more)


CHAINS: dict[str, Factory] = {
    "dfc": dfc("dfc"),
    "dfc, simulated": dfc("dfc", solver="simulate", points=40, dt=0.1, tau=0.3),
    "dfc-ss": dfc("ss"),
    "dfc-ssa": dfc("ssa"),
    "strong": lambda model, **more: apical.StrongDeepFeedbackControl(model, learn="none", **more),
    **{variant: target_propagation(variant) for variant in ("dtp", "drl", "linear", "hidden", "control", "lee")},
}
SETTLING: dict[str, Factory] = {
    "ep": apical.EquilibriumPropagation,
    "ep, directed": lambda model, **more: apical.EquilibriumPropagation(model, weights="directed", **more),
    "hep": lambda model, **more: apical.EquilibriumPropagation(model, estimator="holomorphic", **more),
    "corinfomax": lambda model, **more: apical.CorInfoMax(model, nudge="one-sided", **more),
}
PAIRED: dict[str, Factory] = {
    "ccl": apical.CounterCurrentLearning,
    "ccl, mask": lambda model, **more: apical.CounterCurrentLearning(model, mask=True, **more),
    "ccl, cosine": lambda model, **more: apical.CounterCurrentLearning(model, pair="cosine", spread=0.5, **more),
}
ALL = CHAINS | SETTLING | PAIRED


def model(name: str, outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    activation = nn.ReLU if name == "corinfomax" else nn.Sigmoid
    return nn.Sequential(nn.Linear(5, 6), activation(), nn.Linear(6, 4), activation(), nn.Linear(4, outputs)).double()


def batch(size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(size, 5, dtype=torch.double, generator=generator), torch.arange(size) % 3


def gradients(rule: CreditRule, inputs: Tensor, targets: Tensor) -> list[Tensor]:
    rule.eval()  # where lateral weights follow every batch of training
    rule.zero_grad()
    rule(inputs, targets).backward()
    return [p.grad.clone() for p in rule.model.parameters()]


@pytest.mark.parametrize("name", ALL)
def test_an_empty_batch_is_one_clear_error(name: str) -> None:
    rule = ALL[name](model(name))
    inputs, targets = batch()
    with pytest.raises(ConfigError, match="the batch is empty"):
        rule(inputs[:0], targets[:0])


@pytest.mark.parametrize("name", ALL)
def test_a_target_for_each_sample(name: str) -> None:
    rule = ALL[name](model(name))
    inputs, targets = batch()
    for wrong in (targets[:4], torch.tensor(1)):
        with pytest.raises(ConfigError, match="6 inputs came with targets of shape"):
            rule(inputs, wrong)


@pytest.mark.parametrize("name", CHAINS)
def test_samples_that_the_loss_ignores_have_no_part_in_the_update(name: str) -> None:
    rule = CHAINS[name](model(name))
    inputs, targets = batch()
    keep = torch.tensor([0, 1, 3, 5])
    some = torch.full_like(targets, -100).index_copy(0, keep, targets[keep])
    credit = rule(inputs, some)
    assert credit.output.shape == (6, 3)
    assert abs(credit.loss - rule(inputs[keep], targets[keep]).loss) < 1e-14
    for whole, part in zip(gradients(rule, inputs, some), gradients(rule, inputs[keep], targets[keep]), strict=True):
        assert part.abs().max() > 1e-8
        assert (whole - part).abs().max() < 1e-11 * part.abs().max()
    with pytest.raises(ConfigError, match="ignores every sample"):
        rule(inputs, torch.full_like(targets, -100))


@pytest.mark.parametrize("name", SETTLING | PAIRED)
def test_a_label_that_is_no_class_is_named(name: str) -> None:
    rule = ALL[name](model(name))
    inputs, targets = batch()
    for label, words in ((-100, "label -100, but every sample needs a class.*ignore_index"), (3, "label 3.*3 outputs")):
        targets[2] = label
        with pytest.raises(ConfigError, match=words):
            rule(inputs, targets)


@pytest.mark.parametrize("name", CHAINS | SETTLING)
def test_numbers_without_the_dimension_of_one_output_are_numbers_with_it(name: str) -> None:
    inputs, _ = batch()
    numbers = torch.rand(6, dtype=torch.double)
    for loss in (F.mse_loss, squared_error, nn.MSELoss()):
        if name == "hep" and isinstance(loss, nn.Module):
            continue
        rule = ALL[name](model(name, 1), loss=loss)
        flat = gradients(rule, inputs, numbers)
        for one, two in zip(flat, gradients(rule, inputs, numbers.unsqueeze(1)), strict=True):
            assert torch.equal(one, two)
        assert any(each.abs().max() > 1e-8 for each in flat)
        with pytest.raises(ConfigError, match=r"targets of shape \(6, 2\) do not fit outputs of shape \(6, 1\)"):
            rule(inputs, torch.rand(6, 2, dtype=torch.double))


def test_a_loss_of_ones_own_gets_its_targets_as_they_are() -> None:
    seen = []

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        seen.append(targets.dim())
        return (output.squeeze(1) - targets).square().mean()

    apical.DeepFeedbackControl(model("dfc", 1), loss, learn="none")(batch()[0], torch.rand(6).double())
    assert set(seen) == {1}


def test_labels_for_a_loss_of_numbers_are_refused() -> None:
    labels = torch.tensor([0, 1])
    with pytest.raises(ConfigError, match="mse_loss compares numbers, not class labels"):
        fitted(F.mse_loss, torch.zeros(2, 2), labels)
    assert fitted(squared_error, torch.zeros(2, 2), labels) is labels
    assert fitted(F.cross_entropy, torch.zeros(2, 2), labels) is labels
    require_classes(labels, 2)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CHAINS | SETTLING)
def test_half_precision_is_refused_whenever_it_comes(name: str, kind: torch.dtype) -> None:
    words = f"learns from small differences.*{str(kind).removeprefix('torch.')} rounds away"
    with pytest.raises(UnsupportedModelError, match=words):
        ALL[name](model(name).to(kind))
    rule = ALL[name](model(name))
    rule.to(kind)
    inputs, targets = batch()
    with pytest.raises(UnsupportedModelError, match=words):
        rule(inputs.to(kind), targets)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"orthogonal": True}, {"mask": True, "input_pair": True}])
def test_counter_current_learning_works_in_half_precision(options: dict[str, bool], kind: torch.dtype) -> None:
    inputs, targets = batch()
    rules = []
    for dtype in (torch.float32, kind):
        torch.manual_seed(3)
        rules.append(apical.CounterCurrentLearning(model("ccl").float().to(dtype), **options).to(dtype))
    rules[1].load_state_dict(rules[0].state_dict())
    rules[0].load_state_dict(rules[1].state_dict())  # rounded
    full = gradients(rules[0], inputs.float(), targets)
    half = gradients(rules[1], inputs.to(kind), targets)
    for one, two in zip(full, half, strict=True):
        assert two.dtype == kind
        assert (one - two.float()).norm() < 0.1 * one.norm()


@pytest.mark.parametrize("name", [each for each in ALL if each not in ("ep", "hep")])
def test_a_model_moved_without_its_rule_is_told_from_one_moved_with_it(name: str) -> None:
    inputs, targets = batch()
    rule = ALL[name](model(name).float())
    rule.model.double()
    with pytest.raises(ConfigError, match=r"the model is torch.float64 on cpu, but .* is torch.float32.*rule.to"):
        rule(inputs, targets)
    rule.double()
    found = gradients(rule, inputs, targets)
    made = ALL[name](rule.model)
    made.load_state_dict(rule.state_dict())
    for one, two in zip(found, gradients(made, inputs, targets), strict=True):
        assert one.dtype == torch.double
        assert (one - two).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["ep", "hep"])
def test_symmetric_weights_may_move_alone(name: str) -> None:
    rule = ALL[name](model(name).float())
    rule.model.double()
    assert all(grad.dtype == torch.double for grad in gradients(rule, *batch()))


SIZED: dict[str, Factory] = {
    "local-pred": apical.LocalClassifiers,
    "local-sim": lambda model, **more: apical.LocalClassifiers(model, local="similarity", **more),
    "local-both": lambda model, **more: apical.LocalClassifiers(model, local="both", **more),
    "mono-forward": lambda model, **more: apical.LocalClassifiers(model, local="projection", **more),
    "ff": apical.ForwardForward,
    "scff": lambda model, **more: apical.ForwardForward(model, negatives="images", goodness="sum", **more),
    "ccl": apical.CounterCurrentLearning,
    "ccl, free": lambda model, **more: apical.CounterCurrentLearning(model, feedback="free", **more),
}
"""Rules of blocks whose read-outs, thresholds or codes are for activities of one size."""


@pytest.mark.parametrize(("size", "samples"), [(11, 4), (16, 1)])
@pytest.mark.parametrize("name", SIZED)
def test_images_of_another_size_are_refused_where_the_size_of_activities_matters(name: str, size: int, samples: int) -> None:
    """Though the model itself takes them: its last pooling adapts. One of 16 x 16 is no four of 8 x 8."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    rule = SIZED[name](nn.Sequential(*layers, nn.Flatten(), nn.Linear(3, 3)), input_shape=(1, 8, 8))
    targets = torch.arange(4) % 3
    rule(torch.rand(4, 1, 8, 8), targets).backward()
    with pytest.raises(
        UnsupportedModelError, match=rf"layer '0' gave \(4, {size}, {size}\) per sample.*pass the input_shape"
    ):
        rule(torch.rand(samples, 1, size, size), targets[:samples])


NOISY: dict[str, Factory] = {
    "ep": lambda model, noise: apical.EquilibriumPropagation(model, free_steps=5, nudged_steps=3, noise=noise),
    "strong-dfc": lambda model, noise: apical.StrongDeepFeedbackControl(
        model, solver="simulate", points=12, sigma=noise, learn="expected" if noise else "none"
    ),
}
"""Rules whose dynamics are noisy, whatever their feedback learns from."""


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize("name", NOISY)
def test_noise_in_the_dynamics_is_declared(name: str, noise: float) -> None:
    """So the conformance suite does not ask of a noisy rule that a batch twice over gives what the batch gives."""
    rule = NOISY[name](dense_network(), noise=noise)
    assert rule.random_per_sample is (noise > 0)
    CHECKS["batch_mean"](lambda model, loss: NOISY[name](model, noise=noise))
