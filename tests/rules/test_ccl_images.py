"""Counter-current learning with images: convolutions, autoencoders, controls, feedback networks of one's own.

The expected gradients come from the sum of all local losses, written out here from the paper's equations, by plain autograd
through blocks whose inputs are detached.
"""

import pytest
import torch
import torch.nn.functional as F
from test_ccl import gradients, leaves
from torch import Tensor, nn

from apical import CounterCurrentLearning, models
from apical.errors import ConfigError

IMAGE = (3, 32, 32)
LABELS = torch.tensor([0, 3, 3, 9, 1, 2])


def images(shape: tuple[int, ...] = IMAGE) -> Tensor:
    return torch.rand(6, *shape, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def built(name: str, shape: tuple[int, ...] = IMAGE, outputs: int = 10, **options: object) -> CounterCurrentLearning:
    """The rule in float64, every parameter moved off its special first value."""
    torch.manual_seed(0)
    model = models.build(name, shape, outputs).double()
    loss = F.mse_loss if options.get("pair") == "match" else F.cross_entropy
    rule = CounterCurrentLearning(model, loss, input_shape=shape, **options)
    with torch.no_grad():
        for parameter in rule.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return rule


def unit(rows: Tensor) -> Tensor:
    return rows / (rows.norm(dim=1, keepdim=True) + 1e-8)


def centred(maps: Tensor) -> Tensor:
    flat = maps.flatten(2) - maps.flatten(2).mean(2, keepdim=True)
    return flat / (flat.norm(dim=2, keepdim=True) + 1e-8)


def cosine_loss(a: Tensor, b: Tensor, s: float = 1.0, r: float = 0.5) -> Tensor:
    a, b, m = unit(a.flatten(1)), unit(b.flatten(1)), F.one_hot(LABELS, 10).double()
    apart = sum(((x @ x.T - torch.eye(len(x))) ** 2).mean() for x in (a, b))
    return s * ((a @ b.T - m) ** 2).mean() + r * apart


def match_loss(a: Tensor, b: Tensor, end: bool) -> Tensor:
    both = (a - b).square().mean()
    return a.shape[2] * (both if end else both + (centred(a) - centred(b)).square().mean())


def summed(rule: CounterCurrentLearning, inputs: Tensor, targets: Tensor) -> Tensor:
    """All losses of one pass; the blocks themselves are run as modules, their inputs detached."""
    a = [inputs]
    for block in rule.row:
        a.append(block(a[-1].detach()))
    match = rule.pair == "match"
    b = [targets.reshape(6, *rule.row[-1].shape) if match else torch.eye(10, dtype=torch.double)]
    for module in rule.feedback:
        b.insert(0, module(b[0].detach()))
    b = [torch.empty(0)] * (len(a) - len(b)) + b
    levels = range(len(a) - 1 - len(rule.feedback), len(a) - 1)
    pairs = [match_loss(a[i], b[i], i == 0) if match else cosine_loss(a[i], b[i]) for i in levels]
    last = F.mse_loss(a[-1], targets) * inputs.shape[2] if match else F.cross_entropy(a[-1], targets)
    return torch.stack(pairs).sum() + last


CASES = {
    "pooling": ("cnn-elu-4-4-6-6-8", IMAGE, 10, {}),
    "norm": ("cnn-elu-bn-4-4-6", IMAGE, 10, {}),
    "strides": ("cnn-stride-4-4-6-6-8", IMAGE, 10, {}),
    "transposed": ("cnn-stride-4-4-6-6-8", IMAGE, 10, {"enlarge": "transposed"}),
    "odd sizes": ("cnn-elu-4-4-6", (1, 28, 28), 10, {}),
    "autoencoder": ("conv-autoencoder-4-5-6", (3, 28, 28), 3 * 28 * 28, {"pair": "match"}),
}


@pytest.mark.parametrize("input_pair", [False, True], ids=["no input pair", "input pair"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_summed_local_losses(case: str, input_pair: bool) -> None:
    name, shape, outputs, options = CASES[case]
    rule, inputs = built(name, shape, outputs, input_pair=input_pair, **options), images(shape)
    targets = inputs.flatten(1) if rule.pair == "match" else LABELS
    rule(inputs, targets).backward()
    found = gradients(rule)
    rule.zero_grad()
    summed(rule, inputs, targets).backward()
    wanted = gradients(rule)
    assert found.keys() == wanted.keys() == {name for name, _ in rule.named_parameters()}
    size = max(float(gradient.abs().max()) for gradient in wanted.values())
    for key, gradient in wanted.items():  # a bias before BatchNorm has none but rounding's
        torch.testing.assert_close(found[key], gradient, rtol=1e-9, atol=1e-14 * size)
    assert sum(bool(gradient.abs().max() > 1e-8 * size) for gradient in wanted.values()) > len(wanted) / 2


@pytest.mark.parametrize("case", CASES)
def test_every_root_reaches_one_block_alone(case: str) -> None:
    name, shape, outputs, options = CASES[case]
    rule, inputs = built(name, shape, outputs, **options), images(shape)
    owner = {id(p): f"F{i}" for i, block in enumerate(rule.row) for module in block.modules for p in module.parameters()}
    owner |= {id(p): f"G{i}" for i, module in enumerate(rule.feedback) for p in module.parameters()}
    targets = inputs.flatten(1) if rule.pair == "match" else LABELS
    reached = []
    for root in rule(inputs, targets).roots:
        if type(root.grad_fn).__name__ == "KnownGradientsBackward":  # closed forms of dense blocks, each made locally
            reached += sorted({owner[id(leaf)] for leaf in leaves(root)})
        else:
            (only,) = {owner[id(leaf)] for leaf in leaves(root)}
            reached.append(only)
    assert sorted(reached) == sorted(set(owner.values()))


def count(network: nn.Module) -> int:
    """Weights and biases of its Linear and convolution layers."""
    layers = [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return sum(parameter.numel() for layer in layers for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("name", "shape", "outputs", "pair", "weights"),
    [
        ("mlp-elu-256-256-256-256-256", (1, 28, 28), 10, "auto", 465_408),
        ("mlp-elu-1024-1024-1024", IMAGE, 10, "auto", 5_253_120),
        ("cnn-elu-128-128-256-256-512", IMAGE, 10, "auto", 2_220_416),
        ("conv-autoencoder-128-256-1024-2048", (3, 96, 96), 27_648, "match", 43_068_931),
    ],
)
def test_both_networks_have_as_many_weights_as_the_authors_have(
    name: str, shape: tuple[int, ...], outputs: int, pair: str, weights: int
) -> None:
    with torch.device("meta"):  # shapes alone
        model = models.build(name, shape, outputs)
        rule = CounterCurrentLearning(model, pair=pair, input_pair=True, input_shape=shape)
    assert count(model) == count(rule.feedback) == weights


def test_kernels_of_the_feedback_network_face_those_of_the_model_turned() -> None:
    """A convolution's transpose is the convolution with the turned kernel: with such weights G undoes F's geometry."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1, bias=False))
    rule = CounterCurrentLearning(model.double(), input_pair=True, input_shape=(2, 5, 5), pair="match", loss=F.mse_loss)
    delta = torch.randn(1, 2, 5, 5, dtype=torch.double)
    back = rule.feedback[0][0]
    with torch.no_grad():
        back.weight.copy_(model[2].weight.transpose(0, 1).flip(2, 3))
    torch.testing.assert_close(back(delta), F.conv_transpose2d(delta, model[2].weight, padding=1))
    torch.testing.assert_close(rule.feedback_weights()["2"], model[2].weight)


def test_sure_samples_do_not_teach_the_forward_network_when_masked() -> None:
    rule = built("cnn-elu-4-4", mask=True)
    inputs = images()
    with torch.no_grad():
        rule.model.linear.weight.zero_()
        linear = rule._activities(inputs)[-2].flatten(1)
        rule.model.linear.weight.copy_(50 * torch.linalg.lstsq(linear, F.one_hot(LABELS, 10).double()).solution.T)
    rule(inputs, LABELS).backward()
    assert all(not rule.model.get_parameter(f"conv{i}.weight").grad.any() for i in (1, 2))
    assert rule.feedback[0][0].weight.grad.any()  # G still hears of them by the terms against collapse


def test_a_frozen_feedback_network_stays_and_still_teaches() -> None:
    rule = built("cnn-elu-4-4", feedback="frozen")
    rule(images(), LABELS).backward()
    assert {name.split(".")[0] for name in gradients(rule)} == {"model"}
    assert rule.model.conv1.weight.grad.any()


def test_free_codes_are_a_classifier_per_layer() -> None:
    rule = built("mlp-elu-7-6", (5,), 10, feedback="free")
    inputs = images((5,))
    rule(inputs, LABELS).backward()
    found = gradients(rule)
    rule.zero_grad()
    a1 = F.elu(inputs @ rule.model.linear1.weight.T)
    a2 = F.elu(a1.detach() @ rule.model.linear2.weight.T)
    member = F.one_hot(LABELS, 10).double()
    rows = [module.rows for module in rule.feedback][::-1]
    losses = [0.5 * 256 / a.shape[1] * ((a @ row.T - member) ** 2).mean() for a, row in zip((a1, a2), rows, strict=True)]
    torch.stack(losses).sum().backward()
    for name in ("model.linear1.weight", "model.linear2.weight", "feedback.0.rows", "feedback.1.rows"):
        torch.testing.assert_close(found[name], rule.get_parameter(name).grad, rtol=1e-10, atol=1e-14)


def test_without_pairs_only_the_last_layer_learns() -> None:
    rule = built("cnn-elu-4-4", feedback="none")
    rule(images(), LABELS).backward()
    assert gradients(rule).keys() == {"model.linear.weight"}
    assert list(rule.read_outs(images())) == ["linear"]
    assert not rule.model.conv1.weight.requires_grad
    assert rule.detach().conv1.weight.requires_grad


def test_a_feedback_network_of_ones_own_is_taken_as_it_is() -> None:
    model = models.build("mlp-elu-7-6", (5,), 10).double()
    own = [nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 6)), nn.Linear(6, 7)]
    rule = CounterCurrentLearning(model, feedback=[module.double() for module in own])
    rule(images((5,)), LABELS).backward()
    assert own[0][0].weight.grad.any()
    with pytest.raises(ConfigError, match=r"takes 2 modules, or 3 .* got 1"):
        CounterCurrentLearning(model, feedback=own[:1])
    with pytest.raises(ConfigError, match=r"facing layer 'linear3' returns shape \(5,\), not \(6,\)"):
        CounterCurrentLearning(model, feedback=[nn.Linear(10, 5).double(), own[1]])


def test_an_autoencoders_feedback_starts_as_the_authors_do() -> None:
    model = models.build("conv-autoencoder-4-5", (3, 8, 8), 192)
    rule = CounterCurrentLearning(model, pair="match", orthogonal=True, input_pair=True, input_shape=(3, 8, 8))
    layers = [next(m for m in module if isinstance(m, nn.Conv2d)) for module in rule.feedback]
    norms = [float(layer.weight.detach().norm()) for layer in layers]
    assert norms[0] > 1
    assert norms[1] > 1
    assert 0 < norms[2] < 0.01
    assert norms[3] == 0
    assert float(model.conv3.weight.detach().norm()) < 0.01
    assert not model.conv4.weight.any()


def test_bf16_autocast_trains() -> None:
    torch.manual_seed(0)
    rule = CounterCurrentLearning(models.build("cnn-elu-4-4", IMAGE, 10), input_shape=IMAGE)
    inputs = images().float()
    rule(inputs, LABELS).backward()
    exact = gradients(rule)
    rule.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        credit = rule(inputs, LABELS)
    credit.backward()
    for name, gradient in gradients(rule).items():
        assert F.cosine_similarity(gradient.flatten(), exact[name].flatten(), dim=0) > 0.99


@pytest.mark.parametrize("targets", [LABELS.double(), torch.rand(6, 5).double()])
def test_targets_of_another_kind_are_refused(targets: Tensor) -> None:
    with pytest.raises(ConfigError, match="one class label"):
        built("cnn-elu-4-4")(images(), targets)
    with pytest.raises(ConfigError, match="targets of the output's size"):
        built("conv-autoencoder-4-5", (3, 8, 8), 192, pair="match")(images((3, 8, 8)), targets)
