"""Functions against their known minima and finite differences; baselines and networks against slow ones."""

import math
from itertools import pairwise

import pytest
import torch

from apical.errors import ConfigError
from apical.evolution.functions import FUNCTIONS, METHODS, Method, best_of_random, descend, draw, function
from apical.evolution.perceptron import Perceptron, evaluate, recur

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


def test_baselines_follow_the_gradient() -> None:
    f = FUNCTIONS["rastrigin"]
    starts, shifts = draw(3, 2, 1.0, seed=6)
    path = descend(f, starts, shifts, "gd", 0.001, steps=4)
    x = starts.clone()
    for step in range(4):
        torch.testing.assert_close(path[step], x)
        z = x - shifts
        x = x - 0.001 * (2 * z + 20 * math.pi * torch.sin(2 * math.pi * z))
    path = descend(f, starts, shifts, "adam", 0.01, steps=5)
    torch.testing.assert_close((path[1] - path[0]).abs(), torch.full((3, 2), 0.01, dtype=torch.double))
    moved = torch.nn.Parameter(starts.clone())
    adam = torch.optim.Adam([moved], lr=0.01)
    for step in range(5):
        torch.testing.assert_close(path[step], moved.detach())
        z = moved.detach() - shifts
        moved.grad = 2 * z + 20 * math.pi * torch.sin(2 * math.pi * z)
        adam.step()
    path = descend(f, starts, shifts, "momentum", 0.001, steps=3)
    x, v = starts.clone(), torch.zeros_like(starts)
    for step in range(3):
        torch.testing.assert_close(path[step], x)
        z = x - shifts
        v = 0.9 * v + 2 * z + 20 * math.pi * torch.sin(2 * math.pi * z)
        x = x - 0.001 * v


@pytest.mark.parametrize("method", METHODS)
def test_several_rates_at_once_are_each_alone(method: Method) -> None:
    f = FUNCTIONS["ackley"]
    starts, shifts = draw(6, 3, 1.0, seed=6)
    rates = [1e-4, 1e-3, 1e-2]  # larger ones make chaotic paths, which magnify rounding
    together = descend(f, starts, shifts, method, torch.tensor(rates).double().view(-1, 1, 1), steps=8)
    for k, rate in enumerate(rates):
        torch.testing.assert_close(together[:, k], descend(f, starts, shifts, method, rate, steps=8))


def test_the_network_made_by_hand_sends_the_gradient_in_capped_steps() -> None:
    f = FUNCTIONS["rosenbrock"]
    starts, shifts = draw(6, 2, 1.0, seed=6)
    path = descend(f, starts, shifts, "capped", 0.01, steps=3, cap=0.4)
    for before, after in pairwise(path):
        a, b = (before - shifts).unbind(-1)
        gradient = torch.stack([-400 * a * (b - a * a) - 2 * (1 - a), 200 * (b - a * a)], -1)
        torch.testing.assert_close(after, before - 0.4 * torch.tanh(0.01 / 0.4 * gradient))
    gentle, plain = (descend(f, starts, shifts, method, 1e-7, steps=3) for method in ("capped", "gd"))
    torch.testing.assert_close(gentle, plain, rtol=0, atol=1e-8)


def test_random_points_are_the_best_of_those_drawn() -> None:
    f = FUNCTIONS["griewank"]
    starts, shifts = draw(5, 2, 1.0, seed=7)
    best = best_of_random(f, starts, shifts, seed=8, steps=30)
    points = draw(150, 2, 0.0, 8)[0].view(30, 5, 2)
    lowest = torch.minimum(f(points - shifts).min(0).values, f(starts - shifts))
    torch.testing.assert_close(f(best - shifts), lowest)


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


def test_recurrent_networks() -> None:
    network = Perceptron([3 + 4, 4, 2])
    generator = torch.Generator().manual_seed(1)
    vector = torch.randn(2, network.parameters, generator=generator, dtype=torch.double)
    (v, b), (u, c) = network.layers(vector)
    memory, slow = torch.zeros(2, 4, 5, dtype=torch.double), torch.zeros(2, 4, 5, dtype=torch.double)
    for _ in range(3):
        s = torch.randn(2, 3, 5, generator=generator, dtype=torch.double)
        sent, memory = recur(network.layers(vector), s, memory)
        slow = torch.tanh(v[:, :, :3] @ s + v[:, :, 3:] @ slow + b)
        torch.testing.assert_close(memory, slow)
        torch.testing.assert_close(sent, u @ slow + c)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: function("rastrigni"), "did you mean 'rastrigin'"),
        (lambda: function("himmelblau", 3), "not defined in 3"),
        (lambda: function("rosenbrock", 1), "not defined in 1"),
        (lambda: Perceptron([3]), "two positive"),
    ],
)
def test_errors(call: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()  # type: ignore[operator]
