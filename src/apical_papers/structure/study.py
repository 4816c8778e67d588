"""Structure and depth: does credit reach the first layer, and does the rule that assigns it shape the weights' topology?

Run `python -m apical_papers.structure.study --out results/structure-study --jobs 1`. Gradients of deep chains at their
initial weights; persistence of the weights of small networks trained on MNIST digits under eight rules, compared with
shuffled weights; learned and fixed wirings; entropy of random codes and the accuracy of a read-out on them. Each seed is
saved when it is finished. The marks were written before the run; learning rates and gamma after inspecting one other seed.
"""

import math
import sys
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from apical.bench.finding import Row, at_least, count, difference, series, table
from apical.bench.program import Cells, SeedStudy, about_study
from apical.bench.statistics import student
from apical_papers.digits import TEST, TRAIN, Digits
from apical_papers.structure import depth
from apical_papers.structure.trained import NODES, RULES, WIDTH, WIRINGS, codes, spearman, topology, wirings

SETTINGS: dict[str, Any] = {
    "training digits": TRAIN,
    "test digits": TEST,
    "depth: width, depths": f"{depth.WIDTH}; {', '.join(map(str, depth.DEPTHS))}",
    "persistence: network": "784-64-64-10, ReLU, Xavier; plain SGD, batches of 64",
    "persistence: learning rates": ", ".join(f"{rule} {lr:g}" for rule, lr in RULES.items()),
    "graphs: nodes, width": f"{NODES}, {WIDTH}; SGD at 0.05; gamma of L1 0.01",
    "codes": "30 random ReLU networks 784-100-100 a seed, linear read-out",
}
FIXED = ("chain", "residual", "complete", "random")

ABOUT = about_study(
    "Structure and depth: how far credit arrives, and what it leaves in the weights",
    "How much of a rule's credit arrives at the first layer of chains of 10, 50 and 200 layers; and whether rules "
    "leave weights of different topology: deep graph persistence, beside that of the same weights shuffled in their layers.",
    "No table of these papers was found in a source that could be read; their claims are tested at a small "
    "size, with marks of ours that were written before the run. Reproduced means that the 95 % interval (Student's t, "
    "paired over seeds) lies on its better side, or the mean past the mark.",
)


def _cell(seed: int, epochs: int) -> dict[str, Any]:
    digits = Digits()
    return {
        "depth": depth.measure(seed, until=depth.SLOW) if seed < depth.SEEDS else {},
        "topology": topology(digits, seed, epochs),
        "wirings": wirings(digits, seed, epochs),
        "codes": codes(digits, seed),
    }


def verdicts(cells: Cells) -> list[Row]:
    """Judge propagation of credit, differences between rules, and wirings."""
    return [*depth_verdicts(cells), *topology_verdicts(cells), *wiring_verdicts(cells)]


def depth_verdicts(cells: Cells) -> list[Row]:
    """Judge the isometry at depth 50: all of BP's gradient arrives, a tenth under fixed feedback, none of CCL's."""
    rows = []
    for layers in depth.DEPTHS:
        off = [1 - abs(1 - r) for r in depth.ratios(cells, depth.EXACT, "bp", layers)]
        what = f"|x| at depth {layers}: 1 minus the distance of layer 1 / L from 1"
        rows.append(at_least("depth", "bp", what, off, 0.999))
    for rule in ("fa", "dfa", "usf", "dtp", "ddtp-linear", "dualprop"):
        ratios = depth.ratios(cells, depth.EXACT, rule, 50)
        rows.append(at_least("depth", rule, "|x| at depth 50: gradient norm of layer 1 / L", ratios, 0.1))
    ratios = [-math.log10(max(r, 1e-30)) for r in depth.ratios(cells, depth.EXACT, "ccl", 50)]
    rows.append(at_least("depth", "ccl", "|x| at depth 50: orders of magnitude lost", ratios, 6.0))
    return rows


def topology_verdicts(cells: Cells) -> list[Row]:
    """Judge persistence: training raises DGP; rules differ from BP, with and without correction for shuffled weights."""
    rows = []
    for rule in RULES:
        what = "deep graph persistence minus that before training"
        rows.append(difference("DGP", rule, what, _deep(cells, rule), _deep(cells, "untrained"), less=False))
    others = [rule for rule in RULES if rule != "bp"]
    differ = [_differs(_deep(cells, r), _deep(cells, "bp")) for r in others]
    excess = [_differs(_excess(cells, r), _excess(cells, "bp")) for r in others]
    rows.append(count("DGP", "all", "rules whose DGP differs from bp's", differ, 4))
    both = [a and b for a, b in zip(differ, excess, strict=True)]
    rows.append(count("DGP", "all", "rules whose DGP and its excess over shuffled weights both differ from bp's", both, 4))
    first = [z[0] - 3 * max(z[1:]) for z in map(_z, series(cells, "topology", "bp"))]
    rows.append(at_least("NP", "bp", "z of layer 1 against shuffles minus 3 times that of every later layer", first, 0.0))
    rows.append(at_least("NP", "all", "later layers: rank correlation of NP with the spread", _spread_rho(cells), 0.8))
    return rows


