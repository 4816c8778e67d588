"""Measures of figure 3 of deep feedback control (arXiv 2106.07887), on a fixed probe batch.

Per rule: Condition 1; angles of the rule's weight change to the damped Gauss-Newton and minimum-norm updates (damping 0.1,
as in the paper's toy experiments). For feedback control also the angle to the DFC-SSA update with the same feedback weights,
Condition 2 and the largest real part of the eigenvalues of the whole linearised loop.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from apical.core.chain import Chain, States
from apical.core.credit import CreditRule
from apical.diagnostics.alignment import angle
from apical.diagnostics.feedback_conditions import condition_one, condition_two
from apical.diagnostics.gauss_newton import Update, gauss_newton_update, minimum_norm_update, requested_change
from apical.diagnostics.stability import largest_real_part, system_matrix
from apical.rules.feedback_control.deep_feedback_control import DeepFeedbackControl
from apical.rules.feedback_control.states import output_jacobian

Variant = Literal["dfc", "ss", "ssa"]
Solver = Literal["closed-form", "steady", "simulate"]

DAMPING = 0.1
"""Damping gamma of the Gauss-Newton and minimum-norm updates."""

EIGENVALUE_SAMPLES = 32
"""Number of probe samples whose system matrix (N + n_L rows) is decomposed."""


MEASURES = {
    "condition_two": "Condition 2\n|PQ| / |Q|",
    "minimum_norm": "angle to minimum\nnorm (degrees)",
    "condition_one": "Condition 1\ns.d. / mean of |r|",
    "gauss_newton": "angle to Gauss-\nNewton (degrees)",
    "eigenvalue": "largest Re eig\n(1/τ_u)",
    "ssa": "angle to DFC-SSA\n(degrees)",
    "condition_one_code": "Condition 1, as in the released code",
    "eigenvalue_worst": "largest Re eig of any sample (1/τ_u)",
}
"""Labels of axes by name of the quantity; the first six are panels A to F of the paper's figure 3."""


class Probe:
    """Measures one rule on one batch, without changing either.

    Args:
        rule: any rule on a chain of layers.
        inputs: probe batch (batch, ...).
        nudge: lambda of the minimum-norm update, which depends on it only through the curvature of the activations.
    """

    def __init__(self, rule: CreditRule, inputs: Tensor, targets: Tensor, nudge: float) -> None:
        self.rule, self.inputs, self.targets, self.nudge = rule, inputs, targets, nudge
        self.chain = Chain(rule.model, inputs.shape[1:])
        self.ssa = twin(rule, "ssa") if isinstance(rule, DeepFeedbackControl) else None

    def condition_two(self) -> float:
        """Mean share of Q in the row space of J; for feedback control only."""
        assert isinstance(self.rule, DeepFeedbackControl)
        jacobian = output_jacobian(self.chain, self.chain.run(self.inputs))
        return float(condition_two(jacobian, self.rule.q).mean())

    def __call__(self) -> dict[str, float]:
        """Return every measure in :data:`MEASURES` that the rule has, means over the batch; angles of batch-mean updates."""
        with forward_phase(self.rule):
            change, delta = requested_change(self.rule, self.inputs, self.targets)
        exact = gauss_newton_update(self.rule.model, self.inputs, delta, DAMPING, names=change)
        least = minimum_norm_update(self.chain, self.inputs, self.nudge * delta, DAMPING)
        states = self.chain.run(self.inputs)
        values = {
            "gauss_newton": update_angle(change, exact),
            "minimum_norm": update_angle(change, least),
            "condition_one": float(condition_one(states).mean()),
            "condition_one_code": float(condition_one(states, "code").mean()),
        }
        if self.ssa is None:
            return values
        linear, _ = requested_change(self.ssa, self.inputs, self.targets)
        real = self._largest_real_parts(states)
        return values | {
            "condition_two": self.condition_two(),
            "ssa": update_angle(change, linear),
            "eigenvalue": float(real.mean()),
            "eigenvalue_worst": float(real.max()),
        }

    def _largest_real_parts(self, states: States) -> Tensor:
        """`max Re eig` of the system matrix of the first samples."""
        assert isinstance(self.rule, DeepFeedbackControl)
        few = States([v[:EIGENVALUE_SAMPLES] for v in states.v], [r[:EIGENVALUE_SAMPLES] for r in states.r])
        loop = self.rule.loop
        matrix = system_matrix(self.chain, few, self.rule.q, alpha=loop.alpha, k_p=loop.k_p, tau=loop.tau, leak=loop.leak)
        return largest_real_part(matrix)


def twin(rule: DeepFeedbackControl, variant: Variant, solver: Solver | None = None, **loop: float) -> DeepFeedbackControl:
    """Make another variant on the same model that shares the rule's feedback weights while these learn.

    Args:
        rule: rule whose controller, loss and nudge it uses.
        variant: "dfc", "ss" or "ssa".
        solver: solver of that variant; None uses the fast one.
        **loop: other values for `nudge`, `k_p` and `points`.
    """
    own = rule.loop
    settings = {"nudge": rule.nudge, "k_p": own.k_p, "points": own.points} | loop
    other = DeepFeedbackControl(
        *(rule.model, rule.loss, variant, solver),
        nudge=settings["nudge"],
        alpha=own.alpha,
        k_p=settings["k_p"],
        dt=own.dt,
        points=int(settings["points"]),
        tau=own.tau,
        leak=own.leak,
        difference=rule.difference,
        learn="none",
        input_shape=rule.chain.stages[0].input_shape,
    )
    other.feedback = rule.feedback
    return other


def update_angle(a: Update, b: Update) -> float:
    """Return the angle in degrees between two updates, over all parameters that both have."""
    names = [name for name in a if name in b]
    return angle(torch.cat([a[name].flatten() for name in names]), torch.cat([b[name].flatten() for name in names]))


@contextmanager
def forward_phase(rule: CreditRule) -> Iterator[None]:
    """Let calls of the rule train the forward weights within the block."""
    before = rule.phase
    rule.phase = "forward"
    try:
        yield
    finally:
        rule.phase = before
