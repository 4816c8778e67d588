"""Neurons that fire once: times against a simulation, derivatives, identities, and the rules that train them."""

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical import models
from apical.core.credit import CreditRule
from apical.core.layers import is_affine
from apical.core.spike_times import SpikeTimes, spike_gradients, spike_times
from apical.diagnostics.coding import activities
from apical.errors import ConfigError, UnsupportedModelError
from apical.models import FirstSpike, FirstSpikeNetwork, Readout, SpikingLinear
from apical.testing import check_model

RULES: dict[str, Callable[[nn.Module], CreditRule]] = {
    "bp": apical.Backprop,
    "fa": apical.FeedbackAlignment,
    "usf": apical.SignSymmetry,
    "kp": apical.KolenPollack,
    "pfa": apical.ProductFeedbackAlignment,
    "wm": apical.WeightMirror,
}


def layer_times(seed: int = 0, silent: int = 2) -> tuple[Tensor, Tensor]:
    """Input times (5, 12), some of them infinite, and weights (6, 12)."""
    drawn = torch.Generator().manual_seed(seed)
    t = torch.rand(5, 12, generator=drawn, dtype=torch.double)
    t[0, :silent] = torch.inf
    return t, 0.25 + 0.4 * torch.randn(6, 12, generator=drawn, dtype=torch.double)


def simulated(t: Tensor, weight: Tensor, theta: float, until: float, steps: int) -> Tensor:
    """First time on a grid with a potential of theta, by brute force; infinity where there is none until then."""
    grid = torch.linspace(0, until, steps, dtype=t.dtype)
    kernel = (grid.view(-1, 1, 1) - t).clamp_min(0.0)  # max(t - t_i, 0), zero of silent inputs
    crossed = kernel @ weight.T >= theta
    first = grid[crossed.to(torch.int8).argmax(0)]
    return first.masked_fill(~crossed.any(0), torch.inf)


def test_times_are_those_of_a_simulation() -> None:
    t, weight = layer_times()
    times, slope = spike_times(t, weight, 1.0)
    grid = simulated(t, weight, 1.0, until=20.0, steps=20001)
    fires = grid.isfinite()
    assert torch.equal(times <= 20.0, fires)
    assert bool(fires.any())
    assert float((times - grid)[fires].abs().max()) <= 1.001e-3
    causal = (t.unsqueeze(1) < times.unsqueeze(2)).double()
    assert torch.allclose((causal * weight).sum(2)[fires], slope[fires], atol=1e-12)


def test_a_neuron_may_be_silent_although_its_last_slope_is_negative() -> None:
    weight = torch.tensor([[1.0, -2.0]]).double()
    assert spike_times(torch.tensor([[0.0, 0.5]]).double(), weight, 1.0)[0].isinf().all()
    assert spike_times(torch.tensor([[0.0, 1.5]]).double(), weight, 1.0)[0].item() == pytest.approx(1.0)  # before the second
    assert spike_times(torch.full((1, 2), math.inf).double(), weight, 1.0)[0].isinf().all()


def test_derivatives_are_those_of_finite_differences() -> None:
    t, weight = layer_times(silent=0)

    def finite(t: Tensor, weight: Tensor) -> Tensor:
        times: Tensor = cast(Any, SpikeTimes).apply(t, weight, 1.0, 0.0)
        return torch.where(times.isfinite(), times, 0.0)

    assert torch.autograd.gradcheck(finite, (t.requires_grad_(), weight.requires_grad_()), eps=1e-7, atol=1e-6)


