"""Recurrent networks that predict the next token: an embedding table, one recurrent layer, a linear readout."""

from torch import Tensor, nn

from apical.errors import ConfigError
from apical.models.initialisation import xavier_
from apical.models.transformer import EMBEDDING

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


class Recurrent(nn.Module):
    """Integer tokens (N, T) -> logits (N, T, vocabulary), for any T; the initial state is zero.

    The recurrent layer keeps PyTorch's default weights; the readout has Xavier weights.

    Args:
        vocabulary: number of tokens.
        width: units of the recurrent layer, and size of an embedding.
        cell: "lstm", "gru" or "rnn" (tanh).

    Raises:
        ConfigError: a size is not positive, or the cell is unknown.

    >>> import torch
    >>> Recurrent(vocabulary=10, width=8)(torch.zeros(3, 4, dtype=torch.long)).shape
    torch.Size([3, 4, 10])
    """

    def __init__(self, vocabulary: int, width: int = 128, cell: str = "lstm") -> None:
        super().__init__()
        if min(vocabulary, width) < 1:
            raise ConfigError("a recurrent network's vocabulary and width must be at least 1")
        if cell not in CELLS:
            raise ConfigError(f"a recurrent network's cell must be one of {', '.join(CELLS)}; got {cell!r}")
        self.tokens = nn.Embedding(vocabulary, width)
        self.recurrent = CELLS[cell](width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)
        xavier_(self)
        nn.init.normal_(self.tokens.weight, std=EMBEDDING)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token at each position: (N, T) -> (N, T, vocabulary)."""
        if tokens.dim() != 2:
            raise ConfigError(f"a recurrent network takes tokens (N, T); got shape {tuple(tokens.shape)}")
        states, _ = self.recurrent(self.tokens(tokens))
        logits: Tensor = self.head(states)
        return logits
