"""Spiking networks on MNIST: contrastive-signal-dependent plasticity (arXiv 2303.18187) and first spikes (2003.11837).

No published accuracy is compared: the papers' tables are not known here. Networks of plasticity are smaller than those of
the released script (3000 and 600 hidden neurons, batches of 500, rates for a step of Adam at each of the 40 steps of a
stimulus): here Adam takes one step per stimulus, at the rate found with our prototype. Backpropagation trains the same
network as a rate network. Encoding, threshold, initial weights and rate of first spikes are ours; other single-spike
networks have published accuracies of 97.4 % (S4NN) and 99.48 % (arXiv 2410.23619) on MNIST.
"""

from dataclasses import replace

from apical.bench.recipe import Recipe
from apical.bench.study import Study, rows_of

EPOCHS = 10

PLASTICITY = Recipe(
    data="mnist-raw",
    model="spiking-256-64",
    epochs=EPOCHS,
    batch_size=100,
    optimizer="adam",
    lr=(4e-2,),
    weight_decay=(0.0,),
)
FIRST = replace(PLASTICITY, model="first-spike-340", batch_size=32, lr=(1e-3,))

STUDIES: dict[str, Study] = {
    "csdp-mnist": Study(
        "Contrastive-signal-dependent plasticity on MNIST, 784-256-64-10, 40 steps a stimulus",
        "about 40 minutes on one CPU core",
        rows_of(PLASTICITY, {"csdp": {}, "csdp-unsupervised": {}, "bp": {"lr": (1e-3,)}}),
        PLASTICITY,
    ),
    "first-spike-mnist": Study(
        "Neurons that fire once on MNIST, 784-340-10",
        "about half an hour on one CPU core",
        rows_of(FIRST, ("bp", "fa", "usf", "kp")),
        FIRST,
    ),
}