def test_identities_of_the_closed_form() -> None:
    t, weight = layer_times(silent=0)
    times, slope = spike_times(t, weight, 1.0)
    fires = times.isfinite()
    later, _ = spike_times(t + 0.37, weight, 1.0)
    assert torch.allclose(later[fires], times[fires] + 0.37, atol=1e-12)
    scaled, _ = spike_times(t, 3 * weight, 3.0)
    assert torch.allclose(scaled[fires], times[fires], atol=1e-12)
    one = torch.ones_like(times)
    below, _ = spike_gradients(t, times, slope, weight, one)
    assert torch.allclose(below.sum(1), fires.double().sum(1), atol=1e-10)  # sum_i dt_j / dt_i = 1
    late = torch.cat([t, torch.full((5, 1), 50.0).double()], 1)
    added, _ = spike_times(late, torch.cat([weight, torch.ones(6, 1).double()], 1), 1.0)
    assert torch.equal(added[times < 50], times[times < 50])
    for i, j in ((i, j) for i in range(12) for j in range(6)):
        raised = weight.clone()
        raised[j, i] += 0.01
        causal = fires[:, j] & (t[:, i] < times[:, j])
        assert bool((spike_times(t, raised, 1.0)[0][causal, j] < times[causal, j]).all())
    single, _ = spike_times(torch.tensor([[0.3]]).double(), torch.tensor([[2.5]]).double(), 1.0)
    assert single.item() == pytest.approx(0.3 + 1 / 2.5)


def test_scale_of_weights_and_threshold() -> None:
    """sum_i w_ji dt_j/dw_ji + theta dt_j/dtheta = 0, with dt_j/dtheta = 1 / S_j."""
    t, weight = layer_times(silent=0)
    times, slope = spike_times(t, weight, 1.0)
    for b, j in times.isfinite().nonzero()[:4].tolist():
        g = torch.zeros_like(times)
        g[b, j] = 1.0
        _, products = spike_gradients(t, times, slope, weight, g)
        assert float((weight * products).sum() + 1 / slope[b, j]) == pytest.approx(0.0, abs=1e-10)


def test_samples_in_turn_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for chunk in (1_000_000, 1):
        monkeypatch.setattr("apical.core.spike_times.CHUNK", chunk)
        t, weight = (each.requires_grad_() for each in layer_times())
        times = cast(Any, SpikeTimes).apply(t, weight, 1.0, 0.1)
        times.masked_fill(times.isinf(), 0.0).square().sum().backward()
        found.append((times.detach(), t.grad, weight.grad))
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, atol=1e-12)


def network() -> FirstSpikeNetwork:
    """12-9-4."""
    torch.manual_seed(1)
    return models.first_spike(12, [9], 4).double()


def batch() -> tuple[Tensor, Tensor]:
    """Inputs between 0 and 1, and classes."""
    drawn = torch.Generator().manual_seed(4)
    return torch.rand(8, 12, generator=drawn, dtype=torch.double), torch.arange(8) % 4


@pytest.mark.parametrize("name", RULES)
def test_rules_with_feedback_weights_train_it_exactly(name: str) -> None:
    model, (x, y) = network(), batch()
    rule: CreditRule = RULES[name](model)
    rule(x, y).backward()
    got = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    encoder, first, second, readout = model.children()
    with torch.no_grad():
        t1 = first(encoder(x))
    t2 = second(t1).detach().requires_grad_()
    F.cross_entropy(readout(t2), y).backward()
    weight = second.get_parameter("weight").detach()
    feedback = rule.feedback_weights().get("spikes2", weight)
    causal = (t1.unsqueeze(1) < t2.detach().unsqueeze(2)).double()
    slope = (causal * weight).sum(2).clamp_min(0.1)
    assert t2.grad is not None
    q = torch.where(t2.detach().isfinite(), t2.grad / slope, 0.0)
    error = torch.einsum("bm,bmn,mn->bn", q, causal, feedback)
    model.zero_grad()
    first(encoder(x)).backward(error)
    by_hand = first.get_parameter("weight").grad
    assert by_hand is not None
    assert torch.allclose(got["spikes1.weight"], by_hand, rtol=1e-13, atol=1e-15)
    assert bool(by_hand.any())
    assert torch.equal(feedback, weight) is (name == "bp")


@pytest.mark.parametrize("name", [*RULES, "dfa"])
def test_models_pass_the_checks(name: str) -> None:
    rule = apical.DirectFeedbackAlignment(network()) if name == "dfa" else RULES[name](network())
    check_model(rule, *batch(), skip={"compiled"} if name != "fa" else set())


