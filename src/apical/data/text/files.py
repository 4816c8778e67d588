"""A text file of the user's."""

from pathlib import Path

from apical.data.dataset import Samples
from apical.data.text.sequences import Level, of_text
from apical.errors import DataError

SHARE = 0.1
"""Share of a text, its end, that is set aside for testing."""


def read(path: Path, context: int, level: Level) -> Samples:
    """Windows of a UTF-8 text, the last tenth of which is test text.

    Raises:
        DataError: it is no text, or too short.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--data {path}: not a text in UTF-8 ({error}); save it as UTF-8") from error
    cut = round(len(text) * (1 - SHARE))
    sequences = of_text(text[:cut], text[cut:], context, level, where=path.name, source=str(path))
    return sequences
