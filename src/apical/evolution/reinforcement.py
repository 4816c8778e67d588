"""Top-down networks evolved to train policies by credits alone, on gymnasium's environments with discrete actions.

A lifetime is 20 updates of a policy `pi = softmax(W2 tanh(W1 o + v1) + v2)`, each from 4 episodes. For every time step, with
the action y (one-hot) that was taken and its advantage a, the top-down network turns `[pi ; y ; a]` into credits: c_h for
the hidden units, c_o for the probabilities. Averaged over all time steps of the update (arXiv 2208.01416 as in
:mod:`apical.rules.top_down.top_down_credit_assignment`),

    e_o = pi (c_o - c_o . pi),   e_h = c_h (1 - h^2),   dW2 = mean e_o h^T,   dW1 = mean e_h o^T

and Adam descends along it, its norm clipped at 1. REINFORCE is the same with `c_o = -a y / pi` and `c_h = W2^T e_o`. The
advantage is the discounted return-to-go, minus its mean over the update's episodes at that time (0 for one that has ended),
divided by the standard deviation of that over all time steps. Fitness is the mean return of the last 5 updates. The paper's
own set-up is not known (only its abstract could be read): environment, inputs and settings are our choice.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from apical.errors import ConfigError
from apical.evolution.environments import CART_POLE, Array, Environments
from apical.evolution.perceptron import Perceptron, evaluate, tanh
from apical.evolution.population import Lifetime, inner_optimizer
from apical.evolution.seeds import seed_of


class Steps(NamedTuple):
    """All time steps of an update, examples last as in :func:`apical.evolution.perceptron.evaluate`; B = T E.

    Attributes:
        observations: (P, n, B).
        actions: one-hot, (P, actions, B).
        rewards: (P, T, E).
        alive: whether the episode still ran when the action was taken, (P, T, E).
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    alive: Tensor

    @property
    def returns(self) -> Tensor:
        """Mean undiscounted return of each individual's episodes, (P,)."""
        return (self.rewards * self.alive).sum(1).mean(1)


