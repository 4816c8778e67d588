"""Many lifetimes at once equal one after the other, and the equations; memory is bounded by the chunk."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tests.rules import tdca_reference as reference
from torch import Tensor, nn

import apical
from apical import models
from apical.core.credit import CreditRule
from apical.core.wrapped import WrappedRule
from apical.errors import ConfigError, DataError, UnsupportedModelError
from apical.evolution.population import Layout, Lifetime, Population, accuracies, losses
from apical.rules.top_down.teacher import TopDownNetwork
from apical.testing import residual_network


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batch(size: int = 20) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(size, 6, dtype=torch.double, generator=draw), torch.arange(size) % 3


def taught(sites: int | None = None) -> tuple[Population, Tensor, Tensor]:
    """A population, start weights (n,), and four top-down networks (4, m)."""
    torch.manual_seed(0)
    rule = apical.TopDownCreditAssignment(perceptron(), teacher=TopDownNetwork(3, [5, 4], hidden=8, sites=sites).double())
    population = Population(rule, *batch(), "teacher.")
    networks = [TopDownNetwork(3, [5, 4], hidden=8, sites=sites).double() for _ in range(4)]
    assert population.other is not None
    flat = [population.other.flat({f"teacher.{name}": p.detach() for name, p in n.named_parameters()}) for n in networks]
    return population, population.start(perceptron()), torch.stack(flat)


def alone(rule: CreditRule, lifetime: Lifetime, x: Tensor, y: Tensor, seed: int = 0) -> Tensor:
    """The plain loop with PyTorch's own optimiser and clipping; the trained weights, flat."""
    parameters = [p for p in rule.model.parameters()]
    make: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    extra = {"momentum": 0.9} if lifetime.optimizer == "sgd" else {}
    optimizer = make[lifetime.optimizer](parameters, lr=lifetime.lr, **extra)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(lifetime.steps):
        index = torch.arange(len(x))
        if lifetime.batch_size is not None:
            index = torch.randperm(len(x), generator=generator)[: lifetime.batch_size]
        optimizer.zero_grad()
        rule(x[index], y[index]).backward()
        if lifetime.clip:
            nn.utils.clip_grad_norm_(parameters, lifetime.clip)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in parameters])


LIFETIMES = [
    Lifetime(steps=12, lr=0.05, clip=0.3),
    Lifetime(steps=12, lr=0.05, clip=0.0),
    Lifetime(steps=12, lr=0.05, optimizer="sgd", clip=0.5),
    Lifetime(steps=12, lr=0.02, batch_size=7),
]


@pytest.mark.parametrize("lifetime", LIFETIMES)
@pytest.mark.parametrize("sites", [None, 2])
def test_a_population_equals_the_plain_loop(lifetime: Lifetime, sites: int | None) -> None:
    population, start, teachers = taught(sites)
    x, y = batch()
    together = population.train(start, teachers, x, y, lifetime, seed=5)
    assert population.other is not None
    for weights, teacher in zip(together, teachers, strict=True):
        model, network = perceptron(), TopDownNetwork(3, [5, 4], hidden=8, sites=sites).double()
        model.load_state_dict({k.removeprefix("model."): v for k, v in population.learner.named(start).items()})
        network.load_state_dict({k.removeprefix("teacher."): v for k, v in population.other.named(teacher).items()})
        expected = alone(apical.TopDownCreditAssignment(model, teacher=network), lifetime, x, y, seed=5)
        assert (weights - expected).abs().max() < 1e-10
        assert (expected - start).abs().max() > 1e-2


def test_a_lifetime_equals_the_equations_one_example_at_a_time() -> None:
    population, start, teachers = taught()
    x, y = batch()
    lifetime = Lifetime(steps=12, lr=0.05, clip=0.3)
    got = population.train(start, teachers, x, y, lifetime)
    assert population.other is not None

    def pairs(flat: dict[str, Tensor]) -> list[tuple[object, object]]:
        values = [v.numpy() for v in flat.values()]
        return list(zip(values[::2], values[1::2], strict=True))

    for weights, teacher in zip(got, teachers, strict=True):
        layers, network = pairs(population.learner.named(start)), pairs(population.other.named(teacher))
        expected = reference.lifetime(layers, network, x.numpy(), y.numpy(), steps=12, lr=0.05, clip=0.3)
        flat = np.concatenate([array.ravel() for layer in expected for array in layer])
        np.testing.assert_allclose(weights, flat, rtol=0, atol=1e-10)


@pytest.mark.parametrize("lifetime", LIFETIMES)
def test_a_recorded_step_is_the_step(lifetime: Lifetime) -> None:
    """To the same bits, also for a last part of the population and for batches of another size."""
    population, start, teachers = taught(2)
    recorded = Population(population.rule, *batch(), "teacher.", record=True)
    for size, part in ((20, teachers), (20, teachers[:3]), (13, teachers)):
        x, y = (t[:size] for t in batch())
        plain, again = (p.train(start, part, x, y, lifetime, seed=5) for p in (population, recorded))
        assert torch.equal(plain, again)
        assert (plain - start).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["bp", "dfa"])
