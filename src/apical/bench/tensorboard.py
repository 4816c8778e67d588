"""Epoch metrics as TensorBoard events, in addition to metrics.jsonl, which remains the record."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from apical.errors import ConfigError


def check_installed() -> None:
    """Refuse --tensorboard if TensorBoard is missing.

    Raises:
        ConfigError: TensorBoard is not installed.
    """
    try:
        import tensorboard  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--tensorboard needs TensorBoard: pip install 'apical[tensorboard]' ({error})") from error


def scalars(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number of an epoch's line, nested names joined by "/", without the epoch itself.

    >>> list(scalars({"epoch": 1, "train_loss": 0.5, "layers": {"fc1": {"norm_ratio": 2}}, "condition_two": None}))
    [('train_loss', 0.5), ('layers/fc1/norm_ratio', 2.0)]
    """
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and f"{prefix}{name}" != "epoch":
            yield f"{prefix}{name}", float(value)


class Events:
    """The event files of one run; nothing is opened before the first line.

    Args:
        folder: folder of the files. A run that continues in it after an interruption replaces the epochs it repeats.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    def add(self, line: Mapping[str, Any]) -> None:
        """Write one finished epoch."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=line["epoch"])
        for name, value in scalars(line):
            self._writer.add_scalar(name, value, line["epoch"])
        self._writer.flush()
