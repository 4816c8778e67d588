"""Causal decoder: a small transformer that predicts the next token; every weight and activation is a separate module."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.errors import ConfigError

EMBEDDING = 0.1
"""Standard deviation of the initial token and position embeddings."""
_SPREAD = 32


class Attention(nn.Module):
    """Multi-head softmax attention, causal by default: (N, T, width) -> (N, T, width).

    Args:
        width: width of the residual stream; a multiple of `heads`.
        heads: number of attention heads.
        causal: position t attends to positions 0..t only, otherwise to all.
    """

    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the positions of x (N, T, width)."""
        q, k, v = (self._split(layer(x)) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        result: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return result

    def _split(self, x: Tensor) -> Tensor:
        """Reshape (N, T, width) to (N, heads, T, width / heads)."""
        split: Tensor = x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)  # also compiles under function modes
        return split


class Block(nn.Module):
    """Attention and a two-layer perceptron (GELU, four times as wide), each added to the residual stream (N, T, width).

    Args:
        width: width of the residual stream.
        heads: number of attention heads.
        norm: "pre" normalises the input of each part, "post" the stream after each sum.
        causal: see :class:`Attention`.
    """

    def __init__(self, width: int, heads: int, norm: str = "pre", causal: bool = True) -> None:
        super().__init__()
        self.pre = norm == "pre"
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.gelu = nn.GELU()
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream after this block: (N, T, width) -> (N, T, width)."""
        if self.pre:
            x = x + self.attention(self.norm1(x))
            x = x + self.down(self.gelu(self.up(self.norm2(x))))
        else:
            x = self.norm1(x + self.attention(x))
            x = self.norm2(x + self.down(self.gelu(self.up(x))))
        return x


class Transformer(nn.Module):
    """Causal decoder with learned positions: integer tokens (N, T) -> logits (N, T, vocabulary), T <= context.

    Linear layers keep PyTorch's default weights, which are smaller than Xavier's; with Xavier weights the loss after 400
    steps is 0.1 nats higher. Both embedding tables are normal with a standard deviation of 0.1.

    Args:
        vocabulary: number of tokens.
        width: width of the residual stream.
        blocks: number of blocks.
        heads: attention heads per block; see :func:`default_heads` for the default.
        context: maximum number of positions.
        norm: "pre", with a final norm before the head, or "post".
        tied: the head shares its weight with the token embedding.

    Raises:
        ConfigError: a size is not positive, the width is not a multiple of the heads, or `norm` is unknown.

    >>> Transformer(vocabulary=10, width=8, blocks=2, heads=2, context=5)(torch.zeros(3, 4, dtype=torch.long)).shape
    torch.Size([3, 4, 10])
    """

    def __init__(
        self,
        vocabulary: int,
        width: int = 96,
        blocks: int = 2,
        heads: int | None = None,
        context: int = 64,
        norm: str = "pre",
        tied: bool = False,
    ) -> None:
        super().__init__()
        heads = default_heads(width) if heads is None else heads
        if min(vocabulary, width, blocks, heads, context) < 1:
            raise ConfigError("a transformer's vocabulary, width, blocks, heads and context must be at least 1")
        if width % heads:
            raise ConfigError(f"a transformer of width {width} cannot have {heads} heads; use a multiple of the heads")
        if norm not in ("pre", "post"):
            raise ConfigError(f"a transformer's norm is 'pre' or 'post'; got {norm!r}")
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, norm) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width) if norm == "pre" else nn.Identity()
        self.head = nn.Linear(width, vocabulary)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=EMBEDDING)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token at each position: (N, T) -> (N, T, vocabulary)."""
        if tokens.dim() != 2 or tokens.shape[1] > self.positions.num_embeddings:
            raise ConfigError(
                f"a transformer of context {self.positions.num_embeddings} takes tokens (N, T) of at most that many "
                f"positions; got shape {tuple(tokens.shape)}"
            )
        places = self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        logits: Tensor = self.head(self.norm(self.blocks(self.tokens(tokens) + places)))
        return logits


def default_heads(width: int) -> int:
    """Return the default number of heads: the most that divide the width, up to 4 or, above width 128, one per 32.

    >>> default_heads(96), default_heads(256), default_heads(10)
    (4, 8, 2)
    """
    return next(heads for heads in range(max(4, width // _SPREAD), 0, -1) if width % heads == 0) if width > 0 else 0
