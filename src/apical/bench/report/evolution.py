"""The report of one evolution: fitness over generations, settings, versions, as one HTML page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from apical.bench.document import command_block, document, figure_block, pairs, reproduce, significant
from apical.bench.evolve.loop import EvolutionFolder
from apical.bench.figures.curves import Drawing, render
from apical.bench.figures.style import RC, plain_log
from apical.bench.state import read_json, write_page
from apical.errors import ConfigError

_WIDTH = 3.5


def fitness_curves(lines: Sequence[dict[str, Any]]) -> Figure:
    """Draw the negative log-likelihood after a lifetime (negated fitness) of centre, best and mean over generations."""
    figure = Figure(figsize=(_WIDTH, 2.6))
    axes = figure.add_subplot()
    generations = [line["generation"] for line in lines]
    looks = {
        "mean": ("population mean", "#E69F00", "--"),
        "best": ("fittest", "#0072B2", ":"),
        "center": ("centre", "k", "-"),
    }
    lowest = min((-line[name] for line in lines for name in looks if line[name] is not None), default=0)
    for name, (label, colour, style) in looks.items():
        values = [float("nan") if line[name] is None else -line[name] for line in lines]
        axes.plot(generations, values, label=label, color=colour, linestyle=style, linewidth=1.0)
    if lowest > 0:
        axes.set_yscale("log")
        plain_log(axes.yaxis)
    axes.set(xlabel="generation", ylabel="loss after a lifetime (nats)")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def write(folder: EvolutionFolder) -> Path:
    """Write figures and report.html into the folder, and return the page's path.

    Raises:
        ConfigError: no generation is finished yet.
    """
    lines, config, around = folder.lines(), read_json(folder.config), read_json(folder.environment)
    if not lines:
        raise ConfigError(f"{folder.path} has no finished generation yet, so there is nothing to report")
    caption = (
        "Loss of learners after a lifetime under the top-down network at the centre of the search distribution, under the "
        "fittest of the population, and on average. Each generation has different tasks, so the curves are noisy."
    )
    with matplotlib.rc_context(RC):
        drawing = render("fitness", "Fitness over generations", caption, fitness_curves(lines))
    drawing.write(folder.path)
    write_page(folder.path / "report.html", _page(folder.path, lines, config, around, drawing))
    return folder.path / "report.html"


def _page(
    path: Path, lines: Sequence[dict[str, Any]], config: dict[str, Any], around: dict[str, Any], drawing: Drawing
) -> str:
    seconds = sum(line["seconds"] for line in lines)
    last, title = lines[-1], f"Evolution of a top-down network on {', '.join(config['data'])}"
    loss = "not finite" if last["center"] is None else significant(-last["center"])
    summary = (
        f"{len(lines)} of {config['generations']} generations of {config['population']} individuals in {seconds:.0f} s "
        f"({3600 * len(lines) / max(seconds, 1e-9):,.0f} generations an hour). After the last one, a learner under the "
        f"centre of the search distribution ends its lifetime of {config['steps']} steps with a loss of {loss} nats."
    )
    settings = {key: value for key, value in config.items() if key != "command"}
    body = f"""{figure_block(drawing)}
<h2>Use it</h2>
{command_block(f"apical compare --rules bp tdca --teacher {path / 'teacher.pt'} --out runs/tdca")}
{reproduce(str(config.get("command", "")), pairs(settings), pairs(around))}"""
    return document(title, summary, body)