Credits = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From probabilities and one-hot actions (P, actions, B), advantages (P, 1, B) and the policy's readout (P, actions, hidden)
to credits for hidden units (P, hidden, B) and for probabilities (P, actions, B)."""


def reinforce(pi: Tensor, actions: Tensor, advantages: Tensor, readout: Tensor) -> tuple[Tensor, Tensor]:
    """The credits with which the rule is REINFORCE: the derivatives of `-a log pi(y)`."""
    output = -advantages * actions / pi
    return readout.transpose(1, 2) @ through_softmax(output, pi), output


def top_down(network: Perceptron, individuals: Tensor, hidden: int) -> Credits:
    """Credits by top-down networks (P, D) that send `hidden` of them to hidden units and the rest to the probabilities."""
    layers = network.layers(individuals)

    def credits(pi: Tensor, actions: Tensor, advantages: Tensor, readout: Tensor) -> tuple[Tensor, Tensor]:
        emitted = evaluate(layers, torch.cat([pi, actions, advantages], 1))
        return emitted[:, :hidden], emitted[:, hidden:]

    return credits


def through_softmax(credit: Tensor, pi: Tensor) -> Tensor:
    """Credit on probabilities (P, actions, B) pulled back to the logits."""
    return pi * (credit - (credit * pi).sum(1, keepdim=True))


def advantages(rewards: Tensor, alive: Tensor, discount: float) -> Tensor:
    """Centred and scaled return-to-go (P, T, E); 0 where an episode has ended."""
    dtype, alive = (
        rewards.dtype,
        alive.double(),
    )  # in float32, equal returns would differ from their mean by enough to matter
    rewards = rewards * alive
    togo = torch.empty_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        running = rewards[:, t] + discount * running
        togo[:, t] = running
    centred = (togo - togo.mean(2, keepdim=True)) * alive
    count = alive.sum((1, 2), keepdim=True)
    mean = centred.sum((1, 2), keepdim=True) / count
    deviation = ((centred - mean).square() * alive).sum((1, 2), keepdim=True).div(count).sqrt()
    return (centred / (deviation + 1e-6)).to(dtype)


def pseudo_gradient(policy: Perceptron, weights: Tensor, steps: Steps, credits: Credits, discount: float) -> Tensor:
    """The rule's mean over all time steps before an episode's end, (P, n), for policies (P, n)."""
    (w1, v1), (w2, v2) = policy.layers(weights)
    h = tanh(torch.baddbmm(v1, w1, steps.observations))
    pi = torch.softmax(torch.baddbmm(v2, w2, h), 1)
    a = advantages(steps.rewards, steps.alive, discount).flatten(1)[:, None]
    c_h, c_o = credits(pi, steps.actions, a, w2)
    alive = steps.alive.flatten(1)[:, None]
    share = alive / alive.sum(2, keepdim=True)
    e_o, e_h = through_softmax(c_o, pi) * share, c_h * (1 - h.square()) * share
    parts = [e_h @ steps.observations.transpose(1, 2), e_h.sum(2), e_o @ h.transpose(1, 2), e_o.sum(2)]
    return torch.cat([part.flatten(1) for part in parts], 1)


def play(environments: Environments, policy: Perceptron, weights: Tensor, seeds: Sequence[int]) -> Steps:
    """One episode in every environment, until all have ended.

    Args:
        weights: policies (P, n).
        seeds: of first states and actions, one for each group of individuals, who meet the same chance.
    """
    layers, dtype = [(w.numpy(), v.numpy()) for w, v in policy.layers(weights)], weights.dtype
    individuals, episodes = environments.individuals, environments.episodes
    size = (environments.steps, 1, 1, episodes)
    luck = np.concatenate([np.random.default_rng(seed_of(seed, "actions")).random(size) for seed in seeds], 1)
    luck = luck.repeat(individuals // len(seeds), 1)
    observation = _columns(environments.reset([seed_of(seed, "states") for seed in seeds]), layers[0][0])
    alive = np.ones((individuals, episodes), dtype=bool)
    seen, taken, rewards, lived = [], [], [], []
    for t in range(environments.steps):
        action = (luck[t] > _probabilities(layers, observation).cumsum(1)[:, :-1]).sum(1)
        seen.append(observation)
        taken.append(action)
        lived.append(alive)
        following, reward, ended = environments.step(action)
        rewards.append(reward)
        alive = alive & ~ended
        if not alive.any():
            break
        observation = _columns(following, observation)
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(np.stack(taken, 1)).flatten(1), environments.actions)
    return Steps(
        torch.from_numpy(np.stack(seen, 2)).flatten(2),
        one_hot.transpose(1, 2).to(dtype),
        torch.from_numpy(np.stack(rewards, 1)).to(dtype),
        torch.from_numpy(np.stack(lived, 1)).to(dtype),
    )


def _columns(observations: Array, like: Array) -> Array:
    """Observations (P, E, n) as (P, n, E), in the type of `like`."""
    return np.ascontiguousarray(observations.transpose(0, 2, 1), dtype=like.dtype)


def _probabilities(layers: Sequence[tuple[Array, Array]], observations: Array) -> Array:
    """A policy's probabilities (P, actions, E): NumPy, because a step of so few numbers is mostly overhead."""
    (w1, v1), (w2, v2) = layers
    logits = w2 @ np.tanh(w1 @ observations + v1) + v2
    weights = np.exp(logits - logits.max(1, keepdims=True))
    result: Array = weights / weights.sum(1, keepdims=True)
    return result


@dataclass(frozen=True)
class Setting:
    """What is evolved, and in which environments.

    Attributes:
        environment: gymnasium's name.
        ranges: setting of the environment -> (lowest, highest); drawn anew for each generation.
        lifetime: updates (its steps), step size, clip.
        episodes: per update.
        steps: after so many, an episode ends.
        discount: of rewards, per step.
        last: updates that count as the end of a lifetime.
        units: hidden units of the policy.
        hidden: units in each of the two hidden layers of the top-down network.
        seed: of environments, policies and the first top-down network.
    """

    environment: str = CART_POLE
    ranges: Mapping[str, tuple[float, float]] = field(
        default_factory=lambda: {"length": (0.4, 0.6), "force_mag": (8.0, 12.0)}
    )
    lifetime: Lifetime = field(default_factory=lambda: Lifetime(steps=20, lr=0.02, clip=1.0))
    episodes: int = 4
    steps: int = 200
    discount: float = 0.99
    last: int = 5
    units: int = 16
    hidden: int = 12
    seed: int = 0


