"""A chain of layers under feedback control: its steady states, solved in the space of the outputs.

    tau_v dv_i/dt = -v_i + W_i phi(v_{i-1}) + b_i + Q_i u,   u = u_int + k_p e,   tau_u du_int/dt = e - alpha u

At rest `e = a u`, so n_L numbers per sample determine the state. With J = d r_L / d v at the feed-forward state and
M = J Q (n_L x n_L), the linearised steady state is `u = (M + a I)^-1 delta` for a target `delta` away from the
feed-forward output; the exact one solves `rho_L(u) + a u = delta`, where rho_L is the output's shift in a forward pass
with `Q_i u` added to every layer (Meulemans et al., arXiv 2106.07887, Lemma 1).

All quantities are deviations from the feed-forward state, which keeps float32 accurate even for weak control.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from apical.core.activations import derivative, difference
from apical.core.chain import Chain, Stage, States
from apical.core.noise import initial
from apical.rules.feedback_control.trajectory import Loop

WIDE = 64
"""Number of outputs from which the solver uses the narrower layer below, where the feedback permits it."""


CACHE = 2**19
"""Bytes of one stage's Jacobian rows processed at a time: half of a core's second-level cache."""

NEWTON_STEPS = 40
"""Maximum number of Newton steps."""

HALVINGS = 12
"""Number of halvings of a step before its sample is given up."""


class Controlled(NamedTuple):
    """A controlled state minus the feed-forward one; one tensor (batch, *shape) per stage.

    Attributes:
        q: apical input, `Q_i u`.
        d: shift of the potential v.
        rho: shift of the rate r.
    """

    q: list[Tensor]
    d: list[Tensor]
    rho: list[Tensor]


def slopes(chain: Chain, states: States) -> list[Tensor]:
    """`phi'(v_i)` of every stage."""
    return [derivative(stage.activation, v, r) for stage, v, r in zip(chain.stages, states.v, states.r[1:], strict=True)]


def output_jacobian(chain: Chain, states: States, stages: int | None = None) -> list[Tensor]:
    """`R_i = d r_k / d v_i` of the stages i up to k, (batch, n_k, n_i): one large product per layer.

    Args:
        stages: k; None means L, the output.
    """
    part = chain.stages[:stages]
    gains = [
        derivative(stage.activation, v, r).flatten(1) for stage, v, r in zip(part, states.v, states.r[1:], strict=False)
    ]
    *_, last = part
    jacobian = [torch.diag_embed(gains[-1])]  # R_k = diag(phi'(v_k)): (batch, n_k, n_k)
    for i in range(len(part) - 2, -1, -1):
        # R_i = R_{i+1} W_{i+1} diag(phi'(v_i)): (batch, n_k, n_{i+1}) -> (batch, n_k, n_i)
        above, gain, rows = part[i + 1], gains[i].unsqueeze(1), jacobian[-1]
        if above is last and above.is_dense:  # a diagonal times W_L: no product needed
            rows = above.layer.weight * gain
            if not is_linear(above):
                rows.mul_(gains[-1].unsqueeze(-1))
        else:
            pulled = above.transposed(rows.reshape(-1, above.size))  # W^T on batch n_k rows together
            rows = pulled.view(len(gain), -1, part[i].size).mul_(gain)
        jacobian.append(rows)
    return jacobian[::-1]


def is_linear(stage: Stage) -> bool:
    """Whether the stage's activation is the identity."""
    return isinstance(stage.activation, nn.Identity)


def mean_jacobian(chain: Chain, states: States) -> list[Tensor]:
    """Batch mean of `d r_L / d v_i` of every stage, (n_L, n_i).

    A wide linear output is the same matrix W_L for every sample, so the rows are those of the layer below.
    """
    *lower, last = chain.stages
    if lower and is_linear(last) and last.is_dense and lower[-1].size < last.size:
        below = [last.layer.weight @ rows.mean(0) for rows in output_jacobian(chain, states, len(lower))]
        return [*below, torch.eye(last.size, dtype=below[0].dtype, device=below[0].device)]
    return gain_and_mean(chain, states, None)[1]


def product_feedback(chain: Chain) -> list[Tensor]:
    """`Q_L = I, Q_i = W_{i+1}^T ... W_L^T` (n_i, n_L): J^T of the network with its activations left out."""
    weight = chain.weights[-1]
    rows = torch.eye(chain.stages[-1].size, dtype=weight.dtype, device=weight.device)
    feedback = [rows.T.contiguous()]  # Q_L
    with torch.no_grad():
        for above in chain.stages[:0:-1]:
            rows = above.transposed(rows)  # (n_L, n_i): W_L ... W_{i+1}
            feedback.append(rows.T.contiguous())
    return feedback[::-1]


