"""Orthogonal flows: identities of the equations, and a network of any depth whose Jacobian is an isometry."""

import math

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import apical
from apical.diagnostics.channel import jacobians, singular_values
from apical.errors import ConfigError, UnsupportedModelError
from apical.models import build, flow
from apical.models.orthogonal_flow import cayley, commutator, gated, isospectral, orthogonal_schedule, schedule
from apical.testing import check_model
from apical.testing.two_ranks import on_two_ranks

RULES = {
    "bp": apical.Backprop,
    "fa": apical.FeedbackAlignment,
    "dfa": apical.DirectFeedbackAlignment,
    "ccl": apical.CounterCurrentLearning,
    "dtp": apical.DifferenceTargetPropagation,
}


def symmetric(n: int) -> torch.Tensor:
    m = torch.randn(n, n).double()
    return (m + m.T) / 2


@pytest.mark.parametrize("kind", ["isospectral", "gated", "tied"])
def test_weights_stay_orthogonal_and_move(kind: str) -> None:
    torch.manual_seed(0)
    weights = orthogonal_schedule(16, 200, kind)
    one = torch.eye(16).double()
    assert max((w.T @ w - one).abs().max() for w in weights) < 1e-13
    assert ((weights[-1] - weights[0]).norm() > 0.5) == (kind != "tied")


def test_spectrum_is_kept_and_brockett_rises() -> None:
    torch.manual_seed(1)
    q, n, w = symmetric(6), symmetric(6), torch.linalg.qr(torch.randn(6, 6).double())[0]
    weights = schedule(w, 3000, lambda w: isospectral(w, q, n), time=12.0)
    eigenvalues = torch.linalg.eigvalsh(q)
    assert max((torch.linalg.eigvalsh(w.T @ q @ w) - eigenvalues).abs().max() for w in weights[::300]) < 5e-13
    heights = torch.stack([(w.T @ q @ w @ n).trace() for w in weights])
    assert (heights.diff() > 0).all()
    assert heights[-1] == pytest.approx(float(eigenvalues @ torch.linalg.eigvalsh(n)), abs=1e-8)


def test_derivatives_of_the_flow() -> None:
    """dH/dt = [H, [H, N]] and d tr(H N)/dt = |[H, N]|^2, by autograd in time."""
    torch.manual_seed(2)
    q, n, w = symmetric(5), symmetric(5), torch.linalg.qr(torch.randn(5, 5).double())[0]
    omega = isospectral(w, q, n)

    def h_at(t: torch.Tensor) -> torch.Tensor:
        moved = w @ torch.linalg.matrix_exp(t * omega)
        return moved.T @ q @ moved

    zero = torch.zeros(()).double()
    h, rate = torch.func.jvp(h_at, (zero,), (zero + 1,))
    assert (rate - commutator(h, commutator(h, n))).abs().max() < 1e-13
    assert (rate @ n).trace().item() == pytest.approx(commutator(h, n).square().sum().item(), rel=1e-13)


def test_where_nothing_flows() -> None:
    w, s, one = torch.linalg.qr(torch.randn(4, 4).double())[0], symmetric(4), torch.eye(4).double()
    assert isospectral(w, 3 * one, s).abs().max() < 1e-14
    assert isospectral(w, s, 2 * one).abs().max() < 1e-14
    a, first, second = torch.randn(2).double(), *torch.randn(2, 2, 4, 4).double()
    omega = gated(w, a, first, second)
    f = [first[i] @ torch.tanh(w @ second[i]) for i in range(2)]
    assert (omega - sum(a[i] * (f[i] - f[i].T) for i in range(2))).abs().max() < 1e-14
    assert torch.equal(omega, -omega.T)
    exact = torch.linalg.matrix_exp(1e-3 * omega)
    assert torch.linalg.matrix_norm(cayley(omega, 1e-3) - exact, 2) < 0.1 * (1e-3 * torch.linalg.matrix_norm(omega, 2)) ** 3


@pytest.mark.parametrize("depth", [50, 200])
def test_the_jacobian_is_an_isometry(depth: int) -> None:
    torch.manual_seed(3)
    model = flow(16, depth).double()
    for layer, weight in zip(model[::2], orthogonal_schedule(16, depth), strict=True):
        with torch.no_grad():
            layer.weight.copy_(weight)  # in float64
    values = singular_values(jacobians(model, torch.randn(2, 16))[0])
    assert (values - 1).abs().max() < (1e-12 if depth == 50 else 1e-11)


