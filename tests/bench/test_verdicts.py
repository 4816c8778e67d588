"""Verdicts follow from tolerance and data."""

from typing import Any

import pytest

from apical.bench.report.records import Comparison, Run
from apical.bench.report.verdicts import judge, tally


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


VALIDATED = Run(
    "bp",
    0,
    {},
    {},
    (0, 1, 2, 3),
    (
        {"test_accuracy": 0.1, "test_loss": 2.3, "validation_accuracy": 0.1, "validation_loss": 2.3, "train_loss": None},
        {"test_accuracy": 0.8, "test_loss": 0.9, "validation_accuracy": 0.9, "validation_loss": 0.8, "train_loss": 3e-7},
        {"test_accuracy": 0.7, "test_loss": 0.7, "validation_accuracy": 0.8, "validation_loss": 0.6, "train_loss": 2e-7},
        {"test_accuracy": 0.6, "test_loss": 0.5, "validation_accuracy": 0.95, "validation_loss": 0.7, "train_loss": 1e-7},
    ),
    None,
)


@pytest.mark.parametrize(
    ("metric", "epoch", "select", "split", "expected"),
    [
        ("error", 3, None, "test", 40.0),
        ("loss", 3, None, "test", 0.5),
        ("loss", 3, None, "train", 1e-7),
        ("accuracy", 3, "best-validation", "test", 60.0),
        ("error", 2, "best-validation", "test", 20.0),  # the best of the epochs up to the second
        ("loss", 3, "best-validation", "test", 0.7),  # of the lowest validation loss, not the highest accuracy
        ("loss", 3, "best-validation", "validation", 0.6),
        ("error", 4, "best-validation", "test", None),
    ],
)
def test_errors_losses_and_the_best_validation(
    metric: str, epoch: int, select: str | None, split: str, expected: float | None
) -> None:
    entry = {**number(metric, epoch, expected or 0.0, 1e-3), "split": split, "select": select}
    (row,) = judge(Comparison("", ("bp",), (VALIDATED,), single=False, published={"bp": [entry]}))
    assert row.measured == (None if expected is None else pytest.approx(expected))
    assert row.verdict == ("not run" if expected is None else "reproduced")
    assert row.what.startswith(f"{split} {metric}")
    assert ("best validation" in row.what) == (select is not None)


def test_without_accuracies_the_validation_loss_selects() -> None:
    records = tuple({**record, "validation_accuracy": None} for record in VALIDATED.records)
    run = Run("bp", 0, {}, {}, VALIDATED.epochs, records, None)
    entry = {**number("accuracy", 3, 70.0, 0.1), "select": "best-validation"}
    (row,) = judge(Comparison("", ("bp",), (run,), single=False, published={"bp": [entry]}))
    assert row.measured == pytest.approx(70.0)
    bare = Run("bp", 0, {}, {}, (0, 1, 2, 3), tuple({"test_accuracy": 0.5} for _ in range(4)), None)
    (row,) = judge(Comparison("", ("bp",), (bare,), single=False, published={"bp": [entry]}))
    assert row.verdict == "not run"


def test_an_order_may_be_of_losses() -> None:
    better = Run("dfc", 0, {}, {}, (0, 1), ({"train_loss": None}, {"train_loss": 1e-7}), None)
    claim = {"rule": "bp", "other": "dfc", "epoch": 1, "least": 0.0, "metric": "loss", "split": "train"}
    (row,) = judge(Comparison("", ("bp", "dfc"), (VALIDATED, better), single=False, claims=(claim,)))
    assert row.measured == pytest.approx(2e-7)
    assert (row.verdict, row.what) == ("reproduced", "train loss minus that of dfc")
    assert row.shown(2e-7) == "2e-07"


def test_our_own_numbers_are_not_counted_as_published() -> None:
    ours = {**number("accuracy", 1, 91.0, 1.0), "tag": "ours"}
    rows = judged({"bp": [number("accuracy", 1, 80.0, 1.0), number("accuracy", 40, 98.0, 1.0), ours]})
    assert tally(rows) == (
        "Reproduced: 0 of 1 read off the published curves; 1 of 1 measured with our own prototype, not published."
    )
