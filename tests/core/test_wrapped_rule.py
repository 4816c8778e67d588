"""A wrapper that changes nothing is the wrapped rule, bit for bit, and stands in for it wherever a rule is expected."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import apical
from apical.core.credit import CreditRule, Loss
from apical.core.processes import summed
from apical.core.transport import geometry
from apical.core.units import Layer
from apical.core.wrapped import WrappedRule, row_gain
from apical.diagnostics.alignment import unchanged
from apical.diagnostics.gauss_newton import minimum_norm_alignment
from apical.errors import ConfigError
from apical.testing import check_model, check_rule
from apical.testing.comparison import Factory, gradients, make, require_same, train
from apical.testing.networks import dense_batch, dense_network
from apical.testing.two_ranks import on_two_ranks

RULES: dict[str, Factory] = {
    "bp": apical.Backprop,
    "fa": apical.FeedbackAlignment,
    "kp": apical.KolenPollack,
    "pfa": apical.ProductFeedbackAlignment,
    "dfa": apical.DirectFeedbackAlignment,
    "dfc-ss": partial(apical.DeepFeedbackControl, variant="ss"),
    "ccl": apical.CounterCurrentLearning,
    "dtp": partial(apical.DifferenceTargetPropagation, variant="dtp"),
    "ep": partial(apical.EquilibriumPropagation, free_steps=3, nudged_steps=2),
    "pc": apical.PredictiveCoding,
}


def around(kind: Factory, model: nn.Module, loss: Loss) -> CreditRule:
    """The plain wrapper, importable by other processes."""
    return WrappedRule(kind(model, loss))


def trained(factory: Factory, compiled: bool = False) -> dict[str, Tensor]:
    """Compiled, the gradients of the captured graph; :func:`test_conforms` traces backward passes."""
    rule = make(factory)
    torch.manual_seed(1)
    if compiled:
        rule(*dense_batch(0)).backward()
        rule.zero_grad()
        torch._dynamo.reset()
        torch.compile(rule, backend="eager", fullgraph=True)(*dense_batch(1)).backward()
        return {name.removeprefix("rule."): grad for name, grad in gradients(rule).items()}
    train(rule, range(3))
    return rule.state_dict()


@pytest.mark.parametrize("kind", RULES.values(), ids=RULES)
def test_bit_equal(kind: Factory) -> None:
    bare, wrapped = trained(kind), trained(partial(around, kind))
    assert list(bare) == list(wrapped)  # the same keys in the same order
    require_same(bare, wrapped, 0.0, "wrapped")


@pytest.mark.parametrize("kind", ["bp", "fa", "dfa", "ccl", "dtp"])
def test_bit_equal_when_compiled(kind: str) -> None:
    bare, wrapped = trained(RULES[kind], compiled=True), trained(partial(around, RULES[kind]), compiled=True)
    require_same(bare, wrapped, 0.0, "wrapped and compiled")


def rank_trained(rank: int, factory: Factory) -> dict[str, Tensor]:
    torch.manual_seed(0)
    rule = factory(dense_network(), F.cross_entropy)
    torch.manual_seed(1)
    parallel = DistributedDataParallel(rule)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.05)
    for step in range(3):
        inputs, targets = dense_batch(step)
        optimizer.zero_grad()
        parallel(inputs[rank::2], targets[rank::2]).backward()
        optimizer.step()
    return rule.state_dict()


@pytest.mark.parametrize("kind", ["fa", "dfa", "ccl", "dtp"])
def test_bit_equal_on_two_ranks(kind: str) -> None:
    bare, wrapped = (on_two_ranks(rank_trained, factory)[0] for factory in (RULES[kind], partial(around, RULES[kind])))
    require_same(bare, wrapped, 0.0, "wrapped on two ranks")


@pytest.mark.parametrize("kind", ["fa", "dtp"])
def test_conforms(kind: str) -> None:
    check_rule(partial(around, RULES[kind]))


@pytest.mark.parametrize("kind", RULES.values(), ids=RULES)
def test_state_dicts_load_each_way(kind: Factory) -> None:
    bare, wrapped, twice = make(kind), WrappedRule(make(kind, seed=1)), WrappedRule(WrappedRule(make(kind, seed=2)))
    twice.load_state_dict(bare.state_dict())
    wrapped.load_state_dict(twice.state_dict())
    require_same(wrapped.state_dict(), bare.state_dict(), 0.0, "bare, twice, once")
    bare.load_state_dict(wrapped.state_dict())
    inside = nn.ModuleDict({"it": wrapped})
    assert list(inside.state_dict()) == [f"it.{key}" for key in bare.state_dict()]
    inside.load_state_dict(inside.state_dict())
    with pytest.raises(RuntimeError, match="Missing"):
        wrapped.load_state_dict({})


def test_versions_of_modules_are_kept() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    bare = apical.FeedbackAlignment(model).state_dict()
    wrapped = WrappedRule(apical.FeedbackAlignment(model)).state_dict()
    versions = [getattr(state, "_metadata")["model.1"] for state in (bare, wrapped)]  # noqa: B009
    assert versions == [{"version": 2}] * 2


def test_it_speaks_for_the_wrapped_rule() -> None:
    ccl = make(apical.CounterCurrentLearning)
    rule = WrappedRule(ccl)
    inputs, targets = dense_batch(0)
    assert rule.model is ccl.model
    assert rule.loss is ccl.loss
    assert rule.placement(inputs) == ccl.placement(inputs)
    found, expected = (each.measures((inputs, targets), [(inputs, targets)]) for each in (rule, ccl))
    assert found == expected
    assert rule.feedback_parameters() == ccl.feedback_parameters() != []
    rule.phase = "forward"
    assert (ccl.phase, rule.phase) == ("forward", "forward")
    dfc = WrappedRule(make(partial(apical.DeepFeedbackControl, variant="ss")))
    assert dfc.two_phase
    assert dfc.learns_apart == dfc.rule.learns_apart
    ep = WrappedRule(make(apical.EquilibriumPropagation))
    assert not ep.feed_forward
    assert torch.equal(ep.answer(inputs), ep.rule.answer(inputs))


def test_diagnostics_look_through_it() -> None:
    inputs, targets = dense_batch(0)
    dfc = make(partial(apical.DeepFeedbackControl, variant="ss", nudge=0.5, difference="voltage"))
    expected = minimum_norm_alignment(dfc, inputs, targets)
    assert minimum_norm_alignment(WrappedRule(dfc), inputs, targets) == expected
    before = dfc.calls
    with unchanged(WrappedRule(dfc)):
        dfc(inputs, targets)
    assert dfc.calls == before


@pytest.mark.parametrize(
    ("kind", "checks"),
    [
        (apical.FeedbackAlignment, {"feedback reaches below", "zero feedback", "feedback differs"}),
        (apical.DirectFeedbackAlignment, {"zero signals", "signals reach their unit", "signals differ"}),
    ],
)
@pytest.mark.parametrize("outer", [WrappedRule, apical.LocalSolve])
def test_check_model_intervenes_on_the_wrapped_rule(outer: Any, kind: Factory, checks: set[str]) -> None:
    report = check_model(outer(make(kind)), *dense_batch(0), skip={"compiled"})
    assert checks <= report.passed.keys()


def test_copies_modes_and_devices_reach_the_wrapped_rule() -> None:
    rule = WrappedRule(make(partial(apical.WeightMirror, warmup=0)))
    other = copy.deepcopy(rule).eval().float()
    assert other.model is other.rule.model is not rule.model
    assert not other.rule.training
    assert rule.rule.training
    assert next(other.model.parameters()).dtype == torch.float32


def wrappers() -> list[Callable[[nn.Module], WrappedRule]]:
    class One:
        mode: Any = "propagating"

        def __call__(self, rows: Tensor) -> Tensor:
            return rows.new_full((len(rows),), 1.5)

    return [
        lambda model: apical.Modulated(apical.FeedbackAlignment(model), One()),
        lambda model: apical.LocalSolve(apical.FeedbackAlignment(model)),
        lambda model: apical.LocalSolve(apical.DirectFeedbackAlignment(model)),
    ]


@pytest.mark.parametrize("number", range(3))
def test_copies_learn_alike_and_copied_models_have_no_rule(number: int) -> None:
    torch.manual_seed(0)
    rule = wrappers()[number](dense_network())
    rule(*dense_batch(0)).backward()
    own = gradients(rule)
    rule.zero_grad()
    other = copy.deepcopy(rule)
    other(*dense_batch(0)).backward()
    require_same(gradients(other), own, 0.0, "a copy")
    assert not gradients(rule)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in other.detach().modules())
    for model in (copy.deepcopy(rule.model), pickle.loads(pickle.dumps(rule.model))):
        inputs, targets = dense_batch(0)
        found, expected = (
            torch.autograd.grad(F.cross_entropy(m(inputs), targets), list(m.parameters())) for m in (model, rule.model)
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_two_rules_on_one_model_do_not_meet() -> None:
    model = dense_network()
    apical.Backprop(model)(*dense_batch(0)).backward()
    plain = gradients(model)
    for number in range(3):
        rules = [wrappers()[number](model), wrappers()[number](model), apical.Backprop(model)]
        for rule in rules:
            model.zero_grad()
            rule(*dense_batch(0)).backward()
        require_same(gradients(model), plain, 0.0, "backpropagation beside")


def test_constraints_are_passed_on() -> None:
    class Bounded(apical.Backprop):
        def constrain_(self) -> None:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.clamp_(-0.1, 0.1)

    rule = WrappedRule(make(Bounded))
    train(rule, range(1))
    assert max(float(p.detach().abs().max()) for p in rule.parameters()) <= 0.1


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="wraps a rule, not a Sequential"):
        WrappedRule(dense_network())  # type: ignore[arg-type]
    bare = make(apical.Backprop)
    rule = WrappedRule(bare)
    assert rule.detach() is bare.model
    with pytest.raises(ConfigError, match="detached"):
        rule(*dense_batch(0))
    with pytest.raises(ConfigError, match="detached"):
        WrappedRule(bare)


def ranks_sum(rank: int) -> list[Tensor]:
    value = torch.full((2,), float(rank + 1))
    return [summed(value), value]


def test_sums_over_processes() -> None:
    for rank, (total, own) in enumerate(on_two_ranks(ranks_sum)):
        assert total.tolist() == [3.0, 3.0]
        assert own.tolist() == [rank + 1.0] * 2
    alone = torch.ones(2)
    assert summed(alone) is alone


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(4, 6), nn.Conv2d(4, 6, 2, groups=2), nn.ConvTranspose1d(4, 6, 3, groups=2)],
    ids=["dense", "grouped", "transposed"],
)
def test_a_row_is_what_feeds_one_output_channel(layer: Layer) -> None:
    """Multiplying an output channel's gradient is multiplying the error there."""
    dims = layer.weight.dim() - 2
    inputs, gain = torch.randn(3, 4, *[5] * dims), torch.arange(1.0, 7.0)
    shape = geometry(layer)
    taps = {name: row_gain(parameter, gain, shape) for name, parameter in layer.named_parameters()}
    output = torch.func.functional_call(layer, taps, (inputs,))
    delta = torch.randn_like(output)
    found = torch.autograd.grad(output, list(layer.parameters()), delta)
    expected = torch.autograd.grad(layer(inputs), list(layer.parameters()), delta * gain.view(6, *[1] * dims))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