@pytest.mark.parametrize("residual", [False, True])
def test_no_flow_is_one_weight_at_every_depth(residual: bool) -> None:
    """x + |W x| / N, or |W x|, N times over."""
    torch.manual_seed(7)
    model = flow(6, 9, "tied", residual).double()
    w, *others = (layer.weight for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    assert len(others) == 8
    assert all(torch.equal(w, other) for other in others)
    assert (w @ w.T - torch.eye(6)).abs().max() < 1e-6  # made in float32
    x = start = torch.randn(5, 6).double()
    for _ in range(9):
        x = (x if residual else 0) + (x @ w.T).abs() / (9 if residual else 1)
    assert (model(start) - x).abs().max() < 1e-14


@pytest.mark.parametrize(("width", "n"), [(8, 2), (8, 20), (3, 7), (16, 50)])
@pytest.mark.parametrize("kind", ["isospectral", "gated", "tied"])
def test_the_bound_of_euler_steps(kind: str, width: int, n: int) -> None:
    torch.manual_seed(4)
    values = singular_values(jacobians(flow(width, n, kind, residual=True), torch.randn(4, width))[0])
    low, high = (1 - 1 / n) ** n, (1 + 1 / n) ** n
    assert 0.25 <= low <= values.min() + 1e-6  # weights are orthogonal in float32
    assert values.max() - 1e-6 <= high < math.e
    assert values.max() - values.min() > 0.1
    bent = flow(width, n, kind, residual=True)
    for step in bent:
        step.abs = torch.nn.Tanh()  # a slope of at most one keeps the upper bound
    assert singular_values(jacobians(bent, torch.randn(4, width))[0]).max() <= high


def test_by_name_and_bad_input() -> None:
    assert len([m for m in build("flow-8x50", (4, 3), 3).modules() if isinstance(m, torch.nn.Linear)]) == 52
    with pytest.raises(ConfigError, match="layers of one width"):
        build("flow-8-4", (4,), 3)
    with pytest.raises(ConfigError, match="at least 1"):
        flow(0, 3)
    with pytest.raises(ConfigError, match="flow must be"):
        flow(4, 3, "fast")


def rule_of(name: str, residual: bool = False) -> tuple[apical.CreditRule, torch.Tensor, torch.Tensor]:
    """With a flow of 5 layers between a first and a last one, and 8 samples of 7 inputs and 3 classes."""
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(7, 6), flow(6, 5, residual=residual), torch.nn.Linear(6, 3)).double()
    return RULES[name](model), torch.randn(8, 7).double(), torch.arange(8) % 3


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_rules_train_a_flow_or_say_why_not(name: str, residual: bool) -> None:
    if residual and name in ("ccl", "dtp"):
        with pytest.raises(UnsupportedModelError, match=r"'1\.step2\.linear'.* not a chain"):
            rule_of(name, residual)
        return
    checked = check_model(*rule_of(name, residual), skip={"compiled"}).passed
    assert {"gradients", "placement", "determinism", "batch sizes", "autocast"} <= checked.keys()
    assert ("feedback differs" in checked, "signals differ" in checked) == (name == "fa", name == "dfa")


def flow_gradients(rank: int, name: str) -> dict[str, torch.Tensor]:
    """Of a rank's half of the batch, averaged over ranks."""
    rule, x, y = rule_of(name)
    parallel = DistributedDataParallel(rule)
    parallel(x[rank::2], y[rank::2]).backward()
    return {key: p.grad for key, p in rule.named_parameters() if p.grad is not None}


@pytest.mark.xdist_group("two ranks")
@pytest.mark.parametrize("name", ["bp", "fa", "dfa", "ccl"])  # target propagation draws noise on each rank
def test_two_ranks_train_a_flow_as_one_process(name: str) -> None:
    first, second = on_two_ranks(flow_gradients, name)
    rule, x, y = rule_of(name)
    rule(x, y).backward()
    whole = {key: p.grad for key, p in rule.named_parameters() if p.grad is not None}
    assert first.keys() == second.keys() == whole.keys()
    for key, gradient in whole.items():
        assert torch.equal(first[key], second[key]), key
        assert torch.allclose(first[key], gradient, rtol=1e-12, atol=1e-15), key
