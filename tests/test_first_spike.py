"""Neurons that fire once: times against bisection, derivatives, identities, and the rules that train them."""

import math
from collections.abc import Callable
from itertools import product
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


def layer_times(seed: int = 0, silent: int = 2, mean: float = 0.25) -> tuple[Tensor, Tensor]:
    """Input times (5, 12), some of them infinite, and weights (6, 12) of that mean."""
    drawn = torch.Generator().manual_seed(seed)
    t = torch.rand(5, 12, generator=drawn, dtype=torch.double)
    t[0, :silent] = torch.inf
    return t, mean + 0.4 * torch.randn(6, 12, generator=drawn, dtype=torch.double)


def bisected(t: Tensor, w: Tensor, theta: float, until: float) -> float:
    """First time with a potential of theta for inputs at t and weights w (n,), infinity where there is none until then.

    Between spikes the potential is a straight line, so it first reaches theta before the first of them by which it has.
    """

    def reached(now: float) -> bool:
        return float(w @ (now - t).clamp_min(0.0)) >= theta

    low = 0.0
    for high in [*sorted(t[t.isfinite()].tolist()), until]:
        if reached(high):
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (low, middle) if reached(middle) else (middle, high)
            return high
        low = high
    return math.inf


@pytest.mark.parametrize(
    ("seed", "theta", "mean"),
    [
        *((1, 1.0, 0.1), (4, 0.4, 0.0), (6, 1.0, 0.25), (7, 2.5, 0.25)),
        *((2, 0.1, -0.1), (3, 0.1, 0.0), (6, 0.1, 0.0)),  # some potentials reach theta, fall below it and reach it again
    ],
)
def test_times_are_those_of_a_bisection(seed: int, theta: float, mean: float) -> None:
    t, weight = layer_times(seed, mean=mean)
    times, slope = spike_times(t, weight, theta)
    crossings = torch.tensor([[bisected(row, w, theta, 20.0) for w in weight] for row in t], dtype=torch.double)
    fires = crossings.isfinite()
    assert torch.equal(times <= 20.0, fires)
    assert fires.any()
    assert float((times - crossings)[fires].abs().max()) < 1e-12
    causal = (t.unsqueeze(1) < times.unsqueeze(2)).double()
    assert torch.allclose((causal * weight).sum(2)[fires], slope[fires], rtol=0, atol=1e-14)


def test_a_neuron_may_be_silent_although_its_last_slope_is_negative() -> None:
    weight = torch.tensor([[1.0, -2.0]]).double()
    assert spike_times(torch.tensor([[0.0, 0.5]]).double(), weight, 1.0)[0].isinf().all()
    assert spike_times(torch.tensor([[0.0, 1.5]]).double(), weight, 1.0)[0].item() == pytest.approx(1.0)  # before the second
    assert spike_times(torch.full((1, 2), math.inf).double(), weight, 1.0)[0].isinf().all()


@pytest.mark.parametrize(("seed", "mean"), [(0, 0.25), (1, 0.25), (11, 0.0)])
def test_derivatives_are_those_of_finite_differences(seed: int, mean: float) -> None:
    """With a mean of 0, of silent neurons too: nothing."""
    t, weight = layer_times(seed, silent=0, mean=mean)
    assert bool(spike_times(t, weight, 1.0)[0].isinf().any()) is (mean == 0)

    def finite(t: Tensor, weight: Tensor) -> Tensor:
        times: Tensor = cast(Any, SpikeTimes).apply(t, weight, 1.0, 0.0)
        return torch.where(times.isfinite(), times, 0.0)

    assert torch.autograd.gradcheck(finite, (t.requires_grad_(), weight.requires_grad_()), eps=1e-6, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("seed", "theta"), [(11, 1.0), (5, 1.7)])
