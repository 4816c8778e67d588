"""Target propagation against its equations (arXiv 2006.14331), written out with autograd and loops, and its limits."""

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical.core.chain import Chain
from apical.core.losses import output_error
from apical.diagnostics.gauss_newton import gauss_newton_targets
from apical.errors import ConfigError, UnsupportedModelError
from apical.rules.target_propagation.difference_target_propagation import Mapped

TP = apical.DifferenceTargetPropagation
VARIANTS = ("dtp", "drl", "linear", "hidden", "control", "lee")
KINDS = [({"variant": name}) for name in VARIANTS] + [{"variant": "hidden", "recurrent": True}]
SIZES = (6, 5, 7, 4, 3)


def network(activation: type[nn.Module] = nn.Tanh, sizes: tuple[int, ...] = SIZES) -> nn.Sequential:
    layers: list[nn.Module] = []
    for given, size in pairwise(sizes):
        layers += [nn.Linear(given, size), activation()]
    return nn.Sequential(*layers[:-1]).double()


def batch(size: int = 9) -> tuple[Tensor, Tensor]:
    return torch.randn(size, SIZES[0], dtype=torch.double), torch.arange(size) % SIZES[-1]


def made(variant: str, seed: int = 0, **options: object) -> apical.DifferenceTargetPropagation:
    torch.manual_seed(seed)
    rule = TP(network(), variant=variant, **options)
    for parameter in rule.maps.parameters():  # biases start at zero, which would hide mistakes
        parameter.data += 0.3 * torch.randn_like(parameter)
    return rule


def gradients(rule: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in rule.named_parameters() if p.grad is not None}


def feedback(rule: apical.DifferenceTargetPropagation, i: int, z: Tensor, own: Tensor) -> Tensor:
    """g_i by its definition, given also the state of layer i."""
    g, last = rule.maps[i], len(rule.maps) - 1
    if rule.variant == "hidden" and i < last:
        z = torch.tanh(z @ rule.random.T)
        z = torch.cat((z, own), 1) if rule.recurrent else z
    v = z @ g.q.T + (g.c if g.c is not None else 0)
    return torch.tanh(v) if rule.sequential or (rule.variant == "hidden" and i < last) else v


def above(rule: apical.DifferenceTargetPropagation, layers: list[nn.Linear], i: int, h: Tensor, until: int) -> list[Tensor]:
    """h_{i+1}..h_until from h_i (layers counted from 0)."""
    found = []
    for k in range(i + 1, until + 1):
        h = layers[k](h)
        h = torch.tanh(h) if k < len(layers) - 1 else h
        found.append(h)
    return found


