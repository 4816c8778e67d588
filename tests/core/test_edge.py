"""Feedback edges: the oracle limit B = W on every layer type, by-hand feedback alignment, and what must not disturb them."""

import copy
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apical
from apical.core.credit import CreditRule
from apical.core.units import key
from apical.errors import UnsupportedModelError


@pytest.fixture(autouse=True)
def _double() -> object:
    torch.set_default_dtype(torch.double)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float)


def squares(output: Tensor, targets: Tensor) -> Tensor:
    """A loss for outputs of any shape, with a different slope at every entry."""
    ramp = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view_as(output)
    return (ramp * output.square()).mean()


def use_forward_weights(rule: CreditRule) -> None:
    for name, layer in rule.layers.items():
        rule.feedback.get_buffer(key(name)).copy_(layer.weight.detach())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every gradient, which is then forgotten."""
    result = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return result


def equal(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert a.keys() == b.keys()
    assert a
    for name in a:
        far = float((a[name] - b[name]).abs().max())
        assert far <= tolerance * max(1.0, float(b[name].abs().max())), f"{name} differs by {far}"


def backprop(model: nn.Module, inputs: Tensor, loss: Callable[[Tensor, Tensor], Tensor] = squares) -> dict[str, Tensor]:
    torch.autograd.backward(loss(model(inputs), inputs))
    return gradients(model)


C1, C2, C3 = nn.Conv1d, nn.Conv2d, nn.Conv3d
T1, T2, T3 = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear-1d": (lambda: nn.Linear(6, 5), lambda: nn.Linear(5, 3), (6,)),
    "linear-2d": (lambda: nn.Linear(6, 5), lambda: nn.Linear(5, 3), (4, 6)),
    "linear-3d": (lambda: nn.Linear(6, 5), lambda: nn.Linear(5, 3), (2, 4, 6)),
    "linear-4d": (lambda: nn.Linear(6, 5), lambda: nn.Linear(5, 3), (2, 3, 2, 6)),
    "linear-3d-no-bias": (lambda: nn.Linear(6, 5, bias=False), lambda: nn.Linear(5, 3, bias=False), (2, 4, 6)),
    "conv1d": (lambda: C1(2, 4, 3), lambda: C1(4, 3, 3, stride=2, padding=1), (2, 2, 9)),
    "conv2d": (lambda: C2(2, 4, 3), lambda: C2(4, 3, 3, stride=2, padding=1), (2, 2, 8, 7)),
    "conv3d": (lambda: C3(2, 4, 2), lambda: C3(4, 3, (2, 1, 3), stride=(1, 2, 1), padding=1), (2, 2, 4, 5, 4)),
    "no-bias": (lambda: C2(2, 4, 3, bias=False), lambda: C2(4, 3, 3, bias=False), (2, 2, 8, 7)),
    "unbatched-1d": (lambda: C1(2, 4, 3), lambda: C1(4, 3, 2, stride=2), (2, 9)),
    "unbatched-2d": (lambda: C2(2, 4, 3), lambda: C2(4, 3, 3, padding=1), (2, 6, 5)),
    "unbatched-3d": (lambda: C3(2, 4, 2), lambda: C3(4, 3, 2), (2, 4, 4, 4)),
    "dilated": (lambda: C2(2, 4, 3), lambda: C2(4, 3, 2, dilation=(2, 3), padding=1), (2, 2, 8, 8)),
    "groups": (lambda: C2(2, 4, 3), lambda: C2(4, 6, 3, groups=2), (2, 2, 7, 7)),
    "depthwise": (lambda: C2(2, 4, 3), lambda: C2(4, 8, 3, groups=4, stride=2), (2, 2, 8, 7)),
    "same-odd": (lambda: C2(2, 4, 3), lambda: C2(4, 3, 3, padding="same"), (2, 2, 7, 7)),
    "same-even": (lambda: C2(2, 4, 3), lambda: C2(4, 3, (2, 4), padding="same"), (2, 2, 7, 7)),
    "same-even-dilated": (lambda: C1(2, 4, 3), lambda: C1(4, 3, 4, padding="same", dilation=3), (2, 2, 14)),
    "valid-even": (lambda: C2(2, 4, 3), lambda: C2(4, 3, (2, 4), padding="valid"), (2, 2, 7, 7)),
    "reflect": (lambda: C2(2, 4, 3), lambda: C2(4, 3, 3, padding=2, padding_mode="reflect"), (2, 2, 7, 7)),
    "replicate": (lambda: C2(2, 4, 3), lambda: C2(4, 3, 3, 2, 1, padding_mode="replicate"), (2, 2, 7, 7)),
    "circular": (lambda: C1(2, 4, 3), lambda: C1(4, 3, 3, padding=2, padding_mode="circular"), (2, 2, 8)),
    "circular-same-even": (lambda: C2(2, 4, 3), lambda: C2(4, 3, 2, padding="same", padding_mode="circular"), (2, 2, 6, 6)),
    "circular-unbatched": (lambda: C2(2, 4, 3), lambda: C2(4, 3, 3, padding=1, padding_mode="circular"), (2, 6, 6)),
    "reflect-grouped-3d": (lambda: C3(2, 4, 2), lambda: C3(4, 4, 2, 1, 1, 1, 2, True, "reflect"), (2, 2, 4, 4, 4)),
    "up1d": (lambda: C1(2, 4, 3), lambda: T1(4, 3, 3, stride=2, output_padding=1), (2, 2, 7)),
    "up2d": (lambda: C2(2, 4, 3), lambda: T2(4, 3, 3, stride=(2, 3), padding=1, output_padding=(1, 2)), (2, 2, 6, 5)),
    "up3d": (lambda: C3(2, 4, 2), lambda: T3(4, 3, 2, stride=2), (2, 2, 3, 4, 3)),
    "up-grouped": (lambda: T2(2, 4, 2), lambda: T2(4, 6, 3, stride=2, groups=2, dilation=2), (2, 2, 4, 4)),
    "up-depthwise-unbatched": (lambda: T2(2, 4, 2), lambda: T2(4, 4, 3, groups=4), (2, 4, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("inplace", [False, True])
def test_with_the_forward_weights_it_is_backpropagation(name: str, inplace: bool) -> None:
    """Every layer holds feedback, so the error is compared down to the gradient of the inputs."""
    first, second, shape = LAYERS[name]
    model = nn.Sequential(first(), nn.ReLU(inplace), second(), nn.LeakyReLU(0.1, inplace))
    inputs = torch.randn(shape, requires_grad=True)
    exact = {**backprop(model, inputs), "inputs": inputs.grad.clone()}
    inputs.grad = None
    rule = apical.FeedbackAlignment(model, squares, first_layer=True)
    use_forward_weights(rule)
    rule(inputs, inputs).backward()
    equal({**gradients(model), "inputs": inputs.grad}, exact)


@pytest.mark.parametrize("name", LAYERS)
def test_random_feedback_changes_only_the_layers_below(name: str) -> None:
    """The last layer's gradient is exact; the first layer's is linear in the feedback: doubled when that is doubled."""
    first, second, shape = LAYERS[name]
    model = nn.Sequential(first(), nn.Tanh(), second(), nn.Tanh())
    inputs = torch.randn(shape)
    exact = backprop(model, inputs)
    rule = apical.FeedbackAlignment(model, squares)
    rule(inputs, inputs).backward()
    once = gradients(model)
    rule.feedback.get_buffer("2").mul_(2.0)
    rule(inputs, inputs).backward()
    twice = gradients(model)
    for parameter, value in once.items():
        if parameter.startswith("2"):
            equal({"": value}, {"": exact[parameter]})
            equal({"": twice[parameter]}, {"": exact[parameter]})
        else:
            equal({"": twice[parameter]}, {"": 2 * value})
            assert not torch.allclose(value, exact[parameter])


def test_dense_feedback_alignment_by_hand() -> None:
    """`delta_l = (U^T delta_{l+1}) * f'(a_l)`, sample by sample."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    inputs, targets = torch.randn(6, 5), torch.randn(6, 2)
    rule = apical.FeedbackAlignment(model, lambda output, target: (output - target).square().sum(1).mean())
    rule(inputs, targets).backward()
    (w1, w2, w3), u = (model[i].weight.detach() for i in (0, 2, 4)), rule.feedback_weights()
    b1, b2, b3 = (model[i].bias.detach() for i in (0, 2, 4))
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x, t in zip(inputs, targets, strict=True):
        h1 = torch.tanh(w1 @ x + b1)
        h2 = torch.tanh(w2 @ h1 + b2)
        delta3 = 2 * (w3 @ h2 + b3 - t) / 6
        delta2 = (u["4"].T @ delta3) * (1 - h2**2)
        delta1 = (u["2"].T @ delta2) * (1 - h1**2)
        for i, delta, h in ((4, delta3, h2), (2, delta2, h1), (0, delta1, x)):
            expected[f"{i}.weight"] += torch.outer(delta, h)
            expected[f"{i}.bias"] += delta
    equal(gradients(model), expected)


