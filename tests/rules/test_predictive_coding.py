"""Predictive coding against its energy, differentiated as it stands, and its exact identities (float64)."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from apical import LocalSolve, PredictiveCoding
from apical.core.losses import squared_error
from apical.core.scaled import ScaledLinear
from apical.diagnostics.alignment import gradient_alignment
from apical.diagnostics.gauss_newton import requested_change
from apical.errors import ConfigError, UnsupportedModelError
from apical.models import mlp_mu
from apical.testing import check_model
from apical.testing.networks import image_batch, residual_network


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.double)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def mlp() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 4))


def images() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 3, padding=1), nn.GELU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(3, 4, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(36, 5), nn.GELU(), nn.Linear(5, 4)),
    )


NETWORKS = {"mlp": (mlp, (6,)), "images": (images, (2, 6, 6))}


def batch(name: str, size: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, *NETWORKS[name][1], generator=generator), torch.arange(size) % 4


def parts(model: nn.Sequential) -> list[nn.Sequential]:
    """The blocks, cut by hand before every layer; flattening belongs to what follows."""
    groups: list[list[nn.Module]] = []
    for module in model:
        opens = isinstance(module, nn.Linear | nn.Conv2d) and not (groups and isinstance(groups[-1][-1], nn.Flatten))
        if opens or isinstance(module, nn.Flatten):
            groups.append([])
        groups[-1].append(module)
    return [nn.Sequential(*group) for group in groups]


def energy(blocks: Sequence[nn.Module], x: Tensor, s: Sequence[Tensor], targets: Tensor, weight: float = 1.0) -> Tensor:
    """E(s), summed over the batch, as the equation stands."""
    below, total = x, x.new_zeros(())
    for block, state in zip(blocks, s, strict=False):
        total = total + 0.5 * (state - block(below)).square().sum()
        below = state
    return total + weight * F.cross_entropy(blocks[-1](below), targets, reduction="sum")


def feed_forward(blocks: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    s = []
    for block in blocks[:-1]:
        x = block(x)
        s.append(x.detach())
    return s


def relaxed(blocks: Sequence[nn.Module], x: Tensor, targets: Tensor, steps: int, g: float, **options: Any) -> list[Tensor]:
    """s after T gradient steps on E(s)."""
    weight, momentum = options.get("weight", 1.0), options.get("momentum", 0.0)
    s = feed_forward(blocks, x)
    moved = [torch.zeros_like(state) for state in s]
    for _ in range(steps):
        leaves = [state.clone().requires_grad_() for state in s]
        slopes = torch.autograd.grad(energy(blocks, x, leaves, targets, weight), leaves)
        moved = [momentum * m - slope for m, slope in zip(moved, slopes, strict=True)]
        s = [state + g * m for state, m in zip(s, moved, strict=True)]
    return s


def relaxed_in_errors(
    blocks: Sequence[nn.Module], x: Tensor, targets: Tensor, steps: int, g: float, **options: Any
) -> list[Tensor]:
    """s after T gradient steps on E(e), differentiated as a whole."""
    weight, momentum = options.get("weight", 1.0), options.get("momentum", 0.0)

    def states(e: Sequence[Tensor]) -> list[Tensor]:
        below, s = x, []
        for block, error in zip(blocks, e, strict=False):
            below = block(below) + error
            s.append(below)
        return s

    e = [torch.zeros_like(state) for state in feed_forward(blocks, x)]
    moved = [torch.zeros_like(error) for error in e]
    for _ in range(steps):
        leaves = [error.clone().requires_grad_() for error in e]
        s = states(leaves)
        loss = F.cross_entropy(blocks[-1](s[-1]), targets, reduction="sum")
        total = sum(0.5 * error.square().sum() for error in leaves) + weight * loss
        moved = [momentum * m - slope for m, slope in zip(moved, torch.autograd.grad(total, leaves), strict=True)]
        e = [error + g * m for error, m in zip(e, moved, strict=True)]
    return [state.detach() for state in states(e)]


def learned(
    blocks: Sequence[nn.Module], x: Tensor, s: Sequence[Tensor], targets: Tensor, weight: float = 1.0
) -> list[Tensor]:
    """d E / d W / B, states held constant: every block's own term only depends on its own weights."""
    parameters = [p for block in blocks for p in block.parameters()]
    return [slope / len(x) for slope in torch.autograd.grad(energy(blocks, x, s, targets, weight), parameters)]


