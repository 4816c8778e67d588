"""Reinforcement learning by credits: against gymnasium's single environments, autograd, and a loop over one individual."""

import math
import pickle
import sys

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from apical.errors import ConfigError
from apical.evolution.environments import CART_POLE, Environments
from apical.evolution.perceptron import Perceptron
from apical.evolution.population import Lifetime
from apical.evolution.reinforcement import (
    Reinforcement,
    Setting,
    Steps,
    advantages,
    play,
    pseudo_gradient,
    reinforce,
    together,
    top_down,
)
from apical.evolution.seeds import seed_of
from apical.evolution.strategy import Search, Strategy, finite

SETTINGS = {
    "length": np.array([0.5, 0.25, 1.0]),
    "force_mag": np.array([10.0, 5.0, 15.0]),
    "gravity": np.array([9.8, 5.0, 15.0]),
    "masscart": np.array([1.0, 0.5, 2.0]),
    "masspole": np.array([0.1, 0.2, 0.05]),
}


def single(individual: int) -> gymnasium.Env:
    """gymnasium's own CartPole with one individual's settings."""
    pole = gymnasium.make("CartPole-v1").unwrapped
    for name, values in SETTINGS.items():
        setattr(pole, name, float(values[individual]))
    pole.total_mass = pole.masspole + pole.masscart
    pole.polemass_length = pole.masspole * pole.length
    return pole


def test_each_individual_has_the_dynamics_of_its_own_settings() -> None:
    environments = Environments(CART_POLE, 3, 2, 50, SETTINGS)
    first = environments.reset([7])
    assert first.shape == (3, 2, 4)
    assert np.array_equal(first[0], first[2])
    assert not np.array_equal(first[0, 0], first[0, 1])
    states = environments.vector.state.T.reshape(3, 2, 4).copy()
    poles = [[single(p) for _ in range(2)] for p in range(3)]
    for p in range(3):
        for e in range(2):
            poles[p][e].reset(seed=0)
            poles[p][e].state = tuple(states[p, e])
    alive = np.ones((3, 2), dtype=bool)
    random = np.random.default_rng(0)
    found = {p: [] for p in range(3)}
    for _ in range(40):
        actions = np.broadcast_to(random.integers(2, size=2), (3, 2)).copy()
        observations, rewards, ended = environments.step(actions)
        for p in range(3):
            for e in range(2):
                if alive[p, e]:
                    there, reward, terminated, _, _ = poles[p][e].step(int(actions[p, e]))
                    np.testing.assert_allclose(observations[p, e], there, rtol=1e-6, atol=1e-8)
                    assert (rewards[p, e], ended[p, e]) == (reward, terminated)
                    found[p].append(there)
        alive &= ~ended
    assert not np.allclose(found[0][1], found[1][1])
    assert not alive.all()
    assert sum(map(len, found.values())) > 60


def test_groups_begin_alike_and_seeds_differ() -> None:
    environments = Environments(CART_POLE, 4, 3, 10)
    states = environments.reset([1, 2])
    assert np.array_equal(states[0], states[1])
    assert np.array_equal(states[2], states[3])
    assert not np.array_equal(states[1], states[2])
    assert np.array_equal(environments.reset([1]), np.broadcast_to(states[0], (4, 3, 4)))
    assert np.abs(states).max() <= 0.05


@pytest.mark.parametrize("name", ["MountainCar-v0", "Acrobot-v1"])
def test_other_environments_run_with_settings(name: str) -> None:
    setting = {"MountainCar-v0": "force", "Acrobot-v1": "LINK_MASS_1"}[name]
    values = np.array([0.001, 0.003]) if name == "MountainCar-v0" else np.array([1.0, 3.0])
    environments = Environments(name, 2, 2, 15, {setting: values})
    first = environments.reset([3])
    assert np.array_equal(first[0], first[1])
    alone = gymnasium.make(name).unwrapped
    setattr(alone, setting, float(values[1]))
    seeds = np.random.default_rng(3).integers(2**31, size=2)
    observation, _ = alone.reset(seed=int(seeds[0]))
    np.testing.assert_array_equal(first[1, 0], observation)
    for step in range(15):
        observations, rewards, ended = environments.step(np.full((2, 2), 2))
        there, reward, *_ = alone.step(2)
        np.testing.assert_allclose(observations[1, 0], there, rtol=1e-6)
        assert rewards[1, 0] == reward == -1
        assert bool(ended.all()) == (step == 14)
        if step == 0:
            assert not np.array_equal(observations[0], observations[1])
    task = Reinforcement(
        Setting(name, ranges={setting: (0.9 * values[0], values[0])}, lifetime=Lifetime(2), steps=9, last=1)
    )
    assert task.fitness(task.start[None], 0).tolist() == [-9.0]  # nobody is done within 9 steps


