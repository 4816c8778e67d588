"""Studies without published numbers: verdicts from paired differences to controls, tables, and one page that shows them."""

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import tyro

from apical.errors import ApicalError, ConfigError
from apical.experiment.figures import Drawing
from apical.experiment.report_html import STYLE, command_block, facts, figure_block
from apical.experiment.run_folder import check_writable, environment
from apical.recipes.cells import kept, side_by_side
from apical.recipes.dfc_toy import compact, rounded
from apical.recipes.dfc_toy_report import pairs, table
from apical.recipes.tdca_statistics import interval, paired

Row = dict[str, Any]
Options = TypeVar("Options", bound="Kept")


def difference(figure: str, rule: str, what: str, ours: Sequence[float], theirs: Sequence[float], *, less: bool) -> Row:
    """A verdict on ours minus theirs, pair by pair: reproduced if its 95 % interval lies on the better side of 0.

    Args:
        figure: part of the specification that it belongs to.
        rule, what: which rule, and what is compared.
        ours, theirs: one value per meta-seed.
        less: less is better.
    """
    found = paired(ours, theirs)
    middle = found["difference"]
    low, high = middle["low"], middle["high"]
    assert low is not None
    assert high is not None
    holds = high < 0 if less else low > 0
    return {
        "figure": figure,
        "rule": rule,
        "what": what,
        "mark": "interval < 0" if less else "interval > 0",
        "mean": middle["mean"],
        "std": None,
        "low": low,
        "high": high,
        "p_student": found["p_student"],
        "p_sign_flip": found["p_sign_flip"],
        "n": middle["n"],
        "source": "our mark",
        "verdict": "reproduced" if holds else "not reproduced",
    }


def count(figure: str, rule: str, what: str, holds: Sequence[bool], least: int) -> Row:
    """A verdict on how many of several comparisons hold."""
    return {
        "figure": figure,
        "rule": rule,
        "what": what,
        "mark": f"≥ {least} of {len(holds)}",
        "mean": float(sum(holds)),
        "std": None,
        "n": len(holds),
        "source": "our mark",
        "verdict": "reproduced" if sum(holds) >= least else "not reproduced",
    }


def at_least(figure: str, rule: str, what: str, values: Sequence[float], mark: float, each: float | None = None) -> Row:
    """A verdict on the mean, and on the worst of the seeds, for marks that were set on these; with the mean's interval."""
    found = interval(values)
    return {
        "figure": figure,
        "rule": rule,
        "what": what if each is None else f"{what}; the worst seed: {min(values):.3g}",
        "mark": f"mean ≥ {mark:g}" if each is None else f"mean ≥ {mark:g}, each ≥ {each:g}",
        "mean": found["mean"],
        "std": None,
        "low": found["low"],
        "high": found["high"],
        "n": len(values),
        "source": "our mark",
        "verdict": "reproduced" if found["mean"] >= mark and (each is None or min(values) >= each) else "not reproduced",
    }


def shown(values: Sequence[float]) -> str:
    """Mean and 95 % interval over meta-seeds.

    >>> shown([1.0, 2.0, 3.0])
    '2 [-0.484, 4.48]'
    """
    found = interval(values)
    mean = f"{found['mean']:.3g}"
    return mean if found["low"] is None else f"{mean} [{found['low']:.3g}, {found['high']:.3g}]"


Cells = Sequence[dict[str, Any]]
"""What was kept of each seed."""


class BySeed(Protocol):
    """Options of a study that runs seed by seed."""

    @property
    def out(self) -> Path:
        """Folder for the results."""

    @property
    def seeds(self) -> int:
        """How many."""

    @property
    def epochs(self) -> int:
        """Passes over the data in each training."""

    @property
    def jobs(self) -> int:
        """Seeds side by side, 0 for one per core."""


