"""The audit's instruments against hand-written formulas, and against rules that cheat on purpose."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical import (
    Backprop,
    ContrastiveSignalPlasticity,
    CounterCurrentLearning,
    DeepFeedbackControl,
    DirectFeedbackAlignment,
    EquilibriumPropagation,
    FeedbackAlignment,
    ForwardForward,
    KolenPollack,
    PredictiveCoding,
    SignSymmetry,
    WeightMirror,
)
from apical.core.credit import Credit, CreditRule
from apical.diagnostics.alignment import gradients
from apical.diagnostics.dataflow import Dataflow, recorded
from apical.diagnostics.interventions import Probe, change, jumps, other_signs, peeks, reads
from apical.diagnostics.memory import held_bytes
from apical.diagnostics.plausibility import CRITERIA, Findings, Verdict, examine, judge, no_backward_locking, symmetry
from apical.diagnostics.synapses import Responding
from apical.errors import ConfigError
from apical.rules.semi_implicit import SemiImplicit

SIZES = (6, 9, 8, 7, 4)
LAST = len(SIZES) - 2


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (n_in, n_out) in enumerate(pairwise(SIZES)):
        layers += [nn.Linear(n_in, n_out)] + ([nn.ReLU()] if i < LAST else [])
    return nn.Sequential(*layers).double()


def batch(size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(size, SIZES[0], generator=generator, dtype=torch.double)
    return inputs, torch.randint(0, SIZES[-1], (size,), generator=generator)


def layers(model: nn.Sequential) -> list[nn.Linear]:
    return [module for module in model if isinstance(module, nn.Linear)]


def by_hand(model: nn.Sequential, inputs: Tensor, targets: Tensor, feedback: list[Tensor] | None = None) -> list[Tensor]:
    """Backpropagation written out: weight gradients, the error going back through `feedback` in place of the weights."""
    linear = layers(model)
    feedback = [layer.weight.detach() for layer in linear] if feedback is None else feedback
    h, gates = [inputs], []
    for i, layer in enumerate(linear):
        a = h[-1] @ layer.weight.detach().T + layer.bias.detach()
        gates.append((a > 0).double())
        h.append(a.clamp_min(0) if i < LAST else a)
    delta = (h[-1].softmax(1) - F.one_hot(targets, SIZES[-1])) / len(inputs)
    found = []
    for i in reversed(range(len(linear))):
        found.append(delta.T @ h[i])
        delta = (delta @ feedback[i]) * gates[i - 1] if i else delta
    return found[::-1]


def examined(make: Callable[[nn.Module], CreditRule], seed: int = 0) -> Findings:
    return examine(make(network(seed)), *batch(), Backprop(network(9)))


def verdicts(make: Callable[[nn.Module], CreditRule]) -> dict[str, Verdict]:
    return judge(examined(make))


def test_a_weight_seen_otherwise_changes_what_goes_back_and_nothing_else() -> None:
    rule, (inputs, targets) = Backprop(network()), batch()
    probe, linear = Probe(rule, inputs, targets), layers(rule.model)  # type: ignore[arg-type]
    seen = [layer.weight.detach() * 1.5 + 0.3 for layer in linear]
    after = probe.seen_otherwise(dict(zip(probe.layers, seen, strict=True)))
    for name, expected in zip(probe.layers, by_hand(rule.model, inputs, targets, seen), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(after[name], expected, rtol=1e-12, atol=1e-14)
    again = probe.updates()
    assert all(torch.equal(again[name], probe.base[name]) for name in again)


def test_nothing_is_left_behind() -> None:
    rule = CounterCurrentLearning(network(), feedback="frozen")
    before = {name: tensor.clone() for name, tensor in (*rule.named_parameters(), *rule.named_buffers())}
    examine(rule, *batch(), Backprop(network()))
    after = dict((*rule.named_parameters(), *rule.named_buffers()))
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.grad is None for parameter in rule.parameters())


def test_a_rule_that_learns_in_its_forward_pass_is_left_as_it_was() -> None:
    rule = WeightMirror(network(), warmup=3)
    samples, exact = batch(), Backprop(network())
    before, drawn = {name: value.clone() for name, value in rule.state_dict().items()}, torch.random.get_rng_state()
    examine(rule, *samples, exact)
    assert all(torch.equal(value, before[name]) for name, value in rule.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_flow_of_backpropagation_is_what_counting_says() -> None:
    rule, (inputs, targets) = Backprop(network()), batch()
    weights = {str(2 * i): layer.weight for i, layer in enumerate(layers(rule.model))}  # type: ignore[arg-type]
    flow = recorded(rule, weights, inputs, targets)
    depth = len(SIZES) - 1
    forward = sum(a * b for a, b in pairwise(SIZES))
    assert flow.multiply_adds == len(inputs) * (3 * forward - SIZES[0] * SIZES[1])  # no error is sent to the input
    assert set(flow.responses.values()) == {1}
    for number, weight in enumerate(weights.values()):
        assert weight.grad is not None
        trace = flow.trace(weight.grad)
        assert trace.earliest == trace.latest == depth - number  # products from the error: one per layer, one of its own
        assert trace.depth == depth + depth - number
        assert trace.layers == set(weights)


def test_the_verdicts_that_the_issue_names() -> None:
    keys = ("no_sign_transport", "no_magnitude_transport", "no_backward_locking")
    found = {make: verdicts(make) for make in (Backprop, FeedbackAlignment, DirectFeedbackAlignment)}
    assert [[found[make][key].verdict for key in keys] for make in found] == [
        ["no", "no", "no"],
        ["yes", "yes", "no"],
        ["yes", "yes", "yes"],
    ]


def test_signs_and_magnitudes_are_told_apart() -> None:
    for variant in ("uniform", "batchwise", "fixed"):
        found = verdicts(lambda model, variant=variant: SignSymmetry(model, variant=variant))  # type: ignore[misc]
        assert (found["no_sign_transport"].good, found["no_magnitude_transport"].good) == (False, True)


def test_derivatives_are_read_by_gradients_and_not_by_a_controller() -> None:
    found = verdicts(lambda model: DeepFeedbackControl(model, solver="simulate", points=40, dt=0.05, learn="none"))
    assert found["no_derivative"].verdict == found["no_sign_transport"].verdict == "yes"
    assert found["one_phase"].verdict == "no"
    assert verdicts(DirectFeedbackAlignment)["no_derivative"].verdict == "no"
    pairs = jumps(Probe(FeedbackAlignment(network()), *batch()))
    direct = jumps(Probe(DirectFeedbackAlignment(network()), *batch()))
    others = [pair for pair in pairs if pair[0] != pair[1]]
    assert others
    assert all(pairs[pair] > 1e-2 and direct[pair] < 1e-6 for pair in others)


def test_smooth_activations_have_no_kink_to_ask_at() -> None:
    def smooth(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 4)).double()

    found = judge(examine(FeedbackAlignment(smooth(0)), *batch(), Backprop(smooth(1))))
    assert found["no_derivative"].verdict == "not applicable"


def test_counter_current_learning_waits_for_nothing() -> None:
    found = verdicts(CounterCurrentLearning)
    for key in ("no_sign_transport", "local", "no_backward_locking", "no_update_locking", "one_phase"):
        assert found[key].verdict == "yes", found[key].text


def test_a_mirror_needs_a_second_response_and_ends_symmetric() -> None:
    found = verdicts(lambda model: WeightMirror(model, warmup=600))
    assert found["one_phase"].numbers["responses"] == 2
    assert found["no_symmetry"].verdict == "no"
    assert verdicts(lambda model: KolenPollack(model, form="explicit"))["no_sign_transport"].verdict == "yes"


def test_a_changed_weight_on_the_way_back_is_symmetry() -> None:
    """Semi-implicit steps send errors through the weights as they will be, which small steps leave almost as they are."""
    found = verdicts(lambda model: SemiImplicit(model, eta=1e-3))
    assert found["no_symmetry"].verdict == "no"
    assert found["no_symmetry"].numbers["degrees"] < 5


def test_angles_of_chance_are_not_symmetry() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 50, generator=generator)
    other = torch.randn(50, 40, generator=generator)
    found = symmetry([other], [weight])
    assert found is not None
    assert found[1] == 2000
    assert abs(found[0] - 90) < 4 * math.degrees(2000**-0.5)
    assert symmetry([weight.T], [weight]) == (0.0, 2000)
    assert symmetry([other[:, :3]], [weight]) is None


class Direct(CreditRule):
    """Direct feedback alignment, with a place for a cheat: `extra(layer, signal, activities, error)` changes signals."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, F.cross_entropy)
        generator = torch.Generator().manual_seed(5)
        for i, size in enumerate(SIZES[1:-1]):
            self.register_buffer(f"b{i}", torch.randn(SIZES[-1], size, generator=generator, dtype=torch.double))

    def extra(self, number: int, signal: Tensor, hidden: list[Tensor], error: Tensor) -> Tensor:
        return signal

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        hidden, roots, last = [], [], inputs
        for module in self.model[:-1]:  # type: ignore[index]
            last = module(last)
            if isinstance(module, nn.ReLU):
                roots.append(last)
                last = last.detach()
                hidden.append(last)
        output = self.model[-1](last)  # type: ignore[index]
        leaf = output.detach().requires_grad_()
        with torch.enable_grad():
            loss = self.loss(leaf, targets)
        error = torch.autograd.grad(loss, leaf)[0]
        signals = [self.extra(i, error @ self.get_buffer(f"b{i}"), hidden, error) for i in range(len(roots))]
        return Credit([*roots, output], [*signals, error], output, loss.detach())

    def above(self, number: int, error: Tensor) -> Tensor:
        """What backpropagation would send to a hidden layer, were all neurons active."""
        delta = error
        for layer in reversed(layers(self.model)[number + 1 :]):  # type: ignore[arg-type]
            delta = delta @ layer.weight.detach()
        return delta


