"""Reinforcement learning by credits: against gymnasium's single environments, autograd, and a loop over one individual."""

import math
import pickle
from itertools import pairwise

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from apical.errors import ConfigError
from apical.evolution.environments import ENVIRONMENTS, environment
from apical.evolution.perceptron import Perceptron
from apical.evolution.population import Lifetime
from apical.evolution.reinforcement import (
    Credits,
    Known,
    Reinforcement,
    Setting,
    Steps,
    advantages,
    by_hand,
    play,
    pseudo_gradient,
    reinforce,
    shuffled,
    together,
)
from apical.evolution.seeds import seed_of
from apical.evolution.strategy import Search, Strategy, finite

CART_POLE = environment("cart-pole")
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


def test_cart_poles_are_gymnasiums_step_for_step() -> None:
    random = np.random.default_rng(0)
    state = CART_POLE.begin(np.random.default_rng(7), 3)
    assert state.shape == (4, 3)
    assert 0 < np.abs(state).max() <= 0.05
    poles = [single(p) for p in range(3)]
    for p, pole in enumerate(poles):
        pole.reset(seed=0)
        pole.state = tuple(state[:, p])
    running, compared = np.ones(3, dtype=bool), 0
    for _ in range(60):
        action = random.integers(2, size=3)
        state, reward, ended = CART_POLE.step(state, action, SETTINGS)
        for p in np.flatnonzero(running):
            there, expected, terminated, _, _ = poles[p].step(int(action[p]))
            np.testing.assert_allclose(CART_POLE.observe(state)[:, p], there, rtol=1e-6, atol=1e-7)
            assert (reward[p], bool(ended[p])) == (expected, terminated)
            compared += 1
        running &= ~ended
    assert not running.any()
    assert compared > 30


def test_pendulums_are_gymnasiums_step_for_step() -> None:
    task, random = environment("pendulum"), np.random.default_rng(1)
    settings = {"m": np.array([1.0, 0.5, 2.0]), "l": np.array([1.0, 1.5, 0.5]), "g": np.array([10.0, 5.0, 15.0])}
    state = task.begin(np.random.default_rng(3), 3)
    others = []
    for p in range(3):
        other = gymnasium.make("Pendulum-v1").unwrapped
        other.reset(seed=0)
        for name, values in settings.items():
            setattr(other, name, float(values[p]))
        other.state = state[:, p].copy()
        others.append(other)
    for _ in range(100):
        action = random.integers(3, size=3)
        state, reward, ended = task.step(state, action, settings)
        assert not ended.any()
        for p, other in enumerate(others):
            there, expected, *_ = other.step(np.array([2.0 * (action[p] - 1)]))
            np.testing.assert_allclose(task.observe(state)[:, p], there, rtol=1e-5, atol=1e-5)
            assert reward[p] == pytest.approx(float(expected), rel=1e-9)
    first = np.concatenate([task.begin(np.random.default_rng(seed), 50) for seed in range(4)], 1)
    assert np.abs(first).max(0).max() <= np.pi
    assert np.abs(first[1]).max() <= 1


def test_acrobots_are_gymnasiums_step_for_step() -> None:
    task, random = environment("acrobot"), np.random.default_rng(2)
    settings = {
        "LINK_MASS_1": np.array([1.0, 0.5, 2.0, 1.0]),
        "LINK_MASS_2": np.array([1.0, 2.0, 0.5, 1.5]),
        "LINK_LENGTH_1": np.array([1.0, 1.5, 0.5, 1.0]),
    }
    state = task.begin(np.random.default_rng(3), 4)
    assert 0 < np.abs(state).max() <= 0.1
    state[:, 3] = (2.5, 0.3, 5.0, 12.0)  # fast, and about to swing over the top
    others = [gymnasium.make("Acrobot-v1").unwrapped for _ in range(4)]
    for p, other in enumerate(others):
        other.reset(seed=0)
        for name, values in settings.items():
            setattr(other, name, float(values[p]))
        other.state = state[:, p].copy()
    over = 0
    for _ in range(60):
        action = random.integers(3, size=4)
        state, reward, ended = task.step(state, action, settings)
        over += int(ended.sum())
        for p, other in enumerate(others):
            there, expected, terminated, *_ = other.step(int(action[p]))
            np.testing.assert_allclose(task.observe(state)[:, p], there, rtol=1e-5, atol=1e-5)
            assert (reward[p], bool(ended[p])) == (expected, terminated)
            other.state = state[:, p].copy()  # two pendulums are chaotic: each step is compared by itself
    assert over


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_usual_settings_are_gymnasiums(name: str) -> None:
    other = gymnasium.make({"cart-pole": "CartPole-v1", "pendulum": "Pendulum-v1", "acrobot": "Acrobot-v1"}[name]).unwrapped
    assert environment(name).settings == {key: getattr(other, key) for key in environment(name).settings}
    assert len(environment(name).scale) == other.observation_space.shape[0]


