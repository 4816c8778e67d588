"""Figures of the trained network that a rule or a model provides: rasters, bars, histograms."""

from collections.abc import Iterator, Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from apical.bench.figures.lines import WIDTH, legend
from apical.bench.report.records import Array, Comparison

_BINS = 30


def panels(comparison: Comparison) -> Iterator[tuple[str, str, str, Figure]]:
    """Yield stem, title, caption and figure of every panel, from the first seed of each rule that saved any."""
    for rule in comparison.rules:
        run = next((run for run in comparison.of(rule) if run.panels), None)
        for number, panel in enumerate(run.panels if run is not None else ()):
            values = {name: np.array(value, dtype=np.float64) for name, value in panel["values"].items()}
            title = f"{panel['title']}, {rule}"
            yield f"panel_{rule.replace(':', '-')}_{number}", title, _CAPTION, _DRAWN[panel["kind"]](panel, values)


def matrices(comparison: Comparison) -> Iterator[tuple[str, str, str, Figure]]:
    """Yield the same for the matrices that a model has, such as the edges of a graph, over training."""
    for rule in comparison.rules:
        run = next((run for run in comparison.of(rule) if any("matrices" in record for record in run.records)), None)
        epochs = {record["epoch"]: record["matrices"] for record in run.records if "matrices" in record} if run else {}
        for number, title in enumerate(dict.fromkeys(title for tables in epochs.values() for title in tables)):
            values = {f"epoch {epoch}": _matrix(tables[title]) for epoch, tables in epochs.items() if title in tables}
            yield f"matrices_{rule.replace(':', '-')}_{number}", f"{title}, {rule}", _MATRICES, heat(values)


def _matrix(rows: Mapping[str, Mapping[str, float | None]]) -> Array:
    """Return a matrix from numbers by row and column."""
    return np.array([list(row.values()) for row in rows.values()], dtype=np.float64)


_MATRICES = "First seed, before, halfway through and after training; white is zero."


def heat(values: Mapping[str, Array]) -> Figure:
    """Draw matrices side by side with one colour scale that is white at zero; rows downwards."""
    figure = Figure(figsize=(WIDTH, 1.8))
    grid = figure.subplots(1, len(values), sharey=True, squeeze=False)[0]
    largest = max((float(np.nanmax(np.abs(value), initial=0.0)) for value in values.values()), default=0.0) or 1.0
    for axes, (name, value) in zip(grid, values.items(), strict=True):
        image = axes.imshow(value, cmap="RdBu_r", vmin=-largest, vmax=largest)
        axes.set_title(name, pad=3)
        axes.grid(visible=False)
        axes.set_xticks(range(0, value.shape[1], max(1, value.shape[1] // 3)))
    grid[0].set_yticks(range(0, value.shape[0], max(1, value.shape[0] // 3)))
    figure.colorbar(image, ax=list(grid), orientation="horizontal", fraction=0.06, pad=0.04, aspect=40)
    return figure


_CAPTION = "The network after the last epoch (first seed), on the probe's training samples."


def raster(panel: Mapping[str, Any], values: Mapping[str, Array]) -> Figure:
    """Draw a dot for each spike of each neuron (upwards) over steps; one panel for each population."""
    figure = Figure(figsize=(WIDTH, 0.8 * len(values) + 0.5))
    grid = figure.subplots(len(values), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, spikes) in zip(grid, values.items(), strict=True):
        step, neuron = spikes.nonzero()
        axes.scatter(step, neuron, s=1.5, color="black", linewidths=0)
        axes.set_ylim(-0.5, spikes.shape[1] - 0.5)
        axes.set_title(name, loc="left", pad=2)
        axes.grid(visible=False)
    grid[-1].set_xlabel(panel["x"])
    figure.supylabel(panel["y"], fontsize=8)
    return figure


def bars(panel: Mapping[str, Any], values: Mapping[str, Array]) -> Figure:
    """Draw grouped bars at each category."""
    figure = Figure(figsize=(WIDTH, 2.4))
    axes, places = figure.add_subplot(), np.arange(len(panel["categories"]))
    width = 0.8 / max(1, len(values))
    for number, ((name, heights), colour) in enumerate(zip(values.items(), _colours(len(values)), strict=True)):
        axes.bar(places - 0.4 + width * (number + 0.5), heights, width, label=name, color=colour)
    axes.set_xticks(places, panel["categories"])
    axes.set(xlabel=panel["x"], ylabel=panel["y"])
    legend(figure, axes, 2)
    return figure


def histogram(panel: Mapping[str, Any], values: Mapping[str, Array]) -> Figure:
    """Draw distributions of finite values, without a long tail; the legend gives the share not finite or in the tail."""
    figure = Figure(figsize=(WIDTH, 2.4))
    axes = figure.add_subplot()
    every = np.concatenate([value[np.isfinite(value)] for value in values.values()] or [np.zeros(1)])
    edges = np.linspace(every.min(initial=0.0), _end(every), _BINS + 1)
    for (name, value), colour in zip(values.items(), _colours(len(values)), strict=True):
        finite = value[np.isfinite(value)]
        shares = {"none": (~np.isfinite(value)).mean(), f"above {edges[-1]:.2g}": (finite > edges[-1]).sum() / value.size}
        told = ", ".join(f"{100 * share:.0f} % {what}" for what, share in shares.items() if share > 0)
        label = f"{name} ({told})" if told else name
        axes.stairs(np.histogram(finite, edges)[0] / max(1, value.size), edges, label=label, color=colour)
    axes.set(xlabel=panel["x"], ylabel=panel["y"])
    legend(figure, axes, 2)
    return figure


def _end(values: Array) -> float:
    """Return the largest value, or the 95th percentile if the largest is ten times that, as with late spikes."""
    largest, most = values.max(initial=1e-9), float(np.quantile(values, 0.95)) if values.size else 0.0
    return most if largest > 10 * most > 0 else float(largest)


_DRAWN = {"raster": raster, "bars": bars, "histogram": histogram}


def _colours(count: int) -> list[Any]:
    return [tuple(colour) for colour in matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, max(1, count)))][:count]