class Reinforcement:
    """The task of evolving, for :class:`apical.evolution.workers.Task`.

    Raises:
        ConfigError: gymnasium or the environment is not there, or a setting is not usable.
    """

    def __init__(self, setting: Setting) -> None:
        counts = (setting.episodes, setting.steps, setting.units, setting.hidden)
        if min(counts) < 1 or not 1 <= setting.last <= setting.lifetime.steps or not 0 <= setting.discount <= 1:
            raise ConfigError(
                "episodes, steps, units and hidden must be positive, last from 1 to the number of updates, and discount "
                f"from 0 to 1; got {setting}"
            )
        self.setting = setting
        probe = Environments(setting.environment, 1, 1, setting.steps)
        probe.close()
        self.policy = Perceptron([probe.observations, setting.units, probe.actions])
        self.network = Perceptron([2 * probe.actions + 1, setting.hidden, setting.hidden, setting.units + probe.actions])
        self.start = self.network.start(seed_of(setting.seed, "teacher"))

    def live(
        self, start: Tensor, credits: Credits, settings: Mapping[str, Array], seeds: Sequence[int], lr: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Lifetimes of policies that begin as start (P, n): mean returns per update (updates, P), and final weights (P, n).

        Args:
            credits: where the policies' credits come from.
            settings: of the environments, each (P,).
            seeds: of everything random in the environments, and of actions: one for all individuals, one for each, or one
                for each of several groups of equal size, one after the other.
            lr: step size of each individual (P,), instead of the lifetime's.
        """
        setting, weights = self.setting, start.clone()
        rates = torch.as_tensor(setting.lifetime.lr if lr is None else lr, dtype=weights.dtype).view(-1, 1)
        move = inner_optimizer(setting.lifetime, weights, rates)
        environments = Environments(setting.environment, len(start), setting.episodes, setting.steps, settings)
        returns = []
        for update in range(setting.lifetime.steps):
            steps = play(environments, self.policy, weights, [seed_of(seed, update) for seed in seeds])
            returns.append(steps.returns)
            gradient = pseudo_gradient(self.policy, weights, steps, credits, setting.discount)
            if setting.lifetime.clip:
                norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
                gradient.mul_((setting.lifetime.clip / (norm + 1e-6)).clamp(max=1.0))
            move(gradient)
        environments.close()
        return torch.stack(returns), weights

    def credits(self, individuals: Tensor) -> Credits:
        """Those of top-down networks (P, D)."""
        return top_down(self.network, individuals, self.setting.units)

    def drawn(self, seed: int, count: int = 1) -> dict[str, Array]:
        """Settings of environments (count,), from the ranges."""
        generator = np.random.default_rng(seed)
        return {name: generator.uniform(low, high, count) for name, (low, high) in self.setting.ranges.items()}

    def score(self, returns: Tensor) -> Tensor:
        """Mean return (P,) at the end of lifetimes with returns (updates, P)."""
        return returns[-self.setting.last :].mean(0)

    def fitness(self, individuals: Tensor, generation: int) -> Tensor:
        """Mean return at the end of a lifetime, (P,); all of a generation begin alike and meet the same."""
        return together([self], individuals[None], generation)[0]


def together(tasks: Sequence[Reinforcement], populations: Tensor, generation: int) -> Tensor:
    """Fitness (S, P) of a population (P, D) for each of S tasks that differ in their seed; one simulation is cheaper."""
    task, individuals = tasks[0], populations.flatten(0, 1)
    P, seeds = populations.shape[1], [partial(seed_of, each.setting.seed, generation) for each in tasks]
    start = torch.stack([task.policy.start(seed("policy")) for seed in seeds]).to(individuals.dtype)
    drawn = [task.drawn(seed("settings")) for seed in seeds]
    settings = {name: np.concatenate([each[name] for each in drawn]).repeat(P) for name in task.setting.ranges}
    chance = [seed("episodes") for seed in seeds]
    returns, _ = task.live(start.repeat_interleave(P, 0), task.credits(individuals), settings, chance)
    score = torch.where(individuals.isfinite().all(1), task.score(returns), torch.nan)
    return score.view(len(tasks), P)
