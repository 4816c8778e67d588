"""Contrastive-signal-dependent plasticity: neurons, modulator, products of a stimulus, bounds, memristors, memory."""

import copy
import gc
from collections.abc import Callable
from itertools import product
from typing import Any, Literal

import csdp_reference
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical import models
from apical.errors import ConfigError, UnsupportedModelError
from apical.rules.contrastive_plasticity import memristor, neurons
from apical.rules.contrastive_plasticity.contrastive_signal_plasticity import ContrastiveSignalPlasticity
from apical.rules.contrastive_plasticity.memristor import Pairs, levelled
from apical.rules.contrastive_plasticity.network import twin
from apical.rules.contrastive_plasticity.neurons import Constants, Neurons
from apical.testing import check_model

QUICK = Constants(dt=50.0, trace=200.0)
"""Neurons that fire within a few steps, whatever the weights."""


def network(hidden: tuple[int, ...] = (6, 5), *, biased: bool = False) -> nn.Sequential:
    """Of 7 inputs and 3 classes."""
    model = models.spiking(7, hidden, 3)
    for layer in model.children():
        if biased and isinstance(layer, nn.Linear):
            layer.bias = nn.Parameter(torch.empty(layer.out_features).uniform_(-1.0, 1.0))
    return model.double()


def weight_of(rule: ContrastiveSignalPlasticity, place: int) -> Tensor:
    """Of a module of the model."""
    return list(rule.model.children())[place].get_parameter("weight")


