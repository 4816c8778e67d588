"""The stability matrices against autograd through the equations of motion, and the advice against simulations."""

import cmath
import itertools
import math
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev

from apical.core.chain import Chain
from apical.diagnostics.feedback_conditions import condition_three, control_matrix
from apical.diagnostics.stability import (
    advice,
    largest_real_part,
    largest_stable_dt,
    loop_matrix,
    loop_step,
    reduced_eigenvalues,
    scalar_modes,
    spectral_radius,
    step_matrix,
    system_matrix,
)
from apical.errors import ConfigError
from apical.rules.feedback_control.states import loop_gains, output_jacobian

SIZES = (6, 5, 4, 3)
LEAKS = ["code", "paper"]
TWO_WAYS = list(itertools.product(LEAKS, [0.0, 1.5]))


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


def net(last: nn.Module | None = None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(SIZES):
        layers += [nn.Linear(n_in, n_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1], *([] if last is None else [last]))


def random_feedback() -> list[Tensor]:
    return [torch.randn(n, SIZES[-1]) for n in SIZES[1:]]


def row_space_feedback(model: nn.Sequential) -> list[Tensor]:
    """Q_i = W_{i+1}^T ... W_L^T, for which J Q is near J J^T."""
    q = [torch.eye(SIZES[-1])]
    for layer in model[:0:-1]:
        if isinstance(layer, nn.Linear):
            q.insert(0, layer.weight.detach().T @ q[0])
    return q


def forward(model: nn.Sequential, x: Tensor, v: list[Tensor]) -> list[Tensor]:
    """W_i phi(v_{i-1}) + b_i of each layer, for given potentials of all layers."""
    rates = [x, *(torch.tanh(part) for part in v[:-1])]
    return [layer(r) for layer, r in zip([m for m in model if isinstance(m, nn.Linear)], rates, strict=True)]


def rest(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    v: list[Tensor] = []
    for i in range(len(SIZES) - 1):
        v.append(forward(model, x, [*v, *[torch.zeros(n) for n in SIZES[1 + i :]]])[i].detach())
    return v


@pytest.mark.parametrize("last", [None, nn.Tanh()], ids=["linear output", "tanh output"])
@pytest.mark.parametrize(("leak", "k_p"), TWO_WAYS)
def test_system_matrix_is_the_jacobian_of_the_equations_of_motion(last: nn.Module | None, leak: str, k_p: float) -> None:
    model, feedback = net(last), random_feedback()
    alpha, tau = 0.3, 0.2
    xs = torch.randn(2, SIZES[0])
    phi = torch.tanh if last is not None else (lambda v: v)

    def motion(state: Tensor, x: Tensor) -> Tensor:
        *v, u_int = state.split([*SIZES[1:], SIZES[-1]])
        e = phi(rest(model, x)[-1]) - phi(v[-1])
        u = u_int + k_p * e
        dv = [(-a + b + q @ u) / tau for a, b, q in zip(v, forward(model, x, v), feedback, strict=True)]
        return torch.cat([*dv, e - alpha * (u if leak == "code" else u_int)])

    chain = Chain(model)
    got = system_matrix(chain, chain.run(xs), feedback, alpha=alpha, k_p=k_p, tau=tau, leak=leak)
    for x, matrix in zip(xs, got, strict=True):
        at_rest = torch.cat([*rest(model, x), torch.zeros(SIZES[-1])])
        assert motion(at_rest, x).norm() < 1e-13  # an equilibrium
        assert torch.allclose(matrix, jacrev(motion)(at_rest, x), atol=1e-12)


@pytest.mark.parametrize("proactive", [True, False])
@pytest.mark.parametrize("instant_transmission", [True, False])
@pytest.mark.parametrize(("leak", "k_p"), TWO_WAYS)
def test_step_matrix_is_the_jacobian_of_one_step(leak: str, k_p: float, proactive: bool, instant_transmission: bool) -> None:
    model, feedback = net(), random_feedback()
    alpha, tau, dt = 0.3, 0.2, 0.05
    xs = torch.randn(2, SIZES[0])
    layers = [m for m in model if isinstance(m, nn.Linear)]

    def step(state: Tensor, x: Tensor) -> Tensor:
        *v, u_int, u = state.split([*SIZES[1:], SIZES[-1], SIZES[-1]])
        e = rest(model, x)[-1] - v[-1]
        new_int = u_int + dt * (e - alpha * (u if leak == "code" else u_int))
        new_u = new_int + k_p * e
        new: list[Tensor] = []
        below = x
        for i, layer in enumerate(layers):
            new.append(v[i] + dt / tau * (layer(below) + feedback[i] @ (new_u if proactive else u) - v[i]))
            below = torch.tanh(new[i] if instant_transmission else v[i])
        return torch.cat([*new, new_int, new_u])

    chain = Chain(model)
    options = {"proactive": proactive, "instant_transmission": instant_transmission}
    got = step_matrix(chain, chain.run(xs), feedback, alpha=alpha, k_p=k_p, dt=dt, tau=tau, leak=leak, **options)
    for x, matrix in zip(xs, got, strict=True):
        at_rest = torch.cat([*rest(model, x), torch.zeros(2 * SIZES[-1])])
        assert torch.allclose(matrix, jacrev(step)(at_rest, x), atol=1e-12)


def test_matrices_of_a_convolutional_chain() -> None:
    """J = C (I - S)^-1: the blocks of the system matrix give back the Jacobian, average pooling included."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 2))
    chain = Chain(model, (1, 6, 6))
    states = chain.run(torch.randn(2, 1, 6, 6))
    feedback = [torch.zeros(stage.size, 2) for stage in chain.stages]
    matrix = system_matrix(chain, states, feedback, alpha=0.1, k_p=0.0, tau=1.0)
    neurons = 32 + 2
    readout, network = -matrix[:, neurons:, :neurons], -matrix[:, :neurons, :neurons]
    assert torch.allclose(readout @ torch.linalg.inv(network), torch.cat(output_jacobian(chain, states), 2), atol=1e-12)


@pytest.mark.parametrize(("leak", "k_p"), TWO_WAYS)
def test_reduced_eigenvalues_are_the_slow_ones_of_the_whole_matrix(leak: str, k_p: float) -> None:
    """The distance is proportional to tau."""
    model = net()
    chain, feedback = Chain(model), row_space_feedback(model)
    states = chain.run(torch.randn(1, SIZES[0]))
    mu = torch.linalg.eigvals(control_matrix(output_jacobian(chain, states), feedback))[0]
    reduced = reduced_eigenvalues(mu, 0.2, k_p, leak)
    errors = []
    for tau in (1e-4, 1e-5):
        matrix = system_matrix(chain, states, feedback, alpha=0.2, k_p=k_p, tau=tau, leak=leak)[0]
        full = torch.linalg.eigvals(matrix)
        slow = full[full.abs().argsort()][: SIZES[-1]]
        errors.append(max(float((slow - value).abs().min()) for value in reduced))
    assert errors[0] < 0.01
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.05)


def test_reduced_eigenvalues_by_hand() -> None:
    """mu = 2 + i, k_p = 3: 1 + k_p mu = 7 + 3i, so (2.5 + i)/(7 + 3i) = (20.5 - 0.5i)/58 and mu/(7 + 3i) = (17 + i)/58."""
    mu = torch.tensor([2 + 1j])
    assert reduced_eigenvalues(mu, 0.5, 3, "code").item() == pytest.approx(-(20.5 - 0.5j) / 58)
    assert reduced_eigenvalues(mu, 0.5, 3, "paper").item() == pytest.approx(-((17 + 1j) / 58 + 0.5))
    for leak in LEAKS:  # without proportional gain the two leaks are one
        assert reduced_eigenvalues(mu, 0.5, 0, leak).item() == pytest.approx(-(2.5 + 1j))


def test_simulation_diverges_exactly_where_condition_three_ends() -> None:
    """k_p = 0 and a network that follows at once (tau -> 0), linear: 1 % of leak decides."""
    weights = [torch.randn(n_out, n_in) / math.sqrt(n_in) for n_in, n_out in itertools.pairwise(SIZES)]
    model = nn.Sequential(*[nn.Linear(n_in, n_out) for n_in, n_out in itertools.pairwise(SIZES)])
    for layer, weight in zip(model, weights, strict=True):
        layer.weight.data.copy_(weight)
    chain, feedback = Chain(model), random_feedback()
    jacobian = output_jacobian(chain, chain.run(torch.randn(1, SIZES[0])))
    edge = -float(condition_three(jacobian, feedback, 0.0))
    assert edge > 0.1  # this Q needs a leak

    def control_after(alpha: float) -> float:
        u, dt = torch.zeros(SIZES[-1]), 2e-3
        for _ in range(20_000):
            shift = torch.zeros(SIZES[0])
            for weight, q in zip(weights, feedback, strict=True):
                shift = weight @ shift + q @ u
            u = u + dt * (torch.tensor([0.1, -0.1, 0.2]) - shift - alpha * u)
        return float(u.norm())

    mu = torch.linalg.eigvals(control_matrix(jacobian, feedback))[0]
    for factor, stable in ((1.1, True), (0.9, False)):
        assert bool((reduced_eigenvalues(mu, factor * edge, 0.0).real < 0).all()) is stable
        assert (control_after(factor * edge) < 50) is stable


def simulate(mu: complex, depth: int, *, alpha: float, k_p: float, dt: float, tau: float, leak: str, steps: int) -> float:
    """|u| after some steps of one scalar mode from a disturbance: `depth` filters in a row, mu/depth of feedback each."""
    x, integral, u = [0j] * depth, 1 + 0j, 1 + 0j
    for _ in range(steps):
        e = -x[-1]
        integral += dt * (e - alpha * (u if leak == "code" else integral))
        u = integral + k_p * e
        below = 0j
        for i in range(depth):
            x[i] += dt / tau * (below + mu / depth * u - x[i])
            below = x[i]
        if not cmath.isfinite(u) or abs(u) > 1e30:
            return math.inf
    return max(abs(u), *(abs(value) for value in x))


CASES = [(3.0, 1, 0.0), (3.0, 1, 2.0), (3.0, 3, 2.0), (2 + 2j, 2, 1.0), (5.0, 4, 0.5)]


@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize(("mu", "depth", "k_p"), CASES)
def test_largest_stable_dt(mu: complex, depth: int, k_p: float, leak: str) -> None:
    """Below it the mode decays, above it grows; where it is tau, it decays at tau."""
    loop = {"alpha": 0.01, "k_p": k_p, "tau": 0.2, "leak": leak}
    limit = largest_stable_dt(scalar_modes(torch.tensor([mu]), depth), **loop)
    assert 0 < limit <= 0.2
    assert simulate(mu, depth, dt=0.98 * limit, steps=20_000, **loop) < 1e-3
    if limit < 0.2:
        assert simulate(mu, depth, dt=1.03 * limit, steps=20_000, **loop) > 1e3


def test_largest_stable_dt_of_one_layer_under_proportional_control() -> None:
    """v' = v - (dt/tau)(1 + k_p mu) v is stable for dt < 2 tau/(1 + k_p mu); the integral is too slow to matter."""
    tau, k_p, mu = 1e-3, 8.0, 3.0  # a slow controller: tau_u = 1000 tau
    assert largest_stable_dt(scalar_modes(torch.tensor([mu]), 1), alpha=0, k_p=k_p, tau=tau) == pytest.approx(
        2 * tau / 25, rel=3e-3
    )


def contained(few: Tensor, many: Tensor) -> float:
    """Largest distance from an eigenvalue in `few` to its nearest one in `many`."""
    return max(float((many - value).abs().min()) for value in few)


@pytest.mark.parametrize("last", [None, nn.Tanh()], ids=["linear output", "tanh output"])
@pytest.mark.parametrize(("leak", "k_p"), TWO_WAYS)
def test_the_loop_in_output_space_has_the_eigenvalues_of_the_whole(last: nn.Module | None, leak: str, k_p: float) -> None:
    """All but the network's own (-1/tau; 1 - dt/tau, and 0 for the remembered u), which the controller cannot move."""
    model, feedback = net(last), random_feedback()
    chain = Chain(model)
    states = chain.run(torch.randn(2, SIZES[0]))
    gains = torch.stack(loop_gains(output_jacobian(chain, states), feedback), 1).detach()
    loop = {"alpha": 0.2, "k_p": k_p, "tau": 0.3, "leak": leak}
    pairs = [(loop_matrix(gains, **loop), system_matrix(chain, states, feedback, **loop), [-1 / 0.3])]
    loop["dt"] = 0.05
    pairs += [(loop_step(gains, **loop), step_matrix(chain, states, feedback, **loop), [1 - 0.05 / 0.3, 0.0])]
    for small, whole, own in pairs:
        for few, many in zip(torch.linalg.eigvals(small), torch.linalg.eigvals(whole), strict=True):
            moved = many[torch.stack([(many - value).abs() for value in own]).amin(0) > 0.05]
            assert len(moved) >= 6  # an n_L-fold pole of the network spreads by round-off; these do not
            assert contained(moved, few) < 1e-8
            assert contained(few[torch.stack([(few - value).abs() for value in own]).amin(0) > 0.05], many) < 1e-8


@pytest.mark.parametrize("leak", LEAKS)
def test_the_largest_stable_dt_is_that_of_the_whole_loop(leak: str) -> None:
    model = net()
    chain, feedback = Chain(model), row_space_feedback(model)
    states = chain.run(torch.randn(1, SIZES[0]))
    gains = torch.stack(loop_gains(output_jacobian(chain, states), feedback), 1).detach()
    loop = {"alpha": 0.1, "k_p": 5.0, "tau": 0.3, "leak": leak}
    limit = largest_stable_dt(gains, **loop)
    assert 0 < limit < 0.3
    assert spectral_radius(step_matrix(chain, states, feedback, dt=0.995 * limit, **loop)).item() < 1
    assert spectral_radius(step_matrix(chain, states, feedback, dt=1.005 * limit, **loop)).item() > 1
    assert largest_real_part(system_matrix(chain, states, feedback, **loop)).item() < 0


def modes(*mu: float) -> Tensor:
    return torch.diag(torch.tensor(mu))[None]


def number(pattern: str, sentence: str | None) -> float:
    assert sentence is not None
    found = re.search(pattern + r" ([-0-9.e]+[0-9])", sentence)
    assert found, sentence
    return float(found[1])


HEALTHY = {"depth": 3, "alpha": 0.01, "k_p": 1.5, "dt": 0.005, "tau": 0.2}


@pytest.mark.parametrize("leak", LEAKS)
def test_no_advice_for_a_healthy_loop(leak: str) -> None:
    assert advice(modes(3.0, 4.0, 6.0), **HEALTHY, leak=leak) is None


@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize("k_p", [0.0, 1.5])
def test_advice_on_feedback_that_violates_condition_three(k_p: float, leak: str) -> None:
    """With the leak just above the one it names the loop settles, just below it does not."""
    jq = torch.cat([modes(3.0, 4.0), modes(-0.2, 4.0)])
    loop = HEALTHY | {"k_p": k_p}
    sentence = advice(jq, **loop, leak=leak)
    assert sentence is not None
    assert "Condition 3 is violated in 1 of 2 samples" in sentence
    assert "retrain the feedback weights" in sentence
    needed = number("raise alpha above", sentence)
    assert advice(jq, **(loop | {"alpha": 1.01 * needed}), leak=leak) is None
    assert "Condition 3" in str(advice(jq, **(loop | {"alpha": 0.99 * needed}), leak=leak))


@pytest.mark.parametrize("leak", LEAKS)
def test_advice_on_a_step_too_large(leak: str) -> None:
    loop = HEALTHY | {"dt": 0.2}
    sentence = advice(modes(3.0, 6.0), **loop, leak=leak)
    limit = number("the largest stable dt is about", sentence)
    assert limit < 0.2
    assert advice(modes(3.0, 6.0), **(loop | {"dt": 0.99 * limit}), leak=leak) is None
    options = {"alpha": 0.01, "k_p": 1.5, "tau": 0.2, "leak": leak, "steps": 20_000}
    assert simulate(6.0, 3, dt=0.98 * limit, **options) < 1
    assert simulate(6.0, 3, dt=1.03 * limit, **options) > 1e3


def test_advice_on_a_gain_that_no_step_can_save() -> None:
    """All feedback at the lowest of three layers: 1 + k_p mu/(1 + tau s)^3 = 0 crosses at k_p mu = 8, mu = 3."""
    lowest = [modes(3.0), modes(0.0), modes(0.0)]
    loop = HEALTHY | {"alpha": 0.0, "k_p": 20.0, "dt": 1e-4, "tau": 1e-3}  # tau so small that the integral does not matter
    sentence = advice(modes(3.0), **loop, by_layer=lowest)
    assert "for every dt" in str(sentence)
    assert number("lower k_p = 20 below about", sentence) == pytest.approx(8 / 3, rel=0.01)
    assert "raise" not in str(sentence)
    assert advice(modes(3.0), **(loop | {"k_p": 2.6}), by_layer=lowest) is None
    assert "every dt" not in str(advice(modes(3.0), **loop))  # the guess of even shares does not see it


@pytest.mark.parametrize("leak", LEAKS)
def test_advice_on_a_network_too_slow_for_its_controller(leak: str) -> None:
    """Integral control alone over four slow layers: each remedy alone helps, half of it does not."""
    loop = {"depth": 4, "alpha": 0.0, "k_p": 0.0, "dt": 1e-3, "tau": 2.0, "leak": leak}
    sentence = advice(modes(5.0), **loop)
    tau = number("lower tau = 2 below about", sentence)
    assert advice(modes(5.0), **(loop | {"tau": 0.98 * tau})) is None
    assert advice(modes(5.0), **(loop | {"tau": 1.03 * tau})) is not None
    gain = number("raise k_p = 0 to about", sentence)
    assert advice(modes(5.0), **(loop | {"k_p": 1.01 * gain})) is None
    assert "for every dt" in str(advice(modes(5.0), **(loop | {"k_p": 0.5 * gain})))


def test_advice_on_other_parameters() -> None:
    assert "choose dt <= tau" in str(advice(modes(3.0), **(HEALTHY | {"dt": 0.3})))
    sentence = advice(modes(-2.0, 1.0), **HEALTHY)
    assert "proportional gain alone" in str(sentence)
    assert number("lower k_p = 1.5 below", sentence) == pytest.approx(1 / 2)
    assert "J Q is not finite" in str(advice(modes(math.nan), **HEALTHY))


CALLS: list[Callable[[], object]] = [
    lambda: advice(modes(1.0), **HEALTHY, leak="codes"),  # type: ignore[arg-type]
    lambda: reduced_eigenvalues(torch.ones(1), 0.1, 0.0, "codes"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("call", CALLS)
def test_an_unknown_leak_is_refused(call: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match="unknown leak 'codes'; did you mean 'code'"):
        call()


def test_times_must_be_positive() -> None:
    with pytest.raises(ConfigError, match=r"must be positive; got depth 3, dt 0, tau 0\.2"):
        advice(modes(1.0), **(HEALTHY | {"dt": 0.0}))
