"""Strong feedback control: the steady state in which the controller holds the output at the label itself.

    goal - out(r_L^- + rho_L(u)) = a u,   out = softmax for classes (so the error is minus the loss's gradient), or identity

n_L unknowns per sample, far from linear. Newton's method would need the Jacobian of the whole network repeatedly;
here only its output part (softmax) is exact at every step, while M = J Q of the layers is maintained by
Broyden's rank-one updates and recomputed periodically for the samples that have not converged.

For classes the first step is taken in logits, which avoids the softmax:

    r_L^- + M u = log(goal - a u) + c,   with log(goal - a u) ~ log goal - (a / goal) u, c such that sum(u) = 0
"""

from typing import NamedTuple

import torch
from torch import Tensor

from apical.core.chain import Chain, States
from apical.rules.feedback_control.states import Controlled, apical, controlled_pass, controlled_states, loop_gain

PASSES = 12
"""Number of quasi-Newton steps between two Jacobians."""


class Held(NamedTuple):
    """A network held at its goal.

    Attributes:
        u: control (batch, n_L).
        state: the network under it.
        residual: norm per sample of `goal - out - a u`, relative to that without control; (batch,).
        passes: number of controlled passes of the slowest sample.
    """

    u: Tensor
    state: Controlled
    residual: Tensor
    passes: int


def outcome(output: Tensor, classes: bool) -> Tensor:
    """The quantity compared with the goal: class probabilities or the output itself."""
    return torch.softmax(output, 1) if classes else output


def error_left(output: Tensor, goal: Tensor, rho: Tensor, classes: bool) -> Tensor:
    """Output error `goal - out(output + rho)`, all (batch, n_L); for regression without loss of digits at small rho."""
    return goal - outcome(output + rho, True) if classes else goal - output - rho


def outcome_slope(output: Tensor, classes: bool) -> Tensor:
    """`d outcome / d output` (batch, n_L, n_L): `diag(p) - p p^T` or the identity."""
    if not classes:
        return torch.eye(output.shape[1], dtype=output.dtype, device=output.device).expand(len(output), -1, -1)
    p = torch.softmax(output, 1)
    return torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)  # (batch, n_L, n_L)


def hold(
    chain: Chain,
    states: States,
    feedback: list[Tensor],
    goal: Tensor,
    a: float,
    *,
    classes: bool,
    tolerance: float,
    most: int = 6 * PASSES,
) -> Held:
    """Find the control that holds every sample's outcome at its `goal` (batch, n_L), up to the leak.

    Args:
        states: the feed-forward states.
        a: steady error per control.
        classes: the goal is a distribution over classes.
        tolerance: of the residual, relative to the error without control.
        most: maximum number of controlled passes.

    Returns:
        The best control found for each sample. No error is raised if a goal cannot be held: check the residual.
    """
    u = torch.zeros_like(goal)
    start = (goal - outcome(states.r[-1].flatten(1), classes)).norm(dim=1)
    aim = tolerance * start + (8 * torch.finfo(goal.dtype).eps if classes else 0.0)  # probabilities are rounded
    samples = torch.arange(len(goal), device=goal.device)  # not converged yet
    unmet = torch.ones_like(samples, dtype=torch.bool)
    problem = _Problem(chain, states, feedback, goal, a, classes)
    guess, passes = problem.linearise(u), 0
    while passes < most:
        guess = problem.step(guess) if passes or not classes else problem.step_in_logits(guess)
        u[samples] = torch.where(unmet.unsqueeze(1), guess.u, u[samples])  # converged samples stay
        passes += 1
        unmet = unmet & (guess.size > aim[samples])
        if not bool(unmet.any()):
            break
        if 2 * int(unmet.sum()) <= len(samples):
            problem, guess, samples, unmet = problem.part(unmet), guess.part(unmet), samples[unmet], unmet[unmet]
        if passes % PASSES == 0:
            guess = problem.linearise(guess.u)
    whole = _Problem(chain, states, feedback, goal, a, classes)
    state = controlled_pass(chain, states, apical(chain, feedback, u))
    return Held(u, state, whole.miss(u, state).norm(dim=1) / start.clamp_min(torch.finfo(goal.dtype).tiny), passes)


