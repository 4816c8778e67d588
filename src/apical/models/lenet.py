"""Small convolutional networks without normalisation.

`LeNet` has the layer sizes of LeNet-5 (LeCun et al. 1998) with ReLU and max pooling in place of sigmoid and
trainable subsampling, as used in the feedback-alignment literature. `LeNetCIFAR` is the network with three
convolutions on which this project compares the speed of rules.
"""

from torch import Tensor, nn

from apical.errors import ConfigError
from apical.models.initialisation import xavier_


class LeNet(nn.Module):
    """LeNet-5-like network: (N, channels, size, size) -> (N, num_classes).

    Two 5x5 convolutions (6 and 16 channels), each with ReLU and 2x2 max pooling, then 400-120-84-`num_classes`.
    28x28 images are zero-padded by two pixels in the first convolution, so both sizes have the same parameters.

    Raises:
        ConfigError: `size` is neither 28 nor 32.
    """

    def __init__(self, channels: int = 1, size: int = 28, num_classes: int = 10) -> None:
        super().__init__()
        if size not in (28, 32):
            raise ConfigError(f"LeNet needs 28x28 or 32x32 images; got {size}x{size}")
        self.conv1 = nn.Conv2d(channels, 6, 5, padding=2 if size == 28 else 0)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.linear1 = nn.Linear(16 * 5 * 5, 120)
        self.relu3 = nn.ReLU()
        self.linear2 = nn.Linear(120, 84)
        self.relu4 = nn.ReLU()
        self.linear3 = nn.Linear(84, num_classes)
        xavier_(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch: (N, channels, size, size) -> (N, num_classes)."""
        maps = self.pool1(self.relu1(self.conv1(images)))
        maps = self.pool2(self.relu2(self.conv2(maps)))
        hidden = self.relu3(self.linear1(self.flatten(maps)))
        logits: Tensor = self.linear3(self.relu4(self.linear2(hidden)))
        return logits


class LeNetCIFAR(nn.Module):
    """Three 3x3 convolutions without padding and a hidden layer: (N, channels, H, W) -> (N, num_classes).

    Channels 32, 64, 128; ReLU after each; 2x2 max pooling after the first two; global average pooling; then
    128-256-`num_classes`. Images need at least 18 pixels a side (see `smallest`).
    """

    smallest = 18

    def __init__(self, channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.conv3 = nn.Conv2d(64, 128, 3)
        self.relu3 = nn.ReLU()
        self.pool3 = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear1 = nn.Linear(128, 256)
        self.relu4 = nn.ReLU()
        self.linear2 = nn.Linear(256, num_classes)
        xavier_(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch: (N, channels, H, W) -> (N, num_classes)."""
        maps = self.pool1(self.relu1(self.conv1(images)))
        maps = self.pool2(self.relu2(self.conv2(maps)))
        maps = self.pool3(self.relu3(self.conv3(maps)))
        logits: Tensor = self.linear2(self.relu4(self.linear1(self.flatten(maps))))
        return logits