def batch(size: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Spike probabilities and classes."""
    drawn = torch.Generator().manual_seed(seed)
    return torch.rand(size, 7, generator=drawn, dtype=torch.double), torch.arange(size) % 3


Check = tuple[Callable[[Tensor], Tensor], Tensor]


def gradients(rule: nn.Module) -> dict[str, Tensor]:
    """What was written to `.grad`."""
    return {name: p.grad.clone() for name, p in rule.named_parameters() if p.grad is not None}


def test_the_modulator_is_the_numerical_gradient_of_the_loss() -> None:
    torch.manual_seed(0)
    t, y, theta = torch.rand(6, 5, dtype=torch.double), torch.tensor([1.0, 1, 1, 0, 0, 0]).double(), 1.3
    g = neurons.goodness(t)
    losses: list[Check] = [
        (lambda t: neurons.threshold_loss(neurons.goodness(t), y, theta), neurons.threshold_slope(g, y, theta)),
        (lambda t: neurons.pairs_loss(neurons.goodness(t), 0.7), neurons.pairs_slope(g, 0.7)),
    ]
    for loss, slope in losses:
        m, step = neurons.modulate_traces_(t.clone(), slope.unsqueeze(1)), 1e-3
        for place in product(range(6), range(5)):
            moved = torch.zeros_like(t)
            moved[place] = step
            near, far = (loss(t + k * moved) - loss(t - k * moved) for k in (1, 2))
            assert abs((8 * near - far) / (12 * step) - m[place]) < 5e-12  # to the fourth order of the step
        assert bool((m[:3] < 0).all())
        assert bool((m[3:] > 0).all())
        silent = t.clone()
        silent[:, 2] = 0.0
        assert not bool(neurons.modulate_traces_(silent, slope.unsqueeze(1))[:, 2].any())


def test_equal_traces_of_positive_and_negative_samples_cancel_at_the_threshold() -> None:
    t = torch.rand(1, 5, dtype=torch.double).repeat(2, 1)
    y = torch.tensor([1.0, 0.0]).double()
    for theta in (0.4, float(neurons.goodness(t)[0])):
        g = neurons.goodness(t)
        m = neurons.modulate_traces_(t.clone(), neurons.threshold_slope(g, y, theta).unsqueeze(1))
        p = torch.sigmoid(g - theta)[0]
        assert torch.allclose(m.sum(0), 2 * t[0] * (2 * p - 1) / 2, rtol=0, atol=1e-15)
    assert not bool(m.sum(0).any())


def test_neurons_step_as_the_equations_say() -> None:
    torch.manual_seed(1)
    c = Constants()
    v, h, t = (torch.rand(3, 4, dtype=torch.double) * scale for scale in (0.1, 0.06, 1.0))
    j = torch.randn(3, 4, dtype=torch.double)
    made = Neurons(v.clone(), torch.empty_like(v), h.clone(), t.clone(), torch.empty_like(v))
    neurons.charge_(made.v, [(j, torch.eye(4).double(), 0.25), (j, torch.eye(4).double(), 0.75)], None, c)
    neurons.fire_(made, torch.ones(1, 4).double(), c)
    for row in range(3):
        fired = [float(v[row, i] + c.dt / c.membrane * (j[row, i] - v[row, i])) > float(h[row, i]) for i in range(4)]
        for i in range(4):
            assert float(made.s[row, i]) == fired[i]
            free = float(v[row, i] + c.dt / c.membrane * (j[row, i] - v[row, i]))
            assert float(made.v[row, i]) == pytest.approx(0.0 if fired[i] else free, abs=1e-15)
            assert float(made.h[row, i]) == pytest.approx(max(float(h[row, i]) + c.adaptation * (sum(fired) - 1), c.floor))
            decayed = (1 - c.dt / c.trace) * float(t[row, i])
            assert float(made.t[row, i]) == pytest.approx(1.0 if fired[i] else decayed, abs=1e-15)


def test_spikes_of_a_sample_are_independent_and_as_probable_as_its_input() -> None:
    """Over many stimuli, means and products of two spikes: other inputs, other steps, and other samples of one step."""
    torch.manual_seed(0)
    many, p = 20000, torch.tensor([[0.0, 0.3, 0.6, 1.0], [0.5, 0.2, 0.9, 0.7]], dtype=torch.double)
    phase, shifts = torch.rand(2, many * 4, dtype=torch.double), torch.rand(2, 2, many * 4, dtype=torch.double)
    every = p.repeat(2, 1, many)  # two samples with the first shift, the same with the second
    first, second = (
        neurons.draw_with_shift_(torch.empty_like(every), every, phase, shift.unsqueeze(1)).view(4, many, 4).transpose(0, 1)
        for shift in shifts
    )
    far = 5 * 0.5 / many**0.5  # five deviations of a mean of zeros and ones
    pairs = [
        (first[:, 0, 1], first[:, 0, 2], 0.3 * 0.6),
        (first[:, 0, 1], second[:, 0, 1], 0.3 * 0.3),
        (first[:, 0, 1], second[:, 0, 2], 0.3 * 0.6),
        (first[:, 0, 1], first[:, 1, 1], 0.3 * 0.2),
        (first[:, 0, 1], first[:, 2, 1], 0.3 * 0.3),
        (first[:, 0, 1], second[:, 2, 1], 0.3 * 0.3),
    ]
    for step in (first, second):
        assert float((step.mean(0) - torch.cat([p, p])).abs().max()) < far
        assert not bool(step[:, 0, 0].any())
        assert bool(step[:, 0, 3].all())
    for one, other, both in pairs:
        assert float((one * other).mean()) == pytest.approx(both, abs=far)


def weights_of(rule: ContrastiveSignalPlasticity) -> csdp_reference.Weights:
    """Of the rule and its model, (from, to)."""
    layers = [layer for layer in rule.model.children() if isinstance(layer, nn.Linear)]
    *up, last = (layer.weight.detach().T for layer in layers)
    bias = [layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach() for layer in layers]
    down, lateral, context, read = (
        [p.detach().T for p in every] for every in (rule.down, rule.lateral, rule.context, rule.read)
    )
    return csdp_reference.Weights(up, down, lateral, context, [*read, last], list(rule.thresholds.buffers()), bias)


def by_hand(
    rule: ContrastiveSignalPlasticity, x: Tensor, targets: Tensor, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of one stimulus, and how often neurons fired without their synapses, under the parameters' names."""
    torch.manual_seed(seed)
    classes, b = rule.classes, len(x)
    right = F.one_hot(targets, classes).double()
    if rule.negatives == "labels":
        wrong = (targets + torch.randint(1, classes, targets.shape)) % classes
        xx, context = torch.cat([x, x]), torch.cat([right, F.one_hot(wrong, classes).double()])
    else:
        other = x.roll(-int(torch.randint(1, b, ())), 0)
        xx, context = torch.cat([x, rule.mix * x + (1 - rule.mix) * other]), torch.zeros(2 * b, classes).double()
    phase = torch.rand_like(x)
    shifts = (torch.rand(2, 1, x.shape[1], dtype=torch.double) for _ in range(rule.steps))  # of positives, of negatives
    inputs = (((phase + shift) % 1).flatten(0, 1).lt(xx).double() for shift in shifts)
    y = torch.cat([torch.ones(b), torch.zeros(b)]).double()
    pairs = rule.contrast == "pairs"
    loss = csdp_reference.pairs_loss(rule.alpha) if pairs else csdp_reference.threshold_loss(rule.theta, y)
    w = weights_of(rule)
    steps = csdp_reference.simulate(w, inputs, context, rule.constants)
    renamed = {f"up.{k}": f"model.linear{k + 1}.weight" for k in range(len(w.up))}
    renamed |= {f"bias.{k}": f"model.linear{k + 1}.bias" for k in range(len(w.up) + 1)}
    renamed[f"read.{len(w.up) - 1}"] = f"model.linear{len(w.up) + 1}.weight"
    gradients, silence = (
        {renamed.get(name, name): each for name, each in found.items()}
        for found in csdp_reference.learn(w, steps, loss, right, rule.constants)
    )
    return gradients, silence


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("hidden", "steps", "options"),
    [
        ((6, 5), 12, {"decay": 2e-3}),
        ((6, 5), 60, {"constants": Constants(), "decay": 2e-3}),
        ((6, 5, 4), 12, {"decay": 2e-3}),
        ((6, 5), 12, {"contrast": "pairs", "alpha": 0.7}),
        ((6, 5), 12, {"negatives": "mixtures", "mix": 0.3, "decay": 2e-3}),
        ((6,), 12, {"negatives": "mixtures", "contrast": "pairs", "alpha": 2.5}),
    ],
)
def test_a_stimulus_teaches_what_the_equations_say(
    hidden: tuple[int, ...], steps: int, options: dict[str, Any], biased: bool
) -> None:
    """Gradients, and what decays of every matrix but the read-outs: lambda for each spike of its neuron without it."""
    torch.manual_seed(1)
    model = network(hidden, biased=biased)
    rule = ContrastiveSignalPlasticity(model, steps=steps, **{"theta": 1.5, "constants": QUICK} | options)
    x, targets = batch()
    torch.manual_seed(5)
    rule(x, targets).backward()
    got = gradients(rule)
    wanted, silence = by_hand(rule, x, targets, 5)
    assert got.keys() == {name for name in wanted if biased or not name.endswith("bias")}
    for name, gradient in got.items():
        assert torch.allclose(gradient, wanted[name], rtol=0, atol=1e-14), name
        assert bool(gradient.any()), name
    before = {name: p.detach().clone() for name, p in rule.named_parameters()}
    rule.constrain_()
    for name, p in rule.named_parameters():
        lost = rule.decay * silence.get(name, torch.zeros_like(p))
        bounded = (before[name] - lost).clamp(0.0 if name.startswith("lateral") else -1.0, 1.0)
        bounded = bounded - bounded.diag().diag() if name.startswith("lateral") else bounded
        assert torch.allclose(p.detach(), bounded, rtol=0, atol=1e-15), name
        assert bool(lost.any()) is (rule.decay > 0 and name in silence), name