def test_identities_of_the_closed_form(seed: int, theta: float) -> None:
    t, weight = layer_times(seed, silent=0, mean=0.0)
    times, slope = spike_times(t, weight, theta)
    fires = times.isfinite()
    assert 0 < int(fires.sum()) < fires.numel()
    later, _ = spike_times(t + 0.37, weight, theta)
    assert torch.allclose(later, times + 0.37, rtol=0, atol=1e-12)
    scaled, _ = spike_times(t, 3 * weight, 3 * theta)
    assert torch.allclose(scaled, times, rtol=0, atol=1e-12)
    step = 1e-6
    (up, up_slope), (down, down_slope) = (spike_times(t, weight, theta + by) for by in (step, -step))
    assert torch.allclose(up_slope, slope, rtol=0, atol=1e-15)  # the same inputs before and after
    assert torch.allclose(down_slope, slope, rtol=0, atol=1e-15)
    by_theta = (up - down) / (2 * step)
    for j in range(6):
        g = torch.zeros_like(times)
        g[:, j] = 1.0
        below, _ = spike_gradients(t, times, slope, weight, g)
        assert torch.allclose(below.sum(1), fires[:, j].double(), rtol=0, atol=1e-12)  # sum_i dt_j / dt_i = 1
        for b in range(5):
            row = slice(b, b + 1)
            _, products = spike_gradients(t[row], times[row], slope[row], weight, g[row])
            of_weights = float((weight * products).sum())  # sum_i w_ji dt_j / dw_ji = -theta dt_j / dtheta
            assert of_weights == pytest.approx(-theta * float(by_theta[b, j]) if fires[b, j] else 0.0, rel=0, abs=1e-8)
            assert of_weights == pytest.approx(-theta / float(slope[b, j]) if fires[b, j] else 0.0, rel=0, abs=1e-12)
        for late, w in product((1e-9, 50.0), (5.0, -5.0)):  # an input after t_j, which others may notice
            more = torch.cat([t, (times[:, j : j + 1] + late).nan_to_num(posinf=50.0)], 1)
            added, _ = spike_times(more, torch.cat([weight, torch.full((6, 1), w).double()], 1), theta)
            assert torch.equal(added[fires[:, j], j], times[fires[:, j], j])
    for i, j in product(range(12), range(6)):
        raised = weight.clone()
        raised[j, i] += 0.01
        causal = fires[:, j] & (t[:, i] < times[:, j])
        assert bool((spike_times(t, raised, theta)[0][causal, j] < times[causal, j]).all())
    for w in (0.2, 2.5):
        single, _ = spike_times(*(torch.tensor([[each]], dtype=torch.double) for each in (0.3, w)), theta)
        assert single.item() == pytest.approx(0.3 + theta / w, rel=0, abs=1e-14)


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
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


def network() -> FirstSpikeNetwork:
    """12-9-4."""
    torch.manual_seed(1)
    return models.first_spike(12, [9], 4).double()


def batch() -> tuple[Tensor, Tensor]:
    """Inputs between 0 and 1, and classes."""
    drawn = torch.Generator().manual_seed(4)
    return torch.rand(8, 12, generator=drawn, dtype=torch.double), torch.arange(8) % 4


def faint() -> FirstSpikeNetwork:
    """The same with small weights: in each layer some neurons are silent, and some fire late, with a slope below 0.1."""
    model = network()
    model.add_module("readout", Readout(latest=50.0, scale=1.0))
    torch.manual_seed(25)
    for name, mean in (("spikes1", 0.05), ("spikes2", 0.1)):
        nn.init.normal_(model.get_submodule(name).get_parameter("weight"), mean, 0.3)
    return model


