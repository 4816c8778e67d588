"""`E_t = c_t E_0` against two explicit matrices, and what the closed form must refuse."""

import math

import pytest
import torch
from torch import Tensor, nn

import apical
from apical.core.mismatch import Mismatch, matched, probe_gradient
from apical.core.units import key
from apical.errors import ConfigError


@pytest.fixture(autouse=True)
def _double() -> object:
    torch.set_default_dtype(torch.double)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float)


SGD = {
    "plain": {"weight_decay": 0.05},
    "momentum": {"momentum": 0.9, "weight_decay": 0.01},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "dampening": {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.01},
    "maximize": {"weight_decay": 0.05, "maximize": True},
    "no-decay": {"momentum": 0.9},
}


def simulate(options: dict[str, object], steps: int = 300, clip: float = math.inf) -> tuple[Tensor, Tensor, Tensor]:
    """`E_0`, `E_t = R - B^T W` of two matrices trained explicitly with schedules of rate and decay, and c_t."""
    b = torch.randn(4, 6) / 2
    w, r = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(6, 5))
    mismatch = Mismatch((r - b.T @ w).detach())
    optimizer = torch.optim.SGD([w, r, mismatch.scale], lr=0.05, **options)
    decay = optimizer.param_groups[0]["weight_decay"]
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 + math.cos(math.pi * step / steps)) + 0.001
            group["weight_decay"] = decay * (3.0 if step < 50 else 0.5)
        w.grad = torch.randn(4, 5)
        r.grad = b.T @ w.grad
        mismatch.scale.grad = probe_gradient(mismatch.scale.detach())
        if clip < math.inf:
            norm = torch.nn.utils.clip_grad_norm_([w, r, mismatch.scale], clip)
            assert norm > clip  # it really acts
        optimizer.step()
    mismatch.check_optimizer("the rule", w)
    return mismatch.initial, (r - b.T @ w).detach(), mismatch.scale.detach()[0, 0]


@pytest.mark.parametrize("name", SGD)
@pytest.mark.parametrize("clip", [math.inf, 1.0], ids=["free", "clipped"])
def test_the_mismatch_is_its_first_value_times_a_scalar(name: str, clip: float) -> None:
    initial, after, c = simulate(SGD[name], clip=clip)
    if name == "no-decay":
        assert c == 1.0
    else:
        assert abs(float(c) - 1.0) > 1e-3  # it moved, and did not merely vanish
        assert abs(float(c)) > 1e-4
    assert float((after - c * initial).norm() / initial.norm()) < 1e-12


def test_plain_decay_by_hand() -> None:
    """Without momentum `c_t = (1 - lr decay)^t`; the probes follow `p <- (1 - lr decay) p - lr g`."""
    scale = Mismatch(torch.ones(2, 2)).scale
    optimizer = torch.optim.SGD([scale], lr=0.1, weight_decay=0.2)
    for _ in range(5):
        scale.grad = probe_gradient(scale.detach())
        optimizer.step()
    assert abs(float(scale[0, 0].detach()) - 0.98**5) < 1e-15
    one = -0.1 * float(probe_gradient(scale)[0, 1]) * sum(0.98**k for k in range(5))
    assert abs(float(scale[0, 1].detach()) / one - 1) < 1e-12
    assert abs(float(scale[0, 2].detach()) / (2 * one) - 1) < 1e-12


def test_matched() -> None:
    weight, initial, scale = torch.randn(3, 2), torch.randn(3, 2), torch.tensor([[0.25, 9.0, 9.0]])
    assert torch.allclose(matched(weight, initial, scale), weight + 0.25 * initial, atol=1e-15)


def test_the_mismatch_is_a_buffer_and_its_scale_a_parameter_of_two_dimensions() -> None:
    mismatch = Mismatch(torch.ones(2, 2))
    assert list(mismatch.state_dict()) == ["scale", "initial"]
    assert [(name, p.dim()) for name, p in mismatch.named_parameters()] == [("scale", 2)]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 4))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=generator), torch.randint(0, 4, (8,), generator=generator)


