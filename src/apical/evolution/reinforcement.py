"""Evolve top-down networks that train policies by credits alone, on :mod:`apical.evolution.environments`.

A lifetime is 20 updates of a policy `pi = softmax(W2 tanh(W1 o + v1) + v2)`, each from 4 episodes. Every time step, with
its action y (one-hot) and advantage a, sends credits: c_h to hidden units, e_o to the logits. Averaged over all time steps
of the update, with h the activity of the hidden units,

    e_h = c_h (1 - h^2),   dW2 = mean e_o h^T,   dW1 = mean e_h o^T

and Adam descends along it, with its norm clipped at 1. The advantage is the discounted return-to-go, minus its mean over the
update's episodes at that time (0 for an episode that has ended), divided by its standard deviation over all time steps.
Sources of credit:

    reinforce   e_o = a (pi - y),  c_h = W2^T e_o       the policy gradient, by backpropagation
    by_hand     e_o = a (pi - y),  c_h = 0              a gated top-down network could send this
    gated       e_o = a T([pi ; y ; ...])               T is multiplied by the advantage and does not see it: a three-factor
                                                        rule. With `state`, T also sees the observation, the number of
                                                        finished updates and the update's mean return
    by_action   e_o[k] = a T([pi[k] ; y[k]])            one small T for all actions k, so that the same T works for policies
                                                        with any number of actions, and for any task
    ungated     c_o, c_h = T([pi ; y ; a]),  e_o = pi (c_o - c_o . pi)    as in the released code for classification

Gating, credit on logits and the state depart from that code. The paper's setup is unknown (only the abstract of arXiv
2208.01416 was available): environments, inputs and settings are our choice. A network that sees the state could send the
actions of a good policy regardless of reward; :func:`shuffled` advantages reveal this.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from apical.errors import ConfigError
from apical.evolution.environments import Array, Environment, environment
from apical.evolution.perceptron import Perceptron, evaluate, tanh
from apical.evolution.population import Lifetime, inner_optimizer
from apical.evolution.seeds import seed_of


class Steps(NamedTuple):
    """All time steps of an update, examples last, as in :func:`apical.evolution.perceptron.evaluate`; B = T E.

    Attributes:
        observations: (P, n, B).
        actions: one-hot, (P, actions, B).
        rewards: (P, T, E).
        alive: whether the episode was still running when the action was taken, (P, T, E).
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    alive: Tensor

    @property
    def returns(self) -> Tensor:
        """Return the mean undiscounted return of each individual's episodes, (P,)."""
        return (self.rewards * self.alive).sum(1).mean(1)


class Known(NamedTuple):
    """Inputs to credits: probabilities and one-hot actions (P, actions, B), advantages (P, 1, B), the readout
    (P, actions, hidden), and the state: observations, progress from -1 to 1 and return, all scaled, (P, n + 2, B)."""

    pi: Tensor
    actions: Tensor
    advantages: Tensor
    readout: Tensor
    state: Tensor


Credits = Callable[[Known], tuple[Tensor | None, Tensor]]
"""Credit of hidden units (P, hidden, B), or None, and of logits (P, actions, B)."""


def by_hand(episode: Known) -> tuple[None, Tensor]:
    """Return `a (pi - y)` for the logits and None for hidden units."""
    return None, episode.advantages * (episode.pi - episode.actions)


def reinforce(episode: Known) -> tuple[Tensor, Tensor]:
    """Return the credits that make the rule REINFORCE."""
    _, output = by_hand(episode)
    return episode.readout.transpose(1, 2) @ output, output


def shuffled(credits: Credits, seed: int) -> Credits:
    """Return the same credits from advantages that are permuted over all time steps: a control."""
    generator = torch.Generator().manual_seed(seed)

    def changed(episode: Known) -> tuple[Tensor | None, Tensor]:
        a = episode.advantages
        order = torch.rand(a.shape, generator=generator).masked_fill(a == 0, 2.0).argsort(-1)
        rank = (a == 0).to(torch.uint8).argsort(dim=-1, stable=True)  # nonzero ones first, in their order
        dealt = torch.zeros_like(a).scatter(-1, rank, a.gather(-1, order))
        return credits(episode._replace(advantages=dealt))

    return changed


