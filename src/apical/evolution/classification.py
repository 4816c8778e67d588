"""Evolve a top-down network that trains classifiers; its fitness is their performance after a lifetime of training.

By default each generation has its own task (a sample of images from a subset of the classes) and its own initial weights,
shared by all individuals. With "fixed" starts, the initial weights are always those of seed 0, as in the released code.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from apical.core.credit import CreditRule
from apical.errors import ConfigError
from apical.evolution.population import Lifetime, Population, losses
from apical.evolution.seeds import seed_of
from apical.models.catalogue import build
from apical.rules.top_down.equivariant import EquivariantNetwork, Network
from apical.rules.top_down.hand_built import wired
from apical.rules.top_down.teacher import Output, Place, TopDownNetwork, load
from apical.rules.top_down.top_down_credit_assignment import TopDownCreditAssignment, shipped

WIRED = "wired"
"""Name of the initial teacher that :func:`apical.rules.top_down.hand_built.wired` builds."""


@dataclass(frozen=True)
class Images:
    """A labelled set from which tasks are drawn: images (N, ...), labels (N,) in 0..classes-1."""

    inputs: Tensor
    targets: Tensor
    classes: int
    name: str = ""


@dataclass(frozen=True)
class Setting:
    """What is evolved, and on which tasks.

    Attributes:
        model: name of the learners' model.
        others: further models, used by tasks in turn with `model`; one top-down network serves them all.
        lifetime: how a learner is trained.
        hidden: units in each hidden layer of the top-down network.
        sites: emission sites per hidden layer of the learner; None emits a credit per unit.
        relative: credit is relative to that of a correct prediction.
        credit: whether the output's credit refers to "logits" or "probabilities".
        output: whether the output's credit is "evolved" too, or is the "error".
        by_class: the top-down network processes one class at a time and works for any number of classes.
        layers: hidden layers for which such a network has emissions; None means as many as the deepest learner has.
        ways: classes per task, drawn and renumbered for each task; None uses all, in their order.
        examples: training images per task; None uses all.
        tasks: tasks per generation; fitness is the mean over them.
        starts: "fresh" initial weights for each task, or "fixed" ones for all.
        zeros: all initial weights are zero.
        quiet: the initial top-down network sends no credit to hidden units, which start as random features.
        held_out: fitness is the likelihood of held-out images of the task instead of its training images.
        settled: fitness is the mean over that many last steps, which penalises oscillation; 1 uses only the final step.
        seed: seed of tasks, initial weights and the initial top-down network.
    """

    model: str = "mlp-tanh-32"
    others: tuple[str, ...] = ()
    lifetime: Lifetime = field(default_factory=Lifetime)
    hidden: int = 16
    sites: int | None = None
    relative: bool = True
    credit: Place = "logits"
    output: Output = "evolved"
    by_class: bool = False
    layers: int | None = None
    ways: int | None = None
    examples: int | None = 500
    tasks: int = 1
    starts: Literal["fresh", "fixed"] = "fresh"
    zeros: bool = False
    quiet: bool = True
    held_out: bool = False
    settled: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Sample:
    """One task: training and held-out images with labels in 0..ways-1."""

    inputs: Tensor
    targets: Tensor
    other_inputs: Tensor
    other_targets: Tensor


class Classification:
    """The evolution task, a :class:`apical.evolution.workers.Task`.

    Args:
        sets: one or more labelled sets of images of the same shape; tasks use them in turn.
        setting: what is evolved.

    Raises:
        ConfigError: there are no image sets, they differ in shape, are too small, or have fewer classes than a task needs.
        UnsupportedModelError: one top-down network cannot serve all of the learners' models.
    """

    def __init__(self, sets: list[Images], setting: Setting) -> None:
        self.sets, self.setting = sets, setting
        if not sets or len({tuple(s.inputs.shape[1:]) for s in sets}) > 1:
            raise ConfigError(f"tasks need image sets of one shape; got {[tuple(s.inputs.shape[1:]) for s in sets]}")
        fewest = min(s.classes for s in sets)
        if setting.ways is None and len({s.classes for s in sets}) > 1:
            raise ConfigError("image sets with different numbers of classes require ways (the number of classes per task)")
        self.outputs = setting.ways or fewest
        if not 2 <= self.outputs <= fewest:
            raise ConfigError(f"a task needs 2 to {fewest} classes; got ways={setting.ways}")
        if not 1 <= setting.settled <= setting.lifetime.steps:
            raise ConfigError(
                f"settled must be from 1 to the {setting.lifetime.steps} steps of a lifetime; got {setting.settled}"
            )
        if setting.examples is not None and setting.examples < 1:
            raise ConfigError(f"a task needs at least one example; got examples={setting.examples}")
        if setting.by_class and (setting.sites is not None or not setting.relative or setting.credit != "logits"):
            raise ConfigError(
                "by_class requires relative credit on logits and no emission sites; got "
                f"relative={setting.relative}, credit={setting.credit!r}, sites={setting.sites}"
            )
        if setting.layers is not None and not setting.by_class:
            raise ConfigError("layers requires by_class=True; other top-down networks have the layers of their learners")
        self.start = self.population.other.flat(dict(self._first.named_parameters(prefix="teacher")))  # type: ignore[union-attr]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("populations", "_first")}

    @cached_property
    def _first(self) -> Network:
        return self.network(seed_of(self.setting.seed, "teacher"))

    @property
    def population(self) -> Population:
        """Learners of the setting's model, each with its own top-down network."""
        return self.populations[0]

    @cached_property
    def populations(self) -> list[Population]:
        """The populations for each of the learners' models."""
        inputs = self.sets[0].inputs[:2]
        targets = torch.zeros(len(inputs), dtype=torch.long)
        populations = []
        for which in range(1 + len(self.setting.others)):
            with torch.random.fork_rng([]):
                torch.manual_seed(seed_of(self.setting.seed, "feedback", which, self.outputs))  # if the rule draws feedback
                rule = self.rule(self.learner(0, which), self._first)
            populations.append(Population(rule, inputs, targets, "teacher.", record=True))
        return populations

    def rule(self, model: nn.Module, teacher: Network, silent: bool = False) -> CreditRule:
        """Return the rule that trains a learner; `silent` omits the credit of hidden units."""
        return TopDownCreditAssignment(model, teacher=teacher, silent=silent)

    def learner(self, seed: int, which: int = 0) -> nn.Module:
        """Return a learner of the model `which` (modulo their number), with initial weights from a seed."""
        names = (self.setting.model, *self.setting.others)
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            model = build(names[which % len(names)], tuple(self.sets[0].inputs.shape[1:]), self.outputs)
        if self.setting.zeros:
            for parameter in model.parameters():
                nn.init.zeros_(parameter)
        return model

    def network(self, seed: int) -> Network:
        """Return an unevolved top-down network for the setting's models, with the hidden layers of the deepest one."""
        setting, every = self.setting, [self.widths(which) for which in range(1 + len(self.setting.others))]
        deepest = max(every, key=len)
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            if setting.by_class:
                return self._quieted(EquivariantNetwork(setting.layers or len(deepest), setting.hidden, setting.output))
            network = TopDownNetwork(
                self.outputs,
                deepest,
                setting.hidden,
                setting.sites,
                setting.relative,
                setting.credit,
                shallower=any(len(widths) < len(deepest) for widths in every),
                output=setting.output,
            )
        return self._quieted(network)

    def _quieted(self, network: Network) -> Network:
        """Return the network, with its output to hidden units zeroed if the setting is `quiet`."""
        weight = cast(nn.Linear, network.body[-1]).weight
        if self.setting.quiet and isinstance(network, TopDownNetwork):
            weight.data[: sum(network.emissions)] = 0
        elif self.setting.quiet:
            weight.data[-cast(EquivariantNetwork, network).layers :] = 0
        return network

    def widths(self, which: int = 0) -> list[int]:
        """Return the units of each hidden layer of the model `which`."""
        probe = TopDownCreditAssignment(self.learner(0, which))
        return [cut.shape[1] for cut in probe.run(self.sets[0].inputs[:2])[1]]

    def weights_of(self, teacher: str) -> Tensor:
        """Return flat weights (D,) of a teacher file, of a shipped teacher, or of the hand-built network ("wired").

        Raises:
            ConfigError: the teacher does not exist, or its sizes differ from the setting's.
        """
        template = self.network(seed_of(self.setting.seed, "teacher"))
        path = shipped(teacher) if teacher != WIRED else teacher
        network = load(path)[0] if teacher != WIRED else wired(template, self.setting.seed)
        there, asked = network.sizes, template.sizes
        names = dict.fromkeys([*there, *asked])
        unlike = [f"{n}: {there.get(n)} vs {asked.get(n)}" for n in names if there.get(n) != asked.get(n)]
        if unlike:
            raise ConfigError(
                f"an evolution with these options cannot start from {path} (found vs required): {'; '.join(unlike)}"
            )
        other = self.population.other
        assert other is not None
        return other.flat({f"teacher.{name}": weight for name, weight in network.state_dict().items()})

    def sample(self, seed: int, which: int = 0) -> Sample:
        """Return the task of a seed, from the image set `which` (modulo their number)."""
        images = self.sets[which % len(self.sets)]
        generator = torch.Generator().manual_seed(seed)
        labels, index = images.targets, torch.arange(len(images.targets))
        if self.setting.ways is not None:
            classes = torch.randperm(images.classes, generator=generator)[: self.setting.ways]
            renumbered = torch.full((images.classes,), -1)
            renumbered[classes] = torch.arange(len(classes))
            labels = renumbered[images.targets]
            index = (labels >= 0).nonzero().squeeze(1)
        order = index[torch.randperm(len(index), generator=generator)]
        take = len(order) if self.setting.examples is None else self.setting.examples
        if take > len(order):
            raise ConfigError(
                f"{take} examples per task, but {images.name or 'the set'} has {len(order)} of these classes; use fewer "
                "(--examples)"
            )
        self.setting.lifetime.require_examples(take)
        train, other = order[:take], order[take : 2 * take]
        return Sample(images.inputs[train], labels[train], images.inputs[other], labels[other])

    def begin(self, seed: int, which: int = 0) -> Tensor:
        """Return flat initial weights (n,) of a learner of the model `which`."""
        return self.populations[which].start(self.learner(0 if self.setting.starts == "fixed" else seed, which))

    def fitness(self, individuals: Tensor, generation: int) -> Tensor:
        """Return minus the final negative log-likelihood of a lifetime, averaged over the generation's tasks: (P,)."""
        total = individuals.new_zeros(len(individuals))
        for k in range(self.setting.tasks):
            total -= self.loss(individuals, generation, k)
        return total / self.setting.tasks

    def loss(self, individuals: Tensor, generation: int, k: int) -> Tensor:
        """Return the negative log-likelihood at the end of a lifetime on the k-th task of a generation: (P,)."""
        turn = generation * self.setting.tasks + k
        which = turn // len(self.sets) % len(self.populations)  # each model is trained on each set
        population = self.populations[which]
        task = self.sample(seed_of(self.setting.seed, "task", generation, k), turn)
        start = self.begin(seed_of(self.setting.seed, "start", generation, k), which)
        x, y = (task.other_inputs, task.other_targets) if self.setting.held_out else (task.inputs, task.targets)
        return self._final_loss(population, start, individuals, task, (x, y), seed_of(generation, k))

    def _final_loss(
        self,
        population: Population,
        start: Tensor,
        individuals: Tensor,
        task: Sample,
        judged: tuple[Tensor, Tensor],
        seed: int,
    ) -> Tensor:
        """Return the loss on images and labels, averaged over the last steps of a lifetime: (P,)."""
        lifetime, found = self.setting.lifetime, []

        def watch(done: int, weights: Tensor) -> None:
            if done > lifetime.steps - self.setting.settled:
                found.append(losses(population.outputs(weights, judged[0]), judged[1]))

        population.train(start, individuals, task.inputs, task.targets, lifetime, seed=seed, watch=watch)
        return torch.stack(found).mean(0)


class AnyClasses(Classification):
    """:class:`Classification` with 2 to `ways` classes per task, drawn at random; requires `by_class`.

    Attributes:
        of: the task for each number of classes.
    """

    def __init__(self, sets: list[Images], setting: Setting) -> None:
        if not setting.by_class:
            raise ConfigError("tasks with varying numbers of classes require by_class=True")
        super().__init__(sets, setting)
        self.of = {ways: Classification(sets, replace(setting, ways=ways)) for ways in range(2, self.outputs + 1)}

    def loss(self, individuals: Tensor, generation: int, k: int) -> Tensor:
        """Return the negative log-likelihood at the end of a lifetime on the k-th task of a generation: (P,)."""
        ways = 2 + seed_of(self.setting.seed, "ways", generation, k) % len(self.of)
        return self.of[ways].loss(individuals, generation, k)
