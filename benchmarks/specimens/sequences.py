"""Small hand-written transformers, a recurrent network and other models for data other than images."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from apical.testing.odd_modules import Masked, Standardised


class SelfAttention(nn.Module):
    """Hand-written attention with one layer for queries, keys and values.

    Args:
        causal: tokens do not see later ones.
    """

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) -> the same."""
        n, t, c = x.shape
        q, k, v = (part.view(n, t, self.heads, -1).transpose(1, 2) for part in self.qkv(x).split(c, dim=2))
        scores = q @ k.transpose(-2, -1) / math.sqrt(c // self.heads)
        if self.causal:
            later = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        mixed = F.softmax(scores, dim=-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(n, t, c))  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """Pre-norm: attention and a perceptron are added to a stream without an activation."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.ln1, self.attn = nn.LayerNorm(width), SelfAttention(width, heads, causal)
        self.ln2, self.fc, self.proj = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) -> the same."""
        x = x + self.attn(self.ln1(x))
        return x + self.proj(F.gelu(self.fc(self.ln2(x))))  # type: ignore[no-any-return]


class Gpt(nn.Module):
    """Token and position embeddings, two blocks, a class for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 8), nn.Embedding(8, 8)
        self.blocks = nn.Sequential(TransformerBlock(8, 2, causal=True), TransformerBlock(8, 2, causal=True))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, length) of token numbers -> (batch, length, 11)."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(x)))  # type: ignore[no-any-return]


class Vit(nn.Module):
    """Patches by a convolution, a class token in an embedding, two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.extra = nn.Conv2d(3, 8, 4, 4), nn.Embedding(5, 8)
        self.blocks = nn.Sequential(TransformerBlock(8, 2, causal=False), TransformerBlock(8, 2, causal=False))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 8, 8) -> (batch, 10)."""
        extra = self.extra(torch.arange(5, device=x.device))
        patches = self.patches(x).flatten(2).transpose(1, 2) + extra[1:]
        x = torch.cat([extra[:1].expand(len(x), 1, -1), patches], 1)
        return self.head(self.norm(self.blocks(x))[:, 0])  # type: ignore[no-any-return]


class Rnn(nn.Module):
    """A hand-written recurrent network that reads sequences of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.again, self.out = nn.Linear(5, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, 5) -> (batch, 4)."""
        hidden = x.new_zeros(len(x), 8)
        for t in range(x.shape[1]):
            hidden = torch.tanh(self.read(x[:, t]) + self.again(hidden))
        return self.out(hidden)  # type: ignore[no-any-return]


class MaskedAndStandardised(nn.Module):
    """Layers that use a function of their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.masked = nn.Linear(6, 8), Masked()
        self.standardised, self.last = Standardised(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 6) -> (batch, 4)."""
        x = self.masked(F.relu(self.first(x)))
        return self.last(F.relu(self.standardised(F.relu(x))))  # type: ignore[no-any-return]


def perceptron(act: type[nn.Module] = nn.ReLU) -> nn.Module:
    """A chain of three layers."""
    return nn.Sequential(nn.Linear(6, 8), act(), nn.Linear(8, 8), act(), nn.Linear(8, 4))


class Shared(nn.Module):
    """One layer used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 6) -> (batch, 4)."""
        x = F.relu(self.first(x))
        for _ in range(3):
            x = F.relu(self.again(x))
        return self.last(x)  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """A perceptron with functional activations and one layer given by the caller.

    Args:
        layer: makes the middle layer, 8 to 8.
    """

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 8), layer(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 6) -> (batch, 4)."""
        return self.last(F.relu(self.middle(F.relu(self.first(x)))))  # type: ignore[no-any-return]


def frozen() -> nn.Module:
    """A perceptron whose middle layer is not trained."""
    return Mlp(lambda: nn.Linear(8, 8).requires_grad_(False))


def weight_normed() -> nn.Module:
    """A perceptron with a weight-normed layer."""
    return Mlp(lambda: weight_norm(nn.Linear(8, 8)))


class DictOutput(nn.Module):
    """Returns a dictionary, as transformer libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mlp(lambda: nn.Linear(8, 8))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(batch, 6) -> {"logits": (batch, 4)}."""
        return {"logits": self.body(x)}


class StochasticDepth(nn.Module):
    """Residual blocks that are skipped at random in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 6) -> (batch, 4)."""
        x = F.relu(self.first(x))
        for block in self.blocks:
            if not self.training or float(torch.rand(())) < 0.7:
                x = F.relu(x + block(x))
        return self.last(x)  # type: ignore[no-any-return]


class MixtureOfExperts(nn.Module):
    """Each sample is routed to the expert with the highest gate value."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 6) -> (batch, 4)."""
        x = F.relu(self.first(x))
        share, best = self.gate(x).softmax(-1).max(-1)
        mixed = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (best == i).nonzero(as_tuple=True)[0]
            if len(rows):
                mixed = mixed.index_add(0, rows, share[rows, None] * expert(x[rows]))
        return self.last(x + mixed)  # type: ignore[no-any-return]
