"""Published and measured numbers: verdicts are computed here from tolerance and data, never entered by hand."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apical.bench.report.records import Comparison, Run
from apical.bench.statistics import bootstrap


@dataclass(frozen=True)
class Verdict:
    """One published number and the mean over seeds.

    Attributes:
        published: the number; for an order of two rules, the smallest difference.
        tolerance: largest allowed distance of the mean; None for an order.
        tag: source of the number.
        measured: mean over seeds; None if no run reached the epoch.
        spread: standard deviation over seeds; None for fewer than two.
        verdict: "reproduced", "not reproduced" or "not run".
        low, high: bootstrap interval of the mean at 95 %; None for fewer than two seeds.
    """

    rule: str
    what: str
    epoch: int
    published: float
    tolerance: float | None
    tag: str
    measured: float | None
    spread: float | None
    n: int
    verdict: str
    low: float | None = None
    high: float | None = None

    def shown(self, value: float) -> str:
        """Format a value of this quantity: losses with significant digits, the others with two decimals."""
        return f"{value:.4g}" if "loss" in self.what else f"{value:.2f}"


def judge(comparison: Comparison) -> list[Verdict]:
    """Return all published numbers and orders in compare.json, in its order.

    A number has a "metric": "accuracy" or "error" in percent, "loss" (each of a "split", test by default), or "angle" in
    degrees of a "layer". It applies after "epoch" epochs or, with "select": "best-validation", at the epoch up to then with
    the highest validation accuracy (for a loss, or without accuracies: the lowest validation loss).
    """
    rows = [
        _verdict(rule, number, [_measure(run, number) for run in comparison.of(rule)])
        for rule, numbers in comparison.published.items()
        for number in numbers
    ]
    for claim in comparison.claims:
        number = {"metric": "accuracy", **claim}
        first = {run.seed: _measure(run, number) for run in comparison.of(claim["rule"])}
        second = {run.seed: _measure(run, number) for run in comparison.of(claim["other"])}
        pairs = [(first[seed], second.get(seed)) for seed in first]
        rows.append(_verdict(claim["rule"], number, [a - b for a, b in pairs if a is not None and b is not None]))
    return rows


def _measure(run: Run, number: Mapping[str, Any]) -> float | None:
    """Return the run's value of a published quantity: percent, degrees or a loss; None if it was not measured."""
    record = _record(run, number)
    if record is None:
        return None
    metric, split = number["metric"], number.get("split", "test")
    if metric == "loss":
        loss: float | None = record.get(f"{split}_loss")
        return loss
    if metric in ("accuracy", "error"):
        accuracy = record.get(f"{split}_accuracy")
        return None if accuracy is None else 100 * (accuracy if metric == "accuracy" else 1 - accuracy)
    layers = [values.get("weight_alignment") for values in (record.get("layers") or {}).values()]
    angles = [angle for angle in layers if angle is not None]
    if number["layer"] == 0:
        return statistics.mean(angles) if angles else None
    return angles[number["layer"] - 1] if number["layer"] <= len(angles) else None


def _record(run: Run, number: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the metrics of the epoch of a published number; None if the run did not reach it."""
    if number["epoch"] not in run.epochs:
        return None
    records = run.records[: run.epochs.index(number["epoch"]) + 1]
    if number.get("select") is None:
        return records[-1]
    if number["metric"] != "loss":
        candidates = [record for record in records if record.get("validation_accuracy") is not None]
        if candidates:
            return max(candidates, key=lambda record: record["validation_accuracy"])
    candidates = [record for record in records if record.get("validation_loss") is not None]
    return min(candidates, key=lambda record: record["validation_loss"]) if candidates else None


def _what(number: Mapping[str, Any]) -> str:
    """Return a published quantity as text."""
    metric, split = number["metric"], number.get("split", "test")
    if metric == "angle":
        what = "angle of feedback, " + (f"layer {number['layer']}, °" if number["layer"] else "mean over layers, °")
    elif "other" in number:
        what = f"{split} {metric} minus that of {number['other']}" + ("" if metric == "loss" else ", points")
    else:
        what = f"{split} {metric}" + ("" if metric == "loss" else ", %")
    return what + (", at the best validation" if number.get("select") else "")


def _verdict(rule: str, number: Mapping[str, Any], values: Sequence[float | None]) -> Verdict:
    numbers = [value for value in values if value is not None]
    mean = statistics.mean(numbers) if numbers else None
    interval = bootstrap(numbers) if numbers else None
    is_order = "other" in number
    if mean is None:
        verdict = "not run"
    elif is_order:
        verdict = "reproduced" if mean >= number["least"] else "not reproduced"
    else:
        verdict = "reproduced" if abs(mean - number["value"]) <= number["tolerance"] else "not reproduced"
    return Verdict(
        rule=rule,
        what=_what(number),
        epoch=number["epoch"],
        published=number["least"] if is_order else number["value"],
        tolerance=None if is_order else number["tolerance"],
        tag=number.get("tag", "fig") if not is_order else "order",
        measured=mean,
        spread=statistics.stdev(numbers) if len(numbers) > 1 else None,
        n=len(numbers),
        verdict=verdict,
        low=interval.low if interval else None,
        high=interval.high if interval else None,
    )


SOURCES = {
    "paper": "printed in the paper",
    "fig": "read off the published curves",
    "code": "named in the authors' repository, single runs",
    "ours": "measured with our own prototype, not published",
    "order": "orders of two rules",
}


def tally(verdicts: Sequence[Verdict]) -> str:
    """Return how many numbers were reproduced, by source, so that sources are not mixed up.

    >>> row = Verdict("pfa", "angle", 5, 20.3, 1.5, "fig", 20.5, None, 1, "reproduced")
    >>> tally([row])
    'Reproduced: 1 of 1 read off the published curves.'
    """
    parts = []
    for tag in dict.fromkeys(row.tag for row in verdicts):
        outcomes = [row.verdict for row in verdicts if row.tag == tag and row.verdict != "not run"]
        if outcomes:
            parts.append(f"{outcomes.count('reproduced')} of {len(outcomes)} {SOURCES.get(tag, tag)}")
    return f"Reproduced: {'; '.join(parts)}." if parts else "No reference number was reached."
