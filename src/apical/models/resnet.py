"""Residual networks of He et al. 2016 (arXiv 1512.03385).

`CifarResNet` is the thin three-stage network of 6n + 2 layers with parameter-free shortcuts ("option A": subsample, pad
the new channels with zeros). `ResNet` is the four-stage network of basic blocks, with 18 layers by default and a
1x1 convolution with BatchNorm on the shortcuts that change shape. In both, every activation is a separate module, and
the last activation of a block follows the residual sum.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from apical.errors import ConfigError
from apical.models.initialisation import xavier_


class ZeroPadShortcut(nn.Module):
    """Option A: (N, C, H, W) -> (N, C + `extra`, ceil(H / stride), ceil(W / stride)), new channels zero.

    Half of the zeros come before the old channels and half after them. It has no parameters.
    """

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.front = extra // 2
        self.behind = extra - extra // 2
        self.stride = stride

    def forward(self, maps: Tensor) -> Tensor:
        """Subsample and pad: see the class."""
        return F.pad(maps[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.front, self.behind))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm around a shortcut: (N, C_in, H, W) -> (N, C_out, H / stride, W / stride).

    `projection` picks the shortcut where the shape changes: 1x1 convolution with BatchNorm, or zero padding.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            if projection:
                self.shortcut = nn.Sequential(
                    OrderedDict(
                        conv=nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                        bn=nn.BatchNorm2d(out_channels),
                    )
                )
            else:
                self.shortcut = ZeroPadShortcut(out_channels - in_channels, stride)
        self.relu2 = nn.ReLU()

    def forward(self, maps: Tensor) -> Tensor:
        """Return the last activation of residual branch plus shortcut."""
        residual = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(maps)))))
        out: Tensor = self.relu2(residual + self.shortcut(maps))
        return out


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int, projection: bool) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride, projection)
    rest = (BasicBlock(out_channels, out_channels, 1, projection) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


class CifarResNet(nn.Module):
    """Thin residual network of `depth` = 6n + 2 layers (8, 20, 32, 56, ...): (N, channels, H, W) -> (N, num_classes).

    Stages of 16, 32 and 64 channels at full, half and quarter resolution. Images need at least 4 pixels a side (see
    `smallest`).

    Raises:
        ConfigError: `depth` is not 6n + 2.
    """

    smallest = 4

    def __init__(self, depth: int = 20, channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ConfigError(f"a CIFAR ResNet has 6n + 2 layers (8, 14, 20, ...); got depth {depth}")
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu1 = nn.ReLU()
        self.stage1 = _stage(16, 16, blocks, 1, projection=False)
        self.stage2 = _stage(16, 32, blocks, 2, projection=False)
        self.stage3 = _stage(32, 64, blocks, 2, projection=False)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(64, num_classes)
        xavier_(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch: (N, channels, H, W) -> (N, num_classes)."""
        maps = self.relu1(self.bn1(self.conv1(images)))
        maps = self.stage3(self.stage2(self.stage1(maps)))
        logits: Tensor = self.linear(self.flatten(self.pool(maps)))
        return logits


class ResNet(nn.Module):
    """Four-stage residual network of basic blocks, ResNet-18 by default: (N, channels, H, W) -> (N, num_classes).

    Args:
        blocks: number of blocks in each of the four stages (64, 128, 256, 512 channels).
        channels: channels of the images.
        num_classes: number of logits.
        small_images: True for the CIFAR form (3x3 stem at full resolution, at least 8 pixels a side, see `smallest`);
            False for the ImageNet form (7x7 stem with stride 2 and max pooling).
    """

    smallest = 8

    def __init__(
        self,
        blocks: Sequence[int] = (2, 2, 2, 2),
        channels: int = 3,
        num_classes: int = 1000,
        small_images: bool = False,
    ) -> None:
        super().__init__()
        if len(blocks) != 4 or min(blocks) < 1:
            raise ConfigError(f"a ResNet has four stages of at least one block; got {tuple(blocks)}")
        self.pool1: nn.Module
        if small_images:
            self.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
            self.pool1 = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
            self.pool1 = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu1 = nn.ReLU()
        self.stage1 = _stage(64, 64, blocks[0], 1, projection=True)
        self.stage2 = _stage(64, 128, blocks[1], 2, projection=True)
        self.stage3 = _stage(128, 256, blocks[2], 2, projection=True)
        self.stage4 = _stage(256, 512, blocks[3], 2, projection=True)
        self.pool2 = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(512, num_classes)
        xavier_(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch: (N, channels, H, W) -> (N, num_classes)."""
        maps = self.pool1(self.relu1(self.bn1(self.conv1(images))))
        maps = self.stage4(self.stage3(self.stage2(self.stage1(maps))))
        logits: Tensor = self.linear(self.flatten(self.pool2(maps)))
        return logits
