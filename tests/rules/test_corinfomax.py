"""CorInfoMax against its equations (arXiv 2306.04810), written out sample by sample, and its exact identities."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical.core.losses import squared_error
from apical.diagnostics.alignment import angle
from apical.errors import ConfigError, UnsupportedModelError
from apical.rules.corinfomax import Layers

CIM = apical.CorInfoMax
SIZES = (6, 5, 4, 3)


def network(sizes: tuple[int, ...] = SIZES, *, bias: bool = False, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for given, size in pairwise(sizes):
        layers += [nn.Linear(given, size, bias=bias), nn.Hardtanh(0.0, 1.0)]
    return nn.Sequential(*layers).double()


def batch(size: int = 5, inputs: int = 6, outputs: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(size, inputs, dtype=torch.double, generator=generator), torch.arange(size) % outputs


def weights(rule: apical.CorInfoMax) -> list[Tensor]:
    return [stage.layer.weight.detach() for stage in rule.chain.stages]


# The slow form, one sample, column vectors.


def slow_phase(rule: apical.CorInfoMax, x: Tensor, u: list[Tensor], steps: int, beta: float, y: Tensor) -> list[Tensor]:
    wf, wb, b = weights(rule), [w.detach() for w in rule.backward], rule.inverses()
    eps, gamma, g, last = rule.epsilon, rule.gamma, rule.leak, len(wf) - 1
    u, r = [v.clone() for v in u], [v.clamp(0, 1) for v in u]
    for t in range(steps):
        mu = max(rule.step / (rule.step_decay * t + 1), rule.step_floor) if rule.step_decay else rule.step
        for k in range(last + 1):
            basal = wf[k] @ (x if k == 0 else r[k - 1])
            if k < last:
                apical_voltage = eps * (2 * gamma * b[k] @ r[k] + g * r[k]) + wb[k] @ r[k + 1]
                du = -g * u[k] + (basal - u[k]) / eps + (apical_voltage - u[k]) / eps
            else:
                apical_voltage = gamma * b[k] @ r[k] + g * r[k] - beta * (r[k] - y)
                du = -g * u[k] + (basal - u[k]) / eps + (apical_voltage - rule.output_leak * u[k])
            u[k] = u[k] + mu * du
            r[k] = u[k].clamp(0, 1)
    return r


def slow_step(rule: apical.CorInfoMax, beta: float) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Changes of forward and backward weights, for learning rates 1 / eps, and the new B."""
    x, labels = batch()
    wf, wb, b = weights(rule), [w.detach() for w in rule.backward], rule.inverses()
    forward, backward = [torch.zeros_like(w) for w in wf], [torch.zeros_like(w) for w in wb]
    moments = [torch.zeros_like(each) for each in b]
    for one, label in zip(x, labels, strict=True):
        y = F.one_hot(label, SIZES[-1]).double()
        free = slow_phase(rule, one, [torch.zeros(n).double() for n in SIZES[1:]], rule.free_steps, 0.0, y)
        nudged = slow_phase(rule, one, free, rule.nudged_steps, beta, y)
        for sign, r in ((1, nudged), (-1, free)):
            below = [one, *r]
            for k in range(len(wf)):
                forward[k] += sign / beta * torch.outer(r[k] - wf[k] @ below[k], below[k]) / len(x) / rule.epsilon
            for k in range(len(wb)):
                backward[k] += sign / beta * torch.outer(r[k] - wb[k] @ r[k + 1], r[k + 1]) / len(x) / rule.epsilon
        for k, each in enumerate(b):
            z = each @ nudged[k]
            moments[k] += torch.outer(z, z) / len(x)
    inverses = [(each - rule.gamma * moment) / rule.forgetting for each, moment in zip(b, moments, strict=True)]
    return forward, backward, inverses


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_a_step_is_that_of_the_equations(decay: float) -> None:
    rule = CIM(network(), nudge="one-sided", forgetting=0.9, step_decay=decay, step_floor=0.03, free_steps=9, nudged_steps=5)
    forward, backward, inverses = slow_step(rule, 1.0)
    rule(*batch()).backward()
    for stage, change in zip(rule.chain.stages, forward, strict=True):
        assert (stage.layer.weight.grad + change).abs().max() < 1e-12
        assert change.abs().max() > 1e-4
    for weight, change in zip(rule.backward, backward, strict=True):
        assert (weight.grad + change).abs().max() < 1e-12
    for own, slow in zip(rule.inverses(), inverses, strict=True):
        assert (own - slow).abs().max() < 1e-12


