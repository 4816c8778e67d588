"""Equilibrium propagation (Scellier & Bengio 2017) with its later estimators and with weights that need not be symmetric.

    free:    s = phi(dPhi/ds),   Phi = sum_k s_k . P(W_k s_{k-1} + b_k)
    nudged:  the same with Phi - beta e(s, target)
    dL/dW_k = - d/dbeta dPhi/dW_k at beta = 0 = - d/dbeta [ s_k s_{k-1}^T ]

The network is not run forwards: it settles, and so does its answer (:meth:`EquilibriumPropagation.answer`). The
derivative with respect to the nudge is taken from a few settled states, one for each nudge beta_p, by weights c_p:

| estimator | nudges | error |
| --- | --- | --- |
| "one-sided" | 0, beta | O(beta) |
| "random-sign" | 0, beta or -beta, drawn for each batch | O(beta), 0 on average to first order |
| "symmetric" (arXiv 2006.03824) | beta, -beta | O(beta^2) |
| "five-point" (its authors' repository) | beta, -beta, 2 beta, -2 beta | O(beta^4) |
| "holomorphic" (arXiv 2209.00530) | beta exp(2 pi i p / N), p = 1..N | O(beta^N) |

With directed weights (arXiv 2006.03824; 2309.02214) a feedback matrix B_k stands in for W_k^T, and the field has no
energy: what is estimated is only near the gradient where B is near W. Either both learn the symmetric update, and weight
decay makes them alike; or each learns from what its own neurons saw and how its target neurons moved, and a homeostatic
loss makes the Jacobian symmetric.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import cos, isfinite, pi, sin
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.chain import Chain, Stage
from apical.core.credit import Credit, CreditRule, Loss
from apical.core.losses import terms, value_at, wanted
from apical.core.pooling import SoftmaxPool2d
from apical.core.sigmoids import ShiftedSigmoid
from apical.dynamics.equilibrium import (
    HOLOMORPHIC,
    EquilibriumNetwork,
    Phases,
    Settled,
    homeostatic_loss,
    is_holomorphic,
    jacobian_product,
    local_roots,
    off_branch,
    weight_root,
)
from apical.errors import ConfigError, InstabilityError, UnsupportedModelError, unknown_name

Estimator = Literal["one-sided", "random-sign", "symmetric", "five-point", "holomorphic"]
ESTIMATORS = ("one-sided", "random-sign", "symmetric", "five-point", "holomorphic")
DRAWS = 5
"""Noise vectors from which the homeostatic loss is estimated."""


class EquilibriumPropagation(CreditRule):
    """The network settles freely, and again under a nudge of its output; weights learn from what differs.

    Args:
        model: a chain of weighted layers and element-wise activations, with pooling where it likes. States of bounded
            activations (`nn.Hardtanh(0, 1)`, :class:`~apical.core.sigmoids.ShiftedSigmoid`, tanh) settle or cycle; others
            may run away.
        loss: maps (output, targets) to a scalar batch mean; for complex nudges cross_entropy, mse_loss or squared_error.
        estimator: see the module.
        beta: size of the nudge.
        points: nudges N of "holomorphic".
        free_steps: T1.
        nudged_steps: T2.
        cycles: of "holomorphic": 0 starts every nudge from the free state, all in one batch; otherwise the nudge goes round
            its circle so often, from zeros, each phase going on where the last one ended. The free phase is then for the
            answer alone.
        output: "read-out" (the last layer reads the states; only its error enters the dynamics) or "state"; None takes
            "state" where the last layer has an activation.
        weights: "symmetric" or "directed".
        update: of directed weights: "same" for both directions, or "different".
        homeostasis: factor of the homeostatic loss of directed weights.
        asymmetry: degrees by which B starts rotated away from W; 90 is an independent draw.
        bounded: states of ReLU layers are cut off at 1, for they would grow without bound: `clip(v, 0, 1)`, and its analytic
            form ShiftedSigmoid for complex nudges.
        damping: share of the old state that a step keeps, in [0, 1).
        noise: standard deviation of what is added to potentials at every step while training.
        tolerance: a phase ends early when no state moves by more in a step; 0 takes all steps.
        rates: learning rate of each layer, relative to the optimiser's; empty for 1.
        input_shape: of one sample; needed with convolutions.

    Raises:
        UnsupportedModelError: the model is no such chain, or an activation has no complex form; the module is named.
        ConfigError: an option is out of range.

    Logs: `free_residual` and `nudged_residual` (the largest change of a state in a phase's last step) and, of holomorphic
    nudges, `off_branch` (:func:`~apical.dynamics.equilibrium.off_branch`).

    >>> model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3))
    >>> rule = EquilibriumPropagation(model, beta=0.1)
    >>> credit = rule(torch.randn(8, 4), torch.randint(3, (8,)))
    >>> credit.backward()
    >>> model[0].weight.grad.shape, rule.answer(torch.randn(8, 4)).shape
    (torch.Size([6, 4]), torch.Size([8, 3]))
    """

    feed_forward = False

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
    ) -> None:
        super().__init__(model, loss)
        for name, value, known in (
            ("estimator", estimator, ESTIMATORS),
            ("output", output or "state", ("read-out", "state")),
            ("weights", weights, ("symmetric", "directed")),
            ("update", update, ("same", "different")),
        ):
            if value not in known:
                raise unknown_name(name, value, known)
        counts = (points - 1, free_steps, nudged_steps)
        if (
            not (beta > 0 and isfinite(beta))
            or min(counts) < 1
            or not all(isinstance(each, int) for each in (*counts, cycles))
        ):
            raise ConfigError(
                f"beta must be positive, steps at least 1 and points at least 2, in whole numbers, got beta={beta}, "
                f"free_steps={free_steps}, nudged_steps={nudged_steps}, points={points}"
            )
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
        if cycles < 0 or (cycles and estimator != "holomorphic"):
            raise ConfigError(f'cycles is for estimator="holomorphic" and not negative, got {cycles} for "{estimator}"')
        if homeostasis and weights != "directed":
            raise ConfigError('homeostasis is for weights="directed"; symmetric weights have nothing to correct')
        self.chain = Chain(model, input_shape, pools=True)
        self._cut_off: list[str] = []
        if bounded:
            limit = ShiftedSigmoid() if estimator == "holomorphic" and (points > 2 or cycles) else nn.Hardtanh(0.0, 1.0)
            self._cut_off = [stage.name for stage in self.chain.stages if isinstance(stage.activation, nn.ReLU)]
            self.chain.stages = [_bounded(stage, limit) for stage in self.chain.stages]
        last = self.chain.stages[-1]
        read_out = isinstance(last.activation, nn.Identity) if output is None else output == "read-out"
        if read_out and len(self.chain.stages) < 2:
            raise UnsupportedModelError(
                f'layer {last.name!r} is all there is: there is no state to settle; use output="state"'
            )
        if read_out and last.after:
            raise UnsupportedModelError(
                f"layer {last.name!r} reads the states out and has {type(last.after[0]).__name__} behind it, which no state "
                'is: put the pooling before the layer, or use output="state"'
            )
        self.network = EquilibriumNetwork(self.chain, read_out=read_out, damping=damping, noise=noise)
        self.estimator, self.beta, self.points = estimator, beta, points
        self.free_steps, self.nudged_steps, self.tolerance = free_steps, nudged_steps, tolerance
        self.cycles = cycles
        if len(rates) not in (0, len(self.chain.stages)):
            raise ConfigError(f"rates needs one number for each of the {len(self.chain.stages)} layers, got {len(rates)}")
        self.rates = tuple(rates) or (1.0,) * len(self.chain.stages)
        self.directed, self.update, self.homeostasis = weights == "directed", update, homeostasis
        if estimator == "holomorphic" and (points > 2 or cycles):
            self._check_complex()
        if homeostasis and (
            pools := [stage.name for stage in self._above if any(map(_bends, (*stage.before, *stage.after)))]
        ):
            raise UnsupportedModelError(
                f"layer {pools[0]!r} has pooling beside it that is not linear: homeostasis needs linear paths"
            )
        turn = asymmetry / 180 * pi
        self.back = nn.ParameterList()
        for stage in self._above if self.directed else ():
            weight = stage.layer.weight.detach()
            drawn = torch.empty_like(weight).normal_(0.0, float(weight.std()) if weight.numel() > 1 else 1.0)
            self.back.append(nn.Parameter(cos(turn) * weight + sin(turn) * drawn))

    @property
    def remarks(self) -> list[str]:
        """That states of ReLU layers are bounded."""
        behind = " and ".join(self._cut_off)
        return [f"ReLU states behind {behind} are cut off at 1 (bounded=False leaves them)"] if behind else []

    @property
    def _above(self) -> list[Stage]:
        """Stages 2..K, whose weights carry states both ways."""
        return self.network.stages[1:]

    def _check_complex(self) -> None:
        if self.loss not in HOLOMORPHIC:
            known = ", ".join(getattr(loss, "__name__", "?") for loss in HOLOMORPHIC)
            raise ConfigError(f"complex nudges need a loss whose error is known for complex outputs: {known}; or points=2")
        for stage in self.chain.stages:
            bent = [module for module in stage.before if _bends(module)] + list(filter(_is_max, stage.after))
            if bent:
                raise UnsupportedModelError(
                    f"layer {stage.name!r} has {type(bent[0]).__name__} beside it, which is not for complex states: use "
                    "average pooling, or SoftmaxPool2d between layer and activation, or points=2"
                )
            if not is_holomorphic(stage.activation):
                raise UnsupportedModelError(
                    f"the activation behind layer {stage.name!r} ({type(stage.activation).__name__}) is not analytic on "
                    "complex states: use ShiftedSigmoid, DoubleSiLU or tanh, or points=2"
                )

    def feedback_parameters(self) -> list[nn.Parameter]:
        """B_2..B_K of directed weights."""
        return list(self.back)

    def feedback_weights(self) -> dict[str, Tensor]:
        """What carries states downwards: B_k, or W_k itself."""
        return {stage.name: back for stage, back in zip(self._above, self._back(), strict=True)}

    def _back(self) -> list[Tensor]:
        return list(self.back) if self.directed else [stage.layer.weight for stage in self._above]

    def answer(self, inputs: Tensor) -> Tensor:
        """The answer (batch, outputs) after a free phase; its gradient is that of backpropagation through time."""
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
            x = self.chain.enter(inputs)
            free = self._free(x, noisy=True)
            if not torch.compiler.is_compiling() and not free.residual.isfinite():
                finite = x.isfinite().all() and all(stage.layer.weight.isfinite().all() for stage in self.chain.stages)
                raise InstabilityError(
                    "the free phase of equilibrium propagation runs away: its states have no bound; use bounded activations "
                    "(--model mlp-sigmoid-256 or mlp-clip-256), smaller weights or fewer steps"
                    if finite
                    else "the free phase of equilibrium propagation is not finite because inputs or weights are not"
                )
            output = network.output(free.s)
            loss = value_at(self.loss, output, targets)
            if self.loss in HOLOMORPHIC and output.dim() == 2:
                targets = wanted(output, targets)
            roots, nudged, logs = self._going_round(x, free.s, targets) if self.cycles else self._nudged(x, free.s, targets)
            roots += terms(loss)
            logs |= {"free_residual": free.residual, "nudged_residual": nudged}
        if self.homeostasis:
            with torch.enable_grad(), torch.autocast(inputs.device.type, enabled=False):
                noise = [torch.randn(DRAWS, *stage.shape, dtype=x.dtype, device=x.device) for stage in network.stages]
                asymmetry = homeostatic_loss(lambda d: jacobian_product(network.stages, list(self.back), d), noise)
                roots.append(self.homeostasis * asymmetry)
        return Credit(roots, [None] * len(roots), output, loss, logs)

    def _nudged(self, x: Tensor, free: list[Tensor], targets: Tensor) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
        """All nudges at once, from the free state: roots, residual and logs."""
        network = self.network
        beta, weights = self._phases(x)
        q = len(beta.im)
        rows = [
            torch.cat((s.repeat(len(beta.re), *[1] * (s.dim() - 1)), s.new_zeros(q * len(s), *s.shape[1:]))) for s in free
        ]
        nudged = network.settle(
            rows,
            network.given(x, beta),
            self._back(),
            self.nudged_steps,
            lambda s: network.nudged_by(network.errors(self.loss, s, targets, q), beta),
            imaginary=q * len(x),
            tolerance=self.tolerance,
            noisy=True,
        )
        roots = self._roots(x, free, nudged.s, targets, beta, weights)
        logs = {}
        if self.estimator == "holomorphic":
            logs["off_branch"] = off_branch(free, nudged.s, _shares(beta, weights))
        return roots, nudged.residual, logs

    def _going_round(self, x: Tensor, free: list[Tensor], targets: Tensor) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
        """One nudge after the other, round the circle again and again."""
        network, n = self.network, self.points * self.cycles
        roots: list[Tensor] = []
        s = [each.new_zeros(2 * len(each), *each.shape[1:]) for each in network.zeros(x)]
        residual = x.new_zeros(())
        for turn in [2 * pi * p / self.points for p in range(self.points)] * self.cycles:
            beta = Phases(self.beta * x.new_tensor([cos(turn)]), self.beta * x.new_tensor([sin(turn)]))
            weight = Phases(x.new_tensor([-cos(turn)]) / (n * self.beta), x.new_tensor([sin(turn)]) / (n * self.beta))

            def push(s: Sequence[Tensor], beta: Phases = beta) -> Tensor:
                return network.nudged_by(network.errors(self.loss, s, targets, 1), beta)

            given = network.given(x, beta)
            settled = network.settle(s, given, self._back(), self.nudged_steps, push, imaginary=len(x), noisy=True)
            s, residual = settled.s, torch.maximum(residual, settled.residual)
            roots += self._roots(x, free, s, targets, beta, weight)
        return roots, residual, {}

    def _phases(self, like: Tensor) -> tuple[Phases, Phases]:
        """beta_p and c_p; of a conjugate pair only one is settled, with twice the weight."""
        one, none = like.new_ones(1), like.new_zeros(0)
        if self.estimator in ("one-sided", "random-sign"):
            sign = 1 - 2 * torch.randint(2, (1,), device=like.device) if self.estimator == "random-sign" else 1
            signed = sign * one * self.beta
            return Phases(signed, none), Phases(-1 / signed, none)
        if self.estimator == "five-point":
            steps = self.beta * like.new_tensor([1.0, -1.0, 2.0, -2.0])
            return Phases(steps, none), Phases(-like.new_tensor([8.0, -8.0, -1.0, 1.0]) / (12 * self.beta), none)
        n = self.points if self.estimator == "holomorphic" else 2
        real = [1.0, -1.0] if n % 2 == 0 else [1.0]
        turns = [2 * pi * p / n for p in range(1, (n + 1) // 2)]
        re, im = real + [cos(turn) for turn in turns], [sin(turn) for turn in turns]
        times = [1.0] * len(real) + [2.0] * len(turns)
        beta = Phases(self.beta * like.new_tensor(re), self.beta * like.new_tensor(im))
        c_re = [-m / (n * self.beta) * x for m, x in zip(times, re, strict=True)]  # 1 / exp(i turn) = exp(-i turn)
        c_im = [2 / (n * self.beta) * y for y in im]
        return beta, Phases(like.new_tensor(c_re), like.new_tensor(c_im))

    def _roots(
        self, x: Tensor, free: list[Tensor], nudged: list[Tensor], targets: Tensor, beta: Phases, c: Phases
    ) -> list[Tensor]:
        """Roots whose gradients are the estimates."""
        size, stages, q = len(x), self.network.stages, len(beta.im)
        parts = [s.view(-1, size, *s.shape[1:]) for s in nudged]
        if self.estimator in ("one-sided", "random-sign"):  # the free state is one of the points
            parts = [torch.cat((s, f.unsqueeze(0))) for s, f in zip(parts, free, strict=True)]
            c = Phases(torch.cat((c.re, -c.re)), c.im)
        real = len(c.re)
        changed = [c.times(s) for s in parts]
        different = self.directed and self.update == "different"
        roots: list[Tensor] = []
        for k, stage in enumerate(stages):
            batch = size / self.rates[k]
            if k == 0 or different:
                below = x if k == 0 else free[k - 1]
                roots += local_roots(stage, changed[k][:real].sum(0), below, batch, size)
            if k > 0 and different:
                roots += weight_root(stage, self.back[k - 1], free[k], changed[k - 1][:real].sum(0), batch)
            elif k > 0:
                signal, below = c.conjugate_rows(changed[k]).flatten(0, 1), parts[k - 1].flatten(0, 1)
                roots += local_roots(stage, signal, below, batch, real * size, q * size)
                roots += weight_root(stage, self.back[k - 1], signal, below, batch, q * size) if self.directed else []
        if self.network.reader is not None:
            share = _shares(beta, c)
            error = self.network.errors(self.loss, nudged, targets, q)
            error = Phases(share, share.new_zeros(q)).times(error)
            signal = beta.conjugate_rows(error).flatten(0, 1)
            roots += local_roots(self.network.reader, signal, nudged[-1], size / self.rates[-1], len(share) * size)
        return roots


def _shares(beta: Phases, c: Phases) -> Tensor:
    """`-beta_p c_p`, which is real: how much each settled phase counts in a mean over all (P,)."""
    share = -beta.re * c.re[: len(beta.re)]
    return share + F.pad(beta.im * c.im, (len(beta.re) - len(beta.im), 0)) if len(beta.im) else share


def _bounded(stage: Stage, limit: nn.Module) -> Stage:
    return replace(stage, activation=limit) if isinstance(stage.activation, nn.ReLU) else stage


def _is_max(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.pooling._MaxPoolNd)


def _bends(module: nn.Module) -> bool:
    """Whether a module beside a layer is not linear."""
    return _is_max(module) or isinstance(module, SoftmaxPool2d)
