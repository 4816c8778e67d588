"""Shared by the commands: lines, tables and bars in a terminal, checks of options, and locks on folders being written."""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from apical.bench.distributed import under_torchrun
from apical.bench.folders import check_writable, refuse_used
from apical.bench.progress import shown_path
from apical.bench.run_folder import FolderLock
from apical.errors import ConfigError

Terminal = partial(Console, markup=False, emoji=False)
"""A console that prints texts literally, without `[bold]` as a style or the end of `my_data.py:cat:` as an emoji."""


def say(text: str, console: Console | None = None) -> None:
    """Print a text unchanged, without breaking its lines."""
    (console or Terminal()).print(text, highlight=False, soft_wrap=True)


def say_files(out: Path, names: Iterable[str]) -> None:
    """Print the paths of files in a folder, labelled by their extensions."""
    for name in names:
        say(f"{name.rpartition('.')[2]}: {shown_path(out / name)}")


def show_table(heads: Sequence[str], lines: Iterable[Sequence[str]], left: Sequence[str], *, whole: bool = False) -> None:
    """Print a table; columns are right-aligned except those whose heads are in `left`, which may be kept `whole`."""
    table, console, rows = Table(box=None, pad_edge=False), Terminal(), list(lines)
    cells = [max((len(row[i]) for row in rows), default=0) for i in range(len(heads))]
    natural = [max(len(head), size) for head, size in zip(heads, cells, strict=True)]
    is_narrow = sum(natural) + 2 * len(heads) > console.width
    for head, size in zip(heads, cells, strict=True):
        is_left, least = head in left, max(size, *map(len, head.split()))
        text = textwrap.fill(head, least) if is_narrow and not is_left else head  # at spaces, where rich would cut words
        table.add_column(text, justify="left" if is_left else "right", overflow="fold", no_wrap=whole and is_left)
    for row in rows:
        table.add_row(*row)
    console.print(table)


@contextmanager
def bar(total: int, text: str = "", *columns: ProgressColumn, transient: bool = True) -> Iterator[Callable[..., None]]:
    """Show a progress bar, only in a terminal; yield a function to update `advance`, `completed` or `description`."""
    console = Terminal()
    if not console.is_terminal:
        yield lambda **changes: None
        return
    columns = columns or (TextColumn("{task.description}"), BarColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=transient) as progress:
        yield partial(progress.update, progress.add_task(text, total=total))


def check_alone(command: str, flags: Any, what: str) -> None:
    """Raise an error under torchrun, or if the folder cannot be written or its content must not be replaced."""
    if under_torchrun():
        raise ConfigError(f"apical {command} is single-process; do not run it under torchrun")
    if flags.out is not None:
        check_writable(flags.out, f"{command}.json")
        if not flags.overwrite:
            refuse_used(flags.out, f"add --overwrite to replace {what} in it")


@contextmanager
def held(out: Path | None, doing: str, check: Callable[[], None]) -> Iterator[None]:
    """Lock the folder within the block. It is checked before and after the lock: its last holder may have written to it."""
    check()
    with nullcontext() if out is None else FolderLock(out).held(doing, wait=0):
        check()
        yield