def reference(rule: apical.DifferenceTargetPropagation, x: Tensor, y: Tensor, seed: int) -> dict[str, Tensor]:
    """Gradients of all local losses by autograd, targets and other layers' weights held."""
    layers = [m for m in rule.model if isinstance(m, nn.Linear)]
    last, size = len(layers) - 1, len(x)
    h, r = [], x
    for i, layer in enumerate(layers):
        r = layer(r)
        r = torch.tanh(r) if i < last else r
        h.append(r.detach())
    leaf = h[-1].clone().requires_grad_()
    e = torch.autograd.grad(F.cross_entropy(leaf, y, reduction="sum"), leaf)[0]
    t: list[Tensor] = [torch.empty(0)] * len(layers)
    t[last] = h[last] - rule.eta * e
    for i in reversed(range(last)):
        heard, base = (t[i + 1], h[i + 1]) if rule.sequential else (t[last], h[last])
        if rule.variant == "lee" and i == last - 1:
            below = h[i].clone().requires_grad_()
            total = F.cross_entropy(layers[last](below), y, reduction="sum")
            t[i] = h[i] - rule.eta * torch.autograd.grad(total, below)[0]
        else:
            t[i] = (feedback(rule, i, heard, h[i]) + h[i] - feedback(rule, i, base, h[i])).detach()
    found = {}
    for i, layer in enumerate(layers):
        a = layer(x if i == 0 else h[i - 1])
        own = torch.tanh(a) if i < last else a
        local = (own - t[i]).square().sum() / size / (2 * rule.eta if rule.normalised else 1)
        for name, parameter in layer.named_parameters():
            found[f"model.{2 * i}.{name}"] = torch.autograd.grad(local, parameter, retain_graph=True)[0]
    torch.manual_seed(seed)
    for i in range(len(rule.maps)):
        noisy = h[i] + rule.sigma * torch.randn_like(h[i])
        if rule.variant in ("dtp", "lee"):
            bracket = feedback(rule, i, above(rule, layers, i, noisy, i + 1)[-1], h[i]) - noisy
        elif rule.variant == "drl":
            z = above(rule, layers, i, noisy, last)[-1]
            for k in reversed(range(i + 1, last)):
                z = (feedback(rule, k, z, h[k]) + h[k] - feedback(rule, k, h[k + 1], h[k])).detach()
            bracket = feedback(rule, i, z, h[i]) + h[i] - feedback(rule, i, h[i + 1], h[i]) - noisy
        else:
            z = above(rule, layers, i, noisy, last)[-1]
            bracket = feedback(rule, i, z, h[i]) - noisy
            if rule.variant != "control":
                bracket = bracket + h[i] - feedback(rule, i, h[last], h[i])
        loss = bracket.square()
        loss = loss.sum() / (2 * size) if rule.reduction == "sum" else loss.mean()
        if rule.variant in ("drl", "linear", "hidden") or (rule.variant in ("dtp", "lee") and rule.reduction == "mean"):
            loss = loss / rule.sigma**2
        for name, parameter in rule.maps[i].named_parameters():
            found[f"maps.{i}.{name}"] = torch.autograd.grad(loss, parameter, retain_graph=True)[0]
    return found


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_updates_are_the_gradients_of_the_local_losses(kind: dict[str, object], normalised: bool, reduction: str) -> None:
    rule = made(**kind, normalised=normalised, reduction=reduction, eta=0.2, sigma=0.3, neurons=8)
    x, y = batch()
    torch.manual_seed(4)
    rule(x, y).backward()
    own, expected = gradients(rule), reference(rule, x, y, 4)
    assert own.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(own[name], value, rtol=1e-10, atol=1e-12), name


