"""A study as a program: its command line, and seeds that run in parallel and are saved as soon as they finish."""

import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Protocol, TypeVar

import matplotlib
import torch
import tyro
from tyro.conf import arg

from apical.bench.cells import Part, kept, side_by_side
from apical.bench.figures.curves import Drawing
from apical.bench.figures.style import RC
from apical.bench.finding import Row
from apical.bench.folders import check_least, check_writable
from apical.bench.page import write
from apical.bench.run_folder import environment
from apical.errors import ApicalError

Options = TypeVar("Options", bound="Kept")

Cells = Sequence[dict[str, Any]]
"""Saved results of each seed."""


@dataclass(frozen=True)
class Seeds:
    """Options of a study that runs seed by seed."""

    out: Annotated[Path, arg(metavar="DIR")]
    """Folder for the results; seeds already in it are kept."""
    seeds: Annotated[int, arg(metavar="K")] = 5
    """Number of seeds, for initial weights and data orders."""
    jobs: Annotated[int, arg(metavar="N")] = 0
    """Seeds run in parallel; 0: one per core."""


@dataclass(frozen=True)
class SeedOptions(Seeds):
    """Options of a study that trains, seed by seed."""

    epochs: Annotated[int, arg(metavar="N")] = 20
    """Passes over the data in each training."""


def about_study(title: str, about: str, our_mark: str, **sources: str) -> dict[str, Any]:
    """Description of a study in its results: title, what was done, and the meaning of its marks.

    Args:
        sources: sources of marks that are not ours, and their meaning.
    """
    return {"title": title, "about": about, "sources": {"our mark": our_mark, **sources}}


def in_order(
    jobs: int, parts: Iterable[Part], make: Callable[[Part], Any], out: Path, name: Callable[[Part, Any], str] | None = None
) -> list[Any]:
    """Return the result of `make` for each part, in order; otherwise like :func:`apical.bench.cells.side_by_side`.

    Args:
        name: makes a line from a part and its result; it is printed with the seconds taken as soon as the part is finished.
    """
    parts, finished = list(parts), dict[int, Any]()
    for part, content in side_by_side(jobs, parts, make, out):
        finished[parts.index(part)] = content
        if name is not None:
            print(f"{content['seconds']:7.1f} s  {name(part, content)}", flush=True)
    return [finished[place] for place in range(len(parts))]