@pytest.mark.parametrize(("constants", "biased"), [(QUICK, False), (Constants(), False), (QUICK, True)])
def test_an_answer_counts_the_spikes_of_the_equations(constants: Constants, biased: bool) -> None:
    """Without context, all samples with the same numbers."""
    torch.manual_seed(3)
    rule = ContrastiveSignalPlasticity(network(biased=biased), steps=60, constants=constants)
    x, _ = batch()
    with torch.no_grad():
        inputs = ((u < x).double() for u in rule.chance)
        steps = list(csdp_reference.simulate(weights_of(rule), inputs, torch.zeros(len(x), 3).double(), constants))
    counts = torch.stack([step.s[-1] for step in steps]).sum(0)
    assert torch.equal(rule.answer(x), counts)
    assert len(counts.unique()) > 2
    for k, spikes in enumerate(rule.spikes(x).values()):
        assert torch.equal(spikes, torch.stack([step.s[k] for step in steps]))


def test_negatives_are_drawn_uniformly() -> None:
    """Wrong classes among all others; partners of a mixture among all other samples."""
    torch.manual_seed(0)
    many, classes = 9000, 4
    rule = ContrastiveSignalPlasticity(models.spiking(2, [3], classes).double(), steps=2)
    targets = torch.arange(many) % classes
    context = rule._stimulus(torch.rand(many, 2).double(), targets).context
    assert context is not None
    assert torch.equal(context[:many], F.one_hot(targets, classes).double())
    assert bool((context.sum(1) == 1).all())
    wrong = context[many:].argmax(1)
    pairs = torch.zeros(classes, classes).index_put_((targets, wrong), torch.ones(many), accumulate=True)
    p = 1 / (classes - 1)
    each = many / classes
    assert not bool(pairs.diagonal().any())
    assert float((pairs - each * p)[~torch.eye(classes).bool()].abs().max()) < 5 * (each * p * (1 - p)) ** 0.5
    mixed = ContrastiveSignalPlasticity(models.spiking(2, [3], classes).double(), steps=2, negatives="mixtures", mix=0.0)
    x, draws = torch.rand(4, 2).double(), 900
    partners = torch.zeros(4, 4)
    for _ in range(draws):
        partners += (mixed._stimulus(x, torch.zeros(4).long()).x[1].unsqueeze(1) == x).all(2)
    assert not bool(partners.diagonal().any())
    assert float((partners - draws / 3)[~torch.eye(4).bool()].abs().max()) < 5 * (draws * 2 / 9) ** 0.5


