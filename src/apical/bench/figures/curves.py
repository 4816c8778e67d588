"""Figures of a comparison, one journal column (3.5 inches) wide, drawn without global plotting state."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from apical.bench.checkpoint import write_atomically
from apical.bench.figures.cost import compute, seconds
from apical.bench.figures.depth import depth_accuracy, reconstructions
from apical.bench.figures.lines import WIDTH, Line, column_mean, has_values, rule_lines, spread
from apical.bench.figures.overview import overview
from apical.bench.figures.panels import matrices, panels
from apical.bench.figures.style import RC, label, plain_log_steps, styles
from apical.bench.report.records import Array, Comparison, Run

MANY = 8
"""Number of rows from which a dot plot leaves out a row far below the others."""

_NAMED_LAYERS = 6
_DPI = 200


class Drawing(NamedTuple):
    """A finished figure: file stem, title, caption, and its bytes as PNG and SVG."""

    stem: str
    title: str
    caption: str
    png: bytes
    svg: bytes

    def write(self, folder: Path) -> None:
        """Save it as `stem`.png and .svg."""
        write_atomically(folder / f"{self.stem}.png", self.png)
        write_atomically(folder / f"{self.stem}.svg", self.svg)


class _LayerFigure(NamedTuple):
    """What distinguishes the figures with a panel per rule and a line per layer; `key` names measure and file."""

    key: str
    title: str
    axis: str
    reference: float
    caption: str


_LAYER_FIGURES = (
    _LayerFigure(
        "weight_alignment",
        "Alignment of the feedback with the forward weights",
        "angle to forward weights (degrees)",
        90.0,
        "Angle between each layer's effective feedback weights and its forward weights (for product feedback "
        "alignment, of the path B R). 0° is backpropagation's symmetry, 90° (dotted) is chance.",
    ),
    _LayerFigure(
        "gradient_alignment",
        "Alignment of the update with backpropagation's gradient",
        "angle to BP gradient (degrees)",
        90.0,
        "Angle between the rule's weight gradient and backpropagation's at the same weights, on a fixed probe batch. "
        "90° (dotted) is chance; a rule whose last layer learns with the exact error shows 0° there.",
    ),
    _LayerFigure(
        "norm_ratio",
        "Size of the feedback relative to the forward weights",
        "norm of feedback / norm of weights",
        1.0,
        "Norm of each layer's effective feedback weights divided by the norm of its forward weights; at 1 (dotted) they "
        "are equal.",
    ),
    _LayerFigure(
        "pair_cka",
        "Similarity of the paired populations",
        "CKA of forward and feedback activity",
        1.0,
        "Linear centred kernel alignment of each layer's activity with that of the feedback network at the same depth, on a "
        "fixed probe batch. At 1 (dotted) both represent the samples equally.",
    ),
)


def draw(comparison: Comparison) -> list[Drawing]:
    """Return every figure for which the comparison has data, in reading order."""
    several = len({run.seed for run in comparison.runs}) > 1
    score = comparison.score
    stem = score.key if score.is_loss else "accuracy"
    curves, final = (_CURVES, _FINAL) if several else ("One seed.", "One seed; only runs that finished.")
    with matplotlib.rc_context(RC):
        drawings = [
            render(stem, f"{score.name.capitalize()} during training", curves, _score_curves(comparison)),
            render("loss", "Training loss", curves, _loss_curves(comparison, "train_loss", "training loss")),
            render(f"final_{stem}", f"Final {score.name}", final, _final_score(comparison)),
        ]
        for name, title, label, caption in _CONDITION_FIGURES:
            drawings.append(render(name, title, f"{caption} {curves}", _curves(comparison, name, label)))
        for spec in _LAYER_FIGURES:
            drawings.append(render(spec.key, spec.title, _layer_caption(spec, comparison), _layers(comparison, spec)))
        both, against = f"{score.name.capitalize()}, and the angle to backpropagation", f"{score.name.capitalize()} against"
        drawings += [
            render("overview", both, f"{_OVERVIEW} {curves}", overview(comparison)),
            render(f"{stem}_seconds", f"{against} time", f"{_SECONDS} {curves}", seconds(comparison)),
            render(f"{stem}_compute", f"{against} computation", f"{_COMPUTE} {curves}", compute(comparison)),
            render("depth_accuracy", "Accuracy by depth", _DEPTHS, depth_accuracy(comparison)),
            render("reconstructions", "Reconstructed images", _IMAGES, reconstructions(comparison)),
        ]
        drawings += [render(stem, title, caption, figure) for stem, title, caption, figure in panels(comparison)]
        drawings += [render(stem, title, caption, figure) for stem, title, caption, figure in matrices(comparison)]
    return [drawing for drawing in drawings if drawing is not None]


_CONDITION_FIGURES = (
    (
        "minimum_norm_alignment",
        "Alignment of the update with the minimum-norm one",
        "angle to minimum norm (°)",
        "Angle between the weight change that a rule requests and the smallest change that moves every output as desired "
        "(damping 1), on a fixed probe batch.",
    ),
    (
        "condition_two",
        "Feedback within the row space of the Jacobian",
        "Condition 2 ratio",
        "Share of the feedback weights Q in the row space of the network's Jacobian, on a fixed probe batch; at 1 feedback "
        "control finds the minimum-norm update.",
    ),
)


_CURVES = (
    "Line: mean over seeds. Band: ± one standard deviation where there are at least three seeds; with two, thin lines "
    "show each."
)
_OVERVIEW = (
    "Above: the score. Below: the angle between a rule's weight gradient and backpropagation's at the same weights, in the "
    "first layer that has one, on a fixed probe batch; 90° (dotted) is chance."
)
_SECONDS = "After each epoch, against the wall-clock seconds of training so far; other load on the machine is included."
_COMPUTE = (
    "After each epoch, against the multiply-adds of all training steps so far, forward and backward, counted on one step; "
    "a rule computed in closed form is counted in that form."
)
_DEPTHS = (
    "Test accuracy of the class read out at each layer, after the last epoch; the last layer is the model's output. "
    "Line: mean over seeds. Band: ± one standard deviation where there are at least three seeds."
)
_IMAGES = "The first test images, and below them the reconstructions by each rule's model after the last epoch (first seed)."
_FINAL = "Open symbols: one seed each. Filled symbol and bar: mean ± standard deviation over seeds. Only runs that finished."


@overload
def render(stem: str, title: str, caption: str, figure: Figure) -> Drawing: ...
@overload
def render(stem: str, title: str, caption: str, figure: Figure | None) -> Drawing | None: ...
def render(stem: str, title: str, caption: str, figure: Figure | None) -> Drawing | None:
    """Render the figure as PNG and SVG; None stays None."""
    if figure is None:
        return None
    png, svg = io.BytesIO(), io.BytesIO()
    figure.set_dpi(_DPI)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()  # computes the layout, which takes longer than drawing; the SVG uses the same layout
    imsave(png, canvas.buffer_rgba(), format="png", dpi=_DPI)
    figure.set_layout_engine("none")
    figure.savefig(svg, format="svg", metadata={"Date": None})
    return Drawing(stem, title, caption, png.getvalue(), svg.getvalue())


def _score_curves(comparison: Comparison) -> Figure | None:
    """Draw the score over epochs; without epoch 0 for accuracies, if possible, as chance level would flatten the curves."""
    score = comparison.score
    if score.is_loss:
        return _loss_curves(comparison, score.key, score.label)
    long = max((run.epochs[-1] for run in comparison.runs if run.epochs), default=0) > 1
    return _curves(comparison, score.key, score.label, scale=score.scale, first=1 if long else 0)


def _loss_curves(comparison: Comparison, key: str, label: str) -> Figure | None:
    figure = _curves(comparison, key, label)
    values = _measured(comparison, key)
    if figure is not None and values.min() > 0 and values.max() > 10 * values.min():
        figure.axes[0].set_yscale("log")
        plain_log_steps(figure.axes[0])
    return figure


def _curves(comparison: Comparison, key: str, label: str, scale: float = 1.0, first: int = 0) -> Figure | None:
    """Draw one line per rule over the epochs from `first` on, with its spread; legend below."""
    lines: dict[str, Line] = {}
    for rule in comparison.rules:
        runs = comparison.of(rule)
        epochs, mean, deviation, count = spread(runs, key, first=first)
        if count:
            seeds = [spread([run], key, first=first)[:2] for run in runs] if count == 2 else []
            own = [(epochs_of_one, values * scale) for epochs_of_one, values in seeds]
            lines[rule] = Line(epochs, mean * scale, deviation * scale, count, own)
    if not lines:
        return None
    figure, axes = rule_lines(lines, comparison.rules)
    axes.set(xlabel="epoch", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def _final_score(comparison: Comparison) -> Figure | None:
    """Draw a dot plot, one row per rule: each seed, mean and standard deviation."""
    scores = {rule: _final_scores(comparison, rule) for rule in comparison.rules}
    scores = {rule: values for rule, values in scores.items() if values.size}
    if not scores:
        return None
    figure = Figure(figsize=(WIDTH, 0.62 + 0.24 * len(scores)))
    axes = figure.add_subplot()
    style = styles(comparison.rules)
    for row, (rule, values) in enumerate(scores.items()):
        colour, marker = style[rule].colour, style[rule].marker
        deviation = values.std(ddof=1) if values.size > 1 else 0.0
        centre: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5.5, "elinewidth": 1.2, "zorder": 3}
        axes.errorbar(values.mean(), row - 0.14 * (values.size > 1), xerr=deviation, **centre)
        if values.size > 1:
            axes.scatter(values, np.full(values.size, row + 0.2), s=11, facecolors="white", edgecolors=colour, lw=0.8)
    axes.set_yticks(range(len(scores)), [label(rule, 22) for rule in scores])
    axes.set_ylim(len(scores) - 0.4, -0.6)
    axes.set_xlabel(comparison.score.label.replace(comparison.score.name, f"{comparison.score.name} after the last epoch"))
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.margins(x=0.06)
    if not comparison.score.is_loss:
        means = np.array([values.mean() for values in scores.values()])
        _leave_out_far_below(axes, means)
    return figure


def _leave_out_far_below(axes: Axes, means: Array) -> None:
    """Show rows far below most others only as a number at the edge: otherwise the rest would be indistinguishable."""
    low, high = np.quantile(means, [0.25, 0.75])
    edge = low - 4 * max(high - low, 1.0)
    if len(means) < MANY or means.min() >= edge:
        return
    kept = means[means >= edge]
    axes.set_xlim(left=kept.min() - 0.15 * (kept.max() - kept.min()) - 1.0)
    for row in np.flatnonzero(means < edge):
        at: Any = axes.get_yaxis_transform()
        axes.text(0.01, float(row), f"\u2190 {means[row]:.1f}", transform=at, va="center", fontsize=8)


def _layers(comparison: Comparison, spec: _LayerFigure) -> Figure | None:
    """Draw small multiples: one panel per rule that has the measure, one line per layer."""
    rules = _rules_with_layers(comparison, spec)
    if not rules:
        return None
    layers = list(dict.fromkeys(layer for rule in rules for run in comparison.of(rule) for layer in run.layers))
    named = len(layers) <= _NAMED_LAYERS
    colours = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.88, len(layers)))
    columns = min(2, len(rules))
    rows = math.ceil(len(rules) / columns)
    height = (1.4 if rows > 1 else 1.7) * rows + (0.35 + 0.14 * math.ceil(len(layers) / 2) if named else 0.7)
    figure = Figure(figsize=(WIDTH, height))
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten())
    spare = panels.pop() if len(panels) > len(rules) else None
    for panel, rule in zip(panels, rules, strict=True):
        _layer_panel(panel, comparison.of(rule), spec, layers, colours, named)
        panel.set_title(label(rule, 20), loc="left", pad=3, fontweight="bold")
    for panel in panels[-columns:]:
        panel.set_xlabel("epoch")
        panel.tick_params(labelbottom=True)
    _layer_scale(panels[0], comparison, spec)
    figure.supylabel(spec.axis, fontsize=8)
    if spare is not None:
        spare.set_axis_off()
    if named:
        _layer_legend(figure, spare, layers, colours)
    else:
        _layer_colourbar(figure, panels, layers, colours)
    return figure


def _layer_panel(
    panel: Axes, runs: Sequence[Run], spec: _LayerFigure, layers: Sequence[str], colours: Array, named: bool
) -> None:
    panel.axhline(spec.reference, color="#555555", linewidth=0.8, linestyle=(0, (1, 1.5)), zorder=1)
    means = []
    widths = np.linspace(1.9, 1.0, len(layers)) if named else np.full(len(layers), 0.7)  # thinner on top, so none is hidden
    for layer, colour, width in zip(layers, colours, widths, strict=True):
        epochs, mean, deviation, count = spread(runs, spec.key, layer)
        means.append(dict(zip(epochs, mean, strict=True)))
        alone = "." if np.isfinite(mean).sum() == 1 else None  # a training that was stopped in its first epoch
        panel.plot(epochs, mean, color=tuple(colour), linewidth=width, zorder=2, marker=alone)
        if named and count >= 3:
            panel.fill_between(epochs, mean - deviation, mean + deviation, color=tuple(colour), alpha=0.18, linewidth=0)
    if not named:
        everywhere = sorted({epoch for layer_means in means for epoch in layer_means})  # a layer may lack some epochs
        table = np.array([[layer_means.get(epoch, np.nan) for epoch in everywhere] for layer_means in means])
        panel.plot(everywhere, column_mean(table), color="black", linewidth=1.4, linestyle=(0, (4, 1.5)), zorder=3)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))


def _layer_scale(panel: Axes, comparison: Comparison, spec: _LayerFigure) -> None:
    values = np.concatenate([run.curve(spec.key, layer) for run in comparison.runs for layer in run.layers])
    values = values[np.isfinite(values)]
    if spec.reference == 90.0:
        panel.set_ylim(0, max(100.0, 1.03 * values.max()))
        panel.set_yticks(range(0, 181 if values.max() > 110 else 91, 30))
    elif spec.key != "pair_cka" and values.min() > 0 and values.max() > 5 * values.min():
        panel.set_yscale("log")
        plain_log_steps(panel)
    else:
        panel.set_ylim(0, 1.08 * max(1.0, values.max()))


def _layer_legend(figure: Figure, spare: Axes | None, layers: Sequence[str], colours: Array) -> None:
    """Draw the names of the layers, in a free cell of the grid if there is one, else below."""
    handles = [Line2D([], [], color=tuple(colour), linewidth=1.6) for colour in colours]
    names = [layer if len(layer) <= 20 else f"{layer[:6]}…{layer[-13:]}" for layer in layers]
    if spare is not None:
        spare.legend(handles, names, loc="center", handlelength=1.6)
        return
    longest = max(map(len, names))
    columns = min(len(layers), 4 if longest <= 8 else 3 if longest <= 12 else 2)
    figure.legend(handles, names, loc="outside lower center", ncols=columns, handlelength=1.4, columnspacing=1.2)


def _layer_colourbar(figure: Figure, panels: list[Axes], layers: Sequence[str], colours: Array) -> None:
    count = len(layers)
    scale = ScalarMappable(BoundaryNorm(np.arange(count + 1) + 0.5, count), ListedColormap(colours.tolist()))
    bar = figure.colorbar(scale, ax=panels, location="bottom", aspect=40, fraction=0.04, pad=0.02)
    bar.set_ticks(sorted({1, *range(5, count - 1, 5), count}))
    bar.ax.minorticks_off()
    bar.set_label("layer, counted from the input")


def _layer_caption(spec: _LayerFigure, comparison: Comparison) -> str:
    seeds = len({run.seed for run in comparison.runs})
    layers = max((run.layers for run in comparison.runs), key=len)
    text = spec.caption + (" Lines are means over seeds." if seeds > 1 else "")
    if len(layers) > _NAMED_LAYERS:
        text += f" Layer 1 is {layers[0]}, layer {len(layers)} is {layers[-1]}; dashed: mean over layers."
    return text


def _rules_with_layers(comparison: Comparison, spec: _LayerFigure) -> list[str]:
    """Return the rules with the measure in some layer, without backpropagation, which agrees with itself."""
    return [
        rule
        for rule in comparison.rules
        if rule != "bp"
        and any(has_values(run.curve(spec.key, layer)) for run in comparison.of(rule) for layer in run.layers)
    ]


def _final_scores(comparison: Comparison, rule: str) -> Array:
    key, scale = comparison.score.key, comparison.score.scale
    scores = scale * np.array([run.final(key) for run in comparison.of(rule) if run.finished], dtype=np.float64)
    return scores[np.isfinite(scores)]


def _measured(comparison: Comparison, key: str) -> Array:
    values: Array = np.concatenate([run.curve(key) for run in comparison.runs])
    finite: Array = values[np.isfinite(values)]
    return finite