class Twice(nn.Module):
    """`head(f(W f(W f(first x))))`: one layer, two calls in one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.head = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        for _ in range(2):
            h = torch.tanh(self.shared(h))
        return self.head(h)


def test_layer_called_twice() -> None:
    """Every call sends its own error back through U; the weight's gradient is the sum over the calls."""
    model, inputs = Twice(), torch.randn(5, 4)
    targets = torch.randn(5, 2)
    rule = apical.FeedbackAlignment(model, lambda output, target: 0.5 * (output - target).square().sum())
    rule(inputs, targets).backward()
    u, head = rule.feedback_weights()["shared"], rule.feedback_weights()["head"]
    with torch.no_grad():
        h0 = torch.tanh(model.first(inputs))
        h1 = torch.tanh(model.shared(h0))
        h2 = torch.tanh(model.shared(h1))
        error = model.head(h2) - targets
        delta2 = (error @ head) * (1 - h2**2)
        delta1 = (delta2 @ u) * (1 - h1**2)
        delta0 = (delta1 @ u) * (1 - h0**2)
    expected = {
        "first.weight": delta0.T @ inputs,
        "first.bias": delta0.sum(0),
        "shared.weight": delta2.T @ h1 + delta1.T @ h0,
        "shared.bias": (delta2 + delta1).sum(0),
        "head.weight": error.T @ h2,
        "head.bias": error.sum(0),
    }
    equal(gradients(model), expected)


