"""Paths of TDCA and backpropagation in the loss landscape: the shipped teacher on the default model, from the same starts.

Run `python -m apical_papers.tdca.landscape --out results/tdca-landscape`. The paper says that TDCA's paths pass local minima
where backpropagation's stay. A plot cannot show that, because any two paths look separate on a plane of principal
components; so the study measures, for each start, where both end and the loss along the straight line between start and end.
The marks: final loss below tuned backpropagation's, and no start that ends worse than guessing.
Each rule has its learning rate from one grid, by the training loss from separate starts. A few minutes on one core.
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tyro.conf import arg

from apical import data
from apical.bench.figures.curves import render
from apical.bench.figures.landscape import landscape
from apical.bench.finding import Row, count, difference, series, table
from apical.bench.program import about_study, keep_results, run_command
from apical.data.dataset import Dataset
from apical.diagnostics.landscape import barrier, losses_at, points_at_once, principal_plane, surface, tortuosity, travelled
from apical.evolution.population import Lifetime, Population, accuracies, losses
from apical.evolution.seeds import seed_of
from apical.models.catalogue import build
from apical_papers.tdca.starts import learners
from apical_papers.tdca.trials import GRID

MODEL = "mlp-256-256"
LIFETIME = Lifetime(steps=900, lr=0.02, optimizer="sgd", clip=1.0, batch_size=32)
EVERY = 45
"""Steps between snapshots."""
GUESS = math.log(10)
"""The loss of equal probabilities for ten digits."""
POINTS = 40
"""Points on a straight line, and per side of the plot."""
TUNING = 8
"""Number of starts for choosing learning rates."""
RULES = {
    "tdca": "TDCA",
    "hand-silent": "by hand: the error, hidden silent",
    "hand-random": "by hand: and random feedback of it",
    "bp": "BP",
}
ABOUT = about_study(
    "TDCA in the loss landscape, against backpropagation",
    "The shipped teacher and backpropagation train the default model on the handwritten digits, from the same "
    "initial weights and with the same mini-batches, each at its own best learning rate of one grid. The straight line "
    "from a run's start to its end has a barrier where the loss exceeds the linear interpolation between its ends. Two "
    "teachers made by hand stand beside them, without marks: the error as the output's credit, and no credit or fixed "
    "random feedback of the error for hidden units.",
    "Differences are paired over initial weights. Reproduced means that the 95 % interval of the mean "
    "difference (Student's t) lies on the better side of the mark, or that the count of starts reaches it. The paper "
    "claims that TDCA's ways get past local minima where BP's stay: TDCA would have to end lower. Barriers are in the "
    "table but have no mark: an earlier run, with another teacher, found none under either rule.",
)


@dataclass(frozen=True)
class Options:
    """TDCA and backpropagation in the loss landscape."""

    out: Annotated[Path, arg(metavar="DIR")]
    """Folder of the study."""
    starts: int = 10
    """Initial weights."""


def train(rule: str, digits: Dataset, seeds: Sequence[int], rates: Sequence[float]) -> tuple[Population, Tensor]:
    """Return snapshots (snapshots, P, n) from start to end of one learner per seed, with a learning rate each."""
    x, y = digits.train.inputs, digits.train.targets
    population, other, start = learners(MODEL, rule, digits, (x, y), seeds)
    others = None if other is None else other.expand(len(seeds), -1)
    snapshots = []

    def watch(done: int, weights: Tensor) -> None:
        if done % EVERY == 0 or done == LIFETIME.steps:
            snapshots.append(weights.clone())

    population.train(start, others, x, y, LIFETIME, lr=torch.tensor(rates), watch=watch)
    return population, torch.stack(snapshots)


def tuned(rule: str, digits: Dataset) -> float:
    """Return the learning rate of the grid with the lowest mean training loss, from starts that are not reported."""
    seeds = [seed_of("landscape tuning", k) for k in range(TUNING)]
    population, ways = train(rule, digits, [seed for seed in seeds for _ in GRID], [*GRID] * TUNING)
    final = losses(population.outputs(ways[-1], digits.train.inputs), digits.train.targets).nan_to_num(nan=1e6, posinf=1e6)
    by_rate = final.view(TUNING, len(GRID)).mean(0)
    return GRID[int(by_rate.argmin())]


def measured(rule: str, digits: Dataset, starts: int, rate: float) -> tuple[list[dict[str, float]], Tensor]:
    """Return the results of each run, and the paths (starts, snapshots, n)."""
    population, ways = train(rule, digits, [seed_of("landscape", k) for k in range(starts)], [rate] * starts)
    right = accuracies(population.outputs(ways[-1], digits.test.inputs), digits.test.targets)
    loss, chunk = surface_of(digits)
    rows = []
    for way, accuracy in zip(ways.transpose(0, 1), right.tolist(), strict=True):
        line = barrier(loss, way[0], way[-1], POINTS, chunk)
        ends = {"loss": float(loss(way[-1:])[0]), "accuracy": accuracy, "barrier": line.height}
        lengths = {"travelled": travelled(way), "distance": float((way[-1] - way[0]).norm())}
        rows.append({**ends, **lengths, "tortuosity": tortuosity(way)})
    return rows, ways.transpose(0, 1)


def surface_of(digits: Dataset) -> tuple[Any, int]:
    """Return the training loss as a function of the weights (n, P), and how many to evaluate together."""
    model = build(MODEL, tuple(digits.train.inputs.shape[1:]), digits.classes)
    x, y = digits.train.inputs, digits.train.targets
    return losses_at(model, F.cross_entropy, x, y), points_at_once(model, x)


def record(digits: Dataset, ways: dict[str, Tensor]) -> dict[str, Any]:
    """Return the surface on the principal plane of two paths (snapshots, n), as :func:`landscape` takes it."""
    loss, chunk = surface_of(digits)
    plane = principal_plane(list(ways.values()))
    places = {rule: plane.coordinates(way) for rule, way in ways.items()}
    every = torch.cat(list(places.values()))
    middle, half = (every.amin(0) + every.amax(0)) / 2, 0.6 * float((every.amax(0) - every.amin(0)).max())
    x, y = (torch.linspace(-half, half, POINTS + 1, dtype=torch.float64) + centre for centre in middle)
    return {
        "explained_variance": plane.explained,
        "loss": "cross_entropy",
        "examples": len(digits.train.targets),
        "x": x.tolist(),
        "y": y.tolist(),
        "losses": surface(loss, plane, x, y, chunk).tolist(),
        "runs": [{"label": rule, "coordinates": place.tolist()} for rule, place in places.items()],
    }


def verdicts(rows: dict[str, list[dict[str, float]]]) -> list[Row]:
    """Judge whether TDCA ends lower, and whether it ends better than guessing from every start."""
    ours, theirs = (series(rows[rule], "loss") for rule in ("tdca", "bp"))
    settled = [loss <= GUESS for loss in ours]
    return [
        difference("C4", "tdca", "training loss at the end minus tuned BP's", ours, theirs, less=True),
        count("C4", "tdca", "starts that end better than a guess", settled, len(settled)),
    ]


def _ends(rows: list[dict[str, float]]) -> list[str]:
    """Format the median loss, and how many runs end above the loss of equal probabilities."""
    final = series(rows, "loss")
    failed = sum(not loss <= GUESS for loss in final)
    return [f"{median(final):.3g}", f"{failed} of {len(final)}"]


def study(options: Options, command: str) -> dict[str, Any]:
    """Train, measure, and write results.json, the figure and report.html."""
    begun, digits = time.perf_counter(), data.load("digits")
    rates = {rule: tuned(rule, digits) for rule in RULES}
    measurements = {rule: measured(rule, digits, options.starts, rates[rule]) for rule in RULES}
    rows = {rule: measurement[0] for rule, measurement in measurements.items()}
    loss, chunk = surface_of(digits)
    between = [
        barrier(loss, ours[-1], theirs[-1], POINTS, chunk).height
        for ours, theirs in zip(measurements["tdca"][1], measurements["bp"][1], strict=True)
    ]
    caption = (
        "Training loss on the plane of the first two principal components of TDCA's and BP's paths from the first start; "
        "circle: start. Any two paths look separate on such a plane; the table has measures that do not depend on it."
    )
    drawn = {rule: measurements[rule][1][0] for rule in ("tdca", "bp")}
    drawing = render("landscape", "Two ways", caption, landscape(record(digits, drawn)))
    keys = ("loss", "accuracy", "barrier", "travelled", "distance", "tortuosity")
    settings = {
        "model": MODEL,
        "starts": options.starts,
        "starts for tuning": TUNING,
        "learning rates": list(GRID),
        "chosen": rates,
        "snapshots every": EVERY,
        **{key: value for key, value in asdict(LIFETIME).items() if key != "lr"},
    }
    ends = table(
        "Ends and ways",
        "Median training loss at the end (nats), starts that end worse than a guess, mean training loss, test accuracy, "
        "barrier on the straight line from start to end (nats), distance travelled (over snapshots), distance from start to "
        "end, and their ratio: mean over starts with 95 % interval. Mean barrier between the ends of TDCA and BP: "
        f"{fmean(between):.3g} nats.",
        ["rule", "learning rate", "median loss", "failed", *keys],
        (
            [name, f"{rates[rule]:g}", *_ends(rows[rule]), *(series(rows[rule], key) for key in keys)]
            for rule, name in RULES.items()
        ),
    )
    spent = [{"seconds": time.perf_counter() - begun}]
    return keep_results(options.out, command, ABOUT, settings, spent, verdicts(rows), [ends], [drawing])


main = partial(run_command, "apical_papers.tdca.landscape", Options, study, least={"starts": 2})


if __name__ == "__main__":
    sys.exit(main())