class ReadsWeights(Direct):
    """A thousandth of the signal comes through the forward weights."""

    def extra(self, number: int, signal: Tensor, hidden: list[Tensor], error: Tensor) -> Tensor:
        return signal + 1e-3 * self.above(number, error)


class ReadsMagnitudes(Direct):
    """The signal is scaled by the mean magnitude of the next layer's weight."""

    def extra(self, number: int, signal: Tensor, hidden: list[Tensor], error: Tensor) -> Tensor:
        return signal * layers(self.model)[number + 1].weight.detach().abs().mean()  # type: ignore[arg-type]


class HidesWeights(Direct):
    """Copies of the next weights, made after each step, are kept where no state dict shows them."""

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        self.copies = getattr(self, "copies", None) or [layer.weight.detach().T.clone() for layer in layers(self.model)]  # type: ignore[arg-type]
        return super().forward(inputs, targets)

    def extra(self, number: int, signal: Tensor, hidden: list[Tensor], error: Tensor) -> Tensor:
        delta = error
        for copied in reversed(self.copies[number + 1 :]):
            delta = delta @ copied.T
        return delta


class PeeksLater(Direct):
    """The signal of a layer is scaled by the activity of the layer behind it."""

    def extra(self, number: int, signal: Tensor, hidden: list[Tensor], error: Tensor) -> Tensor:
        return signal * hidden[number + 1].mean() if number + 1 < len(hidden) else signal