@pytest.mark.parametrize("form", ["literal", "fused"])
def test_layer_called_twice_shares_the_summed_gradient_with_its_plastic_feedback(form: str) -> None:
    """`dR = B^T dW` holds for the sum over the calls as it does for each."""
    model, inputs = Twice(), torch.randn(5, 4)
    rule = apical.ProductFeedbackAlignment(model, squares, expansion=2, form=form)
    rule(inputs, inputs).backward()
    for name in ("shared", "head"):
        expected = rule.expansion.get_buffer(name).T @ model.get_submodule(name).weight.grad
        equal({"": rule.plastic[name].grad}, {"": expected})


def test_an_input_that_feeds_two_layers_gets_the_sum_of_both_errors() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left, self.right = nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.stem(x))
            return self.left(h) + self.right(h) + h[:, :2]

    model, inputs = Fork(), torch.randn(5, 4)
    rule = apical.FeedbackAlignment(model, lambda output, target: output.sum())
    rule(inputs, inputs).backward()
    h = torch.tanh(model.stem(inputs)).detach()
    ones = torch.ones(5, 2)
    below = ones @ (rule.feedback_weights()["left"] + rule.feedback_weights()["right"])
    below[:, :2] += 1  # the skip is exact
    delta = below * (1 - h**2)
    equal({"": model.stem.weight.grad}, {"": delta.T @ inputs})


def test_frozen_layer_in_the_middle_still_hands_the_error_down() -> None:
    """Freezing a weight forbids it to change; the error passes it by feedback as before."""
    model, inputs = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(5, 4)
    rule = apical.FeedbackAlignment(model, squares)
    rule(inputs, inputs).backward()
    free = gradients(model)
    model[2].requires_grad_(False)
    rule(inputs, inputs).backward()
    equal(gradients(model), {name: value for name, value in free.items() if not name.startswith("2")})


