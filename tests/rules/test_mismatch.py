"""The recursion of the mismatch against two explicit matrices under torch's own SGD."""

import math

import pytest
import torch
from torch import Tensor, nn

from apical.rules.plastic_feedback.mismatch import Mismatch


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


@pytest.mark.parametrize("jumps", [False, True], ids=["steady", "jumps"])
@pytest.mark.parametrize("name", SGD)
def test_the_mismatch_obeys_the_optimiser_without_a_gradient(name: str, jumps: bool) -> None:
    """300 steps with schedules of rate and decay; with jumps W is moved from outside ten times, and R is not."""
    b = torch.linalg.qr(torch.randn(4, 4))[0]
    w, r = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(4, 5))
    mismatch = Mismatch((b @ r - w).detach())
    mismatch.follow(w.detach())
    optimizer = torch.optim.SGD([w, r], lr=0.05, **SGD[name])
    (group,), decay = optimizer.param_groups, optimizer.param_groups[0]["weight_decay"]
    for step in range(300):
        group["lr"] = 0.05 * (1 + math.cos(math.pi * step / 300)) + 0.001
        group["weight_decay"] = decay * (3.0 if step < 50 else 0.5)
        w.grad = torch.randn(4, 5)
        r.grad = b.T @ w.grad
        if jumps and step % 30 == 7:
            w.data.mul_(torch.rand(4, 5) > 0.3)
            mismatch.measure(w.detach())
        first = "momentum_buffer" not in optimizer.state[w]
        optimizer.step()
        mismatch.advance(group, first)
        mismatch.follow(w.detach())
        assert torch.allclose(mismatch.feedback, b @ r.detach(), rtol=0, atol=1e-12 * float(r.detach().abs().max()))
    assert jumps or name == "no-decay" or 1e-4 < abs(mismatch.c[0]) < 1 - 1e-3  # it moved, and did not merely vanish
    if SGD[name].get("momentum"):
        momentum = b @ optimizer.state[r]["momentum_buffer"] - optimizer.state[w]["momentum_buffer"]
        assert torch.allclose(mismatch.drift(), momentum, rtol=0, atol=1e-12)


def test_plain_decay_by_hand() -> None:
    """Without momentum `c_t = (1 - lr decay)^t`."""
    mismatch = Mismatch(torch.ones(2, 2))
    for _ in range(5):
        mismatch.advance({"lr": 0.1, "weight_decay": 0.2, "momentum": 0.0}, first=True)
    assert abs(mismatch.c[0] - 0.98**5) < 1e-15


def test_momentum_by_hand() -> None:
    """Two steps with rate 1 and decay 1/2: v = 1/2, c = 1/2; then v = (1/2)(1/2) + (1/2)(1/2), c = 1/2 - 1/2."""
    mismatch = Mismatch(torch.ones(2, 2))
    group = {"lr": 1.0, "weight_decay": 0.5, "momentum": 0.5, "dampening": 0.0, "nesterov": False}
    mismatch.advance(group, first=True)
    assert (mismatch.c[0], mismatch.v[0]) == (0.5, 0.5)
    mismatch.advance(group, first=False)
    assert (mismatch.c[0], mismatch.v[0]) == (0.0, 0.5)


def test_what_single_precision_cannot_hold_is_infinite() -> None:
    """A training that diverges says so; PyTorch raises where a number does not fit into a tensor's kind."""
    ones = torch.ones(2, 2, dtype=torch.float32)
    mismatch = Mismatch(ones, ones)
    for c in ([1e60, 0.0], [-1e60, 0.0], [0.0, 1e60]):
        mismatch.c = mismatch.v = c
        wanted = ones * (sum(c) * torch.inf)
        assert torch.equal(mismatch.matched(ones), wanted)
        assert torch.equal(mismatch.drift(), wanted)


def test_its_numbers_stay_in_double_precision() -> None:
    mismatch = Mismatch(torch.ones(2, 2)).half()
    mismatch.c, mismatch.v = [1 / 3, 0.0], [1 / 7, 1.0]
    other = Mismatch(torch.zeros(2, 2)).half()
    other.load_state_dict(mismatch.state_dict())
    assert (other.c, other.v) == (mismatch.c, mismatch.v)


def test_tiny_coefficients_make_no_denormal_numbers() -> None:
    mismatch = Mismatch(torch.ones(3))
    mismatch.c[0] = 1e-310
    weight: Tensor = torch.zeros(3)
    assert torch.equal(mismatch.matched(weight), weight)
