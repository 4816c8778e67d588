"""The evolution strategies: mirrored pairs, ranks, the released code's update, and that they find what they shall."""

import pytest
import torch
from torch import Tensor

from apical.errors import ConfigError
from apical.evolution.strategy import NAMES, SIGMA_DECAY, Search, Strategy, finite

pytest.importorskip("evotorch")


def sphere(x: Tensor) -> Tensor:
    return -(x - 1).square().sum(1)


def test_mirrored_pairs_average_to_the_centre() -> None:
    search = Search(Strategy(population=10), torch.randn(7))
    population = search.ask(0)
    assert population.shape == (10, 7)
    assert ((population[0::2] + population[1::2]) / 2 - search.center).abs().max() < 1e-6
    assert population.std() > 0


def test_the_centre_moves_as_the_released_code_moves_it() -> None:
    """d = sum (r+ - r-) eps, v = 0.9 v + 0.1 d, mu = mu + 0.1 v, with centred ranks over the population."""
    torch.manual_seed(0)
    search = Search(Strategy(population=8, step=0.1), torch.zeros(5, dtype=torch.double))
    velocity, mu = torch.zeros(5, dtype=torch.double), torch.zeros(5, dtype=torch.double)
    for generation in range(4):
        population = search.ask(generation)
        fitness = sphere(population)
        ranks = fitness.argsort().argsort().double() / 7 - 0.5
        eps = population[0::2] - mu
        velocity = 0.9 * velocity + 0.1 * ((ranks[0::2] - ranks[1::2])[:, None] * eps).sum(0)
        mu = mu + 0.1 * velocity
        search.tell(population, fitness)
        assert (search.center - mu).abs().max() < 1e-12


def test_the_deviation_learns_as_the_released_code_has_it() -> None:
    """dsig = 0.1 sum ((r+ + r-)/2) (eps^2 - sigma^2) / sigma / (2n), at most 20 %, then the decay."""
    torch.manual_seed(0)
    search = Search(Strategy(population=8), torch.zeros(5, dtype=torch.double))
    sigma = search.sigma.clone()
    population = search.ask(3)
    fitness = sphere(population)
    ranks = fitness.argsort().argsort().double() / 7 - 0.5
    eps = population[0::2]
    both = (ranks[0::2] + ranks[1::2]) / 2
    change = 0.1 * (both[:, None] * (eps.square() - sigma.square()) / sigma).sum(0) / 8
    expected = (sigma + change.clamp(-0.2 * sigma, 0.2 * sigma)) * SIGMA_DECAY
    search.tell(population, fitness)
    assert (search.sigma - expected).abs().max() < 1e-12


def test_the_deviation_never_changes_by_more_than_a_fifth() -> None:
    search = Search(Strategy(population=4, sigma=1.0), torch.zeros(50))
    for generation in range(30):
        before = search.sigma.clone()
        population = search.ask(generation)
        search.tell(population, sphere(population))
        ratio = search.sigma / SIGMA_DECAY / before
        assert (ratio <= 1.2 + 1e-5).all()
        assert (ratio >= 0.8 - 1e-5).all()


@pytest.mark.parametrize("name", NAMES)
def test_each_strategy_climbs_a_fifty_dimensional_sphere(name: str) -> None:
    step = 0.1 if name == "pgpe" else 0.3
    search = Search(Strategy(name=name, population=100, sigma=0.5, step=step), torch.zeros(50))
    for generation in range(200):
        population = search.ask(generation)
        search.tell(population, sphere(population))
    assert float(sphere(search.center[None])) > -5.0  # from -50


@pytest.mark.parametrize("name", ["pgpe", "pgpe-clipup"])
def test_the_step_decays_and_a_restored_search_remembers_it(name: str) -> None:
    """With a decay near zero only the first step counts, but for the momentum of the centre; and so after a restart."""
    strategy = Strategy(name=name, population=8, step=0.1, decay=1e-9)
    search, other = Search(strategy, torch.zeros(5)), Search(strategy, torch.zeros(5))
    search.tell(population := search.ask(0), sphere(population))
    first = search.center.clone()
    assert first.any()
    other.restore(search.state())
    for each in (search, other):
        each.tell(population := each.ask(1), sphere(population))
        assert torch.allclose(each.center, 1.9 * first, rtol=1e-5)  # nothing but 0.9 of the last move
    with pytest.raises(ConfigError, match="decay of the step"):
        Strategy(decay=0.0)


def test_what_is_not_finite_is_worst() -> None:
    assert finite(torch.tensor([2.0, float("nan"), 1.0, float("inf"), float("-inf")])).tolist() == [2.0, 0.0, 1.0, 0.0, 0.0]
    assert finite(torch.tensor([float("nan")] * 3)).tolist() == [0.0] * 3
    torch.manual_seed(0)
    plain, holed = (Search(Strategy(population=8), torch.zeros(5)) for _ in range(2))
    population = plain.ask(0)
    fitness = sphere(population)
    worst = int(fitness.argmin())
    plain.tell(population, fitness)
    fitness[worst] = float("nan")
    holed.tell(population, fitness)
    assert torch.equal(plain.center, holed.center)


def test_ranks_ignore_increasing_transforms() -> None:
    one, other = (Search(Strategy(population=8), torch.zeros(5)) for _ in range(2))
    population = one.ask(0)
    one.tell(population, sphere(population))
    other.tell(population, sphere(population).mul(0.1).exp())
    assert torch.equal(one.center, other.center)


@pytest.mark.parametrize("name", NAMES)
def test_a_restored_search_goes_on_as_the_first(name: str) -> None:
    def advance(search: Search, generations: range) -> None:
        for generation in generations:
            population = search.ask(generation)
            search.tell(population, sphere(population))

    whole = Search(Strategy(name=name, population=8), torch.zeros(5))
    advance(whole, range(6))
    half = Search(Strategy(name=name, population=8), torch.zeros(5))
    advance(half, range(3))
    again = Search(Strategy(name=name, population=8), torch.zeros(5))
    again.restore(half.state())
    advance(again, range(3, 6))
    assert torch.equal(whole.center, again.center)
    assert torch.equal(whole.sigma, again.sigma)


def test_asking_leaves_the_global_generator_alone() -> None:
    search = Search(Strategy(population=8), torch.zeros(5))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    search.ask(7)
    assert torch.equal(torch.rand(3), expected)


def test_unusable_settings_are_refused() -> None:
    for wrong, said in (
        ({"name": "ga"}, "strategy"),
        ({"population": 7}, "even"),
        ({"population": 2}, "even"),
        ({"sigma": 0.0}, "sigma"),
    ):
        with pytest.raises(ConfigError, match=said):
            Strategy(**wrong)
