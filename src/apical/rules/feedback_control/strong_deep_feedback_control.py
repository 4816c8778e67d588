"""Strong deep feedback control (Meulemans, Tristany Farinha, Cervera, Sacramento & Grewe, arXiv 2204.07249).

The controller does not nudge: it drives the output all the way to the label, and learning makes its help unnecessary:

    target    r_L* = y (regression), or e = y_soft - softmax(r_L) (classes; y_soft has `label` on the true one)
    network   tau dv_i/dt = -v_i + W_i phi(v_{i-1}) + b_i + Q_i u + noise,   u = u_int + k_p e
    forward   dW_i = 2 [phi(v_i) - phi(v_i^ff)] r_{i-1}^T
    feedback  dQ_i = -s_i v_i^fb (u - u_lowpass)^T / sigma^2 - beta Q_i,   in the same phase, from the same trajectory

With column space of Q = row space of J and a small leak, the forward rule (difference="voltage") is gradient descent on
`H = 1/2 |Q u|^2`, the control the network still needs. Local, as in deep feedback control; only the fast, noise-driven part
of u teaches the feedback, because its mean carries the label.

`solver="steady"` finds the true steady state by Newton's method; "simulate" runs the authors' short trajectory, which does
not reach it (with their settings the control is mostly proportional). With `learn="expected"` the feedback update is its
expectation over the noise to first order in the loop gain, not itself a local rule. The samples of "noise" contain two more
terms, which are the larger ones at the default gain: `Q <u u^T>`, a decay of Q along u, and the trajectory's own transient
towards the label, which the low-pass filter lets through in part. The paper's body could not be read: the single-phase rule
follows its abstract and the released code.

Departure: for classes the error is the softmax one from the start, also during pre-training of Q.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.batch import counted, fitted, require_classes
from apical.core.chain import States
from apical.core.credit import Credit, Loss, Root
from apical.core.losses import NUMBERS, PLAIN, refuse_options, terms, value_at
from apical.errors import ConfigError, InstabilityError, require_choice
from apical.rules.feedback_control import states as control
from apical.rules.feedback_control.control_rule import ControlRule, Difference, Learn, NoiseCorrelation, Start
from apical.rules.feedback_control.states import Controlled, controlled_states
from apical.rules.feedback_control.strong_control import Held, error_left, hold, outcome, outcome_slope
from apical.rules.feedback_control.trajectory import Leak, Loop, Moment, Trace, correlation, end, record, trajectory

CLOSE = 1e-3
"""Residual, relative to the error without control, above which a goal counts as not reached."""


class StrongDeepFeedbackControl(ControlRule):
    """Credit from a controller that holds the output at the label.

    Args:
        model: a chain of weighted layers and element-wise activations (see :class:`apical.core.chain.Chain`).
        loss: maps (output, targets) to a scalar batch mean, for reports: the controller uses only the targets. Integer
            targets are classes, others the desired output itself.
        solver: "steady" or "simulate".
        label: probability of the true class in the target.
        alpha, k_p, dt, points, tau, leak: the controller and its step, see
            :class:`apical.rules.feedback_control.trajectory.Loop`.
        sigma, sigma_output: noise in the apical compartments of hidden layers and output.
        tau_noise: its time constant.
        tau_slow: time constant tau_f of the low-pass filter whose output is subtracted from the control.
        scaled: scale the feedback update of layer i by `(1 + tau/tau_noise)^(L - i)`, which equalises the layers.
        tolerance: of the steady state, relative to the error without control; None: 1e-5 in float32, 1e-10 in float64.
        difference: "rate" compares `phi(v)`, "voltage" the potentials themselves.
        feedback: initial Q: "product" of the forward weights, or "random".
        learn: "expected" or "noise" trains Q; "none" fixes it. The solver "steady" has no noise to learn from.
        learn_output: train Q_L too; it stays the identity otherwise.
        input_shape: of one sample; needed with convolutions.
        generator: for random initial feedback and noise; None draws from PyTorch's global state.

    Raises:
        UnsupportedModelError: the model is not such a chain; the message names the module.
        ConfigError: an option is out of range or does not fit another.

    >>> model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    >>> rule = StrongDeepFeedbackControl(model, label=0.9)
    >>> credit = rule(torch.randn(8, 4), torch.randint(3, (8,)))
    >>> credit.backward()
    >>> bool(credit.logs["residual"] < 1e-4)
    True
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = F.cross_entropy,
        solver: Literal["steady", "simulate"] = "steady",
        label: float = 0.99,
        alpha: float = 1e-3,
        k_p: float = 2.0,
        dt: float = 1e-3,
        points: int = 500,
        tau: float = 0.01,
        leak: Leak = "code",
        sigma: float = 0.01,
        sigma_output: float | None = None,
        tau_noise: float = 0.07,
        tau_slow: float = 0.5,
        scaled: bool = True,
        tolerance: float | None = None,
        difference: Difference = "rate",
        feedback: Start = "product",
        learn: Learn = "expected",
        learn_output: bool = False,
        input_shape: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        require_choice("solver", solver, ("steady", "simulate"))
        if solver == "steady" and learn == "noise":
            raise ConfigError("the solver 'steady' has no noise to learn feedback from: pass learn='expected' or 'none'")
        if not 0 < label < 1:
            raise ConfigError(f"label must lie between 0 and 1, got {label}; at 1 no finite control reaches it")
        if tolerance is not None and not 0 < tolerance < 1:
            raise ConfigError(f"tolerance must lie between 0 and 1, got {tolerance}")
        if sigma_output is not None and not 0 <= sigma_output < float("inf"):
            raise ConfigError(f"sigma_output must not be negative, got {sigma_output}")
        loop = Loop(alpha, k_p, dt, points, tau, leak, sigma=sigma, sigma_output=sigma_output, tau_noise=tau_noise)
        if not dt <= tau_slow < 1:
            raise ConfigError(f"tau_slow must lie between dt={dt} and 1, the controller's time constant; got {tau_slow}")
        super().__init__(model, loss, loop, loop, difference, feedback, learn, learn_output, input_shape, generator)
        refuse_options(self, "strong deep feedback control", (*PLAIN, NUMBERS))
        self.solver, self.label, self.tolerance, self.slow = solver, label, tolerance, dt / tau_slow
        self.random_per_sample = solver == "simulate" and any(self._sigmas())
        depths = range(len(self.chain.stages), 0, -1)
        self.correlations = [correlation(loop, depth, self.slow) for depth in depths]
        self.scales = [(1 + tau / tau_noise) ** (depth - 1) if scaled else 1.0 for depth in depths]

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        """Credit for one batch, for the weights that :attr:`phase` names: forward, feedback, or both."""
        self.require_attached()
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            states = self.run(inputs)
            output = states.r[-1]
            targets = fitted(self.loss, output, targets)
            loss = value_at(self.loss, output, targets)
            walk = self._simulated if self.solver == "simulate" else self._steady
            roots, logs = walk(*self._counted(states, targets))
            roots += terms(loss) if self.phase != "feedback" else []
        return Credit.of(roots, output, loss, logs)

    def goal(self, output: Tensor, targets: Tensor) -> tuple[Tensor, bool]:
        """Return the controller's goal, (batch, n_L), and whether it is a distribution over classes."""
        if targets.is_floating_point():
            if targets[0].numel() != output[0].numel():
                raise ConfigError(
                    f"targets of shape {tuple(targets.shape)} do not fit outputs of shape {tuple(output.shape)}"
                )
            return targets.to(output.dtype).reshape(len(output), -1), False
        classes = output.flatten(1).shape[1]
        if classes < 2:
            raise ConfigError("class labels need a model of at least 2 outputs, got 1; pass floating-point targets")
        if targets.dim() != 1:
            raise ConfigError(f"class labels need shape (batch,), got {tuple(targets.shape)}")
        require_classes(targets, classes)
        goal = output.new_full((len(output), classes), (1 - self.label) / (classes - 1))
        return goal.scatter_(1, targets.long().unsqueeze(1), self.label), True

    def _counted(self, states: States, targets: Tensor) -> tuple[States, Tensor, bool]:
        """States and goals of the samples that have a goal: a negative class label excludes a sample."""
        rows = counted(targets, torch.zeros_like(states.r[-1]))
        if rows is not None:
            states, targets = states.rows(rows), targets[rows]
        return states, *self.goal(states.r[-1], targets)

    def hold(self, inputs: Tensor, targets: Tensor) -> Held:
        """The controlled steady state of a batch: control, deviations, residual."""
        with torch.no_grad():
            states = self.run(inputs)
            return self._hold(*self._counted(states, fitted(self.loss, states.r[-1], targets)))

    def states(self, inputs: Tensor, targets: Tensor) -> dict[str, list[Tensor]]:
        """Return states of a batch under control, layer by layer, each (batch, *shape), without learning.

        Feed-forward potentials "v_minus" and rates "r_minus"; the "target" (of classes, their probabilities) and the control
        "u" (both alone in their lists, (batch, n_L)); and under it the potentials "v", rates "r", basal "v_ff" and apical
        potentials "v_fb": at the steady state, or the end of the simulation.
        """
        self.require_attached()
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            states = self.run(inputs)
            states, goal, classes = self._counted(states, fitted(self.loss, states.r[-1], targets))
            if self.solver == "simulate":
                last, basal = end(self.chain, self._walk(states, goal, classes))
                return self.named_states(states, goal, last.u, Controlled(last.apical, last.d, last.rho), basal)
            held = self._hold(states, goal, classes)
            basal = [d - q for d, q in zip(held.state.d, held.state.q, strict=True)]
            return self.named_states(states, goal, held.u, held.state, basal)

    def _hold(self, states: States, goal: Tensor, classes: bool) -> Held:
        tolerance = self.tolerance or (1e-10 if goal.dtype == torch.float64 else 1e-5)
        return hold(self.chain, states, self.q, goal, self.loop.a, classes=classes, tolerance=tolerance)

    def _steady(self, states: States, goal: Tensor, classes: bool) -> tuple[list[Root], dict[str, Tensor]]:
        held = self._hold(states, goal, classes)
        self._look(held, states)
        roots: list[Root] = []
        if self.phase != "feedback":
            roots += self.roots_at(states, held.state, held.state.q)
        if self._learns_feedback():
            roots += self._expected(controlled_states(states, held.state), classes)
        effort = sum((q.square().flatten(1).sum(1) for q in held.state.q), torch.zeros_like(held.residual)) / 2
        return roots, {"effort": effort.mean(), "residual": held.residual.max()}

    def _look(self, held: Held, states: States) -> None:
        """Warn of goals that were not reached."""
        late = held.residual > max(CLOSE, 10 * (self.tolerance or 0.0))
        if bool(late.any()):
            cause = self.cause(states.rows(late.nonzero().squeeze(1)), moves=False)
            self.warn(
                f"{int(late.sum())} of {len(late)} outputs are not held at their goal (largest residual "
                f"{float(held.residual.amax()):.1e} of the error without control): {cause}"
            )
        self.solves += 1

    @property
    def remedy(self) -> str:
        """See :attr:`apical.rules.feedback_control.control_rule.ControlRule.remedy`."""
        return (
            f"raise alpha={self.loop.alpha:g}, lower label={self.label:g}, or give the last layer an activation that can "
            "reach the targets"
        )

    def _learns_feedback(self) -> bool:
        return self.phase != "forward" and bool(self.feedback_parameters())

    def _sigmas(self) -> list[float]:
        last = len(self.feedback) - 1
        at_output = self.loop.sigma if self.loop.sigma_output is None else self.loop.sigma_output
        return [*[self.loop.sigma] * last, at_output]

    def _expected(self, moved: States, classes: bool) -> list[Root]:
        """Roots of the expected feedback update at the controlled states: `-c_i s_i (mean_b H_b R_i)^T`."""
        sums = [torch.zeros_like(q).T for q in self.q]  # sum_b H_b R_i: (n_L, n_i)
        for part in control.parts_in_cache(self.chain, moved):
            slope = outcome_slope(part.r[-1].flatten(1), classes)
            by_output = slope.transpose(0, 1).flatten(1)  # (n_L, batch n_L)
            for total, rows in zip(sums, control.output_jacobian(self.chain, part), strict=True):
                total += by_output @ rows.flatten(0, 1)
        factors = zip(self.correlations, self.scales, self._sigmas(), strict=True)
        strengths = [c * scale * (sigma / max(sigma, 0.01)) ** 2 / len(moved.r[-1]) for c, scale, sigma in factors]
        return self.feedback_roots([-strength * total.T for strength, total in zip(strengths, sums, strict=True)])

    def _simulated(self, states: States, goal: Tensor, classes: bool) -> tuple[list[Root], dict[str, Tensor]]:
        output = states.r[-1].flatten(1)
        moments = self._walk(states, goal, classes)
        noise = NoiseCorrelation(self.q, states, self.slow) if self.learn == "noise" and self._learns_feedback() else None
        try:
            last, roots = self.roots_along(states, moments, noise)
        except InstabilityError as error:
            raise InstabilityError(f"{error}; {self.cause(states)}") from error
        if self.phase == "feedback":
            roots = []
        if noise is not None:
            layers = zip(self.scales, self._sigmas(), noise.mean(), strict=True)
            roots += self.feedback_roots([scale / max(sigma, 0.01) ** 2 * mean for scale, sigma, mean in layers])
        elif self._learns_feedback():
            roots += self._expected(controlled_states(states, Controlled(last.apical, last.d, last.rho)), classes)
        effort = sum((q.square().flatten(1).sum(1) for q in last.apical), last.u.new_zeros(len(last.u))) / 2
        left = last.e.norm(dim=1) / (goal - outcome(output, classes)).norm(dim=1).clamp_min(1e-30)
        return roots, {"effort": effort.mean(), "error_left": left.mean()}

    def trace(self, inputs: Tensor, targets: Tensor) -> Trace:
        """Somatic, basal and apical potentials, control and output of every sample over the simulated time.

        Memory: three times points x batch x neurons; use few samples.
        """
        self.require_attached()
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            states = self.run(inputs)
            states, goal, classes = self._counted(states, fitted(self.loss, states.r[-1], targets))
            return record(states, self._walk(states, goal, classes), self.loop.dt)

    def _walk(self, states: States, goal: Tensor, classes: bool) -> Iterator[Moment]:
        output = states.r[-1].flatten(1)
        error = partial(error_left, output, goal, classes=classes)
        return trajectory(self.chain, states, self.q, error, self.loop, basal=True, generator=self.generator)