def test_defaults_and_first_values_are_those_of_the_released_code() -> None:
    assert Constants() == (3.0, 100.0, 13.0, 0.1, 0.01, 0.001, 0.025)  # dt, tau_m, tau_t, R_m, R_inh, rho, floor
    torch.manual_seed(0)
    rule = ContrastiveSignalPlasticity(models.spiking(50, [400, 300], 10).double())
    assert (rule.steps, rule.theta, rule.mix) == (40, 10.0, 0.5)
    assert (rule.negatives, rule.contrast, rule.readout) == ("labels", "threshold", "context")
    assert not any("bias" in name for name, _ in rule.named_parameters())
    ranges = {name: (0.0 if name.startswith("lateral") else -1.0, 1.0) for name, _ in rule.named_parameters()}
    drawn = dict(rule.named_parameters())
    for low, high, value in [(*ranges[name], p.detach()) for name, p in drawn.items()] + [
        (0.055 - 0.025, 0.055 + 0.025, torch.cat(list(rule.thresholds.buffers())))
    ]:
        if low == 0.0:
            assert not bool(value.diagonal().any())
            value = value[~torch.eye(len(value)).bool()]
        n, width = value.numel(), high - low
        assert low <= float(value.min()) < low + 12 / n * width
        assert high - 12 / n * width < float(value.max()) <= high
        assert abs(float(value.mean()) - (low + high) / 2) < 5 * width / (12 * n) ** 0.5
    stored = copy.deepcopy(rule.thresholds.state_dict())
    assert {f"thresholds.{name}" for name in stored} <= rule.state_dict().keys()
    rule(torch.rand(2, 50).double(), torch.tensor([0, 1])).backward()
    rule.constrain_()
    assert all(torch.equal(value, stored[name]) for name, value in rule.thresholds.state_dict().items())


def test_read_outs_learn_from_answers_what_the_equations_say() -> None:
    """With readout="answer" by the error of an answer, whose input has no class; all else as with "context"."""
    found = {}
    for readout in ("context", "answer"):
        torch.manual_seed(3)
        rule = ContrastiveSignalPlasticity(network(biased=True), steps=12, theta=1.5, readout=readout, constants=QUICK)
        torch.manual_seed(5)
        rule(*batch()).backward()
        found[readout] = gradients(rule)
    x, targets = batch()
    right, c = F.one_hot(targets, 3).double(), rule.constants
    spikes = rule.spikes(x)
    learning = ("read.0", "model.linear3.weight", "model.linear3.bias")
    trace, wanted = torch.zeros_like(right), dict.fromkeys(learning, torch.zeros(()).double())
    for step in range(rule.steps):
        trace = (1 - c.dt / c.trace) * trace * (1 - spikes["linear3"][step]) + spikes["linear3"][step]
        e = 2 * (trace - right) / len(x)
        wanted["model.linear3.bias"] = wanted["model.linear3.bias"] + c.resistance * e.sum(0)
        for name, layer in (("read.0", "linear1"), ("model.linear3.weight", "linear2")):
            if step:
                wanted[name] = wanted[name] + c.resistance * e.T @ spikes[layer][step - 1]
    for name, gradient in found["answer"].items():
        if name in wanted:
            weight = rule.get_parameter(name).detach()
            assert torch.allclose(gradient, wanted[name] * (1 - weight.abs()), rtol=0, atol=1e-15), name
            assert not torch.allclose(gradient, found["context"][name]), name
        else:
            assert torch.equal(gradient, found["context"][name]), name


