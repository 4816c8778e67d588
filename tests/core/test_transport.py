"""The backward map of every layer type against autograd and against the definition of a transpose, over random layers."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from apical.core.transport import as_matrix, from_matrix, geometry, padded_input, transport, weight_gradient
from apical.errors import UnsupportedModelError

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
quick = settings(max_examples=60, deadline=None, derandomize=True)


def per_dimension(draw: st.DrawFn, dims: int, low: int, high: int) -> tuple[int, ...]:
    return tuple(draw(st.integers(low, high)) for _ in range(dims))


def channels(draw: st.DrawFn) -> tuple[int, int, int]:
    """Input channels, output channels, groups; groups = input channels is a depthwise convolution."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    return groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2)), groups


@st.composite
def dense(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """A Linear layer and an input shape of one to four dimensions."""
    torch.manual_seed(draw(st.integers(0, 999)))
    layer = nn.Linear(draw(st.integers(1, 4)), draw(st.integers(1, 4)), bias=draw(st.booleans()))
    leading = per_dimension(draw, draw(st.integers(0, 3)), 1, 3)
    return layer.double(), (*leading, layer.in_features)


@st.composite
def convolution(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """A convolution with any options and an input shape it accepts, batched or not."""
    torch.manual_seed(draw(st.integers(0, 999)))
    dims = draw(st.sampled_from([1, 2, 2, 3]))
    c_in, c_out, groups = channels(draw)
    kernel, dilation = per_dimension(draw, dims, 1, 4 if dims < 3 else 2), per_dimension(draw, dims, 1, 2)
    padding = draw(st.sampled_from(["same", "valid", "numbers", "numbers"]))
    stride = (1,) * dims if padding == "same" else per_dimension(draw, dims, 1, 3)
    if padding == "numbers":
        padding = per_dimension(draw, dims, 0, 2)
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    bias = draw(st.booleans())
    layer = CONVOLUTIONS[dims](c_in, c_out, kernel, stride, padding, dilation, groups, bias, mode)
    size = [max(d * (k - 1) + 1, 3) + draw(st.integers(0, 2)) for k, d in zip(kernel, dilation, strict=True)]
    return layer.double(), (*draw(st.sampled_from([(), (1,), (2,)])), c_in, *size)


@st.composite
def transposed_convolution(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """A transposed convolution with any options and an input shape it accepts, batched or not."""
    torch.manual_seed(draw(st.integers(0, 999)))
    dims = draw(st.sampled_from([1, 2, 2, 3]))
    c_in, c_out, groups = channels(draw)
    kernel, dilation = per_dimension(draw, dims, 1, 4 if dims < 3 else 2), per_dimension(draw, dims, 1, 2)
    stride = per_dimension(draw, dims, 1, 3)
    padding = tuple(draw(st.integers(0, min(2, d * (k - 1) // 2))) for k, d in zip(kernel, dilation, strict=True))
    output_padding = tuple(draw(st.integers(0, s - 1)) for s in stride)
    bias = draw(st.booleans())
    layer = TRANSPOSED[dims](c_in, c_out, kernel, stride, padding, output_padding, groups, bias, dilation)
    size = per_dimension(draw, dims, 1, 4)
    return layer.double(), (*draw(st.sampled_from([(), (1,), (2,)])), c_in, *size)


any_layer = st.one_of(dense(), convolution(), transposed_convolution())


def close(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= 1e-12 * max(1.0, float(b.abs().max()))


def sent_back(layer: nn.Module, inputs: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
    """`K^T delta` at the true input: through the layer's map, then through its padding."""
    padded = padded_input(layer, inputs)
    below = transport(geometry(layer), delta, weight, padded.detach())
    return below if padded is inputs else torch.autograd.grad(padded, inputs, below)[0]


@quick
@given(any_layer)
def test_transport_with_the_own_weight_is_the_input_gradient(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    layer, shape = case
    inputs = torch.randn(shape, dtype=torch.double, requires_grad=True)
    output = layer(inputs)
    delta = torch.randn_like(output)
    exact = torch.autograd.grad(output, inputs, delta)[0]
    close(sent_back(layer, inputs, delta, layer.weight.detach()), exact)


@quick
@given(any_layer)
def test_transport_with_another_weight_is_that_of_the_layer_carrying_it(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    layer, shape = case
    inputs = torch.randn(shape, dtype=torch.double, requires_grad=True)
    other = copy.deepcopy(layer)
    nn.init.normal_(other.weight)
    output = other(inputs)
    delta = torch.randn_like(output)
    exact = torch.autograd.grad(output, inputs, delta)[0]
    close(sent_back(layer, inputs, delta, other.weight.detach()), exact)


@quick
@given(any_layer)
def test_transport_is_the_transpose_of_the_layers_linear_map(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    """`<W x, delta> = <x, W^T delta>` for all x and delta: no autograd of the layer is involved."""
    layer, shape = case
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    inputs = torch.randn(shape, dtype=torch.double, requires_grad=True)
    with torch.no_grad():
        output = layer(inputs)
    delta = torch.randn_like(output)
    below = sent_back(layer, inputs, delta, layer.weight.detach())
    left, right = (output * delta).sum(), (inputs.detach() * below).sum()
    assert abs(float(left - right)) <= 1e-11 * max(1.0, float((output * delta).abs().sum()))


@quick
@given(any_layer)
def test_weight_gradient_is_autograds(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    layer, shape = case
    if len(shape) == 1:
        shape = (1, *shape)  # one unbatched vector has its own test
    inputs = torch.randn(shape, dtype=torch.double)
    output = layer(inputs)
    delta = torch.randn_like(output)
    exact = torch.autograd.grad(output, layer.weight, delta)[0]
    close(weight_gradient(geometry(layer), delta, padded_input(layer, inputs), layer.weight.detach()), exact)


def test_weight_gradient_of_one_vector_is_the_outer_product() -> None:
    delta, inputs = torch.tensor([2.0, 3.0]), torch.tensor([5.0, 7.0, 11.0])
    expected = torch.tensor([[10.0, 14.0, 22.0], [15.0, 21.0, 33.0]])
    assert torch.equal(weight_gradient(None, delta, inputs, torch.zeros(2, 3)), expected)


@quick
@given(any_layer)
def test_as_matrix_and_from_matrix_are_inverse(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    layer, _ = case
    kind, weight = geometry(layer), layer.weight.detach()
    matrix = as_matrix(kind, weight)
    n_out = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    assert matrix.shape == (n_out, weight.numel() // n_out)
    assert torch.equal(from_matrix(kind, matrix, weight), weight)


def output_channels(layer: nn.Module, output: Tensor) -> Tensor:
    """The output as (channels, everything else)."""
    axis = -1 if isinstance(layer, nn.Linear) else -1 - len(layer.stride)
    moved = output.movedim(axis, 0)
    return moved.reshape(len(moved), -1)


@quick
@given(any_layer, st.integers(0, 99))
def test_one_row_of_the_matrix_belongs_to_one_output_channel(case: tuple[nn.Module, tuple[int, ...]], draw: int) -> None:
    layer, shape = case
    kind, weight = geometry(layer), layer.weight.detach().clone()
    matrix = as_matrix(kind, weight).clone()
    row = draw % len(matrix)
    inputs = torch.rand(shape, dtype=torch.double) + 1.0  # positive, so that a positive change shows at every output
    before = output_channels(layer, layer(inputs).detach())
    matrix[row] += 1.0
    layer.weight.data = from_matrix(kind, matrix, weight).clone()
    after = output_channels(layer, layer(inputs).detach())
    changed = [i for i in range(len(before)) if not torch.equal(before[i], after[i])]
    # a window of padding alone, or a hole of a strided transposed convolution, sees no weight at all
    sees = output_channels(layer, _with_ones(layer)(torch.ones(shape, dtype=torch.double)).detach()).abs().max() > 0
    assert changed == ([row] if sees else [])


def _with_ones(layer: nn.Module) -> nn.Module:
    twin = copy.deepcopy(layer)
    nn.init.ones_(twin.weight)
    if twin.bias is not None:
        nn.init.zeros_(twin.bias)
    return twin


@quick
@given(any_layer, st.integers(2, 3))
def test_a_matrix_with_more_rows_is_a_layer_with_more_channels(case: tuple[nn.Module, tuple[int, ...]], times: int) -> None:
    """Each row repeated `times` over is the layer whose every output channel is repeated."""
    layer, shape = case
    kind, weight = geometry(layer), layer.weight.detach()
    wide = copy.deepcopy(layer)
    wide.weight.data = from_matrix(kind, as_matrix(kind, weight).repeat_interleave(times, 0), weight).clone()
    if wide.bias is not None:
        wide.bias.data = layer.bias.detach().repeat_interleave(times)
    inputs = torch.randn(shape, dtype=torch.double)
    expected = output_channels(layer, layer(inputs).detach()).repeat_interleave(times, 0)
    close(output_channels(wide, wide(inputs).detach()), expected)


def test_the_weight_takes_the_dtype_of_the_error() -> None:
    layer = nn.Conv2d(2, 3, 3)
    delta, inputs = torch.randn(1, 3, 2, 2, dtype=torch.bfloat16), torch.randn(1, 2, 4, 4, dtype=torch.bfloat16)
    assert transport(geometry(layer), delta, layer.weight.detach(), inputs).dtype == torch.bfloat16
    assert transport(None, delta, torch.randn(2, 5), delta).dtype == torch.bfloat16


def test_unknown_layer_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match="Bilinear"):
        geometry(nn.Bilinear(2, 2, 2))


def test_registered_subclass_inherits_its_parents_map() -> None:
    class Special(nn.Conv2d):
        pass

    assert geometry(Special(2, 4, 3, stride=2, padding=1, groups=2)) == geometry(nn.Conv2d(2, 4, 3, 2, 1, groups=2))
