"""Spiking networks on part of MNIST: contrastive-signal-dependent plasticity, and neurons that fire once.

Run `python -m apical_papers.spikes.study --out results/spikes-study`. Plasticity: 784-128-64-10, 40 steps per stimulus, 2000
digits, batches of 100, Adam at 4e-2. First spikes: 784-64-10, 1500 digits, batches of 32, Adam at 1e-3. Marks were set from
prototypes, before this was run. Each seed is saved in the folder when it is finished, so an interrupted study continues.
"""

import sys
import time
from typing import Any

import torch

from apical import models
from apical.bench.finding import Row, by_name, count, mean_table, series
from apical.bench.plain_loop import accuracy, fit
from apical.bench.program import Cells, SeedStudy, about_study
from apical.core.credit import CreditRule
from apical.data import Dataset, load
from apical.rules.backprop import Backprop
from apical.rules.contrastive_plasticity.contrastive_signal_plasticity import ContrastiveSignalPlasticity
from apical.rules.feedback_alignment import FeedbackAlignment
from apical.rules.plastic_feedback.kolen_pollack import KolenPollack

SETTINGS: dict[str, Any] = {
    "data": "mnist-raw",
    "test images": 500,
    "plasticity": "784-128-64-10, 2000 digits, batches of 100, Adam at 4e-2",
    "first spikes": "784-64-10, 1500 digits, batches of 32, Adam at 1e-3",
}

PLASTICITY: dict[str, dict[str, Any]] = {
    "csdp": {},
    "csdp, decay 6e-5": {"decay": 6e-5},
    "csdp-unsupervised": {"negatives": "mixtures"},
    "csdp-memristor": {"levels": 64},
}
FIRST: dict[str, Any] = {"bp": Backprop, "fa": FeedbackAlignment, "kp": KolenPollack}

MARK = 0.78
"""Accuracy of the prototypes after four epochs."""

ABOUT = about_study(
    "Spiking networks on a little of MNIST",
    "Test accuracy after few epochs, at one learning rate for each kind of network.",
    "Seeds that reach what a prototype of ours reached, set before this was run.",
)


def trained(rule: CreditRule, data: Dataset, epochs: int, batch: int, rate: float) -> dict[str, float]:
    """Return test accuracy and seconds of this process."""
    learning = [p for p in rule.parameters() if p.requires_grad]
    optimizer, begun = torch.optim.Adam(learning, rate), time.process_time()
    for _ in range(epochs):
        fit(rule, optimizer, data.train, batch)
    rule.eval()
    return {"accuracy": accuracy(rule, data.test, 500), "seconds": time.process_time() - begun}


def plasticity(arm: str, seed: int, epochs: int) -> dict[str, float]:
    """Train once; `gap` is the goodness of positive minus that of negative test samples, smallest over layers."""
    data = load(SETTINGS["data"], train_limit=2000, test_limit=SETTINGS["test images"])
    torch.manual_seed(seed)
    rule = ContrastiveSignalPlasticity(models.spiking(784, [128, 64], 10), **PLASTICITY[arm])
    measures = trained(rule, data, epochs, 100, 4e-2)
    goodness = rule.goodness(data.test.inputs, data.test.targets).values()
    return measures | {"gap": min(float(positive.mean() - negative.mean()) for positive, negative in goodness)}


def first(arm: str, seed: int, epochs: int) -> dict[str, float]:
    """Train once; `silent` is the share of hidden neurons without a spike for a test sample."""
    data = load(SETTINGS["data"], train_limit=1500, test_limit=SETTINGS["test images"])
    torch.manual_seed(seed)
    model = models.first_spike(784, [64], 10)
    measures = trained(FIRST[arm](model), data, epochs, 32, 1e-3)
    return measures | {"silent": float(model.silent(data.test.inputs)["spikes1"].mean())}


def _cell(seed: int, epochs: int) -> dict[str, Any]:
    return {
        "plasticity": {arm: plasticity(arm, seed, epochs) for arm in PLASTICITY},
        "first": {arm: first(arm, seed, epochs) for arm in FIRST},
    }


def verdicts(cells: Cells) -> list[Row]:
    """The marks."""
    csdp, spikes = series(cells, "plasticity", "csdp"), series(cells, "first", "bp")
    learned, fired = ([run["accuracy"] >= MARK for run in runs] for runs in (csdp, spikes))
    gaps = [run["gap"] > 0.3 for run in csdp]
    return [
        count("S1", "csdp", f"seeds with an accuracy of {MARK}", learned, len(cells)),
        count("S1", "csdp", "seeds with a gap of goodness of 0.3 in both layers", gaps, len(cells)),
        count("S2", "bp", f"first spikes: seeds with an accuracy of {MARK}", fired, len(cells)),
    ]


def tables(cells: Cells) -> list[Row]:
    """Every training."""
    note = (
        "Test accuracy, 0 to 1; the least gap of goodness; seconds of one core, busy with other work too; mean over seeds "
        "with 95 % interval."
    )
    silent = "The same; share of hidden neurons that are silent for a sample."
    csdp, first = ({name: name for name in ("accuracy", last, "seconds")} for last in ("gap", "silent"))
    title = "Contrastive-signal-dependent plasticity"
    return [
        mean_table(title, note, "training", by_name(cells, "plasticity"), csdp),
        mean_table("Neurons that fire once", silent, "rule", by_name(cells, "first"), first),
    ]


main = SeedStudy("apical_papers.spikes.study", ABOUT, SETTINGS, _cell, verdicts, tables, epochs=4)


if __name__ == "__main__":
    sys.exit(main())