def some_steps(generator: torch.Generator, individuals: int = 2, times: int = 6, episodes: int = 3) -> Steps:
    rand = torch.randn(individuals, 4, times * episodes, generator=generator, dtype=torch.double)
    actions = torch.randint(2, (individuals, times * episodes), generator=generator)
    ends = torch.randint(1, times + 1, (individuals, 1, episodes), generator=generator)
    alive = (torch.arange(times)[None, :, None] < ends).double()
    rewards = torch.rand(individuals, times, episodes, generator=generator, dtype=torch.double)
    return Steps(rand, torch.nn.functional.one_hot(actions, 2).transpose(1, 2).double(), rewards, alive)


def test_with_the_signals_of_reinforce_the_rule_is_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    policy, steps = Perceptron([4, 5, 2]), some_steps(generator)
    weights = torch.randn(2, policy.parameters, generator=generator, dtype=torch.double)
    found = pseudo_gradient(policy, weights, steps, reinforce, 0.9)
    for p in range(2):
        modules = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).double()
        torch.nn.utils.vector_to_parameters(weights[p], modules.parameters())
        logs = torch.log_softmax(modules(steps.observations[p].T), 1)
        a = advantages(steps.rewards, steps.alive, 0.9)[p].flatten()
        alive = steps.alive[p].flatten()
        loss = -(a * alive * (logs * steps.actions[p].T).sum(1)).sum() / alive.sum()
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(modules.parameters()))])
        torch.testing.assert_close(found[p], expected, rtol=0, atol=1e-12)
        assert expected.norm() > 1e-2


def test_what_comes_after_the_end_of_an_episode_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    policy, steps = Perceptron([4, 5, 2]), some_steps(generator)
    weights = torch.randn(2, policy.parameters, generator=generator, dtype=torch.double)
    teacher = Perceptron([5, 6, 6, 7])
    credits = top_down(teacher, torch.randn(2, teacher.parameters, generator=generator, dtype=torch.double), 5)
    over = steps.alive == 0
    assert bool(over.any())
    flat = over.flatten(1)[:, None]
    other = Steps(
        torch.where(flat, 3.0, steps.observations),
        torch.where(flat, 1 - steps.actions, steps.actions),
        torch.where(over, 100.0, steps.rewards),
        steps.alive,
    )
    assert torch.equal(steps.returns, other.returns)
    for each in (credits, reinforce):
        before, after = (pseudo_gradient(policy, weights, s, each, 0.9) for s in (steps, other))
        assert torch.equal(before, after)
    first = Steps(steps.observations + 0.1, *steps[1:])
    assert not torch.equal(pseudo_gradient(policy, weights, first, credits, 0.9), before)


def test_episodes_end_once_and_returns_count_their_steps() -> None:
    environments = Environments(CART_POLE, 3, 4, 60, SETTINGS)
    policy = Perceptron([4, 16, 2])
    weights = torch.stack([policy.start(seed) for seed in range(3)]).double()
    steps = play(environments, policy, weights, [5])
    assert bool((steps.alive[:, 1:] <= steps.alive[:, :-1]).all())
    assert bool((steps.alive[:, 0] == 1).all())
    torch.testing.assert_close(steps.returns, steps.alive.sum(1).mean(1))
    assert steps.alive.sum((1, 2)).min() < 4 * steps.alive.shape[1]  # some ended before the others
    assert torch.equal(steps.actions.sum(1), torch.ones_like(steps.actions[:, 0]))


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[[1.0, 1.0], [1.0, 9.0]]], dtype=torch.double)
    alive = torch.tensor([[[1.0, 1.0], [1.0, 0.0]]], dtype=torch.double)
    found = advantages(rewards, alive, 0.5)  # returns-to-go 1.5 and 1, then 1 and nothing: minus 1.25 and 0.5
    centred = torch.tensor([0.25, -0.25, 0.5], dtype=torch.double)
    expected = centred / (centred.std(correction=0) + 1e-6)
    torch.testing.assert_close(found[alive.bool()], expected)
    assert float(found[0, 1, 1]) == 0
    equal = torch.ones(1, 200, 3)
    assert advantages(equal, equal, 0.99).abs().max() < 1e-6  # all the same: nothing to learn