def test_root_layer() -> None:
    """The model is itself a layer: nothing is below it, so every edge rule is exact, with or without feedback of its own."""
    model, inputs, targets = nn.Linear(4, 3), torch.randn(8, 4), torch.arange(8) % 3
    F.cross_entropy(model(inputs), targets).backward()
    exact = gradients(model)
    pfa = apical.ProductFeedbackAlignment
    for rule in (
        apical.FeedbackAlignment(model),
        apical.FeedbackAlignment(model, first_layer=True),
        apical.KolenPollack(model, form="explicit", first_layer=True),
        pfa(model, form="fused", first_layer=True),
    ):
        rule(inputs, targets).backward()
        equal(gradients(model), exact)
        rule.detach()
    feedback = apical.FeedbackAlignment(model, first_layer=True).feedback_weights()
    assert {name: value.shape for name, value in feedback.items()} == {"": (3, 4)}


def conv_net(scale: int = 1) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(2, 4 * scale, 3, padding=1), nn.BatchNorm2d(4 * scale), nn.ReLU(inplace=True)),
        *(nn.Conv2d(4 * scale, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 4)),
    )


RULES = {
    "fa": apical.FeedbackAlignment,
    "kp": apical.KolenPollack,
    "pfa": apical.ProductFeedbackAlignment,
    "pfa-literal": partial(apical.ProductFeedbackAlignment, expansion=2, form="literal"),
    "pfa-fused": partial(apical.ProductFeedbackAlignment, expansion=2, form="fused"),
    "usf": apical.SignSymmetry,
    "dfa": apical.DirectFeedbackAlignment,
    "dfa-leaky": partial(apical.DirectFeedbackAlignment, feedback="broadcast", leaky=True),
}


@pytest.mark.parametrize("name", RULES)
def test_autocast(name: str) -> None:
    """In bfloat16 the gradients have the parameters' own dtype and lie within rounding of the float32 ones."""
    model = conv_net().float()
    inputs, targets = torch.randn(8, 2, 8, 8, dtype=torch.float), torch.arange(8) % 4
    rule = RULES[name](model)
    rule(inputs, targets).backward()
    full = gradients(rule)
    with torch.autocast("cpu", torch.bfloat16):
        credit = rule(inputs, targets)
    credit.backward()
    for parameter, p in rule.named_parameters():
        assert p.grad is not None, parameter
        assert p.grad.dtype == torch.float, parameter
        assert p.grad.isfinite().all(), parameter
        cosine = F.cosine_similarity(p.grad.double().flatten(), full[parameter].double().flatten(), dim=0)
        # a convolution's bias before BatchNorm has no gradient but rounding noise
        assert cosine > 0.98 or parameter == "model.0.bias", (parameter, float(cosine))


@pytest.mark.parametrize("name", ["fa", "pfa", "pfa-literal", "dfa"])
def test_deepcopy_is_equal_and_independent(name: str) -> None:
    inputs, targets = torch.randn(8, 2, 8, 8), torch.arange(8) % 4
    rule = RULES[name](conv_net())
    rule(inputs, targets).backward()
    rule.zero_grad()
    twin = copy.deepcopy(rule)
    rule(inputs, targets).backward()
    assert all(p.grad is None for p in twin.parameters())
    reference = gradients(rule)
    with torch.no_grad():
        for tensor in (*rule.parameters(), *rule.buffers()):
            tensor.zero_()  # what the original becomes is nothing to the copy
    rule.detach()
    twin(inputs, targets).backward()
    equal(gradients(twin), reference, 0.0)
    twin.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.model.modules())


def test_detaching_the_copy_leaves_the_original_attached() -> None:
    inputs, targets = torch.randn(8, 2, 8, 8), torch.arange(8) % 4
    rule = apical.FeedbackAlignment(conv_net())
    rule(inputs, targets).backward()
    before = gradients(rule)
    copy.deepcopy(rule).detach()
    rule(inputs, targets).backward()
    equal(gradients(rule), before, 0.0)