def advantages(rewards: Tensor, alive: Tensor, discount: float) -> Tensor:
    """Return the centred and scaled return-to-go (P, T, E); 0 after the end of an episode."""
    dtype, alive = rewards.dtype, alive.double()  # in float32, equal returns would differ too much from their mean
    togo = (rewards * alive).numpy()
    for t in reversed(range(togo.shape[1] - 1)):
        togo[:, t] += discount * togo[:, t + 1]
    centred = torch.from_numpy(togo - togo.mean(2, keepdims=True)) * alive
    count = alive.sum((1, 2), keepdim=True)
    mean = centred.sum((1, 2), keepdim=True) / count
    deviation = ((centred - mean).square() * alive).sum((1, 2), keepdim=True).div(count).sqrt()
    return (centred / (deviation + 1e-6)).to(dtype)


def pseudo_gradient(
    policy: Perceptron, weights: Tensor, steps: Steps, credits: Credits, discount: float, state: Tensor
) -> Tensor:
    """Return the rule's mean update over all time steps before the ends of episodes, (P, n), for policies (P, n)."""
    (w1, v1), (w2, v2) = policy.layers(weights)
    h = tanh(torch.baddbmm(v1, w1, steps.observations))  # (P, hidden, T E)
    pi = torch.softmax(torch.baddbmm(v2, w2, h), 1)
    a = advantages(steps.rewards, steps.alive, discount).flatten(1)[:, None]
    c_h, e_o = credits(Known(pi, steps.actions, a, w2, state))  # (P, hidden, T E) or None, (P, actions, T E)
    alive = steps.alive.flatten(1)[:, None]
    share = alive / alive.sum(2, keepdim=True)
    e_o = e_o * share
    parts = [torch.zeros_like(w1), torch.zeros_like(v1), e_o @ h.transpose(1, 2), e_o.sum(2)]
    if c_h is not None:
        e_h = c_h * (1 - h.square()) * share  # credit times the slope of tanh
        parts[:2] = [e_h @ steps.observations.transpose(1, 2), e_h.sum(2)]
    return torch.cat([part.flatten(1) for part in parts], 1)


def play(
    task: Environment,
    settings: Mapping[str, Array],
    policy: Perceptron,
    weights: Tensor,
    seeds: Sequence[int],
    episodes: int,
    limit: int,
) -> Steps:
    """Run episodes of every policy (P, n), until all have ended or for `limit` steps.

    Args:
        settings: settings of the environment, each (P,).
        seeds: seeds of initial states and actions, one per group of individuals, which share random numbers.
    """
    P, E = len(weights), episodes
    group = P // len(seeds)
    states = np.stack([task.begin(np.random.default_rng(seed_of(seed, "states")), E) for seed in seeds], 1)
    dtype = weights.numpy().dtype
    state = states.repeat(group, 1).reshape(len(states), P * E).astype(dtype)
    luck = np.stack([np.random.default_rng(seed_of(seed, "actions")).random((limit, E)) for seed in seeds], 1)
    luck = luck.repeat(group, 1).reshape(limit, P * E).astype(dtype)
    usual = {name: np.full(P * E, value, dtype) for name, value in task.settings.items()}
    used = usual | {name: np.repeat(np.asarray(values, dtype=dtype), E) for name, values in settings.items()}
    # weights with episodes last, one copy for each: (inputs, hidden, N), (hidden, N), (hidden, actions, N), (actions, N)
    (w1, v1), (w2, v2) = policy.layers(weights)
    parts = [w1.permute(2, 1, 0), v1.permute(1, 2, 0)[:, 0], w2.permute(2, 1, 0), v2.permute(1, 2, 0)[:, 0]]
    layers = [part.numpy().repeat(E, -1) for part in parts]

    index = np.arange(P * E)
    alive = np.ones(P * E, dtype=bool)
    seen, taken, gained, lived, begun = [], [], [], [], 0
    record = _Record(P * E, limit)
    for t in range(limit):
        observation = task.observe(state)
        seen.append(observation)
        action = _actions(layers, observation, luck[t, index])
        taken.append(action)
        lived.append(alive)
        state, reward, ended = task.step(state, action, used)
        gained.append(reward)
        alive = alive & ~ended
        running = int(alive.sum())
        if running < 0.7 * len(alive) or t == limit - 1:
            record.add(begun, index, seen, taken, gained, lived)
            seen, taken, gained, lived, begun = [], [], [], [], t + 1
            if not running:
                break
            index, state, layers = index[alive], state[:, alive], [part[..., alive] for part in layers]
            used, alive = {name: values[alive] for name, values in used.items()}, alive[alive]
    return record.steps(P, policy.sizes[-1], weights.dtype)