def test_steps_and_stimulus_agree_to_the_first_order_of_the_rate() -> None:
    """Only the factors 1 - |C| of read-outs see that weights have moved, half as much at half the rate."""

    def change(learn: Literal["stimulus", "step"], lr: float) -> dict[str, Tensor]:
        torch.manual_seed(3)
        rule = ContrastiveSignalPlasticity(network(), steps=12, theta=1.5, learn=learn, constants=QUICK)
        before = {name: p.detach().clone() for name, p in rule.named_parameters()}
        optimizer = torch.optim.SGD(rule.parameters(), lr=lr)
        torch.manual_seed(7)
        for _ in range(rule.repeats):
            optimizer.zero_grad()
            rule(*batch()).backward()
            optimizer.step()
        return {name: (p.detach() - before[name]) / lr for name, p in rule.named_parameters()}

    stimulus = change("stimulus", 2e-4)
    whole, half = (
        {name: float((each - stimulus[name]).norm() / stimulus[name].norm()) for name, each in change("step", lr).items()}
        for lr in (2e-4, 1e-4)
    )
    for name in stimulus:
        if name in ("read.0", "model.linear3.weight"):
            assert 1e-6 < whole[name] < 1e-4, name
            assert half[name] == pytest.approx(whole[name] / 2, rel=1e-3), name
        else:
            assert max(whole[name], half[name]) < 1e-9, name


def test_a_layer_knows_nothing_of_the_ones_above_without_feedback() -> None:
    found = []
    for changed in (False, True):
        torch.manual_seed(0)
        rule = ContrastiveSignalPlasticity(network(), steps=10, theta=1.5, constants=QUICK)
        with torch.no_grad():
            rule.down[0].zero_()
            if changed:
                weight_of(rule, 3).uniform_()
                weight_of(rule, 5).uniform_()
                rule.lateral[1].uniform_()
                rule.context[1].uniform_()
                rule.thresholds.get_buffer("linear2").add_(0.02)
        torch.manual_seed(1)
        rule(*batch()).backward()
        found.append(gradients(rule))
    for name in ("model.linear1.weight", "lateral.0", "context.0", "read.0"):
        same = torch.equal(found[0][name], found[1][name])
        assert same is (name != "read.0"), name  # the read-out of a layer learns by the joint error


def test_a_silent_neuron_learns_nothing() -> None:
    torch.manual_seed(0)
    rule = ContrastiveSignalPlasticity(network(), steps=10, theta=1.5, constants=QUICK)
    with torch.no_grad():
        for weights in (weight_of(rule, 1), rule.context[0], rule.down[0]):
            weights[2] = -1.0
    rule(*batch()).backward()
    for name in ("model.linear1.weight", "lateral.0", "context.0", "down.0"):
        gradient = gradients(rule)[name]
        assert not bool(gradient[2].any()), name
        assert bool(gradient.any()), name


