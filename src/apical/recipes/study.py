"""Studies: the rows of a paper's table or figure, each with its recipe and the numbers it should reproduce."""

from dataclasses import dataclass, replace

from apical.experiment.recipe import Recipe


@dataclass(frozen=True)
class Published:
    """One number to compare with.

    Attributes:
        metric: "accuracy" or "error" in percent, "loss" (of the split in `split`), or "angle" in degrees.
        epoch: after so many epochs.
        value: the number.
        tolerance: how far a reproduction may lie from it.
        tag: "fig", "paper" or "ours".
        layer: number of the layer from the input, for angles; 0 for the mean over layers.
        spread: standard deviation over seeds, where known.
        split: "train", "validation" or "test".
        select: "best-validation" takes the value at the best validation epoch up to `epoch`; None that of `epoch` itself.
    """

    metric: str
    epoch: int
    value: float
    tolerance: float
    tag: str
    layer: int | None = None
    spread: float | None = None
    split: str = "test"
    select: str | None = None


@dataclass(frozen=True)
class Claim:
    """A published order: after `epoch` epochs the metric of `rule` minus that of `other` is at least `least`."""

    rule: str
    other: str
    epoch: int
    least: float
    split: str = "test"
    metric: str = "accuracy"


@dataclass(frozen=True)
class Row:
    """One rule of a study: how to train it and what was published."""

    recipe: Recipe
    published: tuple[Published, ...]


@dataclass(frozen=True)
class Study:
    """A set of comparable rows.

    Attributes:
        title: one line.
        cost: rough cost of one run.
        rows: short name of the rule -> row.
        default: the row of any other rule, without published numbers.
        claims: orders among the rules.
    """

    title: str
    cost: str
    rows: dict[str, Row]
    default: Recipe
    claims: tuple[Claim, ...] = ()

    def row(self, rule: str) -> Row:
        """The row of a rule, or the study's settings for a rule that the study does not have."""
        return self.rows.get(rule) or Row(replace(self.default, rule=rule), ())
