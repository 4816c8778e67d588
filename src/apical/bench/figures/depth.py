"""Figures of hidden representations: accuracy of the read-out at each depth, and reconstructions by autoencoders."""

import numpy as np
from matplotlib.figure import Figure

from apical.bench.figures.lines import WIDTH, band, legend
from apical.bench.figures.style import label, styles
from apical.bench.report.records import Array, Comparison, Run

_IMAGES = 8


def depth_accuracy(comparison: Comparison) -> Figure | None:
    """Draw accuracy against depth after the last epoch, one line per rule with read-outs: mean and spread over seeds."""
    depths = {rule: [_depths(run) for run in comparison.of(rule)] for rule in comparison.rules}
    depths = {rule: [row for row in rows if row] for rule, rows in depths.items()}
    depths = {rule: rows for rule, rows in depths.items() if rows}
    if not depths:
        return None
    figure = Figure(figsize=(WIDTH, 2.9))
    axes, style = figure.add_subplot(), styles(comparison.rules)
    names: list[str] = list(dict.fromkeys(name for rows in depths.values() for row in rows for name in row))
    for rule, rows in depths.items():
        look = style[rule]
        table = 100 * np.array([[row.get(name, np.nan) for name in names] for row in rows])
        mean, places = table.mean(0), np.arange(len(names), dtype=np.float64)
        axes.plot(places, mean, label=label(rule), color=look.colour, marker=look.marker, linestyle=look.line)
        band(axes, places, mean, table.std(0, ddof=min(1, len(rows) - 1)), len(rows), look.colour)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set(xlabel="layer at which classes are read out", ylabel="test accuracy (%)")
    legend(figure, axes, 3)
    return figure


def _depths(run: Run) -> dict[str, float]:
    depths = run.records[-1].get("depths") if run.records else None
    return {str(name): float(value) for name, value in depths.items()} if isinstance(depths, dict) else {}


def reconstructions(comparison: Comparison) -> Figure | None:
    """Draw a row of test images, and below it a row of reconstructions by each rule's autoencoder, for the first seed."""
    rows: list[tuple[str, Array]] = []
    for rule in comparison.rules:
        run = next((run for run in comparison.of(rule) if run.examples is not None), None)
        if run is not None and run.examples is not None:
            images, outputs = run.examples
            rows += [] if rows else [("test images", images)]
            rows.append((rule, outputs))
    if not rows:
        return None
    count = min(_IMAGES, min(len(images) for _, images in rows))
    low, high = float(rows[0][1].min()), float(rows[0][1].max())
    figure = Figure(figsize=(WIDTH, 0.42 * len(rows) + 0.1))
    grid = figure.subplots(len(rows), count, squeeze=False)
    for line, (name, images) in zip(grid, rows, strict=True):
        for axes, image in zip(line, images, strict=False):
            axes.imshow(_pixels(image, low, high), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(visible=False)
            for side in axes.spines.values():
                side.set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


def _pixels(image: Array, low: float, high: float) -> Array:
    """Convert (channels, height, width) to matplotlib's layout, with `low` to `high` as black to white."""
    scaled: Array = np.clip((image - low) / max(high - low, 1e-12), 0, 1)
    return scaled[0] if len(scaled) == 1 else np.moveaxis(scaled, 0, -1)