def by_seed(
    options: BySeed,
    command: str,
    cell: Callable[[int, int], dict[str, Any]],
    verdicts: Callable[[Cells], list[Row]],
    tables: Callable[[Cells], list[Row]],
    *,
    settings: Mapping[str, Any],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Run the seeds that are not kept yet, then write results.json and report.html.

    Args:
        options: of the command line.
        command: that was typed.
        cell: (seed, epochs) -> what to keep of the seed; a module's function, for other processes are handed it.
        verdicts: of all seeds.
        tables: of all seeds.
        settings: shown, and held against those with which kept seeds were made.
        about: title, about and sources of the results.

    Raises:
        ConfigError: the folder cannot be written, or an option is not usable.
        CheckpointError: the folder holds seeds with other settings.
    """
    if options.seeds < 2 or options.epochs < 1 or options.jobs < 0:
        raise ConfigError("--seeds must be at least 2, --epochs at least 1, --jobs not negative")
    check_writable(options.out)
    config = {"epochs": options.epochs, **settings}
    found: dict[int, dict[str, Any]] = {}
    make = partial(_kept_seed, options.out, config, cell)
    for seed, made in side_by_side(options.jobs, range(options.seeds), make, options.out):
        found[seed] = made
        print(f"{made['seconds']:7.1f} s  seed {seed}", flush=True)
    cells = [found[seed] for seed in range(options.seeds)]
    results = {
        **about,
        "command": command,
        "environment": environment("cpu", 1),
        "settings": {"seeds": len(cells), **config},
        "seconds": round(sum(each["seconds"] for each in cells), 1),
        "verdicts": verdicts(cells),
        "tables": tables(cells),
    }
    write(options.out, results, [])
    return results


def _kept_seed(
    out: Path, config: Mapping[str, Any], cell: Callable[[int, int], dict[str, Any]], seed: int
) -> dict[str, Any]:
    return kept(out / "cells" / f"seed-{seed}.json", config, partial(cell, seed, config["epochs"]))


def write(out: Path, results: Mapping[str, Any], drawings: Sequence[Drawing]) -> None:
    """results.json, each figure as PNG and SVG, and report.html."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(compact(rounded(results)) + "\n", encoding="utf-8")
    for drawing in drawings:
        (out / f"{drawing.stem}.png").write_bytes(drawing.png)
        (out / f"{drawing.stem}.svg").write_bytes(drawing.svg)
    (out / "report.html").write_text(page(results, drawings), encoding="utf-8")


def page(results: Mapping[str, Any], drawings: Sequence[Drawing]) -> str:
    """The study as one HTML page, without script or network; every name and value is escaped."""
    title = escape(results["title"])
    tables = "".join(
        f"<h2>{escape(each['title'])}</h2><p>{escape(each['note'])}</p>{table(each['header'], each['rows'])}"
        for each in results["tables"]
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}
figure img {{ max-width: 100%; }}
.wide {{ overflow-x: auto; }}</style>
</head>
<body>
<h1>{title}</h1>
<p class="lead">{escape(results["about"])}</p>
<h2>Verdicts</h2>
<p class="note">{escape(results["sources"]["our mark"])}</p>
{_verdicts(results["verdicts"])}
<h2>Figures</h2>
{"".join(map(figure_block, drawings))}
{tables}
<h2>Reproduce this</h2>
{command_block(results["command"])}
<div class="pair">
<div><h3>Settings</h3>{facts(pairs(results["settings"]))}</div>
<div><h3>Versions and machine</h3>{facts(pairs(results["environment"]))}</div>
</div>
<p class="note">The figures also lie beside this page, as PNG (200 dpi) and SVG.</p>
</body>
</html>
"""


def _verdicts(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = ("Rule", "Quantity", "Mark", "Here, mean [95 % interval]", "p, Student", "p, sign flips", "n", "Verdict")
    lines = []
    for row in rows:
        measured = f"{row['mean']:.4g}"
        if row.get("low") is not None:
            measured += f" [{row['low']:.3g}, {row['high']:.3g}]"
        p = [f"{row[key]:.2g}" if row.get(key) is not None else "-" for key in ("p_student", "p_sign_flip")]
        lines.append([row["rule"], row["what"], row["mark"], measured, *p, str(row["n"]), row["verdict"]])
    return table(heads, lines)


class Kept(Protocol):
    """Options of a study: at least a folder, in which what is finished is kept."""

    @property
    def out(self) -> Path:
        """The folder."""
        ...


def run_command(
    module: str,
    options: type[Options],
    study: Callable[[Options, str], Mapping[str, Any]],
    arguments: Sequence[str] | None,
) -> int:
    """`python -m MODULE ...`: run a study and print its verdicts; returns the exit status.

    Args:
        module: name, for the record.
        options: what its command line takes.
        study: maps options and the command to what results.json holds.
        arguments: of the command line; None for those of this process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    chosen = tyro.cli(options, prog=f"python -m {module}", args=arguments)
    torch.set_num_threads(1)  # the networks are too small for more
    try:
        results = study(chosen, shlex.join(["python", "-m", module, *arguments]))
    except ApicalError as error:
        print(f"apical: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from what is in {chosen.out}", file=sys.stderr)
        return 130
    for row in results["verdicts"]:
        print(f"{row['verdict']:14}  {row['rule']:14} {row['what']}: {row['mean']:.4g} {row['mark']}")
    return 0
