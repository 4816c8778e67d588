"""Dual propagation on MNIST (arXiv 2302.01228).

Settings are those of the first paper's released scripts: 784-4x1000-10, Adam at 3e-5, batches of 100, a tenth of the images
held out, test at the epoch of best validation. No readable source with the paper's table was found; a later paper quotes the
number. There the output's states are nudged directly, with strength 1; here the nudge is the loss's gradient, with size 1.
"""

from apical.bench.recipe import Recipe
from apical.bench.study import Published, Study, rows_of

_MNIST = Recipe(
    data="mnist",
    model="mlp-1000x4",
    loss="squared",
    optimizer="adam",
    lr=(3e-5,),
    weight_decay=(0.0,),
    batch_size=100,
    epochs=100,
    validation=6000,
)

STUDIES: dict[str, Study] = {
    "dualprop-mnist": Study(
        "Dual propagation on MNIST, 784-1000x4-10, 100 epochs",
        "hours on one CPU core",
        rows_of(
            _MNIST,
            {"bp": {}, "dualprop": {"rule_options": ("beta=1.0",)}},
            {"dualprop": (Published("accuracy", 100, 98.4, 0.5, "paper", select="best-validation"),)},
        ),
        _MNIST,
    )
}