class _Record:
    """Time steps of N episodes, written in pieces, each for the episodes still running."""

    def __init__(self, count: int, limit: int) -> None:
        self.count, self.limit, self.length = count, limit, 0
        self.arrays: list[Array] = []

    def add(self, begun: int, index: Array, *lists: Sequence[Array]) -> None:
        """Add time steps from `begun` on for the episodes `index`: lists of (..., len(index))."""
        pieces = [np.stack(step_values) for step_values in lists]
        if not self.arrays:
            self.arrays = [
                np.zeros((self.limit, *step_values.shape[1:-1], self.count), step_values.dtype) for step_values in pieces
            ]
        self.length = begun + len(pieces[0])
        for array, piece in zip(self.arrays, pieces, strict=True):
            array[begun : self.length, ..., index] = piece

    def steps(self, individuals: int, actions: int, dtype: torch.dtype) -> Steps:
        seen, taken, gained, lived = (
            torch.from_numpy(array[: self.length].reshape(*array[: self.length].shape[:-1], individuals, -1))
            for array in self.arrays
        )
        one_hot = torch.stack([taken == action for action in range(actions)], 1)
        return Steps(
            seen.permute(2, 1, 0, 3).flatten(2),
            one_hot.permute(2, 1, 0, 3).flatten(2).to(dtype),
            gained.transpose(0, 1).to(dtype),
            lived.transpose(0, 1).to(dtype),
        )


def _actions(layers: Sequence[Array], observation: Array, luck: Array) -> Array:
    """Sample actions (N,), with separate policy weights per episode, from uniform numbers (N,)."""
    w1, v1, w2, v2 = layers
    h = np.einsum("ihn,in->hn", w1, observation)
    h += v1
    np.tanh(h, out=h)
    logits = np.einsum("han,hn->an", w2, h)
    logits += v2
    *below, total = accumulate(np.exp(logits - logits.max(0)))
    threshold, action = luck * total, np.zeros_like(luck)  # floats, so that environments compute in the same dtype
    for bound in below:
        action += threshold > bound
    return action


