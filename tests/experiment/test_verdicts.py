"""Verdicts follow from tolerance and data."""

from typing import Any

import pytest

from apical.experiment.report_records import Comparison, Run
from apical.experiment.verdicts import judge, tally


def run(rule: str, seed: int, accuracies: list[float], angles: list[float | None]) -> Run:
    records: list[dict[str, Any]] = [
        {"test_accuracy": value / 100, "layers": {f"layer{i}": {"weight_alignment": a} for i, a in enumerate(angles)}}
        for value in accuracies
    ]
    return Run(rule, seed, {}, {}, tuple(range(len(records))), tuple(records), None)


def number(metric: str, epoch: int, value: float, tolerance: float, layer: int | None = None) -> dict[str, Any]:
    return {
        "metric": metric,
        "epoch": epoch,
        "value": value,
        "tolerance": tolerance,
        "tag": "fig",
        "layer": layer,
        "split": "test",
    }


RUNS = (
    run("bp", 0, [10, 90], []),
    run("bp", 1, [10, 92], []),
    run("pfa", 0, [10, 89], [20.0, 30.0]),
    run("pfa", 1, [10, 90], [22.0, 34.0]),
)


def judged(published: dict[str, list[dict[str, Any]]], claims: tuple[dict[str, Any], ...] = ()) -> list[Any]:
    return judge(Comparison("", ("bp", "pfa"), RUNS, single=False, published=published, claims=claims))


@pytest.mark.parametrize(("value", "verdict"), [(91.9, "reproduced"), (92.1, "not reproduced"), (89.9, "not reproduced")])
def test_a_mean_within_the_tolerance_is_reproduced(value: float, verdict: str) -> None:
    (row,) = judged({"bp": [number("accuracy", 1, value, 1.0)]})
    assert (row.measured, row.n, row.verdict) == (pytest.approx(91.0), 2, verdict)
    assert row.spread == pytest.approx(2**0.5)


def test_an_epoch_that_was_not_reached_is_not_run() -> None:
    (row,) = judged({"bp": [number("accuracy", 40, 98.0, 1.0)]})
    assert (row.measured, row.n, row.verdict) == (None, 0, "not run")


@pytest.mark.parametrize(("layer", "mean"), [(1, 21.0), (2, 32.0), (0, 26.5)])
def test_angles_are_of_one_layer_or_the_mean_over_layers(layer: int, mean: float) -> None:
    (row,) = judged({"pfa": [number("angle", 1, mean, 0.1, layer)]})
    assert (row.measured, row.verdict) == (pytest.approx(mean), "reproduced")


@pytest.mark.parametrize(("least", "verdict"), [(-1.5, "reproduced"), (-1.4, "not reproduced")])
def test_an_order_is_judged_by_the_mean_difference_over_seeds(least: float, verdict: str) -> None:
    (row,) = judged({}, ({"rule": "pfa", "other": "bp", "epoch": 1, "least": least, "split": "test"},))
    assert (row.measured, row.n, row.verdict) == (pytest.approx(-1.5), 2, verdict)


def test_our_own_numbers_are_not_counted_as_published() -> None:
    ours = {**number("accuracy", 1, 91.0, 1.0), "tag": "ours"}
    rows = judged({"bp": [number("accuracy", 1, 80.0, 1.0), number("accuracy", 40, 98.0, 1.0), ours]})
    assert tally(rows) == (
        "Reproduced: 0 of 1 read off the published curves; 1 of 1 measured with our own prototype, not published."
    )
