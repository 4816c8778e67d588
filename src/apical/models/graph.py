"""Networks with learned connectivity: nodes of a complete directed acyclic graph whose edges are parameters.

    u_i = sum_{j<i} alpha_ij x_j,   x_i = f_i(u_i),   x_0: the input;   loss + gamma sum |alpha_ij|

With e_i = dL/du_i the gradient of an edge is `sum over the batch <e_i, x_j>`, the error at the receiver times the activity
of the sender. It is local, whatever rule computes e_i. The architecture is that of TopoNet (Yuan et al., arXiv 2008.08261),
of which only the abstract was available: here edges are plain numbers and a node is ReLU followed by Linear. Under rules
that send errors to activations, errors then reach edges without passing through a weight. Input-dependent edges, by
attention, follow Yuan et al. (arXiv 2010.01097).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from apical.core.layers import register_local
from apical.errors import ConfigError, require_choice
from apical.models.initialisation import xavier_
from apical.models.mlp import one_width

Wiring = Literal["complete", "chain", "residual"]
Edges = Literal["learned", "fixed", "attention"]
EDGES = "Edges, from the node below to the node at the left"
"""Title of the plot of the edges."""


class Mix(nn.Module):
    """What a node receives: `u_i = sum_j alpha_j x_j`, all x_j of one shape.

    Args:
        senders: indices of the nodes that it receives input from, in ascending order.
        learned: whether the edges are parameters; otherwise they are a buffer.
    """

    alpha: Tensor

    def __init__(self, senders: Sequence[int], learned: bool = True) -> None:
        super().__init__()
        self.senders = tuple(senders)
        alpha = torch.full((len(self.senders),), 1.0 / len(self.senders))
        if learned:
            self.alpha = nn.Parameter(alpha)
        else:
            self.register_buffer("alpha", alpha)

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """Return the weighted sum over the senders, given all states so far."""
        return sum_of([self.alpha[k] * states[j] for k, j in enumerate(self.senders)])


class Attention(nn.Module):
    """A mix whose edges depend on the input: `alpha(x_0) = softmax(R x_0 + r)`, so each input has its own connectivity.

    No error is propagated through the router R to x_0; R itself is trained with the exact error of the edges.

    Args:
        senders: as in :class:`Mix`.
        features: number of features of x_0.
    """

    def __init__(self, senders: Sequence[int], features: int) -> None:
        super().__init__()
        self.senders = tuple(senders)
        self.router = nn.Linear(features, len(self.senders))

    def weights(self, first: Tensor) -> Tensor:
        """Return alpha for each sample: (batch, senders)."""
        result: Tensor = self.router(first.detach()).softmax(-1)
        return result

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """Return the weighted sum over the senders, given all states so far, each (batch, features)."""
        alpha = self.weights(states[0])
        return sum_of([alpha[:, k, None] * states[j] for k, j in enumerate(self.senders)])


register_local(Mix)


def sum_of(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of one or more tensors."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


class Graph(nn.Module):
    """Nodes of a directed acyclic graph in a fixed order; node 0 is the input, and the input of the last node is the output.

    Args:
        nodes: f_1, ..., f_{n-1}; all preserve the same shape.
        wiring: "complete", "chain" (each node receives the previous one), "residual" (the previous two), or the share of
            earlier nodes that a node receives in addition to the previous one, drawn from the global torch RNG.
        edges: "learned": numbers alpha_ij, initialised to `1/(incoming edges)`; "fixed": the same numbers, not trained;
            "attention": computed from the input.
        features: number of features of x_0; required for "attention".

    Raises:
        ConfigError: the wiring or the kind of edges is unknown, or `features` is missing for attention.

    >>> model = Graph([nn.Sequential(nn.ReLU(), nn.Linear(4, 4)) for _ in range(3)])
    >>> model.adjacency().shape, model(torch.randn(2, 4)).shape
    (torch.Size([5, 5]), torch.Size([2, 4]))
    """

    def __init__(
        self,
        nodes: Sequence[nn.Module],
        wiring: Wiring | float = "complete",
        edges: Edges = "learned",
        features: int | None = None,
    ) -> None:
        super().__init__()
        require_choice("edges", edges, ("learned", "fixed", "attention"))
        if edges == "attention" and features is None:
            raise ConfigError("edges='attention' needs features=, the number of features of the input")
        senders = [_senders(i, wiring) for i in range(1, len(nodes) + 2)]
        self.nodes = nn.ModuleList(nodes)
        self.mixes = nn.ModuleList(
            Attention(those, features or 0) if edges == "attention" else Mix(those, edges == "learned") for those in senders
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return u_n, of the same shape as x."""
        states = [x]
        for mix, node in zip(self.mixes, self.nodes, strict=False):
            states.append(node(mix(states)))
        result: Tensor = self.mixes[-1](states)
        return result

    def adjacency(self, inputs: Tensor | None = None) -> Tensor:
        """Return alpha as a strictly lower triangular matrix (n + 1, n + 1): row i receives from column j.

        Args:
            inputs: x_0 (batch, features), over which attention edges are averaged.

        Raises:
            ConfigError: edges are by attention and `inputs` is missing.
        """
        matrix = torch.zeros(len(self.mixes) + 1, len(self.mixes) + 1)
        for i, mix in enumerate(self.mixes, start=1):
            if isinstance(mix, Attention):
                if inputs is None:
                    raise ConfigError("attention edges depend on the input: pass inputs to adjacency")
                matrix[i, list(mix.senders)] = mix.weights(inputs).detach().mean(0).to(matrix)
            elif isinstance(mix, Mix):
                matrix[i, list(mix.senders)] = mix.alpha.detach().to(matrix)
        return matrix

    @torch.no_grad()
    def matrices(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return the edges, which a report plots before, during and after training."""
        return {EDGES: self.adjacency(inputs)}

    @torch.no_grad()
    def shrink_(self, amount: float) -> None:
        """Take a proximal step of `amount = lr gamma` for the L1 term: edges shrink towards zero and are clipped at it.

        Call it after `optimizer.step()`. It affects learned edges only.
        """
        for mix in self.mixes:
            if isinstance(mix, Mix) and isinstance(mix.alpha, nn.Parameter):
                mix.alpha.copy_(nn.functional.softshrink(mix.alpha, amount))

    @torch.no_grad()
    def prune_(self, threshold: float = 1e-2) -> int:
        """Set learned edges below the threshold to zero; return how many of all edges are then zero."""
        zeros = 0
        for mix in self.mixes:
            if isinstance(mix, Mix):
                mix.alpha.mul_(mix.alpha.abs() >= threshold)
                zeros += int((mix.alpha == 0).sum())
        return zeros


class GraphClassifier(nn.Module):
    """`head(relu(graph(stem(x))))`: a graph of dense nodes between a Linear input layer and a Linear readout."""

    def __init__(self, in_features: int, width: int, nodes: int, outputs: int, wiring: Wiring | float, edges: Edges) -> None:
        super().__init__()
        self.flatten, self.stem = nn.Flatten(), nn.Linear(in_features, width)
        dense = [nn.Sequential(nn.ReLU(), nn.Linear(width, width)) for _ in range(nodes)]
        self.graph = Graph(dense, wiring, edges, width)
        self.relu, self.head = nn.ReLU(), nn.Linear(width, outputs)
        xavier_(self)
        for mix in self.graph.mixes:
            if isinstance(mix, Attention):
                nn.init.zeros_(mix.router.weight)  # all edges start equal

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, ...) to (N, outputs)."""
        result: Tensor = self.head(self.relu(self.graph(self.stem(self.flatten(x)))))
        return result

    @torch.no_grad()
    def matrices(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return the edges, which a report plots before, during and after training."""
        return self.graph.matrices(self.stem(self.flatten(inputs)))


def graph(
    in_features: int, widths: Sequence[int], out_features: int, wiring: Wiring | float = "complete", edges: Edges = "learned"
) -> GraphClassifier:
    """Build a classifier with learned connectivity: one node for each of `widths`, which must be equal.

    Raises:
        ConfigError: a size is not positive, or the widths differ.

    >>> [name for name, _ in graph(4, [3, 3], 2).named_parameters()][:3]
    ['stem.weight', 'stem.bias', 'graph.nodes.0.1.weight']
    """
    width = one_width("a graph needs nodes", in_features, widths, out_features)
    return GraphClassifier(in_features, width, len(widths), out_features, wiring, edges)


def _senders(i: int, wiring: Wiring | float) -> list[int]:
    """Return the earlier nodes that node i receives input from."""
    if wiring == "complete":
        return list(range(i))
    if wiring == "chain":
        return [i - 1]
    if wiring == "residual":
        return list(range(max(0, i - 2), i))
    if isinstance(wiring, bool) or not isinstance(wiring, int | float) or not 0 <= wiring <= 1:
        raise ConfigError(f'wiring must be "complete", "chain", "residual" or a share between 0 and 1, not {wiring!r}')
    return [j for j in range(i - 1) if float(torch.rand(())) < wiring] + [i - 1]
