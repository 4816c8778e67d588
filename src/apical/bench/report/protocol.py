"""Uncertainty of a comparison: intervals over seeds, and every rule against backpropagation with the same seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from apical.bench.document import table
from apical.bench.report.records import Comparison, Score
from apical.bench.statistics import Interval, Paired, bootstrap, paired

REFERENCE = "bp"


@dataclass(frozen=True)
class Sureness:
    """One rule's final score over its finished seeds.

    Attributes:
        score: mean with its interval, in percent for an accuracy.
        against: score minus that of backpropagation, over common seeds; None for backpropagation itself or without it.
    """

    rule: str
    score: Interval
    against: Paired | None

    def record(self) -> dict[str, Any]:
        """Return the content for statistics.json."""
        record: dict[str, Any] = {"rule": self.rule, **self.score._asdict()}
        if self.against is not None:
            record |= {f"difference_{key}": value for key, value in self.against.difference._asdict().items()}
            record["p_sign_flip"] = self.against.p
        return record


def sureness(comparison: Comparison) -> list[Sureness]:
    """Return every rule with a finished run, in the comparison's order."""
    score = comparison.score
    finals = {
        rule: {run.seed: score.scale * run.final(score.key) for run in comparison.of(rule) if run.finished}
        for rule in comparison.rules
    }
    finals = {rule: {seed: value for seed, value in by_seed.items() if value == value} for rule, by_seed in finals.items()}
    reference = finals.get(REFERENCE, {})
    return [
        Sureness(rule, bootstrap(list(by_seed.values())), paired(by_seed, reference) if rule != REFERENCE else None)
        for rule, by_seed in finals.items()
        if by_seed
    ]


def section(rows: Sequence[Sureness], score: Score) -> str:
    """Return this section of the report; nothing for single seeds."""
    if max((row.score.n for row in rows), default=0) < 2:
        return ""
    places = 4 if score.is_loss else 2
    unit = "" if score.is_loss else ", %"
    heads = ("Rule", f"{score.name.capitalize()}{unit}, mean [95 % interval]", "n", "Minus bp, same seeds", "p", "n")
    lines = []
    for row in rows:
        cells, beside = [row.rule, row.score.shown(places), str(row.score.n)], ["-"] * 3
        if row.against is not None:
            difference, p = row.against.difference, row.against.p
            beside = [difference.shown(places), f"{p:.2g}", str(difference.n)]
        lines.append([*cells, *beside])
    return f"""<h2>How sure is that?</h2>
{table(heads, lines)}
<p class="note">Percentile bootstrap over seeds (all resamples up to six, 10,000 beyond); with few seeds these intervals are
too narrow. p: two-sided sign-flip test of the differences with equal seeds; n seeds cannot give less than 2 / 2<sup>n</sup>,
so three seeds never show a difference by this test alone. No correction for the number of rules.</p>
"""
