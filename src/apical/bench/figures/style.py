"""Names and styles of rules, the same in every figure and table.

Colours are those of Okabe and Ito for the rules most often compared, and of Paul Tol's sets for most of the rest. Those of
backpropagation, direct feedback alignment and the feedback-control rules, which appear in one plot, are distinguishable with
the common forms of colour blindness. There are many rules, so marker and line style distinguish them everywhere else and in
greyscale print. For feedback control, fixed feedback is a lighter tint of the learned variant, dashed, with the same marker.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

LineStyle = str | tuple[int, tuple[float, ...]]
_DASH: LineStyle = (0, (4, 1.5))
_DOT_DASH: LineStyle = (0, (5, 1.2, 1, 1.2))
_DOT: LineStyle = (0, (1.2, 1.2))

RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.8,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.06,
    "text.parse_math": False,
    "svg.hashsalt": "apical",
    "svg.fonttype": "path",
}
"""Settings of every figure; with the fixed salt, equal data give equal SVG files, and a `$` in a name is kept."""


class Style(NamedTuple):
    """Full name, colour, marker and line style of one rule."""

    name: str
    colour: str
    marker: str
    line: LineStyle


RULES: dict[str, Style] = {
    "bp": Style("Backpropagation", "#000000", "o", "-"),
    "fa": Style("Feedback alignment", "#D55E00", "s", _DASH),
    "dfa": Style("Direct feedback alignment", "#E69F00", "^", _DOT_DASH),
    "usf": Style("Sign symmetry (uniform magnitude)", "#56B4E9", "D", _DASH),
    "brsf": Style("Sign symmetry (magnitude redrawn per batch)", "#999933", "v", _DOT),
    "frsf": Style("Sign symmetry (fixed random magnitude)", "#661100", "<", _DOT_DASH),
    "kp": Style("Kolen-Pollack", "#CC79A7", "P", _DASH),
    "kp-mirror": Style("Kolen-Pollack from a mirror", "#A0527D", "P", _DOT),
    "pfa-mirror": Style("PFA from a mirror", "#3E8FC4", "D", _DASH),
    "pfa-o-mirror": Style("PFA-o from a mirror", "#5BBFA0", "v", _DASH),
    "wm": Style("Weight mirror", "#882255", "X", _DOT_DASH),
    "pfa": Style("Product feedback alignment", "#0072B2", "o", "-"),
    "pfa-o": Style("Product feedback alignment (orthogonal)", "#009E73", "d", _DOT),
    "dfc": Style("Deep feedback control", "#CC3311", "h", "-"),
    "dfc-ss": Style("Deep feedback control (steady state)", "#332288", ">", "-"),
    "dfc-ssa": Style("Deep feedback control (linearised steady state)", "#AA3377", "p", "-"),
    "dfc-fixed": Style("Deep feedback control (fixed feedback)", "#DB7058", "h", _DASH),
    "dfc-ss-fixed": Style("Deep feedback control (steady state, fixed feedback)", "#8F85BE", ">", _DASH),
    "dfc-ssa-fixed": Style("Deep feedback control (linearised steady state, fixed feedback)", "#D9A3C2", "p", _DASH),
    "strong-dfc": Style("Strong deep feedback control", "#1E88E5", "s", _DOT_DASH),
    "ccl": Style("Counter-current learning", "#117733", "D", "-"),
    "ccl-frozen": Style("CCL, feedback network frozen", "#77AA88", "D", _DASH),
    "ccl-free": Style("CCL, a classifier per layer", "#6A51A3", "s", _DOT_DASH),
    "ccl-readout": Style("CCL, only the last layer", "#B0567C", "v", _DOT),
    "dtp": Style("Difference target propagation", "#8C510A", "v", _DASH),
    "dtp-drl": Style("DTP, difference reconstruction loss", "#BF812D", "^", "-"),
    "ddtp-linear": Style("Direct DTP (linear)", "#01665E", "<", "-"),
    "ddtp-rhl": Style("Direct DTP (random hidden layer)", "#35978F", ">", _DOT_DASH),
    "ddtp-control": Style("Direct DTP, reconstruction without difference", "#80A8A2", "<", _DOT),
    "ep": Style("Equilibrium propagation", "#4B2E83", "o", _DASH),
    "ep-one-sided": Style("EP, one nudge of random sign", "#9683C0", "o", _DOT),
    "ep-directed": Style("EP, directed weights", "#C2185B", "P", _DOT_DASH),
    "hep": Style("Holomorphic EP", "#00897B", "H", "-"),
    "corinfomax": Style("CorInfoMax", "#A65628", "X", "-"),
    "pc": Style("Predictive coding (states)", "#4477AA", "^", "-"),
    "pc-error": Style("Predictive coding (errors)", "#1F4E79", "v", _DOT_DASH),
    "pc-one-step": Style("Predictive coding, one step", "#8FB4D9", "v", _DOT),
    "pc-incremental": Style("Incremental predictive coding", "#5B8DB8", "^", _DASH),
    "mupc": Style("Predictive coding (mu parametrisation)", "#2E6F9E", "8", "-"),
    "dualprop": Style("Dual propagation", "#B8860B", "p", _DASH),
    "local-pred": Style("Local classifiers (prediction)", "#228833", "s", "-"),
    "local-sim": Style("Local classifiers (similarity)", "#66AA55", "s", _DOT),
    "local-both": Style("Local classifiers (both losses)", "#3F7F2F", "D", _DASH),
    "mono-forward": Style("Mono-Forward", "#9ACD32", "<", _DOT_DASH),
    "ff": Style("Forward-forward", "#EE6677", "o", "-"),
    "ff-readout": Style("Forward-forward, only the read-out", "#F4A6AF", "o", _DOT),
    "scff": Style("Self-contrastive forward-forward", "#B03A4A", "H", _DASH),
    "csdp": Style("Contrastive-signal-dependent plasticity", "#7A4988", "h", "-"),
    "csdp-unsupervised": Style("CSDP, unsupervised negatives", "#A978B5", "h", _DASH),
    "csdp-memristor": Style("CSDP on memristors", "#4B2A57", "h", _DOT),
    "sibp": Style("Semi-implicit backpropagation", "#595959", ">", _DOT_DASH),
    "tdca": Style("Top-down credit assignment", "#0B5345", "*", "-"),
    "tdca-silent": Style("TDCA, no credit to hidden units", "#3E8E7E", "*", _DOT_DASH),
    "tdca-unevolved": Style("TDCA, unevolved", "#6C8EAD", "*", _DOT),
}
AROUND = {"grapes": "GRAPES", "matched": "GRAPES' control of equal mean step", "cwu": "Consequentialism updates"}
"""Rules that wrap another rule; their name comes before the other's, with a dash."""

