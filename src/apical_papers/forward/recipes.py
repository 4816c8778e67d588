"""Forward-forward (arXiv 2212.13345) on MNIST.

The number tagged "code" is the test accuracy given in the README of loweX/Forward-Forward for three hidden layers of 1000
units after 100 epochs; it holds out 10,000 images, which we train on. It uses SGD at 1e-3 with another rate for the read-out
and weight decay for both, a rate that falls linearly from half of the epochs on, pixels between 0 and 1, peer normalisation
of unit activities, and normal initial weights with deviation 1/sqrt(outputs). We use Adam at 1e-3 for all, without decay,
with two rate steps at 50 and 75 epochs; pixels with mean 0 and deviation 1; no peer normalisation; Xavier weights. The
control `ff-readout`, whose hidden layers are not trained, has no published number.
"""

from apical.bench.recipe import Recipe
from apical.bench.study import Claim, Published, Study, rows_of

EPOCHS = 100

MNIST = Recipe(
    data="mnist",
    model="mlp-1000-1000-1000",
    epochs=EPOCHS,
    batch_size=100,
    optimizer="adam",
    lr=(1e-3, 5e-4, 2e-4),
    lr_epochs=(50, 75),
    weight_decay=(0.0,),
)

STUDIES: dict[str, Study] = {
    "ff-mnist": Study(
        "Forward-forward on MNIST, 784-1000-1000-1000-10, 100 epochs",
        "about four hours on one CPU core",
        rows_of(
            MNIST,
            ("bp", "ff", "ff-readout", "scff"),
            {"ff": (Published("accuracy", EPOCHS, 98.55, 0.5, "code"),)},
        ),
        MNIST,
        (Claim("bp", "ff", EPOCHS, 0.0), Claim("ff", "ff-readout", EPOCHS, 1.0)),
    )
}
