"""Small networks of PyTorch's attention and recurrent modules, and one that ties its embedding to its head."""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attends(nn.Module):
    """Cross-attention of a class token over embedded rows with another width, by `nn.MultiheadAttention`."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.query = nn.Linear(5, 6), nn.Linear(5, 8)
        self.self_attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, 5) -> (batch, 4)."""
        rows = torch.tanh(self.read(x))
        rows = rows + self.self_attention(rows, rows, rows, need_weights=False)[0]
        mixed, _ = self.attention(self.query(x[:, :1]), rows, rows)
        return cast(Tensor, self.out(mixed[:, 0]))


class Encoder(nn.Module):
    """Token and position embeddings, a causal `nn.TransformerEncoder`, a class for every token.

    Args:
        norm_first: normalise before each sub-layer, or after the sum.
    """

    def __init__(self, norm_first: bool = True) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 8), nn.Embedding(8, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, length) of token numbers -> (batch, length, 11)."""
        length = tokens.shape[1]
        mask = torch.full((length, length), -math.inf, dtype=self.head.weight.dtype, device=tokens.device).triu(1)
        x = self.tokens(tokens) + self.positions(torch.arange(length, device=tokens.device))
        return cast(Tensor, self.head(self.encoder(x, mask=mask)))


class Recurrent(nn.Module):
    """A recurrent module that reads sequences, and a class for each.

    Args:
        kind: `nn.RNN`, `nn.GRU` or `nn.LSTM`.
    """

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, layers: int = 2) -> None:
        super().__init__()
        self.read = nn.Linear(5, 6)
        self.recurrent = kind(6, 8, layers, batch_first=True)  # type: ignore[arg-type]
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, 5) -> (batch, 4)."""
        return cast(Tensor, self.out(self.recurrent(torch.tanh(self.read(x)))[0][:, -1]))


class Tied(nn.Module):
    """The head shares the embedding's weight, with a GRU cell between them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.cell = nn.Embedding(11, 8), nn.GRUCell(8, 8)
        self.between, self.head = nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, length) of token numbers -> (batch, length, 11)."""
        state, states = self.tokens.weight.new_zeros(len(tokens), 8), []
        for token in self.tokens(tokens).unbind(1):
            state = self.cell(token, state)
            states.append(state)
        return cast(Tensor, self.head(F.gelu(self.between(torch.stack(states, 1)))))