_FURTHER = (
    ("#7F7F7F", "8", "-"),
    ("#44AA99", "H", _DASH),
    ("#6F4E37", "s", _DOT_DASH),
    ("#DDCC77", "v", _DOT),
    ("#AA4499", "X", "-"),
)


def plain_log(axis: Any) -> None:
    """Label the powers of ten of a logarithmic axis as plain numbers, because `$` does not start mathematics here."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: "")


def plain_log_steps(axes: Axes) -> None:
    """Also label 1, 2 and 5 of each power of ten if there are few powers."""
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    plain_log(axes.yaxis)


def styles(rules: Sequence[str]) -> dict[str, Style]:
    """Return the style of each rule; rules missing from this table get the spare styles in order."""
    unknown = [rule for rule in rules if rule not in RULES]
    further = {rule: Style(_title(rule), *_FURTHER[i % len(_FURTHER)]) for i, rule in enumerate(unknown)}
    return {rule: RULES.get(rule) or further[rule] for rule in rules}


def _title(rule: str) -> str:
    """Return the full name of a rule around one in the table, such as "grapes-fa"; for any other rule, its short name."""
    outer, dash, inner = rule.partition("-")
    if not dash or outer not in AROUND:
        return rule
    return f"{AROUND[outer]} around {RULES[inner].name if inner in RULES else _title(inner)}"


def label(rule: str, room: int = 32) -> str:
    """Shorten a rule's name to the room in a figure.

    >>> label("pfa"), label("FeedbackAlignmentWithSynapsesOfManyKinds")
    ('pfa', 'FeedbackAlignmentWit...ManyKinds')
    """
    return rule if len(rule) <= room else f"{rule[: room - 12]}...{rule[-9:]}"
