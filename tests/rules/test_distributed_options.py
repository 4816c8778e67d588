"""Every rule under the options of `DistributedDataParallel`: ranks stay equal, and equal one process on the joined batch.

One pair of processes serves all rules and options, because a start costs seconds.
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))  # in the processes, which know no conftest

from test_conformance import OF_CLASSES, PATHS, RULES, SKIPPED, TAPS

from apical.core.credit import CreditRule
from apical.rules.plastic_feedback.plastic_rule import PlasticRule
from apical.testing import dense_network
from apical.testing.two_ranks import on_two_ranks

pytestmark = pytest.mark.xdist_group("distributed options")  # all on one worker: the processes are started once
OPTIONS: dict[str, dict[str, bool]] = {
    "default": {},
    "static": {"static_graph": True},
    "unused": {"find_unused_parameters": True},
    "no_sync": {},
}


TRAINED = {"default": list(RULES), "no_sync": PATHS, **{key: [*OF_CLASSES, *TAPS] for key in ("static", "unused")}}
PAIRS = [(name, option) for name in RULES for option in OPTIONS if name in TRAINED[option]]
"""What is trained: every rule by the default, and under the options those that differ in code, or in who gets gradients."""


class Temperature(nn.Module):
    """A loss with a parameter, which every rank must get a gradient for."""

    def __init__(self) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.tensor(1.5, dtype=torch.double))

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output * self.t, targets)


def make(name: str) -> CreditRule:
    torch.manual_seed(0)
    complex_states = name.startswith("hep")
    return RULES[name](dense_network(), F.cross_entropy if complex_states else Temperature())


def train(module: nn.Module, share: slice, option: str) -> None:
    """A few steps, all on one batch where the rule repeats, by `credit.backward()` and `credit.loss.backward()` in turn.

    The first step also shows PyTorch what later ones build on: the order of gradients, or the graph that is to be static,
    which then has a step of either kind.

    Args:
        share: what of a batch this process sees.
        option: with "no_sync" each step has two micro-batches, of which only the second tells the other rank.
    """
    steps, apart = 3 if option == "static" else 2, option == "no_sync"
    rule = module.module if isinstance(module, DistributedDataParallel) else module
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    torch.manual_seed(1)
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(1 + apart):
            if apart:
                rule.restart()  # micro-batches that take turns are each a batch begun anew
            generator = torch.Generator().manual_seed(2 * (0 if rule.repeats > 1 else step) + part)
            inputs = torch.rand(8, 6, dtype=torch.double, generator=generator)[share]
            targets = torch.randint(0, 4, (8,), generator=generator)[share]
            waits = apart and part == 0 and isinstance(module, DistributedDataParallel)
            with module.no_sync() if waits else nullcontext():
                credit = module(inputs, targets)
                (credit.loss if step % 2 else credit).backward()
        optimizer.step()


def learned(rule: CreditRule) -> dict[str, Tensor]:
    """The rule's state; the values of plastic feedback, which one process and several keep in different forms."""
    state = rule.state_dict()
    if not isinstance(rule, PlasticRule):
        return state
    feedback = {f"feedback of {name}": value for name, value in rule.feedback_weights().items()}
    return {**{name: value for name, value in state.items() if name.startswith(("model.", "loss."))}, **feedback}


def train_all(rank: int) -> dict[str, Any]:
    """What every rule has learned under every option on this rank, or the error."""
    found: dict[str, Any] = {}
    for name, option in PAIRS:
        rule = make(name)
        try:
            train(DistributedDataParallel(rule, **OPTIONS[option]), slice(rank, None, 2), option)
            found[f"{name}/{option}"] = learned(rule)
        except Exception as error:
            found[f"{name}/{option}"] = f"{type(error).__name__}: {error}"
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return on_two_ranks(train_all)


@pytest.mark.parametrize(("name", "option"), PAIRS)
def test_ranks_are_equal_and_equal_one_process(name: str, option: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (found[f"{name}/{option}"] for found in ranks)
    assert isinstance(first, dict), first
    assert isinstance(second, dict), second
    trained = first.keys() & {key for key, _ in make(name).named_parameters()} | {
        key for key in first if "feedback of" in key
    }
    assert all(torch.equal(first[key], second[key]) for key in trained)
    rule = make(name)
    if (name, "distributed") in SKIPPED or rule.random_per_sample:
        return
    train(rule, slice(None), option)
    for key, value in learned(rule).items():
        torch.testing.assert_close(first[key], value, rtol=1e-10, atol=1e-10)
