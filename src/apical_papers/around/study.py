"""How an error is used: node importance, local solvers and semi-implicit steps, each with its control.

Run `python -m apical_papers.around.study --out results/around-study`. MNIST digits through small ReLU networks, plain SGD
without momentum. Node importance (GRAPES) is compared with a control of the same mean step and with its local mode;
consequentialism updates around three rules with the bare rules, over a 20-fold range of learning rates; semi-implicit
backpropagation with SGD, over a 100-fold range of steps. Each seed is saved in the folder when it is finished.
"""

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from apical.bench.finding import Row, at_least, difference, series, table
from apical.bench.program import Cells, SeedStudy, about_study
from apical.diagnostics.interference import interference
from apical.rules.backprop import Backprop
from apical_papers.digits import TEST, TRAIN, Digits, passes

SETTINGS: dict[str, Any] = {
    "training digits": TRAIN,
    "test digits": TEST,
    "initial weights": "He uniform, biases zero",
    "grapes: hidden layers of 128, batch": 64,
    "solver: hidden layers": "128, 128",
    "solver: damping": 1e-2,
    "solver: learning rates": "0.05, 0.2, 1; of CCL 1, 4, 20",
    "semi-implicit: hidden layer, batch": "200, 100",
}
ARMS = {
    "bp": ("bp", {}),
    "grapes": ("grapes:bp", {}),
    "local": ("grapes:bp", {"mode": "local"}),
    "matched": ("matched:bp", {}),
}
DEPTHS, RATES = (2, 5), (0.02, 0.1)
SOLVED = {"bp": (0.05, 0.2, 1.0), "dfa": (0.05, 0.2, 1.0), "ccl": (1.0, 4.0, 20.0)}
"""20-fold ranges of learning rates; those of CCL are higher, because its updates are small and clipped."""
ETAS = (0.1, 1.0, 10.0)

ABOUT = about_study(
    "How an error is used: node importance, local solvers, semi-implicit steps",
    "Accuracies after every epoch on 1000 test digits of MNIST. Node importance (GRAPES) is compared with a "
    "control of the same mean step, matched: what it gains over that is due to which units are important.",
    "The papers' tables were found in no source that could be read; their claims are tested at a small size. Reproduced "
    "means that the 95 % interval (Student's t, paired over seeds) lies on its better side, or the mean past the mark.",
)


