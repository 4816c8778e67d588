"""Rows of text for a terminal or a pipe: names are never cut, long texts are wrapped if the output has a margin."""

import shutil
import sys
import textwrap
from collections.abc import Sequence

_LEAST = 24
"""Width in characters below which the last column moves to separate lines."""


def margin() -> int | None:
    """Return the width of the terminal, or None if the output goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def columns(rows: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """Return lines with the cells aligned in columns. The last cell is wrapped to the width, the others stay whole.

    >>> columns([("a", "one two three"), ("long", "four")], 40)
    ['a     one two three', 'long  four']
    >>> columns([("a", "one two three four five six seven")], 28)
    ['a  one two three four five', '   six seven']
    """
    sizes = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)] if rows else []
    left = sum(sizes) + 2 * len(sizes)
    lines = []
    for *cells, last in rows:
        start = "  ".join(f"{cell:{size}s}" for cell, size in zip(cells, sizes, strict=True)) + "  "
        if width is None:
            lines.append((start + last).rstrip())
        elif width - left < _LEAST:
            lines += [start.rstrip(), *textwrap.wrap(last, width, initial_indent="    ", subsequent_indent="    ")]
        else:
            first, *rest = textwrap.wrap(last, width - left, break_on_hyphens=False, break_long_words=False) or [""]
            lines += [(start + first).rstrip(), *(" " * left + line for line in rest)]
    return lines
