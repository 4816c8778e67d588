"""Predictive coding: states of hidden blocks relax, then every block learns to predict what its state became.

    E(s) = sum_{l<L} 1/2 |s_l - f_l(s_{l-1})|^2 + lambda ell(f_L(s_{L-1}), y)          s_0 = x, summed over the batch
    e_l = s_l - f_l(s_{l-1}),   e_L = -lambda d ell / d f_L

    state              s_l <- s_l + g ( -e_l + (d f_{l+1} / d s_l)^T e_{l+1} )         from the feed-forward pass, e = 0
    error              e_l <- e_l - g dE/de_l,   s_l = f_l(s_{l-1}) + e_l              the same energy in other variables
    staged             state, and block l learns at step L - l: BP times g^(L-l)
    fixed-prediction   state, with f_l and its derivative as they are in the feed-forward pass: BP at equilibrium
    learning           dW_l = (d f_l / d W_l)^T e_l / B, the inputs of every block held constant

States and rates are those of single samples: E is a sum, and B divides once, at the end. After few small steps the hidden
errors are about g T times those of backpropagation; the log `hidden_share`, the hidden blocks' share of E, says how far a
run has left that end: near 0 it is BP.

Local: with "state" a block needs its own error and the next block's, through that block's transposed weights. "error" is a
way to solve the same equations on a computer, not a network: each of its steps is a backward pass.
Sources: arXiv 2505.20137 and its code for "error"; arXiv 2407.01163; the identities with BP are tested.
Departures: hidden gradients are divided by 1 - (1 - g)^T, their size where a network hardly bends, unless `rescale` is
False.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apical.core.batch import counted, fitted, require_precision
from apical.core.blocks import Block, blocks
from apical.core.containers import Containers
from apical.core.credit import Credit, CreditRule, Loss, Root
from apical.core.layers import is_random
from apical.core.losses import output_error, refuse_options, terms, value_at
from apical.core.placement import layer_paths
from apical.errors import ConfigError, UnsupportedModelError, unknown_name

Inference = Literal["state", "error", "staged", "fixed-prediction"]
INFERENCES: tuple[Inference, ...] = ("state", "error", "staged", "fixed-prediction")
LOOK_EVERY = 4
"""Steps between looks at whether the states stand still."""

Back = Callable[[Tensor], Tensor]
"""`e -> (d f / d s)^T e`."""


class Relaxed(NamedTuple):
    """What inference leaves: s_0..s_{L-1} that the blocks learn on, e_1..e_{L-1}, the last step's change, and the steps."""

    s: list[Tensor]
    e: list[Tensor]
    residual: Tensor
    steps: int


