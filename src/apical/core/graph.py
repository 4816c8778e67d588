"""Read autograd's record of a forward pass as units: which errors reach which layer, and where a cut would separate them.

A vertex is an output of an autograd node. A *site* is a use of weights: the output of a layer's call, or the vertex at which
another parameter enters. A *mark* is a vertex at which the graph is cut, or will be: the unit that ends there starts a
separate backward pass, and nothing passes from above. The root is the model's output.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.graph import Node

Vertex = tuple[Node, int]
"""An autograd node and the index of its output."""

SHAPES = ("TransposeBackward0", "PermuteBackward0", "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")
"""Nodes whose output contains the same numbers as their input."""

SEVERED = "_SeverBackward"
"""Name of the node with which :func:`apical.core.checkpointing.sever` ends a graph."""


def vertex(tensor: Tensor) -> Vertex | None:
    """Return the tensor's place in the graph; None if it has no history."""
    return None if tensor.grad_fn is None else (tensor.grad_fn, tensor.output_nr)


def lasting(tensor: Tensor) -> Vertex | None:
    """Return the vertex that remains in the graph when the tensor is changed in place: for a view, that of its base."""
    with torch._C.DisableTorchFunction():  # calls made here do not count as the model's
        base = tensor._base
        return vertex(tensor if base is None or base.grad_fn is None else base)


def reshapes(at: Vertex | None) -> Iterator[Vertex]:
    """Return the vertex and those that it is a view of, as far as autograd knows."""
    while at is not None:
        yield at
        below = at[0].next_functions
        at = cast(Vertex, below[0]) if at[0].name() in SHAPES and below[0][0] is not None else None


def leaves(node: Node | None) -> Iterator[Tensor]:
    """Yield leaves that require a gradient below a node, without storing the graph: a quick check below the topmost cut."""
    waiting, seen = [node] if node is not None else [], {node}
    while waiting:
        below = waiting.pop()
        leaf = getattr(below, "variable", None)
        if leaf is not None:
            yield leaf
        elif below.name() != SEVERED:
            for child, _ in below.next_functions:
                if child is not None and child not in seen:
                    seen.add(child)
                    waiting.append(child)


class Reach(NamedTuple):
    """How errors reach one site.

    Attributes:
        roots: the marks (as vertices; None is the model's output) whose errors arrive without being stopped by another mark.
        merged: another weighted site whose weight an error passes on its way, or None.
    """

    roots: frozenset[Vertex | None]
    merged: Vertex | None


