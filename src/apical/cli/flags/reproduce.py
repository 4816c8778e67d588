"""Options of `apical reproduce`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from apical.cli.flags.shown import shown


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Re-run a paper's tables and compare with the published numbers. With no argument, list the available tables."""

    targets: Positional[Annotated[tuple[str, ...], shown("PAPER[/TABLE] ...", "(default: list them)")]] = ()
    """Tables to run, such as pfa/mnist; a paper's name alone runs all of its tables."""
    budget: Annotated[Literal["smoke", "cpu", "paper"], shown("smoke|cpu|paper", "(default: cpu)")] = "cpu"
    """How much to run: a quick check, what two cores can do, or the paper's epochs and seeds."""
    out: Annotated[Path, shown("DIR", "(default: results)")] = Path("results")
    """Folder: a table goes to PAPER-TABLE in it (with -smoke or -paper at these budgets), verdicts to reproductions/."""
    jobs: Annotated[int, shown("N", "(default: one per core)")] = 0
    """Seeds, or parts of a study, run in parallel."""
    ray: Annotated[str | None, shown("local|ADDRESS", "(default: off)")] = None
    """Train on a Ray cluster: one started here, or a running one (`ray start --head`) that sees --out as a shared folder."""
    resume: Annotated[bool, arg(help_behavior_hint="")] = False
    """Continue the run in the folder; finished parts are kept."""
    overwrite: Annotated[bool, arg(help_behavior_hint="")] = False
    """Replace the content of the folder."""
    kept: Annotated[bool, arg(help_behavior_hint="")] = False
    """Train nothing; judge the results already in the folder, including those of another command."""