class PredictiveCoding(CreditRule):
    """Each block learns from the difference between its state, once inference is done, and what the block below predicts.

    Args:
        model: a row of blocks (see :func:`apical.core.blocks.blocks`): Linear and convolution layers with normalisation,
            activations and pooling, one after another; no skips, nothing random.
        loss: maps (output, targets) to a scalar batch mean.
        inference: "error", "state", "staged" or "fixed-prediction".
        steps: T; None: 5 for "error", 2 L for "state", L - 1 otherwise ("staged" has no others).
        rate: g, of single samples; None: 0.1 for "error" and "state", else 1. Stable below 2 over the largest eigenvalue of
            1 + J^T J, which grows with depth and weights.
        momentum: of the states, for "error" and "state".
        output_weight: lambda; the smaller, the nearer to BP.
        rescale: divide the hidden blocks' gradients by 1 - (1 - g)^T ("error" and "state").
        tolerance: stop when no state changes by more; 0 takes all steps.
        input_shape: of one sample, where there are convolutions.

    Raises:
        ConfigError: an option out of range; or a loss with `ignore_index` or a reduction that is no mean.
        UnsupportedModelError: the model is no row of blocks, or random, or of half precision.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    >>> rule = PredictiveCoding(model, inference="state", steps=20)
    >>> credit = rule(torch.randn(8, 4), torch.arange(8) % 3)
    >>> credit.backward()
    >>> sorted(credit.logs)
    ['energy', 'hidden_share', 'residual']
    """

    output_alone = True

    def __init__(
        self,
        model: torch.nn.Module,
        loss: Loss = F.cross_entropy,
        inference: Inference = "error",
        steps: int | None = None,
        rate: float | None = None,
        momentum: float = 0.0,
        output_weight: float = 1.0,
        rescale: bool = True,
        tolerance: float = 0.0,
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(model, loss)
        if inference not in INFERENCES:
            raise unknown_name("inference", inference, INFERENCES)
        refuse_options(loss, "predictive coding", ("ignore_index", "reduction"))
        self.head, self.row = blocks(model, input_shape)
        self._containers = Containers(model)
        for name, module in model.named_modules():
            if is_random(module):
                raise UnsupportedModelError(
                    f"module {name!r} ({type(module).__name__}) would draw anew at every step of the inference; remove it"
                )
        relaxes = inference in ("error", "state")
        default = {"error": 5, "state": 2 * len(self.row)}.get(inference, max(1, len(self.row) - 1))
        self.inference, self.steps = inference, default if steps is None else steps
        self.rate = (0.1 if relaxes else 1.0) if rate is None else rate
        self.momentum, self.output_weight, self.tolerance = momentum, output_weight, tolerance
        self.rescale = rescale and relaxes
        if inference == "staged" and self.steps != default:
            raise ConfigError(f"staged inference takes {default} steps here, one for each hidden block; leave steps out")
        if not relaxes and (momentum or tolerance):
            raise ConfigError(f"momentum and tolerance are for inference='error' and 'state', not {inference!r}")
        if self.steps < 1 or not (self.rate > 0 and 0 <= momentum < 1 and output_weight > 0 and tolerance >= 0):
            raise ConfigError(
                "steps must be at least 1, rate and output_weight positive, momentum in [0, 1), tolerance not negative; got "
                f"steps={steps}, rate={rate}, momentum={momentum}, output_weight={output_weight}, tolerance={tolerance}"
            )
        self._silent = False

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        """Credit for one batch; `output` and `loss` are those of the feed-forward pass."""
        self.require_attached()
        require_precision(type(self).__name__, self.row[0].layer.weight)
        self._containers.require_intact(inputs, lambda x: self._run(x)[-1])
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            s = self._run(inputs)  # s_0..s_{L-1} and the output
            output = s.pop()
            targets = fitted(self.loss, output, targets)
            loss = value_at(self.loss, output, targets)
        if not torch.is_grad_enabled():
            return Credit.of([], output, loss)
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False), self._buffers_kept():
            infer = {"error": self._in_errors, "fixed-prediction": self._at_fixed_predictions}
            relaxed = infer.get(self.inference, self._in_states)(s, targets)
            roots, logs = self._taught(relaxed, targets)
        return Credit.of([*roots, *terms(loss)], output, loss, logs)

    def states(self, inputs: Tensor, targets: Tensor) -> dict[str, list[Tensor]]:
        """ "s", s_1..s_{L-1}, and "e", e_1..e_{L-1} (batch, ...), after inference; nothing is learned."""
        self.require_attached()
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False), self._buffers_kept():
            *s, output = self._run(inputs)
            infer = {"error": self._in_errors, "fixed-prediction": self._at_fixed_predictions}
            relaxed = infer.get(self.inference, self._in_states)(s, fitted(self.loss, output, targets))
            return {"s": relaxed.s[1:], "e": relaxed.e}

    def credit_paths(self, inputs: Tensor) -> dict[str, str]:
        """Exact where the schedule is backpropagation itself."""
        exact = self.inference in ("staged", "fixed-prediction") and self.rate == 1 and self.steps >= len(self.row) - 1
        return layer_paths(self.model, inputs, "exact" if exact else "signal of its own")

    def _run(self, inputs: Tensor) -> list[Tensor]:
        """s_0..s_{L-1} and the output, feed-forward."""
        if len(inputs) == 0:
            raise ConfigError("the batch is empty: credit is a mean over samples")
        for module in self.head:
            inputs = module(inputs)
        s = [inputs]
        for block in self.row:
            s.append(block(s[-1]))
        return s

    def _top(self, output: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, int]:
        """The batch's mean loss, e_L of every sample, and how many samples count."""
        loss, error = output_error(self.loss, output, targets)
        rows = counted(targets, error)
        count = len(output) if rows is None else len(rows)
        return loss, error * (-count * self.output_weight), count

    def _in_states(self, s: list[Tensor], targets: Tensor) -> Relaxed:
        """Inference in the states; "staged" keeps each block's error of the step at which it first has one."""
        first = s[1:2]  # f_1(x) does not change
        s, learned, last = list(s), list(s), len(self.row) - 1
        moved = [torch.zeros_like(state) for state in s]
        e: list[Tensor] = []
        staged: list[Tensor] = [torch.zeros_like(state) for state in s[1:]]
        change, done = s[0].new_zeros(()), 0
        for step in range(self.steps + 1):
            ahead = [linearised(block, state) for block, state in zip(self.row[1:], s[1:], strict=True)]
            predictions = [*first, *(p for p, _ in ahead)]  # f_1..f_L; f_L alone where there is one block
            e = [state - p for state, p in zip(s[1:], predictions, strict=False)]
            if self.inference == "staged" and step:
                staged[last - step] = e[last - step]
            if step == self.steps or not ahead:
                break
            above = [*e, self._top(predictions[-1], targets)[1]]
            change = s[1].new_zeros(())
            for k, (_, back) in enumerate(ahead, start=1):
                moved[k] = self.momentum * moved[k] - e[k - 1] + back(above[k])
                s[k] = s[k] + self.rate * moved[k]
                change = torch.maximum(change, self.rate * moved[k].abs().amax())
            done = step + 1
            if self._stands(step, change):
                e = [state - p for state, p in zip(s[1:], self._predictions(first, s), strict=False)]
                break
        if self.inference == "staged":
            return Relaxed(learned, staged, change, done)
        self._look(e)
        return Relaxed(s, e, change, done)

    def _predictions(self, first: list[Tensor], s: list[Tensor]) -> list[Tensor]:
        return [*first, *(block(state) for block, state in zip(self.row[1:-1], s[1:-1], strict=True))]

    def _in_errors(self, s: list[Tensor], targets: Tensor) -> Relaxed:
        """Inference in the errors: every step runs the perturbed network forwards and backwards."""
        first, s = s[1:2], list(s)
        e = [torch.zeros_like(state) for state in s[1:]]
        moved = [torch.zeros_like(state) for state in s[1:]]
        change, done = s[0].new_zeros(()), 0
        for step in range(self.steps if e else 0):
            s[1] = first[0] + e[0]
            backs: list[Back] = []
            for k, block in enumerate(self.row[1:], start=1):
                prediction, back = linearised(block, s[k])
                backs.append(back)
                if k < len(e):
                    s[k + 1] = prediction + e[k]
            error = self._top(prediction, targets)[1]
            change = s[1].new_zeros(())
            for k in reversed(range(len(e))):
                error = backs[k](error)  # -lambda d ell / d s_{k+1} along the whole path
                moved[k] = self.momentum * moved[k] - e[k] + error
                e[k] = e[k] + self.rate * moved[k]
                change = torch.maximum(change, self.rate * moved[k].abs().amax())
            done = step + 1
            if self._stands(step, change):
                break
        for k, error in enumerate(e):
            s[k + 1] = (first[0] if k == 0 else self.row[k](s[k])) + error
        return Relaxed(s, e, change, done)

    def _at_fixed_predictions(self, s: list[Tensor], targets: Tensor) -> Relaxed:
        """Errors relax while predictions and derivatives stay those of the feed-forward pass."""
        ahead = [linearised(block, state) for block, state in zip(self.row[1:], s[1:], strict=True)]
        e = [torch.zeros_like(state) for state in s[1:]]
        change = s[0].new_zeros(())
        top = self._top(ahead[-1][0], targets)[1] if ahead else None
        for _ in range(self.steps if e else 0):
            assert top is not None
            moves = [back(error) - own for own, (_, back), error in zip(e, ahead, [*e[1:], top], strict=True)]
            e = [own + self.rate * move for own, move in zip(e, moves, strict=True)]
            change = torch.stack([self.rate * move.abs().amax() for move in moves]).amax()
        return Relaxed(s, e, change, self.steps)

    def _stands(self, step: int, change: Tensor) -> bool:
        looks = self.tolerance and step % LOOK_EVERY == LOOK_EVERY - 1 and not torch.compiler.is_compiling()
        return bool(looks) and float(change) <= self.tolerance

    def _taught(self, relaxed: Relaxed, targets: Tensor) -> tuple[list[Root], dict[str, Tensor]]:
        """Every block's prediction as a root, with minus its error over the batch size as the signal; and the logs."""
        predictions = []
        for block, state in zip(self.row, relaxed.s, strict=True):
            with torch.enable_grad():
                predictions.append(block(_copied(block, state.detach())))
        loss, top, count = self._top(predictions[-1].detach(), targets)
        size = 1 - (1 - self.rate) ** relaxed.steps if self.rescale else 1.0
        signals = [*(error / (-count * size) for error in relaxed.e), top / -count]
        roots: list[Root] = [(p, signal) for p, signal in zip(predictions, signals, strict=True) if p.requires_grad]
        hidden = sum((error.square().sum() for error in relaxed.e), loss.new_zeros(())) / (2 * count)
        energy = hidden + self.output_weight * loss.detach()
        share = torch.where(energy == 0, 0.0, hidden / energy)
        logs = {"energy": energy, "hidden_share": share, "residual": relaxed.residual}
        return roots, logs

    def _look(self, e: Sequence[Tensor]) -> None:
        """Warn once where a hidden block has no error: its steps are below the precision of its state, or too few."""
        if self._silent or torch.compiler.is_compiling() or not e or not e[0].is_cpu:
            return
        silent = [block.name for block, error in zip(self.row, e, strict=False) if not bool(error.any())]
        if silent and len(silent) < len(e):  # where all are silent the target is met
            self._silent = True
            warnings.warn(
                f"after {self.steps} steps no error has reached layer {silent[-1]!r}, which learns nothing: it needs at "
                f"least as many steps as there are layers above it, and {e[0].dtype} may round deep layers' errors away; "
                'raise steps or rate, or use inference="error"',
                RuntimeWarning,
                stacklevel=4,
            )

    @contextmanager
    def _buffers_kept(self) -> Iterator[None]:
        """Running statistics move with the feed-forward pass alone."""
        moving = [module._buffers.values() for module in self.model.modules() if module.training]
        kept = [(buffer, buffer.clone()) for buffers in moving for buffer in buffers if buffer is not None]
        try:
            yield
        finally:
            for buffer, before in kept:
                buffer.data.copy_(before)  # unseen by the graphs of the blocks


def linearised(block: Block, state: Tensor) -> tuple[Tensor, Back]:
    """`f(s)` and `e -> (d f / d s)^T e` of one block at a state (batch, ...)."""
    if torch.compiler.is_compiling():
        traced = torch.func.vjp(block, state)
        return traced[0], lambda error: traced[1](error)[0]
    with torch.enable_grad():
        leaf = state.detach().requires_grad_()
        graph = block(_copied(block, leaf))
    return graph.detach(), lambda error: torch.autograd.grad(graph, leaf, error, retain_graph=True)[0]


def _copied(block: Block, state: Tensor) -> Tensor:
    """The state, or a copy where the block begins with a module that changes its input."""
    return state.clone() if getattr(block.modules[0], "inplace", False) else state