@dataclass(frozen=True)
class Setting:
    """What is evolved, and in which environments.

    Attributes:
        environment: name of the environment.
        ranges: setting of the environment -> (lowest, highest); drawn for each generation.
        gated: whether the advantage multiplies the credit that the top-down network sends to logits, the only credit then;
            otherwise the advantage is an input, and credit is sent to hidden units and probabilities.
        state: whether a gated network sees the state.
        by_action: whether a gated network sees the probability of one action and whether it was taken, and sends credit
            only to its logit; the same weights then work for any environment.
        lifetime: number of updates (its steps), step size, clip.
        episodes: episodes per update.
        steps: maximum number of steps in an episode.
        discount: discount of rewards per step.
        last: number of last updates that count as the end of a lifetime.
        units: hidden units of the policy.
        hidden: units in each of the two hidden layers of the top-down network.
        returns: scale of a return, by which it is divided as an input to a network.
        seed: seed of environments, policies and the initial top-down network.
    """

    environment: str = "cart-pole"
    ranges: Mapping[str, tuple[float, float]] = field(
        default_factory=lambda: {"length": (0.4, 0.6), "force_mag": (8.0, 12.0)}
    )
    gated: bool = True
    state: bool = False
    by_action: bool = False
    lifetime: Lifetime = field(default_factory=lambda: Lifetime(steps=20, lr=0.15, clip=1.0))
    episodes: int = 4
    steps: int = 200
    discount: float = 0.99
    last: int = 5
    units: int = 16
    hidden: int = 8
    returns: float = 200.0
    seed: int = 0


