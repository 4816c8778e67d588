"""Counter-current learning (arXiv 2409.19841): perceptrons, convolutional networks, an autoencoder, and controls.

Numbers tagged "paper" are test accuracies, mean and standard deviation over five seeds, from table 1. Settings are those of
the released configuration files: a tenth of the training images held out, test at the epoch of best validation, each network
clipped at norm 1. Where paper and code differ, the code is followed: BP has ELU (the paper says tanh), and no warm-up.

The convolutional rows are those of table 3; each rule has the settings of its released file. Augmentation pads with zeros
instead of edge pixels. The autoencoder is the paper's with fewer channels, on CIFAR-10 instead of STL-10, in batches of 128
instead of 32 and without augmentation, so the only number to compare with is that of backpropagation at the same budget.

The caption of the row that the paper names DFA says DTP; its numbers are compared with DFA's here.
"""

from dataclasses import replace
from typing import Any

from apical.bench.recipe import Recipe
from apical.bench.study import Claim, Published, Row, Study, rows_of


def _accuracy(value: float, spread: float, tolerance: float) -> tuple[Published, ...]:
    return (Published("accuracy", 100, value, tolerance, "paper", spread=spread, select="best-validation"),)


def _perceptron(data: str, model: str, validation: int) -> Recipe:
    return Recipe(
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


_RATES = {"fa": 0.05}
"""Learning rates that differ from the released rate, 1. FA has the best of the paper's grid for it (0.4 to 0.02) by
validation over ten epochs, on MNIST and on Fashion-MNIST; at 1 it diverges. On CIFAR-10 CCL is unstable at 1; 0.5 is the
next value of its grid."""

_DEEP, _WIDE = "mlp-elu-256-256-256-256-256", "mlp-elu-1024-1024-1024"
_SETS = {
    "mnist": ("mnist", _DEEP, 6000, 0.5, "4 minutes"),
    "fashion": ("fashion-mnist", _DEEP, 6000, 0.5, "4 minutes"),
    "cifar10": ("cifar-10", _WIDE, 5000, 0.8, "20 minutes"),
    "cifar100": ("cifar-100", _WIDE, 5000, 0.8, "half an hour"),
}
"""Data, network, images held out, tolerance, and cost of a run."""

_NAMES = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "cifar-10": "CIFAR-10", "cifar-100": "CIFAR-100"}
_SHAPES = {_DEEP: "784-5x256-10", _WIDE: "3072-3x1024-{classes}"}
"""Names of data and networks in titles."""

_COLUMNS = ("bp", "fa", "ccl", "dfa", "dtp-drl")
_TABLE = {
    "mnist": ((98.19, 0.10), (96.96, 0.05), (98.13, 0.10), (97.27, 0.06), (93.05, 0.24)),
    "fashion": ((89.58, 0.25), (87.38, 0.12), (88.58, 0.29), (87.35, 0.99), (83.40, 0.18)),
    "cifar10": ((50.03, 0.31), (45.76, 0.38), (52.73, 0.59), (42.86, 1.94), (42.09, 0.27)),
    "cifar100": ((22.55, 0.19), (22.13, 0.41), (21.76, 0.22), (19.87, 1.50), (19.94, 0.28)),
}
"""Accuracy and its standard deviation, for the rules in the columns."""


def _named(data: str, model: str) -> str:
    return f"{_NAMES[data]}, {_SHAPES[model].format(classes=100 if data == 'cifar-100' else 10)}"


def _published(name: str, tolerance: float) -> dict[str, tuple[Published, ...]]:
    return {rule: _accuracy(*value, tolerance) for rule, value in zip(_COLUMNS, _TABLE[name], strict=True)}


def _study(name: str) -> Study:
    data, model, validation, tolerance, cost = _SETS[name]
    base, slow = _perceptron(data, model, validation), {"ccl": 0.5} if data.startswith("cifar") else {}
    rates = {**_RATES, **slow}
    settings = {rule: {"lr": (rates.get(rule, 1.0),)} for rule in _COLUMNS[:3]}
    title = f"CCL on {_named(data, model)}, 100 epochs"
    rows = rows_of(base, settings, _published(name, tolerance))
    return Study(title, f"about {cost} on one CPU core", rows, base, (Claim("ccl", "fa", 100, 0.0),))


_OTHERS: dict[str, dict[str, Any]] = {
    "dfa": {"lr": (0.1,)},
    "dtp-drl": {"lr": (0.03,), "feedback_lr": 1.0, "rule_options": ("eta=0.03",)},
}
"""Rates of the table's slower half. By validation on MNIST: DFA's rate from 0.4 to 0.02 over ten epochs, as for FA; those
of difference target propagation, 0.01 to 1 and 0.001 to 1, over three epochs for 15 pairs and over ten for 5, twice the
effort of FA: the best pair after three epochs (0.1 and 0.3) diverges after a dozen. The gradients of our reconstruction
losses differ from those of the paper's code, so its grids do not apply."""


