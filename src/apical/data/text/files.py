"""A user's text file."""

from pathlib import Path

from apical.data.dataset import Samples
from apical.data.text.sequences import Level, of_text
from apical.errors import DataError

SHARE = 0.1
"""Share of a text, at its end, that is set aside for testing."""


def read(path: Path, context: int, level: Level) -> Samples:
    """Read windows of a UTF-8 text; the last tenth is test text.

    Raises:
        DataError: the file is not text, or too short.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--data {path}: not a text in UTF-8 ({error}); save it as UTF-8") from error
    cut = round(len(text) * (1 - SHARE))
    sequences = of_text(text[:cut], text[cut:], context, level, where=path.name, source=str(path))
    return sequences
