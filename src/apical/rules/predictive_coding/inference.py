"""Inference of predictive coding: the dynamics of one batch's states and errors.

    E(s) = sum_{l<L} 1/2 |s_l - f_l(s_{l-1})|^2 + top(f_L(s_{L-1})),   e_l = s_l - f_l(s_{l-1}),   e_L = -d top / d f_L

Lists start with the first hidden block: `s[0]` is s_1. The first block's prediction does not change while its input is
held, so it is computed once. The feed-forward pass serves as the first step's forward pass, and the last one's predictions
are those that the blocks learn from: T steps take T forward and T backward passes through blocks 2..L, no more.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apical.core.blocks import Block

LOOK_EVERY = 4
"""Steps between checks of whether the states have converged."""

Top = Callable[[Tensor], Tensor]
"""The output's term of the energy, summed over the batch."""

Back = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Signals at a function's outputs -> signals at its inputs."""


class Steps(NamedTuple):
    """Options of the inference: T, g, momentum of the states, and the change below which it stops (0: never)."""

    number: int
    rate: float
    momentum: float = 0.0
    tolerance: float = 0.0


class Relaxed(NamedTuple):
    """Result of the inference.

    Attributes:
        s: s_1..s_{L-1}, on which blocks 2..L learn.
        e: e_1..e_{L-1}.
        residual: the largest change in the last step.
        steps: number of steps taken.
        p: f_1..f_L at these states with the graph of every block's own weights, where it is known already.
    """

    s: list[Tensor]
    e: list[Tensor]
    residual: Tensor
    steps: int
    p: list[Tensor] | None = None