def _others(name: str) -> Study:
    data, model, validation, tolerance, _ = _SETS[name]
    base = _perceptron(data, model, validation)
    rows = rows_of(base, _OTHERS, _published(name, tolerance))
    title = f"DFA and target propagation, to compare CCL with, on {_named(data, model)}, 100 epochs"
    return Study(title, "half an hour on one CPU core, and more for CIFAR", rows, base)


def _images(data: str, epochs: int, settings: dict[str, Recipe], published: dict[str, tuple[float, float]]) -> Study:
    numbers = {rule: _accuracy(*value, 1.5) for rule, value in published.items()}
    rows = {rule: Row(replace(recipe, rule=rule), numbers.get(rule, ())) for rule, recipe in settings.items()}
    title = f"CCL with convolutions on {_NAMES[data]}, {epochs} epochs"
    return Study(title, "minutes on a GPU, about a day on one CPU core", rows, settings["bp"])


_WIDTHS = "128-128-256-256-512"

_CNN = Recipe(
    data="cifar-10",
    epochs=100,
    lr_cosine=100,
    lr_min=1e-3,
    centralise=True,
    flip=True,
    crop=4,
    validation=5000,
)

_CNN_BP = replace(
    _CNN,
    model=f"cnn-elu-bn-{_WIDTHS}",
    batch_size=256,
    lr=(0.03,),
    momentum=0.5,
    weight_decay=(1e-5,),
    warmup_steps=200,
)

_CNN_CCL = replace(
    _CNN,
    rule="ccl",
    rule_options=("mask=True",),
    model=f"cnn-elu-{_WIDTHS}",
    batch_size=128,
    lr=(1.0,),
    momentum=0.8,
    weight_decay=(1e-6,),
    warmup_steps=100,
    clip=0.3,
    clip_over="network",
)

_NEVER = 1e6
"""A clipping norm that no gradient reaches: the released file of CIFAR-100 does not clip."""

_AUTOENCODER = Recipe(
    data="cifar-10-autoencoder",
    model="conv-autoencoder-64-128-256-512",
    loss="mse",
    epochs=50,
    batch_size=128,
    lr_cosine=50,
    lr_min=1e-3,
    centralise=True,
    clip=0.2,
    clip_over="network",
    validation=5000,
)

_CONTROLS = ("ccl", "ccl-frozen", "ccl-free", "ccl-readout", "bp", "fa")


def _controls(lr: float) -> Study:
    base = replace(_perceptron("mnist", _DEEP, 6000), lr=(lr,), epochs=50)
    title = f"Where CCL's learning comes from: controls on MNIST, learning rate {lr:g}"
    return Study(title, "about an hour on two cores", rows_of(base, _CONTROLS), base)


STUDIES: dict[str, Study] = {
    **{f"ccl-{name}": _study(name) for name in _SETS},
    **{f"ccl-{name}-others": _others(name) for name in _SETS},
    "ccl-cifar10-cnn": _images(
        "cifar-10",
        100,
        {"bp": _CNN_BP, "fa": replace(_CNN_BP, rule="fa"), "ccl": _CNN_CCL},
        {"bp": (87.12, 1.76), "ccl": (82.94, 0.53)},
    ),
    "ccl-cifar100-cnn": _images(
        "cifar-100",
        100,
        {
            "bp": replace(_CNN_BP, data="cifar-100"),
            "ccl": replace(_CNN_CCL, data="cifar-100", rule_options=(), momentum=0.5, clip=_NEVER),
        },
        {"bp": (51.92, 0.48), "ccl": (56.29, 0.25)},
    ),
    "ccl-autoencoder": Study(
        "CCL as an autoencoder of small images",
        "minutes on a GPU, days on one CPU core",
        rows_of(
            _AUTOENCODER,
            {
                "bp": {"lr": (0.03,), "momentum": 0.5, "weight_decay": (1e-5,), "warmup_steps": 200},
                "ccl": {
                    "rule_options": ("pair=match", "orthogonal=True"),
                    "lr": (0.01,),
                    "momentum": 0.9,
                    "weight_decay": (1e-4,),
                    "warmup_steps": 100,
                },
            },
        ),
        _AUTOENCODER,
    ),
    "ccl-controls": _controls(1.0),
    "ccl-controls-slow": _controls(0.2),
}
