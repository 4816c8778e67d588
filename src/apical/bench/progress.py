"""Display of runs while they train: a live table or plain lines, read from the run folders, and the final table."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from apical.bench.restore import check_line
from apical.bench.run_folder import RunFolder
from apical.bench.state import parse_object, read_json
from apical.errors import CheckpointError

LINES = 45
"""Approximate number of lines printed if there is no terminal; a run's last epoch always has one."""


@dataclass
class Watched:
    """One run folder and how much of it has been read.

    Attributes:
        rule, seed, folder: those of the run.
        read: bytes of metrics.jsonl read so far.
        last: the last line read: if it is no longer at its place, the file was replaced and is read from its start.
        line: metrics of the last finished epoch.
        times: milliseconds per step in each epoch.
    """

    rule: str
    seed: int
    folder: RunFolder
    read: int = 0
    last: bytes = b""
    line: dict[str, Any] = field(default_factory=dict)
    times: dict[int, float] = field(default_factory=dict)

    def news(self) -> list[dict[str, Any]]:
        """Return complete lines added to metrics.jsonl since the last call; the training itself refuses damaged ones."""
        try:
            with open(self.folder.metrics, "rb") as file:
                file.seek(self.read - len(self.last))
                if file.read(len(self.last)) != self.last:  # rewound by a resume, or replaced
                    self._forget()
                    file.seek(0)
                content = file.read()
        except FileNotFoundError:
            self._forget()
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self.read += len(whole)
        self.last = whole[whole.rfind(b"\n", 0, -1) + 1 :] or self.last
        lines = []
        for text in whole.split(b"\n"):
            with suppress(ValueError):
                line = parse_object(text.decode())
                check_line(line, line.get("epoch"))
                lines.append(line)
        if lines:
            self.line = lines[-1]
        self.times |= {line["epoch"]: line["ms_per_step"] for line in lines if line["ms_per_step"]}
        return lines

    def _forget(self) -> None:
        self.read, self.last, self.line, self.times = 0, b"", {}, {}

    @property
    def diverged(self) -> bool:
        """Whether result.json says that the run diverged."""
        try:
            return bool(read_json(self.folder.result).get("status") == "diverged")
        except (OSError, CheckpointError):
            return False


class Watch:
    """Shows runs on a console: one live table in a terminal, otherwise lines of text.

    Args:
        epochs: number of epochs to train.
        anew: whether the present content of their folders will be replaced.
    """

    def __init__(self, console: Console, runs: Sequence[Watched], epochs: int, *, anew: bool = False) -> None:
        self._console, self._runs, self._epochs, self._anew = console, runs, epochs, anew
        self._every = math.ceil(len(runs) * (epochs + 1) / LINES)
        self._live: Live | None = None
        self._shown = 0.0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show runs within the block, updated by :meth:`refresh`. Earlier epochs are not printed again."""
        for run in self._runs if not self._anew else ():
            run.news()
        if not self._console.is_terminal:
            yield
            return
        with Live(self._table(), console=self._console, auto_refresh=False) as self._live:
            yield
            self._live.update(self._table(), refresh=True)
        self._live = None

    def refresh(self) -> None:
        """Read and show new epochs; cheap to call often."""
        if self._live is not None and time.monotonic() - self._shown < 0.2:
            return
        self._shown = time.monotonic()
        width = max((6, *(len(run.rule) for run in self._runs)))
        for run in self._runs:
            for line in run.news():
                if self._live is None and self._is_shown(line["epoch"]):
                    text = f"{run.rule:{width}s} seed {run.seed}  {describe(line, self._epochs)}"
                    self._console.print(text, highlight=False, soft_wrap=True)
        if self._live is not None:
            self._live.update(self._table(), refresh=True)

    def _is_shown(self, epoch: int) -> bool:
        """Return whether an epoch gets a line: all of them, or every nth and the last if there would be too many lines."""
        return epoch == self._epochs or self._every == 1 or (epoch > 0 and epoch % self._every == 0)

    def _table(self) -> Table:
        name = score_name([run.line for run in self._runs if run.line])
        table = Table("rule", "seed", "epoch", "train loss", name, "ms/step", box=None, pad_edge=False)
        for run in self._runs:
            line = run.line
            epoch = f"{line['epoch']}/{self._epochs}" if line else "waiting"
            if run.diverged:
                epoch = "diverged"
            cells = [number(line.get("train_loss"), ".4f"), score(line)]
            table.add_row(run.rule, str(run.seed), epoch, *cells, number(line.get("ms_per_step"), ".2f"))
        return table


def score_name(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the name of what :func:`score` shows: accuracy or, if no line has one but some have a loss, the test loss."""
    losses = any(line.get("test_loss") is not None for line in lines)
    return "test loss" if losses and all(line.get("test_accuracy") is None for line in lines) else "test accuracy"


def score(line: Mapping[str, Any]) -> str:
    """Return the test accuracy of an epoch or run or, if it has none, as in regression, the test loss."""
    if line.get("test_accuracy") is None:
        return number(line.get("test_loss"), ".4g")
    return percent(line["test_accuracy"])


def describe(line: Mapping[str, Any], epochs: int) -> str:
    """Return one epoch as one line of text."""
    return (
        f"epoch {line['epoch']:3d}/{epochs}  train loss {number(line['train_loss'], '.4f'):>7s}  "
        f"{score_name([line]).removesuffix(' accuracy')} {score(line):>7s}  {number(line['ms_per_step'], '.2f')} ms/step"
    )


def results_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the final table of a comparison: per rule, means, deviations and median times over the finished seeds."""
    name = score_name(rows)
    units = ("bits_per_token", "perplexity") if any("perplexity" in row for row in rows) else ()  # of a text
    table = Table(box=None, pad_edge=False)
    table.add_column("rule", min_width=max((len(row["rule"]) for row in rows), default=0))
    titles = ("nats", "bits", "perplexity") if units else (name,)
    for title in (*titles, "train loss", "ms/step", "time / bp", "seeds"):
        table.add_column(title, overflow="fold")
    for rule in dict.fromkeys(row["rule"] for row in rows):
        ended = [row for row in rows if row["rule"] == rule]
        ours = [row for row in ended if row["status"] == "finished"]
        key, scale, form, unit = ("test_loss", 1, ".4g", "") if name == "test loss" else ("test_accuracy", 100, ".2f", " %")
        values = [scale * row[key] for row in ours if row.get(key) is not None]
        spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
        lost = len(ended) - len(ours)
        table.add_row(
            rule,
            (f"{statistics.mean(values):{form}}{unit}{spread}" if values else "-"),
            *(_over(statistics.mean, ours, unit, ".2f") for unit in units),
            _over(statistics.mean, ours, "train_loss", ".4f"),
            _over(statistics.median, ours, "ms_per_step", ".2f"),
            _over(statistics.median, ours, "ratio_to_bp", ".2f"),
            f"{len(ours)} of {len(ended)}, {lost} diverged" if lost else str(len(ours)),
        )
    return table


def number(value: float | None, form: str) -> str:
    """Return the formatted value, "-" for None."""
    return "-" if value is None else format(value, form)


def percent(value: float | None) -> str:
    """Return a fraction as a percentage, "-" for None."""
    return "-" if value is None else f"{100 * value:.2f} %"


def _over(middle: Callable[[list[float]], float], rows: Sequence[Mapping[str, Any]], key: str, form: str) -> str:
    """Return the mean or median of a measurement over seeds."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return format(middle(values), form) if values else "-"


def shown_path(path: Path) -> str:
    """Return a path as the user would type it: relative to the current folder if it is inside."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
