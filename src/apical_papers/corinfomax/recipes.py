"""CorInfoMax (arXiv 2306.04810): its studies.

Hyper-parameters are those of the reported runs; published accuracies were read in the result notebooks of the authors'
repository, for 50 epochs and ten seeds. Learning rates fall by 5 % per epoch; in the released code they jump at epoch 15 to
0.9^epoch, and so do ours on images. The repository does not state all rates of the systems compared: those of
backpropagation and feedback alignment are ours (0.01 on Fashion-MNIST and CIFAR-10, where 0.05 diverges), those of
equilibrium propagation are those on MNIST; and their networks have ReLU hidden layers and a linear output. On digits,
networks have 200 hidden units: with 100, one class stays silent in some seeds.
"""

from typing import Any

from apical.bench.recipe import Recipe
from apical.bench.study import Claim, Published, Study, rows_of
from apical_papers.equilibrium.recipes import ORIGINAL


def falling(lr: float, epochs: int, *, jump: bool) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Return the learning rate of each epoch, and the epochs after which it changes.

    >>> falling(1.0, 3, jump=True)
    ((1.0, 0.95, 0.9025), (1, 2))
    """
    rates = [lr * (0.95**e if e < 15 or not jump else 0.9**e) for e in range(epochs)]
    return tuple(float(f"{rate:.6g}") for rate in rates), tuple(range(1, epochs))


def _digits() -> Study:
    lr, lr_epochs = falling(2.0, 20, jump=False)
    base = Recipe(
        data="digits-raw",
        model="mlp-box-200",
        loss="squared",
        epochs=20,
        batch_size=20,
        lr=lr,
        lr_epochs=lr_epochs,
        momentum=0.0,
        weight_decay=(0.0,),
    )
    plain: dict[str, Any] = {"lr": (0.2,), "lr_epochs": ()}
    settings = {
        "bp": {**plain, "model": "mlp-200"},
        "ep-one-sided": {**plain, "model": "mlp-clip-200", "rule_options": ORIGINAL},
        "corinfomax": {"rule_options": ("rates=(1.0, 0.7)", "backward_rates=(0.15,)")},
    }
    rows = rows_of(base, settings, {"corinfomax": (Published("accuracy", 20, 95.5, 5.5, "ours"),)})
    claims = (Claim("corinfomax", "ep-one-sided", 20, -5.0),)
    return Study("CorInfoMax on digits, 64-200-10", "seconds", rows, base, claims)


def _images(
    data: str,
    hidden: int,
    rates: tuple[float, float, float],
    published: dict[str, tuple[float, float]],
    options: tuple[str, ...],
    tolerance: float,
    title: str,
) -> Study:
    """Make the table of one data set.

    Args:
        rates: forward learning rates of both layers, and the backward rate.
        published: accuracy and standard deviation of each rule after 50 epochs.
        options: options of corinfomax other than its rates.
    """
    lower, upper, backward = rates
    lr, lr_epochs = falling(lower, 50, jump=True)
    base = Recipe(
        data=data,
        model=f"mlp-box-{hidden}",
        loss="squared",
        epochs=50,
        batch_size=20,
        lr=lr,
        lr_epochs=lr_epochs,
        momentum=0.0,
        weight_decay=(0.0,),
    )
    own = (f"rates=(1.0, {upper / lower:.6g})", f"backward_rates=({backward / lower:.6g},)", *options)
    plain = {"model": f"mlp-{hidden}", "lr": (0.05 if data == "mnist-raw" else 0.01,), "lr_epochs": ()}
    settings: dict[str, dict[str, Any]] = {
        "bp": plain,
        "fa": plain,
        "ep-one-sided": {**plain, "model": f"mlp-clip-{hidden}", "lr": (0.2,), "rule_options": ORIGINAL},
        "corinfomax": {"rule_options": own},
    }
    numbers = {
        rule: (Published("accuracy", 50, accuracy, tolerance, "code", spread=spread),)
        for rule, (accuracy, spread) in published.items()
    }
    return Study(title, "minutes per epoch", rows_of(base, settings, numbers), base)


_MNIST = {"bp": (97.58, 0.06), "fa": (97.99, 0.10), "ep-one-sided": (97.62, 0.08), "corinfomax": (97.62, 0.12)}
_FASHION = {"bp": (88.39, 0.23), "fa": (88.72, 0.46), "ep-one-sided": (88.06, 0.70), "corinfomax": (88.14, 0.28)}
_CIFAR = {"bp": (52.75, 0.40), "fa": (50.75, 0.61), "ep-one-sided": (49.28, 0.50), "corinfomax": (51.86, 0.33)}
"""Squared error throughout. For equilibrium propagation on CIFAR-10 there are two result files; the other has 50.21."""

STUDIES = {
    "corinfomax-digits": _digits(),
    "corinfomax-mnist": _images("mnist-raw", 500, (1.0, 0.7, 0.15), _MNIST, (), 0.5, "CorInfoMax on MNIST, 784-500-10"),
    "corinfomax-fashion": _images(
        "fashion-mnist-raw",
        500,
        (0.3, 0.22, 0.07),
        _FASHION,
        ("leak=0.3", "step=0.07", "step_decay=0.01"),
        0.5,
        "CorInfoMax on Fashion-MNIST, 784-500-10",
    ),
    "corinfomax-cifar10": _images(
        "cifar-10-std3",
        1000,
        (0.08, 0.04, 0.04),
        _CIFAR,
        ("leak=0.1", "forgetting=0.99995"),
        1.0,
        "CorInfoMax on CIFAR-10, 3072-1000-10",
    ),
}
