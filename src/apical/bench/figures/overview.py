"""The figure of the front page: the score of every rule, and the angle of its first layer's update to backpropagation's."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from apical.bench.figures.lines import WIDTH, band, has_values, legend, spread
from apical.bench.figures.style import label, styles
from apical.bench.report.records import Comparison, Run

_ANGLE = "gradient_alignment"


def overview(comparison: Comparison) -> Figure | None:
    """Draw two panels over epochs; None if no rule except backpropagation has an angle."""
    layers = {rule: layer for rule in comparison.rules if (layer := _first_layer(comparison.of(rule)))}
    if not set(layers) - {"bp"}:
        return None
    columns = min(len(comparison.rules), 4, int(WIDTH / (0.44 + 0.05 * max(len(label(rule)) for rule in comparison.rules))))
    figure = Figure(figsize=(WIDTH, 3.5 + 0.16 * math.ceil(len(comparison.rules) / columns)))
    above, below = figure.subplots(2, 1, sharex=True)
    for rule, look in _looks(comparison.rules).items():
        runs, score = comparison.of(rule), comparison.score
        _draw_line(above, runs, look, score.key, scale=score.scale)
        if rule in layers:
            _draw_line(below, runs, look, _ANGLE, layers[rule])
    above.set_ylabel(comparison.score.label)
    below.axhline(90.0, color="#555555", linewidth=0.8, linestyle=(0, (1, 1.5)), zorder=1)
    below.set(xlabel="epoch", ylabel="angle to BP gradient,\nfirst layer (degrees)", yticks=range(0, 181, 30))
    below.set_ylim(-3, max(93, below.dataLim.ymax))
    below.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    legend(figure, above, columns)
    return figure


def _first_layer(runs: Sequence[Run]) -> str | None:
    """Return the layer nearest to the input that has an angle."""
    return next((layer for run in runs for layer in run.layers if has_values(run.curve(_ANGLE, layer))), None)


def _looks(rules: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return colour, line and markers of each rule; markers of different rules are offset, so overlapping lines show."""
    edge = {"markeredgecolor": "white", "markeredgewidth": 0.4, "zorder": 3}
    return {
        rule: {"label": label(rule), "color": style.colour, "marker": style.marker, "linestyle": style.line, **edge}
        | {"markevery": (0.2 * place / len(rules), 0.2)}  # shares of the panel's diagonal
        for place, (rule, style) in enumerate(styles(rules).items())
    }


def _draw_line(
    axes: Axes, runs: Sequence[Run], look: Mapping[str, Any], key: str, layer: str | None = None, scale: float = 1.0
) -> None:
    """Draw the mean over seeds after each epoch, with a band of one standard deviation for three or more seeds."""
    epochs, mean, deviation, count = spread(runs, key, layer, first=1)
    axes.plot(epochs, scale * mean, **{**look, **({"markevery": None} if len(epochs) == 1 else {})})
    band(axes, epochs, scale * mean, scale * deviation, count, look["color"])
