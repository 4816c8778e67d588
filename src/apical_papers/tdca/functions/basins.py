"""Basins in which TDCA and gradient rules end on non-convex functions (arXiv 2208.01416).

Run `python -m apical_papers.tdca.functions.basins --out results/tdca-basins`. The paper says that TDCA's paths pass local
minima where backpropagation's stay. Networks are evolved as in the study of functions, with separate meta-seeds, and start
from a grid of points under a shift that evolution did not see; so do gradient descent, momentum and Adam, at rates chosen on
validation starts. A point's basin is the minimum that steepest descent reaches from it over a fine lattice. The marks, set
before the run:

    of the starts outside a lowest basin, the share that ends in a lower one is higher for TDCA than for each gradient rule,
    on three of four functions
"""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor
from tyro.conf import arg

from apical.bench.cells import kept
from apical.bench.figures.curves import render
from apical.bench.finding import Row, count, difference
from apical.bench.finding import table as table_of
from apical.bench.program import about_study, in_order, keep_results, run_command
from apical.evolution.functions import BOX, Function, best_of_random, descend, draw
from apical.evolution.minimisation import Minimisation, together
from apical.evolution.seeds import seed_of
from apical_papers.tdca.evolution import evolve
from apical_papers.tdca.functions.study import PLANE, STRATEGY, VALIDATION, Case, tuned

CASES = tuple(case for case in PLANE if case.of.multimodal)
FIRST = 40
"""The first meta-seed; the study of functions used different ones."""
GRID = 21
"""Number of starts per side of the box."""
SIDE, POINTS = 6.0, 481
"""Half the lattice's side, beyond the range of shifted starts, and its points per side."""
GRADIENT = {"gd": "gradient descent", "momentum": "momentum", "adam": "Adam"}
PATHS = {**GRADIENT, "capped": "capped gradient, by hand"}
METHODS = {"tdca": "TDCA", **PATHS, "random": "random points"}
OUTCOMES = {"global": "global minimum", "lower": "lower basin", "same": "the same basin", "higher": "higher basin"}
COLOURS = ("#0B5345", "#7FB8A4", "#D9D9D9", "#D55E00")
ABOUT = about_study(
    "TDCA on non-convex functions: basins",
    "From a grid of starts, evolved networks with memory move a point 60 times without a gradient, and gradient "
    "descent, momentum and Adam do with one, at rates chosen by the final value on validation starts. A start and an end "
    "are in the basins of those minima that steepest descent over a fine lattice reaches from them. The best of 60 random "
    "points has no path and leaves every basin at once; it is in the table for comparison, and has no mark. Neither has the "
    "capped gradient, a top-down network made by hand: T proportional to the gradient, in steps up to its cap.",
    "Shares of starts, paired over meta-seeds (independent evolutions, each with a shift of its own). A function counts if "
    "every 95 % interval of the mean difference between TDCA and a gradient rule (Student's t) lies above 0. Set before the "
    "run, on meta-seeds that were not used before. The paper claims that TDCA gets past local minima.",
)


@dataclass(frozen=True)
class Options:
    """Compare the basins that evolved networks and gradient rules leave."""

    out: Annotated[Path, arg(metavar="DIR")]
    """Output folder; finished parts in it are kept."""
    seeds: int = 5
    """Meta-seeds: independent evolutions of each function."""
    generations: int = 200
    """Generations of each evolution."""
    jobs: int = 0
    """Functions run in parallel; 0: one per core."""


