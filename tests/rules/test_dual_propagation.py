"""Dual propagation against its two compartments, kept apart and updated one layer at a time, and its exact identities."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from apical import DualPropagation
from apical.core.losses import squared_error
from apical.core.pooling import SoftmaxPool2d
from apical.errors import ConfigError, UnsupportedModelError
from apical.testing import check_model


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.double)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def mlp(activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), activation(), nn.Linear(8, 7), activation(), nn.Linear(7, 4))


def images() -> nn.Sequential:
    """Pooling before and behind the activation, and flattening."""
    torch.manual_seed(3)
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 3, padding=1), nn.MaxPool2d(2), nn.Tanh()),
        *(nn.Conv2d(3, 4, 3, padding=1), nn.Softplus(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(4, 4)),
    )


def smooth_pools() -> nn.Sequential:
    """Pooling that is another map at every input, in both places."""
    torch.manual_seed(3)
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 3, padding=1), SoftmaxPool2d(), nn.Tanh(), SoftmaxPool2d(3), nn.Flatten(), nn.Linear(3, 4)),
    )


NETWORKS = {"mlp": (mlp, (6,)), "images": (images, (2, 6, 6)), "smooth pools": (smooth_pools, (2, 6, 6))}


def batch(name: str, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, *NETWORKS[name][1], generator=generator), torch.arange(size) % 4


def affine_and_activation(model: nn.Sequential) -> list[tuple[nn.Sequential, nn.Module]]:
    """What makes a_l of m_{l-1}, and phi_l."""
    stages: list[tuple[nn.Sequential, nn.Module]] = []
    waiting: list[nn.Module] = []
    for module in model:
        if isinstance(module, nn.Tanh | nn.ReLU | nn.Identity | nn.Softplus):
            stages.append((nn.Sequential(*waiting), module))
            waiting = []
        else:
            waiting.append(module)
    return [*stages, (nn.Sequential(*waiting), nn.Identity())]


def reference(model: nn.Sequential, x: Tensor, targets: Tensor, **options: Any) -> list[Tensor]:
    """Gradients: s+ and s- of every layer, updated in the order L-1..1, (1..L-1, L-1..1) and so on; J by autograd."""
    beta, alpha = options.get("beta", 0.1), options.get("alpha", 0.5)
    original = options.get("variant") == "original"
    up, down = (alpha, 1 - alpha) if original else (1 - alpha, alpha)
    stages = affine_and_activation(model)
    top = len(stages) - 1
    mean: list[Tensor] = [x]
    for affine, phi in stages[:-1]:
        mean.append(phi(affine(mean[-1])).detach())
    plus, minus = [each.clone() for each in mean[1:]], [each.clone() for each in mean[1:]]

    def slope() -> Tensor:
        output = stages[top][0](mean[top]).detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(output, targets, reduction="sum"), output)[0]

    g = slope()

    def delta(k: int) -> Tensor:
        return -beta * g if k == top else plus[k] - minus[k]

    def update(k: int) -> None:
        leaf = mean[k + 1].clone().requires_grad_()
        (d,) = torch.autograd.grad(stages[k + 1][0](leaf), leaf, delta(k + 1))
        a, phi = stages[k][0](mean[k]).detach(), stages[k][1]
        plus[k], minus[k] = phi(a + up * d), phi(a - down * d)
        mean[k + 1] = alpha * plus[k] + (1 - alpha) * minus[k]

    for sweep in range(options.get("sweeps", 1)):
        if sweep:
            for k in range(top):
                update(k)
            g = slope() if original else g
        for k in reversed(range(top)):
            update(k)
    own = sum((delta(k) * stage[0](mean[k])).sum() for k, stage in enumerate(stages))
    return list(torch.autograd.grad(-own / (beta * len(x)), list(model.parameters())))


def gradients(rule: DualPropagation, x: Tensor, targets: Tensor) -> list[Tensor]:
    rule.zero_grad()
    rule(x, targets).backward()
    return [p.grad.clone() for p in rule.model.parameters() if p.grad is not None]


def backprop(model: nn.Module, x: Tensor, targets: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(F.cross_entropy(model(x), targets), list(model.parameters())))


def gap(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Largest relative distance of a parameter's gradients."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


def distance(activation: type[nn.Module] = nn.Tanh, size: int = 16, **options: Any) -> float:
    model, (x, targets) = mlp(activation), batch("mlp", size)
    return gap(gradients(DualPropagation(model, **options), x, targets), backprop(model, x, targets))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("variant", ["transposed", "original"])
@pytest.mark.parametrize(("alpha", "sweeps"), [(0.5, 1), (0.0, 3), (1.0, 2), (0.3, 3)])
def test_compartments_one_layer_at_a_time(name: str, variant: Any, alpha: float, sweeps: int) -> None:
    model, (x, targets) = NETWORKS[name][0](), batch(name)
    options: dict[str, Any] = {"variant": variant, "alpha": alpha, "sweeps": sweeps, "beta": 0.7}
    rule = DualPropagation(model, input_shape=NETWORKS[name][1], **options)
    assert gap(gradients(rule, x, targets), reference(model, x, targets, **options)) < 1e-12


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("beta", [1.0, 0.01])
@pytest.mark.parametrize("sweeps", [1, 3, 30])
def test_linear_units_are_backprop_whatever_the_nudge(alpha: float, beta: float, sweeps: int) -> None:
    assert distance(nn.Identity, alpha=alpha, beta=beta, sweeps=sweeps) < 1e-13


def test_linear_units_of_the_original_are_backprop_at_equal_weights_alone() -> None:
    assert distance(nn.Identity, variant="original", alpha=0.5, beta=1.0) < 1e-13
    for alpha in (0.0, 1.0):
        gaps = [distance(nn.Identity, variant="original", alpha=alpha, beta=beta) for beta in (1.0, 0.1, 0.01)]
        assert gaps[0] / gaps[1] == pytest.approx(10, rel=0.3)
        assert gaps[1] / gaps[2] == pytest.approx(10, rel=0.1)
        assert gaps[0] > 0.1


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_rectified_units_are_backprop_while_no_nudge_crosses_a_kink(alpha: float) -> None:
    model, (x, targets) = mlp(nn.ReLU), batch("mlp")
    for module in model:
        if isinstance(module, nn.Linear):
            module.weight.data.div_(20)  # biases decide which units are on
    rule = DualPropagation(model, alpha=alpha, beta=1e-3)
    assert gap(gradients(rule, x, targets), backprop(model, x, targets)) < 1e-12
    assert distance(nn.ReLU, alpha=alpha, beta=30.0) > 1e-3  # where some do


def test_the_order_of_the_distance_to_backprop() -> None:
    """beta^2 at equal weights, beta elsewhere: 100 and 10 for a tenth of the nudge."""
    equal = [distance(alpha=0.5, beta=beta) for beta in (1e-1, 1e-2, 1e-3)]
    assert equal[0] / equal[1] == pytest.approx(100, rel=0.02)
    assert equal[1] / equal[2] == pytest.approx(100, rel=0.02)
    for alpha in (0.0, 1.0):
        other = [distance(alpha=alpha, beta=beta) for beta in (1e-2, 1e-3, 1e-4)]
        assert other[0] / other[1] == pytest.approx(10, rel=0.1)
        assert other[1] / other[2] == pytest.approx(10, rel=0.02)


def test_the_two_kinds_are_one_at_equal_weights() -> None:
    """The output's slope, taken anew by the original, is the one difference from the second sweep on."""
    model, (x, targets) = mlp(), batch("mlp")
    a, b = (gradients(DualPropagation(model, variant=v, beta=0.5), x, targets) for v in ("transposed", "original"))
    assert gap(a, b) == 0.0


