"""Rows of blocks, what has no place in one, and mirrors."""

import pytest
import torch
from torch import Tensor, nn

from apical import models
from apical.core.blocks import blocks
from apical.errors import UnsupportedModelError
from apical.rules.counter_current.mirror import facing, mirrored


def test_blocks_hold_what_shapes_a_layers_input_and_what_follows_it() -> None:
    model = models.build("cnn-elu-bn-4-6", (3, 8, 8), 10)
    head, row = blocks(model, (3, 8, 8))
    names = {id(module): name for name, module in model.named_modules()}
    assert head == []
    assert [[names[id(m)] for m in block.modules] for block in row] == [
        ["norm1", "conv1", "elu1", "pool1", "norm2"],
        ["conv2", "elu2", "pool2"],
        ["flatten", "linear"],
    ]
    assert [block.shape for block in row] == [(4, 4, 4), (6, 2, 2), (10,)]
    x = torch.randn(2, 3, 8, 8)
    y = x
    for block in row:
        y = block(y)
    assert torch.equal(y, model(x))


def test_modules_without_parameters_before_the_first_layer_are_the_head() -> None:
    model = models.build("mlp-4", (1, 2, 2), 3)
    head, row = blocks(model, (1, 2, 2))
    assert [type(module) for module in head] == [nn.Flatten]
    assert [block.name for block in row] == ["linear1", "linear2"]


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(2 * self.one(x))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(self.one(x)))


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (Functional(), None, "'two' is not the output of module 'one' but the result of 'mul'"),
        (Twice(), None, "layer 'one' is called twice"),
        (models.build("resnet8", (3, 16, 16), 3), (3, 16, 16), "module '"),
        (nn.Sequential(nn.Conv2d(1, 2, 3)), None, "layer '0' is a convolution: pass input_shape"),
        (nn.Sequential(nn.Linear(3, 4), nn.Softmin(1), nn.Linear(4, 2)), None, r"module '1' \(Softmin\) has no place"),
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 2)), None, "cannot be run"),
    ],
    ids=["function", "twice", "residual", "shape", "unknown", "sizes"],
)
def test_what_is_no_row_is_refused_by_name(model: nn.Module, shape: tuple[int, ...] | None, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        blocks(model, shape)


GEOMETRIES = {
    "valid padding": nn.Conv2d(2, 3, 5),
    "stride 3": nn.Conv2d(2, 3, 3, stride=3, padding=1),
    "even kernel": nn.Conv2d(2, 3, 4, stride=2, padding=1),
    "dilation": nn.Conv2d(2, 3, 3, padding=2, dilation=2),
    "groups": nn.Conv2d(2, 4, 3, padding=1, groups=2),
    "no padding mode of zeros": nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"),
    "transposed": nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_mirrors_lead_back_to_the_shape_of_the_input(name: str) -> None:
    model = nn.Sequential(GEOMETRIES[name], nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    model(torch.zeros(1, 2, 12, 12))
    _, row = blocks(model, (2, 12, 12))
    b = torch.randn(4, 5)
    for block, module in zip(reversed(row), mirrored(row), strict=True):
        b = module(b)
        assert b.shape[1:] == block.input_shape
        assert block.layer.bias is None or all(not m.bias.any() for m in module if isinstance(m, nn.Conv2d))


def test_a_mirror_that_shrinks_is_strided_and_one_that_enlarges_can_be_transposed() -> None:
    model = models.build("cnn-stride-4", (1, 8, 8), 3)
    _, row = blocks(model, (1, 8, 8))
    nearest, transposed = mirrored(row)[1], mirrored(row, "transposed")[1]
    assert [type(m) for m in nearest] == [nn.Upsample, nn.Conv2d]
    assert [type(m) for m in transposed] == [nn.ConvTranspose2d]
    up = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(2, 1, 3, padding=1))
    back = mirrored(blocks(up, (1, 6, 6))[1])[0]
    assert back[0].stride == (2, 2)
    weight = facing(transposed[0].weight, row[0].layer, transposed[0])
    assert weight is transposed[0].weight


def test_statistics_of_the_batch_at_hand() -> None:
    """Normalisation that keeps none has those of the samples it is run on, of which one is too few."""
    norm = nn.BatchNorm1d(5, track_running_stats=False)
    _, row = blocks(nn.Sequential(nn.Linear(4, 5), norm, nn.Tanh(), nn.Linear(5, 3)), None)
    assert norm in row[0].modules
    model = nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    )
    with pytest.raises(UnsupportedModelError, match=r"layer '5' \(Linear\) has no mirror: Expected more than 1 spatial"):
        mirrored(blocks(model, (2, 8, 8))[1], depths=1)


def test_mirrors_copy_normalisation_and_activation_of_the_population_they_make() -> None:
    model = models.build("conv-autoencoder-4-6", (1, 8, 8), 64)
    kinds = [[type(m).__name__ for m in module] for module in mirrored(blocks(model, (1, 8, 8))[1])]
    assert kinds == [
        ["Unflatten", "Conv2d", "BatchNorm2d", "ReLU"],
        ["Conv2d", "BatchNorm2d", "ReLU"],
        ["Upsample", "Conv2d", "BatchNorm2d", "ReLU"],
        ["Upsample", "Conv2d"],
    ]
    assert not {id(p) for p in model.parameters()} & {
        id(p) for m in mirrored(blocks(model, (1, 8, 8))[1]) for p in m.parameters()
    }