class Reinforcement:
    """The evolution task, a :class:`apical.evolution.workers.Task`.

    Raises:
        ConfigError: the environment is unknown or has no such setting, or a setting is invalid.
    """

    def __init__(self, setting: Setting) -> None:
        counts = (setting.episodes, setting.steps, setting.units, setting.hidden)
        if min(counts) < 1 or not 1 <= setting.last <= setting.lifetime.steps or not 0 <= setting.discount <= 1:
            raise ConfigError(
                "episodes, steps, units and hidden must be positive, last must be from 1 to the number of updates, and "
                f"discount must be from 0 to 1; got {setting}"
            )
        if setting.state and not setting.gated:
            raise ConfigError("only a gated top-down network sees the state: also pass gated=True")
        if setting.by_action and (setting.state or not setting.gated):
            raise ConfigError(
                "by_action requires a gated network that does not see the state: pass gated=True and state=False"
            )
        self.setting, self.environment = setting, environment(setting.environment)
        if unknown := sorted(set(setting.ranges) - set(self.environment.settings)):
            names = ", ".join(self.environment.settings)
            raise ConfigError(f"{setting.environment} has no setting {unknown[0]!r}; it has {names}")
        seen, actions = len(self.environment.scale), self.environment.actions
        self.policy = Perceptron([seen, setting.units, actions])
        inputs = 2 * actions + (seen + 2 if setting.state else 0 if setting.gated else 1)
        outputs = actions + (0 if setting.gated else setting.units)
        if setting.by_action:
            inputs, outputs = 2, 1
        self.network = Perceptron([inputs, setting.hidden, setting.hidden, outputs])
        self.start = self.network.start(seed_of(setting.seed, "teacher"))

    def live(
        self, start: Tensor, credits: Credits, settings: Mapping[str, Array], seeds: Sequence[int], lr: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run lifetimes of policies from start (P, n); return mean returns (updates, P) and final weights (P, n).

        Args:
            credits: source of the policies' credits.
            settings: settings of the environments, each (P,).
            seeds: seeds of the environments and actions: one for all individuals, one for each, or one for each of several
                consecutive groups of equal size.
            lr: step size of each individual (P,), instead of the lifetime's.
        """
        setting, weights, updates = self.setting, start.clone(), self.setting.lifetime.steps
        rates = torch.as_tensor(setting.lifetime.lr if lr is None else lr, dtype=weights.dtype).view(-1, 1)
        move = inner_optimizer(setting.lifetime, weights, rates)
        scale = torch.tensor(self.environment.scale, dtype=weights.dtype)[:, None]
        returns = []
        for update in range(updates):
            chance = [seed_of(seed, update) for seed in seeds]
            steps = play(self.environment, settings, self.policy, weights, chance, setting.episodes, setting.steps)
            returns.append(steps.returns)
            inputs = torch.stack(
                [torch.full_like(returns[-1], 2 * update / max(updates - 1, 1) - 1), returns[-1] / setting.returns]
            )
            state = torch.cat(
                [steps.observations / scale, inputs.T[..., None].expand(-1, -1, steps.observations.shape[2])], 1
            )
            gradient = pseudo_gradient(self.policy, weights, steps, credits, setting.discount, state)
            if setting.lifetime.clip:
                norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
                gradient.mul_((setting.lifetime.clip / (norm + 1e-6)).clamp(max=1.0))
            move(gradient)
        return torch.stack(returns), weights

    def credits(self, individuals: Tensor) -> Credits:
        """Return the credits of top-down networks (P, D)."""
        layers, units, setting = self.network.layers(individuals), self.setting.units, self.setting

        def gated(episode: Known) -> tuple[None, Tensor]:
            seen = [episode.pi, episode.actions, *([episode.state] if setting.state else [])]
            return None, episode.advantages * evaluate(layers, torch.cat(seen, 1))

        def by_action(episode: Known) -> tuple[None, Tensor]:
            each = torch.stack([episode.pi, episode.actions], 1).flatten(2)  # (P, 2, actions B)
            return None, episode.advantages * evaluate(layers, each).view_as(episode.pi)

        def ungated(episode: Known) -> tuple[Tensor, Tensor]:
            sent = evaluate(layers, torch.cat([episode.pi, episode.actions, episode.advantages], 1))
            hidden, output = sent[:, :units], sent[:, units:]
            return hidden, episode.pi * (output - (output * episode.pi).sum(1, keepdim=True))

        return by_action if setting.by_action else gated if setting.gated else ungated

    def with_state(self, individual: Tensor) -> "tuple[Reinforcement, Tensor]":
        """Return the task whose networks also see the state, and such a network equivalent to this one (D,).

        Raises:
            ConfigError: the networks already see the state, or are not gated.
        """
        if self.setting.state or self.setting.by_action or not self.setting.gated:
            raise ConfigError("with_state requires a gated network for all actions that does not see the state yet")
        other = Reinforcement(replace(self.setting, state=True))
        (w, b), *rest = self.network.layers(individual[None])
        wide = torch.cat([w, w.new_zeros(1, len(w[0]), other.network.sizes[0] - w.shape[2])], 2)
        flat = [tensor.flatten() for pair in [(wide, b), *rest] for tensor in pair]
        return other, torch.cat(flat)

    def drawn(self, seed: int, count: int = 1) -> dict[str, Array]:
        """Draw settings of environments (count,) from the ranges."""
        generator = np.random.default_rng(seed)
        return {name: generator.uniform(low, high, count) for name, (low, high) in self.setting.ranges.items()}

    def end(self, returns: Tensor) -> Tensor:
        """Return the mean return (P,) at the end of lifetimes with returns (updates, P)."""
        return returns[-self.setting.last :].mean(0)

    def fitness(self, individuals: Tensor, generation: int) -> Tensor:
        """Return the mean return over a lifetime's updates, (P,); a generation shares starts and random numbers."""
        return together([self], individuals[None], generation)[0]


def together(tasks: Sequence[Reinforcement], populations: Tensor, generation: int) -> Tensor:
    """Return fitness (S, P) of a population (P, D) for S tasks that differ in their seed; one simulation is cheaper."""
    task, individuals, P = tasks[0], populations.flatten(0, 1), populations.shape[1]
    seeds = [seed_of(draw.setting.seed, generation) for draw in tasks]
    starts = torch.stack([task.policy.start(seed_of(seed, "policy")) for seed in seeds]).to(individuals.dtype)
    drawn = [task.drawn(seed_of(seed, "settings")) for seed in seeds]
    settings = {name: np.concatenate([draw[name] for draw in drawn]).repeat(P) for name in task.setting.ranges}
    chance = [seed_of(seed, "episodes") for seed in seeds]
    returns, _ = task.live(starts.repeat_interleave(P, 0), task.credits(individuals), settings, chance)
    fitness = torch.where(individuals.isfinite().all(1), returns.mean(0), torch.nan)
    return fitness.view(len(tasks), P)