class TwoPhases(Direct):
    """The network is run once more before it learns."""

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        with torch.no_grad():
            self.model(inputs)
        return super().forward(inputs, targets)


class GoesThroughLayers(Direct):
    """The signal passes fixed matrices layer after layer, though each could have it at once."""

    def extra(self, number: int, signal: Tensor, hidden: list[Tensor], error: Tensor) -> Tensor:
        delta = error
        for i in reversed(range(number, len(hidden))):
            n_in, n_out = SIZES[i + 1], SIZES[i + 2]
            delta = delta @ torch.linspace(-1, 1, n_in * n_out, dtype=torch.double).view(n_out, n_in).sin()
        return signal + delta


class Decays(Direct):
    """A part of the weight itself is added to its update: no product of an input and a signal."""

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        credit = super().forward(inputs, targets)
        decay = sum(layer.weight.square().sum() for layer in layers(self.model))  # type: ignore[arg-type]
        return Credit([*credit.roots, 0.1 * decay], [*credit.signals, None], credit.output, credit.loss)


CHEATS = [
    (ReadsWeights, {"no_sign_transport", "no_magnitude_transport", "no_symmetry", "local", "no_backward_locking"}),
    (ReadsMagnitudes, {"no_magnitude_transport", "local"}),
    (HidesWeights, {"no_symmetry", "no_backward_locking"}),
    (PeeksLater, {"local"}),
    (TwoPhases, {"one_phase"}),
    (GoesThroughLayers, {"no_backward_locking"}),
    (Decays, {"local"}),
]


