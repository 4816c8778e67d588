"""Pooling for equilibrium networks: smooth, and analytic, so that states can be complex."""

from torch import Tensor, nn

from apical.core.layers import POOLS
from apical.errors import ConfigError


class SoftmaxPool2d(nn.Module):
    """Mean of each window, weighted by the softmax of its values (Laborieux & Zenke 2022, arXiv 2209.00530).

    Windows do not overlap and incomplete ones are dropped, as in max-pooling, which a large sharpness approaches.

    Args:
        kernel_size: side of a window.
        sharpness: factor of the values within the softmax. The released code calls it a temperature; whether it multiplies
            or divides was found in no source that could be read, and for the value 1 it makes no difference.

    Raises:
        ConfigError: an option is not positive.

    >>> SoftmaxPool2d(2)(Tensor([[[[3.0, 3.0], [3.0, 3.0]]]])).item()
    3.0
    """

    def __init__(self, kernel_size: int = 2, sharpness: float = 1.0) -> None:
        super().__init__()
        if kernel_size < 1 or not 0 < sharpness < float("inf"):
            raise ConfigError(
                f"kernel_size and sharpness of softmax pooling must be positive, got {kernel_size}, {sharpness}"
            )
        self.kernel_size, self.sharpness = kernel_size, sharpness

    def forward(self, v: Tensor) -> Tensor:
        """Return (batch, channels, height, width), real or complex."""
        size = self.kernel_size
        windows = v.unfold(2, size, size).unfold(3, size, size).flatten(4)
        sharp = self.sharpness * windows
        if not v.is_complex():
            return (sharp.softmax(-1) * windows).sum(-1)
        highest = sharp.real.detach().amax(-1, keepdim=True)  # for the size of numbers alone: it cancels
        weights = (sharp - highest).exp()
        return (weights * windows).sum(-1) / weights.sum(-1)

    def extra_repr(self) -> str:
        """Return the options, as printed."""
        return f"kernel_size={self.kernel_size}, sharpness={self.sharpness:g}"


POOLS.append(SoftmaxPool2d)