def alone(task: Reinforcement, start: Tensor, vector: Tensor, individual: int, seed: int) -> tuple[list[float], Tensor]:
    """One individual's lifetime, episode by episode and step by step, from the equations."""
    setting = task.setting
    policy = torch.nn.Sequential(
        torch.nn.Linear(4, setting.units), torch.nn.Tanh(), torch.nn.Linear(setting.units, 2)
    ).double()
    H = setting.hidden
    teacher = torch.nn.Sequential(
        *(
            torch.nn.Linear(5, H),
            torch.nn.Tanh(),
            torch.nn.Linear(H, H),
            torch.nn.Tanh(),
            torch.nn.Linear(H, setting.units + 2),
        )
    ).double()
    torch.nn.utils.vector_to_parameters(start.clone(), policy.parameters())
    torch.nn.utils.vector_to_parameters(vector, teacher.parameters())
    optimizer, curve = torch.optim.Adam(policy.parameters(), lr=setting.lifetime.lr), []
    for update in range(setting.lifetime.steps):
        chance = seed_of(seed, update)
        luck = np.random.default_rng(seed_of(chance, "actions")).random((setting.steps, 1, 1, setting.episodes))[:, 0, 0]
        states = np.random.default_rng(seed_of(chance, "states")).uniform(-0.05, 0.05, (setting.episodes, 4))
        episodes = []
        for e in range(setting.episodes):
            pole = single(individual)
            pole.reset(seed=0)
            pole.state, observation, steps = tuple(states[e]), states[e].astype(np.float32), []
            for t in range(setting.steps):
                with torch.no_grad():
                    h = torch.tanh(policy[0](torch.tensor(observation, dtype=torch.double)))
                    pi = torch.softmax(policy[2](h), 0)
                action = int(luck[t, e] > float(pi[0]))
                following, reward, terminated, _, _ = pole.step(action)
                steps.append((observation, h, pi, action, reward))
                observation = following
                if terminated:
                    break
            episodes.append(steps)
        curve.append(sum(len(steps) for steps in episodes) / setting.episodes)
        togo = [
            [sum(setting.discount ** (k - t) * s[k][4] for k in range(t, len(s))) for t in range(len(s))] for s in episodes
        ]
        longest = max(map(len, togo))
        mean = [sum(g[t] for g in togo if t < len(g)) / setting.episodes for t in range(longest)]
        centred = [[g[t] - mean[t] for t in range(len(g))] for g in togo]
        every = [a for c in centred for a in c]
        middle = sum(every) / len(every)
        deviation = math.sqrt(sum((a - middle) ** 2 for a in every) / len(every))
        optimizer.zero_grad()
        gradients = [torch.zeros_like(p) for p in policy.parameters()]
        for steps, c in zip(episodes, centred, strict=True):
            for (observation, h, pi, action, _), a in zip(steps, c, strict=True):
                y = torch.eye(2, dtype=torch.double)[action]
                advantage = torch.tensor([a / (deviation + 1e-6)], dtype=torch.double)
                with torch.no_grad():
                    z = teacher(torch.cat([pi, y, advantage]))
                c_h, c_o = z[: setting.units], z[setting.units :]
                e_h, e_o = c_h * (1 - h**2), pi * (c_o - (c_o * pi).sum())
                o = torch.tensor(observation, dtype=torch.double)
                for total, part in zip(gradients, (torch.outer(e_h, o), e_h, torch.outer(e_o, h), e_o), strict=True):
                    total += part / len(every)
        for parameter, gradient in zip(policy.parameters(), gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(policy.parameters(), setting.lifetime.clip)
        optimizer.step()
    return curve, torch.cat([p.detach().flatten() for p in policy.parameters()])


def test_lifetimes_of_a_population_are_those_of_each_alone() -> None:
    setting = Setting(lifetime=Lifetime(steps=4, lr=0.05, clip=0.5), episodes=3, steps=25, last=2, units=6, hidden=5)
    task = Reinforcement(setting)
    generator = torch.Generator().manual_seed(2)
    teachers = torch.randn(3, task.network.parameters, generator=generator, dtype=torch.double)
    start = torch.stack([task.policy.start(seed) for seed in range(3)]).double()
    returns, weights = task.live(start, task.credits(teachers), SETTINGS, [11])
    assert (weights - start).abs().max() > 0.1
    for p in range(3):
        curve, expected = alone(task, start[p], teachers[p], p, 11)
        assert returns[:, p].tolist() == pytest.approx(curve, abs=1e-12)
        torch.testing.assert_close(weights[p], expected, rtol=0, atol=1e-10)
    own, _ = task.live(start, task.credits(teachers), SETTINGS, [11, 12, 13])
    assert torch.equal(own[:, 0], returns[:, 0])
    assert not torch.equal(own[:, 1], returns[:, 1])


def small(seed: int = 0) -> Reinforcement:
    return Reinforcement(Setting(lifetime=Lifetime(steps=3, lr=0.05), steps=40, last=2, seed=seed))


def test_fitness_follows_from_the_generation_alone() -> None:
    task = small()
    individuals = Search(Strategy(population=4, sigma=0.5), task.start).ask(0)
    fitness = task.fitness(individuals, 5)
    assert fitness.shape == (4,)
    assert torch.equal(fitness, task.fitness(individuals, 5))
    assert torch.equal(fitness, pickle.loads(pickle.dumps(task)).fitness(individuals, 5))
    assert torch.equal(fitness[2:], task.fitness(individuals[2:], 5))
    assert not torch.equal(fitness, task.fitness(individuals, 6))
    assert len(set(fitness.tolist())) > 1
    other = small(1)
    both = together([task, other], torch.stack([individuals, individuals + 0.1]), 5)
    assert torch.equal(both[0], fitness)
    assert torch.equal(both[1], other.fitness(individuals + 0.1, 5))


def test_what_is_not_a_number_ranks_worst() -> None:
    task = small()
    individuals = task.start.repeat(3, 1)
    individuals[1, 0] = math.nan
    individuals[2, -1] = math.inf
    fitness = task.fitness(individuals, 0)
    assert fitness.isfinite().tolist() == [True, False, False]
    assert int(finite(fitness).argmax()) == 0
    assert finite(fitness)[1] < fitness[0]


def test_learning_rates_of_each_individual() -> None:
    task = small()
    start = task.policy.start(0).double().repeat(2, 1)
    settings = {"length": np.array([0.5, 0.5])}
    _, weights = task.live(start, reinforce, settings, [0], lr=torch.tensor([0.05, 1e-9]))
    assert (weights[0] - start[0]).abs().max() > 0.04
    assert (weights[1] - start[1]).abs().max() < 1e-7


def test_reinforce_learns_to_balance() -> None:
    task = Reinforcement(Setting(lifetime=Lifetime(steps=12, lr=0.05)))
    start = torch.stack([task.policy.start(seed) for seed in range(16)])
    returns, _ = task.live(start, reinforce, task.drawn(0, 16), range(16))
    assert returns[-3:].mean() > 2 * returns[0].mean()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Environments(CART_POLE, 1, 1, 9, {"lenght": np.ones(1)}), "no setting 'lenght'"),
        (lambda: Environments("MountainCar-v0", 1, 1, 9, {"wind": np.ones(1)}), "no number 'wind'"),
        (lambda: Environments("Nothing-v9", 1, 1, 9), "cannot make 'Nothing-v9'"),
        (lambda: Environments("Pendulum-v1", 1, 1, 9), "discrete actions"),
        (lambda: Reinforcement(Setting(last=21)), "number of updates"),
    ],
)
def test_errors(call: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()  # type: ignore[operator]


def test_without_gymnasium_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ConfigError, match=r"apical\[rl\]"):
        Environments(CART_POLE, 1, 1, 9)