def test_further_sweeps_change_nothing_at_the_ends() -> None:
    """The mean is the feed-forward activity there, for any activation."""
    model, (x, targets) = mlp(), batch("mlp")
    for alpha in (0.0, 1.0):
        once, thrice, often = (
            gradients(DualPropagation(model, alpha=alpha, beta=1.0, sweeps=sweeps), x, targets) for sweeps in (1, 3, 30)
        )
        assert gap(thrice, once) < 1e-14
        assert gap(often, once) < 1e-14
    rule = DualPropagation(model, alpha=0.0, beta=1.0)
    for mean, state in zip(rule.states(x, targets)["mean"], (model[:2](x), model[:4](x)), strict=True):
        torch.testing.assert_close(mean, state)


def test_single_precision_loses_nothing_at_a_small_nudge() -> None:
    model, (x, targets) = mlp().float(), batch("mlp")
    exact = backprop(mlp(), x, targets)
    for beta in (1e-3, 1e-6):
        ours = gradients(DualPropagation(model, beta=beta), x.float(), targets)
        assert gap([each.double() for each in ours], exact) < 1e-5


def test_nothing_moves_where_the_target_is_met() -> None:
    model, (x, _) = mlp(), batch("mlp")
    rule = DualPropagation(model, loss=squared_error, sweeps=2)
    credit = rule(x, model(x).detach())
    credit.backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
    assert float(credit.logs["nudge"]) == 0


