"""The simulated loop against the slow re-implementation; its noise, its options and its refusals. float64."""

import math

import pytest
import torch
from tests.rules import dfc_reference as ref
from torch import Tensor, nn

from apical.core.chain import Chain, States
from apical.errors import ConfigError, InstabilityError
from apical.rules.feedback_control.states import product_feedback
from apical.rules.feedback_control.trajectory import Loop, Moment, end, record, trajectory

OPTIONS = {"alpha": 0.2, "k_p": 0.4, "dt": 0.1, "points": 12, "tau": 0.25}
ORDERS = [(proactive, instant) for proactive in (True, False) for instant in (True, False)]


def problem(conv: bool = False) -> tuple[Chain, ref.Net, Tensor, States, list[Tensor], Tensor]:
    model, net = ref.conv_net() if conv else ref.mlp((5, 6, 4, 3), nn.Tanh())
    model.requires_grad_(False)
    shape = (2, 6, 6) if conv else (5,)
    chain = Chain(model, shape)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2, *shape, dtype=torch.double, generator=generator)
    delta = torch.randn(2, 3, dtype=torch.double, generator=generator)
    return chain, net, inputs, chain.run(inputs), product_feedback(chain), delta


@pytest.mark.parametrize("conv", [False, True], ids=["mlp", "conv"])
@pytest.mark.parametrize("leak", ["code", "paper"])
@pytest.mark.parametrize(("proactive", "instant"), ORDERS)
def test_moments_are_the_points_of_the_slow_loop(proactive: bool, instant: bool, leak: str, conv: bool) -> None:
    chain, net, inputs, states, feedback, delta = problem(conv)
    loop = Loop(**OPTIONS, leak=leak, proactive=proactive, instant_transmission=instant)
    options = {"leak": leak, "proactive": proactive, "instant_transmission": instant, **OPTIONS}
    histories = [ref.simulate(net, x, feedback, d, **options) for x, d in zip(inputs, delta, strict=True)]
    for basal in (True, False):
        times = []
        for moment in trajectory(chain, states, feedback, lambda rho: delta - rho, loop, basal=basal):
            times.append(moment.time)
            assert (moment.basal is not None) == basal
            for sample, history in enumerate(histories):
                point, before = history[moment.time], history[moment.time - 1]
                target = history[0].r[-1] + delta[sample]
                torch.testing.assert_close(moment.e[sample], target - before.r[-1], rtol=0, atol=1e-13)
                torch.testing.assert_close(moment.u[sample], point.u, rtol=0, atol=1e-13)
                for i in range(len(net)):
                    shifts = [
                        (moment.d[i], point.v[i] - history[0].v[i]),
                        (moment.rho[i], point.r[i + 1] - history[0].r[i + 1]),
                    ]
                    if basal:
                        shifts += [
                            (moment.basal[i], point.basal[i] - history[0].basal[i]),
                            (moment.apical[i], point.apical[i]),
                        ]
                    for ours, theirs in shifts:
                        torch.testing.assert_close(ours[sample], theirs, rtol=0, atol=1e-13)
        assert times == list(range(1, OPTIONS["points"]))


