"""Count-based predictions of the next token: the baselines for a network on text."""

import torch
from torch import Tensor

from apical.data.dataset import Split

PRIOR = 0.5
"""Added to the count of each token that follows one token."""
BACKING = 5.0
"""Weight of the bigram in the trigram, as a number of occurrences of the two context tokens."""


def count_losses(train: Split, test: Split, vocabulary: int) -> dict[str, float]:
    """Return the cross-entropy in nats per token on `test` (N, T) of n-gram tables counted on `train`.

    The unigram uses token frequencies, the bigram the previous token, and the trigram the previous two, interpolated with
    the bigram. The bigram replaces it at the first position of a window, where a network has no earlier context either.

    Args:
        train: windows of tokens and the next token at each position.

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
    """Return probabilities (N, T) of targets given two tokens, `(c(abx) + k p(x|b)) / (c(ab) + k)`, from sparse counts."""
    before, test_contexts = _contexts(train.inputs, V), _contexts(test.inputs, V)
    keys, counts = (before * V + train.targets[:, 1:]).flatten().unique(return_counts=True)
    context_keys, context_counts = before.flatten().unique(return_counts=True)
    triples = _looked_up(test_contexts * V + test.targets[:, 1:], keys, counts)
    contexts = _looked_up(test_contexts, context_keys, context_counts)
    later = (triples + BACKING * backed[:, 1:]) / (contexts + BACKING)
    return torch.cat((backed[:, :1], later), dim=1)


def _contexts(tokens: Tensor, V: int) -> Tensor:
    """Encode the two tokens up to each position except the first as one number: (N, T) -> (N, T - 1)."""
    return tokens[:, :-1] * V + tokens[:, 1:]


def _counted(values: Tensor, size: int) -> Tensor:
    return torch.bincount(values, minlength=size).double()


def _looked_up(wanted: Tensor, keys: Tensor, counts: Tensor) -> Tensor:
    """Return the count of each wanted key, 0 if it was not seen."""
    places = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return torch.where(keys[places] == wanted, counts[places], 0).double()


def _mean(probabilities: Tensor) -> float:
    return float(-probabilities.double().log().mean())