def test_a_bias_is_a_weight_from_a_unit_that_is_one() -> None:
    biased = CIM(network(bias=True), nudge="one-sided", free_steps=9, nudged_steps=5)
    for stage in biased.chain.stages:
        stage.layer.bias.data.uniform_(-0.2, 0.2)
    widened = CIM(network((7, 5, 4, 3)), nudge="one-sided", free_steps=9, nudged_steps=5)
    widened.load_state_dict(
        {
            name: torch.cat((biased.model[0].weight, biased.model[0].bias[:, None]), 1)
            if name == "model.0.weight"
            else value
            for name, value in biased.state_dict().items()
            if not name.endswith("bias")
        }
    )
    for k in (2, 4):
        biased.model[k].bias.data.zero_()
    x, y = batch()
    biased(x, y).backward()
    widened(torch.cat((x, torch.ones(len(x), 1).double()), 1), y).backward()
    expected = widened.model[0].weight.grad
    assert (biased.model[0].weight.grad - expected[:, :-1]).abs().max() < 1e-12
    assert (biased.model[0].bias.grad - expected[:, -1]).abs().max() < 1e-12


def field(rule: apical.CorInfoMax, x: Tensor, r: list[Tensor], beta: float, y: Tensor) -> list[Tensor]:
    """du / mu of one sample at u = r, all layers from the same state."""
    start = Layers([each[None] for each in r], [each[None] for each in r], [])
    found = []
    for k in range(len(r)):
        seen = rule.settle(x[None], start, 1, torch.tensor(beta).double(), y[None])
        found.append((seen.u[k][0] - r[k]) / rule.step)
    return found


def test_the_hidden_field_climbs_its_objective() -> None:
    """Hidden rows climb J_k; the output row climbs J_K - |r_K|^2 / 2, and J_K alone without the output's leak."""
    rule = CIM(network((6, 5, 3)), forgetting=0.999, step=1e-9)
    x, y = batch()[0][0], torch.tensor([0.0, 1.0, 0.0]).double()
    torch.manual_seed(2)
    r = [0.2 + 0.6 * torch.rand(n).double() for n in (5, 3)]
    (w1, w2), (wb,), (b1, b2) = weights(rule), [w.detach() for w in rule.backward], rule.inverses()
    eps, beta, gamma = rule.epsilon, 0.7, rule.gamma
    leaves = [each.clone().requires_grad_() for each in r]
    spread = [gamma * leaf @ b @ leaf for leaf, b in zip(leaves, (b1, b2), strict=True)]
    hidden = spread[0] - ((leaves[0] - w1 @ x).square().sum() + (leaves[0] - wb @ r[1]).square().sum()) / (2 * eps)
    output = spread[1] / 2 - (leaves[1] - w2 @ r[0]).square().sum() / (2 * eps) - beta / 2 * (y - leaves[1]).square().sum()
    for leak in (1.0, 0.0):
        rule.output_leak = leak
        own = field(rule, x, r, beta, y)
        assert (own[0] - torch.autograd.grad(hidden, leaves[0], retain_graph=True)[0]).abs().max() < 1e-6
        whole = output - leak / 2 * leaves[1].square().sum()
        assert (own[1] - torch.autograd.grad(whole, leaves[1], retain_graph=True)[0]).abs().max() < 1e-6