def network(sizes: Sequence[int], seed: int) -> nn.Sequential:
    """A ReLU perceptron."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for given, size in pairwise(sizes):
        layer = nn.Linear(given, size)
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def trained(
    rule: str, options: dict[str, Any], digits: Digits, sizes: Sequence[int], seed: int, lr: float, batch: int, epochs: int
) -> Iterator[nn.Sequential]:
    """Yield the network after every epoch of plain SGD."""
    model = network((digits.x.shape[1], *sizes, 10), seed)
    for _ in passes(rule, model, digits, lr, batch, epochs, options):
        yield model


def accuracies(
    rule: str, options: dict[str, Any], digits: Digits, sizes: Sequence[int], seed: int, lr: float, batch: int, epochs: int
) -> list[float]:
    """Return the test accuracy (0 to 1) after every epoch of plain SGD."""
    return [digits.accuracy(model) for model in trained(rule, options, digits, sizes, seed, lr, batch, epochs)]


def cosines(digits: Digits, seed: int) -> dict[str, tuple[float, float]]:
    """Return interference at the initial weights, on 64 samples, by layer: without and with the solver."""
    model = network((digits.x.shape[1], 128, 128, 10), seed)
    angles = interference(Backprop(model), digits.x[:64], digits.y[:64], SETTINGS["solver: damping"])
    return dict(zip(("first", "second", "output"), angles.values(), strict=True))


def _cell(seed: int, epochs: int) -> dict[str, Any]:
    digits, fewer = Digits(), max(1, epochs - 1)
    return {
        "grapes": {
            _key(depth, lr): {
                arm: accuracies(rule, options, digits, [128] * depth, seed, lr, 64, epochs)
                for arm, (rule, options) in ARMS.items()
            }
            for depth in DEPTHS
            for lr in RATES
        },
        "solver": {
            name: {str(lr): accuracies(name, {}, digits, (128, 128), seed, lr, 64, fewer) for lr in rates}
            for rule, rates in SOLVED.items()
            for name in (rule, f"cwu:{rule}")
        },
        "cosines": cosines(digits, seed),
        "semi-implicit": {
            "sibp": {str(eta): accuracies("sibp", {"eta": eta}, digits, (200,), seed, 1.0, 100, fewer) for eta in ETAS},
            "sgd": {str(lr): accuracies("bp", {}, digits, (200,), seed, lr, 100, fewer) for lr in ETAS},
        },
    }


def _key(depth: int, lr: float) -> str:
    return f"{depth} hidden layers, lr {lr:g}"


def verdicts(cells: Cells) -> list[Row]:
    """Judge the claims and their controls."""
    return [*grapes_verdicts(cells), *solver_verdicts(cells), *semi_implicit_verdicts(cells)]


def grapes_verdicts(cells: Cells) -> list[Row]:
    """Judge GRAPES: above backpropagation at the same rate; above the control; unstable if gains compound over layers."""
    rows = []
    last = len(cells[0]["grapes"][_key(2, RATES[0])]["bp"])
    for other in ("bp", "matched"):
        for lr in RATES:
            for epoch in dict.fromkeys((1, last)):
                ours, theirs = (_accuracy(cells, _key(2, lr), arm, epoch) for arm in ("grapes", other))
                what = f"{_key(2, lr)}, epoch {epoch}: accuracy minus that of {other}"
                rows.append(difference("GRAPES", "grapes:bp", what, ours, theirs, less=False))
    key = _key(5, RATES[-1])
    for other in ("bp", "local"):
        what = f"{key}, epoch 1: accuracy minus that of {other} (gains compound)"
        ours, theirs = (_accuracy(cells, key, arm, 1) for arm in ("grapes", other))
        rows.append(difference("GRAPES", "grapes:bp", what, ours, theirs, less=True))
    return rows


def solver_verdicts(cells: Cells) -> list[Row]:
    """Judge CWU: within 3 points of the best over all rates, unlike the bare rule; samples do not interfere."""
    rows = []
    for rule, rates in SOLVED.items():
        name, what = f"cwu:{rule}", f"spread of accuracies over lr {rates[0]:g} to {rates[-1]:g}"
        rows.append(at_least("CWU", name, f"3 points minus the {what}", [0.03 - s for s in _spread(cells, name)], 0.0))
        rows.append(at_least("CWU", rule, what, _spread(cells, rule), 0.03))
    for layer in cells[0]["cosines"]:
        without, with_ = (series(cells, "cosines", layer, i) for i in range(2))
        rows.append(at_least("CWU", "cwu:bp", f"{layer} layer: cosine of the change to what was asked for", with_, 0.99))
        rows.append(at_least("CWU", "bp", f"{layer} layer: 1 minus that cosine", [1 - c for c in without], 0.4))
    return rows


def semi_implicit_verdicts(cells: Cells) -> list[Row]:
    """Judge SIBP: stable over a 100-fold range of steps, unlike SGD; faster in the first epoch at the same step."""

    of = partial(series, cells, "semi-implicit")
    rows = [at_least("SIBP", "sibp", f"accuracy at eta {eta:g}", of("sibp", str(eta), -1), 0.85) for eta in ETAS]
    lost = [0.85 - accuracy for accuracy in of("sgd", str(ETAS[-1]), -1)]
    rows.append(at_least("SIBP", "bp", f"0.85 minus accuracy at lr {ETAS[-1]:g}", lost, 0))
    what = f"epoch 1, eta = lr = {ETAS[0]:g}: accuracy minus that of bp"
    rows.append(difference("SIBP", "sibp", what, of("sibp", str(ETAS[0]), 0), of("sgd", str(ETAS[0]), 0), less=False))
    return rows


def _accuracy(cells: Cells, key: str, arm: str, epoch: int) -> list[float]:
    return series(cells, "grapes", key, arm, epoch - 1)


def _spread(cells: Cells, name: str) -> list[float]:
    finals = [[run[-1] for run in cell["solver"][name].values()] for cell in cells]
    return [max(final) - min(final) for final in finals]


def tables(cells: Cells) -> list[Row]:
    """Return accuracies and cosines, means over seeds with 95 % intervals."""
    of, last = partial(series, cells), len(cells[0]["grapes"][_key(2, RATES[0])]["bp"])
    grapes, solver, cosines, semi = (cells[0][part] for part in ("grapes", "solver", "cosines", "semi-implicit"))
    arms = [[key, arm, *(of("grapes", key, arm, i) for i in (0, -1))] for key, arms in grapes.items() for arm in arms]
    return [
        table(
            "Node importance",
            "Test accuracy (0 to 1), mean over seeds with 95 % interval. matched: the mean gain for every unit.",
            ["network", "arm", "epoch 1", f"epoch {last}"],
            arms,
        ),
        table(
            "Local solver, by learning rate",
            "Test accuracy (0 to 1) after the last epoch, mean over seeds with 95 % interval.",
            ["rule", "learning rates", "lowest", "middle", "highest"],
            ([name, ", ".join(runs), *(of("solver", name, lr, -1) for lr in runs)] for name, runs in solver.items()),
        ),
        table(
            "Interference",
            "Cosine of a batch's change of pre-activations to what the errors ask for: 64 samples, initial weights.",
            ["layer", "bp", "cwu:bp"],
            ([layer, *(of("cosines", layer, i) for i in range(2))] for layer in cosines),
        ),
        table(
            "Semi-implicit backpropagation, by step",
            "Test accuracy (0 to 1) after the first and the last epoch, mean over seeds with 95 % interval.",
            ["rule", *(f"step {step:g}, epoch {which}" for step in ETAS for which in ("1", "last"))],
            ([name, *(of("semi-implicit", name, step, i) for step in runs for i in (0, -1))] for name, runs in semi.items()),
        ),
    ]


main = SeedStudy(
    "apical_papers.around.study",
    ABOUT,
    SETTINGS,
    _cell,
    verdicts,
    tables,
    epochs=6,
    passes="those of node importance; the others have one less.",
)


if __name__ == "__main__":
    sys.exit(main())