@pytest.mark.parametrize(
    "options",
    [{}, {"negatives": "mixtures"}, {"contrast": "pairs"}, {"decay": 0.01}, {"levels": 8}, {"learn": "step", "decay": 0.01}],
)
def test_bounds_hold_after_every_step(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    rule = ContrastiveSignalPlasticity(network(), steps=6, theta=1.5, constants=QUICK, **options)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(rule.parameters(), lr=0.5)
    beyond = False
    for seed in [seed for seed in range(6) for _ in range(rule.repeats)]:
        optimizer.zero_grad()
        rule(*batch(seed=seed)).backward()
        optimizer.step()
        beyond |= any(float(p.detach().abs().max()) > 1 for p in rule.parameters())
        rule.constrain_()
        assert all(float(p.detach().abs().max()) <= 1 for p in rule.parameters())
        assert all(float(m.detach().min()) >= 0 and not bool(m.detach().diagonal().any()) for m in rule.lateral)
        if rule.pairs is not None:
            for place, p in rule._synapses().items():
                plus, minus = (g.get_buffer(memristor.key(*place)) for g in (rule.pairs.plus, rule.pairs.minus))
                assert torch.equal(p.detach(), plus - minus), place
    assert beyond
    assert all(float(each.min()) >= 0 and float(each.max()) <= 1 for each in rule.spikes(batch()[0]).values())
    with torch.no_grad():
        stimulus = rule._stimulus(*batch())
        rest = rule._rest(stimulus.x, context=stimulus.context is not None)
        for _, state in rule._steps(stimulus, (rest, twin(rest)), rule.steps):
            assert all(float(each.t.min()) >= 0 and float(each.t.max()) <= 1 for each in (*state.layers, state.readout))


def test_decay_is_taken_off_for_every_spike_without_the_synapse() -> None:
    torch.manual_seed(0)
    rule = ContrastiveSignalPlasticity(network((6,)), steps=2, decay=1e-3, constants=Constants(dt=100.0, trace=300.0))
    with torch.no_grad():
        weight_of(rule, 1).fill_(0.5)
        rule.context[0].fill_(0.5)
    x = torch.zeros(2, 7).double()
    x[:, :3] = 1.0  # fire at the first step, and so move the neurons at the second, in which four inputs are silent
    rule(x, torch.tensor([0, 1])).backward()
    rule.constrain_()
    lost = 0.5 - weight_of(rule, 1).detach()
    assert torch.allclose(lost[:, :3], torch.zeros(6, 3).double(), rtol=0, atol=1e-15)
    assert torch.allclose(
        lost[:, 3:], torch.full((6, 4), 4e-3, dtype=torch.double), rtol=0, atol=1e-15
    )  # four rows, one spike each
    rule.constrain_()
    assert torch.equal(0.5 - weight_of(rule, 1).detach(), lost)


def test_mixtures_are_of_two_inputs_and_one_sample_has_none() -> None:
    torch.manual_seed(0)
    rule = ContrastiveSignalPlasticity(network(), negatives="mixtures", mix=0.25, steps=4, constants=QUICK)
    x, targets = batch(5)
    negative = rule._stimulus(x, targets).x[1]
    matches = [
        [torch.allclose(n, 0.25 * x[i] + 0.75 * other, rtol=0, atol=1e-15) for other in x].index(True)
        for i, n in enumerate(negative)
    ]
    assert sorted(matches) == list(range(5))
    assert all(i != other for i, other in enumerate(matches))
    rule(x[:1], targets[:1]).backward()
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(rule).values())


def test_answers_do_not_depend_on_the_batch_or_on_chance() -> None:
    torch.manual_seed(0)
    rule = ContrastiveSignalPlasticity(network(), steps=30)
    x, _ = batch(6)
    whole = rule.answer(x)
    assert bool(whole.any())
    assert torch.equal(whole[2:4], rule.answer(x[2:4]))
    state = torch.random.get_rng_state()
    rule.answer(x)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(copy.deepcopy(rule).answer(x), whole)


def test_memristors_have_levels_and_small_steps_add_up() -> None:
    torch.manual_seed(0)
    weight = torch.zeros(200, 50, dtype=torch.double)
    pairs = Pairs({("up", 0): weight}, levels=33)
    plus, minus = pairs.plus.get_buffer("up0"), pairs.minus.get_buffer("up0")
    steps = 0
    for step in 40 * [0.01] + [-0.25, 9.0, -9.0]:  # a level is 1/32
        before = plus.clone(), minus.clone()
        weight += step
        pairs.program_({("up", 0): weight})
        for g in (plus, minus):
            assert torch.equal((32 * g).round(), 32 * g)
            assert float(g.min()) >= 0
            assert float(g.max()) <= 1
        assert torch.equal(weight, plus - minus)
        if step == 0.01:
            assert float(weight.mean()) == pytest.approx(0.01 * (steps := steps + 1), abs=0.005)
        elif step == -0.25:  # eight levels, four for each, without chance
            assert torch.equal(plus, before[0] - 0.125)
            assert torch.equal(minus, before[1] + 0.125)
        else:
            assert bool((weight == step / 9).all())
    assert torch.equal(
        levelled(torch.tensor([0.0, 0.25, 1.0]), 5, torch.tensor([0.999, 0.5, 0.0])), torch.tensor([0.0, 0.25, 1.0])
    )