def random_feedback(chain: Chain, generator: torch.Generator | None = None) -> list[Tensor]:
    """`Q_L = I`, the others Xavier-normal (n_i, n_L)."""
    weight = chain.weights[-1]
    n = chain.stages[-1].size
    hidden = [initial(nn.init.xavier_normal_, (stage.size, n), weight.detach(), generator) for stage in chain.stages[:-1]]
    return [*hidden, torch.eye(n, dtype=weight.dtype, device=weight.device)]


def loop_gains(jacobian: Sequence[Tensor], feedback: Sequence[Tensor]) -> list[Tensor]:
    """`M_i = J_i Q_i` of every stage, (batch, n_L, n_L)."""
    gains = []
    for rows, weights in zip(jacobian[:-1], feedback[:-1], strict=True):
        # (R_i Q_i)^T for all samples in one product: (n_L, n_i) (n_i, batch n_L); several times faster than R Q
        turned = weights.T @ rows.reshape(-1, rows.shape[-1]).T
        gains.append(turned.view(-1, *rows.shape[:2]).permute(1, 2, 0))  # (n_L, batch, n_L) -> (batch, n_L, n_L)
    return [*gains, jacobian[-1].diagonal(dim1=1, dim2=2).unsqueeze(-1) * feedback[-1]]  # J_L is diagonal


def loop_gain(chain: Chain, states: States, feedback: Sequence[Tensor]) -> Tensor:
    """`M = sum_i M_i = J Q`, (batch, n_L, n_L): the response of the outputs to control, propagated forward.

    Cheaper than through the R_i, since it avoids their products with the Q_i.
    """
    pushes = [weights.T.contiguous() for weights in feedback]  # unit controls, one by one: (n_L, n_i)
    parts = [responses(chain.stages, slopes(chain, part), pushes).mT for part in parts_in_cache(chain, states)]
    return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()


def responses(stages: Sequence[Stage], gains: Sequence[Tensor], pushes: Sequence[Tensor]) -> Tensor:
    """Linear response of the last stage's rates (batch, k, n) to k controls, at the slopes `gains` (batch, *shape).

    Args:
        pushes: what each control adds to the potentials of every stage, (k, n_i), the same for all samples.
    """
    rows = pushes[0] * gains[0].flatten(1).unsqueeze(1)
    for stage, gain, push in zip(stages[1:], gains[1:], pushes[1:], strict=True):
        # S_i = D_i (W_i S_{i-1} + Q_i): (batch k, n_{i-1}) -> (batch, k, n_i)
        below = stage.linear(rows.reshape(-1, *stage.input_shape))
        rows = below.reshape(len(gain), -1, stage.size).add_(push)
        if not is_linear(stage):
            rows.mul_(gain.flatten(1).unsqueeze(1))
    return rows


def gain_and_mean(chain: Chain, states: States, feedback: Sequence[Tensor] | None) -> tuple[Tensor | None, list[Tensor]]:
    """M, if there is feedback, and the batch mean of the R_i, from one set of R_i."""
    gains: list[Tensor] = []
    sums: list[Tensor] = []
    for part in parts_in_cache(chain, states):
        jacobian = output_jacobian(chain, part)
        if feedback is not None:
            first, *others = loop_gains(jacobian, feedback)
            gains.append(sum(others, first))
        added = [rows.sum(0) for rows in jacobian]
        sums = [a + b for a, b in zip(sums, added, strict=True)] if sums else added
    return torch.cat(gains) if gains else None, [rows / len(states.r[0]) for rows in sums]


def parts_in_cache(chain: Chain, states: States) -> Iterator[States]:
    """Split the batch on a CPU into parts whose Jacobian fits the cache, which saves a quarter of the time."""
    size = _cached_samples(chain, states)
    for first in range(0, max(1, len(states.r[0])), size):
        part = slice(first, first + size)
        yield States([v[part] for v in states.v], [r[part] for r in states.r])