def test_lateral_weights_follow_the_inverse_correlation() -> None:
    rule = CIM(network(), forgetting=0.99, exact_inverse=True)
    r = [torch.rand(1, n).double() for n in SIZES[1:]]
    before = [b.clone() for b in rule.inverses()]
    rule._follow(r)
    for b, old, each in zip(rule.inverses(), before, r, strict=True):
        expected = torch.linalg.inv(0.99 * torch.linalg.inv(old) + 0.01 * each.T @ each)
        assert (b - expected).abs().max() < 1e-12
    approximate = CIM(network(), forgetting=1 - 1e-6)
    old = [b.clone() for b in approximate.inverses()]
    approximate._follow(r)
    for b, each, start in zip(approximate.inverses(), r, old, strict=True):
        small = approximate.gamma * float(each @ start @ each.T)
        expected = torch.linalg.inv((1 - 1e-6) * torch.linalg.inv(start) + 1e-6 * each.T @ each)
        assert (b - expected).abs().max() <= 2 * small * (b - start / approximate.forgetting).abs().max() + 1e-12


def test_lateral_weights_stay_symmetric_and_positive() -> None:
    rule = CIM(network(), forgetting=0.99)
    optimizer = torch.optim.SGD(rule.parameters(), 0.1)
    for _ in range(50):
        rule.zero_grad()
        rule(*batch()).backward()
        optimizer.step()
    for b in rule.inverses():
        assert (b - b.T).abs().max() < 1e-12 * b.abs().max()
        assert torch.linalg.eigvalsh(b).min() > -1e-12


def inside(rule: apical.CorInfoMax) -> None:
    """Weights so small and positive that every state lies within the box."""
    for stage in rule.chain.stages:
        stage.layer.weight.data = 0.1 + 0.05 * torch.rand_like(stage.layer.weight)
    for weight in rule.backward:
        weight.data = 0.05 + 0.05 * torch.rand_like(weight)


def test_the_leak_cancels_within_the_box() -> None:
    found = []
    for leak in (0.1, 0.5):
        rule = CIM(network(), leak=leak, free_steps=600)
        torch.manual_seed(3)
        inside(rule)
        found.append(rule._free(batch()[0]))
    assert all(float(r.detach().min()) > 0 and float(r.detach().max()) < 1 for r in found[0].r)
    for a, b in zip(found[0].r, found[1].r, strict=True):
        assert (a - b).abs().max() < 1e-9


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_one_layer_is_a_damped_delta_rule(beta: float) -> None:
    rule = CIM(network((6, 3)), nudge="one-sided", beta=beta, forgetting=1.0, free_steps=600, nudged_steps=600)
    rule.model[0].weight.data = 0.1 + 0.1 * torch.rand(3, 6).double()
    x, labels = batch()
    with torch.no_grad():
        free = rule._free(x).r[-1]
    rule(x, labels).backward()
    y = F.one_hot(labels, 3).double()
    expected = (y - free).T @ x / (1 / rule.epsilon + 1 + beta) / len(x) / rule.epsilon
    assert (rule.model[0].weight.grad + expected).abs().max() < 1e-10


def test_small_nudges_of_both_signs_agree() -> None:
    def found(beta: float, nudge: str) -> Tensor:
        rule = CIM(network(), nudge=nudge, beta=beta, forgetting=1.0, free_steps=900, nudged_steps=900)
        torch.manual_seed(3)
        inside(rule)
        rule(*batch()).backward()
        return torch.cat([stage.layer.weight.grad.flatten() for stage in rule.chain.stages])

    limit = found(1e-4, "symmetric")
    gaps = [(found(beta, "one-sided") - limit).norm() / limit.norm() for beta in (0.2, 0.1)]
    assert gaps[0] < 0.1
    assert float(gaps[0] / gaps[1]) == pytest.approx(2.0, rel=0.25)


