"""Complete directed networks on exclusive or, and their memory of the answer.

Run `python -m apical_papers.equilibrium.logic --out results/ep-logic`. Settings are those of the authors' notebooks (arXiv
2006.08798): two inputs and a bias; one-hot outputs and 2 hidden neurons for DEEP, one output and 5 hidden for the baseline
(and, for comparison, the baseline with one-hot outputs); 1000 free and 1000 nudged steps of 0.05 per epoch, on all four
patterns together. A free phase starts where the last nudged phase ended. Such networks have memory: the nudge can leave them
in a state that answers correctly without having learned the task. So answers are read twice, at the end of that free phase,
and at the end of one that starts from newly drawn states. Each seed is saved in the folder when it is finished.
"""

import sys
from typing import Any

import torch
from torch import Tensor

from apical.bench.finding import Row, count, series, table
from apical.bench.program import Cells, SeedStudy, about_study
from apical_papers.equilibrium.complete_network import (
    Complete,
    asymmetric_settle,
    asymmetric_update,
    is_surely_stable,
    settle,
    shrunk,
)

SETTINGS: dict[str, Any] = {
    "dt": 0.05,
    "steps of a phase": 1000,
    "initial weights": 0.05,
    "shrinking": 1.5e-4,
    "deep": "2 hidden, nudge 1, rate 200",
    "asymmetric": "5 hidden, nudge 10, rate 1, one output",
    "asymmetric, one-hot": "the same with two outputs",
}

NETWORKS = {
    "deep": (Complete(3, 2, 2), 1.0, 200.0),
    "asymmetric": (Complete(3, 5, 1), 10.0, 1.0),
    "asymmetric, one-hot": (Complete(3, 5, 2), 10.0, 1.0),
}
"""Sizes, nudge and learning rate."""

PUBLISHED = (0.75, 0.125)
"""The baseline's share of wrong answers and half its mean squared error, as stored in the authors' notebooks."""

ABOUT = about_study(
    "Complete directed networks on exclusive or",
    "DEEP, in which what a neuron sends away is its leak, and asymmetric equilibrium propagation, both in networks whose "
    "every neuron may reach every other. Answers of a free phase that begins where the nudged one ended, and of one that "
    "begins from new states.",
    "Counts of seeds that answered all four patterns rightly at the end of some epoch.",
    notebooks="Stored outputs of the authors' notebooks: asymmetric equilibrium propagation ends with 75 % wrong "
    "answers and an error of 0.125, which is that of an output of 0.5 whatever the pattern.",
)


def patterns() -> tuple[Tensor, Tensor]:
    """Return inputs (4, 2) and answers (4,) of exclusive or."""
    return torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]), torch.tensor([0, 1, 1, 0])


def answers(outputs: Tensor) -> Tensor:
    """Return classes (batch,) from the outputs (batch, 1 or 2): the larger of two, or whether one is above a half."""
    return outputs.argmax(1) if outputs.shape[1] > 1 else (outputs[:, 0] > 0.5).long()


def trained(kind: str, seed: int, epochs: int) -> dict[str, Any]:
    """Return the smallest share of wrong answers, its first epoch, and the last share: as left, and from new states.

    `error` is half the mean squared error of the outputs at the last epoch, as left.
    """
    torch.manual_seed(seed)
    deep = kind == "deep"
    network, beta, rate = NETWORKS[kind]
    (x, right), mask, dt, steps = patterns(), network.mask(), SETTINGS["dt"], SETTINGS["steps of a phase"]
    y = torch.nn.functional.one_hot(right).float() if network.outputs > 1 else right[:, None].float()
    weight = SETTINGS["initial weights"] * torch.randn(network.size, network.size) * mask

    def free_phase(start: Tensor) -> Tensor:
        if deep:
            return settle(network, start, weight, steps, dt)[0]
        return asymmetric_settle(network, start, weight, steps, dt)

    def wrong(s: Tensor) -> float:
        return float((answers(s[:, -network.outputs :]) != right).float().mean())

    s, left, anew, error = network.start(x), [], [], 0.0
    for _ in range(epochs):
        free = free_phase(s)
        left.append(wrong(free))
        error = float(0.5 * (free[:, -network.outputs :] - y).square().mean())
        anew.append(wrong(free_phase(network.start(x))))
        if deep:
            s, product = settle(network, free, weight, steps, dt, beta, y)
            change = product / len(x)
        else:
            s = asymmetric_settle(network, free, weight, steps, dt, beta, y)
            change = asymmetric_update(free, s, beta)
        weight = shrunk(weight + rate * change * mask, SETTINGS["shrinking"]) * mask
    return {
        name: {"best": min(errors), "epoch": errors.index(min(errors)), "last": errors[-1]}
        for name, errors in (("as left", left), ("anew", anew))
    } | {"error": error, "surely stable": is_surely_stable(network, weight)}


def _cell(seed: int, epochs: int) -> dict[str, Any]:
    return {kind: trained(kind, seed, epochs) for kind in NETWORKS}


def verdicts(cells: Cells) -> list[Row]:
    """Judge whether networks of each kind are ever correct, as left and from new states."""

    def solved(kind: str, start: str) -> list[bool]:
        return [best == 0.0 for best in series(cells, kind, start, "best")]

    unsolved = [not result for result in solved("asymmetric", "as left")]
    what = "seeds that end with the notebooks' share of wrong answers and error, within a pattern and 0.01"
    return [
        count("K9", "", "DEEP, as left: seeds that are right on exclusive or", solved("deep", "as left"), 1),
        count("K9", "", "DEEP, from new states: seeds that are right", solved("deep", "anew"), 1),
        count("K9", "", "asymmetric EP, as left: seeds that are not", unsolved, len(cells)),
        count("K9", "", f"asymmetric EP: {what}", [_as_published(cell["asymmetric"]) for cell in cells], len(cells)),
    ]


def _as_published(result: dict[str, Any]) -> bool:
    share, error = PUBLISHED
    return bool(abs(result["as left"]["last"] - share) <= 0.25 and abs(result["error"] - error) <= 0.01)


def tables(cells: Cells) -> list[Row]:
    """Return a table seed by seed."""

    def row(kind: str, seed: int, result: dict[str, Any]) -> list[str]:
        wrong = [
            text
            for start in ("as left", "anew")
            for text in (f"{result[start]['best']:.2f}", str(result[start]["epoch"]), f"{result[start]['last']:.2f}")
        ]
        return [kind, str(seed), *wrong, f"{result['error']:.3f}", "yes" if result["surely stable"] else "no"]

    note = (
        "Share of wrong answers, the smallest of all epochs with its first epoch and the last one, and whether Gershgorin's "
        "condition (sufficient, not necessary) grants stability at the end. Error is half the mean squared error of the "
        "outputs, as left."
    )
    header = ["network", "seed", "as left", "epoch", "last", "new states", "epoch", "last", "error", "surely stable"]
    rows = [row(kind, seed, cell[kind]) for kind in NETWORKS for seed, cell in enumerate(cells)]
    return [table("Seed by seed", note, header, rows)]


main = SeedStudy(
    "apical_papers.equilibrium.logic",
    ABOUT,
    SETTINGS,
    _cell,
    verdicts,
    tables,
    out="results/ep-logic",
    epochs=200,
    passes="updates of the weights.",
)


if __name__ == "__main__":
    sys.exit(main())
