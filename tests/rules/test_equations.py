"""Each rule against a slow re-implementation of its paper's equations, over many SGD steps in float64."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import reference as ref
import torch
from torch import Tensor, nn

import apical
from apical.core.credit import CreditRule
from apical.core.units import key

WIDTHS = (9, 12, 8, 5)
PFA = apical.ProductFeedbackAlignment


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(WIDTHS):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def batch(step: int, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(size, WIDTHS[0], dtype=torch.double, generator=generator)
    return x, x[:, : WIDTHS[-1]].argmax(dim=1)


def schedule(step: int) -> tuple[float, float]:
    """Learning rate and weight decay: both change on the way."""
    return (0.1 if step < 60 else 0.03, 0.02 if step < 30 else 1e-3)


def train(rule: CreditRule, steps: int = 90) -> list[Tensor]:
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = schedule(step)
        optimizer.zero_grad()
        rule(*batch(step)).backward()
        optimizer.step()
    return [p.detach() for p in rule.model.parameters()]


def train_reference(
    model: nn.Sequential,
    below: Callable[[list[Tensor], int, Tensor, Tensor], Tensor],
    after: Callable[[ref.SGD, ref.Pass, list[Tensor]], None] | None = None,
    steps: int = 90,
) -> list[Tensor]:
    """`below(weights, layer, delta, error)`; `after(sgd, pass, weight gradients)` updates learned feedback."""
    linear = [m for m in model if isinstance(m, nn.Linear)]
    weights = [m.weight.detach().clone() for m in linear]
    biases = [m.bias.detach().clone() for m in linear]
    sgd = ref.SGD(0.1, 0.9, 0.0)
    for step in range(steps):
        sgd.lr, sgd.decay = schedule(step)
        result = ref.run(weights, biases, *batch(step), partial(below, weights))
        gradients = ref.weight_gradients(result)
        if after is not None:
            after(sgd, result, gradients)
        weights = [sgd.step(f"w{i}", w, g) for i, (w, g) in enumerate(zip(weights, gradients, strict=True))]
        biases = [sgd.step(f"b{i}", b, d.sum(dim=0)) for i, (b, d) in enumerate(zip(biases, result.delta, strict=True))]
    return [p for pair in zip(weights, biases, strict=True) for p in pair]


def assert_equal(ours: list[Tensor], reference: list[Tensor], tolerance: float = 1e-10) -> None:
    assert len(ours) == len(reference)
    for a, b in zip(ours, reference, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max()))


LAYER = {1: "2", 2: "4"}  # number of the layer -> its name in `network`


def test_backprop() -> None:
    reference = train_reference(network(), lambda w, layer, delta, error: delta @ w[layer])
    assert_equal(train(apical.Backprop(network())), reference)


def test_feedback_alignment() -> None:
    model = network()
    rule = apical.FeedbackAlignment(model)
    u = {name: value.clone() for name, value in rule.feedback_weights().items()}
    reference = train_reference(model, lambda w, layer, delta, error: delta @ u[LAYER[layer]])
    assert_equal(train(rule), reference)
    assert all(torch.equal(u[name], value) for name, value in rule.feedback_weights().items()), "U is fixed"


def test_direct_feedback_alignment() -> None:
    model = network()
    rule = apical.DirectFeedbackAlignment(model)
    rule(*batch(0))
    b = {1: rule.feedback.get_buffer("1").clone(), 2: rule.feedback.get_buffer("3").clone()}
    # 50 steps: DFA's dynamics amplify rounding tenfold every 15 steps at this learning rate
    reference = train_reference(model, lambda w, layer, delta, error: error @ b[layer], steps=50)
    assert_equal(train(rule, steps=50), reference)


@pytest.mark.parametrize("variant", ["uniform", "fixed"])
def test_sign_symmetry(variant: str) -> None:
    model = network()
    rule = apical.SignSymmetry(model, variant=variant)
    magnitude = {name: value.clone() for name, value in rule.magnitude.named_buffers()}
    if variant == "uniform":
        for layer, name in LAYER.items():
            assert magnitude[name] == pytest.approx(math.sqrt(2 / (WIDTHS[layer] + WIDTHS[layer + 1])), rel=1e-12)

    def below(w: list[Tensor], layer: int, delta: Tensor, error: Tensor) -> Tensor:
        signs = torch.where(w[layer] > 0, 1.0, -1.0).double()
        return delta @ (magnitude[LAYER[layer]] * signs)

    reference = train_reference(model, below)
    assert_equal(train(rule), reference)


def test_batchwise_sign_symmetry_draws_anew_and_keeps_signs() -> None:
    model = network()
    rule = apical.SignSymmetry(model, variant="batchwise")
    bound = math.sqrt(6 / (WIDTHS[1] + WIDTHS[2]))
    x, y = batch(0)
    torch.manual_seed(5)
    rule(x, y).backward()
    # the backward pass draws for the top layer first
    torch.manual_seed(5)
    drawn = {layer: torch.rand(WIDTHS[layer + 1], WIDTHS[layer], dtype=torch.double) for layer in (2, 1)}
    linear = [m for m in model if isinstance(m, nn.Linear)]
    weights = [m.weight.detach() for m in linear]
    bounds = {layer: math.sqrt(6 / (WIDTHS[layer] + WIDTHS[layer + 1])) for layer in (1, 2)}
    assert bounds[1] == pytest.approx(bound)
    result = ref.run(
        weights,
        [m.bias.detach() for m in linear],
        x,
        y,
        lambda layer, delta, error: delta @ (drawn[layer] * bounds[layer] * weights[layer].sign()),
    )
    assert_equal([m.weight.grad for m in linear], ref.weight_gradients(result), 1e-12)
    first = [m.weight.grad.clone() for m in linear]
    rule.zero_grad()
    rule(x, y).backward()
    assert not torch.allclose(first[0], linear[0].weight.grad), "the second batch has its own draw"


@pytest.mark.parametrize("form", ["closed", "explicit"])
def test_kolen_pollack(form: str) -> None:
    model = network()
    rule = apical.KolenPollack(model, form=form)
    b = {layer: rule.feedback_weights()[name].clone() for layer, name in LAYER.items()}

    def after(sgd: ref.SGD, result: ref.Pass, gradients: list[Tensor]) -> None:
        for layer in b:
            b[layer] = sgd.step(f"feedback{layer}", b[layer], gradients[layer])

    reference = train_reference(model, lambda w, layer, delta, error: delta @ b[layer], after)
    assert_equal(train(rule), reference)
    assert_equal([rule.feedback_weights()[LAYER[layer]] for layer in b], list(b.values()))


def literal_matrices(model: nn.Sequential, **options: object) -> dict[int, tuple[Tensor, Tensor]]:
    """B and R_0 that a PFA rule draws: every form draws the same from the same seed."""
    torch.manual_seed(3)
    rule = PFA(model, form="literal", **options)
    matrices = {
        layer: (rule.expansion.get_buffer(key(name)).clone(), rule.plastic[key(name)].detach().clone())
        for layer, name in LAYER.items()
    }
    rule.detach()
    return matrices


@pytest.mark.parametrize("form", ["closed", "literal", "fused", "explicit"])
@pytest.mark.parametrize(
    "options",
    [{}, {"expansion": 1.0}, {"expansion": 2.5}, {"feedback": "orthogonal"}, {"feedback": "identity"}],
    ids=["lambda-10", "lambda-1", "lambda-2.5", "orthogonal", "identity"],
)
def test_product_feedback_alignment(form: str, options: dict[str, object]) -> None:
    model = network()
    matrices = literal_matrices(model, **options)
    torch.manual_seed(3)
    rule = PFA(model, form=form, **options)
    plastic = {layer: r for layer, (_, r) in matrices.items()}

    def below(w: list[Tensor], layer: int, delta: Tensor, error: Tensor) -> Tensor:
        r_err = delta @ matrices[layer][0]
        return r_err @ plastic[layer]

    def after(sgd: ref.SGD, result: ref.Pass, gradients: list[Tensor]) -> None:
        for layer, (b, _) in matrices.items():
            r_err = result.delta[layer] @ b
            plastic[layer] = sgd.step(f"r{layer}", plastic[layer], r_err.T @ result.h[layer])

    reference = train_reference(model, below, after)
    assert_equal(train(rule), reference)
    for layer, name in LAYER.items():
        assert_equal([rule.feedback_weights()[name]], [matrices[layer][0] @ plastic[layer]])


@pytest.mark.parametrize("form", ["literal", "fused"])
def test_sparse_product_feedback_alignment(form: str) -> None:
    """Masks drawn once; R stays on its mask; the forms agree with the masked equations."""
    model = network()
    matrices = literal_matrices(model, density=0.5)
    torch.manual_seed(3)
    rule = PFA(model, form=form, density=0.5)
    plastic = {layer: r for layer, (_, r) in matrices.items()}
    masks = {layer: (r != 0).double() for layer, r in plastic.items()}
    assert all(0.3 < float(mask.mean()) < 0.7 for mask in masks.values())

    def after(sgd: ref.SGD, result: ref.Pass, gradients: list[Tensor]) -> None:
        for layer, (b, _) in matrices.items():
            gradient = (result.delta[layer] @ b).T @ result.h[layer] * masks[layer]
            plastic[layer] = sgd.step(f"r{layer}", plastic[layer], gradient)

    reference = train_reference(model, lambda w, n, delta, error: delta @ matrices[n][0] @ plastic[n], after)
    assert_equal(train(rule), reference)
    for layer, name in LAYER.items():
        assert torch.equal((rule.plastic[key(name)] != 0).double(), masks[layer])


def test_product_feedback_alignment_with_identity_is_kolen_pollack() -> None:
    torch.manual_seed(3)
    pfa = PFA(network(), feedback="identity")
    torch.manual_seed(3)
    kp = apical.KolenPollack(network())
    for name, mismatch in pfa.mismatch.items():
        kp.difference[name].initial.copy_(mismatch.initial)
    assert_equal(train(pfa), train(kp), 1e-12)


def test_a_look_without_gradients_is_no_mirror_step() -> None:
    rule = apical.WeightMirror(network(), rate=0.5, warmup=0)
    before = {name: value.clone() for name, value in rule.feedback_weights().items()}
    with torch.no_grad():
        rule(*batch(0))
    assert all(torch.equal(value, before[name]) for name, value in rule.feedback_weights().items())


def test_weight_mirror() -> None:
    """B <- (1 - rho) B + rho y x^T / batch for unit noise, one step before each batch, then as feedback alignment."""
    model = network()
    rule = apical.WeightMirror(model, rate=0.1, batch=32, warmup=0)
    b = {layer: rule.feedback_weights()[name].clone() for layer, name in LAYER.items()}
    torch.manual_seed(11)
    state = torch.get_rng_state()
    ours = train(rule, steps=50)
    fresh = network()
    torch.set_rng_state(state)
    first_of_pass = max(LAYER)

    def below(w: list[Tensor], layer: int, delta: Tensor, error: Tensor) -> Tensor:
        if layer == first_of_pass:  # the reference mirrors when its backward pass begins: the weights are the same
            for each in LAYER:
                x = torch.randn(32, w[each].shape[1], dtype=torch.double)
                estimate = sum(torch.outer(w[each] @ sample, sample) for sample in x) / 32
                b[each] = 0.9 * b[each] + 0.1 * estimate
        return delta @ b[layer]

    assert_equal(ours, train_reference(fresh, below, steps=50))
