"""Learners of the shipped teacher, of teachers made by hand and of backpropagation, from the same initial weights."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from apical.data.dataset import Dataset
from apical.evolution.population import Population
from apical.evolution.seeds import seed_of
from apical.models.catalogue import build
from apical.rules.backprop import Backprop
from apical.rules.top_down.hand_built import HandBuiltTeacher
from apical.rules.top_down.teacher import load
from apical.rules.top_down.top_down_credit_assignment import TopDownCreditAssignment, shipped


def learners(
    model: str, rule: str, digits: Dataset, images: tuple[Tensor, Tensor], seeds: Sequence[int], record: bool = False
) -> tuple[Population, Tensor | None, Tensor]:
    """Return a population, the teacher's flat weights (D,) if it has one, and the learners' initial weights (seeds, n).

    Args:
        model: name of the model.
        rule: "bp", "tdca" with the shipped teacher, or "hand-silent" or "hand-random" with a hand-built teacher.
        images: inputs and labels to train on.
        record: as in :class:`Population`.
    """

    def drawn(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return build(model, tuple(images[0].shape[1:]), digits.classes)

    with torch.random.fork_rng([]):
        first, *_ = networks = [drawn(seed) for seed in (0, *seeds)]
    if rule == "bp":
        population, other = Population(Backprop(first), *images, record=record), None
    elif rule != "tdca":
        hidden: Literal["silent", "random"] = "silent" if rule == "hand-silent" else "random"
        widths = [layer.out_features for layer in first.modules() if isinstance(layer, torch.nn.Linear)][:-1]
        built = HandBuiltTeacher(digits.classes, widths, hidden, seed=seed_of("feedback") % 2**31)
        population, other = Population(TopDownCreditAssignment(first, teacher=built), *images, record=record), None
    else:
        teacher = load(shipped("digits"))[0]
        taught = TopDownCreditAssignment(first, teacher=teacher)
        population = Population(taught, *images, "teacher.", record=record)
        assert population.other is not None
        other = population.other.flat({f"teacher.{name}": weight for name, weight in teacher.state_dict().items()})
    return population, other, torch.stack([population.start(network) for network in networks[1:]])