@pytest.mark.parametrize(
    "rule",
    [
        *(apical.DeepFeedbackControl, apical.EquilibriumPropagation, apical.DifferenceTargetPropagation),
        *(apical.CounterCurrentLearning, apical.PredictiveCoding, apical.DualPropagation, apical.SemiImplicit),
        *(apical.ForwardForward, apical.LocalClassifiers, apical.CorInfoMax, apical.ContrastiveSignalPlasticity),
    ],
)
def test_rules_about_affine_layers_refuse_it_by_name(rule: Callable[[nn.Module], CreditRule]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"layer 'spikes1' \(SpikingLinear\) is no affine map"):
        rule(network())


def test_a_layer_with_another_forward_is_refused_and_not_guessed() -> None:
    class Delayed(SpikingLinear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1.0

    assert not is_affine(Delayed(3, 2))
    model = nn.Sequential(FirstSpike(), SpikingLinear(12, 9), Delayed(9, 4), Readout()).double()
    with pytest.raises(UnsupportedModelError, match=r"layer '2' \(Delayed\) is no affine map"):
        apical.FeedbackAlignment(model)(*batch())


def test_encoding_readout_and_silence() -> None:
    times = FirstSpike()(torch.tensor([[0.0, 0.1, 0.25, 1.0, 3.0]]))
    assert times.tolist() == [[math.inf, math.inf, 0.75, 0.0, 0.0]]
    assert Readout(latest=5.0, scale=2.0)(torch.tensor([[0.5, math.inf]])).tolist() == [[-1.0, -10.0]]
    model = network()
    x, y = batch()
    silent = model.silent(torch.zeros_like(x))
    assert all(bool((share == 1).all()) for share in silent.values())
    assert bool((activities(model, torch.zeros_like(x))["spikes1"] == 10).all())
    assert torch.allclose(activities(model, x)["spikes2"], model.times(x)["spikes2"].clamp_max(10.0))
    measured = apical.Backprop(model).measures((x, y), []).layers
    assert measured.keys() == {"spikes1", "spikes2"}
    assert 0 <= measured["spikes2"]["dead"] <= measured["spikes2"]["silent"] <= 1
    assert [panel.kind for panel in apical.Backprop(model).panels((x, y))] == ["histogram", "bars"]
    with pytest.raises(ConfigError, match="theta and active"):
        SpikingLinear(3, 2, theta=0.0)
    with pytest.raises(ConfigError, match=r"times \(batch, 3\)"):
        SpikingLinear(3, 2)(torch.rand(2, 4))
    with pytest.raises(ConfigError, match="at least one neuron"):
        models.first_spike(3, [0], 2)


def test_it_learns_and_leaves_silent_neurons_alone() -> None:
    model, (x, y) = network(), batch()
    rule = apical.Backprop(model)
    optimizer = torch.optim.Adam(rule.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        credit = rule(x, y)
        credit.backward()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
        optimizer.step()
        losses.append(float(credit.loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        model.get_submodule("spikes1").get_parameter("weight")[0] = -1.0
    optimizer.zero_grad()
    rule(x, y).backward()
    grad = model.get_submodule("spikes1").get_parameter("weight").grad
    assert grad is not None
    assert not bool(grad[0].any())


def test_late_spikes_do_not_flatten_the_figure_of_the_others() -> None:
    from apical.bench.figures.panels import histogram

    times = np.concatenate([np.linspace(0, 1, 96), [500.0, 1000.0], [np.inf, np.inf]])
    panel = {"x": "time", "y": "share of neurons"}
    figure = histogram(panel, {"late": times, "early": times[:50]})
    assert figure.axes[0].get_xlim()[1] < 2
    late, early = (text.get_text() for text in figure.legends[0].get_texts())
    beyond = (times[:96] > np.quantile(np.concatenate([times[:98], times[:50]]), 0.95)).sum() + 2
    assert (late, early) == (f"late (2 % none, {beyond} % above 0.94)", "early")
    rates = histogram(panel, {"rates": np.array([0.0, 0.1, 0.2, 0.9])})
    assert rates.axes[0].get_xlim()[1] > 0.9
