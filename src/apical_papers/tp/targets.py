"""Direction of targets: lower layers trained through frozen upper ones, and updates that cannot change the output.

Run `python -m apical_papers.tp.targets --out results/tp-targets`. Two experiments of arXiv 2006.14331 at the size of a CPU.
In the first, only the lowest layer is trained, so that the result depends only on the quality of its targets. In the second,
the weights of a small regression network are fixed, and the part of an update in the null space of the output's derivative
is measured: learning it is wasted. Each seed is saved in the folder when it is finished, so an interrupted study continues.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical import models
from apical.bench.finding import Row, difference, series, table
from apical.bench.program import Cells, SeedStudy, about_study
from apical.core.activations import derivative
from apical.core.chain import Chain
from apical.core.credit import CreditRule
from apical.core.losses import output_error
from apical.data import Dataset, load
from apical.diagnostics.alignment import angle, gradients
from apical.diagnostics.gauss_newton import gauss_newton_targets
from apical.rules.backprop import Backprop
from apical.rules.target_propagation.difference_target_propagation import DifferenceTargetPropagation, Variant
from apical_papers.digits import accuracy

SETTINGS: dict[str, Any] = {
    "model": "mlp-tanh-64-64-64-64",
    "batch size": 64,
    "adam": 1e-3,
    "eta": 0.05,
    "sigma": 0.05,
    "feedback epochs before": 5,
    "toy, feedback epochs": 30,
    "toy, training samples": 400,
    "toy, test samples": 200,
}
ETA, SIGMA = SETTINGS["eta"], SETTINGS["sigma"]

Made = Callable[[nn.Module], CreditRule]
VARIANTS: dict[str, Variant] = {"dtp-drl": "drl", "ddtp-linear": "linear", "ddtp-control": "control", "dtp": "dtp"}
_rule = partial(DifferenceTargetPropagation, input_shape=(1, 8, 8))
FROZEN: dict[str, Made] = {
    "bp": Backprop,
    **{name: partial(_rule, variant=kind, eta=ETA, sigma=SIGMA, reduction="mean") for name, kind in VARIANTS.items()},
    "dfa": partial(_rule, variant="linear", learn=False),
}
TOY: dict[str, tuple[dict[str, Any], float, float]] = {
    "dtp": ({"variant": "dtp", "eta": 0.01186, "sigma": 0.1}, 3.289e-3, 1.085e-5),
    "ddtp-linear": ({"variant": "linear", "eta": 0.04032, "sigma": 0.06087}, 2.249e-3, 9.821e-5),
}
"""Options, learning rate and weight decay of the feedback, from the released configuration."""

ABOUT = about_study(
    "Target propagation: where targets point",
    "Digits through a network of four hidden layers whose lowest layer alone learns, and a regression network "
    "in which the part of an update is measured that cannot change the output.",
    "The paper's numbers were found in no source that could be read; its orders are tested. Reproduced "
    "means that the 95 % interval (Student's t, paired over seeds) of the difference lies on its better side.",
)


def frozen(make: Made, digits: Dataset, seed: int, epochs: int) -> float:
    """Return the test accuracy after training only the lowest layer and the feedback."""
    torch.manual_seed(seed)
    model = models.build(SETTINGS["model"], digits.input_shape, digits.classes)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    rule = make(model)
    mean, std = digits.train.inputs.mean(), digits.train.inputs.std()
    lowest = torch.optim.Adam(layers[0].parameters(), SETTINGS["adam"])
    maps = rule.feedback_parameters()
    feedback = torch.optim.Adam(maps, SETTINGS["adam"]) if maps else None
    for epoch in range(-SETTINGS["feedback epochs before"] if feedback else 0, epochs):
        rule.phase = "feedback" if epoch < 0 else "both"
        for batch in torch.randperm(len(digits.train)).split(SETTINGS["batch size"]):
            rule.zero_grad()
            rule((digits.train.inputs[batch] - mean) / std, digits.train.targets[batch]).backward()
            if feedback:
                feedback.step()
            if epoch >= 0:
                lowest.step()
    return accuracy(model, (digits.test.inputs - mean) / std, digits.test.targets)


DAMPING = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
"""Dampings of Gauss-Newton targets: for each rule and layer, the best-fitting one counts."""


def angles(make: Made, digits: Dataset, seed: int, epochs: int) -> dict[str, list[float]]:
    """Return degrees of each hidden layer's update to the gradient and to Gauss-Newton targets', means over epochs."""
    torch.manual_seed(seed)
    model = models.build(SETTINGS["model"], digits.input_shape, digits.classes).double()
    rule, (x, y) = make(model), (digits.train.inputs[:64].double(), digits.train.targets[:64])
    optimizer = torch.optim.Adam(rule.parameters(), SETTINGS["adam"])
    learns = bool(rule.feedback_parameters())
    degrees: dict[str, list[list[float]]] = {"gradient": [], "targets": []}
    for epoch in range(-SETTINGS["feedback epochs before"] if learns else 0, epochs):
        rule.phase = "feedback" if epoch < 0 else "both"
        for batch in torch.randperm(len(digits.train)).split(SETTINGS["batch size"]):
            optimizer.zero_grad()
            rule(digits.train.inputs[batch].double(), digits.train.targets[batch]).backward()
            optimizer.step()
        if epoch >= 0:
            rule.phase = "both"
            own, exact = gradients(rule, x, y)
            names = list(own)[:-1]
            degrees["gradient"].append([angle(own[name], exact[name]) for name in names])
            best = [float("inf")] * len(names)
            for damping in DAMPING:
                updates = target_updates(Chain(model), x, y, damping)
                best = [min(b, angle(-own[name], w)) for b, name, w in zip(best, names, updates, strict=True)]
            degrees["targets"].append(best)
    return {key: torch.tensor(rows).mean(0).tolist() for key, rows in degrees.items()}


@torch.no_grad()
def target_updates(chain: Chain, inputs: Tensor, labels: Tensor, damping: float) -> list[Tensor]:
    """Return changes of the hidden layers' weights towards Gauss-Newton targets, means over the batch."""
    states = chain.run(inputs)
    error = output_error(F.cross_entropy, states.r[-1], labels)[1]
    updates = []
    for i, moved in enumerate(gauss_newton_targets(chain, states, -error * len(error), damping)[:-1]):
        slope = derivative(chain.stages[i].activation, states.v[i], states.r[i + 1])
        updates.append((moved * slope).T @ states.r[i].flatten(1) / len(error))
    return updates