class Energy:
    """The energy of one batch, as a function of states or errors.

    Args:
        row: the blocks.
        x: s_0 (batch, ...).
        top: the output's term.
        p: f_1..f_L of the feed-forward pass; with graphs (see :func:`feed_forward`) the first step needs no separate pass.
        s: the leaves of those graphs, or the states without graph.
        through: those graphs lead from block to block.
    """

    def __init__(
        self, row: Sequence[Block], x: Tensor, top: Top, p: Sequence[Tensor], s: Sequence[Tensor], *, through: bool = False
    ) -> None:
        self.row, self.x, self.top, self.p, self.leaves = row, x, top, list(p), list(s)
        self.has_graph, self.through = bool(s) and s[0].requires_grad, through
        self.s = [state.detach() for state in s]
        self.first = p[0].detach()

    def ahead(self, *s: Tensor) -> tuple[Tensor, ...]:
        """f_2(s_1), .., f_{L-1}(s_{L-2}), top(f_L(s_{L-1}))."""
        predictions = [called(block, state) for block, state in zip(self.row[1:], s, strict=True)]
        return (*predictions[:-1], self.top(predictions[-1]))

    def behind(self, *e: Tensor) -> tuple[Tensor]:
        """top(f_L) of the network that is perturbed by the errors."""
        s = self.first + e[0]
        for block, error in zip(self.row[1:-1], e[1:], strict=True):
            s = called(block, s) + error
        return (self.top(called(self.row[-1], s)),)

    def at_start(self, *, retain: bool = False) -> tuple[Sequence[Tensor], Back]:
        """:meth:`ahead` at the feed-forward pass, and its backward map."""
        if not self.has_graph or self.through:
            return linearised(self.ahead, self.s, retain=retain)
        with torch.enable_grad():
            predictions = (*self.p[1:-1], self.top(self.p[-1]))
        return predictions, lambda signals: torch.autograd.grad(predictions, self.leaves, signals, retain_graph=retain)

    def handed_down(self, e: Sequence[Tensor] | None) -> Sequence[Tensor]:
        """-d top / d e_l along the whole path; None means no errors."""
        if torch.compiler.is_compiling() or (e is None and not (self.has_graph and self.through)):
            results, back = linearised(self.behind, e or [torch.zeros_like(state) for state in self.s])
            return back([-torch.ones_like(results[0])])
        with torch.enable_grad():
            if e is None:
                return torch.autograd.grad(-self.top(self.p[-1]), self.leaves)
            s = [(self.first + e[0]).requires_grad_()]
            for block, error in zip(self.row[1:-1], e[1:], strict=True):
                s.append(called(block, s[-1]) + error)
            return torch.autograd.grad(-self.top(called(self.row[-1], s[-1])), s)

    def learned(self, s: Sequence[Tensor]) -> list[Tensor]:
        """f_1..f_L at s_0 and the given states, with the graph of every block's own weights."""
        return learned(self.row, self.x, s, self.p[0] if self.has_graph else None)

    def learned_in_errors(self, e: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """States s_l = f_l(s_{l-1}) + e_l, and :meth:`learned` at them, in one pass."""
        with torch.enable_grad():
            p = [self.p[0] if self.has_graph else called(self.row[0], self.x)]
            s: list[Tensor] = []
            for block, error in zip(self.row[1:], e, strict=True):
                s.append(p[-1].detach() + error)
                p.append(called(block, s[-1]))
        return s, p


def learned(row: Sequence[Block], x: Tensor, s: Sequence[Tensor], first: Tensor | None = None) -> list[Tensor]:
    """f_1..f_L at s_0 and the given states, with the graph of every block's own weights; `first` is f_1 where known."""
    with torch.enable_grad():
        first = called(row[0], x) if first is None else first
        return [first, *(called(block, state.detach()) for block, state in zip(row[1:], s, strict=True))]


def feed_forward(row: Sequence[Block], x: Tensor, *, through: bool) -> tuple[list[Tensor], list[Tensor]]:
    """f_1..f_L and s_1..s_{L-1} of the feed-forward pass, whose graphs are used in the first step of inference.

    Args:
        row: the blocks.
        x: s_0.
        through: graphs lead from block to block (errors move) instead of ending at each state (states move).
    """
    with torch.enable_grad():
        p, s = [called(row[0], x)], list[Tensor]()
        for block in row[1:]:
            s.append(p[-1] if through and s else p[-1].detach().requires_grad_())
            p.append(called(block, s[-1]))
    return p, s


def called(block: Block, state: Tensor) -> Tensor:
    """`f(s)`; of a copy where the block may change its input: it begins with a module that does, or is a whole module."""
    if block.layer not in block.modules or getattr(block.modules[0], "inplace", False):
        return block(state.clone())
    is_leaf = state.is_leaf and state.requires_grad and not torch.compiler.is_compiling()
    return block(state.view_as(state) if is_leaf else state)  # PyTorch's trackers of modules cannot follow a leaf


def linearised(
    function: Callable[..., tuple[Tensor, ...]], leaves: Sequence[Tensor], *, retain: bool = False
) -> tuple[Sequence[Tensor], Back]:
    """The function's value at the leaves, and its backward map there."""
    if torch.compiler.is_compiling():
        results, pull, *_ = torch.func.vjp(function, *leaves)
        return results, lambda signals: pull(tuple(signals))
    with torch.enable_grad():
        inputs = [leaf.detach().requires_grad_() for leaf in leaves]
        results = function(*inputs)
    return results, lambda signals: torch.autograd.grad(results, inputs, signals, retain_graph=retain)


def in_states(energy: Energy, steps: Steps, *, staged: bool = False) -> Relaxed:
    """s_l <- s_l + g (-e_l + (d f_{l+1} / d s_l)^T e_{l+1}), all blocks simultaneously.

    Args:
        energy: of the batch.
        steps: see there.
        staged: every block keeps its first error, and learns at its feed-forward state.
    """
    s, last = list(energy.s), len(energy.row) - 1
    velocity = [torch.zeros_like(state) for state in s] if steps.momentum else []
    staged_errors = [torch.zeros_like(state) for state in s]
    residual, done = energy.first.new_zeros(()), 0
    while s and done < steps.number:
        predictions, back = energy.at_start() if done == 0 else linearised(energy.ahead, s)
        e = errors(s, energy.first, predictions)
        if staged and done:
            staged_errors[last - done] = e[last - done]
        # -dE/ds_l = -e_l + (d f_{l+1} / d s_l)^T e_{l+1}; at the top -d top / ds in place of an error
        slopes = list(torch._foreach_sub(list(back([*e[1:], -torch.ones_like(predictions[-1])])), e))
        s, velocity = step(s, slopes, velocity, steps)
        done += 1
        if done == steps.number or looks(done, steps):
            residual = steps.rate * largest(velocity or slopes)
            if looks(done, steps) and bool(residual <= steps.tolerance):
                break
    if staged:
        if s:
            staged_errors[last - done] = s[last - done] - energy.p[last - done].detach()  # what is below has not moved yet
        return Relaxed(energy.s, staged_errors, residual, done)
    p = energy.learned(s)
    return Relaxed(s, errors(s, p[0].detach(), p[1:]), residual, done, p)


def errors(s: Sequence[Tensor], first: Tensor, predictions: Sequence[Tensor]) -> list[Tensor]:
    """e_1..e_{L-1}, given f_1 and the predictions from f_2 on."""
    return [state - p.detach() for state, p in zip(s, (first, *predictions), strict=False)]


def in_errors(energy: Energy, steps: Steps) -> Relaxed:
    """e_l <- e_l - g dE/de_l: every step runs the perturbed network forwards and backwards."""
    e = [torch.zeros_like(state) for state in energy.s]
    velocity = [torch.zeros_like(state) for state in e] if steps.momentum else []
    residual, done = energy.first.new_zeros(()), 0
    while e and done < steps.number:
        down, before = list(energy.handed_down(e if done else None)), e
        if velocity:
            e, velocity = step(e, list(torch._foreach_sub(down, e)), velocity, steps)
        else:
            e = list(torch._foreach_lerp(e, down, steps.rate))  # e + g (down - e)
        done += 1
        if done == steps.number or looks(done, steps):
            residual = largest(list(torch._foreach_sub(e, before)))
            if looks(done, steps) and bool(residual <= steps.tolerance):
                break
    s, p = energy.learned_in_errors(e)
    return Relaxed(s, e, residual, done, p)


def at_fixed_predictions(energy: Energy, steps: Steps) -> Relaxed:
    """Errors relax while predictions and derivatives stay those of the feed-forward pass."""
    e = [torch.zeros_like(state) for state in energy.s]
    residual = energy.first.new_zeros(())
    if e:
        predictions, back = energy.at_start(retain=True)
        for _ in range(steps.number):
            slopes = torch._foreach_sub(list(back([*e[1:], -torch.ones_like(predictions[-1])])), e)
            e, _ = step(e, list(slopes), [], steps)
        residual = steps.rate * largest(list(slopes))
    return Relaxed(energy.s, e, residual, steps.number)


def step(
    values: Sequence[Tensor], slopes: Sequence[Tensor], moved: list[Tensor], steps: Steps
) -> tuple[list[Tensor], list[Tensor]]:
    """Values after a step along the slopes, and their change (over g) if there is momentum."""
    if moved:
        moved = list(torch._foreach_add(torch._foreach_mul(moved, steps.momentum), list(slopes)))
    return list(torch._foreach_add(list(values), list(moved or slopes), alpha=steps.rate)), moved


def largest(values: Sequence[Tensor]) -> Tensor:
    """The largest size of an entry."""
    return torch.stack([value.abs().amax() for value in values]).amax()


def looks(done: int, steps: Steps) -> bool:
    """Whether to check convergence after this number of steps; compiled graphs take all steps."""
    return steps.tolerance > 0 and done % LOOK_EVERY == 0 and not torch.compiler.is_compiling()


def infer_input(row: Sequence[Block], x: Tensor, top: Top, steps: Steps) -> Tensor:
    """s_0 after inference in which it moves with the hidden states, from x (batch, ...) and the feed-forward pass."""

    def ahead(*s: Tensor) -> tuple[Tensor, ...]:
        p = [called(block, state) for block, state in zip(row, s, strict=True)]
        return (*p[:-1], top(p[-1]))

    s = [x]
    for block in row[:-1]:
        s.append(called(block, s[-1]))
    for _ in range(steps.number):
        predictions, back = linearised(ahead, s)
        e = [state - p.detach() for state, p in zip(s[1:], predictions, strict=False)]
        down = list(back([*e, -torch.ones_like(predictions[-1])]))
        s, _ = step(s, [down[0], *(a - b for a, b in zip(down[1:], e, strict=True))], [], steps)
    return s[0]
