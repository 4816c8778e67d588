"""Local classifiers (arXiv 1901.06656) and Mono-Forward (arXiv 2501.09238) on MNIST.

Numbers tagged "code" are test accuracies given in the README of anokland/local-loss for a perceptron of three hidden layers
of 1024 units after 100 epochs. Settings are the same: Adam at 5e-4, divided by four at 50, 75, 89 and 94 % of the epochs,
batches of 128, images shifted by up to two pixels, BatchNorm before every activation. Ours have no dropout (theirs 0.1 after
the input of a local loss), and use ReLU also in the rows with a similarity loss, where theirs use LeakyReLU. Mono-Forward
has no number here: its paper uses other networks.
"""

from apical.bench.recipe import Recipe
from apical.bench.study import Claim, Published, Study, rows_of

EPOCHS = 100

MNIST = Recipe(
    data="mnist",
    model="mlp-bn-1024-1024-1024",
    epochs=EPOCHS,
    batch_size=128,
    optimizer="adam",
    lr=tuple(5e-4 * 0.25**k for k in range(5)),
    lr_epochs=(50, 75, 89, 94),
    weight_decay=(0.0,),
    crop=2,
)

ACCURACY = {"bp": 99.25, "local-pred": 99.32, "local-sim": 99.20, "local-both": 99.38}
"""Accuracies in percent, by rule."""


_PUBLISHED = {rule: (Published("accuracy", EPOCHS, value, 0.2, "code"),) for rule, value in ACCURACY.items()}

STUDIES: dict[str, Study] = {
    "local-mnist": Study(
        "Local classifiers on MNIST, 784-1024-1024-1024-10 with BatchNorm, 100 epochs",
        "about three hours on one CPU core",
        rows_of(MNIST, (*ACCURACY, "mono-forward"), _PUBLISHED),
        MNIST,
        (Claim("local-both", "local-pred", EPOCHS, 0.0), Claim("local-pred", "local-sim", EPOCHS, 0.0)),
    )
}