def test_one_hidden_layer_with_a_target_down_the_loss_is_backpropagation() -> None:
    torch.manual_seed(0)
    rule = TP(network(nn.Identity, (6, 5, 3)), variant="lee")
    x, y = batch()
    rule(x, y).backward()
    assert not rule.feedback_parameters()
    weights = [module.weight for module in rule.model if isinstance(module, nn.Linear)]
    exact = torch.autograd.grad(F.cross_entropy(rule.model(x), y), weights)
    for weight, expected in zip(weights, exact, strict=True):
        assert torch.allclose(weight.grad, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_output_layer_learns_by_backpropagation(variant: str) -> None:
    rule, (x, y) = made(variant), batch()
    rule(x, y).backward()
    own = gradients(rule)
    exact = dict(rule.model.named_parameters())
    expected = torch.autograd.grad(F.cross_entropy(rule.model(x), y), [exact["6.weight"], exact["6.bias"]])
    assert torch.allclose(own["model.6.weight"], expected[0], rtol=1e-12, atol=1e-15)
    assert torch.allclose(own["model.6.bias"], expected[1], rtol=1e-12, atol=1e-15)


def test_exact_inverses_give_gauss_newton_targets_to_first_order() -> None:
    errors = []
    for eta in (1e-2, 1e-3, 1e-4):
        torch.manual_seed(0)
        model = network(sizes=(5, 5, 5, 5))
        rule = TP(model, variant="dtp", eta=eta)
        x, y = torch.randn(1, 5, dtype=torch.double), torch.tensor([2])
        states = rule.chain.run(x)
        error = output_error(F.cross_entropy, states.r[-1], y)[1]
        for i, g in enumerate(rule.maps):  # g_i(z) = W^-1 (phi^-1(z) - b): its move, computed apart from the rule
            g.moved = partial(inverse_move, model[2 * (i + 1)], last=i == 1)
        with torch.no_grad():
            d = rule.distances(states, -eta * error)
        jacobian = torch.autograd.functional.jacobian(model[2:], states.r[1])[0, :, 0]
        newton = -eta * torch.linalg.solve(jacobian, error[0])
        errors.append(float((d[0][0] - newton).norm() / newton.norm()))
    assert errors[0] < 0.1
    for larger, smaller in pairwise(errors):
        assert 5 < larger / smaller < 20  # O(eta)


def inverse_move(layer: nn.Linear, at: Mapped, d: Tensor, *, last: bool) -> Mapped:
    z = at.z
    before, after = (z, z + d) if last else (torch.atanh(z), torch.atanh(z + d))
    move = torch.linalg.solve(layer.weight, (after - before).T).T
    return Mapped(move, move, d)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_direct_linear_feedback_learns_the_damped_pseudo_inverse(decay: float) -> None:
    torch.manual_seed(0)
    model = network(nn.Identity, (4, 6, 3))
    rule = TP(model, variant="linear")
    jacobian, q = model[2].weight.detach(), rule.maps[0].q
    noise = torch.linalg.qr(torch.randn(6, 6, dtype=torch.double))[0] * 6**0.5 * rule.sigma  # covariance sigma^2 I exactly
    states = rule.chain.run(torch.randn(6, 4, dtype=torch.double))
    optimizer = torch.optim.SGD([q], lr=0.5, weight_decay=decay)
    for _ in range(3000):
        moved = rule._reconstructed(0, states, rule.points(states), noise)
        moved_input, residual = moved.z, moved.g - noise
        q.grad = residual.T @ moved_input / len(noise) / rule.sigma**2
        optimizer.step()
    expected = jacobian.T @ torch.linalg.inv(jacobian @ jacobian.T + decay * torch.eye(3, dtype=torch.double))
    assert torch.allclose(q, expected, atol=1e-10)


def test_direct_linear_feedback_is_direct_feedback_alignment_with_its_matrix() -> None:
    x, y = batch()
    rule = made("linear")
    aligned = apical.DirectFeedbackAlignment(rule.model)
    aligned(x, y).backward()
    rule.model.zero_grad()
    for i, b in enumerate(aligned.feedback.buffers()):
        rule.maps[i].q.data = b.T.contiguous()
    aligned(x, y).backward()
    expected = gradients(rule.model)
    rule.zero_grad()
    rule(x, y).backward()
    for name, value in gradients(rule.model).items():
        assert torch.allclose(value, expected[name], rtol=1e-12, atol=1e-14), name


def test_transposed_jacobians_of_a_linear_network_make_it_backpropagation() -> None:
    torch.manual_seed(0)
    model = network(nn.Identity)
    rule, (x, y) = TP(model, variant="linear"), batch()
    path = torch.eye(SIZES[-1], dtype=torch.double)
    for i in reversed(range(len(rule.maps))):
        path = path @ model[2 * (i + 1)].weight.detach()
        rule.maps[i].q.data = path.T.contiguous()
    rule(x, y).backward()
    own = gradients(model)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    for name, value in gradients(model).items():
        assert torch.allclose(own[name], value, rtol=1e-12, atol=1e-14), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_an_error_nothing_moves(variant: str) -> None:
    rule = made(variant)
    states = rule.chain.run(batch()[0])
    assert all(not d.any() for d in rule.distances(states, torch.zeros_like(states.r[-1])))


@pytest.mark.parametrize("variant", VARIANTS)
def test_phases_learn_what_they_say(variant: str) -> None:
    rule, (x, y) = made(variant), batch()
    torch.manual_seed(1)
    rule(x, y).backward()
    both = gradients(rule)
    rule.zero_grad()
    for phase in ("forward", "feedback"):
        rule.phase = phase
        torch.manual_seed(1)
        rule(x, y).backward()
    assert all(torch.equal(value, both[name]) for name, value in gradients(rule).items())
    assert not made(variant, learn=False).learns_apart


def test_a_convolution_network_learns_through_direct_feedback() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(48, 4)).double()
    rule = TP(model, variant="linear", input_shape=(1, 8, 8))
    x, y = torch.randn(5, 1, 8, 8, dtype=torch.double), torch.arange(5) % 4
    # with Q the transposed Jacobian of the linear path above, the topmost hidden layer learns by backpropagation
    rule.maps[0].q.data = (
        torch.autograd.functional.jacobian(lambda r: model[2:](r)[0], torch.zeros(1, 3, 8, 8).double()).flatten(1).T
    )
    rule(x, y).backward()
    own = gradients(model)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    for name, value in gradients(model).items():
        assert torch.allclose(own[name], value, rtol=1e-10, atol=1e-13), name
    with pytest.raises(UnsupportedModelError, match="layer '0' has no flat output"):
        TP(model, variant="dtp", input_shape=(1, 8, 8))


