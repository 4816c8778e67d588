"""Equilibrium propagation: quality of its gradients, and development of weights that learn separately.

Run `python -m apical_papers.equilibrium.study --out results/ep-study`. On the 8 x 8 digits: how the estimate's direction
approaches that of backpropagation through time with more nudged steps (arXiv 2209.00530), how its error decreases with the
nudge, and whether directed weights that start rotated away from each other align, through weight decay (arXiv 2006.03824) or
the homeostatic loss (arXiv 2309.02214). Each seed is saved in the folder when it is finished, so an interrupted study
continues.
"""

import math
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apical import models
from apical.bench.finding import Row, by_name, difference, mean_table, series
from apical.bench.plain_loop import accuracy, fit
from apical.bench.program import Cells, SeedStudy, about_study
from apical.core.losses import squared_error
from apical.data import Dataset, load
from apical.diagnostics.alignment import angle, gradients
from apical.rules.equilibrium.equilibrium_propagation import EquilibriumPropagation
from apical.rules.equilibrium.phases import phases

STEPS = (5, 10, 20, 40)
"""Numbers of nudged steps T2."""

NUDGES = (0.1, 0.05)
ANGLES = (0, 45, 90)
"""Initial angles in degrees between the two directions' weights."""

SETTINGS: dict[str, Any] = {
    "gradients": "mlp-sigmoid-64-64, 100 images, 300 free steps",
    "directions": "N = 10, nudge 0.5",
    "directed": "mlp-sigmoid-32-32, Adam 0.003, batches of 50, nudge 0.4, 100 free and 30 nudged steps",
    "homeostasis": 1.0,
    "decay": "mlp-sigmoid-64-64, SGD 0.1, batches of 20, weight decay 0.001",
    "original": "mlp-clip-128, 20 free and 4 nudged steps of size 1/2, nudge 1 of random sign, SGD 0.2 and 0.1, batch 20",
}

ABOUT = about_study(
    "Equilibrium propagation: gradients, and weights that learn apart",
    "Digits. How near estimates come to backpropagation through the settling, and what becomes of directed "
    "weights that start at an angle to each other, with and without the homeostatic loss.",
    "Reproduced means that the 95 % interval (Student's t, paired over seeds) of the difference lies on its better side.",
)


def directions(digits: Dataset, seed: int) -> dict[str, float]:
    """Return the cosine of the estimate to backpropagation through time, by nudged steps; all weights as one vector."""
    x, y = digits.train.inputs[:100].double(), digits.train.targets[:100]
    cosines = {}
    for steps in STEPS:
        torch.manual_seed(seed)
        model = models.build("mlp-sigmoid-64-64", digits.input_shape, digits.classes).double()
        rule = EquilibriumPropagation(
            model, estimator="holomorphic", points=10, beta=0.5, free_steps=300, nudged_steps=steps
        )
        own, exact = _as_vectors(rule, x, y)
        cosines[str(steps)] = float(own @ exact / (own.norm() * exact.norm()))
    return cosines