def test_tied_weights_have_an_energy_and_its_gradient() -> None:
    """The field is the gradient of V, and the Hebbian contrast of r_k r_{k-1} / (eps beta) that of the squared error."""
    rule = CIM(network(), step=1e-9, forgetting=0.999)
    torch.manual_seed(3)
    inside(rule)
    for k, weight in enumerate(rule.backward):
        weight.data = rule.chain.stages[k + 1].layer.weight.detach().T.clone()
    x, label = batch()[0][0], torch.tensor(1)
    y, w, b, eps, beta = F.one_hot(label, 3).double(), weights(rule), rule.inverses(), rule.epsilon, 0.6
    torch.manual_seed(4)
    r = [0.2 + 0.5 * torch.rand(n).double() for n in SIZES[1:]]
    leaves = [each.clone().requires_grad_() for each in r]
    below = [x, *leaves]
    value = sum((leaves[k] @ w[k] @ below[k] for k in range(3)), torch.zeros(())) / eps
    value = value - sum((leaf.square().sum() for leaf in leaves[:-1]), torch.zeros(())) / eps
    value = value - (1 / (2 * eps) + 0.5) * leaves[-1].square().sum() - beta / 2 * (y - leaves[-1]).square().sum()
    value = value + sum(
        (rule.gamma * leaf @ each @ leaf for leaf, each in zip(leaves[:-1], b, strict=False)), torch.zeros(())
    )
    value = value + rule.gamma / 2 * leaves[-1] @ b[-1] @ leaves[-1]
    for own, expected in zip(field(rule, x, r, beta, y), torch.autograd.grad(value, leaves), strict=True):
        assert (own - expected).abs().max() < 1e-6

    rule.step, rule.free_steps = 0.05, 3000
    small, tied = 1e-4, rule.chain.stages[1].layer.weight

    def settled(push: float) -> list[Tensor]:
        with torch.no_grad():
            free = rule._free(x[None])
            return rule.settle(x[None], free, 3000, torch.tensor(push).double(), y[None]).r

    plus, minus = settled(small), settled(-small)
    hebbian = -(plus[1].T @ plus[0] - minus[1].T @ minus[0]) / (2 * small * eps)
    for i, j in ((0, 0), (2, 3)):
        losses = []
        for sign in (1, -1):
            tied.data[i, j] += sign * 1e-5
            rule.backward[0].data[j, i] += sign * 1e-5
            with torch.no_grad():
                losses.append(float((y - rule._free(x[None]).r[-1]).square().sum() / 2))
            tied.data[i, j] -= sign * 1e-5
            rule.backward[0].data[j, i] -= sign * 1e-5
        assert float(hebbian[i, j]) == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-4)


def test_no_label_no_learning() -> None:
    rule = CIM(network(), squared_error, nudge="one-sided", forgetting=1.0, free_steps=2000)
    x, _ = batch()
    with torch.no_grad():
        answer = rule.answer(x)
    rule(x, answer).backward()
    assert max(float(p.grad.abs().max()) for p in rule.parameters()) < 1e-9


def test_the_angle_between_both_ways() -> None:
    rule = CIM(network())
    own = rule.feedback_weights()["2"]
    a, b = rule.backward[0].detach().T, rule.model[2].weight.detach()
    cosine = (a * b).sum() / (a.norm() * b.norm())
    assert angle(own, rule.model[2].weight) == pytest.approx(float(torch.rad2deg(torch.acos(cosine))), rel=1e-9)
    assert angle(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])) == pytest.approx(90.0)


