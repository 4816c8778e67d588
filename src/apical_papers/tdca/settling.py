"""Does the shipped teacher's learner settle? Constant rate, decaying rate and averaged weights, against backpropagation.

Run `python -m apical_papers.tdca.settling --out results/tdca-settling`. In `results/tdca-shipped` narrow and deep
perceptrons missed the mark of 1.5 points on single seeds, at a constant learning rate. A credit that is not a gradient need
not vanish where training should end. On eight development starts and held-out training images, the mean of the weights over
the last quarter of training was better than the final weights, in both networks. Here every rule has its own learning rate
for each way to end, chosen on held-out training images; the tested starts were not used before. The marks, set before the
run:

    averaged weights   every start at most 1.5 points below the mean of backpropagation's, averaged too
    averaged weights   accuracy above that of the last weights of the same runs

Twenty epochs of batches of 32, SGD with momentum 0.9, gradients clipped at norm 1, as in `apical compare` by default, but
without weight decay.
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
from torch import Tensor
from tyro.conf import arg

from apical import data
from apical.bench.finding import Row, count, difference, table
from apical.bench.program import about_study, keep_results, run_command
from apical.data.dataset import Dataset
from apical.evolution.population import Lifetime, Population, accuracies, losses
from apical.evolution.seeds import seed_of
from apical_papers.tdca.starts import learners

MODELS = ("mlp-32-32", "mlp-64-64-64", "mlp-tanh-64")
RULES = {"bp": "BP", "tdca": "TDCA"}
ENDS = {"constant": "constant rate", "averaged": "constant rate, averaged weights", "cosine": "cosine to zero"}
RATES = (0.01, 0.02, 0.05, 0.1)
EPOCHS, BATCH, HELD = 20, 32, 240
TUNING = 8
"""Number of starts for choosing learning rates."""
LAST = 0.25
"""Share of the training over which weights are averaged."""
POINTS = 1.5
ABOUT = about_study(
    "The shipped teacher of TDCA: last weights, averaged weights, decaying rate",
    "The shipped teacher missed its mark on narrow and on deep perceptrons, on single seeds, at a constant "
    "learning rate. Its credit is no gradient and need not vanish where training should end: weights then wander around a "
    "good place. This study averages them over the last quarter of training, or lets the rate fall to zero, for "
    "backpropagation too. Rates are chosen for each rule and way to end on held-out training images.",
    f"Starts: TDCA's test accuracy on each, with averaged weights, is at most {POINTS:g} points below the "
    "mean of backpropagation's with averaged weights. Averaging: the 95 % interval of the mean difference from the "
    "last weights of the same runs (Student's t) lies above 0. Set before the run, after a look at development starts.",
)


@dataclass(frozen=True)
class Options:
    """The shipped teacher at a constant rate, with averaged weights and with a decaying rate."""

    out: Annotated[Path, arg(metavar="DIR")]
    """Folder of the study."""
    starts: int = 5
    """Initial weights."""


def train(
    model: str,
    rule: str,
    digits: Dataset,
    images: tuple[Tensor, Tensor],
    seeds: Sequence[int],
    rates: Sequence[float],
    cosine: bool,
) -> tuple[Population, dict[str, Tensor]]:
    """Return the last and the averaged weights (P, n) of one learner per seed and rate, seeds first.

    Args:
        images: inputs and labels to train on.
        cosine: whether the rate falls to zero along half a cosine.
    """
    x, y = images
    population, other, start = learners(model, rule, digits, images, seeds, record=True)
    start = start.repeat_interleave(len(rates), 0)
    others = None if other is None else other.expand(len(start), -1)
    steps = EPOCHS * (len(x) // BATCH)
    lr, total, summed = torch.tensor([*rates] * len(seeds)), 0, torch.zeros_like(start)
    base = lr.clone()

    def watch(done: int, weights: Tensor) -> None:
        nonlocal total
        if done > (1 - LAST) * steps:
            summed.add_(weights)
            total += 1
        if cosine:  # the optimiser reads the rates again at each step
            lr.copy_(base * (1 + math.cos(math.pi * done / steps)) / 2)

    lifetime = Lifetime(steps=steps, lr=rates[0], optimizer="sgd", clip=1.0, batch_size=BATCH)
    last = population.train(start, others, x, y, lifetime, lr=lr, watch=watch)
    return population, {"last": last, "averaged": summed / total}


def ends(
    model: str, rule: str, digits: Dataset, images: tuple[Tensor, Tensor], seeds: Sequence[int], rates: Sequence[float]
) -> dict[str, tuple[Population, Tensor]]:
    """Return weights (P, n) for each way to end."""
    population, constant = train(model, rule, digits, images, seeds, rates, cosine=False)
    _, falling = train(model, rule, digits, images, seeds, rates, cosine=True)
    weights = {"constant": constant["last"], "averaged": constant["averaged"], "cosine": falling["last"]}
    return {end: (population, weights[end]) for end in ENDS}


def tuned(model: str, rule: str, digits: Dataset) -> dict[str, float]:
    """Return the learning rate with the highest mean accuracy on held-out training images, for each way to end."""
    order = torch.randperm(len(digits.train.targets), generator=torch.Generator().manual_seed(seed_of("held") % 2**31))
    held, kept = order[:HELD], order[HELD:]
    x, y = digits.train.inputs, digits.train.targets
    seeds = [seed_of("settling tuning", k) for k in range(TUNING)]
    best = {}
    for end, (population, weights) in ends(model, rule, digits, (x[kept], y[kept]), seeds, RATES).items():
        right = accuracies(population.outputs(weights, x[held]), y[held]).view(TUNING, len(RATES)).mean(0)
        best[end] = RATES[int(right.argmax())]
    return best


def measured(model: str, rule: str, digits: Dataset, starts: int) -> dict[str, dict[str, Any]]:
    """Return rate, training losses and test accuracies (per cent) for each way to end."""
    x, y = digits.train.inputs, digits.train.targets
    seeds = [seed_of("settling test", k) for k in range(starts)]
    best = tuned(model, rule, digits)
    rates = sorted({*best.values()})
    outcomes = {}
    for end, (population, weights) in ends(model, rule, digits, (x, y), seeds, rates).items():
        chosen = weights.view(starts, len(rates), -1)[:, rates.index(best[end])]
        right = accuracies(population.outputs(chosen, digits.test.inputs), digits.test.targets)
        outcomes[end] = {
            "rate": best[end],
            "losses": losses(population.outputs(chosen, x), y).tolist(),
            "accuracies": (100 * right).tolist(),
        }
    return outcomes


Findings = dict[str, dict[str, dict[str, dict[str, Any]]]]


def verdicts(findings: Findings) -> list[Row]:
    """Return the verdicts on each network."""
    rows = []
    for model, rules in findings.items():
        ours, theirs = (rules[rule]["averaged"]["accuracies"] for rule in ("tdca", "bp"))
        what = f"{model}, averaged weights: starts at most {POINTS:g} points below the mean of BP's test accuracy"
        holds = [accuracy >= fmean(theirs) - POINTS for accuracy in ours]
        rows.append(count("C2", "tdca", what, holds, len(holds)))
        what = f"{model}: test accuracy of averaged weights minus that of the last ones, points"
        last = rules["tdca"]["constant"]["accuracies"]
        rows.append(difference("C2", "tdca", what, ours, last, less=False))
    return rows


def lines(model: str, rules: dict[str, dict[str, dict[str, Any]]]) -> list[list[Any]]:
    """Return the table's rows of a network."""
    rows = []
    for end, title in ENDS.items():
        mean = fmean(rules["bp"][end]["accuracies"])
        for rule, name in RULES.items():
            runs = rules[rule][end]
            right = runs["accuracies"]
            gaps = [f"{fmean(right) - mean:.2f}", f"{min(right) - mean:.2f}"]
            rows.append([model, title, name, f"{runs['rate']:g}", runs["losses"], right, *gaps])
    return rows


