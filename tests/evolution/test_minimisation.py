"""Walks of evolved networks against slow loops, number by number from the equations."""

import math
import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from apical.errors import ConfigError
from apical.evolution.functions import FUNCTIONS, draw
from apical.evolution.minimisation import KINDS, Kind, Minimisation, Setting, together
from apical.evolution.strategy import Search, Strategy


def alone(task: Minimisation, vector: Tensor, start: list[float], shift: list[float]) -> list[list[float]]:
    """One individual, one start."""
    setting, values = task.setting, vector.tolist()
    d, H = setting.dimension, setting.hidden
    moved = 1 if setting.kind == "coordinate" else d
    share = d if setting.kind == "coordinate" else 1
    level = FUNCTIONS[setting.function].level(d) / share
    f = FUNCTIONS[setting.function]

    def take(rows: int, columns: int) -> tuple[list[list[float]], list[float]]:
        weight = [[values.pop(0) for _ in range(columns)] for _ in range(rows)]
        return weight, [values.pop(0) for _ in range(rows)]

    def times(layer: tuple[list[list[float]], list[float]], s: list[float]) -> list[float]:
        weight, bias = layer
        return [sum(w * a for w, a in zip(row, s, strict=True)) + b for row, b in zip(weight, bias, strict=True)]

    def at(x: list[float]) -> float:
        return float(f(torch.tensor([a - b for a, b in zip(x, shift, strict=True)], dtype=torch.double))) / share

    if setting.kind == "stateless":
        layers = [take(H, moved + 2), take(H, H), take(moved, H)]
    else:
        layers = [take(H, 2 * moved + 4 + H), take(moved, H)]
    assert not values
    x, path = list(start), [list(start)]
    turn = setting.turn if setting.kind == "coordinate" else setting.steps
    for step in range(setting.steps):
        if step % turn == 0:
            chosen = [step // turn % d] if setting.kind == "coordinate" else list(range(d))
            u, memory, change = [0.0] * moved, [0.0] * H, 0.0
            best, lowest = [x[i] for i in chosen], at(x)
        value = at(x)
        scaled = math.log(1 + value) / math.log(1 + level)
        if setting.kind == "stateless":
            s = [*u, math.tanh(10 * change / level), scaled]
            for layer in layers[:2]:
                s = [math.tanh(a) for a in times(layer, s)]
            sent = times(layers[2], s)
        else:
            away = [b - x[i] for b, i in zip(best, chosen, strict=True)]
            time = -1 + 2 * (step % turn) / (turn - 1)
            s = [*u, *away, math.tanh(10 * change / level), math.tanh(10 * (value - lowest) / level), scaled, time]
            memory = [math.tanh(a) for a in times(layers[0], s + memory)]
            sent = times(layers[1], memory)
        u = [math.tanh(a) for a in sent]
        for i, step_of_i in zip(chosen, u, strict=True):
            x[i] -= setting.cap * step_of_i
        change = at(x) - value
        if at(x) < lowest:
            best, lowest = [x[i] for i in chosen], at(x)
        path.append(list(x))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_walks_of_a_population_are_those_of_each_alone(kind: Kind) -> None:
    task = Minimisation(Setting("ackley", 3, kind, cap=0.4, steps=14, turn=4, starts=4, hidden=5))
    generator = torch.Generator().manual_seed(3)
    individuals = torch.randn(3, task.network.parameters, generator=generator, dtype=torch.double)
    starts, shifts = draw(4, 3, 1.0, seed=4)
    path = task.walk(individuals, starts, shifts)
    assert path.shape == (15, 3, 4, 3)
    for p in range(3):
        for s in range(4):
            slow = alone(task, individuals[p], starts[s].tolist(), shifts[s].tolist())
            torch.testing.assert_close(path[:, p, s], torch.tensor(slow, dtype=torch.double), rtol=0, atol=1e-9)


def test_networks_for_coordinates_move_one_at_a_time_and_fit_any_dimension() -> None:
    task = Minimisation(Setting("rastrigin", 3, "coordinate", steps=12, turn=4))
    path = task.walk(task.start.double()[None], *draw(5, 3, 1.0, seed=1))[:, 0]
    moved = (path[1:] - path[:-1]).abs().amax(1) > 0  # (steps, d): of any start
    assert moved.int().argmax(1).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert moved.sum(1).tolist() == [1] * 12
    larger = Minimisation(replace(task.setting, dimension=7))
    assert larger.network.parameters == task.network.parameters


@pytest.mark.parametrize("kind", KINDS)
def test_no_network_sees_where_the_minimum_is(kind: Kind) -> None:
    task = Minimisation(Setting("rastrigin", 2, kind, steps=20, turn=5))
    starts, shifts = draw(6, 2, 1.0, seed=5)
    one = task.start.double()[None]
    moved = task.walk(one, starts + shifts, shifts) - shifts
    torch.testing.assert_close(moved, task.walk(one, starts, torch.zeros_like(shifts)), rtol=0, atol=1e-8)


def test_no_step_is_longer_than_the_cap() -> None:
    task = Minimisation(Setting("rosenbrock", cap=0.3, steps=15))
    path = task.walk(20 * task.start.double()[None], *draw(5, 2, 1.0, seed=2))
    steps = (path[1:] - path[:-1]).abs()
    assert steps.max() <= 0.3 + 1e-12
    assert steps.max() > 0.25


def test_fitness_is_minus_the_mean_final_value_of_fresh_starts() -> None:
    task = Minimisation(Setting("himmelblau", shift=1.0, starts=8, steps=9, seed=1))
    individuals = torch.stack([task.start, -task.start]).double()
    fitness = task.fitness(individuals, 3)
    assert bool((fitness < 0).all())
    assert torch.equal(fitness, pickle.loads(pickle.dumps(task)).fitness(individuals, 3))
    assert torch.equal(fitness[:1], task.fitness(individuals[:1], 3))
    assert not torch.equal(fitness, task.fitness(individuals, 4))
    still = torch.zeros_like(individuals)  # never moves
    assert torch.equal(task.walk(still, *draw(8, 2, 1.0, 0))[-1, 0], draw(8, 2, 1.0, 0)[0])


def test_tasks_together_have_the_fitness_of_each_alone() -> None:
    tasks = [Minimisation(Setting("ackley", starts=4, steps=6, seed=seed)) for seed in (0, 1)]
    populations = torch.stack([torch.stack([task.start, -task.start]) for task in tasks]).double()
    both = together(tasks, populations, 7)
    for task, population, found in zip(tasks, populations, both, strict=True):
        torch.testing.assert_close(found, task.fitness(population, 7), rtol=1e-12, atol=0)
    assert not torch.equal(both[0], both[1])


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
    task = Minimisation(Setting("styblinski-tang", starts=16))
    search = Search(Strategy(population=16, step=0.3), task.start)
    before = task.fitness(search.center[None], 1000)
    for generation in range(60):
        population = search.ask(generation)
        search.tell(population, task.fitness(population, generation))
    assert task.fitness(search.center[None], 1000) > before / 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Minimisation(Setting(steps=0)), "positive"),
        (lambda: Minimisation(Setting(kind="both")), "stateless, recurrent"),  # type: ignore[arg-type]
        (lambda: Minimisation(Setting("himmelblau", 3)), "not defined in 3"),
    ],
)
def test_errors(call: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()  # type: ignore[operator]