def _cached_samples(chain: Chain, states: States) -> int:
    """Number of samples whose rows R_i of two stages fit into half a megabyte, in parts of similar size; all on a GPU."""
    output, batch = states.r[-1], len(states.r[0])
    if not output.is_cpu or torch.compiler.is_compiling():
        return batch
    widest = max(stage.size for stage in chain.stages)
    fit = max(1, CACHE // (chain.stages[-1].size * widest * output.element_size()))
    return math.ceil(batch / max(1, math.ceil(batch / fit))) or 1


def apical(chain: Chain, feedback: Sequence[Tensor], u: Tensor) -> list[Tensor]:
    """`Q_i u` of every stage, (batch, *shape), for the control u (batch, n_L)."""
    return [(u @ q.T).view(len(u), *stage.shape) for stage, q in zip(chain.stages, feedback, strict=True)]


def controlled_pass(chain: Chain, states: States, pushes: Sequence[Tensor]) -> Controlled:
    """The forward pass with `pushes[i]` (batch, *shape) added to every potential, as a shift of the feed-forward one."""
    state = Controlled(list(pushes), [], [])
    for i, (stage, push) in enumerate(zip(chain.stages, pushes, strict=True)):
        state.d.append(stage.linear(state.rho[-1], push) if i else push)  # d_i = W_i rho_{i-1} + Q_i u
        state.rho.append(difference(stage.activation, states.v[i], states.r[i + 1], state.d[-1]))  # phi(v + d) - phi(v)
    return state


def controlled_states(states: States, state: Controlled) -> States:
    """The states themselves under control."""
    v = [before + d for before, d in zip(states.v, state.d, strict=True)]
    return States(v, [states.r[0], *(before + rho for before, rho in zip(states.r[1:], state.rho, strict=True))])


def linear_pass(chain: Chain, gains: Sequence[Tensor], pushes: Sequence[Tensor]) -> list[Tensor]:
    """Linear response of the rates to `pushes` on the potentials, at the slopes `gains`; as many stages as pushes."""
    responses: list[Tensor] = []
    for stage, gain, push in zip(chain.stages, gains, pushes, strict=False):
        responses.append(gain * (stage.linear(responses[-1], push) if responses else push))
    return responses


class Resolvent:
    """`(M + a I)^-1` of one batch, factored once.

    Args:
        states: where the slopes are taken.
        a: steady error per control, `e = a u`.
        gain: M (batch, n_L, n_L), if known.
    """

    def __init__(
        self, chain: Chain, states: States, feedback: Sequence[Tensor], a: float, gain: Tensor | None = None
    ) -> None:
        self.chain, self.states, self.feedback, self.a = chain, states, feedback, a
        gain = loop_gain(chain, states, feedback) if gain is None else gain
        eye = torch.eye(gain.shape[-1], dtype=gain.dtype, device=gain.device)
        self._factors = torch.linalg.lu_factor_ex(gain + a * eye)[:2]  # a singular matrix shows in the solution

    def solve(self, rhs: Tensor) -> Tensor:
        """`(M + a I)^-1 rhs`; both (batch, n_L)."""
        solution: Tensor = torch.linalg.lu_solve(*self._factors, rhs.unsqueeze(-1))
        return solution.squeeze(-1)

    def by_depth(self, u: Tensor) -> Tensor:
        """`sum_i (L - i + 1) M_i u`, in one linear pass: the delay of control to the output, in layers; (batch, n_L)."""
        depth = len(self.chain.stages)
        pushes = [(depth - i) * push for i, push in enumerate(apical(self.chain, self.feedback, u))]
        return linear_pass(self.chain, slopes(self.chain, self.states), pushes)[-1].flatten(1)


class WideResolvent(Resolvent):
    """The same for a wide linear output with Q_L = I, through the narrower layer below (Woodbury).

    `M + a I = (1 + a) I + W_L S`, where S is the response of r_{L-1} to u. `K = S W_L` is propagated by its columns: the
    response to control along each column of W_L. Cost n_{L-1} passes instead of n_L, and smaller matrices.
    """

    def __init__(self, chain: Chain, states: States, feedback: Sequence[Tensor], a: float) -> None:
        self.chain, self.states, self.feedback, self.a = chain, states, feedback, a
        self.gains = slopes(chain, states)[:-1]
        *lower, last = chain.stages
        pushes = [(weights @ last.layer.weight).T for weights in feedback[:-1]]  # control W_L e_k: (n_{L-1}, n_i)
        kernel = responses(lower, self.gains, pushes).mT.contiguous()  # (1 + a) I + S W_L: (batch, n_{L-1}, n_{L-1})
        kernel.diagonal(dim1=1, dim2=2).add_(1 + a)
        self._factors = torch.linalg.lu_factor_ex(kernel)[:2]

    def solve(self, rhs: Tensor) -> Tensor:
        """`(M + a I)^-1 rhs`; both (batch, n_L)."""
        pushes = [rhs @ q.T for q in self.feedback[:-1]]
        shift = linear_pass(self.chain, self.gains, pushes)[-1]  # S rhs: (batch, n_{L-1})
        inner: Tensor = torch.linalg.lu_solve(*self._factors, shift.unsqueeze(-1)).squeeze(-1)
        return (rhs - inner @ self.chain.weights[-1].T) / (1 + self.a)  # Woodbury


def goes_below(chain: Chain, feedback: Sequence[Tensor]) -> bool:
    """Whether :class:`WideResolvent` applies: dense stages, wide linear output, and Q_L frozen at the identity.

    Never inside compiled graphs, which cannot inspect Q_L.
    """
    *lower, last = chain.stages
    if last.size < WIDE or not lower or lower[-1].size > last.size or not all(stage.is_dense for stage in chain.stages):
        return False
    if not is_linear(last) or feedback[-1].requires_grad or torch.compiler.is_compiling():  # no graph depends on values
        return False
    return torch.equal(feedback[-1], torch.eye(last.size, dtype=feedback[-1].dtype, device=feedback[-1].device))


def steady_state(
    chain: Chain, states: States, feedback: Sequence[Tensor], delta: Tensor, resolvent: Resolvent, iterations: int
) -> tuple[Tensor, Controlled, Tensor]:
    """The steady state for a target `delta` (batch, n_L) away from the output, by chord Newton from the linearised one.

    Args:
        iterations: of Newton; 0 leaves the linearised control (DFC-SSA), 2 reach about 1e-10 of delta for weak nudging.

    Returns:
        The control u (batch, n_L), the state it leads to, and the residual `rho_L + a u - delta` there.
    """
    u = resolvent.solve(delta)  # linearised: (M + a I) u = delta
    state = controlled_pass(chain, states, apical(chain, feedback, u))
    for _ in range(iterations):
        # chord Newton: the slope stays that of the feed-forward state
        u = u - resolvent.solve(state.rho[-1].flatten(1) + resolvent.a * u - delta)
        state = controlled_pass(chain, states, apical(chain, feedback, u))
    return u, state, state.rho[-1].flatten(1) + resolvent.a * u - delta


def soma_minus_basal(chain: Chain, states: States, state: Controlled, q: Sequence[Tensor]) -> list[Tensor]:
    """`phi(v_i) - phi(v_i - q_i)` at the controlled potentials: the rate minus the prediction of the layer below."""
    if q[0] is state.d[0]:  # only control moves the first layer
        return [state.rho[0], *_soma_minus_basal(chain, states, state, q, 1)]
    return _soma_minus_basal(chain, states, state, q, 0)


def _soma_minus_basal(chain: Chain, states: States, state: Controlled, q: Sequence[Tensor], first: int) -> list[Tensor]:
    return [
        difference(chain.stages[i].activation, states.v[i] + state.d[i], states.r[i + 1] + state.rho[i], -q[i]).neg_()
        for i in range(first, len(q))
    ]


def time_averaged(
    chain: Chain, feedback: Sequence[Tensor], state: Controlled, resolvent: Resolvent, u: Tensor, loop: Loop
) -> list[Tensor]:
    """Soma minus basal potential of every stage, averaged over a whole simulation of weak control, without simulating it.

    For a small target the discrete loop (instant transmission, proactive) is linear. Summed over time, with kappa = dt/tau
    and T points, it gives, except for what has not settled after T points,

        S = (M + a I)^-1 [ (1 - kappa)/kappa sum_i (L - i + 1) M_i - w I ] u
        q_i = Q_i (u + S/T) - (1 - kappa)/(kappa T) d_i

    Args:
        state: the steady state, with the shifts d_i.
        u: its control (batch, n_L).
        loop: the controller; w is its :func:`wind_up`.
    """
    lag = (1 - loop.kappa) / loop.kappa
    summed = resolvent.solve(lag * resolvent.by_depth(u) - wind_up(loop) * u)
    pushes = apical(chain, feedback, u + summed / loop.points)
    return [torch.sub(q, d, alpha=lag / loop.points) for q, d in zip(pushes, state.d, strict=True)]


def wind_up(loop: Loop) -> float:
    """Steps times dt that the integral part takes to its steady value, per control.

    With the leak on the whole control it is `(1 - k_p alpha)/dt`; with the leak on the integral alone, from the same sum,
    `alpha^2 k_p / (1 + alpha k_p)^2 + 1/(dt (1 + alpha k_p)^2)`.
    """
    alpha, k_p, dt = loop.alpha, loop.k_p, loop.dt
    if loop.leak == "code":
        return (1 - k_p * alpha) / dt
    return (alpha**2 * k_p + 1 / dt) / (1 + alpha * k_p) ** 2


@torch.no_grad()
def control_matrix(jacobian: Sequence[Tensor], feedback: Iterable[Tensor]) -> Tensor:
    """`J Q = sum_i J_i Q_i`: (batch, n_L, n_L), of blocks J_i (batch, n_L, n_i) and Q_i (n_i, n_L)."""
    blocks = (block @ weight.detach() for block, weight in zip(jacobian, feedback, strict=True))
    return sum(blocks, jacobian[0].new_zeros(()))


@torch.no_grad()
def condition_two(jacobian: Sequence[Tensor], feedback: Iterable[Tensor]) -> Tensor:
    """Share of Q in the row space of J, `|P Q| / |Q|` (Frobenius): (batch,), 1 where Condition 2 holds.

    `|P Q|^2 = tr(M^T (J J^T)^+ M)` with M = J Q, so only n_L x n_L matrices are inverted.

    Args:
        jacobian: J_i = d r_L / d v_i, each (batch, n_L, n_i).
        feedback: Q_i, each (n_i, n_L).
    """
    feedback = list(feedback)
    product = control_matrix(jacobian, feedback)
    gram = gram_matrix(jacobian)
    inside = (product * (torch.linalg.pinv(gram, hermitian=True) @ product)).sum((1, 2))
    size = sum((weight.square().sum() for weight in feedback), gram.new_zeros(()))
    share: Tensor = (inside / size).sqrt()
    return share


def gram_matrix(jacobian: Sequence[Tensor]) -> Tensor:
    """`J J^T`: (batch, n_L, n_L)."""
    return sum((block @ block.mT for block in jacobian), jacobian[0].new_zeros(()))


def settle(
    chain: Chain,
    states: States,
    feedback: Sequence[Tensor],
    delta: Tensor,
    u: Tensor,
    slope: Callable[[States], Resolvent],
    a: float,
    tolerance: float,
) -> Tensor:
    """Control (batch, n_L) at the steady state by damped Newton's method, where a few chord steps do not reach it.

        F(u) = rho_L(u) + a u - delta = 0,   F'(u) = M(u) + a I,   M = J Q at the controlled state

    Every step uses the slope at the present control, and the fraction 1, 1/2, 1/4, ... for which `|F|` of its sample falls.
    Return the nearest control found; nothing is raised.

    Args:
        states: the feed-forward states.
        delta: how far the target lies from the output (batch, n_L).
        u: initial control; a sample that is farther from its target than without control starts from zero.
        slope: `(M + a I)^-1` at given states.
        a: steady error per control.
        tolerance: of `|F|`, relative to `|delta|`.
    """

    def at(u: Tensor) -> tuple[Controlled, Tensor, Tensor]:
        state = controlled_pass(chain, states, apical(chain, feedback, u))
        miss = state.rho[-1].flatten(1) + a * u - delta  # F(u): (batch, n_L)
        return state, miss, miss.norm(dim=1)

    start = delta.norm(dim=1)
    # |F(0)| = |delta|: samples farther than that start without control
    u = torch.where((at(u)[2] < start).unsqueeze(1), u, 0.0)
    state, miss, size = at(u)
    for _ in range(NEWTON_STEPS):
        done = size <= tolerance * start
        if bool(done.all()):
            break
        step = slope(controlled_states(states, state)).solve(-miss)  # (M(u) + a I) step = -F(u)
        step = step.where(step.isfinite().all(1, keepdim=True), 0.0)
        stride, taken = torch.where(done, 0.0, 1.0).to(u), done  # (batch,)
        for _ in range(HALVINGS):
            # Armijo: a sufficient part of the predicted decrease
            taken = taken | (at(u + stride.unsqueeze(1) * step)[2] < (1 - 1e-4 * stride) * size)
            if bool(taken.all()):
                break
            stride = torch.where(taken, stride, stride / 2)
        stride = torch.where(taken, stride, 0.0)
        if not bool(stride.any()):
            break
        u = u + stride.unsqueeze(1) * step
        state, miss, size = at(u)
    return u