def wiring_verdicts(cells: Cells) -> list[Row]:
    """Judge learned against fixed edges under two rules; pruned edges; entropy and accuracy of random codes."""

    def of(name: str, key: str = "accuracy") -> list[float]:
        return series(cells, "wirings", name, key)

    best = max(FIXED, key=lambda name: fmean(of(name)))
    rows = [
        difference("graph", "bp", f"learned minus {best}, the best fixed wiring", of("learned"), of(best), less=False),
        difference("graph", "bp", "learned minus chain", of("learned"), of("chain"), less=False),
        difference("graph", "fa", "learned minus chain", of("learned, fa"), of("chain, fa"), less=False),
        difference("graph", "bp", "attention minus learned", of("attention"), of("learned"), less=False),
        at_least("graph", "bp", "with L1: share of the edges below 0.01", of("learned, L1", "pruned"), 0.3),
    ]
    losses = [after - before for after, before in zip(of("learned, L1", "accuracy pruned"), of("learned, L1"), strict=True)]
    rows.append(at_least("graph", "bp", "with L1: accuracy without them minus that with them", losses, -0.005))
    what = "rank correlation of entropy with a read-out's accuracy"
    return [*rows, at_least("codes", "none", what, series(cells, "codes"), 0.5)]


def _deep(cells: Cells, rule: str) -> list[float]:
    return series(cells, "topology", rule, "dgp")


def _excess(cells: Cells, rule: str) -> list[float]:
    return [math.log(row["dgp"] / row["dgp shuffled"]) for row in series(cells, "topology", rule)]


def _differs(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Return whether the 95 % interval of the paired difference excludes zero."""
    _, low, high, _ = student([a - b for a, b in zip(ours, theirs, strict=True)])
    return low is not None and high is not None and not low <= 0 <= high


def _z(row: dict[str, Any]) -> list[float]:
    keys = ("np", "np shuffled", "np shuffled std")
    return [(value - mean) / max(std, 1e-12) for value, mean, std in zip(*(row[key] for key in keys), strict=True)]


def _spread_rho(cells: Cells) -> list[float]:
    """Return Spearman's rho over the networks of a seed, mean over the later layers."""
    coefficients = []
    for cell in cells:
        rows = list(cell["topology"].values())
        layers = range(1, len(rows[0]["np"]))
        rhos = [spearman([row["np"][i] for row in rows], [row["spread"][i] for row in rows]) for i in layers]
        coefficients.append(abs(fmean(rhos)))
    return coefficients


def tables(cells: Cells) -> list[Row]:
    """Return tables of means over seeds with 95 % intervals."""
    return [
        *(depth.table(cells, name) for name in depth.NETWORKS),
        _topology_table(cells),
        _layers_table(cells),
        _wiring_table(cells),
    ]


def _topology_table(cells: Cells) -> Row:
    rows = []
    for rule in ("untrained", *RULES):
        excess, bp = _excess(cells, rule), _excess(cells, "bp")
        more = [a - b for a, b in zip(excess, bp, strict=True)]
        measured = (series(cells, "topology", rule, key) for key in ("accuracy", "dgp", "dgp shuffled"))
        rows.append([rule, *measured, excess, more])
    note = (
        "Mean over seeds with 95 % interval. Shuffled: of the same weights within their layers, which keeps their spread. "
        "Excess: log of the ratio; minus bp's, pair by pair."
    )
    header = ("rule", "test accuracy", "DGP", "shuffled", "excess", "excess minus bp's")
    return table("Deep graph persistence", note, header, rows)


def _layers_table(cells: Cells) -> Row:
    rows = [
        [rule, str(layer + 1), *(series(cells, "topology", rule, key, layer) for key in ("np", "np shuffled", "spread"))]
        for rule in ("untrained", *RULES)
        for layer in range(3)
    ]
    note = "Beside that of shuffled weights and the spread std(|W| / max |W|)."
    return table("Neural persistence by layer", note, ["rule", "layer", "NP", "shuffled", "spread"], rows)


def _wiring_table(cells: Cells) -> Row:
    rows = [
        [name, rule, *(series(cells, "wirings", name, key) for key in ("accuracy", "pruned", "accuracy pruned"))]
        for name, (_, _, rule, _) in WIRINGS.items()
    ]
    note = "Test accuracy (0 to 1), mean over seeds with 95 % interval; share of the edges below 0.01."
    header = ("wiring", "rule", "accuracy", "share below 0.01", "accuracy without these")
    return table("Wirings of eight nodes", note, header, rows)


main = SeedStudy(
    "apical_papers.structure.study",
    ABOUT,
    SETTINGS,
    _cell,
    verdicts,
    tables,
    epochs=5,
    passes="of every network that is trained.",
)


if __name__ == "__main__":
    sys.exit(main())