def test_the_sparse_form_has_a_multiplier_in_place_of_the_bound() -> None:
    rule = CIM(network(), nudge="one-sided", sparse=(0.3, 0.2, 0.1), forgetting=1.0, free_steps=1)
    x, _ = batch()
    start = Layers(
        [torch.rand(5, n).double() for n in SIZES[1:]],
        [torch.rand(5, n).double() for n in SIZES[1:]],
        [torch.rand(5, 1).double() for _ in SIZES[1:]],
    )
    plain = CIM(rule.model, forgetting=1.0)
    plain.load_state_dict(rule.state_dict())
    with torch.no_grad():
        moved, without = rule.settle(x, start, 1), plain.settle(x, start, 1)
    assert (moved.u[0] - (without.u[0] - rule.step * start.multiplier[0])).abs().max() < 1e-12
    assert torch.equal(moved.r[0], moved.u[0].clamp_min(0))
    inner = start.multiplier[0] + 0.3 * (-start.multiplier[0] + moved.r[0].sum(1, keepdim=True) - 1 + start.multiplier[0])
    assert (moved.multiplier[0] - inner).abs().max() < 1e-12


def slow_sparse_phase(
    rule: apical.CorInfoMax, x: Tensor, u: list[Tensor], price: list[float], steps: int, beta: float, y: Tensor
) -> tuple[list[Tensor], list[float]]:
    """Appendix E, one sample: Lambda = ReLU(Lambda'), and Lambda' <- Lambda' + eta (-Lambda' + sum r - 1 + Lambda)."""
    wf, wb, b = weights(rule), [w.detach() for w in rule.backward], rule.inverses()
    eps, gamma, g, last = rule.epsilon, rule.gamma, rule.leak, len(wf) - 1
    u, r, inner = [v.clone() for v in u], [v.clamp_min(0) for v in u], list(price)
    for _ in range(steps):
        for k in range(last + 1):
            multiplier = max(inner[k], 0.0)
            basal = wf[k] @ (x if k == 0 else r[k - 1])
            if k < last:
                voltage = eps * (2 * gamma * b[k] @ r[k] + g * r[k] - multiplier) + wb[k] @ r[k + 1]
                du = -g * u[k] + (basal - u[k]) / eps + (voltage - u[k]) / eps
            else:
                voltage = gamma * b[k] @ r[k] + g * r[k] - multiplier - beta * (r[k] - y)
                du = -g * u[k] + (basal - u[k]) / eps + (voltage - rule.output_leak * u[k])
            u[k] = u[k] + rule.step * du
            r[k] = u[k].clamp_min(0)
            inner[k] = inner[k] + rule.sparse[k] * (-inner[k] + float(r[k].sum()) - 1 + multiplier)
    return r, inner


def test_the_sparse_form_keeps_what_lies_below_its_multiplier() -> None:
    """Lambda' sinks below zero while a layer is quiet, and has to come back before the multiplier acts."""
    rule = CIM(network(), nudge="one-sided", sparse=(0.3, 0.2, 0.5), forgetting=0.9, free_steps=25, nudged_steps=6)
    for stage in rule.chain.stages:
        stage.layer.weight.data.mul_(1.7).abs_()
    x, labels = batch()
    with torch.no_grad():
        free = rule._free(x)
        y = F.one_hot(labels, 3).double()
        nudged = rule.settle(x, Layers(list(free.r), list(free.r), list(free.multiplier)), 6, x.new_ones(()), y)
    signs = set()
    for i, one in enumerate(x):
        zeros = [torch.zeros(n).double() for n in SIZES[1:]]
        r, inner = slow_sparse_phase(rule, one, zeros, [0.0, 0.0, 0.0], 25, 0.0, y[i])
        for k in range(3):
            assert (free.r[k][i] - r[k]).abs().max() < 1e-12
            assert abs(float(free.multiplier[k][i]) - inner[k]) < 1e-12
            signs.add(inner[k] < 0)
        r, inner = slow_sparse_phase(rule, one, r, inner, 6, 1.0, y[i])
        for k in range(3):
            assert (nudged.r[k][i] - r[k]).abs().max() < 1e-12
            assert abs(float(nudged.multiplier[k][i]) - inner[k]) < 1e-12
    assert signs == {True, False}  # both of them happen