def _as_vectors(rule: EquilibriumPropagation, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The estimate and the gradient through time, all weights in one vector each."""
    own, exact = (torch.cat([g.flatten() for g in gradient.values()]) for gradient in gradients(rule, x, y))
    return own, exact


def orders(digits: Dataset, seed: int) -> dict[str, float]:
    """Return the power of the nudge with which the estimate's error decreases."""
    x, y = digits.train.inputs[:20].double(), digits.train.targets[:20]
    slopes = {}
    for name, options in {
        "one-sided": {"estimator": "one-sided"},
        "symmetric": {"estimator": "symmetric"},
        "N = 4": {"estimator": "holomorphic", "points": 4},
    }.items():
        errors = []
        for beta in NUDGES:
            torch.manual_seed(seed)
            model = models.build("mlp-sigmoid-32-32", digits.input_shape, digits.classes).double()
            rule = EquilibriumPropagation(model, beta=beta, free_steps=600, nudged_steps=600, **options)  # type: ignore[arg-type]
            own, exact = _as_vectors(rule, x, y)
            errors.append(float((own - exact).norm()))
        slopes[name] = math.log2(errors[0] / errors[1]) / math.log2(NUDGES[0] / NUDGES[1])
    return slopes


def directed(digits: Dataset, degrees: int, homeostasis: float, seed: int, epochs: int) -> dict[str, float]:
    """Return measures of trained directed weights: similarity to the adjoint, symmetry of the Jacobian, accuracy."""
    torch.manual_seed(seed)
    rule = EquilibriumPropagation(
        models.build("mlp-sigmoid-32-32", digits.input_shape, digits.classes),
        weights="directed",
        update="different",
        asymmetry=degrees,
        homeostasis=homeostasis,
        free_steps=100,
        nudged_steps=30,
    )
    optimizer = torch.optim.Adam(rule.parameters(), 3e-3)
    cosines = []
    for _ in range(epochs):
        fit(rule, optimizer, digits.train, 50)
        cosines.append(adjoint_cosines(rule, digits.train.inputs[:100], digits.train.targets[:100]))
    return {
        "cosine": sum(whole for whole, _ in cosines) / len(cosines),
        "cosine, layer 1": sum(first for _, first in cosines) / len(cosines),
        "symmetry": symmetry(rule),
        "accuracy": accuracy(rule, digits.test),
    }


def adjoint_cosines(rule: EquilibriumPropagation, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
    """Return the mean cosine over samples between nudged state changes and minus the potential gradient: all, layer 1."""
    network, back, x = rule.network, [matrix.detach() for matrix in rule.back], rule.chain.enter(inputs)
    with torch.no_grad():
        size = len(x)
        drives = [g if k == 0 else g.expand(size, -1) for k, g in enumerate(network.given(x)) if g is not None]
    leaves = [g.detach().clone().requires_grad_() for g in drives]
    settled = network.settle(network.zeros(x), leaves, back, rule.free_steps).s
    loss = rule.loss(network.output(settled), targets) * size
    exact = [g.flatten(1) for g in torch.autograd.grad(loss, leaves)]
    with torch.no_grad():
        beta, _ = phases(rule.estimator, rule.beta, rule.points, x, rule.generator)
        rows = [s.detach().repeat(2, 1) for s in settled]
        twice = network.settle(
            rows,
            network.given(x, beta),
            back,
            rule.nudged_steps,
            lambda s: network.nudged_by(network.errors(rule.loss, s, targets, 0), beta, s),
        ).s
        shifts = [s[:size] - s[size:] for s in twice]
    whole = F.cosine_similarity(torch.cat(shifts, 1), -torch.cat(exact, 1), dim=1)
    return float(whole.mean()), float(F.cosine_similarity(shifts[0], -exact[0], dim=1).mean())


@torch.no_grad()
def symmetry(rule: EquilibriumPropagation) -> float:
    """Return `|S| / (|S| + |A|)` of the (anti)symmetric parts of the field's Jacobian in activities; 1 is symmetric."""
    pairs = list(zip(rule.network.stages[1:], rule.back, strict=True))
    alike = sum(float((stage.layer.weight + b).square().sum()) for stage, b in pairs) / 2
    alike += sum(stage.size for stage in rule.network.stages)  # the leak, on the diagonal
    unlike = sum(float((stage.layer.weight - b).square().sum()) for stage, b in pairs) / 2
    return math.sqrt(alike) / (math.sqrt(alike) + math.sqrt(unlike))


def decaying(digits: Dataset, seed: int, epochs: int) -> dict[str, float]:
    """Return degrees between the weights of both directions before and after training by one update for both."""
    torch.manual_seed(seed)
    model = models.build("mlp-sigmoid-64-64", digits.input_shape, digits.classes)
    rule = EquilibriumPropagation(model, weights="directed")
    upper = rule.network.stages[1].layer.weight
    optimizer = torch.optim.SGD(rule.parameters(), 0.1, weight_decay=1e-3)
    before = angle(upper, rule.back[0])
    for _ in range(epochs):
        fit(rule, optimizer, digits.train, 20)
    return {"before": before, "after": angle(upper, rule.back[0]), "accuracy": accuracy(rule, digits.test)}


def original(seed: int, epochs: int) -> float:
    """Return the test accuracy of the first paper's network and rule."""
    digits = load("digits-raw")
    torch.manual_seed(seed)
    rule = EquilibriumPropagation(
        models.build("mlp-clip-128", digits.input_shape, digits.classes),
        squared_error,
        "random-sign",
        beta=1.0,
        free_steps=20,
        nudged_steps=4,
        damping=0.5,
        rates=(1.0, 0.5),
    )
    optimizer = torch.optim.SGD(rule.parameters(), 0.2)
    for _ in range(epochs):
        fit(rule, optimizer, digits.train, 20)
    return accuracy(rule, digits.test)


def _cell(seed: int, epochs: int) -> dict[str, Any]:
    digits = load("digits")
    return {
        "directions": directions(digits, seed),
        "orders": orders(digits, seed),
        "directed": {
            f"{degrees}, {homeostasis:g}": directed(digits, degrees, homeostasis, seed, epochs)
            for degrees in ANGLES
            for homeostasis in (0.0, SETTINGS["homeostasis"])
        },
        "decaying": decaying(digits, seed, epochs),
        "original": original(seed, epochs),
    }


def verdicts(cells: Cells) -> list[Row]:
    """The claims."""

    def above(figure: str, rule: str, what: str, values: Sequence[float], mark: float) -> Row:
        return difference(figure, rule, f"{what}, minus {mark:g}", values, mark, less=False)

    def of(degrees: int, homeostasis: int, key: str) -> list[float]:
        return series(cells, "directed", f"{degrees}, {homeostasis}", key)

    one = partial(series, cells)
    rows = [above("K3", "hep", "cosine to BPTT with 20 nudged steps", one("directions", "20"), 0.999)]
    for fewer, more in ((5, 10), (10, 20)):
        what = f"cosine to BPTT with {more} nudged steps minus that with {fewer}"
        rows.append(difference("K3", "hep", what, one("directions", str(more)), one("directions", str(fewer)), less=False))
    rows.append(above("K4", "ep-one-sided", "the first paper's network: accuracy", one("original"), 0.9))
    for name, order in (("one-sided", 1), ("symmetric", 2), ("N = 4", 4)):
        gap, what = [abs(value - order) for value in one("orders", name)], f"{name}: order of the error, distance to {order}"
        rows.append(difference("K5", "ep", f"{what}, minus {order / 4:g}", gap, order / 4, less=True))
    # 0.2 was set before anything was measured; over all neurons the cosine has no room to rise that far, but it rises
    for key, mark in (("cosine", 0.2), ("cosine", 0.0), ("cosine, layer 1", 0.2)):
        gained = [a - b for a, b in zip(of(90, 1, key), of(90, 0, key), strict=True)]
        what = f"90 degrees: what homeostasis adds to the {key} to the adjoint"
        rows.append(above("K6", "ep-directed", what, gained, mark))
    what = "90 degrees: symmetry of the Jacobian with homeostasis minus that without"
    rows.append(difference("K6", "ep-directed", what, of(90, 1, "symmetry"), of(90, 0, "symmetry"), less=False))
    better = [v + 0.01 for v in of(90, 1, "accuracy")]
    what = "90 degrees: accuracy with homeostasis minus that without, plus 1 point"
    rows.append(difference("K6", "ep-directed", what, better, of(90, 0, "accuracy"), less=False))
    fallen = [a - b for a, b in zip(one("decaying", "before"), one("decaying", "after"), strict=True)]
    rows.append(above("K8", "ep-directed", "degrees by which one update and decay align both ways", fallen, 20))
    return rows


def tables(cells: Cells) -> list[Row]:
    """Return tables of cosines by nudged steps, and of directed weights."""
    directions = {
        steps: [{"cosine": cosine} for cosine in cosines] for steps, cosines in by_name(cells, "directions").items()
    }
    note = "Cosine to backpropagation through time by nudged steps, mean over seeds with 95 % interval."
    about = (
        "Mean over epochs of the cosine between how states move and the adjoint, symmetry |S| / (|S| + |A|) of the Jacobian "
        "and test accuracy after training, mean over seeds with 95 % interval."
    )
    measures = {name: name for name in ("cosine", "cosine, layer 1", "symmetry", "accuracy")}
    apart = by_name(cells, "directed")
    return [
        mean_table("Direction of the estimate", note, "nudged steps", directions, {"cosine": "cosine"}),
        mean_table("Weights that learn apart", about, "angle at first, homeostasis", apart, measures),
    ]


main = SeedStudy("apical_papers.equilibrium.study", ABOUT, SETTINGS, _cell, verdicts, tables, out="results/ep-study")


if __name__ == "__main__":
    sys.exit(main())