@pytest.mark.parametrize(("proactive", "instant"), ORDERS)
def test_end_gives_the_basal_compartments_of_the_last_instant(proactive: bool, instant: bool) -> None:
    chain, _, _, states, feedback, delta = problem()
    loop = Loop(**OPTIONS, proactive=proactive, instant_transmission=instant)

    def walk(basal: bool) -> tuple[Moment, list[Tensor]]:
        return end(chain, trajectory(chain, states, feedback, lambda rho: delta - rho, loop, basal=basal))

    (last, carried), (_, remade) = walk(True), walk(False)
    assert last.time == OPTIONS["points"] - 1
    for ours, theirs in zip(remade, carried, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    assert carried[2].abs().max() > 1e-3


def test_record_starts_at_the_feed_forward_state() -> None:
    chain, _, _, states, feedback, delta = problem()
    trace = record(states, trajectory(chain, states, feedback, lambda rho: delta - rho, Loop(**OPTIONS)), 0.1)
    assert trace.times.tolist() == pytest.approx([0.1 * t for t in range(12)])
    assert trace.u.shape == (12, 2, 3)
    assert not trace.u[0].any()
    for soma, basal, apical, v in zip(trace.soma, trace.basal, trace.apical, states.v, strict=True):
        assert torch.equal(soma[0], v)
        assert torch.equal(basal[0], v)
        assert not apical[0].any()
    assert torch.equal(trace.output[0], states.r[-1])


def test_instant_system_has_its_potentials_at_their_input() -> None:
    chain, _, _, states, feedback, delta = problem()
    for basal in (True, False):
        loop = Loop(**OPTIONS | {"k_p": 0.05}, instant_system=True)
        for moment in trajectory(chain, states, feedback, lambda rho: delta - rho, loop, basal=basal):
            for i, (d, q) in enumerate(zip(moment.d, feedback, strict=True)):
                given = moment.rho[i - 1] @ chain.weights[i].T if i else 0
                torch.testing.assert_close(d, given + moment.u @ q.T, rtol=0, atol=1e-13)


def test_apical_compartment_is_a_low_pass_of_the_control() -> None:
    chain, _, _, states, feedback, delta = problem()
    expected = [torch.zeros(2, len(q), dtype=torch.double) for q in feedback]
    for moment in trajectory(chain, states, feedback, lambda rho: delta - rho, Loop(**OPTIONS, tau_apical=0.4)):
        expected = [old + 0.1 / 0.4 * (moment.u @ q.T - old) for old, q in zip(expected, feedback, strict=True)]
        for ours, theirs in zip(moment.apical, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


NOISES = {  # x' = (1 - r) x + sqrt(dt)/tau xi with r = dt/tau
    "filtered": ({"tau_apical": 0.04}, 0.04),
    "added": ({"tau_noise": 0.04}, 0.04),
    "white": ({}, 0.01),
}


@pytest.mark.parametrize("name", NOISES)
def test_noise_has_the_stationary_variance_of_its_equation(name: str) -> None:
    options, tau = NOISES[name]
    rate = 0.01 / tau
    variance = 0.01 / tau**2 / (1 - (1 - rate) ** 2)
    chain = Chain(nn.Sequential(nn.Linear(2, 40), nn.Tanh(), nn.Linear(40, 30)).double().requires_grad_(False))
    states = chain.run(torch.zeros(500, 2, dtype=torch.double))
    silent = [torch.zeros(n, 30, dtype=torch.double) for n in (40, 30)]
    for sigma_output in (None, 0.02, 0.0):
        loop = Loop(0.1, 0.0, 0.01, 60, 0.05, sigma=0.1, sigma_output=sigma_output, **options)
        torch.manual_seed(0)
        *_, last = trajectory(chain, states, silent, torch.neg, loop, basal=False)
        for fed, sigma in zip(last.apical, (0.1, 0.1 if sigma_output is None else sigma_output), strict=True):
            assert float(fed.var()) == pytest.approx(sigma**2 * variance, rel=0.05)
            if sigma:
                assert abs(float(fed.mean())) < 5 * sigma * math.sqrt(variance / fed.numel())
        assert float(last.d[0].var()) > 0  # it drives the potentials


def test_divergence_is_an_error_that_names_the_step_and_the_gain() -> None:
    linear = Chain(nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 3)).double().requires_grad_(False))
    states = linear.run(torch.zeros(2, 5, dtype=torch.double))
    wrong = [-q for q in product_feedback(linear)]
    loop = Loop(0.0, 50.0, 0.1, 2000, 0.1)
    moments = trajectory(linear, states, wrong, lambda rho: 1 - rho, loop)
    seen: list[int] = []
    with pytest.raises(InstabilityError, match=r"diverged within \d+ steps of dt=0\.1, k_p=50"):
        seen.extend(moment.time for moment in moments)
    assert 0 < len(seen) < 1900


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": 0.0}, "dt must be positive"),
        ({"dt": float("nan")}, "dt must be positive"),
        ({"tau": -1.0}, "tau must be positive"),
        ({"tau_apical": 0.0}, "tau_apical must be positive"),
        ({"tau_noise": float("inf")}, "tau_noise must be positive"),
        ({"alpha": -0.1}, "alpha must not be negative"),
        ({"k_p": -0.1}, "k_p must not be negative"),
        ({"sigma": -0.1}, "sigma must not be negative"),
        ({"tau": 0.05}, "tau=0.05 must not be smaller than the step dt=0.1"),
        ({"tau_apical": 0.05}, "tau_apical=0.05 must not be smaller"),
        ({"tau_noise": 0.05}, "tau_noise=0.05 must not be smaller"),
        ({"points": 1}, "points must be a whole number, at least 2"),
        ({"leak": "papers"}, "leak must be"),
    ],
)
def test_loops_that_make_no_sense_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Loop(**OPTIONS | change)


def test_steady_error_per_control() -> None:
    """e = a u at rest: alpha for the leak of the code, alpha / (1 + alpha k_p) for the paper's."""
    assert Loop(**OPTIONS).a == 0.2
    assert Loop(**OPTIONS, leak="paper").a == pytest.approx(0.2 / 1.08)
    chain, _, _, states, feedback, delta = problem()
    for leak in ("code", "paper"):
        loop = Loop(**OPTIONS | {"points": 800}, leak=leak)
        last, _ = end(chain, trajectory(chain, states, feedback, lambda rho: 0.1 * delta - rho, loop))
        torch.testing.assert_close(0.1 * delta - last.rho[-1], loop.a * last.u, rtol=1e-9, atol=1e-12)
