"""The studies of spiking networks: their verdicts, of made-up numbers."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from apical.rules.contrastive_plasticity.contrastive_signal_plasticity import ContrastiveSignalPlasticity
from apical_papers.spikes import logic, mnist, study

SEEDS = 3


def said(rows: Sequence[dict[str, Any]]) -> list[bool]:
    """Which findings were reproduced."""
    assert {row["verdict"] for row in rows} <= {"reproduced", "not reproduced"}
    return [row["verdict"] == "reproduced" for row in rows]


@pytest.mark.parametrize(
    ("csdp", "gap", "bp", "holds"),
    [
        (0.78, 0.31, 0.78, [True, True, True]),
        (0.77, 0.31, 0.78, [False, True, True]),
        (0.78, 0.30, 0.78, [True, False, True]),
        (0.78, 0.31, 0.77, [True, True, False]),
    ],
)
def test_verdicts_on_a_little_of_mnist_follow_the_worst_seed(csdp: float, gap: float, bp: float, holds: list[bool]) -> None:
    """Every seed is to reach the mark; only contrastive plasticity without options and backpropagation have one."""

    def cell(csdp: float, gap: float, bp: float) -> dict[str, Any]:
        plasticity = {arm: {"accuracy": 0.1, "gap": 0.0, "seconds": 1.0} for arm in study.PLASTICITY}
        first = {arm: {"accuracy": 0.1, "silent": 0.5, "seconds": 1.0} for arm in study.FIRST}
        plasticity["csdp"] |= {"accuracy": csdp, "gap": gap}
        first["bp"] |= {"accuracy": bp}
        return {"plasticity": plasticity, "first": first}

    cells = [cell(0.9, 1.0, 0.9), cell(csdp, gap, bp), cell(0.9, 1.0, 0.9)]
    rows = study.verdicts(cells)
    assert said(rows) == holds
    assert [row["figure"] for row in rows] == ["S1", "S1", "S2"]
    assert [row["mean"] for row in rows] == [SEEDS if each else SEEDS - 1 for each in holds]
    assert {row["mark"] for row in rows} == {"≥ 3 of 3"}
    plasticity, first = study.tables(cells)
    assert [len(plasticity["rows"]), len(first["rows"])] == [len(study.PLASTICITY), len(study.FIRST)]


def test_verdicts_on_logic_follow_the_numbers() -> None:
    """Eight of ten seeds, and as great a share of others; no pass means that a function was not learned."""
    learned = {"context": {"AND": 8, "OR": 7, "XOR": 0}, "answer": {"AND": 10, "OR": 9, "XOR": 8}}
    cells = [
        {
            readout: {name: (40 + seed if seed < number else 0, seed < 2) for name, number in each.items()}
            for readout, each in learned.items()
        }
        for seed in range(10)
    ]
    rows = logic.verdicts(cells)
    assert said(rows) == [True, False, False, True, True, True]
    assert [row["mean"] for row in rows] == [8, 7, 0, 10, 9, 8]
    assert rows[0]["what"] == "AND, readout='context': seeds that learn it"
    assert {row["mark"] for row in rows} == {"≥ 8 of 10"}
    assert said(logic.verdicts([cells[0], cells[0], cells[9]])) == [False, False, False, True, False, False]  # 3 of 3
    context, _ = logic.tables(cells)
    assert context["rows"][1] == ["OR", *(str(40 + seed) for seed in range(7)), "-", "-", "-", "2 of 10"]


@pytest.mark.parametrize(("most", "passes"), [(9, 6), (5, 0)])
@pytest.mark.parametrize("separable", [True, False])
def test_a_function_is_learned_after_three_right_passes_in_a_row(
    monkeypatch: pytest.MonkeyPatch, most: int, passes: int, separable: bool
) -> None:
    script: Iterator[bool] = iter([True, True, False, True, True, True])
    y = torch.tensor(logic.FUNCTIONS["XOR"])

    class Scripted(ContrastiveSignalPlasticity):
        def answer(self, inputs: Tensor) -> Tensor:
            right = torch.eye(2)[y]
            if not next(script):
                right[3] = right[3].flip(0)  # three of four
            return right

        def spikes(self, inputs: Tensor) -> dict[str, Tensor]:
            alone = inputs.clone()  # neurons for each input, from which no read-out tells XOR
            both = inputs.prod(1, keepdim=True)
            return {self.names[0]: torch.cat([alone, both] if separable else [alone, 1 - alone], 1).unsqueeze(0)}

    monkeypatch.setattr(logic, "ContrastiveSignalPlasticity", Scripted)
    assert logic.passes(logic.FUNCTIONS["XOR"], 0, most, "answer") == (passes, separable)


GOOD = {
    "csdp": [0.9, 0.91, 0.92],
    "csdp, read-outs alone": [0.86, 0.87, 0.88],
    "first spikes": [0.94, 0.95, 0.96],
    "bp, 784-256-64-10": [0.97, 0.97, 0.97],
    "bp, 784-340-10": [0.97, 0.97, 0.97],
    "linear": [0.87, 0.88, 0.89],
}


@pytest.mark.parametrize(
    ("arm", "values", "fails"),
    [
        ("bp, 784-340-10", [0.1, 0.1, 0.1], []),
        ("csdp", [0.891, 0.897, 0.904], [0]),
        ("csdp", [0.889, 0.92, 0.93], [0]),  # the worst seed
        ("csdp", [0.95, 0.88, 0.89], [0, 1, 2]),  # and differences too uneven
        ("csdp, read-outs alone", [0.9, 0.91, 0.92], [1]),
        ("csdp, read-outs alone", [0.8, 0.9, 0.93], [1]),  # less on the mean, but the interval holds 0
        ("linear", [0.92, 0.93, 0.94], [2]),
        ("linear", [0.95, 0.96, 0.97], [2, 4]),
        ("first spikes", [0.93, 0.94, 0.949], [3]),
        ("first spikes", [0.929, 0.95, 0.96], [3]),
    ],
)
def test_verdicts_on_mnist_follow_the_numbers(arm: str, values: list[float], fails: list[int]) -> None:
    assert GOOD.keys() == mnist.ARMS.keys()
    cells = [
        {name: {"accuracy": each[seed], "rate": 4e-2, "seconds": 1.0} for name, each in (GOOD | {arm: values}).items()}
        for seed in range(SEEDS)
    ]
    rows = mnist.verdicts(cells)
    assert [i for i, holds in enumerate(said(rows)) if not holds] == fails, rows
    assert [row["figure"] for row in rows] == ["S4", "S4", "S4", "S5", "S5"]


def test_tables_on_mnist_show_chosen_rates_and_distances() -> None:
    """Rates at an end of those tried are not bracketed."""
    cells = [
        {name: {"accuracy": each[0], "rate": mnist.ARMS[name].rates[place], "seconds": 1.0} for name, each in GOOD.items()}
        for place in (0, 2, -1)
    ]
    trainings, distances = mnist.tables(cells)
    assert {row[0]: row[3] for row in trainings["rows"]} == dict.fromkeys(mnist.ARMS, "1 of 3")
    assert trainings["rows"][0][2] == "0.01, 0.04, 0.32"
    assert [row[2].split()[0] for row in distances["rows"]] == ["3.4", "5.48"]
