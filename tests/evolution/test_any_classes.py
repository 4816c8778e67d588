"""Evolution of the top-down network for any number of classes: many at once are each alone; tasks have 2 classes to N."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import apical
from apical.errors import ConfigError
from apical.evolution.classification import AnyClasses, Classification, Images, Setting
from apical.evolution.population import Lifetime, Population
from apical.rules.top_down.equivariant import EquivariantNetwork
from apical.rules.top_down.hand_built import wired
from apical.rules.top_down.teacher import TopDownNetwork

SETTING = Setting(
    model="mlp-6-5",
    others=("mlp-tanh-4",),
    lifetime=Lifetime(steps=3, lr=0.05, optimizer="sgd", batch_size=8),
    hidden=4,
    by_class=True,
    examples=16,
    tasks=2,
    quiet=False,
)


def images(classes: int = 5) -> Images:
    draw = torch.Generator().manual_seed(0)
    return Images(torch.randn(100, 1, 4, 4, generator=draw), torch.arange(100) % classes, classes)


def perceptron(classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, classes)).double()


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("options", [{}, {"output": "error", "layers": 1}, {"hidden": 0}])
@pytest.mark.parametrize("record", [False, True])
def test_gradients_of_a_population_are_those_of_each_learner_alone(
    classes: int, options: dict[str, Any], record: bool
) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(9, 6, dtype=torch.double), torch.arange(9) % classes
    networks = [EquivariantNetwork(**options).double() for _ in range(3)]
    rule = apical.TopDownCreditAssignment(perceptron(classes), teacher=networks[0])
    population = Population(rule, x, y, "teacher.", record=record)
    models = [perceptron(classes) for _ in networks]
    assert population.other is not None
    teachers = [population.other.flat({f"teacher.{n}": p.detach() for n, p in one.named_parameters()}) for one in networks]
    weights = torch.stack([population.start(model) for model in models])
    for _ in range(2):  # made, and repeated from the record
        found = population.gradients(weights, torch.stack(teachers), x, y)
        for model, network, gradient in zip(models, networks, found, strict=True):
            single = apical.TopDownCreditAssignment(model, teacher=network)
            single.seed.copy_(rule.seed)  # the same random feedback
            model.zero_grad()
            single(x, y).backward()
            expected = torch.cat([p.grad.flatten() for p in model.parameters()])
            assert (gradient - expected).abs().max() < 1e-12
            assert expected.abs().max() > 1e-3


def test_tasks_have_two_classes_to_all_and_one_network_serves_them() -> None:
    task = AnyClasses([images()], SETTING)
    assert task.outputs == 5
    assert list(task.of) == [2, 3, 4, 5]
    individuals = task.start + 0.3 * torch.randn(3, len(task.start), generator=torch.Generator().manual_seed(0))
    seen: set[int] = set()
    for ways, of in task.of.items():
        inner = of.loss
        of.loss = lambda *given, ways=ways, inner=inner: (seen.add(ways), inner(*given))[1]  # type: ignore[method-assign,misc]
    for generation in range(12):
        fitness = task.fitness(individuals, generation)
        assert fitness.isfinite().all()
        assert len(set(fitness.tolist())) == 3  # individuals differ
    assert seen == {2, 3, 4, 5}
    assert {of.start.numel() for of in task.of.values()} == {task.start.numel()}
    assert list(AnyClasses([images()], replace(SETTING, ways=3)).of) == [2, 3]


def test_another_process_finds_the_same_fitness() -> None:
    """Random feedback follows from the setting's seed, not from what was drawn before."""
    individuals = AnyClasses([images()], SETTING).start.repeat(2, 1)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        task = AnyClasses([images()], SETTING)
        again = pickle.loads(pickle.dumps(task))
        found += [task.fitness(individuals, 3), again.fitness(individuals, 3)]
    assert all(torch.equal(found[0], fitness) for fitness in found)
    assert not torch.equal(found[0], AnyClasses([images()], replace(SETTING, seed=1)).fitness(individuals, 3))


def test_an_evolution_begins_with_a_wired_network_or_a_file_of_its_sizes(tmp_path: Path) -> None:
    task = AnyClasses([images()], SETTING)
    network = wired(EquivariantNetwork(2, 4))
    vector = task.weights_of("wired")
    again = task.network(0)
    torch.nn.utils.vector_to_parameters(vector, again.parameters())
    assert isinstance(again, EquivariantNetwork)
    assert again.layers == 2  # as many as the deepest learner has
    assert torch.equal(again.body[-1].weight, network.body[-1].weight)
    network.save(tmp_path / "teacher.pt")
    assert torch.equal(task.weights_of(str(tmp_path / "teacher.pt"))[-12:], network.body[-1].weight.detach().flatten())
    EquivariantNetwork(3, 4).save(tmp_path / "deeper.pt")
    with pytest.raises(ConfigError, match="layers: 3 vs 2"):
        task.weights_of(str(tmp_path / "deeper.pt"))
    TopDownNetwork(5, [6, 5], 4).save(tmp_path / "other.pt")
    with pytest.raises(ConfigError, match="outputs: 5 vs None"):
        task.weights_of(str(tmp_path / "other.pt"))


def test_quiet_networks_send_nothing_to_hidden_units_at_the_start() -> None:
    for output, silent in (("evolved", 1), ("error", 0)):
        network = Classification([images()], replace(SETTING, quiet=True, output=output, layers=4)).network(0)  # type: ignore[arg-type]
        weight = network.body[-1].weight
        assert not weight[silent:].any()
        assert weight[:silent].any() == (silent > 0)
        assert len(weight) == 4 + silent


def test_tasks_of_several_numbers_of_classes_need_a_network_for_them() -> None:
    with pytest.raises(ConfigError, match="by_class=True"):
        AnyClasses([images()], replace(SETTING, by_class=False))


@pytest.mark.parametrize("wrong", [{"sites": 3}, {"relative": False}, {"credit": "probabilities"}])
def test_settings_that_such_a_network_has_not_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="relative credit on logits"):
        AnyClasses([images()], replace(SETTING, **wrong))
    with pytest.raises(ConfigError, match="layers requires"):
        Classification([images()], replace(SETTING, by_class=False, layers=3))