def test_groups_begin_alike_and_seeds_differ() -> None:
    policy = Perceptron([4, 3, 2])
    same = policy.start(0).repeat(4, 1)
    steps = play(CART_POLE, {}, policy, same, [1, 2], 3, 10)
    first = steps.observations.view(4, 4, -1, 3)[:, :, 0]
    assert torch.equal(first[0], first[1])
    assert torch.equal(first[2], first[3])
    assert not torch.equal(first[1], first[2])
    assert torch.equal(steps.actions[0], steps.actions[1])
    alone = play(CART_POLE, {}, policy, same[:1], [2], 3, 10)
    assert torch.equal(alone.alive[0], steps.alive[2, : alone.alive.shape[1]])
    taken = [(each.actions * each.alive.flatten(1)[:, None])[p] for each, p in ((alone, 0), (steps, 2))]
    assert torch.equal(taken[0], taken[1][:, : taken[0].shape[1]])


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
    found = pseudo_gradient(policy, weights, steps, reinforce, 0.9, steps.observations)
    hand = pseudo_gradient(policy, weights, steps, by_hand, 0.9, steps.observations)
    readout = 4 * 5 + 5
    torch.testing.assert_close(hand[:, readout:], found[:, readout:])
    assert not bool(hand[:, :readout].any())  # nothing for hidden units
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
    task = Reinforcement(Setting(gated=False, units=5, hidden=6))
    credits = task.credits(torch.randn(2, task.network.parameters, generator=generator, dtype=torch.double))
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
        before, after = (pseudo_gradient(policy, weights, s, each, 0.9, s.observations) for s in (steps, other))
        assert torch.equal(before, after)
    first = Steps(steps.observations + 0.1, *steps[1:])
    assert not torch.equal(pseudo_gradient(policy, weights, first, credits, 0.9, first.observations), before)


