"""Figures of the study of non-convex functions: final values, and paths on the landscape."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from torch import Tensor

from apical.bench.statistics import student
from apical.evolution.functions import descend, draw
from apical.evolution.minimisation import Minimisation
from apical.evolution.seeds import seed_of

LOOKS = {
    "tdca": ("#0B5345", "*"),
    "gd": ("#000000", "o"),
    "momentum": ("#56B4E9", "s"),
    "adam": ("#E69F00", "^"),
    "random": ("#CC79A7", "x"),
}
"""Colour (all but one from Okabe and Ito) and marker of each method."""
FLOOR = 1e-5
SIDE = 4.8
STARTS = 4


def final_values(finals: Mapping[str, Mapping[str, Sequence[float]]], names: Mapping[str, str]) -> Figure:
    """Draw a line per function, a marker with its interval per method."""
    figure = Figure(figsize=(5.0, 0.4 * len(finals) + 1.0))
    axes = figure.add_subplot()
    for number, (method, name) in enumerate(names.items()):
        colour, marker = LOOKS[method]
        intervals = [student(values[method]) for values in finals.values()]
        x = np.array([max(interval.mean, FLOOR) for interval in intervals])
        low = np.array([max(interval.mean if interval.low is None else interval.low, FLOOR) for interval in intervals])
        high = np.array([max(interval.mean if interval.high is None else interval.high, FLOOR) for interval in intervals])
        y = np.arange(len(finals)) + 0.14 * (number - (len(names) - 1) / 2)
        axes.errorbar(x, y, xerr=np.stack([x - low, high - x]), fmt=marker, color=colour, ms=4, lw=0.9, label=name)
    axes.set(xscale="log", xlabel="final / starting value")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.axvline(1, color="#888888", lw=0.6, zorder=0)
    axes.grid(visible=False, axis="y")
    for line in np.arange(len(finals) - 1) + 0.5:
        axes.axhline(line, color="#e6e6e6", lw=0.5, zorder=0)
    axes.set_yticks(range(len(finals)), list(finals))
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=3, columnspacing=1.2)
    return figure


def trajectories(networks: Mapping[Any, Sequence[float]], rates: Mapping[Any, Mapping[str, float]]) -> Figure:
    """Draw a row per case, a column per method: paths from the same starts on a shifted landscape."""
    columns = {"tdca": "TDCA", "gd": "gradient descent", "adam": "Adam"}
    figure = Figure(figsize=(5.6, 1.8 * len(networks) + 0.3))
    grid = figure.subplots(len(networks), len(columns), squeeze=False, sharex=True, sharey=True)
    for number, (line, (case, network)) in enumerate(zip(grid, networks.items(), strict=True), start=1):
        starts, shifts = draw(STARTS, 2, 1.5, seed_of("drawn", case.function))
        shifts = shifts[:1].expand_as(starts)
        for axes, (method, name) in zip(line, columns.items(), strict=True):
            _landscape(axes, case, shifts[0])
            if method == "tdca":
                center = torch.tensor(network, dtype=torch.double)
                path = Minimisation(case.setting(0)).walk(center[None], starts, shifts)[:, 0]
            else:
                path = descend(case.of, starts, shifts, method, rates[case][method])  # type: ignore[arg-type]
            _paths(axes, path)
            if number == 1:
                axes.set_title(name)
            if number == len(networks):
                axes.set_xlabel("x₁")
        line[0].set_ylabel(f"{case.of.title}\nx₂")
    return figure


def _landscape(axes: Axes, case: Any, shift: Tensor) -> None:
    ticks = torch.linspace(-SIDE, SIDE, 161, dtype=torch.double)
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    values = torch.log1p(case.of(torch.stack([x, y], -1) - shift))
    drawn = axes.contourf(ticks, ticks, values, levels=14, cmap="Greys", vmin=0, vmax=2.2 * float(values.max()))
    drawn.set_rasterized(True)
    minima = case.of.minima(2) + shift
    axes.plot(*minima.T, "*", color="#D55E00", ms=8, mec="white", mew=0.5, zorder=5)
    axes.set(xlim=(-SIDE, SIDE), ylim=(-SIDE, SIDE), aspect="equal", xticks=(-3, 0, 3), yticks=(-3, 0, 3))
    axes.grid(visible=False)


def _paths(axes: Axes, path: Tensor) -> None:
    for k, colour in zip(range(path.shape[1]), ("#0072B2", "#009E73", "#CC79A7", "#000000"), strict=False):
        axes.plot(*path[:, k].T, "-", color=colour, lw=1.1)
        axes.plot(*path[0, k], "o", color=colour, ms=4, mec="white", mew=0.4, zorder=4)
        axes.plot(*path[-1, k], "X", color=colour, ms=5, mec="white", mew=0.4, zorder=6)