def basins(of: Function, side: float = SIDE, points: int = POINTS) -> tuple[Tensor, Tensor]:
    """Return for each point of a lattice (points, points) over [-side, side]^2 the flat index of the minimum that steepest
    descent over its eight neighbours reaches; and the values of the lattice."""
    ticks = torch.linspace(-side, side, points, dtype=torch.double)
    values = of(torch.stack(torch.meshgrid(ticks, ticks, indexing="ij"), -1))
    around = torch.nn.functional.pad(values, (1, 1, 1, 1), value=torch.inf).unfold(0, 3, 1).unfold(1, 3, 1)
    steps = torch.tensor([[2**0.5, 1, 2**0.5], [1, 1, 1], [2**0.5, 1, 2**0.5]], dtype=torch.double)
    steepest = ((around - values[..., None, None]) / steps).flatten(2)
    steepest[..., 4] = 0  # if no neighbour is lower, the point stays
    number = steepest.argmin(-1)
    places = torch.arange(points * points).view(points, points)
    target = (places + (number // 3 - 1) * points + number % 3 - 1).flatten()
    while not torch.equal(target[target], target):
        target = target[target]
    return target.view(points, points), values


def outcomes(of: Function, starts: Tensor, ends: Tensor, shift: Tensor) -> Tensor:
    """Return for each start (S, 2) the index in :data:`OUTCOMES` of its end; -1 if the start is in a lowest basin."""
    target, values = basins(of)
    depth = values.flatten()

    def minimum(x: Tensor) -> Tensor:
        place = ((x - shift).nan_to_num(SIDE).clamp(-SIDE, SIDE) + SIDE) * (POINTS - 1) / (2 * SIDE)
        i, j = place.round().long().unbind(-1)
        return target[i, j]

    at, to = minimum(starts), minimum(ends)
    lowest = minimum(of.minima(2) + shift)
    result = torch.where(to == at, 2, torch.where(depth[to] < depth[at], 1, 3))
    result[torch.isin(to, lowest)] = 0
    result[torch.isin(at, lowest)] = -1
    return result


def ends(case: Case, center: Tensor, seed: int, rates: Mapping[str, float]) -> dict[str, list[int]]:
    """Return the outcome of every start of the grid under every method, row by row."""
    ticks = torch.linspace(-BOX, BOX, GRID, dtype=torch.double)
    starts = torch.cartesian_prod(ticks, ticks)
    shift = draw(1, 2, case.setting(0).shift, seed_of("basins", case.function, seed))[1]
    shifts = shift.expand_as(starts)
    paths = {name: descend(case.of, starts, shifts, name, rates[name])[-1] for name in PATHS}  # type: ignore[arg-type]
    paths["tdca"] = Minimisation(case.setting(0)).walk(center[None].double(), starts, shifts)[-1, 0]
    paths["random"] = best_of_random(case.of, starts, shifts, seed_of("basins", "random", case.function, seed))
    return {name: outcomes(case.of, starts, paths[name], shift).tolist() for name in METHODS}


def kept_cell(options: Options, config: dict[str, Any], case: Case) -> dict[str, Any]:
    """Return a function's cell, loaded from the folder or computed."""
    path = options.out / "cells" / f"{case.stem}.json"
    return kept(path, config, partial(cell, case, options, path))


def cell(case: Case, options: Options, path: Path) -> dict[str, Any]:
    """Return the evolutions of a function and the outcomes of the starts of each; generations are kept next to the path."""
    seeds = range(FIRST, FIRST + options.seeds)
    tasks = [Minimisation(case.setting(seed)) for seed in seeds]
    starts, states = [task.start for task in tasks], path.with_suffix(".pt")
    evolution = evolve(tasks, seeds, starts, together, STRATEGY, options.generations, states, every=50)
    rates = tuned(case, VALIDATION)["rates"]
    centers = map(torch.tensor, evolution["centers"])
    return {"rates": rates, "ends": [ends(case, c, seed, rates) for c, seed in zip(centers, seeds, strict=True)]}


Cells = Mapping[str, Mapping[str, Any]]
"""Cells by the function's title."""


def shares(record: Mapping[str, Any], method: str, *wanted: str) -> list[float]:
    """Return the share of starts outside a lowest basin with one of the outcomes, for each meta-seed."""
    numbers = {list(OUTCOMES).index(name) for name in wanted}
    outcomes_of = [[outcome for outcome in by_method[method] if outcome >= 0] for by_method in record["ends"]]
    return [fmean(outcome in numbers for outcome in each) for each in outcomes_of]


def verdicts(cells: Cells) -> list[Row]:
    """Judge the count of functions, then each function against the closest gradient rule."""
    rows, holds = [], []
    for title, record in cells.items():
        lower = {method: shares(record, method, "global", "lower") for method in ("tdca", *GRADIENT)}
        what = f"{title}: share of starts that end in a lower basin, minus that under"
        against = [
            difference("C4", "tdca-recurrent", f"{what} {name}", lower["tdca"], lower[method], less=False)
            for method, name in GRADIENT.items()
        ]
        holds.append(all(row["verdict"] == "reproduced" for row in against))
        rows.append(min(against, key=lambda row: row["mean"]))
    what = "functions on which more starts end in a lower basin than under any gradient rule"
    return [count("C4", "tdca-recurrent", what, holds, len(cells) - 1), *rows]


def table(cells: Cells) -> dict[str, Any]:
    """Return a table of where starts end, per function and method."""
    rows = [
        [title, name, *([100 * share for share in shares(record, method, outcome)] for outcome in OUTCOMES)]
        for title, record in cells.items()
        for method, name in METHODS.items()
    ]
    note = "Of the starts that are not in the basin of a global minimum: mean over meta-seeds with 95 % interval."
    return table_of("Where starts end, %", note, ["function", "method", *OUTCOMES.values()], rows)


def figure(cells: Cells) -> Figure:
    """Draw maps of the starts of the first meta-seed, coloured by where they end."""
    drawn = Figure(figsize=(6.4, 1.55 * len(cells) + 0.7))
    methods = ("tdca", *GRADIENT)
    panels = drawn.subplots(len(cells), len(methods), sharex=True, sharey=True, squeeze=False)
    colours = ListedColormap(["#FFFFFF", *COLOURS])
    for line, (title, record) in zip(panels, cells.items(), strict=True):
        for axes, method in zip(line, methods, strict=True):
            image = torch.tensor(record["ends"][0][method]).view(GRID, GRID).T
            norm = BoundaryNorm([number - 0.5 for number in range(-1, len(OUTCOMES) + 1)], colours.N)
            axes.imshow(image, origin="lower", extent=(-BOX, BOX, -BOX, BOX), cmap=colours, norm=norm)
            axes.grid(visible=False)
            axes.set(xticks=(-3, 0, 3), yticks=(-3, 0, 3))
        line[0].set_ylabel(title.partition(",")[0])
    for axes, method in zip(panels[0], methods, strict=True):
        axes.set_title(METHODS[method])
    patches = [Patch(color=colour, label=name) for colour, name in zip(COLOURS, OUTCOMES.values(), strict=True)]
    drawn.legend(handles=patches, loc="outside lower center", ncols=4)
    return drawn


def study(options: Options, command: str) -> dict[str, Any]:
    """Run missing evolutions, and write results.json, the figure and report.html.

    Raises:
        CheckpointError: the folder contains evolutions with other options.
    """
    config = {"seeds": options.seeds, "generations": options.generations, "strategy": asdict(STRATEGY), "grid": GRID}
    made = in_order(options.jobs, CASES, partial(kept_cell, options, config), options.out)
    cells = {case.title: content for case, content in zip(CASES, made, strict=True)}
    caption = (
        "Starts in the box, coloured by where 60 steps from there end; white: starts in the basin of a global minimum. "
        "First meta-seed, under a shift that evolution did not see."
    )
    drawing = render("basins", "Where starts end", caption, figure(cells))
    settings = {**config, "first meta-seed": FIRST, "lattice": POINTS, "half its side": SIDE}
    return keep_results(options.out, command, ABOUT, settings, cells.values(), verdicts(cells), [table(cells)], [drawing])


main = partial(run_command, "apical_papers.tdca.functions.basins", Options, study)


if __name__ == "__main__":
    sys.exit(main())
