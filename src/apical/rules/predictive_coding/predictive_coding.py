"""Predictive coding: states of hidden blocks relax, then every block learns to predict its relaxed state.

    E(s) = sum_{l<L} 1/2 |s_l - f_l(s_{l-1})|^2 + lambda ell(f_L(s_{L-1}), y)          s_0 = x, summed over the batch
    e_l = s_l - f_l(s_{l-1}),   e_L = -lambda d ell / d f_L

    state              s_l <- s_l + g ( -e_l + (d f_{l+1} / d s_l)^T e_{l+1} )         from the feed-forward pass, e = 0
    error              e_l <- e_l - g dE/de_l,   s_l = f_l(s_{l-1}) + e_l              the same energy in other variables
    incremental        state, one step a call: weights move after every step
    staged             state, and block l learns at step L - l: BP times g^(L-l)
    fixed-prediction   state, with f_l and its derivative as they are in the feed-forward pass: BP at equilibrium
    exact              the equilibrium itself, of linear networks with squared error
    learning           dW_l = (d f_l / d W_l)^T e_l / B, the inputs of every block held constant

States and rates are those of single samples: E is a sum, and B divides once, at the end. After few small steps the hidden
errors are about g T times those of backpropagation; the log `hidden_share`, the hidden blocks' share of E, says how far a
run is from that limit: near 0 it is BP.

The generative direction runs the other way: the model maps classes to images, s_0 = y, and the image is the output's target.
Its answer is found by inference with s_0 free.

Local: with "state" a block needs its own error and the next block's, through that block's transposed weights. "error" is a
way to solve the same equations on a computer, not a network: each of its steps is a backward pass.
Sources: arXiv 2505.20137 and its code for "error"; arXiv 2407.01163; arXiv 2212.00720 for "incremental"; arXiv 2505.13124
for "mu"; the identities with BP are tested.
Departures: hidden gradients are divided by 1 - (1 - g)^T, their size where a network hardly bends, unless `rescale` is
False.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apical.core.batch import counted, fitted, require_classes, require_precision, require_samples
from apical.core.blocks import blocks, through
from apical.core.containers import Containers
from apical.core.credit import Credit, CreditRule, Loss, Root
from apical.core.layers import is_random
from apical.core.losses import output_error, refuse_options, squared_error, terms, value_at
from apical.core.placement import layer_paths
from apical.core.scaled import require_mu
from apical.errors import ConfigError, UnsupportedModelError, require_choice, require_count
from apical.rules.predictive_coding.equilibrium import curvature, linear_equilibrium, require_linear
from apical.rules.predictive_coding.inference import (
    Energy,
    Relaxed,
    Steps,
    at_fixed_predictions,
    called,
    feed_forward,
    in_errors,
    in_states,
    infer_input,
    learned,
)

Inference = Literal["state", "error", "incremental", "staged", "fixed-prediction", "exact"]
INFERENCES: tuple[Inference, ...] = ("state", "error", "incremental", "staged", "fixed-prediction", "exact")
RELAXES = ("error", "state", "incremental")


class Held(NamedTuple):
    """A batch whose states continue at the next call: the batch, its states, and the number of its calls."""

    inputs: Tensor
    targets: Tensor
    s: list[Tensor]
    calls: int


class PredictiveCoding(CreditRule):
    """Each block learns from the difference between its state after inference and its prediction from the block below.

    Args:
        model: a row of blocks (see :func:`apical.core.blocks.blocks`): Linear and convolution layers with normalisation,
            activations and pooling, one after another; a module with skips inside (a residual block) is one block with one
            state; nothing random.
        loss: maps (output, targets) to a scalar batch mean.
        inference: "error", "state", "incremental", "staged", "fixed-prediction" or "exact".
        steps: T; None: 5 for "error", 2 L for "state" and "incremental", L - 1 otherwise ("staged" has no others).
        rate: g, of single samples; None: 0.1 for "error", "state" and "incremental", else 1. Stable below 2 over the largest
            eigenvalue of 1 + J^T J, which grows with depth and weights.
        momentum: of the states, for "error" and "state".
        output_weight: lambda; the smaller, the nearer to BP.
        rescale: divide the hidden blocks' gradients by 1 - (1 - g)^T ("error" and "state").
        tolerance: stop when no state changes by more; 0 takes all steps.
        parametrisation: "standard", any model; "mu" demands that every layer has the factor of muPC
            (:func:`apical.models.mlp_mu` makes such models), and then `steps` is L unless given.
        direction: "discriminative" (input to output), or "generative": the model maps one-hot classes (batch, classes) to
            samples, and the answer is inferred.
        answer_steps: of the inference that answers, in the generative direction.
        input_shape: of one sample, where there are convolutions.

    Attributes:
        repeats: calls that a training loop makes per batch, with an optimiser step after each: T where
            inference is "incremental", else 1.

    Raises:
        ConfigError: an option out of range; or a loss with `ignore_index` or a reduction other than the mean.
        UnsupportedModelError: the model is not a row of blocks, is random or in half precision; or is not linear, or not in
            the mu parametrisation, where that is required.

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
        parametrisation: Literal["standard", "mu"] = "standard",
        direction: Literal["discriminative", "generative"] = "discriminative",
        answer_steps: int = 100,
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(model, loss)
        require_choice("inference", inference, INFERENCES)
        require_choice("parametrisation", parametrisation, ("standard", "mu"))
        require_choice("direction", direction, ("discriminative", "generative"))
        refuse_options(self, "predictive coding", ("ignore_index", "reduction"))
        self.head, self.row = blocks(model, input_shape, skips=True)
        self._containers = Containers(model)
        for name, module in model.named_modules():
            if is_random(module):
                raise UnsupportedModelError(
                    f"module {name!r} ({type(module).__name__}) would draw new numbers at every inference step; remove it"
                )
        if parametrisation == "mu":
            require_mu(self.row)
        self.inference, self.direction, self.answer_steps = inference, direction, answer_steps
        self.feed_forward = direction == "discriminative"
        self._own_options(steps, rate, momentum, tolerance, parametrisation == "mu")
        self.output_weight, self.rescale = output_weight, rescale and inference in ("error", "state")
        require_count("answer_steps", answer_steps)
        if not 0 < output_weight < float("inf"):
            raise ConfigError(f"output_weight must be positive; got {output_weight}")
        if inference == "exact":
            require_linear(self.row)
            curvature(self.energy_loss, 1)
        self.repeats = self.steps if inference == "incremental" else 1
        self._silent = self._rising = False

    @property
    def energy_loss(self) -> Loss:
        """The output's term of the energy."""
        return self.loss if self.feed_forward else squared_error

    def _own_options(self, steps: int | None, rate: float | None, momentum: float, tolerance: float, deep: bool) -> None:
        """T, g, momentum and tolerance; `deep` takes T = L unless given."""
        depth, relaxes = len(self.row), self.inference in RELAXES
        default = {"error": 5, "state": 2 * depth, "incremental": 2 * depth}.get(self.inference, max(1, depth - 1))
        default = depth if deep and relaxes else default
        self.steps, self.rate = default if steps is None else steps, (0.1 if relaxes else 1.0) if rate is None else rate
        self.momentum, self.tolerance = momentum, tolerance
        if self.inference in ("staged", "exact") and steps not in (None, default):
            raise ConfigError(
                f"staged inference takes {default} steps here, one for each hidden block; leave steps out"
                if self.inference == "staged"
                else "exact inference takes no steps; leave steps out"
            )
        if self.inference not in ("error", "state") and (momentum or tolerance):
            raise ConfigError(f"momentum and tolerance apply to inference='error' and 'state', not {self.inference!r}")
        require_count("steps", self.steps)
        if not (0 < self.rate < 2 and 0 <= momentum < 1 and 0 <= tolerance < float("inf")):
            raise ConfigError(  # from 2 on not even a state without a network above it comes to rest
                "rate must be in (0, 2), momentum in [0, 1), tolerance not negative; got "
                f"rate={rate}, momentum={momentum}, tolerance={tolerance}"
            )

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        """Credit for one batch; `output` and `loss` are those of the feed-forward pass, or of the inferred answer."""
        self.require_attached()
        require_precision(type(self).__name__, self.row[0].like)
        if not self.feed_forward:
            return self._generative(inputs, targets)
        self._containers.require_intact(inputs, self._output)
        learns = torch.is_grad_enabled()
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            x = self._enter(inputs)
            p, s = self._start(x, learns)
            output = p[-1].detach()
            targets = fitted(self.loss, output, targets)
            if not learns:
                return Credit.of([], output, value_at(self.loss, output, targets))
            loss, error = output_error(self.loss, output, targets)
            with self._buffers_kept():
                roots, logs = self._learned(x, targets, p, s, (loss.detach(), error))
        return Credit.of([*roots, *terms(loss)], output, loss, logs)

    def _generative(self, inputs: Tensor, targets: Tensor) -> Credit:
        learns = torch.is_grad_enabled()
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            self._containers.require_intact(self._classes(targets, inputs), self._output)
            output = self.answer(inputs)
            loss = value_at(self.loss, output, fitted(self.loss, output, targets))
            if not learns:
                return Credit.of([], output, loss)
            x, wanted = self._enter(self._classes(targets, inputs)), self._sample(inputs)
            p, s = self._start(x, learns)
            start, error = output_error(self.energy_loss, p[-1].detach().flatten(1), wanted)
            with self._buffers_kept():
                roots, logs = self._learned(x, wanted, p, s, (start.detach(), error.view_as(p[-1])))
        return Credit.of([*roots, *terms(loss)], output, loss, logs)

    def _classes(self, targets: Tensor, inputs: Tensor) -> Tensor:
        """One-hot rows (batch, classes)."""
        classes = self.row[0].input_shape[-1]
        if targets.is_floating_point():
            return targets.to(inputs.dtype)
        require_classes(targets, classes)
        return F.one_hot(targets.long(), classes).to(inputs.dtype)

    def _sample(self, inputs: Tensor) -> Tensor:
        """Samples as rows (batch, outputs), the output's targets in the generative direction."""
        if inputs.dim() < 2:
            raise ConfigError(f"samples of shape {tuple(inputs.shape)} have no features; pass (batch, features)")
        return inputs.flatten(1)

    def answer(self, inputs: Tensor) -> Tensor:
        """The feed-forward pass; in the generative direction the inferred s_0 (batch, classes), which has no gradient."""
        if self.feed_forward:
            return super().answer(inputs)
        self.require_attached()
        with torch.no_grad(), self._buffers_kept():
            classes = self.row[0].input_shape[-1]
            x = self._enter(inputs.new_full((len(inputs), classes), 1 / classes))
            wanted = self._sample(inputs)

            def top(output: Tensor) -> Tensor:
                return self.output_weight * len(wanted) * squared_error(output.flatten(1), wanted)

            return infer_input(self.row, x, top, Steps(self.answer_steps, self.rate))

    def states(self, inputs: Tensor, targets: Tensor) -> dict[str, list[Tensor]]:
        """ "s", s_1..s_{L-1}, and "e", e_1..e_{L-1} (batch, ...), after inference; nothing is learned."""
        self.require_attached()
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False), self._buffers_kept():
            x = self._enter(inputs if self.feed_forward else self._classes(targets, inputs))
            targets = targets if self.feed_forward else self._sample(inputs)
            p, s = self._start(x, learns=False)
            targets = fitted(self.energy_loss, p[-1], targets) if self.feed_forward else targets
            _, error = output_error(self.energy_loss, self._flat(p[-1]), targets)
            relaxed = self._relaxed(x, targets, p, s, error)
        return {"s": relaxed.s, "e": relaxed.e}

    def credit_paths(self, inputs: Tensor) -> dict[str, str]:
        """Exact where the schedule is backpropagation itself, as it is for a single block, which has no state to infer."""
        alone = len(self.row) == 1 and self.feed_forward
        staged = self.inference in ("staged", "fixed-prediction") and self.rate == 1 and self.steps >= len(self.row) - 1
        exact = (staged or alone) and self.output_weight == 1
        if not self.feed_forward:
            inputs = inputs.new_zeros(len(inputs), *self.row[0].input_shape)
        return layer_paths(self.model, inputs, "exact" if exact else "signal of its own")

    @property
    def remarks(self) -> list[str]:
        """Remarks on several optimiser steps per batch, and on modules with skips, each of which is one block."""
        whole = ", ".join(block.name for block in self.row if block.layer not in block.modules)
        skips = f"each of the modules {whole} is one block with one state; the derivative inside it is exact"
        calls = f"each batch takes {self.repeats} optimiser steps; other rules take one"
        return [calls] * (self.repeats > 1) + [skips] * bool(whole)

    def _enter(self, inputs: Tensor) -> Tensor:
        """s_0."""
        require_samples(inputs)
        return through(self.head, inputs).detach()

    def _output(self, inputs: Tensor) -> Tensor:
        x = self._enter(inputs)
        for block in self.row:
            x = called(block, x)
        return x

    def _start(self, x: Tensor, learns: bool) -> tuple[list[Tensor], list[Tensor]]:
        """f_1..f_L and s_1..s_{L-1} of the feed-forward pass, with graphs where they serve inference."""
        if learns and not torch.compiler.is_compiling() and self.inference not in ("exact", "incremental"):
            return feed_forward(self.row, x, through=self.inference == "error")
        p: list[Tensor] = []
        with self._buffers_kept() if learns and self._held is not None else nullcontext():  # a batch counts once
            for block in self.row:
                p.append(called(block, p[-1] if p else x))
        return p, p[:-1]

    def _flat(self, output: Tensor) -> Tensor:
        return output if self.feed_forward else output.flatten(1)

    def _relaxed(self, x: Tensor, targets: Tensor, p: list[Tensor], s: list[Tensor], error: Tensor) -> Relaxed:
        rows = counted(targets, error)
        count = len(error) if rows is None else len(rows)
        factor = count * self.output_weight

        def top(output: Tensor) -> Tensor:
            return factor * self.energy_loss(self._flat(output), targets)

        steps = Steps(1 if self.inference == "incremental" else self.steps, self.rate, self.momentum, self.tolerance)
        energy = Energy(self.row, x, top, p, s, through=self.inference == "error")
        if self.inference == "error":
            return in_errors(energy, steps)
        if self.inference == "fixed-prediction":
            return at_fixed_predictions(energy, steps)
        if self.inference == "exact":
            c = self.output_weight * curvature(self.energy_loss, error[0].numel())
            return linear_equilibrium(energy, -factor * error, c)
        relaxed = in_states(energy, steps, staged=self.inference == "staged")
        if self.inference == "state":
            self._look(relaxed.e)
        return relaxed

    def _learned(
        self, x: Tensor, targets: Tensor, p: list[Tensor], s: list[Tensor], start: tuple[Tensor, Tensor]
    ) -> tuple[list[Root], dict[str, Tensor]]:
        """Every block's prediction as a root, with minus its error over the batch size as the signal; and the logs.

        Args:
            start: loss and output error of the feed-forward pass.
        """
        incremental = self.inference == "incremental"
        s = self._going_on(x, targets, s) if incremental else s
        relaxed = self._relaxed(x, targets, p, s, start[1])
        if incremental:
            self._hold(x, targets, relaxed.s)
        predictions = relaxed.p
        if predictions is None:
            predictions = learned(self.row, x, relaxed.s, p[0] if p[0].requires_grad else None)
        loss, top = output_error(self.energy_loss, self._flat(predictions[-1].detach()), targets)
        rows = counted(targets, top)
        count = len(top) if rows is None else len(rows)
        size = 1 - (1 - self.rate) ** relaxed.steps if self.rescale else 1.0
        signals = [*(e / (-count * size) for e in relaxed.e), (self.output_weight * top).view_as(predictions[-1])]
        roots: list[Root] = [(p, signal) for p, signal in zip(predictions, signals, strict=True) if p.requires_grad]
        hidden = sum((e.square().sum() for e in relaxed.e), loss.new_zeros(())) / (2 * count)
        energy = hidden + self.output_weight * loss.detach()
        share = torch.where(energy == 0, 0.0, hidden / energy)
        if self.inference in ("error", "state"):
            self._look_at_energy(self.output_weight * start[0], energy)
        return roots, {"energy": energy, "hidden_share": share, "residual": relaxed.residual}

    def _going_on(self, x: Tensor, targets: Tensor, s: list[Tensor]) -> list[Tensor]:
        """The batch's states at the last call; s, the feed-forward ones, at its first call."""
        if torch.compiler.is_compiling():
            raise ConfigError(
                "incremental inference keeps states between calls, which no compiled graph can; do not compile the rule, or "
                "leave out fullgraph=True: it then runs eagerly"
            )
        held: Held | None = self._held
        if held is None:
            return s
        if same(held.inputs, x) and same(held.targets, targets):
            return held.s
        self._held = None
        raise ConfigError(
            f"incremental inference takes {self.repeats} calls per batch (rule.repeats), with an optimiser step "
            f"after each; a new batch came after {held.calls}. Make all calls, call rule.restart() to "
            "leave a batch early, or use inference='state'"
        )

    def _hold(self, x: Tensor, targets: Tensor, s: list[Tensor]) -> None:
        calls = 1 if self._held is None else self._held.calls + 1
        self._held = Held(x.clone(), targets.clone(), s, calls) if calls < self.repeats else None

    def _look(self, e: Sequence[Tensor]) -> None:
        """Warn once where a hidden block has no error: its steps are below the precision of its state, or too few."""
        if self._silent or torch.compiler.is_compiling() or not e or not e[0].is_cpu or bool(e[0].any()):
            return
        silent = [block.name for block, error in zip(self.row, e, strict=False) if not bool(error.any())]
        if silent and len(silent) < len(e):  # where all are silent the target is met
            self._silent = True
            warnings.warn(
                f"after {self.steps} steps no error has reached layer {silent[-1]!r}, so it does not learn: it needs at "
                f"least as many steps as there are layers above it, and {e[0].dtype} may round deep layers' errors to zero; "
                'raise steps or rate, or use inference="error"',
                RuntimeWarning,
                stacklevel=4,
            )

    def _look_at_energy(self, start: Tensor, end: Tensor) -> None:
        """Warn once if inference has raised the energy, which it should lower."""
        if self._rising or torch.compiler.is_compiling() or not end.is_cpu or torch._C._are_functorch_transforms_active():
            return
        rounding = 100 * torch.finfo(end.dtype).eps
        if not float(end - start) > 0.01 * abs(float(start)) + rounding:
            return
        self._rising = True
        warnings.warn(
            f"{type(self).__name__}: inference has raised the energy from {float(start):.3g} to {float(end):.3g} per sample "
            f"in {self.steps} steps: a rate of {self.rate:g} is too large for this network by now; deeper networks and "
            "larger weights need a smaller rate",
            RuntimeWarning,
            stacklevel=5,
        )

    @contextmanager
    def _buffers_kept(self) -> Iterator[None]:
        """Update running statistics only in the feed-forward pass."""
        moving = [module._buffers.values() for module in self.model.modules() if module.training]
        kept = [(buffer, buffer.clone()) for buffers in moving for buffer in buffers if buffer is not None]
        try:
            yield
        finally:
            for buffer, before in kept:
                buffer.data.copy_(before)  # unseen by the graphs of the blocks


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same, NaN being the same as NaN."""
    return a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