@pytest.mark.parametrize("name", ["fa", "pfa", "dfa"])
def test_pickle_round_trip_after_a_batch(name: str) -> None:
    inputs, targets = torch.randn(8, 2, 8, 8), torch.arange(8) % 4
    rule = RULES[name](conv_net())
    rule(inputs, targets).backward()
    rule.zero_grad()
    twin = pickle.loads(pickle.dumps(rule))
    for each in (rule, twin):
        each(inputs, targets).backward()
    equal(gradients(twin), gradients(rule), 0.0)


def test_the_model_alone_is_the_plain_model_before_during_and_after() -> None:
    """Outside the rule's call the model backpropagates exactly: in training, in evaluation, and after a failed call."""
    model, inputs, targets = conv_net(), torch.randn(8, 2, 8, 8), torch.arange(8) % 4
    model[1].momentum = 0.0
    exact = backprop(model, inputs)
    rule = apical.FeedbackAlignment(model)
    equal(backprop(model, inputs), exact, 0.0)
    credit = rule(inputs, targets)
    equal(backprop(model, inputs), exact, 0.0)  # between the rule's forward and backward pass
    credit.backward()
    gradients(model)
    with pytest.raises(RuntimeError):
        rule(torch.randn(8, 3, 8, 8), targets)
    equal(backprop(model, inputs), exact, 0.0)
    rule.eval()
    model.eval()
    outputs = model(inputs)
    assert outputs.grad_fn is not None
    assert torch.equal(outputs, rule(inputs, targets).output)


def test_two_rules_on_one_model_do_not_meet() -> None:
    model, inputs, targets = conv_net(), torch.randn(8, 2, 8, 8), torch.arange(8) % 4
    one = apical.FeedbackAlignment(model)
    one(inputs, targets).backward()
    alone = gradients(model)
    two = apical.FeedbackAlignment(model)
    two(inputs, targets).backward()
    assert not torch.allclose(gradients(model)["0.weight"], alone["0.weight"])
    one(inputs, targets).backward()
    equal(gradients(model), alone, 0.0)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("first", [False, True], ids=["after-a-batch", "at-first"])
def test_call_without_gradients_gives_the_plain_output_and_loss(name: str, first: bool) -> None:
    """Validation: `with torch.no_grad(): rule(inputs, targets).loss`, also before the first training batch."""
    model, inputs, targets = conv_net(), torch.randn(8, 2, 8, 8), torch.arange(8) % 4
    rule = RULES[name](model)
    if not first:
        rule(inputs, targets)
    rule.eval()
    with torch.no_grad():
        credit = rule(inputs, targets)
        expected = model(inputs)
    assert torch.equal(credit.output, expected)
    assert torch.equal(credit.loss, F.cross_entropy(expected, targets))
    assert not credit.output.requires_grad
    assert all(p.grad is None for p in rule.parameters())
    rule.train()
    rule(inputs, targets).backward()
    assert all(p.grad is not None for p in model.parameters())


class Functional(nn.Module):
    """The middle layer's weight is used without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.hidden, self.last = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.first(x))
        return self.last(self.relu(F.linear(h, self.hidden.weight, self.hidden.bias)))


def test_layer_used_functionally_is_named_and_the_remedy_works() -> None:
    inputs = torch.randn(5, 4)
    with pytest.raises(UnsupportedModelError, match=r"'hidden'.*exact=\('hidden',\)"):
        apical.FeedbackAlignment(Functional(), squares)(inputs, inputs)
    rule = apical.FeedbackAlignment(Functional(), squares, exact=("hidden",))
    exact = backprop(rule.model, inputs)
    use_forward_weights(rule)
    rule(inputs, inputs).backward()
    equal(gradients(rule.model), exact)


@pytest.mark.parametrize("name", ["fa", "usf", "pfa-literal", "pfa-fused"])
def test_layer_called_by_keyword(name: str) -> None:
    class Keyword(nn.Module):
        def __init__(self, by_keyword: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last, self.by_keyword = nn.Linear(4, 3), nn.Linear(3, 2), by_keyword

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.first(x))
            return self.last(input=h) if self.by_keyword else self.last(h)

    results, inputs = [], torch.randn(5, 4)
    for by_keyword in (False, True):
        model = Keyword(by_keyword)
        torch.manual_seed(1)
        rule = RULES[name](model, squares)
        rule(inputs, inputs).backward()
        results.append(gradients(rule))
    equal(*results)


class Reversed(nn.Module):
    """Registers its head before the layers that feed it."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(3, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def test_misjudged_first_layer_is_an_error_and_the_remedy_works() -> None:
    """Registration order is not order of execution; what must not happen is exact backpropagation without a word."""
    model, inputs = Reversed(), torch.randn(5, 4)
    with pytest.raises(UnsupportedModelError, match=r"'head'.*first_layer=True"):
        apical.FeedbackAlignment(model, squares)(inputs, inputs)
    rule = apical.FeedbackAlignment(model, squares, first_layer=True)
    exact = backprop(model, inputs)
    rule(inputs, inputs).backward()
    assert not torch.allclose(gradients(model)["body.weight"], exact["body.weight"])
    use_forward_weights(rule)
    rule(inputs, inputs).backward()
    equal(gradients(model), exact)