def output_moves(seed: int, activation: type[nn.Module], networks: int = 50) -> dict[str, list[float]]:
    """Return the cosine of the output's change to minus its error when only one hidden layer is updated, network means."""
    torch.manual_seed(seed)
    sums: dict[str, Tensor] = {"targets": torch.zeros(2), "gradient": torch.zeros(2)}
    for _ in range(networks):
        model = _network((4, 4, 4, 2), activation)
        chain, x, y = Chain(model), torch.randn(1, 4, dtype=torch.double), torch.randn(1, 2, dtype=torch.double)
        states = chain.run(x)
        delta = y - states.r[-1]
        loss = 0.5 * (model(x) - y).square().sum()
        goals = gauss_newton_targets(chain, states, delta)
        for i, stage in enumerate(chain.stages[:-1]):
            slope = derivative(stage.activation, states.v[i], states.r[i + 1])
            updates = {
                "targets": (goals[i] * slope).T @ states.r[i],
                "gradient": -torch.autograd.grad(loss, stage.layer.weight, retain_graph=True)[0],
            }
            for name, update in updates.items():
                output = model(x)[0]
                rows = [torch.autograd.grad(output[k], stage.layer.weight, retain_graph=True)[0] for k in range(2)]
                changes = torch.stack([(row * update).sum() for row in rows])
                sums[name][i] += float(F.cosine_similarity(changes, delta[0], dim=0)) / networks
    return {name: total.tolist() for name, total in sums.items()}


