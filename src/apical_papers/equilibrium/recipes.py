"""Equilibrium propagation: its studies.

The first paper's cost has no factor of one half: its beta is half of ours, and its learning rates are half of ours. No
readable source with its errors on MNIST was found; our numbers are compared with the implementation in the CorInfoMax
repository (arXiv 2306.04810), which trains for 50 epochs. Departure: a free phase starts from zeros, not from the state in
which the same image left it an epoch earlier.

Convolutional networks are those of arXiv 2006.03824 (numbers from its abstract and its repository's page) and arXiv
2209.00530 (from its published logs), which need a GPU. Departures: crops are padded with zeros, not with the edge; in the
second, weight decay goes through the momentum; and backpropagation has one learning rate for all layers, which is ours.
"""

from dataclasses import replace

from apical.bench.recipe import Recipe
from apical.bench.study import Claim, Published, Study, rows_of

ORIGINAL = ("beta=1.0", "free_steps=20", "nudged_steps=4", "damping=0.5", "rates=(1.0, 0.5)")
"""One hidden layer: 20 free and 4 nudged steps of size 1/2; the lower layer's rate is twice that of the upper."""


def _digits() -> Study:
    base = Recipe(
        data="digits", model="mlp-sigmoid-64-64", epochs=20, batch_size=20, lr=(0.1,), momentum=0.0, weight_decay=(0.0,)
    )
    rows = rows_of(base, {"bp": {}, "ep": {}, "ep-one-sided": {}, "ep-directed": {"weight_decay": (1e-3,)}, "hep": {}})
    claims = (Claim("ep", "bp", 20, -2.0), Claim("hep", "bp", 20, -2.0), Claim("ep", "ep-one-sided", 20, 0.0))
    return Study("Equilibrium propagation on digits, 64-64-64-10", "seconds", rows, base, claims)


def _mnist() -> Study:
    base = Recipe(
        data="mnist-raw",
        model="mlp-clip-500",
        loss="squared",
        epochs=25,
        batch_size=20,
        lr=(0.2,),
        momentum=0.0,
        weight_decay=(0.0,),
        validation=10000,
    )
    original, plain = {"rule_options": ORIGINAL}, {"model": "mlp-500", "lr": (0.05,)}
    rows = rows_of(base, {"bp": plain, "ep-one-sided": original, "ep": original})
    claims = (Claim("ep-one-sided", "bp", 10, -1.0), Claim("ep", "bp", 10, -1.0))
    return Study("Equilibrium propagation on MNIST, 784-500-10", "minutes per epoch", rows, base, claims)


_WIDTHS = "128-256-512-512"
_CIFAR = Recipe(
    data="cifar-10-std3",
    model=f"cnn-clip-{_WIDTHS}",
    epochs=120,
    batch_size=128,
    lr=(0.25,),
    lr_cosine=100,
    lr_min=1e-5,
    weight_decay=(3e-4,),
    flip=True,
    crop=4,
)
_RATES = "rates=(1.0, 0.6, 0.4, 0.32, 0.2)"
"""Rates of four convolutions and the read-out: 0.25, 0.15, 0.1, 0.08, 0.05."""


def _cifar10() -> Study:
    phases = ("beta=1.0", "free_steps=250", "nudged_steps=25", _RATES)
    accuracies = {"ep": 88.3, "ep-one-sided": 14.0, "ep-directed": 86.8}
    published = {rule: (Published("accuracy", 120, value, 1.0, "paper"),) for rule, value in accuracies.items()}
    rows = rows_of(_CIFAR, {"bp": {"lr": (0.05,)}, **{rule: {"rule_options": phases} for rule in published}}, published)
    return Study("Convolutional equilibrium propagation on CIFAR-10", "a day on a GPU", rows, _CIFAR)


def _holomorphic_cifar10() -> Study:
    base = replace(
        _CIFAR,
        data="cifar-10-std1.5",
        model=f"cnn-silu-{_WIDTHS}",
        epochs=90,
        lr_cosine=90,
        lr_min=0.0,
        weight_decay=(2e-3,),
    )
    phases = ("points=2", "beta=1.0", "free_steps=250", "nudged_steps=60", _RATES)
    published = {
        "bp": (Published("accuracy", 90, 88.33, 1.0, "code", spread=0.16),),
        "hep": (Published("accuracy", 90, 88.45, 1.0, "code", spread=0.28),),
    }
    plain = {"model": f"cnn-softmax-pool-{_WIDTHS}", "lr": (0.05,)}
    rows = rows_of(base, {"bp": plain, "hep": {"rule_options": phases}}, published)
    return Study("Holomorphic equilibrium propagation on CIFAR-10, softmax pooling", "a day on a GPU", rows, base)


STUDIES = {
    "ep-digits": _digits(),
    "ep-mnist": _mnist(),
    "ep-cifar10": _cifar10(),
    "ep-cifar10-holomorphic": _holomorphic_cifar10(),
}
