"""Networks with learned connectivity: nodes over a complete directed acyclic graph, whose edges are parameters.

    u_i = sum_{j<i} alpha_ij x_j,   x_i = f_i(u_i),   x_0: the input;   loss + gamma sum |alpha_ij|

With e_i = dL/du_i the gradient of an edge is `sum over the batch <e_i, x_j>`, the error at the receiver times the activity
of the sender: local, whatever rule delivers e_i. The container is that of TopoNet (Yuan et al., arXiv 2008.08261), whose
body could not be read: edges are raw numbers here, nodes are ReLU and then Linear. Under rules that hand errors to
activations, errors then reach edges without passing a weight. Edges for each input, by attention, follow Yuan et al. (arXiv
2010.01097).
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
"""Title of their picture."""


class Mix(nn.Module):
    """What a node receives: `u_i = sum_j alpha_j x_j`, all x_j of one shape.

    Args:
        senders: indices of the nodes that it hears, rising.
        learned: whether the edges are parameters; else they are a buffer.
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
        """Of all states so far."""
        return sum_of([self.alpha[k] * states[j] for k, j in enumerate(self.senders)])


class Attention(nn.Module):
    """A mix whose edges depend on the input: `alpha(x_0) = softmax(R x_0 + r)`, so each input has its own wiring.

    No error goes back through the router R to x_0; R itself learns by the exact error of the edges.

    Args:
        senders: as in :class:`Mix`.
        features: of x_0.
    """

    def __init__(self, senders: Sequence[int], features: int) -> None:
        super().__init__()
        self.senders = tuple(senders)
        self.router = nn.Linear(features, len(self.senders))

    def weights(self, first: Tensor) -> Tensor:
        """alpha for each sample: (batch, senders)."""
        result: Tensor = self.router(first.detach()).softmax(-1)
        return result

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """Of all states so far, each (batch, features)."""
        alpha = self.weights(states[0])
        return sum_of([alpha[:, k, None] * states[j] for k, j in enumerate(self.senders)])


register_local(Mix)


def sum_of(parts: Sequence[Tensor]) -> Tensor:
    """The sum of one tensor or more."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


class Graph(nn.Module):
    """Nodes over a directed acyclic graph in a fixed order; node 0 hands out the input, the last one's input is the output.

    Args:
        nodes: f_1, ..., f_{n-1}; all map one shape to itself.
        wiring: "complete", "chain" (each node hears the one before), "residual" (the two before), or the share of the
            earlier nodes that a node hears besides the one before, drawn from the global torch RNG.
        edges: "learned": numbers alpha_ij, at first `1/(incoming edges)`; "fixed": the same, and they stay; "attention":
            from the input.
        features: of x_0, which attention needs.

    Raises:
        ConfigError: the wiring or the kind of edges is unknown, or attention has no features.

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
        """u_n, of x's shape."""
        states = [x]
        for mix, node in zip(self.mixes, self.nodes, strict=False):
            states.append(node(mix(states)))
        result: Tensor = self.mixes[-1](states)
        return result

    def adjacency(self, inputs: Tensor | None = None) -> Tensor:
        """alpha as a strictly lower triangular matrix (n + 1, n + 1): row i hears column j.

        Args:
            inputs: x_0 (batch, features), over which the edges of attention are averaged.

        Raises:
            ConfigError: attention has no edges without inputs.
        """
        matrix = torch.zeros(len(self.mixes) + 1, len(self.mixes) + 1)
        for i, mix in enumerate(self.mixes, start=1):
            if isinstance(mix, Attention):
                if inputs is None:
                    raise ConfigError("the edges of attention depend on the input: give adjacency the inputs")
                matrix[i, list(mix.senders)] = mix.weights(inputs).detach().mean(0).to(matrix)
            elif isinstance(mix, Mix):
                matrix[i, list(mix.senders)] = mix.alpha.detach().to(matrix)
        return matrix

    @torch.no_grad()
    def matrices(self, inputs: Tensor) -> dict[str, Tensor]:
        """What a report draws of the model before, during and after training: the edges."""
        return {EDGES: self.adjacency(inputs)}

    @torch.no_grad()
    def shrink_(self, amount: float) -> None:
        """The proximal step of `amount = lr gamma` for the L1 term: edges move to zero, and those that reach it stay there.

        To be called after `optimizer.step()`; learned edges only.
        """
        for mix in self.mixes:
            if isinstance(mix, Mix) and isinstance(mix.alpha, nn.Parameter):
                mix.alpha.copy_(nn.functional.softshrink(mix.alpha, amount))

    @torch.no_grad()
    def prune_(self, threshold: float = 1e-2) -> int:
        """Set learned edges below the threshold to zero; returns how many of all edges are zero now."""
        zeros = 0
        for mix in self.mixes:
            if isinstance(mix, Mix):
                mix.alpha.mul_(mix.alpha.abs() >= threshold)
                zeros += int((mix.alpha == 0).sum())
        return zeros


class GraphClassifier(nn.Module):
    """`head(relu(graph(stem(x))))`: a graph of dense nodes between a Linear from the input and a Linear read-out."""

    def __init__(self, in_features: int, width: int, nodes: int, outputs: int, wiring: Wiring | float, edges: Edges) -> None:
        super().__init__()
        self.flatten, self.stem = nn.Flatten(), nn.Linear(in_features, width)
        dense = [nn.Sequential(nn.ReLU(), nn.Linear(width, width)) for _ in range(nodes)]
        self.graph = Graph(dense, wiring, edges, width)
        self.relu, self.head = nn.ReLU(), nn.Linear(width, outputs)
        xavier_(self)
        for mix in self.graph.mixes:
            if isinstance(mix, Attention):
                nn.init.zeros_(mix.router.weight)  # at first all edges are alike

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) -> (N, outputs)."""
        result: Tensor = self.head(self.relu(self.graph(self.stem(self.flatten(x)))))
        return result

    @torch.no_grad()
    def matrices(self, inputs: Tensor) -> dict[str, Tensor]:
        """What a report draws of the model before, during and after training: the edges."""
        return self.graph.matrices(self.stem(self.flatten(inputs)))


def graph(
    in_features: int, widths: Sequence[int], out_features: int, wiring: Wiring | float = "complete", edges: Edges = "learned"
) -> GraphClassifier:
    """A classifier with learned connectivity: a node for each of `widths`, which must be equal.

    Raises:
        ConfigError: a size is not positive, or the widths differ.

    >>> [name for name, _ in graph(4, [3, 3], 2).named_parameters()][:3]
    ['stem.weight', 'stem.bias', 'graph.nodes.0.1.weight']
    """
    width = one_width("a graph needs nodes", in_features, widths, out_features)
    return GraphClassifier(in_features, width, len(widths), out_features, wiring, edges)


def _senders(i: int, wiring: Wiring | float) -> list[int]:
    """The earlier nodes that node i hears."""
    if wiring == "complete":
        return list(range(i))
    if wiring == "chain":
        return [i - 1]
    if wiring == "residual":
        return list(range(max(0, i - 2), i))
    if isinstance(wiring, bool) or not isinstance(wiring, int | float) or not 0 <= wiring <= 1:
        raise ConfigError(f'wiring must be "complete", "chain", "residual" or a share between 0 and 1, not {wiring!r}')
    return [j for j in range(i - 1) if float(torch.rand(())) < wiring] + [i - 1]
