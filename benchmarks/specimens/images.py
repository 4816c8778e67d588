"""Small versions of well-known image networks, as people write them: functional activations, streams, concatenation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def lenet() -> nn.Module:
    """A chain: two convolutions, each with tanh and average pooling, and two dense layers."""
    first = (nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2))
    second = (nn.Conv2d(4, 6, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten())
    return nn.Sequential(*first, *second, nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 10))


class MnistExample(nn.Module):
    """The shape of PyTorch's basic MNIST example: two convolutions, dropout, functional ReLU, log-softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3)
        self.dropout1, self.dropout2 = nn.Dropout(0.25), nn.Dropout(0.5)
        self.fc1, self.fc2 = nn.Linear(6 * 4 * 4, 12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, 12, 12) -> log probabilities (batch, 10)."""
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = self.dropout1(F.max_pool2d(x, 2))
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        return F.log_softmax(self.fc2(self.dropout2(x)), dim=1)


class Vgg(nn.Module):
    """Stacks of convolution, batch norm and ReLU with pooling between, and one dense layer."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for size in (6, "M", 8, 8, "M"):
            if size == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                assert isinstance(size, int)
                layers += [nn.Conv2d(width, size, 3, padding=1), nn.BatchNorm2d(size), nn.ReLU(inplace=True)]
                width = size
        self.features, self.classifier = nn.Sequential(*layers), nn.Linear(8 * 2 * 2, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 8, 8) -> (batch, 10)."""
        return self.classifier(self.features(x).flatten(1))  # type: ignore[no-any-return]


class PreActivationBlock(nn.Module):
    """Batch norm and ReLU come before each convolution; the sum has no activation."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(c_in), nn.BatchNorm2d(c_out)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.shortcut = None if (c_in, stride) == (c_out, 1) else nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, c_in, h, w) -> (batch, c_out, h/stride, w/stride)."""
        out = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + skip  # type: ignore[no-any-return]


class PreActivationResNet(nn.Module):
    """A residual stream of pre-activation blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.layers = nn.Sequential(*(PreActivationBlock(*sizes) for sizes in ((4, 4, 1), (4, 6, 2), (6, 6, 1))))
        self.linear = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 8, 8) -> (batch, 10)."""
        return self.linear(self.layers(self.conv1(x)).mean((2, 3)))  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """A dense block's layer: its output is concatenated with its input."""

    def __init__(self, c_in: int, growth: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, 2 * growth, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, c_in, h, w) -> (batch, c_in + growth, h, w)."""
        out = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return torch.cat([out, x], 1)


class DenseNet(nn.Module):
    """Two dense blocks with a transition between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.dense1 = nn.Sequential(Bottleneck(4, 2), Bottleneck(6, 2))
        self.norm, self.squeeze = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1, bias=False)
        self.dense2 = nn.Sequential(Bottleneck(4, 2), Bottleneck(6, 2))
        self.bn, self.linear = nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 8, 8) -> (batch, 10)."""
        x = self.dense1(self.conv1(x))
        x = self.dense2(F.avg_pool2d(self.squeeze(F.relu(self.norm(x))), 2))
        return self.linear(F.relu(self.bn(x)).mean((2, 3)))  # type: ignore[no-any-return]


class Inverted(nn.Module):
    """Expansion, depthwise convolution, projection without an activation, skip."""

    def __init__(self, c_in: int, c_out: int, expansion: int, stride: int) -> None:
        super().__init__()
        width = expansion * c_in
        self.conv1, self.bn1 = nn.Conv2d(c_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, c_out, 1, bias=False), nn.BatchNorm2d(c_out)
        self.skips = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        """(batch, c_in, h, w) -> (batch, c_out, h/stride, w/stride)."""
        out = F.relu6(self.bn1(self.conv1(x)))
        out = F.relu6(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return out + x if self.skips else out  # type: ignore[no-any-return]


class MobileNet(nn.Module):
    """Inverted residuals with linear bottlenecks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.blocks = nn.Sequential(Inverted(4, 4, 2, 1), Inverted(4, 6, 2, 2), Inverted(6, 6, 2, 1))
        self.linear = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 8, 8) -> (batch, 10)."""
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


class SqueezeBlock(nn.Module):
    """A residual block whose channels are weighted by a small network of the map's means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.fc1, self.fc2 = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, h, w) -> the same."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        gate = self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(out, 1)))).sigmoid()
        return F.relu(out * gate + x)


class SeNet(nn.Module):
    """Squeeze-and-excitation blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.layers, self.linear = nn.Sequential(SqueezeBlock(6), SqueezeBlock(6)), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 8, 8) -> (batch, 10)."""
        return self.linear(self.layers(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))  # type: ignore[no-any-return]


def _double(c_in: int, c_out: int) -> nn.Sequential:
    convs = (nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(c_out, c_out, 3, padding=1))
    return nn.Sequential(*convs, nn.ReLU(inplace=True))


class UNet(nn.Module):
    """Down, up, and a concatenation across; a class for every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.pool = _double(1, 4), _double(4, 6), nn.MaxPool2d(2)
        self.up, self.joined, self.out = nn.ConvTranspose2d(6, 4, 2, stride=2), _double(8, 4), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, 8, 8) -> (batch, 3, 8, 8)."""
        across = self.down1(x)
        x = self.up(self.down2(self.pool(across)))
        return self.out(self.joined(torch.cat([across, x], 1)))  # type: ignore[no-any-return]
