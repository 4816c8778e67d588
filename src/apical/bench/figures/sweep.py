"""Trials of a sweep in parallel coordinates: one axis per setting, one for the score, one line per trial."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke

from apical.bench.figures.curves import Drawing, render
from apical.bench.figures.style import RC

_WIDTH = 3.5
_PANEL = 1.75

_CAPTION = (
    "One line per trial, through its settings to its score on validation images (right axis, and colour). Thick: the best "
    "trial of each rule. Dotted, to the bottom: trials that diverged."
)

_COLOURS = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0.0, 0.88, 256)))
"""Colour map without the lightest yellow, which is invisible on white."""

_HALO = [Stroke(linewidth=2, foreground="white"), Normal()]


def draw(record: Mapping[str, Any]) -> Drawing | None:
    """:func:`coordinates` as PNG and SVG; None without trials."""
    with matplotlib.rc_context(RC):
        return render("sweep", "Trials", _CAPTION, coordinates(record))


def coordinates(record: Mapping[str, Any]) -> Figure | None:
    """Draw one panel per rule."""
    rules = [rule for rule, axes in record["axes"].items() if axes and any(t["rule"] == rule for t in record["trials"])]
    scores = [_score(trial, record) for trial in record["trials"] if trial["score"] is not None]
    if not rules or not scores:
        return None
    norm = Normalize(min(scores), max(scores) if max(scores) > min(scores) else min(scores) + 1)
    figure = Figure(figsize=(_WIDTH, _PANEL * len(rules) + 0.55))
    panels = list(figure.subplots(len(rules), 1, squeeze=False).flatten())
    for panel, rule in zip(panels, rules, strict=True):
        _panel(panel, rule, record, norm)
    label = "validation loss" if record["is_loss"] else "validation accuracy (%)"
    colours = ScalarMappable(norm, _COLOURS)
    figure.colorbar(colours, ax=panels, orientation="horizontal", fraction=0.05, pad=0.03, aspect=40, label=label)
    return figure


def _score(trial: Mapping[str, Any], record: Mapping[str, Any]) -> float:
    return -float(trial["score"]) if record["is_loss"] else 100 * float(trial["score"])


def _panel(panel: Axes, rule: str, record: Mapping[str, Any], norm: Normalize) -> None:
    axes = record["axes"][rule]
    trials = [trial for trial in record["trials"] if trial["rule"] == rule]
    best = record["best"].get(rule)
    for trial in trials:
        places = [_place(axis, trial["settings"][axis["name"]]) for axis in axes]
        if trial["score"] is None:
            panel.plot(range(len(axes) + 1), [*places, 0.0], color="#777777", linestyle=":", linewidth=0.8)
            continue
        score = _score(trial, record)
        end = float(np.clip(norm(score), 0, 1))
        is_best = trial["number"] == best
        panel.plot(
            range(len(axes) + 1),
            [*places, 1 - end if record["is_loss"] else end],
            color=_COLOURS(norm(score)),
            linewidth=2.4 if is_best else 0.9,
            zorder=4 if is_best else 2,
        )
    for x, axis in enumerate(axes):
        panel.axvline(x, color="#444444", linewidth=0.6)
        for place, text in _ticks(axis):
            at, side = (-0.04, "right") if x == 0 else (x + 0.04, "left")
            panel.text(at, place, text, fontsize=6, va="center", ha=side, zorder=6, path_effects=_HALO)
    panel.axvline(len(axes), color="#444444", linewidth=0.6)
    top, bottom = (norm.vmin, norm.vmax) if record["is_loss"] else (norm.vmax, norm.vmin)
    for place, value in ((1.0, top), (0.0, bottom)):
        panel.text(len(axes) + 0.04, place, f"{value:.4g}", fontsize=6, va="center", ha="left", zorder=6)
    panel.set_xticks(range(len(axes) + 1), [*(axis["name"] for axis in axes), "score"])
    panel.set(ylim=(-0.08, 1.08), xlim=(-0.17 * len(axes), len(axes) + 0.13 * len(axes)))
    panel.set_yticks([])
    panel.grid(visible=False)
    panel.spines[["left", "bottom"]].set_visible(False)
    panel.tick_params(length=0)
    panel.set_title(rule, loc="left", pad=3, fontweight="bold")


def _place(axis: Mapping[str, Any], value: Any) -> float:
    """Return the height between 0 and 1 at which a value crosses its axis."""
    if axis["range"] is None:
        order = _ordered(axis["values"])
        return 0.5 if len(order) == 1 else order.index(value) / (len(order) - 1)
    low, high = axis["range"]
    if axis["log"]:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return float((value - low) / (high - low))


def _ordered(values: Sequence[Any]) -> list[Any]:
    numbers = all(isinstance(value, int | float) for value in values)
    return sorted(values) if numbers else list(values)


def _ticks(axis: Mapping[str, Any]) -> list[tuple[float, str]]:
    ticks = _ordered(axis["values"]) if axis["range"] is None else axis["range"]
    return [(_place(axis, value), f"{value:g}" if isinstance(value, int | float) else str(value)) for value in ticks]