def handed_down(
    t: Tensor, out: Tensor, weight: Tensor, feedback: Tensor, g: Tensor, floor: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Gradients of times t (batch, n) and weights (m, n), by the equations; slopes are held above a floor."""
    causal = (t.unsqueeze(1) < out.unsqueeze(2)) & out.isfinite().unsqueeze(2)  # (batch, m, n)
    q = (g / (causal * weight).sum(2).clamp_min(floor)).where(out.isfinite(), 0.0)
    late = (t.unsqueeze(1) - out.unsqueeze(2)).where(causal, 0.0)
    return torch.einsum("bm,bmn,mn->bn", q, causal.double(), feedback), torch.einsum("bm,bmn->mn", q, late)


@pytest.mark.parametrize("made", [network, faint])
@pytest.mark.parametrize("name", RULES)
def test_rules_with_feedback_weights_train_it_exactly(name: str, made: Callable[[], FirstSpikeNetwork]) -> None:
    model, (x, y) = made(), batch()
    rule: CreditRule = RULES[name](model)
    rule(x, y).backward()
    got = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    w1, w2 = (p.detach() for p in model.parameters())
    feedback = rule.feedback_weights().get("spikes2", w2)
    assert torch.equal(feedback, w2) is (name == "bp")
    t0 = (1 - x).masked_fill(x <= 0.1, torch.inf)
    t1, t2 = model.times(x).values()
    latest, scale = (50.0, 1.0) if made is faint else (10.0, 16.0)
    p = torch.softmax(-scale * t2.clamp_max(latest), 1)
    g = -scale * (p - F.one_hot(y, 4)) / len(x) * (t2 < latest)
    error, second = handed_down(t1, t2, w2, feedback, g)
    _, first = handed_down(t0, t1, w1, w1, error)
    assert torch.allclose(got["spikes1.weight"], first, rtol=0, atol=1e-12)
    assert torch.allclose(got["spikes2.weight"], second, rtol=0, atol=1e-12)  # of the last layer: backpropagation
    assert first.any()
    assert second.any()
    if made is faint:
        assert all(0 < float(silent.mean()) < 1 for silent in model.silent(x).values())
        assert not torch.allclose(first, handed_down(t0, t1, w1, w1, error, floor=0.0)[1])
        assert not torch.allclose(second, handed_down(t1, t2, w2, feedback, g, floor=0.0)[1])


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
    with pytest.raises(UnsupportedModelError, match=r"layer 'spikes1' \(SpikingLinear\) is not an affine map"):
        rule(network())


def test_a_layer_with_another_forward_is_refused_and_not_guessed() -> None:
    class Delayed(SpikingLinear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1.0

    assert not is_affine(Delayed(3, 2))
    model = nn.Sequential(FirstSpike(), SpikingLinear(12, 9), Delayed(9, 4), Readout()).double()
    with pytest.raises(UnsupportedModelError, match=r"layer '2' \(Delayed\) is not an affine map"):
        apical.FeedbackAlignment(model)(*batch())


def test_defaults_and_first_weights_are_those_of_the_specification() -> None:
    """Threshold 1, slopes divided by 0.1 at least, inputs up to 0.1 silent, silent outputs at 10; N(3 / n, 0.8^2 / n)."""
    torch.manual_seed(0)
    model = models.first_spike(784, [340], 10)
    layers = [model.get_submodule(name) for name in ("spikes1", "spikes2")]
    readout = model.get_submodule("readout")
    assert isinstance(readout, Readout)
    assert (FirstSpike().silent, readout.latest) == (0.1, 10.0)
    for layer, active in zip(layers, (0.2 * 784, 340.0), strict=True):
        assert isinstance(layer, SpikingLinear)
        assert (layer.theta, layer.floor, layer.bias) == (1.0, 0.1, None)
        weight, deviation = layer.weight.detach(), 0.8 / active**0.5
        n = weight.numel()
        assert float(weight.mean()) == pytest.approx(3 / active, abs=5 * deviation / n**0.5)
        assert float(weight.std()) == pytest.approx(deviation, rel=5 / (2 * n) ** 0.5)


def test_encoding_readout_and_silence() -> None:
    times = FirstSpike()(torch.tensor([[0.0, 0.1, 0.25, 1.0, 3.0]]))
    assert times.tolist() == [[math.inf, math.inf, 0.75, 0.0, 0.0]]
    assert Readout(latest=5.0, scale=2.0)(torch.tensor([[0.5, math.inf]])).tolist() == [[-1.0, -10.0]]
    model = network()
    x, y = batch()
    silent = model.silent(torch.zeros_like(x))
    assert all(bool((share == 1).all()) for share in silent.values())
    assert bool((activities(model, torch.zeros_like(x))["spikes1"] == 10).all())
    assert torch.equal(activities(model, x)["spikes2"], model.times(x)["spikes2"].clamp_max(10.0))
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