@pytest.mark.parametrize("options", SGD.values(), ids=SGD)
def test_closed_and_explicit_kolen_pollack_take_the_same_path(options: dict[str, object]) -> None:
    """150 steps with a rate schedule: all weights and the feedback agree."""
    torch.manual_seed(1)
    closed = apical.KolenPollack(net(), form="closed")
    torch.manual_seed(1)
    explicit = apical.KolenPollack(net(), form="explicit")
    for name, value in closed.feedback_weights().items():
        explicit.feedback[key(name)].data.copy_(value)
    for rule in (closed, explicit):
        optimizer = torch.optim.SGD(rule.parameters(), lr=0.05, **options)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)
        for step in range(150):
            optimizer.zero_grad()
            rule(*batch(step)).backward()
            optimizer.step()
            scheduler.step()
    for name, value in explicit.feedback_weights().items():
        assert torch.allclose(closed.feedback_weights()[name], value, rtol=0, atol=1e-10 * float(value.abs().max()))
    for a, b in zip(closed.model.parameters(), explicit.model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-10 * float(b.detach().abs().max()))


def train(rule: apical.CreditRule, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        rule(*batch(step)).backward()
        optimizer.step()


NONLINEAR = {
    "adam": (torch.optim.Adam, 4),
    "adamw": (torch.optim.AdamW, 4),
    "rmsprop": (torch.optim.RMSprop, 4),
    "adagrad": (torch.optim.Adagrad, 4),
    "nadam": (torch.optim.NAdam, 4),
    "adamax": (torch.optim.Adamax, 4),
    "rprop": (torch.optim.Rprop, 4),
    "radam": (torch.optim.RAdam, 101),
    "adadelta": (torch.optim.Adadelta, 101),
}


@pytest.mark.parametrize("rule", [apical.KolenPollack, apical.ProductFeedbackAlignment], ids=["kp", "pfa"])
@pytest.mark.parametrize("name", NONLINEAR)
def test_a_nonlinear_optimiser_is_refused_with_the_remedy(rule: type[apical.KolenPollack], name: str) -> None:
    make, steps = NONLINEAR[name]
    each = rule(net())
    with pytest.raises(ConfigError, match=f'{type(each).__name__}.*SGD.*form="explicit"'):
        train(each, make(each.parameters()), steps)


@pytest.mark.parametrize("rule", [apical.KolenPollack, apical.ProductFeedbackAlignment], ids=["kp", "pfa"])
def test_the_remedy_works(rule: type[apical.KolenPollack]) -> None:
    each = rule(net(), form="explicit")
    train(each, torch.optim.Adam(each.parameters()), 4)


def test_clipping_by_value_is_refused() -> None:
    """It is not linear where it acts; a threshold below the probes acts on them."""
    rule = apical.KolenPollack(net())
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.1, weight_decay=0.01)
    optimizer.register_step_pre_hook(lambda *args: torch.nn.utils.clip_grad_value_(rule.parameters(), 5e-5))
    with pytest.raises(ConfigError, match="linear"):
        train(rule, optimizer, 4)


@pytest.mark.parametrize("options", SGD.values(), ids=SGD)
def test_every_sgd_is_accepted(options: dict[str, object]) -> None:
    rule = apical.KolenPollack(net())
    train(rule, torch.optim.SGD(rule.parameters(), lr=0.05, **options), 101)


def test_gradient_accumulation_is_accepted() -> None:
    rule = apical.KolenPollack(net())
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    for step in range(12):
        rule(*batch(step)).backward()
        if step % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("rule", [apical.KolenPollack, apical.ProductFeedbackAlignment], ids=["kp", "pfa"])
def test_an_optimiser_without_the_scale_is_refused(rule: type[apical.KolenPollack]) -> None:
    """SGD over `model.parameters()`: W decays, the mismatch never does, and nothing would ever align."""
    each = rule(net())
    with pytest.raises(ConfigError, match="parameters"):
        train(each, torch.optim.SGD(each.model.parameters(), lr=0.05, weight_decay=0.01), 101)