def test_the_original_does_not_come_to_rest_at_backprop() -> None:
    model, (x, targets) = mlp(nn.Identity), batch("mlp")
    for module in model:
        if isinstance(module, nn.Linear):
            module.weight.data.mul_(3)
    exact = backprop(model, x, targets)
    original, transposed = (
        gap(gradients(DualPropagation(model, variant=v, alpha=0.0, sweeps=10), x, targets), exact)
        for v in ("original", "transposed")
    )
    assert original > 0.01
    assert transposed < 1e-12


def test_samples_that_the_loss_ignores_teach_nothing() -> None:
    x, targets = batch("mlp", 6)
    some = targets.clone()
    some[[1, 4]] = -100
    kept = some >= 0
    a = gradients(DualPropagation(mlp(), beta=1.0), x, some)
    b = gradients(DualPropagation(mlp(), beta=1.0), x[kept], targets[kept])
    assert gap(a, b) < 1e-13


def test_class_weights_stay_in_the_loss() -> None:
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.5, 2.0]))
    model, (x, targets) = mlp(), batch("mlp")
    exact = list(torch.autograd.grad(weighted(model(x), targets), list(model.parameters())))
    assert gap(gradients(DualPropagation(model, loss=weighted, beta=1e-4), x, targets), exact) < 1e-7


class Products(TorchDispatchMode):
    """Counts the multiply-adds of matrix products."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__.startswith(("mm", "addmm")):
            a, b = args[-2:]
            self.count += a.shape[0] * a.shape[1] * b.shape[1]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("sweeps", [1, 3])
def test_multiply_adds(sweeps: int) -> None:
    """Those of backpropagation for one sweep: 3 P - P_1."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 4))
    first, last, whole = 48, 36, 48 + 72 + 36
    rule = DualPropagation(model, sweeps=sweeps)
    x, targets = batch("mlp", 8)
    rule(x, targets)  # whose first batch is looked at
    with Products() as products:
        rule(x, targets).backward()
    assert products.count == 8 * (3 * whole - first + (sweeps - 1) * (2 * whole - 2 * first - last))


def test_refusals() -> None:
    with pytest.raises(UnsupportedModelError, match=r"last layer '2'"):
        DualPropagation(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Sigmoid()))
    with pytest.raises(UnsupportedModelError, match=r"'1'.*Dropout"):
        DualPropagation(nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)))
    with pytest.raises(UnsupportedModelError, match="float16"):
        DualPropagation(mlp().half())(*batch("mlp"))
    for options in ({"beta": 0.0}, {"alpha": 1.5}, {"sweeps": 0}):
        with pytest.raises(ConfigError, match=r"beta must be positive|sweeps must be a whole number"):
            DualPropagation(mlp(), **options)  # type: ignore[arg-type]
    model = mlp()
    rule = DualPropagation(model)
    model[2] = nn.Linear(8, 7)
    with pytest.raises(UnsupportedModelError, match=r"'2' \(Linear\) was removed from the model"):
        rule(*batch("mlp"))
    with pytest.raises(ConfigError, match="variant"):
        DualPropagation(mlp(), variant="dp")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="reduction"):
        DualPropagation(mlp(), loss=nn.CrossEntropyLoss(reduction="sum"))
    with pytest.raises(ConfigError, match="empty"):
        DualPropagation(mlp())(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))


def test_the_checks_of_a_users_own_model() -> None:
    for name in NETWORKS:
        model, (x, targets) = NETWORKS[name][0](), batch(name)
        check_model(DualPropagation(model, input_shape=NETWORKS[name][1]), x, targets, skip={"compiled"})


def test_one_layer_is_backprop() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    x, targets = batch("mlp")
    assert gap(gradients(DualPropagation(model), x, targets), backprop(model, x, targets)) < 1e-13
