"""Small float64 networks on which rules are tested, and batches for them."""

import torch
from torch import Tensor, nn


class _Block(nn.Module):
    """Pre-sum convolution block with a projection shortcut, as in a ResNet."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.norm1, self.relu1 = nn.BatchNorm2d(c_out), nn.ReLU()
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(c_out), nn.ReLU()
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, c_in, h, w) to (batch, c_out, h/stride, w/stride)."""
        hidden = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        result: Tensor = self.relu2(hidden + self.shortcut(x))
        return result


def dense_network() -> nn.Sequential:
    """Small float64 network for inputs (batch, 6) and 4 classes."""
    layers = (nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 4))
    return nn.Sequential(*layers).double()


def residual_network() -> nn.Sequential:
    """Small float64 residual BatchNorm network for inputs (batch, 2, 8, 8) and 4 classes."""
    stem = (nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    return nn.Sequential(*stem, _Block(4, 4, 1), _Block(4, 6, 2), *head).double()


def dense_batch(seed: int, size: int = 8) -> tuple[Tensor, Tensor]:
    """Inputs (size, 6) and classes (size,) for :func:`dense_network`."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 6, dtype=torch.double, generator=generator)
    return inputs, torch.randint(0, 4, (size,), generator=generator)


def image_batch(seed: int, size: int = 8) -> tuple[Tensor, Tensor]:
    """Inputs (size, 2, 8, 8) and classes (size,) for :func:`residual_network`."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 2, 8, 8, dtype=torch.double, generator=generator)
    return inputs, torch.randint(0, 4, (size,), generator=generator)
