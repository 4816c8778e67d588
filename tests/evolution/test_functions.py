"""Functions against their known minima and finite differences; walks, baselines and basins against slow loops."""

import math
import pickle

import pytest
import torch
from torch import Tensor

from apical.errors import ConfigError
from apical.evolution.functions import (
    BOX,
    FUNCTIONS,
    Input,
    Minimisation,
    Setting,
    basin,
    best_of_random,
    descend,
    draw,
    function,
)
from apical.evolution.perceptron import Perceptron, evaluate
from apical.evolution.strategy import Search, Strategy

NAMES = list(FUNCTIONS)


def dimensions(name: str) -> tuple[int, ...]:
    return (2,) if FUNCTIONS[name].plane else (2, 5)


@pytest.mark.parametrize("name", NAMES)
def test_minima_are_zero_and_lowest(name: str) -> None:
    f = FUNCTIONS[name]
    for d in dimensions(name):
        minima = f.minima(d)
        assert f(minima).abs().max() < 1e-10 * max(1, f.level(d))
        generator = torch.Generator().manual_seed(1)
        around = torch.randn(2000, 1, d, generator=generator, dtype=torch.double)
        for size in (1e-3, 0.1, 1.0):
            assert bool((f(minima + size * around) > -1e-12).all())
        assert f(minima + 0.05).min() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    f = FUNCTIONS[name]
    for d in dimensions(name):
        x = draw(20, d, 0.0, seed=2)[0].requires_grad_()
        (gradient,) = torch.autograd.grad(f(x).sum(), x)
        h, x = 1e-6, x.detach()
        for i in range(d):
            e = torch.eye(d, dtype=torch.double)[i] * h
            slope = (f(x + e) - f(x - e)) / (2 * h)
            torch.testing.assert_close(gradient[:, i], slope, rtol=1e-5, atol=1e-5 * f.level(d))


def test_values_at_points_worked_out_by_hand() -> None:
    z = torch.tensor([1.0, 0.5], dtype=torch.double)
    expected = {
        "rastrigin": (1 + 0) + (0.25 + 20),
        "himmelblau": (1 + 0.5 - 11) ** 2 + (1 + 0.25 - 7) ** 2,
        "rosenbrock": 100 * 0.25,
        "griewank": 1 + 1.25 / 4000 - math.cos(1) * math.cos(0.5 / math.sqrt(2)),
        "ackley": 20 + math.e - 20 * math.exp(-0.2 * math.sqrt(0.625)) - math.exp(0),
        "schwefel": 2 * 418.9828872724338 - math.sin(1) - 0.5 * math.sin(math.sqrt(0.5)),
        "styblinski-tang": 2 * 39.16616570377142 + (1 - 16 + 5 + 0.0625 - 4 + 2.5) / 2,
    }
    assert expected.keys() == FUNCTIONS.keys()
    for name, value in expected.items():
        assert float(FUNCTIONS[name].of(z)) == pytest.approx(value, abs=1e-12)
    outside = torch.tensor([600.0, 0.0], dtype=torch.double)
    at_edge = torch.tensor([500.0, 0.0], dtype=torch.double)
    schwefel = FUNCTIONS["schwefel"].of
    assert float(schwefel(outside) - schwefel(at_edge)) == pytest.approx(0.02 * 100**2)