def test_baselines_train_in_populations_too(name: str) -> None:
    torch.manual_seed(0)
    made = {"bp": apical.Backprop, "dfa": apical.DirectFeedbackAlignment}[name]
    x, y = batch()
    rule = made(perceptron())
    population = Population(rule, x, y)
    start = population.start(perceptron())
    rates = torch.tensor([0.01, 0.05], dtype=torch.double)
    together = population.train(start, None, x, y, Lifetime(steps=20), lr=rates)
    for weights, lr in zip(together, rates.tolist(), strict=True):
        model = perceptron()
        model.load_state_dict({k.removeprefix("model."): v for k, v in population.learner.named(start).items()})
        single = made(model)
        single.load_state_dict({**rule.state_dict(), **{f"model.{k}": v for k, v in model.state_dict().items()}})
        assert (alone(single, Lifetime(steps=20, lr=lr), x, y) - weights).abs().max() < 1e-10


def test_learners_with_data_of_their_own() -> None:
    population, start, teachers = taught()
    draw = torch.Generator().manual_seed(9)
    x = torch.randn(4, 15, 6, dtype=torch.double, generator=draw)
    y = torch.randint(0, 3, (4, 15), generator=draw)
    lifetime = Lifetime(steps=10)
    together = population.train(start, teachers, x, y, lifetime, own=True)
    for i in range(4):
        single = population.train(start, teachers[i : i + 1], x[i], y[i], lifetime)
        assert (together[i] - single[0]).abs().max() < 1e-12
    outputs = population.outputs(together, x, own=True)
    assert outputs.shape == (4, 15, 3)
    one = torch.nn.functional.cross_entropy(outputs[2], y[2])
    assert abs(losses(outputs, y, own=True)[2] - one) < 1e-12
    assert accuracies(outputs, y, own=True)[1] == (outputs[1].argmax(1) == y[1]).double().mean()


@pytest.mark.parametrize("model", ["lenet", "mlp-residual-8-8", "cnn-elu-3-4"])
def test_convolutions_and_residual_blocks(model: str) -> None:
    torch.manual_seed(0)
    shape = (1, 28, 28) if model == "lenet" else (1, 8, 8)
    x, y = torch.randn(6, *shape, dtype=torch.double), torch.arange(6) % 3
    net = models.build(model, shape, 3).double()
    probe = apical.TopDownCreditAssignment(net)
    widths = [cut.shape[1] for cut in probe.run(x)[1]]
    rule = apical.TopDownCreditAssignment(net, teacher=TopDownNetwork(3, widths, hidden=4, sites=2).double())
    population = Population(rule, x, y, "teacher.")
    start = population.start(net)
    assert population.other is not None
    teachers = torch.randn(2, population.other.size, dtype=torch.double)
    together = population.train(start, teachers, x, y, Lifetime(steps=3))
    network = TopDownNetwork(3, widths, hidden=4, sites=2).double()
    network.load_state_dict({k.removeprefix("teacher."): v for k, v in population.other.named(teachers[1]).items()})
    expected = alone(apical.TopDownCreditAssignment(net, teacher=network), Lifetime(steps=3), x, y)
    assert (together[1] - expected).abs().max() < 1e-9


def test_running_statistics_are_refused_by_name() -> None:
    rule = apical.TopDownCreditAssignment(residual_network())
    with pytest.raises(UnsupportedModelError, match=r"'1' \(BatchNorm2d\)"):
        Population(rule, torch.randn(2, 2, 8, 8, dtype=torch.double), torch.tensor([0, 1]))


def test_rules_around_rules_are_refused_by_name() -> None:
    rule = WrappedRule(apical.DirectFeedbackAlignment(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))))
    with pytest.raises(ConfigError, match="does not accept WrappedRule; pass its DirectFeedbackAlignment"):
        Population(rule, torch.randn(2, 4), torch.tensor([0, 1]))


def test_a_layout_is_its_own_inverse() -> None:
    named = {"a": torch.randn(2, 3), "b": torch.randn(4)}
    layout = Layout(named)
    assert layout.size == 10
    again = layout.named(layout.flat(named))
    assert all(torch.equal(again[name], named[name]) for name in named)
    many = {name: torch.stack([value, 2 * value]) for name, value in named.items()}
    assert torch.equal(layout.flat(many)[1], 2 * layout.flat(named))


def test_unusable_lifetimes_are_refused() -> None:
    for wrong in ({"steps": 0}, {"lr": 0.0}, {"clip": -1.0}, {"batch_size": 0}, {"optimizer": "rprop"}):
        with pytest.raises(ConfigError, match="lifetime"):
            Lifetime(**wrong)
    population, start, teachers = taught()
    with pytest.raises(DataError, match="batches of 50 from 20 examples"):
        population.train(start, teachers, *batch(), Lifetime(steps=1, batch_size=50))


def test_watching_sees_every_step() -> None:
    population, start, teachers = taught()
    seen: list[Tensor] = []
    end = population.train(start, teachers, *batch(), Lifetime(steps=3), watch=lambda step, w: seen.append(w.clone()))
    assert len(seen) == 4
    assert torch.equal(seen[0], start.expand_as(seen[0]))
    assert torch.equal(seen[-1], end)