class Graph:
    """The graph below some tensors.

    Args:
        roots: vertices of the model's output, and of cuts that ended other parts of the graph.

    Attributes:
        order: every vertex, in reverse order of computation.
        children: what each vertex is computed from.
        parameters: ids of the leaves that enter at each vertex.
    """

    def __init__(self, roots: Collection[Vertex]) -> None:
        self.roots = list(dict.fromkeys(roots))
        self.children: dict[Vertex, list[Vertex]] = {}
        self.parameters: dict[Vertex, list[int]] = {}
        self.order: list[Vertex] = []
        self._dominated: tuple[frozenset[Vertex], dict[Vertex, Vertex | None]] | None = None
        waiting: list[tuple[Vertex, bool]] = [(root, False) for root in self.roots]
        while waiting:
            at, is_done = waiting.pop()
            if is_done:
                self.order.append(at)
            elif at not in self.children:
                self._open(at)
                waiting.append((at, True))
                waiting += [(child, False) for child in self.children[at] if child not in self.children]
        self.order.reverse()

    def _open(self, at: Vertex) -> None:
        below: list[tuple[Any, int]] = [] if at[0].name() == SEVERED else list(at[0].next_functions)
        children = [(child, number) for child, number in below if child is not None]
        self.children[at] = [pair for pair in children if not hasattr(pair[0], "variable")]
        self.parameters[at] = [id(child.variable) for child, _ in children if hasattr(child, "variable")]

    def reach(self, output: Collection[Vertex], marks: Collection[Vertex], weighted: Collection[Vertex]) -> "Reached":
        """Return how errors travel when the graph is cut at `marks` and the weights are at the `weighted` sites."""
        return Reached(self, set(output), set(marks), set(weighted))

    def chain(self, site: Vertex, output: Collection[Vertex], weighted: Collection[Vertex]) -> list[Vertex]:
        """Return vertices on every path from the output to the site, with no other weighted site below; nearest first."""
        above = self._dominators(frozenset(output))
        weights = set(weighted)
        hot: dict[Vertex, bool] = {site: False}  # for vertices above the site: whether a weighted site lies between
        for at in reversed(self.order):
            below = [child for child in self.children[at] if child in hot]
            if at != site and below:
                hot[at] = any(hot[child] or (child != site and child in weights) for child in below)
        chain: list[Vertex] = []
        top: Vertex | None = site
        while top is not None and not hot.get(top, True) and (top == site or top not in weights):
            chain.append(top)
            top = above.get(top)
        return chain

    def between(self, top: Vertex, site: Vertex) -> set[Vertex]:
        """Return the vertices on paths from `top` down to the site, without these two."""
        up = {site}
        for at in reversed(self.order):
            if any(child in up for child in self.children[at]):
                up.add(at)
        down, waiting = set(), [top]
        while waiting:
            for child in self.children[waiting.pop()]:
                if child in up and child not in down:
                    down.add(child)
                    waiting.append(child)
        return down - {top, site}

    def separators(self, sites: Collection[Vertex], weighted: Collection[Vertex]) -> dict[Vertex, int]:
        """Return vertices on every path from the output to every site below them; nearest to the output first.

        Args:
            sites: all uses of parameters.
            weighted: those that count for the value.

        Returns:
            For each separator, the weighted sites below it, as bits; separators without such sites are left out.
        """
        bits = {site: 1 << number for number, site in enumerate(sites)}
        counted = sum(bits[site] for site in weighted)
        above = self._dominators(frozenset(self.roots))
        below: dict[Vertex, int] = {}
        for at in reversed(self.order):
            below[at] = bits.get(at, 0)
            for child in self.children[at]:
                below[at] |= below[child]
        own = {at: bits.get(at, 0) for at in self.order}
        for at in reversed(self.order):
            parent = above.get(at)
            if parent is not None:
                own[parent] |= own[at]
        return {at: own[at] & counted for at in self.order if own[at] == below[at] and own[at] & counted}

    def shares(self, output: Collection[Vertex], shrinkage: Mapping[Vertex, float]) -> dict[Vertex, float]:
        """Return, for each vertex, the product of the shrinkages on all its paths from the output."""
        above = self._dominators(frozenset(output))
        result: dict[Vertex, float] = {}
        for at in self.order:
            parent = above.get(at)
            result[at] = 1.0 if parent is None else result.get(parent, 1.0) * shrinkage.get(parent, 1.0)
        return result

    def _dominators(self, output: frozenset[Vertex]) -> dict[Vertex, Vertex | None]:
        """Return each vertex's immediate dominator (Cooper, Harvey & Kennedy 2001); None is the output as a whole."""
        if self._dominated is not None and self._dominated[0] == output:
            return self._dominated[1]
        parents: dict[Vertex, list[Vertex | None]] = {at: [None] for at in output}
        nearest: dict[Vertex, Vertex | None] = {}
        depth: dict[Vertex | None, int] = {None: 0}
        for at in self.order:
            if at not in parents:
                continue  # not below the output
            first, *rest = parents[at]
            for other in rest:
                while first != other:
                    if depth[first] >= depth[other]:
                        first = nearest[first] if first is not None else None
                    else:
                        other = nearest[other] if other is not None else None
            nearest[at], depth[at] = first, depth[first] + 1
            for child in self.children[at]:
                parents.setdefault(child, []).append(at)
        self._dominated = output, nearest
        return nearest


class Reached:
    """Errors that propagate down a graph that is cut at marks.

    Attributes:
        direct: for each vertex, the roots whose errors arrive there, as bits: bit 0 is the output, bit i mark i.
        passed: for each output of the model, the errors that arrive through what is computed from it.
        merged: for each vertex, a weighted site that an error passes on its way there, or None.
        above: for each mark's bit, the bits of all units above it.
    """

    def __init__(self, graph: Graph, output: set[Vertex], marks: set[Vertex], weighted: set[Vertex]) -> None:
        self.number: dict[Vertex | None, int] = {None: 0}
        self.number |= {at: i for i, at in enumerate((at for at in graph.order if at in marks), start=1)}
        self.marks: list[Vertex | None] = list(self.number)
        self.weighted = weighted
        self.direct: dict[Vertex, int] = dict.fromkeys(graph.order, 0)
        self.merged: dict[Vertex, Vertex | None] = dict.fromkeys(graph.order)
        self.above: list[int] = [0] * len(self.number)
        self.passed: dict[Vertex, int] = {}
        for at in graph.order:
            if at in output:
                self.passed[at] = self.direct[at]
                self.direct[at] |= 1
            bits, passed = self.direct[at], self.merged[at]
            if at in marks:
                own = self.number[at]
                for i in _bits(bits):
                    self.above[own] |= 1 << i | self.above[i]
                bits, passed = 1 << own, None
                self.direct[at], self.merged[at] = bits, None
            if at in weighted:
                passed = at
            for child in graph.children[at]:
                self.direct[child] |= bits
                if passed is not None and bits:
                    self.merged[child] = passed

    def at(self, site: Vertex) -> Reach:
        """Return how errors reach a site."""
        return Reach(frozenset(self.marks[i] for i in _bits(self.direct[site])), self.merged[site])

    def leaks(self, site: Vertex) -> bool:
        """Whether an error bypasses a cut: it arrives from two units, one above the other.

        A vertex that is an output of the model and is also read inside (the mean of a variational autoencoder) may get both
        errors: the loss's own error at this output has passed nothing.
        """
        bits = self.passed.get(site, self.direct[site])
        return any(self.above[i] & bits for i in _bits(bits)) if bits & (bits - 1) else False


def _bits(number: int) -> Iterator[int]:
    while number:
        low = number & -number
        yield low.bit_length() - 1
        number ^= low
