"""Counter-current learning (arXiv 2409.19841): its studies on perceptrons.

Numbers tagged "paper" are test accuracies, mean and standard deviation over five seeds, table 1. Settings are those of the
released configuration files: a tenth of the training images held out, test at the epoch of best validation, each network
clipped at norm 1. Where paper and code differ, the code: BP has ELU (the paper says tanh), and no warm-up.
"""

from dataclasses import replace

from apical.experiment.recipe import Recipe
from apical.recipes.study import Claim, Published, Row, Study


def _accuracy(value: float, spread: float, tolerance: float) -> tuple[Published, ...]:
    return (Published("accuracy", 100, value, tolerance, "paper", spread=spread, select="best-validation"),)


def _study(
    data: str, model: str, validation: int, published: dict[str, tuple[float, float]], tolerance: float, cost: str
) -> Study:
    base = Recipe(
        data=data,
        model=model,
        epochs=100,
        batch_size=256,
        lr=(1.0,),
        momentum=0.0,
        weight_decay=(0.0,),
        clip=1.0,
        clip_over="network",
        validation=validation,
    )
    rows = {
        rule: Row(replace(base, rule=rule), _accuracy(value, spread, tolerance))
        for rule, (value, spread) in published.items()
    }
    claims = (Claim("ccl", "fa", 100, 0.0),)
    return Study(f"CCL on {data}, {model}, 100 epochs", cost, rows, base, claims)


STUDIES: dict[str, Study] = {
    "ccl-mnist": _study(
        "mnist",
        "mlp-elu-256-256-256-256-256",
        6000,
        {"bp": (98.19, 0.10), "fa": (96.96, 0.05), "ccl": (98.13, 0.10)},
        0.5,
        "about 5 minutes on one CPU core",
    ),
    "ccl-fashion": _study(
        "fashion-mnist",
        "mlp-elu-256-256-256-256-256",
        6000,
        {"bp": (89.58, 0.25), "fa": (87.38, 0.12), "ccl": (88.58, 0.29)},
        0.5,
        "about 5 minutes on one CPU core",
    ),
    "ccl-cifar10": _study(
        "cifar-10",
        "mlp-elu-1024-1024-1024",
        5000,
        {"bp": (50.03, 0.31), "fa": (45.76, 0.38), "ccl": (52.73, 0.59)},
        0.8,
        "about half an hour on one CPU core",
    ),
}