class _Guess(NamedTuple):
    """State of the iteration: control, output shift, miss and its norm, loop gain M, and the fraction of a step to take."""

    u: Tensor
    rho: Tensor
    miss: Tensor
    size: Tensor
    gain: Tensor
    stride: Tensor

    def part(self, samples: Tensor) -> "_Guess":
        return _Guess(*(part[samples] for part in self))


class _Problem(NamedTuple):
    """`out + a u - goal = 0` for some samples."""

    chain: Chain
    states: States
    feedback: list[Tensor]
    goal: Tensor
    a: float
    classes: bool

    def part(self, samples: Tensor) -> "_Problem":
        states = States([v[samples] for v in self.states.v], [r[samples] for r in self.states.r])
        return self._replace(states=states, goal=self.goal[samples])

    def miss(self, u: Tensor, state: Controlled) -> Tensor:
        output, rho = self.states.r[-1].flatten(1), state.rho[-1].flatten(1)
        if self.classes:
            return outcome(output + rho, True) + self.a * u - self.goal
        return rho + self.a * u - (self.goal - output)  # in deviations: large outputs cost float32 no digits

    def linearise(self, u: Tensor) -> _Guess:
        """A guess at u, with M from the Jacobian there."""
        state = controlled_pass(self.chain, self.states, apical(self.chain, self.feedback, u))
        gain = loop_gain(self.chain, controlled_states(self.states, state), self.feedback)
        miss = self.miss(u, state)
        return _Guess(u, state.rho[-1].flatten(1), miss, miss.norm(dim=1), gain, torch.ones_like(u[:, 0]))

    def step(self, at: _Guess) -> _Guess:
        """One step of Newton's method with the present M."""
        slope = outcome_slope(self.states.r[-1].flatten(1) + at.rho, self.classes) @ at.gain
        slope.diagonal(dim1=1, dim2=2).add_(self.a)
        # errors of class probabilities sum to zero, and so does their control: the leak need not hold that direction
        slope = slope + 1 / at.u.shape[1] if self.classes else slope
        solution = torch.linalg.solve_ex(slope, -at.miss)[0]  # (H M + a I) step = -F
        return self.taken(at, solution * at.stride.unsqueeze(1))

    def step_in_logits(self, at: _Guess) -> _Guess:
        """The first step towards classes, from u = 0."""
        slope = at.gain + self.a * torch.diag_embed(1 / self.goal)
        slope = slope - slope.mean(1, keepdim=True) + 1 / at.u.shape[1]  # P (M + a D) + 1 1^T / n: what c adds is taken off
        shift = self.goal.log() - self.states.r[-1].flatten(1)
        solution = torch.linalg.solve_ex(slope, shift - shift.mean(1, keepdim=True))[0]
        return self.taken(at, solution)._replace(stride=at.stride)  # its failure says nothing of Newton's stride

    def taken(self, at: _Guess, step: Tensor) -> _Guess:
        """The guess after a step (batch, n_L), applied only to the samples that it brings closer."""
        # where the outcome does not move at all (saturated, without leak) there is no step; the others continue
        step = step.where(step.isfinite().all(1, keepdim=True), 0.0)
        u = at.u + step
        state = controlled_pass(self.chain, self.states, apical(self.chain, self.feedback, u))
        rho, miss = state.rho[-1].flatten(1), self.miss(u, state)
        size = miss.norm(dim=1)
        # Broyden: M <- M + (d rho - M step) step^T / |step|^2, so that M step is the shift just seen
        error = rho - at.rho - (at.gain @ step.unsqueeze(2)).squeeze(2)
        gain = at.gain + (error / step.square().sum(1, keepdim=True).clamp_min(1e-30)).unsqueeze(2) * step.unsqueeze(1)
        better = size < (1 - 1e-3 * at.stride) * at.size
        pick = better.unsqueeze(1)
        stride = torch.where(better, (2 * at.stride).clamp_max(1), at.stride / 4)
        return _Guess(
            u=torch.where(pick, u, at.u),
            rho=torch.where(pick, rho, at.rho),
            miss=torch.where(pick, miss, at.miss),
            size=torch.where(better, size, at.size),
            gain=gain,
            stride=stride,
        )