def wasted(name: str, seed: int) -> float:
    """Return the mean share of the upper hidden layer's update in the null space of the output's derivative."""
    options, rate, decay = TOY[name]
    torch.manual_seed(seed)
    teacher = _network((6, 1000, 1000, 1000, 1000, 2), nn.ReLU, gain=3.0)
    student = _network((6, 6, 6, 2), nn.Tanh)
    inputs = 2 * torch.rand(SETTINGS["toy, training samples"] + SETTINGS["toy, test samples"], 6, dtype=torch.double) - 1
    with torch.no_grad():
        targets = teacher(inputs)
    trained = SETTINGS["toy, training samples"]
    rule = DifferenceTargetPropagation(student, F.mse_loss, reduction="mean", **options)
    rule.phase = "feedback"
    optimizer = torch.optim.SGD(rule.feedback_parameters(), rate, weight_decay=decay)
    for _ in range(SETTINGS["toy, feedback epochs"]):
        for i in torch.randperm(trained).tolist():
            optimizer.zero_grad()
            rule(inputs[i : i + 1], targets[i : i + 1]).backward()
            optimizer.step()
    return float(null_share(rule, inputs[trained:], targets[trained:]).mean())


@torch.no_grad()
def null_share(rule: DifferenceTargetPropagation, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return `|(I - J^+ J) s| / |s|` (batch,) of the topmost hidden layer; s: its signal, J: Jacobian of the output in it.

    The update of one sample is the outer product of s and the layer's input, so its share is that of s.
    """
    states = rule.chain.run(inputs)
    d = rule.distances(states, -rule.eta * output_error(rule.loss, states.r[-1], targets)[1])[-2]
    slope = derivative(rule.chain.stages[-2].activation, states.v[-2], states.r[-2])
    signal = d * slope
    jacobian = rule.chain.stages[-1].layer.weight * slope[:, None]
    seen = (torch.linalg.pinv(jacobian) @ (jacobian @ signal[:, :, None]))[:, :, 0]
    share: Tensor = (signal - seen).norm(dim=1) / signal.norm(dim=1)
    return share


def _network(sizes: Sequence[int], activation: type[nn.Module], gain: float = 1.0) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, size in pairwise(sizes):
        layer = nn.Linear(inputs, size, dtype=torch.double)
        nn.init.xavier_normal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
        layers += [layer, activation()]
    return nn.Sequential(*layers[:-1])


def _cell(seed: int, epochs: int) -> dict[str, Any]:
    digits = load("digits")
    return {
        "accuracy": {name: frozen(make, digits, seed, epochs) for name, make in FROZEN.items()},
        "wasted": {name: wasted(name, seed) for name in TOY},
        "angles": {name: angles(make, digits, seed, epochs) for name, make in FROZEN.items() if name != "bp"},
        "moves": {kind.__name__.lower(): output_moves(seed, kind) for kind in (nn.Identity, nn.Tanh)},
    }


def verdicts(cells: Cells) -> list[Row]:
    """The claims."""
    margins = (
        ("dtp-drl", "dtp", 0.20),
        ("ddtp-linear", "dtp", 0.15),
        ("ddtp-linear", "ddtp-control", 0.0),
        ("bp", "dtp-drl", 0.0),
    )
    rows = []
    for better, worse, margin in margins:
        points = f", minus {100 * margin:.0f} points" if margin else ""
        what = f"lowest layer alone: accuracy minus that of {worse}{points}"
        ours, theirs = (series(cells, "accuracy", name) for name in (better, worse))
        rows.append(difference("C2", better, what, ours, theirs, less=False, margin=margin))
    wasted, doubled = series(cells, "wasted", "dtp"), [2 * share for share in series(cells, "wasted", "ddtp-linear")]
    what = "wasted share of the update minus twice that of ddtp-linear"
    rows.append(difference("C5", "dtp", what, wasted, doubled, less=False))
    return rows + angle_verdicts(cells) + move_verdicts(cells)


def tables(cells: Cells) -> list[Row]:
    """Return tables of accuracies, wasted shares, directions of updates and their effect on the output."""
    angles = [
        [name, _lowest(cells, name), [fmean(degrees) for degrees in series(cells, "angles", name, "targets")]]
        for name in cells[0]["angles"]
    ]
    moves = [
        [kind, name, *(series(cells, "moves", kind, name, i) for i in range(2))]
        for kind in ("identity", "tanh")
        for name in ("targets", "gradient")
    ]
    return [
        table(
            "The lowest layer alone learns",
            "Test accuracy (0 to 1), mean over seeds with 95 % interval. dfa is ddtp-linear with fixed maps.",
            ["rule", "accuracy"],
            ([name, series(cells, "accuracy", name)] for name in FROZEN),
        ),
        table(
            "What is wasted",
            "Share of the topmost hidden layer's update (norm) in the null space of the output's derivative.",
            ["rule", "share"],
            ([name, series(cells, "wasted", name)] for name in TOY),
        ),
        table(
            "Where updates point",
            "Degrees of a layer's update, all layers learning, to the gradient and to that of Gauss-Newton targets at the "
            "damping that fits best; means over epochs and seeds with 95 % interval.",
            ["rule", "lowest layer, to the gradient", "all hidden layers, to Gauss-Newton targets"],
            angles,
        ),
        table(
            "What moving one layer does to the output",
            "Cosine between the output's first-order move and minus its error, 4-4-4-2 networks, mean over seeds of 50 "
            "networks with 95 % interval, lower and upper hidden layer.",
            ["activation", "update", "lower", "upper"],
            moves,
        ),
    ]


def _lowest(cells: Cells, name: str) -> list[float]:
    return series(cells, "angles", name, "gradient", 0)


def angle_verdicts(cells: Cells) -> list[Row]:
    """Judge the claims about angles: to the gradient in the lowest layer, to Gauss-Newton targets in most hidden layers."""
    rows = []
    for better in ("dtp-drl", "ddtp-linear"):
        what = "lowest layer: degrees to the gradient minus those of dtp, plus 3"
        rows.append(difference("C3", better, what, _lowest(cells, better), _lowest(cells, "dtp"), less=True, margin=-3))
    others = [name for name in cells[0]["angles"] if name != "dfa"]
    largest = [max(cell["angles"][name]["gradient"][0] for name in others) for cell in cells]
    what = "lowest layer: degrees to the gradient minus the largest of the others"
    rows.append(difference("C3", "dfa", what, _lowest(cells, "dfa"), largest, less=False))
    for better in ("dtp-drl", "ddtp-linear"):
        nearer = [
            sum(a < b for a, b in zip(cell["angles"][better]["targets"], cell["angles"]["dtp"]["targets"], strict=True))
            for cell in cells
        ]
        what = "hidden layers nearer to Gauss-Newton targets than dtp's, of 4, minus 2.5"
        rows.append(difference("C4", better, what, nearer, 2.5, less=False))
    return rows


def move_verdicts(cells: Cells) -> list[Row]:
    """Judge the claims about the output's change: correct for linear units, better than the gradient's for others."""
    rows = []
    for kind in ("identity", "tanh"):
        for i, layer in enumerate(("lower", "upper")):
            targets, gradient = (series(cells, "moves", kind, name, i) for name in ("targets", "gradient"))
            what = f"{kind}, {layer} layer: cosine of the output's move to minus the error, targets minus gradient"
            rows.append(difference("C6", "", what, targets, gradient, less=False))
    return rows


main = SeedStudy("apical_papers.tp.targets", ABOUT, SETTINGS, _cell, verdicts, tables)


if __name__ == "__main__":
    sys.exit(main())
