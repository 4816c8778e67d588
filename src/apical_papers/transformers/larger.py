"""Rules on a decoder of four blocks, width 256: does aligned feedback stay as close to backpropagation in a larger net?

Run `python -m apical_papers.transformers.larger --out results/transformers-language-4x256`. The study of
:mod:`apical_papers.transformers.language` with fewer arms, steps and seeds, as two cores allow for a net of 3.2 million
weights, and one learning rate for all: the best rate for these arms in the smaller model, 0.01, times the ratio of the
widths. In few steps of a wider net, weights grow less, and the angle between feedback and weights decreases less, so product
feedback is mirrored four times as long. Marks were written before this was run, after a pilot of `kp-mirror` only, whose
angle fell from 9 to 8 degrees in 200 steps.
"""

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from apical.bench.finding import Row, at_most
from apical.bench.program import about_study, run_command
from apical_papers.transformers.language import Cells, Options, end_angle, loss_ratio, losses_of, study

ALIGNED = {"kp-mirror": 1.02, "pfa-wide-mirror-160": 1.05}
"""Arms with initially aligned feedback, and the largest ratio of their loss to that of bp."""

DEFAULT = Options(
    Path("results/transformers-language-4x256"),
    seeds=2,
    steps=200,
    width=256,
    blocks=4,
    rates=(1e-2 * 96 / 256,),
    arms=("bp", *ALIGNED, "fa", "head only", "tdca"),
)
ABOUT = about_study(
    "Credit rules on a larger language model",
    "Nats per character of the sources of Python's standard library, on modules that were not trained on.",
    "Marks are those of the smaller model, and were written before the runs. Reproduced means that the mean "
    "reaches the mark; with two seeds no interval is narrow enough to say more.",
)


def verdicts(cells: Cells, counts: Mapping[str, float]) -> list[Row]:
    """Judge whether bp uses context, aligned feedback stays close to it and aligned, and fa is worse."""
    test = partial(losses_of, cells)
    behind = [a - b for a, b in zip(test("kp-mirror"), test("fa"), strict=False)]
    below = [loss - counts["bigram"] for loss in test("bp")]
    return [
        *([at_most("context", "bp", "test loss minus that of the bigram table", below, -0.2)] if below else []),
        *(row for arm, most in ALIGNED.items() for row in loss_ratio(cells, "loss", arm, most)),
        *(row for arm in ALIGNED for row in end_angle(cells, "angle", arm, 15.0)),
        *([at_most("context", "kp-mirror", "test loss minus that of fa", behind, -0.2)] if behind else []),
    ]


main = partial(
    run_command,
    "apical_papers.transformers.larger",
    Options,
    partial(study, about=ABOUT, judge=verdicts),
    default=DEFAULT,
    description=ABOUT["title"],
)


if __name__ == "__main__":
    sys.exit(main())