def test_memristors_continue_bit_for_bit() -> None:
    rules = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        rules.append(ContrastiveSignalPlasticity(network(), steps=4, levels=16, constants=QUICK))

    def step(rule: ContrastiveSignalPlasticity, seed: int) -> None:
        torch.manual_seed(seed)
        rule.zero_grad()
        rule(*batch()).backward()
        with torch.no_grad():
            for p in rule.parameters():
                p.sub_(0.1 * p.grad if p.grad is not None else 0.0)
        rule.constrain_()

    step(rules[0], 2)
    rules[1].load_state_dict(rules[0].state_dict())
    for rule in rules:
        step(rule, 3)
    for name, value in rules[0].state_dict().items():
        assert torch.equal(value, rules[1].state_dict()[name]), name


def test_the_time_loop_leaves_no_memory_behind() -> None:
    """As many tensors after 2,000 steps as after the first ones."""
    torch.manual_seed(0)
    rule = ContrastiveSignalPlasticity(models.spiking(4, [3], 2), steps=2000)
    x, targets = torch.rand(2, 4), torch.tensor([0, 1])
    stimulus = rule._stimulus(x, targets)
    counts = []
    with torch.no_grad():
        state = rule._rest(stimulus.x, context=True)
        for steps in (20, 1980):
            state, logs = rule._taught(stimulus, state, steps, rule._zeros())
            del logs
            gc.collect()
            counts.append(sum(issubclass(type(each), Tensor) for each in gc.get_objects()))
    assert counts[1] <= counts[0]


def test_another_batch_must_wait_for_all_calls() -> None:
    rule = ContrastiveSignalPlasticity(network(), steps=4, learn="step")
    rule(*batch()).backward()
    with pytest.raises(ConfigError, match="a new batch came after 1"):
        rule(*batch(seed=9))
    rule(*batch(seed=9)).backward()
    rule.restart()
    rule(*batch()).backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negatives": "noise"}, "negatives"),
        ({"learn": "never"}, "learn"),
        ({"contrast": "x"}, "contrast"),
        ({"readout": "never"}, "readout"),
        ({"readout": "answer", "learn": "step"}, "use learn='stimulus'"),
        ({"steps": 1}, "steps must be"),
        ({"levels": 1}, "levels must be 0"),
        ({"loss": nn.CrossEntropyLoss(ignore_index=2)}, "ignore_index"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ContrastiveSignalPlasticity(network(), **options)  # type: ignore[arg-type]


def test_models_and_targets_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="only one"):
        ContrastiveSignalPlasticity(nn.Sequential(nn.Linear(4, 3)))
    with pytest.raises(UnsupportedModelError, match=r"after layer '0' \(Tanh\)"):
        ContrastiveSignalPlasticity(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)))
    with pytest.raises(ConfigError, match="two classes"):
        ContrastiveSignalPlasticity(models.spiking(4, [3], 1))
    with pytest.raises(UnsupportedModelError, match="bfloat16"):
        ContrastiveSignalPlasticity(models.spiking(4, [3], 2).bfloat16())
    rule = ContrastiveSignalPlasticity(network())
    with pytest.raises(ConfigError, match="class label"):
        rule(batch()[0], torch.zeros(4, 1, dtype=torch.long))
    with pytest.raises(ConfigError, match="empty"):
        rule(torch.zeros(0, 7).double(), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ConfigError, match="label 3"):
        rule(batch()[0], torch.tensor([0, 1, 2, 3]))


