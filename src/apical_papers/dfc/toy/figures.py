"""Figures of feedback control: conditions and angles over training, compartments over time, the set of optimal feedback."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from apical.bench.figures.curves import Drawing, render
from apical.bench.figures.style import RC, RULES, Style
from apical.bench.report.records import Array
from apical.rules.feedback_control.trajectory import Trace
from apical_papers.dfc.toy.optimal import Optimal

_COLUMN, _PAGE = 3.5, 7.0
_FIXED = (0, (4, 1.5))
_REFERENCE: Any = {"color": "#555555", "linewidth": 0.8, "linestyle": (0, (1, 1.5)), "zorder": 1}

STYLES: dict[str, Style] = {
    "dfc": Style("DFC", "#0072B2", "o", "-"),
    "dfc-fixed": Style("DFC, fixed Q", "#0072B2", "o", _FIXED),
    "dfc-ss": Style("DFC-SS", "#009E73", "s", "-"),
    "dfc-ss-fixed": Style("DFC-SS, fixed Q", "#009E73", "s", _FIXED),
    "dfc-ssa": Style("DFC-SSA", "#CC79A7", "D", "-"),
    "dfc-ssa-fixed": Style("DFC-SSA, fixed Q", "#CC79A7", "D", _FIXED),
    "dfa": RULES["dfa"]._replace(name="DFA"),
    "bp": RULES["bp"]._replace(name="BP"),
}
"""Colour is the variant, solid is learned feedback, dashed is fixed feedback."""

COMPARTMENTS = {"soma": "#000000", "basal": "#0072B2", "apical": "#D55E00"}


def conditions(curves: Mapping[str, Mapping[str, Any]], panels: Sequence[tuple[str, str]]) -> Drawing:
    """Draw one panel per measure, one line per rule that has it: mean over seeds with a band of one standard deviation.

    Args:
        curves: rule -> {"n": seeds, "metrics": {measure: {"epochs", "mean", "std"}}}.
        panels: (measure, axis label), in reading order; lettered A, B, ...
    """
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(_PAGE, 1.9 * ((len(panels) + 2) // 3) + 0.55))
        grid = figure.subplots((len(panels) + 2) // 3, 3, sharex=True, squeeze=False)
        used = set()
        for axes, letter, (key, label) in zip(grid.flat, "ABCDEFGHI", panels, strict=False):
            used |= _curves(axes, curves, key)
            axes.set_ylabel(label)
            axes.set_title(letter, loc="left", fontweight="bold", pad=3)
            if key not in ("condition_two", "eigenvalue"):
                axes.set_ylim(0, 1.12 * axes.dataLim.y1)
        for axes in grid[-1]:
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        order = [*STYLES, *(rule for rule in curves if rule not in STYLES)]
        rules = [rule for rule in order if rule in used]
        handles = [Line2D([], [], **_look(rule), linewidth=1.5, markeredgewidth=0.4) for rule in rules]
        names = [_style(rule).name for rule in rules]
        figure.legend(handles, names, loc="outside lower center", ncols=4, columnspacing=1.4, handlelength=3.2)
        seeds = max((entry["n"] for entry in curves.values()), default=0)
        caption = (
            "On a fixed batch of training samples after each epoch; epoch 0 is before the forward weights learn. Lines: "
            f"mean over {seeds} {'seed' if seeds == 1 else 'seeds'}; bands: ± one standard deviation. Solid: learned "
            "feedback weights Q; dashed: Q fixed at the product of the initial forward weights. Dotted grey: where the "
            "condition holds exactly, or the limit of stability. The lines of DFC-SS and DFC-SSA coincide."
        )
        return render("conditions", "Conditions and alignment during training", caption, figure)


def traces(weak: Trace, strong: Trace, weak_target: Tensor, strong_target: Tensor, sample: int = 0) -> Drawing:
    """Draw output, control and compartments of two neurons per layer over time, weak control left, strong control right.

    Args:
        weak_target, strong_target: targets of the output (batch, n_L).
        sample: which sample of the batch to draw.
    """
    layers = len(weak.soma)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(_PAGE, 1.25 * (layers + 2) + 0.5))
        grid = figure.subplots(layers + 2, 2, sharex=True, squeeze=False)
        neurons = [_strongest(layer[:, sample], 2) for layer in strong.apical]
        for column, (trace, target) in enumerate(((weak, weak_target), (strong, strong_target))):
            _output_panel(grid[0, column], trace, target, sample)
            _control_panel(grid[1, column], trace, sample)
            for i, neuron in enumerate(neurons):
                _compartment_panel(grid[i + 2, column], trace, i, sample, neuron)
            grid[-1, column].set_xlabel("time (τ_u)")
        grid[0, 0].set_title("weak control: target a little better", loc="left", fontweight="bold")
        grid[0, 1].set_title("strong control: target is the label", loc="left", fontweight="bold")
        grid[0, 0].set_ylabel("output r_L")
        grid[1, 0].set_ylabel("control u")
        for i, axes in enumerate(grid[2:, 0]):
            axes.set_ylabel(f"Δ potential,\n{'output layer' if i == layers - 1 else f'layer {i + 1}'}")
        figure.align_ylabels(list(grid[:, 0]))
        handles = [Line2D([], [], color=colour) for colour in COMPARTMENTS.values()]
        names = ["soma v", "basal W r + b", "apical Q u"]
        handles += [Line2D([], [], color="#777777", linestyle=line) for line in ("-", _FIXED)]
        figure.legend(handles, [*names, "neuron 1", "neuron 2"], loc="outside lower center", ncols=5)
        caption = (
            "One sample under the controller; time in units of its time constant, potentials without unit. Potentials of "
            "soma and basal compartment are shown minus their feed-forward value, so that soma = basal + apical once "
            "settled (the basal potential of layer 1 cannot move: its input is the sample). Two neurons per layer are "
            "drawn, those with the largest apical potential under strong control. Left: target a tenth of the way to the "
            "label (lambda 0.05); right: same sample, network and feedback, target the label itself. The scales differ."
        )
        return render("trace", "Weak and strong control of one sample", caption, figure)


def optimal(points: Optimal) -> Drawing:
    """Draw random optimal feedback weights in the plane of their principal components, with J^T, J^+ and damped ones."""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(_COLUMN, 3.1))
        axes = figure.add_subplot()
        look: Any = {"s": 3, "color": "#9AA5AE", "linewidths": 0, "rasterized": True}
        axes.scatter(points.cloud[:, 0], points.cloud[:, 1], label="random optimal Q", **look)
        axes.plot(*points.damped.T, color="#0072B2", zorder=3, label="Jᵀ(JJᵀ + \u03b3I)⁻¹")
        axes.plot(*points.transpose, "^", color="#E69F00", markersize=7, markeredgecolor="black", zorder=4, label="Jᵀ")
        axes.plot(*points.pseudoinverse, "s", color="#D55E00", markersize=6, markeredgecolor="black", zorder=4, label="J⁺")
        for name, axis, share in zip(("x", "y"), (1, 2), points.explained, strict=True):
            axes.set(**{f"{name}label": f"principal component {axis} ({100 * share:.0f} % of variance)"})
        axes.set_aspect("equal", adjustable="datalim")
        figure.legend(loc="outside lower center", ncols=4, columnspacing=1.0, handletextpad=0.3, handlelength=1.4)
        caption = (
            f"{len(points.cloud):,} random feedback matrices Q = Jᵀ P of a 5-2-2 network that meet Condition 2 and keep the "
            "loop stable, each scaled to norm 1 (no unit), with the transpose, the pseudoinverse and the damped "
            f"pseudoinverses between them (\u03b3 from {points.gammas[0]:g} to {points.gammas[-1]:g}). All give the "
            "same update."
        )
        return render("optimal_feedback", "Optimal feedback weights are many", caption, figure)


def _style(rule: str) -> Style:
    return STYLES.get(rule) or Style(rule, "#7F7F7F", "*", "-")


def _look(rule: str) -> dict[str, Any]:
    style = _style(rule)
    return {"color": style.colour, "linestyle": style.line, "marker": style.marker, "markeredgecolor": "white"}


def _curves(axes: Axes, curves: Mapping[str, Mapping[str, Any]], key: str) -> set[str]:
    """Draw one measure; return the rules that have it."""
    rules = [rule for rule in curves if key in curves[rule]["metrics"] and not (key == "ssa" and rule.startswith("dfc-ssa"))]
    for position, rule in enumerate(rules):
        line = curves[rule]["metrics"][key]
        epochs, mean, std = (np.array(line[name], dtype=np.float64) for name in ("epochs", "mean", "std"))
        every = max(1, len(epochs) // 5)
        marks = (position * every // max(1, len(rules)), every)
        width = 2.0 - 0.35 * (position % 3)  # thinner on top, so that no line hides another
        axes.plot(epochs, mean, **_look(rule), markevery=marks, linewidth=width, markeredgewidth=0.4, zorder=3 + position)
        if curves[rule]["n"] > 1:
            colour = _style(rule).colour
            axes.fill_between(epochs, mean - std, mean + std, color=colour, alpha=0.1, linewidth=0)
    if key == "condition_two" and rules:
        axes.axhline(1.0, **_REFERENCE)
    if key == "eigenvalue" and rules:
        axes.axhline(0.0, **_REFERENCE)
    return set(rules)


def _strongest(apical: Tensor, count: int) -> list[int]:
    """Return the neurons with the largest apical potential at the end, from (T, n_i)."""
    order: list[int] = apical[-1].abs().argsort(descending=True)[:count].tolist()
    return order


def _thin(values: Tensor) -> Array:
    """Thin out a trajectory at regular intervals, keeping the last point, so that files stay small."""
    every = max(1, (len(values) - 1) // 400)
    steps = torch.tensor(sorted({*range(0, len(values), every), len(values) - 1}))
    thinned: Array = values[steps].double().numpy()
    return thinned


def _output_panel(axes: Axes, trace: Trace, target: Tensor, sample: int) -> None:
    times = _thin(trace.times)
    for k in range(trace.output.shape[2]):
        axes.plot(times, _thin(trace.output[:, sample, k]), color="#000000", label="output" if k == 0 else None)
        wished = float(target[sample, k])
        axes.axhline(wished, color="#009E73", linestyle=_FIXED, linewidth=1.1, label="target" if k == 0 else None)
    axes.legend(loc="center right", handlelength=1.8)


def _control_panel(axes: Axes, trace: Trace, sample: int) -> None:
    for k in range(trace.u.shape[2]):
        axes.plot(_thin(trace.times), _thin(trace.u[:, sample, k]), color="#CC79A7")
    axes.axhline(0.0, **_REFERENCE)


def _compartment_panel(axes: Axes, trace: Trace, layer: int, sample: int, neurons: Sequence[int]) -> None:
    for neuron, line in zip(neurons, ("-", _FIXED), strict=False):
        for kind, colour in COMPARTMENTS.items():
            values = getattr(trace, kind)[layer][:, sample, neuron]
            axes.plot(_thin(trace.times), _thin(values - values[0]), color=colour, linestyle=line, linewidth=1.1)
    axes.axhline(0.0, **_REFERENCE)