class Upsampling(nn.Module):
    """Asks a transposed convolution for one of the output sizes its stride allows."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(2, 3, 3), nn.ConvTranspose2d(3, 2, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.relu(self.down(x)), [10, 10])


def test_transposed_convolution_with_a_requested_output_size() -> None:
    model, inputs = Upsampling(), torch.randn(2, 2, 6, 6)
    exact = backprop(model, inputs)
    rule = apical.FeedbackAlignment(model, squares)
    use_forward_weights(rule)
    rule(inputs, inputs).backward()
    equal(gradients(model), exact)


def test_reentrant_checkpointing_is_not_silently_backpropagation() -> None:
    """A layer whose forward pass is hidden from the rule must be refused."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.hidden, self.last = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.first(x))
            return self.last(torch.utils.checkpoint.checkpoint(self.hidden, h, use_reentrant=True))

    with pytest.raises(UnsupportedModelError, match="'hidden'"):
        apical.FeedbackAlignment(Checkpointed(), squares)(torch.randn(5, 4), torch.randn(5, 2))


@pytest.mark.parametrize("name", ["fa", "pfa"])
def test_compiled_without_graph_breaks(name: str) -> None:
    inputs, targets = torch.randn(8, 2, 8, 8), torch.arange(8) % 4
    rule = RULES[name](conv_net())
    rule(inputs, targets).backward()
    eager = gradients(rule)
    torch._dynamo.reset()
    compiled = torch.compile(rule, backend="aot_eager", fullgraph=True)
    compiled(inputs, targets).backward()
    equal(gradients(rule), eager)
    model_only = backprop(rule.model, inputs)
    assert not torch.allclose(model_only["0.weight"], eager["model.0.weight"])  # the graph really held the feedback


def test_a_layer_under_two_names_keeps_its_parameter() -> None:
    """Substitutes of its weight are taken out again, whichever name they went in by."""

    class TwoNames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = nn.Linear(5, 5)
            self.last = nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))

    model = TwoNames()
    weight = model.first.weight
    rule = apical.KolenPollack(model, form="explicit", first_layer=True)
    rule(torch.randn(4, 5), torch.arange(4) % 3).backward()
    assert model.first.weight is weight
    assert weight.grad is not None


@pytest.mark.parametrize("half", [False, True])
def test_compiled_at_several_lengths(half: bool) -> None:
    network = nn.Sequential(nn.Embedding(5, 16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 5))
    rule = apical.FeedbackAlignment(network.float() if half else network, squares)
    torch._dynamo.reset()
    compiled = torch.compile(rule, backend="aot_eager", fullgraph=True)
    for batch, length in [(4, 8), (4, 7), (3, 9)]:  # from the second on with symbolic lengths
        tokens = torch.randint(5, (batch, length))
        results = []
        for call in (rule, compiled):
            with torch.autocast("cpu", enabled=half):
                call(tokens, tokens).backward()
            results.append(gradients(rule))
        torch.testing.assert_close(*results, **({"rtol": 0.02, "atol": 1e-3} if half else {"rtol": 1e-10, "atol": 1e-12}))