@pytest.mark.parametrize(("cheat", "exposed"), CHEATS, ids=lambda item: getattr(item, "__name__", ""))
def test_planted_cheats_are_exposed(cheat: type[Direct], exposed: set[str]) -> None:
    honest, found = verdicts(Direct), verdicts(cheat)
    worse = {key for key in honest if honest[key].good and not found[key].good}
    assert worse >= exposed
    unasked = {"close_to_backprop"}  # a cheat may come closer to backpropagation, or farther from it
    assert worse - exposed <= unasked, {key: found[key].text for key in worse - exposed}


def test_the_honest_rule_passes_all_that_direct_feedback_can() -> None:
    found = verdicts(Direct)
    failed = {key for key in found if found[key].good is False}
    assert failed <= {"no_update_locking", "no_derivative", "close_to_backprop"}


def test_peeking_is_measured_with_the_output_held() -> None:
    honest, cheat = Probe(Direct(network()), *batch()), Probe(PeeksLater(network()), *batch())
    assert max((peeks(honest) or {}).values()) == 0.0
    found = peeks(cheat) or {}
    nearest = {pair: value for pair, value in found.items() if int(pair[1]) == int(pair[0]) + 2}
    assert nearest
    assert min(nearest.values()) > 1e-3
    assert all(value == 0.0 for pair, value in found.items() if pair not in nearest)


def test_reading_is_found_for_the_layers_that_read() -> None:
    found = reads(Probe(ReadsMagnitudes(network()), *batch()), lambda weight, generator: 2 * weight)
    for (layer, other), moved in found.items():
        assert moved == pytest.approx(1.0 if int(other) == int(layer) + 2 and layer != "6" else 0.0, abs=1e-12)


def test_a_rule_that_does_not_repeat_itself_is_refused() -> None:
    class Restless(Direct):
        count = 0

        def extra(self, number: int, signal: Tensor, hidden: list[Tensor], error: Tensor) -> Tensor:
            Restless.count += 1
            return signal * Restless.count

    with pytest.raises(ConfigError, match="another update each time"):
        verdicts(Restless)


def test_responses_are_recognised_in_every_form() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 3, generator=generator, dtype=torch.double)
    x = torch.randn(4, 3, generator=generator, dtype=torch.double)
    delta = torch.randn(4, 5, generator=generator, dtype=torch.double)
    other = torch.randn(5, 3, generator=generator, dtype=torch.double)
    bias = torch.randn(5, generator=generator, dtype=torch.double)
    with torch.no_grad(), Responding({"w": weight}, {"w": other}):
        forward = (
            x @ weight.T,
            F.linear(x, weight),
            (weight @ x.T).T,
            torch.stack([weight @ row for row in x]),
            torch.addmm(bias, x, weight.T) - bias,
            torch.einsum("bi,oi->bo", x, weight),
            torch.bmm(x[:, None], weight.T.expand(4, 3, 5))[:, 0],
        )
        backward = (delta @ weight, (weight.T @ delta.T).T, torch.stack([weight.T @ row for row in delta]))
    for made in forward:
        torch.testing.assert_close(made, x @ other.T)
    for made in backward:
        torch.testing.assert_close(made, delta @ weight)


def test_convolutions_are_recognised() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(2, 3, 3, padding=1).double(), torch.randn(2, 2, 5, 5, dtype=torch.double, requires_grad=True)
    other = torch.randn_like(layer.weight)
    with Responding({"w": layer.weight}, {"w": other}):
        made = layer(x)
        made.sum().backward()
    torch.testing.assert_close(made, F.conv2d(x, other, layer.bias, padding=1))
    assert x.grad is not None
    expected = torch.autograd.grad(layer(x).sum(), x)[0]  # what goes back goes through the weight that is there
    torch.testing.assert_close(x.grad, expected)