def test_episodes_end_once_and_returns_count_their_steps() -> None:
    policy = Perceptron([4, 16, 2])
    weights = torch.stack([policy.start(seed) for seed in range(3)]).double()
    steps = play(CART_POLE, SETTINGS, policy, weights, [5], 4, 60)
    assert bool((steps.alive[:, 1:] <= steps.alive[:, :-1]).all())
    assert bool((steps.alive[:, 0] == 1).all())
    torch.testing.assert_close(steps.returns, steps.alive.sum(1).mean(1))
    assert steps.alive.sum((1, 2)).min() < 4 * steps.alive.shape[1]  # some ended before the others
    alive = steps.alive.flatten(1)[:, None]
    assert torch.equal(steps.actions.sum(1, keepdim=True) * alive, alive)


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
    """One individual's lifetime on gymnasium's CartPole, episode by episode and step by step, from the equations."""
    setting = task.setting
    policy = torch.nn.Sequential(
        torch.nn.Linear(4, setting.units), torch.nn.Tanh(), torch.nn.Linear(setting.units, 2)
    ).double()
    sizes, modules = task.network.sizes, []
    for i, o in pairwise(sizes):
        modules += [torch.nn.Linear(i, o), torch.nn.Tanh()]
    teacher = torch.nn.Sequential(*modules[:-1]).double()
    torch.nn.utils.vector_to_parameters(start.clone(), policy.parameters())
    torch.nn.utils.vector_to_parameters(vector, teacher.parameters())
    optimizer, curve, updates = torch.optim.Adam(policy.parameters(), lr=setting.lifetime.lr), [], setting.lifetime.steps
    for update in range(updates):
        chance = seed_of(seed, update)
        luck = np.random.default_rng(seed_of(chance, "actions")).random((setting.steps, setting.episodes))
        states = np.random.default_rng(seed_of(chance, "states")).uniform(-0.05, 0.05, (setting.episodes, 4))
        episodes = []
        for e in range(setting.episodes):
            pole = single(individual)
            pole.reset(seed=0)
            pole.state, steps = tuple(states[e]), []
            for t in range(setting.steps):
                observation = torch.tensor(pole.state, dtype=torch.double)
                with torch.no_grad():
                    h = torch.tanh(policy[0](observation))
                    pi = torch.softmax(policy[2](h), 0)
                action = int(luck[t, e] > float(pi[0]))
                _, reward, terminated, _, _ = pole.step(action)
                steps.append((observation, h, pi, action, reward))
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
            for (o, h, pi, action, _), a in zip(steps, c, strict=True):
                y = torch.eye(2, dtype=torch.double)[action]
                advantage = a / (deviation + 1e-6)
                seen = [pi, y]
                if setting.state:
                    others = [2 * update / (updates - 1) - 1, curve[-1] / setting.returns]
                    seen += [o / torch.tensor([1, 1, 0.2, 1]), torch.tensor(others)]
                elif not setting.gated:
                    seen.append(torch.tensor([advantage]))
                with torch.no_grad():
                    if setting.by_action:
                        z = torch.cat([teacher(torch.stack([pi[k], y[k]])) for k in range(2)])
                    else:
                        z = teacher(torch.cat(seen).double())
                if setting.gated:
                    e_h, e_o = torch.zeros_like(h), advantage * z
                else:
                    c_h, c_o = z[: setting.units], z[setting.units :]
                    e_h, e_o = c_h * (1 - h**2), pi * (c_o - (c_o * pi).sum())
                for total, part in zip(gradients, (torch.outer(e_h, o), e_h, torch.outer(e_o, h), e_o), strict=True):
                    total += part / len(every)
        for parameter, gradient in zip(policy.parameters(), gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(policy.parameters(), setting.lifetime.clip)
        optimizer.step()
    return curve, torch.cat([p.detach().flatten() for p in policy.parameters()])


@pytest.mark.parametrize("kind", [{}, {"state": True}, {"gated": False}, {"by_action": True}], ids=str)
def test_lifetimes_of_a_population_are_those_of_each_alone(kind: dict[str, bool]) -> None:
    lifetime = Lifetime(steps=4, lr=0.05, clip=0.5)
    setting = Setting(**kind, lifetime=lifetime, episodes=3, steps=60, last=2, units=6, hidden=5)  # type: ignore[arg-type]
    task = Reinforcement(setting)
    generator = torch.Generator().manual_seed(2)
    teachers = torch.randn(3, task.network.parameters, generator=generator, dtype=torch.double)
    start = torch.stack([task.policy.start(seed) for seed in range(3)]).double()
    returns, weights = task.live(start, task.credits(teachers), SETTINGS, [11])
    assert (weights - start).abs().max() > 0.1
    for p in range(3):
        curve, expected = alone(task, start[p], teachers[p], p, 11)
        assert returns[:, p].tolist() == pytest.approx(curve, abs=1e-12)
        torch.testing.assert_close(weights[p], expected, rtol=0, atol=1e-7)
    own, _ = task.live(start, task.credits(teachers), SETTINGS, [11, 12, 13])
    assert torch.equal(own[:, 0], returns[:, 0])
    assert not torch.equal(own[:, 1], returns[:, 1])


def test_a_gated_network_that_sends_pi_minus_y_is_the_one_made_by_hand() -> None:
    task = Reinforcement(Setting(lifetime=Lifetime(steps=3, lr=0.1), steps=30, last=1, hidden=2))
    (w1, b1), (w2, b2), (w3, b3) = task.network.layers(torch.zeros(1, task.network.parameters, dtype=torch.double))
    small = 1e-4  # tanh is nearly linear
    w1[0] = torch.tensor([[1.0, 0, -1, 0], [0, 1, 0, -1]]) * small
    w2[0] = torch.eye(2)
    w3[0] = torch.eye(2) / small
    vector = torch.cat([each.flatten() for each in (w1, b1, w2, b2, w3, b3)])[None]
    start = task.policy.start(0).double()[None]
    (ours, one), (theirs, other) = (task.live(start, c, {}, [4]) for c in (task.credits(vector), by_hand))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert torch.equal(ours, theirs)


def test_a_network_for_single_actions_serves_any_number_in_any_order() -> None:
    tasks = [Reinforcement(Setting(name, {}, by_action=True)) for name in ("cart-pole", "pendulum", "acrobot")]
    assert {task.network.sizes for task in tasks} == {(2, 8, 8, 1)}
    network = torch.randn(2, tasks[0].network.parameters, dtype=torch.double)
    pi, a = torch.rand(2, 3, 7, dtype=torch.double), torch.randn(2, 1, 7, dtype=torch.double)
    y = torch.eye(3, dtype=torch.double)[torch.randint(3, (2, 7))].transpose(1, 2)
    known = Known(pi, y, a, torch.rand(2, 3, 16), torch.rand(2, 6, 7))
    hidden, output = tasks[1].credits(network)(known)
    assert hidden is None
    order = [2, 0, 1]
    torch.testing.assert_close(
        tasks[2].credits(network)(known._replace(pi=pi[:, order], actions=y[:, order]))[1],
        output[:, order],
        rtol=0,
        atol=1e-12,
    )
    few = known._replace(pi=pi[:, :2], actions=y[:, :2])
    torch.testing.assert_close(tasks[0].credits(network)(few)[1], output[:, :2], rtol=0, atol=1e-12)


def test_without_advantage_a_gated_network_teaches_nothing() -> None:
    task = Reinforcement(Setting(state=True))
    network = torch.randn(2, task.network.parameters, dtype=torch.double)
    pi, y = torch.rand(2, 2, 7, dtype=torch.double), torch.rand(2, 2, 7, dtype=torch.double)
    known = Known(pi, y, torch.zeros(2, 1, 7), torch.rand(2, 2, 16), torch.rand(2, 6, 7, dtype=torch.double))
    hidden, output = task.credits(network)(known)
    assert hidden is None
    assert not bool(output.any())
    with_one = known._replace(advantages=torch.ones(2, 1, 7))
    assert bool(task.credits(network)(with_one)[1].all())


def test_the_second_stage_begins_with_what_the_first_one_does() -> None:
    task = Reinforcement(Setting(lifetime=Lifetime(steps=3, lr=0.1), steps=30, last=1))
    vector = torch.randn(task.network.parameters, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    other, same = task.with_state(vector)
    assert other.network.sizes[0] == task.network.sizes[0] + 4 + 2
    start = task.policy.start(0).double()[None]
    (first, one), (second, two) = (t.live(start, t.credits(v[None]), {}, [4]) for t, v in ((task, vector), (other, same)))
    assert torch.equal(first, second)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-9)
    with pytest.raises(ConfigError, match="does not see the state"):
        other.with_state(same)


def test_shuffled_advantages_are_the_same_ones_elsewhere() -> None:
    a = torch.tensor([[[1.0, 0.0, -2.0, 3.0, 0.0, 5.0, -1.0]], [[0.0, 0.0, 4.0, 2.0, 0.0, 0.0, 9.0]]])
    got = []

    def credits(known: Known) -> tuple[None, Tensor]:
        got.append(known.advantages)
        return None, known.advantages

    control = shuffled(credits, 0)
    other = torch.zeros(2, 1, 7)
    for _ in range(30):
        control(Known(other, other, a, other, other))
    dealt = torch.stack(got)
    assert torch.equal(dealt == 0, (a == 0).expand_as(dealt))  # where an episode has ended, nothing is dealt
    assert torch.equal(dealt.sort(-1).values, a.sort(-1).values.expand_as(dealt))
    assert all(len(dealt[:, p, 0, k].unique()) > 1 for p in range(2) for k in range(7) if a[p, 0, k] != 0)


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
    torch.testing.assert_close(both[0], fitness)
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


@pytest.mark.parametrize(("credits", "rate"), [(reinforce, 0.05), (by_hand, 0.15)])
def test_the_marks_can_be_reached_and_not_by_chance(credits: Credits, rate: float) -> None:
    task = Reinforcement(Setting(lifetime=Lifetime(steps=20, lr=rate)))
    start = torch.stack([task.policy.start(seed) for seed in range(16)])
    returns, _ = task.live(start, credits, task.drawn(0, 16), range(16))
    assert task.end(returns).mean() > returns[0].mean() + 50
    control, _ = task.live(start, shuffled(credits, 0), task.drawn(0, 16), range(16))
    assert task.end(control).mean() < returns[0].mean() + 30


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Reinforcement(Setting(ranges={"lenght": (1, 2)})), "no setting 'lenght'"),
        (lambda: environment("cart-pol"), "did you mean 'cart-pole'"),
        (lambda: Reinforcement(Setting(gated=False, state=True)), "only a gated"),
        (lambda: Reinforcement(Setting(gated=False, by_action=True)), "by_action requires a gated"),
        (lambda: Reinforcement(Setting(state=True, by_action=True)), "by_action requires a gated"),
        (lambda: Reinforcement(Setting(by_action=True)).with_state(torch.zeros(105)), "with_state requires a gated"),
        (lambda: Reinforcement(Setting(last=21)), "number of updates"),
    ],
)
def test_errors(call: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()  # type: ignore[operator]
