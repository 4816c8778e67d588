"""CorInfoMax (arXiv 2306.04810): its studies.

Hyper-parameters of MNIST are those of the reported runs; published accuracies were read in the result notebooks of the
authors' repository, for 50 epochs and ten seeds. Learning rates fall by 5 % an epoch; in the released code they jump at
epoch 15 to 0.9^epoch, and so do ours on MNIST. Of the systems compared with, the repository's rates are not all stated:
those of backpropagation and feedback alignment are ours, and their networks have ReLU hidden layers and a linear output.
On digits networks have 200 hidden units: with 100, a class stays silent in some seeds.
"""

from dataclasses import replace

from apical.experiment.recipe import Recipe
from apical.recipes.equilibrium import ORIGINAL
from apical.recipes.study import Claim, Published, Row, Study

TOLERANCE = 0.5


def falling(lr: float, epochs: int, *, jump: bool) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Learning rate of each epoch, and where it changes.

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
    plain = replace(base, lr=(0.2,), lr_epochs=())
    rows = {
        "bp": Row(replace(plain, rule="bp", model="mlp-200"), ()),
        "ep-one-sided": Row(replace(plain, rule="ep-one-sided", model="mlp-clip-200", rule_options=ORIGINAL), ()),
        "corinfomax": Row(
            replace(base, rule="corinfomax", rule_options=("rates=(1.0, 0.7)", "backward_rates=(0.15,)")),
            (Published("accuracy", 20, 95.5, 5.5, "ours"),),
        ),
    }
    claims = (Claim("corinfomax", "ep-one-sided", 20, -5.0),)
    return Study("CorInfoMax on digits, 64-200-10", "seconds", rows, base, claims)


def _mnist() -> Study:
    lr, lr_epochs = falling(1.0, 50, jump=True)
    base = Recipe(
        data="mnist-raw",
        model="mlp-box-500",
        loss="squared",
        epochs=50,
        batch_size=20,
        lr=lr,
        lr_epochs=lr_epochs,
        momentum=0.0,
        weight_decay=(0.0,),
    )
    plain = replace(base, lr=(0.05,), lr_epochs=())
    rows = {
        "bp": Row(replace(plain, rule="bp", model="mlp-500"), (_published(97.58, 0.06),)),
        "fa": Row(replace(plain, rule="fa", model="mlp-500"), (_published(97.99, 0.10),)),
        "ep-one-sided": Row(
            replace(plain, rule="ep-one-sided", model="mlp-clip-500", lr=(0.2,), rule_options=ORIGINAL),
            (_published(97.62, 0.08),),
        ),
        "corinfomax": Row(
            replace(base, rule="corinfomax", rule_options=("rates=(1.0, 0.7)", "backward_rates=(0.15,)")),
            (_published(97.62, 0.12),),
        ),
    }
    return Study("CorInfoMax on MNIST, 784-500-10", "minutes per epoch", rows, base)


def _published(value: float, spread: float) -> Published:
    return Published("accuracy", 50, value, TOLERANCE, "code", spread=spread)


STUDIES = {"corinfomax-digits": _digits(), "corinfomax-mnist": _mnist()}