@pytest.mark.parametrize("kind", [TP, apical.DeepFeedbackControl])
def test_batches_that_do_not_fit_are_refused(kind: type[apical.CreditRule]) -> None:
    rule = kind(network())
    with pytest.raises(ConfigError, match="the batch is empty"):
        rule(torch.zeros(0, SIZES[0], dtype=torch.double), torch.zeros(0, dtype=torch.long))
    with pytest.raises(UnsupportedModelError, match="layer '0' gave"):
        rule(torch.zeros(2, 5, SIZES[0], dtype=torch.double), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "dlr"}, "did you mean 'drl'"),
        ({"eta": 0.0}, "eta and sigma must be positive"),
        ({"sigma": -1.0}, "eta and sigma must be positive"),
        ({"reduction": "max"}, "reduction"),
        ({"recurrent": True}, 'recurrent=True needs variant="hidden"'),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TP(network(), **options)


def test_difference_reconstruction_inverts_a_linear_path_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """At Q_i with Q_i Q_{i+1}.. = (W_L..W_{i+1})^+ the loss has no gradient; products of layerwise inverses are others."""
    torch.manual_seed(0)
    sizes = (6, 5, 4, 2)
    layers: list[nn.Module] = [nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)]
    rule = TP(nn.Sequential(*layers).double(), variant="drl", eta=0.1, sigma=0.3)
    w = [layer.weight.detach() for layer in layers]
    rule.maps[1].q.data = torch.linalg.pinv(w[2])
    path = rule.maps[1].q.data @ w[2] @ w[1]  # what map 0 hears of noise at layer 1
    rule.maps[0].q.data = torch.linalg.pinv(path)
    whole = rule.maps[0].q.data @ rule.maps[1].q.data
    assert (whole - torch.linalg.pinv(w[2] @ w[1])).abs().max() < 1e-12
    layerwise = torch.linalg.pinv(w[1]) @ torch.linalg.pinv(w[2])
    assert (w[2] @ w[1] @ layerwise - torch.eye(2).double()).abs().max() < 1e-12
    assert (layerwise - whole).norm() > 0.1 * whole.norm()
    monkeypatch.setattr(torch, "randn_like", lambda like: torch.eye(len(like), like.shape[1], dtype=like.dtype))
    rule(
        torch.randn(5, 6).double(), torch.arange(5) % 2
    ).backward()  # one unit of noise on each neuron: the exact expectation
    assert rule.maps[0].q.grad.abs().max() < 1e-12
    rule.maps[0].q.data = torch.linalg.pinv(w[1])
    rule.zero_grad()
    rule(torch.randn(5, 6).double(), torch.arange(5) % 2).backward()
    assert rule.maps[0].q.grad.abs().max() > 1e-3


def test_gauss_newton_targets_waste_nothing_and_end_at_the_gradient() -> None:
    torch.manual_seed(0)
    model, (x, y) = network(), batch(1)
    chain = Chain(model)
    states = chain.run(x)
    delta = -output_error(F.cross_entropy, states.r[-1], y)[1]
    for number, moved in enumerate(gauss_newton_targets(chain, states, delta)[:-1]):
        layer, slope = model[2 * number], 1 - states.r[number + 1] ** 2
        update = torch.outer((moved * slope)[0], states.r[number][0])
        rows = [torch.autograd.grad(model(x)[0, k], layer.weight)[0].flatten() for k in range(SIZES[-1])]
        jacobian = torch.stack(rows)
        seen = torch.linalg.pinv(jacobian) @ (jacobian @ update.flatten())
        assert (seen - update.flatten()).norm() < 1e-9 * update.norm()
    rule = made("dtp")
    d = rule.distances(rule.chain.run(x), delta)
    rows = [torch.autograd.grad(rule.model(x)[0, k], rule.model[0].weight)[0].flatten() for k in range(SIZES[-1])]
    update = torch.outer((d[0] * (1 - rule.chain.run(x).r[1] ** 2))[0], x[0]).flatten()
    jacobian = torch.stack(rows)
    assert (torch.linalg.pinv(jacobian) @ (jacobian @ update) - update).norm() > 0.1 * update.norm()

    damped = gauss_newton_targets(chain, states, delta, damping=1e8)
    h = states.r[1].clone().requires_grad_()
    steepest = torch.autograd.grad(F.cross_entropy(model[2:](h), y), h)[0]
    assert (1e8 * damped[0] + steepest).norm() < 1e-6 * steepest.norm()
    with pytest.raises(ConfigError, match="damping"):
        gauss_newton_targets(chain, states, delta, damping=-1.0)