def study(options: Options, command: str) -> dict[str, Any]:
    """Train, measure, and write results.json and report.html."""
    begun, digits = time.perf_counter(), data.load("digits")
    findings: Findings = {}
    for model in MODELS:
        findings[model] = {rule: measured(model, rule, digits, options.starts) for rule in RULES}
        print(f"{time.perf_counter() - begun:7.1f} s  {model}", flush=True)
    settings = {
        **{key: value for key, value in asdict(options).items() if key != "out"},
        "epochs": EPOCHS,
        "batch size": BATCH,
        "starts for tuning": TUNING,
        "held-out images": HELD,
        "learning rates": list(RATES),
        "averaged, share of training": LAST,
    }
    by_end = table(
        "By network and way to end",
        "Training loss (nats) and test accuracy in %, mean over starts with 95 % interval; the mean and the worst start "
        "minus the mean of BP's with the same end, in points.",
        ["network", "end", "rule", "learning rate", "loss", "accuracy, %", "mean", "worst start"],
        (line for model, rules in findings.items() for line in lines(model, rules)),
    )
    spent = [{"seconds": time.perf_counter() - begun}]
    return keep_results(options.out, command, ABOUT, settings, spent, verdicts(findings), [by_end])


main = partial(run_command, "apical_papers.tdca.settling", Options, study, least={"starts": 2})


if __name__ == "__main__":
    sys.exit(main())
