"""Common base of the feedback-control rules: a model as a chain, feedback weights to every layer, and the local rules.

    forward   dW_i = 2 [phi(v_i) - phi(v_i^ff)] r_{i-1}^T,   v_i^ff = W_i r_{i-1} + b_i
    feedback  dQ_i = -v_i^fb u^T / sigma^2 - beta Q_i

(arXiv 2106.07887, eqs. 5 and 13.) The rule decides how states are computed: by a simulation or a solver.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from apical.core.batch import require_memory, require_one_type, require_precision
from apical.core.chain import Chain, States
from apical.core.credit import Batch, CreditRule, Loss, Measures, Root
from apical.core.feedback import put
from apical.core.local import local_roots, outer
from apical.errors import ConfigError, require_choice
from apical.rules.feedback_control import states as control
from apical.rules.feedback_control.stability import advice, violation
from apical.rules.feedback_control.states import Controlled
from apical.rules.feedback_control.trajectory import Loop, Moment

Difference = Literal["rate", "voltage"]
Start = Literal["product", "random"]
Learn = Literal["expected", "noise", "none"]

LOOK_EVERY = 100
"""Calls between stability checks of the controller where nothing is simulated."""


class ControlRule(CreditRule):
    """Base of the feedback-control rules.

    Args:
        model: a chain of weighted layers and element-wise activations (see :class:`apical.core.chain.Chain`).
        loss: maps (output, targets) to a scalar batch mean.
        loop: the controller.
        sleep: the controller and the noise of the phase that learns feedback.
        difference: "rate" compares `phi(v)` in the forward rule, "voltage" the potentials themselves.
        feedback: initial Q: "product" of the forward weights, or "random".
        learn: "expected" or "noise" trains Q, by the expectation of the local rule or by simulating it; "none" fixes Q.
        learn_output: train Q_L too; it stays the identity otherwise.
        input_shape: of one sample; needed with convolutions.
        generator: for initial feedback and noise; None draws from PyTorch's global state.

    Raises:
        UnsupportedModelError: the model is not such a chain; the message names the module.
        ConfigError: an unknown choice, or learning of feedback without noise.
    """

    two_phase = True
    output_alone = True

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        loop: Loop,
        sleep: Loop,
        difference: Difference,
        feedback: Start,
        learn: Learn,
        learn_output: bool,
        input_shape: Sequence[int] | None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(model, loss)
        self.generator = generator
        require_choice("difference", difference, ("rate", "voltage"))
        require_choice("feedback", feedback, ("product", "random"))
        require_choice("learn", learn, ("expected", "noise", "none"))
        if learn != "none" and sleep.sigma <= 0:
            raise ConfigError(f"learning the feedback needs noise: its sigma must be positive, got {sleep.sigma}")
        self.loop, self.sleep, self.difference, self.learn = loop, sleep, difference, learn
        self.random_per_sample = learn == "noise"
        self.chain = Chain(model, input_shape)
        require_precision(type(self).__name__, self.chain.like)
        sizes = [stage.size for stage in self.chain.stages]
        require_memory(
            f"feedback matrices from {sizes[-1]} outputs to every layer",
            sizes[-1] * sum(sizes) * self.chain.like.element_size(),
            self.chain.like,
            f"{type(self).__name__} takes networks with few outputs, such as classes",
        )
        self.feedback = nn.ParameterList(
            control.product_feedback(self.chain) if feedback == "product" else control.random_feedback(self.chain, generator)
        )
        for i, weights in enumerate(self.feedback):
            weights.requires_grad_(learn != "none" and (learn_output or i < len(self.feedback) - 1))
        self.factor = 2.0  # of the forward rule
        self.calls, self.solves, self._quiet = 0, 0, 0

    def feedback_parameters(self) -> list[nn.Parameter]:
        """The trainable Q_i."""
        return [weights for weights in self.feedback if weights.requires_grad]

    @property
    def q(self) -> list[Tensor]:
        """Q_i (n_i, n_L), stage by stage."""
        return list(self.feedback)

    def run(self, inputs: Tensor) -> States:
        """The feed-forward states of a batch.

        Raises:
            ConfigError: the batch is empty, or the model was moved without the rule.
            UnsupportedModelError: the samples do not have the shape the rule was made for.
        """
        require_precision(type(self).__name__, self.chain.like)
        require_one_type(type(self).__name__, self.chain.like, self.feedback)
        return self.chain.run(inputs)

    @torch.no_grad()
    def measures(self, probe: Batch, test: Sequence[Batch]) -> Measures:
        """Condition 2 on the probe batch, 0 to 1; small chains only."""
        if not self.chain.is_small:
            return Measures()
        jacobian = control.output_jacobian(self.chain, self.run(probe[0]))
        return Measures({"condition_two": float(control.condition_two(jacobian, self.q).mean())})

    def set_feedback(self, layer: str, **matrices: Tensor) -> None:
        """Set the feedback weights of a layer: `Q` (n_i, n_L), which carries the control to it.

        Raises:
            ConfigError: unknown layer or symbol, or a wrong shape.
        """
        handles = {stage.name: {"Q": q} for stage, q in zip(self.chain.stages, self.feedback, strict=True)}
        put(type(self).__name__, layer, handles, matrices)

    def named_states(
        self, states: States, target: Tensor, u: Tensor, state: Controlled, basal: Sequence[Tensor]
    ) -> dict[str, list[Tensor]]:
        """Return the result of the rules' :meth:`states`.

        Args:
            states: the feed-forward states.
            target: of the output (batch, n_L).
            u: control.
            state: the controlled network; its q are the apical potentials.
            basal: shifts of the basal potentials.
        """
        return {
            "v_minus": states.v,
            "r_minus": states.r[1:],
            "target": [target],
            "u": [u],
            "v": [v + d for v, d in zip(states.v, state.d, strict=True)],
            "r": [r + rho for r, rho in zip(states.r[1:], state.rho, strict=True)],
            "v_ff": [v + b for v, b in zip(states.v, basal, strict=True)],
            "v_fb": list(state.q),
        }

    def roots_at(self, states: States, state: Controlled, q: Sequence[Tensor]) -> list[Root]:
        """Roots of the forward rule at one controlled state, with soma-minus-basal potentials q."""
        before = [states.r[0], *(r + rho for r, rho in zip(states.r[1:-1], state.rho[:-1], strict=True))]
        scale, signals = -self.factor / len(states.r[0]), self._signals(states, state, q)
        pairs = zip(self.chain.stages, signals, before, strict=True)
        return [root for stage, signal, rates in pairs for root in local_roots(stage, signal, rates, factor=scale)]

    def _signals(self, states: States, state: Controlled, q: Sequence[Tensor]) -> Sequence[Tensor]:
        return q if self.difference == "voltage" else control.soma_minus_basal(self.chain, states, state, q)

    def roots_along(
        self, states: States, moments: Iterator[Moment], meanwhile: Callable[[Moment], None] | None = None
    ) -> tuple[Moment, list[Root]]:
        """The last moment, and roots of the forward rule averaged over all T points of a trajectory.

        Args:
            meanwhile: called at every moment.
        """
        stages = self.chain.stages
        summed = [torch.zeros_like(v) for v in states.v]
        products = [torch.zeros_like(stage.layer.weight) for stage in stages]
        points = 1  # the feed-forward state adds nothing to the sums
        for moment in moments:
            assert moment.basal is not None
            points += 1
            q = [d - b for d, b in zip(moment.d, moment.basal, strict=True)]
            for i, signal in enumerate(self._signals(states, Controlled(q, moment.d, moment.rho), q)):
                summed[i] += signal
                if i and stages[i].is_dense:
                    products[i].addmm_(signal.T, moment.rho[i - 1])
                elif i:
                    products[i] += outer(stages[i], signal, moment.rho[i - 1])
            if meanwhile is not None:
                meanwhile(moment)
        scale = -self.factor / (len(states.r[0]) * points)
        roots: list[Root] = []
        for i, stage in enumerate(stages):
            products[i] += outer(stage, summed[i], states.r[i])
            roots += local_roots(stage, summed[i], states.r[i], products[i], scale)
        return moment, roots

    def feedback_roots(self, gradients: Sequence[Tensor]) -> list[Root]:
        """The Q_i that are trained, with their gradients."""
        return [pair for pair in zip(self.feedback, gradients, strict=True) if pair[0].requires_grad]

    def cause(self, states: States, *, moves: bool = True) -> str:
        """Return which parameter to change, from the eigenvalues of the loop on a few samples.

        Args:
            moves: see :meth:`watch`.
        """
        gains = self._gains(states)
        if moves:
            return self.advice(gains) or f"reduce dt={self.loop.dt:g}"
        return self._violation(gains) or self.remedy

    def _gains(self, states: States) -> list[Tensor]:
        """`M_i` of the first samples."""
        few = States([v[:4] for v in states.v], [r[:4] for r in states.r])
        return control.loop_gains(control.output_jacobian(self.chain, few), self.q)

    @property
    def remedy(self) -> str:
        """Advice for a steady state that is not found although its loop looks stable."""
        return f"raise alpha={self.loop.alpha:g}"

    def warn(self, message: str) -> None:
        """Warn, at most once in :data:`LOOK_EVERY` calls."""
        if self.solves >= self._quiet:
            self._quiet = self.solves + LOOK_EVERY
            warnings.warn(message, RuntimeWarning, stacklevel=3)

    def advice(self, gains: Sequence[Tensor]) -> str | None:
        """Advice of :func:`apical.rules.feedback_control.stability.advice` for the first samples' `M_i`."""
        loop, total = self.loop, sum(gains[1:], gains[0])
        advise = partial(advice, total, depth=len(gains), leak=loop.leak, by_layer=gains)
        return advise(alpha=loop.alpha, k_p=loop.k_p, dt=loop.dt, tau=loop.tau)

    def watch(self, states: States, *, moves: bool = True) -> None:
        """Check periodically, and warn of a controller that would be unstable if it were simulated.

        Wide outputs, whose M_i are large, and the steady state of strong control are not checked; there only the residual
        shows instability, in the logs and in a warning.

        Args:
            states: the feed-forward states; a few samples are checked.
            moves: check the dynamics with its step and delays; otherwise the steady state alone.
        """
        if torch.compiler.is_compiling():
            return
        if self.calls % LOOK_EVERY == 0:
            gains = self._gains(states)
            reason = self.advice(gains) if moves else self._violation(gains)
            if reason:
                warnings.warn(f"the steady state is unstable: {reason}", RuntimeWarning, stacklevel=2)
        self.calls += 1

    def _violation(self, gains: Sequence[Tensor]) -> str | None:
        total = sum(gains[1:], gains[0])
        if not bool(total.isfinite().all()):
            return None
        mu = torch.linalg.eigvals(total.detach().to("cpu", torch.float64))
        return violation(mu, self.loop.alpha, self.loop.k_p, self.loop.leak)