def by_seed(
    options: Seeds,
    command: str,
    cell: Callable[..., dict[str, Any]],
    verdicts: Callable[[Cells], list[Row]],
    tables: Callable[[Cells], list[Row]],
    *,
    settings: Mapping[str, Any],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Run the seeds that are not saved yet, then write results.json and report.html.

    Args:
        options: options of the command line.
        cell: (seed, epochs) -> results to save for the seed, or (seed) if nothing is trained; a module-level function, so
            that it can be passed to other processes.
        settings: shown, and compared with those of the saved seeds.
        about: title, about and sources of the results.

    Raises:
        CheckpointError: the folder contains seeds with other settings.
    """
    passes = {"epochs": options.epochs} if isinstance(options, SeedOptions) else {}
    config = {**passes, **settings}
    make = partial(_kept_seed, options.out, config, cell, tuple(passes.values()))
    cells = in_order(options.jobs, range(options.seeds), make, options.out, lambda seed, _: f"seed {seed}")
    about_seeds = {"seeds": len(cells), **config}
    return keep_results(options.out, command, about, about_seeds, cells, verdicts(cells), tables(cells))


def keep_results(
    out: Path,
    command: str,
    about: Mapping[str, Any],
    settings: Mapping[str, Any],
    cells: Iterable[Mapping[str, Any]],
    verdicts: list[Row],
    tables: list[Row],
    drawings: Sequence[Drawing | None] = (),
) -> dict[str, Any]:
    """Write results.json, figures and report.html of a study whose cells have `seconds`; return results.json's content."""
    results = {
        **about,
        "command": command,
        "environment": environment("cpu", 1),
        "settings": dict(settings),
        "seconds": round(sum(cell["seconds"] for cell in cells), 1),
        "verdicts": verdicts,
        "tables": tables,
    }
    write(out, results, [drawing for drawing in drawings if drawing is not None])
    return results


@dataclass(frozen=True)
class SeedStudy:
    """A study that runs seed by seed, as a program; see :func:`by_seed`.

    Attributes:
        module: the study's module, which `python -m` runs.
        passes: meaning of its epochs, if they are not passes over all the data.
        out: default folder of the results; by default named after the module.
    """

    module: str
    about: Mapping[str, Any]
    settings: Mapping[str, Any]
    cell: Callable[[int, int], dict[str, Any]]
    verdicts: Callable[[Cells], list[Row]]
    tables: Callable[[Cells], list[Row]]
    seeds: int = 5
    epochs: int = 20
    jobs: int = 0
    passes: str = ""
    out: str = ""

    def __call__(self, arguments: Sequence[str] | None = None) -> int:
        """Run the command line; return the exit status."""
        out = Path(self.out or f"results/{'-'.join(self.module.split('.')[1:])}")
        default = SeedOptions(out, self.seeds, self.jobs, self.epochs)
        description = f"{self.about['title']}. " + (f"Epochs: {self.passes}" if self.passes else "")
        return run_command(self.module, SeedOptions, self._run, arguments, default=default, description=description)

    def _run(self, options: SeedOptions, command: str) -> dict[str, Any]:
        of = (self.cell, self.verdicts, self.tables)
        return by_seed(options, command, *of, settings=self.settings, about=self.about)


def _kept_seed(
    out: Path, config: Mapping[str, Any], cell: Callable[..., dict[str, Any]], passes: tuple[int, ...], seed: int
) -> dict[str, Any]:
    return kept(out / "cells" / f"seed-{seed}.json", config, partial(cell, seed, *passes))


LEAST = {"seeds": 2, "jobs": 0, "train_limit": 0}
"""Smallest values of a study's integer options; 1 for every other one."""


class Kept(Protocol):
    """Options of a study: at least a folder, in which finished parts are kept."""

    @property
    def out(self) -> Path:
        """The folder."""
        ...


def run_command(
    module: str,
    options: type[Options],
    study: Callable[[Options, str], Mapping[str, Any]],
    arguments: Sequence[str] | None = None,
    least: Mapping[str, int] = MappingProxyType({}),
    **shown: Any,
) -> int:
    """Run a study as `python -m MODULE ...`: check its options, run it and print its verdicts; return the exit status.

    Matplotlib uses the settings of all our figures during the run.

    Args:
        options: options of its command line.
        study: maps options and the command to the content of results.json.
        arguments: arguments of the command line; None for those of this process.
        least: smallest values of options for which :data:`LEAST` is not right.
        shown: passed to tyro.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    settings = tyro.cli(options, prog=f"python -m {module}", args=arguments, **shown)
    torch.set_num_threads(1)  # the networks are too small for more
    try:
        _check(settings, {**LEAST, **least})
        with matplotlib.rc_context(RC):
            results = study(settings, shlex.join(["python", "-m", module, *arguments]))
    except ApicalError as error:
        print(f"apical: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        how = "run the same command again (apical reproduce: with --resume) to continue from"
        print(f"stopped; {how} {settings.out}", file=sys.stderr)
        return 130
    for row in results["verdicts"]:
        mean = "-" if row["mean"] is None else f"{row['mean']:.4g}"
        print(f"{row['verdict']:14}  {row['rule']:14} {row['what']}: {mean} {row['mark']}")
    return 0


def _check(options: Kept, least: Mapping[str, int]) -> None:
    check_least(options, **{name: least.get(name, 1) for name, value in vars(options).items() if type(value) is int})
    check_writable(options.out)
