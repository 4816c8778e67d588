"""Deep feedback control (Meulemans, Tristany Farinha, Garcia Ordonez, Vilimelis Aceituno, Sacramento & Grewe, 2106.07887).

A controller drives the output from r_L^- to a slightly better target; the change this requires of a neuron is its credit:

    target   r_L* = r_L^- - lambda dLoss/dr_L  =  r_L^- + delta
    network  tau dv_i/dt = -v_i + W_i phi(v_{i-1}) + b_i + Q_i u,     controller  u = u_int + k_p e,  e = r_L* - r_L
    forward  dW_i = 2 [phi(v_i) - phi(v_i^ff)] r_{i-1}^T,   v_i^ff = W_i r_{i-1} + b_i
    feedback dQ_i = -v_i^fb u^T / sigma^2 - beta Q_i,   in a phase with noise sigma and the network's own output as target

Local: a synapse W needs its neuron's rate, the basal prediction of it, and its input; Q needs the apical potential and u.

DFC averages the forward rule over the trajectory, DFC-SS takes its steady state, DFC-SSA the steady state of the linearised
system, `u = (J Q + a I)^-1 delta`. `solver="simulate"` integrates the equations; "closed-form" (DFC, SSA) and "steady" (SS)
return the state to which the integration settles, hundreds of times faster.

Departures: lambda is per sample (the authors' first code divides it by the batch); samples that do not converge are kept,
and reported. Without instant transmission the forward rule compares a potential with the basal one of the same instant, as
in the paper, `v_i^ff[t] = W_i r_{i-1}[t] + b_i`; the authors' program uses `W_i r_{i-1}[t-1] + b_i`, the one that drove it.
With `learn="expected"` the feedback update is the expectation of the local rule over the noise, not itself a local rule.
The decay beta is left to the optimiser.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.batch import counted, fitted
from apical.core.chain import States
from apical.core.credit import Credit, Loss, Root
from apical.core.losses import output_error, refuse_options, terms
from apical.errors import ConfigError, InstabilityError, require_choice, require_count
from apical.rules.feedback_control import states as control
from apical.rules.feedback_control.control_rule import LOOK_EVERY, ControlRule, Difference, Learn, NoiseCorrelation, Start
from apical.rules.feedback_control.states import Controlled, Resolvent, settle
from apical.rules.feedback_control.trajectory import Leak, Loop, Moment, Trace, correlation, end, record, trajectory

SOLVERS = {"dfc": ("closed-form", "simulate"), "ss": ("steady", "simulate"), "ssa": ("closed-form",)}
"""The solvers of each variant, the default first."""

CLOSE = 1e-3
"""Residual, relative to the distance to the target, above which a steady state counts as not found."""

LINEAR = 0.1
"""The same for linearised control, which misses the target by design: the limit up to which its closed form is valid."""


class DeepFeedbackControl(ControlRule):
    """Credit from a controller that nudges the output; DFC, DFC-SS and DFC-SSA.

    Args:
        model: a chain of weighted layers and element-wise activations (see :class:`apical.core.chain.Chain`).
        loss: maps (output, targets) to a scalar batch mean.
        variant: "dfc", "ss" or "ssa".
        solver: "closed-form" (dfc, ssa), "steady" (ss) or "simulate" (dfc, ss); None selects the fast one.
        nudge: lambda, how far down the loss gradient the target lies.
        normalised: divide the update by 2 lambda, so that learning rates have their usual size; False keeps it as in the
            paper, proportional to lambda (the authors divide the learning rate by it).
        alpha: leak of the controller.
        k_p: its proportional gain.
        dt: step of the simulation, in units of the controller's time constant tau_u.
        points: stored time points T of the simulation.
        tau: time constant of the potentials.
        leak: "code" lets the whole control leak, as in the authors' programs; "paper" its integral only.
        proactive, instant_transmission: order of the updates within a step, see
            :class:`apical.rules.feedback_control.trajectory.Loop`.
        newton: initial steps of the solver "steady", with the slope at the feed-forward state; samples still farther than
            a thousandth of the way from their target continue with damped Newton steps. The log `residual` shows the rest.
        difference: "rate" compares `phi(v)`, "voltage" the potentials themselves.
        feedback: initial Q: "product" of the forward weights, or "random".
        learn: "expected" or "noise" trains Q, by the expectation of the local rule or by simulating it; "none" fixes Q.
        learn_output: train Q_L too; it stays the identity otherwise.
        alpha_fb, k_p_fb, dt_fb, points_fb, tau_fb, tau_apical_fb, sigma_fb: the loop and the noise of the feedback phase.
        input_shape: of one sample; needed with convolutions.
        generator: for random initial feedback and noise; None draws from PyTorch's global state.

    Raises:
        UnsupportedModelError: the model is not such a chain; the message names the module.
        ConfigError: an option is out of range or does not fit another; or the loss has a reduction other than the mean.

    >>> model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    >>> rule = DeepFeedbackControl(model, variant="ssa", alpha=1e-6, learn="none")
    >>> rule(torch.randn(8, 4), torch.randint(3, (8,))).backward()
    >>> model[0].weight.grad.shape
    torch.Size([6, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = F.cross_entropy,
        variant: Literal["dfc", "ss", "ssa"] = "dfc",
        solver: Literal["closed-form", "steady", "simulate"] | None = None,
        nudge: float = 0.01,
        normalised: bool = True,
        alpha: float = 1e-3,
        k_p: float = 2.0,
        dt: float = 0.02,
        points: int = 1000,
        tau: float = 0.2,
        leak: Leak = "code",
        proactive: bool = True,
        instant_transmission: bool = True,
        newton: int = 2,
        difference: Difference = "rate",
        feedback: Start = "product",
        learn: Learn = "expected",
        learn_output: bool = False,
        alpha_fb: float = 0.5,
        k_p_fb: float = 0.1,
        dt_fb: float = 2e-3,
        points_fb: int = 50,
        tau_fb: float = 0.01,
        tau_apical_fb: float = 0.3,
        sigma_fb: float = 0.01,
        input_shape: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        require_choice("variant", variant, SOLVERS)
        chosen = solver or SOLVERS[variant][0]
        if chosen not in SOLVERS[variant]:
            raise ConfigError(f"variant {variant!r} has no solver {solver!r}; it has {' and '.join(SOLVERS[variant])}")
        if (variant, chosen) == ("dfc", "closed-form") and not (proactive and instant_transmission):
            raise ConfigError("the closed form of dfc holds for proactive, instant transmission; pass solver='simulate'")
        if not 0 < nudge < float("inf"):
            raise ConfigError(f"nudge must be positive, got {nudge}")
        require_count("newton", newton)
        loop = Loop(alpha, k_p, dt, points, tau, leak, proactive, instant_transmission)
        sleep = Loop(
            *(alpha_fb, k_p_fb, dt_fb, points_fb, tau_fb, leak), proactive=False, tau_apical=tau_apical_fb, sigma=sigma_fb
        )
        super().__init__(model, loss, loop, sleep, difference, feedback, learn, learn_output, input_shape, generator)
        refuse_options(self, "deep feedback control", ("reduction",))
        self.variant, self.solver, self.nudge, self.newton = variant, chosen, nudge, newton
        self.factor = 1 / nudge if normalised else 2.0
        self.correlations = [correlation(sleep, depth) for depth in range(len(self.chain.stages), 0, -1)]

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        """Credit for one batch, for the weights that :attr:`phase` names: forward, feedback, or both."""
        self.require_attached()
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            states = self.run(inputs)
            output = states.r[-1]
            loss, error = output_error(self.loss, output, fitted(self.loss, output, targets))
            states, error = _counted(states, targets, error)
            forward = self.phase != "feedback"
            backward = self.phase != "forward" and bool(self.feedback_parameters())
            roots: list[Root] = []
            logs: dict[str, Tensor] = {}
            rows: list[Tensor] = []
            if forward and self.solver == "simulate":
                roots, logs = self._simulated(states, self.delta(error))
            elif forward and control.goes_below(self.chain, self.q):
                roots, logs = self._solved(states, self.delta(error), self._resolvent(states))
            elif forward:
                self.watch(states, moves=self.variant != "ssa")
                gain = None
                if backward and self.learn == "expected":
                    gain, rows = control.gain_and_mean(self.chain, states, self.q)
                roots, logs = self._solved(
                    states, self.delta(error), Resolvent(self.chain, states, self.q, self.loop.a, gain)
                )
            if backward:
                roots += self._feedback_roots(states, rows)
            roots += terms(loss) if forward else []
        return Credit.of(roots, output, loss, logs)

    def delta(self, error: Tensor) -> Tensor:
        """Distance of the target from the output, (batch, n_L), for the loss's gradient `error`."""
        return error.flatten(1) * (-self.nudge * len(error))

    def _solved(self, states: States, delta: Tensor, resolvent: Resolvent) -> tuple[list[Root], dict[str, Tensor]]:
        u, state, residual, late = self._steady(states, delta, resolvent)
        self._refuse(u, states, delta, residual if self.variant == "ss" else None)
        q = state.q
        if self.variant == "dfc":
            q = control.time_averaged(self.chain, self.q, state, resolvent, u, self.loop)
        left = residual.norm(dim=1).sum() / delta.norm(dim=1).sum().clamp_min(torch.finfo(delta.dtype).tiny)
        if late is not None:
            self._say_late(states.rows(late), residual[late], delta[late], len(delta))
        elif self.variant != "ss":
            self._look(left)
        if not torch.compiler.is_compiling():  # a changing number would be recompiled every time
            self.solves += 1
        return self.roots_at(states, state, q), {"control": u.norm(dim=1).mean(), "residual": left}

    def _steady(
        self, states: States, delta: Tensor, resolvent: Resolvent
    ) -> tuple[Tensor, Controlled, Tensor, Tensor | None]:
        """Return the steady or linearised state: control, state, residual of the equation (batch, n_L).

        Also return which samples have not reached it, None if all have; samples far from it after the first steps continue
        by damped Newton.
        """
        steps = self.newton if self.variant == "ss" else 0
        u, state, residual = control.steady_state(self.chain, states, self.q, delta, resolvent, steps)
        late = None if steps == 0 or torch.compiler.is_compiling() else _late(residual, delta)
        if late is None:
            return u, state, residual, None
        tolerance = 1e-10 if delta.dtype == torch.float64 else 1e-5
        start, rest = u[late], states.rows(late)
        settled = settle(self.chain, rest, self.q, delta[late], start, self._resolvent, self.loop.a, tolerance)
        lost = ~settled.any(1, keepdim=True) & ~start.isfinite().all(1, keepdim=True)  # to be refused
        u = u.index_copy(0, late, torch.where(lost, start, settled))
        state = control.controlled_pass(self.chain, states, control.apical(self.chain, self.q, u))
        residual = state.rho[-1].flatten(1) + self.loop.a * u - delta
        return u, state, residual, _late(residual, delta)

    def _resolvent(self, states: States) -> Resolvent:
        """`(M + a I)^-1` at any states."""
        if control.goes_below(self.chain, self.q):
            return control.WideResolvent(self.chain, states, self.q, self.loop.a)
        return Resolvent(self.chain, states, self.q, self.loop.a)

    def _say_late(self, states: States, residual: Tensor, delta: Tensor, batch: int) -> None:
        """Warn of the given samples of a batch, for which no steady state was found."""
        worst = float((residual.norm(dim=1) / delta.norm(dim=1)).amax())
        self.warn(
            f"no steady state was found for {len(delta)} of {batch} samples (largest residual {worst:.1e} of the way to the "
            f"target): {self.cause(states, moves=False)}"
        )

    def _look(self, left: Tensor) -> None:
        """Warn periodically of an inaccurate linearisation."""
        if torch.compiler.is_compiling() or self.solves % LOOK_EVERY or not float(left) > LINEAR:
            return
        other = "variant='ss'" if self.variant == "ssa" else "solver='simulate'"
        self.warn(
            f"the linearised control misses its target by {float(left):.1e} of the way there; the closed form needs weak "
            f"control: lower nudge={self.nudge:g} or pass {other}"
        )

    @property
    def remedy(self) -> str:
        """See :attr:`apical.rules.feedback_control.control_rule.ControlRule.remedy`."""
        return f"lower nudge={self.nudge:g} or raise alpha={self.loop.alpha:g}"

    def _simulated(self, states: States, delta: Tensor) -> tuple[list[Root], dict[str, Tensor]]:
        moments = self._walk(states, delta, basal=self.variant == "dfc")
        try:
            if self.variant == "ss":
                last, basal = end(self.chain, moments)
                q = [d - b for d, b in zip(last.d, basal, strict=True)]
                roots = self.roots_at(states, Controlled(q, last.d, last.rho), q)
            else:
                last, roots = self.roots_along(states, moments)
        except InstabilityError as error:
            raise InstabilityError(f"{error}; {self.cause(states)}") from error
        residual = last.rho[-1].flatten(1) + self.loop.a * last.u - delta
        scale = torch.maximum(
            states.r[-1].flatten(1).norm(dim=1), delta.norm(dim=1)
        )  # outputs may be smaller than the nudge
        if bool((residual.norm(dim=1) > scale).any()):
            raise InstabilityError(f"the controlled dynamics diverges from its target; {self.cause(states)}")
        settled = residual.norm(dim=1) < 1e-2 * delta.norm(dim=1)
        return roots, {"control": last.u.norm(dim=1).mean(), "settled": settled.to(delta.dtype).mean()}

    def _walk(self, states: States, delta: Tensor, *, basal: bool) -> Iterator[Moment]:
        return trajectory(
            self.chain, states, self.q, lambda rho: delta - rho, self.loop, basal=basal, generator=self.generator
        )

    def _feedback_roots(self, states: States, rows: list[Tensor]) -> list[Root]:
        """Roots of the feedback rule, given the batch means of the R_i if known; the decay is left to the optimiser."""
        scale = 1 / max(self.sleep.sigma, 0.01) ** 2
        if self.learn == "expected":
            rows = rows or control.mean_jacobian(self.chain, states)
            strengths = [-c * self.sleep.sigma**2 for c in self.correlations]
            return self.feedback_roots([scale * c * row.T for c, row in zip(strengths, rows, strict=True)])
        seen = NoiseCorrelation(self.q, states)
        walk = trajectory(self.chain, states, self.q, torch.neg, self.sleep, basal=False, generator=self.generator)
        for moment in walk:
            seen(moment)
        return self.feedback_roots([scale * row for row in seen.mean()])

    def trace(self, inputs: Tensor, targets: Tensor) -> Trace:
        """Somatic, basal and apical potentials, control and output of every sample over the simulated time.

        Memory: three times points x batch x neurons; use few samples.
        """
        self.require_attached()
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            states = self.run(inputs)
            _, error = output_error(self.loss, states.r[-1], fitted(self.loss, states.r[-1], targets))
            return record(states, self._walk(states, self.delta(error), basal=True), self.loop.dt)

    def states(self, inputs: Tensor, targets: Tensor) -> dict[str, list[Tensor]]:
        """Return states of a batch under control, layer by layer, each (batch, *shape), without learning.

        Feed-forward potentials "v_minus" and rates "r_minus"; the output's "target" r_L*, the control "u" (both alone in
        their lists, (batch, n_L)); and under it the potentials "v", rates "r", basal "v_ff" and apical potentials "v_fb":
        at the steady state, the linearised one, or the end of the simulation, depending on variant and solver.
        """
        self.require_attached()
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            states = self.run(inputs)
            _, error = output_error(self.loss, states.r[-1], fitted(self.loss, states.r[-1], targets))
            states, error = _counted(states, targets, error)
            delta = self.delta(error)
            target = states.r[-1].flatten(1) + delta
            if self.solver == "simulate":
                last, basal = end(self.chain, self._walk(states, delta, basal=True))
                return self.named_states(states, target, last.u, Controlled(last.apical, last.d, last.rho), basal)
            u, state, *_ = self._steady(states, delta, self._resolvent(states))
            return self.named_states(states, target, u, state, [d - q for d, q in zip(state.d, state.q, strict=True)])

    def _refuse(self, u: Tensor, states: States, delta: Tensor, residual: Tensor | None) -> None:
        """Keep a non-finite control from making weights non-finite."""
        if torch.compiler.is_compiling() or not bool(delta.isfinite().all()):
            return
        if not bool(u.isfinite().all()) or (residual is not None and not bool(residual.isfinite().all())):
            raise InstabilityError(f"the controller has no finite steady state; {self.cause(states, moves=False)}")


def _late(residual: Tensor, delta: Tensor) -> Tensor | None:
    """Indices of samples that are not at rest although their target is finite; None if there are none."""
    near = residual.norm(dim=1) <= CLOSE * delta.norm(dim=1)
    if bool(near.all()):
        return None
    late = (~near & delta.isfinite().all(1)).nonzero().squeeze(1)
    return late if len(late) else None


def _counted(states: States, targets: Tensor, error: Tensor) -> tuple[States, Tensor]:
    """States and errors of the samples that the loss does not ignore."""
    rows = counted(targets, error)
    return (states, error) if rows is None else (states.rows(rows), error[rows])