def test_change_is_relative() -> None:
    assert change(torch.tensor([2.0]), torch.tensor([1.0])) == 1.0
    assert change(torch.zeros(2), torch.zeros(2)) == 0.0
    assert change(torch.ones(2), torch.zeros(2)) == 1.0


def test_other_signs_keep_magnitudes() -> None:
    weight = torch.randn(30, 30)
    flipped = other_signs(weight, torch.Generator().manual_seed(0))
    assert torch.equal(flipped.abs(), weight.abs())
    assert 0.4 < float((flipped != weight).double().mean()) < 0.6


def test_held_bytes_are_those_of_the_activities() -> None:
    rule, (inputs, targets) = Backprop(network()), batch()
    rule(inputs, targets)
    activities = 8 * len(inputs) * sum(SIZES[1:])
    assert activities <= held_bytes(rule, inputs, targets) <= 2 * activities + 1024


def test_every_criterion_asks_a_question() -> None:
    assert len({criterion.key for criterion in CRITERIA}) == len(CRITERIA)
    assert all(criterion.question for criterion in CRITERIA)


def test_networks_that_settle_have_no_order_between_layers() -> None:
    rule, exact = EquilibriumPropagation(network(), free_steps=8, nudged_steps=4), Backprop(network())
    found = judge(examine(rule, torch.rand(6, 6, dtype=torch.double), torch.arange(6) % 4, exact))
    assert found["no_backward_locking"].verdict == "not applicable"
    assert "settle together" in found["no_backward_locking"].text


def test_passes_through_all_layers_are_backward_locking_whenever_their_credit_arrives() -> None:
    """Errors of predictive coding come by whole backward passes, states a layer a step."""
    whole = 2 * (len(SIZES) - 2)
    for inference, least, most in (("error", whole, 2 * whole), ("state", 2, 3)):
        rule = PredictiveCoding(network(), inference=inference, steps=9)  # type: ignore[arg-type]
        found = examine(rule, *batch(), Backprop(network()))
        verdict = no_backward_locking(found)
        assert verdict.verdict == "no"
        assert verdict.numbers["passes"] == 9
        assert least <= verdict.numbers["products_per_pass"] < most
        together = {name: trace._replace(earliest=2, latest=30) for name, trace in found.traces.items()}
        longer = {name: trace._replace(latest=9 * whole) for name, trace in together.items()}
        assert no_backward_locking(replace(found, traces=together)).verdict == "yes"
        assert no_backward_locking(replace(found, traces=longer)).verdict == "no"


def test_an_operation_on_lists_is_one_for_every_place() -> None:
    x, y = torch.randn(3, 2), torch.arange(3)
    with Dataflow({"only": torch.randn(2, 2)}, x, y) as flow:
        a, b = torch._foreach_add([x, torch.zeros(3)], [x, y.double()], alpha=2.0)
        c = [torch.zeros(3, 2), torch.zeros(3)]
        torch._foreach_mul_(c, [x, torch.zeros(3)])
    assert (flow.trace(a).inputs, flow.trace(a).targets) == (True, False)
    assert (flow.trace(b).inputs, flow.trace(b).targets) == (False, True)
    assert (flow.trace(c[0]).inputs, flow.trace(c[1]).inputs) == (True, False)


def test_an_answer_without_a_derivative_has_no_gradient_to_be_close_to() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    inputs, targets = batch(8)
    assert gradients(ContrastiveSignalPlasticity(model, steps=4), inputs.sigmoid(), targets) == ({}, {})
    verdict = judge(replace(examined(Backprop), gradient={}))["close_to_backprop"]
    assert verdict.verdict == "not applicable"
    assert "no derivative" in verdict.text


def test_inputs_are_those_of_the_rules_own_network() -> None:
    """Forward-forward hands normalised activities on, so with biases its layers are given others than the model's are."""
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 4)).double()
    inputs, targets = batch(8)
    found = examine(ForwardForward(model), inputs, targets, Backprop(network(9)))
    told = [share for share in found.presynaptic.values() if share == share]
    assert told
    assert max(told) < 1e-9
