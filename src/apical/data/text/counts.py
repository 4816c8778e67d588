"""What counting predicts of the next token: the baselines that a net on text has to be held against."""

import torch
from torch import Tensor

from apical.data.dataset import Split

PRIOR = 0.5
"""Added to the count of each token behind one token."""
BACKING = 5.0
"""How many sightings of two tokens the bigram's word on the third is worth."""


def count_losses(train: Split, test: Split, vocabulary: int) -> dict[str, float]:
    """Cross-entropy in nats per token, on the positions of `test` (N, T), of tables counted on `train`.

    The unigram knows how common tokens are; the bigram the token before; the trigram the two before, interpolated with the
    bigram, which stands in at the first position of a window, as a net sees nothing before it either.

    Args:
        train: windows of tokens and the tokens behind each.

    >>> ones = Split(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long))
    >>> round(count_losses(ones, ones, 2)["unigram"], 3)
    0.074
    """
    V = vocabulary
    singles = _counted(train.targets.flatten(), V).add(PRIOR)
    unigram = singles / singles.sum()
    pairs = _counted((train.inputs * V + train.targets).flatten(), V * V).view(V, V) + PRIOR
    bigram = pairs / pairs.sum(1, keepdim=True)
    backed = bigram[test.inputs, test.targets]  # (N, T)
    return {
        "unigram": _mean(unigram[test.targets]),
        "bigram": _mean(backed),
        "trigram": _mean(_trigram(train, test, V, backed)),
    }


def _trigram(train: Split, test: Split, V: int, backed: Tensor) -> Tensor:
    """Probabilities (N, T) of the targets behind two tokens, `(c(abx) + k p(x|b)) / (c(ab) + k)`; counts kept sparse."""
    before, test_contexts = _contexts(train.inputs, V), _contexts(test.inputs, V)
    keys, counts = (before * V + train.targets[:, 1:]).flatten().unique(return_counts=True)
    context_keys, context_counts = before.flatten().unique(return_counts=True)
    triples = _looked_up(test_contexts * V + test.targets[:, 1:], keys, counts)
    contexts = _looked_up(test_contexts, context_keys, context_counts)
    later = (triples + BACKING * backed[:, 1:]) / (contexts + BACKING)
    return torch.cat((backed[:, :1], later), dim=1)


def _contexts(tokens: Tensor, V: int) -> Tensor:
    """A number for the two tokens up to each position but the first: (N, T) -> (N, T - 1)."""
    return tokens[:, :-1] * V + tokens[:, 1:]


def _counted(values: Tensor, size: int) -> Tensor:
    return torch.bincount(values, minlength=size).double()


def _looked_up(wanted: Tensor, keys: Tensor, counts: Tensor) -> Tensor:
    """Count of each wanted key, 0 where it was not seen."""
    places = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return torch.where(keys[places] == wanted, counts[places], 0).double()


def _mean(probabilities: Tensor) -> float:
    return float(-probabilities.double().log().mean())
