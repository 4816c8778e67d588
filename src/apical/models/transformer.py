"""Causal decoder: a small transformer that says the next token, every weight and activation a module of its own."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.errors import ConfigError

EMBEDDING = 0.1
"""Standard deviation of the initial tables of tokens and positions."""
_SPREAD = 32


class Attention(nn.Module):
    """Softmax attention over the past, `heads` of them side by side: (N, T, width) -> (N, T, width).

    Args:
        width: of the stream; a multiple of `heads`.
        heads: attention maps.
        causal: position t sees 0..t only, otherwise all.
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
        """(N, T, width) -> (N, heads, T, width / heads)."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class Block(nn.Module):
    """Attention and a two-layer perceptron (GELU, four times as wide), each added to the stream (N, T, width).

    Args:
        width: of the stream.
        heads: of the attention.
        norm: "pre" normalises what a part reads, "post" the stream behind each sum.
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
        """The stream after this block: (N, T, width) -> (N, T, width)."""
        if self.pre:
            x = x + self.attention(self.norm1(x))
            x = x + self.down(self.gelu(self.up(self.norm2(x))))
        else:
            x = self.norm1(x + self.attention(x))
            x = self.norm2(x + self.down(self.gelu(self.up(x))))
        return x


class Transformer(nn.Module):
    """Causal decoder with learned positions: tokens (N, T) of whole numbers -> logits (N, T, vocabulary), T <= context.

    Linear weights are PyTorch's own, smaller than Xavier's, with which 400 steps end 0.1 nats higher; both tables are normal
    with a standard deviation of 0.1.

    Args:
        vocabulary: number of tokens.
        width: of the stream.
        blocks: one after the other.
        heads: of attention in each; 4, and more than 128 wide one per 32, if the width can be divided so.
        context: the most positions.
        norm: "pre", with a last norm before the head, or "post".
        tied: the head's weight is the table of tokens.

    Raises:
        ConfigError: a size is not positive, the width is no multiple of the heads, or `norm` is another.

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
            raise ConfigError(f"a transformer of width {width} cannot have {heads} heads; take a width that is a multiple")
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
        """Logits of the next token at each position: (N, T) -> (N, T, vocabulary)."""
        if tokens.dim() != 2 or tokens.shape[1] > self.positions.num_embeddings:
            raise ConfigError(
                f"a transformer of context {self.positions.num_embeddings} takes tokens (N, T) of at most so many "
                f"positions; got shape {tuple(tokens.shape)}"
            )
        places = self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        logits: Tensor = self.head(self.norm(self.blocks(self.tokens(tokens) + places)))
        return logits


def default_heads(width: int) -> int:
    """Heads where none are said: the most that divide the width, up to 4 or, wider than 128, one per 32.

    >>> default_heads(96), default_heads(256), default_heads(10)
    (4, 8, 2)
    """
    return next(heads for heads in range(max(4, width // _SPREAD), 0, -1) if width % heads == 0) if width > 0 else 0
