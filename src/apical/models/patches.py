"""Small networks on image patches: the vision transformer (arXiv 2010.11929) and the MLP-Mixer (arXiv 2105.01601)."""

import torch
from torch import Tensor, nn

from apical.errors import ConfigError
from apical.models.initialisation import xavier_
from apical.models.transformer import EMBEDDING, Block

WIDTH, BLOCKS, HEADS = 96, 4, 4


class Patches(nn.Module):
    """Cut an image into squares and embed each as a vector: (N, channels, H, W) -> (N, squares, width).

    Args:
        side: pixels along a square; None means 4, or 2 for images smaller than 16x16.

    Raises:
        ConfigError: height or width is not divisible by `side`.
    """

    def __init__(self, shape: tuple[int, int, int], width: int, side: int | None = None) -> None:
        super().__init__()
        channels, height, breadth = shape
        side = (4 if min(height, breadth) >= 16 else 2) if side is None else side
        if height % side or breadth % side:
            raise ConfigError(f"images of {height}x{breadth} cannot be cut into squares of {side}x{side} pixels")
        self.number = (height // side) * (breadth // side)
        self.conv = nn.Conv2d(channels, width, side, stride=side)
        self.flatten = nn.Flatten(2)

    def forward(self, images: Tensor) -> Tensor:
        """Return the vectors of the squares, row by row."""
        vectors: Tensor = self.flatten(self.conv(images)).transpose(1, 2)
        return vectors


class VisionTransformer(nn.Module):
    """Attention blocks over all patches, mean pooling, a readout: (N, channels, H, W) -> (N, num_classes).

    Args:
        shape: shape of one image.
        num_classes: number of logits.
        width: width of the residual stream.
        blocks: number of blocks.
        heads: attention heads per block.
        side: pixels along a patch; None means 4, or 2 for images smaller than 16x16.

    Raises:
        ConfigError: height or width of the images is not divisible by `side`.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_classes: int,
        width: int = WIDTH,
        blocks: int = BLOCKS,
        heads: int = HEADS,
        side: int | None = None,
    ) -> None:
        super().__init__()
        self.patches = Patches(shape, width, side)
        self.positions = nn.Embedding(self.patches.number, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        xavier_(self)
        nn.init.normal_(self.positions.weight, std=EMBEDDING)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch."""
        places = self.positions(torch.arange(self.patches.number, device=images.device))
        logits: Tensor = self.head(self.norm(self.blocks(self.patches(images) + places)).mean(1))
        return logits


class Mixer(nn.Module):
    """Blocks that mix patches and channels in turn, mean pooling, a readout: (N, channels, H, W) -> (N, num_classes).

    Args:
        shape: shape of one image.
        num_classes: number of logits.
        width: width of the residual stream.
        blocks: number of blocks.
        side: pixels along a patch; None means 4, or 2 for images smaller than 16x16.

    Raises:
        ConfigError: height or width of the images is not divisible by `side`.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_classes: int,
        width: int = WIDTH,
        blocks: int = BLOCKS,
        side: int | None = None,
    ) -> None:
        super().__init__()
        self.patches = Patches(shape, width, side)
        self.blocks = nn.Sequential(*(MixerBlock(self.patches.number, width) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        xavier_(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch."""
        logits: Tensor = self.head(self.norm(self.blocks(self.patches(images))).mean(1))
        return logits


class MixerBlock(nn.Module):
    """A perceptron across patches, then one across channels, each added to the residual stream (N, number, width)."""

    def __init__(self, number: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.mix1 = nn.Linear(number, 2 * number)
        self.gelu1 = nn.GELU()
        self.mix2 = nn.Linear(2 * number, number)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.gelu2 = nn.GELU()
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream after this block: (N, number, width) -> (N, number, width)."""
        x = x + self.mix2(self.gelu1(self.mix1(self.norm1(x).transpose(1, 2)))).transpose(1, 2)
        x = x + self.down(self.gelu2(self.up(self.norm2(x))))
        return x