def gradients(rule: PredictiveCoding, x: Tensor, targets: Tensor) -> list[Tensor]:
    rule.zero_grad()
    rule(x, targets).backward()
    return [p.grad.clone() for p in rule.model.parameters() if p.grad is not None]


def backprop(model: nn.Module, x: Tensor, targets: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(F.cross_entropy(model(x), targets), list(model.parameters())))


def close(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).norm()) <= tolerance * float(b.norm())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("steps", "momentum", "weight"), [(1, 0.0, 1.0), (7, 0.0, 1.0), (6, 0.5, 0.3)])
def test_states_go_down_the_energy_and_blocks_learn_their_own_term(
    name: str, steps: int, momentum: float, weight: float
) -> None:
    model, (x, targets) = NETWORKS[name][0](), batch(name)
    blocks = parts(model)
    rule = PredictiveCoding(
        model, inference="state", steps=steps, rate=0.1, momentum=momentum, output_weight=weight, rescale=False,
        input_shape=NETWORKS[name][1],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # after one step most errors are zero
        found = rule.states(x, targets)["s"]
        ours = gradients(rule, x, targets)
    s = relaxed(blocks, x, targets, steps, 0.1, momentum=momentum, weight=weight)
    for a, b in zip(found, s, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    for a, b in zip(ours, learned(blocks, x, s, targets, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("steps", "momentum", "weight"), [(1, 0.0, 1.0), (6, 0.0, 1.0), (6, 0.5, 0.3)])
def test_errors_go_down_the_same_energy(name: str, steps: int, momentum: float, weight: float) -> None:
    model, (x, targets) = NETWORKS[name][0](), batch(name)
    blocks = parts(model)
    rule = PredictiveCoding(
        model, inference="error", steps=steps, rate=0.1, momentum=momentum, output_weight=weight, rescale=False,
        input_shape=NETWORKS[name][1],
    )  # fmt: skip
    s = relaxed_in_errors(blocks, x, targets, steps, 0.1, momentum=momentum, weight=weight)
    for a, b in zip(rule.states(x, targets)["s"], s, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    close(gradients(rule, x, targets), learned(blocks, x, s, targets, weight), 1e-11)
    logs = rule(x, targets).logs
    torch.testing.assert_close(logs["energy"], energy(blocks, x, s, targets, weight).detach() / len(x), rtol=1e-12, atol=0)
    hidden = energy(blocks, x, s, targets, weight=0.0).detach() / len(x)
    torch.testing.assert_close(logs["hidden_share"], hidden / logs["energy"], rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_one_step_in_errors_is_backprop_in_the_first_block(name: str) -> None:
    model, (x, targets) = NETWORKS[name][0](), batch(name)
    first = len(list(parts(model)[0].parameters()))
    exact = backprop(model, x, targets)
    gaps = []
    for g in (1e-1, 1e-2, 1e-3):
        rule = PredictiveCoding(model, steps=1, rate=g, rescale=False, input_shape=NETWORKS[name][1])
        ours = gradients(rule, x, targets)
        close([grad / g for grad in ours[:first]], exact[:first], 1e-11)
        rest = [grad / g for grad in ours[first:-2]] + ours[-2:]
        gaps.append(max(float((a - b).norm() / b.norm()) for a, b in zip(rest, exact[first:], strict=True)))
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2]  # O(g)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    ("inference", "rate", "tolerance"), [("staged", 1.0, 1e-13), ("staged", 0.1, 1e-10), ("fixed-prediction", 1.0, 1e-13)]
)
def test_staged_learning_and_fixed_predictions_are_backprop(
    name: str, inference: Any, rate: float, tolerance: float
) -> None:
    """Staged: times g^(L - l)."""
    model, (x, targets) = NETWORKS[name][0](), batch(name)
    rule = PredictiveCoding(model, inference=inference, rate=rate, input_shape=NETWORKS[name][1])
    depth = [len(rule.row) - 1 - k for k, block in enumerate(parts(model)) for _ in block.parameters()]
    ours = [grad / rate**d for grad, d in zip(gradients(rule, x, targets), depth, strict=True)]
    close(ours, backprop(model, x, targets), tolerance)


def test_an_error_goes_down_one_block_a_step() -> None:
    model, (x, targets) = mlp(), batch("mlp")
    for steps in (1, 2, 3):
        rule = PredictiveCoding(model, inference="state", steps=steps, rate=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            e = rule.states(x, targets)["e"]
        assert [bool(error.any()) for error in e] == [k >= 3 - steps for k in range(3)]


def test_a_silent_block_is_named_once() -> None:
    rule = PredictiveCoding(mlp(), inference="state", steps=2)
    with pytest.warns(RuntimeWarning, match="no error has reached layer '0'"):
        rule(*batch("mlp"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rule(*batch("mlp"))
        PredictiveCoding(mlp(), inference="error", steps=1)(*batch("mlp"))


def test_weak_outputs_are_backprop() -> None:
    model, (x, targets) = mlp(), batch("mlp")
    gaps = []
    for weight in (1e-1, 1e-2, 1e-3):
        rule = PredictiveCoding(model, steps=400, rate=0.3, output_weight=weight)
        ours = [grad / weight for grad in gradients(rule, x, targets)]
        gaps.append(max(float((a - b).norm() / b.norm()) for a, b in zip(ours, backprop(model, x, targets), strict=True)))
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2]


def test_both_inferences_meet_where_every_error_is_what_the_next_hands_down() -> None:
    model, (x, targets) = mlp(), batch("mlp")
    error = PredictiveCoding(model, inference="error", steps=3000, rate=0.2, tolerance=1e-15)
    state = PredictiveCoding(model, inference="state", steps=6000, rate=0.2, tolerance=1e-15)
    for key in ("s", "e"):
        for a, b in zip(error.states(x, targets)[key], state.states(x, targets)[key], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    found, blocks = error.states(x, targets), parts(model)
    leaf = found["s"][1].clone().requires_grad_()
    (handed,) = torch.autograd.grad(blocks[2](leaf), leaf, found["e"][2])
    torch.testing.assert_close(found["e"][1], handed, rtol=0, atol=1e-12)
    assert float(error(x, targets).logs["residual"]) <= 1e-15


def test_linear_networks_have_a_closed_form() -> None:
    """e_l = P_l^T S^-1 r with P_l = W_L..W_{l+1}, S = sum P_l P_l^T, r = y - output; E* = r^T S^-1 r / 2."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 3))
    x, y = torch.randn(4, 5), torch.randn(4, 3)
    rule = PredictiveCoding(model, loss=squared_error, steps=2000, rate=0.2, rescale=False)
    credit = rule(x, y)
    weights = [layer.weight.detach() for layer in model]
    p = [weights[2] @ weights[1], weights[2], torch.eye(3)]
    r = y - model(x).detach()
    solved = torch.linalg.solve(sum(each @ each.T for each in p), r.T).T
    torch.testing.assert_close(credit.logs["energy"], (r * solved).sum() / 8, rtol=1e-12, atol=0)
    errors = [solved @ each for each in p]
    for a, b in zip(rule.states(x, y)["e"], errors[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    credit.backward()
    s = [x, *rule.states(x, y)["s"]]
    for layer, error, below in zip(model, errors, s, strict=True):
        torch.testing.assert_close(layer.weight.grad, -error.T @ below / 4, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("inference", ["error", "state"])
def test_a_rate_that_raises_the_energy_is_named_once(inference: Literal["error", "state"]) -> None:
    model, (x, targets) = mlp(), batch("mlp")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # S = I + W W^T + ... has an eigenvalue above 2 / rate
    rule = PredictiveCoding(model, loss=squared_error, inference=inference, rate=0.9, steps=6)
    with pytest.warns(RuntimeWarning, match="inference has raised the energy .* a rate of 0.9 is too large"):
        rule(x, targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rule(x, targets)
        PredictiveCoding(model, loss=squared_error, inference=inference, rate=0.01, steps=6)(x, targets)


def test_an_energy_below_zero_raises_no_alarm() -> None:
    model, (x, targets) = mlp(), batch("mlp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PredictiveCoding(model, loss=lambda output, y: squared_error(output, y) - 1e3, rate=0.01)(x, targets)


def test_nothing_moves_where_the_target_is_met() -> None:
    model, (x, _) = mlp(), batch("mlp")
    rule = PredictiveCoding(model, loss=squared_error)
    credit = rule(x, model(x).detach())
    credit.backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
    assert float(credit.logs["energy"]) == 0
    assert float(credit.logs["hidden_share"]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no error has reached any layer, as there is none
        PredictiveCoding(model, loss=squared_error, inference="state")(x, model(x).detach())


def test_rescaled_gradients_have_backprops_size() -> None:
    model, (x, targets) = mlp(), batch("mlp")
    exact = backprop(model, x, targets)
    for steps in (1, 5, 20):
        ours = gradients(PredictiveCoding(model, steps=steps, rate=1e-4), x, targets)
        close(ours, exact, 1e-2)


def test_running_statistics_move_once_a_batch_and_are_batch_statistics_throughout() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))
    twin = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))
    twin.load_state_dict(model.state_dict())
    x, targets = batch("mlp")
    twin(x)
    PredictiveCoding(model, steps=9)(x, targets).backward()
    for (name, ours), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    first = PredictiveCoding(model, steps=1, rate=1e-3, rescale=False)
    exact = backprop(model, x, targets)
    for ours, theirs in zip(gradients(first, x, targets)[:4], exact[:4], strict=True):
        torch.testing.assert_close(ours / 1e-3, theirs, rtol=1e-8, atol=1e-12)  # a bias before it has no gradient


def test_statistics_move_once_in_all_calls_of_a_batch() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))
    rule, (x, targets) = PredictiveCoding(model, inference="incremental", steps=4), batch("mlp")
    for number in (1, 2):
        wanted = model[1].running_mean.lerp(model[0](x).mean(0), 0.1)
        for call in range(rule.repeats):
            rule.zero_grad()
            rule(x, targets).backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
            with torch.no_grad():  # validation in between, of the plain model
                model.eval()(x)
                model.train()
            assert int(model[1].num_batches_tracked) == number, call
        torch.testing.assert_close(model[1].running_mean, wanted)


@pytest.mark.parametrize("steps", [1, 7])
def test_statistics_that_move_in_an_evaluated_model_move_once(steps: int) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4)).eval()
    model[1].train()
    PredictiveCoding(model, steps=steps)(*batch("mlp")).backward()
    assert int(model[1].num_batches_tracked) == 1


def test_statistics_are_whole_after_a_loss_that_fails() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))
    calls = 0

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise ValueError("mine")
        return F.cross_entropy(output, targets)

    rule = PredictiveCoding(model, loss=loss, steps=9)
    with pytest.raises(ValueError, match="mine"):
        rule(*batch("mlp"))
    assert int(model[1].num_batches_tracked) <= 1


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8), nn.GroupNorm(2, 8)], ids=["layer", "rms", "group"])
def test_normalisation_within_a_sample(norm: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), norm, nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x, targets = batch("mlp")
    close(gradients(PredictiveCoding(model, inference="staged"), x, targets), backprop(model, x, targets), 1e-12)


def test_samples_that_the_loss_ignores_teach_nothing() -> None:
    x, targets = batch("mlp", 6)
    some = targets.clone()
    some[[1, 4]] = -100
    kept = some >= 0
    a = gradients(PredictiveCoding(mlp(), steps=4), x, some)
    b = gradients(PredictiveCoding(mlp(), steps=4), x[kept], targets[kept])
    close(a, b, 1e-12)


def test_refusals() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'1'.*draw new numbers"):
        PredictiveCoding(nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)))
    with pytest.raises(UnsupportedModelError, match=r"'1'.*RReLU.*draw new numbers"):
        PredictiveCoding(nn.Sequential(nn.Linear(4, 5), nn.RReLU(), nn.Linear(5, 3)))
    with pytest.raises(ConfigError, match="inference"):
        PredictiveCoding(mlp(), inference="errors")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="steps"):
        PredictiveCoding(mlp(), steps=0)
    for rate in (0.0, 2.0, float("inf"), float("nan")):  # from 2 on the scale 1 - (1 - g)^T is zero or changes sign
        with pytest.raises(ConfigError, match="rate must be in"):
            PredictiveCoding(mlp(), rate=rate)
    for weight in (0.0, float("inf")):
        with pytest.raises(ConfigError, match="output_weight"):
            PredictiveCoding(mlp(), output_weight=weight)
    model = mlp()
    rule = PredictiveCoding(model)
    model[1] = nn.ReLU()
    with pytest.raises(UnsupportedModelError, match=r"'1' \(Tanh\) was removed from the model"):
        rule(*batch("mlp"))
    model = mlp()
    rule = PredictiveCoding(model)
    model.append(nn.Identity())
    rule(*batch("mlp"))
    model.append(nn.Tanh())
    with pytest.raises(UnsupportedModelError, match="new child"):
        rule(*batch("mlp"))
    generative = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 6))
    rule = PredictiveCoding(generative, direction="generative")
    rule(*batch("mlp"))
    generative.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(UnsupportedModelError, match="hook"):
        rule(*batch("mlp"))
    with pytest.raises(ConfigError, match="staged"):
        PredictiveCoding(mlp(), inference="staged", steps=9)
    for inference in ("staged", "fixed-prediction", "incremental"):
        with pytest.raises(ConfigError, match=f"momentum and tolerance apply to .* not '{inference}'"):
            PredictiveCoding(mlp(), inference=inference, momentum=0.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="reduction"):
        PredictiveCoding(mlp(), loss=nn.CrossEntropyLoss(reduction="sum"))
    with pytest.raises(ConfigError, match="empty"):
        PredictiveCoding(mlp())(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))


class Products(TorchDispatchMode):
    """Counts the multiply-adds of matrix products."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__.startswith(("mm", "addmm")):
            a, b = args[-2:]
            self.count += a.shape[0] * a.shape[1] * b.shape[1]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("inference", ["error", "state", "staged", "fixed-prediction", "incremental"])
def test_multiply_adds(inference: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 9, bias=False), nn.Tanh(), nn.Linear(9, 4, bias=False)
    )
    first, whole = 48, 48 + 72 + 36
    rule = PredictiveCoding(model, inference=inference, steps=None if inference == "staged" else 5)
    x, targets = batch("mlp", 8)
    rule(x, targets)  # whose first batch is looked at
    with Products() as products:
        rule(x, targets).backward()
    if inference == "incremental":  # one call, whose feed-forward pass only makes the output
        assert products.count == 8 * (3 * whole + 2 * (whole - first))
        return
    passes = rule.steps + 1 if inference == "fixed-prediction" else 2 * rule.steps
    assert products.count == 8 * (2 * whole + passes * (whole - first))  # the floor


def test_one_block_is_backprop() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    x, targets = batch("mlp")
    for inference in ("state", "error", "fixed-prediction", "staged"):
        options: Any = {"inference": inference}
        close(gradients(PredictiveCoding(model, **options), x, targets), backprop(model, x, targets), 1e-13)


class Residual(nn.Module):
    """A skip around a layer, with an activation that is a function."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, s: Tensor) -> Tensor:
        return s + self.inner(torch.tanh(s))


def residual() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        *(nn.Linear(6, 7), Residual(nn.Linear(7, 7))),
        *(Residual(nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 7))), nn.Tanh(), nn.Linear(7, 4)),
    )


def residual_parts() -> tuple[nn.Sequential, list[nn.Sequential]]:
    model = residual()
    return model, [nn.Sequential(*model[k:n]) for k, n in ((0, 1), (1, 2), (2, 4), (4, 5))]


@pytest.mark.parametrize("inference", ["error", "state"])
def test_a_module_with_skips_is_one_block(inference: Any) -> None:
    model, blocks = residual_parts()
    x, targets = batch("mlp")
    rule = PredictiveCoding(model, inference=inference, steps=7, rescale=False)
    relax = relaxed_in_errors if inference == "error" else relaxed
    s = relax(blocks, x, targets, 7, 0.1)
    for a, b in zip(rule.states(x, targets)["s"], s, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    close(gradients(rule, x, targets), learned(blocks, x, s, targets), 1e-11)
    assert "1, 2" in rule.remarks[0]
    staged = PredictiveCoding(model, inference="staged")
    close(gradients(staged, x, targets), backprop(model, x, targets), 1e-12)


def test_residual_networks_with_normalisation() -> None:
    """Running statistics move once; the staged schedule is backpropagation."""
    torch.manual_seed(0)
    model, twin = residual_network(), residual_network()
    twin.load_state_dict(model.state_dict())
    x, targets = image_batch(0)
    rule = PredictiveCoding(model, inference="staged", input_shape=(2, 8, 8))
    assert [block.name for block in rule.row] == ["0", "3", "4", "7"]
    close(gradients(rule, x, targets), backprop(twin, x, targets), 1e-10)
    for (name, ours), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("inference", ["error", "state", "incremental", "staged", "fixed-prediction"])
def test_a_block_that_works_in_place_learns_at_its_own_state(inference: Any) -> None:
    """Equal to the same block on a copy of its input."""

    class InPlace(nn.Module):
        def __init__(self, copies: bool) -> None:
            super().__init__()
            self.linear, self.copies = nn.Linear(7, 7), copies

        def forward(self, s: Tensor) -> Tensor:
            s = s.clone() if self.copies else s
            return s.relu_() + self.linear(s)

    results = []
    for copies in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 7), InPlace(copies), InPlace(copies), nn.Linear(7, 4))
        rule = PredictiveCoding(model, inference=inference)
        rule.accumulate(*batch("mlp"))
        results.append([p.grad for p in model.parameters() if p.grad is not None])
        if inference == "staged":
            close(results[-1], backprop(model, *batch("mlp")), 1e-12)
    close(results[0], results[1], 1e-14)


def test_a_skip_around_everything_is_refused() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(torch.tanh(self.a(x)))

    with pytest.raises(UnsupportedModelError, match=r"'b' but the result of 'add'.*a sum or a branch"):
        PredictiveCoding(Around())


def test_a_block_that_draws_is_refused() -> None:
    class Drops(Residual):
        def forward(self, s: Tensor) -> Tensor:
            return s + F.dropout(self.inner(s), training=self.training)

    with pytest.raises(UnsupportedModelError, match=r"'1'.*draws random numbers"):
        PredictiveCoding(nn.Sequential(nn.Linear(6, 7), Drops(nn.Linear(7, 7)), nn.Linear(7, 4)))


@pytest.mark.parametrize("loss", [squared_error, F.mse_loss])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_exact_inference_of_linear_networks(loss: Any, weight: float) -> None:
    """Every slope of the energy vanishes there, and long inference arrives at it."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 3))
    x, y = torch.randn(4, 5), torch.randn(4, 3)
    exact = PredictiveCoding(model, loss=loss, inference="exact", output_weight=weight)
    leaves = [state.clone().requires_grad_() for state in exact.states(x, y)["s"]]
    below, total = x, torch.zeros(())
    for layer, state in zip(model[:2], leaves, strict=True):
        total, below = total + 0.5 * (state - layer(below)).square().sum(), state
    total = total + weight * len(x) * loss(model[2](below), y)
    for slope in torch.autograd.grad(total, leaves):
        assert float(slope.abs().max()) < 1e-13
    long = PredictiveCoding(model, loss=loss, steps=3000, rate=0.2, tolerance=1e-15, output_weight=weight, rescale=False)
    close(gradients(exact, x, y), gradients(long, x, y), 1e-11)
    torch.testing.assert_close(exact(x, y).logs["energy"], total.detach() / len(x), rtol=1e-12, atol=0)


def test_exact_inference_is_refused_where_it_is_not() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Tanh.*'0'.*not known to be linear"):
        PredictiveCoding(mlp(), loss=squared_error, inference="exact")
    with pytest.raises(ConfigError, match="squared errors"):
        PredictiveCoding(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), inference="exact")


def test_incremental_inference_moves_states_and_weights_in_turn() -> None:
    """A state step at the present weights, then a weight step at the present states."""
    model, twin = mlp(), mlp()
    x, targets = batch("mlp")
    rule = PredictiveCoding(model, inference="incremental", steps=6, rate=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(2):  # the second time from the feed-forward pass again
        s = feed_forward(parts(twin), x)
        for _ in range(rule.repeats):
            optimizer.zero_grad()
            credit = rule(x, targets)
            torch.testing.assert_close(credit.output, model(x))
            credit.backward()
            optimizer.step()
            leaves = [state.clone().requires_grad_() for state in s]
            slopes = torch.autograd.grad(energy(parts(twin), x, leaves, targets), leaves)
            s = [state - 0.1 * slope for state, slope in zip(s, slopes, strict=True)]
            for p, slope in zip(twin.parameters(), learned(parts(twin), x, s, targets), strict=True):
                p.data.sub_(slope, alpha=0.2)
    close(list(model.parameters()), list(twin.parameters()), 1e-12)


def test_incremental_inference_wants_all_calls_of_a_batch() -> None:
    x, targets = batch("mlp")
    rule = PredictiveCoding(mlp(), inference="incremental", steps=4)
    assert "4 optimiser steps" in rule.remarks[0]
    rule(x, targets)
    with torch.no_grad():
        rule(x + 1, targets)  # nothing is learned
    rule(x.clone(), targets)
    with pytest.raises(ConfigError, match=r"takes 4 calls.*came after 2"):
        rule(x + 1, targets)
    rule.restart()
    rule(x + 1, targets)
    rule.restart()
    whole = [torch.zeros_like(p) for p in rule.model.parameters()]
    for _ in range(4):
        whole = [a + b for a, b in zip(whole, gradients(rule, x, targets), strict=True)]
    rule.zero_grad()
    rule.accumulate(x, targets)
    close([p.grad for p in rule.model.parameters() if p.grad is not None], whole, 1e-13)


def test_measuring_between_two_calls_of_a_batch_leaves_its_states() -> None:
    x, targets = batch("mlp", 20)
    ours, theirs = (PredictiveCoding(mlp(), inference="incremental", steps=4) for _ in range(2))
    for rule in (ours, theirs):
        rule(x, targets)
    gradient_alignment(ours, x + 1, targets)
    ours.placement(x)
    check_model(ours, x + 1, targets, skip={"compiled"})
    close(gradients(ours, x, targets), gradients(theirs, x, targets), 0.0)


def test_a_local_solver_around_incremental_inference() -> None:
    """It looks at samples of its first batch before it learns from that; the states are those of the bare rule."""
    x, targets = batch("mlp", 20)
    bare = PredictiveCoding(mlp(), inference="incremental", steps=4)
    inner = PredictiveCoding(mlp(), inference="incremental", steps=4)
    rule = LocalSolve(inner)
    for _ in range(rule.repeats):
        torch.testing.assert_close(rule(x, targets).logs, bare(x, targets).logs)
        rule.interference(x + 1, targets)
    rule(x + 1, targets)


def test_a_batch_with_nan_is_the_same_batch_at_its_next_call() -> None:
    x, targets = batch("mlp")
    x[0, 0] = float("nan")
    rule = PredictiveCoding(mlp(), inference="incremental", steps=4)
    with pytest.warns(RuntimeWarning, match="inputs hold NaN"):
        rule(x, targets)
    rule(x, targets)


def test_a_compiled_incremental_rule_runs_eagerly() -> None:
    x, targets = batch("mlp")
    trained = []
    for compiles in (False, True):
        rule = PredictiveCoding(mlp(), inference="incremental", steps=2)
        call = torch.compile(rule, backend="eager") if compiles else rule
        for _ in range(rule.repeats):
            call(x, targets).backward()
        trained.append([p.grad for p in rule.model.parameters() if p.grad is not None])
    close(trained[0], trained[1], 0.0)
    torch._dynamo.reset()  # which knows by now that it does
    rule.restart()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="do not compile the rule"):
        torch.compile(rule, backend="eager", fullgraph=True)(x, targets)


def test_the_mu_parametrisation() -> None:
    model = mlp_mu(6, [8, 8, 8], 4)
    factors = [module.factor for module in model.modules() if isinstance(module, ScaledLinear)]
    assert factors == pytest.approx([6**-0.5, 32**-0.5, 32**-0.5, 1 / 8])
    rule = PredictiveCoding(model, parametrisation="mu")
    assert (rule.steps, len(rule.row)) == (4, 4)
    blocks = [nn.Sequential(module) for module in model[1:]]
    x, targets = batch("mlp")
    rule = PredictiveCoding(model, parametrisation="mu", inference="state", steps=7, rate=0.1)
    for a, b in zip(rule.states(x, targets)["s"], relaxed(blocks, x, targets, 7, 0.1), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    with pytest.raises(UnsupportedModelError, match=r"'0'.*mu parametrisation.*a Linear"):
        PredictiveCoding(mlp(), parametrisation="mu")
    model[2].linear.factor = 1.0
    with pytest.raises(UnsupportedModelError, match=r"'layer2'.*factor 1"):
        PredictiveCoding(model, parametrisation="mu")


def test_layers_of_mu_draw_their_weights_anew_from_the_same_distribution() -> None:
    layer = ScaledLinear(100, 100, 0.1)
    torch.manual_seed(0)
    layer.reset_parameters()
    assert float(layer.weight.std()) == pytest.approx(1, rel=0.05)
    torch.manual_seed(0)
    assert torch.equal(ScaledLinear(100, 100, 0.1).weight, layer.weight)


def test_a_requested_change_is_that_of_all_calls_of_a_batch() -> None:
    x, targets = batch("mlp")
    rule = PredictiveCoding(mlp(), inference="incremental", steps=4)
    change, _ = requested_change(rule, x, targets)
    rule.accumulate(x, targets)
    for name, parameter in rule.model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(change[name], -parameter.grad)
    assert bool(change["0.weight"].any())  # which no single call's is before the third


def test_updates_in_mu_do_not_depend_on_depth() -> None:
    """Outputs of fresh networks have the same size at 4 and 64 layers, up to the noise of one draw."""
    x = torch.randn(20, 30)
    sizes = []
    for depth in (4, 64):
        torch.manual_seed(0)
        sizes.append(float(mlp_mu(30, [100] * (depth - 1), 5)[:-1](x).square().mean().sqrt()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.15)


def test_the_generative_direction() -> None:
    """Classes to samples: s_0 is the class, the sample is the target, and the answer goes down the energy in s_0 too."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 6))
    x, targets = batch("mlp")
    rule = PredictiveCoding(
        model, inference="state", steps=9, rate=0.1, direction="generative", answer_steps=30, rescale=False
    )
    s = [torch.tanh(model[0](F.one_hot(targets, 4).double())).detach()]
    for _ in range(9):
        leaf = s[0].clone().requires_grad_()
        total = generated(model, F.one_hot(targets, 4).double(), leaf, x)
        s = [leaf.detach() - 0.1 * torch.autograd.grad(total, leaf)[0]]
    torch.testing.assert_close(rule.states(x, targets)["s"][0], s[0], rtol=1e-12, atol=1e-13)
    total = generated(model, F.one_hot(targets, 4).double(), s[0], x)
    expected = [slope / len(x) for slope in torch.autograd.grad(total, list(model.parameters()))]
    close(gradients(rule, x, targets), expected, 1e-11)
    credit = rule(x, targets)
    answer = rule.answer(x)
    assert torch.equal(credit.output, answer)
    torch.testing.assert_close(credit.loss, F.cross_entropy(answer, targets))
    s0 = torch.full((5, 4), 0.25)
    s1 = torch.tanh(model[0](s0)).detach()
    for _ in range(rule.answer_steps):
        leaves = [s0.requires_grad_(), s1.requires_grad_()]
        down = torch.autograd.grad(generated(model, s0, s1, x), leaves)
        s0, s1 = s0.detach() - 0.1 * down[0], s1.detach() - 0.1 * down[1]
    torch.testing.assert_close(answer, s0, rtol=1e-12, atol=1e-13)
    assert [row.path for row in rule.placement(x)] == ["signal of its own"] * 2


def test_samples_that_do_not_fit_a_generative_model_are_refused() -> None:
    rule = PredictiveCoding(nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 6)), direction="generative")
    for shape in ((5,), (5, 1), (5, 12)):
        with pytest.raises(ConfigError, match=r"no features|do not fit"):
            rule(torch.zeros(shape), torch.arange(5) % 4)
        with pytest.raises(ConfigError, match=r"no features|do not fit"):
            rule.answer(torch.zeros(shape))
    with pytest.raises(ConfigError, match="empty"):
        rule.answer(torch.zeros(0, 6))


def generated(model: nn.Sequential, s0: Tensor, s1: Tensor, x: Tensor) -> Tensor:
    return 0.5 * (s1 - torch.tanh(model[0](s0))).square().sum() + 0.5 * (model[2](s1) - x).square().sum()


def test_a_users_own_residual_model() -> None:
    model, _ = residual_parts()
    x, targets = batch("mlp", 8)
    check_model(PredictiveCoding(model), x, targets, skip={"compiled"})


@pytest.mark.parametrize("inference", ["state", "error"])
def test_operations_are_counted_as_without_the_counter(inference: str) -> None:
    """PyTorch's counter follows the inputs of modules, and cannot follow leaves."""
    grads = []
    for context in (nullcontext(), FlopCounterMode(display=False)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
        rule = PredictiveCoding(model, inference=inference)  # type: ignore[arg-type]
        with context as counter:
            rule(torch.rand(5, 4), torch.arange(5) % 3).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
        assert counter is None or counter.get_total_flops() > 0
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