class NoiseCorrelation:
    """Mean over samples and time of `v_i^fb[t] u[t+1]^T` along a trajectory, the input of the feedback rule.

    Args:
        feedback: Q_i, for their shapes.
        states: the feed-forward states.
        rate: of the low-pass filter whose output is subtracted from the control; 0 for none. The filter starts at u[1].
    """

    def __init__(self, feedback: Sequence[Tensor], states: States, rate: float = 0.0) -> None:
        self._sums = [torch.zeros_like(weights) for weights in feedback]
        self._apical = [torch.zeros_like(v).flatten(1) for v in states.v]
        self._rate, self._moments = rate, 0
        self._slow: Tensor | None = None

    def __call__(self, moment: Moment) -> None:
        """Add the next moment."""
        u = moment.u
        if self._rate:
            self._slow = u.clone() if self._slow is None else torch.lerp(self._slow, u, self._rate)
            u = u - self._slow
        for total, apical in zip(self._sums, self._apical, strict=True):
            total.addmm_(apical.T, u)
        self._apical = [apical.flatten(1).clone() for apical in moment.apical]
        self._moments += 1

    def mean(self) -> list[Tensor]:
        """The correlations (n_i, n_L)."""
        return [total / (len(self._apical[0]) * self._moments) for total in self._sums]