def test_frozen_layers_stay_and_nothing_is_recorded_without_gradients() -> None:
    torch.manual_seed(0)
    rule = ContrastiveSignalPlasticity(network(), steps=8, theta=1.5, constants=QUICK, decay=0.1)
    weight = weight_of(rule, 1).requires_grad_(False)
    with torch.no_grad():
        weight.fill_(3.0)
        assert not rule(*batch()).roots
    rule(*batch()).backward()
    rule.constrain_()
    assert weight.grad is None
    assert bool((weight == 3.0).all())
    with torch.inference_mode():
        assert rule(*batch()).output.shape == (4, 3)


def test_scaled_losses_scale_the_gradients_and_adam_does_not_feel_it() -> None:
    """The resistance before a modulator is such a scale. A step of SGD is scaled alike."""
    rule = ContrastiveSignalPlasticity(network(), steps=8, theta=1.5, constants=QUICK)
    found, changes = [], []
    before = copy.deepcopy(rule.state_dict())
    for scale in (None, 0.25):
        torch.manual_seed(0)
        rule.zero_grad()
        credit = rule(*batch())
        if scale is None:
            credit.backward()
        else:
            (credit.loss * scale).backward()
        found.append(gradients(rule))
        for optimizer in (torch.optim.Adam(rule.parameters(), 0.1, eps=1e-30), torch.optim.SGD(rule.parameters(), 0.1)):
            optimizer.step()
            changes.append({name: p.detach() - before[name] for name, p in rule.named_parameters()})
            rule.load_state_dict(before)
    adam, sgd, scaled_adam, scaled_sgd = changes
    for name, gradient in found[0].items():
        assert torch.allclose(0.25 * gradient, found[1][name], rtol=0, atol=1e-15), name
        assert torch.allclose(adam[name], scaled_adam[name], rtol=0, atol=1e-15), name
        assert torch.allclose(0.25 * sgd[name], scaled_sgd[name], rtol=0, atol=1e-15), name
        assert bool(adam[name].any()) is bool(sgd[name].any()) is bool(gradient.any())


def test_small_first_weights_are_remarked_upon() -> None:
    for model, is_told in ((models.mlp(7, [6, 5], 3), True), (models.spiking(7, [6, 5], 3), False)):
        with torch.no_grad():
            for layer in model.modules():
                if is_told and isinstance(layer, nn.Linear):
                    layer.weight.clamp_(-0.4, 0.4)
        remarks = " ".join(ContrastiveSignalPlasticity(model).remarks)
        assert ("first weights of linear1 and linear2 are small" in remarks) is is_told


def test_figures_and_measures() -> None:
    torch.manual_seed(0)
    rule = apical.ContrastiveSignalPlasticity(network(), steps=20)
    measured = rule.measures(batch(6), []).layers
    assert measured["linear1"].keys() == {"goodness", "goodness_negative", "firing_rate"}
    assert measured["linear3"].keys() == {"firing_rate"}
    raster, rates, classes = rule.panels(batch(6))
    assert raster.values["linear1"].shape == (20, 6)
    assert rates.values["linear3"].shape == (3,)
    assert list(classes.categories) == ["0", "1", "2"]


@pytest.mark.parametrize("options", [{}, {"learn": "step"}, {"readout": "answer"}, {"decay": 1e-3}, {"levels": 64}])
def test_models_pass_the_checks(options: dict[str, object]) -> None:
    rule = ContrastiveSignalPlasticity(network(), steps=12, theta=1.5, constants=QUICK, **options)  # type: ignore[arg-type]
    checked = check_model(rule, *batch(), skip={"compiled"}).passed
    assert {"gradients", "placement", "determinism", "not backprop", "batch sizes", "autocast"} <= checked.keys()


@pytest.mark.parametrize("place", ["model", "lateral", "read"])
def test_weights_that_are_no_numbers_do_not_hide_behind_spikes(place: str) -> None:
    """A neuron whose potential is NaN fires no spike, so neither output nor gradients would tell."""
    torch.manual_seed(0)
    rule = ContrastiveSignalPlasticity(network(), steps=4, constants=QUICK)
    x, targets = batch()
    assert rule(x, targets).loss.isfinite()
    weight = {"model": weight_of(rule, 1), "lateral": rule.lateral[0], "read": rule.read[0]}[place]
    weight.data[0, 1] = torch.nan
    with pytest.warns(RuntimeWarning, match="the loss is not finite although the inputs are: training has diverged"):
        rule(x, targets)
