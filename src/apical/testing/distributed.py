"""Whether a rule under DistributedDataParallel is the rule: two ranks with half the batch each against one process."""

import pickle

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from apical.core.credit import CreditRule
from apical.testing.comparison import Factory, require_same, train
from apical.testing.networks import dense_network
from apical.testing.two_ranks import RankError, on_two_ranks

STEPS = 4


def check_distributed(factory: Factory) -> None:
    """Two gloo ranks under DistributedDataParallel, half the batch each, equal one process on the joined batch.

    Under a rule that declares `random_per_sample` they equal each other alone.
    """
    try:
        pickle.dumps(factory)
    except Exception as error:
        raise AssertionError(f"the factory must be importable by other processes (no lambda): {error}") from error
    try:
        ranks = on_two_ranks(_rank, factory)
    except RankError as error:
        raise AssertionError(
            f"training on two ranks failed ({error}); is the module that defines the factory importable from sys.path?"
        ) from error
    torch.manual_seed(0)
    rule = factory(dense_network(), F.cross_entropy)
    torch.manual_seed(1)
    train(rule, range(STEPS))
    require_same(ranks[0], ranks[1], 0.0, "the two ranks")
    if not rule.random_per_sample:
        require_same(ranks[0], _learned(rule), 1e-10, "two ranks against one process")


def _learned(rule: CreditRule) -> dict[str, Tensor]:
    """Return what a rule has learned, in whatever form one process or several keep it: model, feedback, other buffers."""
    model = {f"model.{name}": value for name, value in rule.model.state_dict().items()}
    feedback = {f"feedback of {name}": value for name, value in rule.feedback_weights().items()}
    return {**({} if feedback else rule.state_dict()), **model, **feedback}


def _rank(rank: int, factory: Factory) -> dict[str, Tensor]:
    """Return what is learned after some steps on this rank's share of the batches."""
    torch.manual_seed(0)
    rule = factory(dense_network(), F.cross_entropy)
    torch.manual_seed(1)
    train(rule, range(STEPS), parallel=DistributedDataParallel(rule), rank=rank, ranks=2)
    return _learned(rule)
