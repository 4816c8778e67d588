"""What a loaded data set is, and the check every split passes before it is trained on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from apical.errors import DataError

_CHUNK = 4096


@dataclass(frozen=True, eq=False)
class Split:
    """Images (N, C, H, W) or other samples, float32 and normalised, with labels (N,), int64, or numbers (N, M), float32.

    Or sequences: tokens (N, T) and a token as target at each position (N, T), -100 where there is none, int64.
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def answers(self) -> int:
        """Targets of a sample: one, or those of a sequence, in which all samples have equally many."""
        return 1 if self.targets.dim() == 1 else int((self.targets[0] >= 0).sum())


@dataclass(frozen=True, eq=False)
class Dataset:
    """The splits of one data set; `mean` and `std` are per channel, for pixels scaled to 0..1.

    `classes` is the number of classes or, where the targets are numbers, how many there are per sample. `source` says in
    words where the images came from and whether the set is whole.

    A user's data also have a checksum (sixteen hex digits of their content), a line on what was understood, and names of
    the classes where these are not 0, 1, ...
    """

    name: str
    train: Split
    validation: Split | None
    test: Split
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    sha256: str = ""
    about: str = ""
    class_names: tuple[str, ...] = ()
    is_text: bool = False
    """The next token is to be predicted; there are no right answers, only how well it is."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape (C, H, W) of one image, or that of one sample of another kind."""
        return tuple(self.train.inputs.shape[1:])

    @property
    def is_regression(self) -> bool:
        """Whether the targets are numbers (N, classes) instead of class labels (N,)."""
        return self.train.targets.is_floating_point()

    @property
    def is_sequences(self) -> bool:
        """Whether samples are sequences of tokens with a target at each."""
        return self.train.targets.dim() > 1 and not self.is_regression

    @property
    def counts_hits(self) -> bool:
        """Whether answers are right or wrong, so that there is an accuracy."""
        return not (self.is_regression or self.is_text)

    def output_shape(self, samples: int) -> tuple[int, ...]:
        """The shape of what a model says of so many samples: (N, classes), or (N, T, classes) of sequences."""
        positions = self.input_shape if self.is_sequences else ()
        return (samples, *positions, self.classes)


@dataclass(frozen=True, eq=False)
class Samples:
    """A user's own data, or sequences, before a part of them is chosen.

    Attributes:
        train: inputs (N, ...) and labels (N,) or numbers (N, outputs); of sequences tokens (N, T) and targets (N, T).
        test: likewise.
        classes: number of classes, of tokens, or of numbers per sample.
        names: of classes or tokens, where they are not 0, 1, ...
        about: what was understood, in a line.
        sha256: sixteen hex digits of inputs, targets and names, or of the text; empty where code alone makes them.
        source: where from, in words.
        is_text: told apart by how well the next token is predicted, not by right answers.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int
    names: tuple[str, ...]
    about: str
    sha256: str
    source: str
    is_text: bool = False


def check(inputs: Tensor, targets: Tensor, classes: int, where: str) -> None:
    """Raise `DataError` unless `inputs` (N, ...) and their targets are fit for training.

    Targets are integer labels (N,) or floating-point numbers (N, classes).

    The message starts with `where` (set and split) and names the first offending index. Refused are an empty
    split, different numbers of images and labels, labels outside 0..classes-1, and NaN or infinity in images or numbers.

    >>> check(torch.zeros(2, 1, 8, 8), torch.tensor([0, 10]), 10, "digits train split")
    Traceback (most recent call last):
        ...
    apical.errors.DataError: digits train split: label 10 at index 1 is outside 0..9
    """
    numbers = targets.is_floating_point() and targets.dim() > 1
    if inputs.dim() < 2 or (targets.shape[1:] != (classes,) if numbers else targets.dim() != 1):
        shape_in_words = f"numbers (N, {classes})" if numbers else "labels (N,)"
        shapes = f"{tuple(inputs.shape)} and {tuple(targets.shape)}"
        raise DataError(f"{where}: expected samples (N, ...) and {shape_in_words}; got shapes {shapes}")
    if len(inputs) != len(targets):
        raise DataError(f"{where}: {len(inputs)} inputs but {len(targets)} {'targets' if numbers else 'labels'}")
    if len(inputs) == 0 or inputs.numel() == 0:
        raise DataError(
            f"{where}: no samples"
            if len(inputs) == 0
            else f"{where}: samples of shape {tuple(inputs.shape[1:])} hold nothing"
        )
    if numbers:
        _check_finite(targets, f"{where}: NaN or infinity in the targets of the sample")
    elif targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise DataError(f"{where}: labels must be integers, or numbers of shape (N, {classes}); got {targets.dtype}")
    else:
        wrong = (targets < 0) | (targets >= classes)
        if bool(wrong.any()):
            index = int(wrong.nonzero()[0])
            raise DataError(f"{where}: label {int(targets[index])} at index {index} is outside 0..{classes - 1}")
    if inputs.is_floating_point():
        _check_finite(inputs, f"{where}: NaN or infinity in the sample")


def _check_finite(values: Tensor, problem: str) -> None:
    for start in range(0, len(values), _CHUNK):
        finite = values[start : start + _CHUNK].flatten(1).isfinite().all(dim=1)
        if not bool(finite.all()):
            raise DataError(f"{problem} at index {start + int((~finite).nonzero()[0])}")
