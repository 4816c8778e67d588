"""Equilibrium propagation (Scellier & Bengio 2017) with its later estimators and with weights that need not be symmetric.

    free:    s = phi(dPhi/ds),   Phi = sum_k s_k . P(W_k s_{k-1} + b_k)
    nudged:  the same with Phi - beta e(s, target)
    dL/dW_k = - d/dbeta dPhi/dW_k at beta = 0 = - d/dbeta [ s_k s_{k-1}^T ]

The network does not run forwards: it settles, also for its answer (:meth:`EquilibriumPropagation.answer`). The
derivative with respect to the nudge is a weighted sum of a few settled states, one per nudge beta_p, with weights c_p:

| estimator | nudges | error |
| --- | --- | --- |
| "one-sided" | 0, beta | O(beta) |
| "random-sign" | 0, beta or -beta, drawn for each batch | O(beta), 0 on average to first order |
| "symmetric" (arXiv 2006.03824) | beta, -beta | O(beta^2) |
| "five-point" (its authors' repository) | beta, -beta, 2 beta, -2 beta | O(beta^4) |
| "holomorphic" (arXiv 2209.00530) | beta exp(2 pi i p / N), p = 1..N | O(beta^N) |

With directed weights (arXiv 2006.03824; 2309.02214) a feedback matrix B_k replaces W_k^T, and the field has no
energy: the estimate is near the gradient only if B is near W. Either both learn the symmetric update, and weight
decay aligns them; or each learns from its input neurons' activity and its target neurons' change, and a homeostatic
loss makes the Jacobian symmetric.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import cos, isfinite, pi, sin
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.batch import fitted, require_classes, require_one_type, require_precision
from apical.core.chain import Chain, Stage
from apical.core.credit import Credit, CreditRule, Loss, Root
from apical.core.feedback import put
from apical.core.losses import refuse_options, terms, value_at, wanted
from apical.core.noise import initial, normal
from apical.core.sigmoids import ShiftedSigmoid
from apical.errors import ConfigError, InstabilityError, UnsupportedModelError, require_choice, require_count
from apical.rules.equilibrium.holomorphic import HOLOMORPHIC, bends, require_complex
from apical.rules.equilibrium.network import (
    EquilibriumNetwork,
    Settled,
    homeostatic_loss,
    jacobian_product,
    stage_roots,
    weight_roots,
)
from apical.rules.equilibrium.phases import ESTIMATORS, Estimator, Phases, off_branch, phases, shares

DRAWS = 5
"""Number of noise vectors for the estimate of the homeostatic loss."""


class EquilibriumPropagation(CreditRule):
    """Network that settles freely, then under a nudge of its output; weights learn from the difference.

    Args:
        model: a chain of weighted layers and element-wise activations, with pooling anywhere. States of bounded
            activations (`nn.Hardtanh(0, 1)`, :class:`~apical.core.sigmoids.ShiftedSigmoid`, tanh) settle or cycle; others
            may diverge.
        loss: maps (output, targets) to a scalar batch mean; for complex nudges cross_entropy, mse_loss or squared_error.
        estimator: see the module.
        beta: size of the nudge.
        points: number N of nudges of "holomorphic".
        free_steps: T1.
        nudged_steps: T2.
        cycles: of "holomorphic": 0 starts every nudge from the free state, all in one batch; otherwise the nudge runs this
            many times round its circle, from zero states, each phase continuing from the last. The free phase is for the
            answer only.
        output: "read-out" (the last layer reads the states; only its error enters the dynamics) or "state"; None takes
            "state" if the last layer has an activation.
        weights: "symmetric" or "directed".
        update: of directed weights: "same" for both directions, or "different".
        homeostasis: factor of the homeostatic loss of directed weights.
        asymmetry: initial angle between B and W in degrees; 90 is an independent draw.
        bounded: clip states of ReLU layers at 1, since they could grow without bound: `clip(v, 0, 1)`, or its analytic
            form ShiftedSigmoid for complex nudges.
        damping: fraction of the old state that a step keeps, in [0, 1).
        noise: standard deviation of the noise added to potentials at every step of training.
        tolerance: a phase ends early when no state moves by more in a step; 0 takes all steps.
        rates: learning rate of each layer, relative to the optimiser's; empty for 1.
        input_shape: of one sample; needed with convolutions.
        generator: for the initial B, noise and random signs; None draws from PyTorch's global state.

    Raises:
        UnsupportedModelError: the model is not such a chain, or an activation has no complex form; names the module.
        ConfigError: an option is out of range.

    Logs: `free_residual` and `nudged_residual` (the largest change of a state in a phase's last step) and, of holomorphic
    nudges, `off_branch` (:func:`~apical.rules.equilibrium.phases.off_branch`).

    >>> model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3))
    >>> rule = EquilibriumPropagation(model, beta=0.1)
    >>> credit = rule(torch.randn(8, 4), torch.randint(3, (8,)))
    >>> credit.backward()
    >>> model[0].weight.grad.shape, rule.answer(torch.randn(8, 4)).shape
    (torch.Size([6, 4]), torch.Size([8, 3]))
    """

    feed_forward = False
    output_alone = True

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = F.cross_entropy,
        estimator: Estimator = "symmetric",
        beta: float = 0.4,
        points: int = 6,
        free_steps: int = 60,
        nudged_steps: int = 30,
        cycles: int = 0,
        output: Literal["read-out", "state"] | None = None,
        weights: Literal["symmetric", "directed"] = "symmetric",
        update: Literal["same", "different"] = "same",
        homeostasis: float = 0.0,
        asymmetry: float = 90.0,
        bounded: bool = True,
        damping: float = 0.0,
        noise: float = 0.0,
        tolerance: float = 0.0,
        rates: Sequence[float] = (),
        input_shape: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(model, loss)
        refuse_options(self, "equilibrium propagation", ("reduction",))
        require_choice("estimator", estimator, ESTIMATORS)
        require_choice("output", output or "state", ("read-out", "state"))
        require_choice("weights", weights, ("symmetric", "directed"))
        require_choice("update", update, ("same", "different"))
        counts = {"free_steps": free_steps, "nudged_steps": nudged_steps, "points": points, "cycles": cycles}
        for name, count in counts.items():
            require_count(name, count, {"points": 2, "cycles": 0}.get(name, 1))
        if not (beta > 0 and isfinite(beta)):
            raise ConfigError(f"beta must be positive, got {beta}")
        if any(not 0 < rate < float("inf") for rate in rates):
            raise ConfigError(f"rates must be positive, got {tuple(rates)}")
        for name, number in (
            ("noise", noise),
            ("tolerance", tolerance),
            ("homeostasis", homeostasis),
            ("asymmetry", asymmetry),
        ):
            if not 0 <= number < float("inf"):
                raise ConfigError(f"{name} must not be negative, got {number}")
        if not 0 <= damping < 1:
            raise ConfigError(f"damping must be in [0, 1), got {damping}")
        if cycles and estimator != "holomorphic":
            raise ConfigError(f'cycles needs estimator="holomorphic", got "{estimator}"')
        if homeostasis and weights != "directed":
            raise ConfigError('homeostasis needs weights="directed"; symmetric weights have nothing to correct')
        self.chain = Chain(model, input_shape, pools=True)
        require_precision(type(self).__name__, self.chain.like)
        self._cut_off: list[str] = []
        if bounded:
            limit = ShiftedSigmoid() if estimator == "holomorphic" and (points > 2 or cycles) else nn.Hardtanh(0.0, 1.0)
            self._cut_off = [stage.name for stage in self.chain.stages if isinstance(stage.activation, nn.ReLU)]
            self.chain.stages = [
                replace(stage, activation=limit) if isinstance(stage.activation, nn.ReLU) else stage
                for stage in self.chain.stages
            ]
        last = self.chain.stages[-1]
        read_out = isinstance(last.activation, nn.Identity) if output is None else output == "read-out"
        if read_out and len(self.chain.stages) < 2:
            raise UnsupportedModelError(
                f'layer {last.name!r} is the only layer, so there is no state to settle; use output="state"'
            )
        if read_out and last.after:
            raise UnsupportedModelError(
                f"layer {last.name!r} is the read-out, not a state, so {type(last.after[0]).__name__} cannot follow "
                'it: put the pooling before the layer, or use output="state"'
            )
        self.network = EquilibriumNetwork(self.chain, read_out=read_out, damping=damping, noise=noise, generator=generator)
        self.estimator, self.beta, self.points, self.generator = estimator, beta, points, generator
        self.free_steps, self.nudged_steps, self.tolerance, self.cycles = free_steps, nudged_steps, tolerance, cycles
        self.random_per_sample = noise > 0
        if len(rates) not in (0, len(self.chain.stages)):
            raise ConfigError(f"rates needs one number for each of the {len(self.chain.stages)} layers, got {len(rates)}")
        self.rates = tuple(rates) or (1.0,) * len(self.chain.stages)
        self.directed, self.update, self.homeostasis = weights == "directed", update, homeostasis
        if estimator == "holomorphic" and (points > 2 or cycles):
            require_complex(self.chain.stages, self.loss)
        if homeostasis and (
            pools := [stage.name for stage in self._above if any(map(bends, (*stage.before, *stage.after)))]
        ):
            raise UnsupportedModelError(
                f"layer {pools[0]!r} is next to non-linear pooling, but homeostasis needs linear paths"
            )
        turn = asymmetry / 180 * pi
        self.back = nn.ParameterList()
        for stage in self._above if self.directed else ():
            weight = stage.layer.weight.detach()
            drawn = initial(partial(nn.init.normal_, std=_spread(weight)), weight.shape, weight, generator)
            self.back.append(nn.Parameter(cos(turn) * weight + sin(turn) * drawn))

    @property
    def remarks(self) -> list[str]:
        """Remark that states of ReLU layers are bounded."""
        behind = " and ".join(self._cut_off)
        return [f"ReLU states after {behind} are clipped at 1 (bounded=False turns this off)"] if behind else []

    @property
    def _above(self) -> list[Stage]:
        """Stages 2..K, whose weights connect states in both directions."""
        return self.network.stages[1:]

    def feedback_parameters(self) -> list[nn.Parameter]:
        """B_2..B_K of directed weights."""
        return list(self.back)

    def feedback_weights(self) -> dict[str, Tensor]:
        """The weights of the downward connections: B_k, or W_k itself."""
        return {stage.name: back for stage, back in zip(self._above, self._back(), strict=True)}

    def set_feedback(self, layer: str, **matrices: Tensor) -> None:
        """Set the feedback weight `B` of a layer, in the shape of its weight; directed weights only.

        Raises:
            ConfigError: unknown layer or symbol, or a wrong shape.
        """
        if not self.directed:
            raise ConfigError('symmetric weights are their own feedback: pass weights="directed" to set B')
        matrices_of = {stage.name: {"B": back} for stage, back in zip(self._above, self.back, strict=True)}
        put(type(self).__name__, layer, matrices_of, matrices)

    def _back(self) -> list[Tensor]:
        return list(self.back) if self.directed else [stage.layer.weight for stage in self._above]

    def answer(self, inputs: Tensor) -> Tensor:
        """Return the answer (batch, outputs) after a free phase; its gradient is that of backpropagation through time."""
        return self.network.output(self._free(self.chain.enter(inputs), noisy=False).s)

    def _free(self, inputs: Tensor, *, noisy: bool) -> Settled:
        given, back = self.network.given(inputs), self._back()
        tolerance = 0.0 if torch.is_grad_enabled() else self.tolerance
        steps, zeros = self.free_steps, self.network.zeros(inputs)
        return self.network.settle(zeros, given, back, steps, tolerance=tolerance, noisy=noisy)

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        """Credit for one batch: `output` and `loss` are those of the free phase."""
        self.require_attached()
        network = self.network
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            x, free, output, targets = self._answered(inputs, targets)
            loss = value_at(self.loss, output, targets)
            targets = self._labels(output, targets)
            roots, nudged, logs = self._going_round(x, free.s, targets) if self.cycles else self._nudged(x, free.s, targets)
            roots += terms(loss)
            logs |= {"free_residual": free.residual, "nudged_residual": nudged}
            if not torch.compiler.is_compiling() and not nudged.isfinite():
                raise InstabilityError(
                    "the nudged phase of equilibrium propagation diverges, although the free one does not: use a smaller "
                    "beta or bounded activations"
                )
        if self.homeostasis:
            with torch.enable_grad(), torch.autocast(inputs.device.type, enabled=False):
                noise = [normal(x.new_empty(DRAWS, *stage.shape), self.generator) for stage in network.stages]
                asymmetry = homeostatic_loss(lambda d: jacobian_product(network.stages, list(self.back), d), noise)
                roots.append((self.homeostasis * asymmetry, None))
        return Credit.of(roots, output, loss, logs)

    def _answered(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Settled, Tensor, Tensor]:
        """Return the first layer's input, the free state, the output, and targets that fit it."""
        weight = self.chain.like
        require_precision(type(self).__name__, weight)
        require_one_type(type(self).__name__, weight, self.back)
        x = self.chain.enter(inputs).resolve_neg()  # a negative view cannot create new tensors
        free = self._free(x, noisy=True)
        if not torch.compiler.is_compiling() and not free.residual.isfinite():
            finite = x.isfinite().all() and all(stage.layer.weight.isfinite().all() for stage in self.chain.stages)
            raise InstabilityError(
                "the free phase of equilibrium propagation diverges: its states are unbounded; use bounded activations "
                "(--model mlp-sigmoid-256 or mlp-clip-256), smaller weights or fewer steps"
                if finite
                else "the free phase of equilibrium propagation is not finite because inputs or weights are not"
            )
        output = self.network.output(free.s)
        targets = fitted(self.loss, output, targets)
        if targets.dim() == 1 and output.dim() == 2 and self.loss in HOLOMORPHIC:
            require_classes(targets, output.shape[1])
        return x, free, output, targets

    def _labels(self, output: Tensor, targets: Tensor) -> Tensor:
        """Targets as numbers of the output's shape, where these determine the loss's error."""
        return wanted(output, targets) if self.loss in HOLOMORPHIC and output.dim() == 2 else targets

    def states(self, inputs: Tensor, targets: Tensor) -> dict[str, list[Tensor]]:
        """Return the states of a batch, layer by layer, without learning.

        "free": s_k (batch, *shape) of the free phase; "nudged": s_k (P, batch, *shape) under each of the nudges "beta" (P,),
        complex where nudges are. Only one nudge of a conjugate pair is settled. With `cycles`, those of the last cycle.
        """
        self.require_attached()
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            x, free, output, targets = self._answered(inputs, targets)
            targets = self._labels(output, targets)
            if self.cycles:
                rounds = [(beta, settled) for beta, _, settled in self._rounds(x, targets)][-self.points :]
                points = [(beta.complex, [beta.complex_values(s, len(x)) for s in settled.s]) for beta, settled in rounds]
            else:
                beta, _ = phases(self.estimator, self.beta, self.points, x, self.generator)
                settled = self._settle_nudged(x, free.s, targets, beta)
                points = [(beta.complex, [beta.complex_values(s, len(x)) for s in settled.s])]
            nudged = [torch.cat(layer) for layer in zip(*(s for _, s in points), strict=True)]
            return {"free": free.s, "nudged": nudged, "beta": [torch.cat([beta for beta, _ in points])]}

    def _nudged(self, x: Tensor, free: list[Tensor], targets: Tensor) -> tuple[list[Root], Tensor, dict[str, Tensor]]:
        """Settle all nudges in one batch from the free state; return roots, residual and logs."""
        beta, weights = phases(self.estimator, self.beta, self.points, x, self.generator)
        nudged = self._settle_nudged(x, free, targets, beta)
        roots = self._roots(x, free, nudged.s, targets, beta, weights)
        logs = {}
        if self.estimator == "holomorphic":
            logs["off_branch"] = off_branch(free, nudged.s, shares(beta, weights))
        return roots, nudged.residual, logs

    def _settle_nudged(self, x: Tensor, free: list[Tensor], targets: Tensor, beta: Phases) -> Settled:
        network, q = self.network, len(beta.im)
        rows = [
            torch.cat((s.repeat(len(beta.re), *[1] * (s.dim() - 1)), s.new_zeros(q * len(s), *s.shape[1:]))) for s in free
        ]
        return network.settle(
            rows,
            network.given(x, beta),
            self._back(),
            self.nudged_steps,
            lambda s: network.nudged_by(network.errors(self.loss, s, targets, q), beta, s),
            imaginary=q * len(x),
            tolerance=self.tolerance,
            noisy=True,
        )

    def _going_round(self, x: Tensor, free: list[Tensor], targets: Tensor) -> tuple[list[Root], Tensor, dict[str, Tensor]]:
        """Settle one nudge after the other, in repeated cycles round the circle."""
        roots: list[Root] = []
        residual = x.new_zeros(())
        for beta, weight, settled in self._rounds(x, targets):
            residual = torch.maximum(residual, settled.residual)
            roots += self._roots(x, free, settled.s, targets, beta, weight)
        return roots, residual, {}

    def _rounds(self, x: Tensor, targets: Tensor) -> Iterator[tuple[Phases, Phases, Settled]]:
        """Yield each nudge with its weight and settled state, continuing from the previous one."""
        network, n = self.network, self.points * self.cycles
        s = [zeros.new_zeros(2 * len(x), *zeros.shape[1:]) for zeros in network.zeros(x)]  # a real and an imaginary part
        for turn in [2 * pi * p / self.points for p in range(self.points)] * self.cycles:
            # beta_p = beta exp(i turn), c_p = -1 / (n beta_p)
            beta = Phases(self.beta * x.new_tensor([cos(turn)]), self.beta * x.new_tensor([sin(turn)]))
            weight = Phases(x.new_tensor([-cos(turn)]) / (n * self.beta), x.new_tensor([sin(turn)]) / (n * self.beta))

            def push(s: Sequence[Tensor], beta: Phases = beta) -> Tensor:
                return network.nudged_by(network.errors(self.loss, s, targets, 1), beta, s)

            given = network.given(x, beta)
            settled = network.settle(s, given, self._back(), self.nudged_steps, push, imaginary=len(x), noisy=True)
            s = settled.s
            yield beta, weight, settled

    def _roots(
        self, x: Tensor, free: list[Tensor], nudged: list[Tensor], targets: Tensor, beta: Phases, c: Phases
    ) -> list[Root]:
        """Parameters with their gradients, which are the estimates."""
        size, stages, q = len(x), self.network.stages, len(beta.im)
        parts = [s.view(-1, size, *s.shape[1:]) for s in nudged]  # s_k^p: (P + Q, batch, *shape)
        if self.estimator in ("one-sided", "random-sign"):  # the free state is one of the points
            parts = [torch.cat((s, f.unsqueeze(0))) for s, f in zip(parts, free, strict=True)]
            c = Phases(torch.cat((c.re, -c.re)), c.im)
        real = len(c.re)
        changed = [c.times(s) for s in parts]  # c_p s_k^p; their sum over p estimates -d s_k / d beta
        different = self.directed and self.update == "different"
        roots: list[Root] = []
        for k, stage in enumerate(stages):
            batch = size / self.rates[k]
            if k == 0 or different:  # sum_p c_p s_k^p times the free s_{k-1}
                below = x if k == 0 else free[k - 1]
                roots += stage_roots(stage, changed[k][:real].sum(0), below, batch, size)
            if k > 0 and different:  # B_k moves as W_{k-1} does: the free s_k times sum_p c_p s_{k-1}^p
                roots += weight_roots(stage, self.back[k - 1], free[k], changed[k - 1][:real].sum(0), batch)
            elif k > 0:  # Re sum_p c_p s_k^p (s_{k-1}^p)^T, rows ((P + Q) batch, n)
                signal, below = c.conjugate_rows(changed[k]).flatten(0, 1), parts[k - 1].flatten(0, 1)
                roots += stage_roots(stage, signal, below, batch, real * size, q * size)
                roots += weight_roots(stage, self.back[k - 1], signal, below, batch, q * size) if self.directed else []
        if self.network.reader is not None:  # the mean over the points of de/do s_K^T
            share = shares(beta, c)
            error = self.network.errors(self.loss, nudged, targets, q)
            error = Phases(share, share.new_zeros(q)).times(error)
            signal = beta.conjugate_rows(error).flatten(0, 1)
            roots += stage_roots(self.network.reader, signal, nudged[-1], size / self.rates[-1], len(share) * size)
        return roots


def _spread(weight: Tensor) -> float:
    return float(weight.std()) if weight.numel() > 1 else 1.0
