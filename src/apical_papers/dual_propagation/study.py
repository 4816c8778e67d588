"""Dual propagation: which nudges train, how fast its gradient converges to backpropagation's, and the Lipschitz bound.

Run `python -m apical_papers.dual_propagation.study --out results/dualprop-study`. 5,000 images of MNIST, 784-256-256-10
ReLU, Adam 1e-3, batches of 100. Each seed is saved in the folder when it is finished, so an interrupted study continues.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from apical import models
from apical.bench.finding import Row, at_least, by_name, difference, mean_table, series
from apical.bench.plain_loop import accuracy, fit
from apical.bench.program import Cells, SeedStudy, about_study
from apical.core.credit import CreditRule
from apical.data import Split, load
from apical.diagnostics.alignment import gradients
from apical.rules.backprop import Backprop
from apical.rules.dual_propagation import DualPropagation

SETTINGS: dict[str, Any] = {
    "model": "mlp-256-256",
    "weights": "PyTorch's own",
    "pixels": "0 to 1",
    "batch size": 100,
    "adam": 1e-3,
    "training images": 5000,
    "test images": 2000,
}

TRANSPOSED: dict[str, dict[str, Any]] = {
    "alpha 0, beta 0.1": {"alpha": 0.0, "beta": 0.1},
    "alpha 0, beta 1": {"alpha": 0.0, "beta": 1.0},
    "alpha 1/2, beta 0.1": {"alpha": 0.5, "beta": 0.1},
    "alpha 1/2, beta 1": {"alpha": 0.5, "beta": 1.0},
    "alpha 1/2, beta 10": {"alpha": 0.5, "beta": 10.0},
    "alpha 1, beta 0.1": {"alpha": 1.0, "beta": 0.1},
    "alpha 1, beta 1": {"alpha": 1.0, "beta": 1.0},
    "alpha 1, beta 1, 3 sweeps": {"alpha": 1.0, "beta": 1.0, "sweeps": 3},
}
ORIGINAL: dict[str, dict[str, Any]] = {
    "original, alpha 0, beta 1, 3 sweeps": {"variant": "original", "alpha": 0.0, "beta": 1.0, "sweeps": 3},
    "original, alpha 1, beta 1, 3 sweeps": {"variant": "original", "alpha": 1.0, "beta": 1.0, "sweeps": 3},
}
BETAS = (1e-1, 1e-2, 1e-3)

ABOUT = about_study(
    "Dual propagation: nudges, orders and the Lipschitz bound",
    "MNIST digits through a perceptron of two hidden layers. The marks on the original variant were set on a "
    "prototype that held the output's slope at the feed-forward pass; the rule takes it anew in every sweep, as the "
    "authors' code of that variant does.",
    "Marks were set before the runs. Reproduced means that the mean reaches the mark, or that the 95 % "
    "interval (Student's t, paired over seeds) of the difference lies on its better side.",
)


def trained(rule: CreditRule, train: Split, test: Split, epochs: int, seed: int) -> dict[str, Any]:
    """Return test accuracy after each epoch, and `|W_3 W_2 W_1|`, the spectral norm of the product."""
    optimizer = torch.optim.Adam(rule.parameters(), SETTINGS["adam"])
    generator = torch.Generator().manual_seed(seed)
    reached = []
    for _ in range(epochs):
        fit(rule, optimizer, train, SETTINGS["batch size"], generator)
        reached.append(accuracy(rule, test))
    product = torch.eye(784)
    for module in rule.model.modules():
        if isinstance(module, nn.Linear):
            product = module.weight.detach() @ product
    norm = float(torch.linalg.matrix_norm(product, 2))
    return {"accuracy": reached[-1], "last epoch's gain": reached[-1] - reached[0], "product's norm": norm}


def slopes(train: Split, seed: int) -> dict[str, float]:
    """Return the order in beta of the gradient's distance to backpropagation's: log10 of a ratio, in float64."""
    numbers = {}
    for alpha in (0.0, 0.5, 1.0):
        gaps = []
        for beta in BETAS:
            torch.manual_seed(seed)
            rule = DualPropagation(models.build("mlp-tanh-256-256", (1, 28, 28), 10).double(), alpha=alpha, beta=beta)
            own, exact = gradients(rule, train.inputs[:100].double(), train.targets[:100])
            gaps.append(max(float((own[name] - exact[name]).norm() / exact[name].norm()) for name in own))
        numbers[f"alpha {alpha:g}"] = float(torch.log10(torch.tensor(gaps[1] / gaps[2])))
    return numbers


def _cell(seed: int, epochs: int) -> dict[str, Any]:
    mnist = load("mnist-raw")
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randperm(len(mnist.train), generator=generator)[: SETTINGS["training images"]]
    train, few = Split(mnist.train.inputs[samples], mnist.train.targets[samples]), SETTINGS["test images"]
    test = Split(mnist.test.inputs[:few], mnist.test.targets[:few])
    arms: dict[str, Callable[[nn.Module], CreditRule]] = {"bp": Backprop}
    arms |= {name: partial(DualPropagation, **options) for name, options in (TRANSPOSED | ORIGINAL).items()}
    rules = {}
    for name, rule_of in arms.items():
        torch.manual_seed(seed)
        model = models.build(SETTINGS["model"], (1, 28, 28), 10)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        rules[name] = trained(rule_of(model), train, test, epochs, seed)
    return {"arms": rules, "orders": slopes(train, seed)}


def verdicts(cells: Cells) -> list[Row]:
    """The marks."""

    def of(name: str, key: str = "accuracy") -> list[float]:
        return series(cells, "arms", name, key)

    rows = []
    for name in TRANSPOSED:
        near = [0.02 - abs(a - b) for a, b in zip(of(name), of("bp"), strict=True)]
        rows.append(at_least("4.2", "dualprop", f"{name}: 0.02 minus distance to bp", near, 0.0))
    trains, fails = "alpha 1, beta 1, 3 sweeps", "original, alpha 1, beta 1, 3 sweeps"
    what = f"{trains}: transposed minus original, minus 5 points"
    rows.append(difference("4.2", "dualprop", what, of(trains), of(fails), less=False, margin=0.05))
    gain = of(fails, "last epoch's gain")
    rows.append(difference("4.2", "dualprop", f"{fails}: last epoch minus first", gain, 0.0, less=True))
    for alpha, order in (("0", 1.0), ("0.5", 2.0), ("1", 1.0)):
        off = [0.1 - abs(found - order) for found in series(cells, "orders", f"alpha {alpha}")]
        rows.append(at_least("D4, D5", "dualprop", f"alpha {alpha}: 0.1 minus distance of the order to {order:g}", off, 0.0))
    return rows


def tables(cells: Cells) -> list[Row]:
    """Return tables of every training, and of the orders."""
    measures = {name: name for name in ("accuracy", "last epoch's gain", "product's norm")}
    note = (
        "Test accuracy (0 to 1), what it gained from the first epoch to the last, and the spectral norm of the product of "
        "the weights; mean over seeds with 95 % interval."
    )
    orders = {name: [{"order": order} for order in values] for name, values in by_name(cells, "orders").items()}
    title = "Order of the distance to backpropagation in beta"
    return [
        mean_table("Trainings", note, "training", by_name(cells, "arms"), measures),
        mean_table(title, "tanh, float64, fresh weights.", "alpha", orders, {"order": "order"}),
    ]


main = SeedStudy(
    "apical_papers.dual_propagation.study",
    ABOUT,
    SETTINGS,
    _cell,
    verdicts,
    tables,
    out="results/dualprop-study",
    epochs=4,
    jobs=1,
)


if __name__ == "__main__":
    sys.exit(main())
