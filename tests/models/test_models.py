"""Sizes, parameter counts by hand, initialisation, gradient flow, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from apical import models
from apical.errors import ConfigError

FITTING = [
    ("mlp-32-16", (1, 8, 8)),
    ("mlp-7", (5,)),
    ("mlp-tanh-16-8", (1, 8, 8)),
    ("autoencoder-16-4-16", (1, 8, 8)),
    ("lenet", (1, 28, 28)),
    ("lenet", (3, 32, 32)),
    ("lenet-cifar", (3, 32, 32)),
    ("lenet-cifar", (1, 28, 28)),
    ("lenet-cifar", (1, 18, 18)),
    ("cnn-clip-4-6", (1, 8, 8)),
    ("cnn-silu-4-6", (3, 9, 8)),
    ("cnn-softmax-pool-4", (1, 4, 6)),
    ("resnet8", (1, 8, 8)),
    ("resnet8", (1, 28, 28)),
    ("resnet8", (3, 9, 7)),
    ("resnet20", (3, 32, 32)),
    ("resnet32", (1, 8, 8)),
    ("resnet56", (1, 4, 4)),
    ("resnet18", (3, 32, 32)),
    ("resnet18", (1, 8, 8)),
    ("resnet18", (3, 64, 64)),
]


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def resnet18_parameters(stem: int, classes: int) -> int:
    """3x3 convolutions, BatchNorm pairs and the three 1x1 projections, summed stage by stage."""
    total = stem + 2 * 64
    for before, width in ((64, 64), (64, 128), (128, 256), (256, 512)):
        total += 9 * before * width + 3 * 9 * width * width + 4 * 2 * width
        if before != width:
            total += before * width + 2 * width
    return total + 512 * classes + classes


@pytest.mark.parametrize(
    ("name", "shape", "classes", "expected"),
    [
        ("mlp-512-512", (1, 28, 28), 10, (784 * 512 + 512) + (512 * 512 + 512) + (512 * 10 + 10)),
        ("lenet", (1, 28, 28), 10, (25 * 6 + 6) + (25 * 6 * 16 + 16) + (400 * 120 + 120) + (120 * 84 + 84) + 850),
        ("lenet", (3, 32, 32), 10, (75 * 6 + 6) + (25 * 6 * 16 + 16) + (400 * 120 + 120) + (120 * 84 + 84) + 850),
        ("lenet-cifar", (3, 32, 32), 10, 896 + 18496 + 73856 + 33024 + 2570),
        ("cnn-clip-4-6", (1, 8, 8), 10, (9 * 4 + 4) + (9 * 4 * 6 + 6) + (6 * 10 + 10)),
        ("cnn-silu-8-8-16", (3, 32, 32), 10, (27 * 8 + 8) + (72 * 8 + 8) + (72 * 16 + 16) + (9 * 16 * 10 + 10)),
        ("resnet20", (3, 32, 32), 10, 269_722),
        ("resnet18", (3, 32, 32), 10, resnet18_parameters(27 * 64, 10)),
        ("resnet18", (3, 64, 64), 1000, resnet18_parameters(3 * 49 * 64, 1000)),
    ],
)
def test_parameter_count_equals_hand_computation(name, shape, classes, expected):
    assert parameters(models.build(name, shape, classes)) == expected


@pytest.mark.parametrize("depth", [8, 20, 32, 56])
def test_cifar_resnet_counts_follow_from_the_layer_table(depth):
    n = (depth - 2) // 6
    total = 27 * 16 + 2 * 16 + 64 * 10 + 10
    for before, width in ((16, 16), (16, 32), (32, 64)):
        total += 9 * before * width + (2 * n - 1) * 9 * width * width + 2 * n * 2 * width
    model = models.CifarResNet(depth)
    assert parameters(model) == total
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == depth


@pytest.mark.parametrize(("name", "shape"), FITTING)
def test_output_shape_and_every_parameter_gets_a_gradient_in_float64(name, shape):
    torch.manual_seed(0)
    model = models.build(name, shape, 7).double()
    inputs = torch.randn(4, *shape, dtype=torch.float64)
    output = model(inputs)
    assert output.shape == (4, 7)
    assert output.dtype == torch.float64
    F.cross_entropy(output, torch.arange(4)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize(("name", "shape"), FITTING)
def test_no_module_runs_twice_and_activations_are_modules(name, shape):
    model = models.build(name, shape, 3)
    calls: dict[str, int] = {}
    for key, module in model.named_modules():
        module.register_forward_hook(lambda *_, key=key: calls.__setitem__(key, calls.get(key, 0) + 1))
    model(torch.randn(2, *shape))
    assert set(calls.values()) == {1}
    assert set(calls) == {key for key, _ in model.named_modules()}
    relus = [module for module in model.modules() if isinstance(module, nn.ReLU)]
    assert not any(relu.inplace for relu in relus)


def test_initialisation_is_xavier_uniform_with_zero_biases():
    torch.manual_seed(0)
    for model in (models.mlp(300, [200], 100), models.LeNetCIFAR(), models.CifarResNet(8)):
        for module in model.modules():
            if not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            weight = module.weight.detach()
            fan_out, fan_in = weight.flatten(1).shape
            if isinstance(module, nn.Conv2d):
                fan_out *= module.kernel_size[0] * module.kernel_size[1]
            bound = math.sqrt(6 / (fan_in + fan_out))
            assert weight.abs().max() <= bound
            assert weight.abs().max() > 0.97 * bound
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
            if module.bias is not None:
                assert not module.bias.any()


def test_a_seed_fixes_the_weights():
    torch.manual_seed(5)
    first = models.build("resnet8", (1, 8, 8), 10).state_dict()
    torch.manual_seed(5)
    second = models.build("resnet8", (1, 8, 8), 10).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_option_a_shortcut_subsamples_and_pads_both_sides():
    maps = torch.arange(2 * 4 * 5 * 5, dtype=torch.float32).view(2, 4, 5, 5)
    out = models.ZeroPadShortcut(4, 2)(maps)
    assert out.shape == (2, 8, 3, 3)
    assert torch.equal(out[:, 2:6], maps[:, :, ::2, ::2])
    assert not out[:, :2].any()
    assert not out[:, 6:].any()


def test_block_applies_its_last_activation_after_the_sum():
    block = models.BasicBlock(4, 4, 1, projection=False).eval()
    nn.init.zeros_(block.conv2.weight)
    maps = torch.randn(2, 4, 6, 6)
    assert torch.equal(block(maps), maps.relu())


def test_resnet18_takes_the_imagenet_form_from_64_pixels():
    assert models.build("resnet18", (3, 63, 63), 10).conv1.kernel_size == (3, 3)
    assert models.build("resnet18", (3, 64, 64), 10).conv1.kernel_size == (7, 7)


@pytest.mark.parametrize("name", ["mlp-16-16", "lenet", "lenet-cifar", "resnet8"])
def test_graph_is_captured_whole(name):
    """No graph break: the eager backend runs the traced graph without a C++ compiler."""
    torch.manual_seed(0)
    model = models.build(name, (1, 28, 28), 10)
    inputs = torch.randn(2, 1, 28, 28)
    expected = model(inputs)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(inputs), expected)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("lenet", (1, 8, 8), "model 'lenet' needs 28x28 or 32x32 images; got 8x8"),
        ("lenet", (64,), "needs images"),
        ("lenet-cifar", (3, 17, 32), "at least 18x18; got 17x32"),
        ("resnet20", (1, 3, 3), "at least 4x4; got 3x3"),
        ("resnet18", (1, 7, 7), "at least 8x8; got 7x7"),
        ("resnet19", (1, 8, 8), "unknown model 'resnet19'; did you mean"),
        ("lenett", (1, 28, 28), "did you mean 'lenet'"),
        ("mlp", (1, 8, 8), "mlp-512-512"),
        ("mlp-0", (1, 8, 8), "mlp-512-512"),
        ("mlp--4", (1, 8, 8), "mlp-512-512"),
        ("mlp-3", (0, 8), "non-empty"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(name, shape, message):
    with pytest.raises(ConfigError) as caught:
        models.build(name, shape, 10)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_constructors_refuse_impossible_sizes():
    with pytest.raises(ConfigError, match="6n"):
        models.CifarResNet(21)
    with pytest.raises(ConfigError, match="four stages"):
        models.ResNet((2, 2))
    with pytest.raises(ConfigError, match="28x28"):
        models.LeNet(size=30)
    with pytest.raises(ConfigError, match="at least one unit"):
        models.mlp(3, [0], 2)


def test_names_lists_the_mlp_pattern():
    assert models.names()[0] == "mlp-<widths>"
    assert {"lenet", "lenet-cifar", "resnet8", "resnet18", "resnet20", "resnet32", "resnet56"} <= set(models.names())


def test_perceptrons_of_the_feedback_control_paper():
    model = models.build("mlp-tanh-256-256-256", (1, 28, 28), 10)
    kinds = [type(module).__name__ for module in model]
    assert kinds == ["Flatten", "Linear", "Tanh", "Linear", "Tanh", "Linear", "Tanh", "Linear"]
    assert [name for name, _ in model.named_children()][1:4] == ["linear1", "tanh1", "linear2"]
    assert parameters(model) == 784 * 256 + 256 + 2 * (256 * 256 + 256) + 2570
    auto = models.build("autoencoder-256-32-256", (1, 28, 28), 784)
    kinds = [type(module).__name__ for module in auto]
    assert kinds == ["Flatten", "Linear", "Tanh", "Linear", "Identity", "Linear", "Tanh", "Linear"]
    widths = [module.out_features for module in auto if isinstance(module, nn.Linear)]
    assert widths == [256, 32, 256, 784]
    for network in (model, auto):
        for layer in (module for module in network if isinstance(module, nn.Linear)):
            assert not layer.bias.any()
            variance = 2 / (layer.in_features + layer.out_features)
            assert layer.weight.square().mean().item() == pytest.approx(variance, rel=0.1)
            if layer.weight.numel() > 50_000:  # normal, not uniform: the fourth moment is 3 variances squared, not 1.8
                assert layer.weight.pow(4).mean().item() == pytest.approx(3 * variance**2, rel=0.1)


@pytest.mark.parametrize("gain", [0.5, 3.0])
def test_xavier_normal_has_a_gain(gain):
    layer = models.xavier_normal_(nn.Linear(300, 200), gain)
    assert layer.weight.square().mean().item() == pytest.approx(gain**2 * 2 / 500, rel=0.05)
    assert not layer.bias.any()


def test_mlp_takes_any_activation():
    model = models.mlp(3, [4, 4], 2, nn.Sigmoid)
    assert [name for name, _ in model.named_children()] == [
        "flatten",
        "linear1",
        "sigmoid1",
        "linear2",
        "sigmoid2",
        "linear3",
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mlp-tanh", "mlp-tanh-256-256-256"),
        ("mlp-tanh-0", "mlp-tanh-256-256-256"),
        ("autoencoder", "autoencoder-256-32-256"),
        ("autoencoder-8-8", "odd number of hidden layers; got 8-8"),
        ("autoencodr-8", "did you mean 'autoencoder-<widths>'"),
        ("mlp-tahn-8", "mlp-512-512"),
    ],
)
def test_names_of_perceptrons_that_do_not_fit(name, said):
    with pytest.raises(ConfigError, match=said):
        models.build(name, (1, 8, 8), 10)