def alone(setting: Setting, vector: Tensor, start: list[float], shift: list[float], level: float) -> list[list[float]]:
    """One individual, one start, number by number from the equations."""
    d, H = setting.dimension, setting.hidden
    n = d + (1 if setting.input == "absolute" else 2)
    values = vector.tolist()

    def take(rows: int, columns: int) -> tuple[list[list[float]], list[float]]:
        weight = [[values.pop(0) for _ in range(columns)] for _ in range(rows)]
        return weight, [values.pop(0) for _ in range(rows)]

    layers = [take(H, n), take(H, H), take(d, H)]
    f = FUNCTIONS[setting.function]

    def at(x: list[float]) -> float:
        return float(f(torch.tensor([a - b for a, b in zip(x, shift, strict=True)], dtype=torch.double)))

    x, u, change, path = list(start), [0.0] * d, 0.0, [list(start)]
    for _ in range(setting.steps):
        value = at(x)
        scaled = math.log(1 + value) / math.log(1 + level)
        s = [a / BOX for a in x] + [scaled]
        if setting.input == "relative":
            s = [*u, math.tanh(10 * change / level), scaled]
        for number, (weight, bias) in enumerate(layers):
            s = [sum(w * a for w, a in zip(row, s, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
            s = [math.tanh(a) for a in s] if number < 2 else s
        u = [math.tanh(a) for a in s]
        x = [a - setting.rate * b for a, b in zip(x, u, strict=True)]
        change = at(x) - value
        path.append(list(x))
    return path


@pytest.mark.parametrize("kind", ["absolute", "relative"])
def test_walks_of_a_population_are_those_of_each_alone(kind: Input) -> None:
    setting = Setting("ackley", 3, kind, steps=12, starts=4, hidden=5)
    task = Minimisation(setting)
    generator = torch.Generator().manual_seed(3)
    individuals = torch.randn(3, task.network.parameters, generator=generator, dtype=torch.double)
    starts, shifts = draw(4, 3, 1.0, seed=4)
    path = task.walk(individuals, starts, shifts)
    assert path.shape == (13, 3, 4, 3)
    for p in range(3):
        for s in range(4):
            slow = alone(setting, individuals[p], starts[s].tolist(), shifts[s].tolist(), task.level)
            torch.testing.assert_close(path[:, p, s], torch.tensor(slow, dtype=torch.double), rtol=0, atol=1e-10)


def test_relative_input_does_not_see_where_the_minimum_is() -> None:
    task = Minimisation(Setting("rastrigin", 2, "relative", steps=20))
    blind = Minimisation(Setting("rastrigin", 2, "absolute", steps=20))
    starts, shifts = draw(6, 2, 1.0, seed=5)
    one, other = (each.start.double()[None] for each in (task, blind))
    moved = task.walk(one, starts + shifts, shifts) - shifts
    torch.testing.assert_close(moved, task.walk(one, starts, torch.zeros_like(shifts)), rtol=0, atol=1e-9)
    seen = blind.walk(other, starts + shifts, shifts) - shifts
    assert (seen - blind.walk(other, starts, torch.zeros_like(shifts))).abs().max() > 1e-2


def test_fitness_is_minus_the_mean_final_value_of_fresh_starts() -> None:
    task = Minimisation(Setting("himmelblau", shift=1.0, starts=8, seed=1))
    individuals = torch.stack([task.start, -task.start]).double()
    fitness = task.fitness(individuals, 3)
    assert bool((fitness < 0).all())
    assert torch.equal(fitness, task.fitness(individuals, 3))
    assert torch.equal(fitness, pickle.loads(pickle.dumps(task)).fitness(individuals, 3))
    assert torch.equal(fitness[:1], task.fitness(individuals[:1], 3))
    assert not torch.equal(fitness, task.fitness(individuals, 4))
    still = torch.zeros_like(individuals)  # never moves, so fitness is that of the starts
    assert torch.equal(task.walk(still, *draw(8, 2, 1.0, 0))[-1, 0], draw(8, 2, 1.0, 0)[0])


def test_what_is_not_a_number_ranks_worst() -> None:
    task = Minimisation(Setting("rastrigin", starts=4, steps=5))
    search = Search(Strategy(population=4, step=0.3), task.start)
    population = search.ask(0)
    broken = population.clone()
    broken[1] = float("nan")
    fitness = task.fitness(broken, 0)
    assert fitness.isfinite().tolist() == [True, False, True, True]
    search.tell(population, fitness)
    lowest = Search(Strategy(population=4, step=0.3), task.start)
    lowest.tell(population, fitness.nan_to_num(nan=float(fitness[fitness.isfinite()].min()) - 5))
    torch.testing.assert_close(search.center, lowest.center)


def test_evolution_lowers_the_final_value() -> None:
    task = Minimisation(Setting("ackley", starts=16))
    search = Search(Strategy(population=16, step=0.3), task.start)
    before = task.fitness(search.center[None], 1000)
    for generation in range(60):
        population = search.ask(generation)
        search.tell(population, task.fitness(population, generation))
    assert task.fitness(search.center[None], 1000) > before + 1


def test_baselines_follow_the_gradient() -> None:
    f = FUNCTIONS["rastrigin"]
    starts, shifts = draw(3, 2, 1.0, seed=6)
    path = descend(f, starts, shifts, "gd", 0.001, steps=4)
    x = starts.clone()
    for step in range(4):
        torch.testing.assert_close(path[step], x)
        z = x - shifts
        x = x - 0.001 * (2 * z + 20 * math.pi * torch.sin(2 * math.pi * z))
    first = descend(f, starts, shifts, "adam", 0.01, steps=1)
    torch.testing.assert_close((first[1] - first[0]).abs(), torch.full((3, 2), 0.01, dtype=torch.double))


def test_random_points_are_the_best_of_those_drawn() -> None:
    f = FUNCTIONS["griewank"]
    starts, shifts = draw(5, 2, 1.0, seed=7)
    best = best_of_random(f, starts, shifts, seed=8, steps=30)
    points = draw(150, 2, 0.0, 8)[0].view(30, 5, 2)
    lowest = torch.minimum(f(points - shifts).min(0).values, f(starts - shifts))
    torch.testing.assert_close(f(best - shifts), lowest)


def test_basins_of_rastrigin_are_its_cells() -> None:
    f = FUNCTIONS["rastrigin"]
    starts, _ = draw(40, 2, 0.0, seed=9)
    shifts = torch.full((40, 2), 0.3, dtype=torch.double)
    ends = basin(f, starts, shifts)
    cell = (starts - shifts).round()
    inside = ((starts - shifts - cell).abs() < 0.4).all(1)  # away from the ridges
    assert inside.sum() > 10
    assert (ends - shifts - cell)[inside].abs().max() < 0.02


def test_perceptron() -> None:
    network = Perceptron([4, 12, 12, 2])
    assert network.parameters == 242
    start = network.start(0)
    assert torch.equal(start, network.start(0))
    assert not torch.equal(start, network.start(1))
    (w, b), *_ = network.layers(start[None])
    assert w.abs().max() <= (6 / 16) ** 0.5
    assert not bool(b.any())
    modules = torch.nn.Sequential(
        torch.nn.Linear(4, 12), torch.nn.Tanh(), torch.nn.Linear(12, 12), torch.nn.Tanh(), torch.nn.Linear(12, 2)
    )
    vector = torch.nn.utils.parameters_to_vector(modules.parameters()).detach()
    x = torch.randn(7, 4)
    torch.testing.assert_close(evaluate(network.layers(vector[None]), x.T[None])[0].T, modules(x).detach())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: function("rastrigni"), "did you mean 'rastrigin'"),
        (lambda: function("himmelblau", 3), "not defined in 3"),
        (lambda: function("rosenbrock", 1), "not defined in 1"),
        (lambda: Minimisation(Setting(steps=0)), "positive"),
        (lambda: Minimisation(Setting(input="both")), "absolute"),  # type: ignore[arg-type]
        (lambda: Perceptron([3]), "two positive"),
    ],
)
def test_errors(call: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()  # type: ignore[operator]
