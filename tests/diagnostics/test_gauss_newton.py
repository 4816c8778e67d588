"""Gauss-Newton and minimum-norm updates against dense Jacobians of torch.func, and what the theorems say about them."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

import apical
from apical.core.chain import Chain
from apical.core.credit import Credit, CreditRule
from apical.diagnostics.alignment import angle
from apical.diagnostics.channel import channel
from apical.diagnostics.curvature import conjugate_gradient
from apical.diagnostics.gauss_newton import (
    gauss_newton_alignment,
    gauss_newton_direction,
    gauss_newton_update,
    minimum_norm_alignment,
    minimum_norm_update,
)
from apical.errors import ConfigError, UnsupportedModelError


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


def tanh_net(*sizes: int, act: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), act()]
    return nn.Sequential(*layers[:-1])


def conv_net() -> nn.Sequential:
    below = nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()
    return nn.Sequential(*below, nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3))


def norm_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(4, 3))


def dense_jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """J_W of one sample, (n_L, parameters), parameter by parameter in the model's order."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    rows = jacrev(lambda p: functional_call(model, p, (x[None],)).flatten())(parameters)
    return torch.cat([row.flatten(1) for row in rows.values()], 1)


def flat(model: nn.Module, update: dict[str, Tensor]) -> Tensor:
    return torch.cat([update[name].flatten() for name, p in model.named_parameters() if p.requires_grad])


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert float((actual - expected).norm() / expected.norm()) < tolerance


