"""The dynamics of a chain under feedback control, step by step, as the authors of DFC integrate them.

Per step of length dt, all samples at once (arXiv 2106.07887 and its released code; tau_u = 1):

    e = target - output,  u_int += dt (e - alpha u),  u = u_int + k_p e           (leak "paper": - alpha u_int)
    layers in ascending order:  v_i += (dt/tau) (W_i r_{i-1} + b_i + v_i^fb - v_i),  v_i^fb = Q_i u (+ noise)

in deviations from the feed-forward state. How a trajectory is used (its end, its mean, a plot, the feedback weights'
update) is up to the caller.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from apical.core.activations import difference
from apical.core.chain import Chain, Stage, States
from apical.core.noise import normal
from apical.errors import ConfigError, InstabilityError, require_count

Leak = Literal["code", "paper"]
"""What leaks in the controller: the whole control, as in the authors' programs, or its integral."""

LOOK_EVERY = 50
"""Steps between checks for NaN."""


SMALL = 0.004
"""Potential shifts up to which three terms of tanh's series are exact in float32, with a margin between two checks."""

SELDOM = 4
"""Steps between checks of the size of the shifts, after the first few."""


@dataclass(frozen=True)
class Loop:
    """The controller and how its loop is discretised. Times are in units of the controller's tau_u.

    Attributes:
        alpha: leak of the controller.
        k_p: proportional gain.
        dt: step.
        points: stored time points T, the feed-forward state included; T - 1 steps.
        tau: time constant of the potentials, at least dt.
        leak: "code": on the whole control, as in the authors' programs; "paper": on its integral.
        proactive: the layers use this step's control, not the previous one.
        instant_transmission: a layer uses this step's rates of the layer below.
        instant_system: potentials follow their input instantly.
        tau_apical: time constant of the apical compartments; None means they follow instantly.
        sigma: noise in the apical compartments of the hidden layers.
        sigma_output: the same for the output layer; None means sigma.
        tau_noise: the noise is an Ornstein-Uhlenbeck process of this time constant, added to `Q u`; None: white noise drives
            the apical compartment.
    """

    alpha: float
    k_p: float
    dt: float
    points: int
    tau: float
    leak: Leak = "code"
    proactive: bool = True
    instant_transmission: bool = True
    instant_system: bool = False
    tau_apical: float | None = None
    sigma: float = 0.0
    sigma_output: float | None = None
    tau_noise: float | None = None

    def __post_init__(self) -> None:
        positive = {"dt": self.dt, "tau": self.tau, "tau_apical": self.tau_apical, "tau_noise": self.tau_noise}
        for name, value in positive.items():
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be positive, got {value}")
        at_least_zero = {"alpha": self.alpha, "k_p": self.k_p, "sigma": self.sigma, "sigma_output": self.sigma_output}
        for name, value in at_least_zero.items():
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} must not be negative, got {value}")
        for name in ("tau", "tau_apical", "tau_noise"):
            value = getattr(self, name)
            if value is not None and value < self.dt:
                raise ConfigError(f"{name}={value} must not be smaller than the step dt={self.dt}")
        require_count("points", self.points, 2)
        if self.leak not in ("code", "paper"):
            raise ConfigError(f"leak must be 'code' or 'paper', got {self.leak!r}")

    @property
    def a(self) -> float:
        """Steady error per control, `e = a u`."""
        return self.alpha if self.leak == "code" else self.alpha / (1 + self.alpha * self.k_p)

    @property
    def kappa(self) -> float:
        """Fraction of the distance to its input that a potential covers per step."""
        return 1.0 if self.instant_system else self.dt / self.tau


class Moment(NamedTuple):
    """One time point, as deviations from the feed-forward state. The tensors are overwritten by the next step.

    Attributes:
        time: index of the point; 0 is the feed-forward state and is not visited.
        u: control (batch, n_L).
        e: output error of the previous point, to which this control responds.
        apical: feedback compartments, stage by stage (batch, *shape).
        basal: shift of the basal compartments `W r`, or None if not requested.
        d: shift of the potentials.
        rho: shift of the rates.
    """

    time: int
    u: Tensor
    e: Tensor
    apical: list[Tensor]
    basal: list[Tensor] | None
    d: list[Tensor]
    rho: list[Tensor]


