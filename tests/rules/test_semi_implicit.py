"""Semi-implicit backpropagation against the authors' order of steps in numpy, and its limits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical.errors import ConfigError, UnsupportedModelError
from apical.rules.semi_implicit import SemiImplicit
from apical.testing import check_model
from apical.testing.comparison import gradients, require_same


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()


def batch(size: int = 9) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 7, dtype=torch.double, generator=torch.Generator().manual_seed(1)), torch.arange(size) % 3


@pytest.mark.parametrize(("size", "eta", "lam"), [(9, 0.1, 1.0), (4, 3.0, 0.02)])
def test_the_authors_order(size: int, eta: float, lam: float) -> None:
    """Column convention of the paper, absolute lam: W in closed form, then b with the new W, then the error through it."""
    model, (x, y) = mlp(), batch(size)
    ws = [m.weight.detach().numpy().copy() for m in model if isinstance(m, nn.Linear)]
    bs = [m.bias.detach().numpy().copy() for m in model if isinstance(m, nn.Linear)]
    f = [x.numpy().T]
    for i, (w, b) in enumerate(zip(ws, bs, strict=True)):
        z = w @ f[-1] + b[:, None]
        f.append(np.maximum(z, 0) if i < 2 else z)
    p = np.exp(f[3] - f[3].max(0))
    g = p / p.sum(0) - np.eye(3)[y.numpy()].T
    rule = SemiImplicit(model, eta=eta, proximity=lam / size)
    rule(x, y).backward()
    torch.optim.SGD(rule.parameters(), lr=1.0).step()
    for i in (2, 1, 0):
        d = g * (f[i + 1] > 0) if i < 2 else g
        z = ws[i] @ f[i] + bs[i][:, None]
        target = z - eta * d  # of the linear piece
        gram = f[i] @ f[i].T + lam * np.eye(len(f[i]))
        w = ((target - bs[i][:, None]) @ f[i].T + lam * ws[i]) @ np.linalg.inv(gram)
        b = ((target - w @ f[i]).sum(1) + lam * bs[i]) / (size + lam)
        layer = model[2 * i]
        np.testing.assert_allclose(layer.weight.detach().numpy(), w, atol=1e-12)
        np.testing.assert_allclose(layer.bias.detach().numpy(), b, atol=1e-12)
        g = w.T @ d


def test_much_proximity_is_backpropagation() -> None:
    model, (x, y) = mlp(), batch()
    apical.Backprop(model)(x, y).backward()
    exact = gradients(model)
    model.zero_grad()
    SemiImplicit(model, eta=0.5, proximity=1e9)(x, y).backward()
    require_same({name: grad * 1e9 / 0.5 for name, grad in gradients(model).items()}, exact, 1e-7, "lam -> infinity")


def test_the_output_layers_problem_never_gets_worse() -> None:
    model, (x, y) = mlp(), batch()
    hidden = model[:4](x).detach()
    z = model[4](hidden).detach()
    target = z - 2.0 * (torch.softmax(z, 1) - F.one_hot(y, 3))
    old = [p.detach().clone() for p in model[4].parameters()]
    rule = SemiImplicit(model, eta=2.0)
    rule(x, y).backward()
    torch.optim.SGD(rule.parameters(), lr=1.0).step()
    moved = sum(float((p - q).detach().square().sum()) for p, q in zip(model[4].parameters(), old, strict=True))
    after = float((model[4](hidden) - target).detach().square().sum()) + 0.01 * 9 * moved
    assert after < float((z - target).square().sum())


def test_nothing_moves_where_nothing_is_wrong() -> None:
    model, (x, _) = mlp(), batch()
    SemiImplicit(model, F.mse_loss)(x, model(x).detach()).backward()
    assert not any(bool(p.grad.any()) for p in model.parameters())


@pytest.mark.compiles
def test_on_a_model() -> None:
    report = check_model(SemiImplicit(mlp().float(), eta=0.5), batch()[0].float(), batch()[1])
    assert {"gradients", "placement", "determinism", "scaled loss", "compiled"} <= report.passed.keys()


def test_ignored_samples_are_left_out() -> None:
    found = []
    x, y = batch()
    for inputs, targets in ((x[:6], y[:6]), (x, torch.cat([y[:6], torch.full((3,), -100)]))):
        model = mlp()
        SemiImplicit(model)(inputs, targets).backward()
        found.append(gradients(model))
    require_same(found[1], found[0], 1e-12, "ignored samples")


def test_frozen_layers_pass_the_error_on() -> None:
    model, (x, y) = mlp(), batch()
    model[2].requires_grad_(False)
    SemiImplicit(model)(x, y).backward()
    assert model[2].weight.grad is None
    assert bool(model[0].weight.grad.any())


def test_evaluation() -> None:
    rule = SemiImplicit(mlp())
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            credit = rule(*batch())
        torch.testing.assert_close(credit.loss, F.cross_entropy(rule.model(batch()[0]), batch()[1]).detach())
    rule(*batch()).backward()


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="eta and proximity"):
        SemiImplicit(mlp(), eta=0.0)
    with pytest.raises(UnsupportedModelError, match="'0'"):
        SemiImplicit(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)))
    with pytest.raises(ConfigError, match="reduction"):
        SemiImplicit(mlp(), nn.CrossEntropyLoss(reduction="sum"))
    with pytest.raises(UnsupportedModelError, match="float16"):
        SemiImplicit(mlp().half())(batch()[0].half(), batch()[1])
    with pytest.raises(ConfigError, match="empty"):
        SemiImplicit(mlp())(torch.zeros(0, 7).double(), torch.zeros(0, dtype=torch.long))
