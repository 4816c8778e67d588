"""Texts as windows of tokens: each has `context` tokens and, as targets, the token that follows each of them."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apical.data.dataset import Samples
from apical.errors import ConfigError, DataError

Level = Literal["characters", "bytes"]
COMMON = 95
"""Maximum number of distinct characters; all others share one token."""
OTHER = "�"
"""Name of the token for all other characters."""


Make = Callable[[int, Level], Samples]
"""Maps the tokens per window and the kind of token to sequences."""


def of_text(train: str, test: str, context: int, level: Level, *, where: str, source: str) -> Samples:
    """Return windows of two texts; characters that the training text lacks become the token for others.

    Raises:
        ConfigError: the context is not positive.
        DataError: a text is too short for a window.
    """
    if context < 1:
        raise ConfigError(f"--context must be positive, got {context}")
    if level == "bytes":
        names = [chr(byte) if 32 <= byte < 127 or byte == 10 else OTHER for byte in range(256)]
        codes = [torch.from_numpy(np.frombuffer(part.encode(), np.uint8).astype(np.int64)) for part in (train, test)]
    else:
        known = common(train)
        names = [*known, OTHER]
        codes = [encoded(part, known) for part in (train, test)]
    for part, tokens in zip(("training", "test"), codes, strict=True):
        if len(tokens) <= context:
            raise DataError(
                f"{where}: {len(tokens):,} {level} of {part} text are too few for a window of {context} and the token "
                "after it; use a longer text or a smaller --context"
            )
    digest = hashlib.sha256(f"{train}\0{test}".encode(errors="surrogatepass")).hexdigest()[:16]
    sizes = f"{len(codes[0]):,} training and {len(codes[1]):,} test {level}"
    about = f"{where}: {sizes}, {len(names)} tokens, windows of {context}"
    first, second = (windows(tokens, context) for tokens in codes)
    return Samples(first, second, len(names), tuple(names), about, digest, f"{source}, sha256 {digest}", is_text=True)


def common(text: str) -> str:
    """Return the most common characters of a text, at most :data:`COMMON`; ties are sorted by code point.

    >>> common("abacab")
    'abc'
    """
    points, counts = np.unique(_points(text), return_counts=True)
    order = np.lexsort((points, -counts))[:COMMON]
    return "".join(map(chr, points[order]))


def encoded(text: str, known: Sequence[str]) -> Tensor:
    """Return the tokens (characters,) of a text: the index of each in `known`, or `len(known)` if it is not there.

    >>> encoded("cat", "abc").tolist()
    [2, 0, 3]
    """
    points = np.array([ord(character) for character in known], dtype=np.int64)
    order = np.argsort(points)
    wanted = _points(text)
    places = np.minimum(np.searchsorted(points[order], wanted), len(points) - 1)
    tokens = np.where(points[order][places] == wanted, order[places], len(points))
    return torch.from_numpy(tokens)


def decoded(tokens: Sequence[int], names: Sequence[str]) -> str:
    """Return the text of tokens."""
    return "".join(names[token] for token in tokens)


def windows(tokens: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Return adjacent windows (N, context) and the token after each of their tokens (N, context); drop any remainder.

    >>> [part.tolist() for part in windows(torch.arange(6), 2)]
    [[[0, 1], [2, 3]], [[1, 2], [3, 4]]]
    """
    whole = (len(tokens) - 1) // context * context
    return tokens[:whole].reshape(-1, context), tokens[1 : whole + 1].reshape(-1, context)


def _points(text: str) -> NDArray[np.int64]:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32).astype(np.int64)