def trajectory(
    chain: Chain,
    states: States,
    feedback: Sequence[Tensor],
    error: Callable[[Tensor], Tensor],
    loop: Loop,
    *,
    basal: bool = True,
    generator: torch.Generator | None = None,
) -> Iterator[Moment]:
    """Iterate over the controlled dynamics from the feed-forward state; T - 1 moments.

    Args:
        chain: the network.
        states: its feed-forward states.
        feedback: Q_i (n_i, n_L).
        error: shift of the output (batch, n_L) -> output error e; `delta - rho` for a target delta away.
        loop: the controller.
        basal: whether moments include the basal compartments, `W r` at the same instant.
        generator: of the noise; None draws from PyTorch's global state.

    Raises:
        InstabilityError: a potential or the control became NaN or infinite.
    """
    batch = len(states.r[0])
    last = len(chain.stages) - 1
    noisy = loop.sigma > 0 or bool(loop.sigma_output)
    plain = not noisy and loop.tau_apical is None  # the apical compartment is Q u
    d = [torch.zeros_like(v) for v in states.v]
    shifts = [_RateShift(stage, v, r, loop.kappa) for stage, v, r in zip(chain.stages, states.v, states.r[1:], strict=True)]
    rho = [torch.zeros_like(v) for v in states.v]
    below = [torch.zeros_like(v) for v in states.v]
    fed = [torch.zeros_like(v) for v in states.v]
    noise = [torch.zeros_like(v) for v in states.v]
    u = states.r[-1].new_zeros(batch, feedback[0].shape[1])
    integral = torch.zeros_like(u)
    sigmas = [loop.sigma if i < last or loop.sigma_output is None else loop.sigma_output for i in range(last + 1)]
    order = range(last + 1) if loop.instant_transmission else range(last, -1, -1)
    joint = [plain and not basal and stage.is_dense and not loop.instant_system for stage in chain.stages]
    forward, backward = [stage.layer.weight.mT for stage in chain.stages], [weights.mT for weights in feedback]
    for time in range(1, loop.points):
        e = error(rho[-1].flatten(1))
        integral = torch.add(integral, e, alpha=loop.dt).sub_(
            u if loop.leak == "code" else integral, alpha=loop.dt * loop.alpha
        )
        before, u = u, torch.add(integral, e, alpha=loop.k_p)
        seen = u if loop.proactive else before
        for i in order:
            if joint[i]:  # d <- (1 - kappa) d + kappa (W rho + Q u)
                d[i].addmm_(seen, backward[i], beta=1 - loop.kappa, alpha=loop.kappa)
                if i:
                    d[i].addmm_(rho[i - 1], forward[i], alpha=loop.kappa)
            else:
                if plain:
                    torch.mm(seen, backward[i], out=fed[i].view(batch, -1))
                else:
                    _apical_step(fed[i], noise[i], (seen @ backward[i]).view_as(fed[i]), sigmas[i], loop, generator)
                if i:
                    below[i] = chain.stages[i].linear(rho[i - 1])
                d[i].lerp_(below[i] + fed[i], loop.kappa)
            rho[i] = shifts[i](d[i])
        if basal and not loop.instant_transmission:  # compartments of the same instant
            below = [below[0], *(stage.linear(r) for stage, r in zip(chain.stages[1:], rho, strict=False))]
        if time % LOOK_EVERY == 0 or time == loop.points - 1:
            _look(u, d, loop, time)
        yield Moment(time, u, e, fed, below if basal else None, d, rho)


class _RateShift:
    """`phi(v + d) - phi(v)` of one stage, evaluated repeatedly at the same v.

    For tanh and the small d of weak control it is the series

        d (1 - r^2) [1 - r d + (r^2 - 1/3) d^2]

    to float32's last digit: three passes over d in a separate buffer, where the exact form needs two hyperbolic tangents.
    """

    def __init__(self, stage: Stage, v: Tensor, r: Tensor, kappa: float) -> None:
        self._plain = partial(difference, stage.activation, v, r)
        self._linear = isinstance(stage.activation, nn.Identity)
        self._tanh = isinstance(stage.activation, nn.Tanh) and v.is_cpu and v.dtype == torch.float32 and v.numel() > 0
        self._every = SELDOM if kappa <= 0.2 else 1  # a potential that jumps is checked before every step
        self._calls, self._small = 0, False
        if self._tanh:
            slope = 1 - r * r
            self._series = slope, -slope * r, slope * (r * r - 1 / 3)
            self._sum, self._rho = torch.empty_like(v), torch.empty_like(v)

    def __call__(self, d: Tensor) -> Tensor:
        """The shift (batch, *shape); the next call overwrites it."""
        if self._linear:
            return d
        if not self._tanh:
            return self._plain(d)
        if self._calls < 2 * SELDOM or self._calls % self._every == 0:
            low, high = torch.aminmax(d)
            self._small = max(-low.item(), high.item()) < SMALL
        self._calls += 1
        if not self._small:
            return self._plain(d)
        first, second, third = self._series
        torch.addcmul(second, third, d, out=self._sum)
        torch.addcmul(first, self._sum, d, out=self._sum)
        return torch.mul(self._sum, d, out=self._rho)