def test_what_lies_below_the_multiplier_is_forgotten_at_its_own_rate() -> None:
    """A layer that is silent for ever: Lambda' = -1 + (1 + Lambda'_0)(1 - eta)^t, where it is negative."""
    rule = CIM(network(), sparse=(0.3, 0.2, 0.1))
    for stage in rule.chain.stages:
        stage.layer.weight.data.zero_()
    for back in rule.backward:
        back.data.zero_()
    with torch.no_grad():
        free = rule.settle(batch()[0], rule._free(batch()[0][:, :]), 0)
    for eta, multiplier in zip(rule.sparse, free.multiplier, strict=True):
        assert (multiplier + 1 - (1 - eta) ** rule.free_steps).abs().max() < 1e-12


def test_what_is_learned_and_what_is_followed() -> None:
    rule = CIM(network())
    before = [b.clone() for b in rule.inverses()]
    rule.eval()
    rule(*batch())
    assert all(torch.equal(a, b) for a, b in zip(before, rule.inverses(), strict=True))
    rule.train()
    rule(*batch())
    assert not any(torch.equal(a, b) for a, b in zip(before, rule.inverses(), strict=True))
    assert set(rule.feedback_weights()) == {"2", "4"}
    rated = CIM(network(), nudge="one-sided", rates=(2.0, 1.0, 1.0), backward_rates=(0.5, 1.0))
    plain = CIM(network(), nudge="one-sided", rates=(1.0, 1.0, 1.0), backward_rates=(1.0, 1.0))
    for each in (rated, plain):
        each(*batch()).backward()
    assert (rated.model[0].weight.grad - 2 * plain.model[0].weight.grad).abs().max() < 1e-14
    assert (rated.backward[0].grad - 0.5 * plain.backward[0].grad).abs().max() < 1e-14


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"beta": 0.0}, "beta"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"step": -1.0}, "step"),
        ({"forgetting": 0.0}, "forgetting"),
        ({"free_steps": 0}, "steps"),
        ({"nudged_steps": 2.5}, "nudged_steps must be a whole number"),
        ({"nudge": "both"}, "nudge"),
        ({"rates": (1.0,)}, "rates"),
        ({"backward_rates": (1.0,)}, "backward_rates"),
        ({"sparse": (1.0,)}, "sparse"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        CIM(network(), **options)


def test_models_that_have_no_box_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'0' \(Tanh\)"):
        CIM(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)))
    with pytest.raises(UnsupportedModelError):
        CIM(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2)))


def test_samples_of_several_axes_are_refused() -> None:
    rule = apical.CorInfoMax(nn.Sequential(nn.Linear(6, 5), nn.Hardtanh(0.0, 1.0), nn.Linear(5, 4)))
    with pytest.raises(UnsupportedModelError, match=r"takes inputs of shape"):
        rule(torch.rand(2, 3, 6), torch.tensor([0, 1]))


def test_a_loss_of_ones_own_gets_its_targets_as_they_are() -> None:
    """One output for each sample: a loss that squeezes it is given (batch,), the dynamics (batch, 1)."""
    inputs, numbers = batch()[0], torch.rand(5, dtype=torch.double)
    updates = []
    for loss, targets in (
        (lambda o, t: F.binary_cross_entropy(o.squeeze(1), t), numbers),
        (lambda o, t: F.mse_loss(o.flatten(), t), numbers),
        (F.mse_loss, numbers),
        (F.mse_loss, numbers.unsqueeze(1)),
    ):
        rule = CIM(network((6, 5, 1)), loss, nudge="symmetric", generator=torch.Generator().manual_seed(3))
        credit = rule(inputs, targets)
        torch.testing.assert_close(
            credit.loss.detach(), loss(credit.output, targets.view(5, 1) if loss is F.mse_loss else targets)
        )
        credit.backward()
        updates.append([p.grad for p in rule.parameters()])
    for update in updates[1:]:
        torch.testing.assert_close(update, updates[0])
