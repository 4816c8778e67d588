"""Random flips and crops of whole batches, on the device of the batch."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from apical.errors import ConfigError


@dataclass(frozen=True)
class Augment:
    """Mirror each image horizontally with probability 1/2 (`flip`) and shift it by up to `crop` pixels each way.

    The shift is the usual random crop of an image padded by `crop` zeros on every side. The zeros are added to the
    batch as given: in a normalised batch they are the mean colour.
    """

    flip: bool = False
    crop: int = 0

    def __post_init__(self) -> None:
        if self.crop < 0:
            raise ConfigError(f"crop must not be negative; got {self.crop}")

    def __call__(self, batch: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return an augmented copy of `batch` (N, C, H, W), determined by the state of `generator`.

        Flip and shift are drawn for each image, on the generator's device (the batch's if there is none).
        Without flip and crop the batch itself is returned. Raises `ConfigError` for any other shape.
        """
        if batch.dim() != 4:
            raise ConfigError(f"augmentation needs images (N, C, H, W); got shape {tuple(batch.shape)}")
        if not self.flip and not self.crop:
            return batch
        count, channels, height, width = batch.shape
        device = batch.device if generator is None else generator.device
        rows = torch.arange(height, device=batch.device).expand(count, -1)
        columns = torch.arange(width, device=batch.device).expand(count, -1)
        if self.flip:
            mirrored = torch.rand((count, 1), generator=generator, device=device).to(batch.device) < 0.5
            columns = torch.where(mirrored, width - 1 - columns, columns)
        if self.crop:
            shift = torch.randint(0, 2 * self.crop + 1, (2, count, 1), generator=generator, device=device)
            row_shift, column_shift = shift.to(batch.device)
            rows, columns = rows + row_shift, columns + column_shift
            batch = F.pad(batch, (self.crop,) * 4)
        positions = rows[:, :, None] * batch.shape[3] + columns[:, None, :]
        index = positions.view(count, 1, -1).expand(-1, channels, -1)
        return batch.flatten(2).gather(2, index).view(count, channels, height, width)