def _apical_step(
    fed: Tensor, noise: Tensor, control: Tensor, sigma: float, loop: Loop, generator: torch.Generator | None
) -> None:
    """Advance the apical compartment by one step, in place: filtered control and noise."""
    fresh = normal(fed, generator) if sigma else None
    if loop.tau_noise is not None:
        if fresh is not None:
            noise.mul_(1 - loop.dt / loop.tau_noise).add_(fresh, alpha=math.sqrt(loop.dt) / loop.tau_noise)
        torch.add(control, noise, alpha=sigma, out=fed)
        return
    tau = loop.tau_apical or loop.dt
    fed.lerp_(control, loop.dt / tau)
    if fresh is not None:
        fed.add_(fresh, alpha=sigma * math.sqrt(loop.dt) / tau)


def _look(u: Tensor, d: Sequence[Tensor], loop: Loop, time: int) -> None:
    if not (torch.isfinite(u).all() and all(torch.isfinite(each).all() for each in d)):
        raise InstabilityError(f"the controlled dynamics diverged within {time} steps of dt={loop.dt:g}, k_p={loop.k_p:g}")


def end(chain: Chain, moments: Iterator[Moment]) -> tuple[Moment, list[Tensor]]:
    """The last moment of a trajectory, and its basal shifts `W r` where the moments do not include them."""
    for moment in moments:
        last = moment
    if last.basal is not None:
        return last, last.basal
    shifts = [stage.linear(r) for stage, r in zip(chain.stages[1:], last.rho, strict=False)]
    return last, [torch.zeros_like(last.d[0]), *shifts]


class Trace(NamedTuple):
    """The compartments of every neuron over time: one sample's view of a trajectory, or a batch's.

    Attributes:
        times: (T,) in units of tau_u.
        u: control (T, batch, n_L).
        output: of the network (T, batch, n_L).
        soma, basal, apical: potentials, stage by stage (T, batch, n_i).
    """

    times: Tensor
    u: Tensor
    output: Tensor
    soma: list[Tensor]
    basal: list[Tensor]
    apical: list[Tensor]


def record(states: States, moments: Iterator[Moment], dt: float) -> Trace:
    """Record a whole trajectory (its moments must include the basal compartments)."""
    v, output = [each.flatten(1) for each in states.v], states.r[-1].flatten(1)
    u, rates = [], [output]
    soma, basal, apical = ([[each] for each in v], [[each] for each in v], [[torch.zeros_like(each)] for each in v])
    for moment in moments:
        u.append(moment.u.clone())
        rates.append(output + moment.rho[-1].flatten(1))
        for i, (each, shift) in enumerate(zip(v, moment.basal or (), strict=True)):
            soma[i].append(each + moment.d[i].flatten(1))
            basal[i].append(each + shift.flatten(1))
            apical[i].append(moment.apical[i].flatten(1).clone())
    stacked = [[torch.stack(each) for each in kind] for kind in (soma, basal, apical)]
    times = dt * torch.arange(len(rates), dtype=torch.float64)
    return Trace(times, torch.stack([torch.zeros_like(u[0]), *u]), torch.stack(rates), *stacked)


def correlation(loop: Loop, depth: int, rate: float = 0.0) -> float:
    """Correlation of apical noise with the control that responds to it, `depth` layers from the output.

    For noise of unit sigma in a chain of `depth` filters (the noisy layer and those above, with unit weights) the
    expectation over a trajectory of `v_fb[t] u[t+1]`, with opposite sign, from the impulse responses g of the compartment
    and w of the control: the mean over t of `sum_{j < t} g[j] w[j+1]`. The expected update of Q_i is this times J_i^T:
    valid if feedback has little effect within a trajectory (arXiv 2106.07887, section 5, in the released settings).

    Args:
        depth: filters from the compartment to the output.
        rate: of the low-pass filter whose output is subtracted from the control; 0 for none.
    """
    dt, kappa = loop.dt, loop.kappa
    rates = [0.0] * depth
    if loop.tau_noise is not None:
        kick, decay = math.sqrt(dt) / loop.tau_noise, 1 - dt / loop.tau_noise
    else:
        tau = loop.tau_apical or dt
        kick, decay = math.sqrt(dt) / tau, 1 - dt / tau
    compartment, integral, u, slow = 0.0, 0.0, 0.0, 0.0
    g, w = [], []
    for step in range(loop.points):
        e = -rates[-1]
        integral += dt * (e - loop.alpha * (u if loop.leak == "code" else integral))
        u = integral + loop.k_p * e
        compartment = kick if step == 0 else decay * compartment
        given = rates.copy()
        for i in range(depth):
            source = compartment if i == 0 else (rates if loop.instant_transmission else given)[i - 1]
            rates[i] += kappa * (source - rates[i])
        slow += rate * (u - slow)
        g.append(compartment)
        w.append(slow - u)
    lags = [g[j] * w[j + 1] for j in range(loop.points - 1)]
    partial, total = 0.0, 0.0
    for t in range(loop.points - 1):  # moments t = 0..T-2 carry the noise of steps 1..t
        total += partial
        partial += lags[t]
    return total / (loop.points - 1)
