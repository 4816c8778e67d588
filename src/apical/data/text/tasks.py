"""Generated sequence tasks that need memory: copy a word, and recall the value of a key. They are always the same."""

from functools import lru_cache

import torch
from torch import Tensor

from apical.data.dataset import Samples
from apical.data.text.sequences import Level
from apical.errors import ConfigError

TRAIN, TEST = 20_000, 1_000
NONE = -100
"""Target of a position without a target; PyTorch's cross-entropy ignores it."""
SYMBOLS = 8
KEYS = 16
_SEEDS = (0, 1)


@lru_cache(maxsize=2)
def make_copy(context: int, level: Level) -> Samples:
    """Build the copy task: a word of T/2 symbols out of 8, a cue, blanks; the targets from the cue on are the word.

    Raises:
        ConfigError: the context is too short for a word.
    """
    if context < 2:
        raise ConfigError(f"copy needs a --context of at least 2, got {context}")
    train, test = (copying(size, context, seed) for size, seed in zip((TRAIN, TEST), _SEEDS, strict=True))
    about = f"copy: words of {context // 2} symbols out of {SYMBOLS}, to be repeated after a cue"
    return Samples(train, test, SYMBOLS + 2, (), about, "", "made by apical")


@lru_cache(maxsize=2)
def make_recall(context: int, level: Level) -> Samples:
    """Build the recall task: T/4 keys, each followed by its value, then the keys shuffled; the target at each is its value.

    Raises:
        ConfigError: the context is too short for a pair, or has more pairs than there are keys.
    """
    if not 4 <= context < 4 * (KEYS + 1):
        raise ConfigError(f"recall has 1 to {KEYS} pairs and needs a --context of 4 to {4 * KEYS + 3}, got {context}")
    train, test = (recalling(size, context, seed) for size, seed in zip((TRAIN, TEST), _SEEDS, strict=True))
    about = f"recall: {context // 4} pairs of {KEYS} keys and {KEYS} values, then each key as a query for its value"
    return Samples(train, test, 2 * KEYS + 1, (), about, "", "made by apical")


def copying(size: int, context: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return tokens (size, context) and targets (size, context). Tokens 0..7 are symbols, 8 is blank, 9 the cue.

    >>> tokens, targets = copying(1, 6, 0)
    >>> tokens[0, 3:].tolist(), bool((targets[0, 3:] == tokens[0, :3]).all()), targets[0, :3].tolist()
    ([9, 8, 8], True, [-100, -100, -100])
    """
    length = context // 2
    word = torch.randint(SYMBOLS, (size, length), generator=torch.Generator().manual_seed(seed))
    tokens = torch.full((size, context), SYMBOLS)
    targets = torch.full((size, context), NONE)
    tokens[:, :length], tokens[:, length] = word, SYMBOLS + 1
    targets[:, length : 2 * length] = word
    return tokens, targets


def recalling(size: int, context: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return tokens (size, context) and targets (size, context). Tokens 0..15 are keys, 16..31 values, 32 is blank.

    >>> tokens, targets = recalling(1, 4, 0)
    >>> bool(tokens[0, 2] == tokens[0, 0]), bool(targets[0, 2] == tokens[0, 1] == tokens[0, 3])
    (True, True)
    """
    pairs = context // 4
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(size, KEYS, generator=generator).argsort(1)[:, :pairs]
    values = torch.randint(KEYS, (size, pairs), generator=generator) + KEYS
    order = torch.rand(size, pairs, generator=generator).argsort(1)
    tokens = torch.full((size, context), 2 * KEYS)
    targets = torch.full((size, context), NONE)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    tokens[:, 2 * pairs : 4 * pairs : 2], tokens[:, 2 * pairs + 1 : 4 * pairs : 2] = (
        keys.gather(1, order),
        values.gather(1, order),
    )
    targets[:, 2 * pairs : 4 * pairs : 2] = values.gather(1, order)
    return tokens, targets
