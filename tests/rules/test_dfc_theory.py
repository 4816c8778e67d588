"""What deep feedback control computes: minimum-norm and Gauss-Newton updates, and what its feedback rule learns."""

import math

import dfc_reference as ref
import pytest
import torch
from test_dfc import batch, gradients, wished
from torch import Tensor, nn

from apical import DeepFeedbackControl
from apical.diagnostics.gauss_newton import gauss_newton_update, minimum_norm_update
from apical.rules.feedback_control.states import mean_jacobian, output_jacobian
from apical.rules.feedback_control.trajectory import Loop, correlation, trajectory

NUDGE = 1e-6  # so weak that the network is linear


def degrees(ours: list[Tensor], theirs: list[Tensor]) -> float:
    a, b = (torch.cat([each.flatten() for each in update]) for update in (ours, theirs))
    return math.degrees(math.acos(min(1.0, float(a @ b / (a.norm() * b.norm())))))


def equal_norms(seed: int = 0) -> tuple[nn.Sequential, ref.Net, Tensor, Tensor]:
    """A tanh network and one sample on which every layer's input has norm 1: biases put each v_i^- where it must be."""
    model, net = ref.mlp((6, 8, 7, 4), nn.Tanh(), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    rates = [torch.nn.functional.normalize(torch.randn(n, generator=generator).double(), dim=0) for n in (6, 8, 7)]
    with torch.no_grad():
        for section, below, above in zip(net, rates, rates[1:], strict=False):
            section.affine.bias.copy_(torch.atanh(above) - section.affine.weight @ below)
    return model, net, rates[0].unsqueeze(0), torch.tensor([2])


def learned(model: nn.Module, feedback: list[Tensor], inputs: Tensor, targets: Tensor) -> list[Tensor]:
    """The change DFC-SSA asks for with the given Q, alpha -> 0, compared by voltages."""
    rule = DeepFeedbackControl(model, variant="ssa", alpha=1e-9, nudge=NUDGE, difference="voltage", learn="none")
    with torch.no_grad():
        for q, new in zip(rule.feedback, feedback, strict=True):
            q.copy_(new)
    return [-gradient for gradient in gradients(rule, inputs, targets)]


def dense_minimum_norm(net: ref.Net, x: Tensor, delta: Tensor) -> list[Tensor]:
    """`dv = J^+ delta`, `dW_i = dv_i r_{i-1}^T`."""
    _, r = ref.feed_forward(net, x)
    blocks = ref.jacobian(net, x)
    moved = (torch.linalg.pinv(torch.cat(blocks, 1)) @ delta).split([block.shape[1] for block in blocks])
    return [change for dv, rate in zip(moved, r, strict=False) for change in (torch.outer(dv, rate), dv)]


def dense_gauss_newton(net: ref.Net, x: Tensor, delta: Tensor) -> list[Tensor]:
    """`J_W^+ delta` over all weights and biases."""
    parameters = [p for section in net for p in section.affine.parameters()]

    def output(*values: Tensor) -> Tensor:
        r, rest = x, list(values)
        for section in net:
            weight, bias = rest.pop(0), rest.pop(0)
            r = section.phi(weight @ r + bias)
        return r

    parts = torch.autograd.functional.jacobian(output, tuple(parameters))
    flat = torch.linalg.pinv(torch.cat([part.flatten(1) for part in parts], 1)) @ delta
    pieces = flat.split([p.numel() for p in parameters])
    return [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]


def optimal_feedbacks(blocks: list[Tensor]) -> dict[str, list[Tensor]]:
    """J^T, J^+ and J^T M for a positive definite M: all have the columns of Condition 2."""
    whole, sizes = torch.cat(blocks, 1), [block.shape[1] for block in blocks]
    mixed = torch.randn(len(whole), len(whole), generator=torch.Generator().manual_seed(3)).double()
    m = mixed @ mixed.T + torch.eye(len(whole))
    matrices = {"transpose": whole.T, "pseudo-inverse": torch.linalg.pinv(whole), "mixed": whole.T @ m}
    return {name: list(q.split(sizes)) for name, q in matrices.items()}


def test_condition_two_makes_the_minimum_norm_update() -> None:
    model, net = ref.mlp((6, 8, 7, 4), nn.Tanh())
    inputs, targets = batch((6,), 4, size=1)
    delta = wished(net, inputs, targets, NUDGE)
    expected = dense_minimum_norm(net, inputs[0], delta[0])
    updates = {q: learned(model, w, inputs, targets) for q, w in optimal_feedbacks(ref.jacobian(net, inputs[0])).items()}
    for update in updates.values():
        assert degrees(update, expected) < 0.01
        for change, other in zip(update, updates["transpose"], strict=True):
            torch.testing.assert_close(change, other, rtol=1e-5, atol=0)
    rule = DeepFeedbackControl(model, variant="ssa")
    diagnosed = minimum_norm_update(rule.chain, inputs, delta, 1e-12, "voltage")
    assert degrees(updates["mixed"], list(diagnosed.values())) < 0.01
    torch.manual_seed(0)
    wrong = [q + 0.5 * torch.randn_like(q) for q in optimal_feedbacks(ref.jacobian(net, inputs[0]))["transpose"]]
    assert degrees(learned(model, wrong, inputs, targets), expected) > 5


def test_equal_layer_norms_make_it_gauss_newton() -> None:
    model, net, inputs, targets = equal_norms()
    delta = wished(net, inputs, targets, NUDGE)
    for feedback in optimal_feedbacks(ref.jacobian(net, inputs[0])).values():
        update = learned(model, feedback, inputs, targets)
        assert degrees(update, dense_gauss_newton(net, inputs[0], delta[0])) < 0.01
        assert degrees(update, list(gauss_newton_update(model, inputs, delta, 0.0).values())) < 0.01
    inputs = 4 * inputs  # Condition 1 no longer holds, Condition 2 does
    delta = wished(net, inputs, targets, NUDGE)
    update = learned(model, optimal_feedbacks(ref.jacobian(net, inputs[0]))["transpose"], inputs, targets)
    assert degrees(update, dense_minimum_norm(net, inputs[0], delta[0])) < 0.01
    assert degrees(update, dense_gauss_newton(net, inputs[0], delta[0])) > 5


def open_loop_correlation(loop: Loop, depth: int) -> float:
    """Minus the mean over t < T - 1 of `E[v_fb[t] u[t+1]]`, one noise kick at a time, in a chain of unit weights.

    Independent kicks of variance 1 add their products; feedback acts on nothing, u only listens.
    """

    def kicked(at: int) -> tuple[list[float], list[float]]:
        noise, apical, integral, u = 0.0, [0.0], 0.0, [0.0]
        v = [0.0] * depth
        for t in range(1, loop.points):
            e = -v[-1]
            integral += loop.dt * (e - loop.alpha * (u[-1] if loop.leak == "code" else integral))
            u.append(integral + loop.k_p * e)
            xi = math.sqrt(loop.dt) if t == at else 0.0
            tau = loop.tau_noise or loop.tau_apical or loop.dt
            noise = (1 - loop.dt / tau) * noise + xi / tau
            apical.append(noise)
            old = list(v)
            for i in range(depth):
                given = apical[-1] if i == 0 else (v if loop.instant_transmission else old)[i - 1]
                v[i] = old[i] + loop.dt / loop.tau * (given - old[i])
        return apical, u

    total = 0.0
    for at in range(1, loop.points):
        apical, u = kicked(at)
        total += sum(a * b for a, b in zip(apical[:-1], u[1:], strict=True))
    return -total / (loop.points - 1)


NOISES = {
    "filtered": {"tau_apical": 0.3},
    "white": {},
    "added": {"tau_noise": 0.04},
}


@pytest.mark.parametrize("leak", ["code", "paper"])
@pytest.mark.parametrize("instant", [True, False])
@pytest.mark.parametrize("noise", NOISES)
def test_correlation_constants_are_those_of_the_open_loop(noise: str, instant: bool, leak: str) -> None:
    loop = Loop(0.4, 0.3, 0.02, 17, 0.05, leak, False, instant, sigma=0.01, **NOISES[noise])
    constants = [correlation(loop, depth) for depth in (1, 2, 3)]
    assert constants == pytest.approx([open_loop_correlation(loop, depth) for depth in (1, 2, 3)], rel=1e-12)
    assert constants[0] > 0


@pytest.mark.parametrize("noise", NOISES)
def test_noise_correlates_with_control_through_the_jacobian(noise: str) -> None:
    """Each sample of a large batch is a draw: the mean of `v_fb[t] u[t+1]^T` lies along J^T and has the predicted length."""
    model, net = ref.mlp((4, 5, 5, 3), nn.Tanh())
    x = torch.randn(4, generator=torch.Generator().manual_seed(0)).double()
    rule = DeepFeedbackControl(model)
    loop = Loop(0.4, 0.3, 0.02, 13, 0.02, "code", False, sigma=1e-3, **NOISES[noise])
    torch.manual_seed(0)
    with torch.no_grad():
        states = rule.run(x.expand(20000, 4))
        sums, before = [torch.zeros_like(q) for q in rule.q], [torch.zeros_like(v) for v in states.v]
        for moment in trajectory(rule.chain, states, [0.01 * q for q in rule.q], torch.neg, loop, basal=False):
            for total, apical in zip(sums, before, strict=True):
                total += apical.T @ moment.u / (len(moment.u) * (loop.points - 1))
            before = [each.clone() for each in moment.apical]
    for depth, (seen, block) in enumerate(zip(reversed(sums), reversed(ref.jacobian(net, x)), strict=True), 1):
        expected = -correlation(loop, depth) * loop.sigma**2 * block.T
        assert float(torch.cosine_similarity(seen.flatten(), expected.flatten(), dim=0)) > 0.95
        assert float((seen * expected).sum() / expected.square().sum()) == pytest.approx(1, abs=0.05)


def test_sampled_feedback_updates_average_to_the_expected_one() -> None:
    model, _ = ref.mlp((4, 5, 5, 3), nn.Tanh())
    inputs, targets = batch((4,), 3, size=4)
    many = inputs.repeat(5000, 1), targets.repeat(5000)
    options = {"learn_output": True, "points_fb": 12, "dt_fb": 0.01, "tau_fb": 0.01, "sigma_fb": 5e-3}
    updates = []
    for learn in ("expected", "noise"):
        torch.manual_seed(0)
        rule = DeepFeedbackControl(model, learn=learn, **options)
        rule.phase = "feedback"
        with torch.no_grad():
            for q in rule.feedback:
                q.mul_(0.05)  # what feedback does within a trajectory is not in the expectation
        rule(*many).backward()
        updates.append([q.grad for q in rule.feedback])
    for expected, sampled in zip(*updates, strict=True):
        assert float(torch.cosine_similarity(sampled.flatten(), expected.flatten(), dim=0)) > 0.95
        assert float((sampled * expected).sum() / expected.square().sum()) == pytest.approx(1, abs=0.05)


def test_expected_update_descends_towards_the_transposed_jacobian() -> None:
    """Gradient of Q_i = - c_i sigma^2 / max(sigma, 0.01)^2 times the batch mean of J_i^T."""
    model, net = ref.mlp((4, 5, 5, 3), nn.Tanh())
    inputs, targets = batch((4,), 3, size=5)
    for sigma in (5e-3, 0.05):
        rule = DeepFeedbackControl(model, learn_output=True, sigma_fb=sigma, variant="ssa")
        rule(inputs, targets).backward()
        blocks = [torch.stack(block).mean(0) for block in zip(*(ref.jacobian(net, x) for x in inputs), strict=True)]
        for depth, (q, block) in enumerate(zip(reversed(rule.feedback), reversed(blocks), strict=True), 1):
            strength = open_loop_correlation(rule.sleep, depth) * sigma**2 / max(sigma, 0.01) ** 2
            torch.testing.assert_close(q.grad, -strength * block.T, rtol=1e-9, atol=0)


@pytest.mark.parametrize("widths", [(4, 6, 3, 9), (4, 9)])
def test_jacobian_and_its_mean(widths: tuple[int, ...]) -> None:
    """Through the narrower layer below a wide linear output, or plainly: the mean is the mean."""
    for output in (None, nn.Tanh()):
        model, net = ref.mlp(widths, nn.Tanh(), output)
        inputs, _ = batch((4,), 2, size=5)
        rule = DeepFeedbackControl(model)
        with torch.no_grad():
            states = rule.run(inputs)
            single, mean = output_jacobian(rule.chain, states), mean_jacobian(rule.chain, states)
        for i, blocks in enumerate(zip(*(ref.jacobian(net, x) for x in inputs), strict=True)):
            torch.testing.assert_close(single[i], torch.stack(blocks), rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(mean[i], torch.stack(blocks).mean(0), rtol=1e-12, atol=1e-14)


def test_jacobian_of_convolutions() -> None:
    model, net = ref.conv_net()
    inputs, _ = batch((2, 6, 6), 2, size=2)
    rule = DeepFeedbackControl(model, input_shape=(2, 6, 6))
    with torch.no_grad():
        ours = output_jacobian(rule.chain, rule.run(inputs))
    for i, blocks in enumerate(zip(*(ref.jacobian(net, x) for x in inputs), strict=True)):
        torch.testing.assert_close(ours[i], torch.stack(blocks), rtol=1e-12, atol=1e-14)


def test_layer_normalised_rates_descend_the_loss() -> None:
    """Proposition 4: with rates eta / ||r_{i-1}||^2 every stable feedback keeps within 90 degrees of the gradient."""
    stable = 0
    for seed in range(30):
        model, net = ref.mlp((6, 8, 7, 4), nn.Tanh(), bias=False, seed=seed)
        inputs, targets = batch((6,), 4, size=1, seed=seed)
        torch.manual_seed(seed)
        noisy = [block.T + 0.5 * torch.randn_like(block.T) for block in ref.jacobian(net, inputs[0])]
        gain = sum(block @ q for block, q in zip(ref.jacobian(net, inputs[0]), noisy, strict=True))
        if float(torch.linalg.eigvals(gain).real.min()) <= 0:
            continue
        stable += 1
        changes = learned(model, noisy, inputs, targets)
        loss = nn.functional.cross_entropy(model(inputs), targets)
        steepest = torch.autograd.grad(loss, list(model.parameters()))
        rates = [float(r.square().sum()) for r in ref.feed_forward(net, inputs[0])[1][:-1]]
        assert sum(float((c * g).sum()) / n for c, g, n in zip(changes, steepest, rates, strict=True)) < 0
    assert stable > 10