MODELS = {
    "tanh": (lambda: tanh_net(5, 4, 6, 3), (5,)),
    "conv": (conv_net, (2, 8, 8)),
    "norm": (norm_net, (5,)),
    "bare": (lambda: nn.Linear(5, 3, bias=False), (5,)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dense_outputs", [64, 0], ids=["matrix", "conjugate gradients"])
@pytest.mark.parametrize("damping", [0.1, 1.0])
def test_update_is_the_mean_of_damped_pseudoinverses(name: str, dense_outputs: int, damping: float) -> None:
    make, shape = MODELS[name]
    model = make().eval()
    x, delta = torch.randn(4, *shape), torch.randn(4, 3)
    expected = torch.zeros(sum(p.numel() for p in model.parameters()))
    for sample, d in zip(x, delta, strict=True):
        j = dense_jacobian(model, sample)
        # the other side of the push-through identity, (J^T J + g I)^-1 J^T: a parameters-by-parameters solve
        expected += torch.linalg.solve(j.T @ j + damping * torch.eye(j.shape[1]), j.T @ d) / 4
    model.train()
    update = gauss_newton_update(model, x, delta, damping, dense_outputs=dense_outputs)
    close(flat(model, update), expected, 1e-12)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("dense_outputs", [64, 0], ids=["matrix", "conjugate gradients"])
def test_update_is_the_chain_formula(dense_outputs: int) -> None:
    """dW_i = J_i^T (sum_k (|r_{k-1}|^2 + 1) J_k J_k^T + g I)^-1 delta r_{i-1}^T, the 1 from the biases."""
    model, damping = tanh_net(5, 4, 6, 3), 0.1
    x, delta = torch.randn(7, 5), torch.randn(7, 3)
    w2, w3 = (model[i].weight.detach() for i in (2, 4))
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for r0, d in zip(x, delta, strict=True):
        r1 = torch.tanh(model[0](r0)).detach()
        r2 = torch.tanh(model[2](r1)).detach()
        j3 = torch.eye(3)
        j2 = j3 @ w3 @ torch.diag(1 - r2**2)
        j1 = j2 @ w2 @ torch.diag(1 - r1**2)
        kernel = damping * torch.eye(3)
        for r, j in ((r0, j1), (r1, j2), (r2, j3)):
            kernel = kernel + (r @ r + 1) * j @ j.T
        z = torch.linalg.solve(kernel, d)
        for layer, r, j in (("0", r0, j1), ("2", r1, j2), ("4", r2, j3)):
            expected[f"{layer}.weight"] += torch.outer(j.T @ z, r) / 7
            expected[f"{layer}.bias"] += j.T @ z / 7
    update = gauss_newton_update(model, x, delta, damping, dense_outputs=dense_outputs)
    close(flat(model, update), flat(model, expected), 1e-12)


def test_many_samples_are_taken_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, delta = tanh_net(5, 4, 3), torch.randn(9, 5), torch.randn(9, 3)
    whole = gauss_newton_update(model, x, delta)
    monkeypatch.setattr("apical.diagnostics.curvature.ENTRIES_AT_ONCE", 2 * 3 * 39)  # two samples of 39 parameters
    for dense_outputs in (64, 0):
        close(flat(model, gauss_newton_update(model, x, delta, dense_outputs=dense_outputs)), flat(model, whole), 1e-12)


def test_only_the_named_parameters() -> None:
    model, x, delta = tanh_net(5, 4, 3), torch.randn(1, 5), torch.randn(1, 3)
    j = dense_jacobian(model, x[0])[:, :20]  # 0.weight comes first
    expected = j.T @ torch.linalg.solve(j @ j.T + 0.1 * torch.eye(3), delta[0])
    update = gauss_newton_update(model, x, delta, names=["0.weight"])
    assert list(update) == ["0.weight"]
    close(update["0.weight"].flatten(), expected, 1e-12)
    model[0].weight.requires_grad_(False)
    assert list(gauss_newton_update(model, x, delta)) == ["0.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize("loss", [F.cross_entropy, lambda r, y: F.mse_loss(r, F.one_hot(y, 3).double())], ids=["ce", "mse"])
def test_whole_batch_direction_solves_the_dense_system(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """G = J^T H J with J the Jacobian of all outputs of the batch and H the Hessian of the mean loss in them."""
    model, x, y = tanh_net(5, 4, 3), torch.randn(6, 5), torch.tensor([0, 2, 1, 1, 0, 2])
    j = torch.cat([dense_jacobian(model, sample) for sample in x])
    r = model(x).detach()
    h = hessian(lambda o: loss(o.view(6, 3), y))(r.flatten())
    g = torch.cat([p.flatten() for p in torch.autograd.grad(loss(model(x), y), list(model.parameters()))])
    expected = -torch.linalg.solve(j.T @ h @ j + 0.1 * torch.eye(len(g)), g)
    direction = gauss_newton_direction(model, loss, x, y, 0.1, tolerance=1e-13)
    close(flat(model, direction), expected, 1e-11)


Shifts = dict[str, Tensor]


def run_shifted(model: nn.Module, x: Tensor, shifts: Shifts) -> tuple[Tensor, Shifts, Shifts]:
    """Output for one sample with `shifts` added to the layers' potentials; the inputs and potentials of the layers."""
    given: Shifts = {}
    potentials: Shifts = {}

    def shift(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], v: Tensor) -> Tensor:
            given[name], potentials[name] = args[0], v
            return v + shifts.get(name, 0)

        return hook

    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    hooks = [layer.register_forward_hook(shift(name)) for name, layer in layers.items()]
    output = model(x[None]).flatten()
    for hook in hooks:
        hook.remove()
    return output, given, potentials


@pytest.mark.parametrize(("name", "last"), [("tanh", "4"), ("conv", "6"), ("bare", "")])
@pytest.mark.parametrize("difference", ["rate", "voltage"])
def test_minimum_norm_update(name: str, last: str, difference: str) -> None:
    """Per sample, with J = d r_L / d v by autograd through shifts of every potential; every activation below is tanh."""
    make, shape = MODELS[name]
    model = make()
    x, delta, damping = torch.randn(4, *shape), 0.3 * torch.randn(4, 3), 0.1
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for sample, d in zip(x, delta, strict=True):
        _, given, potentials = run_shifted(model, sample, {})
        zeros = {n: torch.zeros_like(v) for n, v in potentials.items()}
        blocks = jacrev(lambda shifts, sample=sample: run_shifted(model, sample, shifts)[0])(zeros)
        j = torch.cat([blocks[n].reshape(3, -1) for n in zeros], 1).detach()
        dv = torch.linalg.solve(j.T @ j + damping * torch.eye(j.shape[1]), j.T @ d)
        parts = dv.split([v.numel() for v in potentials.values()])
        for (n, v), part in zip(potentials.items(), parts, strict=True):
            step = part.view_as(v)
            if difference == "rate" and n != last:
                step = torch.tanh(v + step) - torch.tanh(v)
            layer = model.get_submodule(n)
            own = dict(layer.named_parameters())
            changes = torch.autograd.grad(layer(given[n].detach()), list(own.values()), step / 4)
            for parameter, change in zip(own, changes, strict=True):
                expected[f"{n}.{parameter}" if n else parameter] += change
    update = minimum_norm_update(Chain(model, shape), x, delta, damping, difference)
    close(flat(model, update), flat(model, expected), 1e-11)


def equal_norms(model: nn.Sequential, x: Tensor) -> None:
    """Scale the layers (biases to zero) of a homogeneous net so that |r_0| = |r_1| = ... for the sample x."""
    with torch.no_grad():
        r = x
        for layer in model[:-1]:
            if isinstance(layer, nn.Linear):
                layer.bias.zero_()
                layer.weight *= x.norm() / F.leaky_relu(layer(r), 0.3).norm()
            r = layer(r)


def steady_update(model: nn.Sequential, x: Tensor, delta: Tensor, feedback: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Linearised steady state of feedback control without leak: v - v^ff = Q (J Q)^-1 delta, times r_{i-1}^T."""
    states = Chain(model).run(x[None])
    sizes = [v.shape[1] for v in states.v]

    def output(shift: Tensor) -> Tensor:
        r = x
        for layer, part in zip(model[::2], shift.split(sizes), strict=True):
            v = layer(r) + part
            r = F.leaky_relu(v, 0.3)
        return v

    j = jacrev(output)(torch.zeros(sum(sizes))).detach()
    q = feedback(j)
    push = (q @ torch.linalg.solve(j @ q, delta)).split(sizes)
    names = [str(i) for i in range(0, len(model), 2)]
    update = {f"{n}.weight": torch.outer(p, r[0]) for n, p, r in zip(names, push, states.r, strict=False)}
    return update | {f"{n}.bias": p for n, p in zip(names, push, strict=True)}


M = torch.tensor([[1.0, 2.0, 0.0], [-1.0, 0.5, 1.0], [0.3, 0.0, 2.0]])
FEEDBACKS = {"transpose": lambda j: j.T, "pseudoinverse": torch.linalg.pinv, "any basis": lambda j: j.T @ M.to(j)}


@pytest.mark.parametrize("feedback", FEEDBACKS.values(), ids=FEEDBACKS)
def test_theorems_2_and_3(feedback: Callable[[Tensor], Tensor]) -> None:
    """Feedback in the row space of J gives the minimum-norm update; with equal layer norms that is Gauss-Newton."""
    model = tanh_net(6, 5, 4, 3, act=lambda: nn.LeakyReLU(0.3))
    x, delta = torch.randn(6), torch.randn(3)
    for equal in (False, True):
        if equal:
            equal_norms(model, x)
        asked = steady_update(model, x, delta, feedback)
        norm = minimum_norm_update(Chain(model), x[None], delta[None], 0.0, "voltage")
        newton = gauss_newton_update(model, x[None], delta[None], 0.0)
        close(flat(model, norm), flat(model, asked), 1e-11)
        degrees = angle(flat(model, newton), flat(model, asked))
        assert (degrees < 1e-6) if equal else (degrees > 0.1)


class Wanted(CreditRule):
    """Asks for given changes of the parameters, and notes the mode of its model."""

    def __init__(self, model: nn.Module, changes: dict[str, Tensor]) -> None:
        super().__init__(model, F.mse_loss)
        self.changes = changes

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        assert not self.model.training
        output = self.model(inputs)
        roots = [p for n, p in self.model.named_parameters() if n in self.changes]
        signals = [-self.changes[n] for n, _ in self.model.named_parameters() if n in self.changes]
        return Credit(roots, signals, output, self.loss(output, targets))


def test_alignment_of_a_rule_that_asks_for_the_gauss_newton_update() -> None:
    """And of one that adds to one layer's bias a vector as long as that layer's update, at a right angle to it."""
    model, x, y = tanh_net(5, 4, 3), torch.randn(8, 5), torch.randn(8, 3)
    delta = -2 * (model(x).detach() - y) / 3  # the mean over 3 outputs
    update = gauss_newton_update(model, x, delta, 0.5)
    angles = gauss_newton_alignment(Wanted(model, update), x, y, 0.5)
    assert list(angles) == ["0", "2", "all"]
    assert max(angles.values()) < 1e-6

    bias, weight = update["2.bias"], update["2.weight"]
    aside = torch.randn(3)
    aside -= bias * (aside @ bias) / (bias @ bias)
    length = (weight.square().sum() + bias.square().sum()).sqrt()
    turned = update | {"2.bias": bias + aside * length / aside.norm()}
    angles = gauss_newton_alignment(Wanted(model, turned), x, y, 0.5)
    assert angles["0"] < 1e-6
    assert angles["2"] == pytest.approx(45, abs=1e-9)
    assert angles["all"] == pytest.approx(math.degrees(math.atan(float(length / flat(model, update).norm()))), abs=1e-9)


def test_minimum_norm_alignment_uses_the_nudge() -> None:
    model, x, y = tanh_net(5, 4, 3), torch.randn(8, 5), torch.randn(8, 3)
    delta = -2 * (model(x).detach() - y) / 3
    update = minimum_norm_update(Chain(model), x, 2.0 * delta, 0.1)
    rule = Wanted(model, update)
    assert max(minimum_norm_alignment(rule, x, y, nudge=2.0).values()) < 1e-6
    assert minimum_norm_alignment(rule, x, y)["all"] > 0.1
    rule.nudge = 2.0
    assert max(minimum_norm_alignment(rule, x, y).values()) < 1e-6


def test_huge_damping_turns_gauss_newton_into_the_gradient() -> None:
    """J^T (J J^T + g I)^-1 delta -> J^T delta / g: backpropagation, also through batch normalisation and dropout."""
    make, shape = MODELS["norm"]
    model = make()
    rule = apical.Backprop(model, loss=F.cross_entropy)
    model[1].running_mean.uniform_(-1, 1)
    before = {name: value.clone() for name, value in rule.state_dict().items()}
    x, y = torch.randn(8, *shape), torch.arange(8) % 3
    assert max(gauss_newton_alignment(rule, x, y, 1e9).values()) < 1e-5
    assert gauss_newton_alignment(rule, x, y, 0.01)["all"] > 1
    assert all(torch.equal(value, before[name]) for name, value in rule.state_dict().items())
    assert all(module.training for module in rule.modules())
    assert all(p.grad is None for p in rule.parameters())


def test_only_what_the_rule_trains_is_compared() -> None:
    model, x, y = tanh_net(5, 4, 3), torch.randn(8, 5), torch.randn(8, 3)
    delta = -2 * (model(x).detach() - y) / 3
    update = gauss_newton_update(model, x, delta, names=["2.weight"])
    angles = gauss_newton_alignment(Wanted(model, update), x, y)
    assert list(angles) == ["2", "all"]
    assert angles["all"] < 1e-6


@pytest.mark.parametrize("shape", [(5,), (3, 5)], ids=["one system", "three systems"])
def test_conjugate_gradients(shape: tuple[int, ...]) -> None:
    root = torch.randn(*shape[:-1], 5, 5)
    matrix = root @ root.mT + torch.eye(5)
    x = torch.randn(shape)
    right = (matrix @ x[..., None])[..., 0]
    for scale in (1.0, 1e-200):
        solved = conjugate_gradient(lambda z: (matrix @ z[..., None])[..., 0], scale * right)
        close(solved / scale, x, 1e-12)
    zero = torch.zeros(shape)
    assert torch.equal(conjugate_gradient(lambda z: (matrix @ z[..., None])[..., 0], zero), zero)


def test_conjugate_gradients_say_when_they_fail() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(ConfigError, match=r"did not converge in 2 iterations.*raise the damping"):
        conjugate_gradient(lambda z: matrix @ z, torch.ones(3), iterations=2)
    assert conjugate_gradient(lambda z: matrix @ z, torch.ones(3), iterations=3).sum() == pytest.approx(1 + 1 / 2 + 1 / 3)


def test_errors() -> None:
    model, x, delta = tanh_net(5, 3), torch.randn(2, 5), torch.randn(2, 3)
    with pytest.raises(ConfigError, match="damping must not be negative; got -1"):
        gauss_newton_update(model, x, delta, -1)
    with pytest.raises(ConfigError, match=r"no parameter '7\.weight'; known: 0\.weight, 0\.bias"):
        gauss_newton_update(model, x, delta, names=["7.weight"])
    with pytest.raises(ConfigError, match="'rate' or 'voltage', not 'volts'"):
        minimum_norm_update(Chain(model), x, delta, difference="volts")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no parameter that requires a gradient"):
        gauss_newton_update(model.requires_grad_(False), x, delta)
    mixing = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(UnsupportedModelError, match=r"module '1' .BatchNorm1d. normalises over the batch even"):
        gauss_newton_update(mixing, x, delta)
    assert mixing.training


def test_a_rule_whose_nudge_is_a_word_is_measured_with_the_default() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    rule, x, y = apical.CorInfoMax(model), torch.randn(16, 6), torch.arange(16) % 3
    assert rule.nudge == "random-sign"
    assert minimum_norm_alignment(rule, x, y) == minimum_norm_alignment(rule, x, y, nudge=1e-3)


@pytest.mark.parametrize("number", [math.nan, math.inf, -1.0])
def test_numbers_out_of_range_are_refused_not_returned_as_nan(number: float) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    rule, inputs, targets = apical.FeedbackAlignment(model), torch.randn(6, 4), torch.arange(6) % 3
    with pytest.raises(ConfigError, match="damping"):
        gauss_newton_alignment(rule, inputs, targets, number)
    with pytest.raises(ConfigError, match="damping"):
        minimum_norm_alignment(rule, inputs, targets, number)
    with pytest.raises(ConfigError, match="nudge"):
        minimum_norm_alignment(rule, inputs, targets, nudge=number)
    with pytest.raises(ConfigError, match="tolerance"):
        gauss_newton_direction(model, nn.functional.cross_entropy, inputs, targets, tolerance=number)
    with pytest.raises(ConfigError, match="noise"):
        channel(model, inputs, noise=number)
